//! What the SPDK under test has. Tests that need what v20.07, the last resort, lacks are left out there, and say so.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// What not every SPDK has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Part {
    /// Disks of virtual machines, by vhost-user.
    Vhost,
    /// Reactors that sleep.
    InterruptMode,
    /// An answer to the question which hosts are connected.
    ConnectedHosts,
    /// Writes that a host wants to be durable are told apart. (Without it, all are durable off Lustre, and none are on Lustre.)
    Fua,
}

/// The version of the SPDK in lloop_tgt, "26.01".
pub fn version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| {
        let output = Command::new(env!("CARGO_BIN_EXE_lloop_tgt")).arg("--version").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let version = text.split("SPDK v").nth(1).unwrap_or_else(|| panic!("no SPDK version in {text:?}"));
        version.trim().trim_end_matches(')').to_owned()
    })
}

/// Whether this SPDK has `part`. If not, the test that asks leaves out `what`, and the user is told.
pub fn has(part: Part, what: &str) -> bool {
    let number: f32 = version().parse().unwrap_or_else(|e| panic!("{}: {e}", version()));
    let is_there = match part {
        // A tree can be built without it.
        Part::Vhost => match std::env::var_os("SPDK_DIR") {
            Some(tree) => Path::new(&tree).join("build/lib/libspdk_vhost.a").exists(),
            None => number > 24.0,
        },
        Part::InterruptMode | Part::ConnectedHosts | Part::Fua => number > 24.0,
    };
    if !is_there {
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let line = format!("left out: {test}: {what}: SPDK v{} here is without {part:?}\n", version());
        // Not by eprintln!, which libtest keeps to itself when a test passes; and as a whole, or another test's line is in between.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    is_there
}
