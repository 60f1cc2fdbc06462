//! `lloop export iscsi`: a device as the one LUN of a target node of its own.

use crate::args;
use crate::client::Client;
use crate::device::{self, Device};
use crate::error::{Error, Result};
use crate::export::carry_out;
use crate::exports::Exports;
use crate::iscsi::{Allowed, Node, State, default_iqn, parse_iqn};
use crate::output::Report;
use crate::plan::Step;
use serde_json::{Value, json};
use std::net::SocketAddr;

/// Commands in flight in a session: what SPDK offers at most.
const QUEUE_DEPTH: u32 = 64;

/// Exports a device over iSCSI.
///
/// # Errors
/// As [`Client::call`]. What the call had created is removed then.
pub fn export(client: &mut Client, command: &args::Iscsi, allowed: &Allowed) -> Result<Report> {
    let device = device::find(client, &command.name)?;
    let iqn = match &command.iqn {
        Some(iqn) => iqn.clone(),
        None => parse_iqn(&default_iqn(&device.name))
            .map_err(|e| Error::Failed(format!("{} makes no iSCSI name ({e}); give one with --iqn", device.name)))?,
    };
    let steps = missing(&State::ask(client)?, &device, &iqn, &command.listen, allowed)?;
    if !steps.is_empty() {
        Exports::gather(client)?.check_shared(&device, device.is_read_only())?;
        carry_out(client, &steps, &device.name)?;
    }
    let listen = command.listen;
    let done = if steps.is_empty() { "is exported already" } else { "is exported" };
    let ip = if listen.ip().is_unspecified() { "ADDRESS-OF-THIS-NODE".to_owned() } else { host(&listen) };
    let port = listen.port();
    let connect = format!(
        "iscsiadm -m discovery -t sendtargets -p {ip}:{port} && iscsiadm -m node -T {iqn} -p {ip}:{port} --login"
    );
    Ok(Report {
        text: format!(
            "{} {done} as {iqn}\n  LUN 0, on {listen}, for {}\nConnect with\n  {connect}\n",
            device.name,
            allowed.in_words()
        ),
        json: json!({
            "name": device.name,
            "type": "iscsi",
            "iqn": iqn,
            "lun": 0,
            "listen": listen.to_string(),
            "initiators": allowed.names,
            "networks": allowed.networks,
            "connect": connect,
            "changed": !steps.is_empty(),
        }),
    })
}

/// As SPDK's RPCs and iscsiadm want it.
fn host(address: &SocketAddr) -> String {
    if address.is_ipv4() { address.ip().to_string() } else { format!("[{}]", address.ip()) }
}

/// What must be done for it, in order: the node comes last, so nobody can log in before it is settled who may.
fn missing(state: &State, device: &Device, iqn: &str, listen: &SocketAddr, allowed: &Allowed) -> Result<Vec<Step>> {
    let name = &device.name;
    let refuse = |message: String| Err(Error::Failed(message));
    if let Some(other) = state.nodes.iter().find(|node| node.serves(name) && node.name != iqn) {
        return refuse(format!(
            "{name} is exported as {} already; lloop unexport iscsi {name} takes that back",
            other.name
        ));
    }
    if let Some(node) = state.nodes.iter().find(|node| node.name == iqn) {
        return match is_same(state, node, name, listen, allowed) {
            Ok(()) => Ok(Vec::new()),
            Err(how) => {
                refuse(format!("{iqn} exists, but {how}; lloop unexport iscsi {name} --iqn {iqn} takes it back"))
            }
        };
    }
    let too_many =
        || Error::Failed("the target has no tag left for another group of addresses or initiators".to_owned());
    let mut steps = Vec::new();
    let portals = match state.portals_at(listen) {
        Some(group) => group.tag,
        None => {
            let tag = State::free_tag(state.portals.iter().map(|group| group.tag)).ok_or_else(too_many)?;
            steps.push(Step {
                call: (
                    "iscsi_create_portal_group",
                    json!({"tag": tag, "portals": [{"host": host(listen), "port": listen.port().to_string()}]}),
                ),
                undo: Some(("iscsi_delete_portal_group", json!({"tag": tag}))),
                failure: format!("cannot listen on {listen}"),
                remedy: "is it an address of this node, and the port free? The target's log says more",
            });
            tag
        }
    };
    let initiators = State::free_tag(state.initiators.iter().map(|group| group.tag)).ok_or_else(too_many)?;
    steps.push(Step {
        call: (
            "iscsi_create_initiator_group",
            json!({"tag": initiators, "initiators": allowed.names, "netmasks": allowed.networks}),
        ),
        undo: Some(("iscsi_delete_initiator_group", json!({"tag": initiators}))),
        failure: format!("cannot make a group of {}", allowed.in_words()),
        remedy: "the target's log says more",
    });
    steps.push(Step {
        call: ("iscsi_create_target_node", node(device, iqn, portals, initiators)),
        undo: None,
        failure: format!("cannot make {name} a LUN of {iqn}"),
        remedy: "is something else using it? The target's log says more",
    });
    Ok(steps)
}

fn node(device: &Device, iqn: &str, portals: i64, initiators: i64) -> Value {
    json!({
        "name": iqn, "alias_name": device.name, "luns": [{"bdev_name": device.name, "lun_id": 0}],
        "pg_ig_maps": [{"pg_tag": portals, "ig_tag": initiators}], "queue_depth": QUEUE_DEPTH, "disable_chap": true,
    })
}

/// The node is what is wanted, or in which way it is not.
fn is_same(state: &State, node: &Node, name: &str, listen: &SocketAddr, allowed: &Allowed) -> Result<(), String> {
    match node.bdevs().as_slice() {
        [bdev] if *bdev == name => {}
        [] => return Err("has no device".to_owned()),
        bdevs => return Err(format!("serves {}", bdevs.join(", "))),
    }
    let addresses = state.addresses(node);
    if addresses != [format!("{}:{}", host(listen), listen.port())] {
        return Err(format!("listens on {}, not {listen}", addresses.join(", ")));
    }
    match state.allowed(node).as_slice() {
        [only] if only == allowed => Ok(()),
        others => {
            let words: Vec<String> = others.iter().map(Allowed::in_words).collect();
            Err(format!("is for {}, not {}", words.join(" and "), allowed.in_words()))
        }
    }
}

/// What takes a node back, with the groups that only it used.
pub fn removal(state: &State, node: &Node) -> Vec<Step> {
    let step = |call, what: &str| Step {
        call,
        undo: None,
        failure: format!("cannot remove {what}"),
        remedy: "the target's log says more",
    };
    let (portals, initiators) = state.unused(&[&node.name]);
    let mut steps = vec![step(("iscsi_delete_target_node", json!({"name": node.name})), &node.name)];
    for tag in portals {
        steps.push(step(("iscsi_delete_portal_group", json!({"tag": tag})), &format!("the portal group {tag}")));
    }
    for tag in initiators {
        steps.push(step(("iscsi_delete_initiator_group", json!({"tag": tag})), &format!("the initiator group {tag}")));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iscsi;
    use serde::Deserialize;

    fn device(name: &str) -> Device {
        Device::deserialize(device::tests::bdev(name)).unwrap()
    }

    fn loopback() -> Allowed {
        Allowed { names: vec!["ANY".into()], networks: vec!["127.0.0.1/32".into()] }
    }

    fn planned(name: &str, iqn: &str, listen: &str, allowed: &Allowed) -> Result<Vec<Step>> {
        missing(&iscsi::tests::some(), &device(name), iqn, &iscsi::parse_listen(listen).unwrap(), allowed)
    }

    #[test]
    fn from_nothing() {
        let steps =
            missing(&State::default(), &device("x"), "iqn.a:x", &"[::1]:3260".parse().unwrap(), &loopback()).unwrap();
        let calls: Vec<_> = steps.iter().map(|step| step.call.clone()).collect();
        assert_eq!(
            calls[0],
            ("iscsi_create_portal_group", json!({"tag": 27648, "portals": [{"host": "[::1]", "port": "3260"}]}))
        );
        assert_eq!(
            calls[1],
            (
                "iscsi_create_initiator_group",
                json!({"tag": 27648, "initiators": ["ANY"], "netmasks": ["127.0.0.1/32"]})
            )
        );
        assert_eq!(calls[2].0, "iscsi_create_target_node");
        assert_eq!(calls[2].1["pg_ig_maps"], json!([{"pg_tag": 27648, "ig_tag": 27648}]));
        let undos: Vec<_> = steps.into_iter().filter_map(|step| step.undo).map(|(method, _)| method).collect();
        assert_eq!(undos, ["iscsi_delete_portal_group", "iscsi_delete_initiator_group"]);
    }

    #[test]
    fn what_is_there_is_used() {
        let iqn = "iqn.2026-11.io.lloop:lloop0";
        assert_eq!(planned("lloop0", iqn, "127.0.0.1", &loopback()).unwrap(), [], "the same again");
        let steps = planned("lloop1", "iqn.2026-11.io.lloop:lloop1", "127.0.0.1", &loopback()).unwrap();
        assert_eq!(steps.len(), 2, "the address is shared");
        assert_eq!(steps[1].call.1["pg_ig_maps"], json!([{"pg_tag": 27648, "ig_tag": 27649}]));
    }

    #[test]
    fn what_cannot_be_had() {
        let refusal =
            |name, iqn, listen, allowed: &Allowed| planned(name, iqn, listen, allowed).unwrap_err().to_string();
        let iqn = "iqn.2026-11.io.lloop:lloop0";
        assert!(
            refusal("lloop0", "iqn.b:2", "127.0.0.1", &loopback()).contains("exported as iqn.2026-11.io.lloop:lloop0")
        );
        assert!(refusal("lloop0", iqn, "127.0.0.1:3261", &loopback()).contains("listens on 127.0.0.1:3260, not"));
        assert!(refusal("lloop1", iqn, "127.0.0.1", &loopback()).contains("serves lloop0"));
        assert!(refusal("lloop1", "iqn.2016-06.io.spdk:other", "127.0.0.1", &loopback()).contains("has no device"));
        let any = Allowed { names: vec!["ANY".into()], networks: vec!["ANY".into()] };
        assert!(
            refusal("lloop0", iqn, "127.0.0.1", &any).contains("is for initiators on 127.0.0.1/32, not any initiator")
        );
    }

    #[test]
    fn back_again() {
        let state = iscsi::tests::some();
        let calls: Vec<_> = removal(&state, &state.nodes[0]).into_iter().map(|step| step.call).collect();
        assert_eq!(
            calls,
            [
                ("iscsi_delete_target_node", json!({"name": "iqn.2026-11.io.lloop:lloop0"})),
                ("iscsi_delete_portal_group", json!({"tag": 27648})),
                ("iscsi_delete_initiator_group", json!({"tag": 27648})),
            ]
        );
        assert_eq!(removal(&state, &state.nodes[1]).len(), 1);
    }
}
