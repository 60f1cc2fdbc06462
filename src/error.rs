//! The one error type of the control plane: an errno for programs, a sentence for people.

/// Why a request was refused: what a JSON-RPC error carries.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The errno, positive (`libc::EBUSY` for example). On the wire it is negative.
    pub errno: i32,
    /// What was wrong, with which file or device, and what to do about it.
    pub message: String,
}

/// A result of the control plane.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with its sentence.
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Error { errno, message: message.into() }
    }

    /// "`what`: `reason of errno`", for failures that need no more explanation than the system's own.
    pub fn os(errno: i32, what: impl std::fmt::Display) -> Self {
        Error { errno, message: format!("{what}: {}", reason(errno)) }
    }
}

/// The system's words for an errno: `"No space left on device"`.
pub fn reason(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_without_the_number() {
        assert_eq!(reason(libc::ENOSPC), "No space left on device");
        assert_eq!(Error::os(libc::EIO, "read x").to_string(), "read x: Input/output error");
    }
}
