//! How a reactor's I/O is divided between itself and a thread of the kernel's (a polled ring).
//!
//! Submitting is work: a direct read of a page costs the kernel half a microsecond or more, a write to a file that has to allocate
//! fifty. A reactor that does it all itself is at its end with one processor, however many the machine has. So when it spends most
//! of its time in there, a part goes to the kernel's thread:
//!
//! - never for a reactor that keeps up by itself: a thread that polls costs a processor, and a hand-off costs time;
//! - as much as the other can do until the reactor comes again, less what it has not yet taken;
//! - nothing, for a while, when it makes no progress: its processor is somebody else's. What it was given by then has to wait for it.
//!
//! And however it is divided, one poll submits no more than [`POLL_BUDGET`] takes: others live on the reactor, too.

use crate::os::clock::{self, Ticks};
use std::time::Duration;

/// How long one poll of the reactor submits, before it lets others have a turn.
const POLL_BUDGET: Duration = Duration::from_micros(200);
/// How long the reactor's load is looked at before it is decided anew.
const WINDOW: Duration = Duration::from_millis(1);
/// The share of the time, in percent, that submitting would take alone, above which help is fetched, and below which it is sent away.
const OVERLOAD: u64 = 60;
const RELIEF: u64 = 40;
/// The most that waits for the kernel's thread: what is there cannot be taken back.
pub(super) const MAX_BACKLOG: usize = 64;
/// Without progress for so long it is not trusted any more (it takes some fifty microseconds to wake up),
const PATIENCE: Duration = Duration::from_micros(400);
/// for so long at first, and twice as long each time until the second.
const SHUN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// So many windows without complaint halve that again.
const FORGIVENESS: u32 = 100;

/// Whether the kernel's thread is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Help {
    /// Not at all.
    Off,
    /// When it is of use.
    #[default]
    Auto,
    /// It gets the half of everything. For tests.
    Half,
}

/// What is known of both, and decided from it.
pub(super) struct Balance {
    help: Help,
    wanted: bool,
    /// Of this window: its start, time in the kernel, I/O that the reactor submitted itself, I/O that the other got.
    window: (Ticks, Ticks, u64, u64),
    /// What an I/O costs the reactor in the kernel, a running average; 0 while it is not known.
    cost: Ticks,
    /// How long from one submission to the next, a running average; and when the last was.
    period: Ticks,
    last: Ticks,
    /// The I/O the other has got and taken, of all time, and when it last took some.
    got: u64,
    taken: u64,
    progress: Ticks,
    shunned_until: Ticks,
    shun: Ticks,
    good_windows: u32,
    limits: Limits,
}

/// The constants in ticks.
struct Limits {
    budget: Ticks,
    window: Ticks,
    patience: Ticks,
    shun: (Ticks, Ticks),
}

impl Balance {
    pub(super) fn new(help: Help) -> Self {
        let limits = Limits {
            budget: clock::to_ticks(POLL_BUDGET),
            window: clock::to_ticks(WINDOW),
            patience: clock::to_ticks(PATIENCE),
            shun: (clock::to_ticks(SHUN.0), clock::to_ticks(SHUN.1)),
        };
        Balance {
            help,
            wanted: false,
            window: (0, 0, 0, 0),
            cost: 0,
            period: 0,
            last: 0,
            got: 0,
            taken: 0,
            progress: 0,
            shunned_until: 0,
            shun: limits.shun.0,
            good_windows: 0,
            limits,
        }
    }

    /// Whether the kernel's thread is to be asked at all.
    #[inline]
    pub(super) fn wants_help(&self) -> bool {
        self.wanted || self.help == Help::Half
    }

    /// How many of `staged` I/O the kernel's thread gets, which has `backlog` that it has not taken.
    pub(super) fn share(&mut self, staged: usize, backlog: usize, now: Ticks) -> usize {
        let taken = self.got - backlog as u64;
        if taken != self.taken || backlog == 0 {
            (self.taken, self.progress) = (taken, now);
        }
        if self.help == Help::Half {
            return staged.div_ceil(2).min(MAX_BACKLOG - backlog);
        }
        if now < self.shunned_until {
            return 0;
        }
        if now.saturating_sub(self.progress) > self.limits.patience.max(4 * self.cost * backlog as u64) {
            self.shunned_until = now + self.shun;
            self.shun = (self.shun * 2).min(self.limits.shun.1);
            self.good_windows = 0;
            return 0;
        }
        // As much as it can do until we come again. One is kept: what an I/O costs is measured on our own.
        let can = (self.period / self.cost.max(1)) as usize;
        can.min(MAX_BACKLOG).saturating_sub(backlog).min(staged.saturating_sub(1))
    }

    /// Notes that the kernel's thread got `count` I/O.
    pub(super) fn gave(&mut self, count: usize) {
        self.got += count as u64;
        self.window.3 += count as u64;
    }

    /// How many I/O it got in all.
    pub(super) fn given(&self) -> u64 {
        self.got
    }

    /// How many I/O the reactor may submit now.
    pub(super) fn budget(&self) -> usize {
        self.limits.budget.checked_div(self.cost).map_or(usize::MAX, |count| count.max(1) as usize)
    }

    /// Notes that the reactor was in the kernel from `start` to `end` with `count` I/O of its own.
    pub(super) fn entered(&mut self, count: usize, start: Ticks, end: Ticks) {
        let spent = end.saturating_sub(start);
        self.window.1 += spent;
        if count == 0 {
            return;
        }
        self.window.2 += count as u64;
        average(&mut self.cost, spent / count as u64);
        // (A pause is not a period.)
        average(&mut self.period, end.saturating_sub(self.last).min(self.limits.window));
        self.last = end;
        if end.saturating_sub(self.window.0) >= self.limits.window {
            self.decide(end);
        }
    }

    fn decide(&mut self, now: Ticks) {
        let (start, in_kernel, _, given) = std::mem::replace(&mut self.window, (now, 0, 0, 0));
        let alone = in_kernel + given * self.cost;
        let share = alone * 100 / now.saturating_sub(start).max(1);
        self.wanted = self.help == Help::Auto && share >= if self.wanted { RELIEF } else { OVERLOAD };
        if given > 0 {
            self.good_windows += 1;
            if self.good_windows >= FORGIVENESS {
                self.good_windows = 0;
                self.shun = (self.shun / 2).max(self.limits.shun.0);
            }
        }
    }
}

/// A running average over some eight samples.
fn average(of: &mut Ticks, sample: Ticks) {
    *of = if *of == 0 { sample } else { *of - *of / 8 + sample / 8 };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reactor that goes round and round: each time `staged` I/O, each of which costs `cost_us` in the kernel and `other_us` outside.
    struct Reactor {
        balance: Balance,
        now: Ticks,
        backlog: usize,
    }

    fn us(n: u64) -> Ticks {
        clock::to_ticks(Duration::from_micros(n))
    }

    impl Reactor {
        fn new(help: Help) -> Self {
            Reactor { balance: Balance::new(help), now: us(1_000_000), backlog: 0 }
        }

        /// A turn; how many the other one got, and how many the reactor did itself. The other takes `takes` meanwhile.
        fn turn(&mut self, staged: usize, cost_us: u64, other_us: u64, takes: usize) -> (usize, usize) {
            let start = self.now;
            let share = if self.balance.wants_help() { self.balance.share(staged, self.backlog, start) } else { 0 };
            assert!(share <= staged && self.backlog + share <= MAX_BACKLOG);
            self.balance.gave(share);
            let own = (staged - share).min(self.balance.budget());
            self.now += own as u64 * us(cost_us);
            self.balance.entered(own, start, self.now);
            self.now += staged as u64 * us(other_us);
            self.backlog = (self.backlog + share).saturating_sub(takes);
            (share, own)
        }
    }

    #[test]
    fn help_is_fetched_by_who_needs_it_only() {
        let mut reactor = Reactor::new(Help::Auto);
        for _ in 0..1000 {
            assert_eq!(reactor.turn(8, 1, 4, 8), (0, 8), "a fifth of its time");
        }
        for _ in 0..1000 {
            reactor.turn(8, 4, 1, 8);
        }
        let (share, own) = reactor.turn(8, 4, 1, 8);
        assert!((3..=6).contains(&share), "about the half, in balance: {share}");
        assert_eq!(share + own, 8);
        for _ in 0..1000 {
            reactor.turn(1, 4, 96, 8);
        }
        assert!(!reactor.balance.wants_help(), "it went away when there was little to do");
        assert_eq!(reactor.turn(8, 1, 4, 8), (0, 8));
    }

    #[test]
    fn one_io_alone_stays_here() {
        let mut reactor = Reactor::new(Help::Auto);
        for _ in 0..5000 {
            assert_eq!(reactor.turn(1, 4, 0, 1), (0, 1));
        }
        assert!(reactor.balance.wants_help());
    }

    #[test]
    fn who_makes_no_progress_is_left_alone_and_then_tried_again() {
        let mut reactor = Reactor::new(Help::Auto);
        for _ in 0..1000 {
            reactor.turn(16, 4, 1, 16);
        }
        assert!(reactor.turn(16, 4, 1, 16).0 > 0);
        let stuck: usize = (0..50_000).map(|_| reactor.turn(16, 4, 1, 0).0).sum();
        assert!((1..=MAX_BACKLOG).contains(&stuck), "{stuck} wait for it");
        assert_eq!(reactor.balance.shun, reactor.balance.limits.shun.1, "the longest pause by now");
        // Its processor is free again.
        reactor.backlog = 0;
        let (before, mut turns) = (reactor.now, 0);
        while reactor.turn(16, 4, 1, 16).0 == 0 {
            turns += 1;
            assert!(turns < 50_000, "never tried again");
        }
        assert!(reactor.now - before <= us(1_100_000));
        for _ in 0..50_000 {
            assert!(reactor.turn(16, 4, 1, 16).0 > 0, "once it works it is not left alone");
        }
        assert_eq!(reactor.balance.shun, reactor.balance.limits.shun.0, "and forgiven");
    }

    #[test]
    fn one_poll_does_not_submit_for_ever() {
        let mut reactor = Reactor::new(Help::Off);
        assert_eq!(reactor.turn(64, 50, 1, 0).1, 64, "nothing is known yet");
        assert_eq!(reactor.turn(64, 50, 1, 0).1, 4, "200 microseconds of them");
        for _ in 0..100 {
            reactor.turn(64, 1000, 0, 0);
        }
        assert_eq!(reactor.turn(64, 1000, 0, 0).1, 1, "but one at least");
    }
}
