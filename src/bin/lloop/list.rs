//! `lloop list` and `lloop info`.

use crate::client::Client;
use crate::device::{self, Device};
use crate::error::Result;
use crate::nvmf::{self, ListenAddress, Subsystem};
use crate::output::Report;
use crate::size;
use crate::table::{self, Align};
use serde_json::{Map, Value, json};

/// Lists the devices.
///
/// # Errors
/// As [`Client::call`].
pub fn list(client: &mut Client) -> Result<Report> {
    let devices = device::all(client)?;
    let subsystems = nvmf::subsystems_if_any(client)?;
    Ok(listed(&devices, subsystems.as_deref()))
}

const COLUMNS: [(&str, Align); 8] = [
    ("NAME", Align::Left),
    ("SIZE", Align::Right),
    ("BLOCK", Align::Right),
    ("STATE", Align::Left),
    ("ENGINE", Align::Left),
    ("FS", Align::Left),
    ("FILE", Align::Left),
    ("EXPORTS", Align::Left),
];

fn listed(devices: &[Device], subsystems: Option<&[Subsystem]>) -> Report {
    let nqns = |device: &Device| -> Option<Vec<String>> {
        subsystems.map(|all| nvmf::exports_of(all, &device.name).map(|subsystem| subsystem.nqn.clone()).collect())
    };
    let row = |device: &Device| {
        vec![
            device.name.clone(),
            size::human(device.size_bytes()),
            device.block_bytes.to_string(),
            device.field("state"),
            device.field("engine"),
            device.field("fs"),
            device.field("filename"),
            match nqns(device) {
                None => "?".to_owned(),
                Some(nqns) if nqns.is_empty() => "-".to_owned(),
                Some(nqns) => nqns.join(","),
            },
        ]
    };
    let object = |device: &Device| {
        let mut object = json!({"name": device.name, "size": device.size_bytes(), "block_size": device.block_bytes});
        for key in ["state", "engine", "fs", "filename", "read_only"] {
            object[key] = device.lloop().get(key).cloned().unwrap_or_default();
        }
        object["exports"] = json!(nqns(device));
        object
    };
    Report {
        text: match devices {
            [] => "No devices are attached; lloop attach FILE attaches one.\n".to_owned(),
            devices => table::table(&COLUMNS, &devices.iter().map(row).collect::<Vec<_>>()),
        },
        json: devices.iter().map(object).collect(),
    }
}

/// Shows all there is to know of a device.
///
/// # Errors
/// As [`Client::call`], and when there is no such device.
pub fn info(client: &mut Client, name: &str) -> Result<Report> {
    let device = device::find(client, name)?;
    let subsystems = nvmf::subsystems_if_any(client)?;
    Ok(informed(&device, subsystems.as_deref()))
}

fn informed(device: &Device, subsystems: Option<&[Subsystem]>) -> Report {
    let exports: Option<Vec<&Subsystem>> = subsystems.map(|all| nvmf::exports_of(all, &device.name).collect());
    let io_types: Vec<&str> = device.io_types().collect();
    let shown = match &exports {
        None => "unknown: the target does not tell".to_owned(),
        Some(exports) if exports.is_empty() => "none".to_owned(),
        Some(exports) => exports.iter().map(|export| in_words(export, &device.name)).collect::<Vec<_>>().join("\n"),
    };
    let mut facts = vec![
        ("name".to_owned(), device.name.clone()),
        ("size".to_owned(), size::exact(device.size_bytes())),
        ("block size".to_owned(), device.block_bytes.to_string()),
        ("uuid".to_owned(), device.uuid.to_string()),
    ];
    flatten("", device.lloop(), &mut facts);
    facts.push(("io types".to_owned(), io_types.join(", ")));
    facts.push(("claimed".to_owned(), device.claimed.to_string()));
    facts.push(("exports".to_owned(), shown));

    let mut object = Map::new();
    object.insert("name".to_owned(), device.name.clone().into());
    object.insert("size".to_owned(), device.size_bytes().into());
    object.insert("block_size".to_owned(), device.block_bytes.into());
    object.insert("uuid".to_owned(), device.uuid.to_string().into());
    object.insert("lloop".to_owned(), device.lloop().clone().into());
    object.insert("io_types".to_owned(), json!(io_types));
    object.insert("claimed".to_owned(), device.claimed.into());
    object.insert(
        "exports".to_owned(),
        exports.map(|all| all.iter().map(|export| for_programs(export, &device.name)).collect()).unwrap_or_default(),
    );
    Report { text: table::facts(&facts), json: object.into() }
}

/// Objects in objects become "outer inner"; underscores become spaces.
fn flatten(outer: &str, object: &Map<String, Value>, facts: &mut Vec<(String, String)>) {
    for (key, value) in object {
        let name = if outer.is_empty() { key.replace('_', " ") } else { format!("{outer} {}", key.replace('_', " ")) };
        match value {
            Value::Object(inner) => flatten(&name, inner, facts),
            Value::Array(values) => facts.push((name, values.iter().map(device::text).collect::<Vec<_>>().join(", "))),
            // A newline is for a fact with several lines; in a file's name it is not one.
            value => facts.push((name, table::printable(&device::text(value)))),
        }
    }
}

fn in_words(subsystem: &Subsystem, name: &str) -> String {
    let listeners: Vec<String> = subsystem.listen_addresses.iter().map(ListenAddress::shown).collect();
    let listeners = if listeners.is_empty() { "nowhere".to_owned() } else { listeners.join(", ") };
    let nsid = subsystem.namespace_of(name).map_or(0, |namespace| namespace.nsid);
    format!("{}\n  namespace {nsid}, on {listeners}, for {}", subsystem.nqn, subsystem.hosts_in_words())
}

fn for_programs(subsystem: &Subsystem, name: &str) -> Value {
    json!({
        "nqn": subsystem.nqn,
        "nsid": subsystem.namespace_of(name).map(|namespace| namespace.nsid),
        "listen_addresses": subsystem.listen_addresses,
        "allow_any_host": subsystem.allow_any_host,
        "hosts": subsystem.hosts.iter().map(|host| host.nqn.as_str()).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device, nvmf};
    use serde::Deserialize;

    fn device(name: &str) -> Device {
        Device::deserialize(device::tests::bdev(name)).unwrap()
    }

    #[test]
    fn a_table_of_devices() {
        let report = listed(&[device("lloop0"), device("x")], Some(&nvmf::tests::some()));
        let lines: Vec<&str> = report.text.lines().collect();
        assert_eq!(lines[0], "NAME      SIZE  BLOCK  STATE  ENGINE   FS      FILE           EXPORTS");
        assert_eq!(
            lines[1],
            "lloop0  64 MiB   4096  bound  threads  lustre  /lustre/a.img  nqn.2026-11.io.lloop:lloop0"
        );
        assert!(lines[2].ends_with("  -"));
        assert_eq!(report.json[0]["exports"], json!(["nqn.2026-11.io.lloop:lloop0"]));
        assert_eq!(report.json[1]["size"], 64 << 20);
        let untold = listed(&[device("x")], None);
        assert!(untold.text.ends_with("  ?\n") && untold.json[0]["exports"].is_null());
    }

    #[test]
    fn nothing_attached() {
        let report = listed(&[], None);
        assert!(report.text.contains("lloop attach") && report.json == json!([]));
    }

    #[test]
    fn all_facts() {
        let report = informed(&device("lloop0"), Some(&nvmf::tests::some()));
        for line in [
            "name                    lloop0",
            "size                    67108864 bytes (64 MiB)",
            "filename                /lustre/a.img",
            "direct io align memory  4096",
            "io types                read, write",
            "exports                 nqn.2026-11.io.lloop:lloop0",
            "                          namespace 1, on tcp 127.0.0.1:44321, for nqn.2014-08.org.nvmexpress:uuid:1",
        ] {
            assert!(report.text.lines().any(|l| l == line), "{line} in\n{}", report.text);
        }
        assert_eq!(report.json["lloop"]["fs"], "lustre");
        assert_eq!(report.json["exports"][0]["listen_addresses"][0]["trsvcid"], "44321");
        assert!(informed(&device("y"), None).text.contains("does not tell"));
    }
}
