//! The `lloop` command and SPDK's own client with our plugin, as people type them.

use crate::common::spdk::{self, Part};
use crate::common::{Target, free_port, run};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Runs `lloop`; the exit status, what it printed and what it complained about.
fn lloop(target: Option<&Target>, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop"));
    command.env_remove("LLOOP_SOCKET");
    if let Some(target) = target {
        command.env("LLOOP_SOCKET", &target.socket);
    }
    let output = command.args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn ok(target: &Target, args: &[&str]) -> String {
    let (status, out, err) = lloop(Some(target), args);
    assert_eq!(status, 0, "lloop {args:?}: {err}");
    out
}

fn refused(target: &Target, args: &[&str], words: &[&str]) {
    let (status, out, err) = lloop(Some(target), args);
    assert_eq!(status, 1, "lloop {args:?}: {out}{err}");
    assert!(err.starts_with("lloop: "), "{err}");
    for word in words {
        assert!(err.contains(word), "lloop {args:?}: no {word:?} in {err}");
    }
}

#[test]
fn a_day_with_the_command_line() {
    let target = Target::start();
    let file = target.folder.path().join("disk.img");
    let shown = file.to_str().unwrap();
    assert!(ok(&target, &["list"]).contains("No devices"), "an empty list says so");
    ok(&target, &["create", shown, "--size", "64M"]);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 64 * MIB);
    refused(&target, &["create", shown, "--size", "64M"], &[shown]);
    refused(&target, &["attach", shown], &[shown, "--allow-any-fs"]);
    assert_eq!(ok(&target, &["attach", shown, "--allow-any-fs"]).trim(), "lloop0");
    let list = ok(&target, &["list"]);
    assert!(list.contains("lloop0") && list.contains(shown) && list.contains("64"), "{list}");
    let json: Value = serde_json::from_str(&ok(&target, &["list", "--json"])).unwrap();
    assert!(json.to_string().contains("lloop0"));
    let info = ok(&target, &["info", "lloop0"]);
    for word in [shown, "engine", "advisory", "bound"] {
        assert!(info.contains(word), "{info}");
    }
    assert!(ok(&target, &["resize", "lloop0", "128M"]).contains("128") || target.bdev("lloop0")["num_blocks"] == 32768);
    assert_eq!(target.bdev("lloop0")["num_blocks"], 32768);
    assert!(ok(&target, &["stat"]).contains("lloop0"));
    let stat: Value = serde_json::from_str(&ok(&target, &["stat", "lloop0", "--json"])).unwrap();
    assert!(stat.to_string().contains("oldest"), "{stat}");

    // Export: not to everybody unless said so, twice the same is fine, and a host can use it.
    let listen = format!("127.0.0.1:{}", free_port());
    let (status, _, err) = lloop(Some(&target), &["export", "nvmf", "lloop0", "--listen", &listen]);
    assert_eq!(status, 2, "{err}");
    assert!(err.contains("--allow-host") && err.contains("--allow-any-host"), "{err}");
    let export =
        ["export", "nvmf", "lloop0", "--listen", &listen, "--nqn", "nqn.2026-11.io.lloop.test:cli", "--allow-any-host"];
    let first = ok(&target, &export);
    assert!(first.contains("nqn.2026-11.io.lloop.test:cli"), "{first}");
    assert!(first.contains("nvme_core.io_timeout=600") && first.contains("--ctrl-loss-tmo=1800"), "{first}");
    let subsystems = target.ok("nvmf_get_subsystems", json!({}));
    ok(&target, &export);
    assert_eq!(target.ok("nvmf_get_subsystems", json!({})), subsystems, "the second export changed something");
    let mut nvme = crate::common::nvme::Nvme::connect(&listen, "nqn.2026-11.io.lloop.test:cli", 4096).unwrap();
    nvme.write(3, &[0x42; 4096]).unwrap();
    assert_eq!(std::fs::read(&file).unwrap()[3 * 4096], 0x42);
    assert!(ok(&target, &["list"]).contains("nqn.2026-11.io.lloop.test:cli"));
    refused(&target, &["detach", "lloop0"], &["lloop0", "in use"]);
    drop(nvme);
    ok(&target, &["unexport", "lloop0"]);
    assert!(!target.ok("nvmf_get_subsystems", json!({})).to_string().contains("lloop.test:cli"));
    refused(&target, &["unexport", "lloop0"], &["lloop0"]);
    ok(&target, &["detach", "lloop0"]);
    refused(&target, &["detach", "lloop0"], &["lloop0"]);
    refused(&target, &["info", "lloop0"], &["lloop0"]);
    assert!(target.names().is_empty());
}

#[test]
fn hosts_get_what_they_were_named_for() {
    let target = Target::start();
    for name in ["a", "b"] {
        let file = target.image(name, 8 * MIB);
        ok(&target, &["attach", file.to_str().unwrap(), "--allow-any-fs", "--name", name]);
    }
    let listen = format!("127.0.0.1:{}", free_port());
    let one = "nqn.2014-08.org.nvmexpress:uuid:6c6c6f6f-7000-4000-8000-000000000001";
    let two = "nqn.2014-08.org.nvmexpress:uuid:6c6c6f6f-7000-4000-8000-000000000002";
    let nqn = "nqn.2026-11.io.lloop.test:both";
    let export = |name, host| ["export", "nvmf", name, "--listen", &listen, "--nqn", nqn, "--allow-host", host];
    ok(&target, &export("a", one));
    let before = target.ok("nvmf_get_subsystems", json!({}));
    refused(&target, &export("b", two), &[two, "would get a as well", "--nqn"]);
    assert_eq!(target.ok("nvmf_get_subsystems", json!({})), before, "nothing has changed");
    ok(&target, &export("b", one));
    // Alone in it, a device gets one more host.
    ok(&target, &["unexport", "b"]);
    ok(&target, &export("a", two));
}

/// What a target has of exports, all of them.
fn all_exports(target: &Target) -> Vec<Value> {
    let methods =
        ["iscsi_get_target_nodes", "iscsi_get_portal_groups", "iscsi_get_initiator_groups", "vhost_get_controllers"];
    let there = target.ok("rpc_get_methods", json!({}));
    let methods = methods.into_iter().filter(|method| there.as_array().unwrap().contains(&json!(method)));
    methods.map(|method| target.ok(method, json!({}))).collect()
}

#[test]
fn exports_of_the_other_kinds() {
    let target = Target::start();
    for name in ["a", "b"] {
        let file = target.image(name, 8 * MIB);
        ok(&target, &["attach", file.to_str().unwrap(), "--allow-any-fs", "--name", name]);
    }
    let nothing = all_exports(&target);
    let sockets = tempfile::Builder::new().prefix("lloop").tempdir().unwrap();
    let path = |name: &str| sockets.path().join(name).to_str().unwrap().to_owned();
    let (blk, scsi, listen) = (path("made/blk"), path("scsi"), format!("127.0.0.1:{}", free_port()));
    let mut exports = vec![("iscsi", vec!["--listen", &listen])];
    let has_vhost = spdk::has(Part::Vhost, "exports by vhost");
    if has_vhost {
        exports.extend([("vhost-blk", vec!["--socket", &blk]), ("vhost-scsi", vec!["--socket", &scsi])]);
    }
    for (kind, options) in &exports {
        let export = [&["export", kind, "a"], options.as_slice()].concat();
        assert!(ok(&target, &export).contains("is exported"), "{kind}");
        let before = all_exports(&target);
        assert!(ok(&target, &export).contains("already"), "{kind}: the same again succeeds");
        assert_eq!(all_exports(&target), before, "{kind}: and changes nothing");
        let list: Value = serde_json::from_str(&ok(&target, &["list", "--json"])).unwrap();
        assert_eq!((&list[0]["exports"][0]["type"], &list[0]["exports"][0]["connected"]), (&json!(kind), &json!([])));
        // Two that write to one device would destroy each other's data; a place that is taken stays who it was.
        for (other, options) in exports.iter().filter(|(other, _)| other != kind) {
            refused(
                &target,
                &[&["export", other, "a"], options.as_slice()].concat(),
                &["a is exported as", "unexport a"],
            );
        }
        if *kind == "vhost-blk" {
            refused(&target, &["export", "vhost-blk", "b", "--socket", &blk], &[&blk, "serves a"]);
        }
        refused(&target, &["detach", "a"], &["in use", "unexport a"]);
        refused(&target, &["unexport", kind, "b"], &["b is not exported"]);
        ok(&target, &["unexport", kind, "a"]);
        assert_eq!(all_exports(&target), nothing, "{kind}: nothing stays behind");
    }
    // What fails leaves nothing.
    if has_vhost {
        let file = path("file");
        std::fs::write(&file, "x").unwrap();
        refused(&target, &["export", "vhost-blk", "a", "--socket", &file], &["no socket"]);
        refused(&target, &["export", "vhost-scsi", "a", "--socket", "/nowhere/at/all"], &["cannot make the folder"]);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    refused(
        &target,
        &["export", "iscsi", "a", "--listen", &taken.local_addr().unwrap().to_string()],
        &["cannot listen"],
    );
    let (status, _, err) = lloop(Some(&target), &["export", "iscsi", "a", "--listen", "0.0.0.0:3260"]);
    assert!(status == 2 && err.contains("--allow-initiator"), "{err}");
    assert_eq!(all_exports(&target), nothing);
}

#[test]
fn usage_errors_and_a_missing_target() {
    for args in [
        &["attach"][..],
        &["frobnicate"],
        &["attach", "/f", "--block-size", "1000"],
        &["resize", "x", "many"],
        &["stat", "--prometheus", "--json"],
    ] {
        let (status, _, err) = lloop(None, args);
        assert_eq!(status, 2, "lloop {args:?}: {err}");
    }
    let (status, _, err) = lloop(None, &["--socket", "/nowhere/x.sock", "list"]);
    assert!(status == 1 && err.contains("/nowhere/x.sock") && err.contains("lloop_tgt"), "{err}");
    for shell in ["bash", "zsh", "fish"] {
        let (status, out, _) = lloop(None, &["completions", shell]);
        assert!(status == 0 && out.contains("attach"), "{shell}");
    }
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every method of ours through one client, told where the target is; the client's way to load the plugin is in `command`.
fn through_a_client(target: &Target, client: &dyn Fn() -> Command, file: &Path) {
    let call = |args: &[&str]| {
        let mut command = client();
        command.args(["-s", target.socket.to_str().unwrap()]).args(args);
        let (status, text) = run(&mut command, Duration::from_secs(60));
        (status.code().unwrap(), text)
    };
    let ok = |args: &[&str]| {
        let (status, text) = call(args);
        assert_eq!(status, 0, "{args:?}: {text}");
        text
    };
    let shown = file.to_str().unwrap();
    assert_eq!(ok(&["bdev_lloop_create", "--filename", shown, "--allow-any-fs", "--name", "py0"]).trim(), "py0");
    assert!(ok(&["bdev_get_bdevs"]).contains("py0"), "SPDK's own methods work beside ours");
    assert!(ok(&["bdev_lloop_get_stats", "py0"]).contains("in_flight"));
    ok(&["bdev_lloop_resize", "py0", "--size", "8M"]);
    assert_eq!(target.bdev("py0")["num_blocks"], 2048);
    ok(&["bdev_lloop_set_options", "--workers", "17"]);
    assert!(ok(&["bdev_lloop_get_options"]).contains("17"));
    let (status, text) = call(&["bdev_lloop_create", "--filename", "/nowhere/x.img", "--allow-any-fs"]);
    assert!(status == 1 && text.contains("/nowhere/x.img"), "{status} {text}");
    assert_eq!(call(&["bdev_lloop_create"]).0, 2, "a usage error");
    let (status, text) = call(&["bdev_lloop_resume", "py0"]);
    assert!(status == 1 && text.contains("nothing to resume"), "{text}");
    ok(&["bdev_lloop_delete", "py0"]);
    assert!(target.names().is_empty());
}

#[test]
fn spdks_client_with_the_plugin() {
    let target = Target::start();
    let file = target.image("a.img", 4 * MIB);
    let rpc = repository().join("rpc");
    let python = if Path::new("/usr/bin/python3").exists() { "/usr/bin/python3" } else { "python3" };
    let tree = std::env::var("SPDK_DIR").expect("SPDK_DIR is set: run the tests by scripts/test.sh");
    let plain = || {
        let mut command = Command::new(python);
        command.arg(Path::new(&tree).join("scripts/rpc.py")).env("PYTHONPATH", &rpc).args(["--plugin", "lloop_rpc"]);
        command
    };
    through_a_client(&target, &plain, &file);
    let wrapped = || {
        let mut command = Command::new(python);
        command.arg(rpc.join("spdk_rpc.py")).env("SPDK_DIR", &tree).env_remove("PYTHONPATH");
        command
    };
    std::fs::File::options().write(true).open(&file).unwrap().set_len(4 * MIB).unwrap();
    through_a_client(&target, &wrapped, &file);
}

#[test]
fn the_client_of_pypi_with_the_plugin() {
    let target = Target::start();
    let file = target.image("a.img", 4 * MIB);
    let venv = std::env::var("LLOOP_PYPI_VENV").expect("LLOOP_PYPI_VENV is set: run the tests by scripts/test.sh");
    let wrapped = || {
        let mut command = Command::new(Path::new(&venv).join("bin/python"));
        command.arg(repository().join("rpc/spdk_rpc.py")).env_remove("SPDK_DIR").env("LLOOP_CACHE", "/nowhere");
        command
    };
    through_a_client(&target, &wrapped, &file);
}
