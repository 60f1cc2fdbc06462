//! An io_uring for direct reads and writes: registered files, registered memory, completions without interrupts where the kernel
//! can; each of those is tried and done without where it cannot.

use super::iov::IoVecs;
use super::thread::CpuSet;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Slots for registered files.
const FILES: u32 = 512;
/// The kernel takes registered buffers of at most this length.
const MAX_BUFFER_BYTES: usize = 1 << 30;
/// And we register at most so many.
const MAX_BUFFERS: usize = 256;

/// What any ring has registered lies between these two addresses.
static REGISTERED: (AtomicUsize, AtomicUsize) = (AtomicUsize::new(usize::MAX), AtomicUsize::new(0));
/// Counts how often something of that was given back to the system.
static FORGOTTEN: AtomicU64 = AtomicU64::new(0);

/// To be called before memory that may be registered is unmapped: other memory can appear at the same addresses later, while the
/// kernel would still move data to and from the old. From then on the rings there are use all memory unregistered.
pub fn forget_memory(start: usize, len_bytes: usize) {
    let (low, high) = (REGISTERED.0.load(Ordering::SeqCst), REGISTERED.1.load(Ordering::SeqCst));
    if start < high && start.saturating_add(len_bytes) > low {
        FORGOTTEN.fetch_add(1, Ordering::SeqCst);
    }
}

/// How a ring may be set up.
#[derive(Debug, Clone)]
pub struct RingOptions {
    /// How many I/O can be in flight.
    pub entries: u32,
    /// The thread that makes the ring is the only one that will ever use it.
    pub one_thread: bool,
    /// Processors that the kernel's helpers keep away from.
    pub reactor_cpus: Vec<u32>,
}

/// What the kernel could do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Completions are worked on when the ring is entered, not by interrupting the thread.
    pub deferred: bool,
    /// Files are registered.
    pub files: bool,
    /// How many buffers are registered.
    pub buffers: usize,
    /// Scattered memory can be registered memory, too.
    pub vectored_fixed: bool,
}

/// A ring.
///
/// # Invariants
/// `in_flight` counts what the kernel has or will be given: pushed and not yet seen completed. The memory of those belongs to the
/// kernel: the ring is not freed before they have completed.
pub struct Ring {
    ring: IoUring,
    in_flight: u32,
    buffers: Vec<(usize, usize)>,
    /// [`FORGOTTEN`] when the buffers were registered.
    forgotten: u64,
    features: Features,
}

/// An I/O that was refused: the ring is full.
#[derive(Debug)]
pub struct Full;

impl Ring {
    /// Makes a ring on the current thread.
    ///
    /// # Errors
    /// The errno of io_uring_setup: ENOSYS or EPERM where kernel or sandbox have none.
    pub fn new(options: &RingOptions) -> Result<Self, i32> {
        let deferred = |b: &mut io_uring::Builder| {
            b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        };
        let cooperative = |b: &mut io_uring::Builder| {
            b.setup_coop_taskrun().setup_taskrun_flag();
        };
        let plain = |_: &mut io_uring::Builder| {};
        let build = |configure: &dyn Fn(&mut io_uring::Builder)| {
            let mut builder = IoUring::builder();
            configure(&mut builder);
            builder.setup_cqsize(options.entries * 2).dontfork().build(options.entries)
        };
        let mut is_deferred = options.one_thread;
        let ring = match is_deferred.then(|| build(&deferred)) {
            Some(Ok(ring)) => Ok(ring),
            _ => {
                is_deferred = false;
                build(&cooperative).or_else(|_| build(&plain))
            }
        };
        let ring = ring.map_err(|e| e.raw_os_error().unwrap_or(libc::ENOSYS))?;
        let mut this = Ring { ring, in_flight: 0, buffers: Vec::new(), forgotten: 0, features: Features::default() };
        this.features.deferred = is_deferred;
        this.features.files = this.ring.submitter().register_files_sparse(FILES).is_ok();
        // Helper threads inherit the pinning of whoever makes the ring: away from the reactor that never sleeps.
        let _ = this.ring.submitter().register_iowq_aff(CpuSet::but(&options.reactor_cpus).raw());
        if options.one_thread {
            let _ = this.ring.submitter().register_ring_fd();
        }
        Ok(this)
    }

    /// What the kernel could do for this ring.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Registers this process's hugepages, where SPDK's buffers are. Memory that comes later is used unregistered.
    pub fn register_hugepages(&mut self) {
        self.forgotten = FORGOTTEN.load(Ordering::SeqCst);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let regions = hugepage_regions(&maps);
        let iovecs: Vec<libc::iovec> =
            regions.iter().map(|&(start, len)| libc::iovec { iov_base: start as *mut _, iov_len: len }).collect();
        // Before the kernel has them: what goes away while it takes them is noticed.
        for &(start, len) in &regions {
            REGISTERED.0.fetch_min(start, Ordering::SeqCst);
            REGISTERED.1.fetch_max(start + len, Ordering::SeqCst);
        }
        // SAFETY: the regions are mapped; the kernel holds on to the pages, whatever becomes of the mapping, and addresses whose
        // mapping has changed are not looked up any more (`forget_memory`).
        if !iovecs.is_empty() && unsafe { self.ring.submitter().register_buffers(&iovecs) }.is_ok() {
            self.features.buffers = regions.len();
            self.buffers = regions;
            let mut probe = io_uring::Probe::new();
            self.features.vectored_fixed = self.ring.submitter().register_probe(&mut probe).is_ok()
                && probe.is_supported(opcode::ReadvFixed::CODE)
                && probe.is_supported(opcode::WritevFixed::CODE);
        }
    }

    /// Registers a file; its slot. `None` when the kernel has no slots, or they are used up.
    pub fn register_file(&mut self, slot: u32, fd: BorrowedFd<'_>) -> bool {
        slot < FILES
            && self.features.files
            && self.ring.submitter().register_files_update(slot, &[fd.as_raw_fd()]).is_ok()
    }

    /// Gives a slot back; nothing may be in flight on it.
    pub fn unregister_file(&mut self, slot: u32) {
        let _ = self.ring.submitter().register_files_update(slot, &[-1]);
    }

    /// The registered buffer that `address..address + len` lies in.
    fn buffer_of(&self, address: usize, len: usize) -> Option<u16> {
        if FORGOTTEN.load(Ordering::Acquire) != self.forgotten {
            return None;
        }
        let inside = |&(start, size): &(usize, usize)| address >= start && address + len <= start + size;
        self.buffers.iter().position(inside).map(|i| i as u16)
    }

    /// Queues a read (or write) of `iovs` at `offset_bytes` of the file in `slot`; [`Ring::enter`] hands it to the kernel.
    /// `user_data` comes back with its result.
    ///
    /// # Errors
    /// [`Full`]; nothing was queued.
    pub fn push(
        &mut self,
        write: bool,
        slot: u32,
        iovs: &IoVecs,
        offset_bytes: u64,
        user_data: u64,
    ) -> Result<(), Full> {
        let fd = types::Fixed(slot);
        let segments = iovs.segments();
        let entry: squeue::Entry = if let [segment] = segments {
            let (buffer, len) = (segment.iov_base.cast::<u8>(), segment.iov_len as u32);
            match (write, self.buffer_of(buffer as usize, segment.iov_len)) {
                (false, Some(i)) => opcode::ReadFixed::new(fd, buffer, len, i).offset(offset_bytes).build(),
                (true, Some(i)) => opcode::WriteFixed::new(fd, buffer, len, i).offset(offset_bytes).build(),
                (false, None) => opcode::Read::new(fd, buffer, len).offset(offset_bytes).build(),
                (true, None) => opcode::Write::new(fd, buffer, len).offset(offset_bytes).build(),
            }
        } else {
            let (first, count) = (segments.as_ptr(), segments.len() as u32);
            let all_in = |i: u16| segments.iter().all(|s| self.buffer_of(s.iov_base as usize, s.iov_len) == Some(i));
            let buffer = segments.first().and_then(|s| self.buffer_of(s.iov_base as usize, s.iov_len));
            match (write, buffer.filter(|&i| self.features.vectored_fixed && all_in(i))) {
                (false, Some(i)) => opcode::ReadvFixed::new(fd, first, count, i).offset(offset_bytes).build(),
                (true, Some(i)) => opcode::WritevFixed::new(fd, first, count, i).offset(offset_bytes).build(),
                (false, None) => opcode::Readv::new(fd, first, count).offset(offset_bytes).build(),
                (true, None) => opcode::Writev::new(fd, first, count).offset(offset_bytes).build(),
            }
        };
        // SAFETY: array and segments stay valid until the request is answered (the invariant of IoVecs), which its owner does
        // after the completion only; the ring's own drop waits for those that nobody waited for.
        unsafe { self.ring.submission().push(&entry.user_data(user_data)) }.map_err(|_| Full)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Hands over what is queued, and lets the kernel post what has completed. One system call, none when there is nothing to do.
    ///
    /// # Errors
    /// The errno, when the kernel takes nothing now (EBUSY, EAGAIN: try again after reaping).
    pub fn enter(&mut self) -> Result<(), i32> {
        let queue = self.ring.submission();
        let (queued, pending) = (queue.len(), queue.taskrun() || queue.cq_overflow());
        drop(queue);
        if queued == 0 && !pending {
            return Ok(());
        }
        const GETEVENTS: u32 = 1;
        loop {
            // SAFETY: no argument structure is passed.
            let result = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(
                    queued as u32,
                    0,
                    if pending { GETEVENTS } else { 0 },
                    None,
                )
            };
            match result.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)) {
                Ok(_) => return Ok(()),
                Err(libc::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Makes `fd`, an eventfd, readable whenever something has completed; whether the kernel can.
    pub fn ring_on_completion(&mut self, fd: BorrowedFd<'_>) -> bool {
        self.ring.submitter().register_eventfd(fd.as_raw_fd()).is_ok()
    }

    /// Calls `done(user_data, result)` for everything that has completed.
    pub fn reap(&mut self, mut done: impl FnMut(u64, i32)) -> usize {
        let mut count = 0;
        for entry in self.ring.completion() {
            let entry: cqueue::Entry = entry;
            count += 1;
            done(entry.user_data(), entry.result());
        }
        self.in_flight -= count as u32;
        count
    }

    /// How many I/O the kernel has.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if let Err(e) = self.ring.submit_and_wait(1)
                && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                // The kernel may still write to memory that is not ours to give back: better no process than a wrong one.
                eprintln!("lloop: waiting for {} I/O in flight failed: {e}", self.in_flight);
                std::process::abort();
            }
            self.reap(|_, _| {});
        }
    }
}

/// The hugepage mappings in the text of /proc/self/maps, neighbours joined: start and length, as buffers can be registered.
fn hugepage_regions(maps: &str) -> Vec<(usize, usize)> {
    let mut regions: Vec<(usize, usize)> = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), path) = (fields.next(), fields.nth(4).unwrap_or_default()) else { continue };
        if !(path.contains("map_") && (path.contains("hugepages") || path.contains("spdk_pid"))) {
            continue;
        }
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        let Some((Some(start), Some(end))) = range.split_once('-').map(|(s, e)| (number(s), number(e))) else {
            continue;
        };
        match regions.last_mut() {
            Some(last) if last.0 + last.1 == start && end - last.0 <= MAX_BUFFER_BYTES => last.1 = end - last.0,
            _ => regions.push((start, end - start)),
        }
    }
    regions.retain(|r| r.1 <= MAX_BUFFER_BYTES);
    regions.truncate(MAX_BUFFERS);
    regions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::iov::LeakedBuffers;
    use std::os::fd::AsFd;

    fn ring(one_thread: bool) -> Ring {
        Ring::new(&RingOptions { entries: 8, one_thread, reactor_cpus: Vec::new() }).unwrap()
    }

    #[test]
    fn reads_what_it_wrote_and_reports_short_reads() {
        for one_thread in [true, false] {
            let file = tempfile::tempfile().unwrap();
            let mut ring = ring(one_thread);
            assert!(ring.register_file(3, file.as_fd()));
            let out = LeakedBuffers::new(&[4096, 512], 0, 7);
            let back = LeakedBuffers::new(&[8192], 0, 0);
            let wait = |ring: &mut Ring| {
                let mut results = Vec::new();
                while ring.in_flight() > 0 {
                    ring.enter().unwrap();
                    ring.reap(|user_data, result| results.push((user_data, result)));
                }
                results
            };
            ring.push(true, 3, &out.iovs(), 100, 42).unwrap();
            assert_eq!(wait(&mut ring), [(42, 4608)]);
            ring.push(false, 3, &back.iovs(), 100, 43).unwrap();
            assert_eq!(wait(&mut ring), [(43, 4608)]);
            assert!(back.get()[..4608].iter().all(|&b| b == 7));
            ring.unregister_file(3);
            ring.push(false, 3, &back.iovs(), 0, 44).unwrap();
            assert_eq!(wait(&mut ring), [(44, -libc::EBADF)]);
        }
    }

    #[test]
    fn a_full_ring_says_so_and_a_dropped_one_waits() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = ring(true);
        assert!(ring.register_file(0, file.as_fd()));
        let buffer = LeakedBuffers::new(&[4096], 0, 1);
        let pushed = (0..100).take_while(|&i| ring.push(true, 0, &buffer.iovs(), i * 4096, i).is_ok()).count();
        assert_eq!(pushed, 8);
        assert_eq!(ring.in_flight(), 8);
        drop(ring);
        assert_eq!(file.metadata().unwrap().len(), 8 * 4096, "all that was pushed was done");
    }

    #[test]
    fn memory_that_went_away_is_not_used_by_its_number() {
        let file = tempfile::tempfile().unwrap();
        let buffer = LeakedBuffers::new(&[4096], 0, 9);
        let address = buffer.iovs().segments()[0].iov_base as usize;
        let mut ring = ring(true);
        assert!(ring.register_file(0, file.as_fd()));
        // As register_hugepages does it, with memory of ours.
        // SAFETY: leaked memory stays.
        unsafe { ring.ring.submitter().register_buffers(buffer.iovs().segments()) }.unwrap();
        ring.buffers = vec![(address, 4096)];
        ring.forgotten = FORGOTTEN.load(Ordering::SeqCst);
        REGISTERED.0.fetch_min(address, Ordering::SeqCst);
        REGISTERED.1.fetch_max(address + 4096, Ordering::SeqCst);
        assert_eq!((ring.buffer_of(address, 4096), ring.buffer_of(address, 4097)), (Some(0), None));
        forget_memory(0x1000, 0x1000);
        assert_eq!(ring.buffer_of(address, 4096), Some(0), "somebody else's memory");
        forget_memory(address, 4096);
        assert_eq!(ring.buffer_of(address, 4096), None);
        ring.push(true, 0, &buffer.iovs(), 0, 1).unwrap();
        while ring.in_flight() > 0 {
            ring.enter().unwrap();
            ring.reap(|_, result| assert_eq!(result, 4096, "written as any other memory"));
        }
    }

    #[test]
    fn hugepages_are_found_and_joined() {
        let maps = "\
200000200000-200000400000 rw-s 00000000 00:2d 1 /dev/hugepages/spdk_pid9map_0
200000400000-200000600000 rw-s 00000000 00:2d 2                          /dev/hugepages/spdk_pid9map_1 (deleted)
200000a00000-200000c00000 rw-s 00000000 00:2d 3 /dev/hugepages/spdk_pid9map_2
55d0c0000000-55d0c0001000 r-xp 00000000 fe:00 4 /usr/bin/cat
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
";
        let expected = [(0x2000_0020_0000, 4 << 20), (0x2000_00a0_0000, 2 << 20)];
        assert_eq!(hugepage_regions(maps), expected);
        assert!(hugepage_regions("nonsense\n").is_empty());
    }
}
