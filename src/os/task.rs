//! Calls that may block, for callers that must not: they run on threads of their own and are awaited.

use super::thread::run_anywhere_but;
use crate::error::{Error, Result};
use futures::channel::oneshot;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

/// The most calls in progress; each is a thread. A hanging server must not eat all of the machine's.
const MAX_CALLS: usize = 128;

/// The most calls that go on after their callers have stopped waiting for them. Each is a thread that nobody can end.
const MAX_STUCK: usize = 32;

type Job = Box<dyn FnOnce() + Send>;

/// Starts blocking calls from threads that must not even wait for a thread to be made.
#[derive(Clone)]
pub struct Blocking {
    jobs: mpsc::Sender<Job>,
    in_progress: Arc<AtomicUsize>,
    stuck: Arc<AtomicUsize>,
}

/// How a call stands that its caller waits for only so long.
struct Fate {
    state: AtomicU8,
    stuck: Arc<AtomicUsize>,
}

const WAITED_FOR: u8 = 0;
const GIVEN_UP: u8 = 1;
const RETURNED: u8 = 2;

impl Fate {
    /// The caller has stopped waiting: the call counts as stuck until it returns.
    fn give_up(&self) {
        self.stuck.fetch_add(1, Ordering::Relaxed);
        if self.state.swap(GIVEN_UP, Ordering::Relaxed) == RETURNED {
            self.stuck.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Says that a call has returned, also when it has panicked.
struct Returns(Arc<Fate>);

impl Drop for Returns {
    fn drop(&mut self) {
        if self.0.state.swap(RETURNED, Ordering::Relaxed) == GIVEN_UP {
            self.0.stuck.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn take(slot: &Mutex<Option<Job>>) -> Option<Job> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// A place among the calls in progress.
struct Count(Arc<AtomicUsize>);

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Blocking {
    /// Starts the dispatcher. It ends when the last clone is dropped.
    ///
    /// # Errors
    /// The system's errno when it has no thread left.
    pub fn new(reactor_cpus: Vec<u32>) -> Result<Self> {
        let (jobs, receiver) = mpsc::channel::<Job>();
        let dispatch = move || {
            // What is started from here inherits the affinity.
            run_anywhere_but(&reactor_cpus);
            while let Ok(job) = receiver.recv() {
                // When there is no thread for it the job runs here: late, but a file is always closed.
                let slot = Arc::new(Mutex::new(Some(job)));
                let place = slot.clone();
                let run = move || take(&place).into_iter().for_each(|job| job());
                if let Err(error) = std::thread::Builder::new().name("lloop-call".into()).spawn(run) {
                    tracing::error!("cannot start a thread for a blocking call ({error}); making it on the only one");
                    take(&slot).into_iter().for_each(|job| job());
                }
            }
        };
        let started = std::thread::Builder::new().name("lloop-calls".into()).spawn(dispatch);
        started.map_err(|e| Error::os(e.raw_os_error().unwrap_or(libc::EAGAIN), "starting a thread"))?;
        Ok(Blocking { jobs, in_progress: Arc::default(), stuck: Arc::default() })
    }

    /// How many calls go on after their callers have stopped waiting for them.
    pub fn stuck(&self) -> usize {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Runs `call` on a thread of its own; nobody waits for it. False when the dispatcher has ended.
    pub fn start(&self, call: impl FnOnce() + Send + 'static) -> bool {
        self.jobs.send(Box::new(call)).is_ok()
    }

    /// Runs `call` on a thread of its own. When the caller stops waiting, the call goes on and its result is dropped there.
    ///
    /// # Errors
    /// EAGAIN when too many calls are stuck already, or the system has no thread; EFAULT when `call` panicked.
    pub async fn run<R: Send + 'static>(&self, call: impl FnOnce() -> R + Send + 'static) -> Result<R> {
        let count = Count(self.in_progress.clone());
        if count.0.fetch_add(1, Ordering::Relaxed) >= MAX_CALLS {
            return Err(Error::new(libc::EAGAIN, "too many file operations are stuck; is a server down?"));
        }
        self.run_counted(Some(count), call).await
    }

    /// As [`Blocking::run`], but never refused for want of a place: for what gives something back.
    ///
    /// # Errors
    /// EAGAIN when the system has no thread; EFAULT when `call` panicked.
    pub async fn run_always<R: Send + 'static>(&self, call: impl FnOnce() -> R + Send + 'static) -> Result<R> {
        self.run_counted(None, call).await
    }

    async fn run_counted<R: Send + 'static>(
        &self,
        count: Option<Count>,
        call: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R> {
        let (sender, receiver) = oneshot::channel();
        let job = move || {
            let result = call();
            // (A panic drops it as well. Before the answer: whoever has that may count on the place.)
            drop(count);
            let _ = sender.send(result);
        };
        self.jobs
            .send(Box::new(job))
            .map_err(|_| Error::new(libc::EAGAIN, "the dispatcher of blocking calls has ended"))?;
        receiver.await.map_err(|_| Error::new(libc::EFAULT, "a blocking call could not be made, see the log"))
    }
}

impl Blocking {
    /// As [`Blocking::run`], but waits no longer than `limit`. The call goes on after that, and its result is dropped there.
    ///
    /// # Errors
    /// ETIMEDOUT; EAGAIN also when too many earlier calls have timed out and still go on; those of [`Blocking::run`].
    pub async fn run_within<R: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R> {
        let stuck = self.stuck();
        if stuck >= MAX_STUCK {
            let message = format!("{stuck} earlier calls have timed out and are still waiting for their servers");
            return Err(Error::new(libc::EAGAIN, message));
        }
        let fate = Arc::new(Fate { state: AtomicU8::new(WAITED_FOR), stuck: self.stuck.clone() });
        self.run(move || {
            let (sender, receiver) = mpsc::sync_channel(1);
            let returns = Returns(fate.clone());
            // (The call counts for as long as it is waited for: the caller can start no more than so many a time.)
            let worker = std::thread::Builder::new().name("lloop-call".into()).spawn(move || {
                let _returns = returns;
                // A result that nobody waits for is dropped here. That can block, too.
                let _ = sender.send(call());
            });
            worker.map_err(|e| Error::os(e.raw_os_error().unwrap_or(libc::EAGAIN), "starting a thread"))?;
            receiver.recv_timeout(limit).map_err(|e| match e {
                mpsc::RecvTimeoutError::Timeout => {
                    fate.give_up();
                    Error::new(libc::ETIMEDOUT, format!("no answer for {limit:?}"))
                }
                mpsc::RecvTimeoutError::Disconnected => {
                    Error::new(libc::EFAULT, "a blocking call has failed, see the log")
                }
            })
        })
        .await?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;

    #[test]
    fn results_and_panics_come_back() {
        let blocking = Blocking::new(Vec::new()).unwrap();
        assert_eq!(block_on(blocking.run(|| 6 * 7)), Ok(42));
        let error = block_on(blocking.run(|| -> i32 { panic!("expected by a test") })).unwrap_err();
        assert_eq!(error.errno, libc::EFAULT);
        assert_eq!(block_on(blocking.run(|| 1)), Ok(1));
        assert_eq!(blocking.in_progress.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn calls_that_nobody_waits_for_are_counted_and_bounded() {
        let blocking = Blocking::new(Vec::new()).unwrap();
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(std::sync::Mutex::new(wait));
        for stuck in 1..=MAX_STUCK {
            let wait = wait.clone();
            let call = move || wait.lock().unwrap().recv().is_err();
            let error = block_on(blocking.run_within(Duration::from_millis(1), call)).unwrap_err();
            assert_eq!((error.errno, blocking.stuck()), (libc::ETIMEDOUT, stuck));
        }
        assert_eq!(block_on(blocking.run_within(Duration::from_secs(60), || 1)).unwrap_err().errno, libc::EAGAIN);
        assert_eq!(block_on(blocking.run(|| 1)), Ok(1), "closing files goes on");
        drop(release);
        let start = std::time::Instant::now();
        while blocking.stuck() > 0 {
            assert!(start.elapsed() < Duration::from_secs(30), "{} are stuck", blocking.stuck());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(block_on(blocking.run_within(Duration::from_secs(60), || 1)), Ok(1));
        assert_eq!(blocking.stuck(), 0);
    }

    #[test]
    fn stuck_calls_are_bounded() {
        let blocking = Blocking::new(Vec::new()).unwrap();
        blocking.in_progress.store(MAX_CALLS, Ordering::Relaxed);
        assert_eq!(block_on(blocking.run(|| 1)).unwrap_err().errno, libc::EAGAIN);
        assert_eq!(blocking.in_progress.load(Ordering::Relaxed), MAX_CALLS);
    }
}
