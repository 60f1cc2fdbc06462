//! A switch for each rule of the engine, so that `tests/sim` can show that it would notice a broken one.
//!
//! Builds without debug assertions have no switches: every rule is kept, and the compiler removes the question.

/// What can be switched off, by the number of its rule (issue 11, "The rules").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Rule 1: of two overlapping writes the newer one waits for the older one.
    NoGhosts,
    /// Rule 3: a write with FUA is not merged with one without.
    FuaApart,
    /// Rule 4: a failed fdatasync is not tried again.
    FlushOnce,
    /// Rule 6: every object of a file is asked whether its group lock is there.
    EveryObject,
}

#[cfg(debug_assertions)]
thread_local! {
    static OFF: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Switches a rule off for this thread, or all of them on again.
#[cfg(debug_assertions)]
pub fn switch_off(rule: Option<Rule>) {
    OFF.set(rule);
}

/// Whether a rule is kept: always, but in the simulator.
#[inline(always)]
pub(super) fn keeps(rule: Rule) -> bool {
    #[cfg(debug_assertions)]
    return OFF.get() != Some(rule);
    #[cfg(not(debug_assertions))]
    {
        let _ = rule;
        true
    }
}
