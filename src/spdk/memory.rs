//! Hearing of memory that goes away.

use spdk_sys as sys;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

/// Calls a function for every range of memory that SPDK (its environment, or a guest's end) stops using, before it is unmapped.
/// From whatever thread that happens on. Ends when dropped.
pub struct MemoryWatch(NonNull<sys::spdk_mem_map>);

type Forget = fn(start: usize, len_bytes: usize);

unsafe extern "C" fn notify(
    context: *mut c_void,
    _map: *mut sys::spdk_mem_map,
    action: sys::spdk_mem_map_notify_action::Type,
    start: *mut c_void,
    len_bytes: usize,
) -> c_int {
    if action == sys::spdk_mem_map_notify_action::SPDK_MEM_MAP_NOTIFY_UNREGISTER {
        // SAFETY: the context is the function that `new` passed.
        let forget = unsafe { std::mem::transmute::<*mut c_void, Forget>(context) };
        super::guard("forgetting memory", || forget(start as usize, len_bytes));
    }
    0
}

impl MemoryWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(forget: Forget) -> Result<Self, i32> {
        static OPS: sys::spdk_mem_map_ops = sys::spdk_mem_map_ops { notify_cb: Some(notify), are_contiguous: None };
        // SAFETY: the operations are a static, and the context is a function.
        let map = unsafe { sys::spdk_mem_map_alloc(0, &OPS, forget as *mut c_void) };
        NonNull::new(map).map(MemoryWatch).ok_or(libc::ENOMEM)
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        let mut map = self.0.as_ptr();
        // SAFETY: allocated by `new`, and freed once.
        unsafe { sys::spdk_mem_map_free(&mut map) };
    }
}
