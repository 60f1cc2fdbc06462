//! The file as a guard sees it: every question to a server takes time, in which the world goes on.

use crate::locks::Fd;
use crate::options::{Options, Place};
use crate::world::{MS, World};
use lloop::engine::lockable::Lockable;
use lloop::error::{Error, Result};
use lloop::os::lock::{Marker, Outcome};
use std::cell::{Cell, RefCell};
use std::num::NonZeroU32;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// An open file, until its last user goes.
struct Open {
    world: Weak<World>,
    fd: Fd,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(world) = self.world.upgrade() {
            world.locks.borrow_mut().close(self.fd);
        }
    }
}

pub struct Handle {
    node: usize,
    place: Place,
    open: RefCell<Rc<Open>>,
    /// The path leads to another file.
    replaced: Cell<bool>,
}

impl Handle {
    pub fn open(world: &World, node: usize) -> Self {
        let fd = world.locks.borrow_mut().open(node);
        let open = RefCell::new(Rc::new(Open { world: world.this.clone(), fd }));
        Handle { node, place: world.options.place, open, replaced: Cell::new(false) }
    }

    pub fn fd(&self) -> Fd {
        self.open.borrow().fd
    }

    pub fn world(&self) -> Rc<World> {
        self.open.borrow().world.upgrade().expect("a world outlives what is in it")
    }

    /// Asks a server.
    fn ask<T>(&self, question: impl FnOnce(&World, Fd) -> Result<T, i32>) -> Result<T, i32> {
        let world = self.world();
        world.run_until(world.now() + world.latency());
        let answer = question(&world, self.fd());
        world.run_until(world.now() + world.latency() / 8);
        answer
    }

    /// Waits for every server of the file.
    fn wait_for_all(&self) {
        let world = self.world();
        let until = world.disk.borrow().hangs_until.iter().copied().max().unwrap_or(0);
        world.run_until(until);
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the file on node {}", self.node)
    }
}

impl Lockable for Handle {
    type Watch = Handle;

    fn path(&self) -> &Path {
        Path::new("simulated")
    }

    fn read_only(&self) -> bool {
        false
    }

    fn may_lose_locks(&self) -> bool {
        self.place != Place::Local
    }

    fn try_lock(&self, exclusive: bool, marker: Option<&Marker>) -> Result<Outcome, i32> {
        self.ask(|world, fd| world.locks.borrow_mut().try_lock(fd, exclusive, marker))
    }

    fn unlock(&self) {
        self.world().locks.borrow_mut().unlock(self.fd());
    }

    fn watch(&self) -> Result<Handle, i32> {
        Ok(Handle::open(&self.world(), self.node))
    }

    fn sees_marker(watch: &Handle, marker: &Marker, _exclusive: bool) -> Result<bool, i32> {
        watch.ask(|world, fd| world.locks.borrow_mut().is_set(fd, *marker))
    }

    fn group_lock(&self, group: NonZeroU32) -> Result<(), i32> {
        self.wait_for_all();
        self.ask(|world, fd| world.locks.borrow_mut().group_lock(fd, group.get()))
    }

    fn group_unlock(&self, _: NonZeroU32) -> Result<(), i32> {
        self.ask(|world, fd| world.locks.borrow_mut().group_unlock(fd))
    }

    fn trial_read(&self, offset_bytes: u64) -> Result<(), i32> {
        let world = self.world();
        let sector = (offset_bytes / world.options.sector_bytes) as usize;
        let (object, until) = {
            let disk = world.disk.borrow();
            (disk.object_of[sector], disk.hangs(sector, 1))
        };
        world.run_until(until);
        loop {
            match self.ask(|world, fd| world.locks.borrow_mut().may_touch(fd, object)) {
                Ok(true) => return Ok(()),
                Err(errno) => return Err(errno),
                Ok(false) => world.run_until(world.now() + 10 * MS),
            }
            if world.has_failed() {
                return Err(libc::EIO);
            }
        }
    }

    fn data_version(&self) -> Result<u64, i32> {
        self.wait_for_all();
        Ok(self.world().disk.borrow().changes + 1)
    }

    fn open_again(&self) -> Result<Self> {
        let world = self.world();
        if self.replaced.get() || world.rng.permille(20) {
            self.replaced.set(true);
            return Err(Error::new(libc::ESTALE, "another file"));
        }
        Ok(Handle::open(&world, self.node))
    }

    fn take_over(&self, new: &Self) -> Result<()> {
        let old = self.open.replace(new.open.borrow().clone());
        drop(old);
        Ok(())
    }

    fn pause(&self, time: Duration) {
        let world = self.world();
        world.run_until(world.now() + time.as_nanos() as u64);
    }

    fn now(&self) -> u64 {
        self.world().now()
    }
}

thread_local! {
    /// A real file that targets are made with. Nothing is read from it or written to it.
    static STAND_IN: tempfile::NamedTempFile = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
}

/// A file for a target of this world.
pub fn stand_in(options: &Options) -> lloop::os::file::DirectFile {
    use lloop::os::file::{DirectFile, OpenOptions};
    let open = |file: &tempfile::NamedTempFile| {
        file.as_file().set_len(4096).unwrap();
        DirectFile::open(file.path(), OpenOptions { read_only: false, allow_any_fs: true }).unwrap()
    };
    let mut file = STAND_IN.with(open);
    file.pretend_alignment(crate::options::PAGE_BYTES as usize);
    if options.on_lustre() {
        file.pretend_lustre();
    }
    file
}
