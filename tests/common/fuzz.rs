//! Fuzzing on stable Rust: properties checked on as many cases as there is time for.

#![allow(dead_code)] // each user uses its part

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::{Map, Value};
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

/// Any JSON, with what is at the borders of numbers and strings in it more often than chance has it.
pub fn json() -> impl Strategy<Value = Value> {
    let words = ["", "lloop0", "auto", "group", "\0", "\u{1F600}\n", "6c6c6f6f-7000-5000-8000-6c7573747265", "/a/../b"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(vec![0, 1, 511, 512, 4096, 1 << 31, 1 << 32, 1 << 63, u64::MAX]).prop_map(Value::from),
        prop::sample::select(words.to_vec()).prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        let object = proptest::collection::vec(("[a-z_]{0,6}", inner.clone()), 0..6);
        prop_oneof![
            proptest::collection::vec(inner, 0..6).prop_map(Value::from),
            object.prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
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
