//! The one who looks after volumes while others move data: takes lost locks again, opens stale files anew, does gathered discards,
//! watches locks, files and calls that do not return.
//!
//! The keeper itself never makes a call that can block. Each volume that needs one gets a thread for it, one at a time: a server that
//! hangs holds nobody but the volumes on it.

use super::errand::{self, Job};
use super::guard::Guard;
use super::sched::Trouble;
use super::state::{Event, VolumeState};
use super::target::{Damage, Target};
use super::threads::Shared;
use super::worker::answer;
use crate::error::{Error, Result};
use crate::os::clock::{self, Ticks};
use crate::os::file::DirectFile;
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
/// How long an operator waits for an errand.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the keeper remembers.
pub(super) struct Keeper {
    care: Care,
    /// Volumes that a thread works for.
    at_work: HashSet<u32>,
    /// Volumes whose file a thread looks at. (It may hang in that while somebody else watches the locks.)
    looking: HashSet<u32>,
    last_check: Instant,
    /// Volumes whose locks are to be asked for.
    unchecked: HashSet<u32>,
    /// Lanes that stall, and since when.
    stalled: HashMap<(u32, u16), Ticks>,
    said_full: bool,
}

impl Keeper {
    pub fn new(care: Care) -> Self {
        Keeper {
            care,
            at_work: HashSet::new(),
            looking: HashSet::new(),
            last_check: Instant::now(),
            unchecked: HashSet::new(),
            stalled: HashMap::new(),
            said_full: false,
        }
    }

    pub fn set_care(&mut self, care: Care) {
        self.care = care;
    }

    /// Who is somewhere already: to look at files, or for all else.
    fn place(&mut self, looks: bool) -> &mut HashSet<u32> {
        if looks { &mut self.looking } else { &mut self.at_work }
    }
}

/// Takes a volume off the list of those that somebody works for, also when that panics.
struct Done<'a, T>(&'a Shared<T>, u32, bool);

impl<T> Drop for Done<'_, T> {
    fn drop(&mut self) {
        self.0.care().place(self.2).remove(&self.1);
    }
}

/// What a thread of the keeper does for a volume.
enum Errand {
    Trouble(Trouble),
    /// Ask for its locks.
    Check,
    /// Look at its file.
    Look,
}

impl<T: Send + 'static> Shared<T> {
    /// The keeper's life.
    pub(super) fn keep(self: Arc<Self>) {
        thread::run_anywhere_but(&self.reactor_cpus);
        while !self.stopping() {
            let mut sched = self.sched();
            if !sched.is_troubled() {
                sched = self.attention.wait_timeout(sched, TICK).unwrap_or_else(PoisonError::into_inner).0;
            }
            let ready = sched.has_ready();
            drop(sched);
            // Never hold two locks here: only this thread and `resume` start jobs.
            let at_work = self.care().at_work.clone();
            let mut sched = self.sched();
            let troubles = sched.take_troubles(&at_work);
            let mut left = sched.is_troubled();
            drop(sched);
            for (id, target, trouble) in troubles {
                if !self.send(id, &target, Errand::Trouble(trouble)) {
                    self.sched().put_back(id, trouble);
                    left = true;
                }
            }
            if left {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.watch_calls(ready);
            self.send_to_look();
            let dead = self.sched().take_dead();
            if !dead.is_empty() {
                // Closing a file can block.
                let _ = self.start("lloop-close".into(), move || drop(dead));
            }
        }
    }

    /// Has every volume's locks and file looked at, when it is time for that.
    fn send_to_look(self: &Arc<Self>) {
        let mut keeper = self.care();
        let due = keeper.last_check.elapsed() >= keeper.care.check;
        if !due && keeper.unchecked.is_empty() {
            return;
        }
        let unchecked = std::mem::take(&mut keeper.unchecked);
        if due {
            keeper.last_check = Instant::now();
        }
        drop(keeper);
        let volumes = self.sched().targets();
        for (id, target) in volumes {
            if (due || unchecked.contains(&id)) && !self.send(id, &target, Errand::Check) {
                self.care().unchecked.insert(id);
            }
            if due {
                // (Somebody who still looks will do.)
                let _ = self.send(id, &target, Errand::Look);
            }
        }
    }

    /// Has a thread run an errand; false when one is on its way for this volume.
    fn send(self: &Arc<Self>, id: u32, target: &Arc<Target>, errand: Errand) -> bool {
        let looks = matches!(errand, Errand::Look);
        if !self.care().place(looks).insert(id) {
            return false;
        }
        let (shared, target) = (self.clone(), target.clone());
        let run = move || {
            let _done = Done(&shared, id, looks);
            // Rebind so that `target` drops before `_done`: the volume must hold no file reference when it is marked idle.
            let target = target;
            match errand {
                Errand::Trouble(trouble) => errand::mend(&VolumeJob { shared: &shared, id, target: &target }, trouble),
                Errand::Check => errand::check(&VolumeJob { shared: &shared, id, target: &target }),
                Errand::Look => shared.look(id, &target),
            }
        };
        if let Err(error) = self.start(format!("lloop-keep-{id}"), run) {
            self.care().place(looks).remove(&id);
            tracing::error!("{error}; trying again");
            std::thread::sleep(TICK);
            return false;
        }
        true
    }

    fn go_on(&self, id: u32, event: Event) {
        let mut sched = self.sched();
        sched.go_on(id, event, clock::now());
        // (When the others' retries are due is for the supervisor to know.)
        let _ = sched.revive(clock::now());
        let ready = sched.has_ready();
        if sched.is_troubled() {
            self.attention.notify_one();
        }
        drop(sched);
        self.summons.tell_of_retries();
        if ready {
            self.rouse();
        }
    }

    /// Looks at a volume's file.
    fn look(&self, id: u32, target: &Target) {
        // A failed flush does not hide what is worse.
        if target.damage().is_none_or(|damage| damage == Damage::FlushFailed)
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
        let shown = target.file().path().display();
        let refuse = |errno, why: String| Err(Error::new(errno, format!("{shown}: {why}")));
        // One at a time: an errand may be ending, and two operators would take the lock from under each other's I/O.
        let start = Instant::now();
        while !self.care().at_work.insert(id) {
            if start.elapsed() >= PATIENCE {
                return refuse(libc::EBUSY, "it is being looked after at the moment; try again".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _done = Done(self, id, false);
        if target.state() == VolumeState::Fenced
            && let Err(why) = errand::resume(&VolumeJob { shared: self, id, target })
        {
            return refuse(libc::EBUSY, format!("it stays fenced: {why}"));
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
        // (Before the lock, so dropped after it: a name may be the last owner of a file, and closing can block.)
        let mut names: HashMap<u32, Arc<Target>> = HashMap::new();
        let mut keeper = self.care();
        let limit = clock::to_ticks(keeper.care.stall_warn);
        let mut oldest: HashMap<(u32, u16), (Ticks, u64, u64)> = HashMap::new();
        for busy in &self.busy {
            let volume = busy.volume.load(Ordering::Relaxed);
            if let Some(started) = busy.started_on(volume)
                && now.saturating_sub(started) >= limit
            {
                let (offset, len) = (busy.offset_bytes.load(Ordering::Relaxed), busy.len_bytes.load(Ordering::Relaxed));
                let place =
                    oldest.entry((volume, busy.lane.load(Ordering::Relaxed) as u16)).or_insert((Ticks::MAX, 0, 0));
                if started < place.0 {
                    *place = (started, offset, len);
                }
            }
        }
        let news: Vec<_> = oldest.iter().filter(|(place, _)| !keeper.stalled.contains_key(*place)).collect();
        let over: Vec<_> =
            keeper.stalled.iter().filter(|(place, _)| !oldest.contains_key(*place)).map(|(p, s)| (*p, *s)).collect();
        if !(news.is_empty() && over.is_empty()) {
            names.extend(self.sched().targets());
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
                self.sched().count_stall(*volume, *lane);
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

/// A volume of the pool that something is done for.
struct VolumeJob<'a, T> {
    shared: &'a Shared<T>,
    id: u32,
    target: &'a Target,
}

impl<T: Send + 'static> Job for VolumeJob<'_, T> {
    type File = DirectFile;

    fn file(&self) -> &DirectFile {
        self.target.file()
    }

    fn guard(&self) -> &Guard {
        self.target.guard()
    }

    fn objects(&self) -> Vec<u64> {
        self.target.object_offsets()
    }

    fn state(&self) -> VolumeState {
        self.target.state()
    }

    fn is_open(&self) -> bool {
        !self.shared.stopping() && self.shared.sched().is_open(self.id)
    }

    fn hold_and_drain(&self, event: Event, limit: Duration) -> bool {
        let start = Instant::now();
        let mut sched = self.shared.sched();
        while !sched.hold(self.id, event) {
            if self.shared.stopping() || start.elapsed() >= limit {
                return false;
            }
            sched = self.shared.quiet.wait_timeout(sched, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn trouble(&self) -> Trouble {
        self.shared.sched().trouble(self.id)
    }

    fn put_back(&self, trouble: Trouble) {
        self.shared.sched().put_back(self.id, trouble);
    }

    fn go_on(&self, event: Event) {
        self.shared.go_on(self.id, event);
    }

    fn fence(&self) {
        self.shared.sched().fence(self.id);
        self.shared.rouse();
    }

    fn has_stuck_call(&self, limit: Duration) -> bool {
        let (now, limit) = (clock::now(), clock::to_ticks(limit));
        let mut calls = self.shared.busy.iter().filter_map(|busy| busy.started_on(self.id));
        calls.any(|started| now.saturating_sub(started) > limit)
    }

    fn do_discards(&self) -> Result<(), String> {
        let (shared, target) = (self.shared, self.target);
        let mut requests = shared.sched().take_discards(self.id);
        // What is not done is not reported as done.
        requests.iter_mut().for_each(|request| request.conclude(Err(libc::EIO)));
        let done = self.guard().without_group(self.file(), &self.objects(), |permit| {
            errand::discard(&mut requests, |start, end| target.discard(permit, start, end));
        });
        let tickets = requests.iter_mut().filter_map(|request| request.ticket.take()).collect();
        answer(&shared.ports(), requests);
        shared.sched().discarded(self.id, tickets);
        done
    }
}
