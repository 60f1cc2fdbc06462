//! No I/O allocates from the heap: counted, over all threads, on every engine, after a warm-up.

use lloop::engine::{LaneMap, Op, Pool, PoolOptions, Port, Request, Target, Uring, UringOptions, Volume};
use lloop::os::file::{DirectFile, OpenOptions};
use lloop::os::iov::{IoVecs, LeakedBuffers};
use lloop::os::queue::{List, Node, Placed};
use std::alloc::{GlobalAlloc, Layout, System};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counts while it is told to.
struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);
static COUNTING: AtomicBool = AtomicBool::new(false);

// SAFETY: the system's allocator does the work; counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: usize = 32;
type Slot = MaybeUninit<Node<Request<usize>>>;

/// One round at full depth: reads, writes, neighbours, memory to be bounced, a flush, zeroes. Requests lie in `slots`, as they do
/// in SPDK's I/O.
fn round(
    volume: &Volume<usize>,
    port: &mut Port<usize>,
    mut ring: Option<&mut (Uring<usize>, u32)>,
    slots: &mut [Slot],
    buffers: &[LeakedBuffers],
) {
    for (i, slot) in slots.iter_mut().enumerate() {
        let (op, iovs) = match i {
            0 => (Op::Flush, IoVecs::EMPTY),
            1 => (Op::WriteZeroes, IoVecs::EMPTY),
            _ => (if i % 2 == 0 { Op::Read } else { Op::Write }, buffers[i].iovs()),
        };
        let offset = if i < DEPTH / 2 { i as u64 * 4096 } else { (i as u64 * 7919 % 200) * 4096 };
        let request = Request::new(op, volume, offset, 4096, iovs, i);
        // SAFETY: the slot is borrowed until all answers are taken, below, and used for this request only.
        let mut request = unsafe { Placed::new(NonNull::from(slot), request) };
        let alone = request.claim();
        match &mut ring {
            Some((ring, file)) if alone && request.suits_a_ring() => ring.submit(request, *file),
            _ => port.stage(request),
        }
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut answered = 0;
    while answered < slots.len() {
        assert!(Instant::now() < deadline, "{answered} of {} answers", slots.len());
        port.ring();
        let mut done = port.reap();
        if let Some((ring, _)) = &mut ring {
            let mut again = List::default();
            ring.enter();
            ring.reap(&mut done, &mut again);
            while let Some(request) = again.pop_front() {
                port.stage(request);
            }
        }
        while let Some(request) = done.pop_front() {
            assert_eq!(port.answer(request).result, Ok(()));
            answered += 1;
        }
    }
}

#[test]
fn no_io_allocates() {
    for uring in [None, Some(Vec::new()), Some(vec![0])] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("image");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let file = DirectFile::open(&path, OpenOptions { read_only: false, allow_any_fs: true }).unwrap();
        // One worker: that every thread is warmed up must not depend on which of them ran.
        let pool = Pool::new(&PoolOptions { workers: 1, ..PoolOptions::default() }).unwrap();
        let volume = pool.open(Arc::new(Target::new(file, 0, 4096)), LaneMap::single());
        let mut port = Port::new(&pool, None);
        let polls = uring.as_ref().is_some_and(|cpus: &Vec<u32>| !cpus.is_empty());
        let mut ring = uring.clone().map(|sqpoll_cpus| {
            let mut ring = Uring::new(&UringOptions { reactor_cpus: Vec::new(), sqpoll_cpus }, None).unwrap();
            let slot = ring.add_file(volume.target().file().as_fd()).unwrap();
            (ring, slot)
        });
        let buffers: Vec<_> =
            (0..DEPTH).map(|i| LeakedBuffers::new(&[4096], if i % 8 == 3 { 1 } else { 0 }, 1)).collect();
        let mut slots: Vec<Slot> = (0..DEPTH).map(|_| MaybeUninit::uninit()).collect();
        for _ in 0..50 {
            round(&volume, &mut port, ring.as_mut(), &mut slots, &buffers);
        }
        COUNT.store(0, Ordering::Relaxed);
        COUNTING.store(true, Ordering::SeqCst);
        for _ in 0..200 {
            round(&volume, &mut port, ring.as_mut(), &mut slots, &buffers);
        }
        COUNTING.store(false, Ordering::SeqCst);
        let count = COUNT.load(Ordering::Relaxed);
        assert_eq!(count, 0, "{count} allocations in {} I/O (uring: {uring:?})", 200 * DEPTH);
        let helped = ring.as_ref().map_or(0, |(ring, _)| ring.watch().helped());
        assert_eq!(helped > 0, polls, "{helped} by the kernel's thread");
        drop((port, ring));
        pool.close(volume, Duration::from_secs(10)).unwrap();
        pool.stop(Duration::from_secs(10)).unwrap();
    }
}
