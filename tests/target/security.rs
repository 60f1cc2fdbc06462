//! What a target does not let its clients do, and what it does not keep for itself.

use crate::common::spdk::{self, Part};
use crate::common::{INVALID_PARAMS, Target, call, eventually, folder, hugepages, image, run, spdk_app};
use serde_json::{Value, json};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn create(file: &Path) -> Value {
    json!({"filename": file, "allow_any_fs": true})
}

/// Runs lloop_tgt with arguments that it has to refuse.
fn does_not_start(args: &[&str], words: &[&str]) {
    let (status, text) = run(Command::new(env!("CARGO_BIN_EXE_lloop_tgt")).args(args), Duration::from_secs(60));
    assert_eq!(status.code(), Some(2), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no {word:?} in {text}");
    }
}

#[test]
fn files_outside_of_the_roots() {
    let dir = folder();
    let here = dir.path().to_owned();
    let (root, second, out) = (here.join("in"), here.join("second"), here.join("out"));
    for folder in [&root, &second, &out, &root.join("sub")] {
        std::fs::create_dir(folder).unwrap();
    }
    let (inside, outside) = (image(&root.join("sub"), "a.img", MIB), image(&out, "b.img", MIB));
    let other = image(&second, "c.img", MIB);
    symlink("sub/a.img", root.join("link")).unwrap();
    symlink("../out/b.img", root.join("trap")).unwrap();
    symlink(&out, root.join("folder")).unwrap();
    let shown = |path: &Path| path.to_str().unwrap().to_owned();
    let roots = [shown(&root), shown(&second)];
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop_tgt"));
    let target = Target::start_by(&mut command, &["--root", &roots[0], "--root", &roots[1]], dir);

    for file in [inside.clone(), root.join("link"), root.join("sub/../sub/a.img"), other] {
        let name = target.attach(&file, json!({}));
        target.ok("bdev_lloop_delete", json!({"name": name}));
    }
    let descriptors = target.descriptors();
    for file in [
        outside,
        root.join("../out/b.img"),
        root.join("sub/../../out/b.img"),
        root.join("trap"),
        root.join("folder/b.img"),
        "/etc/passwd".into(),
        "/proc/self/exe".into(),
        "relative.img".into(),
        // (Whether there is such a file is nobody's business.)
        out.join("missing.img"),
    ] {
        target.refused(
            "bdev_lloop_create",
            create(&file),
            libc::EACCES,
            &[&shown(&file), "--root", &roots[0], &roots[1]],
        );
    }
    target.refused("bdev_lloop_create", create(&root.join("missing.img")), libc::ENOENT, &["create it"]);
    assert_eq!((target.descriptors(), target.names()), (descriptors, vec![]));

    // It is shown; no client and no configuration changes it.
    assert_eq!(target.ok("bdev_lloop_get_options", json!({}))["roots"], json!(roots));
    let refused = target.call("bdev_lloop_set_options", json!({"roots": ["/"]})).unwrap_err();
    assert!(refused.code == INVALID_PARAMS && refused.message.contains("roots"), "{refused:?}");
    let config = target.ok("framework_get_config", json!({"name": "bdev"})).to_string();
    assert!(config.contains("bdev_lloop_set_options") && !config.contains("roots"), "{config}");
}

#[test]
fn a_race_for_the_way_out() {
    let dir = folder();
    let here = dir.path().to_owned();
    let (root, out) = (here.join("in"), here.join("out"));
    for folder in [&root, &out, &root.join("real")] {
        std::fs::create_dir(folder).unwrap();
    }
    let inside = image(&root.join("real"), "a.img", MIB);
    image(&out, "a.img", MIB);
    symlink("../out", root.join("trap")).unwrap();
    let inode = std::fs::metadata(&inside).unwrap().ino();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop_tgt"));
    let target = Target::start_by(&mut command, &["--root", root.to_str().unwrap()], dir);
    let stop = AtomicBool::new(false);
    let (mut attached, mut refused, mut tries) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (from, to) in [("real", "x"), ("x", "real"), ("trap", "x"), ("x", "trap")] {
                    std::fs::rename(root.join(from), root.join(to)).unwrap();
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        });
        let start = Instant::now();
        while tries < 200 || (attached == 0 || refused == 0) && start.elapsed() < Duration::from_secs(60) {
            tries += 1;
            match target.call("bdev_lloop_create", create(&root.join("x/a.img"))) {
                Ok(name) => {
                    let bdev = target.bdev(name.as_str().unwrap());
                    target.ok("bdev_lloop_delete", json!({"name": name}));
                    assert_eq!(bdev["driver_specific"]["lloop"]["inode"], inode);
                    attached += 1;
                }
                Err(error) if error.code == -i64::from(libc::EACCES) => refused += 1,
                Err(error) => assert_eq!(error.code, -i64::from(libc::ENOENT), "{error:?}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(attached > 0 && refused > 0, "it was no race: {attached} attached, {refused} refused of {tries}");
}

#[test]
fn roots_and_users_that_are_none() {
    does_not_start(&["--root", "/nowhere/x"], &["--root /nowhere/x", "No such file"]);
    does_not_start(&["--root", "/etc/passwd"], &["--root /etc/passwd", "Not a directory"]);
    does_not_start(&["--user", "no-such-user-here"], &["no-such-user-here", "no such user"]);
    does_not_start(&["--user", "root"], &["leave --user out"]);
}

#[test]
fn sockets_are_the_owners_alone() {
    // A folder for vhost's sockets, and a configuration that makes one at the start.
    let dir = folder();
    let saved = dir.path().join("config.json");
    let config = |socket: &Path| {
        json!({"subsystems": [{"subsystem": "vhost", "config": [
            {"method": "vhost_create_scsi_controller", "params": {"ctrlr": socket.file_name().unwrap().to_str()}}
        ]}]})
    };
    let early = dir.path().join("early.sock");
    let has_vhost = spdk::has(Part::Vhost, "sockets of vhost");
    let content = if has_vhost { config(&early) } else { json!({"subsystems": []}) };
    std::fs::write(&saved, content.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop_tgt"));
    let sockets = dir.path().to_str().unwrap().to_owned();
    let target = Target::start_by(&mut command, &["--config", saved.to_str().unwrap(), "-S", &sockets], dir);
    assert!(eventually(|| target.log().contains("is ready")), "{}", target.log());
    assert_eq!(mode(&target.socket), 0o600);
    if has_vhost {
        target.ok("vhost_create_scsi_controller", json!({"ctrlr": "late.sock"}));
        for socket in [&early, &target.folder.path().join("late.sock")] {
            assert_eq!(mode(socket), 0o600, "{}", socket.display());
        }
    }
    // Before the subsystems are up it is as closed to others.
    let waiting = Target::start_with(&["--wait-for-rpc"]);
    assert_eq!(mode(&waiting.socket) & 0o077, 0);
}

/// To a VM, whose memory has to be mapped: SPDK's own initiator is one. `own` is the file of lloop0.
fn serves_a_machine(target: &Target, here: &Path, own: &Path) {
    target.ok("vhost_create_scsi_controller", json!({"ctrlr": "vm.sock"}));
    target.ok(
        "vhost_scsi_controller_add_target",
        json!({"ctrlr": "vm.sock", "scsi_target_num": 0, "bdev_name": "lloop0"}),
    );
    let vm = here.join("vm.sock");
    assert_eq!((mode(&vm), std::fs::metadata(&vm).unwrap().uid()), (0o600, 65534));
    let config = here.join("initiator.json");
    let params =
        json!({"name": "VM", "trtype": "user", "traddr": vm, "dev_type": "scsi", "vq_count": 2, "vq_size": 128});
    let method = json!({"method": "bdev_virtio_attach_controller", "params": params});
    std::fs::write(&config, json!({"subsystems": [{"subsystem": "bdev", "config": [method]}]}).to_string()).unwrap();
    let content: Vec<u8> = (0..4 * MIB as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    std::fs::write(here.join("written"), &content).unwrap();
    let dd = |args: &[String]| {
        let socket = here.join("dd.sock");
        let mut command = spdk_app("spdk_dd");
        // (vhost-user passes on eight pieces of memory at most: -g.)
        command
            .args(["-m", "0x2", "-s", "256", "-g", "--bs=65536", "--json"])
            .arg(&config)
            .arg("-r")
            .arg(socket)
            .args(args);
        let (status, text) = run(&mut command, Duration::from_secs(120));
        assert!(status.success(), "{text}\n{}", target.log());
    };
    dd(&[format!("--if={}", here.join("written").display()), "--ob=VMt0".into()]);
    dd(&["--ib=VMt0".into(), format!("--of={}", here.join("read").display()), "--count=64".into()]);
    assert!(std::fs::read(here.join("read")).unwrap() == content);
    assert!(std::fs::read(own).unwrap()[..content.len()] == content);
}

#[test]
fn a_target_that_gives_up_its_rights() {
    let _memory = hugepages::reserve(2048);
    // A place that other users reach, which the build folder need not be.
    let dir = tempfile::Builder::new().prefix("lloop-user").tempdir_in("/var/tmp").unwrap();
    let here = dir.path().to_owned();
    std::fs::set_permissions(&here, PermissionsExt::from_mode(0o777)).unwrap();
    let (own, roots) = (image(&here, "own.img", 8 * MIB), image(&here, "roots.img", MIB));
    let nobody = 65534;
    chown(&own, Some(nobody), None).unwrap();
    for file in [&own, &roots] {
        std::fs::set_permissions(file, PermissionsExt::from_mode(0o600)).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop_tgt"));
    let sockets = here.to_str().unwrap();
    let mut target = Target::start_by(&mut command, &["--user", "nobody", "-s", "1024", "-S", sockets], dir);
    assert!(eventually(|| target.log().contains("is ready")), "{}", target.log());
    let rights_are_gone = |target: &Target| {
        for thread in std::fs::read_dir(format!("/proc/{}/task", target.pid())).unwrap() {
            let Ok(status) = std::fs::read_to_string(thread.unwrap().path().join("status")) else { continue };
            for line in ["Uid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"] {
                assert!(status.contains(line), "no {line} in\n{status}");
            }
            assert!(
                !status.lines().any(|l| l.starts_with("Groups:") && l.split_whitespace().any(|group| group == "0"))
            );
        }
    };
    rights_are_gone(&target);
    assert_eq!((mode(&target.socket), std::fs::metadata(&target.socket).unwrap().uid()), (0o600, nobody));
    let others = "import socket, sys\nsocket.socket(socket.AF_UNIX).connect(sys.argv[1])";
    let as_user = |uid: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", uid, "--regid", uid, "--clear-groups", "--", "/usr/bin/python3", "-c", others]);
        run(command.arg(&target.socket), Duration::from_secs(60))
    };
    assert!(as_user("65534").0.success());
    let (status, text) = as_user("1");
    assert!(!status.success() && text.contains("PermissionError"), "{text}");

    target.refused("bdev_lloop_create", create(&roots), libc::EACCES, &[roots.to_str().unwrap(), "permission"]);
    target.attach(&own, json!({}));
    rights_are_gone(&target);
    // Over NVMe/TCP, in memory that was there before: hugepages cannot be added any more.
    let mut nvme = target.connect("lloop0");
    nvme.write(5, &[0x5a; 4096]).unwrap();
    nvme.flush().unwrap();
    assert_eq!(nvme.read(5, 1).unwrap(), [0x5a; 4096]);
    assert_eq!(std::fs::read(&own).unwrap()[5 * 4096], 0x5a);
    drop(nvme);
    target.ok("nvmf_delete_subsystem", json!({"nqn": "nqn.2026-11.io.lloop.test:lloop0"}));

    if spdk::has(Part::Vhost, "a disk of a virtual machine") {
        serves_a_machine(&target, &here, &own);
    }

    let pid = target.pid();
    target.stop();
    let left =
        std::fs::read_dir("/dev/hugepages").unwrap().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    assert_eq!(left.filter(|name| name.contains(&format!("spdk_pid{pid}map"))).count(), 0);
    assert!(call(&target.socket, "rpc_get_methods", &json!({})).is_err());
}
