//! `lloop create` on Lustre: the striping that was asked for, or no file.

use crate::common::Target;
use crate::common::slow::{SlowFile, fixture, on_lustre};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// Runs `lloop create` as on Lustre; what it printed, or what it complained about.
fn create(file: &Path, args: &[&str]) -> Result<String, String> {
    create_with(&mut Command::new(env!("CARGO_BIN_EXE_lloop")), file, args)
}

fn create_with(command: &mut Command, file: &Path, args: &[&str]) -> Result<String, String> {
    let output = on_lustre(command).arg("create").arg(file).args(["--size", "8M"]).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.code() {
        Some(0) => Ok(text(&output.stdout)),
        Some(1) => Err(text(&output.stderr)),
        other => panic!("{other:?}: {}", text(&output.stderr)),
    }
}

fn refused(file: &Path, args: &[&str], words: &[&str]) {
    let error = create(file, args).unwrap_err();
    for word in words.iter().chain(&[&*file.to_string_lossy()]) {
        assert!(error.contains(word), "{args:?}: no {word:?} in {error}");
    }
    assert!(!file.exists(), "{args:?}: nothing is left");
}

#[test]
fn create_stripes_files_on_lustre() {
    let folder = crate::common::folder();
    let slow = SlowFile::lustre(folder.path(), MIB, &fixture("v1-two-stripes"));
    let file = |name: &str| slow.mountpoint.join(name);
    let text = create(&file("a"), &["--stripe-count", "3", "--stripe-size", "1M", "--pool", "flash"]).unwrap();
    assert!(text.contains("8388608 bytes (8 MiB), sparse, 3 stripes of 1 MiB in pool flash, on OST "), "{text}");
    assert!(text.contains("a pool flash was not checked"), "{text}");
    assert_eq!(std::fs::metadata(file("a")).unwrap().len(), 8 * MIB);
    let text = create(&file("b"), &["--stripe-count", "-1", "--preallocate", "--json"]).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["layout"]["lmm_stripe_count"], &report["preallocated"]), (&json!(4), &json!(true)), "{text}");
    // The site's defaults, where nothing is asked for.
    let text = create(&file("c"), &[]).unwrap();
    assert!(text.contains("1 stripe of 4 MiB"), "{text}");
    let error = create(&file("a"), &["--stripe-count", "1"]).unwrap_err();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(std::fs::metadata(file("a")).unwrap().len(), 8 * MIB);
}

#[test]
fn create_refuses_what_a_site_ignores() {
    let folder = crate::common::folder();
    let slow = SlowFile::lustre(folder.path(), MIB, &fixture("v1-two-stripes"));
    let file = slow.mountpoint.join("a");
    refused(&file, &["--stripe-count", "5"], &["stripe count is 4 instead of 5", "did not do it"]);
    slow.set_faults("ignore_setstripe");
    refused(&file, &["--stripe-count", "2"], &["stripe count is 1 instead of 2"]);
    refused(&file, &["--stripe-size", "1M"], &["4194304 bytes instead of 1048576"]);
    refused(&file, &["--pool", "flash"], &["no pool instead of flash"]);
    slow.set_faults("ignore_pool");
    refused(&file, &["--pool", "flash", "--stripe-count", "2"], &["no pool instead of flash"]);
    slow.set_faults("skip_setstripe");
    refused(&file, &["--stripe-count", "2"], &["no layout"]);
    slow.set_faults("no_fallocate");
    refused(&file, &["--stripe-count", "2", "--preallocate"], &["ZFS", "--preallocate"]);
    slow.set_faults("");
    create(&file, &["--stripe-count", "2", "--preallocate"]).unwrap();
}

#[test]
fn create_knows_the_pools() {
    let folder = crate::common::folder();
    let slow = SlowFile::lustre(folder.path(), MIB, &fixture("v1-two-stripes"));
    let file = slow.mountpoint.join("a");
    // What a client shows of its pools. A new file of the stand-in begins on any of its four OSTs.
    let pools = folder.path().join("proc/lov/standin-clilov-ffff888000000001/pools");
    std::fs::create_dir_all(&pools).unwrap();
    let osts = |osts: &[u32]| osts.iter().map(|ost| format!("standin-OST{ost:04x}_UUID\n")).collect::<String>();
    std::fs::write(pools.join("all"), osts(&[0, 1, 2, 3])).unwrap();
    std::fs::write(pools.join("far"), osts(&[17])).unwrap();
    let create = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lloop"));
        create_with(command.env("STANDIN_PROC", folder.path().join("proc")), &file, args)
    };
    let error = create(&["--pool", "nosuch"]).unwrap_err();
    assert!(error.contains("standin has no pool nosuch (it has all, far)") && error.contains("/a"), "{error}");
    assert!(!file.exists());
    let error = create(&["--pool", "far", "--stripe-count", "2"]).unwrap_err();
    assert!(error.contains("pool far has OST 17"), "{error}");
    assert!(!file.exists());
    let text = create(&["--pool", "all", "--stripe-count", "-1"]).unwrap();
    assert!(text.contains("in pool all, on OST 0, 1, 2, 3") && !text.contains("not checked"), "{text}");
}

#[test]
fn create_makes_plain_layouts_whatever_the_site_has() {
    let folder = crate::common::folder();
    let slow = SlowFile::lustre(folder.path(), MIB, &fixture("v1-two-stripes"));
    let (file, dom) = (slow.mountpoint.join("a"), slow.mountpoint.join("dom"));
    slow.set_faults("default_dom");
    let text = create(&file, &[]).unwrap();
    assert!(text.contains("1 stripe of 4 MiB, on OST") && text.contains("components (mdt, raid0)"), "{text}");
    slow.set_faults("default_dom\nskip_setstripe");
    let other = slow.mountpoint.join("b");
    refused(&other, &[], &["metadata server (DoM)", "lfs setstripe"]);
    // One that somebody else has made is attached, with a word about it.
    slow.set_faults("default_dom");
    std::fs::File::create(&dom).unwrap().set_len(8 * MIB).unwrap();
    let target = Target::start_on_lustre(&[]);
    target.ok("bdev_lloop_create", json!({"filename": file}));
    assert!(!target.log().contains("DoM"), "{}", target.log());
    target.ok("bdev_lloop_create", json!({"filename": dom}));
    assert_eq!(target.log().matches("(DoM)").count(), 1, "{}", target.log());
}
