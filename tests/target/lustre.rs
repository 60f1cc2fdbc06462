//! Devices on Lustre, as the stand-in has it: who they are, how they keep others out, and what they survive.

use crate::client::{MIB, attach, info, start, stats, striped, until};
use crate::common::load::Load;
use crate::common::nvme::Failed;
use crate::common::slow::{SlowFile, fixture};
use crate::common::{folder, hugepages};
use serde_json::json;
use std::time::{Duration, Instant};

const BLOCKS: u64 = 8 * MIB / 4096;

#[test]
fn lustre_tells_who_a_file_is_and_where_it_lies() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let (bdev, info) = (target.bdev(&name), info(&target, &name));
    assert_eq!((&info["fs"], &info["lock"], &info["engine"]), (&json!("lustre"), &json!("group"), &json!("threads")));
    assert!(info["fid"].as_str().unwrap().starts_with("[0x200000401:"), "{info}");
    assert!(info["group_id"].as_u64() > Some(0), "{info}");
    assert!(info["mount"]["options"].as_str().unwrap().contains("flock"), "{info}");
    assert_eq!((&info["layout"]["lmm_stripe_count"], &info["layout"]["lmm_stripe_size"]), (&json!(2), &json!(MIB)));
    assert_eq!(bdev["supported_io_types"]["unmap"], false, "not under a group lock, unless asked for");
    let lanes = stats(&target, &name)["lanes"].as_array().unwrap().iter().map(|l| l["ost"].clone()).collect::<Vec<_>>();
    assert_eq!(lanes.len(), 3, "one for each object, one for what lies on both: {lanes:?}");
    let uuid = bdev["uuid"].clone();
    target.ok("bdev_lloop_delete", json!({"name": name}));
    // Elsewhere, later: the same file is the same device.
    let other = start();
    let name = attach(&other, &file, json!({"lock": "advisory"}));
    assert_eq!(other.bdev(&name)["uuid"], uuid);
    assert_eq!(self::info(&other, &name)["lock"], "advisory");
    assert_eq!(other.bdev(&name)["supported_io_types"]["unmap"], true);
}

#[test]
fn lustre_locks_are_shown_as_far_as_they_reach() {
    for (mounted, lock, shown) in [
        ("localflock", json!({"lock": "advisory"}), "advisory, this node only"),
        ("noflock", json!({"lock": "advisory"}), "none"),
        ("noflock", json!({}), "group"),
        ("flock", json!({"lock": "off"}), "off"),
        ("flock", json!({"read_only": true}), "advisory"),
    ] {
        let dir = folder();
        let file = SlowFile::mount(dir.path(), 8 * MIB, Some(&fixture("v1-one-stripe")), mounted);
        let target = start();
        let name = attach(&target, &file, lock.clone());
        assert_eq!(info(&target, &name)["lock"], shown, "{mounted} {lock}");
    }
}

#[test]
fn lustre_group_locks_keep_everybody_else_out() {
    let _memory = hugepages::reserve(3 * hugepages::DEFAULT_MIB);
    let dir = folder();
    let file = striped(&dir);
    let stranger = file.client("s");
    stranger.ok("lock s 99");
    let (target, other) = (start(), start());
    target.refused("bdev_lloop_create", json!({"filename": file.path}), libc::EBUSY, &["image", "group lock"]);
    assert_eq!(file.stats()["records_held"], 0, "nothing is left behind");
    stranger.ok("unlock s 99");
    let name = attach(&target, &file, json!({}));
    other.refused("bdev_lloop_create", json!({"filename": file.path}), libc::EBUSY, &["image", "in use"]);
    stranger.blocks("write s 0 1");
    target.ok("bdev_lloop_delete", json!({"name": name}));
    assert_eq!(file.stats()["groups_held"], json!([]));

    // Those with one id share it on purpose; nobody else comes in.
    let shared = json!({"group_id": 77});
    let (a, b) = (attach(&target, &file, shared.clone()), attach(&other, &file, shared));
    let (mut ours, mut theirs) = (target.connect(&a), other.connect(&b));
    ours.write(3, &[3; 4096]).unwrap();
    assert!(theirs.read(3, 1).unwrap().iter().all(|&byte| byte == 3));
    let third = start();
    third.refused("bdev_lloop_create", json!({"filename": file.path}), libc::EBUSY, &["in use"]);
    third.refused("bdev_lloop_create", json!({"filename": file.path, "group_id": 78}), libc::EBUSY, &["group"]);
    third.refused("bdev_lloop_create", json!({"filename": file.path, "group_id": 0}), 32602, &["group_id"]);
    // Who is killed has nothing any more.
    drop((ours, theirs));
    target.signal("KILL");
    other.signal("KILL");
    until("the killed let go", || file.stats()["groups_held"] == json!([]) && file.stats()["records_held"] == 0);
    attach(&third, &file, json!({}));
}

#[test]
fn lustre_ost_evictions_under_load_are_survived() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut load = Load::new(target.connect(&name), BLOCKS, 1);
    for eviction in 1..=3 {
        (0..20).for_each(|_| load.round());
        file.set_faults(&format!("latency_us=3000\nevict_ost={eviction}"));
        load.round();
        file.set_faults(&format!("evict_ost={eviction}"));
        until("the lock is there again", || stats(&target, &name)["lock_recoveries"].as_u64() >= Some(eviction));
    }
    load.verify(&file.backing);
    let seen = file.stats();
    assert_eq!((&seen["unprotected_ios"], &seen["fallocates_under_group_lock"]), (&json!(0), &json!(0)), "{seen}");
    // One flush an eviction is told of it, and it is shown until an operator has seen it.
    assert!((1..=3).contains(&load.failed_flushes), "{} flushes failed", load.failed_flushes);
    assert_eq!(info(&target, &name)["degraded"]["reason"], "flush failed");
    target.ok("bdev_lloop_resume", json!({"name": name}));
    assert_eq!(info(&target, &name)["state"], "bound");
    assert!(target.log().contains("the group lock is lost"), "{}", target.log());
}

#[test]
fn lustre_mds_evictions_are_noticed_and_survived() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut load = Load::new(target.connect(&name), BLOCKS, 2);
    load.round();
    assert_eq!(file.stats()["records_held"], 2, "the lock and its marker");
    file.set_faults("evict_mds=1");
    (0..20).for_each(|_| load.round());
    until("the lock is there again", || stats(&target, &name)["lock_recoveries"].as_u64() >= Some(1));
    assert_eq!(file.stats()["records_held"], 2, "the lock and its marker");
    load.verify(&file.backing);
    assert_eq!(
        (info(&target, &name)["state"].clone(), file.stats()["unprotected_ios"].clone()),
        (json!("bound"), json!(0))
    );
}

#[test]
fn lustre_fences_where_somebody_may_have_been_in() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut nvme = target.connect(&name);
    nvme.write(0, &[1; 4096]).unwrap();
    // Both at once: nobody kept watch.
    file.set_faults("evict_ost=1\nevict_mds=1");
    assert!(nvme.write(1, &[2; 4096]).is_err());
    until("it is fenced", || info(&target, &name)["state"] == "fenced");
    for _ in 0..3 {
        assert!(nvme.write(2, &[2; 4096]).is_err() && nvme.read(0, 1).is_err() && nvme.flush().is_err());
    }
    assert!(target.log().contains("Fenced: every I/O fails until bdev_lloop_resume"), "{}", target.log());
    // Somebody is in.
    let stranger = file.client("s");
    stranger.ok("record s w");
    target.refused("bdev_lloop_resume", json!({"name": name}), libc::EBUSY, &["image", "fenced", "advisory lock"]);
    stranger.ok("write s 4096 5");
    stranger.ok("record s u");
    target.ok("bdev_lloop_resume", json!({"name": name}));
    assert_eq!(info(&target, &name)["state"], "bound");
    assert!(target.log().contains("written to by others"), "{}", target.log());
    nvme.write(2, &[7; 4096]).unwrap();
    assert!(
        nvme.read(1, 1).unwrap().iter().all(|&byte| byte == 5)
            && nvme.read(2, 1).unwrap().iter().all(|&byte| byte == 7)
    );
    assert_eq!(file.stats()["unprotected_ios"], 0);
    target.refused("bdev_lloop_resume", json!({"name": name}), libc::EINVAL, &["nothing to resume"]);
}

#[test]
fn lustre_fences_when_only_an_advisory_lock_is_lost() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({"lock": "advisory"}));
    let mut nvme = target.connect(&name);
    nvme.write(0, &[1; 4096]).unwrap();
    file.set_faults("evict_mds=1");
    until("it is fenced", || info(&target, &name)["state"] == "fenced");
    assert!(nvme.write(0, &[2; 4096]).is_err());
    target.ok("bdev_lloop_resume", json!({"name": name}));
    nvme.write(0, &[3; 4096]).unwrap();
}

#[test]
fn lustre_a_hanging_ost_holds_only_its_own_stripes() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let osts: Vec<u64> =
        stats(&target, &name)["lanes"].as_array().unwrap().iter().filter_map(|l| l["ost"].as_u64()).collect();
    let (sick, healthy) = (target.connect(&name), target.export_again(&name));
    let (mut sick, mut healthy) = (sick, healthy);
    healthy.write(256, &[1; 4096]).unwrap();
    // The first stripe's OST hangs; far more I/O for it than it may have calls.
    file.set_faults(&format!("hang ost={}", osts[0]));
    let stuck: Vec<_> = (0..100u64).map(|i| sick.start_write(i * 2, &[9; 4096]).unwrap()).collect();
    until("they are on their way", || stats(&target, &name)["calls_running"].as_u64() >= Some(32));
    // (Every second MiB is the other's.)
    for i in 0..500u64 {
        healthy.write(256 + i % 256, &[i as u8; 4096]).unwrap();
        assert!(healthy.read(256 + i % 256, 1).unwrap().iter().all(|&byte| byte == i as u8));
    }
    let seen = stats(&target, &name);
    let lane = |ost: u64| seen["lanes"].as_array().unwrap().iter().find(|l| l["ost"] == ost).unwrap().clone();
    assert_eq!((&lane(osts[0])["calls_running"], &lane(osts[0])["queued"]), (&json!(32), &json!(68)), "{seen}");
    assert!(lane(osts[1])["calls_running"].as_u64() <= Some(1), "{seen}");
    // Seen and said.
    until("it is said", || target.log().contains("a call has not returned for"));
    let said = target.log();
    let line = said.lines().find(|line| line.contains("a call has not returned for")).unwrap();
    assert!(line.contains("image") && line.contains(&format!("on OST {:#06x}", osts[0])), "{line}");
    assert!(stats(&target, &name)["stalls"].as_u64() >= Some(1));
    file.set_faults("");
    for flight in stuck {
        sick.finish(flight).unwrap().unwrap();
    }
    until("that is said as well", || target.log().contains("calls return again"));
}

#[test]
fn lustre_errors_that_pass_are_tried_again_and_others_are_not() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut nvme = target.connect(&name);
    for errno in [libc::EIO, libc::ESHUTDOWN, libc::EAGAIN, libc::ENOMEM] {
        file.set_faults(&format!("error={errno} times=3"));
        nvme.write(5, &[errno as u8; 4096]).unwrap();
        file.set_faults(&format!("error={errno} times=2"));
        assert!(nvme.read(5, 1).unwrap().iter().all(|&byte| byte == errno as u8), "{errno}");
    }
    assert_eq!(stats(&target, &name)["retries"], 20);
    assert_eq!(stats(&target, &name)["io"]["write"]["errors"], 0);
    for (errno, status) in
        [(libc::ENOSPC, (0, 0x81)), (libc::EDQUOT, (0, 0x81)), (libc::EROFS, (0, 0x20)), (libc::ENODATA, (0, 0x06))]
    {
        file.set_faults(&format!("error={errno} times=1"));
        assert_eq!(nvme.write(6, &[1; 4096]), Err(Failed(status)), "{errno}");
    }
    assert_eq!(stats(&target, &name)["retries"], 20);
    // A flush does not overtake a write that is being tried again.
    file.set_faults("error=108 writes times=4");
    let write = nvme.start_write(7, &[7; 4096]).unwrap();
    until("it has failed once", || stats(&target, &name)["retries"].as_u64() > Some(20));
    let before = file.stats()["fsyncs"].clone();
    let flush = nvme.start_flush().unwrap();
    until("the flush waits", || {
        stats(&target, &name)["io"]["write"]["ops"].as_u64().is_some() && stats(&target, &name)["in_flight"] == 2
    });
    assert_eq!(file.stats()["fsyncs"], before);
    nvme.finish(write).unwrap().unwrap();
    nvme.finish(flush).unwrap().unwrap();
    assert_ne!(file.stats()["fsyncs"], before);
    // Without a budget nothing is tried again.
    target.ok("bdev_lloop_set_options", json!({"retry_timeout": 0}));
    file.set_faults("error=5 times=1");
    assert_eq!(nvme.write(6, &[1; 4096]), Err(Failed((2, 0x80))));
    nvme.write(6, &[1; 4096]).unwrap();
}

#[test]
fn lustre_stale_files_are_opened_again_if_they_are_the_same() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut load = Load::new(target.connect(&name), BLOCKS, 3);
    for _ in 0..3 {
        (0..5).for_each(|_| load.round());
        file.set_faults("error=116 times=3");
        load.round();
    }
    file.set_faults("");
    load.verify(&file.backing);
    assert_eq!(
        (info(&target, &name)["state"].clone(), file.stats()["groups_held"].as_array().unwrap().len()),
        (json!("bound"), 1)
    );
    assert_eq!(file.stats()["records_held"], 2, "the lock and its marker");
    // Another file stands there now: never written to.
    file.set_faults("fid=99\nerror=116 times=1");
    assert!(load.nvme.write(0, &[1; 4096]).is_err());
    until("it is fenced", || info(&target, &name)["state"] == "fenced");
}

#[test]
fn lustre_discards_let_go_of_the_group_lock_and_lose_nothing() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({"discard": true}));
    assert_eq!(target.bdev(&name)["supported_io_types"]["unmap"], true);
    let mut load = Load::new(target.connect(&name), BLOCKS / 2, 4);
    let mut other = target.export_again(&name);
    let filled = vec![5; 65536];
    (0..16u64).for_each(|i| other.write(BLOCKS / 2 + i * 16, &filled).unwrap());
    for i in 0..16u64 {
        other.unmap(BLOCKS / 2 + i * 16, 16).unwrap();
        load.round();
    }
    assert!(other.read(BLOCKS / 2, 16).unwrap().iter().all(|&byte| byte == 0));
    // (Zeroes are written by the bdev layer.)
    other.write(BLOCKS / 2, &filled).unwrap();
    other.write_zeroes(BLOCKS / 2, 16).unwrap();
    assert!(other.read(BLOCKS / 2, 16).unwrap().iter().all(|&byte| byte == 0));
    load.verify(&file.backing);
    let seen = file.stats();
    assert_eq!((&seen["fallocates_under_group_lock"], &seen["unprotected_ios"]), (&json!(0), &json!(0)), "{seen}");
    assert!(seen["fallocates"].as_u64() >= Some(1), "{seen}");
    assert_eq!(info(&target, &name)["state"], "bound");
}

#[test]
fn lustre_a_truncated_file_never_reads_as_zeroes() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut nvme = target.connect(&name);
    nvme.write(10, &[1; 4096]).unwrap();
    std::fs::File::options().write(true).open(&file.backing).unwrap().set_len(4 * MIB).unwrap();
    assert!(nvme.read(BLOCKS - 1, 1).is_err());
    until("it is degraded", || info(&target, &name)["state"] == "degraded");
    assert_eq!(info(&target, &name)["degraded"]["reason"], "truncated");
    // A write behind the end would make zeroes of what is missing before it.
    assert!(nvme.write(BLOCKS - 1, &[1; 4096]).is_err() && nvme.read(BLOCKS / 2, 1).is_err());
    assert!(nvme.read(10, 1).unwrap().iter().all(|&byte| byte == 1));
    target.refused("bdev_lloop_resume", json!({"name": name}), libc::EINVAL, &["image", "bdev_lloop_resize"]);
    target.ok("bdev_lloop_resize", json!({"name": name, "size": 8 * MIB}));
    assert_eq!(info(&target, &name)["state"], "bound");
    nvme.write(BLOCKS - 1, &[4; 4096]).unwrap();
}

#[test]
fn a_file_that_is_removed_or_replaced_is_noticed() {
    let target = start();
    let path = target.image("a.img", 8 * MIB);
    let name = target.attach(&path, json!({}));
    let kept = target.folder.path().join("kept");
    std::fs::rename(&path, &kept).unwrap();
    until("it is noticed", || info(&target, &name)["degraded"]["reason"] == "removed");
    std::fs::write(&path, "another").unwrap();
    target.refused("bdev_lloop_resume", json!({"name": name}), libc::EINVAL, &["a.img", "another file"]);
    assert_eq!(info(&target, &name)["degraded"]["reason"], "replaced");
    std::fs::rename(&kept, &path).unwrap();
    target.ok("bdev_lloop_resume", json!({"name": name}));
    assert_eq!(info(&target, &name)["state"], "bound");
}

#[test]
fn lustre_layouts_are_read_again_when_they_change() {
    let dir = folder();
    let file = SlowFile::lustre(dir.path(), 8 * MIB, &fixture("pfl-three-components"));
    let target = start();
    let name = attach(&target, &file, json!({}));
    assert_eq!(info(&target, &name)["layout"]["components"].as_array().unwrap().len(), 3);
    assert_eq!(stats(&target, &name)["lanes"].as_array().unwrap().len(), 4, "three objects are there");
    file.set_layout(&fixture("v1-two-stripes"));
    target.ok("bdev_lloop_resize", json!({"name": name, "size": 16 * MIB}));
    until("it is read", || info(&target, &name)["layout"]["lmm_stripe_count"] == 2);
    let mut load = Load::new(target.connect(&name), 4 * BLOCKS / 2, 5);
    (0..10).for_each(|_| load.round());
    load.verify(&file.backing);
}

#[test]
fn lustre_servers_that_hang_do_not_hang_an_attach() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    target.ok("bdev_lloop_set_options", json!({"lock_timeout": 1}));
    file.set_faults("hang");
    let start = Instant::now();
    let refused = target.call("bdev_lloop_create", json!({"filename": file.path}));
    file.set_faults("");
    // (A hung read is one of several places where it can be stuck; it must come back one way or the other.)
    match refused {
        Ok(name) => drop(target.ok("bdev_lloop_delete", json!({"name": name}))),
        Err(refused) => {
            assert_eq!(refused.code, -i64::from(libc::ETIMEDOUT), "{refused:?}");
            assert!(refused.message.contains("image") && start.elapsed() >= Duration::from_secs(2), "{refused:?}");
        }
    }
    until("nothing is left of it", || file.stats()["records_held"] == 0 && file.stats()["groups_held"] == json!([]));
    attach(&target, &file, json!({}));
}

#[test]
fn lustre_retries_and_discards_do_not_wait_for_another_ost() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({"discard": true}));
    let (mut sick, mut nvme) = (target.connect(&name), target.export_again(&name));
    file.set_faults("hang ost=0");
    let stuck = sick.start_write(0, &[1; 4096]).unwrap();
    until("it is on its way", || stats(&target, &name)["calls_running"] == 1);
    // With nothing else to wake anybody, a write on the other OST that fails at first.
    file.set_faults("hang ost=0\nerror=108 ost=1 writes times=2");
    nvme.write(256, &[2; 4096]).unwrap();
    // An unmap needs all calls to end: it waits, and the others go on.
    let unmap = nvme.start_unmap(300, 8).unwrap();
    let before = file.stats()["group_unlocks"].clone();
    for i in 0..200u64 {
        nvme.write(257 + i % 20, &[3; 4096]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(file.stats()["group_unlocks"], before);
    file.set_faults("");
    sick.finish(stuck).unwrap().unwrap();
    nvme.finish(unmap).unwrap().unwrap();
}

#[test]
fn lustre_a_fence_stays_until_an_operator_comes() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({"discard": true}));
    let (mut nvme, mut other) = (target.connect(&name), target.export_again(&name));
    nvme.write(0, &[1; 4096]).unwrap();
    // Both locks are lost, and while that is found out more work comes of every kind.
    file.set_faults("latency_us=50000\nevict_ost=1\nevict_mds=1");
    let writes: Vec<_> = (0..40u64).map(|i| other.start_write(i * 3, &[2; 4096]).unwrap()).collect();
    assert!(nvme.unmap(200, 8).is_err());
    for write in writes {
        assert!(other.finish(write).unwrap().is_err());
    }
    until("it is fenced", || info(&target, &name)["state"] == "fenced");
    for _ in 0..20 {
        assert!(nvme.write(0, &[3; 4096]).is_err() && nvme.unmap(200, 8).is_err());
        std::thread::sleep(Duration::from_millis(50));
    }
    file.set_faults("evict_ost=1\nevict_mds=1");
    assert_eq!(info(&target, &name)["state"], "fenced");
    target.ok("bdev_lloop_resume", json!({"name": name}));
    nvme.write(0, &[4; 4096]).unwrap();
    nvme.unmap(200, 8).unwrap();
    assert_eq!(file.stats()["unprotected_ios"], 0);
}

#[test]
fn lustre_a_fenced_device_can_be_detached() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    let mut nvme = target.connect(&name);
    file.set_faults("evict_ost=1\nevict_mds=1");
    assert!(nvme.write(1, &[2; 4096]).is_err());
    until("it is fenced", || info(&target, &name)["state"] == "fenced");
    target.ok("bdev_lloop_delete", json!({"name": name, "force": true}));
    until("its locks are gone", || file.stats()["groups_held"] == json!([]) && file.stats()["records_held"] == 0);
    attach(&target, &file, json!({}));
}
