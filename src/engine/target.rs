//! The file behind a device, as the engines see it.

use super::guard::Guard;
use super::lane::{Extent, LaneMap};
use super::order::Claims;
use super::state::VolumeState;
use crate::os::file::{DirectFile, Unlocked};
use crate::os::lustre::layout::Layout;
use crate::os::probe::PathState;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is wrong with a file under a live device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Damage {
    /// It ends inside the device.
    Truncated = 1,
    /// It has no name any more: what is written is gone when the device is.
    Removed,
    /// Its name leads to another file now.
    Replaced,
    /// A flush has failed: what was written before may not be on stable storage.
    FlushFailed,
}

impl Damage {
    /// Its name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Damage::Truncated => "truncated",
            Damage::Removed => "removed",
            Damage::Replaced => "replaced",
            Damage::FlushFailed => "flush failed",
        }
    }

    /// What it means, and what to do.
    pub fn advice(self, target: &Target) -> String {
        match self {
            Damage::Truncated => format!(
                "the file ends at {} bytes, inside the device; I/O behind that fails. Make it long enough again with bdev_lloop_resize, or detach and attach it",
                target.known_end_bytes.load(Ordering::Relaxed)
            ),
            Damage::Removed => "the file was removed: what is on the device now is gone when it is detached. Copy it away".into(),
            Damage::Replaced => "another file has taken its name, the device goes on with the old one. Detach it and attach the new one, or put the old one back".into(),
            Damage::FlushFailed => "a flush has failed: what was written before it may not be on stable storage. Whoever flushed was told. Check the storage and what is on the device, then resume it (bdev_lloop_resume)".into(),
        }
    }
}

/// A file and the part of it that is the device.
#[derive(Debug)]
pub struct Target {
    file: DirectFile,
    guard: Guard,
    /// Who changes which blocks.
    claims: Claims,
    /// A [`VolumeState`], as the scheduler has it.
    state: AtomicU8,
    base_bytes: u64,
    /// How long the device is; 0 while nobody has said.
    len_bytes: AtomicU64,
    /// Whether requests may be finer than the file's direct I/O, so that parts of pages are read, modified and written.
    sub_page: bool,
    /// Cleared when the filesystem turns out not to know FALLOC_FL_ZERO_RANGE.
    zero_range_works: AtomicBool,
    /// A [`Damage`], or 0.
    damage: AtomicU8,
    /// Where a truncated file ends: what lies behind fails.
    known_end_bytes: AtomicU64,
    /// Calls on this file take long enough to be worth another thread.
    slow: AtomicBool,
    /// On Lustre, where the file's stripes lie.
    layout: Mutex<Option<Layout>>,
    layout_is_old: AtomicBool,
}

impl Target {
    /// The part of `file` that starts at `base_bytes`, used in blocks of `block_bytes`. Without locks.
    pub fn new(file: DirectFile, base_bytes: u64, block_bytes: u32) -> Self {
        Self::guarded(file, Guard::none(), base_bytes, block_bytes)
    }

    /// The same with the locks that were taken on it.
    pub fn guarded(file: DirectFile, guard: Guard, base_bytes: u64, block_bytes: u32) -> Self {
        let align = file.offset_align_bytes() as u64;
        let sub_page = !u64::from(block_bytes).is_multiple_of(align) || !base_bytes.is_multiple_of(align);
        Target {
            file,
            guard,
            claims: Claims::new(block_bytes),
            state: AtomicU8::new(VolumeState::Open as u8),
            base_bytes,
            len_bytes: AtomicU64::new(0),
            sub_page,
            zero_range_works: AtomicBool::new(true),
            damage: AtomicU8::new(0),
            known_end_bytes: AtomicU64::new(u64::MAX),
            slow: AtomicBool::new(false),
            layout: Mutex::new(None),
            layout_is_old: AtomicBool::new(false),
        }
    }

    /// The file.
    pub fn file(&self) -> &DirectFile {
        &self.file
    }

    /// Its locks.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Who changes which of its blocks.
    pub(super) fn claims(&self) -> &Claims {
        &self.claims
    }

    /// The state of its volume.
    pub fn state(&self) -> VolumeState {
        VolumeState::from_u8(self.state.load(Ordering::Acquire))
    }

    pub(super) fn set_state(&self, state: VolumeState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Where the device starts in the file.
    pub fn base_bytes(&self) -> u64 {
        self.base_bytes
    }

    /// Says how long the device is, so that a file that has become too short is noticed.
    pub fn set_len_bytes(&self, len_bytes: u64) {
        self.len_bytes.store(len_bytes, Ordering::Relaxed);
    }

    /// Whether a request can cover parts of the pages that direct I/O moves.
    pub fn sub_page(&self) -> bool {
        self.sub_page
    }

    /// Whether errors may pass by themselves, as they do on Lustre.
    pub fn on_lustre(&self) -> bool {
        self.file.identity().fid.is_some()
    }

    /// What is wrong with the file.
    pub fn damage(&self) -> Option<Damage> {
        match self.damage.load(Ordering::Relaxed) {
            1 => Some(Damage::Truncated),
            2 => Some(Damage::Removed),
            3 => Some(Damage::Replaced),
            4 => Some(Damage::FlushFailed),
            _ => None,
        }
    }

    /// Notes that the file is not what the device needs.
    pub fn set_damage(&self, damage: Damage) {
        // The others say more, and need more.
        if damage == Damage::FlushFailed && self.damage().is_some() {
            return;
        }
        if damage == Damage::Truncated {
            // A file whose size cannot be asked for is not known to be too short.
            let Ok(end_bytes) = self.file.size_bytes() else { return };
            self.known_end_bytes.store(end_bytes, Ordering::Relaxed);
        }
        if self.damage.swap(damage as u8, Ordering::Relaxed) != damage as u8 {
            tracing::error!("{}: degraded: {}", self.file.path().display(), damage.advice(self));
        }
    }

    /// Forgets it: the file is what it was again.
    pub fn clear_damage(&self) {
        self.known_end_bytes.store(u64::MAX, Ordering::Relaxed);
        if self.damage.swap(0, Ordering::Relaxed) != 0 {
            tracing::info!("{}: the file is what the device needs again", self.file.path().display());
        }
    }

    /// Whether the file is known to end before `end_bytes`: reads there would make up zeroes, writes would hide that something is
    /// missing in between.
    #[inline]
    pub(super) fn ends_before(&self, end_bytes: u64) -> bool {
        end_bytes > self.known_end_bytes.load(Ordering::Relaxed)
    }

    /// Looks at the file and at its name. Blocks.
    pub fn look_for_damage(&self) -> Option<Damage> {
        let len_bytes = self.len_bytes.load(Ordering::Relaxed);
        if len_bytes > 0 && self.file.size_bytes().is_ok_and(|size| size < self.base_bytes + len_bytes) {
            return Some(Damage::Truncated);
        }
        match self.file.path_state() {
            PathState::Same => None,
            PathState::Removed => Some(Damage::Removed),
            PathState::Replaced => Some(Damage::Replaced),
        }
    }

    pub(super) fn slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed)
    }

    pub(super) fn set_slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    /// Zeroes whole pages of the file: keeps the space where the filesystem can, else punches a hole, which reads the same.
    pub(super) fn zero_pages(&self, permit: Unlocked<'_>, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
        if self.zero_range_works.load(Ordering::Relaxed) {
            match self.file.zero_range(permit, offset_bytes, len_bytes) {
                Err(libc::EOPNOTSUPP) => self.zero_range_works.store(false, Ordering::Relaxed),
                other => return other,
            }
        }
        self.file.punch(permit, offset_bytes, len_bytes)
    }

    /// Gives the whole pages of a range back; parts of pages keep what they have.
    pub(super) fn discard(&self, permit: Unlocked<'_>, start_bytes: u64, end_bytes: u64) -> Result<(), i32> {
        let align = self.file.offset_align_bytes() as u64;
        let (first, last) = (start_bytes.next_multiple_of(align), end_bytes - end_bytes % align);
        if first < last { self.file.punch(permit, first, last - first) } else { Ok(()) }
    }

    fn layout_slot(&self) -> MutexGuard<'_, Option<Layout>> {
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where its stripes lie, on Lustre.
    pub fn layout(&self) -> Option<Layout> {
        self.layout_slot().clone()
    }

    /// Whether the layout should be read again: the file may have grown into a part that was not instantiated.
    pub(super) fn layout_is_old(&self) -> bool {
        self.on_lustre() && (self.layout_is_old.swap(false, Ordering::Relaxed) || self.has_uninstantiated_parts())
    }

    fn has_uninstantiated_parts(&self) -> bool {
        self.layout_slot()
            .as_ref()
            .is_some_and(|layout| layout.components.iter().any(|component| component.objects.is_empty()))
    }

    /// Has it read again at the next look.
    pub fn expect_new_layout(&self) {
        self.layout_is_old.store(true, Ordering::Relaxed);
    }

    /// Reads the layout; the lanes that follow from it, when it has changed. Blocks.
    pub fn read_layout(&self) -> Option<LaneMap> {
        let new = match Layout::read(std::os::fd::AsFd::as_fd(&self.file)) {
            Ok(layout) => layout,
            Err(libc::ENODATA | libc::EOPNOTSUPP | libc::ENOTTY) => return None,
            Err(errno) => {
                tracing::warn!(
                    "{}: its layout cannot be read, going on without: {}",
                    self.file.path().display(),
                    crate::error::reason(errno)
                );
                return None;
            }
        };
        let map = lanes_of(&new);
        let mut slot = self.layout_slot();
        let changed = slot.as_ref() != Some(&new);
        *slot = Some(new);
        changed.then_some(map)
    }

    /// An offset in each object of the file that holds some of it: reads there tell of every server's lock.
    /// None when the layout is not known: then nothing tells. Blocks.
    pub fn object_offsets(&self) -> Vec<u64> {
        let size_bytes = self.file.size_bytes().unwrap_or(u64::MAX);
        // Read anew: writes of ours may have added objects.
        let now = Layout::read(std::os::fd::AsFd::as_fd(&self.file)).ok().or_else(|| self.layout());
        now.map_or_else(Vec::new, |layout| layout.object_offsets(size_bytes))
    }

    /// The server that holds a byte of the file.
    pub fn ost_of(&self, offset_bytes: u64) -> Option<u32> {
        self.layout_slot().as_ref()?.ost_of(offset_bytes)
    }
}

/// A lane for each object of the mirror that is read and written first.
fn lanes_of(layout: &Layout) -> LaneMap {
    let mut extents: Vec<(usize, Extent)> = Vec::new();
    for (index, _, object) in layout.objects() {
        if extents.last().is_none_or(|(last, _)| *last != index) {
            let component = &layout.components[index];
            let (start_bytes, end_bytes) = (component.start_bytes, component.end_bytes);
            let stripe_bytes = component.stripe_size_bytes;
            extents.push((index, Extent { start_bytes, end_bytes, stripe_bytes, osts: Vec::new() }));
        }
        extents.iter_mut().next_back().into_iter().for_each(|(_, extent)| extent.osts.push(object.ost_idx));
    }
    LaneMap::striped(extents.into_iter().map(|(_, extent)| extent).collect())
}
