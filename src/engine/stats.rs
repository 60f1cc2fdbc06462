//! Counters that cost an I/O a few instructions: written by one thread, read by whoever asks.

use super::request::Op;
use crate::os::clock::{self, Ticks};
use std::sync::atomic::{AtomicU64, Ordering};

/// Sub-buckets to a power of two: percentiles are right to within 12.5 %.
const SUB_BITS: u32 = 3;
const BUCKETS: usize = ((64 - SUB_BITS) << SUB_BITS) as usize;

/// A latency histogram with logarithmic buckets, in ticks.
struct Histogram {
    buckets: Box<[AtomicU64]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: std::iter::repeat_with(AtomicU64::default).take(BUCKETS).collect() }
    }
}

fn bucket(ticks: Ticks) -> usize {
    let sub = 1 << SUB_BITS;
    if ticks < sub {
        return ticks as usize;
    }
    let shift = ticks.ilog2() - SUB_BITS;
    ((u64::from(shift) << SUB_BITS) + (ticks >> shift)) as usize
}

fn upper_bound(bucket: usize) -> Ticks {
    let (sub, bucket) = (1u64 << SUB_BITS, bucket as u64);
    if bucket < sub {
        return bucket;
    }
    let shift = (bucket >> SUB_BITS) - 1;
    (((bucket & (sub - 1)) + sub + 1) << shift) - 1
}

/// Adds without an atomic read-modify-write: every counter has one writer.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

#[derive(Default)]
struct Kind {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    ticks: AtomicU64,
    max_ticks: AtomicU64,
    histogram: Histogram,
}

/// The counters of one device on one thread.
#[derive(Default)]
pub struct Counters {
    kinds: [Kind; OPS.len()],
    /// I/O submitted and not yet completed.
    in_flight: AtomicU64,
    last_errno: AtomicU64,
}

/// Every operation, in the order of the counters, with its name on the wire.
pub const OPS: [(Op, &str); 5] = [
    (Op::Read, "read"),
    (Op::Write, "write"),
    (Op::Flush, "flush"),
    (Op::Unmap, "unmap"),
    (Op::WriteZeroes, "write_zeroes"),
];

impl Counters {
    /// Notes a submission.
    pub fn submitted(&self) {
        add(&self.in_flight, 1);
    }

    /// Notes a completion.
    pub fn completed(&self, op: Op, len_bytes: u64, result: Result<(), i32>, took: Ticks) {
        add(&self.in_flight, 1u64.wrapping_neg());
        let kind = &self.kinds[op as usize];
        add(&kind.count, 1);
        match result {
            // A flush comes with the range of the whole device, and moves nothing.
            Ok(()) if op == Op::Flush => {}
            Ok(()) => add(&kind.bytes, len_bytes),
            Err(errno) => {
                add(&kind.errors, 1);
                self.last_errno.store(errno as u64, Ordering::Relaxed);
            }
        }
        add(&kind.ticks, took);
        if took > kind.max_ticks.load(Ordering::Relaxed) {
            kind.max_ticks.store(took, Ordering::Relaxed);
        }
        add(&kind.histogram.buckets[bucket(took)], 1);
    }

    /// I/O submitted and not yet completed, on this thread.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }
}

/// Sums of one operation.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// I/O completed, failed ones included.
    pub count: u64,
    /// Bytes moved by those that succeeded.
    pub bytes: u64,
    /// Failures.
    pub errors: u64,
    /// Latencies of all together.
    pub total_ns: u64,
    /// Mean latency.
    pub mean_ns: u64,
    /// Half were faster.
    pub p50_ns: u64,
    /// 99 of 100 were faster.
    pub p99_ns: u64,
    /// 999 of 1000 were faster.
    pub p999_ns: u64,
    /// The slowest.
    pub max_ns: u64,
    /// How many took at most so long and longer than the one before, shortest first; only where there are some.
    pub histogram: Vec<(u64, u64)>,
}

/// The sums over several threads' counters of one device, by operation as in [`OPS`].
pub fn summarize<'a>(counters: impl Iterator<Item = &'a Counters> + Clone) -> [Summary; OPS.len()] {
    std::array::from_fn(|op| {
        let kinds = counters.clone().map(|c| &c.kinds[op]);
        let sum = |field: fn(&Kind) -> &AtomicU64| {
            kinds.clone().fold(0u64, |sum, kind| sum.wrapping_add(field(kind).load(Ordering::Relaxed)))
        };
        let mut buckets = vec![0u64; BUCKETS];
        for kind in kinds.clone() {
            for (sum, bucket) in buckets.iter_mut().zip(&kind.histogram.buckets) {
                *sum += bucket.load(Ordering::Relaxed);
            }
        }
        let total: u64 = buckets.iter().sum();
        let max = kinds.clone().map(|k| k.max_ticks.load(Ordering::Relaxed)).max().unwrap_or(0);
        let percentile = |per_mille: u64| {
            let rank = (total * per_mille).div_ceil(1000).max(1);
            let mut seen = 0;
            let at = buckets.iter().position(|n| {
                seen += n;
                seen >= rank
            });
            clock::to_nanos(at.map_or(0, upper_bound).min(max))
        };
        let (count, ticks) = (sum(|k| &k.count), sum(|k| &k.ticks));
        let filled = buckets.iter().enumerate().filter(|(_, n)| **n > 0);
        Summary {
            count,
            bytes: sum(|k| &k.bytes),
            errors: sum(|k| &k.errors),
            total_ns: clock::to_nanos(ticks),
            mean_ns: clock::to_nanos(ticks / count.max(1)),
            p50_ns: percentile(500),
            p99_ns: percentile(990),
            p999_ns: percentile(999),
            max_ns: clock::to_nanos(max),
            histogram: filled.map(|(bucket, &n)| (clock::to_nanos(upper_bound(bucket)), n)).collect(),
        }
    })
}

/// The errno of the newest failure known to one of `counters`, or 0.
pub fn last_errno<'a>(counters: impl Iterator<Item = &'a Counters>) -> i32 {
    counters.map(|c| c.last_errno.load(Ordering::Relaxed) as i32).find(|&errno| errno != 0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_what_lies_below_its_bound(ticks in 0u64..u64::MAX / 2) {
            let b = bucket(ticks);
            prop_assert!(b < BUCKETS && ticks <= upper_bound(b));
            prop_assert!(b == 0 || ticks > upper_bound(b - 1));
            prop_assert!(upper_bound(b) as f64 <= ticks as f64 * 1.126 + 1.0);
        }
    }

    #[test]
    fn sums_over_threads() {
        let (a, b) = (Counters::default(), Counters::default());
        for _ in 0..99 {
            a.submitted();
            a.completed(Op::Read, 4096, Ok(()), clock::to_ticks(std::time::Duration::from_micros(10)));
        }
        b.submitted();
        b.completed(Op::Read, 4096, Err(libc::EIO), clock::to_ticks(std::time::Duration::from_millis(1)));
        b.submitted();
        let sums = summarize([&a, &b].into_iter());
        assert_eq!((sums[0].count, sums[0].bytes, sums[0].errors), (100, 99 * 4096, 1));
        assert!((9_000..12_000).contains(&sums[0].p50_ns) && (9_000..12_000).contains(&sums[0].p99_ns));
        assert!((900_000..1_150_000).contains(&sums[0].p999_ns) && (15_000..25_000).contains(&sums[0].mean_ns));
        let counts: Vec<u64> = sums[0].histogram.iter().map(|(_, n)| *n).collect();
        assert!(counts == [99, 1] && sums[0].histogram[0].0 == sums[0].p50_ns, "{:?}", sums[0]);
        assert!((1_980_000..2_000_000).contains(&sums[0].total_ns), "{:?}", sums[0]);
        assert_eq!((sums[1].count, b.in_flight(), last_errno([&a, &b].into_iter())), (0, 1, libc::EIO));
    }
}
