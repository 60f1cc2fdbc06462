//! What goes wrong.

use crate::host::Host;
use crate::stranger::Stranger;
use crate::world::{MS, SECOND, World, count};
use lloop::engine::LaneMap;

impl World {
    /// Something goes wrong, or somebody does something about it.
    pub fn fault(&self) {
        let rng = &self.rng;
        let node = &self.nodes[rng.below(self.nodes.len())];
        let on_lustre = self.options.on_lustre();
        match rng.below(13) {
            0 => {
                let object = rng.below(self.options.objects);
                let until = self.now() + rng.between(MS, if rng.permille(200) { 4 * SECOND } else { 200 * MS });
                self.say(|| format!("object {object} hangs until {}", until as f64 / 1e9));
                count(&self.stats.hangs);
                let hangs_until = &mut self.disk.borrow_mut().hangs_until[object];
                *hangs_until = until.max(*hangs_until);
            }
            1..5 if on_lustre => self.evict(),
            5 => self.idle_until.set(self.now() + rng.between(10 * MS, 2 * SECOND)),
            6 if on_lustre => {
                if let Some(volume) = &*node.volume.borrow() {
                    self.say(|| format!("descriptor {} goes stale", volume.handle.fd()));
                    self.locks.borrow_mut().make_stale(volume.handle.fd());
                }
            }
            7 if on_lustre && node.is_attached() => {
                let map = if rng.permille(500) { LaneMap::single() } else { self.options.map() };
                let id = node.the_volume().id;
                node.sched.borrow_mut().set_map(id, map);
            }
            8 if rng.permille(300) => node.detach(self),
            9 if rng.permille(200) => self.cut_power(),
            10 => {
                let lane_limit = 1 + rng.below(4);
                node.sched.borrow_mut().set_limits(self.options.workers, lane_limit, self.options.max_merge_bytes);
            }
            _ => {}
        }
    }

    /// Servers evict a client: the metadata server, one or all of the storage servers, or both kinds.
    fn evict(&self) {
        let rng = &self.rng;
        let node = rng.below(self.nodes.len());
        count(&self.stats.evictions);
        let mut locks = self.locks.borrow_mut();
        let which = rng.below(4);
        if which != 0 {
            self.say(|| format!("node {node} is evicted from its MDS"));
            locks.evict_from_mds(node);
        }
        let one = rng.below(self.options.objects);
        for object in 0..self.options.objects {
            if matches!(which, 0 | 2) && object == one || which == 3 {
                self.say(|| format!("node {node} is evicted from object {object}"));
                locks.evict_from_ost(node, object);
            }
        }
    }

    /// All power fails, and comes back. Not in the middle of an errand, which lies on the stack.
    pub fn cut_power(&self) {
        if self.depth.get() > 0 || self.has_failed() {
            return;
        }
        self.say(|| "power cut".into());
        count(&self.stats.power_cuts);
        self.disk.borrow_mut().cut_power(&self.rng);
        self.check.borrow_mut().power_cut(&self.disk.borrow().contents);
        self.nodes.iter().for_each(|node| node.die(self));
        self.locks.borrow_mut().forget_all();
        *self.stranger.borrow_mut() = Stranger::default();
        self.hosts.borrow_mut().iter_mut().for_each(Host::forget_all);
    }

    /// What has to be true when all is quiet.
    pub fn last_look(&self) {
        for node in self.nodes.iter().filter(|node| node.is_attached()) {
            node.check(self);
            let volume = node.the_volume();
            if node.is_open() && volume.foreign.borrow().contains(&true) {
                self.fail("rule 6: others have written, and the volume goes on as if they were kept out".into());
            }
        }
        self.cut_power();
        if self.has_failed() {
            return;
        }
        if !self.locks.borrow().is_free() {
            self.fail("a lock is left behind".into());
        }
    }
}
