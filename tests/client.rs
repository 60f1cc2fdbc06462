//! A client of a filesystem under test, in a process of its own: opens, locks, reads and writes files as it is told, several
//! things at a time, and says what came of each. With tests/lustre.c preloaded it is a client of Lustre.
//!
//! usage: client, with lines `ID COMMAND ARGUMENTS...` on standard input; answers `ID ok WORDS...` or `ID errno N`, as they come.
//!
//! `NAME` is what a file is called here after `open NAME PATH FLAGS` (r, w, direct, nonblock, create, delay, by commas).
//! Groups, record locks, layouts and FIDs are asked for by the product's own code.

#[allow(dead_code, missing_docs)]
#[path = "../src/os/lustre/mod.rs"]
mod lustre;

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, Result, Write};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock, Mutex};

static FILES: LazyLock<Mutex<HashMap<String, Arc<File>>>> = LazyLock::new(Mutex::default);

/// Memory as direct I/O wants it.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// The result of a system call.
fn check(rc: impl Into<i64>) -> Result<i64> {
    match rc.into() {
        -1 => Err(std::io::Error::last_os_error()),
        n => Ok(n),
    }
}

fn os(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

fn open(path: &str, flags: &str) -> Result<File> {
    let bits = flags.split(',').map(|flag| match flag {
        "r" => libc::O_RDONLY,
        "w" => libc::O_RDWR,
        "direct" => libc::O_DIRECT,
        "nonblock" => libc::O_NONBLOCK,
        "create" => libc::O_CREAT | libc::O_EXCL,
        // O_LOV_DELAY_CREATE
        "delay" => 0x2100,
        other => panic!("no flag {other}"),
    });
    let path = CString::new(path).unwrap();
    // SAFETY: a C string that outlives the call.
    let fd = check(unsafe { libc::open(path.as_ptr(), bits.fold(libc::O_CLOEXEC, |all, bit| all | bit), 0o644) })?;
    // SAFETY: just opened, and nobody else knows the number.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

/// Sets or asks for a lock of a whole file that belongs to the open file: what stands there (r, w or u).
fn record_lock(file: &File, command: i32, kind: &str) -> Result<&'static str> {
    // SAFETY: an all-zero flock is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = match kind {
        "r" => libc::F_RDLCK,
        "w" => libc::F_WRLCK,
        _ => libc::F_UNLCK,
    } as libc::c_short;
    // SAFETY: an open descriptor and a live structure.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) })?;
    Ok(match i32::from(lock.l_type) {
        libc::F_RDLCK => "r",
        libc::F_WRLCK => "w",
        _ => "u",
    })
}

fn statfs(file: &File) -> Result<String> {
    // SAFETY: statfs is plain data, for which zeroes are valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a live structure.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) })?;
    Ok(format!("{:#x}", stat.f_type as u64 & 0xFFFF_FFFF))
}

/// An attribute's bytes, or all names: as much as fits into `size`; 0 asks for the size.
fn xattr(file: &File, name: Option<&str>, size: usize) -> Result<String> {
    let mut value = vec![0u8; size];
    let pointer = value.as_mut_ptr();
    let name = name.map(|name| CString::new(name).unwrap());
    let n = check(match &name {
        // SAFETY: a C string and as much live memory as is said.
        Some(name) => unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), pointer.cast(), size) as i64 },
        // SAFETY: as above.
        None => unsafe { libc::flistxattr(file.as_raw_fd(), pointer.cast(), size) as i64 },
    })?;
    value.truncate(n as usize);
    Ok(match (size, name) {
        (0, _) => n.to_string(),
        (_, None) => String::from_utf8_lossy(&value).replace('\0', " "),
        _ => value.iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

fn command(words: &[&str]) -> Result<String> {
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    let group = || NonZeroU32::new(number(2) as u32).ok_or_else(|| os(libc::EINVAL));
    let file = || FILES.lock().unwrap()[words[1]].clone();
    match words[0] {
        "open" => drop(FILES.lock().unwrap().insert(words[1].into(), Arc::new(open(words[2], words[3])?))),
        "close" => drop(FILES.lock().unwrap().remove(words[1])),
        "lock" => lustre::group::group_lock(file().as_fd(), group()?).map_err(os)?,
        // Past the product's types: what the filesystem says to group 0.
        // SAFETY: the argument of this request is a number.
        "lock_zero" => drop(check(unsafe { libc::ioctl(file().as_raw_fd(), 0x4008_669e, 0) })?),
        "unlock" => lustre::group::group_unlock(file().as_fd(), group()?).map_err(os)?,
        "version" => return Ok(lustre::group::data_version(file().as_fd()).map_err(os)?.to_string()),
        "fid" => return Ok(lustre::fid(file().as_fd()).map_err(os)?.to_string()),
        "layout" => return Ok(lustre::layout::Layout::read(file().as_fd()).map_err(os)?.to_json().to_string()),
        "statfs" => return statfs(&file()),
        "record" => drop(record_lock(&file(), libc::F_OFD_SETLK, words[2])?),
        "record_wait" => drop(record_lock(&file(), libc::F_OFD_SETLKW, words[2])?),
        "ask_record" => return Ok(record_lock(&file(), libc::F_OFD_GETLK, words[2])?.into()),
        "read" => {
            let mut page = Page([0; 4096]);
            let n = file().read_at(&mut page.0, number(2))?;
            return Ok(format!("{n} {}", page.0[0]));
        }
        "write" => return Ok(file().write_at(&Page([number(3) as u8; 4096]).0, number(2))?.to_string()),
        "sync" => file().sync_data()?,
        "truncate" => file().set_len(number(2))?,
        "size" => return Ok(file().metadata()?.len().to_string()),
        "punch" => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: a call on an open descriptor.
            check(unsafe { libc::fallocate(file().as_raw_fd(), mode, number(2) as i64, number(3) as i64) })?;
        }
        "xattr" => return xattr(&file(), Some(words[2]), number(3) as usize),
        "xattrs" => return xattr(&file(), None, number(2) as usize),
        "setstripe" => {
            let blob: Vec<u8> = words[2].as_bytes().chunks(2).map(hex).collect();
            // SAFETY: the request reads a v1 or v3 blob, and the test gives all of one.
            check(unsafe { libc::ioctl(file().as_raw_fd(), 0x4008_669a, blob.as_ptr()) })?;
        }
        "mounts" => {
            let mounts = std::fs::read_to_string(words[1])?;
            return Ok(mounts.lines().find(|line| line.contains(words[2])).unwrap_or_default().into());
        }
        other => panic!("no command {other}"),
    }
    Ok(String::new())
}

fn hex(byte: &[u8]) -> u8 {
    u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 16).unwrap()
}

fn main() {
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        std::thread::spawn(move || {
            let words: Vec<&str> = line.split_whitespace().collect();
            let answer = match command(&words[1..]) {
                Ok(text) => format!("{} ok {text}\n", words[0]),
                Err(e) => format!("{} errno {}\n", words[0], e.raw_os_error().unwrap_or(0)),
            };
            std::io::stdout().lock().write_all(answer.as_bytes()).unwrap();
        });
    }
}
