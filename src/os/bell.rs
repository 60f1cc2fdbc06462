//! A descriptor that becomes readable when it is rung: how a thread that sleeps in epoll is woken.

use super::errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An eventfd that never blocks.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A silent one.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM.
    pub fn new() -> Result<Self, i32> {
        // SAFETY: eventfd has no preconditions.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        // SAFETY: just opened, and nobody else knows the number.
        if fd < 0 { Err(errno()) } else { Ok(Bell(unsafe { OwnedFd::from_raw_fd(fd) })) }
    }

    /// Makes it readable until it is cleared. From any thread.
    pub fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: an open descriptor and eight live bytes. (It can only fail when it is readable already, 2^64 - 2 times.)
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes it silent; what happens after this rings anew.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: an open descriptor and eight live bytes. (It fails when there is nothing to clear.)
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(bell: &Bell) -> bool {
        let mut poll = libc::pollfd { fd: bell.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live structure.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    #[test]
    fn it_stays_rung_until_it_is_cleared() {
        let bell = Bell::new().unwrap();
        assert!(!readable(&bell));
        bell.ring();
        bell.ring();
        assert!(readable(&bell) && readable(&bell));
        bell.clear();
        assert!(!readable(&bell));
        bell.clear();
    }
}
