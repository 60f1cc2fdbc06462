//! SPDK's own layers on top of lloop: each moves data, and the files below hold it where it belongs.

use crate::common::Target;
use crate::common::nvme::Nvme;
use base64::Engine;
use serde_json::json;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// The type that SPDK's gpt module makes devices of.
const SPDK_PARTITION: &str = "7C5222BD-8F5D-4087-9C00-BF9843C7B58C";

fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|i| (seed.wrapping_mul(0x9E37_79B9) ^ (i / 5).wrapping_mul(31) ^ (i >> 12)) as u8).collect()
}

/// Writes in requests of 64 KiB: SPDK's target takes 128 KiB at most.
fn write(nvme: &mut Nvme, lba: u64, data: &[u8]) {
    for (i, part) in data.chunks(65536).enumerate() {
        nvme.write(lba + i as u64 * 65536 / BLOCK, part).unwrap();
    }
}

/// Reads in requests of 64 KiB.
fn read(nvme: &mut Nvme, lba: u64, len: usize) -> Vec<u8> {
    let blocks = len as u64 / BLOCK;
    let parts = (0..blocks).step_by(16).map(|at| nvme.read(lba + at, (blocks - at).min(16) as usize).unwrap());
    parts.flatten().collect()
}

/// Whether the target's SPDK is of `major` or later.
fn since(target: &Target, major: u64) -> bool {
    target.ok("spdk_get_version", json!({}))["fields"]["major"].as_u64().unwrap() >= major
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn logical_volumes_with_snapshots_and_clones() {
    let folder;
    let (old, new) = (pattern(1, 2 * MIB), pattern(2, MIB));
    {
        let mut target = Target::start();
        let name = target.attach(&target.image("a.img", 128 * MIB), json!({}));
        target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": name, "lvs_name": "store", "cluster_sz": MIB}));
        let mut volume = json!({"lvs_name": "store", "lvol_name": "volume", "thin_provision": true});
        if since(&target, 23) {
            volume["size_in_mib"] = json!(32);
        } else {
            volume["size"] = json!(32 * MIB);
        }
        target.ok("bdev_lvol_create", volume);
        let mut nvme = target.connect("store/volume");
        // From the middle of a cluster on.
        write(&mut nvme, 100, &old);
        target.ok("bdev_lvol_snapshot", json!({"lvol_name": "store/volume", "snapshot_name": "snapshot"}));
        write(&mut nvme, 100, &new);
        target.ok("bdev_lvol_clone", json!({"snapshot_name": "store/snapshot", "clone_name": "clone"}));
        let mut clone = target.connect("store/clone");
        assert!(read(&mut clone, 100, old.len()) == old, "the clone is what the snapshot was");
        write(&mut clone, 5000, &new);
        let expected = [&new[..], &old[MIB as usize..]].concat();
        assert!(read(&mut nvme, 100, old.len()) == expected);
        assert!(read(&mut nvme, 5000, new.len()).iter().all(|&byte| byte == 0), "the clone's writes are its own");
        nvme.flush().unwrap();
        target.stop();
        folder = std::mem::replace(&mut target.folder, crate::common::folder());
    }
    // The file carries all of it to another target, which finds it by itself.
    let target = Target::start();
    target.attach(&folder.path().join("a.img"), json!({"engine": "threads"}));
    let deadline = Instant::now() + Duration::from_secs(30);
    while target.call("bdev_get_bdevs", json!({"name": "store/clone"})).is_err() {
        assert!(Instant::now() < deadline, "the store does not appear:\n{}", target.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(read(&mut target.connect("store/volume"), 100, new.len()) == new);
    assert!(read(&mut target.connect("store/snapshot"), 100, old.len()) == old);
    let mut clone = target.connect("store/clone");
    assert!(read(&mut clone, 100, old.len()) == old && read(&mut clone, 5000, new.len()) == new);
}

#[test]
fn raid0_over_two() {
    const STRIP: u64 = 64 << 10;
    let target = Target::start();
    let files = ["a.img", "b.img"].map(|name| target.image(name, 32 * MIB));
    let bases =
        [target.attach(&files[0], json!({"engine": "uring"})), target.attach(&files[1], json!({"engine": "threads"}))];
    let raid = json!({"name": "raid", "strip_size_kb": STRIP >> 10, "raid_level": "raid0", "base_bdevs": bases});
    target.ok("bdev_raid_create", raid);
    let mut nvme = target.connect("raid");
    let data = pattern(3, 4 * MIB);
    // A page before a strip's end: every request is cut in two.
    let at = STRIP - BLOCK;
    write(&mut nvme, at / BLOCK, &data);
    nvme.flush().unwrap();
    assert!(read(&mut nvme, at / BLOCK, data.len()) == data);
    let contents = files.map(|file| std::fs::read(file).unwrap());
    for (i, byte) in data.iter().enumerate() {
        let place = at + i as u64;
        let (strip, within) = (place / STRIP, place % STRIP);
        assert_eq!(contents[strip as usize % 2][(strip / 2 * STRIP + within) as usize], *byte, "byte {place}");
    }
    nvme.unmap(at / BLOCK, (MIB / BLOCK) as usize).unwrap();
    assert!(read(&mut nvme, at / BLOCK, MIB as usize).iter().all(|&byte| byte == 0));
    assert!(nvme.read((at + MIB) / BLOCK, 16).unwrap() == data[MIB as usize..][..16 * BLOCK as usize]);
}

#[test]
fn a_device_split_in_parts() {
    let target = Target::start();
    let file = target.image("a.img", 32 * MIB);
    let name = target.attach(&file, json!({}));
    let parts = target.ok("bdev_split_create", json!({"base_bdev": name, "split_count": 4, "split_size_mb": 8}));
    assert_eq!(parts.as_array().unwrap().len(), 4);
    for (i, part) in parts.as_array().unwrap().iter().enumerate() {
        let mut nvme = target.connect(part.as_str().unwrap());
        nvme.write(8 * MIB / BLOCK - 16, &pattern(i as u64, 65536)).unwrap();
        nvme.flush().unwrap();
        assert!(nvme.read(8 * MIB / BLOCK - 16, 16).unwrap() == pattern(i as u64, 65536));
        assert!(nvme.read(8 * MIB / BLOCK, 1).is_err(), "a part ends where the next begins");
    }
    let content = std::fs::read(&file).unwrap();
    for i in 0..4 {
        assert!(content[((i + 1) * 8 * MIB - 65536) as usize..][..65536] == pattern(i, 65536), "part {i}");
        assert!(content[(i * 8 * MIB) as usize..][..(8 * MIB - 65536) as usize].iter().all(|&byte| byte == 0));
    }
}

/// Makes a partition table as an administrator does; sizes and places in MiB.
fn partition(file: &Path, parts: &[(u64, u64)]) {
    let lines = parts.iter().map(|(at, size)| format!("start={at}MiB, size={size}MiB, type={SPDK_PARTITION}\n"));
    let script = format!("label: gpt\n{}", lines.collect::<String>());
    let mut child = Command::new("/usr/sbin/sfdisk").arg("-q").arg(file).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_partitions_of_a_gpt() {
    let target = Target::start();
    let file = target.image("a.img", 32 * MIB);
    partition(&file, &[(1, 8), (9, 16)]);
    for engine in ["uring", "threads"] {
        let name = target.attach(&file, json!({"block_size": 512, "engine": engine, "name": engine}));
        let seed = u64::from(engine == "uring");
        for (i, at) in [(1, 1), (2, 9)] {
            let mut nvme = target.connect(&format!("{name}p{i}"));
            // Not aligned to pages.
            nvme.write(3, &pattern(seed + i, 10 * 512)).unwrap();
            nvme.flush().unwrap();
            assert!(nvme.read(3, 10).unwrap() == pattern(seed + i, 10 * 512));
            let content = std::fs::read(&file).unwrap();
            assert!(
                content[(at * MIB) as usize + 3 * 512..][..10 * 512] == pattern(seed + i, 10 * 512),
                "partition {i}"
            );
        }
        target.ok("bdev_lloop_delete", json!({"name": name, "force": true}));
    }
}

#[test]
fn what_is_encrypted_above_lies_encrypted_in_the_file() {
    let target = Target::start();
    let methods = target.ok("rpc_get_methods", json!({}));
    if !methods.as_array().unwrap().contains(&json!("bdev_crypto_create")) {
        // Ours has it; somebody's own SPDK need not.
        assert!(since(&target, 21) || cfg!(not(target_arch = "x86_64")), "scripts/spdk.sh builds SPDK with crypto");
        println!("SKIPPED: this SPDK was built without its crypto module (configure --with-crypto)");
        return;
    }
    let file = target.image("a.img", 32 * MIB);
    let name = target.attach(&file, json!({}));
    // (The key is no secret: it is in a test.)
    let mut crypto = json!({"base_bdev_name": name, "name": "secret"});
    let more = match since(&target, 23) {
        true => {
            let (key, second) = ("30313233343536373839616263646566", "66656463626139383736353433323130");
            let key = json!({"name": "k", "cipher": "AES_XTS", "key": key, "key2": second});
            target.ok("accel_crypto_key_create", key);
            json!({"key_name": "k"})
        }
        false => json!({"crypto_pmd": "crypto_aesni_mb", "key": "0123456789abcdef"}),
    };
    crypto.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    target.ok("bdev_crypto_create", crypto);
    let mut nvme = target.connect("secret");
    let data = b"nobody who has the file shall read this; ".repeat(8192)[..262_144].to_vec();
    write(&mut nvme, 17, &data);
    nvme.flush().unwrap();
    assert!(read(&mut nvme, 17, data.len()) == data);
    let content = std::fs::read(&file).unwrap();
    let stored = &content[17 * BLOCK as usize..][..data.len()];
    assert!(stored.iter().any(|&byte| byte != 0), "it is there");
    assert!(!contains(&content, b"nobody who has the file"), "but not to be read");
}

#[test]
fn a_limit_holds() {
    let target = Target::start();
    let name = target.attach(&target.image("a.img", 64 * MIB), json!({}));
    target.ok("bdev_set_qos_limit", json!({"name": name, "rw_mbytes_per_sec": 10}));
    let mut nvme = target.connect(&name);
    let data = pattern(4, 65536);
    // 30 MiB at 10 MiB/s: half a second of grace for what may be taken in advance, and only slower is allowed.
    let start = Instant::now();
    for i in 0..480 {
        nvme.write(i * 16, &data).unwrap();
    }
    assert!(start.elapsed() > Duration::from_secs(2), "30 MiB took {:?} at 10 MiB/s", start.elapsed());
    for i in (0..480).step_by(37) {
        assert!(nvme.read(i * 16, 16).unwrap() == data);
    }
    // Many at once, and the limit ends while they wait.
    let flights: Vec<_> = (0..64).map(|i| nvme.start_write(i * 16, &pattern(5, 65536)).unwrap()).collect();
    target.ok("bdev_set_qos_limit", json!({"name": name, "rw_mbytes_per_sec": 0}));
    for flight in flights {
        nvme.finish(flight).unwrap().unwrap();
    }
    assert!(nvme.read(63 * 16, 16).unwrap() == pattern(5, 65536));
}

#[test]
fn histograms_count_every_request() {
    let target = Target::start();
    for engine in ["uring", "threads"] {
        let name = target.attach(&target.image(engine, 16 * MIB), json!({"engine": engine}));
        let mut nvme = target.connect(&name);
        target.ok("bdev_enable_histogram", json!({"name": name, "enable": true}));
        let count = || {
            let stats = target.ok("bdev_lloop_get_stats", json!({"name": name}));
            let io = &stats["devices"][0]["io"];
            (io["write"]["ops"].as_u64().unwrap(), io["read"]["ops"].as_u64().unwrap())
        };
        let counted = || -> u64 {
            let answer = target.ok("bdev_get_histogram", json!({"name": name}));
            let text = answer["histogram"].as_str().unwrap();
            let bytes = base64::prelude::BASE64_STANDARD.decode(text).unwrap();
            bytes.chunks_exact(8).map(|count| u64::from_le_bytes(count.try_into().unwrap())).sum()
        };
        assert_eq!(counted(), 0);
        let before = count();
        for i in 0..200 {
            nvme.write(i * 3, &pattern(i, 2 * BLOCK)).unwrap();
        }
        for i in 0..100 {
            assert!(nvme.read(i * 3, 2).unwrap() == pattern(i, 2 * BLOCK));
        }
        assert_eq!(counted(), 300, "{engine}");
        let done = count();
        assert_eq!((done.0 - before.0, done.1 - before.1), (200, 100), "{engine}: what lloop itself counts");
        target.ok("bdev_enable_histogram", json!({"name": name, "enable": false}));
        nvme.write(0, &pattern(0, BLOCK)).unwrap();
        target.ok("bdev_enable_histogram", json!({"name": name, "enable": true}));
        assert_eq!(counted(), 0, "a new one begins with nothing");
    }
}
