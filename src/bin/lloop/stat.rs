//! `lloop stat`: what devices have done.

use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::Report;
use crate::size;
use crate::table::{self, Align};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::io;

/// A reply of `bdev_lloop_get_stats`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Stats {
    workers: Workers,
    devices: Vec<DeviceStats>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Workers {
    started: u64,
    active: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct DeviceStats {
    name: String,
    state: String,
    in_flight: u64,
    queued: u64,
    calls_running: u64,
    oldest_io_us: u64,
    last_errno: i32,
    io: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct OpStats {
    ops: u64,
    bytes: u64,
    errors: u64,
    latency_us: Latency,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Latency {
    mean: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

impl DeviceStats {
    fn op(&self, name: &str) -> OpStats {
        self.io.get(name).and_then(|op| OpStats::deserialize(op).ok()).unwrap_or_default()
    }
}

/// Asks for the counters of a device, or of all.
///
/// # Errors
/// As [`Client::call`].
pub fn ask(client: &mut Client, name: Option<&str>) -> Result<Value> {
    client.call("bdev_lloop_get_stats", name.map_or(Value::Null, |name| json!({"name": name})))
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
    let json = ask(client, name)?;
    Ok(Report { text: shown(&read(&json)?, Rates::Unasked), json })
}

/// Whether operations per second are shown, and since when.
#[derive(Clone, Copy)]
pub enum Rates<'a> {
    /// Totals only.
    Unasked,
    /// There is nothing to compare with yet.
    Unknown,
    /// Compared with an earlier sample, so many seconds ago.
    Since(&'a Stats, f64),
}

/// Counters for people.
pub fn shown(stats: &Stats, rates: Rates) -> String {
    if stats.devices.is_empty() {
        return "No devices are attached; lloop attach FILE attaches one.\n".to_owned();
    }
    let mut blocks: Vec<String> = stats.devices.iter().map(|device| device_shown(device, rates)).collect();
    blocks.push(format!("workers: {} started, {} active\n", stats.workers.started, stats.workers.active));
    blocks.join("\n")
}

fn device_shown(device: &DeviceStats, rates: Rates) -> String {
    let name = table::printable(&device.name);
    let mut text = format!("{name}  {}  in flight {}, queued {}", device.state, device.in_flight, device.queued);
    text += &format!(", calls running {}", device.calls_running);
    if device.oldest_io_us > 0 {
        text += &format!(", oldest I/O {}", duration(device.oldest_io_us as f64));
    }
    if device.last_errno != 0 {
        text += &format!(", last error: {}", errno_in_words(device.last_errno));
    }
    text.push('\n');

    let mut columns = vec![("OPERATION", Align::Left)];
    let has_rates = !matches!(rates, Rates::Unasked);
    if has_rates {
        columns.extend([("IOPS", Align::Right), ("MiB/s", Align::Right)]);
    }
    columns.extend(["OPS", "BYTES", "ERRORS", "MEAN", "P50", "P99", "MAX"].map(|title| (title, Align::Right)));
    let row = |name: &String| {
        let op = device.op(name);
        let mut row = vec![name.clone()];
        if has_rates {
            row.extend(op_rates(device, name, &op, rates));
        }
        row.extend([op.ops.to_string(), size::human(op.bytes), op.errors.to_string()]);
        let latency = &op.latency_us;
        row.extend(
            [latency.mean, latency.p50, latency.p99, latency.max]
                .map(|us| if op.ops == 0 { "-".to_owned() } else { duration(us) }),
        );
        row
    };
    text + &table::table(&columns, &device.io.keys().map(row).collect::<Vec<_>>())
}

/// Operations and MiB a second.
fn op_rates(device: &DeviceStats, name: &str, now: &OpStats, rates: Rates) -> [String; 2] {
    let unknown = || ["-".to_owned(), "-".to_owned()];
    let Rates::Since(before, seconds) = rates else { return unknown() };
    let Some(before) = before.devices.iter().find(|before| before.name == device.name).map(|before| before.op(name))
    else {
        return unknown();
    };
    // Less than before: it is another device of the same name.
    match (now.ops.checked_sub(before.ops), now.bytes.checked_sub(before.bytes)) {
        (Some(ops), Some(bytes)) if seconds > 0.0 => {
            let mib = bytes as f64 / f64::from(1 << 20);
            [format!("{:.0}", ops as f64 / seconds), format!("{:.1}", mib / seconds)]
        }
        _ => unknown(),
    }
}

/// Microseconds for people, with about three digits.
fn duration(us: f64) -> String {
    let (value, unit) = match us {
        _ if us < 1e3 => (us, "us"),
        _ if us < 1e6 => (us / 1e3, "ms"),
        _ => (us / 1e6, "s"),
    };
    if value < 99.95 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

fn errno_in_words(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    fn sample(ops: u64, bytes: u64) -> Stats {
        let op = |ops: u64, bytes: u64| {
            json!({"ops": ops, "bytes": bytes, "errors": 1,
                   "latency_us": {"mean": 147.8, "p50": 99.0, "p99": 1555.5, "p99.9": 1600.0, "max": 2_500_000.0}})
        };
        read(&json!({
            "workers": {"started": 3, "active": 1},
            "devices": [{"name": "lloop0", "state": "bound", "in_flight": 4, "queued": 2, "calls_running": 2, "oldest_io_us": 12_000,
                         "last_errno": 5, "io": {"read": op(ops, bytes), "flush": op(0, 0)}}],
        }))
        .unwrap()
    }

    #[test]
    fn totals() {
        let text = shown(&sample(1000, 3 << 20), Rates::Unasked);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "lloop0  bound  in flight 4, queued 2, calls running 2, oldest I/O 12.0 ms, last error: Input/output error"
        );
        assert_eq!(lines[1], "OPERATION   OPS  BYTES  ERRORS    MEAN      P50     P99    MAX");
        assert_eq!(lines[2], "read       1000  3 MiB       1  148 us  99.0 us  1.6 ms  2.5 s");
        assert_eq!(lines[3], "flush         0    0 B       1       -        -       -      -");
        assert_eq!(lines.last(), Some(&"workers: 3 started, 1 active"));
        assert!(shown(&Stats::default(), Rates::Unasked).contains("lloop attach"));
    }

    #[test]
    fn rates() {
        let read_row = |now: &Stats, rates| {
            shown(now, rates)
                .lines()
                .nth(2)
                .map(|l| l.split_whitespace().skip(1).take(2).map(str::to_owned).collect::<Vec<_>>())
                .unwrap()
        };
        let (before, now) = (sample(1000, 1 << 20), sample(3000, 6 << 20));
        assert_eq!(read_row(&now, Rates::Since(&before, 2.0)), ["1000", "2.5"]);
        assert_eq!(read_row(&now, Rates::Unknown), ["-", "-"]);
        assert_eq!(read_row(&before, Rates::Since(&now, 2.0)), ["-", "-"], "attached anew");
        let none = Stats::default();
        assert_eq!(read_row(&now, Rates::Since(&none, 2.0)), ["-", "-"], "attached since");
        assert_eq!(read_row(&now, Rates::Since(&before, 0.0)), ["-", "-"]);
    }

    #[test]
    fn durations() {
        let texts = [0.0, 0.4, 99.94, 99.96, 999.0, 1500.0, 250_000.0, 3.2e6].map(duration);
        assert_eq!(texts, ["0.0 us", "0.4 us", "99.9 us", "100 us", "999 us", "1.5 ms", "250 ms", "3.2 s"]);
    }
}
