//! What keeps others from a file: locks, taken when it is attached, watched, and taken again when they are lost.
//!
//! On Lustre there are two, which fail independently of each other (docs/internals/lustre.md): the advisory lock (open-file
//! description lock) at the metadata server, which an eviction drops silently, and the group lock at the storage servers, which
//! shuts every stranger out and after an eviction fails each I/O with ENOLCK, object by object. While one of them is held without a gap nobody else
//! can have come in, and the other is taken again without asking anybody. Where that is not so the volume is fenced until an
//! operator decides.

use super::lockable::Lockable;
use super::rules::{Rule, keeps};
use crate::error::{Error, Result, reason};
use crate::os::clock;
use crate::os::file::{DirectFile, Unlocked};
use crate::os::lock::{Marker, Outcome};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Which locks are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuardOptions {
    /// The advisory lock: shared or exclusive. `None` for no lock at all.
    pub advisory: Option<Sharing>,
    /// The group lock beside it, with its group.
    pub group: Option<NonZeroU32>,
    /// Unmaps are gathered, and done while the group lock is let go of.
    pub discards: bool,
    /// The advisory lock reaches the other processes of this node only (`localflock`).
    pub this_node_only: bool,
    /// How long a lock is waited for.
    pub timeout: Duration,
}

/// How a lock goes with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Shuts everybody out.
    Exclusive,
    /// Shuts exclusive ones out.
    Shared,
}

/// The locks of a volume on its file.
#[derive(Debug)]
pub struct Guard<F: Lockable = DirectFile> {
    options: GuardOptions,
    /// What came of the advisory lock.
    advisory: Option<Outcome>,
    /// What tells our advisory lock from anybody else's, where a server may lose it.
    marker: Option<Marker>,
    /// Another open file of the same, to ask the server through.
    watch: Mutex<Option<F::Watch>>,
    /// How often a lock was lost and taken again.
    recoveries: AtomicU64,
    /// The file's data version when it was fenced, to tell whether somebody has written since.
    version_at_fence: AtomicU64,
    /// The same when the lock of a reader was taken; 0 where the filesystem does not say.
    version_at_start: AtomicU64,
}

/// How long between two tries to get a lock back.
const PAUSE: Duration = Duration::from_millis(100);

/// How often a group lock that somebody else has is asked for again when a file is attached.
const GROUP_TRIES: u32 = 2;

impl<F: Lockable> Guard<F> {
    /// No locks.
    pub fn none() -> Self {
        Self::untaken(GuardOptions::default())
    }

    /// Says which locks are wanted, and takes none.
    #[doc(hidden)]
    pub fn untaken(options: GuardOptions) -> Self {
        Guard {
            options,
            advisory: None,
            marker: None,
            watch: Mutex::new(None),
            recoveries: AtomicU64::new(0),
            version_at_fence: AtomicU64::new(0),
            version_at_start: AtomicU64::new(0),
        }
    }

    /// Takes the advisory lock, which tells whether anybody has the file. Blocks.
    ///
    /// # Errors
    /// EBUSY when somebody holds a lock that excludes it; the system's errno.
    pub fn take_advisory(file: &F, options: GuardOptions) -> Result<Self> {
        let shown = file.path().display();
        // Only a metadata server can lose a lock.
        let marker = (file.may_lose_locks() && !options.this_node_only).then(Marker::new);
        let advisory = match options.advisory {
            None => None,
            Some(sharing) => Some(
                file.try_lock(sharing == Sharing::Exclusive, marker.as_ref())
                    .map_err(|e| Error::os(e, format!("locking {shown}")))?,
            ),
        };
        if advisory == Some(Outcome::Conflict) {
            let who = if file.read_only() { "a writer" } else { "another process or node" };
            return Err(Error::new(
                libc::EBUSY,
                format!("{shown} is in use by {who}, which holds a lock on it; detach it there first"),
            ));
        }
        let watched = advisory == Some(Outcome::Held) && marker.is_some();
        let watch = watched.then(|| file.watch()).transpose().map_err(|e| Error::os(e, format!("opening {shown}")))?;
        let version = if watch.is_some() && file.read_only() { file.data_version().unwrap_or(0) } else { 0 };
        Ok(Guard {
            advisory,
            marker,
            watch: Mutex::new(watch),
            version_at_start: AtomicU64::new(version),
            ..Guard::untaken(options)
        })
    }

    /// Takes the group lock, if one is wanted. Needs every storage server of the file; blocks as long as they do.
    ///
    /// # Errors
    /// EBUSY when another group has it; ENOTTY, EOPNOTSUPP and their like where the filesystem has no group locks.
    pub fn take_group(&self, file: &F) -> Result<()> {
        let Some(gid) = self.options.group else { return Ok(()) };
        let shown = file.path().display();
        let mut taken = file.group_lock(gid);
        // Somebody else's attach may be looking for group locks: that takes one for a moment.
        for _ in 0..GROUP_TRIES {
            if taken == Err(libc::EAGAIN) {
                file.pause(PAUSE);
                taken = file.group_lock(gid);
            }
        }
        match taken {
            // That can have taken as long as a server was down: somebody else may have the advisory lock by now.
            Ok(()) if self.has_lost_advisory(file) => Err(Error::new(
                libc::ENOLCK,
                format!("{shown}: its advisory lock was lost while the group lock was waited for; attach it again"),
            )),
            Ok(()) => Ok(()),
            Err(libc::EAGAIN) => Err(Error::new(
                libc::EBUSY,
                format!(
                    "{shown} is in use by another process or node, which holds a group lock on it; detach it there first, or give that group's id (group_id)"
                ),
            )),
            Err(errno @ (libc::ENOTTY | libc::ENOSYS | libc::EOPNOTSUPP)) => {
                Err(Error::new(errno, format!("{shown}: its filesystem has no group locks; use lock advisory")))
            }
            Err(errno) => Err(Error::os(errno, format!("taking the group lock of {shown}"))),
        }
    }

    /// What came of the advisory lock; `None` when there was none wanted.
    pub fn advisory(&self) -> Option<Outcome> {
        self.advisory
    }

    /// The group of the group lock.
    pub fn group(&self) -> Option<NonZeroU32> {
        self.options.group
    }

    /// Whether a group lock was taken.
    pub fn holds_group(&self) -> bool {
        self.options.group.is_some()
    }

    /// Whether unmaps are gathered and done in batches.
    pub fn gathers_discards(&self) -> bool {
        self.options.group.is_some() && self.options.discards
    }

    /// Whether the advisory lock keeps everybody out while the group lock is not there. A shared one does not: those of another group
    /// share it, too.
    pub fn advisory_covers(&self) -> bool {
        self.advisory == Some(Outcome::Held)
            && self.options.advisory == Some(Sharing::Exclusive)
            && !self.options.this_node_only
    }

    /// Whether the advisory lock reaches the other processes of this node only.
    pub fn is_of_this_node_only(&self) -> bool {
        self.options.this_node_only
    }

    fn watch(&self) -> MutexGuard<'_, Option<F::Watch>> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a server may lose a lock of this guard without anybody noticing.
    pub fn wants_watching(&self) -> bool {
        self.watch().is_some()
    }

    /// That fallocate may be called on the file: not under a group lock.
    pub fn unlocked(&self) -> Option<Unlocked<'_>> {
        (!self.holds_group()).then(Unlocked::known_by_guard)
    }

    /// Gives all locks back: the file is about to be closed. Blocks.
    pub fn give_back(&self, file: &F) {
        if let Some(gid) = self.options.group {
            // One that was lost is no harm here.
            let _ = file.group_unlock(gid);
        }
        if self.advisory == Some(Outcome::Held) {
            file.unlock();
        }
    }

    /// How often locks were lost and taken again.
    pub fn recoveries(&self) -> u64 {
        self.recoveries.load(Ordering::Relaxed)
    }

    /// Whether the advisory lock is still held, without a gap. Asks the server. Blocks.
    ///
    /// "Somebody has a lock on the file" would not do: that may be a stranger who came after an eviction and is about to go. What is
    /// asked for is our marker, which is lost with the lock and never taken again but by us.
    ///
    /// # Errors
    /// The errno of a server that cannot be asked now.
    pub fn advisory_is_held(&self, file: &F) -> Result<bool, i32> {
        let Some(watch) = &*self.watch() else { return Ok(self.advisory == Some(Outcome::Held)) };
        self.marker_is_set(file, watch)
    }

    fn marker_is_set(&self, file: &F, watch: &F::Watch) -> Result<bool, i32> {
        // Without a marker no server can lose the lock.
        let Some(marker) = &self.marker else { return Ok(true) };
        let exclusive = self.options.advisory == Some(Sharing::Exclusive);
        // The first answer after an eviction is EIO, the second tells.
        let mut answer = F::sees_marker(watch, marker, exclusive);
        for _ in 0..3 {
            if !matches!(answer, Err(libc::EIO | libc::ESHUTDOWN)) {
                break;
            }
            file.pause(PAUSE / 2);
            answer = F::sees_marker(watch, marker, exclusive);
        }
        answer
    }

    /// Whether an advisory lock that was taken is not known to be there.
    fn has_lost_advisory(&self, file: &F) -> bool {
        let is_lost = match self.advisory_is_held(file) {
            Ok(held) => !held,
            // A shared one that somebody else's shared lock hides: that cannot be told, and both are welcome.
            Err(libc::EBUSY) => false,
            Err(_) => true,
        };
        self.advisory == Some(Outcome::Held) && is_lost
    }

    fn retake_advisory(&self, file: &F) -> Result<bool, i32> {
        let exclusive = self.options.advisory == Some(Sharing::Exclusive);
        Ok(file.try_lock(exclusive, self.marker.as_ref())? == Outcome::Held)
    }

    /// Whether the group lock is still there, on every object of the file (`objects`: an offset in each): a direct read says ENOLCK
    /// where it is not. An object that does not answer counts as lost. Blocks.
    fn group_is_held(&self, file: &F, objects: &[u64]) -> bool {
        let is_held = |offset_bytes: u64| {
            for _ in 0..5 {
                match file.trial_read(offset_bytes) {
                    Ok(()) => return true,
                    // The first answer after an eviction says nothing yet of the lock; nor does a server that takes a descriptor for stale.
                    Err(libc::EIO | libc::ESHUTDOWN | libc::EAGAIN | libc::ENOMEM | libc::ESTALE) => {
                        file.pause(PAUSE / 2)
                    }
                    Err(_) => return false,
                }
            }
            false
        };
        let objects = if keeps(Rule::EveryObject) { objects } else { &objects[..objects.len().min(1)] };
        self.options.group.is_some() && !objects.is_empty() && objects.iter().all(|&offset_bytes| is_held(offset_bytes))
    }

    /// Takes the group lock again after a call has said ENOLCK. No I/O is in flight, and none starts. Blocks.
    ///
    /// # Errors
    /// Why the volume has to be fenced, for people.
    pub fn regain_group(&self, file: &F) -> Result<(), String> {
        self.vouch(file)?;
        self.relock_group(file, true)?;
        // Once more: that can have taken as long as a server was down.
        self.vouch(file)
    }

    /// Whether the advisory lock has kept others out until now.
    fn vouch(&self, file: &F) -> Result<(), String> {
        if !self.advisory_covers() {
            return Err("there is no advisory lock that would have kept others out meanwhile".into());
        }
        match self.advisory_is_held(file) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the advisory lock is lost as well".into()),
            Err(errno) => Err(format!("the advisory lock cannot be checked: {}", reason(errno))),
        }
    }

    /// Takes the advisory lock again after it was seen to be gone. No I/O is in flight, and none starts. Blocks.
    ///
    /// # Errors
    /// Why the volume has to be fenced, for people.
    pub fn regain_advisory(&self, file: &F, objects: &[u64]) -> Result<(), String> {
        match self.retake_advisory(file) {
            Ok(true) if file.read_only() && self.is_unwritten(file) => Ok(()),
            // Asked last: a group lock that is lost does not come back by itself.
            Ok(true) if self.group_is_held(file, objects) => Ok(()),
            Ok(true) => {
                Err("no group lock was held, on every object of the file, that would have kept others out meanwhile"
                    .into())
            }
            Ok(false) => Err("somebody else has taken it".into()),
            Err(errno) => Err(format!("it cannot be taken again: {}", reason(errno))),
        }
    }

    /// Whether nobody has written to the file since a reader's lock was taken, as far as the servers know. Blocks.
    fn is_unwritten(&self, file: &F) -> bool {
        let was = self.version_at_start.load(Ordering::Relaxed);
        was != 0 && file.data_version() == Ok(was)
    }

    /// Lets go of the group lock for a moment, for what waits for ever under it. No I/O is in flight, and none starts. The advisory
    /// lock stays. `objects` as for [`crate::engine::Target::object_offsets`]. Blocks.
    ///
    /// # Errors
    /// Why the volume has to be fenced, for people; `work` may have been done.
    pub fn without_group(&self, file: &F, objects: &[u64], work: impl FnOnce(Unlocked<'_>)) -> Result<(), String> {
        let Some(gid) = self.options.group else {
            work(Unlocked::known_by_guard());
            return Ok(());
        };
        // Giving a lost lock back succeeds as well: whether it was lost, and others may have been in, has to be known before.
        if !self.group_is_held(file, objects) {
            self.regain_group(file)?;
        } else if self.vouch(file).is_err() {
            // An eviction that nobody has noticed yet: the group lock has kept others out.
            self.regain_advisory(file, objects)?;
            self.recovered(file);
            self.vouch(file)?;
        }
        file.group_unlock(gid).map_err(|errno| format!("the group lock cannot be given back: {}", reason(errno)))?;
        work(Unlocked::known_by_guard());
        self.relock_group(file, false)?;
        self.vouch(file)
    }

    /// Opens the file anew in the place of a stale descriptor, without a moment in which nobody keeps others out: a member of the group
    /// is let in at once while the old one still has it, and a lock that is only shared for that moment is so on both. `objects` as for
    /// [`crate::engine::Target::object_offsets`]. No I/O is in flight, and none starts. Blocks.
    ///
    /// # Errors
    /// Why the volume has to be fenced, for people.
    pub fn reopen(&self, file: &F, objects: &[u64]) -> Result<(), String> {
        // Where no exclusive advisory lock tells that nobody was in, the group lock of the old descriptor has to.
        let exclusive = self.options.advisory == Some(Sharing::Exclusive) && self.advisory == Some(Outcome::Held);
        if self.options.group.is_some() && !exclusive && !self.group_is_held(file, objects) {
            return Err("nothing tells that others were kept out meanwhile".into());
        }
        let new = file.open_again().map_err(|e| e.message)?;
        let held = self.advisory == Some(Outcome::Held);
        match self.options.group {
            Some(gid) => new.group_lock(gid).map_err(no_group)?,
            None if held => {
                // Before the locks are asked for: that would take a lost marker again.
                self.marker_has_to_be_set(file, &new)?;
                for each in [file, &new] {
                    if each.try_lock(false, self.marker.as_ref()) != Ok(Outcome::Held) {
                        return Err("the advisory lock cannot be moved to the new descriptor".into());
                    }
                }
            }
            None => {}
        }
        if held {
            // Asked when the new lock is there: that can have taken as long as a server was down, and both old ones may have been
            // lost meanwhile. Asked through the new descriptor: the old one may not answer.
            self.marker_has_to_be_set(file, &new)?;
        }
        file.take_over(&new).map_err(|e| e.message)?;
        if held && self.retake_advisory(file) != Ok(true) {
            return Err("somebody else has taken the advisory lock".into());
        }
        // The old advisory lock went with the old descriptor: until now it was the group lock that kept others out.
        if self.options.group.is_some() && !self.group_is_held(file, objects) {
            return Err("the group lock is lost again".into());
        }
        let mut watch = self.watch();
        if watch.is_some() {
            *watch = Some(file.watch().map_err(reason)?);
        }
        Ok(())
    }

    /// Asks, through another open file, whether the marker of this one is there.
    fn marker_has_to_be_set(&self, file: &F, other: &F) -> Result<(), String> {
        match self.marker_is_set(file, &other.watch().map_err(reason)?) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the advisory lock is lost as well".into()),
            Err(errno) => Err(format!("the advisory lock cannot be checked: {}", reason(errno))),
        }
    }

    /// Everything anew, for an operator. Blocks.
    ///
    /// # Errors
    /// Who or what is in the way, for people.
    pub fn retake_all(&self, file: &F) -> Result<(), String> {
        if self.advisory == Some(Outcome::Held) {
            match self.retake_advisory(file) {
                Ok(true) => {}
                Ok(false) => return Err("somebody else holds the advisory lock".into()),
                Err(errno) => return Err(format!("the advisory lock: {}", reason(errno))),
            }
        }
        self.relock_group(file, true)?;
        // Once more: that can have taken as long as a server was down.
        if self.has_lost_advisory(file) {
            return Err("the advisory lock was lost again".into());
        }
        Ok(())
    }

    fn relock_group(&self, file: &F, unlock_first: bool) -> Result<(), String> {
        let Some(gid) = self.options.group else { return Ok(()) };
        let deadline = file.now().saturating_add(clock::to_ticks(self.options.timeout));
        if unlock_first {
            // A lost lock has to be given back before it can be taken again; one that this file never had is no harm.
            let _ = file.group_unlock(gid);
        }
        loop {
            let errno = match file.group_lock(gid) {
                Ok(()) => return Ok(()),
                Err(errno) => errno,
            };
            if file.now() >= deadline {
                return Err(no_group(errno));
            }
            file.pause(PAUSE);
        }
    }

    /// Remembers what the file was like when it was fenced. Blocks as long as a server is down.
    pub fn remember_version(&self, file: &F) {
        self.version_at_fence.store(file.data_version().unwrap_or(0), Ordering::Relaxed);
    }

    /// Notes that all is well again; whether the file was written to while it was fenced, where that can be told.
    pub fn recovered(&self, file: &F) -> Option<bool> {
        let was = self.version_at_fence.swap(0, Ordering::Relaxed);
        self.recoveries.fetch_add(1, Ordering::Relaxed);
        (was != 0).then(|| file.data_version().is_ok_and(|now| now != was))
    }
}

/// Why a group lock could not be had again, for people.
fn no_group(errno: i32) -> String {
    match errno {
        libc::EAGAIN => "somebody else holds a group lock".into(),
        errno => format!("the group lock cannot be taken again: {}", reason(errno)),
    }
}
