//! Lanes: the parts of a volume that can be slow or stuck by themselves.
//!
//! A file on Lustre is striped over objects on several servers (OSTs). Each of those objects is a lane, with a queue and a limit of
//! its own on calls at a time, so that one hanging server holds no call for the others. Where there is one server, or nothing is
//! known of it, the volume has one lane.

use super::request::{Op, Request};
use super::rules::{Rule, keeps};
use super::target::Target;
use super::transfer::BOUNCE_BYTES;
use crate::os::clock::Ticks;
use crate::os::iov::IOV_MAX;
use crate::os::queue::List;

/// A part of a file that is striped over objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts in the file.
    pub start_bytes: u64,
    /// First byte behind it; `u64::MAX` to the end of the file.
    pub end_bytes: u64,
    /// How much goes to one object before the next one's turn comes, counted from the file's start.
    pub stripe_bytes: u64,
    /// The server of each object, in turn.
    pub osts: Vec<u32>,
}

/// Which lane takes what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaneMap {
    /// In the order of the file, without overlaps; with the lane of the first object.
    extents: Vec<(Extent, u16)>,
    /// The server of each lane; none for the first, which takes what lies on several objects or on none.
    osts: Vec<Option<u32>>,
}

/// The most lanes of a volume. (Lustre stripes over 2000 objects at most; more components than that share the first lane.)
const MAX_LANES: usize = 4096;

impl LaneMap {
    /// One lane for everything.
    pub fn single() -> Self {
        LaneMap { extents: Vec::new(), osts: vec![None] }
    }

    /// A lane for each object of `extents`, and one for what lies on several. Invalid or overlapping extents are ignored; their range uses
    /// lane 0.
    pub fn striped(extents: Vec<Extent>) -> Self {
        let mut map = LaneMap::single();
        let mut sorted = extents;
        sorted.sort_by_key(|extent| extent.start_bytes);
        let mut end_bytes = 0;
        for extent in sorted {
            let fits = map.osts.len() + extent.osts.len() <= MAX_LANES;
            let sound = extent.start_bytes >= end_bytes && extent.start_bytes < extent.end_bytes;
            if fits && sound && extent.stripe_bytes > 0 && !extent.osts.is_empty() {
                end_bytes = extent.end_bytes;
                let first = map.osts.len() as u16;
                map.osts.extend(extent.osts.iter().copied().map(Some));
                map.extents.push((extent, first));
            }
        }
        map
    }

    /// The server of each lane.
    pub fn osts(&self) -> &[Option<u32>] {
        &self.osts
    }

    /// The lane of a range of the file: its object's, or the first when it lies on several or none.
    pub fn lane_of(&self, offset_bytes: u64, len_bytes: u64) -> u16 {
        let behind = self.extents.partition_point(|(extent, _)| extent.start_bytes <= offset_bytes);
        let Some((extent, first)) = behind.checked_sub(1).map(|at| &self.extents[at]) else { return 0 };
        let stripe = offset_bytes / extent.stripe_bytes;
        let stripe_end = stripe.saturating_add(1).saturating_mul(extent.stripe_bytes);
        let end = offset_bytes.saturating_add(len_bytes);
        // With one object in all, stripes do not matter.
        if end > extent.end_bytes || (end > stripe_end && extent.osts.len() > 1) {
            return 0;
        }
        first + (stripe % extent.osts.len() as u64) as u16
    }
}

/// What a lane is doing at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneLoad {
    /// The server, where that is known.
    pub ost: Option<u32>,
    /// Requests that wait for a worker.
    pub queued: usize,
    /// Calls that are being made.
    pub running: usize,
    /// When the oldest waiting request was submitted.
    pub oldest_queued: Option<Ticks>,
    /// How often calls have not returned for long.
    pub stalls: u64,
}

/// The pages that are being worked on: start, end, whether parts of pages are modified.
pub(super) type Range = (u64, u64, bool);

/// One queue.
pub(super) struct Lane<T> {
    pub queue: List<Request<T>>,
    pub running: usize,
    pub has_turn: bool,
    /// Running average of how long a call takes.
    pub service: Ticks,
    pub slow: bool,
    pub stalls: u64,
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Lane { queue: List::default(), running: 0, has_turn: false, service: 0, slow: false, stalls: 0 }
    }
}

impl<T> Lane<T> {
    /// The head, with the neighbours that one call can take along; and what it has to be kept apart from. `None` when the head has
    /// to wait for an overlapping request.
    pub fn take(
        &mut self,
        target: &Target,
        ranges: &mut Vec<Range>,
        max_merge_bytes: u64,
    ) -> Option<(List<Request<T>>, Option<Range>)> {
        let head = self.queue.front()?;
        let align = target.file().offset_align_bytes() as u64;
        let is_free = |wanted: &Range| !ranges.iter().any(|r| overlap_matters(r, wanted));
        let mut range = None;
        if target.sub_page() {
            let wanted = page_range(head, align);
            if !is_free(&wanted) {
                return None;
            }
            range = Some(wanted);
        }
        let mut requests = List::default();
        let head = self.queue.pop_front()?;
        let (op, fua) = (head.op, head.fua);
        let (mut end, mut len, mut segments) = (head.end_bytes(), head.len_bytes, head.iovs.count());
        // A neighbour is merged when one vectored call can take it as it is, or after all of them are copied.
        let mut mergeable = matches!(op, Op::Read | Op::Write) && is_whole_pages(target, &head);
        let mut suits = head.suits_direct_io();
        requests.push_back(head);
        while mergeable && let Some(next) = self.queue.front() {
            mergeable = next.op == op
                && (next.fua == fua || !keeps(Rule::FuaApart))
                && next.offset_bytes == end
                && len + next.len_bytes <= max_merge_bytes
                && segments + next.iovs.count() <= IOV_MAX
                && is_whole_pages(target, next)
                && (len + next.len_bytes <= BOUNCE_BYTES as u64 || (suits && next.suits_direct_io()))
                && (range.is_none() || is_free(&page_range(next, align)));
            if mergeable && let Some(next) = self.queue.pop_front() {
                (end, len, segments) = (next.end_bytes(), len + next.len_bytes, segments + next.iovs.count());
                suits &= next.suits_direct_io();
                requests.push_back(next);
            }
        }
        if let Some(range) = &mut range {
            range.1 = range.1.max(end.next_multiple_of(align));
            ranges.push(*range);
        }
        Some((requests, range))
    }

    /// Notes how long a call took; whether the lane has become slow, or fast.
    pub fn served(&mut self, took: Ticks, slow_ticks: Ticks) {
        // One call that was merely preempted must not make a lane slow: an outlier counts as 8 times the threshold at most.
        self.service = self.service - self.service / 16 + took.min(slow_ticks * 8) / 16;
        self.slow = self.service > if self.slow { slow_ticks / 2 } else { slow_ticks };
    }
}

/// Whether direct I/O takes it, but perhaps for its memory.
fn is_whole_pages<T>(target: &Target, request: &Request<T>) -> bool {
    let align = target.file().offset_align_bytes();
    !target.sub_page() || (request.offset_bytes | request.len_bytes).is_multiple_of(align as u64)
}

/// The pages a request touches, and whether it modifies parts of them.
fn page_range<T>(request: &Request<T>, align: u64) -> Range {
    let (start, end) = (request.offset_bytes, request.end_bytes());
    let parts = request.op != Op::Read && (start % align != 0 || end % align != 0);
    (start - start % align, end.next_multiple_of(align), parts)
}

fn overlap_matters(a: &Range, b: &Range) -> bool {
    (a.2 || b.2) && a.0 < b.1 && b.0 < a.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn extent(start: u64, end: u64, stripe: u64, osts: &[u32]) -> Extent {
        Extent { start_bytes: start, end_bytes: end, stripe_bytes: stripe, osts: osts.to_vec() }
    }

    #[test]
    fn stripes_go_round() {
        // Two components: one object up to 4 MiB, then two.
        let map = LaneMap::striped(vec![extent(4 * MIB, u64::MAX, MIB, &[1, 0]), extent(0, 4 * MIB, MIB, &[0])]);
        assert_eq!(map.osts(), [None, Some(0), Some(1), Some(0)]);
        for (offset, len, lane) in [
            (0, 4096, 1),
            (0, 4 * MIB, 1),
            (4 * MIB - 4096, 8192, 0),
            (4 * MIB, MIB, 2),
            (5 * MIB, MIB, 3),
            (5 * MIB + 4096, MIB, 0),
            (1 << 40, 4096, 2),
            (u64::MAX - 1, 1, 3),
        ] {
            assert_eq!(map.lane_of(offset, len), lane, "{offset}+{len}");
        }
        assert_eq!(LaneMap::single().lane_of(5, 5), 0);
    }

    proptest! {
        #[test]
        fn any_extents_make_a_map(extents in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), prop::collection::vec(0u32..8, 0..5)), 0..6),
                                  offset in any::<u64>(), len in any::<u64>()) {
            let extents = extents.into_iter().map(|(s, e, stripe, osts)| extent(s, e, stripe, &osts)).collect();
            let map = LaneMap::striped(extents);
            prop_assert!((map.lane_of(offset, len) as usize) < map.osts().len());
        }
    }
}
