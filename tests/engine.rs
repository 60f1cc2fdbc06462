//! The engines on real files, without SPDK: results, errors, and a model that random overlapping I/O is checked against.

#[path = "common/mod.rs"]
mod common;

use common::slow::SlowFile;
use lloop::engine::{Answer, LaneMap, Op, Pool, PoolOptions, Port, Request, Target, Uring, UringOptions, Volume};
use lloop::os::file::{DirectFile, OpenOptions};
use lloop::os::iov::{IoVecs, LeakedBuffers};
use lloop::os::queue::{List, Placed};
use proptest::prelude::*;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

struct Rig {
    uring: Option<(Uring<u64>, u32)>,
    pool: Pool<u64>,
    volume: Option<Volume<u64>>,
    port: Option<Port<u64>>,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

/// Makes a rig: [`Rig::new`]'s parameters.
type Make = fn(u64, u32, usize, bool) -> Rig;

fn threads(len_bytes: u64, block_bytes: u32, align_bytes: usize, read_only: bool) -> Rig {
    Rig::new(len_bytes, block_bytes, align_bytes, read_only)
}

fn uring(len_bytes: u64, block_bytes: u32, align_bytes: usize, read_only: bool) -> Rig {
    Rig::new(len_bytes, block_bytes, align_bytes, read_only).with_ring(Vec::new())
}

/// Half of what suits the ring goes to the kernel's own thread.
fn polled(len_bytes: u64, block_bytes: u32, align_bytes: usize, read_only: bool) -> Rig {
    Rig::new(len_bytes, block_bytes, align_bytes, read_only).with_ring(vec![0])
}

/// The same tests on every engine.
macro_rules! on_every_engine {
    ($($test:ident),* $(,)?) => {
        mod on_threads {
            $(#[test] fn $test() { super::$test(super::threads) })*
        }
        mod on_uring {
            $(#[test] fn $test() { super::$test(super::uring) })*
        }
        mod on_uring_polled {
            $(#[test] fn $test() { super::$test(super::polled) })*
        }
    };
}

on_every_engine!(
    what_is_written_is_read,
    memory_that_direct_io_does_not_take_is_bounced,
    a_read_behind_a_shrunken_file_fails_and_says_so,
    a_write_through_a_read_only_descriptor_fails,
    a_full_filesystem_is_reported_as_such,
    neighbours_are_merged_and_each_gets_its_own_result,
    zeroes_and_holes,
    a_thousand_flushes_and_writes_at_once,
);

fn can_punch(rig: &Rig) -> bool {
    let target = rig.volume.as_ref().unwrap().target();
    target.file().can_punch(target.guard().unlocked().unwrap())
}

/// A directory for test files: beside the build, because /tmp may be a tmpfs, which has no direct I/O.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(path: &Path, read_only: bool) -> DirectFile {
    DirectFile::open(path, OpenOptions { read_only, allow_any_fs: true }).unwrap()
}

impl Rig {
    fn new(len_bytes: u64, block_bytes: u32, align_bytes: usize, read_only: bool) -> Self {
        let dir = directory();
        let path = dir.path().join("image");
        std::fs::File::create(&path).unwrap().set_len(len_bytes).unwrap();
        let mut file = open(&path, read_only);
        file.pretend_alignment(align_bytes);
        Rig::on(file, block_bytes, path, dir)
    }

    fn on(file: DirectFile, block_bytes: u32, path: std::path::PathBuf, dir: tempfile::TempDir) -> Self {
        let pool = Pool::new(&PoolOptions { workers: 8, lane_limit: 8, ..PoolOptions::default() }).unwrap();
        let volume = pool.open(Arc::new(Target::new(file, 0, block_bytes)), LaneMap::single());
        Rig { uring: None, port: Some(Port::new(&pool, None)), volume: Some(volume), pool, path, _dir: dir }
    }

    /// Sends what suits it through a ring, as a channel does.
    fn with_ring(mut self, sqpoll_cpus: Vec<u32>) -> Self {
        let polls = !sqpoll_cpus.is_empty();
        let mut ring = Uring::new(&UringOptions { reactor_cpus: Vec::new(), sqpoll_cpus }, None).unwrap();
        assert_eq!(ring.features().1.is_some(), polls, "the kernel has polled rings");
        let slot = ring.add_file(self.volume.as_ref().unwrap().target().file().as_fd()).unwrap();
        self.uring = Some((ring, slot));
        self
    }

    fn stage(&mut self, op: Op, offset: u64, len: u64, iovs: IoVecs, token: u64) {
        let volume = self.volume.as_ref().unwrap();
        let mut request = Placed::on_heap(Request::new(op, volume, offset, len, iovs, token));
        let alone = request.claim();
        match &mut self.uring {
            Some((ring, slot)) if alone && request.suits_a_ring() => ring.submit(request, *slot),
            _ => self.port.as_mut().unwrap().stage(request),
        }
    }

    fn wait(&mut self) -> Vec<Answer<u64>> {
        let port = self.port.as_mut().unwrap();
        let deadline = std::time::Instant::now() + LIMIT;
        let mut answers = Vec::new();
        while port.in_flight() > 0 || self.uring.as_ref().is_some_and(|(ring, _)| !ring.is_idle()) {
            assert!(std::time::Instant::now() < deadline, "{} requests got no answer", port.in_flight());
            let mut list = port.reap();
            if let Some((ring, _)) = &mut self.uring {
                let mut again = List::default();
                ring.enter();
                ring.reap(&mut list, &mut again);
                while let Some(request) = again.pop_front() {
                    port.stage(request);
                }
            }
            port.ring();
            while let Some(request) = list.pop_front() {
                answers.push(port.answer(request));
            }
        }
        answers
    }

    fn one(&mut self, op: Op, offset: u64, len: u64, iovs: IoVecs) -> Result<(), i32> {
        self.stage(op, offset, len, iovs, 7);
        let answer = self.wait().pop().unwrap();
        assert_eq!((answer.token, answer.op, answer.len_bytes), (7, op, len));
        answer.result
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            if let Some((mut ring, slot)) = self.uring.take() {
                ring.remove_file(slot);
            }
            drop(self.port.take());
            self.pool.close(self.volume.take().unwrap(), LIMIT).unwrap();
            self.pool.stop(LIMIT).unwrap();
        }
    }
}

fn what_is_written_is_read(rig: Make) {
    let mut rig = rig(1 << 20, 4096, 4096, false);
    let data: Vec<u8> = (0..64 << 10).map(|i| (i / 7) as u8).collect();
    let out = LeakedBuffers::new(&[4096, 61440], 0, 0);
    out.set(&data);
    assert_eq!(rig.one(Op::Write, 8192, 65536, out.iovs()), Ok(()));
    let back = LeakedBuffers::new(&[32768, 32768], 0, 0xee);
    assert_eq!(rig.one(Op::Read, 8192, 65536, back.iovs()), Ok(()));
    assert!(back.get() == data);
    assert!(std::fs::read(&rig.path).unwrap()[8192..][..65536] == data);
}

fn memory_that_direct_io_does_not_take_is_bounced(rig: Make) {
    let mut rig = rig(8 << 20, 4096, 4096, false);
    // Odd addresses and lengths, longer than a bounce buffer.
    let out = LeakedBuffers::new(&[3, 3 << 20, 4093], 1, 0);
    let data: Vec<u8> = (0..(3 << 20) + 4096).map(|i| (i / 13) as u8).collect();
    out.set(&data);
    assert_eq!(rig.one(Op::Write, 4096, data.len() as u64, out.iovs()), Ok(()));
    let back = LeakedBuffers::new(&[4096, 3 << 20], 17, 0);
    assert_eq!(rig.one(Op::Read, 4096, data.len() as u64, back.iovs()), Ok(()));
    assert!(back.get() == data);
}

fn a_read_behind_a_shrunken_file_fails_and_says_so(rig: Make) {
    let mut rig = rig(1 << 20, 4096, 512, false);
    std::fs::File::options().write(true).open(&rig.path).unwrap().set_len(10_000).unwrap();
    let buffer = LeakedBuffers::new(&[8192], 0, 0);
    assert_eq!(rig.one(Op::Read, 0, 8192, buffer.iovs()), Ok(()));
    assert_eq!(rig.volume.as_ref().unwrap().target().damage(), None);
    assert_eq!(rig.one(Op::Read, 8192, 8192, buffer.iovs()), Err(libc::EIO), "crosses the end");
    assert_eq!(rig.one(Op::Read, 16384, 8192, buffer.iovs()), Err(libc::EIO), "lies behind the end");
    assert_eq!(rig.volume.as_ref().unwrap().target().damage(), Some(lloop::engine::target::Damage::Truncated));
}

fn a_write_through_a_read_only_descriptor_fails(rig: Make) {
    let mut rig = rig(1 << 20, 4096, 512, true);
    let buffer = LeakedBuffers::new(&[4096], 0, 1);
    assert_eq!(rig.one(Op::Write, 0, 4096, buffer.iovs()), Err(libc::EBADF));
    assert_eq!(rig.one(Op::Read, 0, 4096, buffer.iovs()), Ok(()));
    assert!(!can_punch(&rig));
}

fn a_full_filesystem_is_reported_as_such(rig: Make) {
    // A file size limit answers EFBIG where a full disk says ENOSPC: the same way back for any errno.
    let mut rig = rig(1 << 20, 4096, 512, false);
    let buffer = LeakedBuffers::new(&[4096], 0, 1);
    let behind_everything = (i64::MAX as u64 - (1 << 20)) & !4095;
    assert_eq!(rig.one(Op::Write, behind_everything, 4096, buffer.iovs()), Err(libc::EFBIG));
}

fn neighbours_are_merged_and_each_gets_its_own_result(rig: Make) {
    // In memory that suits direct I/O, that suits all but ext4's writes, and that does not suit; or in a mixture.
    for shift in [|_| 0, |_| 512, |_| 1, |i| [0, 512, 1][i % 3]] {
        neighbours_in(rig(1 << 20, 4096, 512, false), shift);
    }
}

fn neighbours_in(mut rig: Rig, shift: fn(usize) -> usize) {
    let len = 40 * 4096;
    std::fs::File::options().write(true).open(&rig.path).unwrap().set_len(len).unwrap();
    let buffers: Vec<_> = (0..64).map(|i| LeakedBuffers::new(&[4096], shift(i), i as u8 ^ 0x55)).collect();
    for (i, buffer) in buffers.iter().take(40).enumerate() {
        rig.stage(Op::Write, i as u64 * 4096, 4096, buffer.iovs(), i as u64);
    }
    assert!(rig.wait().iter().all(|a| a.result.is_ok()));
    let back: Vec<_> = (0..64).map(|i| LeakedBuffers::new(&[4096], shift(i), 0)).collect();
    for (i, buffer) in back.iter().enumerate() {
        rig.stage(Op::Read, i as u64 * 4096, 4096, buffer.iovs(), i as u64);
    }
    let answers = rig.wait();
    assert_eq!(answers.len(), 64);
    for answer in answers {
        let i = answer.token as usize;
        assert_eq!(answer.result, if i < 40 { Ok(()) } else { Err(libc::EIO) }, "block {i} of 40");
        if i < 40 {
            assert!(back[i].get() == buffers[i].get());
        }
    }
}

fn zeroes_and_holes(rig: Make) {
    let mut rig = rig(1 << 20, 4096, 512, false);
    assert!(can_punch(&rig));
    let ones = LeakedBuffers::new(&[1 << 20], 0, 0xff);
    assert_eq!(rig.one(Op::Write, 0, 1 << 20, ones.iovs()), Ok(()));
    assert_eq!(rig.one(Op::Flush, 0, 1 << 20, IoVecs::EMPTY), Ok(()));
    let blocks = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap());
    let full = blocks(&rig.path);
    assert_eq!(rig.one(Op::WriteZeroes, 4096, 8192, IoVecs::EMPTY), Ok(()));
    assert_eq!(blocks(&rig.path), full, "zeroed space is kept");
    assert_eq!(rig.one(Op::Unmap, 65536, 131072, IoVecs::EMPTY), Ok(()));
    assert!(blocks(&rig.path) <= full - 256, "unmapped space is given back");
    let mut expected = vec![0xff; 1 << 20];
    expected[4096..12288].fill(0);
    expected[65536..196608].fill(0);
    assert_eq!(rig.one(Op::Read, 0, 1 << 20, ones.iovs()), Ok(()));
    assert!(ones.get() == expected);
}

fn a_thousand_flushes_and_writes_at_once(rig: Make) {
    let mut rig = rig(4 << 20, 4096, 512, false);
    // (More than a ring has places.)
    let buffer = LeakedBuffers::new(&[4096], 0, 3);
    for i in 0..1000 {
        rig.stage(Op::Write, i % 1024 * 4096, 4096, buffer.iovs(), i);
        rig.stage(Op::Flush, 0, 4 << 20, IoVecs::EMPTY, i + 10_000);
    }
    let answers = rig.wait();
    assert_eq!(answers.len(), 2000);
    assert!(answers.iter().all(|a| a.result.is_ok()));
}

#[test]
fn a_pool_starts_what_it_needs_and_sleeps_when_idle() {
    let mut rig = Rig::new(1 << 20, 4096, 512, false);
    assert_eq!(rig.pool.worker_counts().0, 0, "no worker before the first request");
    assert_eq!(rig.one(Op::Flush, 0, 0, IoVecs::EMPTY), Ok(()));
    let deadline = std::time::Instant::now() + LIMIT;
    while rig.pool.worker_counts().1 > 0 {
        assert!(std::time::Instant::now() < deadline, "workers do not go to sleep");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!((1..=8).contains(&rig.pool.worker_counts().0));
    // And wake up again.
    for _ in 0..100 {
        assert_eq!(rig.one(Op::Flush, 0, 0, IoVecs::EMPTY), Ok(()));
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn two_threads_share_a_lane() {
    let mut rig = Rig::new(8 << 20, 4096, 512, false);
    let target = rig.volume.as_ref().unwrap().target().clone();
    let pool = rig.pool.clone();
    let other = std::thread::spawn(move || {
        let volume = pool.open(target, LaneMap::single());
        let mut port = Port::new(&pool, None);
        let buffer = LeakedBuffers::new(&[4096], 0, 2);
        for i in 0..500 {
            let mut request =
                Placed::on_heap(Request::new(Op::Write, &volume, (1024 + i) * 4096, 4096, buffer.iovs(), i));
            request.claim();
            port.stage(request);
            port.ring();
            while port.in_flight() > 0 {
                while let Some(request) = port.reap().pop_front() {
                    assert_eq!(port.answer(request).result, Ok(()));
                }
            }
        }
        drop(port);
        // The volume of this thread only: the target is the rig's as well.
        let _ = pool.close(volume, Duration::from_millis(50));
    });
    let buffer = LeakedBuffers::new(&[4096], 0, 1);
    for i in 0..500 {
        assert_eq!(rig.one(Op::Write, i * 4096, 4096, buffer.iovs()), Ok(()));
    }
    other.join().unwrap();
    let content = std::fs::read(&rig.path).unwrap();
    assert!(content[..500 * 4096].iter().all(|&b| b == 1));
    assert!(content[1024 * 4096..][..500 * 4096].iter().all(|&b| b == 2));
}

#[derive(Debug, Clone)]
struct Step {
    op: u8,
    block: u64,
    blocks: u64,
    fill: u8,
    shift: usize,
}

fn step() -> impl Strategy<Value = Step> {
    (0u8..12, 0u64..96, 1u64..24, 1u8..=255, prop_oneof![Just(0usize), Just(1), Just(512)])
        .prop_map(|(op, block, blocks, fill, shift)| Step { op, block, blocks, fill, shift })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..60)
}

/// Runs the steps in waves: within a wave writes do not overlap each other, so the result is known; they do overlap in pages.
fn against_a_model(make: Make, steps: Vec<Step>, block_bytes: u64, align_bytes: usize) {
    let len = 120 * block_bytes;
    let mut rig = make(len.next_multiple_of(4096), block_bytes as u32, align_bytes, false);
    let mut model = vec![0u8; len as usize];
    let mut wave: Vec<(u64, u64)> = Vec::new();
    let settle = |rig: &mut Rig, wave: &mut Vec<(u64, u64)>| {
        assert!(rig.wait().iter().all(|a| a.result.is_ok()));
        wave.clear();
    };
    for (i, step) in steps.iter().enumerate() {
        let (start, end) = (step.block * block_bytes, (step.block + step.blocks) * block_bytes);
        let (range, size) = (start as usize..end as usize, (end - start) as usize);
        if wave.iter().any(|w| w.0 < end && start < w.1) {
            settle(&mut rig, &mut wave);
        }
        match step.op {
            0..=5 => {
                let buffer = LeakedBuffers::new(&[size / 2, size - size / 2], step.shift, step.fill);
                rig.stage(Op::Write, start, end - start, buffer.iovs(), i as u64);
                model[range].fill(step.fill);
                wave.push((start, end));
            }
            6 | 7 => {
                let op = if step.op == 6 { Op::WriteZeroes } else { Op::Unmap };
                rig.stage(op, start, end - start, IoVecs::EMPTY, i as u64);
                model[range].fill(0);
                wave.push((start, end));
            }
            8 => rig.stage(Op::Flush, 0, len, IoVecs::EMPTY, i as u64),
            _ => {
                settle(&mut rig, &mut wave);
                let buffer = LeakedBuffers::new(&[size], step.shift, 0xaa);
                assert_eq!(rig.one(Op::Read, start, end - start, buffer.iovs()), Ok(()));
                assert!(buffer.get() == model[range], "step {i} reads something else at {start}..{end}");
            }
        }
    }
    settle(&mut rig, &mut wave);
    assert!(std::fs::read(&rig.path).unwrap()[..len as usize] == model, "the file is not what the model says");
}

/// What a block may hold: what was written last, and before that what failed to be written.
type May = Vec<u8>;

/// The same on a file whose transfers are short and fail now and then (FUSE: worker threads only). Blocks of what failed hold the old
/// or the new; everything else is exact. How many failed.
fn against_a_model_with_faults(steps: &[(Step, u8)], slow: &SlowFile, block_bytes: u64) -> usize {
    let mut failed = 0;
    let len = 120 * block_bytes;
    let mut rig = Rig::on(open(&slow.path, false), block_bytes as u32, slow.backing.clone(), directory());
    // (Files are used for several runs.)
    let mut model: Vec<May> = vec![vec![0]; 120];
    assert_eq!(rig.one(Op::WriteZeroes, 0, len, IoVecs::EMPTY), Ok(()));
    let mut wave: Vec<(u64, u64, u8)> = Vec::new();
    let mut settle = |rig: &mut Rig, wave: &mut Vec<(u64, u64, u8)>, model: &mut Vec<May>| {
        for answer in rig.wait() {
            let (start, end, fill) = wave[answer.token as usize];
            failed += usize::from(answer.result.is_err());
            for block in &mut model[start as usize..end as usize] {
                match answer.result {
                    Ok(()) => *block = vec![fill],
                    Err(errno) => {
                        assert_eq!(errno, libc::EIO);
                        block.push(fill);
                    }
                }
            }
        }
        wave.clear();
    };
    let check = |data: &[u8], model: &mut [May]| {
        for (block, may) in data.chunks_exact(block_bytes as usize).zip(model) {
            assert!(block.iter().all(|byte| byte == &block[0]), "a torn block");
            assert!(may.contains(&block[0]), "{} is none of {may:?}", block[0]);
            *may = vec![block[0]];
        }
    };
    for (step, fault) in steps {
        slow.set_faults(&match fault {
            0..=3 => format!("short={}", (u64::from(*fault) + 1) * 4096),
            4 => "error=5 times=1".into(),
            5 => format!("error=5 writes range={}-{}", step.block * block_bytes, step.block * block_bytes + 1),
            6 => "short=8192\nerror=5 times=2".into(),
            _ => String::new(),
        });
        let (start, end) = (step.block, step.block + step.blocks);
        let size = (step.blocks * block_bytes) as usize;
        if wave.iter().any(|w| w.0 < end && start < w.1) {
            settle(&mut rig, &mut wave, &mut model);
        }
        if step.op < 8 {
            let buffer = LeakedBuffers::new(&[size / 2, size - size / 2], step.shift, step.fill);
            rig.stage(Op::Write, start * block_bytes, size as u64, buffer.iovs(), wave.len() as u64);
            wave.push((start, end, step.fill));
        } else {
            settle(&mut rig, &mut wave, &mut model);
            let buffer = LeakedBuffers::new(&[size], step.shift, 0xaa);
            match rig.one(Op::Read, start * block_bytes, size as u64, buffer.iovs()) {
                Ok(()) => check(&buffer.get(), &mut model[start as usize..end as usize]),
                Err(errno) => assert_eq!(errno, libc::EIO),
            }
        }
    }
    settle(&mut rig, &mut wave, &mut model);
    slow.set_faults("");
    check(&std::fs::read(&slow.backing).unwrap()[..len as usize], &mut model);
    failed
}

/// Rings know neither FUSE nor another way to have the kernel fail in the middle on purpose. What a ring's transfers can be is short,
/// at the end of a file that ends within the device, wherever that is: reads up to there are exact, those across it fail.
fn against_a_model_that_ends(make: Make, steps: Vec<Step>, end_bytes: u64) {
    let mut rig = make(1 << 20, 4096, 512, false);
    std::fs::File::options().write(true).open(&rig.path).unwrap().set_len(end_bytes).unwrap();
    let mut model = vec![0u8; end_bytes as usize];
    for (i, step) in steps.iter().enumerate() {
        let (start, size) = (step.block * 4096, step.blocks * 4096);
        let inside = start + size <= end_bytes;
        let buffer = LeakedBuffers::new(&[size as usize], step.shift, step.fill);
        if step.op < 6 && inside {
            assert_eq!(rig.one(Op::Write, start, size, buffer.iovs()), Ok(()), "step {i}");
            model[start as usize..][..size as usize].fill(step.fill);
        } else {
            let expected = if inside { Ok(()) } else { Err(libc::EIO) };
            assert_eq!(
                rig.one(Op::Read, start, size, buffer.iovs()),
                expected,
                "step {i}: {start}+{size} of {end_bytes}"
            );
            assert!(!inside || buffer.get() == model[start as usize..][..size as usize], "step {i}");
        }
    }
    assert!(std::fs::read(&rig.path).unwrap() == model);
}

#[test]
fn random_io_agrees_with_the_model_when_transfers_are_short_and_fail() {
    let dir = directory();
    let slow = SlowFile::new(dir.path(), 1 << 20);
    let faulty = prop::collection::vec((step(), 0u8..10), 1..60);
    for block_bytes in [4096, 512] {
        let failed = std::cell::Cell::new(0);
        let run = |steps: Vec<(Step, u8)>| {
            slow.set_faults("");
            failed.set(failed.get() + against_a_model_with_faults(&steps, &slow, block_bytes));
            Ok(())
        };
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(30));
        runner.run(&faulty, run).unwrap();
        assert!(failed.get() > 0, "nothing has failed");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn random_io_agrees_with_the_model_in_pages(steps in steps()) {
        against_a_model(threads, steps, 4096, 4096);
    }

    #[test]
    fn random_io_agrees_with_the_model_in_parts_of_pages(steps in steps()) {
        against_a_model(threads, steps, 512, 4096);
    }

    #[test]
    fn random_io_agrees_with_the_model_on_uring_polled(steps in steps(), sectors: bool) {
        against_a_model(polled, steps, if sectors { 512 } else { 4096 }, if sectors { 512 } else { 4096 });
    }

    #[test]
    fn random_io_agrees_with_the_model_on_uring(steps in steps(), sectors: bool) {
        against_a_model(uring, steps, if sectors { 512 } else { 4096 }, if sectors { 512 } else { 4096 });
    }

    #[test]
    fn random_io_agrees_with_the_model_up_to_a_files_end(steps in steps(), sectors in 100u64..960, ring: bool) {
        against_a_model_that_ends(if ring { uring } else { threads }, steps, sectors * 512);
    }

    #[test]
    fn random_io_agrees_with_the_model_in_sectors(steps in steps()) {
        against_a_model(threads, steps, 512, 512);
    }
}
