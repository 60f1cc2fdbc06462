//! A node with a target: the scheduler, its workers, its rings and its ports.

use crate::check::Moment;
use crate::exec::{Call, Exec, Kind, Token};
use crate::handle::Handle;
use crate::job::VolumeJob;
use crate::locks::Fd;
use crate::options::{Options, Place};
use crate::world::{World, count};
use lloop::engine::errand;
use lloop::engine::order::Ticket;
use lloop::engine::sched::{FinishedWork, Sched};
use lloop::engine::state::VolumeState;
use lloop::engine::transfer::Access;
use lloop::engine::uring;
use lloop::engine::{Answer, Guard, Op, Request, Target, retry};
use lloop::os::iov::{IoVecs, LeakedBuffers};
use lloop::os::queue::{Batch, Inbox, List, Placed, Places};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

pub struct Volume {
    pub id: u32,
    pub target: Arc<Target>,
    pub handle: Handle,
    pub guard: Guard<Handle>,
    /// The objects that others have written to since its locks were last in order.
    pub foreign: RefCell<Vec<bool>>,
}

/// What the scheduler is told of a work.
struct Finished {
    done: FinishedWork,
    took: u64,
    flush_errno: i32,
    answered: Vec<Ticket>,
    again: List<Request<Token>>,
}

/// What a host submits.
pub struct Submission {
    pub port: usize,
    pub op: Op,
    pub range: Range<usize>,
    pub fua: bool,
    pub token: Token,
    /// Of an abort: the number of the request that it means.
    pub means: Option<u64>,
}

enum Worker {
    Idle,
    Busy {
        exec: Exec,
        done: FinishedWork,
        started: u64,
    },
    /// Its requests are answered; the scheduler does not know yet.
    Answered(Finished),
}

struct Flight {
    request: Placed<Request<Token>>,
    call: Call,
}

pub struct Node {
    index: usize,
    pub sched: RefCell<Sched<Token>>,
    pub volume: RefCell<Option<Rc<Volume>>>,
    inbox: Inbox<Request<Token>>,
    claims_changed: Cell<bool>,
    workers: RefCell<Vec<Worker>>,
    ring: RefCell<Vec<Flight>>,
    staged: RefCell<Vec<List<Request<Token>>>>,
    answers: Vec<Inbox<Request<Token>>>,
    in_flight: Cell<usize>,
    due: Cell<Option<u64>>,
    /// How often it was fenced.
    pub fences: Cell<u64>,
    pub at_work: Cell<bool>,
    pub detaching: Cell<bool>,
    pub next_check: Cell<u64>,
    pub next_attach: Cell<u64>,
    pub next_operator: Cell<u64>,
}

fn new_sched(options: &Options) -> Sched<Token> {
    Sched::new(options.workers, options.lane_limit, options.max_merge_bytes, 50_000)
}

thread_local! {
    static PLACES: RefCell<Places<Request<Token>>> = RefCell::default();
}

/// Memory for a request. Nothing looks at what is in it.
fn memory(bytes: usize) -> IoVecs {
    thread_local! {
        static BUFFERS: RefCell<HashMap<usize, LeakedBuffers>> = RefCell::default();
    }
    BUFFERS.with_borrow_mut(|buffers| buffers.entry(bytes).or_insert_with(|| LeakedBuffers::new(&[bytes], 0, 0)).iovs())
}

fn deliver(to: &Inbox<Request<Token>>, request: Placed<Request<Token>>) {
    let mut batch = Batch::default();
    batch.push(request);
    to.push(batch);
}

impl Node {
    pub fn new(index: usize, options: &Options) -> Self {
        Node {
            index,
            sched: RefCell::new(new_sched(options)),
            volume: RefCell::default(),
            inbox: Inbox::default(),
            claims_changed: Cell::new(false),
            workers: RefCell::new((0..options.workers).map(|_| Worker::Idle).collect()),
            ring: RefCell::default(),
            staged: RefCell::new((0..options.ports).map(|_| List::default()).collect()),
            answers: (0..options.ports).map(|_| Inbox::default()).collect(),
            in_flight: Cell::new(0),
            due: Cell::new(None),
            fences: Cell::new(0),
            at_work: Cell::new(false),
            detaching: Cell::new(false),
            next_check: Cell::new(0),
            next_attach: Cell::new(0),
            next_operator: Cell::new(0),
        }
    }

    pub fn the_volume(&self) -> Rc<Volume> {
        self.volume.borrow().clone().expect("it is attached")
    }

    pub fn is_attached(&self) -> bool {
        self.volume.borrow().is_some() && !self.detaching.get()
    }

    pub fn state(&self) -> Option<VolumeState> {
        self.volume.borrow().as_ref().map(|volume| volume.target.state())
    }

    pub fn is_open(&self) -> bool {
        self.state() == Some(VolumeState::Open)
    }

    /// Whether it is fenced, and for the how manieth time.
    pub fn fence(&self) -> Option<u64> {
        (self.state() == Some(VolumeState::Fenced)).then_some(self.fences.get())
    }

    pub fn is_at_work(&self) -> bool {
        self.at_work.get()
    }

    pub fn is_troubled(&self) -> bool {
        self.sched.borrow().is_troubled()
    }

    pub fn is_idle(&self) -> bool {
        self.in_flight.get() == 0 && !self.at_work.get() && !self.is_troubled()
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    pub fn has_staged(&self, port: usize) -> bool {
        !self.staged.borrow()[port].is_empty()
    }

    pub fn has_answers(&self, port: usize) -> bool {
        !self.answers[port].is_empty()
    }

    pub fn next_due(&self) -> Option<u64> {
        self.due.get()
    }

    fn has_news(&self) -> bool {
        !self.inbox.is_empty() || self.claims_changed.get() || self.sched.borrow().has_ready()
    }

    /// The workers that can do something, and when.
    pub fn workers_ready(&self) -> impl Iterator<Item = (usize, u64)> {
        let news = self.has_news();
        let workers = self.workers.borrow();
        let ready: Vec<_> = workers
            .iter()
            .enumerate()
            .filter_map(|(at, worker)| match worker {
                Worker::Idle => news.then_some((at, 0)),
                Worker::Busy { exec, .. } => Some((at, exec.ready_at())),
                Worker::Answered(_) => Some((at, 0)),
            })
            .collect();
        ready.into_iter()
    }

    pub fn ring_ready(&self) -> Vec<u64> {
        self.ring.borrow().iter().map(|flight| flight.call.ready_at).collect()
    }

    /// Somebody changes a sector of this object through another open file.
    pub fn sees_change_by(&self, fd: Fd, object: usize) {
        if let Some(volume) = &*self.volume.borrow()
            && volume.handle.fd() != fd
            && volume.target.state().refuses().is_none()
        {
            volume.foreign.borrow_mut()[object] = true;
        }
    }

    /// Whether others have changed this object, which is used through `fd`.
    pub fn has_foreign(&self, fd: Fd, object: usize) -> bool {
        let volume = self.volume.borrow();
        volume.as_ref().is_some_and(|volume| volume.handle.fd() == fd && volume.foreign.borrow()[object])
    }

    pub fn index(&self) -> usize {
        self.index
    }

    /// A host's channel: takes a request in. Its number.
    pub fn submit(&self, world: &World, submission: Submission) -> u64 {
        let Submission { port, op, range, fua, token, means } = submission;
        let volume = self.the_volume();
        let bytes = world.options.sector_bytes;
        let (offset, len) = (range.start as u64 * bytes, range.len() as u64 * bytes);
        let iovs = if matches!(op, Op::Read | Op::Write) { memory(len as usize) } else { IoVecs::EMPTY };
        let request = Request::at(world.now(), op, (volume.id, &volume.target), offset, len, iovs, token).with_fua(fua);
        // Tokens are numbered from 0, and 0 is no number.
        let number = token.id as u64 + 1;
        let request = match means {
            Some(number) => request.meaning(number),
            None => request.with_number(number),
        };
        let mut request = PLACES.with_borrow_mut(|places| places.place(request));
        let alone = request.claim();
        request.port = port as u32;
        self.in_flight.set(self.in_flight.get() + 1);
        if world.options.ring && alone && request.suits_a_ring() {
            let kind = Kind::Move(Access::of(&request));
            let call = Call::begin(world, kind, volume.handle.fd(), range.start, vec![token.id; range.len()]);
            self.ring.borrow_mut().push(Flight { request, call });
        } else {
            self.staged.borrow_mut()[port].push_back(request);
        }
        number
    }

    /// A port hands over what it has gathered.
    pub fn push(&self, port: usize) {
        let mut staged = std::mem::take(&mut self.staged.borrow_mut()[port]);
        let mut batch = Batch::default();
        while let Some(request) = staged.pop_front() {
            batch.push(request);
        }
        self.inbox.push(batch);
    }

    /// A port takes its answers.
    pub fn reap(&self, world: &World, port: usize) {
        let mut answers = self.answers[port].take_all();
        while let Some(request) = answers.pop_front() {
            self.in_flight.set(self.in_flight.get() - 1);
            let (answer, wakes) = finish(request);
            self.claims_changed.set(self.claims_changed.get() | wakes);
            let Token { id, host } = answer.token;
            world.say(|| format!("{id} is answered: {:?}", answer.result));
            let disk = world.disk.borrow();
            let moment =
                Moment { now: world.now(), excused: world.excused(), fence: self.fence(), contents: &disk.contents };
            world.check.borrow_mut().answered(id, answer.result, moment);
            drop(disk);
            count(&world.stats.answers);
            world.hosts.borrow_mut()[host].answered(id);
        }
    }

    pub fn step_ring(&self, world: &World, at: usize) {
        let mut ring = self.ring.borrow_mut();
        let Some(result) = ring[at].call.step(world) else { return };
        let Flight { mut request, call } = ring.swap_remove(at);
        let result = match result {
            Ok(moved) => (moved as u64 * world.options.sector_bytes) as i32,
            Err(errno) => -errno,
        };
        let port = request.port as usize;
        match uring::outcome(result, request.len_bytes) {
            Some(result) => {
                if request.op == Op::Read {
                    world.check.borrow_mut().records[request.token.id as usize].found = call.data;
                }
                request.conclude(result);
                deliver(&self.answers[port], request);
            }
            None => self.staged.borrow_mut()[port].push_back(request),
        }
    }

    /// What a worker does next: as `engine::worker`.
    pub fn step_worker(&self, world: &World, at: usize) {
        let mut workers = self.workers.borrow_mut();
        let worker = std::mem::replace(&mut workers[at], Worker::Idle);
        let next = match worker {
            Worker::Busy { exec, done, started } => self.execute(world, exec, done, started),
            Worker::Idle => self.look_for_work(world, None),
            Worker::Answered(finished) => self.look_for_work(world, Some(finished)),
        };
        workers[at] = next;
    }

    fn execute(&self, world: &World, mut exec: Exec, done: FinishedWork, started: u64) -> Worker {
        let Some(all_well) = exec.step(world) else { return Worker::Busy { exec, done, started } };
        let mut requests = exec.requests;
        let is_sync = requests.front().is_some_and(|first| first.op == Op::Flush);
        let again = if all_well {
            List::default()
        } else {
            retry::take_retries(&mut requests, world.now(), world.options.retry_timeout)
        };
        if is_sync && !all_well {
            let told = requests.iter().any(|flush| flush.errno != 0);
            let disk = world.disk.borrow();
            world.check.borrow_mut().sync_failed(told, &disk.contents);
        }
        let answered = requests.iter_mut().filter_map(|request| request.ticket.take()).collect();
        let flush_errno = requests.front().filter(|first| first.op == Op::Flush).map_or(0, |flush| flush.errno);
        self.answer(world, requests);
        Worker::Answered(Finished { done, took: world.now() - started, flush_errno, answered, again })
    }

    pub fn answer(&self, world: &World, mut requests: List<Request<Token>>) {
        while let Some(request) = requests.pop_front() {
            world.check.borrow_mut().is_done(request.token.id);
            deliver(&self.answers[request.port as usize], request);
        }
    }

    /// What a worker does under the scheduler's lock.
    fn look_for_work(&self, world: &World, finished: Option<Finished>) -> Worker {
        let mut sched = self.sched.borrow_mut();
        if let Some(Finished { done, took, flush_errno, mut answered, again }) = finished {
            for request in again.iter() {
                count(&world.stats.retries);
                world.check.borrow_mut().is_tried_again(request.token.id);
            }
            if !again.is_empty() {
                self.due.set(Some(0));
            }
            sched.finished(done, took, flush_errno, &mut answered, again);
        }
        sched.accept(self.inbox.take_all());
        if self.claims_changed.take() {
            sched.claims_changed();
        }
        let Some(work) = sched.take_next() else { return Worker::Idle };
        drop(sched);
        if work.refused {
            self.answer(world, work.requests);
            return Worker::Idle;
        }
        for flush in work.requests.iter().filter(|request| request.op == Op::Flush) {
            world.check.borrow_mut().flush_begins(flush.token.id);
        }
        if !self.is_open() {
            world.fail(format!("a call is made although the volume is {:?}", self.state()));
        }
        let may_punch = world.options.place != Place::Group;
        let exec = Exec::new(work.requests, self.the_volume().handle.fd(), may_punch);
        Worker::Busy { exec, done: work.done, started: world.now() }
    }

    /// The supervisor: retries whose time has come.
    pub fn revive(&self, world: &World) {
        let next = self.sched.borrow_mut().revive(world.now());
        self.due.set(next);
    }

    /// Somebody has to look when the next retry is due.
    pub fn tell_of_retries(&self) {
        self.due.set(Some(0));
    }

    pub fn has_call_since(&self, started_before: u64) -> bool {
        let workers = self.workers.borrow();
        workers.iter().any(|worker| matches!(worker, Worker::Busy { started, .. } if *started < started_before))
    }

    /// Does something for the volume, one at a time, while the world goes on.
    pub fn at_work(&self, world: &World, errand: impl FnOnce(&VolumeJob<'_>)) {
        if self.at_work.replace(true) {
            return;
        }
        world.depth.set(world.depth.get() + 1);
        let volume = self.the_volume();
        errand(&VolumeJob { world, node: self, volume: &volume });
        world.depth.set(world.depth.get() - 1);
        self.at_work.set(false);
    }

    /// The keeper sees to what calls have said.
    pub fn mend(&self, world: &World) {
        let troubles = self.sched.borrow_mut().take_troubles(&Default::default());
        for (_, _, trouble) in troubles {
            world.say(|| format!("node {}: {trouble:?}", self.index));
            self.at_work(world, |job| errand::mend(job, trouble));
        }
    }

    /// The keeper asks for the locks.
    pub fn check(&self, world: &World) {
        self.next_check.set(world.now() + world.options.lock_check);
        self.at_work(world, |job| errand::check(job));
    }

    /// The power fails: whatever is under way is gone.
    pub fn die(&self, world: &World) {
        let Some(volume) = self.volume.take() else { return };
        let mut sched = self.sched.replace(new_sched(&world.options));
        sched.end(volume.id);
        (0..self.answers.len()).for_each(|port| self.push(port));
        for flight in self.ring.take() {
            finish(flight.request);
        }
        for worker in self.workers.borrow_mut().iter_mut() {
            match std::mem::replace(worker, Worker::Idle) {
                Worker::Idle => {}
                Worker::Busy { mut exec, done, .. } => {
                    let mut answered = exec.requests.iter_mut().filter_map(|request| request.ticket.take()).collect();
                    finish_all(exec.requests);
                    sched.finished(done, 0, 0, &mut answered, List::default());
                }
                Worker::Answered(Finished { done, mut answered, again, .. }) => {
                    sched.finished(done, 0, 0, &mut answered, again);
                }
            }
        }
        sched.accept(self.inbox.take_all());
        while let Some(work) = sched.take_next() {
            if !work.refused {
                world.fail("a call is made for a volume that has ended".into());
            }
            finish_all(work.requests);
        }
        self.answers.iter().for_each(|answers| finish_all(answers.take_all()));
        if !sched.close(volume.id) {
            world.fail("a volume that has ended keeps requests".into());
        }
        self.in_flight.set(0);
        self.claims_changed.set(false);
        self.due.set(None);
        self.detaching.set(false);
        self.next_attach.set(world.now());
    }
}

/// Takes an executed request apart; whether somebody waits for its end.
fn finish(mut request: Placed<Request<Token>>) -> (Answer<Token>, bool) {
    let wakes = request.release_claim();
    (PLACES.with_borrow_mut(|places| places.take(request)).into_answer(), wakes)
}

fn finish_all(mut requests: List<Request<Token>>) {
    while let Some(request) = requests.pop_front() {
        finish(request);
    }
}
