//! What a reactor thread has of lloop: one port to the workers for all devices, and a channel for each device it uses.

use super::device::Shared;
use super::state;
use crate::engine::stats::Counters;
use crate::engine::{Lane, Op, Port, Request};
use crate::os::clock::{self, Ticks};
use crate::os::iov::IoVecs;
use crate::spdk::bdev_io::{BdevIo, Completion, Parked};
use crate::spdk::io_channel::{PerThread, PerThreadKind, PerThreadRef};
use crate::spdk::poller::Poller;
use std::cell::RefCell;
use std::ffi::CStr;
use std::rc::Rc;
use std::sync::Arc;

/// What comes back with an answer.
pub struct Token {
    io: Parked,
    counters: Arc<Counters>,
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
    resets: RefCell<Vec<Reset>>,
}

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
        let inner = Rc::new(Inner { port: RefCell::new(Port::new(&pool)), resets: RefCell::default() });
        let polled = inner.clone();
        Ok(Group { _poller: Poller::register(c"lloop", 0, move || polled.poll())?, inner })
    }
}

impl Inner {
    /// Completes what is answered, then hands over what was submitted since: one doorbell a poll.
    fn poll(&self) -> bool {
        // The borrow ends before the first completion, whose owner may submit again at once.
        let mut answers = self.port.borrow_mut().reap();
        let busy = !answers.is_empty();
        if busy {
            let now = clock::now();
            while let Some(request) = answers.pop_front() {
                let answer = Request::answer(request);
                let took = now.saturating_sub(answer.submitted);
                answer.token.counters.completed(answer.op, answer.len_bytes, answer.result, took);
                answer.token.io.resume().complete(state::completion(answer.op, answer.result));
            }
        }
        self.port.borrow_mut().ring();
        busy | self.poll_resets()
    }

    fn poll_resets(&self) -> bool {
        if self.resets.borrow().is_empty() {
            return false;
        }
        let now = clock::now();
        let done = |reset: &mut Reset| reset.device.in_flight() == 0 || now >= reset.deadline;
        let finished: Vec<Reset> = self.resets.borrow_mut().extract_if(.., done).collect();
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

/// A device on a thread.
pub struct Channel {
    group: PerThreadRef<Group>,
    lane: Arc<Lane<Token>>,
    counters: Arc<Counters>,
    device: Arc<Shared>,
}

impl Channel {
    /// The current thread's channel of a device.
    ///
    /// # Errors
    /// ENODEV when the device is on its way out, ENOMEM.
    pub fn open(device: &Arc<Shared>) -> Result<Self, i32> {
        let lane = device.lane().ok_or(libc::ENODEV)?;
        Ok(Channel { group: GROUPS.get()?, lane, counters: device.take_counters(), device: device.clone() })
    }

    /// Stages an I/O; the group's next poll hands it over.
    #[inline]
    pub fn submit(&self, op: Op, io: BdevIo, iovs: IoVecs) {
        let (offset, len) = (io.offset_bytes(), io.len_bytes());
        self.counters.submitted();
        let request = io
            .park(|io| Request::new(op, &self.lane, offset, len, iovs, Token { io, counters: self.counters.clone() }));
        self.group.inner.port.borrow_mut().stage(request);
    }

    /// Counts and ends an I/O that is refused.
    pub fn refuse(&self, op: Op, io: BdevIo, errno: i32) {
        self.counters.submitted();
        self.counters.completed(op, 0, Err(errno), 0);
        io.complete(state::completion(op, Err(errno)));
    }

    /// Ends `io` when the device has nothing in flight, or as failed when that takes too long.
    pub fn reset(&self, io: BdevIo) {
        let limit = std::time::Duration::from_secs(super::options::current().reset_timeout_s.into());
        let deadline = clock::now() + clock::to_ticks(limit);
        self.group.inner.resets.borrow_mut().push(Reset { io, device: self.device.clone(), deadline });
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.device.return_counters(&self.counters);
    }
}
