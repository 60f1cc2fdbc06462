//! The filesystem's calls.

use crate::faults::{Io, Kind};
use crate::locks::Record;
use crate::node::Node;
use crate::{SlowFs, ioctl};
use fuser::{
    Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

const NO_CACHE: Duration = Duration::ZERO;
/// The longest name, by which tests/lustre.c knows this filesystem.
const NAME_MAX: u32 = 249;
/// The part of O_LOV_DELAY_CREATE that reaches a filesystem (FASYNC).
const DELAY_CREATE: i32 = 0x2000;
const LOV: &str = "lustre.lov";
const STATS: &str = "user.slowfs.stats";

fn open_flags() -> FopenFlags {
    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
}

/// Answers a question for an attribute: its size, or all of it.
fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Err(e) => reply.error(e),
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
    }
}

fn reply_empty(reply: ReplyEmpty, done: Result<(), Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

impl SlowFs {
    fn handle(&self) -> FileHandle {
        FileHandle(self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn xattr(&self, ino: INodeNo, name: &OsStr) -> Result<Vec<u8>, Errno> {
        let node = self.node(ino)?;
        match name.to_str() {
            Some(LOV) => std::fs::read(&node.lov).map_err(|_| Errno::ENODATA),
            Some(STATS) => {
                self.faults();
                Ok(node.state.lock().unwrap().stats().to_string().into_bytes())
            }
            _ => Err(Errno::ENODATA),
        }
    }

    pub fn sync(&self, node: &Node) -> Result<(), Errno> {
        let io = Io { kind: Kind::Sync, offset: 0, len: 0, osts: Vec::new() };
        self.suffer(node, &io, None)?;
        let evicted = node.change(|state| {
            state.counters.fsyncs += 1;
            std::mem::take(&mut state.sync_error)
        });
        node.file.sync_data()?;
        if evicted { Err(Errno::EIO) } else { Ok(()) }
    }

    fn fallocate(
        &self,
        ino: INodeNo,
        (pid, handle): (u32, u64),
        (offset, length): (u64, u64),
        mode: i32,
    ) -> Result<(), Errno> {
        let node = self.node(ino)?;
        let mut counted = false;
        // It waits for group locks, and be it the caller's own: for ever, then.
        self.wait(&node, pid, |state| {
            if !std::mem::replace(&mut counted, true) {
                state.counters.fallocates += 1;
                state.counters.fallocates_under_group_lock += u64::from(state.groups.holds(handle));
            }
            (!state.groups.is_held()).then_some(Ok(()))
        })?;
        if self.faults().no_fallocate {
            return Err(Errno::EOPNOTSUPP);
        }
        // SAFETY: a call on an open descriptor.
        match unsafe { libc::fallocate(node.file.as_raw_fd(), mode, offset as i64, length as i64) } {
            0 => node.change(|state| state.version += 1),
            _ => return Err(std::io::Error::last_os_error().into()),
        }
        Ok(())
    }

    fn set_lock(&self, ino: INodeNo, pid: u32, wanted: Record, unlock: bool, sleep: bool) -> Result<(), Errno> {
        if self.noflock {
            return Err(Errno::ENOSYS);
        }
        let node = self.node(ino)?;
        if let Some(errno) = self.faults().lock_error.filter(|_| !unlock) {
            return Err(Errno::from_i32(errno));
        }
        if unlock {
            node.change(|state| state.records.clear(wanted.owner, wanted.start, wanted.end));
            return Ok(());
        }
        self.wait(&node, pid, |state| match state.records.conflict(&wanted) {
            Some(_) if sleep => None,
            Some(_) => Some(Err(Errno::EAGAIN)),
            None => {
                state.records.set(wanted);
                state.counters.record_locks += 1;
                Some(Ok(()))
            }
        })
    }
}

impl Filesystem for SlowFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config.set_max_write(1 << 20);
        config
            .add_capabilities(InitFlags::FUSE_POSIX_LOCKS)
            .map_err(|_| std::io::Error::other("a kernel without locks"))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = self.names.lock().unwrap().get(&*name.to_string_lossy()).copied();
        match ino.ok_or(Errno::ENOENT).and_then(|ino| self.attr(ino)) {
            Ok(attr) => reply.entry(&NO_CACHE, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let failed = self.faults().stat_error.map_or(Ok(()), |errno| Err(Errno::from_i32(errno)));
        match failed.and_then(|()| self.attr(u64::from(ino))) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 30, 1 << 30, 1 << 30, 1 << 20, 1 << 20, 4096, NAME_MAX, 4096);
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
        let resize = |size| {
            let node = self.node(ino)?;
            std::thread::sleep(self.faults().truncate_latency);
            node.file.set_len(size)?;
            node.change(|state| state.version += 1);
            Ok(())
        };
        match size.map_or(Ok(()), resize).and_then(|()| self.attr(u64::from(ino))) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(self.handle(), open_flags());
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, flags: i32, reply: ReplyCreate) {
        match SlowFs::create(self, &name.to_string_lossy(), flags & DELAY_CREATE != 0) {
            Ok((attr, generation)) => reply.created(&NO_CACHE, &attr, generation, self.handle(), open_flags()),
            Err(e) => reply.error(e),
        }
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let remove = || -> Result<(), Errno> {
            let ino = self.names.lock().unwrap().remove(&*name.to_string_lossy()).ok_or(Errno::ENOENT)?;
            let node = self.node(INodeNo(ino))?;
            let _ = std::fs::remove_file(&node.lov);
            Ok(std::fs::remove_file(&node.path)?)
        };
        reply_empty(reply, remove());
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let what = (Kind::Read, offset, size as usize);
        let read = self.transfer(ino, (request.pid(), handle.0), what, |node, len| {
            let mut data = vec![0; len];
            let n = node.file.read_at(&mut data, offset)?;
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
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let what = (Kind::Write, offset, data.len());
        let written =
            self.transfer(ino, (request.pid(), handle.0), what, |node, len| node.file.write_at(&data[..len], offset));
        match written {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(e),
        }
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply_empty(reply, self.node(ino).and_then(|node| self.sync(&node)));
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        reply_empty(reply, SlowFs::fallocate(self, ino, (request.pid(), handle.0), (offset, length), mode));
    }

    fn flush(&self, _: &Request, ino: INodeNo, _: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let released = self.node(ino).map(|node| node.change(|state| state.records.release(None, Some(owner.0))));
        reply_empty(reply, released);
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        // The last open file that an unlinked one had.
        let released = self.node(ino).map(|node| {
            node.change(|state| {
                state.groups.release(handle.0);
                state.records.release(Some(handle.0), None);
            })
        });
        reply_empty(reply, released);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        reply_xattr(reply, size, self.xattr(ino, name));
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = [LOV, STATS].into_iter().filter(|name| self.xattr(ino, name.as_ref()).is_ok());
        reply_xattr(reply, size, Ok(names.flat_map(|name| [name, "\0"]).collect::<String>().into_bytes()));
    }

    fn getlk(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        self.faults();
        let wanted = record(owner, handle, (start, end), kind, pid);
        let asked = self.node(ino).and_then(|node| {
            if self.noflock {
                return Err(Errno::ENOSYS);
            }
            node.change(|state| {
                if std::mem::take(&mut state.query_error) {
                    Err(Errno::EIO)
                } else {
                    Ok(state.records.conflict(&wanted))
                }
            })
        });
        match asked {
            Err(e) => reply.error(e),
            Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
            Ok(Some(held)) => {
                let kind = if held.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                reply.locked(held.start, held.end, kind, held.pid);
            }
        }
    }

    fn setlk(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let wanted = record(owner, handle, (start, end), kind, pid);
        reply_empty(reply, self.set_lock(ino, request.pid(), wanted, kind == libc::F_UNLCK, sleep));
    }

    fn ioctl(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let answer = self.node(ino).and_then(|node| ioctl::call(self, &node, request.pid(), handle.0, cmd, in_data));
        match answer {
            Ok(data) => reply.ioctl(0, &data),
            Err(e) => reply.error(e),
        }
    }
}

fn record(owner: LockOwner, handle: FileHandle, (start, end): (u64, u64), kind: i32, pid: u32) -> Record {
    Record { owner: owner.0, handle: handle.0, start, end, exclusive: kind == libc::F_WRLCK, pid }
}
