//! Scenes that random worlds have found broken, played step by step: seeds mean something else when the simulator changes, these do not.
//!
//! All three are of one kind: a lock is asked for, the next one takes as long as a server is down, and meanwhile the first is lost.

use crate::check::Id;
use crate::host::Host;
use crate::options::{Options, Place};
use crate::rng::Rng;
use crate::stranger::Stranger;
use crate::world::{MS, World};
use lloop::engine::Op;
use std::rc::Rc;

/// One node and its file on two servers. Nothing goes wrong by itself, and no host is there.
fn quiet_world() -> Rc<World> {
    lloop::os::clock::pretend_hz(1_000_000_000);
    let options = Options {
        place: Place::Group,
        sectors: 16,
        sector_bytes: 4096,
        page_sectors: 1,
        objects: 2,
        stripe: 4,
        nodes: 1,
        hosts: 0,
        workers: 2,
        trouble: 0,
        fault_every: u64::MAX,
        lock_check: u64::MAX / 4,
        ..Options::new(&Rng::new(1))
    };
    World::new(options, 1)
}

/// The servers hang for 100 ms. In the middle of that they evict the node, and `stranger` comes.
fn evict_while_servers_hang(world: &World, stranger: fn(&World)) {
    world.disk.borrow_mut().hangs_until.fill(world.now() + 100 * MS);
    world.plan(world.now() + 50 * MS, move |world| {
        let mut locks = world.locks.borrow_mut();
        locks.evict_from_mds(0);
        (0..2).for_each(|object| locks.evict_from_ost(0, object));
        drop(locks);
        stranger(world);
    });
}

fn a_write(world: &World) -> Id {
    world.hosts.borrow_mut().push(Host::new(0, &world.options));
    Host::submit(world, 0, (0, 0), Op::Write, 0..1, None)
}

#[test]
fn a_stale_descriptor_is_replaced_while_both_locks_are_lost() {
    let world = quiet_world();
    world.run_until(world.now() + 100 * MS);
    let fd = world.nodes[0].the_volume().handle.fd();
    world.locks.borrow_mut().make_stale(fd);
    a_write(&world);
    evict_while_servers_hang(&world, |world| {
        let fd = Stranger::come(world).expect("nobody has the lock");
        Stranger::write(world, fd, 0);
        world.locks.borrow_mut().close(fd);
    });
    world.run_until(world.now() + 1000 * MS);
    // An operator may have resumed it since.
    assert_eq!(world.nodes[0].fences.get(), 1);
    assert_eq!(world.check.borrow().failure, None);
}

#[test]
fn an_attach_loses_its_advisory_lock_while_it_waits_for_the_group_lock() {
    let world = quiet_world();
    // It stays.
    evict_while_servers_hang(&world, |world| {
        Stranger::come(world);
    });
    world.run_until(world.now() + 1000 * MS);
    assert!(!world.nodes[0].is_attached(), "somebody else has the advisory lock");
    assert_eq!(world.nodes[0].fences.get(), 0, "it was never attached");
}

#[test]
fn an_operator_resumes_while_the_advisory_lock_is_lost_again() {
    let world = quiet_world();
    world.run_until(world.now() + 100 * MS);
    let node = &world.nodes[0];
    let volume = node.the_volume();
    node.sched.borrow_mut().fence(volume.id);
    drop(volume);
    node.next_operator.set(world.now());
    evict_while_servers_hang(&world, |world| {
        Stranger::come(world);
    });
    world.run_until(world.now() + 3000 * MS);
    assert!(!world.nodes[0].is_open(), "somebody else has the advisory lock");
}
