//! `lloop list` and `lloop info`.

use crate::client::Client;
use crate::device::{self, Device};
use crate::error::Result;
use crate::exports::{Exported, Exports};
use crate::layout;
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
    Ok(listed(&devices, &Exports::gather(client)?))
}

const COLUMNS: [(&str, Align); 9] = [
    ("NAME", Align::Left),
    ("SIZE", Align::Right),
    ("BLOCK", Align::Right),
    ("STATE", Align::Left),
    ("ENGINE", Align::Left),
    ("FS", Align::Left),
    ("FILE", Align::Left),
    ("EXPORTS", Align::Left),
    ("CONNECTED", Align::Left),
];

fn listed(devices: &[Device], exports: &Exports) -> Report {
    Report {
        text: match devices {
            [] => "No devices are attached; lloop attach FILE attaches one.\n".to_owned(),
            devices => {
                table::table(&COLUMNS, &devices.iter().flat_map(|device| rows(device, exports)).collect::<Vec<_>>())
            }
        },
        json: devices.iter().map(|device| object(device, exports)).collect(),
    }
}

/// A device, with a line for each of its exports.
fn rows(device: &Device, exports: &Exports) -> Vec<Vec<String>> {
    let mut lines: Vec<[String; 2]> =
        exports.of(&device.name).iter().map(|export| [export.shown(), export.connected_in_words()]).collect();
    match (exports.are_all_told(), lines.is_empty()) {
        (true, true) => lines.push(["-".to_owned(), "-".to_owned()]),
        (true, false) => {}
        (false, _) => lines.push(["?".to_owned(), "?".to_owned()]),
    }
    let mut facts = vec![
        device.name.clone(),
        size::human(device.size_bytes()),
        device.block_bytes.to_string(),
        device.field("state"),
        device.field("engine"),
        device.field("fs"),
        device.field("filename"),
    ];
    let row = |line: [String; 2]| {
        let blank = vec![String::new(); facts.len()];
        let mut row = std::mem::replace(&mut facts, blank);
        row.extend(line);
        row
    };
    lines.into_iter().map(row).collect()
}

fn object(device: &Device, exports: &Exports) -> Value {
    let mut object = json!({"name": device.name, "size": device.size_bytes(), "block_size": device.block_bytes});
    for key in ["state", "engine", "fs", "filename", "read_only"] {
        object[key] = device.lloop().get(key).cloned().unwrap_or_default();
    }
    object["exports"] = for_programs(device, exports);
    object
}

/// Null where the target does not tell.
fn for_programs(device: &Device, exports: &Exports) -> Value {
    let all = exports.of(&device.name);
    if all.is_empty() && !exports.are_all_told() {
        Value::Null
    } else {
        all.into_iter().map(|export| export.json).collect()
    }
}

/// Shows all there is to know of a device.
///
/// # Errors
/// As [`Client::call`], and when there is no such device.
pub fn info(client: &mut Client, name: &str) -> Result<Report> {
    let device = device::find(client, name)?;
    Ok(informed(&device, &Exports::gather(client)?))
}

fn informed(device: &Device, exports: &Exports) -> Report {
    let io_types: Vec<&str> = device.io_types().collect();
    let mut shown: Vec<String> = exports.of(&device.name).iter().map(in_words).collect();
    if !exports.are_all_told() {
        shown.push("unknown: the target does not tell".to_owned());
    } else if shown.is_empty() {
        shown.push("none".to_owned());
    }
    let mut facts = vec![
        ("name".to_owned(), device.name.clone()),
        ("size".to_owned(), size::exact(device.size_bytes())),
        ("block size".to_owned(), device.block_bytes.to_string()),
        ("uuid".to_owned(), device.uuid.to_string()),
    ];
    flatten("", device.lloop(), &mut facts);
    facts.push(("io types".to_owned(), io_types.join(", ")));
    facts.push(("claimed".to_owned(), device.claimed.to_string()));
    facts.push(("exports".to_owned(), shown.join("\n")));

    let mut object = Map::new();
    object.insert("name".to_owned(), device.name.clone().into());
    object.insert("size".to_owned(), device.size_bytes().into());
    object.insert("block_size".to_owned(), device.block_bytes.into());
    object.insert("uuid".to_owned(), device.uuid.to_string().into());
    object.insert("lloop".to_owned(), device.lloop().clone().into());
    object.insert("io_types".to_owned(), json!(io_types));
    object.insert("claimed".to_owned(), device.claimed.into());
    object.insert("exports".to_owned(), for_programs(device, exports));
    Report { text: table::facts(&facts), json: object.into() }
}

/// Objects in objects become "outer inner"; underscores become spaces.
fn flatten(outer: &str, object: &Map<String, Value>, facts: &mut Vec<(String, String)>) {
    for (key, value) in object {
        let name = if outer.is_empty() { key.replace('_', " ") } else { format!("{outer} {}", key.replace('_', " ")) };
        match value {
            Value::Object(inner) if key == "layout" => facts.push((name, layout::in_words(inner))),
            Value::Object(inner) => flatten(&name, inner, facts),
            Value::Null => {}
            Value::Array(values) => facts.push((name, values.iter().map(device::text).collect::<Vec<_>>().join(", "))),
            // A newline is for a fact with several lines; in a file's name it is not one.
            value => facts.push((name, table::printable(&device::text(value)))),
        }
    }
}

fn in_words(export: &Exported) -> String {
    let connected = match export.connected.as_deref() {
        None => "cannot be told".to_owned(),
        Some([]) => "nobody".to_owned(),
        Some(who) => who.join(", "),
    };
    format!("{}\n  {}\n  connected: {connected}", export.shown(), export.words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device, exports};
    use serde::Deserialize;

    fn device(name: &str) -> Device {
        Device::deserialize(device::tests::bdev(name)).unwrap()
    }

    #[test]
    fn a_table_of_devices() {
        let report = listed(&[device("lloop0"), device("x")], &exports::tests::some());
        let lines: Vec<&str> = report.text.lines().collect();
        let column = lines[0].find("EXPORTS").unwrap();
        assert_eq!(&lines[0][..column], "NAME      SIZE  BLOCK  STATE  ENGINE   FS      FILE           ");
        assert_eq!(&lines[1][..column], "lloop0  64 MiB   4096  bound  threads  lustre  /lustre/a.img  ");
        let words = |at: usize| lines[at][column..].split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(1), "nqn.2026-11.io.lloop:lloop0 on tcp 127.0.0.1:44321 nqn.h:1");
        assert_eq!(words(2), "vhost-blk on /run/lloop/blk.sock ?");
        assert_eq!(words(3), "iqn.2026-11.io.lloop:lloop0 on 127.0.0.1:3260 127.0.0.1");
        assert!(lines[2].starts_with("   ") && lines.len() == 5);
        assert_eq!(words(4), "- -");
        assert_eq!(report.json[0]["exports"][0]["nqn"], "nqn.2026-11.io.lloop:lloop0");
        assert_eq!((&report.json[1]["size"], &report.json[1]["exports"]), (&json!(64 << 20), &json!([])));
        let untold = listed(&[device("x")], &Exports::default());
        assert!(untold.text.trim_end().ends_with('?') && untold.json[0]["exports"].is_null());
    }

    #[test]
    fn nothing_attached() {
        let report = listed(&[], &Exports::default());
        assert!(report.text.contains("lloop attach") && report.json == json!([]));
    }

    #[test]
    fn all_facts() {
        let report = informed(&device("lloop0"), &exports::tests::some());
        for line in [
            "name                    lloop0",
            "size                    67108864 bytes (64 MiB)",
            "filename                /lustre/a.img",
            "direct io align memory  4096",
            "io types                read, write",
            "exports                 nqn.2026-11.io.lloop:lloop0 on tcp 127.0.0.1:44321",
            "                          namespace 1, for nqn.2014-08.org.nvmexpress:uuid:1",
            "                          connected: nqn.h:1",
        ] {
            assert!(report.text.lines().any(|l| l == line), "{line} in\n{}", report.text);
        }
        assert_eq!(report.json["lloop"]["fs"], "lustre");
        assert_eq!(report.json["exports"][0]["listen_addresses"][0]["trsvcid"], "44321");
        assert!(informed(&device("y"), &Exports::default()).text.contains("does not tell"));
    }
}
