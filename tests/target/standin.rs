//! The stand-in for Lustre itself: it has to do what was measured on a real one, else the tests that use it show nothing.

use crate::common::Target;
use crate::common::slow::{Client, SlowFile, fixture};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn served(folder: &tempfile::TempDir, lov: &str) -> SlowFile {
    SlowFile::lustre(folder.path(), 8 * MIB, &fixture(lov))
}

#[test]
fn standin_is_lustre_to_those_that_it_is_preloaded_into() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let client = slow.client("a");
    assert_eq!(client.ok("statfs a"), "0xbd00bd0");
    assert!(client.ok("fid a").starts_with("[0x200000401:0x"));
    let lov = fixture("v1-two-stripes");
    assert_eq!(client.ok("xattr a lustre.lov 0"), lov.len().to_string());
    assert_eq!(client.call("xattr a lustre.lov 79"), Err(libc::ERANGE));
    let hex: String = lov.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(client.ok("xattr a lustre.lov 80"), hex);
    assert_eq!(client.ok("xattrs a 100"), "lustre.lov user.slowfs.stats ");
    assert_eq!(client.call("xattrs a 5"), Err(libc::ERANGE));
    // The parser reads it from an open file; a file may be striped over more OSTs than a first buffer holds.
    let layout: serde_json::Value = serde_json::from_str(&client.ok("layout a")).unwrap();
    assert_eq!((&layout["lmm_stripe_count"], &layout["lmm_stripe_size"]), (&json!(2), &json!(MIB)));
    let wide = [&lov[..28], &2000u16.to_le_bytes(), &[0xFF; 2], &lov[32..56].repeat(2000)].concat();
    slow.set_layout(&wide);
    let layout: serde_json::Value = serde_json::from_str(&client.ok("layout a")).unwrap();
    assert_eq!(layout["lmm_objects"].as_array().unwrap().len(), 2000);
    slow.set_layout(&lov[..79]);
    assert_eq!(client.call("layout a"), Err(libc::EBADMSG));
    slow.set_layout(&fixture("v3-pool"));
    assert_eq!(client.ok("xattr a lustre.lov 0"), "96", "never cached");
    std::fs::remove_file(slow.backing.with_file_name("backing.lov")).unwrap();
    assert_eq!(client.call("xattr a lustre.lov 100"), Err(libc::ENODATA));
    assert_eq!(client.ok("xattrs a 100"), "user.slowfs.stats ");
    assert_eq!(client.call("layout a"), Err(libc::ENODATA));
    let mountpoint = slow.mountpoint.display();
    for (list, expected) in [
        ("/proc/self/mountinfo", " - lustre 127.0.0.1@tcp:/standin rw,flock,"),
        ("/proc/mounts", " lustre rw,flock,checksum"),
    ] {
        let line = client.ok(&format!("mounts {list} {mountpoint}"));
        assert!(line.contains(expected), "{line}");
    }
    // The same file in a process without the shim.
    let stat = rustix::fs::statfs(&slow.path).unwrap();
    assert_eq!(stat.f_type, 0x6573_5546, "a FUSE filesystem");
    // Every change is another data version.
    let mut seen = vec![client.ok("version a")];
    for change in ["write a 4096 7", "truncate a 8192", "punch a 0 4096"] {
        client.ok(change);
        seen.push(client.ok("version a"));
    }
    client.ok("read a 0");
    assert_eq!(seen.last(), Some(&client.ok("version a")));
    seen.dedup();
    assert_eq!(seen.len(), 4, "{seen:?}");
}

#[test]
fn standin_group_locks_shut_strangers_out() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let (ours, theirs) = (slow.client("a"), slow.client("b"));
    ours.ok(&format!("open stranger {} w,direct", slow.path.display()));
    assert_eq!(ours.call("lock_zero a"), Err(libc::EINVAL));
    assert_eq!(ours.call("unlock a 7"), Err(libc::EINVAL));
    ours.ok("lock a 7");
    assert_eq!(ours.call("lock a 7"), Err(libc::EINVAL), "it has it");
    assert_eq!(ours.call("unlock a 8"), Err(libc::EINVAL));
    theirs.ok("lock b 7");
    theirs.ok("write b 0 1");
    theirs.ok("unlock b 7");
    assert_eq!(theirs.call("lock b 8"), Err(libc::EAGAIN), "b is O_NONBLOCK");
    // Neither another process nor another open file of this one.
    ours.ok("truncate a 4194304");
    let (write, read) = (theirs.blocks("write b 4096 2"), ours.blocks("read stranger 0"));
    let waiting = ours.blocks("lock stranger 8");
    assert_eq!(theirs.ok("size b"), (4 * MIB).to_string());
    for command in ["write a 0 3", "read a 0", "size a", "sync a"] {
        ours.ok(command);
    }
    ours.ok("unlock a 7");
    assert_eq!(ours.comes_back(waiting), Ok(String::new()));
    assert_eq!(slow.stats()["groups_held"], json!([8]));
    ours.ok("close stranger");
    assert_eq!(theirs.comes_back(write), Ok("4096".into()));
    drop(ours.comes_back(read));
    assert_eq!(slow.stats()["unprotected_ios"], 1, "b had the lock once and wrote without");
    // Who is killed has nothing any more.
    ours.ok("lock a 9");
    theirs.ok(&format!("open waiter {} w,direct", slow.path.display()));
    let waiting = theirs.blocks("lock waiter 10");
    ours.kill();
    theirs.comes_back(waiting).unwrap();
}

#[test]
fn standin_fallocate_waits_for_its_own_group_lock_for_ever() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let client = slow.client("a");
    client.ok("punch a 0 4096");
    client.ok("lock a 7");
    client.blocks("punch a 0 4096");
    let other = Client::start();
    let asked = other.tell(&format!("open b {} w,direct", slow.path.display()));
    other.comes_back(asked).unwrap();
    let (waiting, start) = (other.blocks("lock b 8"), std::time::Instant::now());
    client.kill();
    other.comes_back(waiting).unwrap();
    assert!(start.elapsed() < std::time::Duration::from_secs(20));
    let stats = slow.stats();
    assert_eq!((&stats["fallocates"], &stats["fallocates_under_group_lock"]), (&json!(2), &json!(1)));
    other.ok("unlock b 8");
    slow.set_faults("no_fallocate");
    assert_eq!(other.call("punch b 0 4096"), Err(libc::EOPNOTSUPP), "as on ZFS servers");
}

#[test]
fn standin_evictions_take_group_locks() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let (ours, theirs) = (slow.client("a"), slow.client("b"));
    ours.ok("lock a 7");
    slow.set_faults("hang ost=0");
    let (first, second) = (ours.blocks("write a 0 1"), ours.blocks("read a 2097152"));
    ours.ok("write a 1048576 1");
    slow.set_faults("evict_ost=1");
    assert_eq!((ours.comes_back(first), ours.comes_back(second)), (Err(libc::EIO), Err(libc::EIO)));
    for _ in 0..2 {
        assert_eq!(ours.call("write a 1048576 1"), Err(libc::ENOLCK));
        assert_eq!(ours.call("read a 0"), Err(libc::ENOLCK));
    }
    assert_eq!(ours.call("sync a"), Err(libc::EIO), "the earlier error, once");
    ours.ok("sync a");
    assert_eq!(ours.call("lock a 7"), Err(libc::EINVAL), "unlock first");
    // Somebody else may have it meanwhile.
    theirs.ok("lock b 8");
    ours.ok("unlock a 7");
    assert_eq!(ours.call("lock a 7"), Err(libc::EAGAIN));
    theirs.ok("unlock b 8");
    ours.ok("lock a 7");
    ours.ok("write a 0 1");
    // The same number again is no new eviction; another one is, and takes only what was on that OST.
    slow.set_faults("evict_ost=1\nlatency_us=400000");
    let both = [ours.tell("write a 0 2"), ours.tell("write a 1048576 2")];
    slow.until("both writes are on their way", |stats| stats["writes"] == 5);
    slow.set_faults("evict_ost=2 ost=1");
    let answers = both.map(|id| ours.comes_back(id));
    assert_eq!(answers[1], Err(libc::EIO));
    assert!(answers[0].is_ok(), "{answers:?}");
    // A group lock is lost object by object; the rest keeps others out.
    ours.ok("write a 0 1");
    assert_eq!(ours.call("write a 1048576 1"), Err(libc::ENOLCK));
    theirs.ok("write b 1048576 7");
    let kept_out = theirs.blocks("write b 0 7");
    // Without a group lock an eviction is over with the error.
    let plain = slow.client("c");
    ours.ok("unlock a 7");
    theirs.comes_back(kept_out).unwrap();
    slow.set_faults("hang");
    let write = plain.blocks("write c 0 5");
    slow.set_faults("evict_ost=3");
    assert_eq!(plain.comes_back(write), Err(libc::EIO));
    plain.ok("write c 0 5");
}

#[test]
fn standin_record_locks_are_lost_silently() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let (ours, theirs) = (slow.client("a"), slow.client("b"));
    ours.ok(&format!("open watch {} w", slow.path.display()));
    ours.ok("record a w");
    assert_eq!(ours.ok("ask_record a w"), "u", "its own is no conflict");
    assert_eq!(ours.ok("ask_record watch w"), "w");
    assert_eq!(theirs.call("record b r"), Err(libc::EAGAIN));
    let waiting = theirs.blocks("record_wait b w");
    ours.ok("lock a 7");
    slow.set_faults("evict_mds=1");
    theirs.comes_back(waiting).unwrap();
    assert_eq!(ours.call("ask_record watch w"), Err(libc::EIO), "once");
    assert_eq!(ours.ok("ask_record watch w"), "w", "theirs");
    // Nothing is said to who lost it, and the group lock is not touched.
    ours.ok("write a 0 1");
    assert_eq!(slow.stats()["groups_held"], json!([7]));
    ours.ok("unlock a 7");
    theirs.kill();
    assert_eq!(ours.ok("ask_record watch w"), "u");
    ours.ok("record a w");
    ours.ok("close a");
    ours.ok("record watch w");
    // Not everybody has them.
    let other = tempfile::TempDir::new_in(folder.path()).unwrap();
    let noflock = SlowFile::mount(other.path(), MIB, None, "noflock");
    assert_eq!(noflock.client("n").call("record n w"), Err(libc::ENOSYS));
}

#[test]
fn standin_faults_are_combined_counted_and_laid_on_osts() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let client = slow.client("a");
    slow.set_faults("error=5 ost=1 times=2 writes\nfull range=4096-8192\nsync_error=28 times=1");
    for (command, expected) in [
        ("read a 1048576", Ok(())),
        ("write a 0 1", Ok(())),
        ("write a 1048576 1", Err(libc::EIO)),
        ("write a 3145728 1", Err(libc::EIO)),
        ("write a 1048576 1", Ok(())),
        ("write a 4096 1", Err(libc::ENOSPC)),
        ("read a 4096", Ok(())),
        ("sync a", Err(libc::ENOSPC)),
        ("sync a", Ok(())),
    ] {
        assert_eq!(client.call(command).map(drop), expected, "{command}");
    }
    let stats = slow.stats();
    assert_eq!((&stats["reads"], &stats["writes"], &stats["fsyncs"]), (&json!(2), &json!(5), &json!(1)));
    assert_eq!((&stats["osts"]["0"]["writes"], &stats["osts"]["1"]["writes"]), (&json!(2), &json!(3)));
    // Whole layouts, and stripes without one.
    slow.set_layout(&fixture("pfl-three-components"));
    slow.set_faults("error=5 ost=0");
    for (offset, expected) in [(0, false), (4 * MIB, true), (5 * MIB, false), (6 * MIB, true)] {
        assert_eq!(client.call(&format!("read a {offset}")).is_ok(), expected, "{offset}");
    }
    slow.set_faults("stripes=3:65536\nhang ost=2");
    let hung = [2, 5, 8].map(|stripe| client.blocks(&format!("read a {}", stripe * 65536)));
    client.ok("read a 0");
    slow.set_faults("");
    for id in hung {
        client.comes_back(id).unwrap();
    }
    assert_eq!(slow.stats()["osts"]["2"]["max_concurrent"], 3);
}

#[test]
fn standin_new_files_get_the_striping_that_is_asked_for() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let client = Client::start();
    let open = |name: &str, flags: &str| {
        client.ok(&format!("open {name} {}/{name} w,create{flags}", slow.mountpoint.display()));
    };
    // Magic, pattern RAID0, no object, 1 MiB stripes, three of them.
    let asked = |magic: &str, pool: &str| {
        let id = "0".repeat(32);
        format!("{magic}01000000{id}000010000300ffff{pool}")
    };
    let v1 = asked("d00bd10b", "");
    open("early", "");
    assert_eq!(client.ok("xattr early lustre.lov 0"), "56");
    assert_eq!(client.call(&format!("setstripe early {v1}")), Err(libc::EEXIST));
    open("plain", ",delay");
    assert_eq!(client.call("xattr plain lustre.lov 0"), Err(libc::ENODATA));
    client.ok(&format!("setstripe plain {v1}"));
    let lov = client.ok("xattr plain lustre.lov 1000");
    assert!(lov.len() == 2 * (32 + 3 * 24) && lov[48..].starts_with("000010000300"), "{lov}");
    open("pool", ",delay");
    client.ok(&format!("setstripe pool {}", asked("d00bd30b", "666c6173680000000000000000000000")));
    assert_eq!(client.ok("xattr pool lustre.lov 0"), (48 + 3 * 24).to_string());
    slow.set_faults("ignore_setstripe");
    open("ignored", ",delay");
    client.ok(&format!("setstripe ignored {v1}"));
    assert_eq!(client.ok("xattr ignored lustre.lov 0"), "56", "the site's, and no error");
    client.ok("truncate ignored 65536");
    assert_eq!(client.ok("size ignored"), "65536");
    std::fs::remove_file(slow.mountpoint.join("ignored")).unwrap();
    assert!(!slow.mountpoint.join("ignored").exists());
}

#[test]
fn standin_is_lustre_to_the_target() {
    let folder = crate::common::folder();
    let slow = served(&folder, "v1-two-stripes");
    let target = Target::start_on_lustre(&[]);
    let name = target.ok("bdev_lloop_create", json!({"filename": slow.path})).as_str().unwrap().to_owned();
    let info = target.bdev(&name)["driver_specific"]["lloop"].clone();
    assert_eq!((&info["fs"], &info["engine"]), (&json!("lustre"), &json!("threads")), "{info}");
    assert!(info.to_string().contains("[0x200000401:0x"), "{info}");
    let mut nvme = target.connect(&name);
    let data: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
    nvme.write(250, &data).unwrap();
    assert!(nvme.read(250, 16).unwrap() == data);
    nvme.flush().unwrap();
    let stats = slow.stats();
    assert!(
        stats["osts"]["0"]["writes"].as_u64() > Some(0) && stats["osts"]["1"]["writes"].as_u64() > Some(0),
        "{stats}"
    );
}
