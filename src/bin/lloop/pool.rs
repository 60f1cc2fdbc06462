//! Pools of OSTs, as this node's Lustre client shows them. Lustre itself stores the name of a pool that does not exist in a layout
//! and says nothing.

use crate::mount::Mount;
use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Where the client has a folder for each file system that it mounts, with a file for each pool (`lctl get_param lov.*.pools.*`).
const LOV: &str = "/proc/fs/lustre/lov";

/// What is known of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pool {
    /// It has these OSTs.
    Of(Vec<u32>),
    /// The file system has no such pool, but these.
    Missing {
        /// The file system.
        filesystem: String,
        /// Its pools.
        others: Vec<String>,
    },
    /// The client does not tell.
    Unknown,
}

/// Looks for a pool of the file system that an open file or folder is on.
pub fn look(file: BorrowedFd<'_>, name: &str) -> Pool {
    let filesystem = Mount::of(file).and_then(|mount| filesystem_of(&mount.source).map(str::to_owned));
    filesystem.map_or(Pool::Unknown, |filesystem| look_in(Path::new(LOV), &filesystem, name))
}

/// The file system's name in "10.0.0.1@tcp:/fs/folder".
fn filesystem_of(source: &str) -> Option<&str> {
    let path = source.rsplit_once(":/")?.1;
    path.split('/').next().filter(|name| !name.is_empty())
}

fn look_in(lov: &Path, filesystem: &str, name: &str) -> Pool {
    let prefix = format!("{filesystem}-clilov-");
    let mut others = None;
    for folder in fs::read_dir(lov).into_iter().flatten().flatten() {
        if !folder.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        let Ok(pools) = fs::read_dir(folder.path().join("pools")) else { continue };
        let pools: Vec<_> = pools.flatten().collect();
        if let Some(found) = pools.iter().find(|pool| pool.file_name() == name) {
            // One whose list cannot be read is there all the same.
            return fs::read_to_string(found.path()).map_or(Pool::Unknown, |list| Pool::Of(osts_of(&list)));
        }
        let names = pools.iter().map(|pool| pool.file_name().to_string_lossy().into_owned());
        others.get_or_insert_with(Vec::new).extend(names);
    }
    match others {
        None => Pool::Unknown,
        Some(mut others) => {
            others.sort_unstable();
            others.dedup();
            Pool::Missing { filesystem: filesystem.to_owned(), others }
        }
    }
}

/// The numbers in lines like "fs-OST000a_UUID".
fn osts_of(list: &str) -> Vec<u32> {
    let number = |line: &str| {
        let (_, digits) = line.trim().strip_suffix("_UUID")?.rsplit_once("-OST")?;
        u32::from_str_radix(digits, 16).ok()
    };
    list.lines().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems() {
        assert_eq!(filesystem_of("10.0.0.1@tcp:/fs"), Some("fs"));
        assert_eq!(filesystem_of("a@o2ib:b@o2ib:/scratch/home/x"), Some("scratch"));
        assert_eq!((filesystem_of("/dev/sda1"), filesystem_of("a@tcp:/")), (None, None));
    }

    #[test]
    fn pools() {
        let lov = tempfile::tempdir().unwrap();
        let look = |filesystem, name| look_in(lov.path(), filesystem, name);
        assert_eq!(look("fs", "flash"), Pool::Unknown);
        for (folder, pool, osts) in [
            ("fs-clilov-ffff0001", "flash", "fs-OST0000_UUID\nfs-OST001f_UUID\n"),
            ("fs-clilov-ffff0002", "disk", "fs-OST0002_UUID\n"),
            ("fs2-clilov-ffff0003", "other", ""),
        ] {
            let pools = lov.path().join(folder).join("pools");
            fs::create_dir_all(&pools).unwrap();
            fs::write(pools.join(pool), osts).unwrap();
        }
        assert_eq!(look("fs", "flash"), Pool::Of(vec![0, 31]));
        let others = vec!["disk".to_owned(), "flash".to_owned()];
        assert_eq!(look("fs", "other"), Pool::Missing { filesystem: "fs".into(), others: others.clone() });
        assert_eq!(look("fs", ".."), Pool::Missing { filesystem: "fs".into(), others });
        assert_eq!(look("fs3", "flash"), Pool::Unknown);
    }
}
