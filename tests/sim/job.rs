//! What is done for a volume apart from its I/O: the keeper's errands, attaching, detaching, resuming.

use crate::exec::{Call, Kind};
use crate::handle::{Handle, stand_in};
use crate::node::{Node, Volume};
use crate::options::Place;
use crate::world::{MS, SECOND, World, count};
use lloop::engine::errand::{self, Job};
use lloop::engine::sched::Trouble;
use lloop::engine::state::{Event, VolumeState};
use lloop::engine::{Guard, Target};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

pub struct VolumeJob<'a> {
    pub world: &'a World,
    pub node: &'a Node,
    pub volume: &'a Volume,
}

impl Job for VolumeJob<'_> {
    type File = Handle;

    fn file(&self) -> &Handle {
        &self.volume.handle
    }

    fn guard(&self) -> &Guard<Handle> {
        &self.volume.guard
    }

    fn objects(&self) -> Vec<u64> {
        self.world.options.object_offsets()
    }

    fn state(&self) -> VolumeState {
        self.volume.target.state()
    }

    fn is_open(&self) -> bool {
        !self.world.has_failed() && self.node.sched.borrow().is_open(self.volume.id)
    }

    fn hold_and_drain(&self, event: Event, limit: Duration) -> bool {
        let end = self.world.now().saturating_add(limit.as_nanos().try_into().unwrap_or(u64::MAX));
        while !self.node.sched.borrow_mut().hold(self.volume.id, event) {
            if self.world.now() >= end || self.world.has_failed() {
                return false;
            }
            self.world.step(end);
        }
        true
    }

    fn trouble(&self) -> Trouble {
        self.node.sched.borrow().trouble(self.volume.id)
    }

    fn put_back(&self, trouble: Trouble) {
        self.node.sched.borrow_mut().put_back(self.volume.id, trouble);
    }

    fn go_on(&self, event: Event) {
        self.world.say(|| format!("{event:?}"));
        if event == Event::Resume {
            self.volume.foreign.borrow_mut().fill(false);
        } else {
            count(&self.world.stats.recoveries);
        }
        let now = self.world.now();
        let mut sched = self.node.sched.borrow_mut();
        sched.go_on(self.volume.id, event, now);
        let _ = sched.revive(now);
        self.node.tell_of_retries();
    }

    fn fence(&self) {
        self.world.say(|| "fenced".into());
        self.node.fences.set(self.node.fences.get() + 1);
        self.node.next_operator.set(self.world.now() + self.world.rng.between(MS, 200 * MS));
        count(&self.world.stats.fenced);
        self.node.sched.borrow_mut().fence(self.volume.id);
    }

    fn has_stuck_call(&self, limit: Duration) -> bool {
        self.node.has_call_since(self.world.now().saturating_sub(limit.as_nanos() as u64))
    }

    fn do_discards(&self) -> Result<(), String> {
        let (world, node) = (self.world, self.node);
        let mut requests = node.sched.borrow_mut().take_discards(self.volume.id);
        requests.iter_mut().for_each(|request| request.conclude(Err(libc::EIO)));
        let ids: Vec<_> = requests.iter().map(|request| (world.sectors_of(request), request.token.id)).collect();
        let bytes = world.options.sector_bytes;
        let punch = |start: u64, end: u64| {
            let sectors = (start / bytes) as usize..(end / bytes) as usize;
            let id_of = |sector| ids.iter().filter(|(range, _)| range.contains(&sector)).map(|(_, id)| *id).max();
            let data = sectors.clone().map(|sector| id_of(sector).unwrap_or(0)).collect();
            let mut call = Call::begin(world, Kind::Zero, self.volume.handle.fd(), sectors.start, data);
            loop {
                world.run_until(call.ready_at);
                if let Some(result) = call.step(world) {
                    return result.map(drop);
                }
                if world.has_failed() {
                    return Err(libc::EIO);
                }
            }
        };
        let done = self.guard().without_group(self.file(), &self.objects(), |_| errand::discard(&mut requests, punch));
        let tickets = requests.iter_mut().filter_map(|request| request.ticket.take()).collect();
        node.answer(world, requests);
        node.sched.borrow_mut().discarded(self.volume.id, tickets);
        done
    }
}

impl Node {
    /// Attaches the file, if its locks can be had.
    pub fn attach(&self, world: &World) {
        self.next_attach.set(world.now() + world.rng.between(MS, 100 * MS));
        if self.at_work.replace(true) {
            return;
        }
        world.depth.set(world.depth.get() + 1);
        let volume = self.try_to_attach(world);
        if let Some(volume) = volume {
            if world.nodes.iter().any(|other| other.volume.borrow().is_some()) {
                count(&world.stats.takeovers);
            }
            world.say(|| format!("descriptor {} is attached", volume.handle.fd()));
            *self.volume.borrow_mut() = Some(Rc::new(volume));
        }
        world.depth.set(world.depth.get() - 1);
        self.at_work.set(false);
    }

    fn try_to_attach(&self, world: &World) -> Option<Volume> {
        let handle = Handle::open(world, self.index());
        let options = world.options.guard_of(self.index());
        let guard = if world.options.place == Place::Local {
            Guard::none()
        } else {
            Guard::take_advisory(&handle, options).ok()?
        };
        guard.take_group(&handle).ok()?;
        let file = stand_in(&world.options);
        let sector_bytes = world.options.sector_bytes as u32;
        let target = Arc::new(Target::guarded(file, Guard::untaken(options), 0, sector_bytes));
        let id = self.sched.borrow_mut().open(target.clone(), world.options.map());
        let foreign = RefCell::new(vec![false; world.options.objects]);
        Some(Volume { id, target, handle, guard, foreign })
    }

    /// Detaches it by force.
    pub fn detach(&self, world: &World) {
        if !self.is_attached() {
            return;
        }
        self.at_work(world, |job| {
            self.detaching.set(true);
            self.sched.borrow_mut().end(job.volume.id);
            let end = world.now() + 60 * SECOND;
            while self.in_flight() > 0 && !world.has_failed() {
                world.step(end);
                if world.now() >= end {
                    return world.fail("rule 2: I/O of a volume that was detached by force does not end".into());
                }
            }
            while !world.has_failed() && !self.sched.borrow_mut().close(job.volume.id) {
                world.step(end);
            }
            if world.has_failed() {
                return;
            }
            self.sched.borrow_mut().take_dead();
            job.volume.guard.give_back(&job.volume.handle);
            self.sched.borrow_mut().forget(job.volume.id);
            *self.volume.borrow_mut() = None;
            self.detaching.set(false);
            self.next_attach.set(world.now() + world.rng.between(MS, 200 * MS));
        });
    }

    /// An operator finds a fenced volume: it may go on, or is detached.
    pub fn operate(&self, world: &World) {
        self.next_operator.set(world.now() + world.rng.between(MS, 200 * MS));
        if world.rng.permille(200) {
            self.detach(world);
        } else {
            self.at_work(world, |job| drop(errand::resume(job)));
        }
    }
}
