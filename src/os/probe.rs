//! Finding out what a file can do, and what has become of it.

use super::bounce::BounceBuffer;
use super::file::{DirectFile, PAGE_BYTES, Unlocked, fstat, open_fd, retry_interrupted, through_proc};
use super::iov::IovList;
use super::lustre;
use super::lustre::group::{PROBE_GROUP, group_lock};
use crate::error::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Where a file's path leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// To it.
    Same,
    /// Nowhere, or the file has no name left.
    Removed,
    /// To another file.
    Replaced,
}

impl DirectFile {
    /// What direct I/O wants: the kernel's word where it gives one, else whole pages, tried out with a read.
    pub(super) fn find_alignment(&mut self) -> Result<()> {
        let refuse = || {
            Error::new(
                libc::EINVAL,
                format!(
                    "{} cannot do direct I/O (O_DIRECT) on {}; move the file to a filesystem that can",
                    self.path.display(),
                    self.identity.fs_name()
                ),
            )
        };
        match dio_align(self.fd.as_fd()) {
            Some((0, _) | (_, 0)) => return Err(refuse()),
            // Lustre says nothing here; should it ever, whole pages are what every version takes (docs/internals/lustre.md#alignment).
            Some((offset, memory)) if self.identity.fs_magic != lustre::CLIENT_MAGIC => {
                self.align.offset_bytes = offset.max(512);
                self.align.memory_bytes = memory;
            }
            _ => {
                // SAFETY: sysconf has no preconditions.
                let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(PAGE_BYTES as i64) as usize;
                (self.align.offset_bytes, self.align.memory_bytes) = (page, page);
            }
        }
        let mut buffer = BounceBuffer::new(self.align.offset_bytes)
            .map_err(|e| Error::os(e.raw_os_error().unwrap_or(libc::ENOMEM), "memory for a trial read"))?;
        let mut iovs = IovList::default();
        iovs.push_slice(buffer.as_mut_slice());
        // Somebody else's group lock would have a read wait for it; that direct I/O works there is known.
        if self.identity.fs_magic == lustre::CLIENT_MAGIC {
            return Ok(());
        }
        match self.read_at(&iovs, 0) {
            Ok(_) => Ok(()),
            Err(libc::EINVAL | libc::EOPNOTSUPP) => Err(refuse()),
            Err(e) => Err(Error::os(e, format!("reading the start of {}", self.path.display()))),
        }
    }

    /// Whether reads can be asked not to block: what io_uring needs to work without helper threads. Tried out.
    ///
    /// # Errors
    /// The errno that says no: EOPNOTSUPP on Lustre and FUSE, for example.
    pub fn probe_nowait(&self) -> Result<(), i32> {
        let mut buffer = BounceBuffer::new(self.align.offset_bytes).map_err(|_| libc::ENOMEM)?;
        let mut iovs = IovList::default();
        iovs.push_slice(buffer.as_mut_slice());
        let (first, count) = iovs.raw();
        let read = retry_interrupted(|| {
            // SAFETY: the list describes the live buffer.
            unsafe { libc::preadv2(self.fd.as_raw_fd(), first, count, 0, libc::RWF_NOWAIT) }
        });
        match read {
            Ok(_) | Err(libc::EAGAIN) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Whether anybody else holds a group lock on this file of Lustre. Takes one itself for a moment, on an open file of its own.
    /// Never waits for another group; blocks as long as an OST of the file does not answer.
    ///
    /// # Errors
    /// The system's errno.
    pub fn is_group_locked(&self) -> Result<bool, i32> {
        let flags = libc::O_RDONLY | libc::O_NOCTTY | libc::O_NONBLOCK;
        let probe = open_fd(&through_proc(self.fd.as_fd()), flags)?;
        // Closing `probe` gives the lock back.
        match group_lock(probe.as_fd(), PROBE_GROUP) {
            Ok(()) => Ok(false),
            Err(libc::EAGAIN) => Ok(true),
            // Where there are no group locks nobody holds one.
            Err(libc::ENOTTY | libc::ENOSYS | libc::EOPNOTSUPP) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Whether holes can be punched, tried out where it changes nothing: far behind the file's end. On Lustre it waits for
    /// everybody's group locks: ask [`DirectFile::is_group_locked`] first. Blocks.
    pub fn can_punch(&self, permit: Unlocked<'_>) -> bool {
        const FAR_BYTES: u64 = 1 << 30;
        match self.size_bytes() {
            Ok(size) if !self.read_only && size < i64::MAX as u64 - 2 * FAR_BYTES => {
                self.punch(permit, (size + FAR_BYTES) & !(FAR_BYTES - 1), PAGE_BYTES as u64).is_ok()
            }
            _ => false,
        }
    }

    /// Reads a page and forgets it. Blocks.
    ///
    /// # Errors
    /// The system's errno.
    pub fn trial_read(&self, offset_bytes: u64) -> Result<(), i32> {
        let mut buffer = BounceBuffer::new(self.align.offset_bytes).map_err(|_| libc::ENOMEM)?;
        let mut iovs = IovList::default();
        iovs.push_slice(buffer.as_mut_slice());
        self.read_at(&iovs, offset_bytes).map(drop)
    }

    /// Whether the path still leads to this file. Blocks.
    pub fn path_state(&self) -> PathState {
        use std::os::unix::fs::MetadataExt;
        match std::fs::metadata(&self.path) {
            Ok(meta) if (meta.dev(), meta.ino()) == (self.identity.dev, self.identity.ino) => PathState::Same,
            // Also when the file has no name left: another one was renamed over it.
            Ok(_) => PathState::Replaced,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => PathState::Removed,
            // Who cannot look there can still see whether the file has a name.
            Err(_) if fstat(self.fd.as_fd()).is_ok_and(|stat| stat.st_nlink == 0) => PathState::Removed,
            Err(_) => PathState::Same,
        }
    }
}

/// Offset and memory alignment of direct I/O as `statx` reports them (Linux 6.1), zeroes where there is no direct I/O;
/// nothing where the filesystem does not say.
fn dio_align(fd: BorrowedFd<'_>) -> Option<(usize, usize)> {
    // SAFETY: statx is plain data, for which zeroes are valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor, an empty C string (allowed by AT_EMPTY_PATH) and a live structure.
    let rc = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut stat) };
    (rc == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((stat.stx_dio_offset_align as usize, stat.stx_dio_mem_align as usize))
}
