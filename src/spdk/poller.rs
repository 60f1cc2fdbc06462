//! Functions that a reactor calls again and again.

use spdk_sys as sys;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;

/// A registered poller. Dropping it, on the thread that registered it and not from within itself, ends it.
pub struct Poller {
    poller: *mut sys::spdk_poller,
    /// What the callback's context points to.
    callback: NonNull<Callback>,
}

type Callback = Box<dyn FnMut() -> bool>;

impl Poller {
    /// Calls `callback` on the current SPDK thread every `period_us` microseconds, 0 for as often as possible. It says
    /// whether it had anything to do.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn register(name: &CStr, period_us: u64, callback: impl FnMut() -> bool + 'static) -> Result<Self, i32> {
        extern "C" fn poll(context: *mut c_void) -> c_int {
            // SAFETY: `context` is the callback, which lives until the poller is unregistered; a thread polls one at a time,
            // so this is the only reference.
            let callback = unsafe { &mut *context.cast::<Callback>() };
            callback().into()
        }
        let callback = NonNull::from(Box::leak(Box::new(Box::new(callback) as Callback)));
        // SAFETY: on an SPDK thread (else null comes back); the name is copied; the callback lives as said above.
        let poller =
            unsafe { sys::spdk_poller_register_named(Some(poll), callback.as_ptr().cast(), period_us, name.as_ptr()) };
        let this = Poller { poller, callback };
        if poller.is_null() { Err(libc::ENOMEM) } else { Ok(this) }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        if !self.poller.is_null() {
            // SAFETY: registered and not yet unregistered. SPDK does not call it any more after this.
            unsafe { sys::spdk_poller_unregister(&mut self.poller) };
        }
        // SAFETY: leaked in `register`; with the poller gone nobody else has it.
        drop(unsafe { Box::from_raw(self.callback.as_ptr()) });
    }
}
