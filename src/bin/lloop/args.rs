//! The command line.

use crate::client::Address;
use crate::{create, export, listen, options, size};
use clap::{Parser, Subcommand, ValueHint};
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

const DEFAULT_SOCKET: &str = "/var/tmp/spdk.sock";
const SOCKET_VARIABLE: &str = "LLOOP_SOCKET";
/// The heading of what every command takes.
const GLOBAL: &str = "Target and output";

/// Files, on Lustre above all, as block devices in user space: attach them to a running lloop_tgt, look at them, export them
/// over NVMe-oF.
#[derive(Parser, Debug)]
#[command(name = "lloop", version, max_term_width = 120)]
pub struct Args {
    /// Where the target listens: a socket's path, or host:port [default: $LLOOP_SOCKET, or /var/tmp/spdk.sock]
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "PATH", value_hint = ValueHint::FilePath)]
    socket: Option<OsString>,
    /// How long to wait for the target's answers, in seconds
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "SECONDS", default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// Print JSON
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// Where the target is.
    pub fn address(&self) -> Address {
        let variable = || env::var_os(SOCKET_VARIABLE).filter(|value| !value.is_empty());
        Address::parse(self.socket.clone().or_else(variable).unwrap_or_else(|| DEFAULT_SOCKET.into()))
    }

    /// How long to wait for an answer.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Attach a file as a block device, and print the device's name
    Attach(Attach),
    /// Detach a device
    Detach {
        /// The device
        name: String,
        /// Even while it is in use
        #[arg(long)]
        force: bool,
    },
    /// List the devices
    #[command(visible_alias = "ls")]
    List,
    /// Show all there is to know of a device
    Info {
        /// The device
        name: String,
    },
    /// Make an image file to attach; needs no target
    Create(Create),
    /// Grow a device, and its file where it is too short
    Resize {
        /// The device
        name: String,
        /// Its new size (10G, 1536M, ...); the file's size when left out
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
        /// The same
        #[arg(long = "size", value_name = "SIZE", value_parser = size::parse, conflicts_with = "size")]
        size_option: Option<u64>,
    },
    /// Resume a device that is fenced or degraded
    Resume {
        /// The device
        name: String,
    },
    /// Show what devices have done: operations, bytes, errors, latencies, queues
    Stat {
        /// The device; all when left out
        name: Option<String>,
        /// Again and again, with rates, every so many seconds (1 when left out), until Ctrl-C. Latencies are those since the
        /// attach
        #[arg(long, value_name = "SECONDS", num_args = 0..=1)]
        watch: Option<Option<String>>,
    },
    /// Offer a device to others
    #[command(subcommand)]
    Export(Export),
    /// Take a device's exports back
    Unexport {
        /// The device
        name: String,
        /// From this subsystem only
        #[arg(long, value_parser = export::parse_nqn)]
        nqn: Option<String>,
    },
    /// Show the module's options, or change some
    Options {
        /// Options to change (max_merge_bytes=4M)
        #[arg(long, value_name = "KEY=VALUE", num_args = 1.., value_parser = options::parse)]
        set: Vec<options::Setting>,
    },
    /// Print a script for a shell that completes the command line
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `lloop attach`
#[derive(clap::Args, Debug)]
pub struct Attach {
    /// The file
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Name of the device [default: the lowest free lloopN]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Logical block size in bytes [default: 4096]
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    pub block_size: Option<String>,
    /// No writes
    #[arg(long)]
    pub read_only: bool,
    /// Where in the file the device starts
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub offset: Option<u64>,
    /// How much of the file the device has at most [default: all]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub size_limit: Option<u64>,
    /// What moves the data [default: auto]
    #[arg(long, value_parser = ["auto", "threads", "uring"])]
    pub engine: Option<String>,
    /// Accept filesystems other than Lustre
    #[arg(long)]
    pub allow_any_fs: bool,
    /// The device's UUID [default: derived from the file]
    #[arg(long)]
    pub uuid: Option<uuid::Uuid>,
    /// How the file is kept from others: a Lustre group lock, an advisory lock, or not at all
    #[arg(long, value_parser = ["group", "advisory", "off"])]
    pub lock: Option<String>,
    /// The group that shares a group lock
    #[arg(long, value_name = "N")]
    pub group_id: Option<u32>,
    /// Offer no UNMAP and WRITE ZEROES
    #[arg(long)]
    pub no_discard: bool,
}

/// `lloop create`
#[derive(clap::Args, Debug)]
pub struct Create {
    /// The file to make; it must not be there yet
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Its size (10G, 1536M, ...), a multiple of 4096
    #[arg(long = "size", value_name = "SIZE", value_parser = size::parse_image)]
    pub size_bytes: u64,
    /// Allocate its space now, instead of when it is written
    #[arg(long)]
    pub preallocate: bool,
    /// On Lustre: over how many OSTs it is striped, 1 to 2000, or -1 for all [default: the site's]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = create::parse_stripe_count)]
    pub stripe_count: Option<u16>,
    /// On Lustre: how much of it lies on an OST before the next one's turn (1M, 4M, ...), a multiple of 64K [default: the site's]
    #[arg(long, value_name = "SIZE", value_parser = create::parse_stripe_size)]
    pub stripe_size: Option<u32>,
    /// On Lustre: the pool of OSTs that it is on [default: the site's]
    #[arg(long, value_name = "NAME", value_parser = create::parse_pool)]
    pub pool: Option<String>,
}

/// Ways to offer a device to others.
#[derive(Subcommand, Debug)]
pub enum Export {
    /// Over NVMe/TCP. What is there already is used: saying it twice changes nothing
    Nvmf(Nvmf),
}

/// `lloop export nvmf`
#[derive(clap::Args, Debug)]
pub struct Nvmf {
    /// The device
    pub name: String,
    /// Where to listen; [::1]:4420 with IPv6
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:4420", value_parser = listen::parse)]
    pub listen: std::net::SocketAddr,
    /// The subsystem [default: nqn.2026-11.io.lloop:NAME]
    #[arg(long, value_parser = export::parse_nqn)]
    pub nqn: Option<String>,
    /// A host that may connect, by its NQN (cat /etc/nvme/hostnqn there); may be given several times
    #[arg(long, value_name = "NQN", value_parser = export::parse_nqn, conflicts_with = "allow_any_host")]
    pub allow_host: Vec<String>,
    /// Let every host that reaches the address connect
    #[arg(long)]
    pub allow_any_host: bool,
    /// Serial number, 1 to 20 printable characters [default: derived from the device's UUID]
    #[arg(long, value_parser = export::parse_serial)]
    pub serial: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Args, clap::error::ErrorKind> {
        Args::try_parse_from(line.split(' ')).map_err(|e| e.kind())
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn commands_and_their_usage_errors() {
        for line in [
            "lloop attach f --block-size 512 --offset 1M --engine threads --lock off --uuid 6c6c6f6f-7000-5000-8000-6c7573747265",
            "lloop detach lloop0 --force --socket /run/x.sock",
            "lloop --json list",
            "lloop list --json",
            "lloop resize lloop0",
            "lloop resize lloop0 1G",
            "lloop resize lloop0 --size 1G",
            "lloop stat --watch",
            "lloop stat --watch 2 lloop0",
            "lloop options --set a=1 b=2 --set c=3",
            "lloop export nvmf lloop0 --allow-any-host --listen [::1]:4420",
            "lloop create f --size 0x10000",
            "lloop create f --size 1G --stripe-count -1 --stripe-size 1M --pool flash_2.a-b",
            "lloop create f --size 1G --stripe-count 2000 --preallocate",
            "lloop completions zsh",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "lloop attach f --block-size 1024",
            "lloop attach f --offset 1X",
            "lloop resize lloop0 1G --size 1G",
            "lloop create f",
            "lloop create f --size 0",
            "lloop create f --size 100",
            "lloop create f --size 1G --stripe-count 0",
            "lloop create f --size 1G --stripe-count 2001",
            "lloop create f --size 1G --stripe-count -2",
            "lloop create f --size 1G --stripe-size 0",
            "lloop create f --size 1G --stripe-size 100K",
            "lloop create f --size 1G --stripe-size 4G",
            "lloop create f --size 1G --pool a/b",
            "lloop create f --size 1G --pool abcdefghijklmnop",
            "lloop create f --size 1G --pool=",
            "lloop export nvmf lloop0 --listen localhost",
            "lloop export nvmf lloop0 --allow-any-host --allow-host nqn.2014-08.org.nvmexpress:uuid:x",
            "lloop export nvmf lloop0 --allow-host me",
            "lloop options --set a",
            "lloop list --timeout 0",
            "lloop",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
