//! What `lloop stat` and `lloop exporter` tell is what the target counts.

use crate::common::Target;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// A sample's labels and value.
type Samples = BTreeMap<String, Vec<(BTreeMap<String, String>, f64)>>;

fn lloop(target: &Target, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop"));
    command.env("LLOOP_SOCKET", &target.socket).args(args);
    command
}

/// Reads the text format line by line, strictly: each family has its help and its type before its samples, once, all samples of
/// a family stand together, and none is there twice.
fn parsed(text: &str) -> (Samples, BTreeMap<String, String>) {
    assert!(text.ends_with('\n'), "the last line ends");
    let (mut samples, mut types) = (Samples::new(), BTreeMap::new());
    let (mut family, mut help) = (String::new(), String::new());
    let mut seen = BTreeSet::new();
    let is_name = |name: &str| {
        name.starts_with("lloop_") && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, words) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && !words.is_empty() && !types.contains_key(name), "{line}");
            help = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(name == help && ["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            types.insert(name.to_owned(), kind.to_owned());
            family = name.to_owned();
        } else {
            let (key, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
            let (name, labels) = key.split_once('{').unwrap_or((key, "}"));
            let suffix = name.strip_prefix(family.as_str()).unwrap_or_else(|| panic!("{line} is not of {family}"));
            let suffixes: &[&str] = if types[&family] == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix) && is_name(name), "{line}");
            assert!(seen.insert(key.to_owned()), "{key} is there twice");
            let labels = labels.strip_suffix('}').unwrap_or_else(|| panic!("{line}"));
            let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
                let (name, value) = label.split_once('=').unwrap();
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap();
                (name.to_owned(), value.to_owned())
            });
            samples.entry(name.to_owned()).or_default().push((labels.collect(), value.parse().unwrap()));
        }
    }
    (samples, types)
}

/// The one sample with these labels.
fn sample(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> f64 {
    let labels: BTreeMap<String, String> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let found: Vec<f64> = samples[name].iter().filter(|(l, _)| *l == labels).map(|(_, v)| *v).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?} in {samples:?}");
    found[0]
}

/// Compares every number with the RPC's.
fn same_as_the_rpc(text: &str, stats: &Value) {
    let (samples, types) = parsed(text);
    assert_eq!(sample(&samples, "lloop_up", &[]), 1.0);
    assert_eq!(json!(sample(&samples, "lloop_workers_started", &[]) as u64), stats["workers"]["started"]);
    assert_eq!(json!(sample(&samples, "lloop_rings", &[]) as u64), stats["rings"]["open"]);
    assert_eq!(json!(sample(&samples, "lloop_sqpoll_ops_total", &[]) as u64), stats["rings"]["sqpoll_ops"]);
    let devices = stats["devices"].as_array().unwrap();
    for device in devices {
        let name = device["name"].as_str().unwrap();
        for (metric, key, unit) in [
            ("lloop_in_flight", "in_flight", 1.0),
            ("lloop_queued", "queued", 1.0),
            ("lloop_calls_running", "calls_running", 1.0),
            ("lloop_last_errno", "last_errno", 1.0),
            ("lloop_oldest_io_seconds", "oldest_io_us", 1e6),
        ] {
            assert_eq!(sample(&samples, metric, &[("device", name)]) * unit, device[key].as_f64().unwrap(), "{metric}");
        }
        let state = device["state"].as_str().unwrap();
        assert_eq!(sample(&samples, "lloop_state", &[("device", name), ("state", state)]), 1.0);
        for (op, counted) in device["io"].as_object().unwrap() {
            let labels = [("device", name), ("op", op.as_str())];
            let ops = counted["ops"].as_f64().unwrap();
            for (metric, value) in [
                ("lloop_operations_total", ops),
                ("lloop_bytes_total", counted["bytes"].as_f64().unwrap()),
                ("lloop_errors_total", counted["errors"].as_f64().unwrap()),
                ("lloop_latency_seconds_count", ops),
            ] {
                assert_eq!(sample(&samples, metric, &labels), value, "{metric} {labels:?}");
            }
            let sum = sample(&samples, "lloop_latency_seconds_sum", &labels) * 1e6;
            assert!((sum - counted["latency_us"]["total"].as_f64().unwrap()).abs() < 0.1, "{labels:?}");
            let histogram = counted["histogram"].as_array().unwrap();
            let mut before = 0.0;
            for (bucket, count) in
                samples["lloop_latency_seconds_bucket"].iter().filter(|(l, _)| l["device"] == name && l["op"] == *op)
            {
                let bound_us = bucket["le"].replace("+Inf", "inf").parse::<f64>().unwrap() * 1e6 + 1e-6;
                let within = histogram.iter().filter(|pair| pair[0].as_f64().unwrap() <= bound_us);
                assert_eq!(*count, within.map(|pair| pair[1].as_f64().unwrap()).sum::<f64>(), "{bucket:?}");
                assert!(*count >= before, "buckets hold those before them");
                before = *count;
            }
            assert_eq!(before, ops, "the last bucket is +Inf");
        }
    }
    let ops = devices.iter().map(|device| device["io"].as_object().unwrap().len()).sum::<usize>();
    assert_eq!(samples["lloop_operations_total"].len(), ops, "nothing else is told");
    assert_eq!(types["lloop_latency_seconds"], "histogram");
}

/// A target with two devices of which one has worked.
fn worked() -> Target {
    let target = Target::start();
    for name in ["a.img", "b.img"] {
        let file = target.image(name, 4 * MIB);
        target.attach(&file, json!({}));
    }
    let mut nvme = target.connect("lloop0");
    for lba in 0..64 {
        nvme.write(lba, &[lba as u8; 4096]).unwrap();
        nvme.read(lba, 1).unwrap();
    }
    nvme.flush().unwrap();
    drop(nvme);
    // A failure as well: the file is shorter than the device by now.
    std::fs::File::options().write(true).open(target.folder.path().join("b.img")).unwrap().set_len(MIB).unwrap();
    let mut nvme = target.connect("lloop1");
    assert!(nvme.read(1000, 1).is_err());
    drop(nvme);
    // (SPDK's own examination of a device ends, too.)
    std::thread::sleep(Duration::from_millis(200));
    target
}

fn stats(target: &Target) -> Value {
    target.ok("bdev_lloop_get_stats", json!({"histogram": true}))
}

#[test]
fn prometheus_gets_what_is_counted() {
    let target = worked();
    let counted = stats(&target);
    assert!(counted["devices"][0]["io"]["read"]["ops"].as_u64().unwrap() >= 64);
    let text = String::from_utf8(lloop(&target, &["stat", "--prometheus"]).output().unwrap().stdout).unwrap();
    // (The oldest I/O and busy workers are a matter of the moment, and none is under way.)
    same_as_the_rpc(&text, &counted);
    let one = lloop(&target, &["stat", "--prometheus", "lloop1"]).output().unwrap();
    let (samples, _) = parsed(&String::from_utf8(one.stdout).unwrap());
    assert_eq!(samples["lloop_in_flight"].len(), 1);
    assert!(sample(&samples, "lloop_errors_total", &[("device", "lloop1"), ("op", "read")]) >= 1.0);
    let without = target.ok("bdev_lloop_get_stats", json!({}));
    assert!(!without.to_string().contains("histogram"));
}

/// A program that is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn http(address: &str, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (header, body) = text.split_once("\r\n\r\n").unwrap();
    (header.to_owned(), body.to_owned())
}

#[test]
fn the_exporter_is_scraped() {
    let mut target = worked();
    let mut command = lloop(&target, &["exporter", "--listen", "127.0.0.1:0"]);
    let mut exporter = Running(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(exporter.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("http://").and_then(|url| url.strip_suffix("/metrics")).unwrap();
    assert!(address.starts_with("127.0.0.1:"));
    // Somebody who connects and says nothing keeps nobody else waiting.
    let _idle = TcpStream::connect(address).unwrap();

    let (header, body) = http(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(header.starts_with("HTTP/1.1 200 OK") && header.contains("text/plain; version=0.0.4"), "{header}");
    assert!(header.contains(&format!("Content-Length: {}", body.len())), "{header}");
    same_as_the_rpc(&body, &stats(&target));
    let (header, body) = http(address, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(header.starts_with("HTTP/1.1 200 OK") && body.is_empty());
    assert!(http(address, "GET /x HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.1 404"));
    assert!(http(address, "DELETE /metrics HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.1 405"));

    target.stop();
    let (header, body) = http(address, "GET /metrics HTTP/1.1\r\n\r\n");
    assert!(header.starts_with("HTTP/1.1 200 OK"));
    let (samples, _) = parsed(&body);
    assert_eq!((sample(&samples, "lloop_up", &[]), samples.len()), (0.0, 1));
    // A port that is taken is said.
    let second = Command::new(env!("CARGO_BIN_EXE_lloop")).args(["exporter", "--listen", address]).output().unwrap();
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(1) && words.contains(address) && words.contains("--listen"), "{words}");
}

/// What is watched is what happens now, not what has happened since the attach.
#[test]
fn watching_shows_the_last_interval() {
    let target = Target::start();
    target.attach(&target.image("a.img", 4 * MIB), json!({}));
    let mut command = lloop(&target, &["stat", "--watch", "0.2", "lloop0"]);
    let mut watch = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(watch.0.stdout.take().unwrap()).lines();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut next_reads = || {
        loop {
            assert!(Instant::now() < deadline);
            let line = lines.next().unwrap().unwrap();
            assert!(!line.contains("flush") || line.split_whitespace().last() != Some("0"), "{line}");
            if line.starts_with("read ") {
                break line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            }
        }
    };
    let first = next_reads();
    assert_eq!(first[1..8], ["-"; 7], "{first:?}");
    // Other modules may still be looking into the new device. Their reads are over some time, and are not shown for ever.
    let idle = loop {
        let row = next_reads();
        if row[1] == "0" {
            break row;
        }
    };
    assert_eq!(idle[1..5], ["0", "0.0", "0.0", "-"], "{idle:?}");
    let mut nvme = target.connect("lloop0");
    let busy = loop {
        nvme.read(0, 8).unwrap();
        if nvme.read(8, 8).is_ok() {
            let row = next_reads();
            if row[1] != "0" {
                break row;
            }
        }
    };
    assert!(
        busy[1].parse::<u64>().unwrap() > 0 && busy.contains(&"us".to_owned()) || busy.contains(&"ms".to_owned()),
        "{busy:?}"
    );
}
