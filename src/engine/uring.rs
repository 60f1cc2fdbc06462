//! The io_uring engine: a ring a thread, whole-page reads and writes without any other thread of ours.
//!
//! It does what is regular and leaves the rest to the workers: whatever comes back short, or with an errno that a second try by a
//! blocking call can better, is executed anew by them (reads and writes of blocks can be repeated), and flushes, discards and
//! reads to memory that direct I/O does not take go there from the start. So there is one place that continues and explains. Short
//! writes from such memory are copied and stay: a copy is cheaper than a hand-over.
//!
//! Where an operator has granted processors for it (`sqpoll_cpus`), a thread has a second, polled ring, and half of every batch goes
//! there.

use super::request::{Op, Request};
use crate::os::bell::Bell;
use crate::os::bounce::{BouncePool, Slot};
use crate::os::clock::{self, Ticks};
use crate::os::queue::{List, Placed};
use crate::os::ring::{Access, Batch, Features, Ring, RingOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ThreadId;
use std::time::Duration;

/// How many I/O of one thread the kernel gets at a time; more wait here.
const ENTRIES: u32 = 512;
/// How many are handed over in one poll, at most.
const BATCH: usize = 128;
/// And how long that may take: the reactor has other things to do. A read costs some 0.7 us, but 128 writes that allocate took 7 ms
/// (docs/internals/constants.md).
const BUDGET: Duration = Duration::from_micros(200);

/// How a thread's ring is made.
#[derive(Debug, Clone, Default)]
pub struct UringOptions {
    /// Where the kernel's threads may not be.
    pub reactor_cpus: Vec<u32>,
    /// Processors that the kernel's threads may poll on. None: there is no polled ring.
    pub sqpoll_cpus: Vec<u32>,
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
    flights: Flights<T>,
    waiting: List<Request<T>>,
    /// How many are handed over in the next poll, to stay in the budget.
    batch: usize,
    /// The places of what was pushed to `ring`; the last of them may not be taken by the kernel yet.
    pushed: Vec<u32>,
    /// What a ring that failed has given back: for the workers.
    returned: List<Request<T>>,
    /// What is answered without having been handed over.
    answered: List<Request<T>>,
    files: Vec<bool>,
    reactor_cpus: Vec<u32>,
    /// The thread that used it last.
    user: Option<ThreadId>,
    /// The kernel refuses it: everything goes to the workers.
    broken: bool,
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
    /// Makes a ring, for whatever thread will use it; its completions ring `bell`, for a thread that sleeps. Takes some milliseconds (it
    /// pins SPDK's memory): not for a reactor.
    ///
    /// # Errors
    /// The errno of making it: ENOSYS or EPERM where kernel or sandbox have no io_uring, or cannot ring.
    pub fn new(options: &UringOptions, bell: Option<&Bell>) -> Result<Self, i32> {
        let ring_options = RingOptions {
            entries: ENTRIES,
            reactor_cpus: options.reactor_cpus.clone(),
            sqpoll_cpus: options.sqpoll_cpus.clone(),
        };
        let mut ring = Ring::new(&ring_options)?;
        if !ring.features().files {
            return Err(libc::ENOSYS);
        }
        if bell.is_some_and(|bell| !ring.ring_on_completion(bell.as_fd())) {
            return Err(libc::EOPNOTSUPP);
        }
        ring.register_hugepages();
        let mut polled = None;
        // A reactor that may sleep is there to save processors.
        if !options.sqpoll_cpus.is_empty() && bell.is_none() {
            match Ring::new_polled(&ring_options) {
                Ok(mut ring) => {
                    ring.register_hugepages();
                    polled = Some(ring);
                }
                Err(errno) => tracing::warn!(
                    "sqpoll_cpus {:?}: no polled ring, going on without: {}",
                    options.sqpoll_cpus,
                    crate::error::reason(errno)
                ),
            }
        }
        let flights = Flights {
            bounce: BouncePool::new().map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))?,
            places: std::iter::repeat_with(|| None).take(ENTRIES as usize).collect(),
            free: (0..ENTRIES).rev().collect(),
            watch: Arc::new(Watch {
                ages: (0..ENTRIES).map(|_| Default::default()).collect(),
                helped: AtomicU64::new(0),
            }),
        };
        Ok(Uring {
            ring,
            polled,
            flights,
            waiting: List::default(),
            batch: BATCH,
            pushed: Vec::with_capacity(2 * ENTRIES as usize),
            returned: List::default(),
            answered: List::default(),
            files: Vec::new(),
            reactor_cpus: options.reactor_cpus.clone(),
            user: None,
            broken: false,
        })
    }

    /// Whether this kernel lets us make rings with what the engine needs.
    ///
    /// # Errors
    /// Why not.
    pub fn probe() -> Result<(), i32> {
        let ring = Ring::new(&RingOptions { entries: 1, reactor_cpus: Vec::new(), sqpoll_cpus: Vec::new() })?;
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

    /// Whether it takes requests: not any more when the kernel has refused it for good.
    pub fn works(&self) -> bool {
        !self.broken
    }

    /// Takes a read or write in, on the file in `slot`; the next [`Uring::enter`] hands it over. A write has its claim, alone
    /// ([`Request::claim`]).
    #[inline]
    pub fn submit(&mut self, mut request: Placed<Request<T>>, slot: u32) {
        debug_assert!(self.works());
        request.port = slot;
        self.waiting.push_back(request);
    }

    /// Answers with ECANCELED what waits here and the kernel has not got, if it is `meant`. Whether there was any.
    pub fn cancel(&mut self, meant: impl Fn(&Request<T>) -> bool) -> bool {
        let mut cancelled = self.waiting.extract(|request| meant(request));
        let any = !cancelled.is_empty();
        cancelled.iter_mut().for_each(|request| request.conclude(Err(libc::ECANCELED)));
        self.answered.append(&mut cancelled);
        any
    }

    /// Has a request answered by the next [`Uring::reap`], as done.
    pub fn answer(&mut self, mut request: Placed<Request<T>>) {
        request.conclude(Ok(()));
        self.answered.push_back(request);
    }

    /// Hands over what was submitted: one system call, and seldom a second that wakes the kernel's thread. Whether it is to be called
    /// again although nothing completes.
    pub fn enter(&mut self) -> bool {
        if self.broken {
            // The polled ring still has what it was given; its thread may have to be woken.
            let polled = self.polled.as_mut().filter(|polled| polled.in_flight() > 0);
            return polled.is_some_and(|polled| polled.enter().is_err());
        }
        let Uring { ring, polled, flights, waiting, .. } = self;
        let mut again = false;
        if let Some(ring) = polled {
            // Half, unless its thread has not taken the last share yet.
            let mut batch = ring.batch();
            if waiting.len() > 1 && batch.backlog() == 0 {
                let gave = flights.hand_over(waiting, &mut batch, (waiting.len() / 2).min(self.batch), |_| {});
                flights.watch.helped.fetch_add(gave as u64, Ordering::Relaxed);
            }
            drop(batch);
            if ring.in_flight() > 0 {
                match ring.enter() {
                    Ok(()) => {}
                    Err(libc::EBUSY | libc::EAGAIN) => again = true,
                    Err(errno) => return self.fail_over(errno),
                }
            }
        }
        let mut count = 0;
        if !waiting.is_empty() {
            let mut batch = ring.batch();
            if batch.backlog() == 0 {
                self.pushed.clear();
            }
            count = flights.hand_over(waiting, &mut batch, self.batch, |place| self.pushed.push(place));
        }
        // One alone is not worth two looks at the clock.
        let start = if count > 1 { clock::now() } else { 0 };
        let entered = self.ring.enter();
        if count > 1 {
            self.adapt(count, clock::to_duration(clock::now().wrapping_sub(start)));
        }
        match entered {
            Ok(()) => {
                // After this thread's first entry: before that the kernel knows nothing of it (EINVAL).
                if count > 0 {
                    self.adopt();
                }
                again || !self.waiting.is_empty()
            }
            Err(libc::EBUSY | libc::EAGAIN) => true,
            Err(errno) => self.fail_over(errno),
        }
    }

    /// Sets the next batch by what `count` took: as many as fit the budget, and twice as many as this time at most.
    fn adapt(&mut self, count: usize, took: Duration) {
        let fits = count as u128 * BUDGET.as_nanos() / took.as_nanos().max(1);
        self.batch =
            (fits.min(2 * count as u128) as usize).max(if took > BUDGET { 1 } else { self.batch }).clamp(1, BATCH);
    }

    /// Notices that another thread uses it than before: SPDK moves its threads.
    fn adopt(&mut self) {
        let user = Some(std::thread::current().id());
        if self.user != user {
            self.user = user;
            let cpus = std::mem::take(&mut self.reactor_cpus);
            self.rings().for_each(|ring| ring.adopt(&cpus));
            self.reactor_cpus = cpus;
        }
    }

    /// Gives the ring up after an error that no retry can mend: what the kernel has not taken goes to the workers, and whatever comes.
    /// What it has taken completes.
    #[cold]
    fn fail_over(&mut self, errno: i32) -> bool {
        if std::mem::replace(&mut self.broken, true) {
            return false;
        }
        tracing::error!("io_uring_enter: {}; the workers do its work from now on", crate::error::reason(errno));
        let left = self.ring.give_up();
        for place in self.pushed.split_off(self.pushed.len() - left) {
            if let Some(request) = self.flights.land(place) {
                self.returned.push_back(request);
            }
        }
        self.returned.append(&mut self.waiting);
        false
    }

    /// Takes what has completed: into `done` with its result, or into `again` for the workers to execute anew.
    pub fn reap(&mut self, done: &mut List<Request<T>>, again: &mut List<Request<T>>) {
        again.append(&mut self.returned);
        done.append(&mut self.answered);
        let Uring { ring, polled, flights, .. } = self;
        for ring in std::iter::once(ring).chain(polled) {
            ring.reap(|place, result| {
                let Some(mut request) = flights.land(place as u32) else { return };
                match outcome(result, request.len_bytes) {
                    Some(result) => {
                        request.conclude(result);
                        done.push_back(request);
                    }
                    None => again.push_back(request),
                }
            });
        }
    }

    /// Whether nothing is submitted that has not come back.
    pub fn is_idle(&self) -> bool {
        self.flights.free.len() == ENTRIES as usize
            && [&self.waiting, &self.returned, &self.answered].iter().all(|list| list.is_empty())
    }
}

impl<T> Flights<T> {
    /// Pushes up to `count` of `waiting`, no more than there are places, and room in the ring; how many it were.
    fn hand_over(
        &mut self,
        waiting: &mut List<Request<T>>,
        batch: &mut Batch<'_>,
        count: usize,
        mut pushed: impl FnMut(u32),
    ) -> usize {
        for done in 0..count {
            let Some(&place) = self.free.last() else { return done };
            let Some(request) = waiting.pop_front() else { return done };
            let suits = request.suits_direct_io();
            let copy = if suits { None } else { self.bounce.copy(&request.iovs) };
            let iovs = copy.as_ref().map_or(&request.iovs, |(_, iovs)| iovs);
            let access = match (request.op, request.fua) {
                (Op::Read, _) => Access::Read,
                (_, true) => Access::WriteDurably,
                (_, false) => Access::Write,
            };
            // (What does not suit waits for a slot.)
            let goes = suits || copy.is_some();
            if !goes || batch.push(access, request.port, iovs, request.offset_bytes, place.into()).is_err() {
                if let Some((slot, _)) = copy {
                    self.bounce.give_back(slot);
                }
                waiting.push_front(request);
                return done;
            }
            self.free.pop();
            pushed(place);
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

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        debug_assert!(self.is_idle() || std::thread::panicking(), "a ring was closed with I/O in flight");
    }
}

/// What a completion of the kernel's means for a request of `len_bytes`; nothing where the workers have to execute it anew.
#[doc(hidden)]
pub fn outcome(result: i32, len_bytes: u64) -> Option<Result<(), i32>> {
    match result {
        n if n >= 0 && n as u64 == len_bytes => Some(Ok(())),
        e if e < 0 && is_final(-e) => Some(Err(-e)),
        _ => None,
    }
}

/// Whether a blocking call would only say the same.
fn is_final(errno: i32) -> bool {
    matches!(
        errno,
        libc::EIO | libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EROFS | libc::EBADF | libc::EPERM | libc::ENODATA
    )
}
