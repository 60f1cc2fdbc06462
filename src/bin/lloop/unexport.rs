//! `lloop unexport`

use crate::client::Client;
use crate::device;
use crate::error::{Error, Result};
use crate::nvmf::{self, Subsystem, default_nqn};
use crate::output::Report;
use serde_json::{Value, json};

/// Takes a device out of the subsystems that export it, or out of one of them.
///
/// # Errors
/// When it is not exported, and as [`Client::call`].
pub fn unexport(client: &mut Client, name: &str, nqn: Option<&str>) -> Result<Report> {
    // A device that was detached by force leaves an empty subsystem behind: it need not be there any more.
    device::find_if_any(client, name)?;
    let removals = removals(&nvmf::subsystems(client)?, name, nqn);
    if removals.is_empty() {
        let by = nqn.map(|nqn| format!(" as {nqn}")).unwrap_or_default();
        return Err(Error::Failed(format!("{name} is not exported{by}")));
    }
    for removal in &removals {
        client.call(removal.method, removal.params.clone()).map_err(|e| {
            e.explain(&format!("cannot take {name} out of {}", removal.nqn), "the target's log says more")
        })?;
    }
    let nqns: Vec<&str> = removals.iter().map(|removal| removal.nqn.as_str()).collect();
    Ok(Report {
        text: format!("{name} is no longer exported as {}\n", nqns.join(", ")),
        json: json!({"name": name, "unexported": nqns}),
    })
}

#[derive(Debug, PartialEq)]
struct Removal {
    nqn: String,
    method: &'static str,
    params: Value,
}

/// A subsystem goes with its last namespace.
fn removals(subsystems: &[Subsystem], name: &str, nqn: Option<&str>) -> Vec<Removal> {
    let of_interest =
        subsystems.iter().filter(|subsystem| subsystem.is_nvme() && nqn.is_none_or(|nqn| nqn == subsystem.nqn));
    let removal = |subsystem: &Subsystem| {
        let own = subsystem.nqn == nqn.map_or_else(|| default_nqn(name), str::to_owned);
        match (subsystem.namespace_of(name), subsystem.namespaces.len()) {
            (Some(_), 1) => Some(("nvmf_delete_subsystem", json!({"nqn": subsystem.nqn}))),
            (Some(namespace), _) => {
                Some(("nvmf_subsystem_remove_ns", json!({"nqn": subsystem.nqn, "nsid": namespace.nsid})))
            }
            (None, 0) if own => Some(("nvmf_delete_subsystem", json!({"nqn": subsystem.nqn}))),
            _ => None,
        }
        .map(|(method, params)| Removal { nqn: subsystem.nqn.clone(), method, params })
    };
    of_interest.filter_map(removal).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::slice;

    fn calls(subsystems: &[Subsystem], name: &str, nqn: Option<&str>) -> Vec<(&'static str, Value)> {
        removals(subsystems, name, nqn).into_iter().map(|removal| (removal.method, removal.params)).collect()
    }

    #[test]
    fn a_subsystem_goes_with_its_last_namespace() {
        let all = nvmf::tests::some();
        let only = ("nvmf_delete_subsystem", json!({"nqn": "nqn.2026-11.io.lloop:lloop0"}));
        assert_eq!(calls(&all, "lloop0", None), slice::from_ref(&only));
        assert_eq!(calls(&all, "lloop0", Some("nqn.2026-11.io.lloop:lloop0")), [only]);
        let one = ("nvmf_subsystem_remove_ns", json!({"nqn": "nqn.2026-11.io.lloop:many", "nsid": 7}));
        assert_eq!(calls(&all, "lloop2", None), [one]);
        assert!(calls(&all, "lloop0", Some("nqn.2026-11.io.lloop:many")).is_empty());
        assert!(calls(&all, "lloop9", None).is_empty());
        assert!(calls(&all, "lloop0", Some("nqn.2014-08.org.nvmexpress.discovery")).is_empty());
    }

    #[test]
    fn an_empty_one_is_left_over() {
        let mut all = nvmf::tests::some();
        all[1].namespaces.clear();
        let left = ("nvmf_delete_subsystem", json!({"nqn": "nqn.2026-11.io.lloop:lloop0"}));
        assert_eq!(calls(&all, "lloop0", None), slice::from_ref(&left));
        assert!(calls(&all, "lloop1", None).iter().all(|call| *call != left), "not that of another device");
        assert_eq!(calls(&all, "x", Some("nqn.2026-11.io.lloop:lloop0")), [left]);
    }
}
