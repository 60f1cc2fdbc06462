//! The parameters of every RPC: whatever a client sends is decoded or refused by name, and does no harm.
//!
//! `LLOOP_FUZZ_SECONDS=60` gives each method that long instead of its few hundred cases. The samples that are changed to make
//! them are in tests/corpus/rpc, a file a method.

mod common;

use common::fuzz::{fuzz, json};
use lloop::lloop::options::{self, CreateParams, OptionsChange, capacity_blocks};
use lloop::lloop::rpc;
use lloop::spdk::rpc::{Method, parse};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json as value};
use std::path::Path;

/// The samples of a method: those that are decoded, and those that are not.
fn corpus<M: Method>() -> (Vec<Value>, Vec<Value>) {
    let name = M::NAME.to_str().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/rpc").join(name).with_extension("json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let corpus: Value = serde_json::from_str(&text).unwrap();
    let list = |key: &str| corpus[key].as_array().unwrap().clone();
    (list("accepted"), list("refused"))
}

/// A sample with some of its parameters replaced, removed or added, or something else altogether.
fn changed(samples: Vec<Value>) -> impl Strategy<Value = Value> {
    let mut keys: Vec<String> = samples.iter().filter_map(Value::as_object).flat_map(|o| o.keys().cloned()).collect();
    keys.push("unknown".to_owned());
    let edit = (prop::sample::select(keys), any::<Index>(), prop::option::weighted(0.8, json()));
    let edited = (prop::sample::select(samples), proptest::collection::vec(edit, 0..4));
    let edited = edited.prop_map(|(mut sample, edits)| {
        if let Some(object) = sample.as_object_mut() {
            for (key, index, new) in edits {
                match new {
                    // What is there already, for the most part: all of the sample's values have to be met.
                    Some(new) if object.len() > 1 && index.index(2) == 0 => {
                        let at = index.index(object.len());
                        *object.values_mut().nth(at).unwrap() = new;
                    }
                    Some(new) => drop(object.insert(key, new)),
                    None => drop(object.shift_remove(&key)),
                }
            }
        }
        sample
    });
    prop_oneof![9 => edited, 1 => json()]
}

/// Tries a method's decoding; `check` sees what was accepted, and from what.
fn decode<M: Method>(check: impl Fn(&Value, M::Params)) {
    let (accepted, refused) = corpus::<M>();
    for sample in &accepted {
        let params = parse::<M::Params>(sample.clone()).unwrap_or_else(|e| panic!("{sample}: {e}"));
        check(sample, params);
    }
    for sample in &refused {
        assert!(parse::<M::Params>(sample.clone()).is_err(), "{sample}");
    }
    fuzz(&changed([accepted, refused].concat()), |sample| match parse::<M::Params>(sample.clone()) {
        Ok(params) => {
            check(&sample, params);
            // What is decoded has been looked at key by key.
            let mut more = if sample.is_null() { value!({}) } else { sample };
            more["no_such_key"] = value!(1);
            let refused = parse::<M::Params>(more).err().expect("unknown keys are refused");
            assert!(refused.contains("no_such_key"), "{refused}");
        }
        Err(message) => {
            let keys = sample.as_object().into_iter().flat_map(|object| object.keys());
            let is_named = keys
                .chain([&"missing field".to_owned(), &"must be an object".to_owned()])
                .any(|key| message.contains(key));
            assert!(is_named, "{message:?} does not say what is wrong with {sample}");
        }
    });
}

#[test]
fn create_parameters() {
    decode::<rpc::Create>(|sample, params: CreateParams| {
        let saved = serde_json::to_value(&params).unwrap();
        assert_eq!(parse::<CreateParams>(saved).unwrap(), params, "the configuration brings it back");
        if let Err(error) = params.check() {
            assert!(error.errno == libc::EINVAL && !error.message.is_empty(), "{sample}: {error}");
            return;
        }
        for file_bytes in [0, 1, 4096, 4097, 1 << 30, i64::MAX as u64] {
            for align_bytes in [1, 512, 4096, 65536] {
                if let Ok(blocks) = capacity_blocks(&params, file_bytes, align_bytes) {
                    let len_bytes = blocks.checked_mul(u64::from(params.block_size)).expect("it has a size");
                    assert!(blocks > 0 && params.offset.checked_add(len_bytes).is_some_and(|end| end <= file_bytes));
                }
            }
        }
    });
}

#[test]
fn delete_parameters() {
    decode::<rpc::Delete>(|_, _| {});
}

#[test]
fn resize_parameters() {
    decode::<rpc::Resize>(|_, _| {});
}

#[test]
fn resume_parameters() {
    decode::<rpc::Resume>(|_, _| {});
}

#[test]
fn set_options_parameters() {
    decode::<rpc::SetOptions>(|sample, change| match change.apply() {
        Ok(options) => {
            assert_eq!(options, options::current());
            // What is saved can be loaded.
            let saved = serde_json::to_value(options).unwrap();
            parse::<OptionsChange>(saved).unwrap().apply().unwrap();
        }
        Err(error) => {
            let keys = sample.as_object().unwrap().keys();
            assert!(error.errno == libc::EINVAL && keys.into_iter().any(|key| error.message.contains(key)), "{error}");
        }
    });
}

#[test]
fn get_options_parameters() {
    decode::<rpc::GetOptions>(|_, _| {});
}

#[test]
fn get_stats_parameters() {
    decode::<rpc::GetStats>(|_, _| {});
}
