//! SPDK's own test suites against lloop.

use crate::common::{Target, folder, image, run, spdk_app};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

fn config(folder: &Path, calls: &[(&str, Value)]) -> std::path::PathBuf {
    let calls: Vec<Value> = calls.iter().map(|(method, params)| json!({"method": method, "params": params})).collect();
    let path = folder.join("config.json");
    std::fs::write(&path, json!({"subsystems": [{"subsystem": "bdev", "config": calls}]}).to_string()).unwrap();
    path
}

fn lloop(folder: &Path, name: &str, len_bytes: u64, more: Value) -> (&'static str, Value) {
    let file = image(folder, &format!("{name}.img"), len_bytes);
    let mut params = json!({"filename": file, "name": name, "allow_any_fs": true});
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ("bdev_lloop_create", params)
}

/// Runs bdevio on the devices of a configuration. All of its tests have to pass on each.
fn bdevio(folder: &Path, config: &Path, devices: usize) {
    let mut command = spdk_app("bdevio");
    command.env("LLOOP_TEST_LCORES", "0@0,1@1,2@0").arg("--json").arg(config);
    command.args(["-s", "256", "-r"]).arg(folder.join("s"));
    let (status, output) = run(&mut command, LIMIT);
    assert!(status.success(), "bdevio: {status}\n{output}");
    // CUnit's summary: "tests", total, ran, passed, failed, inactive.
    let summary = output.lines().find_map(|line| line.trim().strip_prefix("tests")).expect("a summary");
    let numbers: Vec<usize> = summary.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    assert!(numbers[0] >= 22 * devices && numbers[2] == numbers[0] && numbers[3] == 0, "{numbers:?}\n{output}");
    assert_eq!(output.matches("Suite: bdevio tests on: ").count(), devices, "{output}");
}

#[test]
fn bdevio_passes() {
    let folder = folder();
    let calls = [
        lloop(folder.path(), "Luring4096", 64 * MIB, json!({"engine": "uring"})),
        lloop(folder.path(), "Lthreads4096", 64 * MIB, json!({"engine": "threads"})),
        lloop(folder.path(), "Luring512", 64 * MIB, json!({"block_size": 512, "engine": "uring"})),
        lloop(folder.path(), "Lthreads512", 64 * MIB, json!({"block_size": 512, "engine": "threads"})),
        lloop(folder.path(), "Loffset", 64 * MIB, json!({"block_size": 512, "offset": 1536})),
        lloop(folder.path(), "Lplain", 64 * MIB, json!({"discard": false})),
    ];
    bdevio(folder.path(), &config(folder.path(), &calls), calls.len());
}

#[test]
fn bdevio_passes_through_nvme_tcp() {
    let target = Target::start();
    let folder = folder();
    let mut calls = Vec::new();
    for (block, engine) in [(4096, "uring"), (512, "threads")] {
        let file = target.image(&format!("{block}.img"), 64 * MIB);
        let name = target.attach(&file, json!({"block_size": block, "engine": engine}));
        let (address, nqn) = target.export(&name);
        let (host, port) = address.rsplit_once(':').unwrap();
        let params = json!({"name": format!("N{block}"), "trtype": "TCP", "adrfam": "IPv4", "traddr": host, "trsvcid": port, "subnqn": nqn});
        calls.push(("bdev_nvme_attach_controller", params));
    }
    bdevio(folder.path(), &config(folder.path(), &calls), calls.len());
}

/// Runs a workload of bdevperf on two reactors. It has to end well and to have done something on each device.
fn bdevperf(folder: &Path, config: &Path, workload: &[&str]) -> String {
    let mut command = spdk_app("bdevperf");
    command.arg("--json").arg(config).args(["-s", "512", "-m", "0x3", "-C", "-t", "2", "-r"]).arg(folder.join("s"));
    let (status, output) = run(command.args(workload), LIMIT);
    assert!(status.success(), "bdevperf {workload:?}: {status}\n{output}");
    for bad in ["ERROR", "error occurred", "mismatch", "inf", "nan", "nan IOPS"] {
        let lines: Vec<_> = output.lines().filter(|l| l.contains(bad) && !l.contains("initialized")).collect();
        // "inf" as a word only.
        let lines: Vec<_> =
            lines.into_iter().filter(|l| bad.len() > 3 || l.split_whitespace().any(|w| w == bad)).collect();
        assert!(lines.is_empty(), "bdevperf {workload:?}: {lines:?}\n{output}");
    }
    output
}

#[test]
fn bdevperf_verifies_what_it_wrote() {
    let folder = folder();
    let calls = [
        lloop(folder.path(), "L4096", 64 * MIB, json!({"engine": "threads"})),
        lloop(folder.path(), "L512", 64 * MIB, json!({"block_size": 512, "engine": "threads"})),
        lloop(folder.path(), "R4096", 64 * MIB, json!({"engine": "uring"})),
        lloop(folder.path(), "R512", 64 * MIB, json!({"block_size": 512, "engine": "uring"})),
    ];
    let config = config(folder.path(), &calls);
    for workload in [
        ["-w", "verify", "-q", "128", "-o", "4096"],
        ["-w", "verify", "-q", "32", "-o", "65536"],
        ["-w", "verify", "-q", "16", "-o", "20480"],
    ] {
        let output = bdevperf(folder.path(), &config, &workload);
        for name in ["L4096", "L512", "R4096", "R512"] {
            assert!(output.contains(name), "{output}");
        }
    }
}

#[test]
fn bdevperf_does_everything_else() {
    let folder = folder();
    let calls = [
        lloop(folder.path(), "L", 64 * MIB, json!({"engine": "threads"})),
        lloop(folder.path(), "R", 64 * MIB, json!({"engine": "uring"})),
    ];
    let config = config(folder.path(), &calls);
    for workload in ["write_zeroes", "unmap", "flush", "reset", "randrw"] {
        let mut arguments = vec!["-w", workload, "-q", "32", "-o", "4096"];
        if workload == "randrw" {
            arguments.extend(["-M", "70"]);
        }
        bdevperf(folder.path(), &config, &arguments);
    }
}

#[test]
fn spdk_dd_copies_in_and_out() {
    let folder = folder();
    let config = config(folder.path(), &[lloop(folder.path(), "L0", 48 * MIB, json!({}))]);
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    let data: Vec<u8> = (0..48 * MIB).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8).collect();
    std::fs::write(&input, &data).unwrap();
    let dd = |arguments: [String; 2]| {
        let mut command = spdk_app("spdk_dd");
        command.arg("--json").arg(&config).args(arguments).args(["--bs=1048576", "-m", "0x1", "-s", "256", "-r"]);
        let (status, text) = run(command.arg(folder.path().join("s")), LIMIT);
        assert!(status.success(), "spdk_dd: {status}\n{text}");
    };
    dd([format!("--if={}", input.display()), "--ob=L0".into()]);
    assert!(std::fs::read(folder.path().join("L0.img")).unwrap() == data, "the image is what went in");
    dd(["--ib=L0".into(), format!("--of={}", output.display())]);
    assert!(std::fs::read(&output).unwrap() == data, "what comes out is what went in");
}
