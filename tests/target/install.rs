//! scripts/install.sh: what it puts in place works there, and it takes all of it away again.

use crate::common::{Target, eventually, folder, image, run};
use serde_json::json;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn install(destdir: Option<&Path>, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install.sh"));
    command.args(args).env_remove("DESTDIR");
    if let Some(destdir) = destdir {
        command.env("DESTDIR", destdir);
    }
    let (status, text) = run(&mut command, Duration::from_secs(120));
    (status.code().unwrap(), text)
}

fn installed(destdir: Option<&Path>, args: &[&str]) -> String {
    let (status, text) = install(destdir, args);
    assert_eq!(status, 0, "install.sh {args:?}: {text}");
    text
}

/// Everything below a folder, files and folders.
fn tree(of: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(of).into_iter().flatten() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            all.extend(tree(&entry.path()));
        }
        all.insert(entry.path());
    }
    all
}

fn text_of(command: &mut Command) -> String {
    let (status, text) = run(command, Duration::from_secs(60));
    assert!(status.success(), "{command:?}: {text}");
    text
}

#[test]
fn what_is_installed_works_and_goes_again() {
    let dir = folder();
    let prefix = dir.path().join("p");
    let shown = prefix.to_str().unwrap().to_owned();
    let args = ["--prefix", &shown];
    // Somebody else's folder, with a file in it.
    std::fs::create_dir_all(prefix.join("bin")).unwrap();
    std::fs::write(prefix.join("bin/other"), "").unwrap();
    let before = tree(&prefix);
    installed(None, &args);
    let first = tree(&prefix);
    installed(None, &args);
    assert_eq!(tree(&prefix), first, "an upgrade leaves nothing behind");

    // The target and the command line from there: save, and start with it.
    let config = prefix.join("etc/lloop/config.json");
    let bin = |name: &str| prefix.join("bin").join(name);
    let file = image(dir.path(), "a.img", 4 << 20);
    let start = || {
        let mut command = Command::new(bin("lloop_tgt"));
        Target::start_by(&mut command, &["--config", config.to_str().unwrap(), "--huge-unlink"], folder())
    };
    let mut target = start();
    let lloop = |target: &Target, args: &[&str]| {
        text_of(Command::new(bin("lloop")).env("LLOOP_SOCKET", &target.socket).args(args))
    };
    assert_eq!(
        lloop(&target, &["attach", file.to_str().unwrap(), "--allow-any-fs", "--block-size", "512"]).trim(),
        "lloop0"
    );
    let said = lloop(&target, &["save", config.to_str().unwrap()]);
    assert!(said.contains("1 device;") && target.log().contains("not there yet"), "{said}\n{}", target.log());
    assert_eq!(config.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    let device = target.bdev("lloop0");
    target.stop();
    let mut target = start();
    let back = eventually(|| target.names().contains(&"lloop0".to_owned()));
    assert!(back && target.bdev("lloop0") == device, "{}", target.log());
    let tree_of_spdk = std::env::var("SPDK_DIR").expect("SPDK_DIR is set: run the tests by scripts/test.sh");
    let mut client = Command::new(bin("spdk_rpc.py"));
    client.env("SPDK_DIR", tree_of_spdk).args(["-s", target.socket.to_str().unwrap(), "bdev_lloop_get_options"]);
    assert!(text_of(&mut client).contains("max_lloop"));
    target.stop();

    // Manual pages without a complaint of the formatter.
    for (page, words) in [("man1/lloop.1.gz", "lloop export nvmf"), ("man8/lloop_tgt.8.gz", "--root")] {
        let page = prefix.join("share/man").join(page);
        let script = "set -o pipefail; gunzip -c \"$1\" | groff -man -Tutf8 -ww -P-c -P-b -P-u 2>&1 1>/dev/null";
        let complaints = text_of(Command::new("bash").args(["-c", script, "bash"]).arg(&page));
        assert_eq!(complaints, "", "{}", page.display());
        let script = script.replace("2>&1 1>/dev/null", "");
        let text = text_of(Command::new("bash").args(["-c", &script, "bash"]).arg(&page));
        let text = text.replace(['\u{2010}', '\u{2212}'], "-").split_whitespace().collect::<Vec<_>>().join(" ");
        for word in ["NAME", "SYNOPSIS", "OPTIONS", "SEE ALSO", words] {
            assert!(text.contains(word), "no {word} in {text}");
        }
    }
    // Completions: bash's are tried, the others are there.
    let script =
        "source \"$1\"; COMP_WORDS=(lloop att); COMP_CWORD=1; _lloop lloop att lloop; echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(prefix.join("share/bash-completion/completions/lloop"));
    assert_eq!(text_of(&mut bash).trim(), "attach");
    for (file, word) in [
        ("bash-completion/completions/lloop_tgt", "--cpumask"),
        ("zsh/site-functions/_lloop", "#compdef lloop"),
        ("zsh/site-functions/_lloop_tgt", "#compdef lloop_tgt"),
        ("fish/vendor_completions.d/lloop.fish", "complete -c lloop"),
        ("fish/vendor_completions.d/lloop_tgt.fish", "complete -c lloop_tgt"),
    ] {
        assert!(std::fs::read_to_string(prefix.join("share").join(file)).unwrap().contains(word), "{file}");
    }

    // What the user made stays, and is said to.
    let text = installed(None, &["--prefix", &shown, "--uninstall"]);
    assert!(text.contains("not empty") && text.contains("/etc/lloop/"), "{text}");
    let left: BTreeSet<_> = tree(&prefix).into_iter().filter(|path| !path.starts_with(prefix.join("etc"))).collect();
    assert_eq!(left, before);
    assert!(config.exists());
    let (status, text) = install(None, &["--prefix", &shown, "--uninstall"]);
    assert!(status == 1 && text.contains("nothing is installed there"), "{text}");
    // And a file that is not ours is not written over.
    std::fs::write(bin("lloop"), "mine").unwrap();
    let (status, text) = install(None, &args);
    assert!(status == 1 && text.contains("not lloop's"), "{text}");
    assert_eq!(std::fs::read(bin("lloop")).unwrap(), b"mine");
}

#[test]
fn a_package_is_made_in_destdir() {
    let dir = folder();
    let (destdir, args) = (dir.path().join("d"), ["--prefix", "/usr"]);
    std::fs::create_dir(&destdir).unwrap();
    installed(Some(&destdir), &args);
    for path in
        ["usr/bin/lloop", "usr/bin/lloop_tgt", "usr/lib/systemd/system/lloop.service", "etc/lloop/lloop_tgt.conf"]
    {
        assert!(destdir.join(path).exists(), "{path}");
    }
    for path in tree(&destdir).into_iter().filter(|path| path.is_file()) {
        let content = std::fs::read(&path).unwrap();
        let needle = destdir.as_os_str().as_encoded_bytes();
        let found = content.windows(needle.len()).any(|part| part == needle);
        assert!(!found, "{} tells of DESTDIR", path.display());
    }
    // Untouched options go as well.
    installed(Some(&destdir), &["--prefix", "/usr", "--uninstall"]);
    assert_eq!(tree(&destdir), BTreeSet::new());
}

/// The value of a directive in the unit; those that may be there several times are put together.
fn directive(unit: &str, name: &str) -> String {
    let values = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.collect::<Vec<_>>().join(" ")
}

#[test]
fn the_service_is_one_that_systemd_takes() {
    let dir = folder();
    let prefix = dir.path().join("p");
    let shown = prefix.to_str().unwrap().to_owned();
    std::fs::create_dir(&prefix).unwrap();
    installed(None, &["--prefix", &shown]);
    let path = prefix.join("lib/systemd/system/lloop.service");
    // (Manual pages are looked up by systemd itself, in the system's own folders.)
    let text = text_of(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path));
    assert_eq!(text.trim(), "", "systemd has something to say");
    let unit = std::fs::read_to_string(&path).unwrap();

    // The target with no more rights than the service has, and without writable code (PR_SET_MDWE, which is what
    // MemoryDenyWriteExecute does where the kernel can).
    let bounding: Vec<String> = directive(&unit, "CapabilityBoundingSet")
        .split_whitespace()
        .map(|capability| format!("+{}", capability.trim_start_matches("CAP_").to_ascii_lowercase()))
        .collect();
    assert!(bounding.len() > 5 && directive(&unit, "MemoryDenyWriteExecute") == "yes");
    let mdwe = "import ctypes, os, sys\nctypes.CDLL(None).prctl(65, 1, 0, 0, 0)\nos.execv(sys.argv[1], sys.argv[1:])";
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", &format!("--bounding-set=-all,{}", bounding.join(",")), "--"]);
    command.args(["/usr/bin/python3", "-c", mdwe]).arg(prefix.join("bin/lloop_tgt"));
    let exec = directive(&unit, "ExecStart");
    assert!(exec.contains("--huge-unlink") && exec.contains("/etc/lloop/config.json"), "{exec}");
    let mut target = Target::start_by(&mut command, &["--huge-unlink"], folder());
    let status = std::fs::read_to_string(format!("/proc/{}/status", target.pid())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    for engine in ["threads", "uring"] {
        let file = target.image(engine, 4 << 20);
        let name = target.attach(&file, json!({"engine": engine}));
        let mut nvme = target.connect(&name);
        nvme.write(7, &[0x77; 4096]).unwrap();
        nvme.flush().unwrap();
        assert_eq!(nvme.read(7, 1).unwrap(), [0x77; 4096]);
    }
    target.stop();

    // It tells the service manager when it is ready.
    let notify = dir.path().join("notify");
    let listener = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    listener.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(directive(&unit, "Type"), "notify");
    let mut command = Command::new(prefix.join("bin/lloop_tgt"));
    let _target = Target::start_by(command.env("NOTIFY_SOCKET", &notify), &[], folder());
    let mut said = [0; 64];
    let n = listener.recv(&mut said).unwrap();
    assert!(said[..n].starts_with(b"READY=1"));

    // Hugepages that are free already are left as they are.
    let before = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
    text_of(Command::new(prefix.join("libexec/lloop/hugepages")).arg("2"));
    assert_eq!(std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap(), before);
    installed(None, &["--prefix", &shown, "--uninstall"]);
    assert_eq!(tree(&prefix), BTreeSet::new());
}
