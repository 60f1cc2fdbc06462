//! What the engines need of the operating system, made safe: files with direct I/O, locks, the Lustre calls, memory that
//! requests live in, and sleeping and waking. Nothing here knows SPDK.

pub mod bell;
pub mod bounce;
pub mod clock;
pub mod crew;
pub mod event;
pub mod file;
pub mod iov;
pub mod lock;
pub mod lustre;
pub mod mount;
pub mod probe;
pub mod queue;
pub mod ring;
pub mod root;
pub mod sync;
pub mod task;
pub mod thread;
pub mod user;

/// The calling thread's `errno` as a positive number.
pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}
