//! The thread pool: workers that make blocking calls so that reactors need not.
//!
//! How many are awake adapts. One worker that never sleeps does fast I/O (unwritten extents, a good cache) faster than two
//! that take the processor from each other and from the reactor; a hundred blocked ones are right for a slow file. So workers
//! tell the two apart by the average time their calls take, lane by lane:
//! - on a fast lane a worker goes on alone; one that finds nothing spins for a moment (one at a time does), then sleeps, and
//!   those beyond the number of processors that the reactors leave go to sleep although there is work;
//! - a worker that enters a call on a slow lane does not count as active any more, and wakes the next one if there is more;
//! - a port that sees no request picked up for a while wakes one more, or has the supervisor start it. That covers the first
//!   slow calls of a lane that was fast.
//!
//! A port whose thread sleeps between events cannot look for a stall: the supervisor does it while there is work.
//!
//! No reactor starts a thread or waits for a lock: it pushes a batch, and makes one futex call when nobody is active.

use super::port::Mailbox;
use super::request::Request;
use super::sched::{LaneLoad, Sched};
use super::target::Target;
use super::transfer::Transfer;
use crate::error::{Error, Result, reason};
use crate::os::clock::{self, Ticks};
use crate::os::event::Event;
use crate::os::queue::{Batch, Inbox, List};
use crate::os::thread;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a worker that ran out of work looks for more before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// How long nothing may be picked up, with work there, before another worker is woken.
const STALL: Duration = Duration::from_micros(20);
/// The same when as many are active as there are processors for: then it is more likely that the scheduler has one of them wait
/// for another than that all of them are stuck, and one more would make that worse.
const CROWDED_STALL: Duration = Duration::from_micros(500);
/// How often the supervisor looks for a stall in the place of ports that sleep.
const WATCH: Duration = Duration::from_millis(1);
/// Calls longer than this make a lane a slow one.
const SLOW: Duration = Duration::from_micros(50);

/// The pool's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    /// The most worker threads.
    pub workers: usize,
    /// The most calls at a time on one lane.
    pub lane_limit: usize,
    /// The longest call that neighbouring requests are merged into, in bytes.
    pub max_merge_bytes: u64,
    /// Processors that workers keep away from: the reactors'.
    pub reactor_cpus: Vec<u32>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        PoolOptions { workers: 64, lane_limit: 32, max_merge_bytes: 1 << 20, reactor_cpus: Vec::new() }
    }
}

/// A word on a cache line (pair) of its own.
#[repr(align(128))]
#[derive(Default)]
pub(super) struct Apart<A>(A);

impl<A> std::ops::Deref for Apart<A> {
    type Target = A;
    fn deref(&self) -> &A {
        &self.0
    }
}

/// What a worker is busy with, for statistics.
#[derive(Default)]
struct Busy {
    lane: AtomicU32,
    /// When the oldest request of the call was submitted, or one of the two values below.
    submitted: AtomicU64,
}

/// The place is free.
const NOBODY: Ticks = 0;
/// It belongs to a worker that is in no call.
const IDLE: Ticks = Ticks::MAX;

/// Where the answers of each port go.
type Ports<T> = Vec<Option<Arc<Mailbox<T>>>>;

pub(super) struct Shared<T> {
    inbox: Inbox<Request<T>>,
    /// Where workers sleep.
    idle: Event,
    /// Where the supervisor sleeps.
    supervise: Event,
    /// Ports whose threads sleep when they have nothing to do.
    sleepers: AtomicU32,
    /// Whether the supervisor looks for stalls.
    watching: AtomicBool,
    /// Whether a worker spins, looking at the inbox.
    spinning: Apart<AtomicBool>,
    /// Workers that will look at the inbox soon: awake, and not in a call on a slow lane.
    active: Apart<AtomicU32>,
    /// Works taken so far: stands still when everybody is stuck.
    pub(super) picks: Apart<AtomicU64>,
    /// Whether lanes had work left at the last pick.
    ready: AtomicBool,
    live: AtomicU32,
    workers: AtomicU32,
    /// How many active workers fast lanes are worth.
    budget: u32,
    stop: AtomicBool,
    sched: Mutex<Sched<T>>,
    lane_gone: Condvar,
    ports: Mutex<Ports<T>>,
    ports_changed: AtomicU64,
    busy: Vec<Busy>,
    handles: Mutex<Vec<std::thread::JoinHandle<()>>>,
    reactor_cpus: Vec<u32>,
    pub(super) stall_ticks: Ticks,
    crowded_stall_ticks: Ticks,
    spin_ticks: Ticks,
}

/// The most workers that can be configured.
pub const MAX_WORKERS: usize = 1024;

/// A pool of workers with its lanes. Clones are the same pool.
pub struct Pool<T>(Arc<Shared<T>>);

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Pool(self.0.clone())
    }
}

/// A device's way into the pool.
pub struct Lane<T> {
    id: u32,
    target: Arc<Target>,
    pool: Arc<Shared<T>>,
}

impl<T> Lane<T> {
    /// The file.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Its number in the pool.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What it is doing, and when its oldest request, waiting or being executed, was submitted. Takes the pool's lock.
    pub fn load(&self) -> (LaneLoad, Option<Ticks>) {
        let load = self.pool.sched().load(self.id);
        let running = self.pool.busy.iter().filter_map(|busy| {
            let submitted = busy.submitted.load(Ordering::Relaxed);
            (!matches!(submitted, NOBODY | IDLE) && busy.lane.load(Ordering::Relaxed) == self.id).then_some(submitted)
        });
        (load, running.chain(load.oldest_queued).min())
    }
}

impl<T: Send + 'static> Pool<T> {
    /// Starts the supervisor; workers start when there is something to do.
    ///
    /// # Errors
    /// EAGAIN or ENOMEM when the system has no thread left.
    pub fn new(options: &PoolOptions) -> Result<Self> {
        let shared = Arc::new(Shared {
            inbox: Inbox::default(),
            idle: Event::default(),
            supervise: Event::default(),
            sleepers: AtomicU32::new(0),
            watching: AtomicBool::new(false),
            spinning: Apart::default(),
            active: Apart::default(),
            picks: Apart::default(),
            ready: AtomicBool::new(false),
            live: AtomicU32::new(0),
            workers: AtomicU32::new(options.workers.clamp(1, MAX_WORKERS) as u32),
            budget: thread::processors_but(&options.reactor_cpus).max(1) as u32,
            stop: AtomicBool::new(false),
            sched: Mutex::new(Sched::new(options.lane_limit, options.max_merge_bytes, clock::to_ticks(SLOW))),
            lane_gone: Condvar::new(),
            ports: Mutex::default(),
            ports_changed: AtomicU64::new(0),
            busy: std::iter::repeat_with(Busy::default).take(MAX_WORKERS).collect(),
            handles: Mutex::default(),
            reactor_cpus: options.reactor_cpus.clone(),
            stall_ticks: clock::to_ticks(STALL),
            crowded_stall_ticks: clock::to_ticks(CROWDED_STALL),
            spin_ticks: clock::to_ticks(SPIN),
        });
        let supervisor = shared.clone();
        shared.start("lloop-super".into(), move || supervisor.supervise())?;
        Ok(Pool(shared))
    }

    pub(super) fn shared(&self) -> &Arc<Shared<T>> {
        &self.0
    }

    /// Opens a lane for `target`.
    pub fn open_lane(&self, target: Arc<Target>) -> Lane<T> {
        let id = self.0.sched().open(target.clone());
        Lane { id, target, pool: self.0.clone() }
    }

    /// Ends a lane that gets no more requests, waits until nothing uses its file any more and closes that. Blocks: not for a
    /// reactor.
    ///
    /// # Errors
    /// ETIMEDOUT when a call on the file has not returned within `limit`. The lane then ends when that call does, and the
    /// file is closed with it.
    pub fn close_lane(&self, lane: Lane<T>, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let Lane { id, target, .. } = lane;
        let mut sched = self.0.sched();
        while !sched.close(id) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    libc::ETIMEDOUT,
                    format!(
                        "a call on {} has not returned for {limit:?}; the file stays open until it does",
                        target.file().path().display()
                    ),
                ));
            }
            sched = self.0.lane_gone.wait_timeout(sched, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(sched);
        // A worker that has just handed out the last answer may still hold the target for an instant.
        let mut target = target;
        while let Err(shared) = Arc::try_unwrap(target) {
            if Instant::now() >= deadline {
                return Err(Error::new(libc::ETIMEDOUT, "the file is still in use"));
            }
            target = shared;
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Changes the limits for what comes from now on. Workers beyond a lower number go when they run out of work.
    pub fn set_limits(&self, workers: usize, lane_limit: usize, max_merge_bytes: u64) {
        self.0.workers.store(workers.clamp(1, MAX_WORKERS) as u32, Ordering::Relaxed);
        self.0.sched().set_limits(lane_limit, max_merge_bytes);
        self.0.idle.notify_all();
    }

    /// How many workers there are, and how many of them are awake and not in a slow call.
    pub fn worker_counts(&self) -> (u32, u32) {
        (self.0.live.load(Ordering::Relaxed), self.0.active.load(Ordering::Relaxed))
    }

    /// Ends all threads. To be called when all lanes are closed. Blocks: not for a reactor.
    ///
    /// # Errors
    /// ETIMEDOUT when a thread has not ended within `limit`; it is left behind.
    pub fn stop(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.supervise.notify_all();
        loop {
            self.0.idle.notify_all();
            let mut handles = self.0.handles.lock().unwrap_or_else(PoisonError::into_inner);
            let (done, left): (Vec<_>, Vec<_>) =
                std::mem::take(&mut *handles).into_iter().partition(|h| h.is_finished());
            done.into_iter().for_each(|handle| drop(handle.join()));
            let stuck = left.len();
            *handles = left;
            drop(handles);
            if stuck == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(
                    libc::ETIMEDOUT,
                    format!("{stuck} threads are stuck in a call and were left behind"),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl<T> Shared<T> {
    fn sched(&self) -> MutexGuard<'_, Sched<T>> {
        self.sched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_port(&self, mailbox: Arc<Mailbox<T>>) -> u32 {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ports.iter().position(Option::is_none).unwrap_or_else(|| {
            ports.push(None);
            ports.len() - 1
        });
        ports[id] = Some(mailbox);
        self.ports_changed.fetch_add(1, Ordering::Release);
        id as u32
    }

    pub(super) fn remove_port(&self, id: u32) {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)[id as usize] = None;
        self.ports_changed.fetch_add(1, Ordering::Release);
    }

    /// Called by reactors.
    pub(super) fn submit(&self, batch: Batch<Request<T>>, slow: bool) {
        self.inbox.push(batch);
        // Publish, then look (as `Event` does it): a worker that stops being active looks at the inbox afterwards.
        fence(Ordering::SeqCst);
        if self.spinning.load(Ordering::Relaxed) {
            return;
        }
        if slow || self.active.load(Ordering::Relaxed) == 0 {
            self.wake_one();
        }
        self.watch();
    }

    /// Counts a port that sleeps between events, or does not any more.
    pub(super) fn count_sleeper(&self, sleeps: bool) {
        if sleeps {
            self.sleepers.fetch_add(1, Ordering::Relaxed)
        } else {
            self.sleepers.fetch_sub(1, Ordering::Relaxed)
        };
    }

    /// Has the supervisor look for stalls, when the ports are not awake to do it.
    fn watch(&self) {
        if self.sleepers.load(Ordering::Relaxed) > 0 && !self.watching.swap(true, Ordering::SeqCst) {
            self.supervise.notify_one();
        }
    }

    /// Called by ports that wait for answers while nothing has been picked up for `stalled` ticks. Whether it did anything.
    pub(super) fn help(&self, stalled: Ticks) -> bool {
        let crowded = self.active.load(Ordering::Relaxed) >= self.budget;
        let wanted = (!crowded || stalled >= self.crowded_stall_ticks)
            && (self.ready.load(Ordering::Relaxed) || !self.inbox.is_empty());
        if wanted {
            self.wake_one();
        }
        wanted
    }

    fn wake_one(&self) {
        if !self.idle.notify_one() && self.live.load(Ordering::Relaxed) < self.workers.load(Ordering::Relaxed) {
            self.supervise.notify_one();
        }
    }
}

impl<T: Send + 'static> Shared<T> {
    fn start(&self, name: String, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let handle = std::thread::Builder::new().name(name).spawn(run).map_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
            Error::new(errno, format!("cannot start a thread: {}", reason(errno)))
        })?;
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.retain(|h| !h.is_finished());
        handles.push(handle);
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Starts a worker whenever somebody finds that there are too few, and looks for stalls in the place of ports that sleep.
    fn supervise(self: Arc<Self>) {
        thread::run_anywhere_but(&self.reactor_cpus);
        let mut warned = false;
        let (mut picks_seen, mut sign) = (0, clock::now());
        while !self.stopping() {
            let announced = self.supervise.announce();
            if self.stopping() {
                self.supervise.cancel(announced);
                break;
            }
            self.supervise.wait(announced, self.watching.load(Ordering::SeqCst).then_some(WATCH));
            if self.watching.load(Ordering::SeqCst) {
                let (now, picks) = (clock::now(), self.picks.load(Ordering::Relaxed));
                if std::mem::replace(&mut picks_seen, picks) != picks || self.help(now.wrapping_sub(sign)) {
                    sign = now;
                }
                // Stop looking, then look once more: whoever adds work after this has us woken again.
                self.watching.store(false, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                if self.ready.load(Ordering::Relaxed) || !self.inbox.is_empty() {
                    self.watching.store(true, Ordering::SeqCst);
                }
            }
            let limit = self.workers.load(Ordering::Relaxed);
            if self.stopping() || self.live.load(Ordering::Relaxed) >= limit {
                continue;
            }
            let number = self.live.fetch_add(1, Ordering::Relaxed);
            let worker = self.clone();
            if let Err(error) = self.start(format!("lloop-{number}"), move || worker.work()) {
                self.live.fetch_sub(1, Ordering::Relaxed);
                if !std::mem::replace(&mut warned, true) {
                    tracing::error!("{error}; going on with {number} workers");
                }
            }
        }
    }

    /// A worker's life.
    fn work(self: Arc<Self>) {
        thread::run_anywhere_but(&self.reactor_cpus);
        match Transfer::new() {
            Ok(transfer) => self.work_with(transfer),
            Err(error) => tracing::error!("a worker ends, there is no memory for it: {error}"),
        }
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    fn work_with(&self, mut transfer: Transfer) {
        let mut ports = Ports::new();
        let mut ports_seen = u64::MAX;
        let Some(busy) = self
            .busy
            .iter()
            .find(|b| b.submitted.compare_exchange(NOBODY, IDLE, Ordering::Relaxed, Ordering::Relaxed).is_ok())
        else {
            return;
        };
        self.active.fetch_add(1, Ordering::SeqCst);
        let mut finished = None;
        let mut picks_seen = self.picks.load(Ordering::Relaxed);
        'awake: loop {
            let mut sched = self.sched();
            if let Some((work, took)) = finished.take()
                && sched.finished(work, took)
            {
                self.lane_gone.notify_all();
            }
            sched.accept(self.inbox.take_all());
            // More of us than fast calls are worth, and the others get on with it: leave it to them. (When they do not get on,
            // they are stuck, whatever the averages say.)
            let picks = self.picks.load(Ordering::Relaxed);
            let surplus = self.active.load(Ordering::Relaxed) > self.budget && picks != picks_seen;
            if let Some(work) = (!surplus).then(|| sched.take_next()).flatten() {
                let more = sched.has_ready();
                self.ready.store(more, Ordering::Relaxed);
                picks_seen = picks.wrapping_add(1);
                self.picks.store(picks_seen, Ordering::Relaxed);
                drop(sched);
                if more {
                    self.watch();
                }
                let (mut requests, done) = work.into_parts();
                let Some(first) = requests.front() else { continue };
                let slow = first.target.slow();
                let changed = self.ports_changed.load(Ordering::Acquire);
                if changed != ports_seen {
                    ports.clone_from(&self.ports.lock().unwrap_or_else(PoisonError::into_inner));
                    ports_seen = changed;
                }
                busy.lane.store(first.lane, Ordering::Relaxed);
                busy.submitted.store(first.submitted, Ordering::Relaxed);
                if slow {
                    self.active.fetch_sub(1, Ordering::SeqCst);
                    if (more || !self.inbox.is_empty()) && !self.spinning.load(Ordering::SeqCst) {
                        self.wake_one();
                    }
                }
                let start = clock::now();
                transfer.execute(&mut requests);
                let took = clock::now().wrapping_sub(start);
                busy.submitted.store(IDLE, Ordering::Relaxed);
                if slow {
                    self.active.fetch_add(1, Ordering::SeqCst);
                }
                answer(&ports, requests);
                finished = Some((done, took));
                continue;
            }
            let left_over = sched.has_ready();
            self.ready.store(left_over, Ordering::Relaxed);
            drop(sched);
            if self.spin(surplus) {
                continue;
            }
            // Going to sleep. Announce it, stop being active, and look once more.
            loop {
                let announced = self.idle.announce();
                let before = self.active.fetch_sub(1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                // A surplus worker sleeps whatever there is to do, as long as another one is active: that one looks again.
                let work_for_us = !self.inbox.is_empty() || self.sched().has_ready();
                if (work_for_us && !(surplus && before > 1)) || self.retire_or_stop() {
                    self.idle.cancel(announced);
                } else {
                    self.idle.wait(announced, None);
                }
                if self.retire_or_stop() {
                    break 'awake;
                }
                self.active.fetch_add(1, Ordering::SeqCst);
                if !self.inbox.is_empty() || self.sched().has_ready() {
                    picks_seen = self.picks.load(Ordering::Relaxed);
                    continue 'awake;
                }
            }
        }
        busy.submitted.store(NOBODY, Ordering::Relaxed);
    }

    /// Whether this worker should end: the pool stops, or there are more than are wanted.
    fn retire_or_stop(&self) -> bool {
        self.stopping() || self.live.load(Ordering::Relaxed) > self.workers.load(Ordering::Relaxed)
    }

    /// Looks at the inbox for a while; true when something came. One worker at a time does that.
    fn spin(&self, surplus: bool) -> bool {
        if surplus || self.spinning.swap(true, Ordering::SeqCst) {
            return false;
        }
        let start = clock::now();
        let mut came = false;
        while !came && clock::now().wrapping_sub(start) < self.spin_ticks && !self.stopping() {
            for _ in 0..8 {
                came |= !self.inbox.is_empty();
                if came {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        // A submitter that saw the flag before this store relies on the look at the inbox that comes after it.
        self.spinning.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        came || !self.inbox.is_empty()
    }
}

/// Gives each request back to the port it came from.
fn answer<T>(ports: &Ports<T>, mut requests: List<Request<T>>) {
    while let Some(first) = requests.pop_front() {
        let port = first.port;
        let mut batch = Batch::default();
        batch.push(first);
        // Merged requests mostly come from one port: one atomic operation for all of them.
        while requests.front().is_some_and(|next| next.port == port) {
            if let Some(next) = requests.pop_front() {
                batch.push(next);
            }
        }
        ports[port as usize].as_ref().expect("a port outlives its requests").push(batch);
    }
}
