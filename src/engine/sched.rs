//! Who is next: the workers' shared view of what is to be done. Plain data under a lock that no system call is made under and
//! that no reactor takes.
//!
//! Lanes with something to do wait in a ring and get one turn each. A lane gets `lane_limit` calls at a time, and never more than there
//! are workers left: so one that hangs keeps half of the pool at most, two a third each, and there is always one for the next
//! (Choudhury and Hahne, "Dynamic queue length thresholds", 1998).

use super::lane::{Lane, LaneLoad, LaneMap, Range};
use super::request::{Op, Request};
use super::target::Target;
use crate::os::clock::Ticks;
use crate::os::queue::{List, Placed};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

/// The place of a volume's flushes among its lanes.
const FLUSHES: u16 = u16::MAX;

/// What a worker executes as one.
pub struct Work<T> {
    pub(super) requests: List<Request<T>>,
    /// Calls on this lane take long.
    pub(super) slow: bool,
    pub(super) done: FinishedWork,
    /// Not to be executed: each has its errno.
    pub(super) refused: bool,
}

/// What the scheduler needs to know of a work that is done.
pub struct FinishedWork {
    pub(super) volume: u32,
    pub(super) lane: u16,
    range: Option<Range>,
    /// How many of its requests were tried before.
    retried: usize,
}

/// Why a volume needs somebody's attention.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trouble {
    /// A call said that the group lock is lost.
    pub lock_lost: bool,
    /// A call said that the descriptor is stale.
    pub stale: bool,
    /// Discards have been gathered.
    pub discards: bool,
}

impl Trouble {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Trouble::default()
    }
}

struct Volume<T> {
    target: Arc<Target>,
    map: LaneMap,
    lanes: Vec<Lane<T>>,
    flushes: List<Request<T>>,
    /// When the newest of the flushes was submitted.
    newest_flush: Ticks,
    flush_running: bool,
    flush_in_ring: bool,
    /// Calls that are being made.
    running: usize,
    /// Requests that failed and are due again some time; oldest failure first.
    retries: List<Request<T>>,
    /// Requests in `running` that were tried before, and when the oldest of them was submitted (or an earlier one).
    retried: (usize, Ticks),
    retries_total: u64,
    /// Unmaps, where they are done in batches.
    discards: List<Request<T>>,
    /// Nothing new is started.
    held: bool,
    /// Everything fails with this.
    failing: Option<i32>,
    trouble: Trouble,
    /// It fails for good.
    abandoned: bool,
    closing: bool,
    /// What is being executed, page by page. Kept where parts of pages can be modified only.
    ranges: Vec<Range>,
}

/// All volumes.
pub struct Sched<T> {
    volumes: Vec<Option<Volume<T>>>,
    /// Numbers of volumes that are gone, while somebody may still mean them.
    retired: HashSet<u32>,
    /// Files that nobody may own any more: to be dropped where closing can block.
    dead: Vec<Arc<Target>>,
    ring: VecDeque<(u32, u16)>,
    /// Lanes that have work and took too many workers already.
    crowded: VecDeque<(u32, u16)>,
    /// What is answered without being executed.
    refused: List<Request<T>>,
    running: usize,
    workers: usize,
    lane_limit: usize,
    max_merge_bytes: u64,
    slow_ticks: Ticks,
    /// Somebody has set `trouble` since this was last taken.
    troubled: bool,
}

impl<T> Sched<T> {
    /// No volumes yet, and `workers` to serve them. Calls that take longer than `slow_ticks` on average make a lane a slow one.
    pub fn new(workers: usize, lane_limit: usize, max_merge_bytes: u64, slow_ticks: Ticks) -> Self {
        Sched {
            volumes: Vec::new(),
            retired: HashSet::new(),
            dead: Vec::new(),
            ring: VecDeque::new(),
            crowded: VecDeque::new(),
            refused: List::default(),
            running: 0,
            workers: workers.max(1),
            lane_limit: lane_limit.max(1),
            max_merge_bytes,
            slow_ticks,
            troubled: false,
        }
    }

    /// Changes how many workers there are, how many calls a lane gets at a time, and how much is merged.
    pub fn set_limits(&mut self, workers: usize, lane_limit: usize, max_merge_bytes: u64) {
        (self.workers, self.lane_limit) = (workers.max(1), lane_limit.max(1));
        self.max_merge_bytes = max_merge_bytes;
        self.ring.append(&mut self.crowded);
    }

    /// Adds a volume; its number.
    pub fn open(&mut self, target: Arc<Target>, map: LaneMap) -> u32 {
        let volume = Volume {
            ranges: Vec::with_capacity(if target.sub_page() { 1024 } else { 0 }),
            target,
            lanes: map.osts().iter().map(|_| Lane::default()).collect(),
            map,
            flushes: List::default(),
            newest_flush: 0,
            flush_running: false,
            flush_in_ring: false,
            running: 0,
            retries: List::default(),
            retried: (0, 0),
            retries_total: 0,
            discards: List::default(),
            held: false,
            failing: None,
            trouble: Trouble::default(),
            abandoned: false,
            closing: false,
        };
        let is_free = |id: &usize| self.volumes[*id].is_none() && !self.retired.contains(&(*id as u32));
        let id = (0..self.volumes.len()).find(is_free).unwrap_or_else(|| {
            self.volumes.push(None);
            self.volumes.len() - 1
        });
        self.volumes[id] = Some(volume);
        self.make_room();
        id as u32
    }

    /// A lane is in the ring, or among the crowded, once at most: room for all, and the I/O path never allocates.
    fn make_room(&mut self) {
        let lanes: usize = self.volumes.iter().flatten().map(|volume| volume.lanes.len() + 1).sum();
        self.ring.reserve(lanes);
        self.crowded.reserve(lanes);
    }

    /// Sorts what comes from now on into other lanes: the layout has changed.
    pub fn set_map(&mut self, id: u32, map: LaneMap) {
        let Some(volume) = self.volume_mut(id) else { return };
        // Lanes are never taken away: some may have work. What waits stays where it is.
        volume.lanes.resize_with(map.osts().len().max(volume.lanes.len()), Lane::default);
        volume.map = map;
        self.make_room();
    }

    fn volume_mut(&mut self, id: u32) -> Option<&mut Volume<T>> {
        self.volumes.get_mut(id as usize)?.as_mut()
    }

    /// Ends a volume that gets no more requests: at once, or when its last call is done. True when it is gone.
    pub fn close(&mut self, id: u32) -> bool {
        let Some(volume) = self.volume_mut(id) else { return true };
        volume.closing = true;
        // (Nothing is left to wait for a lock, or for better times.)
        if volume.held {
            self.fail(id, libc::ENODEV);
        }
        self.drop_if_closed(id)
    }

    fn drop_if_closed(&mut self, id: u32) -> bool {
        let slot = &mut self.volumes[id as usize];
        if slot.as_ref().is_some_and(|volume| volume.closing && volume.is_idle()) {
            self.dead.extend(slot.take().map(|volume| volume.target));
            self.retired.insert(id);
            self.ring.retain(|&(other, _)| other != id);
            self.crowded.retain(|&(other, _)| other != id);
        }
        slot.is_none()
    }

    /// The files of volumes that are gone.
    pub fn take_dead(&mut self) -> Vec<Arc<Target>> {
        std::mem::take(&mut self.dead)
    }

    /// Nobody means this volume any more: its number may be given to another.
    pub fn forget(&mut self, id: u32) {
        self.retired.remove(&id);
    }

    /// Takes in what was submitted.
    pub fn accept(&mut self, mut submitted: List<Request<T>>) {
        while let Some(request) = submitted.pop_front() {
            let id = request.volume;
            let volume = self.volumes[id as usize].as_mut().expect("a volume outlives its requests");
            if let Some(errno) = volume.failing {
                self.refuse(request, errno);
                continue;
            }
            match request.op {
                Op::Flush => {
                    // (Ports do not hand over in the order of time.)
                    volume.newest_flush = volume.newest_flush.max(request.submitted);
                    volume.flushes.push_back(request);
                    self.enlist(id, FLUSHES);
                }
                Op::Unmap if volume.target.guard().gathers_discards() => {
                    volume.discards.push_back(request);
                    volume.trouble.discards = true;
                    self.troubled = true;
                }
                _ => {
                    let lane = volume.map.lane_of(request.offset_bytes, request.len_bytes);
                    volume.lanes[lane as usize].queue.push_back(request);
                    self.enlist(id, lane);
                }
            }
        }
    }

    fn refuse(&mut self, mut request: Placed<Request<T>>, errno: i32) {
        request.conclude(Err(errno));
        self.refused.push_back(request);
    }

    /// Puts a lane into the ring when it could get a turn.
    fn enlist(&mut self, id: u32, lane: u16) {
        let lane_limit = self.lane_limit;
        let Some(volume) = self.volume_mut(id) else { return };
        if volume.held {
            return;
        }
        let in_ring = if lane == FLUSHES {
            if volume.flush_running || volume.flush_has_to_wait() {
                return;
            }
            &mut volume.flush_in_ring
        } else {
            let lane = &mut volume.lanes[lane as usize];
            if lane.running >= lane_limit || lane.queue.is_empty() {
                return;
            }
            &mut lane.in_ring
        };
        if !std::mem::replace(in_ring, true) {
            self.ring.push_back((id, lane));
        }
    }

    fn enlist_all(&mut self, id: u32) {
        let lanes = self.volume_mut(id).map_or(0, |volume| volume.lanes.len());
        (0..lanes as u16).chain([FLUSHES]).for_each(|lane| self.enlist(id, lane));
    }

    /// The next thing to do, if there is any that may be done now.
    pub fn take_next(&mut self) -> Option<Work<T>> {
        if !self.refused.is_empty() {
            let done = FinishedWork { volume: u32::MAX, lane: 0, range: None, retried: 0 };
            return Some(Work { requests: std::mem::take(&mut self.refused), slow: false, done, refused: true });
        }
        while let Some((id, at)) = self.ring.pop_front() {
            let free = self.workers.saturating_sub(self.running).max(1);
            let volume = self.volumes[id as usize].as_mut().expect("a lane leaves the ring before it goes");
            if let Some(lane) = volume.lanes.get_mut(at as usize)
                && lane.running >= free
                && !volume.held
            {
                self.crowded.push_back((id, at));
                continue;
            }
            let max_merge_bytes = match self.max_merge_bytes {
                0 if volume.target.on_lustre() => 4 << 20,
                0 => 1 << 20,
                n => n,
            };
            let Some(work) = volume.take(id, at, max_merge_bytes) else {
                // The volume is held, or the head has to wait for an overlapping request; the end of that enlists the lane again.
                continue;
            };
            self.running += 1;
            self.enlist(id, at);
            return Some(work);
        }
        None
    }

    /// Whether anything could be done at once.
    pub fn has_ready(&self) -> bool {
        !self.ring.is_empty() || !self.refused.is_empty()
    }

    /// Notes the end of a work that took `took`, and what of it is to be tried again; true when its volume is gone with it, or when
    /// somebody may wait for it to be idle.
    pub fn finished(&mut self, done: FinishedWork, took: Ticks, mut again: List<Request<T>>) -> bool {
        let slow_ticks = self.slow_ticks;
        let id = done.volume;
        self.running -= 1;
        self.ring.append(&mut self.crowded);
        let Some(volume) = self.volume_mut(id) else { return true };
        volume.running -= 1;
        volume.retried.0 -= done.retried;
        if let Some(lane) = volume.lanes.get_mut(done.lane as usize) {
            lane.running -= 1;
            lane.served(took, slow_ticks);
            let slow = volume.lanes.iter().any(|lane| lane.slow);
            if volume.target.slow() != slow {
                volume.target.set_slow(slow);
            }
        } else {
            volume.flush_running = false;
        }
        if let Some(range) = done.range
            && let Some(at) = volume.ranges.iter().position(|r| *r == range)
        {
            volume.ranges.swap_remove(at);
            // What waited for these pages may be in any lane.
            if volume.lanes.len() > 1 {
                self.enlist_all(id);
            }
        }
        while let Some(request) = again.pop_front() {
            self.try_again(id, request);
        }
        self.enlist(id, done.lane);
        if done.retried > 0 {
            self.enlist(id, FLUSHES);
        }
        self.drop_if_closed(id) || self.volume_mut(id).is_some_and(|volume| volume.held && volume.running == 0)
    }

    fn try_again(&mut self, id: u32, request: Placed<Request<T>>) {
        let Some(volume) = self.volume_mut(id) else { return };
        if let Some(errno) = volume.failing.or(volume.closing.then_some(request.errno)) {
            return self.refuse(request, errno);
        }
        volume.retries_total += 1;
        volume.trouble.lock_lost |= request.errno == libc::ENOLCK;
        volume.trouble.stale |= request.errno == libc::ESTALE;
        volume.retries.push_back(request);
        if volume.trouble.lock_lost || volume.trouble.stale {
            volume.held = true;
            self.troubled = true;
        }
    }

    /// Puts what is due again at the head of its lane; when the next one is due.
    pub fn revive(&mut self, now: Ticks) -> Option<Ticks> {
        let mut next = None;
        for id in 0..self.volumes.len() as u32 {
            let Some(volume) = self.volume_mut(id).filter(|volume| !volume.held && !volume.retries.is_empty()) else {
                continue;
            };
            let mut waiting = std::mem::take(&mut volume.retries);
            while let Some(request) = waiting.pop_front() {
                if request.due > now {
                    next = Some(next.map_or(request.due, |next: Ticks| next.min(request.due)));
                    volume.retries.push_back(request);
                    continue;
                }
                let lane = volume.map.lane_of(request.offset_bytes, request.len_bytes);
                if request.op == Op::Flush {
                    volume.flushes.push_front(request);
                } else {
                    volume.lanes[lane as usize].queue.push_front(request);
                }
            }
            self.enlist_all(id);
        }
        next
    }

    /// Starts nothing new on a volume until [`Sched::release`]. Whether nothing is going on there now.
    pub fn hold(&mut self, id: u32) -> bool {
        let Some(volume) = self.volume_mut(id) else { return true };
        volume.held = true;
        volume.running == 0
    }

    /// Goes on with a volume that was held, or failing.
    pub fn release(&mut self, id: u32) {
        let Some(volume) = self.volume_mut(id) else { return };
        if volume.abandoned {
            return;
        }
        (volume.held, volume.failing) = (false, None);
        (volume.trouble.lock_lost, volume.trouble.stale) = (false, false);
        // (The time that they have was not for waiting for a lock.)
        let now = crate::os::clock::now();
        volume.retries.iter_mut().for_each(|request| (request.due, request.first_failure) = (0, now));
        // What was gathered while something else was mended still waits for its errand.
        let discards = !volume.discards.is_empty();
        volume.trouble.discards = discards;
        self.troubled |= discards;
        self.enlist_all(id);
    }

    /// The volume is on its way out: what waits for better times is answered now, and whatever still comes.
    pub fn abandon(&mut self, id: u32) {
        let Some(volume) = self.volume_mut(id) else { return };
        if volume.held || volume.failing.is_some() {
            volume.abandoned = true;
            self.fail(id, libc::ENODEV);
        }
    }

    /// Answers whatever waits on a volume, and whatever comes, with `errno`, until [`Sched::release`].
    pub fn fail(&mut self, id: u32, errno: i32) {
        let Some(volume) = self.volume_mut(id) else { return };
        volume.failing = Some(errno);
        volume.held = false;
        let mut all = std::mem::take(&mut volume.retries);
        volume.lanes.iter_mut().for_each(|lane| all.append(&mut lane.queue));
        all.append(&mut volume.flushes);
        all.append(&mut volume.discards);
        while let Some(request) = all.pop_front() {
            self.refuse(request, errno);
        }
    }

    /// The unmaps gathered so far; the caller answers them.
    pub fn take_discards(&mut self, id: u32) -> List<Request<T>> {
        self.volume_mut(id).map_or_else(List::default, |volume| {
            volume.trouble.discards = false;
            std::mem::take(&mut volume.discards)
        })
    }

    /// Volumes that need attention, with why, when that has changed since it was last asked.
    /// Volumes `at_work` keep theirs: who is there may mend it, too.
    pub fn take_troubles(&mut self, at_work: &HashSet<u32>) -> Vec<(u32, Arc<Target>, Trouble)> {
        if !std::mem::take(&mut self.troubled) {
            return Vec::new();
        }
        let mut left = false;
        let volumes = self.volumes.iter_mut().enumerate();
        let troubles = volumes
            .filter_map(|(id, volume)| {
                let volume = volume.as_mut()?;
                if at_work.contains(&(id as u32)) {
                    left |= !volume.trouble.is_none();
                    return None;
                }
                let trouble = std::mem::take(&mut volume.trouble);
                (!trouble.is_none()).then(|| (id as u32, volume.target.clone(), trouble))
            })
            .collect();
        self.troubled = left;
        troubles
    }

    /// What is the matter with a volume by now, beside what was taken.
    pub fn trouble(&self, id: u32) -> Trouble {
        self.volumes.get(id as usize).and_then(Option::as_ref).map_or(Trouble::default(), |volume| volume.trouble)
    }

    /// Gives a trouble back that nobody could be sent for.
    pub fn put_back(&mut self, id: u32, trouble: Trouble) {
        let Some(volume) = self.volume_mut(id) else { return };
        volume.trouble.lock_lost |= trouble.lock_lost;
        volume.trouble.stale |= trouble.stale;
        volume.trouble.discards |= trouble.discards;
        self.troubled = true;
    }

    /// Counts a call that does not return (flushes with the first lane, as in [`Sched::load`]).
    pub fn count_stall(&mut self, id: u32, lane: u16) {
        let Some(volume) = self.volume_mut(id) else { return };
        let at = if lane == FLUSHES { 0 } else { lane as usize };
        volume.lanes[at].stalls += 1;
    }

    /// Whether a volume is there, and not on its way out.
    pub fn is_open(&self, id: u32) -> bool {
        let volume = self.volumes.get(id as usize).and_then(Option::as_ref);
        volume.is_some_and(|volume| !volume.closing && !volume.abandoned)
    }

    /// Every volume's file.
    pub fn targets(&self) -> Vec<(u32, Arc<Target>)> {
        let volumes = self.volumes.iter().enumerate();
        volumes.filter_map(|(id, volume)| Some((id as u32, volume.as_ref()?.target.clone()))).collect()
    }

    /// Whether [`Sched::take_troubles`] has something to tell.
    pub fn is_troubled(&self) -> bool {
        self.troubled
    }

    /// What each lane of a volume is doing (the first takes the flushes along), and how many retries there were.
    pub fn load(&self, id: u32) -> (Vec<LaneLoad>, u64) {
        let Some(volume) = self.volumes.get(id as usize).and_then(Option::as_ref) else { return Default::default() };
        let oldest = |list: &List<Request<T>>| list.front().map(|r| r.submitted);
        let mut loads: Vec<LaneLoad> = volume
            .lanes
            .iter()
            .enumerate()
            .map(|(at, lane)| LaneLoad {
                ost: volume.map.osts().get(at).copied().flatten(),
                queued: lane.queue.len(),
                running: lane.running,
                oldest_queued: oldest(&lane.queue),
                stalls: lane.stalls,
            })
            .collect();
        let waiting = [&volume.flushes, &volume.retries, &volume.discards];
        let first = &mut loads[0];
        first.queued += waiting.iter().map(|list| list.len()).sum::<usize>();
        first.running += usize::from(volume.flush_running);
        first.oldest_queued = first.oldest_queued.into_iter().chain(waiting.into_iter().filter_map(oldest)).min();
        (loads, volume.retries_total)
    }
}

impl<T> Volume<T> {
    fn is_idle(&self) -> bool {
        self.running == 0
            && self.lanes.iter().all(|lane| lane.queue.is_empty())
            && [&self.flushes, &self.retries, &self.discards].iter().all(|list| list.is_empty())
    }

    /// A flush does not overtake an earlier write that is being tried again: whoever waits for the flush may take it to cover that.
    fn flush_has_to_wait(&self) -> bool {
        let earlier = |submitted: Ticks| submitted <= self.newest_flush;
        self.flushes.is_empty()
            || (self.retried.0 > 0 && earlier(self.retried.1))
            || self.retries.iter().any(|request| request.op != Op::Flush && earlier(request.submitted))
            // (Those whose time has come stand at the heads of their lanes.)
            || self.lanes.iter().any(|lane| {
                lane.queue.iter().take_while(|request| request.attempts > 0).any(|request| earlier(request.submitted))
            })
    }

    fn take(&mut self, id: u32, at: u16, max_merge_bytes: u64) -> Option<Work<T>> {
        let mut done = FinishedWork { volume: id, lane: at, range: None, retried: 0 };
        let (requests, slow) = match self.lanes.get_mut(at as usize) {
            None => {
                self.flush_in_ring = false;
                if self.held || self.flush_running || self.flush_has_to_wait() {
                    return None;
                }
                // Group commit: one fdatasync that starts now answers all of them; those that come meanwhile share the next.
                self.flush_running = true;
                (std::mem::take(&mut self.flushes), self.target.slow())
            }
            Some(lane) => {
                lane.in_ring = false;
                if self.held {
                    return None;
                }
                let (requests, range) = lane.take(&self.target, &mut self.ranges, max_merge_bytes)?;
                lane.running += 1;
                done.range = range;
                (requests, lane.slow)
            }
        };
        self.running += 1;
        done.retried = requests.iter().filter(|request| request.attempts > 0 && request.op != Op::Flush).count();
        if done.retried > 0 {
            let oldest = requests.iter().map(|request| request.submitted).min().unwrap_or(0);
            self.retried = match self.retried {
                (0, _) => (done.retried, oldest),
                (n, earlier) => (n + done.retried, earlier.min(oldest)),
            };
        }
        Some(Work { requests, slow, done, refused: false })
    }
}
