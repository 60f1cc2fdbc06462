//! vhost controllers, as `vhost_get_controllers` shows them: each is a socket that a virtual machine connects to.

use crate::client::Client;
use crate::error::{Error, METHOD_NOT_FOUND, Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The kernel's limit of a UNIX socket's path.
const MAX_SOCKET_BYTES: usize = 107;

/// A socket's path, made whole.
///
/// # Errors
/// A sentence.
pub fn parse_socket(text: &str) -> Result<PathBuf, String> {
    let path = std::path::absolute(text).map_err(|e| e.to_string())?;
    match path.as_os_str().len() {
        _ if text.ends_with('/') || path.file_name().is_none() => {
            Err("that is a folder, not a socket's path".to_owned())
        }
        1..=MAX_SOCKET_BYTES => Ok(path),
        _ => Err(format!("a socket's path has {MAX_SOCKET_BYTES} bytes at most")),
    }
}

/// A controller.
#[derive(Debug, Clone, Deserialize)]
pub struct Controller {
    /// Its name.
    #[serde(rename = "ctrlr")]
    pub name: String,
    /// Its socket.
    pub socket: PathBuf,
    /// The connections, where the target tells.
    #[serde(default)]
    pub sessions: Option<Vec<Value>>,
    backend_specific: Backend,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Backend {
    block: Option<Block>,
    scsi: Option<Vec<Target>>,
}

/// What a virtio-blk controller serves.
#[derive(Debug, Clone, Deserialize)]
pub struct Block {
    /// No writes.
    #[serde(default, rename = "readonly")]
    pub read_only: bool,
    /// The bdev; none when it went away.
    pub bdev: Option<String>,
}

/// A SCSI target of a virtio-scsi controller.
#[derive(Debug, Clone, Deserialize)]
pub struct Target {
    /// Its number.
    #[serde(rename = "scsi_dev_num")]
    pub number: u32,
    #[serde(default)]
    luns: Vec<Lun>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lun {
    bdev_name: Option<String>,
}

impl Controller {
    /// A virtio-blk controller's disk.
    pub fn block(&self) -> Option<&Block> {
        self.backend_specific.block.as_ref()
    }

    /// A virtio-scsi controller's targets.
    pub fn targets(&self) -> Option<&[Target]> {
        self.backend_specific.scsi.as_deref()
    }

    /// The kind of export it is.
    pub fn kind(&self) -> &'static str {
        match (self.block(), self.targets()) {
            (Some(_), _) => "vhost-blk",
            (None, Some(_)) => "vhost-scsi",
            (None, None) => "vhost",
        }
    }

    /// The SCSI targets that a bdev is.
    pub fn targets_of<'a>(&'a self, bdev_name: &'a str) -> impl Iterator<Item = &'a Target> {
        let is_it = move |lun: &Lun| lun.bdev_name.as_deref() == Some(bdev_name);
        self.targets().unwrap_or_default().iter().filter(move |target| target.luns.iter().any(is_it))
    }

    /// A virtual machine gets this bdev from it.
    pub fn serves(&self, bdev_name: &str) -> bool {
        let as_block = self.block().is_some_and(|block| block.bdev.as_deref() == Some(bdev_name));
        as_block || self.targets_of(bdev_name).next().is_some()
    }

    /// What it serves.
    pub fn in_words(&self) -> String {
        let bdevs: Vec<&str> = match self.block() {
            Some(block) => block.bdev.iter().map(String::as_str).collect(),
            None => {
                let luns = self.targets().unwrap_or_default().iter().flat_map(|target| &target.luns);
                luns.filter_map(|lun| lun.bdev_name.as_deref()).collect()
            }
        };
        let bdevs = if bdevs.is_empty() { "nothing".to_owned() } else { bdevs.join(", ") };
        format!("serves {bdevs} ({})", self.kind())
    }

    /// It is this socket, however the path is written.
    pub fn is_at(&self, socket: &Path) -> bool {
        self.socket.components().eq(socket.components())
    }
}

/// The name of the controller whose socket is at this path, on a target that puts sockets below "/", as lloop_tgt does.
pub fn name_for(socket: &Path) -> String {
    let relative: PathBuf = socket.components().skip(1).collect();
    relative.to_string_lossy().into_owned()
}

/// Reads a reply of `vhost_get_controllers`.
fn read(reply: Value) -> Result<Vec<Controller>> {
    serde_json::from_value(reply)
        .map_err(|e| Error::Failed(format!("vhost_get_controllers describes a controller in an unknown way: {e}")))
}

/// All controllers of the target.
///
/// # Errors
/// As [`Client::call`]; that the target was built without vhost.
pub fn controllers(client: &mut Client) -> Result<Vec<Controller>> {
    match client.call("vhost_get_controllers", Value::Null) {
        Err(Error::Refused { code: METHOD_NOT_FOUND, .. }) => Err(Error::Failed(format!(
            "the target on {} was built without vhost, as it always is with SPDK v20.07, whose vhost can end the target with a crash. \
             Give the virtual machine its disk by lloop export nvmf or iscsi, or use SPDK v24.09 or later",
            client.address()
        ))),
        reply => read(reply?),
    }
}

/// All controllers, for showing: none where the target has no vhost, `None` where it does not tell.
///
/// # Errors
/// Only when the target has gone.
pub fn controllers_if_any(client: &mut Client) -> Result<Option<Vec<Controller>>> {
    match client.call("vhost_get_controllers", Value::Null) {
        Ok(reply) => Ok(read(reply).ok()),
        Err(e) if e.is_unknown_method() => Ok(Some(Vec::new())),
        Err(Error::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::json;

    /// Controllers as SPDK shows them.
    pub fn some() -> Vec<Controller> {
        read(json!([
            {"ctrlr": "run/lloop/blk.sock", "cpumask": "0x1", "delay_base_us": 0, "iops_threshold": 60000, "socket": "/run/lloop/blk.sock",
             "backend_specific": {"block": {"readonly": true, "bdev": "lloop0"}}},
            {"ctrlr": "run/lloop/scsi.sock", "cpumask": "0x1", "socket": "/run/lloop/scsi.sock",
             "sessions": [{"vid": 0, "id": 0, "name": "x", "started": true}],
             "backend_specific": {"scsi": [
                {"scsi_dev_num": 0, "id": 0, "target_name": "Target 0", "luns": [{"id": 0, "bdev_name": "lloop1"}]},
                {"scsi_dev_num": 3, "id": 1, "target_name": "Target 3", "luns": [{"id": 0, "bdev_name": "lloop2"}]}]}},
            {"ctrlr": "run/lloop/gone.sock", "socket": "//run/lloop/gone.sock", "sessions": [],
             "backend_specific": {"block": {"readonly": false, "bdev": null, "transport": "vhost_user_blk"}}},
        ]))
        .unwrap()
    }

    #[test]
    fn what_they_serve() {
        let all = some();
        let serving = |name| all.iter().map(|controller| controller.serves(name)).collect::<Vec<_>>();
        assert_eq!(serving("lloop0"), [true, false, false]);
        assert_eq!(serving("lloop2"), [false, true, false]);
        assert_eq!(all[1].targets_of("lloop2").map(|target| target.number).collect::<Vec<_>>(), [3]);
        assert_eq!(all[1].in_words(), "serves lloop1, lloop2 (vhost-scsi)");
        assert_eq!(all[2].in_words(), "serves nothing (vhost-blk)");
        assert!(all[2].is_at(Path::new("/run/lloop/gone.sock")) && !all[2].is_at(Path::new("/run/lloop/gone")));
    }

    #[test]
    fn paths_of_sockets() {
        assert_eq!(parse_socket("/run/lloop/a.sock").unwrap(), Path::new("/run/lloop/a.sock"));
        assert_eq!(parse_socket("a.sock").unwrap(), std::env::current_dir().unwrap().join("a.sock"));
        for text in ["", "/", "/run/", "/run/..", &format!("/{}", "x".repeat(107))] {
            assert!(parse_socket(text).is_err(), "{text}");
        }
        assert_eq!(name_for(Path::new("/run/lloop/a.sock")), "run/lloop/a.sock");
    }
}
