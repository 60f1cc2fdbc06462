//! One simulated world: clock, file, servers, nodes with their targets, hosts, strangers, and what goes wrong. Everything that happens is a
//! step; which of the possible steps comes next is the seed's choice.
//!
//! Nothing runs in parallel. A call that blocks (an errand of the keeper's) has the world go on below it, on the same stack, until it
//! may return.

use crate::check::{Checker, Id, Sector};
use crate::disk::Disk;
use crate::exec::{Kind, Token};
use crate::host::Host;
use crate::locks::{Fd, Locks};
use crate::node::Node;
use crate::options::{Options, Place};
use crate::rng::Rng;
use crate::stranger::Stranger;
use lloop::engine::Request;
use lloop::engine::transfer::Access;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::{Rc, Weak};

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;

/// How much was simulated.
#[derive(Default)]
pub struct Stats {
    pub answers: Cell<u64>,
    pub calls: Cell<u64>,
    pub power_cuts: Cell<u64>,
    pub evictions: Cell<u64>,
    pub hangs: Cell<u64>,
    pub failed_calls: Cell<u64>,
    pub failed_syncs: Cell<u64>,
    pub retries: Cell<u64>,
    pub fenced: Cell<u64>,
    pub recoveries: Cell<u64>,
    pub takeovers: Cell<u64>,
    pub strangers: Cell<u64>,
    pub seeds: Cell<u64>,
}

impl Stats {
    fn counters(&self) -> [(&'static str, &Cell<u64>); 13] {
        [
            ("worlds", &self.seeds),
            ("I/O", &self.answers),
            ("calls", &self.calls),
            ("of them failed", &self.failed_calls),
            ("failed fdatasync", &self.failed_syncs),
            ("retries", &self.retries),
            ("hangs", &self.hangs),
            ("power cuts", &self.power_cuts),
            ("evictions", &self.evictions),
            ("recoveries", &self.recoveries),
            ("fences", &self.fenced),
            ("takeovers", &self.takeovers),
            ("strangers' writes", &self.strangers),
        ]
    }

    pub fn add(&self, other: &Stats) {
        count(&other.seeds);
        for ((_, total), (_, more)) in self.counters().into_iter().zip(other.counters()) {
            total.set(total.get() + more.get());
        }
    }
}

impl std::fmt::Display for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<_> = self.counters().iter().map(|(name, value)| format!("{} {name}", value.get())).collect();
        write!(f, "simulated: {}", parts.join(", "))
    }
}

pub fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

pub struct World {
    pub options: Options,
    pub rng: Rng,
    pub stats: Stats,
    pub disk: RefCell<Disk>,
    pub locks: RefCell<Locks>,
    pub check: RefCell<Checker>,
    pub nodes: Vec<Rc<Node>>,
    pub hosts: RefCell<Vec<Host>>,
    pub stranger: RefCell<Stranger>,
    pub this: Weak<World>,
    clock: Cell<u64>,
    next_fault: Cell<u64>,
    /// What a scene has planned, in order.
    plans: RefCell<VecDeque<(u64, Plan)>>,
    /// No host submits until then.
    pub idle_until: Cell<u64>,
    /// Time in which no answer can be expected.
    excused: Cell<u64>,
    /// How many errands are on the stack.
    pub depth: Cell<u32>,
    /// Nothing goes wrong any more, and nobody submits.
    pub calm: Cell<bool>,
    pub trace: bool,
}

/// What can be done next.
#[derive(Clone, Copy)]
enum Step {
    Host(usize),
    Push(usize, usize),
    Reap(usize, usize),
    Worker(usize, usize),
    Ring(usize, usize),
    Revive(usize),
    Mend(usize),
    Check(usize),
    Attach(usize),
    Operator(usize),
    Stranger,
    Fault,
    Plan,
}

type Plan = Box<dyn FnOnce(&World)>;

impl World {
    pub fn new(options: Options, seed: u64) -> Rc<Self> {
        Rc::new_cyclic(|this| World {
            disk: RefCell::new(Disk::new(options.sectors, options.objects, options.stripe)),
            locks: RefCell::new(Locks::new(options.objects)),
            check: RefCell::new(Checker::new(options.sectors, options.flush_bound())),
            nodes: (0..options.nodes).map(|at| Rc::new(Node::new(at, &options))).collect(),
            hosts: RefCell::new((0..options.hosts).map(|at| Host::new(at, &options)).collect()),
            stranger: RefCell::default(),
            rng: Rng::new(seed),
            stats: Stats::default(),
            this: this.clone(),
            clock: Cell::new(SECOND),
            next_fault: Cell::new(if options.fault_every == u64::MAX { u64::MAX } else { SECOND + 20 * MS }),
            plans: RefCell::default(),
            idle_until: Cell::new(0),
            excused: Cell::new(0),
            depth: Cell::new(0),
            calm: Cell::new(false),
            trace: std::env::var_os("LLOOP_SIM_TRACE").is_some(),
            options,
        })
    }

    pub fn now(&self) -> u64 {
        self.clock.get()
    }

    pub fn excused(&self) -> u64 {
        self.excused.get()
    }

    /// Has something happen at a given moment.
    pub fn plan(&self, when: u64, plan: impl FnOnce(&World) + 'static) {
        self.plans.borrow_mut().push_back((when, Box::new(plan)));
    }

    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.6} {}", self.now() as f64 / 1e9, what());
        }
    }

    pub fn fail(&self, what: String) {
        self.check.borrow_mut().fail(what);
    }

    pub fn has_failed(&self) -> bool {
        self.check.borrow().failure.is_some()
    }

    /// How long a part of a call takes.
    pub fn latency(&self) -> u64 {
        if self.rng.permille(20) { self.rng.between(MS, 20 * MS) } else { self.rng.between(1000, 300_000) }
    }

    pub fn sectors_of(&self, request: &Request<Token>) -> Range<Sector> {
        let first = request.offset_bytes / self.options.sector_bytes;
        first as Sector..(first + request.len_bytes / self.options.sector_bytes) as Sector
    }

    /// How a call is going to end.
    pub fn outcome(&self, kind: Kind, sectors: usize) -> Result<usize, i32> {
        count(&self.stats.calls);
        let trouble = if self.calm.get() { 0 } else { self.options.trouble };
        if !self.rng.permille(trouble) {
            return Ok(sectors);
        }
        if sectors > 1 && matches!(kind, Kind::Move(_)) && self.rng.permille(500) {
            return Ok(self.rng.below(sectors));
        }
        count(&self.stats.failed_calls);
        let errnos = match kind {
            Kind::Sync => &[libc::EIO, libc::ENOSPC, libc::EAGAIN, libc::ESHUTDOWN][..],
            Kind::Move(Access::Read) => {
                &[libc::EIO, libc::ESHUTDOWN, libc::EAGAIN, libc::ENOMEM, libc::ENODATA, libc::EIO]
            }
            _ => &[
                libc::EIO,
                libc::EIO,
                libc::ESHUTDOWN,
                libc::EAGAIN,
                libc::ENOMEM,
                libc::ENOSPC,
                libc::EDQUOT,
                libc::EROFS,
                libc::EFBIG,
                libc::EINVAL,
            ],
        };
        Err(self.rng.pick(errnos))
    }

    /// A call through `fd` changes a sector.
    pub fn change(&self, fd: Fd, sector: Sector, id: Id) {
        let mut disk = self.disk.borrow_mut();
        self.check.borrow_mut().takes_effect(sector, disk.contents[sector], id);
        self.say(|| format!("sector {sector} is {id}, by descriptor {fd}"));
        disk.change(sector, id);
        let object = disk.object_of[sector];
        drop(disk);
        self.nodes.iter().for_each(|node| node.sees_change_by(fd, object));
    }

    /// Whether somebody else has written to a sector after `discard` was submitted, on a file under a group lock.
    ///
    /// A discard is done while that lock is let go of. Who comes just then, after an eviction that nobody can have noticed, may lose what he
    /// writes: fallocate waits in the kernel until it gets through, and cannot be taken back. That is a known gap, and not checked.
    pub fn is_taken_over(&self, sector: Sector, discard: Id) -> bool {
        let (id, check) = (self.disk.borrow().contents[sector], self.check.borrow());
        let node_of = |id: Id| check.records[id as usize].node;
        self.options.place == Place::Group && id > discard && node_of(id) != node_of(discard)
    }

    /// A call through `fd` gets at an object: not if others have been there since its locks were in order.
    pub fn touches(&self, fd: Fd, object: usize) {
        for node in &self.nodes {
            if self.options.place == Place::Group && node.has_foreign(fd, object) {
                self.fail(format!("rule 6: others have written to object {object}, and the volume goes on"));
            }
        }
    }

    /// Everything that may be done now; with the moment when the next thing may be, if nothing can.
    fn possible(&self) -> (Vec<Step>, u64) {
        let now = self.now();
        let (mut steps, mut next) = (Vec::new(), u64::MAX);
        let mut at = |step: Step, when: u64| {
            if when <= now { steps.push(step) } else { next = next.min(when) }
        };
        if !self.calm.get() {
            for (index, host) in self.hosts.borrow().iter().enumerate() {
                at(Step::Host(index), host.next_at().max(self.idle_until.get()));
            }
            at(Step::Fault, self.next_fault.get());
        }
        if let Some((when, _)) = self.plans.borrow().front() {
            at(Step::Plan, *when);
        }
        at(Step::Stranger, self.stranger.borrow().next_at(self));
        for (index, node) in self.nodes.iter().enumerate() {
            for port in 0..self.options.ports {
                if node.has_staged(port) {
                    at(Step::Push(index, port), 0);
                }
                if node.has_answers(port) {
                    at(Step::Reap(index, port), 0);
                }
            }
            node.workers_ready().for_each(|(worker, when)| at(Step::Worker(index, worker), when));
            node.ring_ready().into_iter().enumerate().for_each(|(flight, when)| at(Step::Ring(index, flight), when));
            if let Some(due) = node.next_due() {
                at(Step::Revive(index), due);
            }
            if !node.is_at_work() {
                if node.is_troubled() {
                    at(Step::Mend(index), 0);
                }
                if node.is_attached() {
                    at(Step::Check(index), node.next_check.get());
                    if node.fence().is_some() && !self.calm.get() {
                        at(Step::Operator(index), node.next_operator.get());
                    }
                } else if !self.calm.get() {
                    at(Step::Attach(index), node.next_attach.get());
                }
            }
        }
        (steps, next)
    }

    /// Does one thing, at `limit` at the latest. False when there is nothing to do until then.
    pub fn step(&self, limit: u64) -> bool {
        if self.has_failed() {
            return false;
        }
        let (steps, next) = self.possible();
        if steps.is_empty() {
            if next == u64::MAX || next > limit {
                self.pass(limit.saturating_sub(self.now()).min(SECOND));
                return false;
            }
            self.pass(next - self.now());
            return true;
        }
        self.pass(self.rng.between(1, 2000));
        self.run(self.rng.pick(&steps));
        true
    }

    fn run(&self, step: Step) {
        match step {
            Step::Host(host) => Host::act(self, host),
            Step::Push(node, port) => self.nodes[node].push(port),
            Step::Reap(node, port) => self.nodes[node].reap(self, port),
            Step::Worker(node, worker) => self.nodes[node].step_worker(self, worker),
            Step::Ring(node, flight) => self.nodes[node].step_ring(self, flight),
            Step::Revive(node) => self.nodes[node].revive(self),
            Step::Mend(node) => self.nodes[node].mend(self),
            Step::Check(node) => self.nodes[node].check(self),
            Step::Attach(node) => self.nodes[node].attach(self),
            Step::Operator(node) => self.nodes[node].operate(self),
            Step::Stranger => Stranger::act(self),
            Step::Plan => {
                let plan = self.plans.borrow_mut().pop_front();
                plan.into_iter().for_each(|(_, plan)| plan(self));
            }
            Step::Fault => {
                self.next_fault.set(self.now() + self.rng.between(MS, self.options.fault_every));
                self.fault();
            }
        }
    }

    fn pass(&self, time: u64) {
        let hangs = self.disk.borrow().hangs_until.iter().any(|&until| until > self.now());
        if hangs || self.nodes.iter().any(|node| node.is_attached() && !node.is_open()) {
            self.excused.set(self.excused.get() + time);
        }
        self.clock.set(self.now() + time);
    }

    /// Lets the world go on until `time`: somebody sleeps that long, or waits for a server.
    pub fn run_until(&self, time: u64) {
        while self.now() < time && !self.has_failed() {
            self.step(time);
        }
    }

    /// No more faults and no new requests; goes on until nothing is left to do.
    pub fn calm_down(&self) {
        self.calm.set(true);
        let end = self.now() + 600 * SECOND;
        while self.now() < end && !self.has_failed() && self.nodes.iter().any(|node| !node.is_idle()) {
            self.step(u64::MAX);
        }
        if self.has_failed() {
            return;
        }
        let stuck = self.check.borrow().records.iter().position(|record| !record.answered);
        if let Some(id) = stuck {
            let op = self.check.borrow().records[id].op;
            self.fail(format!("request {id} ({op:?}) is never answered"));
        }
    }
}
