//! What Lustre tells about an open file, and what can be asked of it. Numbers and meanings: the public uapi headers of Lustre.
//! On its own: the `lloop` command includes it as well.

pub mod create;
pub mod group;
pub mod layout;

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `statfs` type of a Lustre client mount (LL_SUPER_MAGIC).
pub const CLIENT_MAGIC: u64 = 0x0BD0_0BD0;
/// `statfs` type of a server target mounted directly: never to be touched.
pub const SERVER_MAGIC: u64 = 0x0BD0_0BD1;

const LL_IOC_PATH2FID: libc::c_ulong = 0x8008_66ad;

/// The identity of a file in the whole filesystem (`struct lu_fid`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fid {
    /// Sequence.
    pub seq: u64,
    /// Object in the sequence.
    pub oid: u32,
    /// Version.
    pub ver: u32,
}

impl fmt::Display for Fid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}:{:#x}:{:#x}]", self.seq, self.oid, self.ver)
    }
}

/// The FID of an open file of a Lustre client.
///
/// # Errors
/// The ioctl's errno; ENOTTY where the file is not on Lustre.
pub fn fid(fd: BorrowedFd<'_>) -> Result<Fid, i32> {
    let mut fid = Fid { seq: 0, oid: 0, ver: 0 };
    // SAFETY: the ioctl writes a lu_fid, which `Fid` has the layout of (checked below), to the live address given.
    match unsafe { libc::ioctl(fd.as_raw_fd(), LL_IOC_PATH2FID, &mut fid) } {
        0 => Ok(fid),
        _ => Err(errno()),
    }
}

/// The calling thread's `errno` as a positive number.
fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

const _: () = assert!(size_of::<Fid>() == 16 && std::mem::offset_of!(Fid, ver) == 12);

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn fids_print_as_lustre_prints_them() {
        assert_eq!(Fid { seq: 0x200000401, oid: 0x1a, ver: 0 }.to_string(), "[0x200000401:0x1a:0x0]");
    }

    #[test]
    fn elsewhere_there_is_none() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(fid(file.as_fd()), Err(libc::ENOTTY));
    }
}
