//! Whose rights the process has, and who may use the sockets it makes.

use crate::error::{Error, Result, reason};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{self, Gid, Uid, User};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::ffi::CString;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// A user to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    name: CString,
    uid: Uid,
    gid: Gid,
}

/// Looks a user up, by name or number. Before anything is started: a mistake is told at once.
///
/// # Errors
/// EINVAL for a user that is not there, or is root; EPERM when this process is not root's.
pub fn account(name: &str) -> Result<Account> {
    let found = match name.parse() {
        Ok(uid) => User::from_uid(Uid::from_raw(uid)),
        Err(_) => User::from_name(name),
    };
    let user = match found {
        Ok(Some(user)) => user,
        Ok(None) => {
            return Err(Error::new(
                libc::EINVAL,
                format!("--user {name}: there is no such user; create it (useradd -r)"),
            ));
        }
        Err(errno) => return Err(Error::os(errno as i32, format!("--user {name}"))),
    };
    if user.uid.is_root() {
        return Err(Error::new(libc::EINVAL, format!("--user {name}: that is root; leave --user out")));
    }
    if !unistd::geteuid().is_root() {
        return Err(Error::new(
            libc::EPERM,
            format!("--user {name}: only root can become another user; start lloop_tgt as {name}"),
        ));
    }
    let name = CString::new(user.name).map_err(|_| Error::new(libc::EINVAL, "a user's name holds a NUL byte"))?;
    Ok(Account { name, uid: user.uid, gid: user.gid })
}

impl Account {
    /// Makes every thread of the process this user's, with the user's groups and without any capability. For good.
    ///
    /// # Errors
    /// The system's errno. Then the process may have half of its rights, and should end.
    pub fn assume(&self) -> Result<()> {
        let failed = |what: &str| {
            let what = format!("becoming user {}: {what}", self.name.to_string_lossy());
            move |errno: nix::Error| Error::os(errno as i32, what)
        };
        // What is registered with io_uring counts against this limit for everybody but root.
        let unlimited = Rlimit { current: None, maximum: None };
        if let Err(errno) = setrlimit(Resource::Memlock, unlimited) {
            tracing::warn!(
                "the limit of locked memory cannot be raised ({}): io_uring may have to do without registered memory",
                reason(errno.raw_os_error())
            );
        }
        // (The C library makes each of these calls on all threads.)
        unistd::initgroups(&self.name, self.gid).map_err(failed("its groups"))?;
        unistd::setgid(self.gid).map_err(failed("its group"))?;
        unistd::setuid(self.uid).map_err(failed("its rights"))?;
        if unistd::setuid(Uid::from_raw(0)).is_ok() {
            return Err(Error::new(libc::EPERM, "root's rights were given up, and are still there"));
        }
        Ok(())
    }

    /// Gives it a file of this process: the socket that it will be asked on.
    ///
    /// # Errors
    /// The system's errno.
    pub fn own(&self, path: &Path) -> Result<()> {
        unistd::chown(path, Some(self.uid), Some(self.gid)).map_err(|errno| {
            Error::os(errno as i32, format!("giving {} to user {}", path.display(), self.name.to_string_lossy()))
        })
    }
}

static TO_ONESELF: AtomicBool = AtomicBool::new(false);

/// What this process makes from now on, sockets above all, is for its own user only.
pub fn keep_to_oneself() {
    TO_ONESELF.store(true, Ordering::Relaxed);
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// No more folders are made, so nothing needs to be executable: with [`keep_to_oneself`], sockets come out as 0600.
pub fn folders_are_made() {
    if TO_ONESELF.load(Ordering::Relaxed) {
        umask(Mode::S_IXUSR | Mode::S_IRWXG | Mode::S_IRWXO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_that_are_none() {
        for (name, word) in
            [("no-such-user-here", "no such user"), ("4294967290", "no such user"), ("root", "root"), ("0", "root")]
        {
            let error = account(name).unwrap_err();
            assert!(
                error.errno == libc::EINVAL && error.message.contains(word) && error.message.contains(name),
                "{error}"
            );
        }
    }

    #[test]
    fn users_by_name_and_number() {
        if unistd::geteuid().is_root() {
            assert_eq!(account("nobody").unwrap(), account("65534").unwrap());
        } else {
            assert_eq!(account("nobody").unwrap_err().errno, libc::EPERM);
        }
    }
}
