//! Virtual machines as users of lloop: their disks, and the Linux kernel's own NVMe/TCP initiator.

#[path = "../common/mod.rs"]
mod common;

mod disks;
mod nvme_tcp;
mod vm;
