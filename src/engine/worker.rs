//! What a worker does from its start to its end.

use super::order::Ticket;
use super::port::Mailbox;
use super::request::{Op, Request};
use super::retry::take_retries;
use super::sched::{FinishedWork, Work};
use super::threads::{IDLE, NOBODY, Shared};
use super::transfer::Transfer;
use crate::os::clock::{self, Ticks};
use crate::os::iov::IOV_MAX;
use crate::os::queue::{Batch, List};
use crate::os::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Where the answers of each port go.
pub(super) type Ports<T> = Vec<Option<Arc<Mailbox<T>>>>;

impl<T: Send + 'static> Shared<T> {
    /// A worker's life.
    pub(super) fn work(self: Arc<Self>) {
        thread::run_anywhere_but(&self.reactor_cpus);
        match Transfer::new() {
            Ok(transfer) => self.work_with(transfer),
            Err(error) => tracing::error!("a worker ends, there is no memory for it: {error}"),
        }
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    fn work_with(&self, mut transfer: Transfer) {
        let mut ports = Ports::new();
        let mut ports_seen = u64::MAX;
        let Some(busy) = self
            .busy
            .iter()
            .find(|b| b.submitted.compare_exchange(NOBODY, IDLE, Ordering::Relaxed, Ordering::Relaxed).is_ok())
        else {
            return;
        };
        self.crew.begin();
        let mut finished: Option<(FinishedWork, Ticks, i32, List<Request<T>>)> = None;
        // The writes that the last call ended. Reserved, so that no I/O allocates.
        let mut answered: Vec<Ticket> = Vec::with_capacity(IOV_MAX);
        let mut picks_seen = self.picks.load(Ordering::Relaxed);
        'awake: loop {
            let mut sched = self.sched();
            if let Some((work, took, flush_errno, again)) = finished.take() {
                let retries = !again.is_empty();
                if sched.finished(work, took, flush_errno, &mut answered, again) {
                    self.quiet.notify_all();
                }
                if retries {
                    // It is the supervisor who knows when their time has come.
                    self.summons.tell_of_retries();
                }
            }
            sched.accept(self.inbox.take_all());
            if self.claims_changed.swap(false, Ordering::SeqCst) {
                sched.claims_changed();
            }
            if sched.is_troubled() {
                self.attention.notify_one();
            }
            // More of us than fast calls are worth, and the others get on with it: leave it to them. (When they do not get on,
            // they are stuck, whatever the averages say.)
            let picks = self.picks.load(Ordering::Relaxed);
            let surplus = self.crew.active() > self.budget && picks != picks_seen;
            if let Some(work) = (!surplus).then(|| sched.take_next()).flatten() {
                let more = sched.has_ready();
                self.ready.store(more, Ordering::Relaxed);
                picks_seen = picks.wrapping_add(1);
                self.picks.store(picks_seen, Ordering::Relaxed);
                drop(sched);
                if more {
                    self.watch();
                }
                let changed = self.ports_changed.load(Ordering::Acquire);
                if changed != ports_seen {
                    ports.clone_from(&self.ports());
                    ports_seen = changed;
                }
                let Work { mut requests, slow, done, refused } = work;
                let Some(first) = requests.front() else { continue };
                if refused {
                    answer(&ports, requests);
                    continue;
                }
                if slow {
                    self.crew.pause();
                    if (more || !self.inbox.is_empty()) && !self.crew.spins() {
                        self.wake_one();
                    }
                }
                let start = clock::now();
                busy.set(&done, first, start);
                let all_well = transfer.execute(&mut requests);
                let now = clock::now();
                busy.submitted.store(IDLE, Ordering::Relaxed);
                if slow {
                    self.crew.begin();
                }
                let budget = Duration::from_millis(self.retry_budget_ms.load(Ordering::Relaxed));
                let again = if all_well { List::default() } else { take_retries(&mut requests, now, budget) };
                answered.extend(requests.iter_mut().filter_map(|request| request.ticket.take()));
                let flush = requests.front().filter(|request| request.op == Op::Flush);
                let flush_errno = flush.map_or(0, |flush| flush.errno);
                answer(&ports, requests);
                finished = Some((done, now.wrapping_sub(start), flush_errno, again));
                continue;
            }
            let left_over = sched.has_ready();
            self.ready.store(left_over, Ordering::Relaxed);
            drop(sched);
            if self.spin(surplus) {
                continue;
            }
            // Going to sleep. Announce it, stop being active, and look once more.
            loop {
                self.crew.sleep(|active| {
                    // A surplus worker sleeps whatever there is to do, as long as another one is active: that one looks again.
                    let work_for_us = self.has_news() || self.sched().has_ready();
                    (work_for_us && !(surplus && active > 1)) || self.retire_or_stop()
                });
                if self.retire_or_stop() {
                    break 'awake;
                }
                self.crew.begin();
                if self.has_news() || self.sched().has_ready() {
                    picks_seen = self.picks.load(Ordering::Relaxed);
                    continue 'awake;
                }
            }
        }
        busy.submitted.store(NOBODY, Ordering::Relaxed);
    }

    /// Whether this worker should end: the pool stops, or there are more than are wanted.
    fn retire_or_stop(&self) -> bool {
        self.stopping() || self.live.load(Ordering::Relaxed) > self.workers.load(Ordering::Relaxed)
    }

    /// Looks at the inbox for a while; true when something came. One worker at a time does that.
    fn spin(&self, surplus: bool) -> bool {
        let start = clock::now();
        let look = || {
            (0..8).any(|_| {
                std::hint::spin_loop();
                self.has_news()
            })
        };
        !surplus && self.crew.spin(look, || clock::now().wrapping_sub(start) < self.spin_ticks && !self.stopping())
    }
}

/// Gives each request back to the port it came from.
pub(super) fn answer<T>(ports: &Ports<T>, mut requests: List<Request<T>>) {
    while let Some(first) = requests.pop_front() {
        let port = first.port;
        let mut batch = Batch::default();
        batch.push(first);
        // Merged requests mostly come from one port: one atomic operation for all of them.
        while requests.front().is_some_and(|next| next.port == port) {
            if let Some(next) = requests.pop_front() {
                batch.push(next);
            }
        }
        ports[port as usize].as_ref().expect("a port outlives its requests").push(batch);
    }
}
