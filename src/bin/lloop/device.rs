//! lloop devices, as `bdev_get_bdevs` shows them.

use crate::client::Client;
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A lloop device.
#[derive(Debug, Clone, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Logical block size.
    #[serde(rename = "block_size")]
    pub block_bytes: u64,
    /// How many of them.
    pub num_blocks: u64,
    /// Its UUID.
    #[serde(default)]
    pub uuid: uuid::Uuid,
    /// Something in the target has it for itself.
    #[serde(default)]
    pub claimed: bool,
    #[serde(default)]
    supported_io_types: Map<String, Value>,
    driver_specific: DriverSpecific,
}

#[derive(Debug, Clone, Deserialize)]
struct DriverSpecific {
    lloop: Map<String, Value>,
}

impl Device {
    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.num_blocks.saturating_mul(self.block_bytes)
    }

    /// What lloop says of it.
    pub fn lloop(&self) -> &Map<String, Value> {
        &self.driver_specific.lloop
    }

    /// It takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.lloop().get("read_only") == Some(&Value::Bool(true))
    }

    /// One of these, as text.
    pub fn field(&self, key: &str) -> String {
        self.lloop().get(key).map_or_else(|| "-".to_owned(), text)
    }

    /// What can be done with it: "read", "write", ...
    pub fn io_types(&self) -> impl Iterator<Item = &str> {
        self.supported_io_types.iter().filter(|(_, yes)| **yes == Value::Bool(true)).map(|(name, _)| name.as_str())
    }
}

/// A value as text: strings without their quotes.
pub fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Those bdevs that are lloop's, by name in the order of numbers: lloop2 before lloop10.
fn of_lloop(bdevs: &Value) -> Result<Vec<Device>> {
    let is_lloop = |bdev: &&Value| bdev["driver_specific"]["lloop"].is_object();
    let bdevs = bdevs.as_array().into_iter().flatten().filter(is_lloop);
    let devices: std::result::Result<Vec<Device>, _> = bdevs.map(Device::deserialize).collect();
    let mut devices =
        devices.map_err(|e| Error::Failed(format!("bdev_get_bdevs describes a device in an unknown way: {e}")))?;
    devices.sort_by_cached_key(|device| by_number(&device.name));
    Ok(devices)
}

fn by_number(name: &str) -> (String, u64, String) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.to_owned(), name[stem.len()..].parse().unwrap_or(0), name.to_owned())
}

/// All lloop devices of the target.
///
/// # Errors
/// As [`Client::call`].
pub fn all(client: &mut Client) -> Result<Vec<Device>> {
    of_lloop(&client.call("bdev_get_bdevs", Value::Null)?)
}

/// The device of this name.
///
/// # Errors
/// When there is none, naming those there are.
pub fn find(client: &mut Client, name: &str) -> Result<Device> {
    let bdevs = client.call("bdev_get_bdevs", Value::Null)?;
    of_lloop(&bdevs)?.into_iter().find(|device| device.name == name).ok_or_else(|| missing(&bdevs, name))
}

/// The device of this name; `None` where nothing has the name.
///
/// # Errors
/// When the name belongs to a bdev that is not lloop's.
pub fn find_if_any(client: &mut Client, name: &str) -> Result<Option<Device>> {
    let bdevs = client.call("bdev_get_bdevs", Value::Null)?;
    match of_lloop(&bdevs)?.into_iter().find(|device| device.name == name) {
        None if has(&bdevs, name) => Err(missing(&bdevs, name)),
        device => Ok(device),
    }
}

/// The `group_id` that a device was attached with: others may have its file, too. None for one of its own.
///
/// # Errors
/// Only when the target has gone.
pub fn shared_group(client: &mut Client, name: &str) -> Result<Option<u64>> {
    let config = match client.call("framework_get_config", json!({"name": "bdev"})) {
        Ok(config) => config,
        Err(Error::Refused { .. }) => return Ok(None),
        Err(e) => return Err(e),
    };
    let ours = |call: &&Value| call["method"] == "bdev_lloop_create" && call["params"]["name"] == name;
    Ok(config.as_array().into_iter().flatten().find(ours).and_then(|call| call["params"]["group_id"].as_u64()))
}

fn has(bdevs: &Value, name: &str) -> bool {
    bdevs.as_array().into_iter().flatten().any(|bdev| bdev["name"] == name)
}

fn missing(bdevs: &Value, name: &str) -> Error {
    if has(bdevs, name) {
        return Error::Failed(format!("{name} is a block device of the target, but none of lloop's"));
    }
    let names: Vec<String> = of_lloop(bdevs).unwrap_or_default().into_iter().map(|device| device.name).collect();
    Error::Failed(match names.as_slice() {
        [] => format!("there is no device {name} (none is attached)"),
        names => format!("there is no device {name} (attached: {})", names.join(", ")),
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A device as SPDK v20.07 shows it.
    pub fn bdev(name: &str) -> Value {
        json!({
            "name": name, "aliases": [], "product_name": "lloop", "block_size": 4096, "num_blocks": 16384,
            "uuid": "68ab7c9d-7abe-53db-8420-013c7fe22d1e", "claimed": false, "zoned": false,
            "supported_io_types": {"read": true, "write": true, "unmap": false, "nvme_admin": false},
            "driver_specific": {"lloop": {
                "filename": "/lustre/a.img", "state": "bound", "fs": "lustre", "engine": "threads", "read_only": false,
                "offset": 0, "direct_io_align": {"offset": 512, "memory": 4096},
            }},
        })
    }

    #[test]
    fn only_those_of_lloop() {
        let malloc = json!({"name": "Malloc0", "block_size": 512, "num_blocks": 8, "driver_specific": {}});
        let nvme = json!({"name": "Nvme0n1", "driver_specific": {"nvme": [{}], "mp_policy": "x"}});
        let bdevs = json!([malloc, bdev("lloop10"), bdev("lloop2"), nvme, {"name": "Null0"}]);
        let devices = of_lloop(&bdevs).unwrap();
        assert_eq!(devices.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["lloop2", "lloop10"]);
        assert_eq!(
            (devices[0].size_bytes(), devices[0].field("fs"), devices[0].field("fid")),
            (64 << 20, "lustre".into(), "-".into())
        );
        assert_eq!(devices[0].io_types().collect::<Vec<_>>(), ["read", "write"]);
        assert_eq!(missing(&bdevs, "Null0").to_string(), "Null0 is a block device of the target, but none of lloop's");
        assert_eq!(missing(&bdevs, "x").to_string(), "there is no device x (attached: lloop2, lloop10)");
        assert_eq!(missing(&json!([]), "x").to_string(), "there is no device x (none is attached)");
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let odd = json!([{"name": "x", "driver_specific": {"lloop": {}}}]);
        assert!(of_lloop(&odd).unwrap_err().to_string().contains("block_size"));
        assert!(of_lloop(&Value::Null).unwrap().is_empty());
    }
}
