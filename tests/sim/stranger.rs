//! Somebody else who uses the file: asks for the advisory lock as everybody should, writes where no server keeps it out, and goes.

use crate::check::{Moment, Record, Sector};
use crate::locks::Fd;
use crate::options::Place;
use crate::world::{MS, World, count};
use lloop::engine::Op;
use lloop::os::lock::Outcome;

#[derive(Default)]
pub struct Stranger {
    next_at: u64,
    /// What it has open, with a lock on it.
    fd: Option<Fd>,
}

impl Stranger {
    pub fn next_at(&self, world: &World) -> u64 {
        let comes = world.options.place != Place::Local && world.options.fault_every != u64::MAX && !world.calm.get();
        if comes || self.fd.is_some() { self.next_at } else { u64::MAX }
    }

    pub fn act(world: &World) {
        let rng = &world.rng;
        let mut stranger = world.stranger.borrow_mut();
        // Asks now and then, and does not stay for long.
        stranger.next_at = world.now() + rng.between(MS / 10, 3 * MS);
        match stranger.fd {
            None => {
                stranger.fd = Stranger::come(world);
                if stranger.fd.is_none() {
                    stranger.next_at = world.now() + rng.between(MS, world.options.fault_every / 4);
                }
            }
            Some(fd) if rng.permille(600) && !world.calm.get() => {
                drop(stranger);
                Stranger::write(world, fd, rng.below(world.options.sectors));
            }
            Some(fd) => {
                world.say(|| "the stranger goes".into());
                world.locks.borrow_mut().close(fd);
                stranger.fd = None;
                stranger.next_at = world.now() + rng.between(MS, world.options.fault_every);
            }
        }
    }

    /// Takes the advisory lock, if nobody has it.
    pub fn come(world: &World) -> Option<Fd> {
        let mut locks = world.locks.borrow_mut();
        let fd = locks.open(usize::MAX);
        if locks.try_lock(fd, true, None) == Ok(Outcome::Held) {
            world.say(|| format!("a stranger has the advisory lock, descriptor {fd}"));
            return Some(fd);
        }
        locks.close(fd);
        None
    }

    /// Writes to a sector, unless its server keeps others off.
    pub fn write(world: &World, fd: Fd, sector: Sector) {
        let object = world.disk.borrow().object_of[sector];
        if world.locks.borrow_mut().may_touch(fd, object) != Ok(true) {
            return;
        }
        count(&world.stats.strangers);
        if world.options.place != Place::Group {
            // The advisory lock is looked at now and then. Until then both write; what is in the file then means nothing.
            return world.nodes.iter().for_each(|node| node.sees_change_by(fd, object));
        }
        let record = Record {
            op: Op::Write,
            first: sector,
            count: 1,
            fua: false,
            submitted: world.now(),
            excused: world.excused(),
            answered: false,
            found: Vec::new(),
            floor: Vec::new(),
            node: usize::MAX,
            fence: None,
        };
        let id = world.check.borrow_mut().submit(record);
        world.change(fd, sector, id);
        let disk = world.disk.borrow();
        let moment = Moment { now: world.now(), excused: world.excused(), fence: None, contents: &disk.contents };
        world.check.borrow_mut().answered(id, Ok(()), moment);
    }
}
