//! Counters in Prometheus' text format, version 0.0.4.

use crate::client::Client;
use crate::error::Result;
use crate::stat::{self, DeviceStats, OpStats, Stats};
use std::fmt::Write;

/// Upper bounds of the latency histogram, in microseconds with their names in seconds. They are always the same: what is
/// collected over time, and from several targets, can be put together.
const BOUNDS: [(f64, &str); 19] = [
    (10.0, "0.00001"),
    (20.0, "0.00002"),
    (50.0, "0.00005"),
    (100.0, "0.0001"),
    (200.0, "0.0002"),
    (500.0, "0.0005"),
    (1e3, "0.001"),
    (2e3, "0.002"),
    (5e3, "0.005"),
    (1e4, "0.01"),
    (2e4, "0.02"),
    (5e4, "0.05"),
    (1e5, "0.1"),
    (2e5, "0.2"),
    (5e5, "0.5"),
    (1e6, "1"),
    (5e6, "5"),
    (3e7, "30"),
    (3e8, "300"),
];

/// Asks the target for the counters of a device, or of all.
///
/// # Errors
/// As [`Client::call`].
pub fn collect(client: &mut Client, name: Option<&str>) -> Result<String> {
    Ok(exposition(&stat::read(&stat::ask(client, name, true)?)?))
}

/// That there is no target to ask.
pub fn down() -> String {
    let mut text = String::new();
    family(&mut text, "lloop_up", "gauge", UP_HELP, [(String::new(), "0".to_owned())]);
    text
}

const UP_HELP: &str = "Whether the target answers.";

/// A family of samples: its help, its type, and a line for each set of labels. Nothing where there are no samples.
fn family(text: &mut String, name: &str, kind: &str, help: &str, samples: impl IntoIterator<Item = (String, String)>) {
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return;
    }
    // (Writing to a String does not fail.)
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

/// `{name="value",...}`
fn labels(pairs: &[(&str, &str)]) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

/// All counters.
fn exposition(stats: &Stats) -> String {
    let mut text = String::new();
    let bare = |n: u64| [(String::new(), n.to_string())];
    family(&mut text, "lloop_up", "gauge", UP_HELP, bare(1));
    let workers = &stats.workers;
    family(&mut text, "lloop_workers_started", "gauge", "Worker threads of the target.", bare(workers.started));
    family(
        &mut text,
        "lloop_workers_active",
        "gauge",
        "Worker threads that are not waiting for work.",
        bare(workers.active),
    );
    family(&mut text, "lloop_rings", "gauge", "io_urings of the target, one a thread.", bare(stats.rings.open));
    family(
        &mut text,
        "lloop_sqpoll_ops_total",
        "counter",
        "I/O that threads of the kernel have submitted for busy reactors.",
        bare(stats.rings.sqpoll_ops),
    );
    family(
        &mut text,
        "lloop_stuck_threads",
        "gauge",
        "File operations that have timed out and still wait for a server.",
        bare(stats.stuck_threads),
    );
    devices(&mut text, stats);
    lanes(&mut text, stats);
    operations(&mut text, stats);
    text
}

/// Microseconds as seconds, exactly.
fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}

fn devices(text: &mut String, stats: &Stats) {
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&DeviceStats) -> String| {
        let samples = stats.devices.iter().map(|device| (labels(&[("device", &device.name)]), value(device)));
        family(text, name, "gauge", help, samples);
    };
    gauge("lloop_in_flight", "I/O submitted and not yet completed.", &|device| device.in_flight.to_string());
    gauge("lloop_queued", "I/O that waits for a worker.", &|device| device.queued.to_string());
    gauge("lloop_calls_running", "System calls that workers are in.", &|device| device.calls_running.to_string());
    gauge("lloop_oldest_io_seconds", "Age of the oldest I/O in flight; 0 without one.", &|device| {
        seconds(device.oldest_io_us)
    });
    gauge("lloop_last_errno", "The errno of the newest failure; 0 without one.", &|device| {
        device.last_errno.to_string()
    });
    let states = stats
        .devices
        .iter()
        .map(|device| (labels(&[("device", &device.name), ("state", &device.state)]), "1".to_owned()));
    family(text, "lloop_state", "gauge", "1 for the state that the device is in.", states);
}

fn lanes(text: &mut String, stats: &Stats) {
    let lanes: Vec<_> =
        stats.devices.iter().flat_map(|device| device.lanes.iter().map(move |lane| (device, lane))).collect();
    let of = |value: &dyn Fn(&stat::LaneStats) -> String| -> Vec<(String, String)> {
        lanes
            .iter()
            .filter(|(_, lane)| !lane.ost.is_null())
            .map(|(device, lane)| (labels(&[("device", &device.name), ("ost", &lane.ost_shown())]), value(lane)))
            .collect()
    };
    family(
        text,
        "lloop_ost_queued",
        "gauge",
        "I/O to an OST that waits for a worker.",
        of(&|lane| lane.queued.to_string()),
    );
    let running = of(&|lane| lane.calls_running.to_string());
    family(text, "lloop_ost_calls_running", "gauge", "System calls to an OST that workers are in.", running);
    let oldest = of(&|lane| seconds(lane.oldest_io_us));
    family(text, "lloop_ost_oldest_io_seconds", "gauge", "Age of the oldest I/O to an OST; 0 without one.", oldest);
}

fn operations(text: &mut String, stats: &Stats) {
    let ops: Vec<(&DeviceStats, &String, OpStats)> = stats
        .devices
        .iter()
        .flat_map(|device| device.io.keys().map(move |name| (device, name, device.op(name))))
        .collect();
    let mut counter = |name: &str, help: &str, value: &dyn Fn(&OpStats) -> u64| {
        let samples = ops
            .iter()
            .map(|(device, op, stats)| (labels(&[("device", &device.name), ("op", op)]), value(stats).to_string()));
        family(text, name, "counter", help, samples);
    };
    counter("lloop_operations_total", "I/O completed, failed ones included.", &|op| op.ops);
    counter("lloop_bytes_total", "Bytes moved by I/O that succeeded.", &|op| op.bytes);
    counter("lloop_errors_total", "I/O that failed.", &|op| op.errors);
    histograms(text, &ops);
}

fn histograms(text: &mut String, ops: &[(&DeviceStats, &String, OpStats)]) {
    const NAME: &str = "lloop_latency_seconds";
    if ops.is_empty() {
        return;
    }
    let help = "How long I/O took, from submission to completion (bounds are right to within 12.5 %).";
    let _ = writeln!(text, "# HELP {NAME} {help}\n# TYPE {NAME} histogram");
    for (device, op, stats) in ops {
        let own = [("device", device.name.as_str()), ("op", op.as_str())];
        let mut bucket = |bound: &str, count: u64| {
            let labels = labels(&[own[0], own[1], ("le", bound)]);
            let _ = writeln!(text, "{NAME}_bucket{labels} {count}");
        };
        for (bound_us, bound) in BOUNDS {
            let within = stats.histogram.iter().filter(|(upper_us, _)| *upper_us <= bound_us);
            bucket(bound, within.map(|(_, count)| count).sum());
        }
        // What is counted while it is being read may be in one and not yet in the other; here they are one.
        let count: u64 = stats.histogram.iter().map(|(_, count)| count).sum();
        bucket("+Inf", count);
        let labels = labels(&own);
        let _ = writeln!(text, "{NAME}_sum{labels} {}", stats.latency_us.total / 1e6);
        let _ = writeln!(text, "{NAME}_count{labels} {count}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stat::tests::sample;

    #[test]
    fn everything_that_is_counted() {
        let text = exposition(&sample(1000, 3 << 20));
        for line in [
            "lloop_up 1",
            "# TYPE lloop_operations_total counter",
            "lloop_operations_total{device=\"lloop0\",op=\"read\"} 1000",
            "lloop_bytes_total{device=\"lloop0\",op=\"read\"} 3145728",
            "lloop_errors_total{device=\"lloop0\",op=\"flush\"} 1",
            "lloop_oldest_io_seconds{device=\"lloop0\"} 0.012000",
            "lloop_state{device=\"lloop0\",state=\"bound\"} 1",
            "lloop_ost_oldest_io_seconds{device=\"lloop0\",ost=\"11\"} 0.012000",
            "# TYPE lloop_latency_seconds histogram",
            "lloop_latency_seconds_bucket{device=\"lloop0\",op=\"read\",le=\"0.00005\"} 0",
            "lloop_latency_seconds_bucket{device=\"lloop0\",op=\"read\",le=\"0.0001\"} 500",
            "lloop_latency_seconds_bucket{device=\"lloop0\",op=\"read\",le=\"0.002\"} 1000",
            "lloop_latency_seconds_bucket{device=\"lloop0\",op=\"read\",le=\"+Inf\"} 1000",
            "lloop_latency_seconds_count{device=\"lloop0\",op=\"read\"} 1000",
            "lloop_latency_seconds_sum{device=\"lloop0\",op=\"read\"} 0.1478",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(text.ends_with('\n') && down().ends_with("\nlloop_up 0\n"));
    }

    #[test]
    fn without_devices_there_are_no_empty_families() {
        let text = exposition(&Stats::default());
        assert!(!text.contains("lloop_latency") && !text.contains("lloop_queued"), "{text}");
    }

    #[test]
    fn bounds_are_named_as_they_are() {
        for (us, name) in BOUNDS {
            assert!((name.parse::<f64>().unwrap() - us / 1e6).abs() < 1e-12, "{name}");
        }
        assert!(BOUNDS.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(labels(&[("device", "a\"b\\c\nd")]), r#"{device="a\"b\\c\nd"}"#);
    }
}
