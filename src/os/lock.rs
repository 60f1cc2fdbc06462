//! Whole-file locks between processes and, where the filesystem carries them, between nodes.
//!
//! Open-file-description locks: they belong to the open file, not to the process, so two devices of one process exclude each
//! other and closing some unrelated descriptor of the file releases nothing (as it would with POSIX locks).

use super::errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What came of asking for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is ours, until the last duplicate of the descriptor is closed.
    Held,
    /// Somebody else holds one that excludes it.
    Conflict,
    /// The filesystem has no locks (Lustre mounted `noflock` answers ENOSYS).
    Unsupported,
}

/// Whether anybody has a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nobody.
    Free,
    /// Another open file than the one that was asked through.
    Taken,
}

/// Whether any other open file than `fd`'s holds a lock on the file. Takes none.
///
/// # Errors
/// The errno of a server that cannot be asked.
pub fn standing(fd: BorrowedFd<'_>) -> Result<Standing, i32> {
    loop {
        let mut lock = whole_file(libc::F_WRLCK);
        // SAFETY: the descriptor is open and the structure live.
        match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
            0 if lock.l_type == libc::F_UNLCK as libc::c_short => return Ok(Standing::Free),
            0 => return Ok(Standing::Taken),
            _ if errno() == libc::EINTR => {}
            _ => return Err(errno()),
        }
    }
}

fn whole_file(kind: i32) -> libc::flock {
    // SAFETY: an all-zero flock is valid: from offset 0 to the end, process id 0 as OFD locks require.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// Asks for a lock on the whole file: exclusive for a writer, else shared. Does not wait for a holder, but the system call
/// may take as long as a metadata server does.
///
/// # Errors
/// The errno of anything but a conflict or missing support.
pub fn try_lock(fd: BorrowedFd<'_>, exclusive: bool) -> Result<Outcome, i32> {
    let lock = whole_file(if exclusive { libc::F_WRLCK } else { libc::F_RDLCK });
    loop {
        // SAFETY: the descriptor is open and the structure live.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
            return Ok(Outcome::Held);
        }
        match errno() {
            libc::EINTR => {}
            libc::EAGAIN | libc::EACCES => return Ok(Outcome::Conflict),
            // ENOLCK and EINVAL are a lock server's that cannot give a lock now: that is not the same.
            libc::ENOSYS | libc::EOPNOTSUPP => return Ok(Outcome::Unsupported),
            other => return Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn writers_exclude_everybody_and_readers_only_writers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        File::create(&path).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (a, b) = (open(), open());
        assert_eq!(try_lock(a.as_fd(), true), Ok(Outcome::Held));
        assert_eq!(try_lock(b.as_fd(), true), Ok(Outcome::Conflict));
        assert_eq!((standing(a.as_fd()), standing(b.as_fd())), (Ok(Standing::Free), Ok(Standing::Taken)));
        assert_eq!(try_lock(b.as_fd(), false), Ok(Outcome::Conflict));
        drop(a);
        assert_eq!(try_lock(b.as_fd(), false), Ok(Outcome::Held));
        let c = open();
        assert_eq!(try_lock(c.as_fd(), false), Ok(Outcome::Held));
        assert_eq!(try_lock(c.as_fd(), true), Ok(Outcome::Conflict));
    }
}
