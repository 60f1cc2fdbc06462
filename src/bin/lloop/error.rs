//! What can go wrong, in words for the user.

use std::io;

/// Why a command ends without success.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The target refused a request.
    #[error("{message}")]
    Refused {
        /// The JSON-RPC code: a negative errno, or one of the protocol's own.
        code: i64,
        /// The target's words.
        message: String,
    },
    /// Anything else that failed.
    #[error("{0}")]
    Failed(String),
    /// The target's answer cannot be read.
    #[error("{0}")]
    Unknown(String),
    /// The command line makes no sense.
    #[error("{0} (see lloop --help)")]
    Usage(String),
    /// Standard output cannot be written.
    #[error("write to standard output: {0}")]
    Output(io::Error),
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// JSON-RPC's code for a method that is not there.
pub const METHOD_NOT_FOUND: i64 = -32601;

impl Error {
    /// The exit status that tells it.
    pub fn exit_status(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            _ => 1,
        }
    }

    /// The target does not know the method.
    pub fn is_unknown_method(&self) -> bool {
        matches!(self, Error::Refused { code: METHOD_NOT_FOUND, .. })
    }

    /// Puts words before the message of a refusal, and a remedy after it: SPDK's own messages are often but "Invalid parameters".
    pub fn explain(self, what: &str, remedy: &str) -> Self {
        let remedy = if remedy.is_empty() { String::new() } else { format!("; {remedy}") };
        match self {
            Error::Refused { code, message } => {
                Error::Refused { code, message: format!("{what}: {}{remedy}", message.trim_end()) }
            }
            other => other,
        }
    }
}

/// What the system says of a failure, without the number.
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_words() {
        assert_eq!(reason(&io::Error::from_raw_os_error(libc::ENOENT)), "No such file or directory");
        assert_eq!(reason(&io::Error::other("odd")), "odd");
    }

    #[test]
    fn refusals_are_explained() {
        let refused = || Error::Refused { code: -32602, message: "Invalid parameters\n".into() };
        assert_eq!(
            refused().explain("no listening", "is the port free?").to_string(),
            "no listening: Invalid parameters; is the port free?"
        );
        assert_eq!(refused().explain("no listening", "").to_string(), "no listening: Invalid parameters");
        assert_eq!(Error::Failed("x".into()).explain("y", "z").to_string(), "x");
        assert_eq!((refused().exit_status(), Error::Usage(String::new()).exit_status()), (1, 2));
    }
}
