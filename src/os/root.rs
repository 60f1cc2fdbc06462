//! Folders that nothing is opened outside of, whatever a client's path says.
//!
//! The folders are opened once, at the start. A path is then looked up by the kernel below one of them (`openat2`), and what it
//! finds is a handle: no `..` and no symbolic link leads out, and nobody who renames things meanwhile gets in between.

use crate::error::{Error, Result, reason};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::{Errno, retry_on_intr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// How often a lookup is repeated that was disturbed by renames.
const MAX_DISTURBED: usize = 128;

static ROOTS: OnceLock<Roots> = OnceLock::new();

/// Confines every [`open_handle`] of this process to `folders`, for good.
///
/// # Errors
/// ENOSYS where the kernel has no `openat2`; what comes of opening the folders; EINVAL the second time.
pub fn confine(folders: &[PathBuf]) -> Result<()> {
    let roots = Roots::open(folders)?;
    ROOTS.set(roots).map_err(|_| Error::new(libc::EINVAL, "the roots are set already, and they do not change"))
}

/// The folders that this process is confined to, as they were given; none: all.
pub fn folders() -> Vec<PathBuf> {
    ROOTS.get().map(|roots| roots.0.iter().map(|root| root.given.clone()).collect()).unwrap_or_default()
}

/// A handle (O_PATH) to what `path` leads to. Blocks as long as the filesystem does.
///
/// # Errors
/// EACCES outside of the folders, naming them; else, with no message yet, the system's errno.
pub fn open_handle(path: &Path) -> Result<OwnedFd, OpenError> {
    match ROOTS.get() {
        Some(roots) => roots.open_handle(path),
        None => {
            let opened = retry_on_intr(|| open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()));
            opened.map_err(|errno| OpenError::System(errno.raw_os_error()))
        }
    }
}

/// Why there is no handle.
#[derive(Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The path leads out of the folders.
    Outside(Error),
    /// The system's errno.
    System(i32),
}

/// A folder, under both of its names.
struct Root {
    given: PathBuf,
    real: PathBuf,
    fd: OwnedFd,
}

/// Some folders.
struct Roots(Vec<Root>);

impl Roots {
    fn open(folders: &[PathBuf]) -> Result<Roots> {
        folders.iter().map(|folder| Root::open(folder)).collect::<Result<_>>().map(Roots)
    }

    fn open_handle(&self, path: &Path) -> Result<OwnedFd, OpenError> {
        let outside = |why: &str| {
            let roots = self.0.iter().map(|root| root.given.display().to_string()).collect::<Vec<_>>().join(", ");
            let shown = path.display();
            OpenError::Outside(Error::new(
                libc::EACCES,
                format!("{shown} {why}; lloop_tgt was started with --root {roots} and attaches files in there only"),
            ))
        };
        // The words of a path only choose the folder. What is below it is for the kernel to find. Folders may lie in each other,
        // and what leads out of one need not lead out of another.
        let mut left_by_links = false;
        for (root, rest) in self.0.iter().filter_map(|root| root.below(path).map(|rest| (root, rest))) {
            match root.look_up(rest) {
                Ok(handle) => return Ok(handle),
                Err(Errno::XDEV) => left_by_links = true,
                Err(errno) => return Err(OpenError::System(errno.raw_os_error())),
            }
        }
        Err(outside(match left_by_links {
            true => "leads outside, by .. or by a symbolic link (absolute ones are not followed)",
            false => "is outside",
        }))
    }
}

impl Root {
    fn open(folder: &Path) -> Result<Root> {
        let shown = folder.display();
        let failed =
            |errno: i32| Error::new(errno, format!("--root {shown}: {}; name an existing folder", reason(errno)));
        let system = |e: std::io::Error| failed(e.raw_os_error().unwrap_or(libc::EIO));
        let given = std::path::absolute(folder).map_err(system)?;
        let real = given.canonicalize().map_err(system)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat2(CWD, &real, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).map_err(|e| match e {
            Errno::NOSYS => Error::new(
                libc::ENOSYS,
                "--root needs the system call openat2, which this kernel (before 5.6) or sandbox has not; leave --root out, or use a newer kernel",
            ),
            e => failed(e.raw_os_error()),
        })?;
        Ok(Root { given, real, fd })
    }

    /// The rest of `path` if it starts with one of the folder's names.
    fn below<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        let rest = path.strip_prefix(&self.given).or_else(|_| path.strip_prefix(&self.real)).ok()?;
        Some(if rest.as_os_str().is_empty() { Path::new(".") } else { rest })
    }

    fn look_up(&self, rest: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let mut disturbed = 0;
        loop {
            match openat2(self.fd.as_fd(), rest, flags, Mode::empty(), resolve) {
                // With a .. in the path the kernel gives up when anything is renamed anywhere meanwhile.
                Err(Errno::AGAIN) if disturbed < MAX_DISTURBED => disturbed += 1,
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    fn inode(handle: &OwnedFd) -> u64 {
        rustix::fs::fstat(handle).unwrap().st_ino
    }

    fn refused(roots: &Roots, path: &Path) {
        match roots.open_handle(path) {
            Err(OpenError::Outside(error)) => assert!(
                error.errno == libc::EACCES
                    && error.message.contains(path.to_str().unwrap())
                    && error.message.contains("in"),
                "{error}"
            ),
            other => panic!("{}: {other:?}", path.display()),
        }
    }

    #[test]
    fn nothing_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(root.join("sub/a"), "").unwrap();
        fs::write(out.join("b"), "").unwrap();
        symlink("sub/a", root.join("link")).unwrap();
        symlink("../in/sub", root.join("out-and-in")).unwrap();
        symlink("../out", root.join("folder")).unwrap();
        symlink("../out/b", root.join("file")).unwrap();
        symlink("/", root.join("slash")).unwrap();
        symlink(&root, dir.path().join("alias")).unwrap();
        let ino = fs::metadata(root.join("sub/a")).unwrap().ino();
        let roots = Roots::open(std::slice::from_ref(&root)).unwrap();
        for good in ["sub/a", "link", "sub/../sub/a", "./sub/./a"] {
            assert_eq!(inode(&roots.open_handle(&root.join(good)).unwrap()), ino, "{good}");
        }
        for bad in ["../out/b", "sub/../../out/b", "folder/b", "file", "slash/etc/passwd", "out-and-in/a", ".."] {
            refused(&roots, &root.join(bad));
        }
        for bad in [out.join("b"), dir.path().join("in2"), "/etc/passwd".into(), "relative".into(), "/".into()] {
            refused(&roots, &bad);
        }
        refused(&roots, &dir.path().join("alias/sub/a"));
        assert_eq!(roots.open_handle(&root.join("missing")).unwrap_err(), OpenError::System(libc::ENOENT));
        assert!(roots.open_handle(&root).is_ok(), "the folder itself is inside");

        let by_alias = Roots::open(&[dir.path().join("alias")]).unwrap();
        for good in ["alias/sub/a", "in/sub/a"] {
            assert_eq!(inode(&by_alias.open_handle(&dir.path().join(good)).unwrap()), ino, "{good}");
        }
        let both = Roots::open(&[root.clone(), out.clone()]).unwrap();
        assert!(both.open_handle(&out.join("b")).is_ok() && both.open_handle(&root.join("sub/a")).is_ok());
        refused(&both, &root.join("file"));
        let nested = Roots::open(&[root.join("sub"), root.clone()]).unwrap();
        assert!(nested.open_handle(&root.join("sub/../link")).is_ok());
        refused(&nested, &root.join("sub/../../out/b"));
    }

    #[test]
    fn folders_that_are_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (folder, errno) in [(Path::new("/nowhere/x"), libc::ENOENT), (file.path(), libc::ENOTDIR)] {
            let error = Roots::open(&[folder.to_owned()]).err().unwrap();
            assert!(error.errno == errno && error.message.contains(folder.to_str().unwrap()), "{error}");
        }
    }

    /// A folder and a link to the outside change places all the time: a lookup finds the inner file, or nothing.
    #[test]
    fn renames_in_between() {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("in"), dir.path().join("out"));
        for folder in [&root, &out, &root.join("real")] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(root.join("real/a"), "").unwrap();
        fs::write(out.join("a"), "").unwrap();
        symlink("../out", root.join("trap")).unwrap();
        let inside = fs::metadata(root.join("real/a")).unwrap().ino();
        let roots = Roots::open(std::slice::from_ref(&root)).unwrap();
        let stop = AtomicBool::new(false);
        let (mut found, mut refusals) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for (from, to) in [("real", "x"), ("x", "real"), ("trap", "x"), ("x", "trap")] {
                        fs::rename(root.join(from), root.join(to)).unwrap();
                    }
                }
            });
            let start = Instant::now();
            let mut lookups = 0;
            while lookups < 20_000 || (found == 0 || refusals == 0) && start.elapsed() < Duration::from_secs(60) {
                lookups += 1;
                for path in ["x/a", "x/../x/a"] {
                    match roots.open_handle(&root.join(path)) {
                        Ok(handle) => {
                            assert_eq!(inode(&handle), inside);
                            found += 1;
                        }
                        Err(OpenError::Outside(_)) => refusals += 1,
                        Err(OpenError::System(errno)) => {
                            assert!([libc::ENOENT, libc::EAGAIN].contains(&errno), "{errno}")
                        }
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(found > 0 && refusals > 0, "it was no race: {found} found, {refusals} refused");
    }
}
