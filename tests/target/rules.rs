//! The engine's rules (docs/internals/rules.md), each through a running target: the reproductions that they were written for.

use crate::client::{MIB, attach, info, start, stats, striped, until};
use crate::common::nvme::{Failed, Nvme};
use crate::common::spdk::{self, Part};
use crate::common::{Target, folder};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What a host with several paths takes as a reason to try another one.
fn path_error() -> Failed {
    // Code 0 of that type would be a success to v20.07's target (spdk-sys, compat::status_code).
    Failed(if spdk::version() == "20.07" { (3, 0x60) } else { (3, 0) })
}

/// Proves that a write that failed and waits for its next try does not come after a newer one to the same block, also when the host
/// has given up on it. Without the rule the second host's data is overwritten half a second after its answer.
#[test]
fn rule_1_a_write_that_is_tried_again_never_undoes_a_newer_one() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut gave_up = target.connect(&name);
    file.set_faults("error=5 writes range=0-4096");
    let first = gave_up.start_write(0, &[1; 4096]).unwrap();
    until("the first write is being tried again", || stats(&target, &name)["retries"].as_u64() > Some(1));
    drop((first, gave_up));
    let mut host = target.export_again(&name);
    // A neighbour does not wait.
    host.write(1, &[9; 4096]).unwrap();
    let second = host.start_write(0, &[2; 4096]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    file.set_faults("");
    host.finish(second).unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    assert!(host.read(0, 1).unwrap().iter().all(|&byte| byte == 2), "the first write came back");
}

/// The same with a discard that is gathered and put off because a call hangs: without the rule it zeroes what was written after it.
#[test]
fn rule_1_a_postponed_discard_never_undoes_a_newer_write() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({"discard": true}));
    let mut host = target.connect(&name);
    host.write(0, &[1; 4096]).unwrap();
    file.set_faults(&format!("hang reads range={MIB}-{}", MIB + 4096));
    let hangs = host.start_read(256, 1).unwrap();
    std::thread::sleep(Duration::from_millis(400));
    let discard = host.start_unmap(0, 1).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let write = host.start_write(0, &[2; 4096]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    file.set_faults("");
    host.finish_read(hangs).unwrap().unwrap();
    host.finish(discard).unwrap().unwrap();
    host.finish(write).unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(host.read(0, 1).unwrap().iter().all(|&byte| byte == 2), "the discard came later");
}

/// Proves that an abort answers what has not started, at once, and leaves what has. Without it the host's time-out would have to reset the
/// controller, and everything with it.
#[test]
fn rule_2_abort_answers_what_has_not_started() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    target.ok("bdev_lloop_set_options", json!({"lane_limit": 1}));
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    host.write(0, &[1; 8192]).unwrap();
    file.set_faults("hang writes range=0-4096");
    let started = host.start_write(0, &[2; 4096]).unwrap();
    until("the first one is in its call", || stats(&target, &name)["calls_running"] == json!(1));
    let waits = host.start_write(1, &[3; 4096]).unwrap();
    until("the second one waits", || stats(&target, &name)["queued"] == json!(1));
    let asked = Instant::now();
    assert!(host.abort(&waits), "it was aborted");
    assert_eq!(host.finish(waits).unwrap(), Err(Failed((0, 7))), "command abort requested");
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert!(!host.abort(&started), "a call cannot be called back");
    file.set_faults("");
    host.finish(started).unwrap().unwrap();
    let data = host.read(0, 2).unwrap();
    assert!(data[..4096].iter().all(|&byte| byte == 2) && data[4096..].iter().all(|&byte| byte == 1));
}

/// How many flushes a block device has done (the kernel's Documentation/block/stat.rst, the 16th number).
fn flushes(device: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/sys/block/{}/stat", device.trim_start_matches("/dev/"))).unwrap();
    stat.split_whitespace().nth(15).unwrap().parse().unwrap()
}

fn ran(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// An ext4 of its own on a loop device, gone with the value: what reaches its disk can be counted.
struct Disk {
    device: String,
    mountpoint: std::path::PathBuf,
}

impl Disk {
    fn new(folder: &Path) -> Disk {
        let (below, mountpoint) = (crate::common::image(folder, "disk", 128 * MIB), folder.join("mnt"));
        std::fs::create_dir(&mountpoint).unwrap();
        let device = ran("losetup", &["--find", "--show", below.to_str().unwrap()]);
        let disk = Disk { device, mountpoint };
        ran("mke2fs", &["-q", "-t", "ext4", &disk.device]);
        ran("mount", &[&disk.device, disk.mountpoint.to_str().unwrap()]);
        disk
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mountpoint).status();
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

/// Proves, at the disk below the file system, that each FUA write is flushed there before it is answered, on both engines, and that
/// others are not.
#[test]
fn rule_3_a_fua_write_is_on_the_disk() {
    let dir = folder();
    let disk = Disk::new(dir.path());
    let target = Target::start();
    for engine in ["threads", "uring"] {
        let path = disk.mountpoint.join(engine);
        std::fs::write(&path, vec![7; 4 * MIB as usize]).unwrap();
        ran("sync", &[]);
        let name = target.attach(&path, json!({"engine": engine, "name": engine}));
        let mut host = target.connect(&name);
        // The ring is made in the background, and the workers do it all until it is there.
        std::thread::sleep(Duration::from_millis(500));
        host.read(0, 1).unwrap();
        let before = flushes(&disk.device);
        for lba in 0..10 {
            host.write(lba, &[1; 4096]).unwrap();
        }
        let plain = flushes(&disk.device) - before;
        // With v20.07, which drops the bit, every write is durable.
        let every = target.ok("spdk_get_version", json!({}))["version"].as_str().unwrap().contains("20.07");
        assert!(every || plain < 5, "{engine}: {plain} flushes for 10 writes without FUA");
        let before = flushes(&disk.device);
        for lba in 0..10 {
            let write = host.start_write_fua(lba, &[2; 4096]).unwrap();
            host.finish(write).unwrap().unwrap();
        }
        let fua = flushes(&disk.device) - before;
        assert!(fua >= 10, "{engine}: {fua} flushes for 10 FUA writes");
        drop(host);
        target.ok("bdev_lloop_delete", json!({"name": name, "force": true}));
    }
}

/// Proves that FUA writes, merged or not, are followed by a sync on Lustre, too.
#[test]
fn rule_3_neighbours_of_a_fua_write_do_not_take_it_along() {
    if !spdk::has(Part::Fua, "all of it") {
        return;
    }
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    target.ok("bdev_lloop_set_options", json!({"lane_limit": 1}));
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    let syncs = || file.stats()["fsyncs"].as_u64().unwrap();
    let before = syncs();
    file.set_faults("latency_us=20000");
    let plain: Vec<_> = (0..8).map(|lba| host.start_write(lba, &[1; 4096]).unwrap()).collect();
    let fua = host.start_write_fua(8, &[2; 4096]).unwrap();
    let more: Vec<_> = (9..16).map(|lba| host.start_write(lba, &[1; 4096]).unwrap()).collect();
    host.finish(fua).unwrap().unwrap();
    assert!(syncs() > before, "answered before it was durable");
    for write in plain.into_iter().chain(more) {
        host.finish(write).unwrap().unwrap();
    }
    assert_eq!(syncs() - before, 1, "only the one that asked for it");
}

/// Proves that a failed fdatasync is told to whoever flushed, is shown, and is not made good by another try.
#[test]
fn rule_4_a_failed_flush_is_told_and_shown() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    file.set_faults("sync_error=5 times=1");
    assert_eq!(host.flush(), Err(Failed((2, 0x80))));
    assert_eq!(
        (&stats(&target, &name)["state"], &stats(&target, &name)["io"]["flush"]["errors"]),
        (&json!("degraded"), &json!(1))
    );
    assert_eq!(info(&target, &name)["degraded"]["reason"], "flush failed");
    assert_eq!(host.flush(), Ok(()), "what was lost was told once");
    target.ok("bdev_lloop_resume", json!({"name": name}));
    assert_eq!(stats(&target, &name)["state"], "bound");
}

/// Proves that a flush waits for an older write that is tried again, and for nothing else: not for a read, not for a newer write.
#[test]
fn rule_4_a_flush_waits_for_older_writes_only() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    target.ok("bdev_lloop_set_options", json!({"retry_timeout": 4}));
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    file.set_faults("error=108 reads range=0-4096\nerror=108 writes range=8192-12288");
    let retries = |n| until("it is tried again", || stats(&target, &name)["retries"].as_u64() >= Some(n));
    let read = host.start_read(0, 1).unwrap();
    retries(1);
    let asked = Instant::now();
    host.flush().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(2), "it waited for a read: {:?}", asked.elapsed());
    let write = host.start_write(2, &[1; 4096]).unwrap();
    let before = stats(&target, &name)["retries"].as_u64().unwrap();
    retries(before + 2);
    let flush = host.start_flush().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(stats(&target, &name)["io"]["flush"]["ops"], 1, "the second one waits for the older write");
    file.set_faults("");
    host.finish(write).unwrap().unwrap();
    host.finish(flush).unwrap().unwrap();
    host.finish_read(read).unwrap().unwrap();
}

/// Proves that a device without discard does none, whoever asks: under a group lock one fallocate hangs the file for ever.
#[test]
fn rule_5_only_what_is_offered_is_done() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    host.write(0, &[1; 4096]).unwrap();
    let before = file.stats()["fallocates"].clone();
    let _ = host.unmap(0, 1);
    host.write_zeroes(1, 1).unwrap();
    assert_eq!(file.stats()["fallocates"], before);
    assert_eq!(file.stats()["fallocates_under_group_lock"], 0);
    assert_eq!(host.read(1, 1).unwrap(), [0; 4096], "the bdev layer writes the zeroes");
}

/// Proves that an eviction by the second OST, and by the MDS, of an idle device is noticed: a stranger was in. It fails when only the
/// first page's object is asked.
#[test]
fn rule_6_every_object_is_asked_before_the_group_lock_is_believed() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    host.write(0, &[1; 4096]).unwrap();
    let layout = info(&target, &name)["layout"].clone();
    let ost = layout["lmm_objects"][1]["l_ost_idx"].as_u64().unwrap();
    file.set_faults(&format!("evict_mds=1\nevict_ost=1 ost={ost}"));
    let stranger = file.client("s");
    stranger.ok(&format!("write s {MIB} 7"));
    until("the device is fenced", || stats(&target, &name)["state"] == "fenced");
    // Rule 8: it is a matter of the path.
    assert_eq!(host.read(0, 1), Err(path_error()));
    assert_eq!(host.write(0, &[2; 4096]), Err(path_error()));
    // An operator decides.
    target.ok("bdev_lloop_resume", json!({"name": name}));
    assert_eq!(host.read(0, 1).unwrap(), [1; 4096]);
}

/// The other way round: with every object still locked, an eviction by the MDS alone costs nothing.
#[test]
fn rule_6_the_group_lock_vouches_when_all_of_it_is_there() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let before = file.stats()["record_locks"].clone();
    file.set_faults("evict_mds=1");
    until("the lock is taken again", || stats(&target, &name)["lock_recoveries"] == json!(1));
    assert_ne!(file.stats()["record_locks"], before);
    assert_eq!(stats(&target, &name)["state"], "bound");
}

/// Proves that a detach by force answers what waits for better times at once, as a matter of the path.
#[test]
fn rule_2_a_forced_detach_answers_what_waits() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut host = target.connect(&name);
    file.set_faults("error=108 writes range=0-4096");
    let write = host.start_write(0, &[1; 4096]).unwrap();
    until("it is being tried again", || stats(&target, &name)["retries"].as_u64() > Some(0));
    let start = Instant::now();
    target.ok("bdev_lloop_delete", json!({"name": name, "force": true}));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // The connection may be gone first; an answer is a path error or the end of the namespace, and never success.
    if let Ok(answer) = host.finish(write) {
        assert!(answer.is_err(), "{answer:?}");
    }
}

/// Proves that a ring survives when SPDK moves its thread to another reactor under load. With a ring for a single issuer every call fails
/// after the first move (EEXIST), and the device hangs.
#[test]
fn rule_11_threads_move_under_load() {
    let target = Target::start_with(&["-m", "0x3"]);
    let path = target.image("a.img", 4 * MIB);
    let name = target.attach(&path, json!({"engine": "uring"}));
    let mut host: Nvme = target.connect(&name);
    let threads = target.ok("framework_get_reactors", json!({}));
    let ids: Vec<Value> = threads["reactors"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|reactor| reactor["lw_threads"].as_array().unwrap().clone())
        .filter(|thread| thread["name"].as_str().unwrap().starts_with("nvmf_tgt_poll_group"))
        .map(|thread| thread["id"].clone())
        .collect();
    assert!(!ids.is_empty(), "{threads}");
    for round in 0..40u8 {
        let writes: Vec<_> = (0..64).map(|lba| host.start_write(lba, &[round; 4096]).unwrap()).collect();
        for id in &ids {
            target.ok("thread_set_cpumask", json!({"id": id, "cpumask": format!("{:x}", 1 + round % 2)}));
        }
        for write in writes {
            host.finish(write).unwrap().unwrap();
        }
        assert!(host.read(u64::from(round), 1).unwrap().iter().all(|&byte| byte == round));
    }
}

/// Proves that a stale descriptor is replaced under the advisory lock alone. It is fenced when the lock on the old descriptor is widened
/// over its own marker before that is asked for.
#[test]
fn rule_6_a_stale_descriptor_is_replaced_under_the_advisory_lock() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({"lock": "advisory"}));
    let mut host = target.connect(&name);
    file.set_faults("error=116 times=1");
    host.write(0, &[1; 4096]).unwrap();
    assert_eq!(stats(&target, &name)["state"], "bound");
    assert_eq!(file.stats()["records_held"], 2, "the lock and its marker");
}
