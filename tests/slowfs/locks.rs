//! Group locks and record locks, as they were measured on Lustre.

use std::collections::{BTreeMap, BTreeSet};

/// An open file.
pub type Handle = u64;

/// The group locks of a file.
#[derive(Default)]
pub struct Groups {
    holders: BTreeMap<Handle, u64>,
    /// Those that an eviction took it from: nothing works for them until they unlock.
    lost: BTreeMap<Handle, u64>,
    /// All that ever held one.
    ever: BTreeSet<Handle>,
}

/// What came of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Yes,
    /// Not while others have it.
    Wait,
    No(i32),
}

impl Groups {
    pub fn lock(&mut self, handle: Handle, gid: u64, nonblock: bool) -> Asked {
        if gid == 0 || self.holders.contains_key(&handle) || self.lost.contains_key(&handle) {
            return Asked::No(libc::EINVAL);
        }
        if self.holders.values().any(|&other| other != gid) {
            return if nonblock { Asked::No(libc::EAGAIN) } else { Asked::Wait };
        }
        self.holders.insert(handle, gid);
        self.ever.insert(handle);
        Asked::Yes
    }

    pub fn unlock(&mut self, handle: Handle, gid: u64) -> Result<(), i32> {
        for held in [&mut self.holders, &mut self.lost] {
            if held.get(&handle) == Some(&gid) {
                held.remove(&handle);
                return Ok(());
            }
        }
        Err(libc::EINVAL)
    }

    /// Whether an open file may do I/O.
    pub fn admits(&self, handle: Handle) -> Asked {
        if self.lost.contains_key(&handle) {
            Asked::No(libc::ENOLCK)
        } else if self.is_held() && !self.holders.contains_key(&handle) {
            Asked::Wait
        } else {
            Asked::Yes
        }
    }

    pub fn is_held(&self) -> bool {
        !self.holders.is_empty()
    }

    /// Whether this one is in the group that `handle` asks to be in.
    pub fn is_in(&self, handle: Handle, gid: u64) -> bool {
        self.holders.get(&handle) == Some(&gid)
    }

    /// Whether this one has a lock.
    pub fn holds(&self, handle: Handle) -> bool {
        self.holders.contains_key(&handle)
    }

    /// Had a lock, and goes on without one.
    pub fn is_unprotected(&self, handle: Handle) -> bool {
        self.ever.contains(&handle) && !self.holders.contains_key(&handle)
    }

    pub fn evict(&mut self) {
        self.lost.append(&mut self.holders);
    }

    pub fn release(&mut self, handle: Handle) {
        self.holders.remove(&handle);
        self.lost.remove(&handle);
        self.ever.remove(&handle);
    }

    /// Groups that hold it now.
    pub fn held(&self) -> Vec<u64> {
        self.holders.values().copied().collect()
    }
}

/// A record lock: bytes `start` to `end`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub owner: u64,
    pub handle: Handle,
    pub start: u64,
    pub end: u64,
    pub exclusive: bool,
    pub pid: u32,
}

/// The record locks of a file.
#[derive(Default)]
pub struct Records(Vec<Record>);

impl Records {
    /// Somebody's lock that excludes the wanted one.
    pub fn conflict(&self, wanted: &Record) -> Option<Record> {
        let overlaps = |held: &&Record| held.start <= wanted.end && wanted.start <= held.end;
        let excludes = |held: &&Record| held.owner != wanted.owner && (held.exclusive || wanted.exclusive);
        self.0.iter().filter(overlaps).find(excludes).copied()
    }

    /// Takes a lock that conflicts with none, in place of what the owner has there.
    pub fn set(&mut self, wanted: Record) {
        self.clear(wanted.owner, wanted.start, wanted.end);
        self.0.push(wanted);
    }

    /// Gives back what the owner has there; what sticks out stays.
    pub fn clear(&mut self, owner: u64, start: u64, end: u64) {
        let (touched, mut kept): (Vec<_>, Vec<_>) =
            self.0.drain(..).partition(|held| held.owner == owner && held.start <= end && start <= held.end);
        for held in touched {
            if held.start < start {
                kept.push(Record { end: start - 1, ..held });
            }
            if held.end > end {
                kept.push(Record { start: end + 1, ..held });
            }
        }
        self.0 = kept;
    }

    /// An open file is closed, or a process has closed it.
    pub fn release(&mut self, handle: Option<Handle>, owner: Option<u64>) {
        self.0.retain(|held| Some(held.handle) != handle && Some(held.owner) != owner);
    }

    pub fn evict(&mut self) {
        self.0.clear();
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }
}
