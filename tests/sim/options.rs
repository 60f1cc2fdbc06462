//! What kind of world a seed makes.

use crate::rng::Rng;
use crate::world::{MS, SECOND};
use lloop::engine::LaneMap;
use lloop::engine::guard::{GuardOptions, Sharing};
use lloop::engine::lane::Extent;
use std::num::NonZeroU32;
use std::time::Duration;

/// Where the file is, and how it is locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A local filesystem: a ring, no retries, no locks.
    Local,
    /// Lustre, with the advisory lock alone.
    Advisory,
    /// Lustre, with the group lock beside it.
    Group,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub place: Place,
    pub sectors: usize,
    pub sector_bytes: u64,
    /// Sectors of a page: more than one where requests may cover parts of pages.
    pub page_sectors: usize,
    pub objects: usize,
    /// Sectors before the next object's turn comes.
    pub stripe: usize,
    pub nodes: usize,
    pub ports: usize,
    pub hosts: usize,
    /// Requests of a host at a time.
    pub depth: usize,
    pub workers: usize,
    pub lane_limit: usize,
    pub max_merge_bytes: u64,
    pub ring: bool,
    /// How many calls in a thousand go wrong.
    pub trouble: u32,
    pub fault_every: u64,
    pub retry_timeout: Duration,
    pub lock_check: u64,
    pub discards: bool,
    /// How long hosts go on.
    pub length: u64,
}

pub const PAGE_BYTES: u64 = 4096;

impl Options {
    pub fn new(rng: &Rng) -> Self {
        let place = rng.pick(&[Place::Local, Place::Advisory, Place::Group, Place::Group]);
        let on_lustre = place != Place::Local;
        let sub_page = !on_lustre && rng.permille(300);
        let sector_bytes = if sub_page { 512 } else { PAGE_BYTES };
        let large = !sub_page && rng.permille(50);
        let sectors = if large { 2048 } else { rng.pick(&[16, 24, 64]) };
        Options {
            place,
            sectors,
            sector_bytes,
            page_sectors: (PAGE_BYTES / sector_bytes) as usize,
            objects: if on_lustre { 1 + rng.below(3) } else { 1 },
            stripe: rng.pick(&[2, 4]),
            nodes: if place == Place::Group { 1 + rng.below(2) } else { 1 },
            ports: 1 + rng.below(3),
            hosts: 1 + rng.below(4),
            depth: rng.pick(&[1, 4, 16]),
            workers: 1 + rng.below(6),
            lane_limit: 1 + rng.below(4),
            max_merge_bytes: rng.pick(&[4096, 16384, 1 << 20]),
            ring: !on_lustre && rng.permille(700),
            trouble: rng.pick(&[0, 20, 100, 300]),
            fault_every: rng.pick(&[50 * MS, 500 * MS, 5 * SECOND]),
            retry_timeout: Duration::from_millis(rng.pick(&[0, 200, 1000, 3000])),
            lock_check: rng.pick(&[100 * MS, SECOND]),
            discards: rng.permille(500),
            length: rng.between(SECOND / 10, 4 * SECOND),
        }
    }

    pub fn on_lustre(&self) -> bool {
        self.place != Place::Local
    }

    /// The longest that a flush may take while servers answer: it waits for older writes that are tried again, and calls take their
    /// time.
    pub fn flush_bound(&self) -> u64 {
        self.retry_timeout.as_nanos() as u64 + 2 * SECOND
    }

    pub fn guard(&self) -> GuardOptions {
        if self.place == Place::Local {
            return GuardOptions::default();
        }
        GuardOptions {
            advisory: Some(Sharing::Exclusive),
            group: None,
            discards: self.discards,
            this_node_only: false,
            timeout: Duration::from_secs(2),
        }
    }

    /// The same for the `node`th target, which has a group of its own.
    pub fn guard_of(&self, node: usize) -> GuardOptions {
        let group = (self.place == Place::Group).then(|| NonZeroU32::new(node as u32 + 1)).flatten();
        GuardOptions { group, ..self.guard() }
    }

    /// The lanes of the file's objects.
    pub fn map(&self) -> LaneMap {
        if self.objects == 1 {
            return LaneMap::single();
        }
        LaneMap::striped(vec![Extent {
            start_bytes: 0,
            end_bytes: u64::MAX,
            stripe_bytes: self.stripe as u64 * self.sector_bytes,
            osts: (0..self.objects as u32).collect(),
        }])
    }

    /// An offset in each object.
    pub fn object_offsets(&self) -> Vec<u64> {
        (0..self.objects).map(|object| (object * self.stripe) as u64 * self.sector_bytes).collect()
    }
}
