//! A regular file opened for direct I/O: finding out what it is, and the calls that move data.

use super::errno;
use super::iov::{IoVecs, IovList};
use super::lustre::{self, Fid};
use super::root::{self, OpenError};
use crate::error::{Error, Result, reason};
use std::ffi::CString;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub(super) const PAGE_BYTES: usize = 4096;

/// How to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    /// No writes.
    pub read_only: bool,
    /// Accept filesystems other than Lustre.
    pub allow_any_fs: bool,
}

/// What makes a file itself, whatever path leads to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Device of the mount. Not stable over a reboot.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// `statfs` type.
    pub fs_magic: u64,
    /// `statfs` id: stable over remounts where the filesystem has a UUID.
    pub fs_id: u64,
    /// The FID, on Lustre.
    pub fid: Option<Fid>,
}

impl Identity {
    /// The filesystem's name: `"lustre"`, `"ext4"`, ... or its magic in hexadecimal.
    pub fn fs_name(&self) -> String {
        let name = match self.fs_magic {
            lustre::CLIENT_MAGIC => "lustre",
            EXT4_MAGIC => "ext4",
            0x5846_5342 => "xfs",
            0x9123_683E => "btrfs",
            0x6573_5546 => "fuse",
            0x6969 => "nfs",
            0x794C_7630 => "overlay",
            0x2FC1_2FC1 => "zfs",
            0xF2F5_2010 => "f2fs",
            other => return format!("{other:#x}"),
        };
        name.to_owned()
    }

    /// Whether the two are one file.
    pub fn is_same_file(&self, other: &Identity) -> bool {
        match (self.fid, other.fid) {
            // (Two mounts of one Lustre have two device numbers.)
            (Some(fid), Some(theirs)) => (self.fs_id, fid) == (other.fs_id, theirs),
            _ => (self.dev, self.ino) == (other.dev, other.ino),
        }
    }

    /// A UUID that is the same at every attach, on every node that sees the same filesystem id: RFC 9562 version 5 over
    /// filesystem type, filesystem id and FID (Lustre) or inode number.
    pub fn uuid(&self) -> uuid::Uuid {
        const NAMESPACE: uuid::Uuid = uuid::uuid!("6c6c6f6f-7000-5000-8000-6c7573747265");
        let file = self.fid.map_or_else(|| format!("ino {}", self.ino), |fid| format!("fid {fid}"));
        uuid::Uuid::new_v5(&NAMESPACE, format!("{:x} {:016x} {file}", self.fs_magic, self.fs_id).as_bytes())
    }
}

/// The word that a file is not under a group lock, which fallocate would wait for, for ever (docs/internals/lustre.md). Only
/// [`crate::engine::guard`], which takes and gives back group locks, gives it.
#[derive(Debug, Clone, Copy)]
pub struct Unlocked<'a>(PhantomData<&'a ()>);

impl Unlocked<'_> {
    /// To be called by whoever knows that this process holds no group lock on the file.
    pub(crate) fn known_by_guard() -> Self {
        Unlocked(PhantomData)
    }
}

/// A regular file opened with O_DIRECT that was seen to do direct I/O.
#[derive(Debug)]
pub struct DirectFile {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) identity: Identity,
    pub(super) read_only: bool,
    pub(super) align: Alignment,
}

/// What direct I/O wants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Alignment {
    /// Of offsets and lengths.
    pub offset_bytes: usize,
    /// Of memory.
    pub memory_bytes: usize,
    /// Writes of whole blocks of this size go faster from memory that is aligned to them.
    pub write_block_bytes: Option<usize>,
}

impl Alignment {
    fn suits(&self, write: bool, offset_bytes: u64, len_bytes: u64, iovs: &IoVecs) -> bool {
        let block = self.write_block_bytes.filter(|&block| {
            write && len_bytes <= MAX_COPIED_BYTES && (offset_bytes | len_bytes).is_multiple_of(block as u64)
        });
        let block = block.unwrap_or(1);
        iovs.is_aligned(block.max(self.memory_bytes), block.max(self.offset_bytes))
    }
}

const EXT4_MAGIC: u64 = 0xEF53;

/// Up to here a write is better copied than executed from memory that ext4 does not like; a longer one is worth its wait.
const MAX_COPIED_BYTES: u64 = 256 << 10;

impl DirectFile {
    /// Opens `path`. Blocks as long as the filesystem does.
    ///
    /// The path is resolved once, to a handle that gives no access, and within [`root::folders`]; what it is gets checked there,
    /// and the real open goes through that handle: nobody can swap the file in between, and a device node or FIFO is never opened.
    ///
    /// # Errors
    /// ENOENT, EACCES, ELOOP, EROFS and their like from the system; EINVAL for what is not a regular file, not on Lustre
    /// (unless `allow_any_fs`) or not able to do direct I/O. Nothing stays open.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self> {
        let shown = path.display();
        if path.as_os_str().as_bytes().contains(&0) {
            return Err(Error::new(libc::EINVAL, format!("{shown:?} is no path: it holds a NUL byte")));
        }
        let handle = root::open_handle(path).map_err(|e| match e {
            OpenError::Outside(error) => error,
            OpenError::System(errno) => open_error(errno, path, options),
        })?;
        let stat = fstat(handle.as_fd()).map_err(|e| Error::os(e, format!("stat {shown}")))?;
        if let Some(kind) = not_regular(stat.st_mode) {
            return Err(Error::new(libc::EINVAL, format!("{shown} is a {kind}; only a regular file can be attached")));
        }
        let (fs_magic, fs_id) = fstatfs(handle.as_fd()).map_err(|e| Error::os(e, format!("statfs {shown}")))?;
        check_filesystem(path, fs_magic, options)?;

        let through_handle = through_proc(handle.as_fd());
        let mode = if options.read_only { libc::O_RDONLY } else { libc::O_RDWR };
        let flags = mode | libc::O_DIRECT | libc::O_NOCTTY;
        // Nobody asks when a disk image was last read, and keeping account of it costs every read some percent. Only the file's
        // owner may leave it out.
        let fd = match open_fd(&through_handle, flags | libc::O_NOATIME) {
            Err(libc::EPERM) => open_fd(&through_handle, flags),
            other => other,
        }
        .map_err(|e| open_error(e, path, options))?;
        let fid = match fs_magic {
            lustre::CLIENT_MAGIC => {
                Some(lustre::fid(fd.as_fd()).map_err(|e| Error::os(e, format!("asking for the FID of {shown}")))?)
            }
            _ => None,
        };
        let identity = Identity { dev: stat.st_dev, ino: stat.st_ino, fs_magic, fs_id, fid };
        // ext4 has a direct write that is not aligned to its blocks, *memory included*, wait for all others of the file, unless it
        // overwrites what is written already (ext4_dio_write_checks, Linux 5.4 and later): on a new image, one at a time.
        let write_block_bytes = (fs_magic == EXT4_MAGIC).then_some(stat.st_blksize as usize);
        let mut file = DirectFile {
            fd,
            path: path.to_owned(),
            identity,
            read_only: options.read_only,
            align: Alignment { offset_bytes: PAGE_BYTES, memory_bytes: PAGE_BYTES, write_block_bytes },
        };
        file.find_alignment()?;
        Ok(file)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What file it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What offsets and lengths of direct I/O must be multiples of.
    pub fn offset_align_bytes(&self) -> usize {
        self.align.offset_bytes
    }

    /// What memory addresses of direct I/O must be multiples of.
    pub fn memory_align_bytes(&self) -> usize {
        self.align.memory_bytes
    }

    /// Whether direct I/O takes these whole pages from or to this memory as well as any other.
    pub fn suits(&self, write: bool, offset_bytes: u64, len_bytes: u64, iovs: &IoVecs) -> bool {
        self.align.suits(write, offset_bytes, len_bytes, iovs)
    }

    /// Asks for more alignment than the file needs, so that tests meet Lustre's rules on any filesystem.
    #[doc(hidden)]
    pub fn pretend_alignment(&mut self, align_bytes: usize) {
        self.align.offset_bytes = self.align.offset_bytes.max(align_bytes);
        self.align.memory_bytes = self.align.memory_bytes.max(align_bytes);
    }

    /// Has the engine take the file for one on Lustre: its errors may pass.
    #[doc(hidden)]
    pub fn pretend_lustre(&mut self) {
        self.identity.fid = Some(Fid { seq: 0x2_0000_0401, oid: 1, ver: 0 });
    }

    /// The file's size now, in bytes. Blocks.
    ///
    /// # Errors
    /// The system's errno.
    pub fn size_bytes(&self) -> Result<u64, i32> {
        fstat(self.fd.as_fd()).map(|stat| stat.st_size as u64)
    }

    /// Writes dirty pages back and drops cached ones: what others wrote through the page cache is on disk before the first
    /// direct read, and no dirty page can later overwrite what was written directly. Blocks.
    ///
    /// # Errors
    /// The errno of writing back; cached pages that cannot be dropped are none.
    pub fn drop_cache(&self) -> Result<(), i32> {
        // (An old error, of somebody's writes through the cache, is reported once.)
        self.sync_data().or_else(|_| self.sync_data())?;
        // SAFETY: a call on an open descriptor, about pages of the kernel's own.
        unsafe { libc::posix_fadvise(self.fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        Ok(())
    }

    /// Reads into `iovs` from `offset_bytes` on; the bytes read, 0 at or behind the end. Blocks.
    ///
    /// # Errors
    /// The system's errno.
    pub fn read_at(&self, iovs: &IovList, offset_bytes: u64) -> Result<usize, i32> {
        let (first, count) = iovs.raw();
        retry_interrupted(|| {
            // SAFETY: `iovs` describes memory valid for writes (the invariant of what was pushed into it).
            unsafe { libc::preadv2(self.fd.as_raw_fd(), first, count, offset_bytes as libc::off_t, 0) }
        })
    }

    /// Writes `iovs` from `offset_bytes` on; the bytes written. With `durable` they are on stable storage then. Blocks.
    ///
    /// # Errors
    /// The system's errno.
    pub fn write_at(&self, iovs: &IovList, offset_bytes: u64, durable: bool) -> Result<usize, i32> {
        let (first, count) = iovs.raw();
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        retry_interrupted(|| {
            // SAFETY: `iovs` describes memory valid for reads (the invariant of what was pushed into it).
            unsafe { libc::pwritev2(self.fd.as_raw_fd(), first, count, offset_bytes as libc::off_t, flags) }
        })
    }

    /// Makes what was written, and the metadata needed to find it, durable. Blocks.
    ///
    /// # Errors
    /// The system's errno, an earlier asynchronous write error among them.
    pub fn sync_data(&self) -> Result<(), i32> {
        // SAFETY: a call on an open descriptor.
        retry_interrupted(|| unsafe { libc::fdatasync(self.fd.as_raw_fd()) } as isize).map(drop)
    }

    /// Gives the range back to the filesystem; it reads as zeroes. The size stays. Blocks.
    ///
    /// # Errors
    /// EOPNOTSUPP where the filesystem cannot; the system's other errnos.
    pub fn punch(&self, _: Unlocked<'_>, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset_bytes, len_bytes)
    }

    /// Makes the range read as zeroes and keeps its space. The size stays. Blocks.
    ///
    /// # Errors
    /// As for [`DirectFile::punch`].
    pub fn zero_range(&self, _: Unlocked<'_>, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
        self.fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset_bytes, len_bytes)
    }

    fn fallocate(&self, mode: i32, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
        retry_interrupted(|| {
            // SAFETY: a call on an open descriptor.
            unsafe { libc::fallocate(self.fd.as_raw_fd(), mode, offset_bytes as i64, len_bytes as i64) as isize }
        })
        .map(drop)
    }

    /// Another open file of the same, with locks and flags of its own. For asking questions, not for data. Blocks.
    ///
    /// # Errors
    /// The system's errno.
    pub fn duplicate(&self) -> Result<OwnedFd, i32> {
        open_fd(&through_proc(self.fd.as_fd()), libc::O_RDONLY | libc::O_NOCTTY)
    }

    /// Sets or clears O_NONBLOCK of the open file.
    ///
    /// # Errors
    /// The system's errno.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), i32> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: a call on an open descriptor.
        let flags = retry_interrupted(|| unsafe { libc::fcntl(fd, libc::F_GETFL) } as isize)? as i32;
        let wanted = if nonblocking { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
        // SAFETY: as above.
        retry_interrupted(|| unsafe { libc::fcntl(fd, libc::F_SETFL, wanted) } as isize).map(drop)
    }

    /// Opens the path anew. Blocks.
    ///
    /// # Errors
    /// ESTALE when the path leads to another file by now; those of [`DirectFile::open`].
    pub fn open_again(&self) -> Result<DirectFile> {
        let options = OpenOptions { read_only: self.read_only, allow_any_fs: true };
        let new = DirectFile::open(&self.path, options)?;
        if !new.identity.is_same_file(&self.identity) {
            return Err(Error::new(libc::ESTALE, format!("{} is another file by now", self.path.display())));
        }
        Ok(new)
    }

    /// Puts `new` in the place of the descriptor, for whoever uses it. Locks on the old one are gone with it. Nothing may be in flight.
    ///
    /// # Errors
    /// The system's.
    pub fn take_over(&self, new: &DirectFile) -> Result<()> {
        // SAFETY: both are open; the number stays ours, only what it stands for changes.
        retry_interrupted(|| unsafe { libc::dup3(new.fd.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) } as isize)
            .map(drop)
            .map_err(|e| Error::os(e, format!("replacing the descriptor of {}", self.path.display())))
    }

    /// Makes the file `size_bytes` long. Blocks.
    ///
    /// # Errors
    /// EFBIG, ENOSPC, EDQUOT and the system's other errnos.
    pub fn set_size(&self, size_bytes: u64) -> Result<(), i32> {
        let Ok(size) = i64::try_from(size_bytes) else { return Err(libc::EFBIG) };
        // SAFETY: a call on an open descriptor.
        retry_interrupted(|| unsafe { libc::ftruncate(self.fd.as_raw_fd(), size) } as isize).map(drop)
    }
}

impl AsFd for DirectFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(super) fn retry_interrupted(mut call: impl FnMut() -> isize) -> Result<usize, i32> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => match errno() {
                libc::EINTR => {}
                other => return Err(other),
            },
        }
    }
}

/// The path by which an open file can be opened once more.
pub(super) fn through_proc(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("digits hold no NUL")
}

pub(super) fn open_fd(path: &CString, flags: i32) -> Result<OwnedFd, i32> {
    let mut fd = -1;
    retry_interrupted(|| {
        // SAFETY: a NUL-terminated path that outlives the call.
        fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
        fd as isize
    })?;
    // SAFETY: just opened, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn open_error(errno: i32, path: &Path, options: OpenOptions) -> Error {
    let shown = path.display();
    let advice = match errno {
        libc::ENOENT => "no such file; create it first (lloop create)".to_owned(),
        libc::EACCES | libc::EPERM if options.read_only => {
            "permission denied; the target must be able to read it".into()
        }
        libc::EACCES | libc::EPERM => {
            "permission denied; the target must be able to read and write it, or attach it read-only".into()
        }
        libc::ELOOP => "too many levels of symbolic links; name the file itself".into(),
        libc::EROFS => "the filesystem is mounted read-only; attach it read-only (read_only)".into(),
        libc::EINVAL => "its filesystem refuses direct I/O (O_DIRECT); move the file to one that can".into(),
        other => reason(other),
    };
    // One errno for one thing: an immutable file (EPERM) is a matter of permission to whoever asks.
    let errno = if errno == libc::EPERM { libc::EACCES } else { errno };
    Error::new(errno, format!("cannot open {shown}: {advice}"))
}

fn not_regular(mode: u32) -> Option<&'static str> {
    Some(match mode & libc::S_IFMT {
        libc::S_IFREG => return None,
        libc::S_IFDIR => "directory",
        libc::S_IFBLK => "block device (bdev_aio or bdev_uring take those)",
        libc::S_IFCHR => "character device",
        libc::S_IFIFO => "FIFO",
        libc::S_IFSOCK => "socket",
        _ => "special file",
    })
}

fn check_filesystem(path: &Path, magic: u64, options: OpenOptions) -> Result<()> {
    let shown = path.display();
    // They take the flag and serve from memory: there is no storage behind them to be direct to, or durable on.
    let in_memory = match magic {
        0x0102_1994 => "tmpfs",
        0x8584_58F6 => "ramfs",
        0x9584_58F6 => "hugetlbfs",
        _ => "",
    };
    if magic == lustre::SERVER_MAGIC {
        return Err(Error::new(
            libc::EINVAL,
            format!("{shown} is on a Lustre server's own target; attach it through a client mount"),
        ));
    }
    if magic != lustre::CLIENT_MAGIC && !options.allow_any_fs {
        return Err(Error::new(
            libc::EINVAL,
            format!("{shown} is not on Lustre; set allow_any_fs to use it all the same"),
        ));
    }
    if !in_memory.is_empty() {
        return Err(Error::new(
            libc::EINVAL,
            format!("{shown} is on {in_memory}, which has no direct I/O (O_DIRECT); move it to a disk filesystem"),
        ));
    }
    Ok(())
}

pub(super) fn fstat(fd: BorrowedFd<'_>) -> Result<libc::stat, i32> {
    // SAFETY: stat is plain data, for which zeroes are valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a live structure.
    retry_interrupted(|| unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } as isize)?;
    Ok(stat)
}

/// Type and id of the filesystem.
fn fstatfs(fd: BorrowedFd<'_>) -> Result<(u64, u64), i32> {
    // SAFETY: statfs is plain data, for which zeroes are valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a live structure.
    retry_interrupted(|| unsafe { libc::fstatfs(fd.as_raw_fd(), &mut stat) } as isize)?;
    // SAFETY: fsid_t is two ints whose names libc keeps to itself; any bytes are a valid u64.
    let id: u64 = unsafe { std::mem::transmute(stat.f_fsid) };
    Ok((stat.f_type as u64 & 0xFFFF_FFFF, id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::iov::LeakedBuffers;

    #[test]
    fn writes_in_blocks_want_memory_in_blocks_on_ext4() {
        let ext4 = Alignment { offset_bytes: 512, memory_bytes: 512, write_block_bytes: Some(4096) };
        let other = Alignment { write_block_bytes: None, ..ext4 };
        let suits = |align: &Alignment, write, offset, shift, len: usize| {
            align.suits(write, offset, len as u64, &LeakedBuffers::new(&[len], shift, 0).iovs())
        };
        for write in [false, true] {
            assert!(suits(&ext4, write, 4096, 0, 8192) && !suits(&ext4, write, 4096, 1, 8192), "in any case");
        }
        assert!(!suits(&ext4, true, 4096, 512, 8192), "it would wait for all others");
        assert!(suits(&ext4, false, 4096, 512, 8192), "reads do not");
        assert!(suits(&other, true, 4096, 512, 8192), "nor do other filesystems");
        assert!(
            suits(&ext4, true, 512, 512, 8192) && suits(&ext4, true, 4096, 512, 512),
            "parts of blocks wait anyhow"
        );
        assert!(suits(&ext4, true, 0, 512, 512 << 10), "too long to be copied for that");
    }
}
