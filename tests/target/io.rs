//! I/O as an NVMe-oF host does it, with the status codes that it sees, and what arrives in the file.

use crate::common::nvme::Failed;
use crate::common::{Target, eventually};
use serde_json::json;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
const CAPACITY_EXCEEDED: Failed = Failed((0, 0x81));
const WRITE_PROTECTED: Failed = Failed((0, 0x20));
const UNRECOVERED_READ: Failed = Failed((2, 0x81));

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (seed.wrapping_mul(0x9E37_79B9) ^ (i / 3).wrapping_mul(31)) as u8).collect()
}

#[test]
fn data_goes_to_its_place_in_the_file() {
    for (block, offset, engine) in
        [(4096u64, 0u64, "uring"), (4096, 8192, "threads"), (512, 0, "uring"), (512, 1536, "threads")]
    {
        let target = Target::start();
        let file = target.image("a.img", 8 * MIB);
        let name = target.attach(&file, json!({"block_size": block, "offset": offset, "engine": engine}));
        assert_eq!(target.bdev(&name)["driver_specific"]["lloop"]["engine"], engine);
        let mut nvme = target.connect(&name);
        let mut model = vec![0u8; 8 * MIB as usize];
        for (i, (lba, blocks)) in [(0u64, 1usize), (1, 3), (7, 8), (100, 32), (33, 5)].into_iter().enumerate() {
            let data = pattern(i as u64, blocks * block as usize);
            nvme.write(lba, &data).unwrap();
            let at = (offset + lba * block) as usize;
            model[at..at + data.len()].copy_from_slice(&data);
            assert!(nvme.read(lba, blocks).unwrap() == data);
        }
        nvme.write_zeroes(2, 4).unwrap();
        model[(offset + 2 * block) as usize..][..4 * block as usize].fill(0);
        nvme.unmap(104, 16).unwrap();
        model[(offset + 104 * block) as usize..][..16 * block as usize].fill(0);
        nvme.flush().unwrap();
        assert!(nvme.read(100, 32).unwrap() == model[(offset + 100 * block) as usize..][..32 * block as usize]);
        assert!(std::fs::read(&file).unwrap() == model, "block {block}, offset {offset}");
        let stats = target.ok("bdev_lloop_get_stats", json!({"name": name}))["devices"][0].clone();
        assert!(stats["io"]["write"]["ops"].as_u64() >= Some(5) && stats["io"]["write"]["errors"] == 0);
        assert_eq!((&stats["io"]["flush"]["ops"], &stats["io"]["unmap"]["ops"]), (&json!(1), &json!(1)));
    }
}

#[test]
fn a_kernel_thread_polls_only_where_it_may() {
    /// The processors that the kernel's threads of polled rings may use.
    fn processors(target: &Target) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", target.pid())).unwrap();
        let of_task = |task: std::io::Result<std::fs::DirEntry>| {
            let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
            field("Name:").starts_with("iou-sqp-").then(|| field("Cpus_allowed_list:").to_owned())
        };
        tasks.filter_map(of_task).collect()
    }
    for (cpus, expected) in [(json!([1]), vec!["1".to_owned()]), (json!([]), vec![])] {
        let target = Target::start();
        target.ok("bdev_lloop_set_options", json!({"sqpoll_cpus": cpus}));
        let file = target.image("a.img", 8 * MIB);
        let name = target.attach(&file, json!({"engine": "uring"}));
        let mut nvme = target.connect(&name);
        // The ring is made in the background.
        assert!(eventually(|| {
            nvme.write(0, &[9; 65536]).unwrap();
            assert!(nvme.read(0, 16).unwrap() == [9; 65536]);
            target.ok("bdev_lloop_get_stats", json!({}))["rings"]["open"].as_u64() >= Some(1)
        }));
        assert!(target.ok("bdev_lloop_get_stats", json!({}))["rings"]["sqpoll_ops"].is_u64());
        assert!(eventually(|| processors(&target) == expected), "{cpus}: {:?}", processors(&target));
    }
    let target = Target::start();
    target.refused("bdev_lloop_set_options", json!({"sqpoll_cpus": [4095]}), libc::EINVAL, &["sqpoll_cpus", "4095"]);
}

#[test]
fn unmapped_blocks_are_given_back() {
    let target = Target::start();
    let file = target.image("a.img", 16 * MIB);
    let name = target.attach(&file, json!({}));
    let mut nvme = target.connect(&name);
    for lba in (0..4096).step_by(16) {
        nvme.write(lba, &[9; 65536]).unwrap();
    }
    nvme.flush().unwrap();
    let full = std::fs::metadata(&file).unwrap().blocks();
    nvme.unmap(0, 2048).unwrap();
    nvme.flush().unwrap();
    assert!(std::fs::metadata(&file).unwrap().blocks() <= full - 8 * 2048 + 64, "holes appear in the file");
    assert!(nvme.read(2047, 1).unwrap().iter().all(|&b| b == 0) && nvme.read(2048, 1).unwrap().iter().all(|&b| b == 9));
}

#[test]
fn a_read_only_device_refuses_writes() {
    let target = Target::start();
    let file = target.image("a.img", MIB);
    std::fs::write(&file, pattern(1, MIB as usize)).unwrap();
    let name = target.attach(&file, json!({"read_only": true}));
    assert_eq!(target.bdev(&name)["supported_io_types"]["write"], false);
    assert_eq!(target.bdev(&name)["supported_io_types"]["unmap"], false);
    let mut nvme = target.connect(&name);
    assert!(nvme.read(0, 8).unwrap() == pattern(1, MIB as usize)[..32768]);
    let refused = nvme.write(0, &[1; 4096]).unwrap_err();
    assert!(refused == WRITE_PROTECTED || refused == Failed((0, 0x01)), "{refused:x?}");
    nvme.flush().unwrap();
    assert!(std::fs::read(&file).unwrap() == pattern(1, MIB as usize));
}

#[test]
fn a_file_truncated_in_use_degrades_its_device_and_can_be_healed() {
    let target = Target::start();
    let file = target.image("a.img", 4 * MIB);
    std::fs::write(&file, vec![5; 4 * MIB as usize]).unwrap();
    let name = target.attach(&file, json!({}));
    let mut nvme = target.connect(&name);
    let state = || target.bdev(&name)["driver_specific"]["lloop"]["state"].clone();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(MIB).unwrap();
    assert!(nvme.read(0, 1).unwrap().iter().all(|&b| b == 5));
    assert_eq!(nvme.read(256, 1), Err(UNRECOVERED_READ), "never zeroes");
    assert_eq!(nvme.read(255, 2), Err(UNRECOVERED_READ));
    assert_eq!(state(), "degraded");
    assert!(target.log().contains(file.to_str().unwrap()), "the log names the file");
    target.refused("bdev_lloop_resume", json!({"name": name}), libc::EINVAL, &["resize"]);
    let stats = target.ok("bdev_lloop_get_stats", json!({"name": name}))["devices"][0].clone();
    assert!(stats["io"]["read"]["errors"].as_u64() >= Some(2));
    assert_eq!(stats["last_errno"], libc::EIO);
    assert_eq!(target.ok("bdev_lloop_resize", json!({"name": name, "size": 4 * MIB})), 4 * MIB);
    assert_eq!(state(), "bound");
    assert!(nvme.read(256, 1).unwrap().iter().all(|&b| b == 0), "the new part is empty");
    assert!(nvme.read(255, 1).unwrap().iter().all(|&b| b == 5), "the old part is there");
}

/// A small filesystem in a file, mounted on a folder, gone with the value.
struct SmallFilesystem(PathBuf);

impl SmallFilesystem {
    fn new(folder: &Path, len_bytes: u64) -> Self {
        let image = crate::common::image(folder, "small.fs", len_bytes);
        let place = folder.join("small");
        std::fs::create_dir(&place).unwrap();
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).args([&image, &place]));
        SmallFilesystem(place)
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_filesystem_is_reported_as_such() {
    let folder = crate::common::folder();
    let small = SmallFilesystem::new(folder.path(), 24 * MIB);
    let file = crate::common::image(&small.0, "thin.img", 64 * MIB);
    {
        let target = Target::start();
        let name = target.attach(&file, json!({}));
        let mut nvme = target.connect(&name);
        let data = pattern(3, 65536);
        let mut written = Vec::new();
        let failed = (0..1024u64).find_map(|i| match nvme.write(i * 16, &data) {
            Ok(()) => {
                written.push(i * 16);
                None
            }
            Err(failed) => Some(failed),
        });
        assert_eq!(failed, Some(CAPACITY_EXCEEDED), "after {} writes", written.len());
        assert!(written.len() > 64);
        // What was acknowledged is there, the device goes on, and space that is given back can be used.
        nvme.flush().unwrap();
        for &lba in &written {
            assert!(nvme.read(lba, 16).unwrap() == data);
        }
        assert_eq!(nvme.write(15_000, &data), Err(CAPACITY_EXCEEDED));
        nvme.unmap(written[0], 64).unwrap();
        nvme.flush().unwrap();
        nvme.write(written[0], &data).unwrap();
        let last_errno = target.ok("bdev_lloop_get_stats", json!({"name": name}))["devices"][0]["last_errno"].clone();
        assert_eq!(last_errno, libc::ENOSPC);
        assert_eq!(target.bdev(&name)["driver_specific"]["lloop"]["state"], "bound");
    }
    drop(small);
}

#[test]
fn what_others_cached_is_written_back_before_the_first_read() {
    let target = Target::start();
    let file = target.image("a.img", MIB);
    // Dirty pages of somebody's buffered write.
    let writer = std::fs::File::options().write(true).open(&file).unwrap();
    writer.write_all_at(&pattern(4, MIB as usize), 0).unwrap();
    let name = target.attach(&file, json!({}));
    let mut nvme = target.connect(&name);
    assert!(nvme.read(0, 16).unwrap() == pattern(4, MIB as usize)[..65536]);
    nvme.write(0, &pattern(5, 65536)).unwrap();
    assert!(std::fs::read(&file).unwrap()[..65536] == pattern(5, 65536), "and no stale page is left");
}

#[test]
fn many_devices_do_not_mix_up_their_data() {
    let target = Target::start();
    let mut devices: Vec<_> = (0..8u64)
        .map(|i| {
            let file = target.image(&format!("{i}.img"), 4 * MIB);
            let name = target.attach(&file, json!({}));
            (target.connect(&name), file, i)
        })
        .collect();
    for round in 0..32u64 {
        let mut flights = Vec::new();
        for (nvme, _, i) in &mut devices {
            for k in 0..4 {
                flights.push((
                    *i,
                    nvme.start_write(round * 16 + k * 4, &pattern(*i * 1000 + round * 4 + k, 16384)).unwrap(),
                ));
            }
        }
        for (i, flight) in flights {
            devices[i as usize].0.finish(flight).unwrap().unwrap();
        }
    }
    for (_, file, i) in &devices {
        let content = std::fs::read(file).unwrap();
        for round in 0..32u64 {
            for k in 0..4 {
                let at = ((round * 16 + k * 4) * 4096) as usize;
                assert!(
                    content[at..at + 16384] == pattern(i * 1000 + round * 4 + k, 16384),
                    "device {i}, round {round}"
                );
            }
        }
    }
}
