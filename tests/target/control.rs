//! Control calls that meet each other, fenced devices, and servers that do not answer.

use crate::client::{MIB, attach, info, start, striped};
use crate::common::{Refused, Target, call, eventually, folder};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn size_bytes(target: &Target, name: &str) -> u64 {
    target.bdev(name)["num_blocks"].as_u64().unwrap() * 4096
}

#[test]
fn control_resizes_take_turns() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    file.set_faults("truncate_us=500000");
    let (larger, smaller) = std::thread::scope(|scope| {
        let resize = |size| target.call("bdev_lloop_resize", json!({"name": name, "size": size}));
        let larger = scope.spawn(move || resize(16 * MIB));
        // While that one is at work the device still has its old size.
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(size_bytes(&target, &name), 8 * MIB);
        let smaller = scope.spawn(move || resize(12 * MIB));
        (larger.join().unwrap(), smaller.join().unwrap())
    });
    assert_eq!(larger, Ok(json!(16 * MIB)));
    let refused = smaller.unwrap_err();
    assert!(refused.code == -i64::from(libc::EINVAL) && refused.message.contains("cannot shrink"), "{refused:?}");
    assert_eq!(size_bytes(&target, &name), 16 * MIB);
    assert_eq!(std::fs::metadata(&file.backing).unwrap().len(), 16 * MIB);
    // One that does not end is not waited for without end.
    target.ok("bdev_lloop_set_options", json!({"lock_timeout": 1}));
    file.set_faults("truncate_us=3000000");
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| target.call("bdev_lloop_resize", json!({"name": name, "size": 20 * MIB})));
        std::thread::sleep(Duration::from_millis(200));
        target.refused("bdev_lloop_resize", json!({"name": name}), libc::EBUSY, &["image", "earlier resize"]);
        assert_eq!(slow.join().unwrap(), Ok(json!(20 * MIB)));
    });
}

#[test]
fn control_a_fenced_device_is_not_resized() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    file.set_faults("evict_ost=1\nevict_mds=1");
    assert!(target.connect(&name).write(1, &[2; 4096]).is_err());
    assert!(eventually(|| info(&target, &name)["state"] == "fenced"));
    for size in [0, 16 * MIB] {
        let params = json!({"name": name, "size": size});
        target.refused("bdev_lloop_resize", params, libc::EBUSY, &["image", "fenced", "resume"]);
    }
    assert_eq!(std::fs::metadata(&file.backing).unwrap().len(), 8 * MIB);
    target.ok("bdev_lloop_resume", json!({"name": name}));
    assert_eq!(target.ok("bdev_lloop_resize", json!({"name": name, "size": 16 * MIB})), json!(16 * MIB));
}

#[test]
fn control_size_0_is_the_files() {
    let target = Target::start();
    let file = target.image("a", 8 * MIB);
    let name = target.attach(&file, json!({"size_limit": 4 * MIB, "offset": MIB}));
    assert_eq!(size_bytes(&target, &name), 4 * MIB);
    assert_eq!(target.ok("bdev_lloop_resize", json!({"name": name})), json!(7 * MIB));
    assert_eq!((size_bytes(&target, &name), &info(&target, &name)["size_limit"]), (7 * MIB, &json!(0)));
    // The limit is gone from what is saved, too.
    let saved = target.ok("framework_get_config", json!({"name": "bdev"}));
    let ours = saved.as_array().unwrap().iter().find(|call| call["method"] == "bdev_lloop_create").unwrap();
    assert_eq!(ours["params"]["size_limit"], Value::Null, "{ours}");
    std::fs::File::options().write(true).open(&file).unwrap().set_len(10 * MIB).unwrap();
    assert_eq!(target.ok("bdev_lloop_resize", json!({"name": name, "size": 0})), json!(9 * MIB));
}

#[test]
fn control_stuck_attaches_are_counted_and_bounded() {
    const LIMIT: usize = 32;
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    target.ok("bdev_lloop_set_options", json!({"lock_timeout": 1}));
    let stuck = || target.ok("bdev_lloop_get_stats", json!({}))["stuck_threads"].as_u64().unwrap();
    assert_eq!(stuck(), 0);
    let files: Vec<_> = (0..=LIMIT).map(|n| file.mountpoint.join(format!("f{n}"))).collect();
    for path in &files {
        std::fs::File::create(path).unwrap().set_len(MIB).unwrap();
    }
    file.set_faults("hang");
    let attach = |path: &std::path::Path| -> Result<Value, Refused> {
        call(&target.socket, "bdev_lloop_create", &json!({"filename": path})).unwrap()
    };
    std::thread::scope(|scope| {
        let attaches: Vec<_> = files[..LIMIT].iter().map(|path| scope.spawn(|| attach(path))).collect();
        for attached in attaches {
            assert_eq!(attached.join().unwrap().unwrap_err().code, -i64::from(libc::ETIMEDOUT));
        }
    });
    assert_eq!(stuck(), LIMIT as u64);
    let start = Instant::now();
    let refused = attach(&files[LIMIT]).unwrap_err();
    assert_eq!(refused.code, -i64::from(libc::EAGAIN));
    assert!(refused.message.contains("f32") && refused.message.contains("stuck_threads"), "{refused:?}");
    assert!(start.elapsed() < Duration::from_secs(1));
    // The servers are back.
    file.set_faults("");
    assert!(eventually(|| stuck() == 0));
    attach(&files[LIMIT]).unwrap();
}

#[test]
fn control_a_failing_stat_changes_nothing() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let name = attach(&target, &file, json!({}));
    file.set_faults("stat_error=5");
    target.refused("bdev_lloop_resize", json!({"name": name}), libc::EIO, &["image", "size"]);
    assert_eq!(size_bytes(&target, &name), 8 * MIB);
    // A read that comes back short, of a file that cannot be asked how long it is.
    file.set_faults("stat_error=5\nshort=0 reads times=20");
    let mut nvme = target.connect(&name);
    assert!(nvme.read(1, 1).is_err());
    file.set_faults("stat_error=5");
    nvme.write(1, &[1; 4096]).unwrap();
    assert_eq!(info(&target, &name)["state"], "bound");
    // One that is known to be too short is not taken for well.
    file.set_faults("");
    std::fs::File::options().write(true).open(&file.backing).unwrap().set_len(4 * MIB).unwrap();
    assert!(eventually(|| info(&target, &name)["degraded"]["reason"] == "truncated"));
    file.set_faults("stat_error=5");
    target.refused("bdev_lloop_resume", json!({"name": name}), libc::EIO, &["image", "size"]);
    assert_eq!(info(&target, &name)["degraded"]["reason"], "truncated");
    file.set_faults("");
    target.ok("bdev_lloop_resize", json!({"name": name, "size": 8 * MIB}));
    assert_eq!(info(&target, &name)["state"], "bound");
}

#[test]
fn control_a_lock_server_that_gives_none_is_no_filesystem_without_locks() {
    let dir = folder();
    let file = striped(&dir);
    let target = start();
    let create = json!({"filename": file.path});
    for errno in [libc::ENOLCK, libc::EINVAL] {
        file.set_faults(&format!("lock_error={errno}"));
        target.refused("bdev_lloop_create", create.clone(), errno, &["image", "has locks", "lock off"]);
    }
    let stats = file.stats();
    assert_eq!((&stats["groups_held"], &stats["records_held"]), (&json!([]), &json!(0)));
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP] {
        file.set_faults(&format!("lock_error={errno}"));
        let name = attach(&target, &file, json!({"lock": "advisory"}));
        assert_eq!(info(&target, &name)["lock"], "none");
        target.ok("bdev_lloop_delete", json!({"name": name}));
    }
}

#[test]
fn control_a_file_renamed_over_is_replaced() {
    let target = start();
    let path = target.image("a.img", 8 * MIB);
    let name = target.attach(&path, json!({}));
    let other = target.image("b.img", 8 * MIB);
    std::fs::rename(&other, &path).unwrap();
    assert!(eventually(|| info(&target, &name)["state"] == "degraded"));
    assert_eq!(info(&target, &name)["degraded"]["reason"], "replaced");
    std::fs::remove_file(&path).unwrap();
    let removed = target.image("c.img", 8 * MIB);
    let name = target.attach(&removed, json!({}));
    std::fs::remove_file(&removed).unwrap();
    assert!(eventually(|| info(&target, &name)["degraded"]["reason"] == "removed"));
}

#[test]
fn control_a_flush_counts_no_bytes() {
    let target = Target::start();
    let file = target.image("a.img", 8 * MIB);
    let name = target.attach(&file, json!({}));
    let mut nvme = target.connect(&name);
    nvme.write(0, &[1; 8192]).unwrap();
    nvme.flush().unwrap();
    nvme.flush().unwrap();
    let io = target.ok("bdev_lloop_get_stats", json!({"name": name}))["devices"][0]["io"].clone();
    assert_eq!(
        (&io["write"]["bytes"], &io["flush"]["ops"], &io["flush"]["bytes"]),
        (&json!(8192), &json!(2), &json!(0))
    );
}
