//! An io_uring for direct reads and writes: registered files, registered memory, completions without interrupts where the kernel
//! can; each of those is tried and done without where it cannot.
//!
//! A ring is entered by the thread that pushes, or it is a *polled* one (SQPOLL): then a thread of the kernel's takes what is pushed,
//! on a processor that an operator has granted, and sleeps when nothing comes for a while.
//!
//! Any thread may make a ring, and another one use it: SPDK moves its threads between reactors. So no ring is set up for a single
//! issuer (IORING_SETUP_SINGLE_ISSUER): after a move the kernel would refuse each of its calls with EEXIST.

use super::iov::IoVecs;
use super::thread::CpuSet;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Slots for registered files.
const FILES: u32 = 512;
/// The kernel takes registered buffers of at most this length.
const MAX_BUFFER_BYTES: usize = 1 << 30;
/// And we register at most so many.
const MAX_BUFFERS: usize = 256;
/// How long the kernel's thread of a polled ring looks for more before it sleeps.
const POLL_IDLE_MS: u32 = 1;

/// The polled rings there are. They share threads when there are more of them than processors for those.
static POLLED: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// What any ring has registered lies between these two addresses.
static REGISTERED: (AtomicUsize, AtomicUsize) = (AtomicUsize::new(usize::MAX), AtomicUsize::new(0));
/// Counts how often something of that was given back to the system.
static FORGOTTEN: AtomicU64 = AtomicU64::new(0);

/// How many rings read the maps at this moment: what they register is not in `REGISTERED` yet.
static REGISTERING: AtomicUsize = AtomicUsize::new(0);

struct Registering;

impl Registering {
    fn begin() -> Self {
        REGISTERING.fetch_add(1, Ordering::SeqCst);
        Registering
    }
}

impl Drop for Registering {
    fn drop(&mut self) {
        REGISTERING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Memory that is about to be unmapped, or was: start and length.
static GONE: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

fn gone() -> MutexGuard<'static, Vec<(usize, usize)>> {
    GONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// To be called after memory was mapped that rings may register, and before it is unmapped.
pub fn memory_changes(start: usize, len_bytes: usize, is_mapped: bool) {
    // Before anybody can read that it is still there.
    let mut gone = gone();
    gone.retain(|&(other, len)| other >= start + len_bytes || other + len <= start);
    if !is_mapped {
        gone.push((start, len_bytes));
        forget_memory(start, len_bytes);
    }
}

/// Other memory can appear at the same addresses later, while the kernel would still move data to and from the old. From here on the
/// rings there are use all memory unregistered.
fn forget_memory(start: usize, len_bytes: usize) {
    let (low, high) = (REGISTERED.0.load(Ordering::SeqCst), REGISTERED.1.load(Ordering::SeqCst));
    let is_registered = start < high && start.saturating_add(len_bytes) > low;
    if is_registered || REGISTERING.load(Ordering::SeqCst) > 0 {
        FORGOTTEN.fetch_add(1, Ordering::SeqCst);
    }
}

/// How a ring may be set up.
#[derive(Debug, Clone)]
pub struct RingOptions {
    /// How many I/O can be in flight.
    pub entries: u32,
    /// Processors that the kernel's helpers keep away from.
    pub reactor_cpus: Vec<u32>,
    /// Processors that threads of polled rings may take.
    pub sqpoll_cpus: Vec<u32>,
}

/// What the kernel could do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Files are registered.
    pub files: bool,
    /// How many buffers are registered.
    pub buffers: usize,
    /// Scattered memory can be registered memory, too.
    pub vectored_fixed: bool,
    /// A thread of the kernel's takes what is pushed.
    pub polled: bool,
}

/// A ring.
///
/// # Invariants
/// `in_flight` counts what the kernel has or will be given: pushed and not yet seen completed. The memory of those belongs to the
/// kernel: the ring is not freed before they have completed.
pub struct Ring {
    ring: IoUring,
    in_flight: u32,
    memory: Memory,
    features: Features,
    /// The kernel has refused a call for a reason that does not pass: the ring is not entered any more.
    broken: bool,
}

/// What memory a ring has registered.
#[derive(Default)]
struct Memory {
    buffers: Vec<(usize, usize)>,
    /// [`FORGOTTEN`] when the buffers were registered.
    forgotten: u64,
    /// Scattered memory can be registered memory, too.
    vectored: bool,
}

/// A ring that I/O is being pushed to. The kernel sees what was pushed when this is dropped.
pub struct Batch<'a> {
    queue: squeue::SubmissionQueue<'a>,
    in_flight: &'a mut u32,
    memory: &'a Memory,
}

/// What an I/O does with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Fills memory.
    Read,
    /// Writes memory.
    Write,
    /// The same; it is on stable storage when the I/O completes.
    WriteDurably,
}

/// An I/O that was refused: the ring is full.
#[derive(Debug)]
pub struct Full;

impl Ring {
    /// Makes a ring.
    ///
    /// # Errors
    /// The errno of io_uring_setup: ENOSYS or EPERM where kernel or sandbox have none.
    pub fn new(options: &RingOptions) -> Result<Self, i32> {
        let cooperative = |b: &mut io_uring::Builder| {
            b.setup_coop_taskrun().setup_taskrun_flag();
        };
        let plain = |_: &mut io_uring::Builder| {};
        let build = |configure: &dyn Fn(&mut io_uring::Builder)| {
            let mut builder = IoUring::builder();
            configure(&mut builder);
            builder.setup_cqsize(options.entries * 2).dontfork().build(options.entries)
        };
        let ring =
            build(&cooperative).or_else(|_| build(&plain)).map_err(|e| e.raw_os_error().unwrap_or(libc::ENOSYS))?;
        Ok(Ring::around(ring))
    }

    /// Makes a polled ring. Never more of the kernel's threads than processors are granted: further rings share.
    ///
    /// # Errors
    /// ENODEV when none is granted; the errno of io_uring_setup: EPERM where the kernel is old and we may not.
    pub fn new_polled(options: &RingOptions) -> Result<Self, i32> {
        let cpus = &options.sqpoll_cpus;
        // Held meanwhile: a ring that others attach to must not be closed before they have.
        let mut polled = POLLED.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = polled.len();
        let &cpu = cpus.get(turn % cpus.len().max(1)).ok_or(libc::ENODEV)?;
        let mut builder = IoUring::builder();
        // Pinned: where it is not, the kernel lets it take any processor, a reactor's, too.
        builder.setup_sqpoll(POLL_IDLE_MS).setup_sqpoll_cpu(cpu);
        if turn >= cpus.len() {
            builder.setup_attach_wq(polled[turn % cpus.len()]);
        }
        let ring = builder.setup_cqsize(options.entries * 2).dontfork().build(options.entries);
        let ring = ring.map_err(|e| e.raw_os_error().unwrap_or(libc::ENOSYS))?;
        polled.push(ring.as_raw_fd());
        drop(polled);
        let mut this = Ring::around(ring);
        this.features.polled = true;
        Ok(this)
    }

    /// What all rings have.
    fn around(ring: IoUring) -> Self {
        let (memory, features) = (Memory::default(), Features::default());
        let mut this = Ring { ring, in_flight: 0, memory, features, broken: false };
        this.features.files = this.ring.submitter().register_files_sparse(FILES).is_ok();
        this
    }

    /// To be called by the thread that uses the ring from here on: the kernel's helper threads inherit its pinning otherwise, and would
    /// compete with the reactor, which never sleeps.
    pub fn adopt(&self, reactor_cpus: &[u32]) {
        let _ = self.ring.submitter().register_iowq_aff(CpuSet::but(reactor_cpus).raw());
    }

    /// What the kernel could do for this ring.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Registers this process's hugepages, where SPDK's buffers are. Memory that comes later is used unregistered. Takes some
    /// milliseconds: not for a reactor.
    pub fn register_hugepages(&mut self) {
        // From before the maps are read to the end every mapping that goes away counts: it may be one of those read.
        self.memory.forgotten = FORGOTTEN.load(Ordering::SeqCst);
        let _registering = Registering::begin();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let is_gone = |region: &(usize, usize)| {
            gone().iter().any(|&(start, len)| region.0 < start + len && start < region.0 + region.1)
        };
        let regions: Vec<_> = hugepage_regions(&maps).into_iter().filter(|region| !is_gone(region)).collect();
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
            self.memory.buffers = regions;
            let mut probe = io_uring::Probe::new();
            self.features.vectored_fixed = self.ring.submitter().register_probe(&mut probe).is_ok()
                && probe.is_supported(opcode::ReadvFixed::CODE)
                && probe.is_supported(opcode::WritevFixed::CODE);
            self.memory.vectored = self.features.vectored_fixed;
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

    /// Begins to push I/O.
    pub fn batch(&mut self) -> Batch<'_> {
        Batch { queue: self.ring.submission(), in_flight: &mut self.in_flight, memory: &self.memory }
    }

    /// Hands over what is queued, and lets the kernel post what has completed. One system call, none when there is nothing to do, or
    /// when the kernel's own thread is awake.
    ///
    /// # Errors
    /// The errno, when the kernel takes nothing now (EBUSY, EAGAIN: try again after reaping).
    pub fn enter(&mut self) -> Result<(), i32> {
        if self.features.polled {
            // Between what was pushed and the look at whether the kernel's thread sleeps: it does the same the other way round.
            fence(Ordering::SeqCst);
        }
        let queue = self.ring.submission();
        let (queued, pending) = (queue.len(), queue.taskrun() || queue.cq_overflow());
        let asleep = self.features.polled && queue.need_wakeup();
        drop(queue);
        if (queued == 0 || (self.features.polled && !asleep)) && !pending {
            return Ok(());
        }
        const GETEVENTS: u32 = 1;
        const SQ_WAKEUP: u32 = 2;
        let flags = if pending { GETEVENTS } else { 0 } | if asleep { SQ_WAKEUP } else { 0 };
        if self.broken {
            return Err(libc::EBADFD);
        }
        loop {
            // SAFETY: no argument structure is passed.
            let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued as u32, 0, flags, None) };
            match result.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)) {
                Ok(_) => return Ok(()),
                Err(libc::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Ends the use of a ring that the kernel refuses to be entered. What it has not taken yet is taken back: how many of the last
    /// pushes that were (of a polled ring none: its thread takes them). What it has taken completes all the same.
    pub fn give_up(&mut self) -> usize {
        self.broken = true;
        // A thread of the kernel's may still take what is queued.
        let left = if self.features.polled { 0 } else { self.ring.submission().len() };
        self.in_flight -= left as u32;
        left
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

impl Memory {
    /// The registered buffer that `address..address + len` lies in.
    fn buffer_of(&self, address: usize, len: usize) -> Option<u16> {
        if FORGOTTEN.load(Ordering::Acquire) != self.forgotten {
            return None;
        }
        let inside = |&(start, size): &(usize, usize)| address >= start && address + len <= start + size;
        self.buffers.iter().position(inside).map(|i| i as u16)
    }
}

impl Batch<'_> {
    /// Queues what `access` says with `iovs` at `offset_bytes` of the file in `slot`; [`Ring::enter`] hands it to the kernel.
    /// `user_data` comes back with its result.
    ///
    /// # Errors
    /// [`Full`]; nothing was queued.
    pub fn push(
        &mut self,
        access: Access,
        slot: u32,
        iovs: &IoVecs,
        offset_bytes: u64,
        user_data: u64,
    ) -> Result<(), Full> {
        let (fd, at) = (types::Fixed(slot), offset_bytes);
        let write = access != Access::Read;
        let flags = if access == Access::WriteDurably { libc::RWF_DSYNC } else { 0 };
        let segments = iovs.segments();
        let entry: squeue::Entry = if let [segment] = segments {
            let (buffer, len) = (segment.iov_base.cast::<u8>(), segment.iov_len as u32);
            match (write, self.memory.buffer_of(buffer as usize, segment.iov_len)) {
                (false, Some(i)) => opcode::ReadFixed::new(fd, buffer, len, i).offset(at).build(),
                (true, Some(i)) => opcode::WriteFixed::new(fd, buffer, len, i).rw_flags(flags).offset(at).build(),
                (false, None) => opcode::Read::new(fd, buffer, len).offset(at).build(),
                (true, None) => opcode::Write::new(fd, buffer, len).rw_flags(flags).offset(at).build(),
            }
        } else {
            let (first, count) = (segments.as_ptr(), segments.len() as u32);
            let all_in =
                |i: u16| segments.iter().all(|s| self.memory.buffer_of(s.iov_base as usize, s.iov_len) == Some(i));
            let buffer = segments.first().and_then(|s| self.memory.buffer_of(s.iov_base as usize, s.iov_len));
            match (write, buffer.filter(|&i| self.memory.vectored && all_in(i))) {
                (false, Some(i)) => opcode::ReadvFixed::new(fd, first, count, i).offset(at).build(),
                (true, Some(i)) => opcode::WritevFixed::new(fd, first, count, i).rw_flags(flags).offset(at).build(),
                (false, None) => opcode::Readv::new(fd, first, count).offset(at).build(),
                (true, None) => opcode::Writev::new(fd, first, count).rw_flags(flags).offset(at).build(),
            }
        };
        // SAFETY: array and segments stay valid until the request is answered (the invariant of IoVecs), which its owner does
        // after the completion only; the ring's own drop waits for those that nobody waited for.
        unsafe { self.queue.push(&entry.user_data(user_data)) }.map_err(|_| Full)?;
        *self.in_flight += 1;
        Ok(())
    }

    /// How many the kernel has not taken yet.
    pub fn backlog(&self) -> usize {
        self.queue.len()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.broken {
                // It may refuse to wait. What it has taken completes by itself; what it has not was taken back, so nothing is submitted.
                std::thread::sleep(std::time::Duration::from_millis(1));
            } else if let Err(e) = self.ring.submit_and_wait(1)
                && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                // The kernel may still write to memory that is not ours to give back: better no process than a wrong one.
                eprintln!("lloop: waiting for {} I/O in flight failed: {e}", self.in_flight);
                std::process::abort();
            }
            self.reap(|_, _| {});
        }
        if self.features.polled {
            let fd = self.ring.as_raw_fd();
            POLLED.lock().unwrap_or_else(PoisonError::into_inner).retain(|&other| other != fd);
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

    fn options(sqpoll_cpus: Vec<u32>) -> RingOptions {
        RingOptions { entries: 8, reactor_cpus: Vec::new(), sqpoll_cpus }
    }

    fn ring() -> Ring {
        Ring::new(&options(Vec::new())).unwrap()
    }

    /// For tests with polled rings: they would share threads, and move each other's.
    static ALONE: Mutex<()> = Mutex::new(());

    fn polled() -> Ring {
        Ring::new_polled(&options(vec![0])).unwrap()
    }

    #[test]
    fn reads_what_it_wrote_and_reports_short_reads() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        for mut ring in [ring(), polled()] {
            let file = tempfile::tempfile().unwrap();
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
            ring.batch().push(Access::Write, 3, &out.iovs(), 100, 42).unwrap();
            assert_eq!(wait(&mut ring), [(42, 4608)]);
            ring.batch().push(Access::Read, 3, &back.iovs(), 100, 43).unwrap();
            assert_eq!(wait(&mut ring), [(43, 4608)]);
            assert!(back.get()[..4608].iter().all(|&b| b == 7));
            ring.unregister_file(3);
            ring.batch().push(Access::Read, 3, &back.iovs(), 0, 44).unwrap();
            assert_eq!(wait(&mut ring), [(44, -libc::EBADF)]);
        }
    }

    #[test]
    fn a_full_ring_says_so_and_a_dropped_one_waits() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        for mut ring in [ring(), polled()] {
            let file = tempfile::tempfile().unwrap();
            assert!(ring.register_file(0, file.as_fd()));
            let buffer = LeakedBuffers::new(&[4096], 0, 1);
            let mut batch = ring.batch();
            let pushed =
                (0..100).take_while(|&i| batch.push(Access::Write, 0, &buffer.iovs(), i * 4096, i).is_ok()).count();
            assert_eq!((pushed, batch.backlog()), (8, 8));
            drop(batch);
            assert_eq!(ring.in_flight(), 8);
            drop(ring);
            assert_eq!(file.metadata().unwrap().len(), 8 * 4096, "all that was pushed was done");
        }
    }

    #[test]
    fn memory_that_went_away_is_not_used_by_its_number() {
        let file = tempfile::tempfile().unwrap();
        let buffer = LeakedBuffers::new(&[4096], 0, 9);
        let address = buffer.iovs().segments()[0].iov_base as usize;
        let mut ring = ring();
        assert!(ring.register_file(0, file.as_fd()));
        // As register_hugepages does it, with memory of ours.
        // SAFETY: leaked memory stays.
        unsafe { ring.ring.submitter().register_buffers(buffer.iovs().segments()) }.unwrap();
        ring.memory.buffers = vec![(address, 4096)];
        ring.memory.forgotten = FORGOTTEN.load(Ordering::SeqCst);
        REGISTERED.0.fetch_min(address, Ordering::SeqCst);
        REGISTERED.1.fetch_max(address + 4096, Ordering::SeqCst);
        assert_eq!((ring.memory.buffer_of(address, 4096), ring.memory.buffer_of(address, 4097)), (Some(0), None));
        forget_memory(0x1000, 0x1000);
        assert_eq!(ring.memory.buffer_of(address, 4096), Some(0), "somebody else's memory");
        forget_memory(address, 4096);
        assert_eq!(ring.memory.buffer_of(address, 4096), None);
        ring.batch().push(Access::Write, 0, &buffer.iovs(), 0, 1).unwrap();
        while ring.in_flight() > 0 {
            ring.enter().unwrap();
            ring.reap(|_, result| assert_eq!(result, 4096, "written as any other memory"));
        }
    }

    #[test]
    fn another_thread_may_use_it() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = std::thread::spawn(ring).join().unwrap();
        ring.adopt(&[]);
        assert!(ring.register_file(0, file.as_fd()));
        let buffer = LeakedBuffers::new(&[4096], 0, 3);
        for turn in 0..3 {
            ring.batch().push(Access::WriteDurably, 0, &buffer.iovs(), turn * 4096, turn).unwrap();
            // Submitted here, completed there: as when SPDK moves its thread in between.
            ring.enter().unwrap();
            ring = std::thread::spawn(move || {
                while ring.in_flight() > 0 {
                    ring.enter().unwrap();
                    ring.reap(|_, result| assert_eq!(result, 4096));
                }
                ring
            })
            .join()
            .unwrap();
        }
    }

    #[test]
    fn a_broken_one_gives_back_what_the_kernel_has_not_taken() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = ring();
        assert!(ring.register_file(0, file.as_fd()));
        let buffer = LeakedBuffers::new(&[4096], 0, 3);
        ring.batch().push(Access::Write, 0, &buffer.iovs(), 0, 1).unwrap();
        ring.enter().unwrap();
        for at in 1..4 {
            ring.batch().push(Access::Write, 0, &buffer.iovs(), at * 4096, at).unwrap();
        }
        assert_eq!(ring.give_up(), 3);
        assert_eq!((ring.enter(), ring.in_flight()), (Err(libc::EBADFD), 1));
        drop(ring);
        assert_eq!(file.metadata().unwrap().len(), 4096, "what it had taken was done, and nothing else");
    }

    /// Where the kernel's threads of this process's polled rings may run.
    fn processors_of_sq_threads() -> Vec<String> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let of_task = |task: std::io::Result<std::fs::DirEntry>| {
            let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
            field("Name:").starts_with("iou-sqp-").then(|| field("Cpus_allowed_list:").to_owned())
        };
        tasks.filter_map(of_task).collect()
    }

    #[test]
    fn polled_rings_stay_where_they_may_be_and_share_threads() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of other tests' rings end when the kernel finds the time.
        while !processors_of_sq_threads().is_empty() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(Ring::new_polled(&options(Vec::new())).err(), Some(libc::ENODEV), "none is granted");
        let rings: Vec<Ring> = (0..3).map(|_| Ring::new_polled(&options(vec![0])).unwrap()).collect();
        // A thread of the kernel's has its name when it runs first.
        while processors_of_sq_threads().is_empty() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(processors_of_sq_threads(), ["0"], "one thread for all");
        let file = tempfile::tempfile().unwrap();
        let buffer = LeakedBuffers::new(&[4096], 0, 5);
        for (i, mut ring) in rings.into_iter().enumerate() {
            assert!(ring.register_file(0, file.as_fd()));
            ring.batch().push(Access::Write, 0, &buffer.iovs(), i as u64 * 4096, 1).unwrap();
            drop(ring);
        }
        assert_eq!(file.metadata().unwrap().len(), 3 * 4096);
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
