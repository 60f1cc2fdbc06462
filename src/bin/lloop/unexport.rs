//! `lloop unexport`

use crate::args::Unexport;
use crate::client::Client;
use crate::device;
use crate::error::{Error, Result};
use crate::export::carry_out;
use crate::exports::Exports;
use crate::iscsi::{self, default_iqn};
use crate::nvmf::{Subsystem, default_nqn};
use crate::output::Report;
use crate::plan::Step;
use crate::vhost::Controller;
use crate::{iscsi_export, vhost_export};
use serde_json::json;
use std::path::Path;

/// Which exports of a device to take back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    /// All of them.
    All,
    /// From subsystems, or one of them.
    Nvmf(Option<&'a str>),
    /// From sockets of a kind, or one of them.
    Vhost(&'static str, Option<&'a Path>),
    /// From iSCSI targets, or one of them.
    Iscsi(Option<&'a str>),
}

impl<'a> Which<'a> {
    /// What the command line says: of which device, and which.
    pub fn chosen(name: Option<&'a str>, nqn: Option<&'a str>, kind: Option<&'a Unexport>) -> (&'a str, Which<'a>) {
        match kind {
            Some(Unexport::Nvmf { name, nqn }) => (name, Which::Nvmf(nqn.as_deref())),
            Some(Unexport::VhostScsi(command)) => {
                (&command.name, Which::Vhost("vhost-scsi", command.socket.as_deref()))
            }
            Some(Unexport::VhostBlk(command)) => (&command.name, Which::Vhost("vhost-blk", command.socket.as_deref())),
            Some(Unexport::Iscsi { name, iqn }) => (name, Which::Iscsi(iqn.as_deref())),
            None if nqn.is_some() => (name.unwrap_or_default(), Which::Nvmf(nqn)),
            None => (name.unwrap_or_default(), Which::All),
        }
    }

    fn in_words(&self) -> String {
        match self {
            Which::All => String::new(),
            Which::Nvmf(Some(name)) | Which::Iscsi(Some(name)) => format!(" as {name}"),
            Which::Nvmf(None) => " over NVMe-oF".to_owned(),
            Which::Iscsi(None) => " over iSCSI".to_owned(),
            Which::Vhost(kind, None) => format!(" by {kind}"),
            Which::Vhost(kind, Some(socket)) => format!(" by {kind} on {}", socket.display()),
        }
    }
}

/// Takes a device out of what exports it.
///
/// # Errors
/// When it is not exported, and as [`Client::call`].
pub fn unexport(client: &mut Client, name: &str, which: &Which) -> Result<Report> {
    // A device that was detached by force leaves empty exports behind: it need not be there any more.
    device::find_if_any(client, name)?;
    let exports = Exports::gather(client)?;
    let removals = removals(&exports, name, which);
    if removals.is_empty() {
        return Err(Error::Failed(format!("{name} is not exported{}", which.in_words())));
    }
    check_idle(&exports, name, &removals)?;
    for removal in &removals {
        carry_out(client, &removal.steps, name)?;
    }
    let names: Vec<&str> = removals.iter().map(|removal| removal.name.as_str()).collect();
    Ok(Report {
        text: format!("{name} is no longer exported as {}\n", names.join(", ")),
        json: json!({"name": name, "unexported": names}),
    })
}

#[derive(Debug, PartialEq)]
struct Removal {
    name: String,
    steps: Vec<Step>,
}

/// A controller cannot go while a virtual machine is connected, and its disk should not go half-way.
fn check_idle(exports: &Exports, name: &str, removals: &[Removal]) -> Result<()> {
    let deletes = |removal: &Removal| removal.steps.iter().any(|step| step.call.0 == "vhost_delete_controller");
    for removal in removals.iter().filter(|removal| deletes(removal)) {
        let connected =
            exports.of(name).into_iter().find(|export| export.name == removal.name).and_then(|e| e.connected);
        if connected.is_some_and(|who| !who.is_empty()) {
            return Err(Error::Failed(format!(
                "a virtual machine is connected to {}, and {name} is its disk; end it first",
                removal.name
            )));
        }
    }
    Ok(())
}

fn removals(exports: &Exports, name: &str, which: &Which) -> Vec<Removal> {
    let mut all = Vec::new();
    if let Which::All | Which::Nvmf(_) = which {
        let nqn = if let Which::Nvmf(nqn) = which { *nqn } else { None };
        let subsystems = exports.subsystems.iter().flatten();
        let of_interest =
            subsystems.filter(|subsystem| subsystem.is_nvme() && nqn.is_none_or(|nqn| nqn == subsystem.nqn));
        all.extend(of_interest.filter_map(|subsystem| from_subsystem(subsystem, name, nqn)));
    }
    if let Which::All | Which::Vhost(..) = which {
        all.extend(
            exports.controllers.iter().flatten().filter_map(|controller| from_controller(controller, name, which)),
        );
    }
    if let (Which::All | Which::Iscsi(_), Some(state)) = (which, &exports.iscsi) {
        let iqn = if let Which::Iscsi(iqn) = which { *iqn } else { None };
        all.extend(state.nodes.iter().filter_map(|node| from_node(state, node, name, iqn)));
    }
    all
}

/// A subsystem goes with its last namespace.
fn from_subsystem(subsystem: &Subsystem, name: &str, nqn: Option<&str>) -> Option<Removal> {
    let own = subsystem.nqn == nqn.map_or_else(|| default_nqn(name), str::to_owned);
    let call = match (subsystem.namespace_of(name), subsystem.namespaces.len()) {
        (Some(_), 1) => ("nvmf_delete_subsystem", json!({"nqn": subsystem.nqn})),
        (Some(namespace), _) => ("nvmf_subsystem_remove_ns", json!({"nqn": subsystem.nqn, "nsid": namespace.nsid})),
        (None, 0) if own => ("nvmf_delete_subsystem", json!({"nqn": subsystem.nqn})),
        _ => return None,
    };
    let step = Step {
        call,
        undo: None,
        failure: format!("cannot take {name} out of {}", subsystem.nqn),
        remedy: "the target's log says more",
    };
    Some(Removal { name: subsystem.nqn.clone(), steps: vec![step] })
}

/// A controller goes with its last device; one without any only when it is named, for it does not tell whose it was.
fn from_controller(controller: &Controller, name: &str, which: &Which) -> Option<Removal> {
    let steps = match which {
        Which::Vhost(kind, _) if *kind != controller.kind() => None,
        Which::Vhost(_, Some(socket)) if !controller.is_at(socket) => None,
        Which::Vhost(_, Some(_)) => {
            vhost_export::removal(controller, name).or_else(|| vhost_export::removal_of_empty(controller))
        }
        _ => vhost_export::removal(controller, name),
    }?;
    Some(Removal { name: controller.socket.display().to_string(), steps })
}

fn from_node(state: &iscsi::State, node: &iscsi::Node, name: &str, iqn: Option<&str>) -> Option<Removal> {
    let bdevs = node.bdevs();
    let is_left_over = bdevs.is_empty() && node.name == iqn.map_or_else(|| default_iqn(name), str::to_owned);
    // A node with more LUNs is none of ours: SPDK cannot take a single one away.
    let is_its = bdevs == [name] && iqn.is_none_or(|iqn| iqn == node.name);
    (is_its || is_left_over).then(|| Removal { name: node.name.clone(), steps: iscsi_export::removal(state, node) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Call;
    use crate::{exports, nvmf};
    use std::slice;

    fn calls(exports: &Exports, name: &str, which: &Which) -> Vec<Call> {
        removals(exports, name, which).into_iter().flat_map(|removal| removal.steps).map(|step| step.call).collect()
    }

    fn nvmf_calls(subsystems: &[Subsystem], name: &str, nqn: Option<&str>) -> Vec<Call> {
        let mut exports = Exports::default();
        exports.subsystems = Some(subsystems.to_vec());
        calls(&exports, name, &Which::Nvmf(nqn))
    }

    #[test]
    fn a_subsystem_goes_with_its_last_namespace() {
        let all = nvmf::tests::some();
        let only = ("nvmf_delete_subsystem", json!({"nqn": "nqn.2026-11.io.lloop:lloop0"}));
        assert_eq!(nvmf_calls(&all, "lloop0", None), slice::from_ref(&only));
        assert_eq!(nvmf_calls(&all, "lloop0", Some("nqn.2026-11.io.lloop:lloop0")), [only]);
        let one = ("nvmf_subsystem_remove_ns", json!({"nqn": "nqn.2026-11.io.lloop:many", "nsid": 7}));
        assert_eq!(nvmf_calls(&all, "lloop2", None), [one]);
        assert!(nvmf_calls(&all, "lloop0", Some("nqn.2026-11.io.lloop:many")).is_empty());
        assert!(nvmf_calls(&all, "lloop9", None).is_empty());
        assert!(nvmf_calls(&all, "lloop0", Some("nqn.2014-08.org.nvmexpress.discovery")).is_empty());
    }

    #[test]
    fn an_empty_one_is_left_over() {
        let mut all = nvmf::tests::some();
        all[1].namespaces.clear();
        let left = ("nvmf_delete_subsystem", json!({"nqn": "nqn.2026-11.io.lloop:lloop0"}));
        assert_eq!(nvmf_calls(&all, "lloop0", None), slice::from_ref(&left));
        assert!(nvmf_calls(&all, "lloop1", None).iter().all(|call| *call != left), "not that of another device");
        assert_eq!(nvmf_calls(&all, "x", Some("nqn.2026-11.io.lloop:lloop0")), [left]);
    }

    #[test]
    fn of_every_kind_or_one() {
        let all = exports::tests::some();
        let methods = |name, which: &Which| calls(&all, name, which).into_iter().map(|call| call.0).collect::<Vec<_>>();
        let iscsi = ["iscsi_delete_target_node", "iscsi_delete_portal_group", "iscsi_delete_initiator_group"];
        let every = [&["nvmf_delete_subsystem", "vhost_delete_controller"][..], &iscsi].concat();
        assert_eq!(methods("lloop0", &Which::All), every);
        assert_eq!(methods("lloop0", &Which::Iscsi(None)), iscsi);
        assert!(methods("lloop0", &Which::Iscsi(Some("iqn.x:y"))).is_empty());
        assert_eq!(methods("lloop0", &Which::Vhost("vhost-blk", None)), ["vhost_delete_controller"]);
        assert!(methods("lloop0", &Which::Vhost("vhost-scsi", None)).is_empty());
        let gone = Path::new("/run/lloop/gone.sock");
        assert_eq!(methods("lloop0", &Which::Vhost("vhost-blk", Some(gone))), ["vhost_delete_controller"]);
        assert!(methods("lloop9", &Which::All).is_empty(), "a controller without a device could be anybody's");
    }

    #[test]
    fn a_running_machine_keeps_its_disk() {
        let mut all = exports::tests::some();
        let which = Which::Vhost("vhost-scsi", None);
        assert!(check_idle(&all, "lloop2", &removals(&all, "lloop2", &which)).is_ok(), "one of several can go");
        let mut controllers = vhost_controllers_with_one_disk();
        controllers.truncate(1);
        all.controllers = Some(controllers);
        let refusal = check_idle(&all, "lloop1", &removals(&all, "lloop1", &which)).unwrap_err().to_string();
        assert!(refusal.contains("/run/s") && refusal.contains("end it first"), "{refusal}");
    }

    fn vhost_controllers_with_one_disk() -> Vec<Controller> {
        serde_json::from_value(
            json!([{"ctrlr": "run/s", "socket": "/run/s", "sessions": [{"vid": 0}], "backend_specific":
            {"scsi": [{"scsi_dev_num": 0, "luns": [{"bdev_name": "lloop1"}]}]}}]),
        )
        .unwrap()
    }
}
