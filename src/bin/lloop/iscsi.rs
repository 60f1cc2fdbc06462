//! iSCSI target nodes, portal groups and initiator groups, as the target shows them.

use crate::args;
use crate::client::Client;
use crate::error::{Error, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

/// iSCSI's port where none is said.
const DEFAULT_PORT: u16 = 3260;
/// The longest name of the iSCSI specification.
const MAX_NAME_BYTES: usize = 223;
/// Tags of the groups that are made here. Groups with other tags are somebody else's: they are used, never removed.
const OWN_TAGS: Range<i64> = 0x6c00..0x6d00;
/// SPDK's word for every initiator and every address.
const ANY: &str = "ANY";

/// An address with a port, or without.
///
/// # Errors
/// A sentence with examples.
pub fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    crate::listen::parse_with(text, DEFAULT_PORT, "say an IP address and a port, like 10.0.0.5:3260 or [fd00::5]:3260")
}

/// An iSCSI name. The target checks the rest.
///
/// # Errors
/// A sentence.
pub fn parse_iqn(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.:".contains(c);
    match text {
        _ if text.len() > MAX_NAME_BYTES => Err(format!("an iSCSI name has {MAX_NAME_BYTES} bytes at most")),
        _ if !is_iscsi_name(text) || (text.starts_with("iqn.") && !text.contains(':')) => {
            Err("no iSCSI name; they are like iqn.2026-11.io.lloop:disk0".to_owned())
        }
        _ if !text.chars().all(is_plain) => {
            Err("an iSCSI name has small letters, digits, dots, colons and dashes only".to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

fn is_iscsi_name(text: &str) -> bool {
    ["iqn.", "eui.", "naa."].iter().any(|prefix| text.starts_with(prefix))
}

/// Somebody who may log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Initiator {
    /// By name, which it claims.
    Name(String),
    /// By address: as SPDK writes a network.
    Network(String),
}

/// An initiator's name, address or network.
///
/// # Errors
/// A sentence.
pub fn parse_initiator(text: &str) -> Result<Initiator, String> {
    if is_iscsi_name(text) {
        return parse_iqn(text).map(Initiator::Name);
    }
    let fail = || format!("{text:?} is no address (10.0.0.7), network (10.0.0.0/24, fd00::/64) or iSCSI name (iqn...)");
    let (ip, bits) = text.split_once('/').map_or((text, None), |(ip, bits)| (ip, Some(bits)));
    let ip: IpAddr = ip.trim_matches(['[', ']']).parse().map_err(|_| fail())?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    let bits: u8 = bits.map_or(Ok(most), str::parse).map_err(|_| fail())?;
    if !(1..=most).contains(&bits) { Err(fail()) } else { Ok(Initiator::Network(network(&ip, bits))) }
}

fn network(ip: &IpAddr, bits: u8) -> String {
    if ip.is_ipv4() { format!("{ip}/{bits}") } else { format!("[{ip}]/{bits}") }
}

/// Who may log in: both a name and a network have to fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Names.
    pub names: Vec<String>,
    /// Networks.
    pub networks: Vec<String>,
}

impl Allowed {
    /// What the command line says. Where it listens on loopback, nothing need be said.
    ///
    /// # Errors
    /// [`Error::Usage`]
    pub fn chosen(command: &args::Iscsi) -> Result<Allowed> {
        let any = || vec![ANY.to_owned()];
        let mut names: Vec<String> = Vec::new();
        let mut networks: Vec<String> = Vec::new();
        for initiator in &command.allow_initiator {
            match initiator {
                Initiator::Name(name) => names.push(name.clone()),
                Initiator::Network(network) => networks.push(network.clone()),
            }
        }
        if command.allow_any {
            networks = any();
        } else if networks.is_empty() {
            let ip = command.listen.ip();
            networks = match (ip.is_loopback(), names.is_empty()) {
                (true, _) => vec![network(&ip, if ip.is_ipv4() { 32 } else { 128 })],
                (false, false) => any(),
                (false, true) => {
                    return Err(Error::Usage(
                        "say who may log in: --allow-initiator with an address, a network or an initiator's name for each, or --allow-any \
                         for everyone who reaches the address"
                            .to_owned(),
                    ));
                }
            };
        }
        if names.is_empty() {
            names = any();
        }
        for list in [&mut names, &mut networks] {
            list.sort_unstable();
            list.dedup();
        }
        Ok(Allowed { names, networks })
    }

    /// In words.
    pub fn in_words(&self) -> String {
        let list = |list: &[String]| (list != [ANY]).then(|| list.join(", "));
        match (list(&self.names), list(&self.networks)) {
            (None, None) => "any initiator".to_owned(),
            (None, Some(networks)) => format!("initiators on {networks}"),
            (Some(names), None) => names,
            (Some(names), Some(networks)) => format!("{names} on {networks}"),
        }
    }
}

/// A target node.
#[derive(Debug, Clone, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    #[serde(default, rename = "pg_ig_maps")]
    pub maps: Vec<Map>,
    #[serde(default)]
    luns: Vec<Lun>,
}

/// Where a node can be reached, and by whom.
#[derive(Debug, Clone, Deserialize)]
pub struct Map {
    /// A portal group's tag.
    #[serde(rename = "pg_tag")]
    pub portals: i64,
    /// An initiator group's tag.
    #[serde(rename = "ig_tag")]
    pub initiators: i64,
}

#[derive(Debug, Clone, Deserialize)]
struct Lun {
    bdev_name: Option<String>,
}

impl Node {
    /// The bdev is one of its LUNs.
    pub fn serves(&self, bdev_name: &str) -> bool {
        self.luns.iter().any(|lun| lun.bdev_name.as_deref() == Some(bdev_name))
    }

    /// What it serves.
    pub fn bdevs(&self) -> Vec<&str> {
        self.luns.iter().filter_map(|lun| lun.bdev_name.as_deref()).collect()
    }
}

/// A group of addresses.
#[derive(Debug, Clone, Deserialize)]
pub struct Portals {
    /// Its tag.
    pub tag: i64,
    portals: Vec<Portal>,
}

#[derive(Debug, Clone, Deserialize)]
struct Portal {
    host: String,
    port: String,
}

impl Portal {
    fn is_at(&self, address: &SocketAddr) -> bool {
        let host = self.host.trim_matches(['[', ']']).parse::<IpAddr>();
        host.is_ok_and(|ip| ip == address.ip()) && self.port.parse() == Ok(address.port())
    }
}

/// A group of initiators.
#[derive(Debug, Clone, Deserialize)]
pub struct Initiators {
    /// Its tag.
    pub tag: i64,
    initiators: Vec<String>,
    netmasks: Vec<String>,
}

impl Initiators {
    /// Who is in it.
    pub fn allowed(&self) -> Allowed {
        let sorted = |list: &[String]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list
        };
        Allowed { names: sorted(&self.initiators), networks: sorted(&self.netmasks) }
    }
}

#[derive(Debug, Clone, Deserialize)]
struct Connection {
    #[serde(default)]
    initiator_addr: String,
    #[serde(default)]
    target_node_name: String,
}

/// All there is of iSCSI in a target.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Target nodes.
    pub nodes: Vec<Node>,
    /// Groups of addresses.
    pub portals: Vec<Portals>,
    /// Groups of initiators.
    pub initiators: Vec<Initiators>,
    connections: Option<Vec<Connection>>,
}

impl State {
    /// Asks the target.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn ask(client: &mut Client) -> Result<State> {
        Ok(State {
            nodes: read(client, "iscsi_get_target_nodes")?,
            portals: read(client, "iscsi_get_portal_groups")?,
            initiators: read(client, "iscsi_get_initiator_groups")?,
            connections: read(client, "iscsi_get_connections").ok(),
        })
    }

    /// Asks for showing: nothing where the target has no iSCSI, `None` where it does not tell.
    ///
    /// # Errors
    /// Only when the target has gone.
    pub fn ask_if_any(client: &mut Client) -> Result<Option<State>> {
        match State::ask(client) {
            Ok(state) => Ok(Some(state)),
            Err(e) if e.is_unknown_method() => Ok(Some(State::default())),
            Err(Error::Refused { .. } | Error::Unknown(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The addresses that a node can be reached at, as "10.0.0.5:3260".
    pub fn addresses(&self, node: &Node) -> Vec<String> {
        let mut tags: Vec<i64> = node.maps.iter().map(|map| map.portals).collect();
        tags.sort_unstable();
        tags.dedup();
        let groups = self.portals.iter().filter(|group| tags.contains(&group.tag));
        groups.flat_map(|group| &group.portals).map(|portal| format!("{}:{}", portal.host, portal.port)).collect()
    }

    /// Who may log in to a node.
    pub fn allowed(&self, node: &Node) -> Vec<Allowed> {
        let is_mapped = |group: &&Initiators| node.maps.iter().any(|map| map.initiators == group.tag);
        self.initiators.iter().filter(is_mapped).map(Initiators::allowed).collect()
    }

    /// The addresses of those who are logged in to a node; `None` where the target does not tell.
    pub fn connected(&self, node: &Node) -> Option<Vec<String>> {
        // SPDK shows what is behind the first colon only.
        let short = node.name.split_once(':').map_or("", |(_, short)| short);
        let is_its = |c: &&Connection| c.target_node_name == node.name || c.target_node_name == short;
        let all = self.connections.as_ref()?.iter().filter(is_its);
        let mut addresses: Vec<String> = all.map(|connection| connection.initiator_addr.clone()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Some(addresses)
    }

    /// The group of just this address.
    pub fn portals_at(&self, address: &SocketAddr) -> Option<&Portals> {
        self.portals.iter().find(|group| matches!(group.portals.as_slice(), [portal] if portal.is_at(address)))
    }

    /// A tag of ours that is not in use yet.
    pub fn free_tag(taken: impl Iterator<Item = i64>) -> Option<i64> {
        let taken: Vec<i64> = taken.collect();
        OWN_TAGS.into_iter().find(|tag| !taken.contains(tag))
    }

    /// The groups of ours that no node uses when those of `gone` are no more: portal groups' tags and initiator groups'.
    pub fn unused(&self, gone: &[&str]) -> (Vec<i64>, Vec<i64>) {
        let maps: Vec<&Map> =
            self.nodes.iter().filter(|node| !gone.contains(&node.name.as_str())).flat_map(|node| &node.maps).collect();
        let is_own = |tag: &i64| OWN_TAGS.contains(tag);
        let portals = self.portals.iter().map(|group| group.tag);
        let initiators = self.initiators.iter().map(|group| group.tag);
        (
            portals.filter(is_own).filter(|tag| maps.iter().all(|map| map.portals != *tag)).collect(),
            initiators.filter(is_own).filter(|tag| maps.iter().all(|map| map.initiators != *tag)).collect(),
        )
    }
}

/// The node of a device, unless another is asked for.
pub fn default_iqn(device: &str) -> String {
    format!("iqn.2026-11.io.lloop:{}", device.to_ascii_lowercase())
}

fn read<T: DeserializeOwned>(client: &mut Client, method: &str) -> Result<T> {
    describe(method, client.call(method, Value::Null)?)
}

fn describe<T: DeserializeOwned>(method: &str, reply: Value) -> Result<T> {
    serde_json::from_value(reply)
        .map_err(|e| Error::Unknown(format!("{method} describes its objects in an unknown way: {e}")))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::args::{Args, Command, Export};
    use serde_json::json;

    /// iSCSI as SPDK shows it.
    pub fn some() -> State {
        State {
            nodes: describe("nodes", json!([
                {"name": "iqn.2026-11.io.lloop:lloop0", "pg_ig_maps": [{"pg_tag": 27648, "ig_tag": 27648}],
                 "luns": [{"bdev_name": "lloop0", "lun_id": 0}], "queue_depth": 64, "disable_chap": true},
                {"name": "iqn.2016-06.io.spdk:other", "alias_name": "x", "pg_ig_maps": [{"pg_tag": 1, "ig_tag": 2}], "luns": []},
            ]))
            .unwrap(),
            portals: describe("portals", json!([
                {"tag": 27648, "portals": [{"host": "127.0.0.1", "port": "3260"}], "private": false},
                {"tag": 1, "portals": [{"host": "[::1]", "port": "3261"}]},
            ]))
            .unwrap(),
            initiators: describe("initiators", json!([
                {"tag": 27648, "initiators": ["ANY"], "netmasks": ["127.0.0.1/32"]},
                {"tag": 2, "initiators": ["iqn.b:2", "iqn.a:1"], "netmasks": ["ANY"]},
            ]))
            .unwrap(),
            connections: describe("connections", json!([
                {"id": 0, "cid": 0, "tsih": 1, "initiator_addr": "127.0.0.1", "target_addr": "127.0.0.1", "target_node_name": "lloop0"},
                {"id": 1, "cid": 0, "tsih": 2, "initiator_addr": "127.0.0.1", "target_addr": "127.0.0.1", "target_node_name": "lloop0"},
            ]))
            .unwrap(),
        }
    }

    #[test]
    fn lookups() {
        let state = some();
        let [node, other] = state.nodes.as_slice() else { panic!() };
        assert!(node.serves("lloop0") && !node.serves("lloop1") && other.bdevs().is_empty());
        assert_eq!(state.addresses(node), ["127.0.0.1:3260"]);
        assert_eq!(state.addresses(other), ["[::1]:3261"]);
        assert_eq!(state.connected(node), Some(vec!["127.0.0.1".to_owned()]));
        assert_eq!(state.connected(other), Some(Vec::new()));
        assert_eq!(state.allowed(node)[0].in_words(), "initiators on 127.0.0.1/32");
        assert_eq!(state.allowed(other)[0].in_words(), "iqn.a:1, iqn.b:2");
        let at = |text| state.portals_at(&parse_listen(text).unwrap()).map(|group| group.tag);
        assert_eq!([at("127.0.0.1"), at("[::1]:3261"), at("[::1]")], [Some(27648), Some(1), None]);
        assert_eq!(State::free_tag([27648, 1].into_iter()), Some(27649));
        assert_eq!(State::free_tag(OWN_TAGS), None);
        assert_eq!(state.unused(&[]), (vec![], vec![]), "what others made is not ours to remove");
        assert_eq!(state.unused(&["iqn.2026-11.io.lloop:lloop0"]), (vec![27648], vec![27648]));
    }

    #[test]
    fn who_may_log_in() {
        let of =
            |line: &str| match Args::read(format!("lloop export iscsi d {line}").split_whitespace()).unwrap().command {
                Command::Export(Export::Iscsi(command)) => Allowed::chosen(&command).map(|allowed| allowed.in_words()),
                other => panic!("{other:?}"),
            };
        for (line, words) in [
            ("", "initiators on 127.0.0.1/32"),
            ("--listen [::1]", "initiators on [::1]/128"),
            ("--allow-any", "any initiator"),
            ("--listen 10.0.0.5 --allow-any", "any initiator"),
            (
                "--listen 10.0.0.5 --allow-initiator 10.0.0.0/24 --allow-initiator fd00::7",
                "initiators on 10.0.0.0/24, [fd00::7]/128",
            ),
            ("--listen 10.0.0.5 --allow-initiator iqn.1993-08.org.debian:01:x", "iqn.1993-08.org.debian:01:x"),
            ("--allow-initiator iqn.1993-08.org.debian:01:x", "iqn.1993-08.org.debian:01:x on 127.0.0.1/32"),
        ] {
            assert_eq!(of(line).unwrap(), words, "{line}");
        }
        assert!(matches!(of("--listen 10.0.0.5"), Err(Error::Usage(_))));
    }

    #[test]
    fn names_and_addresses() {
        for text in ["iqn.2026-11.io.lloop:disk0", "eui.02004567a425678d"] {
            assert!(parse_iqn(text).is_ok(), "{text}");
        }
        for text in ["", "disk0", "iqn.2026-11.io.lloop", "iqn.2026-11.io.lloop:Disk", "iqn.2026-11.io.lloop:a b"] {
            assert!(parse_iqn(text).is_err(), "{text}");
        }
        for text in ["", "me", "10.0.0.0/33", "10.0.0.0/0", "10.0.0/8", "fd00::/129", "10.0.0.0/x"] {
            assert!(parse_initiator(text).is_err(), "{text}");
        }
        assert_eq!(parse_listen("[::1]").unwrap().port(), 3260);
    }
}
