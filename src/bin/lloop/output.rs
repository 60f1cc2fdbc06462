//! What goes to standard output. `println!` would panic when nobody reads any more.

use crate::error::{Error, Result};
use serde_json::Value;
use std::io::{self, Write};

/// What a command has to say: the same for people and for programs.
pub struct Report {
    /// For people: whole lines.
    pub text: String,
    /// For programs.
    pub json: Value,
}

impl Report {
    /// Prints one of the two.
    ///
    /// # Errors
    /// [`Error::Output`]
    pub fn print(&self, as_json: bool) -> Result<()> {
        if as_json { write(format!("{:#}\n", self.json).as_bytes()) } else { write(self.text.as_bytes()) }
    }
}

/// Writes all of it.
///
/// # Errors
/// [`Error::Output`]
pub fn write(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::Output)
}
