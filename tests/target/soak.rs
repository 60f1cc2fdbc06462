//! Random faults in the middle of random I/O, for as long as `LLOOP_SOAK_SECONDS` says (scripts/soak.sh): nothing is lost, nobody
//! else comes in, nothing is left behind. `LLOOP_SOAK_SEED` repeats what a run did, as far as time lets it.

use crate::common::load::{BLOCK, Random, content};
use crate::common::nvme::{InFlight, Nvme};
use crate::common::slow::{SlowFile, fixture, on_lustre};
use crate::common::{Target, folder, free_port, run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const FILE_BYTES: u64 = 16 * MIB;
const BLOCKS: u64 = FILE_BYTES / BLOCK as u64;
/// The first blocks are iscsi-test-cu's, which writes there what it likes.
const FOREIGN: u64 = 256;
/// The most blocks of one I/O.
const LONGEST: u64 = 24;
/// A hang limit.
const LIMIT: Duration = Duration::from_secs(60);
/// No well-behaved stranger's group.
const STRANGERS_GROUP: u32 = 99;

/// Times in which something is allowed that is a mistake otherwise.
#[derive(Default)]
struct Excuse(AtomicU64);

impl Excuse {
    fn begin(&self) {
        assert!(self.0.fetch_add(1, Ordering::SeqCst).is_multiple_of(2));
    }

    fn end(&self) {
        assert!(!self.0.fetch_add(1, Ordering::SeqCst).is_multiple_of(2));
    }

    /// To be asked for before something that may need an excuse.
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Whether there was one at any time since.
    fn there_was_one(&self, since: u64) -> bool {
        !since.is_multiple_of(2) || self.now() != since
    }
}

/// What all threads of the soak share.
struct Soak {
    target: Target,
    file: SlowFile,
    /// I/O may fail: the device is fenced, or its disk full.
    may_fail: Excuse,
    /// Others may come in: the device is fenced, or detached.
    may_enter: Excuse,
    /// Held by whoever needs the device to be there, or away.
    presence: Mutex<()>,
    /// Whether the device takes discards, for which it lets go of its group lock now and then.
    discards: AtomicBool,
    over: AtomicBool,
    /// How many calls of fdatasync may have failed so far: each is told to who flushed (rule 4).
    flush_faults: AtomicU64,
}

/// Ends the other threads with the one that has it, whatever ends that.
struct Ends<'a>(&'a Soak);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
        self.0.file.set_faults("");
    }
}

impl Soak {
    fn over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn state(&self) -> Value {
        self.target.bdev("lloop0")["driver_specific"]["lloop"]["state"].clone()
    }

    fn until(&self, what: &str, mut seen: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !seen() {
            assert!(Instant::now() < deadline, "waiting until {what}: {}", self.file.stats());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the device goes on with all its locks.
    fn is_well(&self) -> bool {
        let stats = self.file.stats();
        let info = self.target.bdev("lloop0")["driver_specific"]["lloop"].clone();
        let group = info["group_id"].clone();
        // An eviction is told to who flushes next, and shown until somebody has seen it.
        if info["degraded"]["reason"] == "flush failed" {
            let _ = self.target.call("bdev_lloop_resume", json!({"name": "lloop0"}));
        }
        stats["groups_held"] == json!([group]) && stats["records_held"] == 2 && self.state() == "bound"
    }

    fn a_flush_may_fail(&self, times: u64) {
        self.flush_faults.fetch_add(times, Ordering::SeqCst);
    }

    /// Waits until it does.
    fn until_well(&self) {
        self.until("the device is well again", || self.is_well());
    }

    /// Takes a device that is fenced into use again.
    fn resume(&self) {
        self.file.set_faults("");
        // (The stranger may be in just now.)
        self.until("it goes on", || self.target.call("bdev_lloop_resume", json!({"name": "lloop0"})).is_ok());
        self.until_well();
    }
}

/// Spends a random time.
fn pause(random: &mut Random, longest_ms: u64) {
    std::thread::sleep(Duration::from_millis(random.below(longest_ms) + 1));
}

/// One who makes things go wrong, one after the other. How often what happened.
fn go_wrong(soak: &Soak, mut random: Random, end: Instant) -> BTreeMap<&'static str, u64> {
    let _ends = Ends(soak);
    let mut happened = BTreeMap::new();
    let mut evictions = 0;
    while Instant::now() < end && !soak.over() {
        let ost = random.below(2);
        let mut evict = || {
            evictions += 1;
            // One in flight, and the next one.
            soak.a_flush_may_fail(2);
            evictions
        };
        let what = match random.below(11) {
            0 => {
                let _here = soak.presence.lock().unwrap();
                let place = if random.below(2) == 0 { String::new() } else { format!(" ost={ost}") };
                soak.file.set_faults(&format!("latency_us=3000\nevict_ost={}{place}", evict()));
                soak.until_well();
                "evictions by a storage server"
            }
            1 => {
                let _here = soak.presence.lock().unwrap();
                // While a discard is going on the advisory lock is the only one.
                let may_fence = soak.discards.load(Ordering::SeqCst);
                let excuses = [&soak.may_fail, &soak.may_enter].into_iter().filter(|_| may_fence);
                excuses.clone().for_each(Excuse::begin);
                soak.file.set_faults(&format!("latency_us=500\nevict_mds={}", evict()));
                soak.until("it is fenced or well", || may_fence && soak.state() == "fenced" || soak.is_well());
                if soak.state() == "fenced" {
                    soak.resume();
                }
                excuses.for_each(Excuse::end);
                "evictions by the metadata server"
            }
            2 => {
                let _here = soak.presence.lock().unwrap();
                soak.may_fail.begin();
                soak.may_enter.begin();
                let number = evict();
                soak.file.set_faults(&format!("latency_us=1000\nevict_ost={number}\nevict_mds={number}"));
                soak.until("it is fenced", || soak.state() == "fenced");
                pause(&mut random, 300);
                soak.resume();
                soak.may_enter.end();
                soak.may_fail.end();
                "evictions by both, and fences"
            }
            3 => {
                let errnos = [libc::EIO, libc::ESHUTDOWN, libc::EAGAIN, libc::ENOMEM];
                let errno = errnos[random.below(4) as usize];
                let only = ["", " reads", " writes"][random.below(3) as usize];
                let times = random.below(3) + 1;
                soak.a_flush_may_fail(times);
                soak.file.set_faults(&format!("error={errno} times={times}{only}"));
                pause(&mut random, 1000);
                "errors that pass"
            }
            4 => {
                soak.file.set_faults(&format!("short={}", (random.below(4) + 1) * 4096));
                pause(&mut random, 1500);
                "short transfers"
            }
            5 => {
                soak.file.set_faults(&format!("latency_us={} ost={ost}", random.below(50_000)));
                pause(&mut random, 1500);
                "slow servers"
            }
            6 => {
                soak.file.set_faults(&format!("hang ost={ost}"));
                pause(&mut random, 4000);
                // (An attach may wait for them, and this thread for the attach.)
                soak.file.set_faults("");
                "hanging servers"
            }
            7 => {
                let _here = soak.presence.lock().unwrap();
                soak.a_flush_may_fail(1);
                soak.file.set_faults("error=116 times=1");
                pause(&mut random, 500);
                soak.until_well();
                "stale descriptors"
            }
            8 => {
                soak.may_fail.begin();
                soak.file.set_faults(["full", "error=28", "error=122"][random.below(3) as usize]);
                pause(&mut random, 100);
                soak.file.set_faults("");
                // (Neither does any call that began before.)
                soak.until("it is over", || in_flight_is_newer_than_now(soak));
                soak.may_fail.end();
                "full disks"
            }
            9 => {
                soak.a_flush_may_fail(2);
                soak.file.set_faults("sync_error=5 times=2\nlatency_us=200");
                pause(&mut random, 500);
                "failing syncs"
            }
            _ => {
                let _here = soak.presence.lock().unwrap();
                soak.file.set_faults(&format!("hang ost={ost}"));
                pause(&mut random, 1500);
                soak.file.set_faults(&format!("evict_ost={} ost={ost}", evict()));
                soak.until_well();
                "hanging servers that evict"
            }
        };
        *happened.entry(what).or_default() += 1;
        if random.below(2) == 0 {
            soak.file.set_faults("");
            pause(&mut random, 200);
        }
    }
    happened
}

/// Whether no I/O is left that was in flight when this was called first; true at last.
fn in_flight_is_newer_than_now(soak: &Soak) -> bool {
    std::thread::sleep(Duration::from_millis(100));
    let stats = soak.target.call("bdev_lloop_get_stats", json!({"name": "lloop0"}));
    stats.is_ok_and(|stats| stats["devices"][0]["oldest_io_us"].as_u64().unwrap_or(0) < 100_000)
}

/// Another node that wants the file, takes locks as lloop does, and has to be kept out. How often it tried.
fn try_to_enter(soak: &Soak) -> u64 {
    let _ends = Ends(soak);
    let stranger = soak.file.client("s");
    let mut tries = 0;
    while !soak.over() {
        let excuse = soak.may_enter.now();
        if stranger.call(&format!("lock s {STRANGERS_GROUP}")).is_ok() {
            if stranger.call("record s w").is_ok() {
                assert!(soak.may_enter.there_was_one(excuse), "somebody else has got all locks");
                stranger.ok("record s u");
            }
            stranger.ok(&format!("unlock s {STRANGERS_GROUP}"));
        }
        tries += 1;
        std::thread::sleep(Duration::from_millis(3));
    }
    tries
}

/// An I/O on its way.
#[derive(Debug)]
enum Flight {
    Read(u64, u64, InFlight),
    /// With the seed of the first block's new content; the others' follow. 0 for an unmap.
    Change(u64, u64, u64, InFlight),
    Flush(InFlight),
}

/// I/O, and what the device may hold after it.
struct Load<'a> {
    soak: &'a Soak,
    nvme: Nvme,
    random: Random,
    /// The seeds of what each block may hold: one, or more after a change that failed.
    model: Vec<Vec<u64>>,
    next_seed: u64,
    done: u64,
    failed: u64,
    /// Rounds in which a flush has failed.
    flushes_failed: u64,
}

fn seed_of(first: u64, at: u64) -> u64 {
    if first == 0 { 0 } else { first + at }
}

impl<'a> Load<'a> {
    fn new(soak: &'a Soak, seed: u64) -> Self {
        let nvme = soak.target.connect("lloop0");
        let model = vec![vec![0]; BLOCKS as usize];
        Load { soak, nvme, random: Random::new(seed), model, next_seed: 1, done: 0, failed: 0, flushes_failed: 0 }
    }

    /// Starts reads, writes and unmaps of different blocks, and flushes.
    fn start(&mut self) -> Vec<Flight> {
        let mut busy: Vec<(u64, u64)> = Vec::new();
        let mut flights = Vec::new();
        for _ in 0..self.random.below(40) + 1 {
            let len = if self.random.below(3) == 0 { self.random.below(LONGEST) + 1 } else { 1 };
            let start = FOREIGN + self.random.below(BLOCKS - FOREIGN - len);
            if busy.iter().any(|&(from, to)| from < start + len && start < to) {
                continue;
            }
            busy.push((start, start + len));
            flights.push(match self.random.below(20) {
                0 if self.soak.discards.load(Ordering::SeqCst) => {
                    Flight::Change(start, len, 0, self.nvme.start_unmap(start, len as usize).unwrap())
                }
                1 => Flight::Flush(self.nvme.start_flush().unwrap()),
                2..=7 => Flight::Read(start, len, self.nvme.start_read(start, len as usize).unwrap()),
                _ => {
                    let first = self.next_seed;
                    self.next_seed += len;
                    let data: Vec<u8> = (first..first + len).flat_map(content).collect();
                    Flight::Change(start, len, first, self.nvme.start_write(start, &data).unwrap())
                }
            });
        }
        flights
    }

    /// Some I/O at once; all of it has to succeed, but for an excuse, and to be right.
    fn round(&mut self) {
        let excuse = self.soak.may_fail.now();
        let failed_before = self.failed;
        let mut told = false;
        for flight in self.start() {
            let is_flush = matches!(flight, Flight::Flush(_));
            let what = format!("{flight:?}");
            let result = match flight {
                Flight::Read(start, len, flight) => {
                    self.nvme.finish_read(flight).unwrap().map(|data| self.compare(start, len, &data))
                }
                Flight::Change(start, len, first, flight) => {
                    let result = self.nvme.finish(flight).unwrap();
                    self.changed(start, len, first, result.is_ok());
                    result
                }
                Flight::Flush(flight) => self.nvme.finish(flight).unwrap(),
            };
            self.done += 1;
            if let Err(failed) = result {
                let is_excused = self.soak.may_fail.there_was_one(excuse);
                // Flushes that share a call share its error.
                told |= is_flush && !is_excused && (told || self.flush_may_fail());
                assert!(
                    is_excused || is_flush && told,
                    "{what} failed: {failed:x?}, {} flushes have",
                    self.flushes_failed
                );
                self.failed += 1;
            }
        }
        if self.failed > failed_before {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A flush has failed; whether one more may have.
    fn flush_may_fail(&mut self) -> bool {
        self.flushes_failed += 1;
        self.flushes_failed <= self.soak.flush_faults.load(Ordering::SeqCst)
    }

    fn changed(&mut self, start: u64, len: u64, first: u64, surely: bool) {
        for at in 0..len {
            let block = &mut self.model[(start + at) as usize];
            if surely {
                block.clear();
            }
            block.push(seed_of(first, at));
        }
    }

    /// What was read has to be what the blocks may hold; from now on it is what they hold.
    fn compare(&mut self, start: u64, len: u64, data: &[u8]) {
        for at in 0..len {
            let block = &mut self.model[(start + at) as usize];
            let data = &data[at as usize * BLOCK..][..BLOCK];
            let seen = block.iter().copied().find(|&seed| content(seed) == data);
            let seen = seen.unwrap_or_else(|| panic!("block {} is none of {block:?}: {:x?}", start + at, &data[..16]));
            *block = vec![seen];
        }
    }

    /// The connection breaks in the middle of I/O; what was in flight may have been done, or not.
    fn lose_the_connection(&mut self) {
        for flight in self.start() {
            if let Flight::Change(start, len, first, _) = flight {
                self.changed(start, len, first, false);
            }
        }
        self.detach();
        self.attach();
    }

    fn detach(&mut self) {
        let target = &self.soak.target;
        let nqn = "nqn.2026-11.io.lloop.test:lloop0";
        target.ok("nvmf_delete_subsystem", json!({"nqn": nqn}));
        self.soak.may_enter.begin();
        self.soak.until("it is detached", || target.call("bdev_lloop_delete", json!({"name": "lloop0"})).is_ok());
    }

    fn attach(&mut self) {
        attach(self.soak, self.random.below(2) == 0);
        self.soak.may_enter.end();
        self.nvme = self.soak.target.connect("lloop0");
    }

    /// Detached and attached again, and perhaps reset meanwhile, through iSCSI.
    fn come_again(&mut self) {
        self.detach();
        if self.random.below(3) == 0 {
            attach(self.soak, true);
            self.soak.may_enter.end();
            reset(&self.soak.target);
            self.soak.may_enter.begin();
            let gone = || self.soak.target.call("bdev_lloop_delete", json!({"name": "lloop0"})).is_ok();
            self.soak.until("it is detached", gone);
        }
        self.attach();
    }

    /// Everything has to be there: through the device, and in the file below it.
    fn verify(&mut self) {
        for start in (FOREIGN..BLOCKS).step_by(32) {
            let data = self.nvme.read(start, 32).unwrap();
            self.compare(start, 32, &data);
        }
        if self.nvme.flush().is_err() {
            assert!(self.flush_may_fail());
            self.nvme.flush().unwrap();
        }
        let file = std::fs::read(&self.soak.file.backing).unwrap();
        for block in FOREIGN as usize..BLOCKS as usize {
            assert!(file[block * BLOCK..][..BLOCK] == content(self.model[block][0]), "block {block} of the file");
        }
    }
}

/// Attaches the file; servers that hang and strangers that try to come in may be in the way for a while.
fn attach(soak: &Soak, discards: bool) {
    soak.discards.store(discards, Ordering::SeqCst);
    let params = json!({"filename": soak.file.path, "name": "lloop0", "discard": discards});
    let deadline = Instant::now() + LIMIT;
    while let Err(refused) = soak.target.call("bdev_lloop_create", params.clone()) {
        assert!(Instant::now() < deadline, "{refused:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Resets the device with I/O in flight, through iSCSI, where a reset is a thing that initiators do.
fn reset(target: &Target) {
    let port = free_port().to_string();
    target.ok("iscsi_create_portal_group", json!({"tag": 1, "portals": [{"host": "127.0.0.1", "port": port}]}));
    target.ok("iscsi_create_initiator_group", json!({"tag": 1, "initiators": ["ANY"], "netmasks": ["127.0.0.0/8"]}));
    let node = json!({
        "name": "disk", "alias_name": "disk", "queue_depth": 64, "disable_chap": true,
        "pg_ig_maps": [{"pg_tag": 1, "ig_tag": 1}], "luns": [{"bdev_name": "lloop0", "lun_id": 0}],
    });
    target.ok("iscsi_create_target_node", node);
    let url = format!("iscsi://127.0.0.1:{port}/iqn.2016-06.io.spdk:disk/0");
    let (status, output) = run(Command::new("iscsi-test-cu").args(["-d", "-n", "-t", "iSCSI.iSCSITMF", &url]), LIMIT);
    assert!(status.code().is_some() && output.contains("Run Summary"), "{status}\n{output}");
    target.ok("iscsi_delete_target_node", json!({"name": "iqn.2016-06.io.spdk:disk"}));
    target.ok("iscsi_delete_initiator_group", json!({"tag": 1}));
    target.ok("iscsi_delete_portal_group", json!({"tag": 1}));
}

/// What a target without a device has: descriptors, and threads when the pool is down to one worker.
fn belongings(target: &Target) -> (Vec<String>, usize) {
    target.ok("bdev_lloop_set_options", json!({"workers": 1}));
    let mut threads = target.threads();
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        threads = threads.min(target.threads());
    }
    target.ok("bdev_lloop_set_options", json!({"workers": 64}));
    (target.descriptors(), threads)
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

#[test]
fn soak_random_faults_lose_nothing() {
    let seconds = from_environment("LLOOP_SOAK_SECONDS").unwrap_or(60);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = from_environment("LLOOP_SOAK_SEED").unwrap_or(now.as_secs());
    eprintln!("soaking for {seconds} s with LLOOP_SOAK_SEED={seed}");
    let dir = folder();
    let file = SlowFile::lustre(dir.path(), FILE_BYTES, &fixture("v1-two-stripes"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_lloop_tgt"));
    let target = Target::start_by(on_lustre(&mut command), &[], folder());
    target.ok("bdev_lloop_set_options", json!({"lock_check": 1, "lock_timeout": 5, "stall_warn": 1}));
    let soak = Soak {
        target,
        file,
        may_fail: Excuse::default(),
        may_enter: Excuse::default(),
        presence: Mutex::default(),
        discards: AtomicBool::default(),
        over: AtomicBool::default(),
        flush_faults: AtomicU64::default(),
    };
    attach(&soak, true);
    let mut load = Load::new(&soak, seed);
    (0..20).for_each(|_| load.round());
    load.detach();
    let before = belongings(&soak.target);
    load.attach();

    let end = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random::new(seed.wrapping_mul(31) ^ 0x5eed);
    let faults = Random::new(random.below(u64::MAX));
    let (happened, tries) = std::thread::scope(|threads| {
        let troubles = threads.spawn(|| go_wrong(&soak, faults, end));
        let stranger = threads.spawn(|| try_to_enter(&soak));
        let ends = Ends(&soak);
        while !troubles.is_finished() {
            load.round();
            let event = random.below(100);
            if event < 4
                && let Ok(_away) = soak.presence.try_lock()
            {
                if event < 2 { load.lose_the_connection() } else { load.come_again() }
            }
        }
        drop(ends);
        (troubles.join().unwrap(), stranger.join().unwrap())
    });
    soak.until_well();
    load.verify();
    load.detach();
    let stats = soak.file.stats();
    eprintln!(
        "{} I/O, {} failed while they might; a stranger tried {tries} times; {happened:?}",
        load.done, load.failed
    );
    assert_eq!((&stats["unprotected_ios"], &stats["fallocates_under_group_lock"]), (&json!(0), &json!(0)), "{stats}");
    assert_eq!((&stats["groups_held"], &stats["records_held"]), (&json!([]), &json!(0)), "{stats}");
    let after = belongings(&soak.target);
    assert_eq!(after.0, before.0, "something is left behind");
    // (A thread of the start may have ended since.)
    assert!(after.1 <= before.1, "{} threads, there were {}", after.1, before.1);
    drop(load);
    let Soak { mut target, .. } = soak;
    target.stop();
}
