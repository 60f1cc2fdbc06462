//! A reactor thread's end of the hand-off. Nothing here blocks, locks or allocates once it is set up.

use super::request::{Answer, Request};
use super::threads::{Pool, Shared};
use crate::os::bell::Bell;
use crate::os::clock::{self, Ticks};
use crate::os::queue::{Batch, Inbox, List, Placed};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// The most polls that go by between two looks at the clock.
const MAX_POLLS_A_LOOK: u32 = 32;

/// Where a port's answers arrive, from any thread.
pub(super) struct Mailbox<T> {
    answers: Inbox<Request<T>>,
    /// Whether the port's thread sleeps when it has nothing to do, and has to be woken.
    sleeps: AtomicBool,
    bell: Option<Arc<Bell>>,
}

impl<T> Mailbox<T> {
    /// Delivers answers. One system call when the port's thread sleeps and nobody has rung yet; none else.
    pub(super) fn push(&self, batch: Batch<Request<T>>) {
        let was_empty = self.answers.push(batch);
        if let Some(bell) = &self.bell {
            // Deliver, then look; `Port::set_sleeping` says so, then looks.
            fence(Ordering::SeqCst);
            if was_empty && self.sleeps.load(Ordering::Relaxed) {
                bell.ring();
            }
        }
    }
}

/// What one thread submits through and gets its answers from. Stays on that thread.
pub struct Port<T> {
    id: u32,
    pool: Arc<Shared<T>>,
    mailbox: Arc<Mailbox<T>>,
    staged: Batch<Request<T>>,
    staged_slow: bool,
    sleeping: bool,
    in_flight: usize,
    last_look: Ticks,
    last_clock: Ticks,
    /// How many polls go by between two looks at the clock, which costs more than all else of an empty poll; and how many have.
    looks_every: u32,
    polls: u32,
    last_picks: u64,
    /// When picks were last seen to go on.
    last_sign: Ticks,
}

impl<T: Send + 'static> Port<T> {
    /// A port to `pool`. Takes the pool's lock: for the control plane. With a `bell` its thread may sleep
    /// ([`Port::set_sleeping`]).
    pub fn new(pool: &Pool<T>, bell: Option<Arc<Bell>>) -> Self {
        let mailbox = Arc::new(Mailbox { answers: Inbox::default(), sleeps: AtomicBool::new(false), bell });
        Port {
            id: pool.shared().add_port(mailbox.clone()),
            pool: pool.shared().clone(),
            mailbox,
            staged: Batch::default(),
            staged_slow: false,
            sleeping: false,
            in_flight: 0,
            last_look: 0,
            last_clock: 0,
            looks_every: 1,
            polls: 0,
            last_picks: 0,
            last_sign: 0,
        }
    }

    /// From here on the bell is rung when answers arrive, or not any more. What has arrived before rings nothing: reap after
    /// this. A port without a bell stays awake.
    pub fn set_sleeping(&mut self, sleeping: bool) {
        let sleeping = sleeping && self.mailbox.bell.is_some();
        if std::mem::replace(&mut self.sleeping, sleeping) != sleeping {
            self.mailbox.sleeps.store(sleeping, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.pool.count_sleeper(sleeping);
        }
    }

    /// Takes a request in; the next [`Port::ring`] hands it over.
    pub fn stage(&mut self, mut request: Placed<Request<T>>) {
        request.port = self.id;
        if self.in_flight == 0 {
            self.last_sign = request.submitted;
        }
        self.staged_slow |= request.target.slow();
        self.staged.push(request);
        self.in_flight += 1;
    }

    /// Hands over what is staged: one atomic operation, and one system call at most, when nobody is awake to see it.
    pub fn ring(&mut self) {
        if self.staged.is_empty() {
            return;
        }
        self.pool.submit(std::mem::take(&mut self.staged), std::mem::take(&mut self.staged_slow));
    }

    /// Whether there is anything for [`Port::reap`] or [`Port::ring`] to do. Most polls of a reactor end here.
    #[inline]
    pub fn is_ready(&mut self) -> bool {
        if !self.mailbox.answers.is_empty() || !self.staged.is_empty() {
            return true;
        }
        // Now and then somebody has to look for a stall.
        self.polls = self.polls.wrapping_add(1);
        self.in_flight > 0 && self.polls >= self.looks_every
    }

    /// Takes all answers that are there. Also notices, when there are none for a while, that the awake workers are all stuck
    /// and somebody else has to be woken.
    pub fn reap(&mut self) -> List<Request<T>> {
        let answers = self.mailbox.answers.take_all();
        self.in_flight -= answers.len();
        if self.in_flight > 0 && answers.is_empty() {
            self.look_for_a_stall();
        }
        answers
    }

    /// Takes an executed request apart, one of [`Port::reap`]'s or of this thread's ring.
    #[inline]
    pub fn answer(&self, request: Placed<Request<T>>) -> Answer<T> {
        let (answer, wakes) = Request::answer(request);
        if wakes {
            self.pool.tell_of_claims();
        }
        answer
    }

    /// How many requests are staged or handed over and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    #[cold]
    fn look_for_a_stall(&mut self) {
        self.polls = 0;
        let now = clock::now();
        // Some four looks in the time that a stall takes to be one.
        let elapsed = now.wrapping_sub(self.last_clock);
        self.last_clock = now;
        if elapsed > self.pool.stall_ticks / 2 {
            self.looks_every = (self.looks_every / 2).max(1);
        } else if elapsed < self.pool.stall_ticks / 4 {
            self.looks_every = (self.looks_every + 1).min(MAX_POLLS_A_LOOK);
        }
        if now.wrapping_sub(self.last_look) < self.pool.stall_ticks {
            return;
        }
        self.last_look = now;
        let picks = self.pool.picks.load(Ordering::Relaxed);
        // The stall is as old as the newest sign of life; after help, the next one gets its time anew.
        if std::mem::replace(&mut self.last_picks, picks) != picks || self.pool.help(now.wrapping_sub(self.last_sign)) {
            self.last_sign = now;
        }
    }
}

impl<T> Drop for Port<T> {
    fn drop(&mut self) {
        debug_assert!(
            self.in_flight == 0 || std::thread::panicking(),
            "a port was closed with {} requests",
            self.in_flight
        );
        if self.sleeping {
            self.pool.count_sleeper(false);
        }
        self.pool.remove_port(self.id);
    }
}
