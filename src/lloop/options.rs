//! What can be chosen: for the module, and for a device.

use crate::engine::{Care, PoolOptions};
use crate::error::{Error, Result};
use crate::os::lustre::group::PROBE_GROUP;
use crate::os::thread;
use serde::{Deserialize, Serialize};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The most devices that can be asked for, as in the kernel driver.
pub const MAX_LLOOP: u32 = 256;

/// The module's options (`bdev_lloop_set_options`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Options {
    /// The most devices at a time, 1 to 256.
    pub max_lloop: u32,
    /// The most worker threads, 1 to 1024.
    pub workers: u32,
    /// The most calls at a time on one lane, 1 to 1024.
    pub lane_limit: u32,
    /// The longest call that neighbouring requests are merged into, 4096 to 64 MiB; 0: 1 MiB, and 4 MiB on Lustre.
    pub max_merge_bytes: u64,
    /// How long a reset waits for what is in flight, in seconds, 1 to 3600.
    pub reset_timeout_s: u32,
    /// How long a detach waits for a call that does not return, in seconds, 1 to 3600.
    pub detach_timeout_s: u32,
    /// How long I/O that failed for a passing reason is tried again, on Lustre, in seconds, 0 (not at all) to 3600.
    pub retry_timeout: u32,
    /// How long a lock is waited for, in seconds, 1 to 3600.
    pub lock_timeout: u32,
    /// How often locks and files are looked at, in seconds, 1 to 3600.
    pub lock_check: u32,
    /// A call that takes longer is reported, in seconds, 1 to 3600.
    pub stall_warn: u32,
    /// Processors that threads of the kernel's may poll on, to take half of each reactor's batches (io_uring's SQPOLL). None: there
    /// are no such threads. For rings that are made from then on.
    pub sqpoll_cpus: Vec<u32>,
}

impl Options {
    const DEFAULT: Options = Options {
        max_lloop: MAX_LLOOP,
        workers: 128,
        lane_limit: 32,
        max_merge_bytes: 0,
        reset_timeout_s: 30,
        detach_timeout_s: 30,
        retry_timeout: 30,
        lock_timeout: 30,
        lock_check: 10,
        stall_warn: 30,
        sqpoll_cpus: Vec::new(),
    };

    /// What of them the workers need.
    pub fn pool(&self) -> PoolOptions {
        let seconds = |n: u32| Duration::from_secs(n.into());
        PoolOptions {
            workers: self.workers as usize,
            lane_limit: self.lane_limit as usize,
            max_merge_bytes: self.max_merge_bytes,
            retry_timeout: seconds(self.retry_timeout),
            care: Care { check: seconds(self.lock_check), stall_warn: seconds(self.stall_warn) },
            reactor_cpus: Vec::new(),
        }
    }
}

static OPTIONS: Mutex<Options> = Mutex::new(Options::DEFAULT);

/// The options as they are.
pub fn current() -> Options {
    OPTIONS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// A change of options: what is left out stays.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptionsChange {
    max_lloop: Option<u32>,
    workers: Option<u32>,
    lane_limit: Option<u32>,
    max_merge_bytes: Option<u64>,
    reset_timeout_s: Option<u32>,
    detach_timeout_s: Option<u32>,
    retry_timeout: Option<u32>,
    lock_timeout: Option<u32>,
    lock_check: Option<u32>,
    stall_warn: Option<u32>,
    sqpoll_cpus: Option<Vec<u32>>,
    /// Of version 0.1: taken from saved configurations, and without effect.
    sqpoll: Option<bool>,
}

impl OptionsChange {
    /// Makes the change, all of it or nothing.
    ///
    /// # Errors
    /// EINVAL, naming the option that is out of its range.
    pub fn apply(&self) -> Result<Options> {
        fn set<N: Copy + PartialOrd + std::fmt::Display>(
            name: &str,
            field: &mut N,
            new: Option<N>,
            min: N,
            max: N,
        ) -> Result<()> {
            match new {
                Some(n) if n < min || n > max => {
                    return Err(Error::new(libc::EINVAL, format!("{name} must be {min} to {max}, not {n}")));
                }
                Some(n) => *field = n,
                None => {}
            }
            Ok(())
        }
        let mut new = current();
        set("max_lloop", &mut new.max_lloop, self.max_lloop, 1, MAX_LLOOP)?;
        set("workers", &mut new.workers, self.workers, 1, 1024)?;
        set("lane_limit", &mut new.lane_limit, self.lane_limit, 1, 1024)?;
        let merge = self.max_merge_bytes.filter(|&n| n != 0);
        set("max_merge_bytes", &mut new.max_merge_bytes, merge, 4096, 64 << 20)?;
        if self.max_merge_bytes == Some(0) {
            new.max_merge_bytes = 0;
        }
        set("reset_timeout_s", &mut new.reset_timeout_s, self.reset_timeout_s, 1, 3600)?;
        set("detach_timeout_s", &mut new.detach_timeout_s, self.detach_timeout_s, 1, 3600)?;
        set("retry_timeout", &mut new.retry_timeout, self.retry_timeout, 0, 3600)?;
        set("lock_timeout", &mut new.lock_timeout, self.lock_timeout, 1, 3600)?;
        set("lock_check", &mut new.lock_check, self.lock_check, 1, 3600)?;
        set("stall_warn", &mut new.stall_warn, self.stall_warn, 1, 3600)?;
        if let Some(cpus) = &self.sqpoll_cpus {
            if let Some(cpu) = cpus.iter().find(|cpu| !thread::is_online(**cpu)) {
                return Err(Error::new(libc::EINVAL, format!("sqpoll_cpus: this machine has no processor {cpu}")));
            }
            new.sqpoll_cpus.clone_from(cpus);
        }
        if self.sqpoll.is_some() {
            tracing::warn!("the option sqpoll has no effect any more; sqpoll_cpus names processors that may poll");
        }
        *OPTIONS.lock().unwrap_or_else(PoisonError::into_inner) = new.clone();
        Ok(new)
    }
}

/// Which engine moves the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The best that works.
    #[default]
    Auto,
    /// The thread pool.
    Threads,
    /// io_uring.
    Uring,
}

/// How a file is kept from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockChoice {
    /// A Lustre group lock beside the advisory one.
    Group,
    /// An open-file-description lock.
    Advisory,
    /// None.
    Off,
}

/// Whether I/O is split at the boundaries of stripes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StripeSplit {
    /// Where this node's Lustre client does not work on the stripes of one call in parallel by itself.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

fn default_block_size() -> u32 {
    4096
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The parameters of `bdev_lloop_create`, and what of them brings the same device about again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateParams {
    /// The file.
    pub filename: PathBuf,
    /// Name of the device; the lowest free `lloopN` when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Logical block size in bytes, 512 or 4096.
    #[serde(default = "default_block_size")]
    pub block_size: u32,
    /// No writes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub read_only: bool,
    /// Where in the file the device starts, in bytes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub offset: u64,
    /// How much of the file the device has at most, in bytes; 0: to the end.
    #[serde(default, skip_serializing_if = "is_default")]
    pub size_limit: u64,
    /// Which engine.
    #[serde(default, skip_serializing_if = "is_default")]
    pub engine: EngineChoice,
    /// Accept filesystems other than Lustre.
    #[serde(default, skip_serializing_if = "is_default")]
    pub allow_any_fs: bool,
    /// Its UUID; derived from the file when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<uuid::Uuid>,
    /// How it is kept from others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lock: Option<LockChoice>,
    /// The group that shares a group lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_id: Option<NonZeroU32>,
    /// Offer UNMAP and WRITE ZEROES where they work; when left out, true, and false under a group lock (which has to be let go of
    /// for each batch of discards).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<bool>,
    /// Whether I/O is split at stripes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stripe_split: StripeSplit,
}

impl CreateParams {
    /// Checks what can be checked without looking at the file.
    ///
    /// # Errors
    /// EINVAL, naming the parameter.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(libc::EINVAL, format!("{}: {message}", self.filename.display())));
        if self.filename.as_os_str().is_empty() {
            return Err(Error::new(libc::EINVAL, "filename is empty"));
        }
        if self.name.as_ref().is_some_and(|name| name.is_empty() || name.len() > 255 || name.contains('\0')) {
            return refuse("name must have 1 to 255 bytes".into());
        }
        if !matches!(self.block_size, 512 | 4096) {
            return refuse(format!("block_size must be 512 or 4096, not {}", self.block_size));
        }
        if self.group_id.is_some() && !matches!(self.lock, None | Some(LockChoice::Group)) {
            return refuse("group_id goes with lock group".into());
        }
        if self.group_id == Some(PROBE_GROUP) {
            return refuse(format!(
                "group_id {PROBE_GROUP} is lloop's own, for finding out whether a file is in use; choose another"
            ));
        }
        if self.group_id.is_some() && self.discard == Some(true) {
            return refuse(
                "discards would wait for the group lock of the others in the group; leave out discard or group_id"
                    .into(),
            );
        }
        if self.group_id.is_some() && self.lock.is_none() && self.read_only {
            return refuse("a read-only device takes no group lock unless asked for; give lock group as well".into());
        }
        Ok(())
    }
}

/// How many blocks a device has.
///
/// # Errors
/// EINVAL when nothing is left, when offset or limit do not fit the file or the block size.
pub fn capacity_blocks(params: &CreateParams, file_bytes: u64, align_bytes: u64) -> Result<u64> {
    let shown = params.filename.display();
    let (block, offset, limit) = (u64::from(params.block_size), params.offset, params.size_limit);
    let refuse = |message: String| Err(Error::new(libc::EINVAL, format!("{shown}: {message}")));
    if file_bytes < block {
        return refuse(format!("the file has {file_bytes} bytes, less than a block of {block}; make it larger first"));
    }
    if !offset.is_multiple_of(block) {
        return refuse(format!("offset {offset} is no multiple of the block size {block}"));
    }
    if offset >= file_bytes {
        return refuse(format!("offset {offset} is at or past the file's end at {file_bytes}"));
    }
    let rest = file_bytes - offset;
    if limit > rest {
        return refuse(format!(
            "size_limit {limit} is over the file's end: {rest} bytes are left behind offset {offset}"
        ));
    }
    let end = offset + if limit == 0 { rest } else { limit };
    // Where direct I/O is coarser than a block, the last page is used only if the file has all of it: writing a part of it
    // would make the file longer.
    let usable_end = if align_bytes > block && end > file_bytes - file_bytes % align_bytes {
        file_bytes - file_bytes % align_bytes
    } else {
        end
    };
    match usable_end.saturating_sub(offset) / block {
        0 => refuse(format!("nothing of block size {block} is left between offset {offset} and {end}")),
        blocks => Ok(blocks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn params(offset: u64, size_limit: u64, block_size: u32) -> CreateParams {
        let json = json!({"filename": "/f", "offset": offset, "size_limit": size_limit, "block_size": block_size});
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn capacities() {
        let blocks = |offset, limit, block, file, align| capacity_blocks(&params(offset, limit, block), file, align);
        assert_eq!(blocks(0, 0, 4096, 4 << 20, 4096), Ok(1024));
        assert_eq!(blocks(0, 0, 4096, (4 << 20) + 4095, 512), Ok(1024), "the tail is dropped");
        assert_eq!(blocks(4096, 0, 4096, 4 << 20, 4096), Ok(1023));
        assert_eq!(blocks(4096, 8192, 4096, 4 << 20, 4096), Ok(2));
        assert_eq!(blocks(512, 0, 512, 4096, 512), Ok(7));
        assert_eq!(blocks(512, 0, 512, 8191, 4096), Ok(7), "no part of a page is written");
        for (offset, limit, block, file, text) in [
            (0, 0, 4096, 4095, "less than a block"),
            (0, 0, 4096, 0, "less than a block"),
            (100, 0, 4096, 1 << 20, "no multiple"),
            (1 << 20, 0, 4096, 1 << 20, "past the file's end"),
            (1 << 40, 0, 4096, 1 << 20, "past the file's end"),
            (0, (1 << 20) + 1, 4096, 1 << 20, "over the file's end"),
            (8192, u64::MAX, 4096, 1 << 20, "over the file's end"),
            (0, 100, 4096, 1 << 20, "nothing"),
        ] {
            let error = blocks(offset, limit, block, file, 512).unwrap_err();
            assert!(
                error.errno == libc::EINVAL && error.message.contains(text) && error.message.contains("/f"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_device_lies_inside_its_file(offset in 0u64..1 << 22, limit in 0u64..1 << 22, file in 0u64..1 << 22,
                                         block in prop_oneof![Just(512u32), Just(4096)], align in prop_oneof![Just(512u64), Just(4096), Just(65536)]) {
            if let Ok(blocks) = capacity_blocks(&params(offset, limit, block), file, align) {
                let end = offset + blocks * u64::from(block);
                prop_assert!(blocks > 0 && end <= file);
                prop_assert!(limit == 0 || end <= offset + limit);
                prop_assert!(align <= u64::from(block) || end.next_multiple_of(align) <= file);
            }
        }
    }

    #[test]
    fn parameters_survive_the_configuration() {
        let json = json!({"filename": "/f", "name": "x", "block_size": 512, "read_only": true, "offset": 512, "size_limit": 1024,
            "engine": "threads", "allow_any_fs": true, "uuid": "6c6c6f6f-7000-5000-8000-6c7573747265", "lock": "off", "discard": false});
        let params: CreateParams = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&params).unwrap(), json);
        assert_eq!(
            serde_json::to_value(super::tests::params(0, 0, 4096)).unwrap(),
            json!({"filename": "/f", "block_size": 4096})
        );
    }

    #[test]
    fn options_have_ranges() {
        let change = |json| serde_json::from_value::<OptionsChange>(json).unwrap().apply();
        for (json, name) in [
            (json!({"max_lloop": 0}), "max_lloop"),
            (json!({"max_lloop": 257}), "max_lloop"),
            (json!({"workers": 0, "max_lloop": 3}), "workers"),
            (json!({"lane_limit": 2000}), "lane_limit"),
            (json!({"max_merge_bytes": 1}), "max_merge_bytes"),
            (json!({"reset_timeout_s": 0}), "reset_timeout_s"),
        ] {
            let error = change(json).unwrap_err();
            assert!(error.errno == libc::EINVAL && error.message.contains(name), "{error}");
        }
        assert_eq!(current(), Options::DEFAULT, "nothing was changed");
    }
}
