//! Scattered memory: what a request brings, and what a system call takes.

use std::ptr;

/// The most segments of one system call (Linux's UIO_MAXIOV).
pub const IOV_MAX: usize = 1024;

/// The memory of a request: borrowed segments, described by an array that is borrowed as well.
///
/// # Invariants
/// Array and segments stay valid for I/O until the request that holds this is answered. Others (a guest, a remote host's
/// buffer) may change the segments' contents meanwhile, so they are copied through raw pointers only.
#[derive(Clone, Copy)]
pub struct IoVecs {
    first: *const libc::iovec,
    count: usize,
}

// SAFETY: who holds an `IoVecs` may use the memory, on whatever thread (see the invariants).
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// No memory, for operations that move no data.
    pub const EMPTY: IoVecs = IoVecs { first: ptr::null(), count: 0 };

    /// Describes `count` segments.
    ///
    /// # Safety
    /// The array and every segment in it are valid, for reads and for writes as the operation wants, until the request
    /// that this is put into is answered.
    pub unsafe fn from_raw(first: *const libc::iovec, count: usize) -> Self {
        IoVecs { first, count }
    }

    pub(super) fn segments(&self) -> &[libc::iovec] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: by the invariant the array is valid for as long as this value is in its request.
        unsafe { std::slice::from_raw_parts(self.first, self.count) }
    }

    /// How many segments there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The length of all segments together.
    pub fn len_bytes(&self) -> u64 {
        self.segments().iter().map(|s| s.iov_len as u64).sum()
    }

    /// Whether every segment's address is a multiple of `address_align_bytes` and its length one of `len_align_bytes` (both
    /// powers of two): what direct I/O asks of each segment.
    pub fn is_aligned(&self, address_align_bytes: usize, len_align_bytes: usize) -> bool {
        let bits = |field: fn(&libc::iovec) -> usize| self.segments().iter().fold(0, |bits, s| bits | field(s));
        bits(|s| s.iov_base as usize) & (address_align_bytes - 1) == 0
            && bits(|s| s.iov_len) & (len_align_bytes - 1) == 0
    }

    /// Calls `f(pointer, length, bytes before)` for the parts of the segments that lie in `skip_bytes..skip_bytes+len_bytes`.
    fn for_each_part(
        &self,
        mut skip_bytes: usize,
        len_bytes: usize,
        mut f: impl FnMut(*mut u8, usize, usize),
    ) -> usize {
        let mut done = 0;
        for segment in self.segments() {
            if done == len_bytes {
                break;
            }
            if skip_bytes >= segment.iov_len {
                skip_bytes -= segment.iov_len;
                continue;
            }
            let part = (segment.iov_len - skip_bytes).min(len_bytes - done);
            f(segment.iov_base.cast::<u8>().wrapping_add(skip_bytes), part, done);
            done += part;
            skip_bytes = 0;
        }
        done
    }

    /// Gathers from `skip_bytes` on into `to`. Returns how many bytes there were.
    pub fn gather(&self, skip_bytes: usize, to: &mut [u8]) -> usize {
        let target = to.as_mut_ptr();
        self.for_each_part(skip_bytes, to.len(), |part, len, at| {
            // SAFETY: the part is readable (invariant) and `at + len <= to.len()`; `to` is ours alone.
            unsafe { ptr::copy_nonoverlapping(part, target.add(at), len) }
        })
    }

    /// Scatters `from` over the segments from `skip_bytes` on. Returns how many bytes had room.
    pub fn scatter(&self, skip_bytes: usize, from: &[u8]) -> usize {
        self.for_each_part(skip_bytes, from.len(), |part, len, at| {
            // SAFETY: the part is writable (invariant) and `at + len <= from.len()`.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr().add(at), part, len) }
        })
    }
}

/// The segments of one system call, built anew for each; its memory is reserved once.
///
/// Holds pointers into requests: valid until the first of them is answered, so [`IovList::clear`] comes first in every use.
pub struct IovList {
    list: Vec<libc::iovec>,
    len_bytes: usize,
}

// SAFETY: carries addresses for its owner only; see `IoVecs`.
unsafe impl Send for IovList {}

impl Default for IovList {
    fn default() -> Self {
        IovList { list: Vec::with_capacity(IOV_MAX), len_bytes: 0 }
    }
}

impl IovList {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.list.clear();
        self.len_bytes = 0;
    }

    /// Adds what lies behind the first `skip_bytes` of `iovs`, as far as [`IOV_MAX`] allows. Returns the bytes added.
    pub fn push(&mut self, iovs: &IoVecs, skip_bytes: usize) -> usize {
        let mut added = 0;
        let list = &mut self.list;
        iovs.for_each_part(skip_bytes, usize::MAX, |part, len, _| {
            if list.len() < IOV_MAX {
                list.push(libc::iovec { iov_base: part.cast(), iov_len: len });
                added += len;
            }
        });
        self.len_bytes += added;
        added
    }

    /// Adds one slice.
    pub fn push_slice(&mut self, slice: &mut [u8]) {
        self.list.push(libc::iovec { iov_base: slice.as_mut_ptr().cast(), iov_len: slice.len() });
        self.len_bytes += slice.len();
    }

    /// The length of all segments together.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(super) fn raw(&self) -> (*const libc::iovec, i32) {
        (self.list.as_ptr(), self.list.len() as i32)
    }
}

/// Segments on the heap that live for ever, for tests: whatever an engine does with them late, the memory is there.
#[doc(hidden)]
pub struct LeakedBuffers {
    iovs: &'static [libc::iovec],
}

// SAFETY: 'static memory; tests look at it when no I/O is in flight.
unsafe impl Send for LeakedBuffers {}

#[doc(hidden)]
impl LeakedBuffers {
    /// Segments of `lens_bytes`, each starting `shift_bytes` behind a page boundary, filled with `fill`.
    pub fn new(lens_bytes: &[usize], shift_bytes: usize, fill: u8) -> Self {
        let iovs = lens_bytes.iter().map(|&len| {
            let memory = vec![fill; len + shift_bytes + 4096].leak();
            let start = memory.as_ptr().align_offset(4096) + shift_bytes;
            libc::iovec { iov_base: memory[start..].as_mut_ptr().cast(), iov_len: len }
        });
        LeakedBuffers { iovs: iovs.collect::<Vec<_>>().leak() }
    }

    /// The segments.
    pub fn iovs(&self) -> IoVecs {
        // SAFETY: array and segments are leaked, so valid for ever.
        unsafe { IoVecs::from_raw(self.iovs.as_ptr(), self.iovs.len()) }
    }

    /// Fills the segments with `data`.
    pub fn set(&self, data: &[u8]) {
        assert_eq!(self.iovs().scatter(0, data), data.len());
    }

    /// What the segments hold.
    pub fn get(&self) -> Vec<u8> {
        let mut data = vec![0; self.iovs().len_bytes() as usize];
        self.iovs().gather(0, &mut data);
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn alignment_looks_at_addresses_and_lengths() {
        assert!(LeakedBuffers::new(&[4096, 8192], 0, 0).iovs().is_aligned(4096, 4096));
        assert!(!LeakedBuffers::new(&[4096], 512, 0).iovs().is_aligned(4096, 4096));
        assert!(LeakedBuffers::new(&[4096], 512, 0).iovs().is_aligned(512, 4096));
        assert!(!LeakedBuffers::new(&[4096, 100], 0, 0).iovs().is_aligned(4, 512));
        assert!(IoVecs::EMPTY.is_aligned(4096, 4096));
    }

    #[test]
    fn more_segments_than_a_call_takes() {
        let buffers = LeakedBuffers::new(&[8; IOV_MAX + 10], 0, 1);
        let mut list = IovList::default();
        assert_eq!(list.push(&buffers.iovs(), 4), IOV_MAX * 8 - 4);
        assert_eq!((list.len_bytes(), list.raw().1), (IOV_MAX * 8 - 4, IOV_MAX as i32));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 256 }))]

        /// Gathering, scattering and listing agree with the flat bytes, wherever they start.
        #[test]
        fn arithmetic(lens in prop::collection::vec(0usize..40, 0..8), skip in 0usize..200, len in 0usize..200) {
            let buffers = LeakedBuffers::new(&lens, 3, 0);
            let total: usize = lens.iter().sum();
            let data: Vec<u8> = (0..total).map(|i| i as u8 ^ 0x5a).collect();
            buffers.set(&data);
            prop_assert_eq!(buffers.iovs().len_bytes(), total as u64);
            let expected = data.get(skip..(skip + len).min(total)).unwrap_or(&[]);

            let mut part = vec![0; len];
            let n = buffers.iovs().gather(skip, &mut part);
            prop_assert_eq!(&part[..n], expected);

            let mut list = IovList::default();
            prop_assert_eq!(list.push(&buffers.iovs(), skip), total.saturating_sub(skip));
            prop_assert_eq!(list.len_bytes(), total.saturating_sub(skip));

            let patch = vec![0xff; len];
            prop_assert_eq!(buffers.iovs().scatter(skip, &patch), n);
            let mut wanted = data.clone();
            if skip < total { wanted[skip..skip + n].fill(0xff); }
            prop_assert_eq!(buffers.get(), wanted);
        }
    }
}
