//! The atomics and the futex of the lock-free parts: the real ones, or loom's, which tries out every order of events
//! (`RUSTFLAGS="--cfg loom" cargo test --release --no-default-features --lib loom`).

#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering, fence};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering, fence};

/// A word on a cache line (pair) of its own.
#[repr(align(128))]
#[derive(Default)]
pub struct Apart<A>(A);

impl<A> std::ops::Deref for Apart<A> {
    type Target = A;
    #[inline]
    fn deref(&self) -> &A {
        &self.0
    }
}

#[cfg(not(loom))]
mod futex {
    use super::AtomicU32;
    use std::time::Duration;

    /// A word that threads sleep on.
    #[derive(Default)]
    pub struct Futex(AtomicU32);

    impl Futex {
        /// The word.
        pub fn word(&self) -> &AtomicU32 {
            &self.0
        }

        /// Sleeps while the word is `expected`, until woken or `timeout` is over. May return early.
        pub fn wait(&self, expected: u32, timeout: Option<Duration>) {
            let timespec = timeout.map(|t| libc::timespec {
                tv_sec: t.as_secs().min(i32::MAX as u64) as libc::time_t,
                tv_nsec: t.subsec_nanos().into(),
            });
            let timeout_ptr = timespec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
            // SAFETY: the word outlives the call; the kernel reads it and the time-out, which is null or points to a live
            // value.
            unsafe { libc::syscall(libc::SYS_futex, self.0.as_ptr(), operation, expected, timeout_ptr) };
        }

        /// Wakes `count` sleepers.
        pub fn wake(&self, count: i32) {
            let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
            // SAFETY: the word outlives the call; waking touches nothing else.
            unsafe { libc::syscall(libc::SYS_futex, self.0.as_ptr(), operation, count) };
        }
    }
}

#[cfg(loom)]
mod futex {
    use super::{AtomicU32, Ordering};
    use std::time::Duration;

    /// What the kernel promises, in loom's terms: comparing and going to sleep is one step with respect to waking.
    #[derive(Default)]
    pub struct Futex(AtomicU32, loom::sync::Mutex<()>, loom::sync::Condvar);

    impl Futex {
        /// The word.
        pub fn word(&self) -> &AtomicU32 {
            &self.0
        }

        /// Sleeps while the word is `expected`, until woken. (Time does not pass here.)
        pub fn wait(&self, expected: u32, _timeout: Option<Duration>) {
            let guard = self.1.lock().unwrap();
            if self.0.load(Ordering::SeqCst) == expected {
                drop(self.2.wait(guard).unwrap());
            }
        }

        /// Wakes sleepers.
        pub fn wake(&self, count: i32) {
            let _guard = self.1.lock().unwrap();
            if count == 1 { self.2.notify_one() } else { self.2.notify_all() }
        }
    }
}

pub use futex::Futex;

#[cfg(all(test, loom))]
mod loom_tests {
    use crate::os::event::Event;
    use crate::os::queue::{Batch, Inbox, Placed};
    use loom::sync::Arc;
    use loom::thread;

    fn batch(values: &[u32]) -> Batch<u32> {
        let mut batch = Batch::default();
        values.iter().for_each(|&v| batch.push(Placed::on_heap(v)));
        batch
    }

    /// Two producers and a consumer that takes now and then: nothing is lost, doubled, or reordered within a producer.
    #[test]
    fn loom_an_inbox_delivers_everything_once_and_in_order() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::default());
            let producers: Vec<_> = [[1, 2], [11, 12]]
                .map(|values| {
                    let inbox = inbox.clone();
                    thread::spawn(move || {
                        inbox.push(batch(&values));
                    })
                })
                .into_iter()
                .collect();
            let mut seen = Vec::new();
            let take = |seen: &mut Vec<u32>| {
                let mut list = inbox.take_all();
                while let Some(value) = list.pop_front() {
                    seen.push(value.take());
                }
            };
            take(&mut seen);
            producers.into_iter().for_each(|p| p.join().unwrap());
            take(&mut seen);
            assert_eq!(seen.iter().filter(|&&v| v < 10).collect::<Vec<_>>(), [&1, &2]);
            assert_eq!(seen.iter().filter(|&&v| v > 10).collect::<Vec<_>>(), [&11, &12]);
        });
    }

    /// A consumer that sleeps when it finds nothing gets what is pushed, in every order of events: no wake-up is lost. (Loom
    /// reports a deadlock otherwise.)
    #[test]
    fn loom_a_sleeper_is_woken_for_what_comes() {
        loom::model(|| {
            let shared = Arc::new((Inbox::default(), Event::default()));
            let producer = {
                let shared = shared.clone();
                thread::spawn(move || {
                    for value in [1, 2] {
                        shared.0.push(batch(&[value]));
                        shared.1.notify_one();
                    }
                })
            };
            let mut got = 0;
            while got < 2 {
                let announced = shared.1.announce();
                let mut list = shared.0.take_all();
                if list.is_empty() {
                    shared.1.wait(announced, None);
                } else {
                    shared.1.cancel(announced);
                    while let Some(value) = list.pop_front() {
                        got += 1;
                        assert_eq!(value.take(), got);
                    }
                }
            }
            producer.join().unwrap();
            assert_eq!(shared.1.waiters(), 0);
        });
    }
}
