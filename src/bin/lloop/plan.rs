//! What is missing of an export: the steps from what is there to what shall be.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::export::{Hosts, MAX_SERIAL_BYTES};
use crate::listen;
use crate::nvmf::{self, Subsystem};
use serde_json::{Value, json};
use std::net::SocketAddr;

/// A method and its parameters.
pub type Call = (&'static str, Value);

/// One change of the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What does it.
    pub call: Call,
    /// What takes it back. Nothing where an earlier step's undoing does it as well.
    pub undo: Option<Call>,
    /// What did not work, when it does not.
    pub failure: String,
    /// What may help.
    pub remedy: &'static str,
}

/// An export as it shall be.
pub struct Wanted<'a> {
    /// The device.
    pub device: &'a Device,
    /// The subsystem.
    pub nqn: &'a str,
    /// Who may connect.
    pub hosts: &'a Hosts,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The serial number, if it matters.
    pub serial: Option<&'a str>,
}

impl Wanted<'_> {
    /// What must be done for it, in order: nobody may connect before it is settled who may.
    ///
    /// # Errors
    /// What is there already stands against it.
    pub fn missing(&self, subsystems: &[Subsystem], transports: &Value) -> Result<Vec<Step>> {
        let found = subsystems.iter().find(|subsystem| subsystem.nqn == self.nqn);
        self.check(subsystems, found)?;
        let mut steps = Vec::new();
        let is_tcp =
            |transport: &Value| transport["trtype"].as_str().is_some_and(|name| name.eq_ignore_ascii_case("tcp"));
        if !transports.as_array().into_iter().flatten().any(is_tcp) {
            steps.push(Step {
                call: ("nvmf_create_transport", json!({"trtype": "TCP"})),
                // SPDK has no call that removes a transport. One without listeners does nothing.
                undo: None,
                failure: "NVMe/TCP cannot be set up".to_owned(),
                remedy: "has the target enough memory (lloop_tgt -s)? Its log says more",
            });
        }
        let is_new = found.is_none();
        let empty = Subsystem::default();
        let subsystem = found.unwrap_or(&empty);
        if is_new {
            steps.push(self.create_subsystem());
        }
        // Deleting a new subsystem takes back all that follows.
        let undo = |method, params| (!is_new).then_some((method, params));
        if subsystem.namespace_of(&self.device.name).is_none() {
            steps.push(self.add_namespace(subsystem.free_nsid(), &undo));
        }
        steps.extend(self.allow_hosts(subsystem, is_new, &undo));
        if !subsystem.listens_on(&self.listen) {
            steps.push(Step {
                call: (
                    "nvmf_subsystem_add_listener",
                    json!({"nqn": self.nqn, "listen_address": listen::listen_address(&self.listen)}),
                ),
                // The last step: nothing can fail behind it.
                undo: None,
                failure: format!("cannot listen on {}", self.listen),
                remedy: "is it an address of this node, and the port free? The target's log says more",
            });
        }
        Ok(steps)
    }

    /// What cannot be had beside that which is there.
    fn check(&self, subsystems: &[Subsystem], found: Option<&Subsystem>) -> Result<()> {
        let (name, nqn) = (&self.device.name, self.nqn);
        let refuse = |message: String| Err(Error::Failed(message));
        if let Some(other) = nvmf::exports_of(subsystems, name).find(|subsystem| subsystem.nqn != nqn) {
            return refuse(format!(
                "{name} is exported as {} already; lloop unexport {name} takes that back",
                other.nqn
            ));
        }
        if self.device.claimed && found.is_none_or(|subsystem| subsystem.namespace_of(name).is_none()) {
            return refuse(format!("{name} is in use by something else in the target, which has it for itself"));
        }
        let Some(found) = found else { return Ok(()) };
        if !found.is_nvme() {
            return refuse(format!("{nqn} is a discovery subsystem, which has no namespaces"));
        }
        if let Some(serial) = self.serial.filter(|serial| *serial != found.serial_number) {
            return refuse(format!("{nqn} exists with the serial number {}, not {serial}", found.serial_number));
        }
        // Whoever lists hosts means to keep others out.
        if *self.hosts != Hosts::Any && found.allow_any_host {
            return refuse(format!(
                "{nqn} exists and lets every host connect; lloop unexport {name} first, or say --allow-any-host"
            ));
        }
        self.check_hosts(found)
    }

    /// Every host of a subsystem gets all its namespaces: hosts that differ would get each other's devices.
    fn check_hosts(&self, found: &Subsystem) -> Result<()> {
        let (name, nqn) = (&self.device.name, self.nqn);
        let others: Vec<&str> = found
            .namespaces
            .iter()
            .map(|namespace| namespace.bdev_name.as_str())
            .filter(|other| other != name)
            .collect();
        let is_in = found.namespace_of(name).is_some();
        let newcomers: Vec<&str> = match self.hosts {
            Hosts::Any if !found.allow_any_host => vec!["any host"],
            Hosts::Any => Vec::new(),
            Hosts::These(hosts) => hosts.iter().filter(|host| !found.lists_host(host)).map(String::as_str).collect(),
        };
        let unnamed: Vec<&str> = match self.hosts {
            Hosts::These(hosts) if !is_in => found
                .hosts
                .iter()
                .map(|host| host.nqn.as_str())
                .filter(|host| hosts.iter().all(|h| h != host))
                .collect(),
            _ => Vec::new(),
        };
        let consequence = if !newcomers.is_empty() && !others.is_empty() {
            format!("{} would get {} as well", newcomers.join(", "), others.join(", "))
        } else if !unnamed.is_empty() {
            format!("{} would get {name} as well", unnamed.join(", "))
        } else {
            return Ok(());
        };
        Err(Error::Failed(format!(
            "{nqn} exists for {}: {consequence}, since a host gets everything in a subsystem. Name the same hosts, or use a subsystem of its own (--nqn)",
            found.hosts_in_words()
        )))
    }

    fn create_subsystem(&self) -> Step {
        let uuid = self.device.uuid.simple().to_string();
        let serial = self.serial.unwrap_or(&uuid[..MAX_SERIAL_BYTES]);
        Step {
            call: (
                "nvmf_create_subsystem",
                json!({
                    "nqn": self.nqn, "serial_number": serial, "model_number": "lloop",
                    "allow_any_host": *self.hosts == Hosts::Any,
                }),
            ),
            undo: Some(("nvmf_delete_subsystem", json!({"nqn": self.nqn}))),
            failure: format!("cannot create the subsystem {}", self.nqn),
            remedy: "the target's log says more",
        }
    }

    fn add_namespace(&self, nsid: u32, undo: &dyn Fn(&'static str, Value) -> Option<Call>) -> Step {
        let (nqn, Device { name, uuid, .. }) = (self.nqn, self.device);
        let mut namespace = json!({"nsid": nsid, "bdev_name": name});
        // Hosts know the device again by these, on whichever path they find it.
        if !uuid.is_nil() {
            namespace["uuid"] = uuid.to_string().into();
            namespace["nguid"] = format!("{:X}", uuid.simple()).into();
        }
        Step {
            call: ("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": namespace})),
            undo: undo("nvmf_subsystem_remove_ns", json!({"nqn": nqn, "nsid": nsid})),
            failure: format!("cannot make {name} a namespace of {nqn}"),
            remedy: "is something else using it? The target's log says more",
        }
    }

    fn allow_hosts(
        &self,
        subsystem: &Subsystem,
        is_new: bool,
        undo: &dyn Fn(&'static str, Value) -> Option<Call>,
    ) -> Vec<Step> {
        let nqn = self.nqn;
        match self.hosts {
            // A new one was created with it.
            Hosts::Any if is_new || subsystem.allow_any_host => Vec::new(),
            Hosts::Any => vec![Step {
                call: ("nvmf_subsystem_allow_any_host", json!({"nqn": nqn, "allow_any_host": true})),
                undo: undo("nvmf_subsystem_allow_any_host", json!({"nqn": nqn, "allow_any_host": false})),
                failure: format!("cannot open {nqn} to every host"),
                remedy: "the target's log says more",
            }],
            Hosts::These(hosts) => {
                let mut new: Vec<&String> = hosts.iter().filter(|host| !subsystem.lists_host(host)).collect();
                new.sort_unstable();
                new.dedup();
                let step = |host: &String| Step {
                    call: ("nvmf_subsystem_add_host", json!({"nqn": nqn, "host": host})),
                    undo: undo("nvmf_subsystem_remove_host", json!({"nqn": nqn, "host": host})),
                    failure: format!("cannot open {nqn} to the host {host}"),
                    remedy: "is it a valid NQN? The target's log says more",
                };
                new.into_iter().map(step).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use serde::Deserialize;

    const NQN: &str = "nqn.2026-11.io.lloop:lloop0";
    const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:1";

    fn device(name: &str) -> Device {
        Device::deserialize(device::tests::bdev(name)).unwrap()
    }

    /// What is done for an export of `device` on a target that has [`nvmf::tests::some`] and TCP.
    fn planned(device: &Device, nqn: &str, hosts: &Hosts, listen: &str, serial: Option<&str>) -> Result<Vec<Step>> {
        let wanted = Wanted { device, nqn, hosts, listen: listen.parse().unwrap(), serial };
        wanted.missing(&nvmf::tests::some(), &json!([{"trtype": "RDMA"}, {"trtype": "TCP"}]))
    }

    fn refusal(device: &Device, nqn: &str, hosts: &Hosts, serial: Option<&str>) -> String {
        planned(device, nqn, hosts, "127.0.0.1:44321", serial).unwrap_err().to_string()
    }

    fn these(hosts: &[&str]) -> Hosts {
        Hosts::These(hosts.iter().map(|host| (*host).to_owned()).collect())
    }

    #[test]
    fn from_nothing() {
        let (device, hosts) = (device("lloop0"), these(&[HOST]));
        let wanted =
            Wanted { device: &device, nqn: NQN, hosts: &hosts, listen: "[::1]:44321".parse().unwrap(), serial: None };
        let steps = wanted.missing(&[], &json!([])).unwrap();
        let calls: Vec<Call> = steps.iter().map(|step| step.call.clone()).collect();
        assert_eq!(
            calls,
            [
                ("nvmf_create_transport", json!({"trtype": "TCP"})),
                (
                    "nvmf_create_subsystem",
                    json!({"nqn": NQN, "serial_number": "68ab7c9d7abe53db8420", "model_number": "lloop", "allow_any_host": false})
                ),
                (
                    "nvmf_subsystem_add_ns",
                    json!({"nqn": NQN, "namespace": {"nsid": 1, "bdev_name": "lloop0", "uuid": "68ab7c9d-7abe-53db-8420-013c7fe22d1e",
                        "nguid": "68AB7C9D7ABE53DB8420013C7FE22D1E"}})
                ),
                ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": HOST})),
                (
                    "nvmf_subsystem_add_listener",
                    json!({"nqn": NQN, "listen_address": {"trtype": "TCP", "adrfam": "IPv6", "traddr": "::1", "trsvcid": "44321"}})
                ),
            ]
        );
        let undos: Vec<Call> = steps.into_iter().filter_map(|step| step.undo).collect();
        assert_eq!(undos, [("nvmf_delete_subsystem", json!({"nqn": NQN}))], "one takes all back");
    }

    #[test]
    fn what_is_there_is_used() {
        let steps = planned(&device("lloop0"), NQN, &these(&[HOST]), "127.0.0.1:44321", Some("S")).unwrap();
        assert_eq!(steps, [], "the same again");
        let steps = planned(&device("lloop0"), NQN, &Hosts::Any, "127.0.0.1:44322", None).unwrap();
        assert_eq!(
            steps.iter().map(|step| step.call.0).collect::<Vec<_>>(),
            ["nvmf_subsystem_allow_any_host", "nvmf_subsystem_add_listener"]
        );
        assert_eq!(
            steps[0].undo,
            Some(("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": false})))
        );
        // Those who may connect already, and no more: nothing to do.
        let subset = planned(&device("lloop0"), NQN, &these(&[]), "127.0.0.1:44321", None).unwrap();
        assert_eq!(subset, []);
        // A second device in a subsystem of several.
        let many = "nqn.2026-11.io.lloop:many";
        let steps = planned(&device("lloop3"), many, &Hosts::Any, "[::1]:44321", None).unwrap();
        assert_eq!((steps.len(), &steps[0].call.1["namespace"]["nsid"]), (1, &json!(2)));
        assert_eq!(steps[0].undo, Some(("nvmf_subsystem_remove_ns", json!({"nqn": many, "nsid": 2}))));
        // More hosts, each once.
        let steps =
            planned(&device("lloop0"), NQN, &these(&[HOST, "nqn.b:2", "nqn.b:2"]), "127.0.0.1:44321", None).unwrap();
        assert_eq!(steps.len(), 1);
        assert_eq!(steps[0].undo, Some(("nvmf_subsystem_remove_host", json!({"nqn": NQN, "host": "nqn.b:2"}))));
    }

    #[test]
    fn hosts_do_not_get_each_others_devices() {
        let mut subsystems = nvmf::tests::some();
        let refusal = |subsystems: &[Subsystem], name: &str, hosts: &Hosts| {
            let device = device(name);
            let listen = "127.0.0.1:44321".parse().unwrap();
            let wanted = Wanted { device: &device, nqn: NQN, hosts, listen, serial: None };
            wanted.missing(subsystems, &json!([{"trtype": "TCP"}])).err().map(|e| e.to_string())
        };
        let other = "nqn.2014-08.org.nvmexpress:uuid:2";
        // The subsystem has lloop0, for HOST.
        let error = refusal(&subsystems, "lloop5", &these(&[other])).unwrap();
        assert!(error.contains(other) && error.contains("would get lloop0") && error.contains("--nqn"), "{error}");
        assert!(refusal(&subsystems, "lloop5", &these(&[HOST, other])).unwrap().contains("would get lloop0"));
        assert!(refusal(&subsystems, "lloop5", &Hosts::Any).unwrap().contains("any host would get lloop0"));
        assert_eq!(refusal(&subsystems, "lloop5", &these(&[HOST])), None, "the lists agree");
        assert_eq!(refusal(&subsystems, "lloop0", &these(&[other])), None, "one more host for the only device");
        // With two devices a further host would get both.
        subsystems[1].namespaces.push(nvmf::Namespace { nsid: 2, bdev_name: "lloop5".into() });
        assert!(refusal(&subsystems, "lloop0", &these(&[other])).unwrap().contains("would get lloop5"));
        assert_eq!(refusal(&subsystems, "lloop0", &these(&[HOST])), None);
        // An empty one that was left behind still has its list.
        subsystems[1].namespaces.clear();
        assert!(refusal(&subsystems, "lloop5", &these(&[other])).unwrap().contains("would get lloop5"));
        assert_eq!(refusal(&subsystems, "lloop5", &these(&[HOST, other])), None);
    }

    #[test]
    fn what_cannot_be_had() {
        let lloop0 = device("lloop0");
        assert!(
            refusal(&lloop0, "nqn.2026-11.io.lloop:x", &Hosts::Any, None)
                .contains("exported as nqn.2026-11.io.lloop:lloop0 already")
        );
        assert!(refusal(&lloop0, NQN, &Hosts::Any, Some("T")).contains("serial number S, not T"));
        assert!(refusal(&device("lloop1"), "nqn.2026-11.io.lloop:many", &these(&[HOST]), None).contains("every host"));
        assert!(refusal(&device("x"), "nqn.2014-08.org.nvmexpress.discovery", &Hosts::Any, None).contains("discovery"));
        let mut claimed = device("x");
        claimed.claimed = true;
        assert!(refusal(&claimed, "nqn.2026-11.io.lloop:x", &Hosts::Any, None).contains("in use by something else"));
        claimed.name = "lloop0".into();
        assert_eq!(
            planned(&claimed, NQN, &these(&[HOST]), "127.0.0.1:44321", None).unwrap(),
            [],
            "claimed by this export"
        );
    }
}
