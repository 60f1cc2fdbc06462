//! NVMe-oF subsystems, as `nvmf_get_subsystems` shows them.

use crate::client::Client;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};

/// A subsystem.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Subsystem {
    /// Its name.
    pub nqn: String,
    subtype: String,
    /// Where it listens.
    pub listen_addresses: Vec<ListenAddress>,
    /// Every host may connect.
    pub allow_any_host: bool,
    /// These may.
    pub hosts: Vec<Host>,
    /// Its serial number.
    pub serial_number: String,
    /// Its namespaces.
    pub namespaces: Vec<Namespace>,
}

/// Where a subsystem listens.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct ListenAddress {
    trtype: String,
    adrfam: String,
    traddr: String,
    trsvcid: String,
}

/// A host that may connect.
#[derive(Debug, Clone, Deserialize)]
pub struct Host {
    /// Its name.
    pub nqn: String,
}

/// A namespace.
#[derive(Debug, Clone, Deserialize)]
pub struct Namespace {
    /// Its number.
    pub nsid: u32,
    /// The bdev behind it.
    pub bdev_name: String,
}

impl Subsystem {
    /// Holds namespaces; a discovery subsystem does not.
    pub fn is_nvme(&self) -> bool {
        self.subtype.eq_ignore_ascii_case("nvme")
    }

    /// The namespace of a bdev.
    pub fn namespace_of(&self, bdev_name: &str) -> Option<&Namespace> {
        self.namespaces.iter().find(|namespace| namespace.bdev_name == bdev_name)
    }

    /// It listens there, over TCP.
    pub fn listens_on(&self, address: &SocketAddr) -> bool {
        self.listen_addresses.iter().any(|listener| {
            listener.trtype.eq_ignore_ascii_case("tcp")
                && listener.traddr.parse::<IpAddr>().is_ok_and(|ip| ip == address.ip())
                && listener.trsvcid.parse() == Ok(address.port())
        })
    }

    /// The host is on its list.
    pub fn lists_host(&self, nqn: &str) -> bool {
        self.hosts.iter().any(|host| host.nqn == nqn)
    }

    /// Who may connect.
    pub fn hosts_in_words(&self) -> String {
        match (self.allow_any_host, self.hosts.as_slice()) {
            (true, _) => "any host".to_owned(),
            (false, []) => "no host".to_owned(),
            (false, hosts) => hosts.iter().map(|host| host.nqn.as_str()).collect::<Vec<_>>().join(", "),
        }
    }

    /// The lowest number without a namespace.
    pub fn free_nsid(&self) -> u32 {
        (1..).find(|nsid| self.namespaces.iter().all(|namespace| namespace.nsid != *nsid)).unwrap_or(1)
    }
}

impl ListenAddress {
    /// "tcp 10.0.0.5:4420"
    pub fn shown(&self) -> String {
        let Self { trtype, traddr, trsvcid, .. } = self;
        let address = if traddr.contains(':') && !trsvcid.is_empty() { format!("[{traddr}]") } else { traddr.clone() };
        let port = if trsvcid.is_empty() { String::new() } else { format!(":{trsvcid}") };
        format!("{} {address}{port}", trtype.to_lowercase())
    }
}

/// The subsystem of a device, unless another is asked for.
pub fn default_nqn(device: &str) -> String {
    format!("nqn.2026-11.io.lloop:{device}")
}

/// Those that have a namespace of this bdev.
pub fn exports_of<'a>(subsystems: &'a [Subsystem], bdev_name: &'a str) -> impl Iterator<Item = &'a Subsystem> {
    subsystems.iter().filter(move |subsystem| subsystem.namespace_of(bdev_name).is_some())
}

/// Reads a reply of `nvmf_get_subsystems`.
fn read(reply: Value) -> Result<Vec<Subsystem>> {
    serde_json::from_value(reply)
        .map_err(|e| Error::Failed(format!("nvmf_get_subsystems describes a subsystem in an unknown way: {e}")))
}

/// All subsystems of the target.
///
/// # Errors
/// As [`Client::call`].
pub fn subsystems(client: &mut Client) -> Result<Vec<Subsystem>> {
    read(client.call("nvmf_get_subsystems", Value::Null)?)
}

/// All subsystems, for showing: none where the target has no NVMe-oF, `None` where it does not tell.
///
/// # Errors
/// Only when the target has gone.
pub fn subsystems_if_any(client: &mut Client) -> Result<Option<Vec<Subsystem>>> {
    match client.call("nvmf_get_subsystems", Value::Null) {
        Ok(reply) => Ok(read(reply).ok()),
        Err(e) if e.is_unknown_method() => Ok(Some(Vec::new())),
        Err(Error::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The names of the hosts that are connected to a subsystem; `None` where the target does not tell (SPDK v20.07, the last
/// resort).
///
/// # Errors
/// Only when the target has gone.
pub fn connected_hosts(client: &mut Client, nqn: &str) -> Result<Option<Vec<String>>> {
    match client.call("nvmf_subsystem_get_controllers", json!({"nqn": nqn})) {
        Ok(reply) => {
            let hosts = reply.as_array().into_iter().flatten().filter_map(|controller| controller["hostnqn"].as_str());
            let mut hosts: Vec<String> = hosts.map(str::to_owned).collect();
            hosts.sort_unstable();
            hosts.dedup();
            Ok(Some(hosts))
        }
        Err(Error::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Subsystems as SPDK shows them, an old release and a new one.
    pub fn some() -> Vec<Subsystem> {
        read(json!([
            {"nqn": "nqn.2014-08.org.nvmexpress.discovery", "subtype": "Discovery", "listen_addresses": [], "allow_any_host": true, "hosts": []},
            {"nqn": "nqn.2026-11.io.lloop:lloop0", "subtype": "NVMe",
             "listen_addresses": [{"transport": "TCP", "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "44321"}],
             "allow_any_host": false, "hosts": [{"nqn": "nqn.2014-08.org.nvmexpress:uuid:1"}], "serial_number": "S", "model_number": "lloop",
             "namespaces": [{"nsid": 1, "bdev_name": "lloop0", "name": "lloop0", "uuid": "68ab7c9d-7abe-53db-8420-013c7fe22d1e"}]},
            {"nqn": "nqn.2026-11.io.lloop:many", "subtype": "NVMe", "passthrough": false, "min_cntlid": 1, "wzsl": 0,
             "listen_addresses": [{"trtype": "TCP", "adrfam": "IPv6", "traddr": "::1", "trsvcid": "44321"},
                                  {"trtype": "VFIOUSER", "traddr": "/run/x"}],
             "allow_any_host": true, "hosts": [],
             "namespaces": [{"nsid": 1, "bdev_name": "lloop1", "anagrpid": 1}, {"nsid": 7, "bdev_name": "lloop2"}]},
        ]))
        .unwrap()
    }

    #[test]
    fn lookups() {
        let all = some();
        let nqns = |name| exports_of(&all, name).map(|s| s.nqn.clone()).collect::<Vec<_>>();
        assert_eq!(nqns("lloop0"), ["nqn.2026-11.io.lloop:lloop0"]);
        assert_eq!(nqns("lloop2"), ["nqn.2026-11.io.lloop:many"]);
        assert!(nqns("lloop").is_empty());
        assert_eq!(all[2].namespace_of("lloop2").map(|n| n.nsid), Some(7));
        assert_eq!([all[0].free_nsid(), all[1].free_nsid(), all[2].free_nsid()], [1, 2, 2]);
        assert_eq!(all[2].hosts_in_words(), "any host");
        assert_eq!([all[0].is_nvme(), all[1].is_nvme()], [false, true]);
        assert!(
            all[1].lists_host("nqn.2014-08.org.nvmexpress:uuid:1")
                && !all[1].lists_host("nqn.2014-08.org.nvmexpress:uuid:2")
        );
    }

    #[test]
    fn listeners() {
        let all = some();
        let listens = |at: usize, text: &str| all[at].listens_on(&text.parse().unwrap());
        assert!(listens(1, "127.0.0.1:44321") && !listens(1, "127.0.0.1:44322") && !listens(1, "127.0.0.2:44321"));
        assert!(listens(2, "[::1]:44321") && !listens(0, "[::1]:44321"));
        let shown: Vec<String> = all[2].listen_addresses.iter().map(ListenAddress::shown).collect();
        assert_eq!(shown, ["tcp [::1]:44321", "vfiouser /run/x"]);
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        assert!(read(json!([{"namespaces": 3}])).unwrap_err().to_string().contains("nvmf_get_subsystems"));
    }
}
