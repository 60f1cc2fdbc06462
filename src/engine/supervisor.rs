//! The thread that starts workers, wakes retries when their time has come, and looks for stalls in the place of ports that sleep.

use super::threads::{IDLE, NOBODY, Shared, WATCH};
use crate::os::clock::{self, Ticks};
use crate::os::thread;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

impl<T: Send + 'static> Shared<T> {
    /// Starts a worker whenever somebody finds that there are too few, puts retries back into their lanes when their time has come,
    /// and looks for stalls in the place of ports that sleep.
    pub(super) fn supervise(self: Arc<Self>) {
        thread::run_anywhere_but(&self.reactor_cpus);
        let (mut picks_seen, mut sign) = (0, clock::now());
        let mut next_due = None;
        while !self.stopping() {
            self.summons.wait(|| {
                let stop = self.stopping().then_some(Duration::ZERO);
                let until_due = next_due.map(|due: Ticks| clock::to_duration(due.saturating_sub(clock::now())));
                let watch = self.watching.load(Ordering::SeqCst).then_some(WATCH);
                [stop, until_due, watch].into_iter().flatten().min()
            });
            if self.stopping() {
                break;
            }
            let now = clock::now();
            let mut sched = self.sched();
            next_due = sched.revive(now);
            let revived = sched.has_ready();
            drop(sched);
            if revived {
                // Those who are active may be stuck: ports, or we in their place, look after that.
                self.ready.store(true, Ordering::Relaxed);
                if self.crew.active() == 0 {
                    self.wake_one();
                }
                self.watch();
            }
            if self.watching.load(Ordering::SeqCst) {
                let picks = self.picks.load(Ordering::Relaxed);
                if std::mem::replace(&mut picks_seen, picks) != picks || self.help(now.wrapping_sub(sign)) {
                    sign = now;
                }
                // Stop looking, then look once more: whoever adds work after this has us woken again.
                self.watching.store(false, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                if self.ready.load(Ordering::Relaxed) || self.has_news() {
                    self.watching.store(true, Ordering::SeqCst);
                }
            }
            if !self.summons.wants_a_worker() || self.stopping() {
                continue;
            }
            if self.live.load(Ordering::Relaxed) < self.workers.load(Ordering::Relaxed) {
                self.start_worker();
            }
        }
    }

    fn start_worker(self: &Arc<Self>) {
        let number = self.live.fetch_add(1, Ordering::Relaxed);
        let worker = self.clone();
        if let Err(error) = self.start(format!("lloop-{number}"), move || worker.work()) {
            self.live.fetch_sub(1, Ordering::Relaxed);
            if !self.no_more_threads.swap(true, Ordering::Relaxed) {
                tracing::error!("{error}; going on with {number} workers");
            }
        }
    }

    /// Whether there are as many workers as there may be, and each has been in its call for a second.
    pub(super) fn all_stuck(&self, now: Ticks) -> bool {
        if self.live.load(Ordering::Relaxed) < self.workers.load(Ordering::Relaxed) {
            return false;
        }
        let second = clock::to_ticks(Duration::from_secs(1));
        let mut places = self.busy.iter().filter(|busy| busy.submitted.load(Ordering::Relaxed) != NOBODY);
        places.all(|busy| {
            let started = busy.started.load(Ordering::Relaxed);
            busy.submitted.load(Ordering::Relaxed) != IDLE && now.saturating_sub(started) > second
        })
    }
}
