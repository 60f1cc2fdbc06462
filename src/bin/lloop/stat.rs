//! `lloop stat`: what devices have done.

use crate::client::Client;
use crate::error::{Error, Result, reason};
use crate::output::Report;
use crate::table::{self, Align};
use crate::{device, size};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::io;

/// A reply of `bdev_lloop_get_stats`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// The worker threads.
    pub workers: Workers,
    /// The io_urings.
    pub rings: Rings,
    /// File operations that have timed out and still go on.
    pub stuck_threads: u64,
    /// The devices asked for.
    pub devices: Vec<DeviceStats>,
}

/// The worker threads.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Workers {
    /// How many there are.
    pub started: u64,
    /// How many of them are not waiting for work.
    pub active: u64,
}

/// The io_urings: one for each thread that needs one.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Rings {
    /// How many there are.
    pub open: u64,
    /// I/O that threads of the kernel's have submitted for busy reactors.
    pub sqpoll_ops: u64,
}

/// What a device has done, and is doing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct DeviceStats {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: String,
    /// I/O submitted and not yet completed.
    pub in_flight: u64,
    /// I/O of those that waits for a worker.
    pub queued: u64,
    /// System calls that workers are in.
    pub calls_running: u64,
    /// Age of the oldest I/O in flight.
    pub oldest_io_us: u64,
    /// The newest failure's, or 0.
    pub last_errno: i32,
    /// What it has done, by operation.
    pub io: Map<String, Value>,
    /// Its queues, where it has several: one for each OST.
    pub lanes: Vec<LaneStats>,
}

/// A queue of a device.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct LaneStats {
    /// The OST's index, where that is known.
    pub ost: Value,
    /// As of a device.
    pub queued: u64,
    /// As of a device.
    pub calls_running: u64,
    /// As of a device.
    pub oldest_io_us: u64,
}

/// What came of an operation.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct OpStats {
    /// I/O completed, failed ones included.
    pub ops: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Failures.
    pub errors: u64,
    /// How long they took.
    pub latency_us: Latency,
    /// How many took so many microseconds at most, and longer than the ones before; where it was asked for.
    pub histogram: Vec<(f64, u64)>,
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// All together.
    pub total: f64,
    mean: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

impl LaneStats {
    /// The OST in words.
    pub fn ost_shown(&self) -> String {
        if self.ost.is_null() { "-".to_owned() } else { device::text(&self.ost) }
    }
}

impl DeviceStats {
    /// What came of one operation.
    pub fn op(&self, name: &str) -> OpStats {
        self.io.get(name).and_then(|op| OpStats::deserialize(op).ok()).unwrap_or_default()
    }

    /// How it is, in a line.
    pub fn state_shown(&self) -> String {
        let name = table::printable(&self.name);
        let mut text = format!("{name}  {}  in flight {}, queued {}", self.state, self.in_flight, self.queued);
        text += &format!(", calls running {}", self.calls_running);
        if self.oldest_io_us > 0 {
            text += &format!(", oldest I/O {}", duration(self.oldest_io_us as f64));
        }
        if self.last_errno != 0 {
            text += &format!(", last error: {}", reason(&io::Error::from_raw_os_error(self.last_errno)));
        }
        text + "\n"
    }

    /// Its queues; nothing where it has but one of no known place.
    pub fn lanes_shown(&self) -> String {
        if self.lanes.iter().all(|lane| lane.ost.is_null()) && self.lanes.len() < 2 {
            return String::new();
        }
        let columns = ["OST", "QUEUED", "CALLS", "OLDEST"].map(|title| (title, Align::Right));
        let row = |lane: &LaneStats| {
            let oldest = if lane.oldest_io_us == 0 { "-".to_owned() } else { duration(lane.oldest_io_us as f64) };
            vec![lane.ost_shown(), lane.queued.to_string(), lane.calls_running.to_string(), oldest]
        };
        table::table(&columns, &self.lanes.iter().map(row).collect::<Vec<_>>())
    }
}

/// Asks for the counters of a device, or of all; with histograms or without.
///
/// # Errors
/// As [`Client::call`].
pub fn ask(client: &mut Client, name: Option<&str>, histogram: bool) -> Result<Value> {
    let mut params = Map::new();
    if let Some(name) = name {
        params.insert("name".to_owned(), name.into());
    }
    if histogram {
        params.insert("histogram".to_owned(), true.into());
    }
    client.call("bdev_lloop_get_stats", if params.is_empty() { Value::Null } else { params.into() })
}

/// Understands the reply.
///
/// # Errors
/// When it is of an unknown form.
pub fn read(reply: &Value) -> Result<Stats> {
    Stats::deserialize(reply).map_err(|e| Error::Failed(format!("bdev_lloop_get_stats counts in an unknown way: {e}")))
}

/// Shows the totals.
///
/// # Errors
/// As [`Client::call`].
pub fn once(client: &mut Client, name: Option<&str>) -> Result<Report> {
    let json = ask(client, name, false)?;
    Ok(Report { text: shown(&read(&json)?), json })
}

/// Totals for people.
fn shown(stats: &Stats) -> String {
    framed(stats, &device_shown)
}

/// What there is to say of each device, and of the workers.
pub fn framed(stats: &Stats, device_shown: &dyn Fn(&DeviceStats) -> String) -> String {
    if stats.devices.is_empty() {
        return "No devices are attached; lloop attach FILE attaches one.\n".to_owned();
    }
    let mut blocks: Vec<String> = stats.devices.iter().map(device_shown).collect();
    let (workers, rings) = (&stats.workers, &stats.rings);
    blocks.push(format!(
        "workers: {} started, {} active; rings: {}, with {} I/O by the kernel's threads\n",
        workers.started, workers.active, rings.open, rings.sqpoll_ops
    ));
    blocks.join("\n")
}

fn device_shown(device: &DeviceStats) -> String {
    let mut columns = vec![("OPERATION", Align::Left)];
    columns.extend(["OPS", "BYTES", "ERRORS", "MEAN", "P50", "P99", "MAX"].map(|title| (title, Align::Right)));
    let row = |name: &String| {
        let op = device.op(name);
        let mut row = vec![name.clone(), op.ops.to_string(), size::human(op.bytes), op.errors.to_string()];
        let latency = &op.latency_us;
        row.extend(
            [latency.mean, latency.p50, latency.p99, latency.max]
                .map(|us| if op.ops == 0 { "-".to_owned() } else { duration(us) }),
        );
        row
    };
    let rows: Vec<_> = device.io.keys().map(row).collect();
    device.state_shown() + &table::table(&columns, &rows) + &device.lanes_shown()
}

/// Microseconds for people, with about three digits.
pub fn duration(us: f64) -> String {
    let (value, unit) = match us {
        _ if us < 1e3 => (us, "us"),
        _ if us < 1e6 => (us / 1e3, "ms"),
        _ => (us / 1e6, "s"),
    };
    if value < 99.95 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::json;

    /// A device that has read so much.
    pub fn sample(ops: u64, bytes: u64) -> Stats {
        let op = |ops: u64, bytes: u64| {
            json!({"ops": ops, "bytes": bytes, "errors": 1,
                   "latency_us": {"mean": 147.8, "p50": 99.0, "p99": 1555.5, "p99.9": 1600.0, "max": 2_500_000.0,
                                  "total": ops as f64 * 147.8},
                   "histogram": [[99.0, ops / 2], [1555.5, ops - ops / 2]]})
        };
        read(&json!({
            "workers": {"started": 3, "active": 1},
            "rings": {"open": 2, "sqpoll_ops": 77},
            "devices": [{"name": "lloop0", "state": "bound", "in_flight": 4, "queued": 2, "calls_running": 2, "oldest_io_us": 12_000,
                         "last_errno": 5, "io": {"read": op(ops, bytes), "flush": op(0, 0)},
                         "lanes": [{"ost": 3, "queued": 2, "calls_running": 1, "oldest_io_us": 0},
                                   {"ost": 11, "queued": 0, "calls_running": 1, "oldest_io_us": 12_000}]}],
        }))
        .unwrap()
    }

    #[test]
    fn totals() {
        let text = shown(&sample(1000, 3 << 20));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "lloop0  bound  in flight 4, queued 2, calls running 2, oldest I/O 12.0 ms, last error: Input/output error"
        );
        assert_eq!(lines[1], "OPERATION   OPS  BYTES  ERRORS    MEAN      P50     P99    MAX");
        assert_eq!(lines[2], "read       1000  3 MiB       1  148 us  99.0 us  1.6 ms  2.5 s");
        assert_eq!(lines[3], "flush         0    0 B       1       -        -       -      -");
        assert_eq!(lines[4], "OST  QUEUED  CALLS   OLDEST");
        assert_eq!(lines[5], "  3       2      1        -");
        assert_eq!(lines[6], " 11       0      1  12.0 ms");
        assert_eq!(lines.last(), Some(&"workers: 3 started, 1 active; rings: 2, with 77 I/O by the kernel's threads"));
        assert!(shown(&Stats::default()).contains("lloop attach"));
    }

    #[test]
    fn one_lane_of_no_place_is_not_shown() {
        let mut stats = sample(1, 1);
        stats.devices[0].lanes = vec![LaneStats::default()];
        assert!(!shown(&stats).contains("OST"));
        stats.devices[0].lanes.clear();
        assert!(!shown(&stats).contains("OST"));
    }

    #[test]
    fn durations() {
        let texts = [0.0, 0.4, 99.94, 99.96, 999.0, 1500.0, 250_000.0, 3.2e6].map(duration);
        assert_eq!(texts, ["0.0 us", "0.4 us", "99.9 us", "100 us", "999 us", "1.5 ms", "250 ms", "3.2 s"]);
    }
}
