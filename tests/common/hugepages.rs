//! A budget of hugepage memory, shared by all test programs of this machine.
//!
//! Whoever starts a program of SPDK's kind claims what it takes, and waits until there is that much. A claim is a file in
//! [`folder`] that its test program holds locked, so one of a killed test program is recognised: it counts no more, and whoever
//! finds it ends and cleans up what was started with it.
//!
//! A test may start several programs one after the other. Two such tests would wait for each other for ever if each had half of
//! the memory. So memory is granted by the banker's algorithm: only if all tests could still come to their end, one after the
//! other, each with all that it may need. That is [`LIMIT_MIB`], or what it said by [`reserve`] before it started the first one.

use std::cell::RefCell;
use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// What the programs take beyond their `-s`. DPDK takes what it needs there when the system has it, and fails when it has not. Measured
/// as the most that /proc/PID/status said in the tests, with v26.01: 882 MiB for a target with `-s 512` and 1386 with 1024, mostly
/// iSCSI's; 372 for bdevio and 362 for spdk_dd with 256; 512 for bdevperf and fio with 512.
const MORE_MIB: [(&str, u32); 4] = [("lloop_tgt", 384), ("spdk_tgt", 384), ("spdk_dd", 128), ("bdevio", 128)];
/// What a program that is not told (`-s`) is told here.
const SIZE_MIB: u32 = 512;
/// What a target takes.
pub const DEFAULT_MIB: u32 = SIZE_MIB + 384;
/// What a test may have at a time without [`reserve`].
const LIMIT_MIB: u32 = 2 * DEFAULT_MIB;
/// Not given away: DPDK may take some pages more than it was told, and somebody else may want a few.
const RESERVE_MIB: u32 = 128;
/// A test waits this long for others to end.
const LIMIT: Duration = Duration::from_secs(900);
/// And this long when no other test has any memory, so that it is somebody else who has it.
const LIMIT_ALONE: Duration = Duration::from_secs(120);

/// The programs that take hugepage memory.
const PROGRAMS: [&str; 5] = ["lloop_tgt", "spdk_tgt", "spdk_dd", "bdevio", "bdevperf"];

/// The program of SPDK's kind that a command starts, maybe by setpriv or a shell.
pub fn program_of(command: &Command) -> Option<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let mut names = words.filter_map(|word| Some(Path::new(word).file_name()?.to_string_lossy().into_owned()));
    names.find(|name| PROGRAMS.contains(&&**name))
}

/// What a command takes, if it is one of SPDK's kind or fio with the plugin.
pub fn of(command: &Command) -> Option<u32> {
    let words: Vec<_> = command.get_args().collect();
    let is_only_asked = words.iter().any(|word| ["--version", "--help"].contains(&&*word.to_string_lossy()));
    let has_plugin = command
        .get_envs()
        .any(|(_, value)| value.is_some_and(|value| value.to_string_lossy().contains("liblloop_fio")));
    if is_only_asked || program_of(command).is_none() && !has_plugin {
        return None;
    }
    let size = words.iter().position(|word| *word == "-s").and_then(|at| words.get(at + 1)?.to_str()?.parse().ok());
    let more = MORE_MIB.iter().find(|(name, _)| program_of(command).as_deref() == Some(name));
    Some(size.unwrap_or(SIZE_MIB) + more.map_or(0, |(_, more)| *more))
}

/// A test that has memory: the thread that libtest runs it in.
struct Test {
    path: PathBuf,
    /// Locked as long as this exists.
    _lock: File,
    limit: u32,
    held: u32,
    /// Process id, start time and socket of what was started.
    programs: Vec<(u32, u64, Option<PathBuf>)>,
}

impl Test {
    fn write(&self) {
        let mut text = format!("{} {}\n", self.limit, self.held);
        for (pid, start, socket) in &self.programs {
            let socket = socket.as_deref().unwrap_or(Path::new("")).display();
            writeln!(text, "{pid} {start} {socket}").unwrap();
        }
        std::fs::write(&self.path, text).unwrap();
    }
}

thread_local! {
    static TEST: RefCell<Weak<Handle>> = const { RefCell::new(Weak::new()) };
}

struct Handle(Mutex<Test>);

impl Handle {
    fn test(&self) -> MutexGuard<'_, Test> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let path = self.test().path.clone();
        let _turn = turn();
        let _ = std::fs::remove_file(path);
    }
}

/// Hugepage memory of a program; given back with the value.
pub struct Claim {
    handle: Arc<Handle>,
    mib: u32,
    pid: Option<u32>,
}

impl Claim {
    /// Notes the process that has the memory, and its socket, to be cleaned up should this test program be killed.
    pub fn is_for(&mut self, pid: u32, socket: Option<&Path>) {
        let _turn = turn();
        let mut test = self.handle.test();
        test.programs.push((pid, start_time(pid).unwrap_or(0), socket.map(Path::to_owned)));
        self.pid = Some(pid);
        test.write();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _turn = turn();
        let mut test = self.handle.test();
        test.held -= self.mib;
        test.programs.retain(|(pid, ..)| Some(*pid) != self.pid);
        test.write();
    }
}

/// What a test may have at a time; back to the default with the value.
#[must_use]
pub struct Reservation(Arc<Handle>);

impl Drop for Reservation {
    fn drop(&mut self) {
        let _turn = turn();
        let mut test = self.0.test();
        test.limit = LIMIT_MIB.max(test.held);
        test.write();
    }
}

/// Says that this test will have up to `mib` at a time. Before it starts its first program; the value has to live as long as they.
pub fn reserve(mib: u32) -> Reservation {
    let handle = this_test();
    {
        let _turn = turn();
        let mut test = handle.test();
        assert_eq!(test.held, 0, "hugepages::reserve comes before the first program");
        test.limit = mib;
        test.write();
    }
    Reservation(handle)
}

/// Claims memory for a program that this thread is about to start; waits until there is some.
pub fn claim(mib: u32) -> Claim {
    let handle = this_test();
    let start = Instant::now();
    loop {
        let (text, is_alone) = match try_claim(&handle, mib) {
            Ok(()) => return Claim { handle, mib, pid: None },
            Err(refused) => refused,
        };
        let limit = if is_alone { LIMIT_ALONE } else { LIMIT };
        assert!(start.elapsed() < limit, "no {mib} MiB of hugepages for this test within {limit:?}: {text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes `mib` if that is safe; else why not, and whether no other test has any.
fn try_claim(handle: &Handle, mib: u32) -> Result<(), (String, bool)> {
    let turn = turn();
    let mut test = handle.test();
    let others = others(&test.path);
    let free = free_mib();
    let is_first = test.held == 0 && others.iter().all(|(_, held)| *held == 0);
    let noted = folder().join("budget");
    let budget = match std::fs::read_to_string(&noted).ok().and_then(|text| text.trim().parse().ok()) {
        Some(budget) if !is_first => budget,
        _ => {
            let budget = free.saturating_sub(RESERVE_MIB);
            std::fs::write(&noted, budget.to_string()).unwrap();
            budget
        }
    };
    if test.held == 0 {
        test.limit = test.limit.max(mib);
    }
    // A test that asks for more than it may have is wrong every time, not now and then.
    let (held, limit) = (test.held, test.limit);
    if held + mib > limit {
        drop((test, turn));
        panic!(
            "this test has {held} MiB of hugepages and wants {mib} more: it has to say `hugepages::reserve({})` first",
            held + mib
        );
    }
    let wanted = (limit.min(budget).max(held + mib), held + mib);
    let mut all: Vec<_> = others.iter().map(|&(limit, held)| (limit.min(budget).max(held), held)).collect();
    let is_alone = all.iter().all(|(_, held)| *held == 0);
    all.retain(|(_, held)| *held > 0);
    all.push(wanted);
    if free < mib || !is_safe(budget, &all) {
        let text = format!(
            "{free} MiB are free, the budget is {budget} MiB, and the tests have (limit, now) {others:?}; \
                            scripts/setup.sh --tests reserves more"
        );
        return Err((text, is_alone));
    }
    test.held += mib;
    test.write();
    Ok(())
}

/// Whether everybody can have all that it may need, one after the other. `tests`: what each may need in all, and has.
fn is_safe(budget: u32, tests: &[(u32, u32)]) -> bool {
    let Some(mut free) = budget.checked_sub(tests.iter().map(|(_, held)| held).sum()) else { return false };
    let mut tests = tests.to_vec();
    tests.sort_by_key(|(limit, held)| limit - held);
    tests.iter().all(|(limit, held)| {
        let can_end = limit - held <= free;
        // Then all that it had is free.
        free += held;
        can_end
    })
}

/// This thread's entry, made when there is none.
fn this_test() -> Arc<Handle> {
    if let Some(handle) = TEST.with_borrow(Weak::upgrade) {
        return handle;
    }
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("claim-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let _turn = turn();
    let path = folder().join(name);
    let lock = File::create(&path).unwrap();
    lock.lock().unwrap();
    let test = Test { path, _lock: lock, limit: LIMIT_MIB, held: 0, programs: Vec::new() };
    test.write();
    let handle = Arc::new(Handle(Mutex::new(test)));
    TEST.set(Arc::downgrade(&handle));
    handle
}

/// What the other tests may have and have. Of those that were killed, only what they left is cleaned up.
fn others(own: &Path) -> Vec<(u32, u32)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder()).unwrap().flatten() {
        let path = entry.path();
        if path == own || !entry.file_name().to_string_lossy().starts_with("claim-") {
            continue;
        }
        let (Ok(file), Ok(text)) = (File::open(&path), std::fs::read_to_string(&path)) else { continue };
        let mut lines = text.lines();
        if file.try_lock().is_ok() {
            lines.skip(1).for_each(clean_up);
            let _ = std::fs::remove_file(&path);
        } else if let Some((limit, held)) = lines.next().and_then(|line| line.split_once(' ')) {
            all.push((limit.parse().unwrap(), held.parse().unwrap()));
        }
    }
    all
}

/// Ends a program of a killed test, which nobody else would, and removes what it leaves.
fn clean_up(line: &str) {
    let mut words = line.splitn(3, ' ');
    let (Some(pid), Some(start), socket) = (words.next(), words.next(), words.next().unwrap_or_default()) else {
        return;
    };
    let (Ok(pid), Ok(start)) = (pid.parse::<u32>(), start.parse::<u64>()) else { return };
    let is_there = || start != 0 && start_time(pid) == Some(start);
    if is_there() {
        let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_there() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    if !is_there() {
        super::remove_leftovers(pid);
    }
    if !socket.is_empty() {
        super::remove_socket(Path::new(socket));
    }
}

/// When a process started, in the kernel's ticks; none once it has ended (even if nobody has asked for its status).
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    if fields[0] == "Z" { None } else { fields[19].parse().ok() }
}

/// Free hugepages of the default size.
fn free_mib() -> u32 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let number = |name: &str| -> u32 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    number("HugePages_Free:") * (number("Hugepagesize:") / 1024)
}

/// Where the claims are. All test programs of a machine share its hugepages, so it does not depend on the build's folder.
fn folder() -> PathBuf {
    let folder = Path::new("/tmp").join("lloop-hugepages");
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Everybody's files are read and written by one at a time.
fn turn() -> File {
    let turn = File::create(folder().join("lock")).unwrap();
    turn.lock().unwrap();
    turn
}

#[test]
fn memory_is_granted_when_all_can_end() {
    // Two that have half of what each may need, and nothing left: neither could go on.
    assert!(is_safe(1536, &[(1024, 512), (1024, 512)]));
    assert!(!is_safe(1024, &[(1024, 512), (1024, 512)]));
    // The larger one gets its rest when the smaller one has ended.
    assert!(is_safe(2048, &[(1536, 512), (1024, 1024)]));
    assert!(!is_safe(2048, &[(1536, 1024), (1536, 768)]));
    assert!(!is_safe(512, &[(1024, 1024)]));
}
