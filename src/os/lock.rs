//! Whole-file locks between processes and, where the filesystem carries them, between nodes.
//!
//! Open-file-description locks: they belong to the open file, not to the process, so two devices of one process exclude each
//! other and closing some unrelated descriptor of the file releases nothing (as it would with POSIX locks).

use super::errno;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
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

/// Where the lock ends. No file is that long; behind it are the markers.
const END_BYTES: i64 = 1 << 62;

/// A lock on one byte behind the end of any file, at a place of its own (random): what tells our lock from everybody else's. A server
/// that drops our locks drops all of them, and nobody else takes one just there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker(i64);

impl Marker {
    /// One that nobody has.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let random = RandomState::new().build_hasher().finish();
        // Apart from the lock: the kernel joins neighbours of one owner.
        Marker(END_BYTES + 1 + (random >> 3) as i64)
    }

    /// Takes it, as the lock itself: exclusive or shared.
    ///
    /// # Errors
    /// The system's errno.
    fn set(&self, fd: BorrowedFd<'_>, exclusive: bool) -> Result<(), i32> {
        let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        call(fd, libc::F_OFD_SETLK, &mut range(kind, self.0, 1))
    }

    /// Whether it is there: to be asked through another open file than it was set through. Takes none.
    ///
    /// # Errors
    /// The errno of a server that cannot be asked. EBUSY when that cannot be told: ours is shared, and somebody else's shared lock on
    /// everything hides it.
    pub fn is_set(&self, fd: BorrowedFd<'_>, exclusive: bool) -> Result<bool, i32> {
        let mut lock = range(libc::F_WRLCK, self.0, 1);
        call(fd, libc::F_OFD_GETLK, &mut lock)?;
        if lock.l_type == libc::F_UNLCK as libc::c_short {
            return Ok(false);
        }
        match (lock.l_start, lock.l_len) == (self.0, 1) {
            true => Ok(true),
            false if !exclusive && lock.l_type == libc::F_RDLCK as libc::c_short => Err(libc::EBUSY),
            // It covers the place, so an exclusive marker cannot be there.
            false => Ok(false),
        }
    }
}

/// Gives all locks of the open file back.
pub fn unlock(fd: BorrowedFd<'_>) {
    // One that cannot be given back goes with the descriptor.
    let _ = call(fd, libc::F_OFD_SETLK, &mut range(libc::F_UNLCK, 0, 0));
}

fn range(kind: i32, start_bytes: i64, len_bytes: i64) -> libc::flock {
    // SAFETY: an all-zero flock is valid: process id 0 as OFD locks require.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (start_bytes, len_bytes);
    lock
}

fn call(fd: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> Result<(), i32> {
    loop {
        // SAFETY: the descriptor is open and the structure live.
        match unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut *lock) } {
            0 => return Ok(()),
            _ if errno() == libc::EINTR => {}
            _ => return Err(errno()),
        }
    }
}

/// Asks for a lock on the whole file, exclusive or shared; with its `marker`, if one is wanted. Does not wait for a holder, but the system call
/// may take as long as a metadata server does.
///
/// # Errors
/// The errno of anything but a conflict or missing support.
pub fn try_lock(fd: BorrowedFd<'_>, exclusive: bool, marker: Option<&Marker>) -> Result<Outcome, i32> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let len_bytes = if marker.is_some() { END_BYTES } else { 0 };
    match call(fd, libc::F_OFD_SETLK, &mut range(kind, 0, len_bytes)) {
        Ok(()) => match marker.map_or(Ok(()), |marker| marker.set(fd, exclusive)) {
            Ok(()) => Ok(Outcome::Held),
            Err(libc::EAGAIN | libc::EACCES) => {
                unlock(fd);
                Ok(Outcome::Conflict)
            }
            Err(other) => Err(other),
        },
        Err(libc::EAGAIN | libc::EACCES) => Ok(Outcome::Conflict),
        // ENOLCK and EINVAL are a lock server's that cannot give a lock now: that is not the same.
        Err(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(Outcome::Unsupported),
        Err(other) => Err(other),
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
        assert_eq!(try_lock(a.as_fd(), true, None), Ok(Outcome::Held));
        assert_eq!(try_lock(b.as_fd(), true, None), Ok(Outcome::Conflict));
        assert_eq!(try_lock(b.as_fd(), false, None), Ok(Outcome::Conflict));
        drop(a);
        assert_eq!(try_lock(b.as_fd(), false, None), Ok(Outcome::Held));
        let c = open();
        assert_eq!(try_lock(c.as_fd(), false, None), Ok(Outcome::Held));
        assert_eq!(try_lock(c.as_fd(), true, None), Ok(Outcome::Conflict));
    }

    #[test]
    fn a_marker_is_nobody_elses_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (ours, watch, stranger) = (open(), open(), open());
        let marker = Marker::new();
        assert_eq!(marker.is_set(watch.as_fd(), true), Ok(false));
        assert_eq!(try_lock(ours.as_fd(), true, Some(&marker)), Ok(Outcome::Held));
        assert_eq!(marker.is_set(watch.as_fd(), true), Ok(true));
        // As a server that evicts us does; then a stranger comes, with a lock like ours or on everything.
        unlock(ours.as_fd());
        assert_eq!(try_lock(stranger.as_fd(), true, Some(&Marker::new())), Ok(Outcome::Held));
        assert_eq!(marker.is_set(watch.as_fd(), true), Ok(false));
        call(stranger.as_fd(), libc::F_OFD_SETLK, &mut range(libc::F_WRLCK, 0, 0)).unwrap();
        assert_eq!(marker.is_set(watch.as_fd(), true), Ok(false), "it covers the marker, and is not it");
        unlock(stranger.as_fd());
        // Shared ones: somebody else's on everything hides ours.
        assert_eq!(try_lock(ours.as_fd(), false, Some(&marker)), Ok(Outcome::Held));
        assert_eq!(marker.is_set(watch.as_fd(), false), Ok(true));
        assert_eq!(try_lock(stranger.as_fd(), false, None), Ok(Outcome::Held));
        assert!(marker.is_set(watch.as_fd(), false) != Ok(false), "it is there");
        unlock(ours.as_fd());
        unlock(stranger.as_fd());
        assert_eq!(try_lock(ours.as_fd(), true, None), Ok(Outcome::Held));
        assert_eq!(marker.is_set(watch.as_fd(), true), Ok(false), "the lock alone, taken again, vouches for nothing");
    }
}
