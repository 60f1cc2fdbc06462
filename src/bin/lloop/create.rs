//! `lloop create`: an image to attach. The target has no part in it.

use crate::args::Create;
use crate::error::{Error, Result, reason};
use crate::lustre::create::{O_LOV_DELAY_CREATE, Striping, is_on_lustre, set_stripe};
use crate::lustre::layout::{ALL_OSTS, Layout, STRIPE_UNIT_BYTES};
use crate::output::Report;
use crate::pool::{self, Pool};
use crate::size;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use rustix::io::{Errno, retry_on_intr};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const MAX_STRIPES: i32 = 2000;
const MAX_POOL_BYTES: usize = 15;

/// A stripe count as it is typed: 1 to 2000, or -1 for all OSTs.
///
/// # Errors
/// A sentence.
pub fn parse_stripe_count(text: &str) -> Result<u16, String> {
    match text.parse::<i32>() {
        Ok(-1) => Ok(ALL_OSTS as u16),
        Ok(count @ 1..=MAX_STRIPES) => Ok(count as u16),
        _ => Err(format!("must be 1 to {MAX_STRIPES}, or -1 for all OSTs")),
    }
}

/// A stripe size as it is typed.
///
/// # Errors
/// A sentence.
pub fn parse_stripe_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text)?;
    match u32::try_from(bytes) {
        Ok(size) if size > 0 && bytes.is_multiple_of(STRIPE_UNIT_BYTES) => Ok(size),
        _ => Err("must be a multiple of 64K, and less than 4G".to_owned()),
    }
}

/// The name of a pool as it is typed.
///
/// # Errors
/// A sentence.
pub fn parse_pool(text: &str) -> Result<String, String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !text.is_empty() && text.len() <= MAX_POOL_BYTES && text.chars().all(is_name) {
        Ok(text.to_owned())
    } else {
        Err(format!("a pool's name has 1 to {MAX_POOL_BYTES} letters, digits, dots, underscores and hyphens"))
    }
}

/// Makes an image that only its owner can read, sparse or with all its space, on Lustre with a plain layout. What is there is never
/// touched, and a half-made image does not stay.
///
/// # Errors
/// When the file exists, cannot be made, or not as it was asked for.
pub fn create(command: &Create) -> Result<Report> {
    let (file, size_bytes, preallocate) = (&command.file, command.size_bytes, command.preallocate);
    let shown = file.display();
    let striping = striping(command);
    let folder = open_folder(file).map_err(|e| cannot(file, &e))?;
    let on_lustre = is_on_lustre(folder.as_fd()).map_err(|e| cannot(file, &io::Error::from_raw_os_error(e)))?;
    if striping.is_some() && !on_lustre {
        return Err(Error::Failed(format!(
            "{shown} would not be on Lustre, which alone stripes files; leave --stripe-count, --stripe-size and --pool out"
        )));
    }
    let pool = command.pool.as_ref().map(|name| (name.as_str(), pool::look(folder.as_fd(), name)));
    check_pool(file, pool.as_ref())?;
    let (image, note) = match &striping {
        None if on_lustre => make_by_default(file)?,
        striping => (make(file, striping.as_ref())?, None),
    };
    let made = check_osts(&image, pool.as_ref()).and_then(|()| fill(&image, size_bytes, preallocate, on_lustre));
    if let Err(e) = made {
        return Err(give_up(file, &format!("with {}", size::exact(size_bytes)), &e));
    }
    let kind = if preallocate { "allocated" } else { "sparse" };
    let mut text = format!("{shown}: {}, {kind}", size::exact(size_bytes));
    let mut json = json!({"filename": file.to_string_lossy(), "size": size_bytes, "preallocated": preallocate});
    if on_lustre && let Ok(layout) = Layout::read(image.as_fd()) {
        text += &in_words(&layout);
        json["layout"] = layout.to_json();
    }
    let unchecked = match &pool {
        Some((name, Pool::Unknown)) => Some(format!(
            "whether there is a pool {name} was not checked: this node's Lustre client does not show its pools. Compare the OSTs with \
             lfs pool_list"
        )),
        _ => None,
    };
    let notes: Vec<String> = note.into_iter().chain(unchecked).collect();
    for note in &notes {
        text += &format!("\nNote: {note}");
    }
    json["notes"] = notes.into();
    Ok(Report { text: text + "\n", json })
}

/// Makes the file, striped if that is wanted.
fn make(file: &Path, striping: Option<&Striping>) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    if striping.is_some() {
        options.custom_flags(O_LOV_DELAY_CREATE);
    }
    let image = options.open(file).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => {
            Error::Failed(format!("{} exists already; lloop create overwrites nothing", file.display()))
        }
        _ => cannot(file, &e),
    })?;
    match striping.map_or(Ok(()), |striping| stripe(&image, striping)) {
        Ok(()) => Ok(image),
        Err(e) => Err(give_up(file, "striped like this", &e)),
    }
}

/// Makes the file on Lustre when nothing was asked for: striped as the site has it, but not in components. Those are made for files that
/// grow; the first can be on the metadata server (DoM), where each stranger's read blocks one of its threads under a group lock.
fn make_by_default(file: &Path) -> Result<(File, Option<String>)> {
    let image = make(file, None)?;
    let layout = match Layout::read(image.as_fd()) {
        Ok(layout) if layout.composite || layout.components.iter().any(|c| !c.pattern.is_striped()) => layout,
        _ => return Ok((image, None)),
    };
    drop(image);
    fs::remove_file(file).map_err(|e| cannot(file, &e))?;
    let striping = plain(&layout);
    let note =
        format!("this site's default is a layout of components ({}); the image got a plain one", describe(&layout));
    match make(file, Some(&striping)) {
        Ok(image) => Ok((image, Some(note))),
        Err(e) if layout.components.iter().any(|c| c.pattern.is_mdt()) => Err(Error::Failed(format!(
            "{e}. This site's default puts a part of each file on its metadata server (DoM), where an image must not be: make it in a \
             folder with another default (lfs setstripe)"
        ))),
        // The site allows no choice. Its components will do.
        Err(_) => Ok((make(file, None)?, None)),
    }
}

/// The striping of most of a layout, for the whole of a file.
fn plain(layout: &Layout) -> Striping {
    let widest =
        layout.components.iter().filter(|c| c.pattern.is_striped()).max_by_key(|c| c.end_bytes - c.start_bytes);
    widest.map_or_else(Striping::default, |component| Striping {
        stripe_count: u16::try_from(component.stripe_count).unwrap_or(0),
        stripe_size_bytes: u32::try_from(component.stripe_size_bytes).unwrap_or(0),
        pool: component.pool.clone(),
    })
}

/// "mdt, raid0"
fn describe(layout: &Layout) -> String {
    layout.components.iter().map(|component| component.pattern.to_string()).collect::<Vec<_>>().join(", ")
}

/// Removes what was made of a file, and says why it is not made.
fn give_up(file: &Path, how: &str, error: &io::Error) -> Error {
    let left = match fs::remove_file(file) {
        Ok(()) => String::new(),
        Err(e) => format!("; and what was made of it cannot be removed: {}", reason(&e)),
    };
    Error::Failed(format!("cannot create {} {how}: {}{left}", file.display(), reason(error)))
}

/// Refuses a pool that does not exist.
fn check_pool(file: &Path, pool: Option<&(&str, Pool)>) -> Result<()> {
    let Some((name, Pool::Missing { filesystem, others })) = pool else { return Ok(()) };
    let others = if others.is_empty() { "it has none".to_owned() } else { format!("it has {}", others.join(", ")) };
    Err(Error::Failed(format!(
        "cannot create {}: the file system {filesystem} has no pool {name} ({others}); lfs pool_list {filesystem} lists its pools",
        file.display()
    )))
}

/// Whether a new file is on OSTs of its pool.
fn check_osts(image: &File, pool: Option<&(&str, Pool)>) -> io::Result<()> {
    let (Some((name, Pool::Of(members))), Ok(layout)) = (pool, Layout::read(image.as_fd())) else { return Ok(()) };
    let strangers: Vec<u32> = osts(&layout).into_iter().filter(|ost| !members.contains(ost)).collect();
    if strangers.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "Lustre put it on OST {}, and pool {name} has OST {}; is the pool changed just now? Try again",
        numbers(&strangers),
        numbers(members)
    )))
}

/// The OSTs of a layout, each once.
fn osts(layout: &Layout) -> Vec<u32> {
    let mut osts: Vec<u32> = layout.objects().map(|(_, _, object)| object.ost_idx).collect();
    osts.sort_unstable();
    osts.dedup();
    osts
}

/// "0, 1, 5"; not more than a line.
fn numbers(osts: &[u32]) -> String {
    const SHOWN: usize = 16;
    let shown: Vec<String> = osts.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if osts.len() > SHOWN { format!(" and {} more", osts.len() - SHOWN) } else { String::new() };
    shown.join(", ") + &more
}

/// What was asked for; none if all is left to the site.
fn striping(command: &Create) -> Option<Striping> {
    let striping = Striping {
        stripe_count: command.stripe_count.unwrap_or(0),
        stripe_size_bytes: command.stripe_size.unwrap_or(0),
        pool: command.pool.clone(),
    };
    (striping != Striping::default()).then_some(striping)
}

/// The folder of a file. No permission to read it is needed.
fn open_folder(file: &Path) -> io::Result<OwnedFd> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    Ok(open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Stripes a new file, and looks whether that is what it got.
fn stripe(image: &File, striping: &Striping) -> io::Result<()> {
    set_stripe(image.as_fd(), striping).map_err(|errno| {
        let advice = match errno {
            libc::EEXIST | libc::EALREADY => {
                "this site gives new files a layout that cannot be chosen; leave the striping out"
            }
            libc::EINVAL | libc::ENOENT => "are there such a pool (lfs pool_list) and so many OSTs (lfs osts)?",
            _ => "leave --stripe-count, --stripe-size and --pool out to take what the site has",
        };
        io::Error::other(format!(
            "Lustre refuses this striping: {}; {advice}",
            reason(&io::Error::from_raw_os_error(errno))
        ))
    })?;
    let unmet = match Layout::read(image.as_fd()) {
        Ok(layout) => striping.unmet(&layout),
        Err(libc::ENODATA) => Some("it has no layout".to_owned()),
        Err(errno) => return Err(io::Error::from_raw_os_error(errno)),
    };
    match unmet {
        None => Ok(()),
        Some(what) => Err(io::Error::other(format!(
            "Lustre took the striping without an error, but did not do it: {what}. The site may not allow it, or have fewer OSTs \
             (lfs osts, lfs pool_list); ask for what it has"
        ))),
    }
}

/// A layout in a few words, behind a comma.
fn in_words(layout: &Layout) -> String {
    match &layout.components[..] {
        [component] if !layout.composite && component.pattern.is_striped() => {
            let pool = component.pool.as_ref().map_or(String::new(), |pool| format!(" in pool {pool}"));
            let stripes = if component.stripe_count == 1 { "stripe" } else { "stripes" };
            let size = size::human(component.stripe_size_bytes);
            let osts = osts(layout);
            let osts = if osts.is_empty() { String::new() } else { format!(", on OST {}", numbers(&osts)) };
            format!(", {} {stripes} of {size}{pool}{osts}", component.stripe_count)
        }
        components if layout.composite => format!(", a layout of {} components", components.len()),
        _ => String::new(),
    }
}

fn fill(image: &File, size_bytes: u64, preallocate: bool, on_lustre: bool) -> io::Result<()> {
    if preallocate {
        retry_on_intr(|| fallocate(image, FallocateFlags::empty(), 0, size_bytes)).map_err(|e| match e {
            // Writing zeroes instead, as posix_fallocate does, would take hours for what people have in mind.
            Errno::OPNOTSUPP if on_lustre => io::Error::other(
                "these Lustre servers allocate no space ahead (those on ZFS never do); leave --preallocate out",
            ),
            Errno::OPNOTSUPP => io::Error::other("this filesystem allocates no space ahead; leave --preallocate out"),
            e => e.into(),
        })?;
    } else {
        image.set_len(size_bytes)?;
    }
    // Some filesystems notice only now that there is no space, or a quota.
    image.sync_all()
}

fn cannot(file: &Path, error: &io::Error) -> Error {
    Error::Failed(format!("cannot create {}: {}", file.display(), reason(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn image(file: &Path, size_bytes: u64, preallocate: bool) -> Create {
        Create { file: file.to_owned(), size_bytes, preallocate, stripe_count: None, stripe_size: None, pool: None }
    }

    fn refused(command: &Create) -> String {
        create(command).err().unwrap().to_string()
    }

    #[test]
    fn images_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        let report = create(&image(&file, 1 << 20, false)).unwrap();
        let about = fs::metadata(&file).unwrap();
        assert_eq!((about.len(), about.blocks()), (1 << 20, 0));
        assert_eq!(about.mode() & 0o777, 0o600, "an image is nobody else's to read");
        assert!(report.text.contains("1048576 bytes (1 MiB), sparse\n") && report.json["size"] == 1 << 20);
        let error = refused(&image(&file, 2 << 20, false));
        assert!(error.contains("exists already"), "{error}");
        assert_eq!(fs::metadata(&file).unwrap().len(), 1 << 20, "it is untouched");
    }

    #[test]
    fn a_half_made_image_does_not_stay() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        for preallocate in [false, true] {
            let error = refused(&image(&file, 1 << 62, preallocate));
            assert!(error.contains("a.img") && !error.contains("os error"), "{error}");
            assert!(!file.exists());
        }
        assert!(refused(&image(Path::new("/nonexistent/a.img"), 4096, false)).contains("No such file"));
    }

    #[test]
    fn striping_is_for_lustre() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        let plain = || image(&file, 1 << 20, false);
        for command in [
            Create { stripe_count: Some(2), ..plain() },
            Create { stripe_size: Some(1 << 20), ..plain() },
            Create { pool: Some("flash".into()), ..plain() },
        ] {
            let error = refused(&command);
            assert!(error.contains("a.img") && error.contains("Lustre") && error.contains("--pool"), "{error}");
            assert!(!file.exists());
        }
    }
}
