//! A mounted slowfs (tests/slowfs), and other clients of it.

use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// A program that cargo builds with the tests.
fn example(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(program.exists(), "{} is missing; cargo test builds it", program.display());
    program
}

/// What makes a slowfs look like Lustre to a command (tests/lustre.c).
pub fn on_lustre(command: &mut Command) -> &mut Command {
    let shim =
        std::env::var_os("LLOOP_LUSTRE_SHIM").expect("LLOOP_LUSTRE_SHIM is set: run the tests by scripts/test.sh");
    assert!(Path::new(&shim).exists(), "{} is missing: run the tests by scripts/test.sh", shim.display());
    command.env("LD_PRELOAD", shim)
}

/// The attribute `lustre.lov` of a real file, and where it lies (tests/fixtures/lustre).
pub fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lustre").join(name).with_extension("lov");
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A slow, stuck or failing file; unmounted with the value.
pub struct SlowFile {
    child: Child,
    /// Where new files can be made.
    pub mountpoint: PathBuf,
    faults: PathBuf,
    /// The file below: what is really there.
    pub backing: PathBuf,
    /// The file to attach.
    pub path: PathBuf,
}

impl SlowFile {
    /// Serves a new file of `len_bytes` from a folder.
    pub fn new(folder: &Path, len_bytes: u64) -> Self {
        Self::mount(folder, len_bytes, None, "flock")
    }

    /// The same with a layout, for programs that meet it as Lustre ([`on_lustre`]).
    pub fn lustre(folder: &Path, len_bytes: u64, lov: &[u8]) -> Self {
        Self::mount(folder, len_bytes, Some(lov), "flock")
    }

    /// The same with a mount option about locks: flock, localflock or noflock.
    pub fn mount(folder: &Path, len_bytes: u64, lov: Option<&[u8]>, locks: &str) -> Self {
        let backing = super::image(folder, "backing", len_bytes);
        let mountpoint = folder.join("slow");
        std::fs::create_dir(&mountpoint).unwrap();
        let faults = backing.with_file_name("backing.faults");
        let path = mountpoint.join("image");
        if let Some(lov) = lov {
            std::fs::write(backing.with_file_name("backing.lov"), lov).unwrap();
        }
        let child = Command::new(example("slowfs")).args([&backing, &mountpoint]).arg(locks).spawn().unwrap();
        let slow = SlowFile { child, mountpoint, faults, backing, path };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !slow.path.exists() {
            assert!(Instant::now() < deadline, "slowfs does not come up; is /dev/fuse there?");
            std::thread::sleep(Duration::from_millis(10));
        }
        slow
    }

    /// What is wrong from now on, in slowfs's words (tests/slowfs/faults.rs); nothing when empty.
    pub fn set_faults(&self, words: &str) {
        // Replaced at once, so that nobody reads half of it.
        let new = self.faults.with_extension("new");
        std::fs::write(&new, words).unwrap();
        std::fs::rename(&new, &self.faults).unwrap();
    }

    /// The layout from now on.
    pub fn set_layout(&self, lov: &[u8]) {
        let new = self.backing.with_file_name("backing.new");
        std::fs::write(&new, lov).unwrap();
        std::fs::rename(&new, self.backing.with_file_name("backing.lov")).unwrap();
    }

    /// What was done to the file: reads, writes, fsyncs, fallocates, fallocates_under_group_lock, group_locks, group_unlocks,
    /// groups_held, record_locks, records_held, unprotected_ios, data_version, and `osts` by number: reads, writes, max_concurrent.
    pub fn stats(&self) -> Value {
        let mut text = vec![0; 65536];
        let n = rustix::fs::getxattr(&self.path, "user.slowfs.stats", &mut text[..]).unwrap();
        serde_json::from_slice(&text[..n]).unwrap()
    }

    /// Waits until the stats are as they have to become.
    pub fn until(&self, what: &str, seen: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !seen(&self.stats()) {
            assert!(Instant::now() < deadline, "waiting until {what}: {}", self.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Another client of it, with `NAME` open on the file.
    pub fn client(&self, name: &str) -> Client {
        let client = Client::start();
        client.ok(&format!("open {name} {} w,direct,nonblock", self.path.display()));
        client
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        self.set_faults("");
        let _ = Command::new("umount").arg("-l").arg(&self.mountpoint).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Answers = Arc<(Mutex<HashMap<u64, Result<String, i32>>>, Condvar)>;

/// A process that is a client of Lustre (tests/client.rs); killed with the value.
pub struct Client {
    child: Child,
    input: Mutex<ChildStdin>,
    answers: Answers,
    next: AtomicU64,
}

impl Client {
    /// Starts one.
    pub fn start() -> Client {
        let mut command = Command::new(example("client"));
        let mut child = on_lustre(&mut command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let answers = Answers::default();
        let arrived = answers.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let words: Vec<&str> = line.splitn(3, ' ').collect();
                let answer = if words[1] == "ok" { Ok(words[2].to_owned()) } else { Err(words[2].parse().unwrap()) };
                arrived.0.lock().unwrap().insert(words[0].parse().unwrap(), answer);
                arrived.1.notify_all();
            }
        });
        Client { child, input: Mutex::new(input), answers, next: AtomicU64::new(0) }
    }

    /// Tells it to do something (tests/client.rs has the words), and does not wait for that.
    pub fn tell(&self, command: &str) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        writeln!(self.input.lock().unwrap(), "{id} {command}").unwrap();
        id
    }

    /// What came of it; nothing if that takes longer than `limit`.
    pub fn answer(&self, id: u64, limit: Duration) -> Option<Result<String, i32>> {
        let (answers, arrived) = &*self.answers;
        let waits = |answers: &mut HashMap<_, _>| !answers.contains_key(&id);
        arrived.wait_timeout_while(answers.lock().unwrap(), limit, waits).unwrap().0.remove(&id)
    }

    /// Tells it to do something that has to come to an end; an errno when it failed.
    pub fn call(&self, command: &str) -> Result<String, i32> {
        let id = self.tell(command);
        self.answer(id, Duration::from_secs(30)).unwrap_or_else(|| panic!("{command} does not come back"))
    }

    /// Tells it to do something that has to succeed.
    pub fn ok(&self, command: &str) -> String {
        self.call(command).unwrap_or_else(|errno| panic!("{command}: errno {errno}"))
    }

    /// Tells it to do something that does not come back; checked for as long as it takes to be fairly sure.
    pub fn blocks(&self, command: &str) -> u64 {
        let id = self.tell(command);
        let answer = self.answer(id, Duration::from_millis(300));
        assert_eq!(answer, None, "{command} came back");
        id
    }

    /// What came of something that was blocked.
    pub fn comes_back(&self, id: u64) -> Result<String, i32> {
        self.answer(id, Duration::from_secs(30)).expect("it comes back")
    }

    /// Kills it as the kernel's memory killer would, and waits until it is gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
