//! `lloop options`

use crate::client::Client;
use crate::device;
use crate::error::Result;
use crate::output::Report;
use crate::{size, table};
use serde_json::{Map, Value};

/// An option and its new value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    key: String,
    value: Value,
}

/// KEY=VALUE. Which keys and values there are is the target's to say; only the type of a value is guessed.
///
/// # Errors
/// A sentence.
pub fn parse(text: &str) -> Result<Setting, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => (key, value),
        _ => return Err("say KEY=VALUE, like workers=32 or max_merge_bytes=4M".to_owned()),
    };
    let value = match (size::parse(value), value) {
        _ if key.ends_with("_cpus") => cpus(value)?,
        (Ok(number), _) => number.into(),
        (_, "true") => true.into(),
        (_, "false") => false.into(),
        (_, word) => word.into(),
    };
    Ok(Setting { key: key.to_owned(), value })
}

/// A list of processors: `2,3`, or `none`.
fn cpus(text: &str) -> Result<Value, String> {
    let numbers = text.split(',').filter(|_| text != "none").map(str::parse::<u32>).collect::<Result<Vec<_>, _>>();
    numbers.map(Value::from).map_err(|_| format!("{text} is no list of processors: say 2,3 or none"))
}

/// Changes options, if any are given, all at once; and shows all.
///
/// # Errors
/// As [`Client::call`].
pub fn options(client: &mut Client, set: &[Setting]) -> Result<Report> {
    if !set.is_empty() {
        let params: Map<String, Value> =
            set.iter().map(|setting| (setting.key.clone(), setting.value.clone())).collect();
        client.call("bdev_lloop_set_options", params.into())?;
    }
    let json = client.call("bdev_lloop_get_options", Value::Null)?;
    let facts: Vec<(String, String)> =
        json.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), device::text(value))).collect();
    Ok(Report { text: table::facts(&facts), json })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings() {
        let value = |text| parse(text).unwrap().value.to_string();
        assert_eq!(parse("workers=32"), Ok(Setting { key: "workers".into(), value: 32.into() }));
        assert_eq!(
            [value("a=4M"), value("a=true"), value("a=auto"), value("a=b=c")],
            ["4194304", "true", "\"auto\"", "\"b=c\""]
        );
        assert_eq!(
            [value("sqpoll_cpus=2"), value("sqpoll_cpus=0,3"), value("sqpoll_cpus=none")],
            ["[2]", "[0,3]", "[]"]
        );
        for text in ["workers", "=3", "workers=", "", "sqpoll_cpus=a"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
