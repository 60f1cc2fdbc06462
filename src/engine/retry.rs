//! Which failures pass by themselves: the table of docs/internals/errors.md.
//!
//! Reads and writes of blocks can be repeated without harm. Elsewhere than on Lustre an error is what the disk says, and is passed on
//! at once.

use super::request::{Op, Request};
use super::rules::{Rule, keeps};
use crate::os::clock::{self, Ticks};
use crate::os::queue::List;
use std::time::Duration;

/// What to do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Report it.
    Final,
    /// Try again after that long.
    Again(Duration),
    /// The group lock is lost: take it again first.
    LockLost,
    /// The descriptor is stale: open the file again first.
    Stale,
}

/// How often EIO is tried again: an eviction is over in 30 to 50 ms (measured), a deactivated or broken server stays so.
const MAX_EIO: u32 = 6;
/// How often a lock is taken again for one request: one that does not stay is no lock.
const MAX_LOST: u32 = 20;
/// How often a stale descriptor is replaced.
const MAX_STALE: u32 = 3;

/// What to do about the `attempts`th failure (from 1) of a request, `waited` after its first one, given a file on Lustre and whether a
/// group lock is held on it. `budget` is how long retries may go on, zero for none at all.
pub fn verdict(errno: i32, attempts: u32, waited: Duration, budget: Duration, group_lock: bool) -> Verdict {
    let again = |first_ms: u64, longest_ms: u64| {
        let doubled = first_ms.saturating_mul(1 << (attempts.saturating_sub(1)).min(16));
        Verdict::Again(Duration::from_millis(doubled.min(longest_ms)))
    };
    match errno {
        // Not a matter of time: until the lock is back no call can succeed.
        libc::ENOLCK if group_lock && attempts <= MAX_LOST => Verdict::LockLost,
        _ if waited >= budget => Verdict::Final,
        libc::EIO if attempts <= MAX_EIO => again(50, 2000),
        libc::ESHUTDOWN => again(50, 2000),
        libc::EAGAIN | libc::ENOMEM => again(10, 1000),
        libc::ESTALE if attempts <= MAX_STALE => Verdict::Stale,
        _ => Verdict::Final,
    }
}

/// Takes out of `requests`, which were executed until `now`, what failed in a way that passes, with the time of its next try.
pub fn take_retries<T>(requests: &mut List<Request<T>>, now: Ticks, budget: Duration) -> List<Request<T>> {
    let (mut answered, mut again) = (List::default(), List::default());
    while let Some(mut request) = requests.pop_front() {
        // A failed fdatasync has told all that there is: the next one would say that all is well (rule 4).
        let is_told = request.op == Op::Flush && keeps(Rule::FlushOnce);
        // Nor is an error that is our own word, not Lustre's: the file ends there.
        let is_ours = request.target.ends_before(request.end_bytes());
        if request.errno == 0 || is_told || is_ours || !request.target.on_lustre() {
            answered.push_back(request);
            continue;
        }
        request.attempts += 1;
        if request.attempts == 1 {
            request.first_failure = now;
        }
        let waited = clock::to_duration(now.wrapping_sub(request.first_failure));
        let guarded = request.target.guard().holds_group();
        match verdict(request.errno, request.attempts, waited, budget, guarded) {
            Verdict::Final => answered.push_back(request),
            Verdict::Again(after) => {
                request.due = now + clock::to_ticks(after);
                again.push_back(request);
            }
            Verdict::LockLost | Verdict::Stale => {
                request.due = 0;
                again.push_back(request);
            }
        }
    }
    *requests = answered;
    again
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_secs(30);

    #[test]
    fn by_the_table() {
        let first = |errno| verdict(errno, 1, Duration::ZERO, BUDGET, true);
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EROFS, libc::ENODATA, libc::EINVAL, libc::EFBIG] {
            assert_eq!(first(errno), Verdict::Final);
        }
        assert_eq!(first(libc::EIO), Verdict::Again(Duration::from_millis(50)));
        assert_eq!(first(libc::ENOLCK), Verdict::LockLost);
        assert_eq!(verdict(libc::ENOLCK, 1, Duration::ZERO, BUDGET, false), Verdict::Final);
        assert_eq!(first(libc::ESTALE), Verdict::Stale);
        assert_eq!(verdict(libc::EIO, 4, Duration::ZERO, BUDGET, true), Verdict::Again(Duration::from_millis(400)));
        assert_eq!(verdict(libc::EIO, 7, Duration::ZERO, BUDGET, true), Verdict::Final);
        assert_eq!(verdict(libc::ESHUTDOWN, 99, Duration::ZERO, BUDGET, true), Verdict::Again(Duration::from_secs(2)));
        assert_eq!(verdict(libc::ESHUTDOWN, 99, BUDGET, BUDGET, true), Verdict::Final);
        assert_eq!(verdict(libc::EIO, 1, Duration::ZERO, Duration::ZERO, true), Verdict::Final);
    }
}
