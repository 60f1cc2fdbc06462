//! A mounted slowfs (tests/slowfs.rs).

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A slow, stuck or failing file; unmounted with the value.
pub struct SlowFile {
    child: Child,
    mountpoint: PathBuf,
    faults: PathBuf,
    /// The file below: what is really there.
    pub backing: PathBuf,
    /// The file to attach.
    pub path: PathBuf,
}

impl SlowFile {
    /// Serves a new file of `len_bytes` from a folder.
    pub fn new(folder: &Path, len_bytes: u64) -> Self {
        let backing = super::image(folder, "backing", len_bytes);
        let mountpoint = folder.join("slow");
        std::fs::create_dir(&mountpoint).unwrap();
        let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples/slowfs");
        let child = Command::new(&program).args([&backing, &mountpoint]).spawn().unwrap_or_else(|e| {
            panic!("{}: {e}; cargo test builds it", program.display());
        });
        let path = mountpoint.join("image");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !path.exists() {
            assert!(Instant::now() < deadline, "slowfs does not come up; is /dev/fuse there?");
            std::thread::sleep(Duration::from_millis(10));
        }
        let faults = backing.with_file_name("backing.faults");
        SlowFile { child, mountpoint, faults, backing, path }
    }

    /// What is wrong from now on, in slowfs's words; nothing when empty.
    pub fn set_faults(&self, words: &str) {
        // Replaced at once, so that nobody reads half of it, and with a new time of change.
        let new = self.faults.with_extension("new");
        std::fs::write(&new, words).unwrap();
        std::fs::rename(&new, &self.faults).unwrap();
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        self.set_faults("");
        let _ = Command::new("umount").arg("-l").arg(&self.mountpoint).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
