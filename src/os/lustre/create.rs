//! Files striped as they are asked to be.
//!
//! A file gets its layout from the site's defaults when it is opened for writing first, unless it was opened with
//! [`O_LOV_DELAY_CREATE`]: then it can be chosen before anything is written. Some sites allow no choice and say nothing of it:
//! what came of it has to be read back.

use super::layout::{ALL_OSTS, Layout, MAGIC_V1, MAGIC_V3, POOL_BYTES};
use super::{CLIENT_MAGIC, errno};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Added to the flags that a new file is opened with, for reading and writing.
pub const O_LOV_DELAY_CREATE: i32 = 0x2100;

const LL_IOC_LOV_SETSTRIPE: libc::c_ulong = 0x4008_669a;
const RAID0: u32 = 1;
const ANY_OST: u16 = 0xFFFF;

/// How a file is to be striped; what is 0 or nothing is left to the site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Striping {
    /// Over how many OSTs; [`ALL_OSTS`] for all there are.
    pub stripe_count: u16,
    /// How much lies on one before the next one's turn, a multiple of 64 KiB.
    pub stripe_size_bytes: u32,
    /// The OSTs to choose from, by the name of the pool; 15 bytes at most.
    pub pool: Option<String>,
}

/// Whether an open file or directory is on a Lustre client.
///
/// # Errors
/// The system's errno.
pub fn is_on_lustre(fd: BorrowedFd<'_>) -> Result<bool, i32> {
    // SAFETY: statfs is plain data, for which zeroes are valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a live structure.
    match unsafe { libc::fstatfs(fd.as_raw_fd(), &mut stat) } {
        0 => Ok(stat.f_type as u64 & 0xFFFF_FFFF == CLIENT_MAGIC),
        _ => Err(errno()),
    }
}

/// Chooses the striping of a new file that was opened with [`O_LOV_DELAY_CREATE`].
///
/// # Errors
/// The ioctl's errno: EEXIST or EALREADY for a file that has one already. No error does not mean that it was heeded.
pub fn set_stripe(fd: BorrowedFd<'_>, striping: &Striping) -> Result<(), i32> {
    let request = striping.request().ok_or(libc::EINVAL)?;
    // SAFETY: the ioctl reads a lov_user_md of the kind that its magic says, which `request` is, and keeps nothing of it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), LL_IOC_LOV_SETSTRIPE, request.as_ptr()) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

impl Striping {
    /// What the ioctl takes: `struct lov_user_md` of version 1, of version 3 with a pool. None for a name that is too long.
    fn request(&self) -> Option<Vec<u8>> {
        let mut request = Vec::new();
        request.extend(if self.pool.is_some() { MAGIC_V3 } else { MAGIC_V1 }.to_le_bytes());
        request.extend(RAID0.to_le_bytes());
        request.extend([0; 16]);
        request.extend(self.stripe_size_bytes.to_le_bytes());
        request.extend(self.stripe_count.to_le_bytes());
        request.extend(ANY_OST.to_le_bytes());
        if let Some(pool) = &self.pool {
            let mut name = [0; POOL_BYTES];
            name[..POOL_BYTES - 1].get_mut(..pool.len())?.copy_from_slice(pool.as_bytes());
            request.extend(name);
        }
        Some(request)
    }

    /// In what a layout is not what was asked for, in words. How many OSTs all are is not known here: any number will do.
    pub fn unmet(&self, layout: &Layout) -> Option<String> {
        let component = match &layout.components[..] {
            [component] if !layout.composite && component.pattern.is_striped() => component,
            _ => return Some("it has the site's own layout of components".to_owned()),
        };
        let (count, size_bytes) = (component.stripe_count, component.stripe_size_bytes);
        if !matches!(u32::from(self.stripe_count), 0 | ALL_OSTS) && count != u32::from(self.stripe_count) {
            return Some(format!("its stripe count is {count} instead of {}", self.stripe_count));
        }
        if self.stripe_size_bytes != 0 && size_bytes != u64::from(self.stripe_size_bytes) {
            return Some(format!("its stripe size is {size_bytes} bytes instead of {}", self.stripe_size_bytes));
        }
        match (&self.pool, &component.pool) {
            (Some(wanted), got) if got.as_ref() != Some(wanted) => {
                let got = got.as_ref().map_or("no pool".to_owned(), |got| format!("pool {got}"));
                Some(format!("it is in {got} instead of {wanted}"))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_asked_for_reads_as_a_layout() {
        let wanted = Striping { stripe_count: 3, stripe_size_bytes: 1 << 20, pool: Some("flash".into()) };
        let layout = Layout::parse(&wanted.request().unwrap()).unwrap();
        assert_eq!(wanted.unmet(&layout), None);
        assert_eq!(Striping::default().unmet(&layout), None);
        assert_eq!(Striping { stripe_count: 0xFFFF, ..Striping::default() }.unmet(&layout), None);
        for (other, words) in [
            (Striping { stripe_count: 4, ..wanted.clone() }, "is 3 instead of 4"),
            (Striping { stripe_size_bytes: 1 << 16, ..wanted.clone() }, "1048576 bytes instead of 65536"),
            (Striping { pool: Some("disk".into()), ..wanted.clone() }, "pool flash instead of disk"),
        ] {
            assert!(other.unmet(&layout).unwrap().contains(words));
        }
        let plain = Layout::parse(&Striping { pool: None, ..wanted.clone() }.request().unwrap()).unwrap();
        assert!(wanted.unmet(&plain).unwrap().contains("no pool instead of flash"));
        assert_eq!(Striping { pool: Some("x".repeat(16)), ..wanted }.request(), None);
    }

    #[test]
    fn elsewhere_there_is_no_striping() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(is_on_lustre(file.as_fd()), Ok(false));
        assert_eq!(set_stripe(file.as_fd(), &Striping::default()), Err(libc::ENOTTY));
    }
}
