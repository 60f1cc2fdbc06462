//! `lloop create`: an image to attach. The target has no part in it.

use crate::error::{Error, Result};
use crate::output::Report;
use crate::size;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

/// Makes an image, sparse or with all its space. What is there is never touched, and a half-made image does not stay.
///
/// # Errors
/// When the file exists, or cannot be made.
pub fn create(file: &Path, size_bytes: u64, preallocate: bool) -> Result<Report> {
    let shown = file.display();
    let image = OpenOptions::new().write(true).create_new(true).open(file).map_err(|e| {
        Error::Failed(match e.kind() {
            io::ErrorKind::AlreadyExists => format!("{shown} exists already; lloop create overwrites nothing"),
            _ => format!("cannot create {shown}: {}", reason(&e)),
        })
    })?;
    if let Err(e) = fill(&image, size_bytes, preallocate) {
        let left = match fs::remove_file(file) {
            Ok(()) => String::new(),
            Err(e) => format!("; and what was made of it cannot be removed: {}", reason(&e)),
        };
        return Err(Error::Failed(format!(
            "cannot create {shown} with {}: {}{left}",
            size::exact(size_bytes),
            reason(&e)
        )));
    }
    let kind = if preallocate { "allocated" } else { "sparse" };
    Ok(Report {
        text: format!("{shown}: {}, {kind}\n", size::exact(size_bytes)),
        json: json!({"filename": file.to_string_lossy(), "size": size_bytes, "preallocated": preallocate}),
    })
}

fn fill(image: &File, size_bytes: u64, preallocate: bool) -> io::Result<()> {
    if preallocate {
        retry_on_intr(|| fallocate(image, FallocateFlags::empty(), 0, size_bytes)).map_err(|e| match e {
            // Writing zeroes instead, as posix_fallocate does, would take hours for what people have in mind.
            Errno::OPNOTSUPP => io::Error::other("this filesystem allocates no space ahead; leave --preallocate out"),
            e => e.into(),
        })?;
    } else {
        image.set_len(size_bytes)?;
    }
    // Some filesystems notice only now that there is no space, or a quota.
    image.sync_all()
}

/// The system's words without its number.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn images_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        let report = create(&file, 1 << 20, false).unwrap();
        let about = fs::metadata(&file).unwrap();
        assert_eq!((about.len(), about.blocks()), (1 << 20, 0));
        assert!(report.text.contains("1048576 bytes (1 MiB), sparse") && report.json["size"] == 1 << 20);
        let error = create(&file, 2 << 20, false).err().unwrap().to_string();
        assert!(error.contains("exists already"), "{error}");
        assert_eq!(fs::metadata(&file).unwrap().len(), 1 << 20, "it is untouched");
    }

    #[test]
    fn a_half_made_image_does_not_stay() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        for preallocate in [false, true] {
            let error = create(&file, 1 << 62, preallocate).err().unwrap().to_string();
            assert!(error.contains("a.img") && !error.contains("os error"), "{error}");
            assert!(!file.exists());
        }
        assert!(
            create(Path::new("/nonexistent/a.img"), 4096, false).err().unwrap().to_string().contains("No such file")
        );
    }
}
