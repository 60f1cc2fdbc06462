//! What a [`super::Guard`] asks of a file. The tests' simulator has another answer than the system's.

use crate::error::Result;
use crate::os::clock::{self, Ticks};
use crate::os::file::DirectFile;
use crate::os::lock::{self, Marker, Outcome};
use crate::os::lustre::group;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// A file that locks can be taken on. Every call may block as long as a server does; errors are errnos.
pub trait Lockable: Sized {
    /// Another open file of the same, to ask the server through.
    type Watch;

    /// Its name, for people.
    fn path(&self) -> &Path;
    /// Whether it was opened for reading only.
    fn read_only(&self) -> bool;
    /// Whether a server may drop its locks.
    fn may_lose_locks(&self) -> bool;

    /// As [`lock::try_lock`].
    fn try_lock(&self, exclusive: bool, marker: Option<&Marker>) -> Result<Outcome, i32>;
    /// As [`lock::unlock`].
    fn unlock(&self);
    /// Opens it once more.
    fn watch(&self) -> Result<Self::Watch, i32>;
    /// As [`Marker::is_set`].
    fn sees_marker(watch: &Self::Watch, marker: &Marker, exclusive: bool) -> Result<bool, i32>;

    /// Takes the group lock on every object. Does not wait for another group.
    fn group_lock(&self, group: NonZeroU32) -> Result<(), i32>;
    /// Gives it back.
    fn group_unlock(&self, group: NonZeroU32) -> Result<(), i32>;
    /// Reads at `offset_bytes`, to see whether the object there can be read.
    fn trial_read(&self, offset_bytes: u64) -> Result<(), i32>;
    /// As [`group::data_version`].
    fn data_version(&self) -> Result<u64, i32>;

    /// As [`DirectFile::open_again`].
    fn open_again(&self) -> Result<Self>;
    /// As [`DirectFile::take_over`].
    fn take_over(&self, new: &Self) -> Result<()>;

    /// Waits.
    fn pause(&self, time: Duration);
    /// What time it is.
    fn now(&self) -> Ticks;
}

impl Lockable for DirectFile {
    type Watch = OwnedFd;

    fn path(&self) -> &Path {
        self.path()
    }

    fn read_only(&self) -> bool {
        self.read_only()
    }

    fn may_lose_locks(&self) -> bool {
        self.identity().fid.is_some()
    }

    fn try_lock(&self, exclusive: bool, marker: Option<&Marker>) -> Result<Outcome, i32> {
        lock::try_lock(self.as_fd(), exclusive, marker)
    }

    fn unlock(&self) {
        lock::unlock(self.as_fd());
    }

    fn watch(&self) -> Result<OwnedFd, i32> {
        self.duplicate()
    }

    fn sees_marker(watch: &OwnedFd, marker: &Marker, exclusive: bool) -> Result<bool, i32> {
        marker.is_set(watch.as_fd(), exclusive)
    }

    fn group_lock(&self, group: NonZeroU32) -> Result<(), i32> {
        self.set_nonblocking(true)?;
        let result = group::group_lock(self.as_fd(), group);
        // I/O on a regular file waits whatever this flag says, but Lustre is free to read it otherwise.
        self.set_nonblocking(false)?;
        result
    }

    fn group_unlock(&self, group: NonZeroU32) -> Result<(), i32> {
        group::group_unlock(self.as_fd(), group)
    }

    fn trial_read(&self, offset_bytes: u64) -> Result<(), i32> {
        self.trial_read(offset_bytes)
    }

    fn data_version(&self) -> Result<u64, i32> {
        group::data_version(self.as_fd())
    }

    fn open_again(&self) -> Result<Self> {
        self.open_again()
    }

    fn take_over(&self, new: &Self) -> Result<()> {
        self.take_over(new)
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn now(&self) -> Ticks {
        clock::now()
    }
}
