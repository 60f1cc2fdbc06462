//! A virtual machine with Debian's kernel and a shell that the test drives through a virtio port. Made by scripts/guest.sh.

use crate::common::{Target, program};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Far more than anything takes on a machine that emulates and is busy.
const LIMIT: Duration = Duration::from_secs(120);
/// A machine that has not booted with hardware virtualisation by then never will.
const KVM_LIMIT: Duration = Duration::from_secs(10);
const MEMORY_MIB: u32 = 256;

fn made(name: &str) -> PathBuf {
    let folder = std::env::var_os("LLOOP_GUEST").expect("LLOOP_GUEST is set: run the tests by scripts/test.sh");
    Path::new(&folder).join(name)
}

/// The root filesystem, as an image without partitions.
pub fn root_image() -> PathBuf {
    made("root.img")
}

/// Where a virtual machine has its root filesystem.
pub enum Root {
    /// On a disk of QEMU's own.
    Own,
    /// On this partition of the devices under test.
    On(&'static str),
}

/// A running virtual machine.
pub struct Guest {
    child: Child,
    shell: UnixStream,
    read: Vec<u8>,
    commands: u32,
    folder: tempfile::TempDir,
}

/// How QEMU is to run: with hardware virtualisation only where a machine boots with it. That /dev/kvm exists says little.
fn accelerator() -> &'static [&'static str] {
    const KVM: &[&str] = &["-accel", "kvm", "-cpu", "host"];
    // Without cmpxchg16b: QEMU 7.2 spoils the flags register in emulating it, and Linux 6.12 uses it in its allocator.
    const TCG: &[&str] = &["-accel", "tcg", "-cpu", "max,cx16=off"];
    static CHOICE: OnceLock<&[&str]> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let works = Path::new("/dev/kvm").exists()
            && Guest::try_start(&Root::Own, &[], KVM).is_some_and(|mut guest| guest.try_run("true", KVM_LIMIT).is_ok());
        eprintln!("virtual machines run {}", if works { "by KVM" } else { "by emulation: none boots with KVM here" });
        if works { KVM } else { TCG }
    })
}

impl Guest {
    /// Starts one with more arguments for QEMU, and waits for its shell.
    pub fn start(root: &Root, arguments: &[String]) -> Self {
        let mut guest = Self::try_start(root, arguments, accelerator()).expect("QEMU starts");
        guest.ok("true");
        guest
    }

    fn try_start(root: &Root, arguments: &[String], accelerator: &[&str]) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("lloop-vm").tempdir().unwrap();
        let path = folder.path().join("shell");
        let log = File::create(folder.path().join("log")).unwrap();
        let mut append = "console=ttyS0 panic=-1 mitigations=off".to_owned();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-m", &MEMORY_MIB.to_string()])
            .args(accelerator)
            // The target reads and writes the machine's memory.
            .args([
                "-object",
                &format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"),
                "-numa",
                "node,memdev=mem",
            ])
            .arg("-kernel")
            .arg(made("vmlinuz"))
            .arg("-initrd")
            .arg(made("initrd"))
            .args(["-serial", &format!("file:{}", folder.path().join("console").display())])
            .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=shell,name=shell"])
            .args(["-chardev", &format!("socket,id=shell,path={},server=on,wait=off", path.display())])
            .args(arguments);
        match root {
            Root::Own => {
                let drive = format!("file={},format=raw,if=none,id=root,read-only=on", root_image().display());
                command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=root,serial=root"]);
            }
            Root::On(partition) => append += &format!(" lloop.root={partition}"),
        }
        command.args(["-append", &append]).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut child =
            command.spawn().unwrap_or_else(|e| panic!("qemu-system-x86_64: {e}: run the tests by scripts/test.sh"));
        let deadline = Instant::now() + Duration::from_secs(60);
        let shell = loop {
            match UnixStream::connect(&path) {
                Ok(shell) => break shell,
                Err(e) if child.try_wait().unwrap().is_some() || Instant::now() > deadline => {
                    eprintln!("{e}; QEMU said: {}", std::fs::read_to_string(folder.path().join("log")).unwrap());
                    let _ = child.kill();
                    let _ = child.wait();
                    return None;
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        Some(Guest { child, shell, read: Vec::new(), commands: 0, folder })
    }

    /// What the kernel and QEMU said.
    pub fn console(&self) -> String {
        let read = |name| {
            String::from_utf8_lossy(&std::fs::read(self.folder.path().join(name)).unwrap_or_default()).into_owned()
        };
        let lines: Vec<String> = read("console").lines().map(str::to_owned).collect();
        format!("{}\nQEMU: {}", lines[lines.len().saturating_sub(60)..].join("\n"), read("log"))
    }

    /// Gives the shell something to do, without waiting.
    pub fn send(&mut self, script: &str) {
        self.shell.write_all(format!("{script}\n").as_bytes()).unwrap();
    }

    /// Runs a script in a shell of its own; its exit status and what it printed.
    fn try_run(&mut self, script: &str, limit: Duration) -> Result<(i32, String), String> {
        self.commands += 1;
        let end = format!("\n===end {} ", self.commands);
        // (The marker is put together there, so that no echo of the script can be taken for it.)
        let (word, number) = ("===end", self.commands);
        self.send(&format!(
            "( {script}\n) </dev/null >/tmp/output 2>&1; status=$?; cat /tmp/output; printf '\\n%s %s %s\\n' {word} {number} $status"
        ));
        let deadline = Instant::now() + limit;
        loop {
            let text = String::from_utf8_lossy(&self.read).into_owned();
            if let Some((output, rest)) = text.split_once(&end)
                && let Some((status, _)) = rest.split_once('\n')
            {
                self.read.clear();
                return Ok((status.trim().parse().unwrap(), output.to_owned()));
            }
            // A machine whose target has died may hang: that is said at once.
            program::all_live();
            let left = deadline.saturating_duration_since(Instant::now());
            self.shell.set_read_timeout(Some(left.clamp(Duration::from_millis(1), Duration::from_secs(1)))).unwrap();
            let mut part = [0; 4096];
            match self.shell.read(&mut part) {
                Ok(0) => return Err("the virtual machine has ended".to_owned()),
                Ok(n) => self.read.extend(&part[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() < deadline {
                        continue;
                    }
                    return Err(format!("no end within {limit:?}; so far: {text}"));
                }
                Err(e) => return Err(format!("the virtual machine has ended: {e}")),
            }
        }
    }

    /// Runs a script; its exit status and what it printed.
    pub fn run(&mut self, script: &str) -> (i32, String) {
        match self.try_run(script, LIMIT) {
            Ok(result) => result,
            Err(error) => panic!("{script}: {error}\n{}", self.console()),
        }
    }

    /// Runs a script every command of which has to succeed; what it printed.
    pub fn ok(&mut self, script: &str) -> String {
        let (status, output) = self.run(&format!("set -e\n{script}"));
        assert_eq!(status, 0, "{script}\n{output}\n{}", self.console());
        output.trim().to_owned()
    }

    /// Runs a script until it prints `wanted`.
    pub fn wait_for(&mut self, script: &str, wanted: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let (_, output) = self.run(script);
            if output.trim() == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{script}: {output:?}, not {wanted:?}\n{}", self.console());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Boots it again, by force: nothing is written back before.
    pub fn reboot(&mut self) {
        let boots = |guest: &Self| {
            let console = std::fs::read(guest.folder.path().join("console")).unwrap();
            String::from_utf8_lossy(&console).matches("Linux version ").count()
        };
        let before = boots(self);
        self.send("reboot -f");
        // What came earlier would be read by the shell that is about to go.
        let deadline = Instant::now() + LIMIT;
        while boots(self) == before {
            program::all_live();
            assert!(Instant::now() < deadline, "it does not boot again\n{}", self.console());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.ok("true");
    }

    /// The kernel of the virtual machine has not met an error of any disk, but for lines that contain `known`.
    pub fn has_clean_log(&mut self, known: Option<&str>) {
        let log = self.ok("dmesg");
        let bad = |line: &&str| {
            let line = line.to_lowercase();
            ["i/o error", "ext4-fs error", "ext4-fs warning", "not supported", "unsupported", "sense key", "timed out", "timeout, "]
                .iter()
                .any(|word| line.contains(word))
                && !known.is_some_and(|known| line.contains(&known.to_lowercase()))
                // What a kernel says of the machine itself.
                && !["acpi", "mmconfig", "apic", "spectre", "firmware", "nvdimm"].iter().any(|word| line.contains(word))
        };
        let found: Vec<&str> = log.lines().filter(bad).collect();
        assert!(found.is_empty(), "the guest's kernel complains: {found:#?}");
    }

    /// Ends it.
    pub fn stop(mut self) {
        self.send("sync; poweroff -f");
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not end\n{}", self.console());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs `lloop` for a target; the exit status and what it printed.
pub fn lloop(target: &Target, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop"));
    let output = command.env("LLOOP_SOCKET", &target.socket).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

/// Runs `lloop`, which has to succeed.
pub fn lloop_ok(target: &Target, arguments: &[&str]) -> String {
    let (status, text) = lloop(target, arguments);
    assert_eq!(status, 0, "lloop {arguments:?}: {text}\n{}", target.log());
    text
}
