//! A target whose reactors sleep: woken by every completion, idle when idle. v20.07 has none.

use crate::common::Target;
use crate::common::slow::SlowFile;
use crate::common::spdk::{self, Part};
use serde_json::json;
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Processor time of a process so far, in clock ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn sleeping_reactors_are_woken_by_completions() {
    if !spdk::has(Part::InterruptMode, "all but the refusal") {
        let refused = Command::new(env!("CARGO_BIN_EXE_lloop_tgt")).arg("--interrupt-mode").output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("interrupt mode needs a newer SPDK"), "{said}");
        return;
    }
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 16 * MIB);
    let mut target = Target::start_with(&["--interrupt-mode"]);
    let (a, b) = (target.image("a", 16 * MIB), target.image("b", 16 * MIB));
    let uring = target.attach(&a, json!({"name": "uring", "engine": "uring"}));
    assert_eq!(target.bdev(&uring)["driver_specific"]["lloop"]["engine"], "uring");
    target.attach(&b, json!({"name": "threads", "engine": "threads"}));
    target.attach(&slow.path, json!({"name": "slow"}));
    let mut connections = Vec::new();
    for name in ["uring", "threads", "slow"] {
        let mut nvme = target.connect(name);
        for round in 0..20u64 {
            let data: Vec<u8> = (0..65536u64).map(|i| (i * 7 + round) as u8).collect();
            nvme.write(round * 16, &data).unwrap();
            assert!(nvme.read(round * 16, 16).unwrap() == data, "{name}, round {round}");
        }
        nvme.flush().unwrap();
        nvme.unmap(0, 16).unwrap();
        assert!(nvme.read(0, 16).unwrap().iter().all(|&byte| byte == 0));
        connections.push(nvme);
    }
    // One call hangs, with the rest of the queue behind it: nobody polls, so the supervisor has to see that.
    let mut nvme = connections.pop().unwrap();
    slow.set_faults("hang range=0-4096");
    let stuck = nvme.start_write(0, &[1; 4096]).unwrap();
    let others: Vec<_> = (1..16u64).map(|i| nvme.start_write(i * 9, &[i as u8; 4096]).unwrap()).collect();
    for other in others {
        nvme.finish(other).unwrap().unwrap();
    }
    slow.set_faults("");
    nvme.finish(stuck).unwrap().unwrap();

    // With the connections still there and everything attached, it is idle.
    std::thread::sleep(Duration::from_secs(1));
    let before = ticks(target.pid());
    std::thread::sleep(Duration::from_secs(4));
    let spent = ticks(target.pid()) - before;
    assert!(spent <= 8, "{spent} ticks of 10 ms in 4 s are more than 2 % of a core");
    drop((nvme, connections));
    target.stop();
}
