//! A filesystem with one file, `image`, that passes everything on to a file below and can be slow, stuck, short or failing: what
//! a sick server looks like. Blocks the caller, as Lustre does: no asynchronous direct I/O.
//!
//! usage: slowfs BACKING MOUNTPOINT
//!
//! It does what `BACKING.faults` says, read anew when that changes: words separated by blanks, any of
//! `latency_us=N` (every read and write takes that much longer), `hang` (they wait until this word is gone), `short=N` (they move
//! N bytes at most), `error=ERRNO` (they fail), `range=START-END` (the above only for those that touch these bytes).
//! Ends when unmounted.

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const IMAGE: u64 = 2;
const NO_CACHE: Duration = Duration::ZERO;

#[derive(Clone, Default)]
struct Faults {
    /// Which file of faults this is: the clock of changes is too coarse to tell two of them apart by it alone.
    version: Option<(u64, SystemTime)>,
    latency: Duration,
    hang: bool,
    short: Option<usize>,
    error: Option<i32>,
    range: Option<(u64, u64)>,
}

struct SlowFs {
    file: File,
    faults_path: PathBuf,
    faults: Mutex<Faults>,
}

impl SlowFs {
    /// What is wrong now.
    fn faults(&self) -> Faults {
        let changed = std::fs::metadata(&self.faults_path).and_then(|m| Ok((m.ino(), m.modified()?))).ok();
        let mut faults = self.faults.lock().unwrap();
        if faults.version != changed || changed.is_none() {
            *faults = Faults { version: changed, ..Faults::default() };
            for word in std::fs::read_to_string(&self.faults_path).unwrap_or_default().split_whitespace() {
                let (key, value) = word.split_once('=').unwrap_or((word, ""));
                match key {
                    "latency_us" => faults.latency = Duration::from_micros(value.parse().expect("a number")),
                    "hang" => faults.hang = true,
                    "short" => faults.short = Some(value.parse().expect("a number")),
                    "error" => faults.error = Some(value.parse().expect("an errno")),
                    "range" => {
                        let (start, end) = value.split_once('-').expect("START-END");
                        faults.range = Some((start.parse().expect("a number"), end.parse().expect("a number")));
                    }
                    other => eprintln!("slowfs: unknown fault {other}"),
                }
            }
        }
        faults.clone()
    }

    /// Suffers; how many of `len` bytes may be moved.
    fn suffer(&self, offset: u64, len: usize) -> Result<usize, Errno> {
        loop {
            let faults = self.faults();
            if faults.range.is_some_and(|(start, end)| offset >= end || offset + len as u64 <= start) {
                return Ok(len);
            }
            if faults.hang {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            if !faults.latency.is_zero() {
                std::thread::sleep(faults.latency);
            }
            return match faults.error {
                Some(errno) => Err(Errno::from_i32(errno)),
                None => Ok(faults.short.map_or(len, |short| len.min(short))),
            };
        }
    }

    fn attr(&self, ino: u64) -> Result<FileAttr, Errno> {
        let meta = self.file.metadata()?;
        let dir = ino == 1;
        Ok(FileAttr {
            ino: INodeNo(ino),
            size: if dir { 0 } else { meta.len() },
            blocks: meta.blocks(),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if dir { FileType::Directory } else { FileType::RegularFile },
            perm: if dir { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }
}

fn errno() -> Errno {
    std::io::Error::last_os_error().into()
}

impl Filesystem for SlowFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(IMAGE) {
            Ok(attr) if u64::from(parent) == 1 && name == "image" => reply.entry(&NO_CACHE, &attr, Generation(0)),
            Ok(_) => reply.error(Errno::ENOENT),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(u64::from(ino)) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(e) => reply.error(e),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<fuser::TimeOrNow>,
        _: Option<fuser::TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let done = size.map_or(Ok(()), |size| self.file.set_len(size));
        match done.map_err(Errno::from).and_then(|()| self.attr(u64::from(ino))) {
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
        let read = self.suffer(offset, size as usize).and_then(|len| {
            let mut data = vec![0; len];
            let n = self.file.read_at(&mut data, offset)?;
            data.truncate(n);
            Ok(data)
        });
        match read {
            Ok(data) => reply.data(&data),
            Err(e) => reply.error(e),
        }
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
        let written = self.suffer(offset, data.len()).and_then(|len| Ok(self.file.write_at(&data[..len], offset)?));
        match written {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(e),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.suffer(0, 0).and_then(|_| Ok(self.file.sync_data()?)) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // SAFETY: a call on an open descriptor.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, length as i64) } {
            0 => reply.ok(),
            _ => reply.error(errno()),
        }
    }
}

fn main() {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(backing), Some(mountpoint)) = (args.next(), args.next()) else {
        eprintln!("usage: slowfs BACKING MOUNTPOINT");
        std::process::exit(2);
    };
    let file = File::options().read(true).write(true).open(&backing).expect("the backing file opens");
    let mut faults_path = backing.into_os_string();
    faults_path.push(".faults");
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("slowfs".into())];
    config.n_threads = Some(96);
    config.clone_fd = true;
    let fs = SlowFs { file, faults_path: faults_path.into(), faults: Mutex::default() };
    fuser::mount(fs, mountpoint, &config).expect("the filesystem is served");
}
