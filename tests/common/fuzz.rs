//! Fuzzing on stable Rust: properties checked on as many cases as there is time for.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use std::time::{Duration, Instant};

/// Checks a property on a few hundred cases (`PROPTEST_CASES`), or for `LLOOP_FUZZ_SECONDS`. A case that fails is made small and
/// shown.
pub fn fuzz<S: Strategy>(strategy: &S, check: impl Fn(S::Value)) {
    let check = |value| -> Result<(), TestCaseError> {
        check(value);
        Ok(())
    };
    // Cases that failed are added to the corpora by hand.
    let config = Config { failure_persistence: None, ..Config::default() };
    let seconds = std::env::var("LLOOP_FUZZ_SECONDS").ok().map(|s| s.parse().expect("LLOOP_FUZZ_SECONDS is a number"));
    let deadline = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    loop {
        if let Err(failure) = TestRunner::new(config.clone()).run(strategy, check) {
            panic!("{failure}");
        }
        if Instant::now() >= deadline {
            return;
        }
    }
}

/// One of the samples, changed here and there: bytes, 16-, 32- and 64-bit numbers, parts left out, doubled or moved.
pub fn mutated(corpus: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![any::<u64>(), 0u64..100, Just(u64::MAX), Just(1 << 31), Just(0xFFFF)];
    let change = (0..6usize, any::<prop::sample::Index>(), any::<prop::sample::Index>(), number);
    (prop::sample::select(corpus), proptest::collection::vec(change, 1..8)).prop_map(|(mut bytes, changes)| {
        for (kind, from, to, number) in changes {
            let len = bytes.len();
            if len == 0 {
                break;
            }
            let (at, other) = (from.index(len), to.index(len));
            match kind {
                0 => bytes[at] = number as u8,
                kind @ 1..=3 => {
                    // Where numbers stand: aligned.
                    let width = [2, 4, 8][kind - 1];
                    let at = at - at % width;
                    let end = (at + width).min(len);
                    bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
                }
                4 => bytes.truncate(at),
                _ => {
                    let part = bytes[at.min(other)..at.max(other)].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
        bytes
    })
}
