//! Who may have a file of Lustre at the same time as others, and what an attach says to those who may not.

use crate::client::{LOCK_TIMEOUT_S, attach, start, striped, with_file};
use crate::common::folder;
use serde_json::json;
use std::time::{Duration, Instant};

const LOCK_TIMEOUT: Duration = Duration::from_secs(LOCK_TIMEOUT_S);

#[test]
fn sharing_needs_whole_pages() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    for (more, words) in [
        (json!({"group_id": 7, "block_size": 512}), "group_id"),
        (json!({"group_id": 7, "block_size": 512, "offset": 512}), "group_id"),
        (json!({"lock": "off", "block_size": 512}), "lock off"),
    ] {
        let words = ["image", words, "multiples of 4096"];
        target.refused("bdev_lloop_create", with_file(&file, &more), libc::EINVAL, &words);
    }
    // Who is alone, or only reads, may.
    for more in [json!({"block_size": 512}), json!({"lock": "off", "block_size": 512, "read_only": true})] {
        let name = attach(&target, &file, more);
        target.ok("bdev_lloop_delete", json!({"name": name}));
    }
}

#[test]
fn sharing_nobody_waits_for_a_strangers_group_lock() {
    let dir = folder();
    let file = striped(&dir);
    let stranger = file.client("s");
    stranger.ok("lock s 99");
    let target = start();
    for more in [
        json!({"lock": "advisory"}),
        json!({"lock": "off"}),
        json!({"read_only": true}),
        json!({"read_only": true, "lock": "off"}),
    ] {
        let start = Instant::now();
        target.refused("bdev_lloop_create", with_file(&file, &more), libc::EBUSY, &["image", "group lock", "group_id"]);
        assert!(start.elapsed() < LOCK_TIMEOUT, "{more}: {:?}", start.elapsed());
    }
    let stats = file.stats();
    assert_eq!(
        (&stats["groups_held"], &stats["records_held"], &stats["fallocates"]),
        (&json!([99]), &json!(0), &json!(0))
    );
    stranger.ok("unlock s 99");
    attach(&target, &file, json!({"lock": "off"}));
    assert_eq!(file.stats()["groups_held"], json!([]), "looking for locks leaves none behind");
}

#[test]
fn sharing_readers_beside_a_group() {
    let dir = folder();
    let file = striped(&dir);
    // What another target has that was given a group_id.
    let writer = file.client("w");
    writer.ok("record w r");
    writer.ok("lock w 77");
    writer.ok("write w 4096 5");
    let target = start();
    let alone = with_file(&file, &json!({"read_only": true}));
    target.refused("bdev_lloop_create", alone, libc::EBUSY, &["image", "group lock", "join"]);
    let other = with_file(&file, &json!({"read_only": true, "lock": "group", "group_id": 78}));
    target.refused("bdev_lloop_create", other, libc::EBUSY, &["image", "group lock"]);
    let joined = attach(&target, &file, json!({"read_only": true, "lock": "group", "group_id": 77}));
    assert!(target.connect(&joined).read(1, 1).unwrap().iter().all(|&byte| byte == 5));
    writer.ok("write w 4096 6");
    let reserved = with_file(&file, &json!({"group_id": 0x6c6c_6f70}));
    target.refused("bdev_lloop_create", reserved, libc::EINVAL, &["image", "group_id", "another"]);
}

#[test]
fn sharing_readers_do_not_disturb_each_other() {
    let dir = folder();
    let file = striped(&dir);
    // Another reader, whose reads are always on their way while this one attaches.
    let reader = file.client("r");
    let target = start();
    for _ in 0..20 {
        let reads: Vec<u64> = (0..50).map(|_| reader.tell("read r 0")).collect();
        let name = attach(&target, &file, json!({"read_only": true}));
        reads.into_iter().for_each(|read| drop(reader.comes_back(read).unwrap()));
        target.ok("bdev_lloop_delete", json!({"name": name}));
    }
}

#[test]
fn sharing_a_file_means_one_nqn() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let lloop = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lloop"));
        let output = command.env("LLOOP_SOCKET", &target.socket).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let listen = format!("127.0.0.1:{}", crate::common::free_port());
    let export = ["export", "nvmf", "lloop0", "--listen", &listen, "--allow-any-host"];
    attach(&target, &file, json!({}));
    assert!(!lloop(&export).contains("group_id"), "a group of its own is not shared");
    lloop(&["unexport", "lloop0"]);
    lloop(&["detach", "lloop0"]);
    attach(&target, &file, json!({"group_id": 77}));
    let text = lloop(&export);
    assert!(text.contains("group_id 77") && text.contains("--nqn nqn.2026-11.io.lloop:lloop0"), "{text}");
}

/// A second mount of a filesystem; unmounted with the value.
struct SecondMount(std::path::PathBuf);

impl SecondMount {
    fn new(first: &std::path::Path, at: std::path::PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        let done = std::process::Command::new("mount").arg("--bind").args([first, &at]).status().unwrap();
        assert!(done.success());
        SecondMount(at)
    }
}

impl Drop for SecondMount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn sharing_depends_on_the_mount_that_a_file_was_opened_through() {
    let dir = folder();
    let file = striped(&dir);
    let second = SecondMount::new(&file.mountpoint, dir.path().join("second-localflock"));
    let target = start();
    let through = |point: &std::path::Path, lock: &str| {
        let params = json!({"filename": point.join("image"), "lock": lock});
        let name = target.ok("bdev_lloop_create", params);
        let info = target.bdev(name.as_str().unwrap())["driver_specific"]["lloop"].clone();
        target.ok("bdev_lloop_delete", json!({"name": name}));
        assert_eq!(info["mount"]["point"], json!(point), "{info}");
        (info["mount"]["options"].as_str().unwrap().contains("localflock"), info["lock"].clone())
    };
    assert_eq!(through(&file.mountpoint, "advisory"), (false, json!("advisory")));
    assert_eq!(through(&second.0, "advisory"), (true, json!("advisory, this node only")));
    assert_eq!(through(&second.0, "group"), (true, json!("group")));
}

#[test]
fn sharing_a_local_lock_vouches_for_nobody() {
    let dir = folder();
    let file = striped(&dir);
    let second = SecondMount::new(&file.mountpoint, dir.path().join("second-localflock"));
    let target = start();
    let params = json!({"filename": second.0.join("image")});
    let name = target.ok("bdev_lloop_create", params).as_str().unwrap().to_owned();
    // The group lock is lost. Nodes that a local lock does not reach may have come in since.
    file.set_faults("evict_ost=1");
    assert!(target.connect(&name).write(1, &[2; 4096]).is_err());
    let state = || target.bdev(&name)["driver_specific"]["lloop"]["state"].clone();
    assert!(crate::common::eventually(|| state() == "fenced"), "{}", state());
}
