//! A device: what the bdev layer calls, and what is known about the file behind it.

use super::channel::{Channel, Token, oldest_in_rings};
use super::options::CreateParams;
use super::state::{State, StateCell};
use crate::engine::lane::LaneLoad;
use crate::engine::state::VolumeState;
use crate::engine::stats::{self, Counters, OPS};
use crate::engine::{Op, Target, Volume};
use crate::os::clock::{self, Ticks};
use crate::os::iov::IoVecs;
use crate::os::mount::Mount;
use crate::spdk::bdev::Bdev;
use crate::spdk::bdev_io::{BdevIo, IoType};
use async_trait::async_trait;
use serde_json::{Map, Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What of a device outlives its channels.
pub struct Shared {
    /// Its name.
    pub name: String,
    /// Every write is to be on stable storage when it is answered: this SPDK does not tell which must be.
    pub writes_durably: bool,
    volume: Mutex<Option<Arc<Volume<Token>>>>,
    /// One for each thread that has, or had, a channel; with whether one has it now.
    counters: Mutex<Vec<(Arc<Counters>, bool)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The way to the workers, until the device is closed.
    pub fn volume(&self) -> Option<Arc<Volume<Token>>> {
        lock(&self.volume).clone()
    }

    /// Counters for a new channel. Those of a closed one go on counting, so that no I/O is forgotten.
    pub fn take_counters(&self) -> Arc<Counters> {
        let mut all = lock(&self.counters);
        let at = all.iter().position(|(_, used)| !used).unwrap_or_else(|| {
            all.push((Arc::default(), false));
            all.len() - 1
        });
        all[at].1 = true;
        all[at].0.clone()
    }

    /// Gives them back.
    pub fn return_counters(&self, counters: &Arc<Counters>) {
        if let Some(entry) = lock(&self.counters).iter_mut().find(|(c, _)| Arc::ptr_eq(c, counters)) {
            entry.1 = false;
        }
    }

    /// I/O in flight on all threads.
    pub fn in_flight(&self) -> u64 {
        lock(&self.counters).iter().fold(0, |sum, (c, _)| sum.wrapping_add(c.in_flight()))
    }
}

/// The engines' names.
pub const THREADS: &str = "threads";
/// The engines' names.
pub const URING: &str = "uring";

/// A device that is attached.
pub struct Device {
    shared: Arc<Shared>,
    state: StateCell,
    writable: bool,
    discards: bool,
    /// WRITE ZEROES is for us to do; without, the bdev layer writes zeroes.
    zeroes: bool,
    params: Mutex<CreateParams>,
    target: Mutex<Option<Arc<Target>>>,
    /// What is shown of the file, gathered when it was opened.
    facts: Facts,
}

/// What was found out when the file was opened.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Filesystem, FID or inode.
    pub identity: crate::os::file::Identity,
    /// What keeps others from it.
    pub protection: &'static str,
    /// UNMAP and WRITE ZEROES work.
    pub can_punch: bool,
    /// Alignment of direct I/O: offsets and lengths, memory.
    pub align_bytes: (usize, usize),
    /// Which engine, and why.
    pub engine: (&'static str, String),
    /// The device's UUID.
    pub uuid: uuid::Uuid,
    /// How its filesystem is mounted.
    pub mount: Option<Mount>,
    /// The version of this node's Lustre client, as it says itself.
    pub client_version: Option<String>,
}

impl Device {
    /// A bound device. `params` name it.
    pub fn new(name: &str, params: CreateParams, volume: Volume<Token>, facts: Facts) -> Self {
        let target = volume.target().clone();
        Device {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                // Lustre's servers commit direct writes before they answer.
                writes_durably: !crate::spdk::HAS_FUA && !target.on_lustre(),
                volume: Mutex::new(Some(Arc::new(volume))),
                counters: Mutex::default(),
            }),
            state: StateCell::new(State::Bound),
            writable: !params.read_only,
            discards: !params.read_only && facts.can_punch,
            zeroes: !params.read_only && facts.can_punch && !target.guard().holds_group(),
            params: Mutex::new(params),
            target: Mutex::new(Some(target)),
            facts,
        }
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.state.get()
    }

    /// Accepts no more I/O.
    pub fn run_down(&self) {
        self.state.set(State::Rundown);
    }

    /// What it was made with.
    pub fn params(&self) -> CreateParams {
        lock(&self.params).clone()
    }

    /// Remembers a new limit, so that a saved configuration brings the same size about.
    pub fn set_size_limit(&self, size_limit_bytes: u64) {
        lock(&self.params).size_limit = size_limit_bytes;
    }

    /// What is known of the file.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The file, until it is closed.
    pub fn target(&self) -> Option<Arc<Target>> {
        lock(&self.target).clone()
    }

    /// I/O in flight on all threads.
    pub fn in_flight(&self) -> u64 {
        self.shared.in_flight()
    }

    /// Its number in the pool, until it is closed.
    pub fn volume_id(&self) -> Option<u32> {
        self.shared.volume().map(|volume| volume.id())
    }

    /// Takes the file's last owners out, for closing it. For [`Bdev::closed`], and for a device that was never registered.
    pub fn release(&self) -> Option<Volume<Token>> {
        drop(lock(&self.target).take());
        let volume = lock(&self.shared.volume).take()?;
        // Channels have clones, and there are none any more.
        Arc::into_inner(volume)
    }

    /// Counters, latencies, queues, and the age of the oldest I/O in flight. With a `histogram`, how many I/O took how long:
    /// what percentiles of any interval can be found from.
    pub fn stats(&self, histogram: bool) -> Value {
        let counters: Vec<Arc<Counters>> = lock(&self.shared.counters).iter().map(|(c, _)| c.clone()).collect();
        let mut ops = Map::new();
        for ((_, name), sum) in OPS.iter().zip(stats::summarize(counters.iter().map(|c| &**c))) {
            let us = |ns: u64| (ns as f64 / 100.0).round() / 10.0;
            ops.insert(
                (*name).to_owned(),
                json!({
                    "ops": sum.count, "bytes": sum.bytes, "errors": sum.errors,
                    "latency_us": {
                        "mean": us(sum.mean_ns), "p50": us(sum.p50_ns), "p99": us(sum.p99_ns), "p99.9": us(sum.p999_ns),
                        "max": us(sum.max_ns), "total": us(sum.total_ns),
                    },
                }),
            );
            if histogram {
                let pairs: Vec<_> =
                    sum.histogram.iter().map(|&(ns, count)| json!([ns as f64 / 1000.0, count])).collect();
                ops[*name]["histogram"] = pairs.into();
            }
        }
        let volume = self.shared.volume();
        let load = volume.as_ref().map(|volume| volume.load()).unwrap_or_default();
        let now = clock::now();
        let age_us =
            |oldest: Option<Ticks>| oldest.map_or(0, |since| clock::to_nanos(now.saturating_sub(since)) / 1000);
        let in_rings = volume.and_then(|volume| oldest_in_rings(&volume));
        let oldest = load.lanes.iter().filter_map(|(_, oldest)| *oldest).chain(in_rings).min();
        let sum = |f: fn(&LaneLoad) -> usize| load.lanes.iter().map(|(lane, _)| f(lane)).sum::<usize>();
        let lanes = load.lanes.iter().map(|(lane, oldest)| {
            json!({
                "ost": lane.ost, "queued": lane.queued, "calls_running": lane.running, "oldest_io_us": age_us(*oldest),
                "stalls": lane.stalls,
            })
        });
        let target = self.target();
        json!({
            "name": self.shared.name,
            "state": self.state_name(),
            "in_flight": self.shared.in_flight(),
            "queued": sum(|lane| lane.queued),
            "calls_running": sum(|lane| lane.running),
            "oldest_io_us": age_us(oldest),
            "retries": load.retries,
            "stalls": load.lanes.iter().map(|(lane, _)| lane.stalls).sum::<u64>(),
            "lock_recoveries": target.map_or(0, |target| target.guard().recoveries()),
            "lanes": lanes.collect::<Vec<_>>(),
            "last_errno": stats::last_errno(counters.iter().map(|c| &**c)),
            "io": ops,
        })
    }

    fn state_name(&self) -> &'static str {
        match self.state() {
            State::Bound => match self.target() {
                Some(target) if target.state() == VolumeState::Fenced => "fenced",
                Some(target) if target.damage().is_some() => "degraded",
                _ => State::Bound.name(),
            },
            state => state.name(),
        }
    }
}

#[async_trait(?Send)]
impl Bdev for Device {
    type Channel = Channel;

    // (v20.07 asks for every I/O: no lock here.)
    fn supports(&self, io_type: IoType) -> bool {
        match io_type {
            IoType::Read | IoType::Flush | IoType::Reset | IoType::Abort => true,
            IoType::Write => self.writable,
            IoType::Unmap => self.discards,
            IoType::WriteZeroes => self.zeroes,
        }
    }

    fn open_channel(&self) -> Result<Channel, i32> {
        Channel::open(&self.shared, self.facts.engine.0 == URING)
    }

    fn submit(&self, channel: &Channel, io: BdevIo) {
        let op = match io.io_type() {
            Some(IoType::Read) => Op::Read,
            Some(IoType::Write) => Op::Write,
            Some(IoType::Flush) => Op::Flush,
            Some(IoType::Unmap) => Op::Unmap,
            Some(IoType::WriteZeroes) => Op::WriteZeroes,
            Some(IoType::Reset) => return channel.reset(io),
            Some(IoType::Abort) => return channel.abort(io),
            None => return channel.refuse(Op::Flush, io, libc::EOPNOTSUPP),
        };
        if self.state() != State::Bound {
            return channel.refuse(op, io, libc::ENODEV);
        }
        // Only what is offered is done, whoever asks (rule 5). A write to a read-only device is "write protected" by the file's word.
        let is_offered = match op {
            Op::Unmap => self.discards,
            Op::WriteZeroes => self.zeroes,
            _ => true,
        };
        if !is_offered {
            return channel.refuse(op, io, libc::EOPNOTSUPP);
        }
        let iovs = match op {
            Op::Read | Op::Write => io.iovs(),
            _ => IoVecs::EMPTY,
        };
        // (Writes to a read-only file come back with EBADF from the worker: an initiator's mistake is not worth a check for
        // every I/O of all others.)
        channel.submit(op, io, iovs);
    }

    fn info(&self) -> (&'static str, Value) {
        let params = self.params();
        let identity = &self.facts.identity;
        let mut info = json!({
            "filename": params.filename,
            "state": self.state_name(),
            "fs": identity.fs_name(),
        });
        match identity.fid {
            Some(fid) => info["fid"] = fid.to_string().into(),
            None => info["inode"] = identity.ino.into(),
        }
        info["engine"] = self.facts.engine.0.into();
        info["engine_reason"] = self.facts.engine.1.as_str().into();
        info["read_only"] = params.read_only.into();
        info["offset"] = params.offset.into();
        info["size_limit"] = params.size_limit.into();
        info["lock"] = self.facts.protection.into();
        if let Some(target) = self.target() {
            if let Some(group) = target.guard().group() {
                info["group_id"] = group.get().into();
            }
            if target.state() == VolumeState::Recovering {
                info["lock_state"] = "being taken again".into();
            }
            if let Some(damage) = target.damage() {
                info["degraded"] = json!({"reason": damage.name(), "advice": damage.advice(&target)});
            }
            if let Some(layout) = target.layout() {
                info["layout"] = layout.to_json();
            }
        }
        if identity.fid.is_some() {
            info["client_version"] = self.facts.client_version.clone().into();
        }
        if let Some(mount) = &self.facts.mount {
            info["mount"] = json!({"point": mount.point, "source": mount.source, "options": mount.options.join(",")});
        }
        info["discard"] = self.supports(IoType::Unmap).into();
        info["direct_io_align"] = json!({"offset": self.facts.align_bytes.0, "memory": self.facts.align_bytes.1});
        ("lloop", info)
    }

    fn config(&self) -> Option<(&'static str, Value)> {
        let mut params = self.params();
        params.name = Some(self.shared.name.clone());
        serde_json::to_value(params).ok().map(|params| ("bdev_lloop_create", params))
    }

    async fn closed(&self) {
        self.run_down();
        super::attach::close(&self.shared.name, self.release()).await;
        self.state.set(State::Unbound);
    }
}
