//! The io_uring engine: a ring a thread, whole-page reads and writes without any other thread of ours.
//!
//! It does what is regular and leaves the rest to the workers: whatever comes back short, or with an errno that a second try by a
//! blocking call can better, is executed anew by them (reads and writes of blocks can be repeated), and flushes, discards and
//! reads to memory that direct I/O does not take go there from the start. So there is one place that continues and explains. Short
//! writes from such memory are copied and stay: a copy is cheaper than a hand-over.
//!
//! A thread that submits more than it can has a second, polled ring, and the kernel's thread behind that takes a part (balance.rs).

use super::balance::{Balance, Help, LOAD, Load};
use super::request::{Op, Request};
use crate::os::bell::Bell;
use crate::os::bounce::{BouncePool, Slot};
use crate::os::clock::{self, Ticks};
use crate::os::queue::{List, Placed};
use crate::os::ring::{Batch, Features, Ring, RingOptions};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many I/O of one thread the kernel gets at a time; more wait here.
const ENTRIES: u32 = 512;

/// How a thread's ring is made.
#[derive(Debug, Clone, Default)]
pub struct UringOptions {
    /// The thread that makes it is the only one that will ever use it.
    pub one_thread: bool,
    /// Where the kernel's threads may not be.
    pub reactor_cpus: Vec<u32>,
    /// Whether one of them may help to submit.
    pub help: Help,
}

/// What other threads may know of a ring, for statistics.
pub struct Watch {
    /// When each I/O in flight was submitted, by its place, and of which volume it is; 0 for a free place.
    ages: Box<[(AtomicU64, AtomicU64)]>,
    helped: AtomicU64,
}

impl Watch {
    /// How many I/O the kernel's own thread has got.
    pub fn helped(&self) -> u64 {
        self.helped.load(Ordering::Relaxed)
    }

    /// When the oldest I/O in flight of `volume` was submitted.
    pub fn oldest(&self, volume: u32) -> Option<Ticks> {
        let of_volume = self.ages.iter().filter(|(_, l)| l.load(Ordering::Relaxed) == u64::from(volume));
        of_volume.map(|(submitted, _)| submitted.load(Ordering::Relaxed)).filter(|&t| t != 0).min()
    }
}

/// A thread's ring, with the requests that the kernel has.
pub struct Uring<T> {
    ring: Ring,
    /// A second one, of the kernel's thread.
    polled: Option<Ring>,
    balance: Balance,
    flights: Flights<T>,
    waiting: List<Request<T>>,
    files: Vec<bool>,
    troubled: bool,
}

/// The requests that the kernel has, each in a place.
struct Flights<T> {
    places: Vec<Option<Flight<T>>>,
    bounce: BouncePool,
    free: Vec<u32>,
    watch: Arc<Watch>,
}

struct Flight<T> {
    request: Placed<Request<T>>,
    /// What it was copied to, when it had to be.
    copy: Option<Slot>,
}

impl<T> Uring<T> {
    /// Makes the current thread's ring; its completions ring `bell`, for a thread that sleeps.
    ///
    /// # Errors
    /// The errno of making it: ENOSYS or EPERM where kernel or sandbox have no io_uring, or cannot ring.
    pub fn new(options: &UringOptions, bell: Option<&Bell>) -> Result<Self, i32> {
        let UringOptions { one_thread, ref reactor_cpus, help } = *options;
        let of = |entries| RingOptions { entries, one_thread, reactor_cpus: reactor_cpus.clone() };
        let mut ring = Ring::new(&of(ENTRIES))?;
        if !ring.features().files {
            return Err(libc::ENOSYS);
        }
        if bell.is_some_and(|bell| !ring.ring_on_completion(bell.as_fd())) {
            return Err(libc::EOPNOTSUPP);
        }
        ring.register_hugepages();
        let mut polled = None;
        // (A reactor that may sleep is there to save processors.)
        if help != Help::Off && bell.is_none() {
            match Ring::new_polled(&of(ENTRIES)) {
                Ok(mut ring) => {
                    ring.register_hugepages();
                    polled = Some(ring);
                }
                Err(errno) => tracing::debug!("no polled ring: {}", crate::error::reason(errno)),
            }
        }
        let help = if polled.is_some() { help } else { Help::Off };
        let flights = Flights {
            bounce: BouncePool::new().map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))?,
            places: std::iter::repeat_with(|| None).take(ENTRIES as usize).collect(),
            free: (0..ENTRIES).rev().collect(),
            watch: Arc::new(Watch {
                ages: (0..ENTRIES).map(|_| Default::default()).collect(),
                helped: AtomicU64::new(0),
            }),
        };
        let (balance, waiting, files) = (Balance::new(help), List::default(), Vec::new());
        Ok(Uring { ring, polled, balance, flights, waiting, files, troubled: false })
    }

    /// Whether this kernel lets us make rings with what the engine needs.
    ///
    /// # Errors
    /// Why not.
    pub fn probe() -> Result<(), i32> {
        let ring = Ring::new(&RingOptions { entries: 1, one_thread: true, reactor_cpus: Vec::new() })?;
        if ring.features().files { Ok(()) } else { Err(libc::ENOSYS) }
    }

    /// What the kernel could do for this ring, and for the polled one beside it.
    pub fn features(&self) -> (Features, Option<Features>) {
        (self.ring.features(), self.polled.as_ref().map(Ring::features))
    }

    /// What other threads may know of it.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.flights.watch
    }

    /// Registers a file; its slot, or `None` when there is none left.
    pub fn add_file(&mut self, fd: BorrowedFd<'_>) -> Option<u32> {
        let slot = self.files.iter().position(|used| !used).unwrap_or(self.files.len());
        if !self.rings().all(|ring| ring.register_file(slot as u32, fd)) {
            self.rings().for_each(|ring| ring.unregister_file(slot as u32));
            return None;
        }
        if slot == self.files.len() {
            self.files.push(false);
        }
        self.files[slot] = true;
        Some(slot as u32)
    }

    /// Gives a slot back; nothing is in flight on it.
    pub fn remove_file(&mut self, slot: u32) {
        self.rings().for_each(|ring| ring.unregister_file(slot));
        self.files[slot as usize] = false;
    }

    fn rings(&mut self) -> impl Iterator<Item = &mut Ring> {
        std::iter::once(&mut self.ring).chain(&mut self.polled)
    }

    /// Takes a read or write in, on the file in `slot`; the next [`Uring::enter`] hands it over.
    #[inline]
    pub fn submit(&mut self, mut request: Placed<Request<T>>, slot: u32) {
        request.port = slot;
        self.waiting.push_back(request);
    }

    /// Hands over what was submitted: one system call, and seldom a second that wakes the kernel's thread. Whether it is to be called
    /// again although nothing completes.
    pub fn enter(&mut self) -> bool {
        LOAD.with_borrow_mut(|load| self.enter_from(load))
    }

    fn enter_from(&mut self, load: &mut Load) -> bool {
        let Uring { ring, polled, balance, flights, waiting, troubled, .. } = self;
        // An I/O alone is not worth two looks at the clock each time.
        let is_due = balance.is_due();
        let is_timed = waiting.len() > 1 || is_due;
        let start = if is_timed { clock::now() } else { 0 };
        if let Some(ring) = polled
            && waiting.len() > 1
            && balance.wants_help(load)
        {
            let mut batch = ring.batch();
            let share = balance.share(load, waiting.len(), batch.backlog(), start);
            let gave = flights.hand_over(waiting, &mut batch, share);
            drop(batch);
            balance.gave(load, gave, start);
            flights.watch.helped.store(balance.given(), Ordering::Relaxed);
            try_entering(ring, troubled);
        } else if let Some(ring) = polled
            && is_due
            && ring.in_flight() > 0
        {
            // Should waking its thread have failed, there may be nothing else that does it again.
            try_entering(ring, troubled);
        }
        let count =
            if waiting.is_empty() { 0 } else { flights.hand_over(waiting, &mut ring.batch(), balance.budget(load)) };
        let again = try_entering(ring, troubled);
        if is_timed {
            balance.entered(load, count, start, clock::now());
        } else {
            load.guess(count);
        }
        again || !waiting.is_empty()
    }

    /// Takes what has completed: into `done` with its result, or into `again` for the workers to execute anew.
    pub fn reap(&mut self, done: &mut List<Request<T>>, again: &mut List<Request<T>>) {
        let Uring { ring, polled, flights, .. } = self;
        for ring in std::iter::once(ring).chain(polled) {
            ring.reap(|place, result| {
                let Some(mut request) = flights.land(place as u32) else { return };
                match result {
                    n if n >= 0 && n as u64 == request.len_bytes => {
                        request.conclude(Ok(()));
                        done.push_back(request);
                    }
                    e if e < 0 && is_final(-e) => {
                        request.conclude(Err(-e));
                        done.push_back(request);
                    }
                    _ => again.push_back(request),
                }
            });
        }
    }

    /// Whether nothing is submitted that has not come back.
    pub fn is_idle(&self) -> bool {
        self.flights.free.len() == ENTRIES as usize && self.waiting.is_empty()
    }
}

impl<T> Flights<T> {
    /// Pushes up to `count` of `waiting`; how many it were. (No more than there are places, and room in the ring.)
    fn hand_over(&mut self, waiting: &mut List<Request<T>>, batch: &mut Batch<'_>, count: usize) -> usize {
        for done in 0..count {
            let Some(&place) = self.free.last() else { return done };
            let Some(request) = waiting.pop_front() else { return done };
            let suits = request.suits_direct_io();
            let copy = if suits { None } else { self.bounce.copy(&request.iovs) };
            let iovs = copy.as_ref().map_or(&request.iovs, |(_, iovs)| iovs);
            let write = request.op == Op::Write;
            // (What does not suit waits for a slot.)
            let goes = suits || copy.is_some();
            if !goes || batch.push(write, request.port, iovs, request.offset_bytes, place.into()).is_err() {
                if let Some((slot, _)) = copy {
                    self.bounce.give_back(slot);
                }
                waiting.push_front(request);
                return done;
            }
            self.free.pop();
            let age = &self.watch.ages[place as usize];
            age.1.store(request.volume.into(), Ordering::Relaxed);
            age.0.store(request.submitted, Ordering::Relaxed);
            self.places[place as usize] = Some(Flight { request, copy: copy.map(|(slot, _)| slot) });
        }
        count
    }

    /// Takes the request in a place back.
    fn land(&mut self, place: u32) -> Option<Placed<Request<T>>> {
        let Flight { request, copy } = self.places[place as usize].take()?;
        if let Some(slot) = copy {
            self.bounce.give_back(slot);
        }
        self.watch.ages[place as usize].0.store(0, Ordering::Relaxed);
        self.free.push(place);
        Some(request)
    }
}

/// Enters a ring; whether that has to be tried again.
fn try_entering(ring: &mut Ring, troubled: &mut bool) -> bool {
    match ring.enter() {
        Ok(()) => return false,
        Err(libc::EBUSY | libc::EAGAIN) => {}
        Err(errno) => {
            if !std::mem::replace(troubled, true) {
                tracing::error!("io_uring_enter: {}; trying on", crate::error::reason(errno));
            }
        }
    }
    true
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        debug_assert!(self.is_idle() || std::thread::panicking(), "a ring was closed with I/O in flight");
    }
}

/// Whether a blocking call would only say the same.
fn is_final(errno: i32) -> bool {
    matches!(
        errno,
        libc::EIO | libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EROFS | libc::EBADF | libc::EPERM | libc::ENODATA
    )
}
