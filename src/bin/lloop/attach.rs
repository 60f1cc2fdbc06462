//! `lloop attach`, `detach`, `resize` and `resume`.

use crate::args::Attach;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::exports::{self, Exports};
use crate::output::Report;
use crate::size;
use serde_json::{Map, Value, json};
use std::path::Path;

const EBUSY: i64 = -16;

/// Attaches a file.
///
/// # Errors
/// As [`Client::call`], and when the file's name cannot be sent.
pub fn attach(client: &mut Client, command: &Attach) -> Result<Report> {
    let reply = client.call("bdev_lloop_create", params(command)?).map_err(in_words_of_the_command_line)?;
    let name = reply
        .as_str()
        .ok_or_else(|| Error::Failed(format!("the target names the device in an unknown way: {reply}")))?;
    Ok(Report { text: format!("{name}\n"), json: json!({"name": name}) })
}

/// What is left out is left to the target, which knows its defaults.
fn params(command: &Attach) -> Result<Value> {
    let mut params = Map::new();
    let mut add = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            params.insert(key.to_owned(), value);
        }
    };
    add("filename", Some(absolute(&command.file)?.into()));
    add("name", command.name.clone().map(Value::from));
    add("block_size", command.block_size.as_ref().and_then(|bytes| bytes.parse::<u32>().ok()).map(Value::from));
    add("read_only", command.read_only.then_some(Value::Bool(true)));
    add("offset", command.offset.map(Value::from));
    add("size_limit", command.size_limit.map(Value::from));
    add("engine", command.engine.clone().map(Value::from));
    add("allow_any_fs", command.allow_any_fs.then_some(Value::Bool(true)));
    add("uuid", command.uuid.map(|uuid| uuid.to_string().into()));
    add("lock", command.lock.clone().map(Value::from));
    add("group_id", command.group_id.map(Value::from));
    add("discard", (command.discard || command.no_discard).then_some(Value::Bool(command.discard)));
    add("stripe_split", command.stripe_split.clone().map(Value::from));
    Ok(params.into())
}

/// The target has a directory of its own.
fn absolute(file: &Path) -> Result<String> {
    let fail = |reason: &str| Error::Failed(format!("{}: {reason}", file.display()));
    let file = std::path::absolute(file).map_err(|e| fail(&e.to_string()))?;
    file.into_os_string()
        .into_string()
        .map_err(|_| fail("JSON-RPC can only carry names that are UTF-8; rename the file or link to it"))
}

/// The target's messages name its own parameters.
fn in_words_of_the_command_line(error: Error) -> Error {
    match error {
        Error::Refused { code, message } if message.contains("allow_any_fs") => {
            Error::Refused { code, message: format!("{message} (lloop attach --allow-any-fs)") }
        }
        other => other,
    }
}

/// Detaches a device.
///
/// # Errors
/// As [`Client::call`]; one that is busy with its exports' names.
pub fn detach(client: &mut Client, name: &str, force: bool) -> Result<Report> {
    match client.call("bdev_lloop_delete", json!({"name": name, "force": force})) {
        Ok(_) => Ok(Report { text: format!("{name} is detached\n"), json: json!({"name": name, "detached": true}) }),
        Err(Error::Refused { code: EBUSY, message }) => {
            // Whether they can be told or not, the refusal is what counts.
            let exports = Exports::gather(client).map(|exports| exports.of(name)).unwrap_or_default();
            let exports = match exports.as_slice() {
                [] => String::new(),
                all => format!(" (it is exported as {}: lloop unexport {name})", exports::names(all)),
            };
            Err(Error::Refused { code: EBUSY, message: message + &exports })
        }
        Err(e) => Err(e),
    }
}

/// Grows a device; 0 takes the file's size.
///
/// # Errors
/// As [`Client::call`].
pub fn resize(client: &mut Client, name: &str, size_bytes: u64) -> Result<Report> {
    let reply = client.call("bdev_lloop_resize", json!({"name": name, "size": size_bytes}))?;
    let new =
        reply.as_u64().ok_or_else(|| Error::Failed(format!("the target gives the size in an unknown way: {reply}")))?;
    Ok(Report { text: format!("{name}: {}\n", size::exact(new)), json: json!({"name": name, "size": new}) })
}

/// Resumes a device that is fenced or degraded.
///
/// # Errors
/// As [`Client::call`].
pub fn resume(client: &mut Client, name: &str) -> Result<Report> {
    client.call("bdev_lloop_resume", json!({"name": name}))?;
    Ok(Report { text: format!("{name} is resumed\n"), json: json!({"name": name, "resumed": true}) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};

    fn sent(line: &str) -> Value {
        match Args::read(line.split(' ')).unwrap().command {
            Command::Attach(command) => params(&command).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_was_said_is_sent() {
        assert_eq!(sent("lloop attach /x/a.img"), json!({"filename": "/x/a.img"}));
        let line = "lloop attach /a --name n --block-size 512 --read-only --offset 1M --size-limit 0x1000 --engine uring --allow-any-fs \
                    --uuid 6C6C6F6F-7000-5000-8000-6C7573747265 --lock group --group-id 7 --no-discard --stripe-split on";
        let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
        let all = json!({"filename": "/a", "name": "n", "block_size": 512, "read_only": true, "offset": 1 << 20, "size_limit": 4096,
            "engine": "uring", "allow_any_fs": true, "uuid": "6c6c6f6f-7000-5000-8000-6c7573747265", "lock": "group", "group_id": 7,
            "discard": false, "stripe_split": "on"});
        assert_eq!(sent("lloop attach /a --discard"), json!({"filename": "/a", "discard": true}));
        assert_eq!(sent(&line), all);
    }

    #[test]
    fn files_are_named_from_the_root() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(sent("lloop attach a/b.img")["filename"], here.join("a/b.img").to_str().unwrap());
        assert!(absolute(Path::new("")).is_err());
    }

    #[test]
    fn remedies_are_spelled_for_the_command_line() {
        let refuse = |message: &str| {
            in_words_of_the_command_line(Error::Refused { code: -22, message: message.into() }).to_string()
        };
        assert!(refuse("/f is not on Lustre; set allow_any_fs").ends_with("--allow-any-fs)"));
        assert_eq!(refuse("no such file"), "no such file");
    }
}
