//! What is exported where, of every kind, and who is connected.

use crate::client::Client;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::iscsi;
use crate::nvmf::{self, Subsystem};
use crate::vhost::{self, Controller};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// An export of a device.
#[derive(Debug, Clone)]
pub struct Exported {
    /// "nvmf", "vhost-blk", "vhost-scsi" or "iscsi".
    pub kind: &'static str,
    /// A NQN, a socket, or an iSCSI name.
    pub name: String,
    /// Where it listens, if that is not its name.
    pub listeners: Vec<String>,
    /// Who is connected; `None` where that cannot be known.
    pub connected: Option<Vec<String>>,
    /// It takes no writes.
    pub read_only: bool,
    /// What more there is to say, on a line.
    pub words: String,
    /// All of it, for programs.
    pub json: Value,
}

impl Exported {
    /// "vhost-blk on /run/lloop/vm0.sock"
    pub fn shown(&self) -> String {
        match (self.kind, self.listeners.as_slice()) {
            ("nvmf" | "iscsi", []) => format!("{} on no address", self.name),
            ("nvmf" | "iscsi", listeners) => format!("{} on {}", self.name, listeners.join(", ")),
            (kind, _) => format!("{kind} on {}", self.name),
        }
    }

    /// Who is connected.
    pub fn connected_in_words(&self) -> String {
        match self.connected.as_deref() {
            None => "?".to_owned(),
            Some([]) => "-".to_owned(),
            Some(who) => who.join(", "),
        }
    }
}

/// Their names, for a sentence.
pub fn names(exports: &[Exported]) -> String {
    let name = |export: &Exported| match export.kind {
        "nvmf" | "iscsi" => export.name.clone(),
        kind => format!("{kind} on {}", export.name),
    };
    exports.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// All exports of a target. `None` where it does not tell.
#[derive(Debug, Clone, Default)]
pub struct Exports {
    /// NVMe-oF.
    pub subsystems: Option<Vec<Subsystem>>,
    /// vhost.
    pub controllers: Option<Vec<Controller>>,
    /// iSCSI.
    pub iscsi: Option<iscsi::State>,
    /// The hosts connected to subsystems, by the subsystem's name, where the target tells.
    hosts: BTreeMap<String, Vec<String>>,
}

impl Exports {
    /// Asks the target.
    ///
    /// # Errors
    /// Only when the target has gone.
    pub fn gather(client: &mut Client) -> Result<Exports> {
        let subsystems = nvmf::subsystems_if_any(client)?;
        let mut hosts = BTreeMap::new();
        for subsystem in subsystems.iter().flatten().filter(|subsystem| subsystem.is_nvme()) {
            match nvmf::connected_hosts(client, &subsystem.nqn)? {
                Some(connected) => hosts.insert(subsystem.nqn.clone(), connected),
                None => break,
            };
        }
        Ok(Exports {
            subsystems,
            controllers: vhost::controllers_if_any(client)?,
            iscsi: iscsi::State::ask_if_any(client)?,
            hosts,
        })
    }

    /// The target told of every kind.
    pub fn are_all_told(&self) -> bool {
        self.subsystems.is_some() && self.controllers.is_some() && self.iscsi.is_some()
    }

    /// Those of a device, as far as the target tells.
    pub fn of(&self, name: &str) -> Vec<Exported> {
        let subsystems = nvmf::exports_of(self.subsystems.as_deref().unwrap_or_default(), name);
        let mut all: Vec<Exported> = subsystems.map(|subsystem| self.over_nvmf(subsystem, name)).collect();
        let controllers = self.controllers.iter().flatten().filter(|controller| controller.serves(name));
        all.extend(controllers.map(|controller| self.by_vhost(controller, name)));
        if let Some(state) = &self.iscsi {
            all.extend(state.nodes.iter().filter(|node| node.serves(name)).map(|node| over_iscsi(state, node)));
        }
        all
    }

    /// A device that is written to must not be in two hands.
    ///
    /// # Errors
    /// It would be.
    pub fn check_shared(&self, device: &Device, read_only: bool) -> Result<()> {
        let name = &device.name;
        let others = self.of(name);
        let refuse = |message: String| Err(Error::Failed(message));
        if others.iter().any(|other| other.kind == "nvmf") || device.claimed {
            return match others.as_slice() {
                [] => refuse(format!("{name} is in use by something else in the target, which has it for itself")),
                _ => refuse(format!("{name} is exported as {} already; lloop unexport {name} first", names(&others))),
            };
        }
        if others.is_empty() || device.is_read_only() || (read_only && others.iter().all(|other| other.read_only)) {
            return Ok(());
        }
        refuse(format!(
            "{name} is exported as {} already, and two that write to it would destroy each other's data; lloop unexport {name} first, \
             or attach it with --read-only",
            names(&others)
        ))
    }

    fn over_nvmf(&self, subsystem: &Subsystem, name: &str) -> Exported {
        let nsid = subsystem.namespace_of(name).map(|namespace| namespace.nsid);
        let listeners: Vec<String> = subsystem.listen_addresses.iter().map(nvmf::ListenAddress::shown).collect();
        let connected = self.hosts.get(&subsystem.nqn).cloned();
        Exported {
            kind: "nvmf",
            name: subsystem.nqn.clone(),
            words: format!("namespace {}, for {}", nsid.unwrap_or_default(), subsystem.hosts_in_words()),
            json: json!({
                "type": "nvmf",
                "nqn": subsystem.nqn,
                "nsid": nsid,
                "listen_addresses": subsystem.listen_addresses,
                "allow_any_host": subsystem.allow_any_host,
                "hosts": subsystem.hosts.iter().map(|host| host.nqn.as_str()).collect::<Vec<_>>(),
                "connected": connected,
            }),
            listeners,
            connected,
            read_only: false,
        }
    }

    fn by_vhost(&self, controller: &Controller, name: &str) -> Exported {
        let count = controller.sessions.as_ref().map(Vec::len);
        let read_only = controller.block().is_some_and(|block| block.read_only);
        let target = controller.targets_of(name).next().map(|target| target.number);
        let socket = controller.socket.display().to_string();
        let connected = count.map(|count| match count {
            0 => Vec::new(),
            1 => vec!["a virtual machine".to_owned()],
            more => vec![format!("{more} virtual machines")],
        });
        Exported {
            kind: controller.kind(),
            words: match target {
                Some(number) => format!("SCSI target {number}"),
                None if read_only => "read-only".to_owned(),
                None => "for writing".to_owned(),
            },
            json: json!({
                "type": controller.kind(),
                "socket": socket,
                "controller": controller.name,
                "target": target,
                "read_only": read_only,
                "connected": connected,
            }),
            name: socket,
            listeners: Vec::new(),
            connected,
            read_only,
        }
    }
}

fn over_iscsi(state: &iscsi::State, node: &iscsi::Node) -> Exported {
    let (listeners, connected) = (state.addresses(node), state.connected(node));
    let allowed = state.allowed(node);
    let words: Vec<String> = allowed.iter().map(iscsi::Allowed::in_words).collect();
    let all = |list: fn(&iscsi::Allowed) -> &Vec<String>| allowed.iter().flat_map(list).collect::<Vec<_>>();
    Exported {
        kind: "iscsi",
        name: node.name.clone(),
        words: format!("for {}", if words.is_empty() { "nobody".to_owned() } else { words.join(" and ") }),
        json: json!({
            "type": "iscsi",
            "iqn": node.name,
            "listen_addresses": listeners,
            "initiators": all(|allowed| &allowed.names),
            "networks": all(|allowed| &allowed.networks),
            "connected": connected,
        }),
        listeners,
        connected,
        read_only: false,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::device;
    use serde::Deserialize;

    /// Exports of every kind.
    pub fn some() -> Exports {
        Exports {
            subsystems: Some(nvmf::tests::some()),
            controllers: Some(vhost::tests::some()),
            iscsi: Some(iscsi::tests::some()),
            hosts: BTreeMap::from([("nqn.2026-11.io.lloop:lloop0".to_owned(), vec!["nqn.h:1".to_owned()])]),
        }
    }

    #[test]
    fn of_every_kind() {
        let all = some().of("lloop0");
        let shown: Vec<String> = all.iter().map(Exported::shown).collect();
        assert_eq!(
            shown,
            [
                "nqn.2026-11.io.lloop:lloop0 on tcp 127.0.0.1:44321",
                "vhost-blk on /run/lloop/blk.sock",
                "iqn.2026-11.io.lloop:lloop0 on 127.0.0.1:3260"
            ]
        );
        let connected: Vec<String> = all.iter().map(Exported::connected_in_words).collect();
        assert_eq!(connected, ["nqn.h:1", "?", "127.0.0.1"]);
        assert_eq!(all[0].json["connected"], json!(["nqn.h:1"]));
        let scsi = some().of("lloop2").pop().unwrap();
        assert_eq!((scsi.words.as_str(), scsi.connected_in_words().as_str()), ("SCSI target 3", "a virtual machine"));
        assert!(some().of("lloop7").is_empty() && some().are_all_told() && !Exports::default().are_all_told());
    }

    #[test]
    fn two_hands() {
        let device = |name: &str, read_only: bool, claimed: bool| {
            let mut bdev = device::tests::bdev(name);
            bdev["driver_specific"]["lloop"]["read_only"] = read_only.into();
            bdev["claimed"] = claimed.into();
            Device::deserialize(bdev).unwrap()
        };
        let check = |exports: &Exports, device: &Device, read_only| {
            exports.check_shared(device, read_only).map_err(|e| e.to_string())
        };
        let exports = Exports { subsystems: Some(Vec::new()), ..some() };
        assert!(check(&exports, &device("new", false, false), false).is_ok());
        assert!(check(&exports, &device("new", false, true), false).unwrap_err().contains("in use by something else"));
        assert!(
            check(&exports, &device("lloop1", false, false), true).unwrap_err().contains("destroy each other's data")
        );
        assert!(check(&exports, &device("lloop1", true, false), true).is_ok());
        let blk_only = Exports { iscsi: None, ..exports };
        assert!(check(&blk_only, &device("lloop0", false, false), true).is_ok(), "both only read");
        assert!(check(&blk_only, &device("lloop0", false, false), false).is_err());
        assert!(
            check(&some(), &device("lloop0", true, true), true).unwrap_err().contains("lloop unexport lloop0 first")
        );
    }
}
