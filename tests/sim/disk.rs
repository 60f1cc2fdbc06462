//! The file: what is in it, what of that is on stable storage, and what calls on it come to.

use crate::check::{Id, Sector};
use crate::rng::Rng;

/// A change that is in the volatile cache.
struct Dirty {
    at: u64,
    id: Id,
    /// A failed fdatasync has lost it: it is read, but never written back.
    lost: bool,
}

pub struct Disk {
    pub contents: Vec<Id>,
    stable: Vec<Id>,
    /// Changes since `stable`, oldest first.
    dirty: Vec<Vec<Dirty>>,
    /// How many changes there were.
    pub changes: u64,
    pub object_of: Vec<usize>,
    /// Until when each object's server does not answer.
    pub hangs_until: Vec<u64>,
}

impl Disk {
    /// `stripe` sectors on each object in turn.
    pub fn new(sectors: usize, objects: usize, stripe: usize) -> Self {
        Disk {
            contents: vec![0; sectors],
            stable: vec![0; sectors],
            dirty: std::iter::repeat_with(Vec::new).take(sectors).collect(),
            changes: 0,
            object_of: (0..sectors).map(|sector| sector / stripe % objects).collect(),
            hangs_until: vec![0; objects],
        }
    }

    pub fn sectors(&self) -> usize {
        self.contents.len()
    }

    /// Changes a sector, in the volatile cache.
    pub fn change(&mut self, sector: Sector, id: Id) {
        self.changes += 1;
        self.contents[sector] = id;
        self.dirty[sector].push(Dirty { at: self.changes, id, lost: false });
    }

    /// Writes a sector's last change up to `until` to stable storage, with whatever came before it.
    fn write_back(&mut self, sector: Sector, until: u64) {
        let dirty = &mut self.dirty[sector];
        if let Some(last) = dirty.iter().rposition(|change| change.at <= until && !change.lost) {
            self.stable[sector] = dirty[last].id;
            dirty.drain(..=last);
        }
    }

    /// The end of a durable write of `ids` from `first` on. (A failed fdatasync meanwhile does not matter to it.)
    pub fn persist(&mut self, first: Sector, ids: &[Id]) {
        for (sector, &id) in (first..).zip(ids) {
            let dirty = &mut self.dirty[sector];
            if let Some(at) = dirty.iter().rposition(|change| change.id == id) {
                self.stable[sector] = id;
                dirty.drain(..=at);
            }
        }
    }

    /// The end of an fdatasync that began after `began` changes.
    pub fn sync(&mut self, began: u64) {
        (0..self.sectors()).for_each(|sector| self.write_back(sector, began));
    }

    /// The same of one that fails: some of the changes are on stable storage, the others are lost, and nobody will say so again.
    pub fn fail_sync(&mut self, began: u64, rng: &Rng) {
        for sector in 0..self.sectors() {
            if self.dirty[sector].is_empty() {
                continue;
            }
            if rng.permille(300) {
                self.write_back(sector, began);
            }
            self.dirty[sector].iter_mut().filter(|change| change.at <= began).for_each(|change| change.lost = true);
        }
    }

    /// The power fails: of each sector any change since the stable one may have reached stable storage.
    pub fn cut_power(&mut self, rng: &Rng) {
        for (sector, dirty) in self.dirty.iter_mut().enumerate() {
            let candidates: Vec<Id> = dirty.iter().filter(|change| !change.lost).map(|change| change.id).collect();
            if !candidates.is_empty() && rng.permille(500) {
                self.stable[sector] = rng.pick(&candidates);
            }
            dirty.clear();
            self.contents[sector] = self.stable[sector];
        }
        self.hangs_until.fill(0);
    }

    /// Whether a range is on a server that does not answer until later.
    pub fn hangs(&self, first: Sector, count: usize) -> u64 {
        self.object_of[first..first + count].iter().map(|&object| self.hangs_until[object]).max().unwrap_or(0)
    }
}
