//! How a reactor's I/O is divided between itself and a thread of the kernel's (a polled ring).
//!
//! Submitting is work: a direct read of a page costs the kernel half a microsecond or more, a write to a file that has to allocate
//! fifty. A reactor that does it all itself is at its end with one processor, however many the machine has. So when it spends most
//! of its time in there, a part goes to the kernel's thread:
//!
//! - never for a reactor that keeps up by itself: a thread that polls costs a processor, and a hand-off costs time;
//! - as much as the other can do until the reactor comes again, less what it has not yet taken, and the half of it at most unless it
//!   is little;
//! - nothing, for a while, when it makes no progress: its processor is somebody else's. What it was given by then has to wait for it.
//!
//! And however it is divided, one poll submits no more than [`POLL_BUDGET`] takes: others live on the reactor, too.

use crate::os::clock::{self, Ticks};
use std::cell::RefCell;
use std::time::Duration;

/// How long one poll of the reactor submits, before it lets others have a turn.
const POLL_BUDGET: Duration = Duration::from_micros(200);
/// How long the reactor's load is looked at before it is decided anew.
const WINDOW: Duration = Duration::from_millis(1);
/// The share of the time, in percent, that submitting would take alone, above which help is fetched, and below which it is sent away.
const OVERLOAD: u64 = 60;
const RELIEF: u64 = 40;
/// One in so many submissions of a single I/O is timed.
const TIMED_TURNS: u32 = 64;
/// The most that waits for the kernel's thread: what is there cannot be taken back.
pub(super) const MAX_BACKLOG: usize = 64;
/// Without progress for so long it is not trusted any more (it takes some fifty microseconds to wake up),
const PATIENCE: Duration = Duration::from_micros(800);
/// for so long at first, and twice as long each time until the second,
const SHUN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// or until it has done well for so long.
const FORGIVENESS: Duration = Duration::from_secs(2);

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

/// What is known of a reactor: of all rings that are entered on it.
pub(super) struct Load {
    wanted: bool,
    /// Since when it is looked at, and how long it was in the kernel meanwhile, or would have been with what others did for it.
    since: Ticks,
    in_kernel: Ticks,
    /// What an I/O costs it in the kernel, a running average; 0 while it is not known.
    cost: Ticks,
    /// When the kernel's thread should be through with what the reactor gave it.
    busy_until: Ticks,
}

impl Load {
    /// Notes `count` I/O that the reactor submitted and did not time.
    #[inline]
    pub(super) fn guess(&mut self, count: usize) {
        self.in_kernel += count as u64 * self.cost;
    }
}

thread_local! {
    /// The load of this thread: with SPDK a reactor, on which several of its threads may live, each with a ring.
    pub(super) static LOAD: RefCell<Load> =
        const { RefCell::new(Load { wanted: false, since: 0, in_kernel: 0, cost: 0, busy_until: 0 }) };
}

/// What is known of a ring's kernel thread, and decided from it.
pub(super) struct Balance {
    help: Help,
    /// How long from one submission to the next, a running average; and when the last was.
    period: Ticks,
    last: Ticks,
    /// The I/O it has got and taken, of all time, and when it last took some.
    got: u64,
    taken: u64,
    progress: Ticks,
    shunned_until: Ticks,
    shun: Ticks,
    shunned_at: Ticks,
    turns: u32,
    limits: Limits,
}

/// The constants in ticks.
struct Limits {
    budget: Ticks,
    window: Ticks,
    patience: Ticks,
    shun: (Ticks, Ticks),
    forgiveness: Ticks,
}

impl Balance {
    pub(super) fn new(help: Help) -> Self {
        let limits = Limits {
            budget: clock::to_ticks(POLL_BUDGET),
            window: clock::to_ticks(WINDOW),
            patience: clock::to_ticks(PATIENCE),
            shun: (clock::to_ticks(SHUN.0), clock::to_ticks(SHUN.1)),
            forgiveness: clock::to_ticks(FORGIVENESS),
        };
        let shun = limits.shun.0;
        Balance {
            help,
            period: 0,
            last: 0,
            got: 0,
            taken: 0,
            progress: 0,
            shunned_until: 0,
            shun,
            shunned_at: 0,
            turns: 0,
            limits,
        }
    }

    /// Whether the reactor's way into the kernel is to be timed although it carries one I/O only, now and then.
    #[inline]
    pub(super) fn is_due(&mut self) -> bool {
        self.turns = self.turns.wrapping_add(1);
        self.turns.is_multiple_of(TIMED_TURNS)
    }

    /// Whether the kernel's thread is to be asked at all.
    #[inline]
    pub(super) fn wants_help(&self, load: &Load) -> bool {
        match self.help {
            Help::Off => false,
            Help::Auto => load.wanted,
            Help::Half => true,
        }
    }

    /// How many of `staged` I/O the kernel's thread gets, which has `backlog` of this ring's that it has not taken.
    pub(super) fn share(&mut self, load: &Load, staged: usize, backlog: usize, now: Ticks) -> usize {
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
        let limits = &self.limits;
        if now.saturating_sub(self.progress) > limits.patience.max(4 * load.cost * backlog as u64) {
            let long_ago = now.saturating_sub(self.shunned_at) > limits.forgiveness;
            self.shun = if long_ago { limits.shun.0 } else { (self.shun * 2).min(limits.shun.1) };
            (self.shunned_at, self.shunned_until) = (now, now + self.shun);
            return 0;
        }
        // As much as it can do until we come again, with what it has from here and from the reactor's other rings.
        let can = |time: Ticks| (time / load.cost.max(1)).min(MAX_BACKLOG as u64) as usize;
        let here = can(self.period).saturating_sub(backlog);
        let room = here.min(can((now + self.period).saturating_sub(load.busy_until)));
        // What is little to it it gets whole, which saves us the system call; else the half at most, so that both have something to do.
        if room >= 2 * staged { staged } else { room.min(staged.div_ceil(2)) }
    }

    /// Notes that the kernel's thread got `count` I/O.
    pub(super) fn gave(&mut self, load: &mut Load, count: usize, now: Ticks) {
        self.got += count as u64;
        let work = count as u64 * load.cost;
        load.busy_until = load.busy_until.max(now) + work;
        load.in_kernel += work;
    }

    /// How many I/O it got in all.
    pub(super) fn given(&self) -> u64 {
        self.got
    }

    /// How many I/O the reactor may submit now.
    pub(super) fn budget(&self, load: &Load) -> usize {
        self.limits.budget.checked_div(load.cost).map_or(usize::MAX, |count| count.max(1) as usize)
    }

    /// Notes that the reactor was in the kernel from `start` to `end` with `count` I/O of its own.
    pub(super) fn entered(&mut self, load: &mut Load, count: usize, start: Ticks, end: Ticks) {
        let spent = end.saturating_sub(start);
        load.in_kernel += spent;
        if count > 0 {
            average(&mut load.cost, spent / count as u64);
            // (A pause is not a period.)
            average(&mut self.period, end.saturating_sub(self.last).min(self.limits.window));
            self.last = end;
        }
        let elapsed = end.saturating_sub(load.since);
        if elapsed >= self.limits.window {
            let share = load.in_kernel * 100 / elapsed;
            load.wanted = share >= if load.wanted { RELIEF } else { OVERLOAD };
            (load.since, load.in_kernel) = (end, 0);
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
        load: Load,
        balance: Balance,
        now: Ticks,
        backlog: usize,
    }

    fn us(n: u64) -> Ticks {
        clock::to_ticks(Duration::from_micros(n))
    }

    impl Reactor {
        fn new(help: Help) -> Self {
            let load = Load { wanted: false, since: 0, in_kernel: 0, cost: 0, busy_until: 0 };
            Reactor { load, balance: Balance::new(help), now: us(1_000_000), backlog: 0 }
        }

        /// A turn; how many the other one got, and how many the reactor did itself. The other takes `takes` meanwhile.
        fn turn(&mut self, staged: usize, cost_us: u64, other_us: u64, takes: usize) -> (usize, usize) {
            let Reactor { load, balance, .. } = self;
            let start = self.now;
            let helped = staged > 1 && balance.wants_help(load);
            let share = if helped { balance.share(load, staged, self.backlog, start) } else { 0 };
            assert!(share <= staged && self.backlog + share <= MAX_BACKLOG);
            balance.gave(load, share, start);
            let own = (staged - share).min(balance.budget(load));
            self.now += own as u64 * us(cost_us);
            balance.entered(load, own, start, self.now);
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
        assert!(!reactor.balance.wants_help(&reactor.load), "it went away when there was little to do");
        assert_eq!(reactor.turn(8, 1, 4, 8), (0, 8));
    }

    #[test]
    fn help_that_takes_everything_is_sent_away_as_well() {
        let mut reactor = Reactor::new(Help::Auto);
        for _ in 0..1000 {
            reactor.turn(8, 4, 1, 8);
        }
        assert!(reactor.balance.wants_help(&reactor.load));
        for _ in 0..1000 {
            reactor.turn(2, 4, 96, 2);
        }
        assert_eq!(reactor.turn(2, 4, 96, 2), (0, 2), "there is little to do");
    }

    #[test]
    fn one_io_alone_stays_here() {
        let mut reactor = Reactor::new(Help::Auto);
        for _ in 0..5000 {
            assert_eq!(reactor.turn(1, 4, 0, 1), (0, 1));
        }
        assert!(reactor.balance.wants_help(&reactor.load));
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
        while reactor.turn(16, 4, 1, 0).0 > 0 || reactor.balance.shunned_until < reactor.now {}
        assert_eq!(reactor.balance.shun, reactor.balance.limits.shun.0, "and forgiven");
    }

    #[test]
    fn sixteen_rings_of_a_reactor_share_what_there_is() {
        let mut reactor = Reactor::new(Help::Auto);
        let mut rings: Vec<(Balance, usize)> = (0..16).map(|_| (Balance::new(Help::Auto), 0)).collect();
        let (mut given, mut own, mut done_until) = (0, 0, reactor.now);
        for _ in 0..2000 {
            for (balance, backlog) in &mut rings {
                std::mem::swap(&mut reactor.balance, balance);
                reactor.backlog = *backlog;
                let before = reactor.now;
                let (share, mine) = reactor.turn(8, 4, 1, 0);
                // It works through what it got, at the same speed.
                done_until = before.max(done_until) + share as u64 * us(4);
                *backlog = 0;
                std::mem::swap(&mut reactor.balance, balance);
                (given, own) = (given + share, own + mine);
            }
            let behind = done_until.saturating_sub(reactor.now);
            assert!(behind <= us(1000), "it never has more than a round's work");
        }
        assert!(given * 10 > own * 8, "{given} to {own}: every ring knows that the reactor is overloaded");
        assert!(given * 10 < own * 20, "{given} to {own}: and none gives as if it were alone");
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
