//! A filesystem whose file `image` passes everything on to a file below, a fixed time after it was asked. Its callers are blocked
//! meanwhile: it has no asynchronous direct I/O. For benchmarks, where its own work must not be what is measured: one thread takes
//! requests, one answers those that are due. (tests/slowfs can do more, and takes five times as long for it.)
//!
//! usage: latencyfs BACKING MOUNTPOINT LATENCY_US
//!
//! Ends when unmounted.

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

const IMAGE: INodeNo = INodeNo(2);
const NO_CACHE: Duration = Duration::ZERO;

/// What is to be done when the time has come.
enum Work {
    Read(u64, u32, ReplyData),
    Write(u64, Vec<u8>, ReplyWrite),
    Sync(ReplyEmpty),
}

/// What waits for its time, in order.
#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<(Instant, Work)>>,
    not_empty: Condvar,
}

impl Queue {
    /// Answers everything when it is due.
    fn serve(&self, file: &File) -> ! {
        let (mut due, mut buffer) = (Vec::new(), Vec::new());
        loop {
            let mut waiting = self.waiting.lock().unwrap();
            let next = loop {
                match waiting.front() {
                    Some((at, _)) => break *at,
                    None => waiting = self.not_empty.wait(waiting).unwrap(),
                }
            };
            let now = Instant::now();
            let count = waiting.iter().take_while(|(at, _)| *at <= now).count();
            due.extend(waiting.drain(..count).map(|(_, work)| work));
            drop(waiting);
            if due.is_empty() {
                std::thread::sleep(next - now);
            }
            for work in due.drain(..) {
                match work {
                    Work::Read(offset, len, reply) => {
                        buffer.resize(len as usize, 0);
                        match file.read_at(&mut buffer, offset) {
                            Ok(n) => reply.data(&buffer[..n]),
                            Err(e) => reply.error(e.into()),
                        }
                    }
                    Work::Write(offset, data, reply) => match file.write_at(&data, offset) {
                        Ok(n) => reply.written(n as u32),
                        Err(e) => reply.error(e.into()),
                    },
                    Work::Sync(reply) => match file.sync_data() {
                        Ok(()) => reply.ok(),
                        Err(e) => reply.error(e.into()),
                    },
                }
            }
        }
    }
}

struct LatencyFs {
    file: Arc<File>,
    latency: Duration,
    queue: Arc<Queue>,
}

impl LatencyFs {
    fn later(&self, work: Work) {
        let mut waiting = self.queue.waiting.lock().unwrap();
        waiting.push_back((Instant::now() + self.latency, work));
        if waiting.len() == 1 {
            self.queue.not_empty.notify_one();
        }
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let (kind, perm, size, blocks) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0, 0),
            _ => {
                let meta = self.file.metadata()?;
                (FileType::RegularFile, 0o644, meta.size(), meta.blocks())
            }
        };
        let (time, nlink, uid, gid, rdev, flags, blksize) = (UNIX_EPOCH, 1, 0, 0, 0, 0, 4096);
        let (atime, mtime, ctime, crtime) = (time, time, time, time);
        Ok(FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            flags,
        })
    }
}

impl Filesystem for LatencyFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = if name == "image" { self.attr(IMAGE) } else { Err(Errno::ENOENT) };
        match found {
            Ok(attr) => reply.entry(&NO_CACHE, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.later(Work::Read(offset, size, reply));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.later(Work::Write(offset, data.to_vec(), reply));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.later(Work::Sync(reply));
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (backing, mountpoint, latency_us) = match &args[..] {
        [backing, mountpoint, latency] if latency.parse::<u64>().is_ok() => (backing, mountpoint, latency),
        _ => {
            eprintln!("usage: latencyfs BACKING MOUNTPOINT LATENCY_US");
            std::process::exit(2);
        }
    };
    let latency = Duration::from_micros(latency_us.parse().expect("a number"));
    let file = Arc::new(File::options().read(true).write(true).open(backing).expect("the backing file opens"));
    let queue = Arc::new(Queue::default());
    let (served, below) = (queue.clone(), file.clone());
    std::thread::spawn(move || {
        // Else each sleep is 50 microseconds too long.
        // SAFETY: concerns the calling thread only.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
        served.serve(&below)
    });
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("latencyfs".to_owned())];
    fuser::mount(LatencyFs { file, latency, queue }, mountpoint, &config).expect("the filesystem is served");
}
