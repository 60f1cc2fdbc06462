//! Hosts: they submit, wait, lose patience, abort, and send again by another path.

use crate::check::{Id, Record};
use crate::exec::Token;
use crate::node::Submission;
use crate::options::{Options, Place};
use crate::world::{MS, World};
use lloop::engine::Op;
use std::ops::Range;

pub struct Host {
    next_at: u64,
    depth: usize,
    port: usize,
    /// What it waits for, with where each request lies in memory and which path it took.
    waits_for: Vec<Waiting>,
}

#[derive(Clone)]
struct Waiting {
    id: Id,
    number: u64,
    node: usize,
    range: Range<usize>,
    op: Op,
}

impl Host {
    pub fn new(at: usize, options: &Options) -> Self {
        Host { next_at: 0, depth: options.depth, port: at % options.ports, waits_for: Vec::new() }
    }

    pub fn next_at(&self) -> u64 {
        if self.waits_for.len() < self.depth + 4 { self.next_at } else { u64::MAX }
    }

    /// An answer to one of its requests.
    pub fn answered(&mut self, id: Id) {
        self.waits_for.retain(|waiting| waiting.id != id);
    }

    /// The power has failed.
    pub fn forget_all(&mut self) {
        self.waits_for.clear();
    }

    pub fn act(world: &World, index: usize) {
        let rng = &world.rng;
        let (mut port, full, waiting) = {
            let mut hosts = world.hosts.borrow_mut();
            let host = &mut hosts[index];
            host.next_at =
                world.now() + if rng.permille(900) { rng.between(0, 500_000) } else { rng.between(0, 30 * MS) };
            let waiting = (!host.waits_for.is_empty()).then(|| host.waits_for[rng.below(host.waits_for.len())].clone());
            (host.port, host.waits_for.len() >= host.depth, waiting)
        };
        let attached: Vec<usize> = (0..world.nodes.len()).filter(|&node| world.nodes[node].is_attached()).collect();
        if attached.is_empty() {
            return;
        }
        let node = rng.pick(&attached);
        // Loses patience with a request: the next one to the same place goes by another port, with or without an abort before.
        if let Some(waiting) = waiting
            && rng.permille(if full { 300 } else { 60 })
        {
            let still_there =
                world.nodes[waiting.node].is_attached() && !world.check.borrow().records[waiting.id as usize].answered;
            if rng.permille(400) && still_there {
                world.say(|| format!("host {index} aborts {}", waiting.id));
                Host::submit(world, index, (waiting.node, port), Op::Abort, 0..0, Some(waiting.number));
            }
            if rng.permille(500) {
                world.say(|| format!("host {index} gives {} up", waiting.id));
                world.hosts.borrow_mut()[index].answered(waiting.id);
                port = rng.below(world.options.ports);
                if waiting.op.changes_data() {
                    let op = if world.options.place == Place::Group { Op::Write } else { Host::change(world) };
                    Host::submit(world, index, (node, port), op, waiting.range, None);
                }
            }
            return;
        }
        if full {
            return;
        }
        if rng.permille(3) {
            Host::submit(world, index, (node, port), Op::Reset, 0..0, None);
            return;
        }
        let op = match rng.below(20) {
            0..6 => Op::Read,
            6..16 => Op::Write,
            16 => Host::change(world),
            _ => Op::Flush,
        };
        let range = if op == Op::Flush { 0..0 } else { Host::range(world, op) };
        Host::submit(world, index, (node, port), op, range, None);
    }

    /// Something that changes data, and is offered.
    fn change(world: &World) -> Op {
        match world.options.place {
            Place::Group if world.options.discards => Op::Unmap,
            Place::Group => Op::Write,
            _ => world.rng.pick(&[Op::Write, Op::WriteZeroes, Op::Unmap]),
        }
    }

    /// Mostly on few sectors, so that requests overlap; sometimes neighbours, to be merged; seldom large.
    fn range(world: &World, op: Op) -> Range<usize> {
        let sectors = world.options.sectors;
        if sectors > 1024 && op == Op::WriteZeroes && world.rng.permille(500) {
            let first = world.rng.below(sectors - 1100);
            return first..first + 1024 + world.rng.below(76);
        }
        let hot = if world.rng.permille(700) { sectors.min(8) } else { sectors };
        let first = world.rng.below(hot);
        first..(first + 1 + world.rng.below(4)).min(sectors)
    }

    /// Submits a request, or an abort of the one that has the number `means`, by a node and a port.
    pub fn submit(
        world: &World,
        index: usize,
        path: (usize, usize),
        op: Op,
        range: Range<usize>,
        means: Option<u64>,
    ) -> Id {
        let (node, port) = path;
        let fua = op == Op::Write && world.rng.permille(200);
        let record = Record {
            op,
            first: range.start,
            count: range.len(),
            fua,
            submitted: world.now(),
            excused: world.excused(),
            answered: false,
            found: Vec::new(),
            floor: Vec::new(),
            node,
            fence: world.nodes[node].fence(),
        };
        let id = world.check.borrow_mut().submit(record);
        world.say(|| format!("host {index} submits {id}: {op:?} {range:?} fua {fua}, node {node} port {port}"));
        let token = Token { id, host: index };
        let submission = Submission { port, op, range: range.clone(), fua, token, means };
        let number = world.nodes[node].submit(world, submission);
        if means.is_none() {
            world.hosts.borrow_mut()[index].waits_for.push(Waiting { id, number, node, range, op });
        }
        id
    }
}
