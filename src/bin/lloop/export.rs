//! `lloop export nvmf`: what is missing of an export is planned from what is there, then done, and undone where a step fails.

use crate::args::Nvmf;
use crate::client::Client;
use crate::device;
use crate::error::{Error, Result};
use crate::exports::{self, Exports};
use crate::listen;
use crate::nvmf::{self, default_nqn};
use crate::output::Report;
use crate::plan::{Step, Wanted};
use serde_json::{Value, json};

/// The longest NQN of the NVMe specification.
const MAX_NQN_BYTES: usize = 223;
/// The longest serial number of the NVMe specification.
pub const MAX_SERIAL_BYTES: usize = 20;

/// An NQN, of a host or a subsystem. The target checks the rest.
///
/// # Errors
/// A sentence.
pub fn parse_nqn(text: &str) -> Result<String, String> {
    match text {
        _ if text.len() > MAX_NQN_BYTES => Err(format!("an NQN has {MAX_NQN_BYTES} bytes at most")),
        _ if !text.starts_with("nqn.") || !text.contains(':') => {
            Err("no NQN; they are like nqn.2014-08.org.nvmexpress:uuid:... or nqn.2026-11.io.lloop:disk0".to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

/// A serial number.
///
/// # Errors
/// A sentence.
pub fn parse_serial(text: &str) -> Result<String, String> {
    let is_printable = |b: u8| (0x20..0x7f).contains(&b);
    match text.len() {
        1..=MAX_SERIAL_BYTES if text.bytes().all(is_printable) => Ok(text.to_owned()),
        _ => Err(format!("a serial number has 1 to {MAX_SERIAL_BYTES} printable ASCII characters")),
    }
}

/// Who may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hosts {
    /// Everyone.
    Any,
    /// These.
    These(Vec<String>),
}

impl Hosts {
    /// What the command line says; it must say something.
    ///
    /// # Errors
    /// [`Error::Usage`]
    pub fn chosen(command: &Nvmf) -> Result<Hosts> {
        match (command.allow_any_host, command.allow_host.as_slice()) {
            (true, _) => Ok(Hosts::Any),
            (false, []) => Err(Error::Usage(
                "say who may connect: --allow-host NQN for each host (its NQN is in its /etc/nvme/hostnqn), or --allow-any-host \
                 for everyone who reaches the address"
                    .to_owned(),
            )),
            (false, these) => Ok(Hosts::These(these.to_vec())),
        }
    }
}

/// Exports a device over NVMe/TCP.
///
/// # Errors
/// As [`Client::call`]. What the call had created is removed then.
pub fn nvmf(client: &mut Client, command: &Nvmf, hosts: &Hosts) -> Result<Report> {
    let device = device::find(client, &command.name)?;
    let nqn = match &command.nqn {
        Some(nqn) => nqn.clone(),
        None => parse_nqn(&default_nqn(&device.name)).map_err(|_| {
            Error::Failed(format!("{} is too long a name for an NQN; give one with --nqn", device.name))
        })?,
    };
    let subsystems = nvmf::subsystems(client)?;
    let transports = client.call("nvmf_get_transports", Value::Null)?;
    let wanted =
        Wanted { device: &device, nqn: &nqn, hosts, listen: command.listen, serial: command.serial.as_deref() };
    let steps = wanted.missing(&subsystems, &transports)?;
    let mut others = Exports::gather(client)?.of(&device.name);
    others.retain(|export| export.kind != "nvmf");
    if !steps.is_empty() && !others.is_empty() {
        return Err(Error::Failed(format!(
            "{0} is exported as {1} already, and NVMe-oF has a device for itself; lloop unexport {0} first",
            device.name,
            exports::names(&others)
        )));
    }
    carry_out(client, &steps, &device.name)?;

    let subsystems = nvmf::subsystems(client)?;
    let subsystem = subsystems.iter().find(|subsystem| subsystem.nqn == nqn);
    let nsid = subsystem.and_then(|subsystem| subsystem.namespace_of(&device.name)).map(|namespace| namespace.nsid);
    let (Some(subsystem), Some(nsid)) = (subsystem, nsid) else {
        return Err(Error::Failed(format!("{nqn} has gone again: does someone else change it?")));
    };
    let connect = listen::connect_command(&command.listen, &nqn);
    let notes = notes(client, &device.name, &nqn)?;
    let done = if steps.is_empty() { "is exported already" } else { "is exported" };
    Ok(Report {
        text: format!(
            "{} {done} as {nqn}\n  namespace {nsid}, on tcp {}, for {}\nConnect with\n  {connect}\n{}",
            device.name,
            command.listen,
            subsystem.hosts_in_words(),
            notes.iter().map(|note| format!("Note: {note}\n")).collect::<String>()
        ),
        json: json!({
            "name": device.name,
            "nqn": nqn,
            "nsid": nsid,
            "serial_number": subsystem.serial_number,
            "listen_address": listen::listen_address(&command.listen),
            "allow_any_host": subsystem.allow_any_host,
            "hosts": subsystem.hosts.iter().map(|host| host.nqn.as_str()).collect::<Vec<_>>(),
            "connect": connect,
            "notes": notes,
            "changed": !steps.is_empty(),
        }),
    })
}

/// What to do on the hosts, or on other targets. One target cannot have two devices with one UUID (SPDK refuses that); two targets can,
/// and Linux drops a namespace whose UUID it has under another NQN already ("duplicate IDs").
fn notes(client: &mut Client, name: &str, nqn: &str) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    if let Some(group) = device::shared_group(client, name)? {
        notes.push(format!(
            "another target with group_id {group} may export this file, too. A Linux host that connects to both drops the second \
             unless both have one NQN; export it there with --nqn {nqn}"
        ));
    }
    Ok(notes)
}

/// Does the steps. When one is refused those before it are taken back, the newest first.
///
/// # Errors
/// As [`Client::call`].
pub fn carry_out(client: &mut Client, steps: &[Step], name: &str) -> Result<()> {
    for (at, step) in steps.iter().enumerate() {
        let (method, params) = &step.call;
        let error = match client.call(method, params.clone()) {
            Ok(_) => continue,
            Err(e @ Error::Refused { .. }) => e,
            // No answer: it is not known what was done, and nothing more can be asked.
            Err(e) => {
                return Err(Error::Failed(format!(
                    "{e}; parts of the export may be there: lloop unexport {name} takes them back"
                )));
            }
        };
        let mut left = None;
        for (method, params) in steps[..at].iter().rev().filter_map(|step| step.undo.clone()) {
            if let Err(e) = client.call(method, params) {
                left.get_or_insert(e);
            }
        }
        let remedy = match left {
            None => step.remedy.to_owned(),
            Some(e) => format!("{}; and what was done before cannot be taken back: {e}", step.remedy),
        };
        return Err(error.explain(&step.failure, &remedy));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Address;
    use serde::Deserialize;
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};
    use std::time::Duration;

    /// A target that refuses what begins with "bad", and at the end tells what it was asked for.
    fn target() -> (Client, JoinHandle<Vec<String>>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let methods = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut methods = Vec::new();
            while let Ok(request) = Value::deserialize(&mut serde_json::Deserializer::from_reader(&stream)) {
                let method = request["method"].as_str().unwrap().to_owned();
                let reply = match method.starts_with("bad") {
                    true => json!({"id": request["id"], "error": {"code": -32602, "message": "Invalid parameters"}}),
                    false => json!({"id": request["id"], "result": true}),
                };
                (&stream).write_all(reply.to_string().as_bytes()).unwrap();
                methods.push(method);
            }
            methods
        });
        (Client::connect(&Address::Unix(path), Duration::from_secs(5)).unwrap(), methods, dir)
    }

    fn step(method: &'static str, undo: Option<&'static str>) -> Step {
        let undo = undo.map(|method| (method, Value::Null));
        Step { call: (method, Value::Null), undo, failure: format!("no {method}"), remedy: "sorry" }
    }

    #[test]
    fn a_refused_step_undoes_those_before_it() {
        let (mut client, methods, _dir) = target();
        let steps = [
            step("a", Some("undo a")),
            step("b", None),
            step("c", Some("bad undo c")),
            step("bad d", None),
            step("e", None),
        ];
        let error = carry_out(&mut client, &steps, "lloop0").unwrap_err().to_string();
        drop(client);
        assert_eq!(methods.join().unwrap(), ["a", "b", "c", "bad d", "bad undo c", "undo a"]);
        assert!(
            error.starts_with("no bad d: Invalid parameters; sorry; and what was done before cannot be taken back"),
            "{error}"
        );
    }

    #[test]
    fn all_steps_are_done() {
        let (mut client, methods, _dir) = target();
        carry_out(&mut client, &[step("a", Some("undo a")), step("b", None)], "lloop0").unwrap();
        drop(client);
        assert_eq!(methods.join().unwrap(), ["a", "b"]);
    }

    #[test]
    fn names_and_numbers() {
        assert!(
            parse_nqn("nqn.2014-08.org.nvmexpress:uuid:1").is_ok()
                && parse_nqn("me").is_err()
                && parse_nqn("nqn.x").is_err()
        );
        assert!(parse_nqn(&format!("nqn.2026-11.io.lloop:{}", "x".repeat(250))).is_err());
        assert!(parse_serial("LL-0001").is_ok() && parse_serial("").is_err());
        assert!(parse_serial("123456789012345678901").is_err() && parse_serial("é").is_err());
    }
}
