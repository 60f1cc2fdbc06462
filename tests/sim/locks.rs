//! The servers' locks: an advisory one at the metadata server, a group lock on every object. Evictions drop them object by object, as
//! docs/internals/lustre.md says.

use lloop::os::lock::{Marker, Outcome};

/// An open file.
pub type Fd = u32;

/// A group lock of an open file on one object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Yes,
    /// The server has evicted the client. The first call after that says EIO, the others ENOLCK.
    Evicted {
        said_so: bool,
    },
}

#[derive(Default)]
pub struct Locks {
    open: Vec<OpenFile>,
    /// Clients that the metadata server has evicted: their next question about locks is answered with EIO.
    evicted: Vec<usize>,
    advisory: Vec<(Fd, bool)>,
    markers: Vec<(Fd, Marker)>,
    /// By object: who holds it, with which group.
    group: Vec<Vec<(Fd, u32, Held)>>,
}

struct OpenFile {
    node: usize,
    stale: bool,
}

impl Locks {
    pub fn new(objects: usize) -> Self {
        Locks { group: vec![Vec::new(); objects], ..Locks::default() }
    }

    pub fn open(&mut self, node: usize) -> Fd {
        self.open.push(OpenFile { node, stale: false });
        self.open.len() as Fd - 1
    }

    /// Gives everything back.
    pub fn close(&mut self, fd: Fd) {
        self.unlock(fd);
        self.group.iter_mut().for_each(|holders| holders.retain(|holder| holder.0 != fd));
    }

    pub fn try_lock(&mut self, fd: Fd, exclusive: bool, marker: Option<&Marker>) -> Result<Outcome, i32> {
        self.answers(fd)?;
        if self.advisory.iter().any(|&(other, theirs)| other != fd && (exclusive || theirs)) {
            return Ok(Outcome::Conflict);
        }
        self.advisory.retain(|&(other, _)| other != fd);
        self.advisory.push((fd, exclusive));
        self.markers.extend(marker.map(|&marker| (fd, marker)));
        Ok(Outcome::Held)
    }

    pub fn unlock(&mut self, fd: Fd) {
        self.advisory.retain(|&(other, _)| other != fd);
        self.markers.retain(|&(other, _)| other != fd);
    }

    pub fn is_set(&mut self, fd: Fd, marker: Marker) -> Result<bool, i32> {
        self.answers(fd)?;
        Ok(self.markers.iter().any(|&(_, other)| other == marker))
    }

    fn answers(&mut self, fd: Fd) -> Result<(), i32> {
        let file = &self.open[fd as usize];
        if file.stale {
            return Err(libc::ESTALE);
        }
        match self.evicted.iter().position(|&node| node == file.node) {
            Some(at) => {
                self.evicted.swap_remove(at);
                Err(libc::EIO)
            }
            None => Ok(()),
        }
    }

    pub fn group_lock(&mut self, fd: Fd, group: u32) -> Result<(), i32> {
        if self.open[fd as usize].stale {
            return Err(libc::ESTALE);
        }
        let holders = || self.group.iter().flatten();
        if holders().any(|holder| holder.0 == fd) {
            return Err(libc::EINVAL);
        }
        if holders().any(|holder| holder.1 != group && holder.2 == Held::Yes) {
            return Err(libc::EAGAIN);
        }
        self.group.iter_mut().for_each(|holders| holders.push((fd, group, Held::Yes)));
        Ok(())
    }

    pub fn group_unlock(&mut self, fd: Fd) -> Result<(), i32> {
        if !self.group.iter().flatten().any(|holder| holder.0 == fd) {
            return Err(libc::EINVAL);
        }
        self.group.iter_mut().for_each(|holders| holders.retain(|holder| holder.0 != fd));
        Ok(())
    }

    /// Whether a call on an object may go on: an errno, or that it has to wait for somebody's group lock.
    pub fn may_touch(&mut self, fd: Fd, object: usize) -> Result<bool, i32> {
        if self.open[fd as usize].stale {
            return Err(libc::ESTALE);
        }
        let holders = &mut self.group[object];
        match holders.iter_mut().find(|holder| holder.0 == fd).map(|holder| &mut holder.2) {
            Some(Held::Yes) => Ok(true),
            Some(Held::Evicted { said_so: true }) => Err(libc::ENOLCK),
            Some(Held::Evicted { said_so }) => {
                *said_so = true;
                Err(libc::EIO)
            }
            None => Ok(!holders.iter().any(|holder| holder.2 == Held::Yes)),
        }
    }

    pub fn is_free(&self) -> bool {
        self.advisory.is_empty() && self.group.iter().all(Vec::is_empty)
    }

    /// The metadata server evicts a client.
    pub fn evict_from_mds(&mut self, node: usize) {
        let is_evicted = |fd: Fd| self.open[fd as usize].node == node;
        if self.advisory.iter().any(|&(fd, _)| is_evicted(fd)) && !self.evicted.contains(&node) {
            self.evicted.push(node);
        }
        self.advisory.retain(|&(fd, _)| !is_evicted(fd));
        self.markers.retain(|&(fd, _)| !is_evicted(fd));
    }

    /// The server of an object evicts a client.
    pub fn evict_from_ost(&mut self, node: usize, object: usize) {
        for holder in self.group[object].iter_mut().filter(|holder| self.open[holder.0 as usize].node == node) {
            if holder.2 == Held::Yes {
                holder.2 = Held::Evicted { said_so: false };
            }
        }
    }

    /// The open files of a client go stale.
    pub fn make_stale(&mut self, fd: Fd) {
        self.open[fd as usize].stale = true;
    }

    /// The power fails: nobody is there any more.
    pub fn forget_all(&mut self) {
        self.advisory.clear();
        self.markers.clear();
        self.group.iter_mut().for_each(Vec::clear);
    }
}
