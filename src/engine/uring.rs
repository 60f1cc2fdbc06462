//! The io_uring engine: a ring a thread, whole-page reads and writes without any other thread.
//!
//! It does what is regular and leaves the rest to the workers: whatever comes back short, or with an errno that a second try by a
//! blocking call can better, is executed anew by them (reads and writes of blocks can be repeated), and flushes, discards and
//! memory that direct I/O does not take go there from the start. So there is one place that continues, bounces and explains.

use super::request::{Op, Request};
use crate::os::bell::Bell;
use crate::os::clock::Ticks;
use crate::os::queue::{List, Placed};
use crate::os::ring::{Features, Ring, RingOptions};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many I/O of one thread the kernel gets at a time; more wait here.
const ENTRIES: u32 = 512;

/// When each I/O in flight was submitted, by its place; 0 for a free one. For statistics, read by other threads.
pub struct Ages(Box<[(AtomicU64, AtomicU64)]>);

impl Ages {
    /// When the oldest I/O in flight of `volume` was submitted.
    pub fn oldest(&self, volume: u32) -> Option<Ticks> {
        let of_volume = self.0.iter().filter(|(_, l)| l.load(Ordering::Relaxed) == u64::from(volume));
        of_volume.map(|(submitted, _)| submitted.load(Ordering::Relaxed)).filter(|&t| t != 0).min()
    }
}

/// A thread's ring, with the requests that the kernel has.
pub struct Uring<T> {
    ring: Ring,
    in_flight: Vec<Option<Placed<Request<T>>>>,
    free: Vec<u32>,
    waiting: List<Request<T>>,
    files: Vec<bool>,
    ages: Arc<Ages>,
    troubled: bool,
}

impl<T> Uring<T> {
    /// Makes the current thread's ring; its completions ring `bell`, for a thread that sleeps.
    ///
    /// # Errors
    /// The errno of making it: ENOSYS or EPERM where kernel or sandbox have no io_uring, or cannot ring.
    pub fn new(one_thread: bool, reactor_cpus: Vec<u32>, bell: Option<&Bell>) -> Result<Self, i32> {
        let mut ring = Ring::new(&RingOptions { entries: ENTRIES, one_thread, reactor_cpus })?;
        if !ring.features().files {
            return Err(libc::ENOSYS);
        }
        if bell.is_some_and(|bell| !ring.ring_on_completion(bell.as_fd())) {
            return Err(libc::EOPNOTSUPP);
        }
        ring.register_hugepages();
        Ok(Uring {
            ring,
            in_flight: std::iter::repeat_with(|| None).take(ENTRIES as usize).collect(),
            free: (0..ENTRIES).rev().collect(),
            waiting: List::default(),
            files: Vec::new(),
            ages: Arc::new(Ages((0..ENTRIES).map(|_| Default::default()).collect())),
            troubled: false,
        })
    }

    /// Whether this kernel lets us make rings with what the engine needs.
    ///
    /// # Errors
    /// Why not.
    pub fn probe() -> Result<(), i32> {
        let ring = Ring::new(&RingOptions { entries: 1, one_thread: true, reactor_cpus: Vec::new() })?;
        if ring.features().files { Ok(()) } else { Err(libc::ENOSYS) }
    }

    /// What the kernel could do for this ring.
    pub fn features(&self) -> Features {
        self.ring.features()
    }

    /// The times of submission, for statistics.
    pub fn ages(&self) -> &Arc<Ages> {
        &self.ages
    }

    /// Registers a file; its slot, or `None` when there is none left.
    pub fn add_file(&mut self, fd: BorrowedFd<'_>) -> Option<u32> {
        let slot = self.files.iter().position(|used| !used).unwrap_or(self.files.len());
        if !self.ring.register_file(slot as u32, fd) {
            return None;
        }
        if slot == self.files.len() {
            self.files.push(false);
        }
        self.files[slot] = true;
        Some(slot as u32)
    }

    /// Gives a slot back; nothing is in flight on it.
    pub fn remove_file(&mut self, slot: u32) {
        self.ring.unregister_file(slot);
        self.files[slot as usize] = false;
    }

    /// Takes a read or write in, on the file in `slot`; the next [`Uring::enter`] hands it over.
    pub fn submit(&mut self, mut request: Placed<Request<T>>, slot: u32) {
        request.port = slot;
        if self.waiting.is_empty() {
            if let Err(request) = self.push(request) {
                self.waiting.push_back(request);
            }
        } else {
            self.waiting.push_back(request);
        }
    }

    fn push(&mut self, request: Placed<Request<T>>) -> Result<(), Placed<Request<T>>> {
        let Some(&place) = self.free.last() else { return Err(request) };
        let write = request.op == Op::Write;
        if self.ring.push(write, request.port, &request.iovs, request.offset_bytes, place.into()).is_err() {
            return Err(request);
        }
        self.free.pop();
        let age = &self.ages.0[place as usize];
        age.1.store(request.volume.into(), Ordering::Relaxed);
        age.0.store(request.submitted, Ordering::Relaxed);
        self.in_flight[place as usize] = Some(request);
        Ok(())
    }

    /// Hands over what was submitted: one system call at most. Whether that has to be tried again although nothing completes.
    pub fn enter(&mut self) -> bool {
        while !self.free.is_empty()
            && let Some(request) = self.waiting.pop_front()
        {
            if let Err(request) = self.push(request) {
                // (The submission queue is as long as there are places; this is for a kernel that made it shorter.)
                let mut rest = std::mem::take(&mut self.waiting);
                self.waiting.push_back(request);
                self.waiting.append(&mut rest);
                break;
            }
        }
        match self.ring.enter() {
            Ok(()) => return false,
            Err(libc::EBUSY | libc::EAGAIN) => {}
            Err(errno) => {
                if !std::mem::replace(&mut self.troubled, true) {
                    tracing::error!("io_uring_enter: {}; trying on", crate::error::reason(errno));
                }
            }
        }
        true
    }

    /// Takes what has completed: into `done` with its result, or into `again` for the workers to execute anew.
    pub fn reap(&mut self, done: &mut List<Request<T>>, again: &mut List<Request<T>>) {
        let Uring { ring, in_flight, free, ages, .. } = self;
        ring.reap(|place, result| {
            let Some(mut request) = in_flight[place as usize].take() else { return };
            ages.0[place as usize].0.store(0, Ordering::Relaxed);
            free.push(place as u32);
            match result {
                n if n >= 0 && n as u64 == request.len_bytes => {
                    request.conclude(Ok(()));
                    done.push_back(request);
                }
                e if e < 0 && is_final(-e) => {
                    request.conclude(Err(-e));
                    done.push_back(request);
                }
                _ => again.push_back(request),
            }
        });
    }

    /// Whether nothing is submitted that has not come back.
    pub fn is_idle(&self) -> bool {
        self.ring.in_flight() == 0 && self.waiting.is_empty()
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        debug_assert!(self.is_idle() || std::thread::panicking(), "a ring was closed with I/O in flight");
    }
}

/// Whether a blocking call would only say the same.
fn is_final(errno: i32) -> bool {
    matches!(
        errno,
        libc::EIO | libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EROFS | libc::EBADF | libc::EPERM | libc::ENODATA
    )
}
