//! State that exists once a thread: what SPDK calls an I/O channel of an I/O device.

use spdk_sys as sys;
use spdk_sys::compat;
use std::ffi::{CStr, c_int, c_void};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;

/// How a channel's state is made when a thread asks for it first.
pub(super) trait MakeChannel {
    type Channel: 'static;
    fn make(&self) -> Result<Self::Channel, i32>;
}

/// SPDK keeps a pointer to the state in the channel's own memory; the state itself is in a box, so that its alignment is ours.
type Stored<C> = *mut C;

/// Registers `device` as an I/O device whose channels are made by it.
///
/// # Safety
/// `device` stays valid until the callback of [`unregister`].
pub(super) unsafe fn register<D: MakeChannel>(device: *const D, name: &CStr) {
    extern "C" fn create<D: MakeChannel>(device: *mut c_void, memory: *mut c_void) -> c_int {
        // SAFETY: the registered device, valid as `register` demands.
        let device = unsafe { &*device.cast::<D>() };
        match super::guard("making a channel", || device.make()) {
            Some(Ok(channel)) => {
                // SAFETY: SPDK gives as much memory as was asked for below, aligned for pointers.
                unsafe { memory.cast::<Stored<D::Channel>>().write(Box::into_raw(Box::new(channel))) };
                0
            }
            Some(Err(errno)) => -errno,
            None => -libc::EFAULT,
        }
    }
    extern "C" fn destroy<D: MakeChannel>(_device: *mut c_void, memory: *mut c_void) {
        // SAFETY: written by `create`, destroyed once, and nobody has the channel any more.
        let channel = unsafe { Box::from_raw(memory.cast::<Stored<D::Channel>>().read()) };
        super::guard("ending a channel", || drop(channel));
    }
    // SAFETY: the callbacks fit the device's type; its lifetime is the caller's promise.
    unsafe {
        sys::spdk_io_device_register(
            device.cast_mut().cast(),
            Some(create::<D>),
            Some(destroy::<D>),
            size_of::<Stored<D::Channel>>() as u32,
            name.as_ptr(),
        );
    }
}

/// Ends a device; `done` is called when its last channel is gone.
///
/// # Safety
/// `device` is registered, and the caller is on an SPDK thread. `done` gets the device's address.
pub(super) unsafe fn unregister(device: *const c_void, done: extern "C" fn(*mut c_void)) {
    // SAFETY: as the caller promises.
    unsafe { sys::spdk_io_device_unregister(device.cast_mut(), Some(done)) };
}

/// The state in a channel.
///
/// # Safety
/// `channel` is a channel of a device that was registered with [`register`] for a `D` with this `D::Channel`, and stays one
/// for as long as the reference is used.
#[inline]
pub(super) unsafe fn state<'a, C>(channel: *mut sys::spdk_io_channel) -> &'a C {
    // SAFETY: `create` put the pointer there.
    unsafe { &**compat::io_channel_ctx(channel).cast::<Stored<C>>() }
}

/// State that every thread has one of while it needs it.
pub trait PerThread: Sized + 'static {
    /// Its name in SPDK's listings.
    const NAME: &'static CStr;

    /// Makes the current thread's.
    ///
    /// # Errors
    /// An errno; whoever asked for it gets none.
    fn create() -> Result<Self, i32>;
}

/// A kind of per-thread state: a static.
pub struct PerThreadKind<C> {
    _address: u8,
    kind: PhantomData<fn() -> C>,
}

impl<C: PerThread> MakeChannel for PerThreadKind<C> {
    type Channel = C;
    fn make(&self) -> Result<C, i32> {
        C::create()
    }
}

impl<C: PerThread> PerThreadKind<C> {
    /// To be put into a static.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        PerThreadKind { _address: 0, kind: PhantomData }
    }

    /// Makes [`PerThreadKind::get`] work. Once, on an SPDK thread.
    pub fn register(&'static self) {
        // SAFETY: a static is valid for ever.
        unsafe { register::<Self>(self, C::NAME) };
    }

    /// Ends it when the last [`PerThreadRef`] is gone, then calls `done` on this thread. One at a time, on an SPDK thread.
    pub fn unregister(&'static self, done: extern "C" fn(*mut c_void)) {
        // SAFETY: registered before.
        unsafe { unregister(std::ptr::from_ref(self).cast(), done) };
    }

    /// The current thread's state, made if it does not exist.
    ///
    /// # Errors
    /// ENOMEM when it cannot be made (SPDK does not hand the reason through).
    pub fn get(&'static self) -> Result<PerThreadRef<C>, i32> {
        // SAFETY: a registered device, or null comes back.
        let channel = unsafe { sys::spdk_get_io_channel(std::ptr::from_ref(self).cast_mut().cast()) };
        NonNull::new(channel).map(|channel| PerThreadRef { channel, state: PhantomData }).ok_or(libc::ENOMEM)
    }
}

/// A counted reference to the current thread's state. Stays on that thread.
pub struct PerThreadRef<C> {
    channel: NonNull<sys::spdk_io_channel>,
    state: PhantomData<*const C>,
}

impl<C> Deref for PerThreadRef<C> {
    type Target = C;
    #[inline]
    fn deref(&self) -> &C {
        // SAFETY: got from a device of this kind, and held until this is dropped.
        unsafe { state(self.channel.as_ptr()) }
    }
}

impl<C> Drop for PerThreadRef<C> {
    fn drop(&mut self) {
        // SAFETY: held since `get`, on the same thread.
        unsafe { sys::spdk_put_io_channel(self.channel.as_ptr()) };
    }
}
