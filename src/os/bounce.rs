//! Page-aligned memory for I/O whose own buffer direct I/O cannot take.

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

#[cfg(test)]
mod tests {
    use super::*;

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
