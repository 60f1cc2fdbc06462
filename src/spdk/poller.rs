//! Functions that a reactor calls again and again.

use futures::channel::oneshot;
use spdk_sys as sys;
use spdk_sys::compat::{self, Interrupt};
use std::ffi::{CStr, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::time::Duration;

/// Whether this target's reactors may sleep until an event descriptor wakes them, instead of polling (`--interrupt-mode`).
pub fn reactors_may_sleep() -> bool {
    compat::interrupt_mode_is_enabled()
}

/// Has iSCSI's pollers sleep like all others. SPDK's iSCSI knows no interrupts and would keep its thread busy for ever; it serves
/// nobody from then on.
pub fn put_iscsi_to_sleep() {
    extern "C" fn one(_: *mut c_void) {
        // SAFETY: SPDK calls this on each of its threads.
        unsafe { compat::let_pollers_sleep(c"iscsi_poll_group_poll") };
    }
    extern "C" fn done(_: *mut c_void) {}
    // SAFETY: on an SPDK thread; no context is used.
    unsafe { sys::spdk_for_each_thread(Some(one), std::ptr::null_mut(), Some(done)) };
}

/// Is done after `duration`, on the current SPDK thread.
///
/// # Errors
/// ENOMEM.
pub async fn sleep(duration: Duration) -> Result<(), i32> {
    let (sender, receiver) = oneshot::channel::<()>();
    let mut sender = Some(sender);
    let fire = move || sender.take().is_some_and(|sender| sender.send(()).is_ok());
    // (It is dropped outside of its own call: when this future goes on, which is later, or is dropped.)
    let _poller = Poller::register(c"lloop_sleep", duration.as_micros() as u64, fire)?;
    receiver.await.map_err(|_| libc::ENOMEM)
}

/// A registered poller. Dropping it, on the thread that registered it and not from within itself, ends it.
pub struct Poller {
    poller: *mut sys::spdk_poller,
    /// What the callback's context points to.
    callback: NonNull<Callback>,
    interrupt: Option<Interrupt>,
    /// What the context of changes of mode points to.
    mode_changed: Option<NonNull<ModeChanged>>,
}

type Callback = Box<dyn FnMut() -> bool>;
type ModeChanged = Box<dyn FnMut(bool)>;

extern "C" fn poll(context: *mut c_void) -> c_int {
    // SAFETY: `context` is the callback, which lives until the poller is unregistered; a thread polls one at a time, and calls
    // for descriptors in between, so this is the only reference.
    let callback = unsafe { &mut *context.cast::<Callback>() };
    callback().into()
}

impl Poller {
    /// Calls `callback` on the current SPDK thread every `period_us` microseconds, 0 for as often as possible. It says
    /// whether it had anything to do.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn register(name: &CStr, period_us: u64, callback: impl FnMut() -> bool + 'static) -> Result<Self, i32> {
        let callback = NonNull::from(Box::leak(Box::new(Box::new(callback) as Callback)));
        // SAFETY: on an SPDK thread (else null comes back); the name is copied; the callback lives as said above.
        let poller =
            unsafe { sys::spdk_poller_register_named(Some(poll), callback.as_ptr().cast(), period_us, name.as_ptr()) };
        let this = Poller { poller, callback, interrupt: None, mode_changed: None };
        if poller.is_null() { Err(libc::ENOMEM) } else { Ok(this) }
    }

    /// Where reactors may sleep: lets the thread sleep until `fd` is readable, and calls the callback then. `mode_changed` is told
    /// whenever the thread starts (true) or ends sleeping between events, at once if it does now. `fd` stays open as long as
    /// the poller lives.
    ///
    /// # Errors
    /// ENOMEM when SPDK cannot watch the descriptor.
    pub fn sleep_on(
        &mut self,
        name: &CStr,
        fd: BorrowedFd<'_>,
        mode_changed: impl FnMut(bool) + 'static,
    ) -> Result<(), i32> {
        extern "C" fn changed(_: *mut sys::spdk_poller, context: *mut c_void, sleeps: bool) {
            // SAFETY: `context` is the closure, which lives until the poller is unregistered; one call at a time, on its thread.
            let mode_changed = unsafe { &mut *context.cast::<ModeChanged>() };
            mode_changed(sleeps);
        }
        // SAFETY: on the poller's thread; the callback lives until both are unregistered, in `drop`.
        let interrupt =
            unsafe { Interrupt::register(fd.as_raw_fd(), poll, self.callback.as_ptr().cast(), name.as_ptr()) };
        self.interrupt = Some(interrupt.ok_or(libc::ENOMEM)?);
        let closure = NonNull::from(Box::leak(Box::new(Box::new(mode_changed) as ModeChanged)));
        self.mode_changed = Some(closure);
        // SAFETY: registered on this thread; the closure lives until `drop`.
        unsafe { compat::poller_register_interrupt(self.poller, changed, closure.as_ptr().cast()) };
        Ok(())
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        if let Some(interrupt) = self.interrupt.take() {
            // SAFETY: registered by this thread.
            unsafe { interrupt.unregister() };
        }
        if !self.poller.is_null() {
            // SAFETY: registered and not yet unregistered. SPDK does not call it any more after this.
            unsafe { sys::spdk_poller_unregister(&mut self.poller) };
        }
        // SAFETY: leaked in `register`; with the poller gone nobody else has it.
        drop(unsafe { Box::from_raw(self.callback.as_ptr()) });
        if let Some(closure) = self.mode_changed {
            // SAFETY: leaked in `sleep_on`; as above.
            drop(unsafe { Box::from_raw(closure.as_ptr()) });
        }
    }
}
