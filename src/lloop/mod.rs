//! The bdev module: devices over files, their RPCs and their lives.

pub mod attach;
pub mod channel;
pub mod device;
pub mod options;
pub mod prepare;
pub mod rpc;
pub mod state;

use crate::engine::{Pool, PoolOptions};
use crate::error::{Error, Result};
use crate::os::file::Identity;
use crate::os::task::Blocking;
use crate::os::{clock, ring, user};
use crate::spdk::app;
use crate::spdk::bdev::{self, BdevHandle, FiniDone};
use crate::spdk::log;
use crate::spdk::memory::MemoryWatch;
use crate::spdk::poller;
use crate::spdk::thread::{self, Owned};
use channel::{GROUPS, Token};
use device::Device;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

crate::spdk_module!(
    MODULE: Lloop,
    rpc::Create,
    rpc::Delete,
    rpc::Resize,
    rpc::Resume,
    rpc::SetOptions,
    rpc::GetOptions,
    rpc::GetStats,
);

/// The module.
pub struct Lloop;

/// A name that is taken.
enum Entry {
    /// Its file is being opened; with what the file is, once that is known.
    Attaching(Option<Identity>),
    /// There it is.
    Attached(Attached),
}

/// A device, as the control plane has it.
#[derive(Clone)]
struct Attached {
    device: Arc<Device>,
    handle: BdevHandle,
    /// Whoever resizes it holds this: one at a time.
    resizing: Rc<futures::lock::Mutex<()>>,
}

/// What the application's thread knows.
struct Registry {
    entries: RefCell<BTreeMap<String, Entry>>,
    blocking: Blocking,
    /// Tells the rings of memory that goes away.
    _memory: MemoryWatch,
}

static REGISTRY: Owned<Registry> = Owned::new();
static POOL: Mutex<Option<Pool<Token>>> = Mutex::new(None);

/// The module has been told to end.
static ENDING: AtomicBool = AtomicBool::new(false);

fn is_ending() -> bool {
    ENDING.load(Ordering::SeqCst)
}

/// The way to other threads, for any reactor.
static BLOCKING: Mutex<Option<Blocking>> = Mutex::new(None);

/// The way to other threads, while the module runs. Not for the I/O path.
fn blocking() -> Option<Blocking> {
    BLOCKING.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The workers, while the module runs.
fn pool() -> Option<Pool<Token>> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// How many file operations have timed out and still go on; each is a thread.
fn stuck_threads() -> usize {
    REGISTRY.with(|registry| registry.blocking.stuck()).unwrap_or(0)
}

/// Keeps the module in a program that does not mention it otherwise; what registers it runs before `main`.
pub fn linked() -> &'static CStr {
    <Lloop as bdev::Module>::NAME
}

/// Called when the target is told to end. I/O that hangs keeps the bdev layer from ending, and its memory must not be given back:
/// after a while the process ends as it is.
pub fn watch_the_end() {
    let patience = Duration::from_secs(u64::from(options::current().detach_timeout_s) + END_GRACE_S);
    let watch = move || {
        std::thread::sleep(patience);
        let stuck = pool().map(|pool| pool.stuck_calls()).unwrap_or_default();
        for call in &stuck {
            tracing::error!("ending without it: {call}");
        }
        let count = stuck.len();
        tracing::error!("not ended after {} s, {count} calls have not returned; ending as it is", patience.as_secs());
        crate::os::thread::exit_at_once(1);
    };
    // (It ends with the process, at the latest.)
    if let Err(error) = std::thread::Builder::new().name("lloop-end".into()).spawn(watch) {
        tracing::error!("the end is not watched: {error}");
    }
}

/// How much longer the end of a target may take than that of a device.
const END_GRACE_S: u64 = 5;

impl bdev::Module for Lloop {
    const NAME: &'static CStr = c"lloop";

    fn init() -> Result<(), i32> {
        log::forward_to_spdk();
        // (Bdev modules start before iSCSI does.)
        app::unname_iscsi_memory();
        // (DPDK has made its own by now, and vhost's sockets come later.)
        user::folders_are_made();
        let start = || -> Result<()> {
            let reactor_cpus = thread::reactor_cpus();
            clock::ticks_hz();
            let options = options::current();
            let pool = Pool::new(&PoolOptions { reactor_cpus: reactor_cpus.clone(), ..options.pool() })?;
            *POOL.lock().unwrap_or_else(PoisonError::into_inner) = Some(pool);
            let blocking = Blocking::new(reactor_cpus)?;
            *BLOCKING.lock().unwrap_or_else(PoisonError::into_inner) = Some(blocking.clone());
            let memory = MemoryWatch::new(ring::memory_changes).map_err(|e| Error::os(e, "watching SPDK's memory"))?;
            REGISTRY.put(Registry { entries: RefCell::default(), blocking, _memory: memory });
            GROUPS.register();
            Ok(())
        };
        start().map_err(|error| {
            tracing::error!("lloop cannot start: {error}");
            error.errno
        })
    }

    /// By now the bdev layer has unregistered every device that was not being detached before.
    fn fini(done: FiniDone) {
        ENDING.store(true, Ordering::SeqCst);
        thread::spawn(async move {
            // The bdev layer has forgotten those that were being detached already: their files are still being closed. And an attach
            // under way has to find out that it is too late.
            let deadline = Instant::now() + Duration::from_secs(options::current().detach_timeout_s.into());
            while attach::is_busy() && Instant::now() < deadline {
                if poller::sleep(Duration::from_millis(5)).await.is_err() {
                    break;
                }
            }
            let Some(registry) = REGISTRY.take() else { return done.report() };
            let pool = POOL.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(BLOCKING.lock().unwrap_or_else(PoisonError::into_inner).take());
            if let Some(pool) = pool {
                let stopped = registry.blocking.run(move || pool.stop(Duration::from_secs(5))).await;
                if let Err(error) | Ok(Err(error)) = stopped {
                    tracing::error!("ending the workers: {error}");
                }
            }
            FINI.put(RefCell::new(Some(done)));
            GROUPS.unregister(groups_gone);
        });
        static FINI: Owned<RefCell<Option<FiniDone>>> = Owned::new();
        extern "C" fn groups_gone(_: *mut c_void) {
            // Nothing of ours waits for messages any more; what is stuck in a call must not send one to threads that end.
            thread::close();
            if let Some(done) = FINI.take().and_then(RefCell::into_inner) {
                done.report();
            }
        }
    }

    fn config() -> Vec<(&'static str, Value)> {
        let options = serde_json::to_value(options::current()).unwrap_or(Value::Null);
        vec![("bdev_lloop_set_options", options)]
    }
}
