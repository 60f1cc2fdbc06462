//! A filesystem whose file `image` passes everything on to a file below and can be slow, stuck, short or failing: what a sick
//! server looks like. Blocks the caller, as Lustre does: no asynchronous direct I/O. To a process that tests/lustre.c is
//! preloaded into it is Lustre, with layouts, FIDs, data versions, group locks and evictions.
//!
//! usage: slowfs BACKING MOUNTPOINT [flock|localflock|noflock]
//!
//! - `BACKING.faults` says what is wrong (tests/slowfs/faults.rs tells the words), and is read anew when it changes.
//! - `BACKING.lov` is the attribute `lustre.lov` of the file, if it is there.
//! - The attribute `user.slowfs.stats` has what was done to the file, as JSON.
//! - New files can be made; they are kept in the folder `BACKING.d`.
//! - The third word is the mount option that says how far locks reach (flock).
//!
//! Ends when unmounted.

mod faults;
mod fuse;
mod ioctl;
mod layout;
mod locks;
mod node;

use faults::{Faults, Io, Kind, Watched};
use fuser::{Config, Errno, FileAttr, FileType, Generation, INodeNo, MountOption};
use node::{Node, State};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

const IMAGE: u64 = 2;
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// An errno as fuser has it.
fn raw(errno: i32) -> Errno {
    Errno::from_i32(errno)
}

/// The path with something added to its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// The faults, and the evictions that have happened.
struct Events {
    faults: Watched<Faults>,
    evicted_ost: Option<u64>,
    evicted_mds: Option<u64>,
}

struct SlowFs {
    /// Where new files go.
    folder: PathBuf,
    events: Mutex<Events>,
    nodes: Mutex<BTreeMap<u64, Arc<Node>>>,
    names: Mutex<BTreeMap<String, u64>>,
    next: AtomicU64,
    /// No locks at all.
    noflock: bool,
}

impl SlowFs {
    fn new(backing: &Path, noflock: bool) -> std::io::Result<SlowFs> {
        let file = File::options().read(true).write(true).open(backing)?;
        let faults = Watched::new(&beside(backing, ".faults"), Faults::parse);
        Ok(SlowFs {
            folder: beside(backing, ".d"),
            events: Mutex::new(Events { faults, evicted_ost: None, evicted_mds: None }),
            nodes: Mutex::new(BTreeMap::from([(IMAGE, Arc::new(Node::new(file, backing)))])),
            names: Mutex::new(BTreeMap::from([("image".to_owned(), IMAGE)])),
            next: AtomicU64::new(IMAGE + 1),
            noflock,
        })
    }

    /// What is wrong now. Evictions take place when they are seen here.
    fn faults(&self) -> Arc<Faults> {
        let mut events = self.events.lock().unwrap();
        let faults = events.faults.get();
        let nodes = || self.nodes.lock().unwrap().values().cloned().collect::<Vec<_>>();
        if let Some((number, ost)) = faults.evict_ost.filter(|&(number, _)| Some(number) != events.evicted_ost) {
            events.evicted_ost = Some(number);
            nodes().iter().for_each(|node| node.change(|state| state.evict_ost(ost)));
        }
        if let Some(number) = faults.evict_mds.filter(|&number| Some(number) != events.evicted_mds) {
            events.evicted_mds = Some(number);
            nodes().iter().for_each(|node| node.change(State::evict_mds));
        }
        faults
    }

    fn node(&self, ino: INodeNo) -> Result<Arc<Node>, Errno> {
        self.nodes.lock().unwrap().get(&u64::from(ino)).cloned().ok_or(Errno::ENOENT)
    }

    /// Waits until `attempt` has an answer, or the caller is killed.
    fn wait<T>(
        &self,
        node: &Node,
        pid: u32,
        mut attempt: impl FnMut(&mut State) -> Option<Result<T, Errno>>,
    ) -> Result<T, Errno> {
        loop {
            self.faults();
            let mut state = node.state.lock().unwrap();
            if let Some(answer) = attempt(&mut state) {
                return answer;
            }
            drop(node.changed.wait_timeout(state, LOOK_AGAIN));
            if is_killed(pid) {
                return Err(Errno::EINTR);
            }
        }
    }

    /// Waits as long as some I/O hangs.
    fn while_hanging(&self, pid: u32) -> Result<(), Errno> {
        while self.faults().hangs() {
            std::thread::sleep(LOOK_AGAIN);
            if is_killed(pid) {
                return Err(Errno::EINTR);
            }
        }
        Ok(())
    }

    /// Suffers; how many bytes may be moved. `began` is the number of evictions when the I/O came.
    fn suffer(&self, node: &Node, io: &Io, began: Option<usize>) -> Result<usize, Errno> {
        loop {
            let faults = self.faults();
            let rules = faults.matching(io);
            if rules.iter().any(|rule| rule.hang) {
                while Arc::ptr_eq(&faults, &self.faults()) {
                    std::thread::sleep(LOOK_AGAIN);
                }
                if began.is_some_and(|began| node.state.lock().unwrap().was_evicted(began, &io.osts)) {
                    return Err(Errno::EIO);
                }
                continue;
            }
            let latency: Duration = rules.iter().map(|rule| rule.latency).sum();
            if !latency.is_zero() {
                std::thread::sleep(latency);
            }
            return match rules.iter().find_map(|rule| rule.errno(io.kind)) {
                Some(errno) => Err(raw(errno)),
                None => Ok(rules.iter().filter_map(|rule| rule.short).fold(io.len, usize::min)),
            };
        }
    }

    /// A read or a write: what comes between it and the data, then `data` itself with the bytes that it may move.
    fn transfer<T>(
        &self,
        ino: INodeNo,
        (pid, handle): (u32, u64),
        (kind, offset, len): (Kind, u64, usize),
        data: impl FnOnce(&Node, usize) -> std::io::Result<T>,
    ) -> Result<T, Errno> {
        let node = self.node(ino)?;
        let io = Io { kind, offset, len, osts: node.osts(&self.faults(), offset, len) };
        let began = node.change(|state| state.begin(handle, &io.osts, kind == Kind::Write)).map_err(raw)?;
        let admitted = self.suffer(&node, &io, Some(began)).and_then(|len| {
            self.wait(&node, pid, |state| Some(state.admit(handle, began, &io.osts)?.map_err(raw)))?;
            Ok(len)
        });
        let done = admitted.and_then(|len| {
            let done = data(&node, len);
            node.change(|state| {
                state.moved(handle);
                state.version += u64::from(kind == Kind::Write);
            });
            Ok(done?)
        });
        node.change(|state| state.end(&io.osts));
        done
    }

    fn attr(&self, ino: u64) -> Result<FileAttr, Errno> {
        let (kind, perm, size, blocks) = match ino {
            1 => (FileType::Directory, 0o755, 0, 0),
            ino => {
                let meta = self.node(INodeNo(ino))?.file.metadata()?;
                (FileType::RegularFile, 0o644, meta.len(), meta.blocks())
            }
        };
        Ok(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }

    /// A new file. Without `delayed` it has the site's layout from the start.
    fn create(&self, name: &str, delayed: bool) -> Result<(FileAttr, Generation), Errno> {
        let path = self.folder.join(name);
        std::fs::create_dir_all(&self.folder)?;
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        let node = Node::new(file, &path);
        if !delayed {
            let serial = node.file.metadata()?.ino() as u32;
            let faults = self.faults();
            let osts = faults.osts.unwrap_or(4);
            let lov = match faults.default_dom {
                true => layout::with_dom(osts, serial),
                false => layout::instantiate(&layout::default_request(), osts, false, serial).map_err(raw)?,
            };
            std::fs::write(&node.lov, lov)?;
        }
        let ino = self.next.fetch_add(1, Ordering::Relaxed);
        self.nodes.lock().unwrap().insert(ino, Arc::new(node));
        self.names.lock().unwrap().insert(name.to_owned(), ino);
        Ok((self.attr(ino)?, Generation(0)))
    }
}

/// Whether a thread that waits for us has got SIGKILL. The kernel asks no FUSE server to let go of it.
fn is_killed(thread: u32) -> bool {
    const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else { return true };
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap_or("0").trim();
    u64::from_str_radix(pending, 16).is_ok_and(|signals| signals & SIGKILL_BIT != 0)
}

fn main() {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(backing), Some(mountpoint)) = (args.next(), args.next()) else {
        eprintln!("usage: slowfs BACKING MOUNTPOINT [flock|localflock|noflock]");
        std::process::exit(2);
    };
    let locks = args.next().map_or("flock".to_owned(), |word| word.display().to_string());
    let fs = SlowFs::new(&backing, locks == "noflock").expect("the backing file opens");
    // Faults that make no sense, or a bug: a filesystem with fewer threads would be one more riddle.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("slowfs: {panic}");
        std::process::exit(1);
    }));
    let mut config = Config::default();
    // tests/lustre.c knows the mount by this name.
    config.mount_options = vec![MountOption::FSName(format!("slowfs:{locks}"))];
    config.n_threads = Some(160);
    config.clone_fd = true;
    fuser::mount(fs, mountpoint, &config).expect("the filesystem is served");
}
