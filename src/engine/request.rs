//! One I/O on its way through an engine.

use super::order::{Order, Span, Ticket};
use super::target::Target;
use crate::os::bounce::BouncePool;
use crate::os::clock::{self, Ticks};
use crate::os::iov::IoVecs;
use crate::os::queue::Placed;
use std::sync::Arc;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the memory from the file.
    Read,
    /// Write the memory to the file.
    Write,
    /// Make everything that was completed before durable.
    Flush,
    /// Give the range back to the filesystem; it reads as zeroes afterwards.
    Unmap,
    /// Make the range read as zeroes, keeping its space where the filesystem can.
    WriteZeroes,
    /// Answer another request, if no call has been made for it yet.
    Abort,
    /// Answer all requests that no call has been made for yet.
    Reset,
}

impl Op {
    /// Whether it changes the bytes of its range: what rule 1 (docs/internals/rules.md) keeps in order.
    pub fn changes_data(self) -> bool {
        matches!(self, Op::Write | Op::Unmap | Op::WriteZeroes)
    }
}

/// An I/O. `T` is what its submitter wants back with the answer.
pub struct Request<T> {
    /// What is to be done.
    #[doc(hidden)]
    pub op: Op,
    /// Where the answer goes.
    #[doc(hidden)]
    pub port: u32,
    pub(super) volume: u32,
    /// 0 while all is well.
    #[doc(hidden)]
    pub errno: i32,
    pub(super) target: Arc<Target>,
    /// In the file, not in the device. Of an abort: the number of what it means.
    #[doc(hidden)]
    pub offset_bytes: u64,
    /// How long it is.
    #[doc(hidden)]
    pub len_bytes: u64,
    pub(super) iovs: IoVecs,
    pub(super) submitted: Ticks,
    /// When it is to be tried again, after a failure.
    pub(super) due: Ticks,
    /// When it failed first.
    pub(super) first_failure: Ticks,
    /// How often it has failed.
    pub(super) attempts: u32,
    /// A number that no other request of its port has, for aborts; 0 when nobody aborts.
    pub(super) number: u64,
    /// A write that is to be on stable storage when it is answered.
    pub(super) fua: bool,
    /// It has a claim on its blocks, and no place in the scheduler's order yet.
    claimed: bool,
    /// Its place in the scheduler's order.
    #[doc(hidden)]
    pub ticket: Option<Ticket>,
    /// Its submitter's.
    #[doc(hidden)]
    pub token: T,
}

/// What became of a request.
pub struct Answer<T> {
    /// What the submitter put in.
    pub token: T,
    /// What was to be done.
    pub op: Op,
    /// Length of the range in bytes.
    pub len_bytes: u64,
    /// Done, or the errno (positive) of what failed. Nothing in between: a short transfer has been continued.
    pub result: Result<(), i32>,
    /// When it was submitted.
    pub submitted: Ticks,
}

impl<T> Request<T> {
    /// A request on the device range `offset_bytes..offset_bytes + len_bytes` of `volume`. `iovs` holds as many bytes for
    /// reads and writes, and nothing otherwise.
    pub fn new(op: Op, volume: &super::Volume<T>, offset_bytes: u64, len_bytes: u64, iovs: IoVecs, token: T) -> Self {
        Request::at(clock::now(), op, (volume.id(), volume.target()), offset_bytes, len_bytes, iovs, token)
    }

    /// The same, submitted at a given moment to a volume's number and file.
    #[doc(hidden)]
    pub fn at(
        submitted: Ticks,
        op: Op,
        (volume, target): (u32, &Arc<Target>),
        offset_bytes: u64,
        len_bytes: u64,
        iovs: IoVecs,
        token: T,
    ) -> Self {
        let target = target.clone();
        Request {
            op,
            port: u32::MAX,
            volume,
            errno: 0,
            offset_bytes: target.base_bytes() + offset_bytes,
            target,
            len_bytes,
            iovs,
            submitted,
            due: 0,
            first_failure: 0,
            attempts: 0,
            number: 0,
            fua: false,
            claimed: false,
            ticket: None,
            token,
        }
    }

    /// Has a write on stable storage when it is answered (force unit access).
    #[must_use]
    pub fn with_fua(mut self, fua: bool) -> Self {
        self.fua = fua;
        self
    }

    /// Gives it a number that no other request of its port has: what an abort finds it by.
    #[must_use]
    pub fn with_number(mut self, number: u64) -> Self {
        self.number = number;
        self
    }

    /// Whether it has this number, and an abort may mean it.
    pub fn has_number(&self, number: u64) -> bool {
        number != 0 && self.number == number
    }

    /// Whether it is one of a volume.
    pub fn is_of(&self, volume: &super::Volume<T>) -> bool {
        self.volume == volume.id()
    }

    /// An abort of the request that has this number, on the same port.
    pub fn abort(volume: &super::Volume<T>, number: u64, token: T) -> Self {
        Request::new(Op::Abort, volume, 0, 0, IoVecs::EMPTY, token).meaning(number)
    }

    /// An abort of the request that has this number, on the same port.
    #[doc(hidden)]
    #[must_use]
    pub fn meaning(mut self, number: u64) -> Self {
        debug_assert_eq!(self.op, Op::Abort);
        self.offset_bytes = number;
        self
    }

    /// To be called once, when it is submitted. Whether it may go to a ring as far as others are concerned: it changes nothing, or
    /// nobody else changes its blocks.
    pub fn claim(&mut self) -> bool {
        debug_assert!(!self.claimed && self.ticket.is_none());
        self.claimed = self.op.changes_data();
        !self.claimed || self.target.claims().claim(self.span())
    }

    /// It can have no more effect. Whether somebody waits for that in the scheduler.
    #[doc(hidden)]
    pub fn release_claim(&mut self) -> bool {
        std::mem::take(&mut self.claimed) && self.target.claims().release(self.span())
    }

    /// Gives it a place in the scheduler's order, which keeps the claim from here on.
    pub(super) fn enter(&mut self, order: &mut Order) -> Ticket {
        debug_assert!(self.claimed, "a write is claimed when it is submitted");
        self.claimed = false;
        let ticket = order.enter(self.span(), self.submitted);
        self.ticket = Some(ticket);
        ticket
    }

    /// The bytes that it touches.
    pub(super) fn span(&self) -> Span {
        Span { start_bytes: self.offset_bytes, end_bytes: self.end_bytes() }
    }

    /// Whether it is a read or write that direct I/O takes as it is, or after a short copy, of a file that is whole.
    pub fn suits_a_ring(&self) -> bool {
        matches!(self.op, Op::Read | Op::Write)
            && !self.target.ends_before(self.end_bytes())
            && (self.suits_direct_io() || self.suits_a_copy())
    }

    /// Whether it is a write that only needs an aligned copy.
    fn suits_a_copy(&self) -> bool {
        let align_bytes = self.target.file().offset_align_bytes() as u64;
        self.op == Op::Write
            && self.len_bytes <= BouncePool::SLOT_BYTES as u64
            && (self.offset_bytes | self.len_bytes).is_multiple_of(align_bytes)
    }

    /// Whether its memory suits direct I/O.
    pub(super) fn suits_direct_io(&self) -> bool {
        self.target.file().suits(self.op == Op::Write, self.offset_bytes, self.len_bytes, &self.iovs)
    }

    /// First byte behind the range.
    pub(super) fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.len_bytes
    }

    /// Takes an executed request apart. With it: whether somebody waits for its end in the scheduler ([`super::Port::answer`] tells
    /// them).
    pub(super) fn answer(mut this: Placed<Self>) -> (Answer<T>, bool) {
        let wakes = this.release_claim();
        (this.take().into_answer(), wakes)
    }

    /// What its submitter gets.
    #[doc(hidden)]
    pub fn into_answer(self) -> Answer<T> {
        Answer {
            op: self.op,
            len_bytes: self.len_bytes,
            result: if self.errno == 0 { Ok(()) } else { Err(self.errno) },
            submitted: self.submitted,
            token: self.token,
        }
    }

    /// Sets the outcome.
    #[doc(hidden)]
    pub fn conclude(&mut self, result: Result<(), i32>) {
        self.errno = result.err().unwrap_or(0);
    }
}
