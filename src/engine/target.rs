//! The file behind a device, as the engines see it.

use crate::os::file::DirectFile;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// A file and the part of it that is the device.
#[derive(Debug)]
pub struct Target {
    file: DirectFile,
    base_bytes: u64,
    /// Whether requests may be finer than the file's direct I/O, so that parts of pages are read, modified and written.
    sub_page: bool,
    /// Cleared when the filesystem turns out not to know FALLOC_FL_ZERO_RANGE.
    zero_range_works: AtomicBool,
    /// The errno that made the device suspicious (a file shorter than the device), or 0.
    degraded: AtomicI32,
    /// Calls on this file take long enough to be worth another thread.
    slow: AtomicBool,
}

impl Target {
    /// The part of `file` that starts at `base_bytes`, used in blocks of `block_bytes`.
    pub fn new(file: DirectFile, base_bytes: u64, block_bytes: u32) -> Self {
        let align = file.offset_align_bytes() as u64;
        let sub_page = !u64::from(block_bytes).is_multiple_of(align) || !base_bytes.is_multiple_of(align);
        Target {
            file,
            base_bytes,
            sub_page,
            zero_range_works: AtomicBool::new(true),
            degraded: AtomicI32::new(0),
            slow: AtomicBool::new(false),
        }
    }

    /// The file.
    pub fn file(&self) -> &DirectFile {
        &self.file
    }

    /// Where the device starts in the file.
    pub fn base_bytes(&self) -> u64 {
        self.base_bytes
    }

    /// Whether a request can cover parts of the pages that direct I/O moves.
    pub fn sub_page(&self) -> bool {
        self.sub_page
    }

    /// The errno that degraded it: EIO after a read met the end of the file inside the device.
    pub fn degraded(&self) -> Option<i32> {
        match self.degraded.load(Ordering::Relaxed) {
            0 => None,
            errno => Some(errno),
        }
    }

    /// Notes that the file is not what the device needs.
    pub fn set_degraded(&self, errno: i32) {
        if self.degraded.swap(errno, Ordering::Relaxed) == 0 {
            tracing::error!(
                file = %self.file.path().display(),
                "the file ends inside the device (truncated while in use?); reads behind its end fail. Grow it again with bdev_lloop_resize, or detach and attach it"
            );
        }
    }

    /// Forgets it: the file was made long enough again.
    pub fn clear_degraded(&self) {
        self.degraded.store(0, Ordering::Relaxed);
    }

    pub(super) fn slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed)
    }

    pub(super) fn set_slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    /// Zeroes whole pages of the file: keeps the space where the filesystem can, else punches a hole, which reads the same.
    pub(super) fn zero_pages(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
        if self.zero_range_works.load(Ordering::Relaxed) {
            match self.file.zero_range(offset_bytes, len_bytes) {
                Err(libc::EOPNOTSUPP) => self.zero_range_works.store(false, Ordering::Relaxed),
                other => return other,
            }
        }
        self.file.punch(offset_bytes, len_bytes)
    }
}
