//! A device's life, and what the other side of an error is told.

use crate::engine::Op;
use crate::spdk::bdev_io::Completion;
use std::sync::atomic::{AtomicU8, Ordering};

/// The states of the kernel driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// No file behind it: before it is attached and after its file is closed.
    Unbound,
    /// I/O is accepted.
    Bound,
    /// On its way out: what is in flight ends, nothing new is accepted.
    Rundown,
}

impl State {
    /// Its name, as `bdev_get_bdevs` shows it.
    pub fn name(self) -> &'static str {
        match self {
            State::Unbound => "unbound",
            State::Bound => "bound",
            State::Rundown => "rundown",
        }
    }
}

/// A state that is read for every I/O.
#[derive(Debug)]
pub struct StateCell(AtomicU8);

impl StateCell {
    /// Starts with `state`.
    pub const fn new(state: State) -> Self {
        StateCell(AtomicU8::new(state as u8))
    }

    /// The state.
    #[inline]
    pub fn get(&self) -> State {
        match self.0.load(Ordering::Acquire) {
            1 => State::Bound,
            2 => State::Rundown,
            _ => State::Unbound,
        }
    }

    /// Changes it.
    pub fn set(&self, state: State) {
        self.0.store(state as u8, Ordering::Release);
    }
}

/// What an initiator is told of an errno: the NVMe status (NVM Express base specification, figures "status code") that means
/// the same, so that a full disk is not taken for a broken one.
pub fn completion(op: Op, result: Result<(), i32>) -> Completion {
    const GENERIC: i32 = 0;
    const MEDIA: i32 = 2;
    const PATH: i32 = 3;
    let (sct, sc) = match result {
        Ok(()) => return Completion::Success,
        Err(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => (GENERIC, 0x81), // capacity exceeded
        Err(libc::EROFS | libc::EBADF | libc::EPERM) => (GENERIC, 0x20),   // namespace is write protected
        Err(libc::EIO | libc::ENODATA) if op == Op::Read => (MEDIA, 0x81), // unrecovered read error
        Err(libc::EIO) => (MEDIA, 0x80),                                   // write fault
        // The device is fenced or on its way out: a host with another path takes that one.
        Err(libc::ENOLCK | libc::ENODEV | libc::ESHUTDOWN) => (PATH, 0x00), // internal path error
        Err(libc::ECANCELED) => (GENERIC, 0x07),                            // command abort requested
        Err(libc::EOPNOTSUPP) => (GENERIC, 0x01),                           // invalid command opcode
        Err(_) => (GENERIC, 0x06),                                          // internal error
    };
    Completion::Nvme { sct, sc }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_their_meaning() {
        assert_eq!(completion(Op::Write, Ok(())), Completion::Success);
        assert_eq!(completion(Op::Write, Err(libc::ENOSPC)), Completion::Nvme { sct: 0, sc: 0x81 });
        assert_eq!(completion(Op::Read, Err(libc::EIO)), Completion::Nvme { sct: 2, sc: 0x81 });
        assert_eq!(completion(Op::Flush, Err(libc::EIO)), Completion::Nvme { sct: 2, sc: 0x80 });
        assert_eq!(completion(Op::Write, Err(libc::EROFS)), Completion::Nvme { sct: 0, sc: 0x20 });
        for path in [libc::ENOLCK, libc::ENODEV, libc::ESHUTDOWN] {
            assert_eq!(completion(Op::Read, Err(path)), Completion::Nvme { sct: 3, sc: 0 });
        }
        assert_eq!(completion(Op::Unmap, Err(libc::EOPNOTSUPP)), Completion::Nvme { sct: 0, sc: 1 });
    }
}
