//! The command line.

use crate::client::Address;
use crate::{create, export, iscsi, listen, options, size, vhost};
use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand, ValueHint, value_parser};
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

const DEFAULT_SOCKET: &str = "/var/tmp/spdk.sock";
const DEFAULT_CONFIG: &str = "/etc/lloop/config.json";
const SOCKET_VARIABLE: &str = "LLOOP_SOCKET";
const SOCKET: &str = "target_socket";
/// The heading of what every command takes.
const GLOBAL: &str = "Target and output";

/// Files, on Lustre above all, as block devices in user space: attach them to a running lloop_tgt, look at them, export them
/// over NVMe-oF and iSCSI and to virtual machines.
#[derive(Parser, Debug)]
#[command(name = "lloop", version, max_term_width = 120)]
pub struct Args {
    /// `--socket` of every command that has not another one of its own: [`with_socket`].
    #[arg(skip)]
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

/// Gives the command and those below it the option that says where the target is. It is no global option of clap's, because
/// behind `export vhost-blk` and its like `--socket` is the virtual machine's socket.
fn with_socket(command: clap::Command) -> clap::Command {
    let has_own = command.get_arguments().any(|argument| argument.get_long() == Some("socket"));
    let command = if has_own {
        command
    } else {
        command.arg(
            Arg::new(SOCKET)
                .long("socket")
                .help("Where the target listens: a socket's path, or host:port [default: $LLOOP_SOCKET, or /var/tmp/spdk.sock]")
                .help_heading(GLOBAL)
                .value_name("PATH")
                .value_hint(ValueHint::FilePath)
                .value_parser(value_parser!(OsString)),
        )
    };
    command.mut_subcommands(with_socket)
}

/// What was said last, on the way down the commands.
fn socket(matches: &ArgMatches) -> Option<OsString> {
    let below = matches.subcommand().and_then(|(_, matches)| socket(matches));
    below.or_else(|| matches.try_get_one::<OsString>(SOCKET).ok().flatten().cloned())
}

impl Args {
    /// The whole command line, as clap knows it.
    pub fn described() -> clap::Command {
        with_socket(Args::command())
    }

    /// Reads a command line.
    ///
    /// # Errors
    /// As clap puts it.
    pub fn read(words: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Args, clap::Error> {
        let matches = Args::described().try_get_matches_from(words)?;
        let mut args = Args::from_arg_matches(&matches)?;
        args.socket = socket(&matches);
        Ok(args)
    }

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
        /// What they do now: rates, depths and latencies, every so many seconds (1 when left out), until Ctrl-C
        #[arg(long, value_name = "SECONDS", num_args = 0..=1)]
        watch: Option<Option<String>>,
        /// Print the counters in Prometheus' text format
        #[arg(long, conflicts_with = "watch")]
        prometheus: bool,
    },
    /// Serve the counters to Prometheus over HTTP (/metrics), until Ctrl-C
    Exporter {
        /// Where to listen. There is no password: loopback is for this machine only
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9555")]
        listen: std::net::SocketAddr,
    },
    /// Save all that the target is and has, for lloop_tgt --config to bring back
    Save {
        /// The file, which is replaced
        #[arg(default_value = DEFAULT_CONFIG, value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Offer a device to others
    #[command(subcommand)]
    Export(Export),
    /// Take a device's exports back: all of them, or those of one kind
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Unexport {
        /// The device
        #[arg(required = true)]
        name: Option<String>,
        /// From this subsystem only
        #[arg(long, value_parser = export::parse_nqn)]
        nqn: Option<String>,
        /// Those of one kind.
        #[command(subcommand)]
        kind: Option<Unexport>,
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
    /// Print the manual page
    #[command(hide = true)]
    Man,
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
    /// Share the file with those that give the same number (a group lock of one's own otherwise)
    #[arg(long, value_name = "N")]
    pub group_id: Option<u32>,
    /// Offer UNMAP under a group lock, too: it is let go of for each batch
    #[arg(long, conflicts_with = "no_discard")]
    pub discard: bool,
    /// Offer no UNMAP and WRITE ZEROES
    #[arg(long)]
    pub no_discard: bool,
    /// Split I/O at stripes [default: auto, where the Lustre client needs that]
    #[arg(long, value_parser = ["auto", "on", "off"])]
    pub stripe_split: Option<String>,
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
    /// To a virtual machine, as a SCSI disk (QEMU: vhost-user-scsi-pci). Several devices can share a socket
    VhostScsi(VhostScsi),
    /// To a virtual machine, as a virtio disk (QEMU: vhost-user-blk-pci)
    VhostBlk(VhostBlk),
    /// Over iSCSI
    Iscsi(Iscsi),
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

/// `lloop export vhost-scsi`
#[derive(clap::Args, Debug)]
pub struct VhostScsi {
    /// The device
    pub name: String,
    /// The socket that the virtual machine connects to. (The target's own socket is said before `export`: lloop --socket
    /// PATH export ..., or by $LLOOP_SOCKET)
    #[arg(id = "vhost_socket", long = "socket", value_name = "PATH", value_hint = ValueHint::FilePath)]
    #[arg(value_parser = vhost::parse_socket)]
    pub socket: PathBuf,
}

/// `lloop export vhost-blk`
#[derive(clap::Args, Debug)]
pub struct VhostBlk {
    /// The device
    pub name: String,
    /// The socket that the virtual machine connects to. (The target's own socket is said before `export`: lloop --socket
    /// PATH export ..., or by $LLOOP_SOCKET)
    #[arg(id = "vhost_socket", long = "socket", value_name = "PATH", value_hint = ValueHint::FilePath)]
    #[arg(value_parser = vhost::parse_socket)]
    pub socket: PathBuf,
    /// Let the virtual machine read only; a device attached with --read-only is so anyway
    #[arg(long)]
    pub read_only: bool,
}

/// `lloop export iscsi`
#[derive(clap::Args, Debug)]
pub struct Iscsi {
    /// The device
    pub name: String,
    /// Where to listen; [::1]:3260 with IPv6
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:3260", value_parser = iscsi::parse_listen)]
    pub listen: std::net::SocketAddr,
    /// The target's name [default: iqn.2026-11.io.lloop:NAME]
    #[arg(long, value_parser = iscsi::parse_iqn)]
    pub iqn: Option<String>,
    /// An initiator that may log in, by its address (10.0.0.7, 10.0.0.0/24, fd00::/64) or its name (iqn....); may be given several
    /// times. Names are taken on trust [default: this node only]
    #[arg(long, value_name = "ADDRESS|IQN", value_parser = iscsi::parse_initiator, conflicts_with = "allow_any")]
    pub allow_initiator: Vec<iscsi::Initiator>,
    /// Let every initiator that reaches the address log in
    #[arg(long)]
    pub allow_any: bool,
}

/// Exports of one kind to take back.
#[derive(Subcommand, Debug)]
pub enum Unexport {
    /// Those over NVMe-oF
    Nvmf {
        /// The device
        name: String,
        /// From this subsystem only
        #[arg(long, value_parser = export::parse_nqn)]
        nqn: Option<String>,
    },
    /// Those as SCSI disks
    VhostScsi(UnexportVhost),
    /// Those as virtio disks
    VhostBlk(UnexportVhost),
    /// Those over iSCSI
    Iscsi {
        /// The device
        name: String,
        /// From this target only
        #[arg(long, value_parser = iscsi::parse_iqn)]
        iqn: Option<String>,
    },
}

/// `lloop unexport vhost-scsi` and `vhost-blk`
#[derive(clap::Args, Debug)]
pub struct UnexportVhost {
    /// The device
    pub name: String,
    /// From this virtual machine's socket only. (The target's own socket is said before `unexport`)
    #[arg(id = "vhost_socket", long = "socket", value_name = "PATH", value_hint = ValueHint::FilePath)]
    #[arg(value_parser = vhost::parse_socket)]
    pub socket: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::error::ErrorKind> {
        Args::read(line.split(' ')).map_err(|e| e.kind())
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::described().debug_assert();
    }

    #[test]
    fn two_sockets() {
        let of = |line: &str| {
            let args = parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            let vhost = match args.command {
                Command::Export(Export::VhostScsi(command)) => Some(command.socket),
                Command::Export(Export::VhostBlk(command)) => Some(command.socket),
                Command::Unexport { kind: Some(Unexport::VhostBlk(command)), .. } => command.socket,
                _ => None,
            };
            (args.socket.map(|path| path.into_string().unwrap()), vhost.map(|path| path.to_str().unwrap().to_owned()))
        };
        let (target, vhost) = (|| Some("/t".to_owned()), || Some("/run/v".to_owned()));
        assert_eq!(of("lloop export vhost-scsi l --socket /run/v"), (None, vhost()));
        assert_eq!(of("lloop export vhost-blk l --socket /run/v --read-only"), (None, vhost()));
        assert_eq!(of("lloop --socket /t export vhost-blk l --socket /run/v"), (target(), vhost()));
        assert_eq!(of("lloop export --socket /t vhost-scsi --socket /run/v l"), (target(), vhost()));
        assert_eq!(of("lloop unexport vhost-blk l --socket /run/v"), (None, vhost()));
        assert_eq!(of("lloop --socket /t unexport vhost-blk l"), (target(), None));
        assert_eq!(of("lloop unexport l --socket /t"), (target(), None));
        assert_eq!(of("lloop --socket /u list --socket /t"), (target(), None));
        assert_eq!(of("lloop export nvmf l --allow-any-host --socket /t"), (target(), None));
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
            "lloop stat --prometheus lloop0",
            "lloop exporter --listen [::1]:0",
            "lloop save",
            "lloop save x.json",
            "lloop man",
            "lloop options --set a=1 b=2 --set c=3",
            "lloop export nvmf lloop0 --allow-any-host --listen [::1]:4420",
            "lloop export iscsi lloop0",
            "lloop export iscsi lloop0 --allow-initiator 10.0.0.0/8 --allow-initiator iqn.1993-08.org.debian:01:x",
            "lloop unexport lloop0",
            "lloop unexport lloop0 --nqn nqn.2026-11.io.lloop:x",
            "lloop unexport nvmf lloop0 --nqn nqn.2026-11.io.lloop:x",
            "lloop unexport iscsi lloop0 --json",
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
            "lloop export vhost-blk lloop0",
            "lloop export iscsi lloop0 --allow-initiator somebody",
            "lloop export iscsi lloop0 --allow-initiator 10.0.0.7 --allow-any",
            "lloop unexport",
            "lloop unexport lloop0 nvmf",
            "lloop unexport nvmf",
            "lloop options --set a",
            "lloop list --timeout 0",
            "lloop stat --prometheus --watch",
            "lloop exporter --listen localhost",
            "lloop",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
