//! The tests' own means: what is said of a target that dies, and what is left of it and of a killed test program.

use crate::common::{Target, eventually, folder, hugepages, remove_socket};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Runs a test in a thread, as libtest does; what it failed with.
fn failure(test: impl FnOnce() + Send + 'static) -> Option<String> {
    let thread = std::thread::Builder::new().name("a test within a test".to_owned()).spawn(test).unwrap();
    let panic = thread.join().err()?;
    Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string()))
}

/// Makes a target crash. Done when it is dead, though nobody has asked for its status.
fn crash(target: &Target) {
    target.signal("ABRT");
    let stat = || std::fs::read_to_string(format!("/proc/{}/stat", target.pid())).unwrap();
    while !stat().contains(") Z ") {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn left_of(pid: u32, socket: &Path) -> Vec<PathBuf> {
    let named =
        ["/dev/hugepages", "/dev/shm", "/var/run/dpdk"].into_iter().filter_map(|place| std::fs::read_dir(place).ok());
    let mut all: Vec<PathBuf> = named.flatten().flatten().map(|entry| entry.path()).collect();
    all.retain(|path| path.to_string_lossy().contains(&format!("pid{pid}")));
    let lock = PathBuf::from(format!("{}.lock", socket.display()));
    all.extend([socket.to_owned(), lock].into_iter().filter(|path| path.exists()));
    all
}

#[test]
fn a_target_that_dies_fails_a_test_that_would_pass() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let said = failure(move || {
        let target = Target::start();
        sender.send((target.pid(), target.socket.clone())).unwrap();
        crash(&target);
    });
    let said = said.expect("it fails");
    assert!(said.contains("DIED") && said.contains("SIGABRT") && said.contains("is ready"), "{said}");
    let (pid, socket) = receiver.recv().unwrap();
    assert_eq!(left_of(pid, &socket), Vec::<PathBuf>::new());
}

#[test]
fn a_target_that_dies_is_said_before_what_the_test_says() {
    // The panic hook says it at the call that fails, so there is nothing left to be said at the end.
    let said = failure(|| {
        let target = Target::start();
        crash(&target);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target.ok("rpc_get_methods", json!({}))));
        assert!(result.is_err() && target.has_been_reported());
    });
    assert_eq!(said, None, "the death is told once");
}

#[test]
fn whoever_waits_for_a_dead_target_is_told_at_once() {
    let said = failure(|| {
        let target = Target::start();
        crash(&target);
        eventually(|| false);
        panic!("it has waited to the end");
    });
    assert!(said.as_ref().is_some_and(|said| said.contains("DIED")), "{said:?}");
}

#[test]
fn a_target_that_was_told_to_end_may() {
    let said = failure(|| {
        let target = Target::start();
        target.signal("KILL");
        std::thread::sleep(Duration::from_millis(300));
    });
    assert_eq!(said, None);
}

#[test]
fn a_test_that_wants_more_memory_than_it_said_is_told_so() {
    let said = failure(|| {
        let _first = hugepages::claim(512);
        let _second = hugepages::claim(1536);
    });
    assert!(said.as_ref().is_some_and(|said| said.contains("hugepages::reserve(2048)")), "{said:?}");
}

#[test]
fn what_a_killed_test_program_left_is_cleaned_up_by_the_next() {
    let here = folder();
    let socket = here.path().join("left.sock");
    // Nobody has this claim locked. Its program still runs.
    let mut program = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = program.id();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let start = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap();
    let trace = Path::new("/dev/shm").join(format!("lloop_test_trace.pid{pid}"));
    let lock = here.path().join("left.sock.lock");
    [&trace, &lock, &socket].into_iter().for_each(|path| std::fs::write(path, "").unwrap());
    let claim = format!("/tmp/lloop-hugepages/claim-{pid}-0");
    std::fs::write(&claim, format!("1024 512\n{pid} {start} {}\n", socket.display())).unwrap();
    drop(hugepages::claim(2));
    assert!(!program.wait().unwrap().success(), "it was killed");
    for path in [Path::new(&claim), &trace, &lock, &socket] {
        assert!(!path.exists(), "{} is still there", path.display());
    }
    // It is no mistake when there is nothing to remove.
    remove_socket(&socket);
}
