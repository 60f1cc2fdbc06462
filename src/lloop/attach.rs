//! Attaching, detaching and resizing. Runs on the application's thread; whatever touches the file runs elsewhere and is
//! awaited.

use super::channel::Token;
use super::device::Device;
use super::options::{self, CreateParams, capacity_blocks};
use super::prepare::{Prepared, prepare};
use super::state::State;
use super::{Entry, MODULE, REGISTRY, pool};
use crate::engine::state::VolumeState;
use crate::engine::{Target, Volume};
use crate::error::{Error, Result};
use crate::os::file::{DirectFile, Identity, OpenOptions};
use crate::os::task::Blocking;
use crate::spdk::bdev::{self, BdevHandle, Description};
use crate::spdk::poller;
use futures::future::{Either, select};
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a detach waits for a device that is open, before it says so.
const EXAMINE_PATIENCE: Duration = Duration::from_millis(500);

/// Uses the table of names. Not across an await.
fn with_entries<R>(f: impl FnOnce(&mut BTreeMap<String, Entry>) -> R) -> Result<R> {
    REGISTRY
        .with(|registry| f(&mut registry.entries.borrow_mut()))
        .ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))
}

fn blocking() -> Result<Blocking> {
    REGISTRY.with(|registry| registry.blocking.clone()).ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))
}

/// Runs `call`, which may block, on another thread; whether that can be done.
pub fn in_background(call: impl FnOnce() + Send + 'static) -> bool {
    // A reactor other than the application's asks as well: the way to the other threads is shared.
    super::blocking().is_some_and(|blocking| blocking.start(call))
}

/// A name that is reserved until the attach has succeeded.
struct Reservation {
    name: String,
    kept: bool,
}

impl Reservation {
    /// Reserves `wanted`, or the lowest free `lloopN`.
    fn new(wanted: Option<&str>) -> Result<Self> {
        let max = options::current().max_lloop;
        with_entries(|entries| {
            if entries.len() >= max as usize {
                return Err(Error::new(
                    libc::EBUSY,
                    format!(
                        "all {max} devices are in use; detach one, or raise max_lloop (bdev_lloop_set_options, up to {})",
                        options::MAX_LLOOP
                    ),
                ));
            }
            let taken = |name: &str| entries.contains_key(name) || bdev::exists(name);
            let name = match wanted {
                Some(name) if taken(name) => {
                    return Err(Error::new(libc::EEXIST, format!("the name {name} is taken; choose another")));
                }
                Some(name) => name.to_owned(),
                None => (0..max).map(|n| format!("lloop{n}")).find(|name| !taken(name)).ok_or_else(|| {
                    Error::new(libc::EBUSY, format!("the names lloop0 to lloop{} are taken; give one (name)", max - 1))
                })?,
            };
            entries.insert(name.clone(), Entry::Attaching(None));
            Ok(Reservation { name, kept: false })
        })?
    }

    /// Notes which file it is for.
    ///
    /// # Errors
    /// EBUSY when that is attached, or being attached, already.
    fn claim(&self, identity: Identity, file: &DirectFile) -> Result<()> {
        with_entries(|entries| {
            let shown = file.path().display();
            for (name, entry) in entries.iter() {
                let (other, path) = match entry {
                    Entry::Attaching(other) => (*other, None),
                    Entry::Attached(device, _) => (Some(device.facts().identity), Some(device.params().filename)),
                };
                if other.is_some_and(|other| other.is_same_file(&identity)) {
                    let path = path.filter(|path| path != file.path());
                    let also = path.map_or(String::new(), |path| format!(" (as {})", path.display()));
                    return Err(Error::new(
                        libc::EBUSY,
                        format!("{shown} is attached already, as {name}{also}; detach that first"),
                    ));
                }
            }
            entries.insert(self.name.clone(), Entry::Attaching(Some(identity)));
            Ok(())
        })?
    }

    fn keep(mut self, device: Arc<Device>, handle: BdevHandle) -> Result<String> {
        self.kept = true;
        let name = std::mem::take(&mut self.name);
        with_entries(|entries| entries.insert(name.clone(), Entry::Attached(device, handle)))?;
        Ok(name)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            // (Without a registry there is no entry to remove.)
            let _ = with_entries(|entries| entries.remove(&self.name));
        }
    }
}

/// `bdev_lloop_create`: the new device's name.
///
/// # Errors
/// As the contract lists them (README); nothing is left behind.
pub async fn attach(mut params: CreateParams) -> Result<String> {
    params.check()?;
    // What is saved must mean the same from another working directory.
    params.filename = std::path::absolute(&params.filename).unwrap_or(params.filename);
    let reservation = Reservation::new(params.name.as_deref())?;
    let pool = pool().ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))?;
    let blocking = blocking()?;

    let path = params.filename.clone();
    let open_options = OpenOptions { read_only: params.read_only, allow_any_fs: params.allow_any_fs };
    let limit = Duration::from_secs(options::current().lock_timeout.into());
    let file = blocking
        .run_within(limit * 2, move || DirectFile::open(&path, open_options))
        .await
        .map_err(|error| no_answer(error, &params, limit))??;
    if let Err(error) = reservation.claim(*file.identity(), &file) {
        // Closing can block as well as opening can.
        blocking.run(move || drop(file)).await?;
        return Err(error);
    }
    let wanted = params.clone();
    // A server that hangs must not hang the caller, too. (Whatever comes of it later is dropped, and the file closed.)
    let Prepared { target, map, facts, num_blocks, stripe_blocks, split } = blocking
        .run_within(limit * 2, move || prepare(file, &wanted, limit))
        .await
        .map_err(|error| no_answer(error, &params, limit))??;

    let description = Description {
        name: reservation.name.clone(),
        product: c"lloop",
        block_bytes: params.block_size,
        physical_block_bytes: params.block_size.max(4096),
        num_blocks,
        // Direct I/O may take less, but not gladly: ext4 looks at addresses, too, when it decides whether a write to unwritten extents
        // covers whole blocks, and serialises those that do not (a sixth of the speed).
        memory_align_bytes: (facts.align_bytes.1 as u32).max(4096),
        optimal_io_boundary_blocks: stripe_blocks,
        split_at_boundary: split,
        write_cache: true,
        uuid: facts.uuid,
    };
    let device = Arc::new(Device::new(&reservation.name, params, pool.open(Arc::new(target), map), facts));
    match bdev::register(&MODULE, device.clone(), &description) {
        Ok(handle) => reservation.keep(device, handle),
        Err(error) => {
            let volume = device.release();
            close_volume(&reservation.name, volume).await;
            Err(error)
        }
    }
}

fn find(name: &str) -> Result<(Arc<Device>, BdevHandle)> {
    with_entries(|entries| match entries.get(name) {
        Some(Entry::Attached(device, handle)) => Ok((device.clone(), handle.clone())),
        Some(Entry::Attaching(_)) => Err(Error::new(libc::EBUSY, format!("{name} is just being attached; try again"))),
        None => {
            Err(Error::new(libc::ENODEV, format!("there is no lloop device {name}; lloop list shows those there are")))
        }
    })?
}

/// What to say when a call took twice `limit`.
fn no_answer(error: Error, params: &CreateParams, limit: Duration) -> Error {
    if error.errno != libc::ETIMEDOUT {
        return error;
    }
    let message = format!(
        "{}: its servers have not answered for {} s (locks need all of them); attach it when they are back",
        params.filename.display(),
        2 * limit.as_secs()
    );
    Error::new(libc::ETIMEDOUT, message)
}

/// `bdev_lloop_delete`.
///
/// # Errors
/// ENODEV; EBUSY when it is open and not forced, or on its way out already.
pub async fn detach(name: &str, force: bool) -> Result<()> {
    let (device, handle) = find(name)?;
    // Other modules look into every new device (for partitions, logical volumes): that is no use to refuse a detach for, and
    // soon over.
    let patience = Instant::now() + EXAMINE_PATIENCE;
    while !force && handle.is_open() && !handle.is_unregistering() && Instant::now() < patience {
        blocking()?.run(|| std::thread::sleep(Duration::from_millis(5))).await?;
    }
    if handle.is_unregistering() || device.state() != State::Bound {
        return Err(Error::new(libc::EBUSY, format!("{name} is being detached already")));
    }
    if !force && handle.is_open() {
        return Err(Error::new(
            libc::EBUSY,
            format!("{name} ({}) is in use; end its exports first, or force it", device.params().filename.display()),
        ));
    }
    device.run_down();
    if let (Some(pool), Some(volume)) = (pool(), device.volume_id()) {
        pool.abandon(volume);
    }
    let limit = Duration::from_secs(options::current().detach_timeout_s.into());
    let (gone, patience) = (pin!(handle.unregister()), pin!(poller::sleep(limit)));
    match select(gone, patience).await {
        Either::Left((result, _)) => result,
        // Its I/O owns its memory until the calls return: that cannot be cut short, only waited for elsewhere.
        Either::Right(_) => Err(Error::new(
            libc::ETIMEDOUT,
            format!(
                "{name} ({}) accepts no more I/O, but {} I/O have not come back in {} s; it goes away when they do (bdev_lloop_get_stats tells how old they are)",
                device.params().filename.display(),
                device.in_flight(),
                limit.as_secs()
            ),
        )),
    }
}

/// The end of a device that the bdev layer has let go of: closes its file and frees its name.
pub async fn close(name: &str, volume: Option<Volume<Token>>) {
    close_volume(name, volume).await;
    // (Without a registry the module is ending anyway.)
    let _ = with_entries(|entries| entries.remove(name));
}

async fn close_volume(name: &str, volume: Option<Volume<Token>>) {
    let (Some(volume), Some(pool), Ok(blocking)) = (volume, pool(), blocking()) else { return };
    let limit = Duration::from_secs(options::current().detach_timeout_s.into());
    if let Err(error) | Ok(Err(error)) = blocking.run(move || pool.close(volume, limit)).await {
        tracing::error!("closing {name}: {error}");
    }
}

/// `bdev_lloop_resize`: the new size in bytes. 0 takes the file's.
///
/// # Errors
/// ENODEV; EINVAL when it would shrink or is no multiple of the block size; EROFS when a read-only file would have to grow;
/// EFBIG, ENOSPC and their like from the filesystem.
pub async fn resize(name: &str, size_bytes: u64) -> Result<u64> {
    let (device, handle) = find(name)?;
    let params = device.params();
    let shown = params.filename.display().to_string();
    let refuse = |errno, message: String| Err(Error::new(errno, format!("{name} ({shown}): {message}")));
    let gone = || Error::new(libc::EBUSY, format!("{name} is being detached"));
    if handle.is_unregistering() {
        return Err(gone());
    }
    let block = u64::from(params.block_size);
    if !size_bytes.is_multiple_of(block) {
        return refuse(libc::EINVAL, format!("size {size_bytes} is no multiple of the block size {block}"));
    }
    let current_bytes = handle.num_blocks()? * block;
    if size_bytes != 0 && size_bytes < current_bytes {
        return refuse(
            libc::EINVAL,
            format!(
                "it has {current_bytes} bytes and cannot shrink to {size_bytes}; detach it and attach it with size_limit"
            ),
        );
    }
    let Some(end_bytes) = params.offset.checked_add(size_bytes).filter(|&end| end <= i64::MAX as u64) else {
        return refuse(libc::EFBIG, format!("size {size_bytes} is more than a file can have"));
    };
    let blocking = blocking()?;
    let target = device.target().ok_or_else(gone)?;
    let read_only = params.read_only;
    let file_name = shown.clone();
    let (file_bytes, align_bytes) = blocking
        .run(move || {
            let file = target.file();
            let mut file_bytes =
                file.size_bytes().map_err(|e| Error::os(e, format!("asking for the size of {file_name}")))?;
            if size_bytes != 0 && file_bytes < end_bytes {
                if read_only {
                    let message = format!("{file_name} is attached read-only and too short; it cannot be made longer");
                    return Err(Error::new(libc::EROFS, message));
                }
                file.set_size(end_bytes)
                    .map_err(|e| Error::os(e, format!("making {file_name} {end_bytes} bytes long")))?;
                file_bytes = end_bytes;
            }
            Ok((file_bytes, file.offset_align_bytes() as u64))
        })
        .await??;
    let mut wanted = params.clone();
    if size_bytes != 0 {
        wanted.size_limit = if file_bytes > end_bytes { size_bytes } else { 0 };
    } else if wanted.size_limit > file_bytes.saturating_sub(wanted.offset) {
        wanted.size_limit = 0;
    }
    let num_blocks = capacity_blocks(&wanted, file_bytes, align_bytes)?;
    let new_bytes = num_blocks * block;
    if new_bytes < current_bytes {
        return refuse(
            libc::EINVAL,
            format!(
                "the file has become shorter than the device ({current_bytes} bytes), which cannot shrink; give size {current_bytes} to make the file long enough again"
            ),
        );
    }
    handle.set_num_blocks(num_blocks)?;
    if size_bytes != 0 {
        device.set_size_limit(wanted.size_limit);
    }
    if let Some(target) = device.target() {
        target.set_len_bytes(new_bytes);
        target.clear_damage();
        target.expect_new_layout();
    }
    Ok(new_bytes)
}

/// `bdev_lloop_resume`.
///
/// # Errors
/// ENODEV; EINVAL when it is neither fenced nor degraded, or its file is still not what it needs; EBUSY when somebody else holds its
/// locks.
pub async fn resume(name: &str) -> Result<()> {
    let (device, _) = find(name)?;
    let sick = |target: &Arc<Target>| target.damage().is_some() || target.state() == VolumeState::Fenced;
    let (Some(target), Some(volume)) = (device.target().filter(sick), device.volume_id()) else {
        return Err(Error::new(
            libc::EINVAL,
            format!("{name} is neither fenced nor degraded; there is nothing to resume"),
        ));
    };
    let pool = pool().ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))?;
    blocking()?.run(move || pool.resume(volume, &target)).await?
}

/// The devices that statistics are wanted of: one, or all.
///
/// # Errors
/// ENODEV when there is none of that name.
pub fn devices(name: Option<&str>) -> Result<Vec<Arc<Device>>> {
    match name {
        Some(name) => find(name).map(|(device, _)| vec![device]),
        None => with_entries(|entries| {
            let attached = entries.values().filter_map(|entry| match entry {
                Entry::Attached(device, _) => Some(device.clone()),
                Entry::Attaching(_) => None,
            });
            attached.collect()
        }),
    }
}
