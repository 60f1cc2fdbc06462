//! One I/O of the bdev layer.

use crate::os::iov::IoVecs;
use crate::os::queue::{Node, Placed};
use spdk_sys as sys;
use spdk_sys::compat;
use spdk_sys::{spdk_bdev_io_status as status, spdk_bdev_io_type as kind};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// How much memory every bdev_io has for what its module keeps while it works on it.
const PARKED_BYTES: usize = 136;
/// Behind that lies the number of the I/O, which stays with its thread.
pub const CONTEXT_BYTES: usize = PARKED_BYTES + size_of::<u64>();

/// What an I/O asks for, as far as this layer's users can do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoType {
    /// Fill the I/O's memory.
    Read,
    /// Write the I/O's memory.
    Write,
    /// The range is not needed any more.
    Unmap,
    /// Make what was completed durable.
    Flush,
    /// Give up on, or finish, everything in flight.
    Reset,
    /// Make the range read as zeroes.
    WriteZeroes,
    /// Give up on another I/O of the same channel, if it has not started.
    Abort,
}

impl IoType {
    pub(super) fn from_raw(raw: sys::spdk_bdev_io_type::Type) -> Option<Self> {
        Some(match raw {
            kind::SPDK_BDEV_IO_TYPE_READ => IoType::Read,
            kind::SPDK_BDEV_IO_TYPE_WRITE => IoType::Write,
            kind::SPDK_BDEV_IO_TYPE_UNMAP => IoType::Unmap,
            kind::SPDK_BDEV_IO_TYPE_FLUSH => IoType::Flush,
            kind::SPDK_BDEV_IO_TYPE_RESET => IoType::Reset,
            kind::SPDK_BDEV_IO_TYPE_WRITE_ZEROES => IoType::WriteZeroes,
            kind::SPDK_BDEV_IO_TYPE_ABORT => IoType::Abort,
            _ => return None,
        })
    }
}

/// How an I/O ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// It was done.
    Success,
    /// It failed, and there is no more to say.
    Failed,
    /// It failed for a reason that NVMe has a name for; SPDK translates for other protocols.
    Nvme {
        /// Status code type.
        sct: i32,
        /// Status code.
        sc: i32,
    },
}

/// An I/O that has to be completed, once, on the thread that it was submitted on.
///
/// # Invariants
/// Points to a bdev_io that SPDK submitted to the module and that was not completed yet; on its own thread (not Send).
#[must_use = "an I/O that is dropped is never completed"]
pub struct BdevIo {
    io: NonNull<sys::spdk_bdev_io>,
    thread_bound: PhantomData<*mut ()>,
}

/// An I/O on its way through other threads. Only [`Parked::resume`] makes something of it.
#[must_use = "an I/O that is dropped is never completed"]
pub struct Parked(NonNull<sys::spdk_bdev_io>);

// SAFETY: only an address elsewhere; `resume` checks that it is back home.
unsafe impl Send for Parked {}

impl BdevIo {
    /// # Safety
    /// As the invariants say.
    pub(super) unsafe fn from_raw(io: *mut sys::spdk_bdev_io) -> Self {
        // SAFETY: SPDK submits no null.
        BdevIo { io: unsafe { NonNull::new_unchecked(io) }, thread_bound: PhantomData }
    }

    /// Notes that an I/O was submitted and is not parked yet.
    ///
    /// # Safety
    /// As [`BdevIo::from_raw`].
    #[inline]
    pub(super) unsafe fn begin(io: *mut sys::spdk_bdev_io) {
        // SAFETY: the context memory is the module's while it has the I/O.
        unsafe { (&raw mut (*io).driver_ctx).cast::<u8>().add(PARKED_BYTES).cast::<u64>().write(0) };
    }

    fn raw(&self) -> &sys::spdk_bdev_io {
        // SAFETY: by the invariants live.
        unsafe { self.io.as_ref() }
    }

    fn block_bytes(&self) -> u64 {
        // SAFETY: the bdev of a live I/O is registered.
        unsafe { (*self.raw().bdev).blocklen.into() }
    }

    /// What it asks for; nothing for what this layer does not know.
    pub fn io_type(&self) -> Option<IoType> {
        IoType::from_raw(self.raw().type_.into())
    }

    /// First block.
    pub fn offset_blocks(&self) -> u64 {
        // SAFETY: every type of IoType but Reset and Abort uses this member of the union, and its bytes are valid for any.
        unsafe { self.raw().u.bdev.offset_blocks }
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> u64 {
        // SAFETY: as for `offset_blocks`.
        unsafe { self.raw().u.bdev.num_blocks }
    }

    /// First byte.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_blocks() * self.block_bytes()
    }

    /// Number of bytes.
    pub fn len_bytes(&self) -> u64 {
        self.num_blocks() * self.block_bytes()
    }

    /// The memory of a read or write.
    pub fn iovs(&self) -> IoVecs {
        // SAFETY: as for `offset_blocks`; SPDK's array and the memory that it describes are valid until the I/O is completed.
        unsafe {
            let range = &self.raw().u.bdev;
            IoVecs::from_raw(range.iovs, range.iovcnt as usize)
        }
    }

    /// Whether a write is to be on stable storage when it is completed (FUA).
    pub fn is_fua(&self) -> bool {
        // SAFETY: a live I/O; of another type than a write the answer is not used.
        self.io_type() == Some(IoType::Write) && unsafe { compat::bdev_io_is_fua(self.raw()) }
    }

    /// The number of the I/O that an abort means, as [`BdevIo::park`] gave it. 0 for one that was never parked.
    pub fn abort_target(&self) -> u64 {
        // SAFETY: an abort has this member of the union, and what it names is an I/O of the same channel, so of this thread, that is
        // not completed. Its number was written when it was submitted, and is touched by its SPDK thread only.
        unsafe {
            let context = &raw const (*self.raw().u.abort.bio_to_abort).driver_ctx;
            context.cast::<u8>().add(PARKED_BYTES).cast::<u64>().read()
        }
    }

    /// Puts the I/O away, in its own context memory, as part of what `make` makes of it. `number` is what [`BdevIo::abort_target`] gives
    /// for an abort of it; 0 for one that nobody aborts.
    pub fn park<C: Send>(self, number: u64, make: impl FnOnce(Parked) -> C) -> Placed<C> {
        const {
            assert!(size_of::<Node<C>>() <= PARKED_BYTES, "the context memory is too small");
            assert!(align_of::<Node<C>>() <= 8, "the context memory is aligned for 8 bytes");
        }
        let io = self.io;
        std::mem::forget(self);
        // SAFETY: driver_ctx is the end of the structure; behind it lie CONTEXT_BYTES that are the module's while it has the
        // I/O, aligned like the structure. The I/O is completed only by way of the `Parked` that goes into the value, so
        // not before that was taken out again.
        unsafe {
            (&raw mut (*io.as_ptr()).driver_ctx).cast::<u8>().add(PARKED_BYTES).cast::<u64>().write(number);
            let memory = (&raw mut (*io.as_ptr()).driver_ctx).cast::<MaybeUninit<Node<C>>>();
            Placed::new(NonNull::new_unchecked(memory), make(Parked(io)))
        }
    }

    /// Ends it.
    pub fn complete(self, completion: Completion) {
        let io = self.io.as_ptr();
        std::mem::forget(self);
        // SAFETY: by the invariants live, not yet completed, on its own thread.
        unsafe {
            match completion {
                Completion::Success => sys::spdk_bdev_io_complete(io, status::SPDK_BDEV_IO_STATUS_SUCCESS),
                Completion::Failed => sys::spdk_bdev_io_complete(io, status::SPDK_BDEV_IO_STATUS_FAILED),
                Completion::Nvme { sct, sc } => {
                    sys::spdk_bdev_io_complete_nvme_status(io, 0, sct, compat::status_code(sct, sc));
                }
            }
        }
    }
}

impl Drop for BdevIo {
    fn drop(&mut self) {
        debug_assert!(std::thread::panicking(), "a bdev_io was dropped without being completed");
        // Where that is not caught: a failed I/O is better than one that never ends.
        // SAFETY: as in `complete`.
        unsafe { sys::spdk_bdev_io_complete(self.io.as_ptr(), status::SPDK_BDEV_IO_STATUS_FAILED) };
    }
}

impl Parked {
    /// Takes the I/O up again, on the thread that it was submitted on.
    pub fn resume(self) -> BdevIo {
        // SAFETY: parked I/O is not completed, so it is live; this reads only.
        debug_assert!(unsafe { sys::spdk_bdev_io_get_thread(self.0.as_ptr()) == sys::spdk_get_thread() });
        BdevIo { io: self.0, thread_bound: PhantomData }
    }
}
