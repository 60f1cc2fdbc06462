//! What is done for a volume when something is wrong with it, step by step: the keeper's decisions, apart from its threads.
//!
//! Hold the volume's queue, wait until nothing is going on there, take back what was lost or do what needs the volume for itself, then go
//! on or fence it. All of it may block as long as a server does.

use super::guard::Guard;
use super::lockable::Lockable;
use super::request::{Op, Request};
use super::sched::Trouble;
use super::state::{Event, VolumeState};
use crate::error::reason;
use crate::os::clock;
use crate::os::queue::List;
use std::time::Duration;

/// How long discards are gathered.
const GATHER: Duration = Duration::from_millis(20);
/// How long a device is held for a discard before it goes on without; and a call that is older is not waited for at all.
const DRAIN: Duration = Duration::from_millis(200);
/// When such a discard is tried again.
const POSTPONE: Duration = Duration::from_secs(1);

/// A volume that something is done for, one thing at a time.
pub trait Job {
    /// What its locks are on.
    type File: Lockable;

    /// Its file.
    fn file(&self) -> &Self::File;
    /// Its locks.
    fn guard(&self) -> &Guard<Self::File>;
    /// An offset in each object of the file.
    fn objects(&self) -> Vec<u64>;
    /// Its state.
    fn state(&self) -> VolumeState;
    /// Whether it is there, and not on its way out.
    fn is_open(&self) -> bool;
    /// Starts nothing new on it, and waits until nothing is going on there, for `limit` at most. Whether that is so.
    fn hold_and_drain(&self, event: Event, limit: Duration) -> bool;
    /// What is the matter with it by now.
    fn trouble(&self) -> Trouble;
    /// Has somebody else see to that.
    fn put_back(&self, trouble: Trouble);
    /// Goes on with it.
    fn go_on(&self, event: Event);
    /// Fails it until an operator resumes it.
    fn fence(&self);
    /// Whether a call on it takes longer than `limit`.
    fn has_stuck_call(&self, limit: Duration) -> bool;
    /// Does what was gathered, by [`Guard::without_group`] and [`discard`], and answers it.
    ///
    /// # Errors
    /// Why it has to be fenced.
    fn do_discards(&self) -> Result<(), String>;
}

/// Sees to what calls on a volume have said, and to gathered discards.
pub fn mend(job: &impl Job, trouble: Trouble) {
    let (file, guard) = (job.file(), job.guard());
    let shown = file.path().display();
    // From there on an operator decides, whatever was noticed before.
    if job.state() == VolumeState::Fenced {
        return;
    }
    let urgent = trouble.stale || trouble.lock_lost;
    if !urgent {
        file.pause(GATHER);
        if job.has_stuck_call(DRAIN) {
            return postpone(job);
        }
    }
    let drained =
        if urgent { job.hold_and_drain(Event::Lost, Duration::MAX) } else { job.hold_and_drain(Event::Hold, DRAIN) };
    // What the last calls have said is for this errand, too.
    let now = job.trouble();
    let (stale, lock_lost) = (trouble.stale || now.stale, trouble.lock_lost || now.lock_lost);
    if !drained && (stale || lock_lost) {
        job.hold_and_drain(Event::Lost, Duration::MAX);
    }
    if stale {
        return settle(job, "its descriptor went stale", guard.reopen(file, &job.objects()));
    }
    if lock_lost {
        tracing::warn!("{shown}: the group lock is lost (evicted by a server?); taking it again");
        return settle(job, "the group lock was lost", guard.regain_group(file));
    }
    if trouble.discards {
        if !drained {
            job.go_on(Event::GoOn);
            return postpone(job);
        }
        match job.do_discards() {
            Ok(()) => job.go_on(Event::GoOn),
            Err(why) => settle(job, "the group lock was let go of for a discard", Err(why)),
        }
    }
}

/// Leaves the discards for later: a server that hangs has everything wait that needs it, and nothing else.
fn postpone(job: &impl Job) {
    let file = job.file();
    let end = file.now().saturating_add(clock::to_ticks(POSTPONE));
    // Whatever is more urgent has this errand end.
    while file.now() < end && job.is_open() {
        let trouble = job.trouble();
        if trouble.lock_lost || trouble.stale {
            break;
        }
        file.pause(GATHER);
    }
    job.put_back(Trouble { discards: true, ..Trouble::default() });
}

/// Goes on with a volume that was held, or fences it.
fn settle(job: &impl Job, what: &str, outcome: Result<(), String>) {
    let (file, guard) = (job.file(), job.guard());
    let shown = file.path().display();
    match outcome {
        Ok(()) => {
            guard.recovered(file);
            tracing::warn!("{shown}: {what}; it is there again, and others were kept out all the time: going on");
            job.go_on(Event::Recovered);
        }
        Err(why) => {
            tracing::error!(
                "{shown}: {what}, and {why}: somebody else may have written to the file. Fenced: every I/O fails until bdev_lloop_resume, or until it is attached again"
            );
            job.fence();
            // Last: it asks every server, and one may be down.
            guard.remember_version(file);
        }
    }
}

/// Asks for a volume's locks.
pub fn check(job: &impl Job) {
    let (file, guard) = (job.file(), job.guard());
    let shown = file.path().display();
    if !guard.wants_watching() || job.state() != VolumeState::Open {
        return;
    }
    match guard.advisory_is_held(file) {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!("{shown}: the advisory lock is lost (evicted by the metadata server?); taking it again");
            job.hold_and_drain(Event::Lost, Duration::MAX);
            let regained = guard.regain_advisory(file, &job.objects());
            settle(job, "the advisory lock was lost", regained);
        }
        Err(errno) => tracing::warn!("{shown}: asking for its lock: {}; asking again later", reason(errno)),
    }
}

/// Takes all locks of a fenced volume anew, for an operator, and goes on.
///
/// # Errors
/// Who or what is in the way, for people.
pub fn resume(job: &impl Job) -> Result<(), String> {
    let (file, guard) = (job.file(), job.guard());
    let shown = file.path().display();
    guard.retake_all(file)?;
    match guard.recovered(file) {
        Some(true) => tracing::warn!("{shown}: resumed; it was written to by others while it was fenced"),
        _ => tracing::info!("{shown}: resumed"),
    }
    job.go_on(Event::Resume);
    Ok(())
}

/// Gives the ranges of gathered unmaps back by `punch`, neighbours together.
pub fn discard<T>(requests: &mut List<Request<T>>, mut punch: impl FnMut(u64, u64) -> Result<(), i32>) {
    let mut ranges: Vec<(u64, u64)> = requests.iter().map(|r| (r.offset_bytes, r.end_bytes())).collect();
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    let results: Vec<(u64, u64, Result<(), i32>)> =
        joined.into_iter().map(|(start, end)| (start, end, punch(start, end))).collect();
    for request in requests.iter_mut() {
        debug_assert_eq!(request.op, Op::Unmap);
        let inside =
            results.iter().find(|(start, end, _)| *start <= request.offset_bytes && request.end_bytes() <= *end);
        request.conclude(inside.map_or(Err(libc::EIO), |(_, _, result)| *result));
    }
}
