//! iSCSI through SPDK's target, judged by libiscsi's conformance programme.

use crate::common::{Target, free_port, run};
use serde_json::json;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// A hang limit; the slowest suite takes some 6 s.
const LIMIT: Duration = Duration::from_secs(120);

/// What a suite said of a device.
#[derive(Debug, Default, PartialEq)]
struct Verdict {
    /// The failed assertions of each test: where they are, and how many times.
    failures: BTreeMap<(String, String), usize>,
    /// Lines that report a failure, and lines that report that something was not tried.
    failed: usize,
    skipped: usize,
    /// Tests that ran.
    ran: usize,
}

impl Verdict {
    fn read(output: &str) -> Self {
        let mut verdict = Verdict {
            failed: output.matches("[FAILED]").count(),
            skipped: output.matches("[SKIPPED]").count(),
            ..Verdict::default()
        };
        let mut test = None;
        for line in output.lines() {
            if let Some((before, _)) = line.split_once(" had failures:") {
                test = before.rsplit_once("Test ").map(|(_, name)| name.to_owned());
            } else if let (Some(test), Some((number, reason))) = (&test, line.trim().split_once(". "))
                && number.parse::<u32>().is_ok()
            {
                // "file.c:123  - assertion"
                let place = reason.split_whitespace().next().unwrap_or_default().to_owned();
                *verdict.failures.entry((test.clone(), place)).or_default() += 1;
            } else if let Some(numbers) = line.trim().strip_prefix("tests ") {
                // Total, ran, passed, failed, inactive.
                verdict.ran = numbers.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
            }
        }
        verdict
    }

    /// What this one fails or skips that `baseline` does not.
    fn worse_than(&self, baseline: &Verdict) -> Vec<String> {
        let mut worse = Vec::new();
        for (what, mine, its) in
            [("[FAILED] lines", self.failed, baseline.failed), ("[SKIPPED] lines", self.skipped, baseline.skipped)]
        {
            if mine > its {
                worse.push(format!("{mine} {what}, the baseline has {its}"));
            }
        }
        for (failure, count) in &self.failures {
            if *count > baseline.failures.get(failure).copied().unwrap_or(0) {
                worse.push(format!("{count} times {failure:?}, which the baseline has not or has fewer times"));
            }
        }
        if self.ran != baseline.ran {
            worse.push(format!("{} tests ran, of the baseline {}", self.ran, baseline.ran));
        }
        worse
    }
}

/// Offers a device over iSCSI on loopback; its URL.
fn export(target: &Target, bdev: &str) -> String {
    let port = (0..50)
        .find_map(|_| {
            let port = free_port().to_string();
            let portals = json!({"tag": 1, "portals": [{"host": "127.0.0.1", "port": port}]});
            target.call("iscsi_create_portal_group", portals).is_ok().then_some(port)
        })
        .expect("a port to listen on");
    target.ok("iscsi_create_initiator_group", json!({"tag": 1, "initiators": ["ANY"], "netmasks": ["127.0.0.0/8"]}));
    let node = json!({
        "name": "disk", "alias_name": "disk", "queue_depth": 64, "disable_chap": true,
        "pg_ig_maps": [{"pg_tag": 1, "ig_tag": 1}], "luns": [{"bdev_name": bdev, "lun_id": 0}],
    });
    target.ok("iscsi_create_target_node", node);
    format!("iscsi://127.0.0.1:{port}/iqn.2016-06.io.spdk:disk/0")
}

/// Runs a suite on a device in a fresh target: a suite may leave reservations and half-dead connections behind.
fn run_suite(suite: &str, attach: impl Fn(&Target) -> String) -> Verdict {
    let mut target = Target::start();
    let name = attach(&target);
    let url = export(&target, &name);
    let (status, output) = run(Command::new("iscsi-test-cu").args(["-d", "-n", "-t", suite, &url]), LIMIT);
    // (The exit status counts for nothing, but for "it ran".)
    assert!(status.code().is_some(), "{suite} on {name}: {status}\n{output}");
    assert!(output.contains("Run Summary"), "{suite} on {name} did not run: {status}\n{output}");
    let verdict = Verdict::read(&output);
    // It is alive and ends in order.
    target.ok("bdev_get_bdevs", json!({"name": name}));
    target.stop();
    verdict
}

/// The suites of libiscsi, as it lists them ("SCSI.Read10"); LINUX's are a part of SCSI's.
fn suites() -> Vec<String> {
    let output = Command::new("iscsi-test-cu").arg("-l").output().expect("iscsi-test-cu runs");
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut suites: Vec<String> = list
        .lines()
        .map(str::trim)
        .filter(|line| line.matches('.').count() == 1 && (line.starts_with("SCSI.") || line.starts_with("iSCSI.")))
        .map(str::to_owned)
        .collect();
    suites.sort();
    suites.dedup();
    assert!(suites.len() >= 50, "{list}");
    suites
}

/// Nothing fails on lloop, with any of the engines, that passes on malloc.
fn conforms(suites: &[String], block: u64, engines: &[&str]) {
    let mut ran = 0;
    let mut worse = Vec::new();
    for suite in suites {
        let malloc = run_suite(suite, |target| {
            let params = json!({"name": "disk", "block_size": block, "num_blocks": 64 * MIB / block});
            target.ok("bdev_malloc_create", params).as_str().unwrap().to_owned()
        });
        for &engine in engines {
            let lloop = run_suite(suite, |target| {
                let params = json!({"name": "disk", "block_size": block, "engine": engine});
                target.attach(&target.image("disk.img", 64 * MIB), params)
            });
            println!("{suite}: {} tests, {engine} {:?}, malloc {:?}", lloop.ran, lloop.failures, malloc.failures);
            ran += lloop.ran;
            worse.extend(lloop.worse_than(&malloc).into_iter().map(|what| format!("{suite}, {engine}: {what}")));
        }
    }
    assert!(worse.is_empty(), "{worse:#?}");
    assert!(ran >= suites.len() * engines.len(), "{ran} tests in {} suites", suites.len());
}

// In two halves, so that both cores have something to do.

#[test]
fn iscsi_conforms_as_malloc_does() {
    let suites = suites();
    conforms(&suites[..suites.len() / 2], 512, &["uring", "threads"]);
}

#[test]
fn iscsi_conforms_as_malloc_does_in_the_rest() {
    let suites = suites();
    conforms(&suites[suites.len() / 2..], 512, &["uring", "threads"]);
}

#[test]
fn iscsi_conforms_with_large_blocks() {
    // Those that move data.
    let moving = ["SCSI.Read10", "SCSI.Read16", "SCSI.Write10", "SCSI.Write16", "SCSI.Unmap"].map(str::to_owned);
    conforms(&moving, 4096, &["threads"]);
}

#[test]
fn a_second_target_leaves_the_first_ones_sessions_alone() {
    let first = Target::start();
    let name = first.attach(&first.image("disk.img", 64 * MIB), json!({"block_size": 512}));
    let url = export(&first, &name);
    // Reads until it is ended, and ends by itself when its session breaks.
    let log = std::fs::File::create(first.folder.path().join("perf")).unwrap();
    let mut session = Command::new("iscsi-perf")
        .args(["-m", "4", "-x", "0", &url])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    for _ in 0..2 {
        Target::start().stop();
        // A new session is possible as well.
        let (status, output) = run(Command::new("iscsi-inq").arg(&url), LIMIT);
        assert!(status.success(), "iscsi-inq: {status}\n{output}");
    }
    let ended = session.try_wait().unwrap();
    let _ = session.kill();
    let _ = session.wait();
    let said = std::fs::read_to_string(first.folder.path().join("perf")).unwrap();
    assert!(ended.is_none(), "the session broke: {ended:?}\n{said}\n{}", first.log());
}
