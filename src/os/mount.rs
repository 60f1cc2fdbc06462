//! How the filesystem of a file is mounted.

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
    /// The mount of a filesystem, by its device number.
    pub fn of_device(dev: u64) -> Option<Mount> {
        find(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, libc::major(dev), libc::minor(dev))
    }

    /// Whether it has an option.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }
}

fn find(text: &str, major: u32, minor: u32) -> Option<Mount> {
    let wanted = format!("{major}:{minor}");
    text.lines().find_map(|line| {
        let (own, filesystem) = line.split_once(" - ")?;
        let (own, filesystem): (Vec<&str>, Vec<&str>) = (own.split(' ').collect(), filesystem.split(' ').collect());
        if *own.get(2)? != wanted {
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
        let mount = find(text, 0, 47).unwrap();
        assert_eq!((mount.point.as_str(), mount.source.as_str()), ("/mnt/l", "10.0.0.1@tcp:/fs"));
        assert_eq!(mount.options, ["rw", "relatime", "localflock", "lazystatfs"]);
        assert!(mount.has("localflock") && !mount.has("flock") && find(text, 0, 48).is_none());
    }
}
