//! SPDK's own NVMe/TCP initiator, in a second target: what it is asked reaches the file through two of them.

use crate::common::Target;
use serde_json::json;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

#[test]
fn spdks_initiator_in_another_target() {
    let (near, far) = (Target::start(), Target::start());
    let file = far.image("a.img", 32 * MIB);
    let name = far.attach(&file, json!({}));
    let (address, nqn) = far.export(&name);
    let (host, port) = address.rsplit_once(':').unwrap();
    let controller =
        json!({"name": "far", "trtype": "TCP", "adrfam": "IPv4", "traddr": host, "trsvcid": port, "subnqn": nqn});
    assert_eq!(near.ok("bdev_nvme_attach_controller", controller), json!(["farn1"]));
    let bdev = near.bdev("farn1");
    assert_eq!((&bdev["block_size"], &bdev["num_blocks"]), (&json!(BLOCK), &json!(32 * MIB / BLOCK as u64)));

    let mut nvme = near.connect("farn1");
    let data: Vec<u8> = (0..64 * BLOCK as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8).collect();
    for (at, part) in data.chunks(16 * BLOCK).enumerate() {
        nvme.write(100 + 16 * at as u64, part).unwrap();
    }
    nvme.flush().unwrap();
    let content = std::fs::read(&file).unwrap();
    assert!(content[100 * BLOCK..164 * BLOCK] == data, "the file holds what was written");
    assert!(nvme.read(100, 16).unwrap() == data[..16 * BLOCK], "and it comes back the same");
    nvme.write_zeroes(100, 8).unwrap();
    assert!(nvme.read(100, 8).unwrap().iter().all(|byte| *byte == 0));
    assert!(std::fs::read(&file).unwrap()[100 * BLOCK..108 * BLOCK].iter().all(|byte| *byte == 0));

    drop(nvme);
    near.ok("bdev_nvme_detach_controller", json!({"name": "far"}));
    assert!(near.call("bdev_get_bdevs", json!({"name": "farn1"})).is_err());
}
