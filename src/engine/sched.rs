//! Who is next: the workers' shared view of what is to be done. Plain data under a lock that no system call is made under and
//! that no reactor takes.
//!
//! A lane is a queue with a limit on how many of its requests are executed at once; lanes with something to do wait in a ring
//! and get one turn each, so that a busy or hanging one takes no more than its limit from the others.

use super::request::{Op, Request};
use super::target::Target;
use crate::os::clock::Ticks;
use crate::os::iov::IOV_MAX;
use crate::os::queue::List;
use std::collections::VecDeque;
use std::sync::Arc;

/// What a worker executes as one.
pub struct Work<T> {
    pub(super) lane: u32,
    pub(super) requests: List<Request<T>>,
    range: Option<(u64, u64, bool)>,
    flush: bool,
}

struct Lane<T> {
    target: Arc<Target>,
    queue: List<Request<T>>,
    flushes: List<Request<T>>,
    flush_running: bool,
    running: usize,
    in_ring: bool,
    closing: bool,
    /// What is being executed, page by page: start, end, whether it modifies parts of pages. Kept where that can happen only.
    ranges: Vec<(u64, u64, bool)>,
    /// Running average of how long a call takes.
    service: Ticks,
}

/// All lanes.
pub struct Sched<T> {
    lanes: Vec<Option<Lane<T>>>,
    ring: VecDeque<u32>,
    lane_limit: usize,
    max_merge_bytes: u64,
    slow_ticks: Ticks,
}

/// What a lane is doing at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneLoad {
    /// Requests that wait for a worker.
    pub queued: usize,
    /// Calls that are being made.
    pub running: usize,
    /// When the oldest waiting request was submitted.
    pub oldest_queued: Option<Ticks>,
}

impl<T> Sched<T> {
    /// No lanes yet. Calls that take longer than `slow_ticks` on average make a lane a slow one.
    pub fn new(lane_limit: usize, max_merge_bytes: u64, slow_ticks: Ticks) -> Self {
        Sched { lanes: Vec::new(), ring: VecDeque::new(), lane_limit: lane_limit.max(1), max_merge_bytes, slow_ticks }
    }

    /// Changes how many requests of one lane are executed at once, and how much is merged.
    pub fn set_limits(&mut self, lane_limit: usize, max_merge_bytes: u64) {
        self.lane_limit = lane_limit.max(1);
        self.max_merge_bytes = max_merge_bytes;
    }

    /// Adds a lane; its number.
    pub fn open(&mut self, target: Arc<Target>) -> u32 {
        let lane = Lane {
            ranges: Vec::with_capacity(if target.sub_page() { 1024 } else { 0 }),
            target,
            queue: List::default(),
            flushes: List::default(),
            flush_running: false,
            running: 0,
            in_ring: false,
            closing: false,
            service: 0,
        };
        let id = self.lanes.iter().position(Option::is_none).unwrap_or_else(|| {
            self.lanes.push(None);
            self.lanes.len() - 1
        });
        self.lanes[id] = Some(lane);
        // A lane is in the ring once at most: this is room for all, and the I/O path never allocates.
        self.ring.reserve(self.lanes.len());
        id as u32
    }

    /// Ends a lane that gets no more requests: at once, or when its last call is done. True when it is gone.
    pub fn close(&mut self, id: u32) -> bool {
        let Some(lane) = self.lanes.get_mut(id as usize).and_then(Option::as_mut) else { return true };
        lane.closing = true;
        self.drop_if_closed(id)
    }

    fn drop_if_closed(&mut self, id: u32) -> bool {
        let gone =
            |lane: &Lane<T>| lane.closing && lane.running == 0 && lane.queue.is_empty() && lane.flushes.is_empty();
        let slot = &mut self.lanes[id as usize];
        if slot.as_ref().is_some_and(gone) {
            *slot = None;
            self.ring.retain(|&other| other != id);
        }
        slot.is_none()
    }

    /// Takes in what was submitted.
    pub fn accept(&mut self, mut submitted: List<Request<T>>) {
        while let Some(request) = submitted.pop_front() {
            let id = request.lane;
            let lane = self.lanes[id as usize].as_mut().expect("a lane outlives its requests");
            match request.op {
                Op::Flush => lane.flushes.push_back(request),
                _ => lane.queue.push_back(request),
            }
            self.enlist(id);
        }
    }

    /// Puts a lane into the ring when it could get a turn.
    fn enlist(&mut self, id: u32) {
        let Some(lane) = self.lanes[id as usize].as_mut() else { return };
        let flush = !lane.flushes.is_empty() && !lane.flush_running;
        if !lane.in_ring && lane.running < self.lane_limit && (flush || !lane.queue.is_empty()) {
            lane.in_ring = true;
            self.ring.push_back(id);
        }
    }

    /// The next thing to do, if there is any that may be done now.
    pub fn take_next(&mut self) -> Option<Work<T>> {
        while let Some(id) = self.ring.pop_front() {
            let lane = self.lanes[id as usize].as_mut().expect("a lane leaves the ring before it goes");
            lane.in_ring = false;
            let work = lane.take(id, self.max_merge_bytes);
            if work.is_some() {
                lane.running += 1;
                self.enlist(id);
                return work;
            }
            // The head has to wait for an overlapping request of its lane; that one's end enlists the lane again.
        }
        None
    }

    /// Whether anything could be done at once.
    pub fn has_ready(&self) -> bool {
        !self.ring.is_empty()
    }

    /// Notes the end of a work that took `took`; true when its lane is gone with it.
    pub fn finished(&mut self, work: FinishedWork, took: Ticks) -> bool {
        let slow_ticks = self.slow_ticks;
        let Some(lane) = self.lanes[work.lane as usize].as_mut() else { return true };
        lane.running -= 1;
        lane.flush_running &= !work.flush;
        if let Some(range) = work.range
            && let Some(at) = lane.ranges.iter().position(|r| *r == range)
        {
            lane.ranges.swap_remove(at);
        }
        // One call that was merely preempted must not make a lane slow: an outlier counts as 8 times the threshold at most.
        lane.service = lane.service - lane.service / 16 + took.min(slow_ticks * 8) / 16;
        let slow = lane.target.slow();
        if slow != (lane.service > if slow { slow_ticks / 2 } else { slow_ticks }) {
            lane.target.set_slow(!slow);
        }
        self.enlist(work.lane);
        self.drop_if_closed(work.lane)
    }

    /// What a lane is doing.
    pub fn load(&self, id: u32) -> LaneLoad {
        let Some(lane) = self.lanes.get(id as usize).and_then(Option::as_ref) else { return LaneLoad::default() };
        let oldest = |list: &List<Request<T>>| list.front().map(|r| r.submitted);
        LaneLoad {
            queued: lane.queue.len() + lane.flushes.len(),
            running: lane.running,
            oldest_queued: [oldest(&lane.queue), oldest(&lane.flushes)].into_iter().flatten().min(),
        }
    }
}

/// What the scheduler needs to know of a work that is done; its requests are answered already.
pub struct FinishedWork {
    lane: u32,
    range: Option<(u64, u64, bool)>,
    flush: bool,
}

impl<T> Work<T> {
    /// Separates the requests, which go to their submitters, from what the scheduler wants back.
    pub fn into_parts(self) -> (List<Request<T>>, FinishedWork) {
        (self.requests, FinishedWork { lane: self.lane, range: self.range, flush: self.flush })
    }
}

impl<T> Lane<T> {
    fn take(&mut self, id: u32, max_merge_bytes: u64) -> Option<Work<T>> {
        if !self.flushes.is_empty() && !self.flush_running {
            // Group commit: one fdatasync that starts now answers all of them; those that come meanwhile share the next.
            self.flush_running = true;
            let requests = std::mem::take(&mut self.flushes);
            return Some(Work { lane: id, requests, range: None, flush: true });
        }
        let head = self.queue.front()?;
        let mut range = None;
        if self.target.sub_page() {
            let wanted = page_range(head, self.target.file().offset_align_bytes() as u64);
            if self.ranges.iter().any(|r| overlap_matters(r, &wanted)) {
                return None;
            }
            self.ranges.push(wanted);
            range = Some(wanted);
        }
        let mut requests = List::default();
        let head = self.queue.pop_front()?;
        let (op, mut end, mut len, mut segments) = (head.op, head.end_bytes(), head.len_bytes, head.iovs.count());
        // A neighbour is merged when one vectored call can take it as it is.
        let mut mergeable = range.is_none() && matches!(op, Op::Read | Op::Write) && self.fits_as_it_is(&head);
        requests.push_back(head);
        while mergeable && let Some(next) = self.queue.front() {
            mergeable = next.op == op
                && next.offset_bytes == end
                && len + next.len_bytes <= max_merge_bytes
                && segments + next.iovs.count() <= IOV_MAX
                && self.fits_as_it_is(next);
            if mergeable && let Some(next) = self.queue.pop_front() {
                (end, len, segments) = (next.end_bytes(), len + next.len_bytes, segments + next.iovs.count());
                requests.push_back(next);
            }
        }
        Some(Work { lane: id, requests, range, flush: false })
    }

    fn fits_as_it_is(&self, request: &Request<T>) -> bool {
        let file = self.target.file();
        request.iovs.is_aligned(file.memory_align_bytes(), file.offset_align_bytes())
    }
}

/// The pages a request touches, and whether it modifies parts of them.
fn page_range<T>(request: &Request<T>, align: u64) -> (u64, u64, bool) {
    let (start, end) = (request.offset_bytes, request.end_bytes());
    let parts = request.op != Op::Read && (start % align != 0 || end % align != 0);
    (start - start % align, end.next_multiple_of(align), parts)
}

fn overlap_matters(a: &(u64, u64, bool), b: &(u64, u64, bool)) -> bool {
    (a.2 || b.2) && a.0 < b.1 && b.0 < a.1
}
