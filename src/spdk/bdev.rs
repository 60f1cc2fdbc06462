//! Block devices and the module that makes them: trait, typed trampolines, constant tables.

use super::bdev_io::{BdevIo, CONTEXT_BYTES, IoType};
use super::io_channel::{self, MakeChannel};
use super::thread::{self, Thread};
use super::{guard, json};
use crate::error::{Error, Result, reason};
use async_trait::async_trait;
use futures::channel::oneshot;
use serde_json::Value;
use spdk_sys as sys;
use spdk_sys::compat;
use std::cell::{Cell, UnsafeCell};
use std::ffi::{CStr, CString, c_int, c_void};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

/// A block device.
#[async_trait(?Send)]
pub trait Bdev: Send + Sync + 'static {
    /// What a thread keeps to submit through.
    type Channel: 'static;

    /// Whether it can do that.
    fn supports(&self, io_type: IoType) -> bool;

    /// Makes the current thread's channel.
    ///
    /// # Errors
    /// An errno; nobody can submit from this thread then.
    fn open_channel(&self) -> Result<Self::Channel, i32>;

    /// Starts an I/O, on the channel's thread. Must not block, and must in the end complete it there.
    fn submit(&self, channel: &Self::Channel, io: BdevIo);

    /// What `bdev_get_bdevs` shows as `driver_specific.NAME`.
    fn info(&self) -> (&'static str, Value);

    /// The RPC that makes this device again: method and parameters.
    fn config(&self) -> Option<(&'static str, Value)>;

    /// Called when nobody has it open and its last channel is gone: the place to release what is behind it. The device
    /// disappears when this is done.
    async fn closed(&self);
}

/// What the bdev layer is told about a device.
#[derive(Debug, Clone)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its kind, for people.
    pub product: &'static CStr,
    /// Size of a logical block in bytes.
    pub block_bytes: u32,
    /// Size of a physical block in bytes.
    pub physical_block_bytes: u32,
    /// Capacity in blocks.
    pub num_blocks: u64,
    /// I/O does best from memory at multiples of this many bytes, a power of two; other memory works as well.
    pub memory_align_bytes: u32,
    /// I/O does best within multiples of this many blocks; 0 for no preference.
    pub optimal_io_boundary_blocks: u32,
    /// Whether the bdev layer splits there.
    pub split_at_boundary: bool,
    /// Completed writes may be lost before a flush.
    pub write_cache: bool,
    /// Its identity.
    pub uuid: uuid::Uuid,
}

/// What a registered device lies in. It is the I/O device of its channels as well: its address is the key.
///
/// Lives from `register` to the end of `destruct`'s work.
struct Registration<D> {
    /// SPDK writes to it while we hold references to the whole.
    bdev: UnsafeCell<sys::spdk_bdev>,
    device: Arc<D>,
    home: Thread,
    handle: Rc<HandleState>,
    _strings: (CString, &'static CStr),
}

struct HandleState {
    /// Null when the bdev is gone.
    bdev: Cell<*mut sys::spdk_bdev>,
    unregistering: Cell<bool>,
}

/// A registered device, as the one who registered it sees it. Stays on the application's thread.
#[derive(Clone)]
pub struct BdevHandle(Rc<HandleState>);

impl<D: Bdev> MakeChannel for Registration<D> {
    type Channel = D::Channel;
    fn make(&self) -> Result<D::Channel, i32> {
        self.device.open_channel()
    }
}

/// The functions of a device of type `D`.
struct Table<D>(PhantomData<D>);

impl<D: Bdev> Table<D> {
    const TABLE: sys::spdk_bdev_fn_table = sys::spdk_bdev_fn_table {
        destruct: Some(destruct::<D>),
        submit_request: Some(submit::<D>),
        io_type_supported: Some(supports::<D>),
        get_io_channel: Some(get_io_channel),
        dump_info_json: Some(dump_info::<D>),
        write_config_json: Some(write_config::<D>),
        // SAFETY: zeroes are "not provided" for all others, whatever this version has.
        ..unsafe { MaybeUninit::zeroed().assume_init() }
    };
}

/// # Safety
/// `context` is the `ctxt` of a bdev that was registered with this `D`.
unsafe fn registration<'a, D>(context: *mut c_void) -> &'a Registration<D> {
    // SAFETY: as the caller promises; the registration outlives every callback but the last.
    unsafe { &*context.cast::<Registration<D>>() }
}

unsafe extern "C" fn submit<D: Bdev>(channel: *mut sys::spdk_io_channel, io: *mut sys::spdk_bdev_io) {
    // SAFETY: SPDK submits live I/O of a registered bdev.
    unsafe { BdevIo::begin(io) };
    // SAFETY: as above.
    let raw = unsafe { &*io };
    if u32::from(raw.type_) == sys::spdk_bdev_io_type::SPDK_BDEV_IO_TYPE_READ {
        // SAFETY: a read has this member.
        let (range, block) = unsafe { (&raw.u.bdev, (*raw.bdev).blocklen) };
        // SAFETY: where there is an array it has an element.
        if range.iovs.is_null() || unsafe { (*range.iovs).iov_base.is_null() } {
            // The reader leaves the memory to us. (Larger than the pool's buffers, it fails there: docs/internals/spdk.md#alignment.)
            // SAFETY: a read that was just submitted.
            unsafe { sys::spdk_bdev_io_get_buf(io, Some(got_buffer::<D>), range.num_blocks * u64::from(block)) };
            return;
        }
    }
    // SAFETY: just submitted, on the channel's thread.
    unsafe { submit_ready::<D>(channel, io) };
}

unsafe extern "C" fn got_buffer<D: Bdev>(
    channel: *mut sys::spdk_io_channel,
    io: *mut sys::spdk_bdev_io,
    success: bool,
) {
    // SAFETY: called for the I/O that the buffer was asked for, on its thread.
    unsafe {
        if success {
            submit_ready::<D>(channel, io);
        } else {
            BdevIo::from_raw(io).complete(super::bdev_io::Completion::Failed);
        }
    }
}

/// # Safety
/// `io` was submitted on `channel`, to a bdev of type `D`, and has its memory.
unsafe fn submit_ready<D: Bdev>(channel: *mut sys::spdk_io_channel, io: *mut sys::spdk_bdev_io) {
    // SAFETY: as the caller promises.
    unsafe {
        let registration = registration::<D>((*(*io).bdev).ctxt);
        registration.device.submit(io_channel::state::<D::Channel>(channel), BdevIo::from_raw(io));
    }
}

unsafe extern "C" fn supports<D: Bdev>(context: *mut c_void, io_type: sys::spdk_bdev_io_type::Type) -> bool {
    // SAFETY: SPDK passes the bdev's context.
    let registration = unsafe { registration::<D>(context) };
    IoType::from_raw(io_type).is_some_and(|io_type| registration.device.supports(io_type))
}

unsafe extern "C" fn get_io_channel(context: *mut c_void) -> *mut sys::spdk_io_channel {
    // SAFETY: the context is what was registered as the I/O device.
    unsafe { sys::spdk_get_io_channel(context) }
}

unsafe extern "C" fn dump_info<D: Bdev>(context: *mut c_void, writer: *mut sys::spdk_json_write_ctx) -> c_int {
    // SAFETY: SPDK passes the bdev's context.
    let registration = unsafe { registration::<D>(context) };
    if let Some((name, value)) = guard("dump_info_json", || registration.device.info()) {
        // SAFETY: the writer is inside the object `driver_specific`.
        unsafe { json::write_named(writer, name, &value) };
    }
    0
}

unsafe extern "C" fn write_config<D: Bdev>(bdev: *mut sys::spdk_bdev, writer: *mut sys::spdk_json_write_ctx) {
    // SAFETY: SPDK passes a registered bdev of this type.
    let registration = unsafe { registration::<D>((*bdev).ctxt) };
    if let Some(Some((method, params))) = guard("write_config_json", || registration.device.config()) {
        // SAFETY: the writer is inside the subsystem's array of calls.
        unsafe { json::write(writer, &serde_json::json!({ "method": method, "params": params })) };
    }
}

/// The bdev layer is done with the bdev. May come on the thread of whoever closed it last; the rest happens at home.
unsafe extern "C" fn destruct<D: Bdev>(context: *mut c_void) -> c_int {
    struct Context(*mut c_void);
    // SAFETY: an address, sent to the thread that owns what it points to.
    unsafe impl Send for Context {}
    impl Context {
        fn get(&self) -> *mut c_void {
            self.0
        }
    }
    // SAFETY: SPDK passes the bdev's context.
    let home = unsafe { registration::<D>(context) }.home;
    let context = Context(context);
    let end = move || {
        // SAFETY: still registered as an I/O device; its channels go as their users let go of them.
        unsafe { io_channel::unregister(context.get(), channels_gone::<D>) };
    };
    if home.is_current() {
        end();
    } else if !home.send(end) {
        return 0;
    }
    // "In progress": spdk_bdev_destruct_done follows.
    1
}

extern "C" fn channels_gone<D: Bdev>(context: *mut c_void) {
    // SAFETY: at home, where it is owned; nobody uses it any more but the task below.
    let device = unsafe { registration::<D>(context) }.device.clone();
    thread::spawn(async move {
        device.closed().await;
        // SAFETY: SPDK is told that the bdev is gone, and it is freed after that, as the last use of the allocation.
        unsafe {
            let registration = registration::<D>(context);
            registration.handle.bdev.set(std::ptr::null_mut());
            sys::spdk_bdev_destruct_done(registration.bdev.get(), 0);
            drop(Box::from_raw(context.cast::<Registration<D>>()));
        }
    });
}

/// Registers `device` with the bdev layer as a bdev of `module`. On the application's thread.
///
/// # Errors
/// EEXIST when the name (or, in newer SPDKs, the UUID) is taken; the device is dropped then.
pub fn register<D: Bdev, M: Module>(
    module: &'static ModuleEntry<M>,
    device: Arc<D>,
    description: &Description,
) -> Result<BdevHandle> {
    let invalid = |_| Error::new(libc::EINVAL, format!("{:?} is no name: it holds a NUL character", description.name));
    let name = CString::new(description.name.as_str()).map_err(invalid)?;
    let home = Thread::current().ok_or_else(|| Error::new(libc::EINVAL, "not on an SPDK thread"))?;
    // SAFETY: zeroes are the defaults of every field of a bdev.
    let mut bdev: sys::spdk_bdev = unsafe { std::mem::zeroed() };
    bdev.name = name.as_ptr().cast_mut();
    bdev.product_name = description.product.as_ptr().cast_mut();
    bdev.write_cache = description.write_cache.into();
    bdev.blocklen = description.block_bytes;
    bdev.blockcnt = description.num_blocks;
    // Alignment 0 while it is registered: with more the bdev layer would limit I/O to what it could copy (64 KiB in v20.07), and
    // we take any memory.
    bdev.required_alignment = 0;
    bdev.optimal_io_boundary = description.optimal_io_boundary_blocks;
    compat::bdev_set_split_on_optimal_io_boundary(&mut bdev, description.split_at_boundary);
    compat::bdev_set_phys_blocklen(&mut bdev, description.physical_block_bytes);
    // SAFETY: both are 16 bytes for which any value is valid.
    bdev.uuid = unsafe { std::mem::transmute_copy(description.uuid.as_bytes()) };
    bdev.module = module.0.get();
    bdev.fn_table = &Table::<D>::TABLE;

    let handle = Rc::new(HandleState { bdev: Cell::new(std::ptr::null_mut()), unregistering: Cell::new(false) });
    let strings = (name, description.product);
    let registration = Box::into_raw(Box::new(Registration {
        bdev: bdev.into(),
        device,
        home,
        handle: handle.clone(),
        _strings: strings,
    }));
    // SAFETY: the registration stays where it is until `channels_gone` frees it; its context is itself. When the bdev layer
    // refuses, the I/O device (which has no channel yet) is unregistered first.
    unsafe {
        let bdev = UnsafeCell::raw_get(&raw const (*registration).bdev);
        (*bdev).ctxt = registration.cast();
        io_channel::register(registration, &(*registration)._strings.0);
        match sys::spdk_bdev_register(bdev) {
            0 => {
                // Now it is only advice: whoever allocates buffers for this bdev aligns them, and nothing has to be copied.
                let align_bytes = description.memory_align_bytes.clamp(1, compat::MAX_BUFFER_ALIGN_BYTES);
                (*bdev).required_alignment = align_bytes.ilog2() as u8;
                handle.bdev.set(bdev);
            }
            rc => {
                extern "C" fn free<D>(registration: *mut c_void) {
                    // SAFETY: made above, and this is its only other owner's end.
                    drop(unsafe { Box::from_raw(registration.cast::<Registration<D>>()) });
                }
                io_channel::unregister(registration.cast(), free::<D>);
                return Err(Error::new(
                    -rc,
                    format!(
                        "cannot register the device {}: {} (its name or UUID is taken?)",
                        description.name,
                        reason(-rc)
                    ),
                ));
            }
        }
    }
    Ok(BdevHandle(handle))
}

/// Whether a bdev of that name exists, of whatever module. On the application's thread.
pub fn exists(name: &str) -> bool {
    // SAFETY: a C string.
    CString::new(name).is_ok_and(|name| !unsafe { sys::spdk_bdev_get_by_name(name.as_ptr()) }.is_null())
}

impl BdevHandle {
    fn bdev(&self) -> Result<NonNull<sys::spdk_bdev>> {
        NonNull::new(self.0.bdev.get()).ok_or_else(|| Error::new(libc::ENODEV, "the device is gone"))
    }

    /// Whether anybody has it open.
    pub fn is_open(&self) -> bool {
        // SAFETY: registered while the pointer is there; on the application's thread (not Send).
        self.bdev().is_ok_and(|bdev| unsafe { compat::bdev_is_open(bdev.as_ptr()) })
    }

    /// Whether it is on its way out.
    pub fn is_unregistering(&self) -> bool {
        self.0.unregistering.get()
    }

    /// Takes the device away: everybody who has it open is told to close it, and the result is there when the last has and
    /// [`Bdev::closed`] is done.
    ///
    /// # Errors
    /// EBUSY when it is on its way out already; ENODEV when it is gone.
    pub async fn unregister(&self) -> Result<()> {
        let bdev = self.bdev()?;
        if self.0.unregistering.replace(true) {
            return Err(Error::new(libc::EBUSY, "the device is being detached already"));
        }
        let (sender, receiver) = oneshot::channel::<c_int>();
        extern "C" fn done(context: *mut c_void, rc: c_int) {
            // SAFETY: made below, and called once.
            let sender = unsafe { Box::from_raw(context.cast::<oneshot::Sender<c_int>>()) };
            // (Nobody waits any more: nothing to tell.)
            let _ = sender.send(rc);
        }
        // SAFETY: registered, and on the application's thread.
        unsafe { sys::spdk_bdev_unregister(bdev.as_ptr(), Some(done), Box::into_raw(Box::new(sender)).cast()) };
        match receiver.await {
            Ok(0) => Ok(()),
            Ok(rc) => Err(Error::os(-rc, "detaching the device")),
            Err(_) => Err(Error::new(libc::EIO, "the device's end was never reported")),
        }
    }

    /// Its capacity in blocks.
    ///
    /// # Errors
    /// ENODEV when it is gone.
    pub fn num_blocks(&self) -> Result<u64> {
        // SAFETY: registered, and on the application's thread, which is the one that changes it.
        Ok(unsafe { sys::spdk_bdev_get_num_blocks(self.bdev()?.as_ptr()) })
    }

    /// Changes its capacity and tells everybody who has it open.
    ///
    /// # Errors
    /// EBUSY when it would shrink while it is open; ENODEV when it is gone.
    pub fn set_num_blocks(&self, num_blocks: u64) -> Result<()> {
        // SAFETY: registered, and on the application's thread.
        match unsafe { sys::spdk_bdev_notify_blockcnt_change(self.bdev()?.as_ptr(), num_blocks) } {
            0 => Ok(()),
            rc => Err(Error::os(-rc, "changing the device's capacity")),
        }
    }
}

/// A bdev module.
pub trait Module: 'static {
    /// Its name.
    const NAME: &'static CStr;

    /// Starts it, on the application's thread.
    ///
    /// # Errors
    /// An errno: the application does not start then.
    fn init() -> Result<(), i32>;

    /// Ends it, after the last of its bdevs; `done` is to be called, on the same thread, when that is finished.
    fn fini(done: FiniDone);

    /// The RPCs, method and parameters, that bring its options about again.
    fn config() -> Vec<(&'static str, Value)>;
}

/// The obligation to report the end of a module.
pub struct FiniDone(());

impl FiniDone {
    /// Reports it.
    pub fn report(self) {
        // SAFETY: this value exists once for a call of `module_fini`, and is used up.
        unsafe { compat::bdev_module_fini_done() };
    }
}

/// SPDK's structure for a module, in a static.
pub struct ModuleEntry<M>(UnsafeCell<sys::spdk_bdev_module>, PhantomData<fn() -> M>);

// SAFETY: only SPDK writes to it, under its own rules; we take its address.
unsafe impl<M> Sync for ModuleEntry<M> {}

impl<M: Module> ModuleEntry<M> {
    /// To be put into a static.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        ModuleEntry(
            UnsafeCell::new(sys::spdk_bdev_module {
                module_init: Some(module_init::<M>),
                module_fini: Some(module_fini::<M>),
                config_json: Some(config_json::<M>),
                get_ctx_size: Some(context_size),
                name: M::NAME.as_ptr(),
                async_fini: true,
                // SAFETY: zeroes are the defaults of all others.
                ..unsafe { MaybeUninit::zeroed().assume_init() }
            }),
            PhantomData,
        )
    }

    /// Adds the module to SPDK's list. Once, before the application starts.
    pub fn register(&'static self) {
        // SAFETY: a static; SPDK's list of modules is initialised statically.
        unsafe { sys::spdk_bdev_module_list_add(self.0.get()) };
    }
}

extern "C" fn context_size() -> c_int {
    CONTEXT_BYTES as c_int
}

extern "C" fn module_init<M: Module>() -> c_int {
    match guard("module_init", M::init) {
        Some(Ok(())) => 0,
        Some(Err(errno)) => -errno,
        None => -libc::EFAULT,
    }
}

extern "C" fn module_fini<M: Module>() {
    guard("module_fini", || M::fini(FiniDone(())));
}

unsafe extern "C" fn config_json<M: Module>(writer: *mut sys::spdk_json_write_ctx) -> c_int {
    for (method, params) in guard("config_json", M::config).unwrap_or_default() {
        // SAFETY: the writer is inside the subsystem's array of calls.
        unsafe { json::write(writer, &serde_json::json!({ "method": method, "params": params })) };
    }
    0
}
