//! Programs that run beside a test, and have to: one that ends while nobody told it to is the failure of that test, whatever the
//! test itself would say. It is told before the test's own failure (by a panic hook), or is the failure (when the value goes).

use super::hugepages::Claim;
use std::cell::RefCell;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};
use std::time::{Duration, Instant};

/// Lines of a dead program's log that are shown.
const LINES: usize = 30;

/// A running program.
pub struct Program {
    name: String,
    /// The test that started it.
    test: String,
    pid: u32,
    log: PathBuf,
    child: Mutex<Child>,
    /// The test told it to end, or has seen its end.
    may_end: AtomicBool,
    reported: AtomicBool,
}

thread_local! {
    static STARTED: RefCell<Vec<Weak<Program>>> = const { RefCell::new(Vec::new()) };
}

/// All of this process, for threads that a test has started: their panics come before the test's.
static ALL: Mutex<Vec<Weak<Program>>> = Mutex::new(Vec::new());

impl Program {
    /// Watches over a child whose output goes to the file `log`.
    pub fn new(child: Child, name: &str, log: PathBuf) -> Arc<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let default = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                report_deaths();
                default(panic);
            }));
        });
        let program = Arc::new(Program {
            name: name.to_owned(),
            test: std::thread::current().name().unwrap_or("a test").to_owned(),
            pid: child.id(),
            log,
            child: Mutex::new(child),
            may_end: AtomicBool::new(false),
            reported: AtomicBool::new(false),
        });
        STARTED.with_borrow_mut(|all| remember(all, &program));
        remember(&mut ALL.lock().unwrap(), &program);
        program
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its end is the test's wish from now on.
    pub fn may_end(&self) {
        self.may_end.store(true, Ordering::Relaxed);
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    /// Kills it, and waits for its end for up to `limit`.
    pub fn kill(&self, limit: Duration) -> bool {
        self.may_end();
        if self.status().is_none() {
            let _ = self.child.lock().unwrap().kill();
        }
        let deadline = Instant::now() + limit;
        while self.status().is_none() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// What to say of it if it has ended by itself, or by a crash on its way out.
    pub fn death(&self) -> Option<String> {
        // A broken connection is seen before its other end is quite gone: an end that is under way is waited for.
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            match self.child.try_lock().ok()?.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if self.is_ending() && Instant::now() < deadline => {}
                _ => return None,
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let crashed =
            status.signal().is_some_and(|signal| ![libc::SIGTERM, libc::SIGINT, libc::SIGKILL].contains(&signal));
        if self.may_end.load(Ordering::Relaxed) && !crashed {
            return None;
        }
        let said = std::fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES)..].join("\n    | ");
        Some(format!(
            "\n#### {} (process {}) of {} DIED: {status}\n#### That is what failed; what the test says may be a consequence.\n    | {last}\n####",
            self.name, self.pid, self.test
        ))
    }

    /// [`Program::death`], the first time only.
    pub fn unreported_death(&self) -> Option<String> {
        let text = self.death()?;
        (!self.reported.swap(true, Ordering::Relaxed)).then_some(text)
    }

    /// Whether its death has been told.
    pub fn has_been_reported(&self) -> bool {
        self.reported.load(Ordering::Relaxed)
    }

    /// Whether the kernel is taking it apart: PF_EXITING in its flags (proc(5), field 9).
    fn is_ending(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)?.parse::<u32>().ok());
        flags.is_some_and(|flags| flags & 0x4 != 0)
    }
}

fn remember(all: &mut Vec<Weak<Program>>, program: &Arc<Program>) {
    all.retain(|other| other.strong_count() > 0);
    all.push(Arc::downgrade(program));
}

/// The programs that a panic of this thread may come of.
fn concerned() -> Vec<Arc<Program>> {
    // libtest names a test's own thread; one without a name was started by some test.
    let has_name = std::thread::current().name().is_some();
    let own = STARTED.try_with(|all| all.try_borrow().map(|all| all.clone()).unwrap_or_default()).unwrap_or_default();
    let all = if has_name { own } else { ALL.try_lock().map(|all| all.clone()).unwrap_or_default() };
    all.iter().filter_map(Weak::upgrade).collect()
}

/// Says which of the test's programs have died.
fn report_deaths() {
    for program in concerned() {
        if let Some(text) = program.unreported_death() {
            eprintln!("{text}");
        }
    }
}

/// Fails the test if one of its programs has died. For whatever waits long.
pub fn all_live() {
    if let Some(text) = concerned().iter().find_map(|program| program.unreported_death()) {
        panic!("{text}");
    }
}

/// Ends a program and removes what it leaves; its memory is given back after that.
pub fn end(program: Arc<Program>, claim: Option<Claim>) {
    if program.kill(Duration::from_secs(5)) {
        super::remove_leftovers(program.pid);
        return;
    }
    // One that is stuck in a call on a slow file ends only when that is unmounted, which the test does after this. Should this
    // process end before, the next test program finds the claim and cleans up.
    std::thread::spawn(move || {
        program.kill(Duration::from_secs(600));
        super::remove_leftovers(program.pid);
        drop(claim);
    });
}
