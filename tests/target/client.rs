//! A target that is a client of Lustre, as the stand-in has it, and what tests do with one.

use crate::common::slow::{SlowFile, fixture};
use crate::common::{Target, eventually};
use serde_json::{Value, json};

pub const MIB: u64 = 1 << 20;

/// How long a lock is waited for here.
pub const LOCK_TIMEOUT_S: u64 = 3;

/// A target that is a client of Lustre, and looks after its files often.
pub fn start() -> Target {
    let target = Target::start_on_lustre(&[]);
    target.ok("bdev_lloop_set_options", json!({"lock_check": 1, "lock_timeout": LOCK_TIMEOUT_S, "stall_warn": 1}));
    target
}

/// A file of 8 MiB in stripes of 1 MiB over two OSTs.
pub fn striped(folder: &tempfile::TempDir) -> SlowFile {
    SlowFile::lustre(folder.path(), 8 * MIB, &fixture("v1-two-stripes"))
}

/// The parameters of an attach.
pub fn with_file(file: &SlowFile, more: &Value) -> Value {
    let mut params = json!({"filename": file.path});
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    params
}

pub fn attach(target: &Target, file: &SlowFile, more: Value) -> String {
    target.ok("bdev_lloop_create", with_file(file, &more)).as_str().unwrap().to_owned()
}

pub fn info(target: &Target, name: &str) -> Value {
    target.bdev(name)["driver_specific"]["lloop"].clone()
}

pub fn stats(target: &Target, name: &str) -> Value {
    target.ok("bdev_lloop_get_stats", json!({"name": name}))["devices"][0].clone()
}

/// Waits until `seen`.
pub fn until(what: &str, seen: impl FnMut() -> bool) {
    assert!(eventually(seen), "waiting until {what}");
}
