//! A file whose server is slow, stuck, short or failing: what comes of its I/O, and that nobody else suffers.

use crate::common::Target;
use crate::common::nvme::Failed;
use crate::common::slow::SlowFile;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (seed.wrapping_mul(0x9E37_79B9) ^ (i / 5).wrapping_mul(17)) as u8).collect()
}

fn stats(target: &Target, name: &str) -> Value {
    target.ok("bdev_lloop_get_stats", json!({"name": name}))["devices"][0].clone()
}

#[test]
fn a_file_that_blocks_gets_worker_threads() {
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 16 * MIB);
    let target = Target::start();
    let name = target.attach(&slow.path, json!({}));
    let info = target.bdev(&name)["driver_specific"]["lloop"].clone();
    assert_eq!((&info["fs"], &info["engine"]), (&json!("fuse"), &json!("threads")));
    assert!(info["engine_reason"].as_str().unwrap().contains("non-blocking"), "{info}");
    // Asked for all the same: falls back, and says so.
    target.ok("bdev_lloop_delete", json!({"name": name}));
    let name = target.attach(&slow.path, json!({"engine": "uring"}));
    let info = target.bdev(&name)["driver_specific"]["lloop"].clone();
    assert_eq!(info["engine"], "threads");
    assert!(info["engine_reason"].as_str().unwrap().starts_with("uring was asked for, but"), "{info}");
    let mut nvme = target.connect(&name);
    nvme.write(5, &pattern(1, 65536)).unwrap();
    assert!(nvme.read(5, 16).unwrap() == pattern(1, 65536));
}

#[test]
fn short_transfers_are_continued_and_parts_of_pages_kept() {
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 8 * MIB);
    let target = Target::start();
    let name = target.attach(&slow.path, json!({"block_size": 512}));
    let mut nvme = target.connect(&name);
    let mut model = vec![0u8; 8 * MIB as usize];
    slow.set_faults("short=8192");
    // (FUSE without alignment rules of its own is used in pages: blocks of 512 are read, modified and written.)
    for (i, (lba, blocks)) in
        [(0u64, 250usize), (3, 1), (1021, 7), (1000, 200), (5000, 129), (8, 8)].into_iter().enumerate()
    {
        let data = pattern(i as u64 + 7, blocks * 512);
        nvme.write(lba, &data).unwrap();
        model[lba as usize * 512..][..data.len()].copy_from_slice(&data);
        let back = nvme.read(lba.saturating_sub(3), blocks + 3).unwrap();
        assert!(back == model[lba.saturating_sub(3) as usize * 512..][..(blocks + 3) * 512], "{lba}+{blocks}");
    }
    nvme.flush().unwrap();
    assert!(std::fs::read(&slow.backing).unwrap() == model);
}

#[test]
fn a_hanging_file_holds_nobody_else_and_loses_nothing() {
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 16 * MIB);
    let target = Target::start();
    // Few workers: the hanging device could take them all if there were no limit for it.
    target.ok("bdev_lloop_set_options", json!({"workers": 8, "lane_limit": 4}));
    let sick = target.attach(&slow.path, json!({"name": "sick"}));
    let healthy_file = target.image("healthy.img", 16 * MIB);
    let healthy = target.attach(&healthy_file, json!({"name": "healthy", "engine": "threads"}));
    let (mut sick_nvme, mut nvme) = (target.connect(&sick), target.connect(&healthy));
    let data = pattern(3, 4096);
    sick_nvme.write(0, &data).unwrap();

    slow.set_faults("hang");
    let flights: Vec<_> = (0..64u64).map(|i| sick_nvme.start_write(i * 8, &pattern(i, 4096)).unwrap()).collect();
    for i in 0..1000u64 {
        nvme.write(i % 4000, &data).unwrap();
        assert!(nvme.read(i % 4000, 1).unwrap() == data);
    }
    nvme.flush().unwrap();
    let seen = stats(&target, "sick");
    assert_eq!(seen["in_flight"], 64, "none of the sick ones has come back meanwhile: {seen}");
    assert!(seen["calls_running"].as_u64() <= Some(4) && seen["oldest_io_us"].as_u64() > Some(0), "{seen}");
    assert_eq!(stats(&target, "healthy")["io"]["write"]["errors"], 0);
    target.refused("bdev_lloop_delete", json!({"name": "sick"}), libc::EBUSY, &["sick", "in use"]);

    slow.set_faults("");
    for flight in flights {
        sick_nvme.finish(flight).unwrap().unwrap();
    }
    sick_nvme.flush().unwrap();
    let content = std::fs::read(&slow.backing).unwrap();
    for i in 0..64usize {
        assert!(content[i * 8 * 4096..][..4096] == pattern(i as u64, 4096), "write {i}");
    }
}

#[test]
fn neighbours_share_a_call_and_its_failure_is_not_shared() {
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 16 * MIB);
    let target = Target::start();
    let name = target.attach(&slow.path, json!({}));
    let mut nvme = target.connect(&name);
    // Only the second page fails, and the queue behind it piles up while the first calls are slow.
    slow.set_faults("latency_us=20000");
    let head = nvme.start_write(1000, &pattern(99, 4096)).unwrap();
    let flights: Vec<_> = (0..64u64).map(|i| nvme.start_write(i, &pattern(i, 4096)).unwrap()).collect();
    nvme.finish(head).unwrap().unwrap();
    for flight in flights {
        nvme.finish(flight).unwrap().unwrap();
    }
    slow.set_faults("error=5 range=4096-8192");
    let flights: Vec<_> = (0..64u64).map(|i| (i, nvme.start_write(i, &pattern(i + 100, 4096)).unwrap())).collect();
    for (i, flight) in flights {
        let expected = if i == 1 { Err(Failed((2, 0x80))) } else { Ok(()) };
        assert_eq!(nvme.finish(flight).unwrap(), expected, "write {i}");
    }
    let content = std::fs::read(&slow.backing).unwrap();
    for i in (0..64usize).filter(|&i| i != 1) {
        assert!(content[i * 4096..][..4096] == pattern(i as u64 + 100, 4096), "write {i}");
    }
    assert_eq!(stats(&target, &name)["io"]["write"]["errors"], 1);
}

#[test]
fn a_target_with_a_hanging_file_can_be_told_to_detach_and_to_end() {
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 4 * MIB);
    let mut target = Target::start();
    let name = target.attach(&slow.path, json!({}));
    let mut nvme = target.connect(&name);
    slow.set_faults("hang");
    let flight = nvme.start_write(0, &[1; 4096]).unwrap();
    // The I/O is on its way before anything else is asked.
    while stats(&target, &name)["calls_running"] == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    target.refused("bdev_lloop_delete", json!({"name": name}), libc::EBUSY, &["in use"]);
    target.signal("TERM");
    std::thread::sleep(std::time::Duration::from_millis(300));
    // The memory of the write is the kernel's until it comes back: the end waits for that, and comes then.
    slow.set_faults("");
    let _ = nvme.finish(flight);
    assert!(target.wait(std::time::Duration::from_secs(30)).success(), "{}", target.log());
    assert!(std::fs::read(&slow.backing).unwrap()[..4096].iter().all(|&b| b == 1));
}

#[test]
fn a_hang_that_lasts_keeps_neither_a_detach_nor_the_end_for_ever() {
    let folder = crate::common::folder();
    let slow = SlowFile::new(folder.path(), 4 * MIB);
    let mut target = Target::start();
    target.ok("bdev_lloop_set_options", json!({"detach_timeout_s": 1}));
    let name = target.attach(&slow.path, json!({}));
    let mut nvme = target.connect(&name);
    slow.set_faults("hang");
    let _flight = nvme.start_write(16, &[1; 4096]).unwrap();
    while stats(&target, &name)["calls_running"] == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let words = ["image", "have not come back", "goes away when they do"];
    target.refused("bdev_lloop_delete", json!({"name": name, "force": true}), libc::ETIMEDOUT, &words);
    target.refused("bdev_lloop_delete", json!({"name": name, "force": true}), libc::EBUSY, &["being detached already"]);
    assert_eq!(stats(&target, &name)["state"], "rundown");
    target.signal("TERM");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !target.log().contains("ending as it is") {
        assert!(std::time::Instant::now() < deadline, "{}", target.log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(target.log().contains("image: the I/O at byte 65536"), "{}", target.log());
    // (The kernel keeps the rest of a process in a call that cannot be interrupted until that returns.)
    slow.set_faults("");
    assert_eq!(target.wait(std::time::Duration::from_secs(30)).code(), Some(1));
}
