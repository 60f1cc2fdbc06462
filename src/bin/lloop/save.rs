//! `lloop save`: what the target is and has, in a file that brings it back at the next start.

use crate::client::Client;
use crate::error::{Error, Result, reason};
use crate::output::Report;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Saves the configuration of every part of the target. The file is replaced as a whole, or stays as it was.
///
/// # Errors
/// As [`Client::call`], and when the file cannot be written.
pub fn save(client: &mut Client, file: &Path) -> Result<Report> {
    let config = config(client)?;
    let shown = file.display();
    replace(file, format!("{config:#}\n").as_bytes())
        .map_err(|e| Error::Failed(format!("cannot save to {shown}: {}", reason(&e))))?;
    let devices = devices(&config);
    let s = if devices == 1 { "" } else { "s" };
    Ok(Report {
        text: format!("{shown}: {devices} device{s}; lloop_tgt --config {shown} brings it back\n"),
        json: json!({"filename": file.to_string_lossy(), "devices": devices}),
    })
}

/// In the order that SPDK starts its parts in, as its own client's save_config does.
fn config(client: &mut Client) -> Result<Value> {
    let list = client.call("framework_get_subsystems", Value::Null)?;
    let mut subsystems = Vec::new();
    for name in list.as_array().into_iter().flatten().filter_map(|subsystem| subsystem["subsystem"].as_str()) {
        let config = client.call("framework_get_config", json!({"name": name}))?;
        subsystems.push(json!({"subsystem": name, "config": config}));
    }
    if subsystems.is_empty() {
        return Err(Error::Failed("the target tells of no subsystems; nothing is saved".to_owned()));
    }
    Ok(json!({"subsystems": subsystems}))
}

fn devices(config: &Value) -> usize {
    let subsystems = config["subsystems"].as_array().into_iter().flatten();
    let methods = subsystems.filter_map(|subsystem| subsystem["config"].as_array()).flatten();
    methods.filter(|method| method["method"] == "bdev_lloop_create").count()
}

/// A new file beside the old one, on stable storage before it takes its place. It may hold secrets (iSCSI's, for example), so
/// it is its owner's alone.
fn replace(file: &Path, content: &[u8]) -> io::Result<()> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let Some(name) = file.file_name() else { return Err(io::Error::other("that is no name of a file")) };
    let mut new = name.to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let new = folder.join(new);
    let written = (|| {
        let mut options = OpenOptions::new();
        let mut out = options.write(true).create_new(true).mode(0o600).open(&new)?;
        out.write_all(content)?;
        out.sync_all()?;
        fs::rename(&new, file)?;
        File::open(folder)?.sync_all()
    })();
    if let Err(e) = &written
        && e.kind() != io::ErrorKind::AlreadyExists
    {
        // (Where it was never made, or has its new name already, there is nothing to remove.)
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        fs::write(&file, "old and longer").unwrap();
        replace(&file, b"new").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(replace(&dir.path().join("missing/x"), b"y").is_err());
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(replace(&dir.path().join("folder"), b"y").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside it");
    }

    #[test]
    fn devices_are_counted() {
        let config = json!({"subsystems": [{"subsystem": "bdev", "config": [{"method": "bdev_lloop_create"}, {"method": "x"}]},
                                           {"subsystem": "sock", "config": null}]});
        assert_eq!(devices(&config), 1);
    }
}
