//! Every method, and a device's way from attach to detach, many times.

use crate::common::{Target, spdk_app};
use serde_json::json;
use std::time::Duration;

const MIB: u64 = 1 << 20;

#[test]
fn every_method_does_what_it_says() {
    let mut target = Target::start();
    let file = target.image("a.img", 64 * MIB);
    assert_eq!(target.attach(&file, json!({})), "lloop0");
    let bdev = target.bdev("lloop0");
    assert_eq!((&bdev["block_size"], &bdev["num_blocks"]), (&json!(4096), &json!(16384)));
    assert_eq!(bdev["product_name"], "lloop");
    for io_type in ["read", "write", "unmap", "write_zeroes", "flush", "reset"] {
        assert_eq!(bdev["supported_io_types"][io_type], true, "{io_type}");
    }
    let info = &bdev["driver_specific"]["lloop"];
    assert_eq!(info["filename"], file.to_str().unwrap());
    assert_eq!((&info["state"], &info["lock"]), (&json!("bound"), &json!("advisory")));
    assert!(info["engine"] == "uring" || info["engine"] == "threads");
    assert!(info["engine_reason"].is_string());
    assert_eq!((&info["read_only"], &info["offset"]), (&json!(false), &json!(0)));
    assert!(info["fs"].is_string() && info["inode"].is_u64());

    // Names: the lowest free one, a chosen one.
    let other = target.image("b.img", MIB);
    let third = target.image("c.img", MIB + 4096 + 1);
    assert_eq!(target.attach(&other, json!({"name": "lloop2"})), "lloop2");
    assert_eq!(target.attach(&third, json!({"offset": 4096, "block_size": 512, "size_limit": 1024})), "lloop1");
    assert_eq!(target.bdev("lloop1")["num_blocks"], 2);
    assert_eq!(target.names().len(), 3);

    let options = target.ok("bdev_lloop_get_options", json!({}));
    assert_eq!((&options["max_lloop"], &options["lane_limit"]), (&json!(256), &json!(32)));
    assert_eq!(target.ok("bdev_lloop_set_options", json!({"max_lloop": 3, "workers": 5})), true);
    let options = target.ok("bdev_lloop_get_options", json!({}));
    assert_eq!((&options["max_lloop"], &options["workers"]), (&json!(3), &json!(5)));

    let stats = target.ok("bdev_lloop_get_stats", json!({}));
    assert_eq!(stats["devices"].as_array().unwrap().len(), 3);
    let one = target.ok("bdev_lloop_get_stats", json!({"name": "lloop0"}));
    assert_eq!((&one["devices"][0]["name"], &one["devices"][0]["in_flight"]), (&json!("lloop0"), &json!(0)));

    assert_eq!(target.ok("bdev_lloop_resize", json!({"name": "lloop0", "size": 128 * MIB})), 128 * MIB);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 128 * MIB, "the file grew with it");
    std::fs::File::options().write(true).open(&file).unwrap().set_len(200 * MIB).unwrap();
    assert_eq!(target.ok("bdev_lloop_resize", json!({"name": "lloop0"})), 200 * MIB, "the file's new size is taken");
    assert_eq!(target.bdev("lloop0")["num_blocks"], 200 * 256);

    for name in ["lloop0", "lloop1", "lloop2"] {
        assert_eq!(target.ok("bdev_lloop_delete", json!({"name": name})), true);
    }
    assert!(target.names().is_empty());
    assert!(!target.descriptors().iter().any(|d| d.ends_with(".img")), "the files are closed");
    target.stop();
}

#[test]
fn the_uuid_is_the_files_own() {
    let target = Target::start();
    let (file, other) = (target.image("a.img", MIB), target.image("b.img", MIB));
    let uuid_of = |file, more| {
        let name = target.attach(file, more);
        let uuid = target.bdev(&name)["uuid"].as_str().unwrap().to_owned();
        target.ok("bdev_lloop_delete", json!({"name": name}));
        uuid
    };
    let first = uuid_of(&file, json!({}));
    assert_eq!(uuid_of(&file, json!({"name": "other", "read_only": true})), first);
    let link = file.with_file_name("link.img");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert_eq!(uuid_of(&link, json!({})), first, "by whatever path");
    assert_ne!(uuid_of(&other, json!({})), first);
    let chosen = "0d0d0d0d-1111-4222-8333-444444444444";
    assert_eq!(uuid_of(&file, json!({"uuid": chosen})), chosen);
}

#[test]
fn a_saved_configuration_brings_everything_back() {
    let mut target = Target::start();
    let (a, b) = (target.image("a.img", 4 * MIB), target.image("b.img", 4 * MIB));
    target.ok("bdev_lloop_set_options", json!({"max_lloop": 7, "lane_limit": 9, "sqpoll_cpus": [0], "sqpoll": true}));
    target.attach(&a, json!({"name": "first", "block_size": 512, "offset": 4096, "size_limit": MIB, "discard": false}));
    target.attach(&b, json!({"read_only": true, "lock": "off", "uuid": "0d0d0d0d-1111-4222-8333-444444444444"}));
    target.ok("bdev_lloop_resize", json!({"name": "first", "size": 2 * MIB}));
    let shown = |target: &Target| {
        let mut bdevs = vec![target.bdev("first"), target.bdev("lloop0")];
        bdevs.push(target.ok("bdev_lloop_get_options", json!({})));
        bdevs
    };
    let before = shown(&target);
    let config = target.ok("framework_get_config", json!({"name": "bdev"}));
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": config}]});
    let path = target.folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    target.stop();

    let mut again = Target::start_with(&["--json", path.to_str().unwrap()]);
    assert_eq!(shown(&again), before);
    assert_eq!(
        json!({"subsystems": [{"subsystem": "bdev", "config": again.ok("framework_get_config", json!({"name": "bdev"}))}]}),
        config
    );
    again.stop();
}

#[test]
fn options_can_be_set_before_the_start() {
    let mut target = Target::start_with(&["--wait-for-rpc"]);
    assert_eq!(target.ok("bdev_lloop_set_options", json!({"workers": 3})), true);
    target.ok("framework_start_init", json!({}));
    assert_eq!(target.ok("bdev_lloop_get_options", json!({}))["workers"], 3);
    let file = target.image("a.img", MIB);
    target.attach(&file, json!({}));
    target.stop();
}

#[test]
fn signals_end_it_in_order_with_devices_attached_and_in_use() {
    for signal in ["INT", "TERM"] {
        let mut target = Target::start();
        let file = target.image("a.img", 16 * MIB);
        let name = target.attach(&file, json!({}));
        let mut nvme = target.connect(&name);
        let data = vec![7; 65536];
        for i in 0..16 {
            nvme.write(i * 16, &data).unwrap();
        }
        target.signal(signal);
        let status = target.wait(Duration::from_secs(30));
        assert!(status.success(), "SIG{signal}: {status}");
        assert!(std::fs::read(&file).unwrap()[..1 << 20].iter().all(|&b| b == 7));
        assert!(!target.log().contains("ERROR"), "{}", target.log());
    }
}

#[test]
fn a_hundred_devices_under_io_leave_nothing_behind() {
    let target = Target::start();
    let busy_file = target.image("busy.img", 16 * MIB);
    let busy = target.attach(&busy_file, json!({"name": "busy"}));
    let mut nvme = target.connect(&busy);
    let file = target.image("a.img", 4 * MIB);
    // One round first: whatever is made once is there then.
    let round = |i: u64| {
        let name = target.attach(&file, json!({"block_size": if i.is_multiple_of(2) { 4096 } else { 512 }}));
        assert_eq!(name, "lloop0");
        target.ok("bdev_lloop_delete", json!({"name": name}));
    };
    let hugepages = || {
        std::fs::read_dir("/dev/hugepages").map_or(0, |d| {
            d.flatten()
                .filter(|e| e.file_name().to_string_lossy().starts_with(&format!("spdk_pid{}map", target.pid())))
                .count()
        })
    };
    for i in 0..4 {
        round(i);
    }
    let settle = || {
        // Workers and call threads end when they are out of work.
        let mut state = (target.descriptors(), target.threads(), hugepages());
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(20));
            let now = (target.descriptors(), target.threads(), hugepages());
            if now == state {
                return state;
            }
            state = now;
        }
        state
    };
    let before = settle();
    let stop = std::sync::atomic::AtomicBool::new(false);
    /// Ends the load also when the rounds fail.
    struct Stop<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let stopper = Stop(&stop);
        let load = scope.spawn(|| {
            let data = vec![0x5a; 8192];
            let mut n = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) || n < 100 {
                nvme.write(n * 2 % 4000, &data).unwrap();
                assert_eq!(nvme.read(n * 2 % 4000, 2).unwrap(), data);
                n += 1;
            }
            n
        });
        for i in 0..100 {
            round(i);
        }
        drop(stopper);
        assert!(load.join().unwrap() >= 100);
    });
    let after = settle();
    assert_eq!(after.0, before.0, "descriptors");
    // (The load may have made the pool start one more worker than the rounds before it did; a leak would be a hundred.)
    assert!(after.1 <= before.1 + 4, "threads: {} before, {} after", before.1, after.1);
    assert_eq!(after.2, before.2, "hugepage files");
    assert!(!target.log().contains("ERROR"), "{}", target.log());
}

#[test]
fn a_device_in_use_is_detached_by_force_only() {
    let target = Target::start();
    let file = target.image("a.img", 4 * MIB);
    let name = target.attach(&file, json!({}));
    let mut nvme = target.connect(&name);
    nvme.write(0, &[1; 4096]).unwrap();
    target.refused("bdev_lloop_delete", json!({"name": name}), libc::EBUSY, &[&name, "in use", file.to_str().unwrap()]);
    nvme.write(1, &[2; 4096]).unwrap();
    assert_eq!(target.ok("bdev_lloop_delete", json!({"name": name, "force": true})), true);
    assert!(nvme.write(2, &[3; 4096]).is_err(), "the namespace is gone");
    assert!(target.names().is_empty());
    // The file is free again.
    assert_eq!(target.attach(&file, json!({})), "lloop0");
    let content = std::fs::read(&file).unwrap();
    assert_eq!((content[0], content[4096], content[8192]), (1, 2, 0));
}

#[test]
fn the_kernel_drivers_own_test() {
    // lloop of the kernel was tested like this: 4 MiB, 1024 blocks of 4 KiB fit, the 1025th does not.
    let folder = crate::common::folder();
    let file = crate::common::image(folder.path(), "floor.img", 4 * MIB);
    let input = folder.path().join("input");
    std::fs::write(&input, vec![0xd7; 1025 * 4096]).unwrap();
    let config = folder.path().join("config.json");
    let create =
        json!({"method": "bdev_lloop_create", "params": {"filename": file, "name": "L0", "allow_any_fs": true}});
    std::fs::write(&config, json!({"subsystems": [{"subsystem": "bdev", "config": [create]}]}).to_string()).unwrap();
    let dd = |count: &str| {
        let mut command = spdk_app("spdk_dd");
        command.arg("--json").arg(&config).arg(format!("--if={}", input.display()));
        command.args(["--ob=L0", "--bs=4096", "-m", "0x1", "-s", "256", "-r"]).arg(folder.path().join("s"));
        command.arg(format!("--count={count}"));
        crate::common::run(&mut command, Duration::from_secs(60))
    };
    let (status, output) = dd("1024");
    assert!(status.success(), "1024 blocks do not fit:\n{output}");
    assert!(std::fs::read(&file).unwrap().iter().all(|&b| b == 0xd7));
    let (status, output) = dd("1025");
    assert!(!status.success(), "1025 blocks fit into 1024:\n{output}");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 4 * MIB, "the file did not grow");

    // And by an initiator: the last block is there, the next is not.
    let target = Target::start();
    let name = target.attach(&file, json!({}));
    let mut nvme = target.connect(&name);
    for lba in 0..1024 {
        nvme.write(lba, &[lba as u8; 4096]).unwrap();
    }
    assert_eq!(nvme.write(1024, &[1; 4096]).unwrap_err().0, (0, 0x80), "LBA out of range");
    assert_eq!(nvme.read(1024, 1).unwrap_err().0, (0, 0x80));
    assert_eq!(nvme.write(1023, &[1; 8192]).unwrap_err().0, (0, 0x80), "nor does a write that starts inside");
    assert!(
        std::fs::read(&file)
            .unwrap()
            .chunks(4096)
            .enumerate()
            .all(|(lba, block)| block.iter().all(|&b| b == lba as u8))
    );
}
