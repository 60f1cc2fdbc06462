//! Attaching, detaching and resizing. Runs on the application's thread; whatever touches the file runs elsewhere and is
//! awaited.

use super::channel::Token;
use super::device::Device;
use super::options::{self, CreateParams, capacity_blocks};
use super::prepare::{Prepared, prepare};
use super::state::State;
use super::{Attached, Entry, MODULE, REGISTRY, pool};
use crate::engine::state::VolumeState;
use crate::engine::target::Damage;
use crate::engine::{Target, Volume};
use crate::error::{Error, Result};
use crate::os::file::{DirectFile, Identity, OpenOptions};
use crate::os::task::Blocking;
use crate::spdk::bdev::{self, BdevHandle, Description};
use crate::spdk::poller;
use futures::future::{Either, select};
use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a detach waits for a device that is open, before it says so.
const EXAMINE_PATIENCE: Duration = Duration::from_secs(2);

/// Uses the table of names. Not across an await.
fn with_entries<R>(f: impl FnOnce(&mut BTreeMap<String, Entry>) -> R) -> Result<R> {
    REGISTRY
        .with(|registry| f(&mut registry.entries.borrow_mut()))
        .ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))
}

fn blocking() -> Result<Blocking> {
    REGISTRY.with(|registry| registry.blocking.clone()).ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))
}

/// Whether an attach or a detach is under way, given that the bdev layer has no device any more.
pub fn is_busy() -> bool {
    with_entries(|entries| !entries.is_empty()).unwrap_or(false)
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
                    Entry::Attached(Attached { device, .. }) => {
                        (Some(device.facts().identity), Some(device.params().filename))
                    }
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
        let attached = Attached { device, handle, resizing: Rc::default() };
        with_entries(|entries| entries.insert(name.clone(), Entry::Attached(attached)))?;
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
        blocking.run_always(move || drop(file)).await?;
        return Err(error);
    }
    let wanted = params.clone();
    // A server that hangs must not hang the caller, too. (Whatever comes of it later is dropped, and the file closed.)
    let Prepared { target, map, facts, num_blocks, stripe_blocks, split } = blocking
        .run_within(limit * 2, move || prepare(file, &wanted, limit))
        .await
        .map_err(|error| no_answer(error, &params, limit))??;

    // The bdev layer takes no device any more.
    if super::is_ending() {
        blocking.run_always(move || drop(target)).await?;
        return Err(Error::new(libc::ENODEV, "the target is ending"));
    }
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

fn find(name: &str) -> Result<Attached> {
    with_entries(|entries| match entries.get(name) {
        Some(Entry::Attached(attached)) => Ok(attached.clone()),
        Some(Entry::Attaching(_)) => Err(Error::new(libc::EBUSY, format!("{name} is just being attached; try again"))),
        None => {
            Err(Error::new(libc::ENODEV, format!("there is no lloop device {name}; lloop list shows those there are")))
        }
    })?
}

/// What to say when a call took twice `limit`, or too many do.
fn no_answer(error: Error, params: &CreateParams, limit: Duration) -> Error {
    let shown = params.filename.display();
    let message = match error.errno {
        libc::ETIMEDOUT => format!(
            "{shown}: its servers have not answered for {} s (locks need all of them); attach it when they are back",
            2 * limit.as_secs()
        ),
        libc::EAGAIN => format!(
            "{shown} is not attached: {}. Attach it when the servers are back (stuck_threads in bdev_lloop_get_stats has to go down)",
            error.message
        ),
        _ => return error,
    };
    Error::new(error.errno, message)
}

/// `bdev_lloop_delete`.
///
/// # Errors
/// ENODEV; EBUSY when it is open and not forced, or on its way out already.
pub async fn detach(name: &str, force: bool) -> Result<()> {
    let Attached { device, handle, .. } = find(name)?;
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
    if let Err(error) | Ok(Err(error)) = blocking.run_always(move || pool.close(volume, limit)).await {
        tracing::error!("closing {name}: {error}");
    }
}

/// `bdev_lloop_resize`: the new size in bytes. 0 takes the file's, and no size limit is left.
///
/// # Errors
/// ENODEV; EINVAL when it would shrink or is no multiple of the block size; EBUSY when it is fenced, being detached or being
/// resized; EROFS when a read-only file would have to grow; EFBIG, ENOSPC and their like from the filesystem.
pub async fn resize(name: &str, size_bytes: u64) -> Result<u64> {
    let Attached { device, handle, resizing } = find(name)?;
    let shown = device.params().filename.display().to_string();
    let refuse = |errno, message: &str| Err(Error::new(errno, format!("{name} ({shown}): {message}")));
    // From the first look at the size to the last change of it: two at a time could shrink the device.
    let limit = Duration::from_secs(options::current().lock_timeout.into());
    let _turn = match select(pin!(resizing.lock()), pin!(poller::sleep(limit))).await {
        Either::Left((turn, _)) => turn,
        Either::Right(_) => return refuse(libc::EBUSY, "an earlier resize has not ended; try again"),
    };
    if handle.is_unregistering() {
        return refuse(libc::EBUSY, "it is being detached");
    }
    let params = device.params();
    let block = u64::from(params.block_size);
    if !size_bytes.is_multiple_of(block) {
        return refuse(libc::EINVAL, &format!("size {size_bytes} is no multiple of the block size {block}"));
    }
    let current_bytes = handle.num_blocks()? * block;
    if size_bytes != 0 && size_bytes < current_bytes {
        let message = format!(
            "it has {current_bytes} bytes and cannot shrink to {size_bytes}; detach it and attach it with size_limit"
        );
        return refuse(libc::EINVAL, &message);
    }
    let end_bytes = match (size_bytes, params.offset.checked_add(size_bytes)) {
        (0, _) => None,
        (_, Some(end)) if end <= i64::MAX as u64 => Some(end),
        _ => return refuse(libc::EFBIG, &format!("size {size_bytes} is more than a file can have")),
    };
    let Some(target) = device.target() else { return refuse(libc::EBUSY, "it is being detached") };
    let file_bytes = blocking()?.run(move || make_long_enough(&target, end_bytes)).await??;
    let size_limit = if end_bytes.is_some_and(|end| file_bytes > end) { size_bytes } else { 0 };
    let Some(target) = device.target() else { return refuse(libc::EBUSY, "it is being detached") };
    let align_bytes = target.file().offset_align_bytes() as u64;
    let num_blocks = capacity_blocks(&CreateParams { size_limit, ..params }, file_bytes, align_bytes)?;
    let new_bytes = num_blocks * block;
    if new_bytes < current_bytes {
        let message = format!(
            "the file has become shorter than the device ({current_bytes} bytes), which cannot shrink; give size {current_bytes} to make the file long enough again"
        );
        return refuse(libc::EINVAL, &message);
    }
    handle.set_num_blocks(num_blocks)?;
    device.set_size_limit(size_limit);
    target.set_len_bytes(new_bytes);
    // The others are an operator's to resume.
    if target.damage() == Some(Damage::Truncated) {
        target.clear_damage();
    }
    target.expect_new_layout();
    Ok(new_bytes)
}

/// Makes a file end at `end_bytes` or later, if an end is wanted; its size then. Blocks.
fn make_long_enough(target: &Target, end_bytes: Option<u64>) -> Result<u64> {
    let file = target.file();
    let shown = file.path().display();
    // Nothing protects a file without its locks: others may be at work on it.
    match target.state() {
        VolumeState::Open | VolumeState::Held | VolumeState::Ending => {}
        VolumeState::Recovering => {
            let message = format!("{shown}: a lock that was lost is being taken again; try again");
            return Err(Error::new(libc::EBUSY, message));
        }
        VolumeState::Fenced => {
            let message = format!("{shown} is fenced: its locks are lost; resume the device first");
            return Err(Error::new(libc::EBUSY, message));
        }
    }
    let file_bytes = file.size_bytes().map_err(|e| Error::os(e, format!("asking for the size of {shown}")))?;
    let Some(end_bytes) = end_bytes.filter(|&end| end > file_bytes) else { return Ok(file_bytes) };
    if file.read_only() {
        let message = format!("{shown} is attached read-only and too short; it cannot be made longer");
        return Err(Error::new(libc::EROFS, message));
    }
    file.set_size(end_bytes).map_err(|e| Error::os(e, format!("making {shown} {end_bytes} bytes long")))?;
    Ok(end_bytes)
}

/// `bdev_lloop_resume`.
///
/// # Errors
/// ENODEV; EINVAL when it is neither fenced nor degraded, or its file is still not what it needs; EBUSY when somebody else holds its
/// locks.
pub async fn resume(name: &str) -> Result<()> {
    let Attached { device, .. } = find(name)?;
    let sick = |target: &Arc<Target>| target.damage().is_some() || target.state() == VolumeState::Fenced;
    let (Some(target), Some(volume)) = (device.target().filter(sick), device.volume_id()) else {
        return Err(Error::new(
            libc::EINVAL,
            format!("{name} is neither fenced nor degraded; there is nothing to resume"),
        ));
    };
    let pool = pool().ok_or_else(|| Error::new(libc::ENODEV, "lloop is not running"))?;
    let shown = device.params().filename.display().to_string();
    let resume = move || {
        // A file that cannot be asked for its size is not known to be well.
        target.file().size_bytes().map_err(|e| Error::os(e, format!("asking for the size of {shown}")))?;
        pool.resume(volume, &target)
    };
    blocking()?.run(resume).await?
}

/// The devices that statistics are wanted of: one, or all.
///
/// # Errors
/// ENODEV when there is none of that name.
pub fn devices(name: Option<&str>) -> Result<Vec<Arc<Device>>> {
    match name {
        Some(name) => find(name).map(|attached| vec![attached.device]),
        None => with_entries(|entries| {
            let attached = entries.values().filter_map(|entry| match entry {
                Entry::Attached(attached) => Some(attached.device.clone()),
                Entry::Attaching(_) => None,
            });
            attached.collect()
        }),
    }
}
