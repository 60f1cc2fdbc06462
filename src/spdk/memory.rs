//! Hearing of memory that comes and goes.

use spdk_sys as sys;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

/// Calls a function for every range of memory that SPDK (its environment, or a guest) begins to use, after it was mapped, with `true`;
/// and for every one that it stops using, before it is unmapped, with `false`. From whatever thread that happens on. Ends when
/// dropped.
pub struct MemoryWatch(NonNull<sys::spdk_mem_map>);

type Changes = fn(start: usize, len_bytes: usize, is_mapped: bool);

unsafe extern "C" fn notify(
    context: *mut c_void,
    _map: *mut sys::spdk_mem_map,
    action: sys::spdk_mem_map_notify_action::Type,
    start: *mut c_void,
    len_bytes: usize,
) -> c_int {
    let is_mapped = action != sys::spdk_mem_map_notify_action::SPDK_MEM_MAP_NOTIFY_UNREGISTER;
    // SAFETY: the context is the function that `new` passed.
    let changes = unsafe { std::mem::transmute::<*mut c_void, Changes>(context) };
    super::guard("watching memory", || changes(start as usize, len_bytes, is_mapped));
    0
}

impl MemoryWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(changes: Changes) -> Result<Self, i32> {
        static OPS: sys::spdk_mem_map_ops = sys::spdk_mem_map_ops { notify_cb: Some(notify), are_contiguous: None };
        // SAFETY: the operations are a static, and the context is a function.
        let map = unsafe { sys::spdk_mem_map_alloc(0, &OPS, changes as *mut c_void) };
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
