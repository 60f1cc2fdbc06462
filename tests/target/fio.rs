//! fio with SPDK's plugin and lloop in it: the stock fio, on the jobs of examples/fio as docs/fio.md has them run.

use crate::common::{beside, folder, image, run};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// The examples and fresh images for them.
fn examples() -> tempfile::TempDir {
    let folder = folder();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/fio")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    for name in ["uring.img", "threads.img"] {
        image(folder.path(), name, 128 * MIB);
    }
    folder
}

/// Runs the stock fio in `folder`; whether it found everything right, and what it said.
fn fio(folder: &Path, plugin: Option<&Path>, job: &str) -> (bool, String) {
    let mut command = Command::new("/usr/bin/fio");
    if let Some(plugin) = plugin {
        command.env("LD_PRELOAD", plugin);
    }
    let (status, output) = run(command.current_dir(folder).arg(job), LIMIT);
    // One line with "err=" a job.
    let jobs: Vec<_> = output.lines().filter(|line| line.contains("(groupid=") && line.contains("err=")).collect();
    assert_eq!(jobs.len(), 2, "{output}");
    let right = jobs.iter().all(|line| line.contains("err= 0"));
    assert_eq!(status.success(), right, "{output}");
    assert!(!right || plugin.is_none() || !output.contains("*ERROR*"), "{output}");
    (right, output)
}

/// Lets the host's fio verify on the files themselves what the plugin's has written there by `job`.
fn host_verifies(folder: &Path, job: &str) {
    let text = std::fs::read_to_string(folder.join(job)).unwrap();
    let lines = text.lines().filter_map(|line| match line.split_once('=') {
        // (With a backlog fio checks nothing when it is to verify only.)
        Some(("spdk_json_conf" | "spdk_mem" | "verify_backlog" | "serialize_overlap" | "iodepth", _)) => None,
        Some(("ioengine", _)) => Some("ioengine=psync\nverify_only=1".to_owned()),
        Some(("filename", device)) => Some(format!("filename={device}.img")),
        _ => Some(line.to_owned()),
    });
    std::fs::write(folder.join("host.fio"), lines.collect::<Vec<_>>().join("\n")).unwrap();
    let (right, output) = fio(folder, None, "host.fio");
    assert!(right, "{job}, seen from the host:\n{output}");
    // And it would have noticed a single wrong byte.
    let file = std::fs::File::options().read(true).write(true).open(folder.join("threads.img")).unwrap();
    let (mut header, mut byte) = ([0; 2], [0]);
    let block = (0..64 * MIB).step_by(4096).find(|&at| file.read_exact_at(&mut header, at).is_ok() && header != [0; 2]);
    let at = block.expect("something is written") + 100;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
    let (right, output) = fio(folder, None, "host.fio");
    assert!(!right && output.contains("verify failed at file threads.img"), "a wrong byte goes unnoticed:\n{output}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let plugin = beside("liblloop_fio.so");
    for job in ["verify.fio", "sequential.fio", "mixed.fio"] {
        let folder = examples();
        let (right, output) = fio(folder.path(), Some(&plugin), job);
        assert!(right, "{job}:\n{output}");
        host_verifies(folder.path(), job);
    }
}

#[test]
fn fio_takes_the_plugin_by_its_path() {
    let folder = examples();
    let job = std::fs::read_to_string(folder.path().join("sequential.fio")).unwrap();
    let plugin = beside("liblloop_fio.so");
    let job = job.replace("ioengine=spdk_bdev", &format!("ioengine={}", plugin.display()));
    std::fs::write(folder.path().join("by-path.fio"), job).unwrap();
    let (right, output) = fio(folder.path(), None, "by-path.fio");
    assert!(right && output.contains("WRITE:"), "{output}");
    assert!(!output.contains("*ERROR*"), "{output}");
    host_verifies(folder.path(), "sequential.fio");
}

#[test]
fn fio_trims() {
    let folder = examples();
    for name in ["uring.img", "threads.img"] {
        std::fs::write(folder.path().join(name), vec![7; 128 * MIB as usize]).unwrap();
    }
    let (right, output) = fio(folder.path(), Some(&beside("liblloop_fio.so")), "trim.fio");
    assert!(right, "{output}");
    for name in ["uring.img", "threads.img"] {
        let file = std::fs::File::open(folder.path().join(name)).unwrap();
        file.sync_all().unwrap();
        let content = std::fs::read(folder.path().join(name)).unwrap();
        let (first, second) = content.split_at(64 * MIB as usize);
        assert!(second.iter().all(|&byte| byte == 7), "{name}: what was not trimmed is there");
        assert!(first.chunks(65536).all(|chunk| chunk != [7; 65536]), "{name}: all of the first half was trimmed");
        if name == "threads.img" {
            assert!(first.iter().all(|&byte| byte == 0), "trimmed blocks read as zeroes");
            let blocks = file.metadata().unwrap().blocks();
            assert!(blocks <= 64 * MIB / 512 + 64, "holes appear in the file: {blocks} blocks");
        }
    }
}

#[test]
fn fio_says_why_a_file_is_refused() {
    let folder = examples();
    std::fs::remove_file(folder.path().join("threads.img")).unwrap();
    let mut command = Command::new("/usr/bin/fio");
    command.env("LD_PRELOAD", beside("liblloop_fio.so")).current_dir(folder.path()).arg("sequential.fio");
    let (status, said) = run(&mut command, LIMIT);
    assert!(!status.success() && said.contains("threads.img"), "{status}\n{said}");
}
