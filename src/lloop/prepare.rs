//! What an attach does to a file before there is a device: locks, probes, layout. All of it can block, and runs off the reactor.

use super::channel::Token;
use super::device::{Facts, THREADS, URING};
use super::options::{CreateParams, EngineChoice, LockChoice, StripeSplit, capacity_blocks};
use crate::engine::guard::{Guard, GuardOptions, Sharing};
use crate::engine::{LaneMap, Target, Uring};
use crate::error::{Error, Result, reason};
use crate::os::file::DirectFile;
use crate::os::lustre::group::PROBE_GROUP;
use crate::os::lustre::layout::Layout;
use crate::os::mount::Mount;
use std::hash::{BuildHasher, Hasher};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::time::Duration;

/// A file that is ready to become a device.
pub struct Prepared {
    /// The file, with its locks.
    pub target: Target,
    /// How it is divided into lanes.
    pub map: LaneMap,
    /// What is shown of it.
    pub facts: Facts,
    /// Capacity of the device.
    pub num_blocks: u64,
    /// Blocks of a stripe, 0 where there are none.
    pub stripe_blocks: u32,
    /// Whether I/O is split at stripes.
    pub split: bool,
}

/// Locks the file, drops its cached pages and finds out what it can do. Blocks. The file is closed, and its locks are gone, when this
/// fails.
///
/// # Errors
/// EBUSY when somebody else has it; EINVAL when the parameters do not fit it; the system's errnos.
pub fn prepare(file: DirectFile, params: &CreateParams, lock_timeout: Duration) -> Result<Prepared> {
    let shown = params.filename.display();
    let failed = |what: &str| {
        let what = format!("{what} {shown}");
        move |errno| Error::os(errno, &what)
    };
    let size_bytes = file.size_bytes().map_err(failed("asking for the size of"))?;
    let align_bytes = (file.offset_align_bytes(), file.memory_align_bytes());
    let num_blocks = capacity_blocks(params, size_bytes, align_bytes.0 as u64)?;

    check_sharing(params, align_bytes.0 as u64)?;

    let mount = Mount::of(file.as_fd());
    let this_node_only = mount.as_ref().is_some_and(|mount| mount.has("localflock"));
    let options =
        GuardOptions { this_node_only, ..guard_options(params, file.identity().fid.is_some(), lock_timeout)? };
    let guard = Guard::take_advisory(&file, options).map_err(|error| match error.errno {
        // The two that are about locks only.
        libc::ENOLCK | libc::EINVAL => Error::new(
            error.errno,
            format!(
                "{shown}: its filesystem has locks, but does not give one now ({}). Try again when its lock server is well; lock off does without, \
                 and keeps nobody out",
                reason(error.errno)
            ),
        ),
        _ => error,
    })?;
    // Before anything else that could wait for a stranger's group lock.
    if file.identity().fid.is_some() && !guard.holds_group() {
        check_group_lock(&file)?;
    }
    file.drop_cache().map_err(failed("writing back the cached pages of"))?;
    guard.take_group(&file)?;
    // Under a group lock fallocate would wait for that lock for ever, so a probe needs to let go of it; and it is worth that only to
    // somebody who has asked for discards.
    let mut can_punch = false;
    let wanted = params.discard.unwrap_or(!guard.holds_group());
    if wanted && guard.holds_group() && !guard.advisory_covers() {
        tracing::warn!(
            "{shown}: no discards: nothing would keep others out while the group lock is let go of for them"
        );
    } else if wanted {
        let probed = guard.without_group(&file, &object_offsets(&file, size_bytes), |permit| {
            can_punch = file.can_punch(permit);
        });
        probed.map_err(|why| Error::new(libc::EBUSY, format!("{shown}: {why}")))?;
    }
    let engine = choose_engine(params, &file);
    let on_lustre = file.identity().fid.is_some();
    let client_version = on_lustre.then(client_version).flatten();
    let facts = Facts {
        identity: *file.identity(),
        protection: protection(&guard),
        can_punch,
        align_bytes,
        engine,
        uuid: params.uuid.unwrap_or_else(|| file.identity().uuid()),
        mount,
        client_version: client_version.clone(),
    };
    let target = Target::guarded(file, guard, params.offset, params.block_size);
    target.set_len_bytes(num_blocks * u64::from(params.block_size));
    let map = if on_lustre { target.read_layout() } else { None }.unwrap_or_else(LaneMap::single);
    if target.layout().is_some_and(|layout| layout.components.iter().any(|component| component.pattern.is_mdt())) {
        tracing::warn!(
            "{}: a part of it is on the metadata server (DoM). A stranger's read of that part blocks one of its threads until the device is \
             detached; copy the file to one made by lloop create",
            params.filename.display()
        );
    }
    let stripe_bytes = target.layout().and_then(|layout| layout.stripe_size_bytes(size_bytes)).unwrap_or(0);
    // (A boundary has to divide the device evenly, from its start on.)
    let fits = stripe_bytes > 0 && params.offset.is_multiple_of(stripe_bytes);
    let stripe_blocks = if fits { u32::try_from(stripe_bytes / u64::from(params.block_size)).unwrap_or(0) } else { 0 };
    let split = match params.stripe_split {
        StripeSplit::On => true,
        StripeSplit::Off => false,
        StripeSplit::Auto => on_lustre && !client_splits(client_version.as_deref().unwrap_or_default()),
    };
    Ok(Prepared { target, map, facts, num_blocks, stripe_blocks, split: split && stripe_blocks > 0 })
}

/// An offset in each object of a file; none when its layout cannot be read.
fn object_offsets(file: &DirectFile, size_bytes: u64) -> Vec<u64> {
    match Layout::read(file.as_fd()) {
        Ok(layout) => layout.object_offsets(size_bytes),
        Err(_) => Vec::new(),
    }
}

/// Refuses a writable device whose blocks are finer than the file's direct I/O where others may write to the file, too: parts of pages
/// are read, modified and written, and that excludes nobody outside this process.
fn check_sharing(params: &CreateParams, align_bytes: u64) -> Result<()> {
    let is_fine =
        !u64::from(params.block_size).is_multiple_of(align_bytes) || !params.offset.is_multiple_of(align_bytes);
    let shares = match (params.group_id, params.lock) {
        (Some(_), _) => "group_id",
        (None, Some(LockChoice::Off)) => "lock off",
        _ => return Ok(()),
    };
    if params.read_only || !is_fine {
        return Ok(());
    }
    Err(Error::new(
        libc::EINVAL,
        format!(
            "{}: {shares} lets others write to the file, too, and with blocks of {} bytes at offset {} they would destroy each other's data: \
             its direct I/O moves {align_bytes} bytes at least. Give a block_size and an offset that are multiples of {align_bytes}, or leave out {shares}",
            params.filename.display(),
            params.block_size,
            params.offset
        ),
    ))
}

/// How often, and after which pause, a group lock is looked for again: somebody else's attach may be failing, and letting go of it.
const GROUP_LOCK_TRIES: u32 = 3;
const GROUP_LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Refuses a file that somebody holds a group lock on. Without that group every read, write and punch would wait for its end.
fn check_group_lock(file: &DirectFile) -> Result<()> {
    let shown = file.path().display();
    for attempt in 1..=GROUP_LOCK_TRIES {
        match file.is_group_locked() {
            Ok(false) => return Ok(()),
            Ok(true) if attempt < GROUP_LOCK_TRIES => std::thread::sleep(GROUP_LOCK_PAUSE),
            Ok(true) => break,
            // One that only reads may be there to save what can be read while an OST is out of service.
            Err(errno) if file.read_only() => {
                tracing::warn!(
                    "{shown}: whether somebody holds a group lock on it cannot be found out ({}); reads may have to wait",
                    reason(errno)
                );
                return Ok(());
            }
            Err(errno) => return Err(Error::os(errno, format!("looking for a group lock on {shown}"))),
        }
    }
    Err(Error::new(
        libc::EBUSY,
        format!(
            "{shown} is in use by another process or node, which holds a group lock on it: I/O would wait for that lock. Detach it \
             there first, or join that group (lock group, and its group_id)"
        ),
    ))
}

/// Which locks a device takes.
fn guard_options(params: &CreateParams, on_lustre: bool, timeout: Duration) -> Result<GuardOptions> {
    let group_wanted = params.lock == Some(LockChoice::Group);
    if group_wanted && !on_lustre {
        return Err(Error::new(
            libc::EINVAL,
            format!(
                "{}: group locks are Lustre's, and this file is not on it; use lock advisory",
                params.filename.display()
            ),
        ));
    }
    let group = match params.lock {
        Some(LockChoice::Group) => true,
        Some(LockChoice::Advisory | LockChoice::Off) => false,
        None => on_lustre && !params.read_only,
    };
    // Those that share a group share the advisory lock, too; it still keeps those out who know that one only.
    let sharing = if params.read_only || params.group_id.is_some() { Sharing::Shared } else { Sharing::Exclusive };
    Ok(GuardOptions {
        advisory: (params.lock != Some(LockChoice::Off)).then_some(sharing),
        group: group.then(|| params.group_id.unwrap_or_else(random_group)),
        discards: params.discard == Some(true),
        this_node_only: false,
        timeout,
    })
}

/// A group of its own: with 2^32 of them no two devices share one by chance.
fn random_group() -> NonZeroU32 {
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    NonZeroU32::new(random as u32).filter(|&group| group != PROBE_GROUP).unwrap_or(NonZeroU32::MAX)
}

/// What keeps others from the file, for people.
fn protection(guard: &Guard) -> &'static str {
    use crate::os::lock::Outcome;
    match (guard.group(), guard.advisory()) {
        (Some(_), _) => "group",
        (None, None) => "off",
        (None, Some(Outcome::Held)) if !guard.is_of_this_node_only() => "advisory",
        (None, Some(Outcome::Held)) => "advisory, this node only",
        (None, Some(_)) => "none",
    }
}

/// Which engine the file gets, and why.
fn choose_engine(params: &CreateParams, file: &DirectFile) -> (&'static str, String) {
    let align_bytes = file.offset_align_bytes() as u64;
    let impossible =
        if !u64::from(params.block_size).is_multiple_of(align_bytes) || !params.offset.is_multiple_of(align_bytes) {
            Some(format!("blocks are finer than the file's direct I/O of {align_bytes} bytes"))
        } else if file.identity().fid.is_some() {
            Some("fencing and retries on Lustre are the workers'".to_owned())
        } else if let Err(errno) = file.probe_nowait() {
            Some(format!("the file has no non-blocking direct I/O ({})", reason(errno)))
        } else if let Err(errno) = Uring::<Token>::probe() {
            Some(format!("this kernel, or sandbox, has no io_uring ({})", reason(errno)))
        } else {
            None
        };
    match (params.engine, impossible) {
        (EngineChoice::Threads, _) => (THREADS, "asked for".to_owned()),
        (EngineChoice::Auto, None) => (URING, "the file does non-blocking direct I/O".to_owned()),
        (EngineChoice::Uring, None) => (URING, "asked for".to_owned()),
        (EngineChoice::Auto, Some(why)) => (THREADS, why),
        (EngineChoice::Uring, Some(why)) => {
            tracing::warn!("{}: engine uring was asked for, using threads: {why}", params.filename.display());
            (THREADS, format!("uring was asked for, but {why}"))
        }
    }
}

/// The version of this node's Lustre client, as it says itself.
fn client_version() -> Option<String> {
    let text = std::fs::read_to_string("/sys/fs/lustre/version").ok()?;
    Some(text.trim().trim_start_matches("lustre:").trim().to_owned())
}

/// Whether that client works on the stripes of one call in parallel: from 2.15 on (docs/internals/lustre.md#stripes-in-parallel).
/// One whose version is not known is taken for a new one.
fn client_splits(version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '_']).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) >= (2, 15),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn params(more: serde_json::Value) -> CreateParams {
        let mut json = json!({"filename": "/f"});
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn locks_by_default_and_by_choice() {
        let of = |more, lustre| guard_options(&params(more), lustre, Duration::ZERO);
        let default = of(json!({}), true).unwrap();
        assert!(default.group.is_some() && default.advisory == Some(Sharing::Exclusive) && !default.discards);
        assert_ne!(default.group, of(json!({}), true).unwrap().group);
        assert!(of(json!({}), false).unwrap().group.is_none());
        assert!(of(json!({"read_only": true}), true).unwrap().group.is_none());
        let shared = of(json!({"lock": "group", "group_id": 7}), true).unwrap();
        assert_eq!((shared.group, shared.advisory), (NonZeroU32::new(7), Some(Sharing::Shared)));
        assert_eq!(of(json!({"lock": "off"}), true).unwrap(), GuardOptions::default());
        assert_eq!(of(json!({"lock": "group"}), false).unwrap_err().errno, libc::EINVAL);
    }

    #[test]
    fn who_shares_a_file_writes_whole_pages() {
        let refused = |more| check_sharing(&params(more), 4096).err().map(|error| (error.errno, error.message));
        for more in [
            json!({"group_id": 7, "block_size": 512}),
            json!({"group_id": 7, "offset": 512, "block_size": 512}),
            json!({"lock": "off", "block_size": 512}),
        ] {
            let (errno, message) = refused(more.clone()).unwrap();
            assert!(
                errno == libc::EINVAL && message.contains("/f") && message.contains("multiples of 4096"),
                "{more}: {message}"
            );
        }
        for more in [
            json!({"group_id": 7}),
            json!({"lock": "off", "offset": 8192}),
            json!({"block_size": 512}),
            json!({"lock": "advisory", "block_size": 512}),
            json!({"lock": "off", "block_size": 512, "read_only": true}),
        ] {
            assert_eq!(refused(more.clone()), None, "{more}");
        }
        assert!(check_sharing(&params(json!({"lock": "off", "offset": 4096})), 65536).is_err(), "coarser pages");
        assert!(check_sharing(&params(json!({"lock": "off", "block_size": 512})), 512).is_ok());
    }

    #[test]
    fn versions() {
        for (version, splits) in
            [("2.14.0", false), ("2.15.3", true), ("2.17.57_dirty", true), ("3.0", true), ("", true)]
        {
            assert_eq!(client_splits(version), splits, "{version}");
        }
    }
}
