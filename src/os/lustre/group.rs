//! Group locks and the data version.
//!
//! A group lock belongs to the open file that it was taken on. While it is held, only open files that hold the same group do
//! I/O; everybody else's waits. After an OST has evicted this client, I/O on the open file fails with ENOLCK until the lock is
//! given back and taken again, in this order.

use super::errno;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, BorrowedFd};

const LL_IOC_GROUP_LOCK: libc::c_ulong = 0x4008_669e;
const LL_IOC_GROUP_UNLOCK: libc::c_ulong = 0x4008_669f;
const LL_IOC_DATA_VERSION: libc::c_ulong = 0x8010_66da;

/// The group of those who take a group lock only to find out whether somebody else holds one. It is the same for all of them, so
/// that they do not exclude each other. Nobody else may use it.
pub const PROBE_GROUP: NonZeroU32 = NonZeroU32::new(0x6c6c_6f70).unwrap();

/// Takes the group lock of `gid`. Needs every OST of the file. Waits for another group to let go, unless the file was opened
/// with O_NONBLOCK. No fallocate may be running, and none may be started while it is held: it would wait for the lock for ever.
///
/// # Errors
/// EAGAIN when another group has it and the file is O_NONBLOCK; EINVAL when this open file holds one already, or has lost one
/// and did not unlock; ENOTTY where the file is not on Lustre.
pub fn group_lock(fd: BorrowedFd<'_>, gid: NonZeroU32) -> Result<(), i32> {
    call(fd, LL_IOC_GROUP_LOCK, gid)
}

/// Gives the group lock of `gid` back, also one that was lost.
///
/// # Errors
/// EINVAL when this open file does not hold it.
pub fn group_unlock(fd: BorrowedFd<'_>, gid: NonZeroU32) -> Result<(), i32> {
    call(fd, LL_IOC_GROUP_UNLOCK, gid)
}

fn call(fd: BorrowedFd<'_>, request: libc::c_ulong, gid: NonZeroU32) -> Result<(), i32> {
    loop {
        // SAFETY: the argument of these requests is the number itself; no memory is touched.
        match unsafe { libc::ioctl(fd.as_raw_fd(), request, libc::c_ulong::from(gid.get())) } {
            0 => return Ok(()),
            _ if errno() == libc::EINTR => {}
            _ => return Err(errno()),
        }
    }
}

/// A number that changes whenever anybody writes to the file. Nothing is flushed for it: direct writes are all there are here.
///
/// # Errors
/// The ioctl's errno; ENOTTY where the file is not on Lustre.
pub fn data_version(fd: BorrowedFd<'_>) -> Result<u64, i32> {
    /// `struct ioc_data_version`.
    #[repr(C)]
    struct DataVersion {
        version: u64,
        layout_version: u32,
        flags: u32,
    }
    const _: () = assert!(size_of::<DataVersion>() == 16);
    let mut answer = DataVersion { version: 0, layout_version: 0, flags: 0 };
    // SAFETY: the ioctl reads and writes an ioc_data_version, which `answer` has the layout of, at the live address given.
    match unsafe { libc::ioctl(fd.as_raw_fd(), LL_IOC_DATA_VERSION, &mut answer) } {
        0 => Ok(answer.version),
        _ => Err(errno()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn elsewhere_there_are_none() {
        let file = tempfile::tempfile().unwrap();
        let gid = NonZeroU32::new(7).unwrap();
        assert_eq!(group_lock(file.as_fd(), gid), Err(libc::ENOTTY));
        assert_eq!(group_unlock(file.as_fd(), gid), Err(libc::ENOTTY));
        assert_eq!(data_version(file.as_fd()), Err(libc::ENOTTY));
    }
}
