//! Who is next: the workers' shared view of what is to be done. Plain data under a lock that no system call is made under and
//! that no reactor takes.
//!
//! A write first asks [`Order`] whether an older one that overlaps is unanswered; if so it waits (`blocked`). Lanes with something
//! to do stand in line (`turns`) and get one turn each. A lane gets `lane_limit` calls at a time, and never more than there are
//! workers left: so one that hangs keeps half of the pool at most, two a third each, and there is always one for the next
//! (Choudhury and Hahne, "Dynamic queue length thresholds", 1998).

use super::lane::{Lane, LaneLoad, LaneMap, Range};
use super::order::{Order, Ticket};
use super::request::{Op, Request};
use super::state::{Event, VolumeState};
use super::target::Target;
use crate::os::clock::Ticks;
use crate::os::queue::{List, Placed};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

/// The place of a volume's flushes among its lanes.
const FLUSHES: u16 = u16::MAX;

/// What a worker executes as one.
pub struct Work<T> {
    /// To be executed, or answered.
    pub requests: List<Request<T>>,
    /// Calls on this lane take long.
    pub slow: bool,
    /// For [`Sched::finished`].
    pub done: FinishedWork,
    /// Not to be executed: each has its errno.
    pub refused: bool,
}

/// What the scheduler needs to know of a work that is done.
pub struct FinishedWork {
    /// Whose it is.
    pub volume: u32,
    /// Its lane, or one behind all lanes for flushes.
    pub lane: u16,
    range: Option<Range>,
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
    state: VolumeState,
    /// Nobody submits any more; it goes when its last request is answered.
    closing: bool,
    order: Order,
    /// Writes that wait for others to be answered (rule 1).
    blocked: List<Request<T>>,
    flushes: List<Request<T>>,
    flush_running: bool,
    flush_has_turn: bool,
    /// Calls that are being made.
    running: usize,
    /// Requests that failed and are due again some time; oldest failure first.
    retries: List<Request<T>>,
    retries_total: u64,
    /// Unmaps, where they are done in batches.
    discards: List<Request<T>>,
    trouble: Trouble,
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
    turns: VecDeque<(u32, u16)>,
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
    /// Writes in `blocked`, of all volumes; and whether one of them may be free now.
    blocked: usize,
    unblock: bool,
}

impl<T> Sched<T> {
    /// No volumes yet, and `workers` to serve them. Calls that take longer than `slow_ticks` on average make a lane a slow one.
    pub fn new(workers: usize, lane_limit: usize, max_merge_bytes: u64, slow_ticks: Ticks) -> Self {
        Sched {
            volumes: Vec::new(),
            retired: HashSet::new(),
            dead: Vec::new(),
            turns: VecDeque::new(),
            crowded: VecDeque::new(),
            refused: List::default(),
            running: 0,
            workers: workers.max(1),
            lane_limit: lane_limit.max(1),
            max_merge_bytes,
            slow_ticks,
            troubled: false,
            blocked: 0,
            unblock: false,
        }
    }

    /// Changes how many workers there are, how many calls a lane gets at a time, and how much is merged.
    pub fn set_limits(&mut self, workers: usize, lane_limit: usize, max_merge_bytes: u64) {
        (self.workers, self.lane_limit) = (workers.max(1), lane_limit.max(1));
        self.max_merge_bytes = max_merge_bytes;
        self.turns.append(&mut self.crowded);
    }

    /// Adds a volume; its number.
    pub fn open(&mut self, target: Arc<Target>, map: LaneMap) -> u32 {
        let volume = Volume {
            ranges: Vec::with_capacity(if target.sub_page() { 1024 } else { 0 }),
            order: Order::new(target.claims()),
            target,
            lanes: map.osts().iter().map(|_| Lane::default()).collect(),
            map,
            state: VolumeState::Open,
            closing: false,
            blocked: List::default(),
            flushes: List::default(),
            flush_running: false,
            flush_has_turn: false,
            running: 0,
            retries: List::default(),
            retries_total: 0,
            discards: List::default(),
            trouble: Trouble::default(),
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

    /// A lane stands in line, or among the crowded, once at most: room for all, and the I/O path never allocates.
    fn make_room(&mut self) {
        let lanes: usize = self.volumes.iter().flatten().map(|volume| volume.lanes.len() + 1).sum();
        self.turns.reserve(lanes);
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
        // Nobody is left who could wait for a lock to come back.
        if !volume.state.starts() {
            self.end(id);
        }
        self.drop_if_closed(id)
    }

    fn drop_if_closed(&mut self, id: u32) -> bool {
        let slot = &mut self.volumes[id as usize];
        if slot.as_ref().is_some_and(|volume| volume.closing && volume.is_idle()) {
            self.dead.extend(slot.take().map(|volume| volume.target));
            self.retired.insert(id);
            self.turns.retain(|&(other, _)| other != id);
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
        while let Some(mut request) = submitted.pop_front() {
            let id = request.volume;
            let volume = self.volumes[id as usize].as_mut().expect("a volume outlives its requests");
            match request.op {
                Op::Abort => self.abort(request),
                Op::Reset => {
                    self.sweep(id, libc::ECANCELED);
                    self.refuse(request, 0);
                }
                _ if let Some(errno) = volume.state.refuses() => self.refuse(request, errno),
                Op::Flush => {
                    volume.flushes.push_back(request);
                    self.enlist(id, FLUSHES);
                }
                Op::Read => self.enqueue(request),
                Op::Write | Op::Unmap | Op::WriteZeroes => {
                    let ticket = request.enter(&mut volume.order);
                    // One that others did not know of until now may be what they waited for.
                    self.unblock |= self.blocked > 0;
                    if volume.order.start(ticket, volume.target.claims()) {
                        self.enqueue(request);
                    } else {
                        volume.blocked.push_back(request);
                        self.blocked += 1;
                        volume.order.set_waiting(volume.blocked.len(), volume.target.claims());
                        // What it waits for may have been answered just before that was said.
                        self.unblock = true;
                    }
                }
            }
        }
        self.start_unblocked();
    }

    /// A claim on a volume was given back by somebody who is not in here.
    pub fn claims_changed(&mut self) {
        self.unblock |= self.blocked > 0;
        self.start_unblocked();
    }

    /// Starts the writes that waited for others, as far as those are answered.
    fn start_unblocked(&mut self) {
        while std::mem::take(&mut self.unblock) {
            for id in 0..self.volumes.len() {
                let Some(volume) = self.volumes[id].as_mut().filter(|volume| !volume.blocked.is_empty()) else {
                    continue;
                };
                let mut waiting = std::mem::take(&mut volume.blocked);
                let mut free = List::default();
                while let Some(request) = waiting.pop_front() {
                    let ticket = request.ticket.expect("a write that waits has entered");
                    if volume.order.start(ticket, volume.target.claims()) {
                        self.blocked -= 1;
                        free.push_back(request);
                    } else {
                        volume.blocked.push_back(request);
                    }
                }
                volume.order.set_waiting(volume.blocked.len(), volume.target.claims());
                while let Some(request) = free.pop_front() {
                    self.enqueue(request);
                }
            }
        }
    }

    /// Puts a request where it waits for its turn.
    fn enqueue(&mut self, request: Placed<Request<T>>) {
        let id = request.volume;
        let volume = self.volumes[id as usize].as_mut().expect("a volume outlives its requests");
        if request.op == Op::Unmap && volume.target.guard().gathers_discards() {
            volume.discards.push_back(request);
            volume.trouble.discards = true;
            self.troubled = true;
            return;
        }
        let lane = volume.map.lane_of(request.offset_bytes, request.len_bytes);
        volume.lanes[lane as usize].queue.push_back(request);
        self.enlist(id, lane);
    }

    /// Answers a request without executing it: with an errno, or 0.
    fn refuse(&mut self, mut request: Placed<Request<T>>, errno: i32) {
        let volume = self.volumes[request.volume as usize].as_mut().expect("a volume outlives its requests");
        match request.ticket.take() {
            Some(ticket) => {
                self.unblock |= volume.order.leave(ticket, volume.target.claims());
                // A flush may have waited for it.
                self.enlist(request.volume, FLUSHES);
            }
            None => self.unblock |= request.release_claim(),
        }
        request.conclude(if errno == 0 { Ok(()) } else { Err(errno) });
        self.refused.push_back(request);
    }

    /// Looks for the request that an abort means, among those that no call has been made for.
    fn abort(&mut self, mut abort: Placed<Request<T>>) {
        let (id, port, number) = (abort.volume, abort.port, abort.offset_bytes);
        let is_meant = |request: &Placed<Request<T>>| request.port == port && request.has_number(number);
        let volume = self.volumes[id as usize].as_mut().expect("a volume outlives its requests");
        let mut found = List::default();
        let lists = [&mut volume.flushes, &mut volume.retries, &mut volume.discards];
        for list in lists.into_iter().chain(volume.lanes.iter_mut().map(|lane| &mut lane.queue)) {
            found.append(&mut list.extract(is_meant));
        }
        let mut blocked = volume.blocked.extract(is_meant);
        self.blocked -= blocked.len();
        volume.order.set_waiting(volume.blocked.len(), volume.target.claims());
        found.append(&mut blocked);
        abort.conclude(if found.is_empty() { Err(libc::EBUSY) } else { Ok(()) });
        self.refused.push_back(abort);
        while let Some(request) = found.pop_front() {
            self.refuse(request, libc::ECANCELED);
        }
    }

    /// Answers whatever waits on a volume with `errno`. What calls have been made for goes on.
    fn sweep(&mut self, id: u32, errno: i32) {
        let Some(volume) = self.volume_mut(id) else { return };
        let mut all = std::mem::take(&mut volume.retries);
        volume.lanes.iter_mut().for_each(|lane| all.append(&mut lane.queue));
        all.append(&mut volume.flushes);
        all.append(&mut volume.discards);
        volume.trouble.discards = false;
        let mut blocked = std::mem::take(&mut volume.blocked);
        volume.order.set_waiting(0, volume.target.claims());
        self.blocked -= blocked.len();
        all.append(&mut blocked);
        while let Some(request) = all.pop_front() {
            self.refuse(request, errno);
        }
        self.start_unblocked();
    }

    /// Puts a lane in line when it could get a turn.
    fn enlist(&mut self, id: u32, lane: u16) {
        let lane_limit = self.lane_limit;
        let Some(volume) = self.volume_mut(id) else { return };
        if !volume.state.starts() {
            return;
        }
        let has_turn = if lane == FLUSHES {
            if volume.flush_running || !volume.flush_may_run() {
                return;
            }
            &mut volume.flush_has_turn
        } else {
            let lane = &mut volume.lanes[lane as usize];
            if lane.running >= lane_limit || lane.queue.is_empty() {
                return;
            }
            &mut lane.has_turn
        };
        if !std::mem::replace(has_turn, true) {
            self.turns.push_back((id, lane));
        }
    }

    fn enlist_all(&mut self, id: u32) {
        let lanes = self.volume_mut(id).map_or(0, |volume| volume.lanes.len());
        (0..lanes as u16).chain([FLUSHES]).for_each(|lane| self.enlist(id, lane));
    }

    /// The next thing to do, if there is any that may be done now.
    pub fn take_next(&mut self) -> Option<Work<T>> {
        if !self.refused.is_empty() {
            let done = FinishedWork { volume: u32::MAX, lane: 0, range: None };
            return Some(Work { requests: std::mem::take(&mut self.refused), slow: false, done, refused: true });
        }
        while let Some((id, at)) = self.turns.pop_front() {
            let free = self.workers.saturating_sub(self.running).max(1);
            let volume = self.volumes[id as usize].as_mut().expect("a lane leaves the line before it goes");
            if let Some(lane) = volume.lanes.get_mut(at as usize)
                && lane.running >= free
                && volume.state.starts()
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
                // The volume is held, or the head has to wait for pages that are being modified; the end of that enlists the lane again.
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
        !self.turns.is_empty() || !self.refused.is_empty()
    }

    /// Notes the end of a work that took `took`: which of its writes were answered (their tickets are taken out), and what is to be
    /// tried again. `flush_errno` is that of a failed flush, else 0. True when its volume is gone with it, or when somebody may wait for
    /// it to be idle.
    pub fn finished(
        &mut self,
        done: FinishedWork,
        took: Ticks,
        flush_errno: i32,
        answered: &mut Vec<Ticket>,
        mut again: List<Request<T>>,
    ) -> bool {
        let slow_ticks = self.slow_ticks;
        let id = done.volume;
        self.running -= 1;
        self.turns.append(&mut self.crowded);
        let volume = self.volumes[id as usize].as_mut().expect("a volume stays while its calls are made");
        volume.running -= 1;
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
        // The system reports a loss once. Those that came meanwhile would be told that all is well, and it is their data, too.
        if flush_errno != 0 {
            let mut waiting = std::mem::take(&mut volume.flushes);
            while let Some(flush) = waiting.pop_front() {
                self.refuse(flush, flush_errno);
            }
        }
        let volume = self.volumes[id as usize].as_mut().expect("a volume stays while its calls are made");
        for ticket in answered.drain(..) {
            self.unblock |= volume.order.leave(ticket, volume.target.claims());
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
        self.start_unblocked();
        self.enlist(id, done.lane);
        self.enlist(id, FLUSHES);
        self.drop_if_closed(id)
            || self.volume_mut(id).is_some_and(|volume| !volume.state.starts() && volume.running == 0)
    }

    /// Notes that gathered discards are answered.
    pub fn discarded(&mut self, id: u32, tickets: Vec<Ticket>) {
        let Some(volume) = self.volumes.get_mut(id as usize).and_then(Option::as_mut) else { return };
        for ticket in tickets {
            self.unblock |= volume.order.leave(ticket, volume.target.claims());
        }
        self.start_unblocked();
        self.drop_if_closed(id);
    }

    fn try_again(&mut self, id: u32, request: Placed<Request<T>>) {
        let Some(volume) = self.volume_mut(id) else { return };
        if let Some(errno) = volume.state.refuses().or(volume.closing.then_some(request.errno)) {
            return self.refuse(request, errno);
        }
        volume.retries_total += 1;
        if let Some(ticket) = request.ticket {
            volume.order.retry(ticket);
        }
        let (lock_lost, stale) = (request.errno == libc::ENOLCK, request.errno == libc::ESTALE);
        volume.retries.push_back(request);
        if lock_lost || stale {
            volume.trouble.lock_lost |= lock_lost;
            volume.trouble.stale |= stale;
            volume.change(Event::Lost);
            self.troubled = true;
        }
    }

    /// Puts what is due again at the head of its lane; when the next one is due.
    pub fn revive(&mut self, now: Ticks) -> Option<Ticks> {
        let mut next = None;
        for id in 0..self.volumes.len() as u32 {
            let Some(volume) = self.volume_mut(id).filter(|volume| volume.state.starts() && !volume.retries.is_empty())
            else {
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
                volume.lanes[lane as usize].queue.push_front(request);
            }
            self.enlist_all(id);
        }
        next
    }

    /// Changes a volume's state. Whether nothing is going on there now.
    pub fn hold(&mut self, id: u32, event: Event) -> bool {
        let Some(volume) = self.volume_mut(id) else { return true };
        volume.change(event);
        volume.running == 0
    }

    /// Goes on `now` with a volume after a job ([`Event::GoOn`], [`Event::Recovered`]) or by an operator's word ([`Event::Resume`]).
    pub fn go_on(&mut self, id: u32, event: Event, now: Ticks) {
        let Some(volume) = self.volume_mut(id) else { return };
        volume.change(event);
        if !volume.state.starts() {
            return;
        }
        (volume.trouble.lock_lost, volume.trouble.stale) = (false, false);
        // Restart the retry budget: lock recovery does not count.
        volume.retries.iter_mut().for_each(|request| (request.due, request.first_failure) = (0, now));
        // What was gathered while something else was mended still waits for its job.
        let discards = !volume.discards.is_empty();
        volume.trouble.discards = discards;
        self.troubled |= discards;
        self.enlist_all(id);
    }

    /// Fails a volume until an operator resumes it: whatever waits there, and whatever comes.
    pub fn fence(&mut self, id: u32) {
        self.refuse_all(id, Event::Fence);
    }

    /// Fails a volume for good: it is being detached.
    pub fn end(&mut self, id: u32) {
        self.refuse_all(id, Event::End);
    }

    fn refuse_all(&mut self, id: u32, event: Event) {
        let Some(volume) = self.volume_mut(id) else { return };
        volume.change(event);
        if let Some(errno) = volume.state.refuses() {
            self.sweep(id, errno);
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
        volume.trouble.discards |= trouble.discards && !volume.discards.is_empty();
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
        volume.is_some_and(|volume| !volume.closing && volume.state != VolumeState::Ending)
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
        let waiting = [&volume.flushes, &volume.retries, &volume.discards, &volume.blocked];
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
            && [&self.flushes, &self.retries, &self.discards, &self.blocked].iter().all(|list| list.is_empty())
    }

    /// The only way that a state changes.
    fn change(&mut self, event: Event) {
        self.state = self.state.after(event);
        self.target.set_state(self.state);
    }

    /// Whether a flush may cover `submitted`: an older write that is tried again may not be left out (rule 4). Reads and newer writes do
    /// not matter.
    fn flush_may_run(&self) -> bool {
        let barrier = self.order.oldest_retried().unwrap_or(Ticks::MAX);
        self.flushes.iter().any(|flush| flush.submitted < barrier)
    }

    fn take(&mut self, id: u32, at: u16, max_merge_bytes: u64) -> Option<Work<T>> {
        let starts = self.state.starts();
        let mut done = FinishedWork { volume: id, lane: at, range: None };
        let (requests, slow) = match self.lanes.get_mut(at as usize) {
            None => {
                self.flush_has_turn = false;
                if !starts || self.flush_running || !self.flush_may_run() {
                    return None;
                }
                // Group commit: one fdatasync that starts now answers all of them; those that come meanwhile share the next.
                self.flush_running = true;
                let barrier = self.order.oldest_retried().unwrap_or(Ticks::MAX);
                (self.flushes.extract(|flush| flush.submitted < barrier), self.target.slow())
            }
            Some(lane) => {
                lane.has_turn = false;
                if !starts {
                    return None;
                }
                let (requests, range) = lane.take(&self.target, &mut self.ranges, max_merge_bytes)?;
                lane.running += 1;
                done.range = range;
                (requests, lane.slow)
            }
        };
        self.running += 1;
        Some(Work { requests, slow, done, refused: false })
    }
}
