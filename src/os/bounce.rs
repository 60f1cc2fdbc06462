//! Page-aligned memory for I/O whose own buffer direct I/O cannot take.

use super::iov::IoVecs;
use std::ptr::NonNull;

/// An anonymous mapping: page-aligned, zero at first, given back to the system on drop.
pub struct BounceBuffer {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for BounceBuffer {}

impl BounceBuffer {
    /// Maps `len_bytes`. The pages are touched at first use only.
    ///
    /// # Errors
    /// The system's, as when it is out of address space or memory.
    pub fn new(len_bytes: usize) -> std::io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => {
                Ok(BounceBuffer { start, len_bytes })
            }
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// The whole of it.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: mapped readable and writable for this length, initialised by the kernel, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len_bytes) }
    }
}

impl Drop for BounceBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// Memory for writes that are copied before the kernel gets them, in slots.
pub struct BouncePool {
    /// Each describes its slot.
    iovecs: Box<[libc::iovec]>,
    free: Vec<Slot>,
    /// What they point into.
    _memory: BounceBuffer,
}

// SAFETY: carries addresses of memory that it owns.
unsafe impl Send for BouncePool {}

/// A slot of a [`BouncePool`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u32);

impl BouncePool {
    /// The longest write that has room in a slot.
    pub const SLOT_BYTES: usize = 64 << 10;
    const SLOTS: usize = 64;

    /// Maps the memory, which is touched at first use only.
    ///
    /// # Errors
    /// As [`BounceBuffer::new`].
    pub fn new() -> std::io::Result<Self> {
        let mut memory = BounceBuffer::new(Self::SLOTS * Self::SLOT_BYTES)?;
        let slots = memory.as_mut_slice().chunks_exact_mut(Self::SLOT_BYTES);
        let iovecs = slots.map(|slot| libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: 0 }).collect();
        Ok(BouncePool { iovecs, free: (0..Self::SLOTS as u32).rev().map(Slot).collect(), _memory: memory })
    }

    /// Copies `from`, of [`BouncePool::SLOT_BYTES`] at most, to a slot and describes that: page-aligned and in one piece. `None` while
    /// no slot is free. The slot is to be given back when nobody uses the description any more; the pool is not dropped before.
    pub fn copy(&mut self, from: &IoVecs) -> Option<(Slot, IoVecs)> {
        let slot = self.free.pop()?;
        let iovec = &mut self.iovecs[slot.0 as usize];
        // SAFETY: a free slot's memory is nobody else's, and is initialised (a mapping).
        let memory = unsafe { std::slice::from_raw_parts_mut(iovec.iov_base.cast::<u8>(), Self::SLOT_BYTES) };
        iovec.iov_len = from.gather(0, memory);
        debug_assert_eq!(iovec.iov_len as u64, from.len_bytes());
        // SAFETY: array and memory are the pool's; by the contract above both stay until the slot comes back.
        Some((slot, unsafe { IoVecs::from_raw(iovec, 1) }))
    }

    /// The kernel is done with what `copy` described.
    pub fn give_back(&mut self, slot: Slot) {
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::super::iov::LeakedBuffers;
    use super::*;

    #[test]
    fn copies_have_a_slot_each_until_it_is_given_back() {
        let mut pool = BouncePool::new().unwrap();
        let small = LeakedBuffers::new(&[4096, 512], 24, 7);
        let large = LeakedBuffers::new(&[BouncePool::SLOT_BYTES], 512, 9);
        let slots: Vec<(Slot, IoVecs)> =
            (0..64).map(|i| pool.copy(&if i % 2 == 0 { small.iovs() } else { large.iovs() }).unwrap()).collect();
        assert!(pool.copy(&small.iovs()).is_none(), "all are in use");
        for (i, (_, iovs)) in slots.iter().enumerate() {
            let mut copy = vec![0; BouncePool::SLOT_BYTES];
            let len = iovs.gather(0, &mut copy);
            assert!(iovs.is_aligned(4096, 512) && iovs.count() == 1);
            let (expected, fill) = if i % 2 == 0 { (4608, 7) } else { (BouncePool::SLOT_BYTES, 9) };
            assert!(len == expected && copy[..len].iter().all(|&b| b == fill), "slot {i}");
        }
        pool.give_back(slots[5].0);
        assert_eq!(pool.copy(&small.iovs()).unwrap().0, slots[5].0);
    }

    #[test]
    fn aligned_zero_and_writable() {
        let mut buffer = BounceBuffer::new(1 << 20).unwrap();
        let slice = buffer.as_mut_slice();
        assert_eq!((slice.len(), slice.as_ptr().align_offset(4096)), (1 << 20, 0));
        assert!(slice.iter().step_by(4096).all(|&b| b == 0));
        slice[(1 << 20) - 1] = 7;
        assert_eq!(buffer.as_mut_slice()[(1 << 20) - 1], 7);
    }
}
