//! Memory: once started, I/O takes none and fills no page cache, so that whoever is short of it (a guest that swaps onto the
//! device, say) can rely on the device.

use crate::common::load::{Load, Random};
use crate::common::{Target, folder, image};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 16 * MIB / 4096;
/// How much more than after the warm-up the target may take.
const ROOM: u64 = 4 * MIB;
/// What is noise. (A log that is written to is page cache, too.)
const NOISE: u64 = MIB / 2;

/// A memory cgroup of version 1 or 2, gone with the value. Hugepages are not counted in either.
struct Cgroup {
    path: PathBuf,
    v2: bool,
}

impl Cgroup {
    /// A new one, below our own or at the root.
    fn new() -> Self {
        let ours = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let below = |controllers: &str| {
            let line =
                ours.lines().find_map(|line| line.split_once(':')?.1.split_once(':').filter(|c| c.0 == controllers));
            line.map_or("", |(_, path)| path.trim_start_matches('/')).to_owned()
        };
        let name = format!("lloop-test-{}", std::process::id());
        let mut tried = Vec::new();
        for (mount, controllers, v2) in [
            ("/sys/fs/cgroup/memory", "memory", false),
            ("/sys/fs/cgroup", "", true),
            ("/sys/fs/cgroup/unified", "", true),
        ] {
            for parent in [Path::new(mount).join(below(controllers)), mount.into()] {
                if v2 {
                    let _ = std::fs::write(parent.join("cgroup.subtree_control"), "+memory");
                }
                let group = Cgroup { path: parent.join(&name), v2 };
                match std::fs::create_dir(&group.path) {
                    Ok(()) if group.path.join(group.limit_file()).exists() => return group,
                    Ok(()) => tried.push(format!("{}: there is no memory controller", parent.display())),
                    Err(e) => tried.push(format!("{}: {e}", parent.display())),
                }
            }
        }
        panic!("this test needs to make a memory cgroup (as root, with /sys/fs/cgroup writable); tried {tried:#?}");
    }

    fn limit_file(&self) -> &'static str {
        if self.v2 { "memory.max" } else { "memory.limit_in_bytes" }
    }

    fn read(&self, file: &str) -> String {
        let path = self.path.join(file);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn write(&self, file: &str, value: &str) {
        let path = self.path.join(file);
        std::fs::write(&path, value).unwrap_or_else(|e| panic!("{value} to {}: {e}", path.display()));
    }

    /// A command in it from its first instruction on.
    fn run(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(self.path.join("cgroup.procs")).arg(program);
        command
    }

    /// A line of one of its files.
    fn number(&self, file: &str, name: &str) -> u64 {
        let text = self.read(file);
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.trim().parse().ok()).unwrap_or_else(|| panic!("no {name} in {file}: {text}"))
    }

    /// All that is charged to it.
    fn usage(&self) -> u64 {
        self.read(if self.v2 { "memory.current" } else { "memory.usage_in_bytes" }).trim().parse().unwrap()
    }

    /// Page cache.
    fn cache(&self) -> u64 {
        self.number("memory.stat", if self.v2 { "file" } else { "cache" })
    }

    /// Memory of programs: heaps and stacks.
    fn anonymous(&self) -> u64 {
        self.number("memory.stat", if self.v2 { "anon" } else { "rss" })
    }

    /// Processes killed for want of memory.
    fn kills(&self) -> u64 {
        self.number(if self.v2 { "memory.events" } else { "memory.oom_control" }, "oom_kill")
    }

    /// Never more than `bytes`, and nothing swapped out.
    fn limit(&self, bytes: u64) {
        if self.v2 {
            // (There is no such file without swap.)
            let _ = std::fs::write(self.path.join("memory.swap.max"), "0");
        } else {
            self.write("memory.swappiness", "0");
        }
        self.write(self.limit_file(), &bytes.to_string());
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            // (Its last process may just be ending.)
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("{} cannot be removed", self.path.display());
    }
}

/// What is done to a device: checked 4 KiB I/O to its first half by `load`, and to the second half long, odd and zeroing I/O.
fn work(load: &mut Load, rounds: usize, block_bytes: u64, random: &mut Random) {
    let long = vec![0x5a; 128 << 10];
    let half = BLOCKS / 2 * 4096;
    for round in 0..rounds {
        load.round();
        let bytes = (1 + random.below(long.len() as u64 / block_bytes)) * block_bytes;
        let at = (half + random.below((half - bytes) / block_bytes) * block_bytes) / block_bytes;
        let other = &mut load.nvme;
        match round % 4 {
            0 => other.write_zeroes(at, (bytes / block_bytes) as usize).unwrap(),
            1 => drop(other.read(at, (bytes / block_bytes) as usize).unwrap()),
            _ => other.write(at, &long[..bytes as usize]).unwrap(),
        }
    }
}

#[test]
fn memory_is_neither_taken_nor_filled_by_io() {
    let cgroup = Cgroup::new();
    let dir = folder();
    let mut target = Target::start_by(&mut cgroup.run(env!("CARGO_BIN_EXE_lloop_tgt")), &[], folder());
    let mut loads: Vec<(Load, PathBuf, u64)> = ["threads", "uring"]
        .into_iter()
        .map(|engine| {
            let path = image(dir.path(), engine, BLOCKS * 4096);
            let name = target.attach(&path, json!({"engine": engine}));
            assert_eq!(target.bdev(&name)["driver_specific"]["lloop"]["engine"], engine);
            (Load::new(target.connect(&name), BLOCKS / 2, 7), path, 4096)
        })
        .collect();
    // Parts of pages: read, modified and written.
    let path = image(dir.path(), "sectors", BLOCKS * 4096);
    let name = target.attach(&path, json!({"engine": "threads", "block_size": 512}));
    let mut sectors = target.connect(&name);
    let mut random = Random::new(11);
    let mut work_all = |loads: &mut Vec<(Load, PathBuf, u64)>, rounds: usize| {
        for _ in 0..rounds / 50 {
            loads.iter_mut().for_each(|(load, _, block_bytes)| work(load, 50, *block_bytes, &mut random));
            for _ in 0..100 {
                let at = random.below(BLOCKS * 8 - 64);
                sectors.write(at, &vec![at as u8; (1 + random.below(63) as usize) * 512]).unwrap();
                sectors.read(at, 1 + random.below(63) as usize).unwrap();
            }
        }
    };
    work_all(&mut loads, 400);
    let (usage, cache, anonymous) = (cgroup.usage(), cgroup.cache(), cgroup.anonymous());
    cgroup.limit(usage + ROOM);
    work_all(&mut loads, 1200);
    let (cache_after, anonymous_after) = (cgroup.cache(), cgroup.anonymous());
    eprintln!("{usage} bytes in use; page cache {cache} -> {cache_after}, anonymous {anonymous} -> {anonymous_after}");
    assert!(cache_after < cache + NOISE, "the page cache grew from {cache} to {cache_after}");
    assert!(anonymous_after < anonymous + NOISE, "memory grew from {anonymous} to {anonymous_after}");
    // (The kernel gives cache up when it is short, so the sum alone might not tell.)
    for image in ["threads", "uring", "sectors"] {
        let path = dir.path().join(image);
        let cached =
            Command::new("fincore").args(["--bytes", "--noheadings", "-o", "RES"]).arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&cached.stdout).trim(), "0", "cached of {image}: {cached:?}");
    }
    // What would have been seen: a program that goes through the page cache.
    let to = format!("of={}", dir.path().join("cached").display());
    let copy = cgroup.run("dd").args(["if=/dev/zero", &to, "bs=64k", "count=32", "status=none"]).status().unwrap();
    assert!(copy.success() && cgroup.cache() >= cache_after + MIB, "{copy}, page cache {}", cgroup.cache());
    loads.iter_mut().for_each(|(load, path, _)| load.verify(path));
    assert_eq!(cgroup.kills(), 0);
    drop((loads, sectors));
    target.stop();
}
