//! The Linux kernel's NVMe/TCP initiator, in a virtual machine whose 10.0.2.2 is the host's loopback.

use crate::common::spdk::{self, Part};
use crate::common::{Target, folder, free_port, image};
use crate::vm::{Guest, Root, lloop_ok};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

const MIB: u64 = 1 << 20;
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:6c6c6f6f-7000-4000-8000-000000000001";
const HOST_ID: &str = "6c6c6f6f-7000-4000-8000-000000000001";

fn guest() -> Guest {
    let network = ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile="].map(str::to_owned);
    let mut guest = Guest::start(&Root::Own, &network);
    guest.ok("ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0");
    guest
}

fn export(target: &Target, name: &str, nqn: &str) -> u16 {
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    lloop_ok(target, &["export", "nvmf", name, "--listen", &listen, "--nqn", nqn, "--allow-host", HOST]);
    port
}

fn connect(port: u16, nqn: &str, host: &str) -> String {
    // (A discovery controller answers with 127.0.0.1, which inside is the guest itself: the address is said.)
    format!("nvme connect -t tcp -a 10.0.2.2 -s {port} -n {nqn} --hostnqn={host} --hostid={HOST_ID} --ctrl-loss-tmo=60")
}

fn part(file: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(file).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn the_kernels_initiator_does_everything() {
    let target = Target::start();
    let file = target.image("disk.img", 128 * MIB);
    lloop_ok(&target, &["attach", file.to_str().unwrap(), "--allow-any-fs"]);
    let nqn = "nqn.2026-11.io.lloop.test:kernel";
    let port = export(&target, "lloop0", nqn);
    let mut guest = guest();

    let found = guest.ok(&format!("nvme discover -t tcp -a 10.0.2.2 -s {port} --hostnqn={HOST} --hostid={HOST_ID}"));
    assert!(found.contains(nqn), "{found}");
    let stranger = "nqn.2014-08.org.nvmexpress:uuid:6c6c6f6f-7000-4000-8000-00000000ffff";
    let (status, text) = guest.run(&connect(port, nqn, stranger));
    assert_ne!(status, 0, "a host that is not named gets in: {text}");
    guest.ok("dmesg -c >/dev/null");

    guest.ok(&connect(port, nqn, HOST));
    guest.wait_for("[ -b /dev/nvme0n1 ] && echo yes", "yes");
    let list: Value = serde_json::from_str(&lloop_ok(&target, &["list", "--json"])).unwrap();
    let connected = &list[0]["exports"][0]["connected"];
    if spdk::has(Part::ConnectedHosts, "who is connected") {
        assert_eq!(connected, &json!([HOST]));
    }

    let uuid = target.bdev("lloop0")["uuid"].as_str().unwrap().to_owned();
    assert_eq!(guest.ok("cat /sys/block/nvme0n1/uuid"), uuid);
    assert_eq!(guest.ok("cat /sys/block/nvme0n1/nguid").to_lowercase(), uuid);
    let namespace: Value = serde_json::from_str(&guest.ok("nvme id-ns /dev/nvme0n1 -o json")).unwrap();
    assert_eq!(
        (&namespace["nsze"], &namespace["nguid"]),
        (&json!(32768), &json!(uuid.replace('-', ""))),
        "{namespace}"
    );
    assert!(guest.ok("nvme id-ctrl /dev/nvme0").contains("lloop"));
    assert_eq!(guest.ok("blockdev --getsize64 /dev/nvme0n1"), (128 * MIB).to_string());
    assert_eq!(guest.ok("cat /sys/block/nvme0n1/queue/logical_block_size"), "4096");

    // Data the host can recognise, a flush, write zeroes and discard.
    let line = "written over NVMe/TCP";
    let write = format!(
        "yes '{line}' | head -c {MIB} | dd of=/dev/nvme0n1 bs=65536 oflag=direct seek=16 iflag=fullblock conv=notrunc; nvme flush /dev/nvme0n1"
    );
    guest.ok(&write);
    let wanted: Vec<u8> = format!("{line}\n").bytes().cycle().take(MIB as usize).collect();
    assert!(part(&file, MIB, MIB as usize) == wanted, "the file holds what was written");
    let flushes = target.ok("bdev_lloop_get_stats", json!({"name": "lloop0"}));
    assert!(flushes["devices"][0]["io"]["flush"]["ops"].as_u64().unwrap() > 0, "{flushes}");
    guest.ok("nvme write-zeroes /dev/nvme0n1 --start-block=256 --block-count=255");
    assert!(part(&file, MIB, MIB as usize).iter().all(|byte| *byte == 0));
    guest.ok(&write);
    let before = file.metadata().unwrap().blocks();
    guest.ok(&format!("blkdiscard -o {MIB} -l {MIB} /dev/nvme0n1"));
    let after = file.metadata().unwrap().blocks();
    assert!(after + MIB / 512 <= before, "a discard gives its space back: {before} to {after}");

    let fio = guest.ok(
        "fio --name=v --filename=/dev/nvme0n1 --size=32M --rw=randwrite --bsrange=4k-128k --direct=1 --ioengine=libaio --iodepth=16 \
         --verify=crc32c --verify_fatal=1 --end_fsync=1",
    );
    assert!(fio.contains("err= 0"), "{fio}");
    guest.ok("mkfs.ext4 -q -F /dev/nvme0n1; mount /dev/nvme0n1 /mnt; cp /bin/busybox /mnt/; sync; fstrim -v /mnt; cmp /bin/busybox /mnt/busybox; umount /mnt");
    guest.ok("e2fsck -f -n /dev/nvme0n1");

    // Growth is seen at once.
    lloop_ok(&target, &["resize", "lloop0", "192M"]);
    guest.wait_for("blockdev --getsize64 /dev/nvme0n1", &(192 * MIB).to_string());

    guest.has_clean_log(None);
    let text = guest.ok(&format!("nvme disconnect -n {nqn}"));
    assert!(text.contains("disconnected 1 controller"), "{text}");
    guest.stop();
    lloop_ok(&target, &["unexport", "nvmf", "lloop0"]);
    lloop_ok(&target, &["detach", "lloop0"]);
}

#[test]
fn two_targets_are_two_paths_to_one_file() {
    let files = folder();
    let file = image(files.path(), "shared.img", 64 * MIB);
    let content: Vec<u8> =
        (0..64 * MIB / 8).flat_map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).collect();
    std::fs::write(&file, &content).unwrap();
    let nqn = "nqn.2026-11.io.lloop.test:paths";
    let targets = [Target::start(), Target::start()];
    let ports = [0, 1].map(|at: usize| {
        lloop_ok(&targets[at], &["attach", file.to_str().unwrap(), "--allow-any-fs", "--read-only"]);
        export(&targets[at], "lloop0", nqn)
    });
    let mut guest = guest();
    guest.ok(&connect(ports[0], nqn, HOST));
    // Each target counts its controllers from 1, and a host refuses a number that it has already: the second attempt gets the next.
    let second = connect(ports[1], nqn, HOST);
    guest.ok(&format!("{second} || {second}"));
    guest.wait_for("ls -d /sys/class/nvme-subsystem/nvme-subsys*/nvme[0-9] /sys/class/nvme-subsystem/nvme-subsys*/nvme[0-9][0-9] 2>/dev/null | wc -l", "2");
    let disk = guest.ok("ls /sys/block | grep '^nvme[0-9]*n1$'");
    assert_eq!(disk.lines().count(), 1, "one disk: {disk}");
    let subsystems = guest.ok("nvme list-subsys");
    assert_eq!(subsystems.matches(" live").count(), 2, "{subsystems}");

    let sum =
        || crate::common::run(std::process::Command::new("sha256sum").arg(&file), std::time::Duration::from_secs(60)).1;
    let sum = sum()[..64].to_owned();
    let read = format!(
        "for turn in 1 2 3 4; do dd if=/dev/{disk} bs=256k iflag=direct 2>/tmp/dd | sha256sum; done >/tmp/sums; echo done >/tmp/done"
    );
    guest.ok(&format!("({read}) &"));
    let reads = |target: &Target| {
        let stats = target.ok("bdev_lloop_get_stats", json!({"name": "lloop0"}));
        stats["devices"][0]["io"]["read"]["bytes"].as_u64().unwrap()
    };
    let [one, two] = targets;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while reads(&one) + reads(&two) < 8 * MIB {
        assert!(std::time::Instant::now() < deadline, "nothing is read");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // One goes without a word; the other takes over.
    drop(one);
    guest.wait_for("cat /tmp/done", "done");
    let sums = guest.ok("cut -c1-64 /tmp/sums");
    assert_eq!(sums.lines().collect::<Vec<_>>(), [sum.as_str(); 4], "every reading is whole");
    assert!(reads(&two) > 0);
    guest.ok(&format!("nvme disconnect -n {nqn}"));
    guest.stop();
    assert!(std::fs::read(&file).unwrap() == content);
}
