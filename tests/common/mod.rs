//! A target of its own for every test: own RPC socket, own hugepage files, own folder; gone with the test.

#![allow(dead_code)] // each test binary uses its part

pub mod fuzz;
pub mod hugepages;
pub mod load;
pub mod nvme;
pub mod program;
pub mod slow;
pub mod spdk;

use program::Program;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// JSON-RPC's "invalid parameters".
pub const INVALID_PARAMS: i64 = -32602;

/// What a refused call says.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    pub code: i64,
    pub message: String,
}

/// A folder beside the build: /tmp may be a tmpfs, which has no direct I/O.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("t").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A file of zeroes.
pub fn image(folder: &Path, name: &str, len_bytes: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::File::create(&path).unwrap().set_len(len_bytes).unwrap();
    path
}

/// A running lloop_tgt. When it dies by itself, the test fails with that.
pub struct Target {
    program: Arc<Program>,
    claim: Option<hugepages::Claim>,
    pub socket: PathBuf,
    pub folder: tempfile::TempDir,
}

impl Target {
    /// Starts one.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts one with more arguments.
    pub fn start_with(args: &[&str]) -> Self {
        Self::start_by(&mut Command::new(env!("CARGO_BIN_EXE_lloop_tgt")), args, folder())
    }

    /// Starts one to which a mounted slowfs is Lustre.
    pub fn start_on_lustre(args: &[&str]) -> Self {
        Self::start_by(slow::on_lustre(&mut Command::new(env!("CARGO_BIN_EXE_lloop_tgt"))), args, folder())
    }

    /// Starts one by `command` in `folder`.
    pub fn start_by(command: &mut Command, args: &[&str], folder: tempfile::TempDir) -> Self {
        let memory: &[&str] = if args.contains(&"-s") { &[] } else { &["-s", "512"] };
        Self::start_program(command.arg("--disable-cpumask-locks").args(memory).args(args), folder)
    }

    /// Starts another program of SPDK's kind, which knows SPDK's own options.
    pub fn start_program(command: &mut Command, folder: tempfile::TempDir) -> Self {
        // The kernel limits a socket's path to 107 bytes, and build folders can be deep.
        let socket = std::env::temp_dir().join(format!("lloop-{}-{}.sock", std::process::id(), unique()));
        let log_path = folder.path().join("log");
        let log = std::fs::File::create(&log_path).unwrap();
        if !command.get_args().any(|arg| arg == "-m") {
            command.args(["-m", "0x1"]);
        }
        if command.get_current_dir().is_none() {
            // A core file goes with the test's folder.
            command.current_dir(folder.path());
        }
        command
            .args(["-r", socket.to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let mut claim = hugepages::claim(hugepages::of(command).unwrap_or(hugepages::DEFAULT_MIB));
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        claim.is_for(child.id(), Some(&socket));
        let name = hugepages::program_of(command).unwrap_or_else(|| "the target".to_owned());
        let target = Target { program: Program::new(child, &name, log_path), claim: Some(claim), socket, folder };
        let deadline = Instant::now() + Duration::from_secs(60);
        while target.try_call("rpc_get_methods", json!({})).is_none() {
            if let Some(status) = target.program.status() {
                target.program.may_end();
                panic!("{name} did not start: {status}");
            }
            assert!(Instant::now() < deadline, "{name} does not answer");
            std::thread::sleep(Duration::from_millis(30));
        }
        target
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// Whether its death has been told.
    pub fn has_been_reported(&self) -> bool {
        self.program.has_been_reported()
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// A file for it.
    pub fn image(&self, name: &str, len_bytes: u64) -> PathBuf {
        image(self.folder.path(), name, len_bytes)
    }

    fn try_call(&self, method: &str, params: Value) -> Option<Result<Value, Refused>> {
        call(&self.socket, method, &params).ok()
    }

    /// Calls a method.
    pub fn call(&self, method: &str, params: Value) -> Result<Value, Refused> {
        match call(&self.socket, method, &params) {
            Ok(answer) => answer,
            Err(error) => panic!("{method} {params}: {error}; the target said:\n{}", self.log()),
        }
    }

    /// Calls a method that has to succeed.
    pub fn ok(&self, method: &str, params: Value) -> Value {
        match self.call(method, params.clone()) {
            Ok(value) => value,
            Err(refused) => panic!("{method} {params}: {refused:?}"),
        }
    }

    /// Calls a method that has to be refused with `errno`, in words that contain all of `words`.
    pub fn refused(&self, method: &str, params: Value, errno: i32, words: &[&str]) {
        let refused = match self.call(method, params.clone()) {
            Ok(value) => panic!("{method} {params} was not refused but answered {value}"),
            Err(refused) => refused,
        };
        assert_eq!(refused.code, -i64::from(errno), "{method} {params}: {}", refused.message);
        for word in words {
            assert!(refused.message.contains(word), "{method} {params}: no {word:?} in {:?}", refused.message);
        }
    }

    /// Attaches a file; `more` parameters are added. The name.
    pub fn attach(&self, file: &Path, more: Value) -> String {
        let mut params = json!({"filename": file, "allow_any_fs": true});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.ok("bdev_lloop_create", params).as_str().unwrap().to_owned()
    }

    /// What `bdev_get_bdevs` says of a device.
    pub fn bdev(&self, name: &str) -> Value {
        self.ok("bdev_get_bdevs", json!({"name": name}))[0].clone()
    }

    /// The names of all devices of lloop.
    pub fn names(&self) -> Vec<String> {
        let bdevs = self.ok("bdev_get_bdevs", json!({}));
        let lloops = bdevs.as_array().unwrap().iter().filter(|b| b["driver_specific"]["lloop"].is_object());
        lloops.map(|b| b["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Exports a device over NVMe/TCP on loopback; the address and the NQN.
    pub fn export(&self, bdev: &str) -> (String, String) {
        let nqn = format!("nqn.2026-11.io.lloop.test:{bdev}");
        if self.ok("nvmf_get_transports", json!({})).as_array().is_none_or(Vec::is_empty) {
            self.ok("nvmf_create_transport", json!({"trtype": "TCP"}));
        }
        self.ok("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true, "serial_number": "LLOOP1"}));
        self.ok("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": bdev}}));
        for _ in 0..50 {
            let port = free_port();
            let address =
                json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
            if self.call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address})).is_ok() {
                return (format!("127.0.0.1:{port}"), nqn);
            }
        }
        panic!("no port to listen on");
    }

    /// One more connection to a device that is exported already.
    pub fn export_again(&self, bdev: &str) -> nvme::Nvme {
        let nqn = format!("nqn.2026-11.io.lloop.test:{bdev}");
        let subsystems = self.ok("nvmf_get_subsystems", json!({}));
        let ours = subsystems.as_array().unwrap().iter().find(|s| s["nqn"] == json!(nqn)).unwrap();
        let address = &ours["listen_addresses"][0];
        let address = format!("{}:{}", address["traddr"].as_str().unwrap(), address["trsvcid"].as_str().unwrap());
        nvme::Nvme::connect(&address, &nqn, self.bdev(bdev)["block_size"].as_u64().unwrap() as usize).unwrap()
    }

    /// An initiator's connection to a device exported for it.
    pub fn connect(&self, bdev: &str) -> nvme::Nvme {
        let block = self.bdev(bdev)["block_size"].as_u64().unwrap() as usize;
        let (address, nqn) = self.export(bdev);
        nvme::Nvme::connect(&address, &nqn, block).unwrap()
    }

    /// Sends a signal. What ends a process may end it from now on.
    pub fn signal(&self, name: &str) {
        if ["TERM", "INT", "KILL", "QUIT", "HUP"].contains(&name) {
            self.program.may_end();
        }
        let status = Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        self.program.may_end();
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.program.status() {
                return status;
            }
            assert!(Instant::now() < deadline, "lloop_tgt does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it as a user does; it has to end in order.
    pub fn stop(&mut self) {
        self.signal("TERM");
        let status = self.wait(Duration::from_secs(30));
        assert!(status.success(), "lloop_tgt ended with {status}:\n{}", self.log());
    }

    /// Its open descriptors: what they lead to. Without hugepage files, which are counted apart, and sockets: the RPC
    /// connections of the tests come and go.
    pub fn descriptors(&self) -> Vec<String> {
        let open = || -> HashSet<(OsString, PathBuf)> {
            let dir = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().flatten();
            dir.filter_map(|entry| Some((entry.file_name(), std::fs::read_link(entry.path()).ok()?))).collect()
        };
        // Any thread may have a file open for a moment: glibc reads /proc/self/maps and the number of processors when a thread starts.
        let mut lasting = open();
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(3));
            let now = open();
            lasting.retain(|descriptor| now.contains(descriptor));
        }
        let mut all: Vec<String> = lasting
            .into_iter()
            .map(|(_, path)| path.display().to_string())
            .filter(|path| !path.starts_with("/dev/hugepages/") && !path.starts_with("socket:"))
            // (SPDK v20.07 names the iSCSI connections' memory alike in every process, so another's end removes the name.)
            .map(|path| path.trim_end_matches(" (deleted)").to_owned())
            .collect();
        all.sort();
        all
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let death = self.program.unreported_death();
        program::end(self.program.clone(), self.claim.take());
        let death = death.or_else(|| self.program.unreported_death());
        remove_socket(&self.socket);
        match death {
            Some(text) if !std::thread::panicking() => panic!("{text}"),
            Some(text) => eprintln!("{text}"),
            None if std::thread::panicking() => eprintln!("---- the target's log\n{}----", self.log()),
            None => {}
        }
    }
}

/// A killed SPDK leaves its socket behind, and newer ones a lock beside it.
pub fn remove_socket(socket: &Path) {
    let mut lock = socket.as_os_str().to_owned();
    lock.push(".lock");
    let _ = std::fs::remove_file(socket);
    let _ = std::fs::remove_file(lock);
}

/// A killed SPDK leaves its hugepage files, its trace memory, DPDK's folder and the locks of its processors behind; these are the
/// ones of `pid`.
pub fn remove_leftovers(pid: u32) {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let hugetlbfs = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        words.next().zip(words.next()).filter(|(_, kind)| *kind == "hugetlbfs").map(|(at, _)| at)
    });
    let folders = hugetlbfs.chain(["/dev/shm", "/var/tmp"]);
    for entry in folders.filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_its_own = name.starts_with(&format!("spdk_pid{pid}map_"))
            || name.ends_with(&format!("_trace.pid{pid}"))
            // Such a lock holds the process id as a C int.
            || name.starts_with("spdk_cpu_lock_") && std::fs::read(entry.path()).is_ok_and(|bytes| bytes.starts_with(&pid.to_ne_bytes()));
        if is_its_own {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let _ = std::fs::remove_dir_all(format!("/var/run/dpdk/spdk_pid{pid}"));
}

/// Whether `condition` comes true within a minute.
pub fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        program::all_live();
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

fn unique() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A port that nobody listens on at the moment.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One JSON-RPC call on a connection of its own.
pub fn call(socket: &Path, method: &str, params: &Value) -> std::io::Result<Result<Value, Refused>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut request = json!({"jsonrpc": "2.0", "id": 1, "method": method});
    if params.as_object().is_none_or(|p| !p.is_empty()) {
        request["params"] = params.clone();
    }
    stream.write_all(request.to_string().as_bytes())?;
    let mut text = Vec::new();
    loop {
        let mut part = [0; 65536];
        let n = stream.read(&mut part)?;
        if n == 0 {
            return Err(std::io::Error::other("the target closed the connection"));
        }
        text.extend(&part[..n]);
        if let Ok(answer) = serde_json::from_slice::<Value>(&text) {
            return Ok(match answer.get("error") {
                Some(error) => Err(Refused {
                    code: error["code"].as_i64().unwrap(),
                    message: error["message"].as_str().unwrap_or_default().to_owned(),
                }),
                None => Ok(answer["result"].clone()),
            });
        }
    }
}

/// What scripts/test.sh has built beside lloop out of SPDK's sources.
pub fn beside(name: &str) -> PathBuf {
    let apps = std::env::var_os("LLOOP_SPDK_APPS").expect("LLOOP_SPDK_APPS is set: run the tests by scripts/test.sh");
    let path = Path::new(&apps).join(name);
    assert!(path.exists(), "{} is missing: run the tests by scripts/test.sh", path.display());
    path
}

/// One of SPDK's own programs with lloop inside, as scripts/test.sh builds them, ready to share its cores and touch no PCI.
pub fn spdk_app(name: &str) -> Command {
    let mut command = Command::new(beside(name));
    command.arg("-u");
    // v20.07 neither locks its cores nor knows the option.
    if spdk::version() != "20.07" {
        command.arg("--disable-cpumask-locks");
    }
    command
}

/// Runs a program to its end, within `limit`; what it printed, and how it ended. One of SPDK's kind may fail but not crash.
pub fn run(command: &mut Command, limit: Duration) -> (ExitStatus, String) {
    let memory = hugepages::of(command);
    let mut claim = memory.map(hugepages::claim);
    // A core file goes with this folder.
    let place = memory.filter(|_| command.get_current_dir().is_none()).map(|_| folder());
    if let Some(place) = &place {
        command.current_dir(place.path());
    }
    let mut output = tempfile::tempfile().unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output.try_clone().unwrap())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let pid = child.id();
    if let Some(claim) = &mut claim {
        claim.is_for(pid, None);
    }
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if claim.is_some() {
        remove_leftovers(pid);
        let words: Vec<_> = command.get_args().collect();
        words.windows(2).filter(|pair| pair[0] == "-r").for_each(|pair| remove_socket(Path::new(pair[1])));
    }
    let mut text = Vec::new();
    std::io::Seek::rewind(&mut output).unwrap();
    output.read_to_end(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = status.unwrap_or_else(|| panic!("{command:?} took longer than {limit:?}:\n{text}"));
    assert!(claim.is_none() || status.signal().is_none(), "{command:?} died: {status}\n{text}");
    (status, text)
}
