//! Every mistake gets its errno and a sentence that names the file and the remedy, leaves nothing behind and ends nothing.

use crate::common::{INVALID_PARAMS, Target, folder};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// What must be as before when a call was refused.
///
/// (Without rings: while other modules look into a device that was just attached, there is one for them.)
fn traces(target: &Target) -> (Vec<String>, Vec<String>) {
    let mut descriptors = target.descriptors();
    descriptors.retain(|d| !d.starts_with("anon_inode:"));
    (descriptors, target.names())
}

/// Calls create with `params` and checks that it is refused and leaves nothing behind.
fn refused(target: &Target, params: Value, errno: i32, words: &[&str]) {
    let before = traces(target);
    target.refused("bdev_lloop_create", params, errno, words);
    assert_eq!(traces(target), before, "something was left behind");
}

fn with(file: &Path, more: Value) -> Value {
    let mut params = json!({"filename": file, "allow_any_fs": true});
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    params
}

#[test]
fn files_that_cannot_be_attached() {
    let mut target = Target::start();
    let dir = target.folder.path().to_owned();
    let file = target.image("a.img", 4 * MIB);
    let shown = file.to_str().unwrap();
    // One good attach first, so that what is made once is there.
    target.attach(&file, json!({}));
    target.ok("bdev_lloop_delete", json!({"name": "lloop0"}));

    let missing = dir.join("missing.img");
    refused(&target, with(&missing, json!({})), libc::ENOENT, &[missing.to_str().unwrap(), "create it"]);
    refused(&target, with(&dir, json!({})), libc::EINVAL, &[dir.to_str().unwrap(), "directory", "regular file"]);
    refused(&target, with(Path::new("/dev/null"), json!({})), libc::EINVAL, &["/dev/null", "character device"]);
    if let Some(disk) = ["/dev/vda", "/dev/sda", "/dev/loop0"].into_iter().find(|d| Path::new(d).exists()) {
        refused(&target, with(Path::new(disk), json!({})), libc::EINVAL, &[disk, "block device"]);
    }
    let fifo = dir.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&target, with(&fifo, json!({})), libc::EINVAL, &[fifo.to_str().unwrap(), "FIFO"]);
    let (one, two) = (dir.join("one"), dir.join("two"));
    symlink(&one, &two).unwrap();
    symlink(&two, &one).unwrap();
    refused(&target, with(&one, json!({})), libc::ELOOP, &[one.to_str().unwrap(), "symbolic links"]);
    refused(&target, with(&file.join("below"), json!({})), libc::ENOTDIR, &[shown]);
    refused(&target, with(Path::new(""), json!({})), libc::EINVAL, &["filename is empty"]);

    refused(&target, json!({"filename": file}), libc::EINVAL, &[shown, "not on Lustre", "allow_any_fs"]);
    refused(
        &target,
        with(Path::new("/proc/version"), json!({"read_only": true})),
        libc::EINVAL,
        &["/proc/version", "O_DIRECT"],
    );
    if Path::new("/dev/shm").is_dir() {
        let in_memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        in_memory.as_file().set_len(MIB).unwrap();
        refused(&target, with(in_memory.path(), json!({})), libc::EINVAL, &["tmpfs", "O_DIRECT"]);
    }

    let empty = target.image("empty.img", 0);
    refused(&target, with(&empty, json!({})), libc::EINVAL, &[empty.to_str().unwrap(), "less than a block"]);
    let short = target.image("short.img", 4095);
    refused(&target, with(&short, json!({})), libc::EINVAL, &[short.to_str().unwrap(), "less than a block"]);
    assert_eq!(target.attach(&short, json!({"block_size": 512})), "lloop0", "seven blocks of 512");
    target.ok("bdev_lloop_delete", json!({"name": "lloop0"}));

    refused(&target, with(&file, json!({"offset": 100})), libc::EINVAL, &[shown, "offset 100", "4096"]);
    refused(&target, with(&file, json!({"offset": 4 * MIB})), libc::EINVAL, &[shown, "past the file's end"]);
    refused(&target, with(&file, json!({"offset": 1u64 << 62})), libc::EINVAL, &[shown, "past the file's end"]);
    refused(&target, with(&file, json!({"size_limit": 4 * MIB + 1})), libc::EINVAL, &[shown, "over the file's end"]);
    refused(
        &target,
        with(&file, json!({"offset": MIB, "size_limit": 4 * MIB})),
        libc::EINVAL,
        &[shown, "over the file's end"],
    );
    refused(&target, with(&file, json!({"block_size": 1000})), libc::EINVAL, &[shown, "512 or 4096"]);
    refused(&target, with(&file, json!({"name": ""})), libc::EINVAL, &["name"]);
    refused(&target, with(&file, json!({"lock": "group"})), libc::EINVAL, &["group"]);

    // After all that the file can still be attached: nothing holds a lock on it.
    assert_eq!(target.attach(&file, json!({})), "lloop0");
    target.stop();
}

#[test]
fn files_that_are_in_use() {
    let target = Target::start();
    let file = target.image("a.img", 4 * MIB);
    target.attach(&file, json!({}));
    let shown = file.to_str().unwrap();
    refused(&target, with(&file, json!({})), libc::EBUSY, &[shown, "lloop0"]);
    let by_another_path = file.parent().unwrap().join(".").join("a.img");
    refused(&target, with(&by_another_path, json!({"name": "x"})), libc::EBUSY, &["lloop0"]);
    let link = file.with_file_name("soft.img");
    symlink(&file, &link).unwrap();
    refused(&target, with(&link, json!({})), libc::EBUSY, &[link.to_str().unwrap(), "lloop0", shown]);
    let hard = file.with_file_name("hard.img");
    std::fs::hard_link(&file, &hard).unwrap();
    refused(&target, with(&hard, json!({})), libc::EBUSY, &[hard.to_str().unwrap(), "lloop0", shown]);
    refused(&target, with(&file, json!({"read_only": true})), libc::EBUSY, &["lloop0"]);

    // Another process: kept out by a writer, and a reader keeps out writers only.
    let other = Target::start();
    refused(&other, with(&file, json!({})), libc::EBUSY, &[shown, "in use by another process"]);
    refused(&other, with(&file, json!({"read_only": true})), libc::EBUSY, &[shown, "a writer"]);
    target.ok("bdev_lloop_delete", json!({"name": "lloop0"}));
    target.attach(&file, json!({"read_only": true}));
    refused(&other, with(&file, json!({})), libc::EBUSY, &[shown]);
    other.attach(&file, json!({"read_only": true}));
}

#[test]
fn names_and_numbers_of_devices() {
    let target = Target::start();
    let file = target.image("a.img", MIB);
    let second = target.image("b.img", MIB);
    target.ok("bdev_malloc_create", json!({"name": "Malloc0", "num_blocks": 256, "block_size": 512}));
    target.attach(&file, json!({}));
    refused(&target, with(&second, json!({"name": "lloop0"})), libc::EEXIST, &["lloop0", "taken"]);
    refused(&target, with(&second, json!({"name": "Malloc0"})), libc::EEXIST, &["Malloc0", "taken"]);
    for max in [0, 257, 100_000] {
        let params = json!({"max_lloop": max});
        target.refused("bdev_lloop_set_options", params, libc::EINVAL, &["max_lloop", "1 to 256", &max.to_string()]);
    }
    target.ok("bdev_lloop_set_options", json!({"max_lloop": 1}));
    refused(&target, with(&second, json!({})), libc::EBUSY, &["max_lloop", "detach"]);
    target.ok("bdev_lloop_set_options", json!({"max_lloop": 2}));
    assert_eq!(target.attach(&second, json!({})), "lloop1");

    target.refused("bdev_lloop_delete", json!({"name": "nope"}), libc::ENODEV, &["nope"]);
    target.refused("bdev_lloop_delete", json!({"name": "Malloc0"}), libc::ENODEV, &["Malloc0"]);
    target.refused("bdev_lloop_resize", json!({"name": "nope"}), libc::ENODEV, &["nope"]);
    target.refused("bdev_lloop_get_stats", json!({"name": "nope"}), libc::ENODEV, &["nope"]);
    target.refused("bdev_lloop_resume", json!({"name": "nope"}), libc::ENODEV, &["nope"]);
    target.refused("bdev_lloop_resume", json!({"name": "lloop0"}), libc::EINVAL, &["lloop0", "nothing to resume"]);

    // Two deletes in one breath: the second meets the first under way.
    let mut stream = std::os::unix::net::UnixStream::connect(&target.socket).unwrap();
    let delete = |id| {
        json!({"jsonrpc": "2.0", "id": id, "method": "bdev_lloop_delete", "params": {"name": "lloop1"}}).to_string()
    };
    stream.write_all((delete(1) + &delete(2)).as_bytes()).unwrap();
    let mut text = String::new();
    let answers = loop {
        let mut part = [0; 4096];
        let n = stream.read(&mut part).unwrap();
        assert!(n > 0, "the target closed the connection");
        text += std::str::from_utf8(&part[..n]).unwrap();
        let answers: Vec<Value> = serde_json::Deserializer::from_str(&text).into_iter().map_while(Result::ok).collect();
        if answers.len() == 2 {
            break answers;
        }
    };
    let by_id = |id: u64| answers.iter().find(|a| a["id"] == id).unwrap();
    assert_eq!(by_id(1)["result"], true);
    let code = by_id(2)["error"]["code"].as_i64().unwrap();
    assert_eq!(code, -i64::from(libc::EBUSY), "{}", by_id(2));
    assert_eq!(target.names(), ["lloop0"]);
}

#[test]
fn parameters_that_do_not_fit() {
    let target = Target::start();
    let file = target.image("a.img", MIB);
    let cases = [
        ("bdev_lloop_create", json!({}), "filename"),
        ("bdev_lloop_create", json!({"filename": 7}), "filename"),
        ("bdev_lloop_create", json!({"filename": file, "colour": "red"}), "colour"),
        ("bdev_lloop_create", json!({"filename": file, "block_size": "big"}), "block_size"),
        ("bdev_lloop_create", json!({"filename": file, "block_size": -1}), "block_size"),
        ("bdev_lloop_create", json!({"filename": file, "offset": 1.5}), "offset"),
        ("bdev_lloop_create", json!({"filename": file, "read_only": "yes"}), "read_only"),
        ("bdev_lloop_create", json!({"filename": file, "engine": "steam"}), "engine"),
        ("bdev_lloop_create", json!({"filename": file, "uuid": "x"}), "uuid"),
        ("bdev_lloop_create", json!({"filename": file, "name": ["x"]}), "name"),
        ("bdev_lloop_create", json!({"filename": file, "lock": 1}), "lock"),
        ("bdev_lloop_delete", json!({}), "name"),
        ("bdev_lloop_delete", json!({"name": "x", "force": 1}), "force"),
        ("bdev_lloop_resize", json!({"name": "x", "size": "1G"}), "size"),
        ("bdev_lloop_set_options", json!({"max_lloop": "many"}), "max_lloop"),
        ("bdev_lloop_set_options", json!({"max_loop": 8}), "max_loop"),
        ("bdev_lloop_get_options", json!({"x": 1}), "x"),
        ("bdev_lloop_get_stats", json!({"name": 1}), "name"),
        ("bdev_lloop_resume", json!({"nam": "x"}), "nam"),
    ];
    for (method, params, key) in cases {
        let refused = target.call(method, params.clone()).expect_err(method);
        assert_eq!(refused.code, INVALID_PARAMS, "{method} {params}: {}", refused.message);
        assert!(refused.message.contains(key), "{method} {params} does not name {key}: {}", refused.message);
    }
    assert!(target.names().is_empty());
}

#[test]
fn files_without_permission() {
    // Root ignores permissions, so this target runs without the capabilities that let it.
    let mut command = Command::new("setpriv");
    let without = "-dac_override,-dac_read_search,-fowner";
    command.args(["--bounding-set", without, "--", env!("CARGO_BIN_EXE_lloop_tgt")]);
    let target = Target::start_by(&mut command, &[], folder());
    let file = target.image("a.img", MIB);
    let shown = file.to_str().unwrap();
    std::os::unix::fs::chown(&file, Some(1), Some(1)).unwrap();
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o600);
    refused(&target, with(&file, json!({})), libc::EACCES, &[shown, "permission"]);
    refused(&target, with(&file, json!({"read_only": true})), libc::EACCES, &[shown, "permission"]);
    mode(0o644);
    refused(&target, with(&file, json!({})), libc::EACCES, &[shown, "read-only"]);
    assert_eq!(target.attach(&file, json!({"read_only": true})), "lloop0");
}

#[test]
fn sizes_that_do_not_fit() {
    let target = Target::start();
    let file = target.image("a.img", 4 * MIB);
    let shown = file.to_str().unwrap().to_owned();
    target.attach(&file, json!({}));
    let refused = |size: u64, errno, words: &[&str]| {
        target.refused("bdev_lloop_resize", json!({"name": "lloop0", "size": size}), errno, words);
        assert_eq!(target.bdev("lloop0")["num_blocks"], 1024);
    };
    refused(2 * MIB, libc::EINVAL, &["lloop0", &shown, "cannot shrink"]);
    refused(4 * MIB + 512, libc::EINVAL, &["lloop0", &shown, "4096"]);
    refused(1 << 63, libc::EFBIG, &["lloop0", &shown]);
    refused((1 << 62) + (1 << 61), libc::EFBIG, &[&shown]);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 4 * MIB);
    target.ok("bdev_lloop_delete", json!({"name": "lloop0"}));
    target.attach(&file, json!({"read_only": true}));
    refused(8 * MIB, libc::EROFS, &[&shown, "read-only"]);
    // A file that shrank does not shrink its device.
    std::fs::File::options().write(true).open(&file).unwrap().set_len(MIB).unwrap();
    refused(0, libc::EINVAL, &["lloop0", &shown, "shorter"]);
}
