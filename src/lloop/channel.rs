//! What a reactor thread has of lloop: one port to the workers for all devices, and a channel for each device it uses.

use super::device::Shared;
use super::state;
use crate::engine::stats::Counters;
use crate::engine::uring::Watch;
use crate::engine::{Op, Port, Request, Uring, UringOptions, Volume};
use crate::os::bell::Bell;
use crate::os::clock::{self, Ticks};
use crate::os::iov::IoVecs;
use crate::os::queue::List;
use crate::spdk::bdev_io::{BdevIo, Completion, Parked};
use crate::spdk::io_channel::{PerThread, PerThreadKind, PerThreadRef};
use crate::spdk::poller::{self, Poller};
use crate::spdk::thread;
use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};

/// What comes back with an answer.
pub struct Token {
    io: Parked,
    counters: Arc<Counters>,
    device: Arc<Shared>,
}

/// The per-thread state of all threads.
pub static GROUPS: PerThreadKind<Group> = PerThreadKind::new();

/// A thread's port, and the poller that serves it.
pub struct Group {
    // Before what it uses: it ends first.
    _poller: Poller,
    inner: Rc<Inner>,
}

struct Inner {
    port: RefCell<Port<Token>>,
    /// Wakes this thread, in a target whose reactors sleep.
    bell: Option<Arc<Bell>>,
    /// Whether it sleeps when nothing is to be done, at the moment.
    sleeping: Cell<bool>,
    /// Whether a poll is certain to come: no need to ring for it.
    awaited: Cell<bool>,
    /// Looks after resets where nobody polls without reason.
    reset_timer: RefCell<Option<Poller>>,
    /// Made, elsewhere, when the first device wants it.
    ring: RefCell<RingState>,
    resets: RefCell<Vec<Reset>>,
    /// What the next I/O is called, for aborts.
    next_number: Cell<u64>,
}

/// A thread's ring. Making one takes milliseconds, so it happens off the reactor; until it is there the workers do everything.
#[derive(Default)]
enum RingState {
    #[default]
    None,
    /// It will arrive here.
    Coming(mpsc::Receiver<Result<Box<Uring<Token>>, i32>>),
    There(Box<Uring<Token>>),
    /// It could not be made.
    Refused,
}

impl RingState {
    fn get(&mut self) -> Option<&mut Uring<Token>> {
        match self {
            RingState::There(ring) => Some(ring),
            _ => None,
        }
    }
}

/// How often a target whose reactors sleep looks after resets.
const RESET_PERIOD_US: u64 = 5000;

/// A reset that waits for its device to be idle.
struct Reset {
    io: BdevIo,
    device: Arc<Shared>,
    deadline: Ticks,
}

impl PerThread for Group {
    const NAME: &'static CStr = c"lloop";

    fn create() -> Result<Self, i32> {
        let pool = super::pool().ok_or(libc::ENODEV)?;
        let bell = if poller::reactors_may_sleep() { Some(Arc::new(Bell::new()?)) } else { None };
        let inner = Rc::new(Inner {
            port: RefCell::new(Port::new(&pool, bell.clone())),
            bell: bell.clone(),
            sleeping: Cell::new(false),
            awaited: Cell::new(false),
            reset_timer: RefCell::default(),
            ring: RefCell::default(),
            resets: RefCell::default(),
            next_number: Cell::new(1),
        });
        let polled = inner.clone();
        let mut poller = Poller::register(c"lloop", 0, move || polled.poll())?;
        if let Some(bell) = &bell {
            let told = inner.clone();
            poller.sleep_on(c"lloop", bell.as_fd(), move |sleeping| told.set_sleeping(sleeping))?;
        }
        Ok(Group { _poller: poller, inner })
    }
}

impl Inner {
    /// The thread sleeps from now on until the bell rings, or does not.
    fn set_sleeping(&self, sleeping: bool) {
        self.sleeping.set(sleeping);
        self.port.borrow_mut().set_sleeping(sleeping);
        // What arrived while nobody rang.
        self.awaited.set(false);
        self.expect_poll();
    }

    /// Sees to it that a poll comes.
    fn expect_poll(&self) {
        if self.sleeping.get()
            && !self.awaited.replace(true)
            && let Some(bell) = &self.bell
        {
            bell.ring();
        }
    }

    /// Completes what is answered, then hands over what was submitted since: one doorbell a poll.
    fn poll(&self) -> bool {
        if let Some(bell) = &self.bell {
            bell.clear();
            self.awaited.set(true);
        }
        let ring_is_idle = match &*self.ring.borrow() {
            RingState::There(ring) => ring.is_idle(),
            _ => true,
        };
        if !self.port.borrow_mut().is_ready() && ring_is_idle && self.resets.borrow().is_empty() {
            self.awaited.set(false);
            return false;
        }
        // The borrow ends before the first completion, whose owner may submit again at once.
        let mut answers = self.port.borrow_mut().reap();
        if let Some(ring) = self.ring.borrow_mut().get() {
            let mut again = List::default();
            ring.reap(&mut answers, &mut again);
            while let Some(request) = again.pop_front() {
                self.port.borrow_mut().stage(request);
            }
        }
        let busy = !answers.is_empty();
        if busy {
            let now = clock::now();
            while let Some(request) = answers.pop_front() {
                let answer = self.port.borrow().answer(request);
                let io = answer.token.io.resume();
                match answer.op {
                    Op::Abort if answer.result.is_ok() => io.complete(Completion::Success),
                    Op::Abort => io.complete(Completion::Failed),
                    Op::Reset => self.await_reset(io, answer.token.device),
                    op => {
                        let took = now.saturating_sub(answer.submitted);
                        answer.token.counters.completed(op, answer.len_bytes, answer.result, took);
                        io.complete(state::completion(op, answer.result));
                    }
                }
            }
        }
        let again = self.ring.borrow_mut().get().is_some_and(|ring| ring.enter());
        self.port.borrow_mut().ring();
        self.awaited.set(false);
        if again {
            self.expect_poll();
        }
        busy | self.poll_resets()
    }

    /// Has a ring made for this thread, unless there is one.
    fn want_ring(&self) {
        let mut state = self.ring.borrow_mut();
        if !matches!(*state, RingState::None) {
            return;
        }
        let options =
            UringOptions { reactor_cpus: thread::reactor_cpus(), sqpoll_cpus: super::options::current().sqpoll_cpus };
        let (sender, receiver) = mpsc::sync_channel(1);
        let bell = self.bell.clone();
        let started = super::attach::in_background(move || {
            // Nobody takes it when the thread has ended meanwhile.
            let _ = sender.send(Uring::new(&options, bell.as_deref()).map(Box::new));
        });
        *state = if started { RingState::Coming(receiver) } else { RingState::Refused };
    }

    /// Takes the ring that was made, if it has arrived. Whether this thread has one now.
    fn has_ring(&self) -> bool {
        let mut state = self.ring.borrow_mut();
        let RingState::Coming(receiver) = &*state else { return matches!(*state, RingState::There(_)) };
        let made = match receiver.try_recv() {
            Err(mpsc::TryRecvError::Empty) => return false,
            Err(mpsc::TryRecvError::Disconnected) => Err(libc::ENOMEM),
            Ok(made) => made,
        };
        *state = match made {
            Ok(ring) => {
                tracing::debug!("io_uring: {:?}", ring.features());
                let mut all = RINGS.lock().unwrap_or_else(PoisonError::into_inner);
                all.retain(|ring| ring.strong_count() > 0);
                all.push(Arc::downgrade(ring.watch()));
                RingState::There(ring)
            }
            Err(errno) => {
                tracing::warn!("no io_uring on this thread ({}); using worker threads", crate::error::reason(errno));
                RingState::Refused
            }
        };
        matches!(*state, RingState::There(_))
    }

    /// Keeps a reset, for which everything that waited was answered, until what has started is answered, too.
    fn await_reset(&self, io: BdevIo, device: Arc<Shared>) {
        let limit = std::time::Duration::from_secs(super::options::current().reset_timeout_s.into());
        self.resets.borrow_mut().push(Reset { io, device, deadline: clock::now() + clock::to_ticks(limit) });
        let mut timer = self.reset_timer.borrow_mut();
        if let (Some(bell), None) = (self.bell.clone(), timer.as_ref()) {
            let rings = move || {
                bell.ring();
                true
            };
            match Poller::register(c"lloop_reset", RESET_PERIOD_US, rings) {
                Ok(poller) => *timer = Some(poller),
                Err(errno) => tracing::error!("a reset goes unwatched: {}", crate::error::reason(errno)),
            }
        }
    }

    fn poll_resets(&self) -> bool {
        if self.resets.borrow().is_empty() {
            return false;
        }
        let now = clock::now();
        let done = |reset: &mut Reset| reset.device.in_flight() == 0 || now >= reset.deadline;
        let finished: Vec<Reset> = self.resets.borrow_mut().extract_if(.., done).collect();
        if self.resets.borrow().is_empty() {
            drop(self.reset_timer.borrow_mut().take());
        }
        let any = !finished.is_empty();
        for Reset { io, device, .. } in finished {
            let left = device.in_flight();
            if left > 0 {
                tracing::error!(
                    device = %device.name,
                    "a reset failed: {left} I/O have not come back in time; their memory stays theirs until they do"
                );
            }
            io.complete(if left == 0 { Completion::Success } else { Completion::Failed });
        }
        any
    }
}

/// The rings of all threads, for statistics.
static RINGS: Mutex<Vec<Weak<Watch>>> = Mutex::new(Vec::new());

/// When the oldest I/O of a volume that the kernel has by way of a ring was submitted.
pub fn oldest_in_rings(volume: &Volume<Token>) -> Option<Ticks> {
    let rings = RINGS.lock().unwrap_or_else(PoisonError::into_inner);
    rings.iter().filter_map(|ring| ring.upgrade()?.oldest(volume.id())).min()
}

/// How many rings there are, and how many I/O went by threads of the kernel's.
pub fn ring_counts() -> (usize, u64) {
    let rings = RINGS.lock().unwrap_or_else(PoisonError::into_inner);
    rings.iter().filter_map(Weak::upgrade).fold((0, 0), |(count, helped), ring| (count + 1, helped + ring.helped()))
}

/// A device on a thread.
pub struct Channel {
    group: PerThreadRef<Group>,
    volume: Arc<Volume<Token>>,
    /// The device's place in this thread's ring.
    slot: Cell<Slot>,
    counters: Arc<Counters>,
    device: Arc<Shared>,
}

/// A device's place in a ring.
#[derive(Clone, Copy)]
enum Slot {
    /// It uses none.
    None,
    /// It gets one when the ring is there.
    Wanted,
    /// It has this one.
    Has(u32),
}

impl Channel {
    /// The current thread's channel of a device.
    ///
    /// # Errors
    /// ENODEV when the device is on its way out, ENOMEM.
    pub fn open(device: &Arc<Shared>, uring: bool) -> Result<Self, i32> {
        let volume = device.volume().ok_or(libc::ENODEV)?;
        let group = GROUPS.get()?;
        if uring {
            group.inner.want_ring();
        }
        let slot = Cell::new(if uring { Slot::Wanted } else { Slot::None });
        Ok(Channel { group, volume, slot, counters: device.take_counters(), device: device.clone() })
    }

    fn token(&self, io: Parked) -> Token {
        Token { io, counters: self.counters.clone(), device: self.device.clone() }
    }

    /// Stages an I/O; the group's next poll hands it over.
    #[inline]
    pub fn submit(&self, op: Op, io: BdevIo, iovs: IoVecs) {
        let (offset, len) = (io.offset_bytes(), io.len_bytes());
        let fua = op == Op::Write && (io.is_fua() || self.device.writes_durably);
        self.counters.submitted();
        let inner = &self.group.inner;
        let number = inner.next_number.replace(inner.next_number.get() + 1);
        let mut request = io.park(number, |io| {
            Request::new(op, &self.volume, offset, len, iovs, self.token(io)).with_fua(fua).with_number(number)
        });
        // Everybody claims, wherever it goes then.
        let alone = request.claim();
        if let Some(slot) = self.slot()
            && alone
            && request.suits_a_ring()
            && let Some(ring) = inner.ring.borrow_mut().get()
            && ring.works()
        {
            ring.submit(request, slot);
        } else {
            inner.port.borrow_mut().stage(request);
        }
        inner.expect_poll();
    }

    /// The device's place in this thread's ring, as soon as there are both.
    #[inline]
    fn slot(&self) -> Option<u32> {
        match self.slot.get() {
            Slot::Has(slot) => Some(slot),
            Slot::None => None,
            Slot::Wanted => self.find_slot(),
        }
    }

    #[cold]
    fn find_slot(&self) -> Option<u32> {
        let inner = &self.group.inner;
        if !inner.has_ring() {
            if matches!(*inner.ring.borrow(), RingState::Refused) {
                self.slot.set(Slot::None);
            }
            return None;
        }
        let slot = inner.ring.borrow_mut().get()?.add_file(self.volume.target().file().as_fd());
        self.slot.set(slot.map_or(Slot::None, Slot::Has));
        slot
    }

    /// Answers another I/O of this thread, if it has not started, then `io`.
    pub fn abort(&self, io: BdevIo) {
        let number = io.abort_target();
        let request = io.park(0, |io| Request::abort(&self.volume, number, self.token(io)));
        if let Some(ring) = self.group.inner.ring.borrow_mut().get()
            && ring.cancel(|waiting| waiting.has_number(number))
        {
            ring.answer(request);
            return self.group.inner.expect_poll();
        }
        self.group.inner.port.borrow_mut().stage(request);
        self.group.inner.expect_poll();
    }

    /// Answers everything that has not started, then `io`, when the rest is answered: or as failed when that takes too long.
    pub fn reset(&self, io: BdevIo) {
        if let Some(ring) = self.group.inner.ring.borrow_mut().get() {
            ring.cancel(|waiting| waiting.is_of(&self.volume));
        }
        let request = io.park(0, |io| Request::new(Op::Reset, &self.volume, 0, 0, IoVecs::EMPTY, self.token(io)));
        self.group.inner.port.borrow_mut().stage(request);
        self.group.inner.expect_poll();
    }

    /// Counts and ends an I/O that is refused.
    pub fn refuse(&self, op: Op, io: BdevIo, errno: i32) {
        self.counters.submitted();
        self.counters.completed(op, 0, Err(errno), 0);
        io.complete(state::completion(op, Err(errno)));
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let (Slot::Has(slot), Some(ring)) = (self.slot.get(), self.group.inner.ring.borrow_mut().get()) {
            ring.remove_file(slot);
        }
        self.device.return_counters(&self.counters);
    }
}
