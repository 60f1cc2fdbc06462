//! A file: what lies below, who has locks on it, and what was done to it.

use crate::faults::{Faults, Watched};
use crate::layout::Map;
use crate::locks::{Asked, Groups, Handle, Records};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex};

#[derive(Default)]
struct Ost {
    reads: u64,
    writes: u64,
    now: u64,
    max: u64,
}

/// What the file's users can ask for as JSON.
#[derive(Default)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub fsyncs: u64,
    pub fallocates: u64,
    pub fallocates_under_group_lock: u64,
    pub group_locks: u64,
    pub group_unlocks: u64,
    pub record_locks: u64,
    /// Reads and writes of open files that had a group lock and went on without it.
    pub unprotected_ios: u64,
    osts: BTreeMap<u32, Ost>,
}

/// What changes.
#[derive(Default)]
pub struct State {
    pub groups: Groups,
    pub records: Records,
    pub counters: Counters,
    /// The data version.
    pub version: u64,
    /// The evictions so far: of all I/O, or of that to one OST.
    evictions: Vec<Option<u32>>,
    /// An eviction that the next fsync has to tell of.
    pub sync_error: bool,
    /// An eviction that the next question for a record lock has to tell of.
    pub query_error: bool,
    /// Reads and writes that are past all waiting, by open file.
    moving: BTreeMap<Handle, usize>,
}

impl State {
    pub fn evict_ost(&mut self, ost: Option<u32>) {
        self.groups.evict();
        self.evictions.push(ost);
        self.sync_error = true;
    }

    pub fn evict_mds(&mut self) {
        self.records.evict();
        self.query_error = true;
    }

    /// Whether I/O to these OSTs that began after so many evictions has been overtaken by another.
    pub fn was_evicted(&self, began: usize, osts: &[u32]) -> bool {
        self.evictions[began..].iter().any(|evicted| evicted.is_none_or(|ost| osts.contains(&ost)))
    }

    /// An I/O arrives; how many evictions there were by then.
    pub fn begin(&mut self, handle: Handle, osts: &[u32], is_write: bool) -> Result<usize, i32> {
        if let Asked::No(errno) = self.groups.admits(handle) {
            return Err(errno);
        }
        for &ost in osts {
            let ost = self.counters.osts.entry(ost).or_default();
            *if is_write { &mut ost.writes } else { &mut ost.reads } += 1;
            ost.now += 1;
            ost.max = ost.max.max(ost.now);
        }
        *if is_write { &mut self.counters.writes } else { &mut self.counters.reads } += 1;
        Ok(self.evictions.len())
    }

    /// It leaves.
    pub fn end(&mut self, osts: &[u32]) {
        for ost in osts {
            self.counters.osts.entry(*ost).or_default().now -= 1;
        }
    }

    /// Whether it may touch the data now.
    pub fn admit(&mut self, handle: Handle, began: usize, osts: &[u32]) -> Option<Result<(), i32>> {
        if self.was_evicted(began, osts) {
            return Some(Err(libc::EIO));
        }
        match self.groups.admits(handle) {
            Asked::Wait => None,
            Asked::No(errno) => Some(Err(errno)),
            Asked::Yes => {
                self.counters.unprotected_ios += u64::from(self.groups.is_unprotected(handle));
                *self.moving.entry(handle).or_default() += 1;
                Some(Ok(()))
            }
        }
    }

    /// It has touched the data.
    pub fn moved(&mut self, handle: Handle) {
        match self.moving.get_mut(&handle) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.moving.remove(&handle)),
        }
    }

    /// Asks for a group lock. What others are moving is waited for, by O_NONBLOCK callers as well: Lustre has that flag keep them
    /// from waiting for another group only (LDLM_FL_BLOCK_NOWAIT in ldlm_extent.c).
    pub fn group_lock(&mut self, handle: Handle, gid: u64, nonblock: bool) -> Asked {
        let stranger_moves = self.moving.keys().any(|&other| other != handle && !self.groups.is_in(other, gid));
        if gid != 0 && !self.groups.is_held() && stranger_moves {
            return Asked::Wait;
        }
        let asked = self.groups.lock(handle, gid, nonblock);
        self.counters.group_locks += u64::from(asked == Asked::Yes);
        asked
    }

    pub fn stats(&self) -> Value {
        let counters = &self.counters;
        let ost = |(index, ost): (&u32, &Ost)| {
            (index.to_string(), json!({"reads": ost.reads, "writes": ost.writes, "max_concurrent": ost.max}))
        };
        json!({
            "reads": counters.reads,
            "writes": counters.writes,
            "fsyncs": counters.fsyncs,
            "fallocates": counters.fallocates,
            "fallocates_under_group_lock": counters.fallocates_under_group_lock,
            "group_locks": counters.group_locks,
            "group_unlocks": counters.group_unlocks,
            "groups_held": self.groups.held(),
            "record_locks": counters.record_locks,
            "records_held": self.records.count(),
            "unprotected_ios": counters.unprotected_ios,
            "data_version": self.version,
            "osts": counters.osts.iter().map(ost).collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// A file.
pub struct Node {
    pub file: File,
    pub path: PathBuf,
    /// Its attribute `lustre.lov` is in here.
    pub lov: PathBuf,
    map: Mutex<Watched<Map>>,
    pub state: Mutex<State>,
    pub changed: Condvar,
}

impl Node {
    pub fn new(file: File, path: &Path) -> Node {
        let lov = crate::beside(path, ".lov");
        let map = Mutex::new(Watched::new(&lov, Map::parse));
        Node { file, path: path.to_owned(), lov, map, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The OSTs that bytes lie on.
    pub fn osts(&self, faults: &Faults, offset: u64, len: usize) -> Vec<u32> {
        match &faults.stripes {
            Some(map) => map.osts(offset, len),
            None => self.map.lock().unwrap().get().osts(offset, len),
        }
    }

    /// Its state is another one now: whoever waits looks again.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
        done
    }
}
