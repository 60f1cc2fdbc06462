//! The differences between the SPDK of today (v24.09 and later) and v20.07, the last resort (`cfg(spdk_fallback)`), all of them:
//! each function here has one meaning on every version.

use crate::bindings::*;
use core::ffi::{c_char, c_int, c_void};
use core::mem::MaybeUninit;

/// The options of an application with SPDK's defaults.
pub fn app_opts_default() -> spdk_app_opts {
    let mut opts = MaybeUninit::<spdk_app_opts>::zeroed();
    // SAFETY: the function fills in a structure of the size that these bindings were generated for; all-zero bytes are a
    // valid value of every field that it leaves alone.
    unsafe {
        #[cfg(not(spdk_fallback))]
        spdk_app_opts_init(opts.as_mut_ptr(), size_of::<spdk_app_opts>());
        #[cfg(spdk_fallback)]
        spdk_app_opts_init(opts.as_mut_ptr());
        opts.assume_init()
    }
}

/// The status code with which an initiator is told of a failure.
///
/// v20.07's NVMe-oF target looks at the code alone, not at its type, when it answers a read (spdk_nvmf_tcp_req_complete and its like of
/// RDMA): with code 0 it sends the buffer as the data of a read that has succeeded. "Internal path error" is code 0 of its type; a
/// "controller pathing error" is the same to a host.
pub fn status_code(sct: c_int, sc: c_int) -> c_int {
    const PATH: c_int = 3;
    if cfg!(spdk_fallback) && (sct, sc) == (PATH, 0) { 0x60 } else { sc }
}

/// Sets the core that runs the application thread (`--main-core`; `--master-core` in v20.07).
pub fn app_opts_set_main_core(opts: &mut spdk_app_opts, core: c_int) {
    #[cfg(not(spdk_fallback))]
    {
        opts.main_core = core;
    }
    #[cfg(spdk_fallback)]
    {
        opts.master_core = core;
    }
}

/// Runs without hugepages; `false` when this SPDK cannot.
pub fn app_opts_set_no_huge(opts: &mut spdk_app_opts) -> bool {
    #[cfg(not(spdk_fallback))]
    {
        opts.no_huge = true;
        true
    }
    #[cfg(spdk_fallback)]
    {
        let _ = opts;
        false
    }
}

/// Lays cores on processors, in the words of DPDK's `--lcores`; `false` when this SPDK cannot. The string must stay where it is
/// until `spdk_app_start` returns.
pub fn app_opts_set_lcore_map(opts: &mut spdk_app_opts, map: *const c_char) -> bool {
    #[cfg(not(spdk_fallback))]
    {
        opts.lcore_map = map;
        opts.reactor_mask = core::ptr::null();
        true
    }
    #[cfg(spdk_fallback)]
    {
        let _ = (opts, map);
        false
    }
}

/// Lets other processes use the same cores; older versions always do.
pub fn app_opts_disable_cpumask_locks(opts: &mut spdk_app_opts) {
    #[cfg(not(spdk_fallback))]
    {
        opts.disable_cpumask_locks = true;
    }
    #[cfg(spdk_fallback)]
    let _ = opts;
}

/// Lets reactors sleep on event descriptors; `false` when this SPDK cannot.
pub fn app_opts_set_interrupt_mode(opts: &mut spdk_app_opts) -> bool {
    #[cfg(not(spdk_fallback))]
    {
        opts.interrupt_mode = true;
        true
    }
    #[cfg(spdk_fallback)]
    {
        let _ = opts;
        false
    }
}

/// Whether reactors of this application sleep on event descriptors, at least sometimes.
pub fn interrupt_mode_is_enabled() -> bool {
    #[cfg(not(spdk_fallback))]
    // SAFETY: reads a flag that is set before the application starts.
    unsafe {
        spdk_interrupt_mode_is_enabled()
    }
    #[cfg(spdk_fallback)]
    false
}

/// An event descriptor that a sleeping reactor looks at (`spdk_interrupt`); versions without have none.
pub struct Interrupt {
    #[cfg(not(spdk_fallback))]
    raw: *mut spdk_interrupt,
}

impl Interrupt {
    /// Has `call(context)` made whenever `fd` is readable while the current SPDK thread sleeps between events; `None` when that
    /// cannot be had.
    ///
    /// # Safety
    /// On an SPDK thread. Until this is unregistered `fd` stays open and `call` may be called with `context` on this thread.
    pub unsafe fn register(
        fd: c_int,
        call: unsafe extern "C" fn(*mut c_void) -> c_int,
        context: *mut c_void,
        name: *const c_char,
    ) -> Option<Self> {
        #[cfg(not(spdk_fallback))]
        {
            // SAFETY: as the caller promises; the name is copied.
            let raw = unsafe { spdk_interrupt_register(fd, Some(call), context, name) };
            (!raw.is_null()).then_some(Interrupt { raw })
        }
        #[cfg(spdk_fallback)]
        {
            let _ = (fd, call, context, name);
            None
        }
    }

    /// Ends it.
    ///
    /// # Safety
    /// On the thread that registered it.
    pub unsafe fn unregister(self) {
        #[cfg(not(spdk_fallback))]
        {
            let mut raw = self.raw;
            // SAFETY: registered, and used up with `self`.
            unsafe { spdk_interrupt_unregister(&mut raw) };
        }
    }
}

/// Tells SPDK that a poller need not be called while its thread sleeps, something else (an [`Interrupt`]) will wake it; and has
/// `changed(_, context, sleeps)` called whenever the thread starts or ends sleeping between events.
///
/// # Safety
/// `poller` is registered on the current SPDK thread; `changed` may be called with `context` until it is unregistered.
pub unsafe fn poller_register_interrupt(
    poller: *mut spdk_poller,
    changed: unsafe extern "C" fn(*mut spdk_poller, *mut c_void, bool),
    context: *mut c_void,
) {
    #[cfg(not(spdk_fallback))]
    // SAFETY: as the caller promises.
    unsafe {
        spdk_poller_register_interrupt(poller, Some(changed), context);
    }
    #[cfg(spdk_fallback)]
    let _ = (poller, changed, context);
}

#[cfg(not(spdk_fallback))]
unsafe extern "C" {
    // Exported, and declared in a header that is not installed (spdk_internal/thread.h).
    fn spdk_thread_get_first_active_poller(thread: *mut spdk_thread) -> *mut spdk_poller;
    fn spdk_thread_get_next_active_poller(previous: *mut spdk_poller) -> *mut spdk_poller;
    fn spdk_poller_get_name(poller: *mut spdk_poller) -> *const c_char;
}

/// Takes from the pollers called `name`, of the current SPDK thread, what keeps a sleeping thread calling them: from then on they
/// are called only while the thread polls. How many there were.
///
/// # Safety
/// On an SPDK thread.
pub unsafe fn let_pollers_sleep(name: &core::ffi::CStr) -> usize {
    let mut count = 0;
    #[cfg(not(spdk_fallback))]
    // SAFETY: the thread's own list of its pollers, walked on that thread; names are C strings that live as long as they.
    unsafe {
        let mut poller = spdk_thread_get_first_active_poller(spdk_get_thread());
        while !poller.is_null() {
            if core::ffi::CStr::from_ptr(spdk_poller_get_name(poller)) == name {
                spdk_poller_register_interrupt(poller, None, core::ptr::null_mut());
                count += 1;
            }
            poller = spdk_thread_get_next_active_poller(poller);
        }
    }
    #[cfg(spdk_fallback)]
    let _ = (name, &mut count);
    count
}

/// Restricts the PCI devices to those listed, or all but those listed.
///
/// `addresses` must stay where it is until `spdk_app_start` returns.
pub fn app_opts_set_pci_list(opts: &mut spdk_app_opts, addresses: &mut [spdk_pci_addr], allowed: bool) {
    opts.num_pci_addr = addresses.len();
    let list = addresses.as_mut_ptr();
    #[cfg(not(spdk_fallback))]
    if allowed {
        opts.pci_allowed = list;
    } else {
        opts.pci_blocked = list;
    }
    #[cfg(spdk_fallback)]
    if allowed {
        opts.pci_whitelist = list;
    } else {
        opts.pci_blacklist = list;
    }
}

/// Whether this SPDK was built with vhost.
pub const HAS_VHOST: bool = cfg!(spdk_vhost);

/// Sets the folder that the names of vhost controllers are sockets in; `false` when this SPDK was built without vhost, or finds
/// the path too long. Before the application starts.
///
/// # Safety
/// `dir` is a C string, and no other thread uses SPDK.
// Inlined where it is called: SPDK's programs without vhost link this library, too.
#[inline]
pub unsafe fn vhost_set_socket_dir(dir: *const c_char) -> bool {
    #[cfg(spdk_vhost)]
    // SAFETY: as the caller promises; the string is copied.
    unsafe {
        spdk_vhost_set_socket_path(dir) == 0
    }
    #[cfg(not(spdk_vhost))]
    {
        let _ = dir;
        false
    }
}

/// Makes the bdev layer split reads and writes at `optimal_io_boundary` (a flag; a bit field in newer versions).
pub fn bdev_set_split_on_optimal_io_boundary(bdev: &mut spdk_bdev, split: bool) {
    #[cfg(not(spdk_fallback))]
    bdev.__bindgen_anon_1.set_split_on_optimal_io_boundary(split.into());
    #[cfg(spdk_fallback)]
    {
        bdev.split_on_optimal_io_boundary = split;
    }
}

/// Sets the physical block size in bytes, where SPDK has one to set.
pub fn bdev_set_phys_blocklen(bdev: &mut spdk_bdev, len_bytes: u32) {
    #[cfg(not(spdk_fallback))]
    {
        bdev.phys_blocklen = len_bytes;
    }
    #[cfg(spdk_fallback)]
    {
        let _ = (bdev, len_bytes);
    }
}

/// Tells the bdev layer that the asynchronous end of a module is done.
///
/// # Safety
/// Only in answer to `module_fini` of a module with `async_fini` set, once, on an SPDK thread.
pub unsafe fn bdev_module_fini_done() {
    // SAFETY: as the caller promises.
    unsafe {
        #[cfg(not(spdk_fallback))]
        spdk_bdev_module_fini_done();
        #[cfg(spdk_fallback)]
        spdk_bdev_module_finish_done();
    }
}

/// Whether anybody has the bdev open.
///
/// # Safety
/// `bdev` is registered, and the caller is on the thread that opens and closes bdevs (the application thread).
pub unsafe fn bdev_is_open(bdev: *const spdk_bdev) -> bool {
    // SAFETY: registered, so its list of descriptors is initialised.
    unsafe { !(*bdev).internal.open_descs.tqh_first.is_null() }
}

/// The memory of an I/O channel behind SPDK's own part of it (`spdk_io_channel_get_ctx`, an inline function).
///
/// # Safety
/// `channel` is an I/O channel.
#[inline]
pub unsafe fn io_channel_ctx(channel: *mut spdk_io_channel) -> *mut core::ffi::c_void {
    #[cfg(not(spdk_fallback))]
    const OWN_BYTES: usize = SPDK_IO_CHANNEL_STRUCT_SIZE as usize;
    #[cfg(spdk_fallback)]
    const OWN_BYTES: usize = size_of::<spdk_io_channel>();
    // SAFETY: SPDK allocates the context with the channel, behind that many bytes.
    unsafe { channel.byte_add(OWN_BYTES).cast() }
}

/// The most alignment that a bdev may ask for: with more, the bdev layer's own buffers, which it hands to readers that bring none
/// (iSCSI), are too small for what it lets them read (64 KiB and 512 bytes in v20.07).
pub const MAX_BUFFER_ALIGN_BYTES: u32 = if cfg!(spdk_fallback) { 512 } else { 4096 };

/// The arguments of `spdk_log_cb` after the format, as vsnprintf takes them.
#[cfg(target_arch = "x86_64")]
pub type VaList = *mut __va_list_tag;
/// The arguments of `spdk_log_cb` after the format, as vsnprintf takes them.
#[cfg(not(target_arch = "x86_64"))]
pub type VaList = va_list;

/// Formats what SPDK's log hands over into `buffer`; the length it would have had, or negative on an error.
///
/// # Safety
/// `format` is a C string and `args` are its arguments, as SPDK passes both to a log callback.
pub unsafe fn format_log(buffer: &mut [u8], format: *const c_char, args: VaList) -> c_int {
    // SAFETY: the buffer's length is given; the rest is the caller's promise.
    unsafe { vsnprintf(buffer.as_mut_ptr().cast(), buffer.len() as _, format, args) }
}

/// Whether the FUA bit of a write reaches the module. Without, no write may be answered before it is on stable storage.
pub const HAS_FUA: bool = cfg!(not(spdk_fallback));

/// Whether a write is to be on stable storage when it is answered (NVMe's FUA: bit 30 of command dword 12). Always false where
/// [`HAS_FUA`] is.
///
/// # Safety
/// `io` is a live write.
#[inline]
pub unsafe fn bdev_io_is_fua(io: &spdk_bdev_io) -> bool {
    #[cfg(not(spdk_fallback))]
    // SAFETY: a write has this member of the union, and its bytes are valid for a number.
    unsafe {
        io.u.bdev.nvme_cdw12.raw & (1 << 30) != 0
    }
    #[cfg(spdk_fallback)]
    {
        let _ = io;
        false
    }
}

/// Whether an RPC may be answered after its server has ended: the answer is dropped then. v20.07 uses the freed connection.
pub const ANSWERS_OUTLIVE_THE_SERVER: bool = cfg!(not(spdk_fallback));

/// A log flag that is never set, for an SPDK that mentions it and leaves it out (see `build.rs`).
#[cfg(spdk_log_reservation)]
#[unsafe(no_mangle)]
#[used]
static mut SPDK_LOG_reservation: spdk_log_flag = spdk_log_flag {
    // SAFETY: zeroes are a valid flag: off, without a name, in no list.
    ..unsafe { MaybeUninit::zeroed().assume_init() }
};
