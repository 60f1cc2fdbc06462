//! Sleeping and waking: an event count on a futex.
//!
//! A waiter announces itself, looks once more for work, and only then sleeps; a notifier publishes work, then looks for
//! announced waiters. Both sides separate their two steps with a sequentially consistent fence, so at least one of them sees
//! the other: no wake-up is lost, and a notifier that finds nobody waiting makes no system call.

use super::sync::{AtomicU32, Futex, Ordering, fence};
use std::time::Duration;

/// Something to wait for, without a lock.
#[repr(align(128))]
#[derive(Default)]
pub struct Event {
    sequence: Futex,
    waiters: AtomicU32,
}

/// The promise to call [`Event::wait`] or [`Event::cancel`].
#[must_use]
pub struct Announced(u32);

impl Event {
    /// Announces that the caller is about to wait. It must look for work after this and before [`Event::wait`].
    pub fn announce(&self) -> Announced {
        let key = self.sequence.word().load(Ordering::Acquire);
        self.waiters.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Announced(key)
    }

    /// Takes the announcement back: there was work after all.
    pub fn cancel(&self, _announced: Announced) {
        self.waiters.fetch_sub(1, Ordering::Relaxed);
    }

    /// Sleeps until notified (since the announcement) or until `timeout` is over. May return early.
    pub fn wait(&self, announced: Announced, timeout: Option<Duration>) {
        self.sequence.wait(announced.0, timeout);
        self.waiters.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many are waiting or about to. Exact after a fence between publishing work and this call.
    pub fn waiters(&self) -> u32 {
        self.waiters.load(Ordering::Relaxed)
    }

    /// Wakes one waiter if there is any; work must be published before. Returns whether somebody was there to be woken.
    pub fn notify_one(&self) -> bool {
        self.notify(1)
    }

    /// Wakes all waiters.
    pub fn notify_all(&self) -> bool {
        self.notify(i32::MAX)
    }

    fn notify(&self, count: i32) -> bool {
        fence(Ordering::SeqCst);
        if self.waiters() == 0 {
            return false;
        }
        self.sequence.word().fetch_add(1, Ordering::Release);
        self.sequence.wake(count);
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn no_wake_up_is_lost() {
        const ROUNDS: u64 = 20_000;
        let shared = Arc::new((Event::default(), AtomicU64::new(0), Event::default(), AtomicU64::new(0)));
        let wait_for = |event: &Event, value: &AtomicU64, wanted: u64| {
            while value.load(Ordering::Acquire) < wanted {
                let announced = event.announce();
                if value.load(Ordering::Acquire) >= wanted {
                    event.cancel(announced);
                } else {
                    event.wait(announced, None);
                }
            }
        };
        let other = shared.clone();
        let echo = std::thread::spawn(move || {
            for round in 1..=ROUNDS {
                wait_for(&other.0, &other.1, round);
                other.3.store(round, Ordering::Release);
                other.2.notify_one();
            }
        });
        for round in 1..=ROUNDS {
            shared.1.store(round, Ordering::Release);
            shared.0.notify_one();
            wait_for(&shared.2, &shared.3, round);
        }
        echo.join().unwrap();
        assert_eq!((shared.0.waiters(), shared.2.waiters()), (0, 0));
    }

    #[test]
    fn waiting_ends_by_itself_and_nobody_there_costs_nothing() {
        let event = Event::default();
        assert!(!event.notify_one());
        event.wait(event.announce(), Some(Duration::from_millis(1)));
        event.cancel(event.announce());
        assert_eq!(event.waiters(), 0);
        assert!(!event.notify_all());
    }
}
