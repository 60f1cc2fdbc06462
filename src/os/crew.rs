//! Workers that sleep when there is nothing to do, whoever wakes them, and whoever starts more of them: the protocol alone, without
//! what the work is. Loom tries it out in every order of events, below.
//!
//! Everywhere it is the same idea: who has something publishes it, then looks whether anybody is about; who is about to stop looking
//! says so, then looks once more. Sequentially consistent fences stand between the two steps, so one of the two sees the other.

use super::event::Event;
use super::sync::{Apart, AtomicBool, AtomicU32, Ordering, fence};
use std::time::Duration;

/// The workers.
#[derive(Default)]
pub struct Crew {
    idle: Event,
    /// Whether a worker spins, looking for work.
    spinning: Apart<AtomicBool>,
    /// Workers that will look for work soon: awake, and not in a call that takes long.
    active: Apart<AtomicU32>,
}

impl Crew {
    /// How many will look for work soon. With none, whoever has published work wakes one.
    #[inline]
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// Whether one of them does nothing else.
    pub fn spins(&self) -> bool {
        self.spinning.load(Ordering::SeqCst)
    }

    /// To be asked after work was published, before anything else is: whether somebody is looking for it at this moment.
    #[inline]
    pub fn looks_for_more(&self) -> bool {
        fence(Ordering::SeqCst);
        self.spinning.load(Ordering::Relaxed)
    }

    /// Wakes a sleeper; false when there is none.
    pub fn wake_one(&self) -> bool {
        self.idle.notify_one()
    }

    /// Wakes all sleepers.
    pub fn wake_all(&self) {
        self.idle.notify_all();
    }

    /// The caller is active from here on: it looks for work after this.
    pub fn begin(&self) {
        self.active.fetch_add(1, Ordering::SeqCst);
    }

    /// The caller is not active any more, for it enters a call that takes long. It looks for work that only it could know of after
    /// this.
    pub fn pause(&self) {
        self.active.fetch_sub(1, Ordering::SeqCst);
    }

    /// Looks for work as long as `go_on`; true when `look` has found some. One worker at a time does that, for others it is false.
    pub fn spin(&self, mut look: impl FnMut() -> bool, mut go_on: impl FnMut() -> bool) -> bool {
        if self.spinning.swap(true, Ordering::SeqCst) {
            return false;
        }
        let mut came = false;
        while !came && go_on() {
            came = look();
        }
        // A submitter that saw the flag before this store relies on the look that comes after it.
        self.spinning.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        came || look()
    }

    /// Ends being active and sleeps, unless the last look says that the caller has to stay awake; that is told how many were active,
    /// the caller among them. The caller is not active afterwards.
    pub fn sleep(&self, stay: impl FnOnce(u32) -> bool) {
        let announced = self.idle.announce();
        let before = self.active.fetch_sub(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if stay(before) {
            self.idle.cancel(announced);
        } else {
            self.idle.wait(announced, None);
        }
    }
}

/// The bell of the one who starts workers and knows when retries are due.
#[derive(Default)]
pub struct Summons {
    event: Event,
    too_few: AtomicBool,
    retries: AtomicBool,
}

impl Summons {
    /// There are too few workers.
    pub fn call_for_a_worker(&self) {
        self.too_few.store(true, Ordering::Relaxed);
        self.event.notify_one();
    }

    /// There are retries that it has not seen.
    pub fn tell_of_retries(&self) {
        self.retries.store(true, Ordering::SeqCst);
        self.event.notify_one();
    }

    /// Something else has changed, which the look of [`Summons::wait`] sees.
    pub fn call(&self) {
        self.event.notify_one();
    }

    /// Waits to be called, for as long as `look` says, which is asked when no call can get lost any more: not at all for zero,
    /// without an end for `None`.
    pub fn wait(&self, look: impl FnOnce() -> Option<Duration>) {
        let announced = self.event.announce();
        // What was wanted before the announcement rang for nobody.
        let retries = self.retries.load(Ordering::SeqCst);
        if retries {
            // (Whoever tells of more after this rings again; those told of before it are seen after this.)
            self.retries.swap(false, Ordering::SeqCst);
        }
        let wanted = retries || self.too_few.load(Ordering::SeqCst);
        let longest = look();
        if wanted || longest == Some(Duration::ZERO) {
            self.event.cancel(announced);
        } else {
            self.event.wait(announced, longest);
        }
    }

    /// Whether there are too few workers; asking settles it.
    pub fn wants_a_worker(&self) -> bool {
        self.too_few.load(Ordering::Relaxed) && self.too_few.swap(false, Ordering::Relaxed)
    }
}

/// As src/engine/threads.rs and worker.rs use it, with work that is only counted. Loom reports a deadlock where a wake-up is lost.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::os::queue::{Batch, Inbox, Placed};
    use loom::sync::Arc;
    use loom::thread;

    #[derive(Default)]
    struct Pool {
        inbox: Inbox<u32>,
        crew: Crew,
        summons: Summons,
        live: AtomicU32,
        done: AtomicU32,
        stop: AtomicBool,
    }

    const WORKERS: u32 = 1;

    impl Pool {
        fn wake_one(&self) {
            if !self.crew.wake_one() && self.live.load(Ordering::Relaxed) < WORKERS {
                self.summons.call_for_a_worker();
            }
        }

        fn submit(&self, value: u32) {
            let mut batch = Batch::default();
            batch.push(Placed::on_heap(value));
            self.inbox.push(batch);
            if !self.crew.looks_for_more() && self.crew.active() == 0 {
                self.wake_one();
            }
        }

        /// Takes what there is; whether it was anything. With the last of `all` everybody is told to stop.
        fn execute(&self, all: u32) -> bool {
            let mut list = self.inbox.take_all();
            let n = list.len() as u32;
            while let Some(value) = list.pop_front() {
                value.take();
            }
            if n > 0 && self.done.fetch_add(n, Ordering::SeqCst) + n == all {
                self.stop.store(true, Ordering::SeqCst);
                self.crew.wake_all();
                self.summons.call();
            }
            n > 0
        }

        fn stopping(&self) -> bool {
            self.stop.load(Ordering::SeqCst)
        }

        fn work(&self, all: u32) {
            self.crew.begin();
            'awake: loop {
                if self.execute(all) {
                    continue;
                }
                let mut looks = 0..1;
                if self.crew.spin(|| !self.inbox.is_empty(), || looks.next().is_some()) {
                    continue;
                }
                loop {
                    self.crew.sleep(|_| !self.inbox.is_empty() || self.stopping());
                    if self.stopping() {
                        break 'awake;
                    }
                    self.crew.begin();
                    if !self.inbox.is_empty() {
                        continue 'awake;
                    }
                }
            }
        }
    }

    fn model(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(run);
    }

    /// One worker and two submissions: whatever it is doing when they come, it executes them.
    #[test]
    fn loom_a_worker_misses_nothing() {
        model(3, || {
            let pool = Arc::new(Pool::default());
            pool.live.store(1, Ordering::Relaxed);
            let worker = thread::spawn({
                let pool = pool.clone();
                move || pool.work(2)
            });
            pool.submit(1);
            pool.submit(2);
            worker.join().unwrap();
            assert_eq!((pool.done.load(Ordering::SeqCst), pool.crew.active()), (2, 0));
        });
    }

    /// Two workers, of whom one spins and the other does not.
    #[test]
    fn loom_two_workers_miss_nothing() {
        model(2, || {
            let pool = Arc::new(Pool::default());
            pool.live.store(2, Ordering::Relaxed);
            let workers = [(); 2].map(|()| {
                let pool = pool.clone();
                thread::spawn(move || pool.work(1))
            });
            pool.submit(1);
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            assert_eq!((pool.done.load(Ordering::SeqCst), pool.crew.active()), (1, 0));
        });
    }

    /// No worker is there: the supervisor hears of it, and the one that it starts finds the work.
    #[test]
    fn loom_a_worker_is_started_for_what_comes_first() {
        model(3, || {
            let pool = Arc::new(Pool::default());
            let supervisor = thread::spawn({
                let pool = pool.clone();
                move || {
                    while !pool.stopping() {
                        pool.summons.wait(|| pool.stopping().then_some(Duration::ZERO));
                        if pool.summons.wants_a_worker() && pool.live.load(Ordering::Relaxed) < WORKERS {
                            pool.live.fetch_add(1, Ordering::Relaxed);
                            pool.work(2);
                        }
                    }
                }
            });
            pool.submit(1);
            pool.submit(2);
            supervisor.join().unwrap();
            assert_eq!(pool.done.load(Ordering::SeqCst), 2);
        });
    }

    /// The supervisor is told of two things by two threads, and hears of both.
    #[test]
    fn loom_the_supervisor_hears_everything() {
        model(3, || {
            let summons = Arc::new(Summons::default());
            let heard = Arc::new(AtomicU32::new(0));
            let due = Arc::new(AtomicU32::new(0));
            let teller = thread::spawn({
                let (summons, due) = (summons.clone(), due.clone());
                move || {
                    due.store(1, Ordering::Relaxed);
                    summons.tell_of_retries();
                }
            });
            let supervisor = thread::spawn({
                let (summons, heard, due) = (summons.clone(), heard.clone(), due.clone());
                move || {
                    let mut worker = false;
                    while !(worker && due.load(Ordering::Acquire) == 1) {
                        summons.wait(|| None);
                        worker |= summons.wants_a_worker();
                    }
                    heard.store(1, Ordering::SeqCst);
                }
            });
            summons.call_for_a_worker();
            teller.join().unwrap();
            supervisor.join().unwrap();
            assert_eq!(heard.load(Ordering::SeqCst), 1);
        });
    }
}
