//! SPDK's own target with lloop in it: linked (liblloop.a), and loaded into the unmodified program (liblloop.so).

use crate::common::{Target, beside, folder, spdk_app};
use serde_json::json;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// Both engines move data, and the device's life is what it is in lloop_tgt.
fn serves(mut target: Target) {
    for (engine, block) in [("uring", 4096u64), ("threads", 512)] {
        let file = target.image(engine, 8 * MIB);
        let name = target.attach(&file, json!({"engine": engine, "block_size": block}));
        let mut nvme = target.connect(&name);
        let data: Vec<u8> = (0..MIB as usize / 16).map(|i| (i / 7) as u8 ^ block as u8).collect();
        nvme.write(3, &data).unwrap();
        nvme.flush().unwrap();
        assert!(nvme.read(3, data.len() / block as usize).unwrap() == data);
        let content = std::fs::read(&file).unwrap();
        assert!(content[3 * block as usize..][..data.len()] == data, "the file holds what was written");
        target.refused("bdev_lloop_create", json!({"filename": file, "allow_any_fs": true}), libc::EBUSY, &[&name]);
        // What lloop has to say is in SPDK's log.
        assert!(
            target.log().contains(&format!("lloop:  WARN bdev_lloop_create: {}", file.display())),
            "{}",
            target.log()
        );
    }
    target.ok("bdev_lloop_delete", json!({"name": "lloop1", "force": true}));
    assert_eq!(target.names(), ["lloop0"]);
    target.stop();
}

#[test]
fn spdk_tgt_with_liblloop_a() {
    serves(Target::start_program(spdk_app("spdk_tgt").args(["-s", "512"]), folder()));
}

#[test]
fn an_unmodified_spdk_tgt_with_liblloop_so() {
    let library = Path::new(&beside("../../release/liblloop.so")).canonicalize().unwrap();
    let mut command = spdk_app("shared/build/bin/spdk_tgt");
    // Nothing of lloop is in it...
    let plain = Target::start_program(command.args(["-s", "512"]), folder());
    let methods = plain.ok("rpc_get_methods", json!({}));
    assert!(!methods.as_array().unwrap().iter().any(|name| name.as_str().unwrap().contains("lloop")), "{methods}");
    drop(plain);
    // ... and its libraries are SPDK's.
    let program = beside("shared/build/bin/spdk_tgt");
    let ldd = Command::new("ldd").arg(&program).output().unwrap();
    let libraries = String::from_utf8_lossy(&ldd.stdout);
    assert!(libraries.contains("libspdk_bdev.so") && !libraries.contains("not found"), "{libraries}");
    let mut command = spdk_app("shared/build/bin/spdk_tgt");
    serves(Target::start_program(command.env("LD_PRELOAD", &library).args(["-s", "512"]), folder()));
}
