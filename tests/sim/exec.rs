//! Calls on the file, executed step by step, and what a worker makes of them: `engine::transfer` as a state machine.

use crate::check::{Id, Sector};
use crate::locks::Fd;
use crate::world::World;
use lloop::engine::transfer::Access;
use lloop::engine::{Op, Request};
use lloop::os::queue::List;
use std::collections::VecDeque;
use std::ops::Range;

/// What a request carries: its number at the checker, and who submitted it.
#[derive(Clone, Copy)]
pub struct Token {
    pub id: Id,
    pub host: usize,
}

/// What a call does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Move(Access),
    Zero,
    Sync,
}

/// One system call that is being made.
pub struct Call {
    kind: Kind,
    fd: Fd,
    at: Sector,
    /// What is written to each sector, or was read from it.
    pub data: Vec<Id>,
    /// How it ends, if no server says otherwise: sectors moved, or an errno.
    outcome: Result<usize, i32>,
    /// Parts that have not had their effect yet, in the order that they will.
    left: Vec<Sector>,
    pub ready_at: u64,
    /// How many changes the file had when it began.
    began: u64,
}

impl Call {
    /// Begins a call on the sectors from `at` on.
    pub fn begin(world: &World, kind: Kind, fd: Fd, at: Sector, data: Vec<Id>) -> Self {
        let outcome = world.outcome(kind, data.len());
        let reach = match outcome {
            Ok(moved) => moved,
            // A call that fails may have done some of it.
            Err(_) => world.rng.below(data.len() + 1),
        };
        let mut left: Vec<Sector> = (0..reach).collect();
        world.rng.shuffle(&mut left);
        let began = world.disk.borrow().changes;
        Call { kind, fd, at, data, outcome, left, ready_at: world.now() + world.latency(), began }
    }

    /// Does one part. What the call returns, when that was the last.
    pub fn step(&mut self, world: &World) -> Option<Result<usize, i32>> {
        if self.kind == Kind::Sync {
            return self.sync(world);
        }
        let hangs_until = world.disk.borrow().hangs(self.at, self.data.len());
        if hangs_until > world.now() {
            self.ready_at = hangs_until;
            return None;
        }
        self.ready_at = world.now() + world.latency();
        // One part of a long call is many sectors.
        let part = self.left.len() - self.left.len() / 2;
        for _ in 0..part.max(1) {
            let Some(&next) = self.left.last() else { return Some(self.end(world)) };
            let sector = self.at + next;
            let object = world.disk.borrow().object_of[sector];
            match world.locks.borrow_mut().may_touch(self.fd, object) {
                Err(errno) => return Some(Err(errno)),
                // Somebody has a group lock: it waits.
                Ok(false) => {
                    self.ready_at = world.now() + 1_000_000;
                    return None;
                }
                Ok(true) if self.kind == Kind::Zero => {}
                Ok(true) => world.touches(self.fd, object),
            }
            self.left.pop();
            match self.kind {
                Kind::Move(Access::Read) => self.data[next] = world.disk.borrow().contents[sector],
                Kind::Zero if world.is_taken_over(sector, self.data[next]) => {}
                _ => world.change(self.fd, sector, self.data[next]),
            }
        }
        None
    }

    fn end(&self, world: &World) -> Result<usize, i32> {
        if let (Kind::Move(Access::WriteDurably), Ok(moved)) = (self.kind, self.outcome) {
            world.disk.borrow_mut().persist(self.at, &self.data[..moved]);
        }
        self.outcome
    }

    fn sync(&self, world: &World) -> Option<Result<usize, i32>> {
        let mut disk = world.disk.borrow_mut();
        match self.outcome {
            Ok(_) => disk.sync(self.began),
            Err(_) => disk.fail_sync(self.began, &world.rng),
        }
        Some(self.outcome)
    }
}

/// A part of a request that takes one call, or more when that comes back short.
struct Piece {
    kind: Kind,
    range: Range<Sector>,
}

/// The execution of one request.
struct Single {
    pieces: VecDeque<Piece>,
    /// What is in the pages of the request, from `base` on.
    base: Sector,
    pages: Vec<Id>,
    /// The request's own sectors: reading the pages around a write does not change them.
    own: Range<Sector>,
    writes: bool,
}

impl Single {
    fn of(world: &World, request: &Request<Token>, may_punch: bool) -> Result<Self, i32> {
        let own = world.sectors_of(request);
        let page = world.options.page_sectors;
        let (base, end) = (own.start / page * page, own.end.next_multiple_of(page));
        let mut pieces = VecDeque::new();
        let access = Access::of(request);
        let mut write = |range: Range<Sector>| {
            let (base, end) = (range.start / page * page, range.end.next_multiple_of(page));
            let read = Kind::Move(Access::Read);
            if range.end != end && end - base > page {
                pieces.push_back(Piece { kind: read, range: end - page..end });
            }
            if range.start != base || (range.end != end && end - base == page) {
                pieces.push_back(Piece { kind: read, range: base..base + page });
            }
            let kind = if access == Access::Read { Kind::Move(Access::Write) } else { Kind::Move(access) };
            pieces.push_back(Piece { kind, range: base..end });
        };
        match request.op {
            Op::Read => pieces.push_back(Piece { kind: Kind::Move(access), range: base..end }),
            Op::Write => write(own.clone()),
            _ => {
                let (first, last) = (own.start.next_multiple_of(page), own.end / page * page);
                if first >= last {
                    write(own.clone());
                } else {
                    [own.start..first, last..own.end].into_iter().filter(|part| !part.is_empty()).for_each(&mut write);
                    if !may_punch {
                        return Err(libc::EOPNOTSUPP);
                    }
                    pieces.push_back(Piece { kind: Kind::Zero, range: first..last });
                }
            }
        }
        let writes = request.op != Op::Read;
        let pages = vec![if writes { request.token.id } else { 0 }; end - base];
        Ok(Single { pieces, base, pages, own, writes })
    }

    fn call(&self, world: &World, fd: Fd) -> Option<Call> {
        let piece = self.pieces.front()?;
        let data = self.pages[piece.range.start - self.base..piece.range.end - self.base].to_vec();
        Some(Call::begin(world, piece.kind, fd, piece.range.start, data))
    }

    /// Takes in what a call has moved; an errno when that leads nowhere.
    fn moved(&mut self, world: &World, call: &Call, count: usize) -> Result<(), i32> {
        let piece = self.pieces.front_mut().expect("a call was made for it");
        let whole = count - count % world.options.page_sectors;
        if whole == 0 {
            return Err(libc::EIO);
        }
        if piece.kind == Kind::Move(Access::Read) {
            for at in 0..whole {
                let sector = piece.range.start + at;
                if !(self.writes && self.own.contains(&sector)) {
                    self.pages[sector - self.base] = call.data[at];
                }
            }
        }
        piece.range.start += whole;
        if piece.range.is_empty() {
            self.pieces.pop_front();
        }
        Ok(())
    }
}

/// What a worker does with the requests of one `Work`.
pub struct Exec {
    pub requests: List<Request<Token>>,
    fd: Fd,
    may_punch: bool,
    /// All of them in one call.
    merged: bool,
    at: usize,
    single: Option<Single>,
    call: Option<Call>,
    all_well: bool,
}

impl Exec {
    pub fn new(requests: List<Request<Token>>, fd: Fd, may_punch: bool) -> Self {
        let merged = requests.len() > 1 && requests.front().is_some_and(|first| first.op != Op::Flush);
        Exec { requests, fd, may_punch, merged, at: 0, single: None, call: None, all_well: true }
    }

    pub fn ready_at(&self) -> u64 {
        self.call.as_ref().map_or(0, |call| call.ready_at)
    }

    /// Does the next step. Whether all succeeded, at the end.
    pub fn step(&mut self, world: &World) -> Option<bool> {
        let Some(call) = &mut self.call else { return self.begin(world) };
        let result = call.step(world)?;
        let call = self.call.take().expect("it was just there");
        match self.requests.front().map(|first| first.op) {
            Some(Op::Flush) => return Some(self.flushed(world, result)),
            _ if self.merged => {
                let wanted = call.data.len();
                if result == Ok(wanted) {
                    let mut rest = &call.data[..];
                    for request in self.requests.iter_mut() {
                        let (part, others) = rest.split_at(world.sectors_of(request).len());
                        rest = others;
                        if request.op == Op::Read {
                            world.check.borrow_mut().records[request.token.id as usize].found = part.to_vec();
                        }
                        request.conclude(Ok(()));
                    }
                    return Some(true);
                }
                self.merged = false;
            }
            _ => {
                let single = self.single.as_mut().expect("its call was made");
                let result = result.and_then(|count| single.moved(world, &call, count));
                if result.is_err() || single.pieces.is_empty() {
                    self.conclude(world, result);
                }
            }
        }
        None
    }

    fn begin(&mut self, world: &World) -> Option<bool> {
        let first = self.requests.front()?;
        if first.op == Op::Flush {
            self.call = Some(Call::begin(world, Kind::Sync, self.fd, 0, Vec::new()));
            return None;
        }
        if self.merged {
            let at = world.sectors_of(first).start;
            let ids = self.requests.iter().flat_map(|r| std::iter::repeat_n(r.token.id, world.sectors_of(r).len()));
            let kind = Kind::Move(Access::of(first));
            self.call = Some(Call::begin(world, kind, self.fd, at, ids.collect()));
            return None;
        }
        if self.single.is_none() {
            let Some(request) = self.requests.iter().nth(self.at) else { return Some(self.all_well) };
            match Single::of(world, request, self.may_punch) {
                Ok(single) => self.single = Some(single),
                Err(errno) => {
                    self.conclude(world, Err(errno));
                    return None;
                }
            }
        }
        self.call = self.single.as_ref().and_then(|single| single.call(world, self.fd));
        None
    }

    /// The end of one request.
    fn conclude(&mut self, world: &World, result: Result<(), i32>) {
        self.all_well &= result.is_ok();
        let request = self.requests.iter_mut().nth(self.at).expect("it is being executed");
        if let Some(single) = self.single.take()
            && request.op == Op::Read
            && result.is_ok()
        {
            let found = single.pages[single.own.start - single.base..single.own.end - single.base].to_vec();
            world.check.borrow_mut().records[request.token.id as usize].found = found;
        }
        request.conclude(result);
        self.at += 1;
    }

    fn flushed(&mut self, world: &World, result: Result<usize, i32>) -> bool {
        let result = result.map(drop);
        if result.is_err() {
            world.stats.failed_syncs.set(world.stats.failed_syncs.get() + 1);
        }
        self.requests.iter_mut().for_each(|request| request.conclude(result));
        result.is_ok()
    }
}
