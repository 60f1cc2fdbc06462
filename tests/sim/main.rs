//! A deterministic simulator of the engine: the real order, scheduler, retries, errands and locks, in a world made from one seed.
//!
//! `LLOOP_SIM_SECONDS=N` sets how long it runs, `LLOOP_SIM_SEED=N` repeats the one run of that seed (with `LLOOP_SIM_TRACE=1` it tells
//! what happens).

mod check;
mod disk;
mod exec;
mod fault;
mod handle;
mod host;
mod job;
mod locks;
mod node;
mod options;
mod rng;
mod scenes;
mod stranger;
mod world;

use options::Options;
use rng::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};
use world::{Stats, World};

/// How long the random runs take when nobody says.
const SECONDS: u64 = 20;

/// Runs the world of one seed.
fn run(seed: u64, totals: &Stats) -> Result<(), String> {
    lloop::os::clock::pretend_hz(1_000_000_000);
    let options = Options::new(&Rng::new(seed));
    let world = World::new(options, seed ^ 0x5EED);
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let end = world.now() + world.options.length;
        world.run_until(end);
        world.calm_down();
        if !world.has_failed() {
            world.last_look();
        }
    }));
    totals.add(&world.stats);
    let failure = match ran {
        Ok(()) => world.check.borrow_mut().failure.take(),
        Err(panic) => Some(format!("the engine panics: {}", words_of(&*panic))),
    };
    if let Some(what) = failure {
        let options = format!("{:?}", world.options);
        // What is in it may be broken: it is left behind.
        std::mem::forget(world);
        return Err(format!("LLOOP_SIM_SEED={seed}: {what}\n({options})"));
    }
    debug_assert_eq!(Rc::strong_count(&world), 1);
    Ok(())
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

#[test]
fn random_worlds() {
    let totals = Stats::default();
    if let Some(seed) = number("LLOOP_SIM_SEED") {
        let result = run(seed, &totals);
        println!("{totals}");
        return result.unwrap_or_else(|what| panic!("{what}"));
    }
    let end = Instant::now() + Duration::from_secs(number("LLOOP_SIM_SECONDS").unwrap_or(SECONDS));
    // Every run of the program sees other seeds.
    let mut seed = std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_nanos() as u64);
    while Instant::now() < end {
        seed = seed.wrapping_add(1);
        if let Err(what) = run(seed, &totals) {
            panic!("{what}");
        }
    }
    println!("{totals}");
}

#[test]
fn a_seed_replays_exactly() {
    let (first, second) = (Stats::default(), Stats::default());
    for totals in [&first, &second] {
        (0..20).for_each(|seed| assert_eq!(run(seed, totals), Ok(())));
    }
    assert_eq!(first.to_string(), second.to_string());
}

/// With a rule switched off something has to be noticed, within a minute.
#[cfg(debug_assertions)]
mod bites {
    use super::*;
    use lloop::engine::rules::{Rule, switch_off};

    fn is_noticed(rule: Rule, words: &[&str]) {
        let (start, totals) = (Instant::now(), Stats::default());
        for seed in 1.. {
            switch_off(Some(rule));
            let result = run(seed, &totals);
            switch_off(None);
            if let Err(what) = result {
                println!("{rule:?} switched off: after {:?}, {totals}\n{what}", start.elapsed());
                assert!(words.iter().any(|words| what.contains(words)), "something else is wrong: {what}");
                assert_eq!(run(seed, &totals), Ok(()), "it is the switch that makes the difference");
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{rule:?} is switched off, and nothing is noticed; {totals}"
            );
        }
    }

    #[test]
    fn rule_1_two_overlapping_writes_at_once() {
        is_noticed(Rule::NoGhosts, &["rule 1"]);
    }

    #[test]
    fn rule_3_fua_merged_into_a_call_without() {
        is_noticed(Rule::FuaApart, &["lost: "]);
    }

    #[test]
    fn rule_4_a_failed_flush_tried_again() {
        is_noticed(Rule::FlushOnce, &["rule 4", "lost: "]);
    }

    #[test]
    fn rule_6_one_object_speaks_for_all() {
        is_noticed(Rule::EveryObject, &["rule 6"]);
    }
}
