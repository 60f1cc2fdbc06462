//! The order between requests that change the same bytes: rule 1 of docs/internals/rules.md, "no ghosts".
//!
//! Of two overlapping writes (write, write zeroes, unmap) the older one never takes effect after the newer one was answered. So a
//! newer one waits while an older one is unanswered, wherever that is: staged, queued, in a call, in a ring, waiting for a retry,
//! gathered as a discard.
//!
//! Two parts know who is unanswered:
//! - [`Claims`] counts them by block, lock-free, from the moment of submission. A write whose blocks nobody else has claimed may go
//!   straight to a ring; that costs one atomic addition a block. Counters are shared by blocks far apart, so a claim can only say
//!   "nobody" or "perhaps somebody".
//! - [`Order`] belongs to the scheduler, under its lock, and knows ranges exactly, of those that have arrived there. What is claimed
//!   and not known there is in a ring or on its way.

use super::rules::{Rule, keeps};
use crate::os::clock::Ticks;
use std::sync::atomic::{AtomicU32, Ordering};

/// Counters of a file. Blocks that are `BUCKETS` apart may share one: with 128 random writes in flight 0.4 % of them meet a stranger
/// there, and take the way through the scheduler for nothing.
const BUCKETS: usize = 1 << 15;
/// A range of more blocks is not counted block by block. It waits until no ring has a write.
const LARGE_BLOCKS: u64 = 1024;

/// A range of the file that a request changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start_bytes: u64,
    /// First byte behind it.
    pub end_bytes: u64,
}

impl Span {
    fn overlaps(&self, other: &Span) -> bool {
        self.start_bytes < other.end_bytes && other.start_bytes < self.end_bytes
    }

    fn blocks(&self, shift: u32) -> std::ops::RangeInclusive<u64> {
        (self.start_bytes >> shift)..=(self.end_bytes.saturating_sub(1).max(self.start_bytes) >> shift)
    }

    fn is_large(&self, shift: u32) -> bool {
        let blocks = self.blocks(shift);
        blocks.end() - blocks.start() >= LARGE_BLOCKS
    }
}

/// Neighbours have different buckets, but for where a run of `BUCKETS` ends.
fn bucket(block: u64) -> usize {
    let run = (block / BUCKETS as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (block.wrapping_add(run) % BUCKETS as u64) as usize
}

/// How many unanswered writes each block has. One for each file; used by all threads.
#[derive(Debug)]
pub struct Claims {
    shift: u32,
    counts: Box<[AtomicU32]>,
    large: AtomicU32,
    /// Writes that wait in the scheduler for others to be answered.
    waiting: AtomicU32,
}

impl Claims {
    /// None yet, for a file that is used in blocks of `block_bytes` (a power of two).
    pub fn new(block_bytes: u32) -> Self {
        Claims {
            shift: block_bytes.max(512).ilog2(),
            counts: std::iter::repeat_with(AtomicU32::default).take(BUCKETS).collect(),
            large: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
        }
    }

    /// Notes a write that was submitted. Whether nobody else has claimed any of its blocks: then it may start at once. Otherwise it
    /// has to go to the scheduler; its claim stays, too.
    // SeqCst: of two that claim at the same time at least one sees the other, also when one of them is large.
    pub fn claim(&self, span: Span) -> bool {
        if span.is_large(self.shift) {
            self.large.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        let mut alone = true;
        for block in span.blocks(self.shift) {
            let before = self.counts[bucket(block)].fetch_add(1, Ordering::SeqCst);
            alone &= before == 0;
        }
        alone && self.large.load(Ordering::SeqCst) == 0 || !keeps(Rule::NoGhosts)
    }

    /// The write can have no more effect. Whether somebody waits for that in the scheduler, and has to be told.
    pub fn release(&self, span: Span) -> bool {
        if span.is_large(self.shift) {
            self.large.fetch_sub(1, Ordering::SeqCst);
        } else {
            for block in span.blocks(self.shift) {
                let before = self.counts[bucket(block)].fetch_sub(1, Ordering::SeqCst);
                debug_assert!(before > 0, "a claim was given back twice");
            }
        }
        // After the counters. `set_waiting` comes before a look at them: one of the two sees the other.
        self.waiting.load(Ordering::SeqCst) != 0
    }

    fn set_waiting(&self, count: usize) {
        self.waiting.store(count as u32, Ordering::SeqCst);
    }

    fn count(&self, bucket: usize) -> u32 {
        self.counts[bucket].load(Ordering::SeqCst)
    }
}

/// A place in an [`Order`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u32);

#[derive(Debug, Clone, Copy)]
struct Entry {
    span: Span,
    /// Older first; numbers in the order of arrival for those of one instant.
    age: (Ticks, u64),
    /// It is in a lane, or further.
    started: bool,
    /// It has failed and is tried again.
    retried: bool,
}

/// The unanswered writes of a volume that have arrived in the scheduler.
pub struct Order {
    shift: u32,
    /// Of the counts in [`Claims`], those of the writes in here.
    known: Box<[u32]>,
    known_large: u32,
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    arrivals: u64,
    retried: usize,
}

impl Order {
    /// Of a file with these claims.
    pub fn new(claims: &Claims) -> Self {
        Order {
            shift: claims.shift,
            known: vec![0; BUCKETS].into_boxed_slice(),
            known_large: 0,
            entries: Vec::with_capacity(1024),
            free: Vec::with_capacity(1024),
            arrivals: 0,
            retried: 0,
        }
    }

    /// Takes in a write that has its claim, submitted at `submitted`.
    pub fn enter(&mut self, span: Span, submitted: Ticks) -> Ticket {
        self.arrivals += 1;
        let entry = Entry { span, age: (submitted, self.arrivals), started: false, retried: false };
        if span.is_large(self.shift) {
            self.known_large += 1;
        } else {
            span.blocks(self.shift).for_each(|block| self.known[bucket(block)] += 1);
        }
        let at = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        self.entries[at as usize] = Some(entry);
        Ticket(at)
    }

    /// It can have no more effect. Whether somebody may wait for that.
    pub fn leave(&mut self, ticket: Ticket, claims: &Claims) -> bool {
        let entry = self.entries[ticket.0 as usize].take().expect("a write leaves once");
        self.free.push(ticket.0);
        self.retried -= usize::from(entry.retried);
        if entry.span.is_large(self.shift) {
            self.known_large -= 1;
        } else {
            entry.span.blocks(self.shift).for_each(|block| self.known[bucket(block)] -= 1);
        }
        // After what is known: nobody may take this claim for one that is not.
        claims.release(entry.span)
    }

    /// Whether it may start now; if so it counts as started.
    pub fn start(&mut self, ticket: Ticket, claims: &Claims) -> bool {
        let entry = *self.entry(ticket);
        let free = entry.started
            || !(self.meets_unknown(&entry.span, claims) || self.meets_known(ticket, &entry))
            || !keeps(Rule::NoGhosts);
        self.entry(ticket).started = free;
        free
    }

    fn entry(&mut self, ticket: Ticket) -> &mut Entry {
        self.entries[ticket.0 as usize].as_mut().expect("a ticket is valid until its write leaves")
    }

    /// Whether a write that is not in here, but in a ring or on its way, may overlap.
    fn meets_unknown(&self, span: &Span, claims: &Claims) -> bool {
        let is_unknown = |bucket: usize| claims.count(bucket) != self.known[bucket];
        if claims.large.load(Ordering::SeqCst) != self.known_large {
            return true;
        }
        if span.is_large(self.shift) {
            return (0..BUCKETS).any(is_unknown);
        }
        span.blocks(self.shift).any(|block| is_unknown(bucket(block)))
    }

    /// Whether a write in here has to end first: it overlaps, and has started or is older.
    fn meets_known(&self, ticket: Ticket, entry: &Entry) -> bool {
        let alone = self.known_large == 0 && entry.span.blocks(self.shift).all(|block| self.known[bucket(block)] == 1);
        if alone {
            return false;
        }
        self.entries.iter().enumerate().any(|(at, other)| {
            other.as_ref().is_some_and(|other| {
                at as u32 != ticket.0 && other.span.overlaps(&entry.span) && (other.started || other.age < entry.age)
            })
        })
    }

    /// Notes that it has failed and is tried again.
    pub fn retry(&mut self, ticket: Ticket) {
        let entry = self.entry(ticket);
        if !std::mem::replace(&mut entry.retried, true) {
            self.retried += 1;
        }
    }

    /// When the oldest of those that are tried again was submitted: a newer flush waits for it (rule 4).
    pub fn oldest_retried(&self) -> Option<Ticks> {
        if self.retried == 0 {
            return None;
        }
        self.entries.iter().flatten().filter(|entry| entry.retried).map(|entry| entry.age.0).min()
    }

    /// Says how many writes wait in the scheduler. Before a look at whether they still have to.
    pub fn set_waiting(&self, count: usize, claims: &Claims) {
        claims.set_waiting(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(start: u64, blocks: u64) -> Span {
        Span { start_bytes: start * 4096, end_bytes: (start + blocks) * 4096 }
    }

    #[test]
    fn the_newer_of_two_waits_for_the_older() {
        let claims = Claims::new(4096);
        let mut order = Order::new(&claims);
        assert!(claims.claim(span(0, 4)));
        let old = order.enter(span(0, 4), 10);
        assert!(order.start(old, &claims));
        assert!(!claims.claim(span(3, 4)), "it shares a block");
        let new = order.enter(span(3, 4), 20);
        assert!(!order.start(new, &claims));
        assert!(claims.claim(span(8, 1)), "a neighbour does not");
        order.retry(old);
        assert_eq!(order.oldest_retried(), Some(10));
        order.set_waiting(1, &claims);
        assert!(order.leave(old, &claims), "somebody waits");
        assert!(order.start(new, &claims) && order.oldest_retried().is_none());
        order.leave(new, &claims);
        claims.release(span(8, 1));
    }

    #[test]
    fn one_that_is_on_its_way_is_waited_for_and_then_goes_first() {
        let claims = Claims::new(4096);
        let mut order = Order::new(&claims);
        assert!(claims.claim(span(5, 1)), "staged, or in a ring");
        assert!(!claims.claim(span(5, 1)));
        let new = order.enter(span(5, 1), 20);
        assert!(!order.start(new, &claims), "the other one is not known here");
        let old = order.enter(span(5, 1), 10);
        assert!(!order.start(new, &claims) && order.start(old, &claims));
        order.leave(old, &claims);
        assert!(order.start(new, &claims));
        order.leave(new, &claims);
    }

    #[test]
    fn a_large_one_waits_for_rings_and_keeps_only_those_off_that_overlap() {
        let claims = Claims::new(4096);
        let mut order = Order::new(&claims);
        assert!(claims.claim(span(1 << 20, 1)));
        assert!(!claims.claim(span(0, 5000)));
        let large = order.enter(span(0, 5000), 10);
        assert!(!order.start(large, &claims));
        claims.release(span(1 << 20, 1));
        assert!(order.start(large, &claims));
        assert!(!claims.claim(span(6000, 1)) && !claims.claim(span(4999, 1)), "both ask the scheduler");
        let (apart, inside) = (order.enter(span(6000, 1), 20), order.enter(span(4999, 1), 20));
        assert!(order.start(apart, &claims) && !order.start(inside, &claims));
        for ticket in [large, apart, inside] {
            order.leave(ticket, &claims);
        }
    }

    proptest! {
        /// Against a plain list: whoever starts overlaps nobody that has started, and nobody older that is unanswered.
        #[test]
        fn no_two_that_overlap_run_at_once(writes in prop::collection::vec((0u64..64, 1u64..8, any::<bool>()), 1..60)) {
            let claims = Claims::new(4096);
            let mut order = Order::new(&claims);
            let (mut waiting, mut running) = (Vec::<(Ticket, Span)>::new(), Vec::<(Ticket, Span)>::new());
            for (now, (start, blocks, ends)) in writes.into_iter().enumerate() {
                let span = span(start, blocks);
                claims.claim(span);
                waiting.push((order.enter(span, now as u64), span));
                if ends && !running.is_empty() {
                    let (ticket, _) = running.remove(now % running.len());
                    order.leave(ticket, &claims);
                }
                let mut index = 0;
                while index < waiting.len() {
                    let (ticket, span) = waiting[index];
                    let expected = !running.iter().chain(&waiting[..index]).any(|(_, other)| other.overlaps(&span));
                    prop_assert_eq!(order.start(ticket, &claims), expected);
                    if expected { running.push(waiting.remove(index)) } else { index += 1 }
                }
            }
            for (ticket, _) in running.into_iter().chain(waiting) {
                order.leave(ticket, &claims);
            }
            prop_assert!((0..BUCKETS).all(|bucket| claims.count(bucket) == 0 && order.known[bucket] == 0));
        }
    }
}
