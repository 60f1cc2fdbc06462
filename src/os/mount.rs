//! How the filesystem of a file is mounted. On its own: the `lloop` command includes it as well.

use std::os::fd::{AsRawFd, BorrowedFd};

/// A line of /proc/self/mountinfo (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub point: String,
    /// What.
    pub source: String,
    /// The options of the mount and of the filesystem.
    pub options: Vec<String>,
}

impl Mount {
    /// The mount that an open file was opened through. A filesystem can be mounted several times, with other options each time, and
    /// all of these mounts have one device number.
    pub fn of(file: BorrowedFd<'_>) -> Option<Mount> {
        let id = mount_id(file)?.to_string();
        find(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, &id)
    }

    /// Whether it has an option.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }
}

/// The number of the mount in /proc/self/mountinfo (Linux 5.8).
fn mount_id(file: BorrowedFd<'_>) -> Option<u64> {
    // SAFETY: statx is plain data, for which zeroes are valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor, an empty C string (allowed by AT_EMPTY_PATH) and a live structure.
    let rc = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_MNT_ID, &mut stat) };
    (rc == 0 && stat.stx_mask & libc::STATX_MNT_ID != 0).then_some(stat.stx_mnt_id)
}

fn find(text: &str, id: &str) -> Option<Mount> {
    text.lines().find_map(|line| {
        let (own, filesystem) = line.split_once(" - ")?;
        let (own, filesystem): (Vec<&str>, Vec<&str>) = (own.split(' ').collect(), filesystem.split(' ').collect());
        if *own.first()? != id {
            return None;
        }
        let mut options: Vec<String> = own.get(5)?.split(',').map(str::to_owned).collect();
        for option in filesystem.get(2)?.split(',') {
            if !options.iter().any(|o| o == option) {
                options.push(option.to_owned());
            }
        }
        Some(Mount { point: (*own.get(4)?).to_owned(), source: (*filesystem.get(1)?).to_owned(), options })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo() {
        let text = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                    40 22 0:47 / /mnt/l rw,relatime shared:9 - lustre 10.0.0.1@tcp:/fs rw,localflock,lazystatfs\n\
                    nonsense\n";
        let mount = find(text, "40").unwrap();
        assert_eq!((mount.point.as_str(), mount.source.as_str()), ("/mnt/l", "10.0.0.1@tcp:/fs"));
        assert_eq!(mount.options, ["rw", "relatime", "localflock", "lazystatfs"]);
        assert!(mount.has("localflock") && !mount.has("flock") && find(text, "47").is_none());
    }

    #[test]
    fn the_mount_of_an_open_file() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let mount = Mount::of(std::os::fd::AsFd::as_fd(&file)).unwrap();
        assert_eq!((mount.point.as_str(), mount.has("no such option")), ("/proc", false));
    }
}
