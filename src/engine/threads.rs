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

use super::keeper::{Care, Keeper};
use super::lane::{LaneLoad, LaneMap};
use super::port::Mailbox;
use super::request::Request;
use super::sched::{FinishedWork, Sched};
use super::target::Target;
use super::worker::Ports;
use crate::error::{Error, Result, reason};
use crate::os::clock::{self, Ticks};
use crate::os::crew::{Crew, Summons};
use crate::os::queue::{Batch, Inbox};
use crate::os::sync::Apart;
use crate::os::thread;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
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
pub(super) const WATCH: Duration = Duration::from_millis(1);
/// How often a close looks again.
const CLOSE_LOOK: Duration = Duration::from_millis(100);
/// Calls longer than this make a lane a slow one.
const SLOW: Duration = Duration::from_micros(50);

/// The pool's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    /// The most worker threads.
    pub workers: usize,
    /// The most calls at a time on one lane.
    pub lane_limit: usize,
    /// The longest call that neighbouring requests are merged into, in bytes; 0: 1 MiB, and 4 MiB on Lustre.
    pub max_merge_bytes: u64,
    /// How long retries of one request may go on, on Lustre.
    pub retry_timeout: Duration,
    /// How files are looked after.
    pub care: Care,
    /// Processors that workers keep away from: the reactors'.
    pub reactor_cpus: Vec<u32>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        PoolOptions {
            workers: 128,
            lane_limit: 32,
            max_merge_bytes: 1 << 20,
            retry_timeout: Duration::from_secs(30),
            care: Care::default(),
            reactor_cpus: Vec::new(),
        }
    }
}

/// What a worker is busy with, for statistics and warnings.
#[derive(Default)]
pub(super) struct Busy {
    pub(super) volume: AtomicU32,
    pub(super) lane: AtomicU32,
    pub(super) offset_bytes: AtomicU64,
    pub(super) len_bytes: AtomicU64,
    /// When the call was made.
    pub(super) started: AtomicU64,
    /// When the oldest request of the call was submitted, or one of the two values below.
    pub(super) submitted: AtomicU64,
}

/// The place is free.
pub(super) const NOBODY: Ticks = 0;
/// It belongs to a worker that is in no call.
pub(super) const IDLE: Ticks = Ticks::MAX;

impl Busy {
    /// Notes a call that is made now, `started`, for `first` and its neighbours.
    pub(super) fn set<T>(&self, work: &FinishedWork, first: &Request<T>, started: Ticks) {
        self.volume.store(work.volume, Ordering::Relaxed);
        self.lane.store(work.lane.into(), Ordering::Relaxed);
        self.offset_bytes.store(first.offset_bytes, Ordering::Relaxed);
        self.len_bytes.store(first.len_bytes, Ordering::Relaxed);
        self.started.store(started, Ordering::Relaxed);
        self.submitted.store(first.submitted, Ordering::Release);
    }

    /// When the current call on `volume` was made.
    pub(super) fn started_on(&self, volume: u32) -> Option<Ticks> {
        self.submitted_on(volume).map(|_| self.started.load(Ordering::Relaxed))
    }

    /// When the oldest request of the current call on `volume` was submitted.
    pub(super) fn submitted_on(&self, volume: u32) -> Option<Ticks> {
        let submitted = self.submitted.load(Ordering::Acquire);
        (!matches!(submitted, NOBODY | IDLE) && self.volume.load(Ordering::Relaxed) == volume).then_some(submitted)
    }
}

pub(super) struct Shared<T> {
    pub(super) inbox: Inbox<Request<T>>,
    /// Who is awake, and where the others sleep.
    pub(super) crew: Crew,
    /// Where the supervisor sleeps.
    pub(super) summons: Summons,
    /// The system gave us none; that was said.
    pub(super) no_more_threads: AtomicBool,
    /// Ports whose threads sleep when they have nothing to do.
    sleepers: AtomicU32,
    /// Whether the supervisor looks for stalls.
    pub(super) watching: AtomicBool,
    /// Works taken so far: stands still when everybody is stuck.
    pub(super) picks: Apart<AtomicU64>,
    /// A claim was given back outside the scheduler, and a write in there waits.
    pub(super) claims_changed: AtomicBool,
    /// Whether lanes had work left at the last pick.
    pub(super) ready: AtomicBool,
    pub(super) live: AtomicU32,
    pub(super) workers: AtomicU32,
    /// How many active workers fast lanes are worth.
    pub(super) budget: u32,
    stop: AtomicBool,
    sched: Mutex<Sched<T>>,
    /// A volume is gone, or held and idle.
    pub(super) quiet: Condvar,
    /// A volume needs the keeper.
    pub(super) attention: Condvar,
    pub(super) retry_budget_ms: AtomicU64,
    keeper: Mutex<Keeper>,
    ports: Mutex<Ports<T>>,
    pub(super) ports_changed: AtomicU64,
    pub(super) busy: Vec<Busy>,
    handles: Mutex<Vec<std::thread::JoinHandle<()>>>,
    pub(super) reactor_cpus: Vec<u32>,
    pub(super) stall_ticks: Ticks,
    crowded_stall_ticks: Ticks,
    pub(super) spin_ticks: Ticks,
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

/// A file in the pool: what a device submits to.
pub struct Volume<T> {
    id: u32,
    target: Arc<Target>,
    pool: Arc<Shared<T>>,
}

/// What a volume is doing at the moment.
#[derive(Debug, Clone, Default)]
pub struct VolumeLoad {
    /// Lane by lane; the first is for what lies on several servers, or where none is known. With when the oldest request, waiting
    /// or being executed, was submitted.
    pub lanes: Vec<(LaneLoad, Option<Ticks>)>,
    /// How often requests were tried again.
    pub retries: u64,
}

impl<T> Volume<T> {
    /// The file.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Its number in the pool.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What it is doing. Takes the pool's lock.
    pub fn load(&self) -> VolumeLoad {
        let (loads, retries) = self.pool.sched().load(self.id);
        let lanes = loads.into_iter().enumerate().map(|(at, load)| {
            // (Flushes have no lane of their own in what is shown.)
            let is_here = |lane: u32| lane as usize == at || (at == 0 && lane == u32::from(u16::MAX));
            let running = self.pool.busy.iter().filter(|busy| is_here(busy.lane.load(Ordering::Relaxed)));
            let oldest = running.filter_map(|busy| busy.submitted_on(self.id)).chain(load.oldest_queued).min();
            (load, oldest)
        });
        VolumeLoad { lanes: lanes.collect(), retries }
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
            crew: Crew::default(),
            summons: Summons::default(),
            no_more_threads: AtomicBool::new(false),
            sleepers: AtomicU32::new(0),
            watching: AtomicBool::new(false),
            picks: Apart::default(),
            claims_changed: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            live: AtomicU32::new(0),
            workers: AtomicU32::new(options.workers.clamp(1, MAX_WORKERS) as u32),
            budget: thread::processors_but(&options.reactor_cpus).max(1) as u32,
            stop: AtomicBool::new(false),
            sched: Mutex::new(Sched::new(
                options.workers.clamp(1, MAX_WORKERS),
                options.lane_limit,
                options.max_merge_bytes,
                clock::to_ticks(SLOW),
            )),
            quiet: Condvar::new(),
            attention: Condvar::new(),
            retry_budget_ms: AtomicU64::new(options.retry_timeout.as_millis() as u64),
            keeper: Mutex::new(Keeper::new(options.care)),
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
        let keeper = shared.clone();
        shared.start("lloop-keeper".into(), move || keeper.keep())?;
        Ok(Pool(shared))
    }

    pub(super) fn shared(&self) -> &Arc<Shared<T>> {
        &self.0
    }

    /// Opens a volume on `target`, with the lanes of `map`.
    pub fn open(&self, target: Arc<Target>, map: LaneMap) -> Volume<T> {
        let id = self.0.sched().open(target.clone(), map);
        Volume { id, target, pool: self.0.clone() }
    }

    /// Ends a volume that gets no more requests, waits until nothing uses its file any more and closes that. Blocks: not for a
    /// reactor.
    ///
    /// # Errors
    /// ETIMEDOUT when a call on the file has not returned within `limit`. The volume then ends when that call does, and the
    /// file is closed with it.
    pub fn close(&self, volume: Volume<T>, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let Volume { id, target, .. } = volume;
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
            if sched.has_ready() {
                self.0.crew.wake_one();
            }
            sched = self.0.quiet.wait_timeout(sched, left.min(CLOSE_LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        }
        let dead = sched.take_dead();
        drop(sched);
        drop(dead);
        // The kernel may keep the file open for a while (io_uring on Linux 6.1 does, for a second): the locks go now.
        target.guard().give_back(target.file());
        // A worker that has just handed out the last answer may still hold the target for an instant; the keeper, while it looks
        // after the file.
        let mut target = target;
        while let Err(shared) = Arc::try_unwrap(target) {
            if Instant::now() >= deadline {
                return Err(Error::new(libc::ETIMEDOUT, "the file is still in use"));
            }
            target = shared;
            std::thread::sleep(Duration::from_micros(100));
        }
        self.0.sched().forget(id);
        Ok(())
    }

    /// Changes the limits for what comes from now on. Workers beyond a lower number go when they run out of work.
    pub fn set_limits(&self, options: &PoolOptions) {
        let workers = options.workers.clamp(1, MAX_WORKERS);
        self.0.workers.store(workers as u32, Ordering::Relaxed);
        self.0.retry_budget_ms.store(options.retry_timeout.as_millis() as u64, Ordering::Relaxed);
        self.0.sched().set_limits(workers, options.lane_limit, options.max_merge_bytes);
        self.0.care().set_care(options.care);
        self.0.crew.wake_all();
    }

    /// The volume is detached by force: what waits there is answered with ENODEV now, and whatever still comes. Takes the pool's lock.
    pub fn abandon(&self, volume: u32) {
        self.0.sched().end(volume);
        self.0.rouse();
    }

    /// Looks after a volume now: takes lost locks again, looks at the file. For an operator who has mended something. Blocks: not for
    /// a reactor.
    ///
    /// # Errors
    /// What keeps it from going on, for people.
    pub fn resume(&self, volume: u32, target: &Target) -> Result<()> {
        self.0.resume(volume, target)
    }

    /// The calls that are being made, for people.
    pub fn stuck_calls(&self) -> Vec<String> {
        let targets = self.0.sched().targets();
        let now = clock::now();
        let calls = self.0.busy.iter().filter_map(|busy| {
            let (submitted, target) =
                targets.iter().find_map(|(id, target)| Some((busy.submitted_on(*id)?, target)))?;
            let age = clock::to_duration(now.saturating_sub(submitted));
            let offset = busy.offset_bytes.load(Ordering::Relaxed);
            Some(format!("{}: the I/O at byte {offset}, {} s old", target.file().path().display(), age.as_secs()))
        });
        calls.collect()
    }

    /// How many workers there are, and how many of them are awake and not in a slow call.
    pub fn worker_counts(&self) -> (u32, u32) {
        (self.0.live.load(Ordering::Relaxed), self.0.crew.active())
    }

    /// Ends all threads. To be called when all lanes are closed. Blocks: not for a reactor.
    ///
    /// # Errors
    /// ETIMEDOUT when a thread has not ended within `limit`; it is left behind.
    pub fn stop(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.summons.call();
        self.0.attention.notify_all();
        loop {
            self.0.crew.wake_all();
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
    pub(super) fn sched(&self) -> MutexGuard<'_, Sched<T>> {
        self.sched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ports(&self) -> MutexGuard<'_, Ports<T>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn care(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_port(&self, mailbox: Arc<Mailbox<T>>) -> u32 {
        let mut ports = self.ports();
        let id = ports.iter().position(Option::is_none).unwrap_or_else(|| {
            ports.push(None);
            ports.len() - 1
        });
        ports[id] = Some(mailbox);
        self.ports_changed.fetch_add(1, Ordering::Release);
        id as u32
    }

    pub(super) fn remove_port(&self, id: u32) {
        self.ports()[id as usize] = None;
        self.ports_changed.fetch_add(1, Ordering::Release);
    }

    /// Called by reactors.
    pub(super) fn submit(&self, batch: Batch<Request<T>>, slow: bool) {
        self.inbox.push(batch);
        if self.crew.looks_for_more() {
            return;
        }
        if slow || self.crew.active() == 0 {
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
    pub(super) fn watch(&self) {
        if self.sleepers.load(Ordering::Relaxed) > 0 && !self.watching.swap(true, Ordering::SeqCst) {
            self.summons.call();
        }
    }

    /// Called by ports that wait for answers while nothing has been picked up for `stalled` ticks. Whether it did anything.
    pub(super) fn help(&self, stalled: Ticks) -> bool {
        let crowded = self.crew.active() >= self.budget;
        let wanted = (!crowded || stalled >= self.crowded_stall_ticks)
            && (self.ready.load(Ordering::Relaxed) || self.has_news());
        if wanted {
            self.wake_one();
        }
        wanted
    }

    /// Whether something has come since the scheduler was last asked.
    pub(super) fn has_news(&self) -> bool {
        !self.inbox.is_empty() || self.claims_changed.load(Ordering::SeqCst)
    }

    /// Has the scheduler look at the writes that wait for others. Called by reactors.
    pub(super) fn tell_of_claims(&self) {
        if !self.claims_changed.swap(true, Ordering::SeqCst) {
            self.rouse();
        }
    }

    /// There is work that did not come by the inbox.
    pub(super) fn rouse(&self) {
        self.ready.store(true, Ordering::Relaxed);
        self.wake_one();
        self.watch();
    }

    pub(super) fn wake_one(&self) {
        if !self.crew.wake_one() && self.live.load(Ordering::Relaxed) < self.workers.load(Ordering::Relaxed) {
            self.summons.call_for_a_worker();
        }
    }
}

impl<T: Send + 'static> Shared<T> {
    pub(super) fn start(&self, name: String, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let handle = std::thread::Builder::new().name(name).spawn(run).map_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
            Error::new(errno, format!("cannot start a thread: {}", reason(errno)))
        })?;
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.retain(|h| !h.is_finished());
        handles.push(handle);
        Ok(())
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
