//! SPDK threads: messages to them, and futures that run on them.
//!
//! For the control plane only. A message costs an allocation and some hundred nanoseconds, and SPDK ends the process when its
//! message pool is exhausted; no I/O sends any.

use super::poller::Poller;
use spdk_sys as sys;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::future::Future;
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// How often the poller of a waiting future is called; it does nothing.
const PENDING_PERIOD_US: u64 = 1_000_000;

/// Set when the application's threads are about to end: a message to one that is gone would end the process.
static CLOSED: Mutex<bool> = Mutex::new(false);

/// From here on messages from other threads are dropped, and futures are not polled any more.
pub fn close() {
    *CLOSED.lock().unwrap_or_else(PoisonError::into_inner) = true;
}

/// An SPDK thread. It lives until the application ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Thread(NonNull<sys::spdk_thread>);

// SAFETY: only used as an address to send messages to, which SPDK allows from everywhere, and to compare.
unsafe impl Send for Thread {}
// SAFETY: as above.
unsafe impl Sync for Thread {}

impl Thread {
    /// The SPDK thread that the caller runs on, if it does.
    pub fn current() -> Option<Thread> {
        // SAFETY: reads a thread-local variable.
        NonNull::new(unsafe { sys::spdk_get_thread() }).map(Thread)
    }

    /// Whether the caller runs on this thread.
    pub fn is_current(&self) -> bool {
        Self::current() == Some(*self)
    }

    /// Runs `callback` on this thread soon. False when the application is ending; it is dropped then.
    pub fn send(&self, callback: impl FnOnce() + Send + 'static) -> bool {
        let boxed: Box<Box<dyn FnOnce() + Send>> = Box::new(Box::new(callback));
        let context = Box::into_raw(boxed);
        extern "C" fn run(context: *mut c_void) {
            // SAFETY: made by `Box::into_raw` below and delivered once.
            let callback = unsafe { Box::from_raw(context.cast::<Box<dyn FnOnce() + Send>>()) };
            super::guard("a message", callback);
        }
        // SAFETY: `run` takes what `context` points to.
        let sent = unsafe { self.send_raw(run, context.cast()) };
        if !sent {
            // SAFETY: not sent, so still ours.
            drop(unsafe { Box::from_raw(context) });
        }
        sent
    }

    /// # Safety
    /// `callback` may be called with `context` on this thread, once. It is not when the result is false.
    unsafe fn send_raw(&self, callback: extern "C" fn(*mut c_void), context: *mut c_void) -> bool {
        let closed = CLOSED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*closed {
            // SAFETY: the thread exists, since threads end after `close`; the rest is the caller's promise.
            unsafe { sys::spdk_thread_send_msg(self.0.as_ptr(), Some(callback), context) };
        }
        !*closed
    }
}

/// A value that belongs to one SPDK thread, in a static.
///
/// # Invariants
/// The value is touched on the thread that it was put in by only (or, before and after, not at all).
pub struct Owned<V>(UnsafeCell<Option<(Thread, V)>>, AtomicBool);

// SAFETY: `with` and `take` check the thread before they touch the value; `put` is the first to touch it, which the flag
// guards.
unsafe impl<V> Sync for Owned<V> {}

impl<V> Owned<V> {
    /// Nothing in it yet.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Owned(UnsafeCell::new(None), AtomicBool::new(false))
    }

    /// Puts a value in; it belongs to the current SPDK thread from here on. False (and the value dropped) when there is one.
    pub fn put(&self, value: V) -> bool {
        let Some(home) = Thread::current() else { return false };
        if self.1.swap(true, Ordering::AcqRel) {
            return false;
        }
        // SAFETY: the flag was off, so nobody touches it but us.
        unsafe { *self.0.get() = Some((home, value)) };
        true
    }

    /// Uses the value; `None` when there is none, or on another thread.
    pub fn with<R>(&self, f: impl FnOnce(&V) -> R) -> Option<R> {
        if !self.1.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: the flag is on, so the home is written and not changed but by `take`, at home.
        let (home, value) = unsafe { (*self.0.get()).as_ref()? };
        home.is_current().then(|| f(value))
    }

    /// Takes the value out, on its thread and not from within `with`; nothing can be put in after that.
    pub fn take(&self) -> Option<V> {
        self.with(|_| ())?;
        // SAFETY: at home, as `with` has just said.
        unsafe { (*self.0.get()).take() }.map(|(_, value)| value)
    }
}

/// A future that is polled on its SPDK thread only, so it need not be Send.
struct Task {
    future: UnsafeCell<Option<Pin<Box<dyn Future<Output = ()>>>>>,
    /// While the future waits for another thread, its own must not look idle: a program without reactors (SPDK's fio plugin)
    /// ends a thread that does, though modules have not finished.
    busy: UnsafeCell<Option<Poller>>,
    home: Thread,
    queued: AtomicBool,
}

// SAFETY: `future` and `busy` are touched on the home thread only (see `run` and `Drop`); the rest is Sync.
unsafe impl Send for Task {}
// SAFETY: as above.
unsafe impl Sync for Task {}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let home = self.home;
        let context = Arc::into_raw(self);
        extern "C" fn run(context: *mut c_void) {
            // SAFETY: made by `Arc::into_raw` below and delivered once, on the home thread.
            Task::run(&unsafe { Arc::from_raw(context.cast::<Task>()) });
        }
        // SAFETY: `run` takes what `context` points to.
        if !unsafe { home.send_raw(run, context.cast_mut().cast()) } {
            // SAFETY: not sent, so still ours.
            drop(unsafe { Arc::from_raw(context) });
        }
    }
}

impl Task {
    /// Polls once. On the home thread, and never from within itself: both hold because only messages to home and `spawn`
    /// call it.
    fn run(self: &Arc<Self>) {
        self.queued.store(false, Ordering::Release);
        // SAFETY: on the home thread, the only one that touches it; SPDK runs one callback at a time there.
        let slot = unsafe { &mut *self.future.get() };
        let Some(future) = slot else { return };
        let waker = Waker::from(self.clone());
        let poll = super::guard("a task", || future.as_mut().poll(&mut Context::from_waker(&waker)));
        // SAFETY: as above.
        let busy = unsafe { &mut *self.busy.get() };
        if !matches!(poll, Some(Poll::Pending)) {
            *slot = None;
            *busy = None;
        } else if busy.is_none() {
            // (Without memory for it everything but such a program goes on as well.)
            *busy = Poller::register(c"lloop_pending", PENDING_PERIOD_US, || false).ok();
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // A future that was not finished when the application ended may hold what belongs to the home thread: keep off it.
        if !self.home.is_current() {
            std::mem::forget(self.future.get_mut().take());
            std::mem::forget(self.busy.get_mut().take());
        }
    }
}

/// Runs `future` on the current SPDK thread: now up to its first wait, and then whenever it is woken.
///
/// # Panics
/// When the caller is not on an SPDK thread.
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    let home = Thread::current().expect("spawn is called on an SPDK thread");
    let task = Arc::new(Task {
        future: UnsafeCell::new(Some(Box::pin(future))),
        busy: UnsafeCell::default(),
        home,
        queued: AtomicBool::new(true),
    });
    task.run();
}

/// The processors that reactors run on.
pub fn reactor_cpus() -> Vec<u32> {
    // SAFETY: reads the environment's list of cores; the end is marked by UINT32_MAX.
    let first = unsafe { sys::spdk_env_get_first_core() };
    // SAFETY: as above, given a core of that list.
    std::iter::successors(Some(first), |&core| Some(unsafe { sys::spdk_env_get_next_core(core) }))
        .take_while(|&core| core != u32::MAX)
        .collect()
}
