//! vhost-user-blk and vhost-user-scsi: disks of virtual machines.

use crate::common::spdk::{self, Part};
use crate::common::{Target, folder, image, run};
use crate::vm::{Guest, Root, lloop, lloop_ok, root_image};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// What the guest writes and the host looks for: a line again and again.
const LINE: &[u8] = b"written by a virtual machine\n";

/// SPDK's vhost-blk offers write zeroes but refuses those that may unmap, which is how Linux asks; it writes zeroes itself then.
const WRITE_ZEROES: Option<&str> = Some("op 0x9:(WRITE_ZEROES)");

fn lines(len: usize) -> Vec<u8> {
    LINE.iter().copied().cycle().take(len).collect()
}

fn part(file: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(file).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// What a file takes on the host's disk.
fn allocated(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().blocks() * 512
}

/// QEMU's arguments for a virtio disk.
fn virtio_disk(socket: &Path) -> Vec<String> {
    let chardev = format!("socket,id=blk,path={},reconnect=1", socket.display());
    ["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=blk"].map(str::to_owned).to_vec()
}

/// QEMU's arguments for a SCSI disk. Before QEMU 8.2 those cannot connect again.
fn scsi_disk(socket: &Path) -> Vec<String> {
    let chardev = format!("socket,id=scsi,path={}", socket.display());
    ["-chardev", &chardev, "-device", "vhost-user-scsi-pci,chardev=scsi"].map(str::to_owned).to_vec()
}

/// Sockets with paths short enough for the kernel, wherever the build is.
fn sockets() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let folder = tempfile::Builder::new().prefix("lloop-vm").tempdir().unwrap();
    let path = folder.path().to_owned();
    (folder, move |name: &str| path.join(name))
}

/// The name and exports of a device, as `lloop list --json` shows them.
fn exports(target: &Target, name: &str) -> Value {
    let list: Value = serde_json::from_str(&lloop_ok(target, &["list", "--json"])).unwrap();
    list.as_array().unwrap().iter().find(|device| device["name"] == name).unwrap()["exports"].clone()
}

/// All that a disk has to do for a guest. `disk` is its name there, `file` its file here.
fn use_disk(guest: &mut Guest, disk: &str, file: &Path) {
    // Bytes that the host can recognise, at the end of the device.
    let at = file.metadata().unwrap().len() - 2 * MIB;
    let write = |guest: &mut Guest| {
        let text = std::str::from_utf8(LINE).unwrap().trim_end();
        guest.ok(&format!(
            "yes '{text}' | head -c {MIB} | dd of=/dev/{disk} bs=65536 oflag=direct seek={} conv=notrunc iflag=fullblock; sync /dev/{disk}",
            at / 65536
        ));
    };
    write(guest);
    assert!(part(file, at, MIB as usize) == lines(MIB as usize), "{disk}: the file holds what was written");
    // Write zeroes, and discard: the file gets its holes.
    guest.ok(&format!("blkdiscard -z -o {at} -l {MIB} /dev/{disk}"));
    assert!(part(file, at, MIB as usize).iter().all(|byte| *byte == 0), "{disk}: zeroes were written");
    write(guest);
    let before = allocated(file);
    guest.ok(&format!("blkdiscard -o {at} -l {MIB} /dev/{disk}"));
    let after = allocated(file);
    assert!(after + MIB <= before, "{disk}: a discard gives its space back: {before} to {after}");

    guest.ok(&format!("mkfs.ext4 -q -F /dev/{disk}; mkdir -p /mnt/{disk}; mount /dev/{disk} /mnt/{disk}"));
    let sum = guest.ok(&format!(
        "dd if=/dev/urandom of=/mnt/{disk}/data bs=1M count=16 conv=fsync 2>/dev/null
         sha256sum </mnt/{disk}/data >/tmp/sum; echo 3 >/proc/sys/vm/drop_caches
         sha256sum </mnt/{disk}/data | cmp - /tmp/sum; cut -c1-64 /tmp/sum"
    ));
    let fio = guest.ok(&format!(
        "fio --name=v --filename=/mnt/{disk}/fio --size=16M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16 \
         --verify=crc32c --verify_fatal=1 --end_fsync=1"
    ));
    assert!(fio.contains("err= 0"), "{disk}: fio: {fio}");
    // What is deleted and trimmed gives its space back.
    guest.ok("sync");
    let before = allocated(file);
    guest.ok(&format!("rm /mnt/{disk}/fio; sync; fstrim -v /mnt/{disk}"));
    let after = allocated(file);
    assert!(after + 12 * MIB <= before, "{disk}: fstrim gives space back: {before} to {after}");
    guest.ok(&format!("umount /mnt/{disk}; e2fsck -f -n /dev/{disk}"));
    // And the host finds the same in the file.
    let (status, text) = run(Command::new("e2fsck").args(["-f", "-n"]).arg(file), Duration::from_secs(60));
    assert!(status.success(), "{text}");
    let mut dump = Command::new("/sbin/debugfs");
    let copy = file.with_extension("copy");
    let (_, text) =
        run(dump.arg("-R").arg(format!("dump /data {}", copy.display())).arg(file), Duration::from_secs(60));
    let (_, here) = run(Command::new("sha256sum").arg(&copy), Duration::from_secs(60));
    assert!(here.starts_with(&sum), "{disk}: the host reads what the guest wrote: {sum}, {here}{text}");
}

/// A disk with a partition table, and the guest's root filesystem on its first partition.
fn disk_with_root(file: &Path) {
    let root = std::fs::metadata(root_image()).unwrap().len();
    File::create(file).unwrap().set_len(root + 64 * MIB).unwrap();
    let table = format!("label: dos\nstart=1MiB, size={}KiB, type=83, bootable\n", root / 1024);
    let mut sfdisk =
        Command::new("/sbin/sfdisk").arg("-q").arg(file).stdin(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut sfdisk.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let mut content = Vec::new();
    File::open(root_image()).unwrap().read_to_end(&mut content).unwrap();
    File::options().write(true).open(file).unwrap().write_all_at(&content, MIB).unwrap();
}

#[test]
fn a_machine_with_two_disks() {
    if !spdk::has(Part::Vhost, "all of it") {
        return;
    }
    let files = folder();
    let (_folder, socket) = sockets();
    let (blk, scsi) = (image(files.path(), "blk.img", 128 * MIB), image(files.path(), "scsi.img", 128 * MIB));
    let target = Target::start();
    for file in [&blk, &scsi] {
        lloop_ok(&target, &["attach", file.to_str().unwrap(), "--allow-any-fs"]);
    }
    let (blk_socket, scsi_socket) = (socket("blk.sock"), socket("scsi.sock"));
    lloop_ok(&target, &["export", "vhost-blk", "lloop0", "--socket", blk_socket.to_str().unwrap()]);
    lloop_ok(&target, &["export", "vhost-scsi", "lloop1", "--socket", scsi_socket.to_str().unwrap()]);
    for socket in [&blk_socket, &scsi_socket] {
        assert_eq!(std::fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600, "{}", socket.display());
    }
    assert_eq!(exports(&target, "lloop0")[0]["connected"], json!([]));
    let arguments = [virtio_disk(&blk_socket), scsi_disk(&scsi_socket)];
    let mut guest = Guest::start(&Root::Own, &arguments.concat());
    assert_eq!(exports(&target, "lloop0")[0]["connected"], json!(["a virtual machine"]));
    assert_eq!(exports(&target, "lloop1")[0]["connected"], json!(["a virtual machine"]));

    // What the guest is told of them.
    guest.wait_for("[ -b /dev/sda ] && echo yes", "yes");
    let virtio = guest.ok("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = root ] || basename $d; done");
    for disk in [virtio.as_str(), "sda"] {
        assert_eq!(guest.ok(&format!("blockdev --getsize64 /dev/{disk}")), (128 * MIB).to_string());
        assert_eq!(guest.ok(&format!("cat /sys/block/{disk}/queue/logical_block_size")), "4096");
        let discard = guest.ok(&format!("cat /sys/block/{disk}/queue/discard_max_bytes"));
        assert!(discard.parse::<u64>().unwrap() > 0, "{disk}: discard is offered");
        assert_eq!(guest.ok(&format!("cat /sys/block/{disk}/ro")), "0");
        assert!(
            guest.ok(&format!("cat /sys/block/{disk}/queue/write_cache")).contains("back"),
            "{disk}: flushes are needed"
        );
    }
    // SPDK v20.07 says the product's name here, newer ones the device's.
    let serial = guest.ok(&format!("cat /sys/block/{virtio}/serial"));
    assert!(["lloop", "lloop0"].contains(&serial.trim()), "{serial}");
    assert!(guest.ok("cat /sys/block/sda/device/vpd_pg80").contains("lloop1"));

    use_disk(&mut guest, &virtio, &blk);
    use_disk(&mut guest, "sda", &scsi);

    // A running machine keeps its disk.
    for (name, kind) in [("lloop0", "vhost-blk"), ("lloop1", "vhost-scsi")] {
        let (status, text) = lloop(&target, &["unexport", kind, name]);
        assert!(status == 1 && text.contains("end it first"), "{text}");
        assert!(lloop(&target, &["detach", name]).1.contains("in use"));
    }

    // Growth is seen: at once by the virtio disk, after a look by the SCSI disk, which SPDK v20.07 sends no word.
    for (name, disk) in [("lloop0", virtio.as_str()), ("lloop1", "sda")] {
        lloop_ok(&target, &["resize", name, "160M"]);
        if disk == "sda" {
            guest.ok("echo 1 >/sys/block/sda/device/rescan");
        }
        guest.wait_for(&format!("blockdev --getsize64 /dev/{disk}"), &(160 * MIB).to_string());
    }

    // A reboot without a word, in the middle of its life.
    guest.ok(&format!("mount /dev/{virtio} /mnt/{virtio}; sha256sum /mnt/{virtio}/data >/mnt/{virtio}/sum; sync"));
    guest.reboot();
    guest.wait_for("[ -b /dev/sda ] && echo yes", "yes");
    guest.ok(&format!(
        "mkdir /mnt/{virtio}; mount /dev/{virtio} /mnt/{virtio}; sha256sum -c /mnt/{virtio}/sum; umount /mnt/{virtio}"
    ));
    for disk in [virtio.as_str(), "sda"] {
        assert_eq!(guest.ok(&format!("blockdev --getsize64 /dev/{disk}")), (160 * MIB).to_string());
    }
    guest.ok("e2fsck -f -n /dev/sda");
    guest.has_clean_log(WRITE_ZEROES);
    guest.stop();
    for name in ["lloop0", "lloop1"] {
        lloop_ok(&target, &["unexport", name]);
        lloop_ok(&target, &["detach", name]);
    }
    assert!(!blk_socket.exists() && !scsi_socket.exists(), "the sockets went with the exports");
}

#[test]
fn two_machines_that_boot_from_their_disks_and_see_the_target_restart() {
    if !spdk::has(Part::Vhost, "all of it") {
        return;
    }
    let files = folder();
    let (_folder, socket) = sockets();
    let names = ["one", "two"];
    let disks: Vec<PathBuf> = names.iter().map(|name| files.path().join(format!("{name}.img"))).collect();
    disks.iter().for_each(|disk| disk_with_root(disk));
    let serve = || {
        let target = Target::start();
        for (name, disk) in names.iter().zip(&disks) {
            lloop_ok(
                &target,
                &["attach", disk.to_str().unwrap(), "--allow-any-fs", "--block-size", "512", "--name", name],
            );
            let socket = socket(name);
            lloop_ok(&target, &["export", "vhost-blk", name, "--socket", socket.to_str().unwrap()]);
        }
        target
    };
    let mut target = serve();
    let mut guests: Vec<Guest> =
        names.iter().map(|name| Guest::start(&Root::On("vda1"), &virtio_disk(&socket(name)))).collect();
    for guest in &mut guests {
        assert_eq!(guest.ok("cat /sys/block/vda/queue/logical_block_size"), "512");
        assert!(guest.ok("mount").contains("/dev/vda1 on / type ext4"));
        guest.ok("mount -o remount,rw /");
    }
    // Both at once, while the target goes away and comes back.
    let script = "fio --name=v --filename=/fio --size=24M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
                  --iodepth=8 --rate_iops=,600 --verify=crc32c --verify_fatal=1 --end_fsync=1 >/tmp/fio 2>&1; echo $? >/tmp/done";
    for guest in &mut guests {
        guest.ok(&format!("(set +e; {script}) &"));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    let writes = |target: &Target| {
        let stats = target.ok("bdev_lloop_get_stats", json!({}));
        stats["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d["io"]["write"]["ops"].as_u64().unwrap_or(0))
            .collect::<Vec<_>>()
    };
    while writes(&target).iter().any(|ops| *ops < 50) {
        assert!(Instant::now() < deadline, "nothing is written: {}", target.ok("bdev_lloop_get_stats", json!({})));
        std::thread::sleep(Duration::from_millis(50));
    }
    target.stop();
    drop(target);
    for guest in &mut guests {
        assert_ne!(guest.run("[ -e /tmp/done ]").0, 0, "it is in the middle of its writing");
    }
    let target = serve();
    for guest in &mut guests {
        guest.wait_for("cat /tmp/done", "0");
        let fio = guest.ok("cat /tmp/fio");
        assert!(fio.contains("err= 0"), "{fio}");
        guest.ok("sync; mount -o remount,ro /");
        guest.has_clean_log(WRITE_ZEROES);
    }
    guests.into_iter().for_each(Guest::stop);
    for (name, disk) in names.iter().zip(&disks) {
        lloop_ok(&target, &["unexport", name]);
        lloop_ok(&target, &["detach", name]);
        let partition = format!("{}?offset={MIB}", disk.display());
        let (status, text) = run(Command::new("e2fsck").args(["-f", "-n", &partition]), Duration::from_secs(60));
        assert!(status.success(), "{text}");
    }
}
