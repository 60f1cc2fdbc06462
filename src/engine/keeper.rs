//! The one who looks after volumes while others move data: takes lost locks again, opens stale files anew, does gathered discards,
//! watches locks, files and calls that do not return.
//!
//! The keeper itself never makes a call that can block. Each volume that needs one gets a thread for it, one at a time: a server that
//! hangs holds nobody but the volumes on it.

use super::guard::Standing;
use super::request::{Op, Request};
use super::sched::Trouble;
use super::target::Target;
use super::threads::Shared;
use super::worker::answer;
use crate::error::{Error, Result, reason};
use crate::os::clock::{self, Ticks};
use crate::os::queue::List;
use crate::os::thread;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How files are looked after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Care {
    /// How often locks and files are looked at.
    pub check: Duration,
    /// A call that takes longer is reported.
    pub stall_warn: Duration,
}

impl Default for Care {
    fn default() -> Self {
        Care { check: Duration::from_secs(10), stall_warn: Duration::from_secs(30) }
    }
}

/// How often calls are looked at.
const TICK: Duration = Duration::from_millis(500);
/// How long discards are gathered.
const GATHER: Duration = Duration::from_millis(20);

/// What the keeper remembers.
pub(super) struct Keeper {
    care: Care,
    /// Volumes that a thread works for.
    at_work: HashSet<u32>,
    last_check: Instant,
    /// Lanes that stall: since when, and what has been said of it.
    stalled: HashMap<(u32, u16), Ticks>,
    /// How often each has.
    stalls: HashMap<(u32, u16), u64>,
    said_full: bool,
}

impl Keeper {
    pub fn new(care: Care) -> Self {
        Keeper {
            care,
            at_work: HashSet::new(),
            last_check: Instant::now(),
            stalled: HashMap::new(),
            stalls: HashMap::new(),
            said_full: false,
        }
    }

    pub fn set_care(&mut self, care: Care) {
        self.care = care;
    }

    /// How often each lane of a volume has stalled.
    pub fn stalls_of(&self, volume: u32) -> HashMap<u16, u64> {
        self.stalls.iter().filter(|((v, _), _)| *v == volume).map(|((_, lane), &n)| (*lane, n)).collect()
    }
}

/// What a thread of the keeper does for a volume.
enum Errand {
    Trouble(Trouble),
    Check,
}

impl<T: Send + 'static> Shared<T> {
    /// The keeper's life.
    pub(super) fn keep(self: Arc<Self>) {
        thread::run_anywhere_but(&self.reactor_cpus);
        // What an errand was already on its way for.
        let mut later: Vec<(u32, Arc<Target>, Trouble)> = Vec::new();
        while !self.stopping() {
            let mut sched = self.sched();
            if !sched.is_troubled() && later.is_empty() {
                sched = self.attention.wait_timeout(sched, TICK).unwrap_or_else(PoisonError::into_inner).0;
            }
            let mut troubles = sched.take_troubles();
            let ready = sched.has_ready();
            drop(sched);
            troubles.append(&mut later);
            for (id, target, trouble) in troubles {
                if !self.send(id, &target, Errand::Trouble(trouble)) {
                    later.push((id, target, trouble));
                }
            }
            if !later.is_empty() {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.watch_calls(ready);
            let check = {
                let mut keeper = self.care();
                let due = keeper.last_check.elapsed() >= keeper.care.check;
                if due {
                    keeper.last_check = Instant::now();
                }
                due
            };
            if check {
                let volumes = self.sched().targets();
                for (id, target) in volumes {
                    // (Somebody who is there already looks, too.)
                    let _ = self.send(id, &target, Errand::Check);
                }
            }
        }
    }

    /// Has a thread run an errand; false when one is on its way for this volume.
    fn send(self: &Arc<Self>, id: u32, target: &Arc<Target>, errand: Errand) -> bool {
        if !self.care().at_work.insert(id) {
            return false;
        }
        let (shared, target) = (self.clone(), target.clone());
        let run = move || {
            match errand {
                Errand::Trouble(trouble) => shared.mend(id, &target, trouble),
                Errand::Check => shared.check(id, &target),
            }
            drop(target);
            shared.care().at_work.remove(&id);
        };
        if let Err(error) = self.start(format!("lloop-keep-{id}"), run) {
            self.care().at_work.remove(&id);
            tracing::error!("{error}; trying again");
            std::thread::sleep(TICK);
            return false;
        }
        true
    }

    /// Starts nothing new on a volume, and waits until nothing is going on there.
    fn hold_and_drain(&self, id: u32) {
        let mut sched = self.sched();
        while !sched.hold(id) && !self.stopping() {
            sched = self.quiet.wait_timeout(sched, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn go_on(&self, id: u32) {
        let mut sched = self.sched();
        sched.release(id);
        // (When the others' retries are due is for the supervisor to know.)
        let _ = sched.revive(clock::now());
        let ready = sched.has_ready();
        if sched.is_troubled() {
            self.attention.notify_one();
        }
        drop(sched);
        self.summons.tell_of_retries();
        if ready {
            self.ready.store(true, Ordering::Relaxed);
            self.wake_one();
        }
    }

    fn mend(&self, id: u32, target: &Target, trouble: Trouble) {
        let (file, guard) = (target.file(), target.guard());
        let shown = file.path().display();
        // (Fenced while this errand waited for its turn: whatever waited with it has its answer.)
        if guard.standing() == Standing::Fenced {
            return;
        }
        if trouble.stale {
            self.hold_and_drain(id);
            return self.settle(id, target, "its descriptor went stale", guard.reopen(file));
        }
        if trouble.lock_lost {
            tracing::warn!("{shown}: the group lock is lost (evicted by a server?); taking it again");
            self.hold_and_drain(id);
            let regained = guard.regain_group(file);
            return self.settle(id, target, "the group lock was lost", regained);
        }
        if trouble.discards {
            std::thread::sleep(GATHER);
            self.hold_and_drain(id);
            let mut requests = self.sched().take_discards(id);
            // (What is not even tried fails as all the rest will.)
            requests.iter_mut().for_each(|request| request.conclude(Err(libc::ENOLCK)));
            let done = guard.without_group(file, || discard(target, &mut requests));
            answer(&self.ports(), requests);
            match done {
                Ok(()) => self.go_on(id),
                Err(why) => self.settle(id, target, "the group lock was let go of for a discard", Err(why)),
            }
        }
    }

    /// Goes on with a volume that was held, or fences it.
    fn settle(&self, id: u32, target: &Target, what: &str, outcome: Result<(), String>) {
        let (file, guard) = (target.file(), target.guard());
        let shown = file.path().display();
        match outcome {
            Ok(()) => {
                guard.recovered(file);
                tracing::warn!("{shown}: {what}; it is there again, and others were kept out all the time: going on");
                self.go_on(id);
            }
            Err(why) => {
                guard.fence(file);
                tracing::error!(
                    "{shown}: {what}, and {why}: somebody else may have written to the file. Fenced: every I/O fails until bdev_lloop_resume, or until it is attached again"
                );
                self.sched().fail(id, libc::ENOLCK);
                self.ready.store(true, Ordering::Relaxed);
                self.wake_one();
            }
        }
    }

    /// Looks at a volume's locks and file.
    fn check(&self, id: u32, target: &Target) {
        let (file, guard) = (target.file(), target.guard());
        let shown = file.path().display();
        if guard.wants_watching() {
            match guard.advisory_is_held(file) {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!(
                        "{shown}: the advisory lock is lost (evicted by the metadata server?); taking it again"
                    );
                    self.hold_and_drain(id);
                    let regained = guard.regain_advisory(file);
                    return self.settle(id, target, "the advisory lock was lost", regained);
                }
                Err(errno) => tracing::warn!("{shown}: asking for its lock: {}; asking again later", reason(errno)),
            }
        }
        if target.damage().is_none()
            && let Some(damage) = target.look_for_damage()
        {
            target.set_damage(damage);
        }
        if target.layout_is_old()
            && let Some(map) = target.read_layout()
        {
            self.sched().set_map(id, map);
        }
    }

    /// What an operator asks for.
    pub(super) fn resume(&self, id: u32, target: &Target) -> Result<()> {
        let (file, guard) = (target.file(), target.guard());
        let shown = file.path().display();
        let refuse = |errno, why: String| Err(Error::new(errno, format!("{shown}: {why}")));
        if guard.standing() == Standing::Fenced {
            if let Err(why) = guard.retake_all(file) {
                return refuse(libc::EBUSY, format!("it stays fenced: {why}"));
            }
            match guard.recovered(file) {
                Some(true) => tracing::warn!("{shown}: resumed; it was written to by others while it was fenced"),
                _ => tracing::info!("{shown}: resumed"),
            }
            self.go_on(id);
        }
        match target.look_for_damage() {
            None => target.clear_damage(),
            Some(damage) => {
                target.set_damage(damage);
                return refuse(libc::EINVAL, damage.advice(target));
            }
        }
        Ok(())
    }

    /// Reports calls that do not return, and those that have after all.
    fn watch_calls(&self, work_waits: bool) {
        let now = clock::now();
        let mut keeper = self.care();
        let limit = clock::to_ticks(keeper.care.stall_warn);
        let mut oldest: HashMap<(u32, u16), (Ticks, u64, u64)> = HashMap::new();
        for busy in &self.busy {
            let volume = busy.volume.load(Ordering::Relaxed);
            if let Some(submitted) = busy.submitted_on(volume)
                && now.saturating_sub(submitted) >= limit
            {
                let (offset, len) = (busy.offset_bytes.load(Ordering::Relaxed), busy.len_bytes.load(Ordering::Relaxed));
                let place =
                    oldest.entry((volume, busy.lane.load(Ordering::Relaxed) as u16)).or_insert((Ticks::MAX, 0, 0));
                if submitted < place.0 {
                    *place = (submitted, offset, len);
                }
            }
        }
        let news: Vec<_> = oldest.iter().filter(|(place, _)| !keeper.stalled.contains_key(*place)).collect();
        let over: Vec<_> =
            keeper.stalled.iter().filter(|(place, _)| !oldest.contains_key(*place)).map(|(p, s)| (*p, *s)).collect();
        if !(news.is_empty() && over.is_empty()) {
            let names: HashMap<u32, Arc<Target>> = self.sched().targets().into_iter().collect();
            let shown = |volume: &u32| {
                names.get(volume).map_or("a file that is closed".into(), |t| t.file().path().display().to_string())
            };
            let seconds = |since: Ticks| clock::to_duration(now.saturating_sub(since)).as_secs();
            for ((volume, lane), &(since, offset, len)) in news {
                let ost = names
                    .get(volume)
                    .and_then(|target| target.ost_of(offset))
                    .map_or(String::new(), |ost| format!(" on OST {ost:#06x}"));
                tracing::warn!(
                    "{}: a call has not returned for {} s: bytes {offset} to {}{ost}; waiting",
                    shown(volume),
                    seconds(since),
                    offset + len
                );
                *keeper.stalls.entry((*volume, *lane)).or_default() += 1;
                keeper.stalled.insert((*volume, *lane), since);
            }
            for (place, since) in over {
                tracing::warn!("{}: calls return again, after {} s", shown(&place.0), seconds(since));
                keeper.stalled.remove(&place);
            }
        }
        if !(work_waits && self.all_stuck(now)) {
            keeper.said_full = false;
        } else if !std::mem::replace(&mut keeper.said_full, true) {
            tracing::warn!(
                "all {} workers wait for calls to return, and more I/O waits for them; is a server down? (bdev_lloop_set_options workers raises their number)",
                self.workers.load(Ordering::Relaxed)
            );
        }
    }
}

/// Punches what was gathered, neighbours together.
fn discard<T>(target: &Target, requests: &mut List<Request<T>>) {
    let mut ranges: Vec<(u64, u64)> = requests.iter().map(|r| (r.offset_bytes, r.end_bytes())).collect();
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    let results: Vec<(u64, u64, Result<(), i32>)> =
        joined.into_iter().map(|(start, end)| (start, end, target.discard(start, end))).collect();
    for request in requests.iter_mut() {
        debug_assert_eq!(request.op, Op::Unmap);
        let inside =
            results.iter().find(|(start, end, _)| *start <= request.offset_bytes && request.end_bytes() <= *end);
        request.conclude(inside.map_or(Err(libc::EIO), |(_, _, result)| *result));
    }
}
