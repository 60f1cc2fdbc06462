//! What devices do at the moment: the difference between two samples of their counters.

use crate::stat::{self, DeviceStats, OpStats, Stats};
use crate::table::{self, Align};

/// What happened to one operation between two samples.
#[derive(Debug, Default, Clone, PartialEq)]
struct Interval {
    ops: u64,
    bytes: u64,
    errors: u64,
    total_us: f64,
    histogram: Vec<(f64, u64)>,
}

impl Interval {
    /// `None` when `now` is less than `before`: it is another device of the same name.
    fn between(before: &OpStats, now: &OpStats) -> Option<Interval> {
        let mut histogram = now.histogram.clone();
        for &(upper_us, count) in &before.histogram {
            let bucket = histogram.iter_mut().find(|(upper, _)| *upper == upper_us)?;
            bucket.1 = bucket.1.checked_sub(count)?;
        }
        histogram.retain(|(_, count)| *count > 0);
        Some(Interval {
            ops: now.ops.checked_sub(before.ops)?,
            bytes: now.bytes.checked_sub(before.bytes)?,
            errors: now.errors.checked_sub(before.errors)?,
            total_us: now.latency_us.total - before.latency_us.total,
            histogram,
        })
    }

    /// So many of 1000 took at most as long.
    fn percentile_us(&self, per_mille: u64) -> Option<f64> {
        let total: u64 = self.histogram.iter().map(|(_, count)| count).sum();
        let rank = (total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        let bucket = self.histogram.iter().find(|(_, count)| {
            seen += count;
            seen >= rank
        });
        bucket.map(|(upper_us, _)| *upper_us)
    }

    fn mean_us(&self) -> Option<f64> {
        (self.ops > 0).then(|| self.total_us.max(0.0) / self.ops as f64)
    }
}

/// The earlier sample, and how many seconds ago it was.
pub type Before<'a> = Option<(&'a Stats, f64)>;

/// Rates, latencies and depths since the earlier sample. Operations that a device has never done are left out.
pub fn shown(stats: &Stats, before: Before) -> String {
    stat::framed(stats, &|device| device_shown(device, before))
}

fn device_shown(device: &DeviceStats, before: Before) -> String {
    let before = before.filter(|(_, seconds)| *seconds > 0.0).and_then(|(stats, seconds)| {
        stats.devices.iter().find(|before| before.name == device.name).map(|before| (before, seconds))
    });
    let titles = ["IOPS", "MiB/s", "DEPTH", "MEAN", "P50", "P99", "ERRORS", "OPS SO FAR"];
    let mut columns = vec![("OPERATION", Align::Left)];
    columns.extend(titles.map(|title| (title, Align::Right)));
    let mut rows = Vec::new();
    for name in device.io.keys() {
        let now = device.op(name);
        if now.ops == 0 && !matches!(name.as_str(), "read" | "write") {
            continue;
        }
        let interval = before.and_then(|(before, seconds)| {
            Interval::between(&before.op(name), &now).map(|interval| (interval, seconds))
        });
        rows.push(row(name, interval, now.ops));
    }
    device.state_shown() + &table::table(&columns, &rows) + &device.lanes_shown()
}

fn row(name: &str, interval: Option<(Interval, f64)>, ops_so_far: u64) -> Vec<String> {
    let dash = || "-".to_owned();
    let mut row = vec![name.to_owned()];
    match interval {
        None => row.extend(std::iter::repeat_with(dash).take(7)),
        Some((interval, seconds)) => {
            let latency = |us: Option<f64>| us.map_or_else(dash, stat::duration);
            row.push(format!("{:.0}", interval.ops as f64 / seconds));
            row.push(format!("{:.1}", interval.bytes as f64 / f64::from(1 << 20) / seconds));
            // As many were under way on average as microseconds of waiting came together in one.
            row.push(format!("{:.1}", interval.total_us.max(0.0) / (seconds * 1e6)));
            row.extend([interval.mean_us(), interval.percentile_us(500), interval.percentile_us(990)].map(latency));
            row.push(interval.errors.to_string());
        }
    }
    row.push(ops_so_far.to_string());
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stat::tests::sample;

    fn read_row(now: &Stats, before: Before) -> Vec<String> {
        let text = shown(now, before);
        text.lines()
            .nth(2)
            .unwrap()
            .split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn rates_of_an_interval() {
        let (before, now) = (sample(1000, 1 << 20), sample(3000, 6 << 20));
        let row = read_row(&now, Some((&before, 2.0)));
        assert_eq!(row, ["read", "1000", "2.5", "0.1", "148 us", "99.0 us", "1.6 ms", "0", "3000"]);
        let unknown = ["read", "-", "-", "-", "-", "-", "-", "-", "3000"];
        assert_eq!(read_row(&now, None), unknown);
        assert_eq!(read_row(&now, Some((&Stats::default(), 2.0))), unknown, "attached since");
        assert_eq!(read_row(&now, Some((&sample(9000, 1), 2.0))), unknown, "attached anew");
        assert_eq!(read_row(&now, Some((&before, 0.0))), unknown);
        assert_eq!(read_row(&now, Some((&now, 1.0))), ["read", "0", "0.0", "0.0", "-", "-", "-", "0", "3000"]);
    }

    #[test]
    fn what_never_happened_is_left_out() {
        let text = shown(&sample(1, 1), None);
        assert!(text.contains("read") && !text.contains("flush") && text.contains("OST"), "{text}");
    }

    #[test]
    fn percentiles_of_an_interval() {
        let op = |histogram: &[(f64, u64)]| OpStats {
            ops: histogram.iter().map(|(_, n)| n).sum(),
            histogram: histogram.to_vec(),
            ..OpStats::default()
        };
        // Slow once, long ago: that is not what it is like now.
        let before = op(&[(10.0, 100), (1e6, 100)]);
        let now = op(&[(10.0, 199), (50.0, 1), (1e6, 100)]);
        let interval = Interval::between(&before, &now).unwrap();
        assert_eq!((interval.percentile_us(500), interval.percentile_us(990)), (Some(10.0), Some(10.0)));
        assert_eq!(interval.percentile_us(999), Some(50.0));
        assert_eq!(Interval::between(&now, &before), None);
        assert_eq!(Interval::default().percentile_us(500), None);
    }
}
