//! The target: SPDK with its bdev modules, NVMe-oF, vhost and iSCSI, and lloop.

use clap::{CommandFactory, Parser};
use lloop::error::{Error, Result};
use lloop::os::root;
use lloop::os::user::{self, Account};
use lloop::spdk::SPDK_VERSION;
use lloop::spdk::app::{self, AppOptions};
use lloop::spdk::log::Level;
use lloop::spdk::poller;
use sd_notify::NotifyState;
use std::fs::Permissions;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (SPDK v");

/// What the manual page has behind the options.
const MANUAL_END: &str = r#".SH FILES
.TP
/etc/lloop/config.json
The configuration of the service, written by \fBlloop save\fR.
.TP
/var/tmp/spdk.sock
The socket that RPCs come from. Whoever may use it controls the target.
.SH ENVIRONMENT
.TP
LLOOP_LOG
What lloop says, in the words of Rust's tracing: \fIwarn\fR, \fIlloop=debug\fR.
.SH "SEE ALSO"
.BR lloop (1)
"#;

/// A SPDK target with the lloop bdev module: files (on Lustre, or anywhere with O_DIRECT) as block devices, for NVMe-oF,
/// vhost and iSCSI. Control it with `lloop`, or with SPDK's rpc.py.
#[derive(Parser, Debug)]
#[command(name = "lloop_tgt", disable_version_flag = true)]
struct Args {
    /// Cores to run reactors on: a mask (0x3) or a list (`[0,1]`)
    #[arg(short = 'm', long, value_name = "MASK", default_value = "0x1")]
    cpumask: String,
    /// Core of the application's thread
    #[arg(short = 'p', long, visible_alias = "master-core", value_name = "ID")]
    main_core: Option<u32>,
    /// Hugepage memory: MiB, or with a unit (512, 512M, 2G); as much as is needed when left out
    #[arg(short = 's', long, value_name = "SIZE", value_parser = parse_mem_size)]
    mem_size: Option<u32>,
    /// Where to listen for RPCs: a socket's path. Only this user, and root, may use it
    #[arg(short = 'r', long, value_name = "PATH", default_value = "/var/tmp/spdk.sock")]
    rpc_socket: String,
    /// The folder that vhost controllers have their sockets in. With / their names are whole paths, as `lloop export` makes them
    #[arg(short = 'S', long, value_name = "DIR", default_value = "/")]
    vhost_dir: PathBuf,
    /// Configuration to load at the start, as save_config writes it
    #[arg(short = 'c', long, value_name = "FILE", conflicts_with = "config")]
    json: Option<PathBuf>,
    /// The same, as `lloop save` writes it; where there is no such file yet, start with nothing
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach files in this folder only, whatever a client asks for; may be given several times
    #[arg(long, value_name = "DIR")]
    root: Vec<PathBuf>,
    /// Become this user when everything is set up; hugepage files are removed at once (-R). Files of the configuration are
    /// opened before, those attached later after it
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Go on when a method of the configuration fails
    #[arg(long)]
    json_ignore_init_errors: bool,
    /// Do not initialise subsystems before the RPC framework_start_init
    #[arg(long)]
    wait_for_rpc: bool,
    /// Use PCI devices. Without this none is touched
    #[arg(long)]
    pci: bool,
    /// Do not use PCI devices (the default here; SPDK's name for it)
    #[arg(short = 'u', long, conflicts_with = "pci")]
    no_pci: bool,
    /// Use this PCI device, and no other but those also given; implies --pci
    #[arg(short = 'A', long, visible_alias = "pci-whitelist", short_alias = 'W', value_name = "BDF")]
    pci_allowed: Vec<String>,
    /// Do not use this PCI device
    #[arg(short = 'B', long, visible_alias = "pci-blacklist", value_name = "BDF")]
    pci_blocked: Vec<String>,
    /// Shared memory id
    #[arg(short = 'i', long, value_name = "ID")]
    shm_id: Option<i32>,
    /// Where hugetlbfs is mounted
    #[arg(long, value_name = "DIR")]
    huge_dir: Option<PathBuf>,
    /// Remove the hugepage files once they are mapped
    #[arg(short = 'R', long)]
    huge_unlink: bool,
    /// Run without hugepages
    #[arg(long)]
    no_huge: bool,
    /// One hugepage file a memory segment
    #[arg(short = 'g', long)]
    single_file_segments: bool,
    /// Memory channels
    #[arg(short = 'n', long, value_name = "N")]
    mem_channels: Option<u32>,
    /// IOVA mode, pa or va
    #[arg(long, value_name = "MODE")]
    iova_mode: Option<String>,
    /// First virtual address of hugepage memory
    #[arg(long, value_name = "ADDRESS", value_parser = parse_number)]
    base_virtaddr: Option<u64>,
    /// Share the cores with other SPDK processes, which SPDK refuses otherwise
    #[arg(long)]
    disable_cpumask_locks: bool,
    /// Mapping of reactors to processors, in DPDK's words (0@0,1@1)
    #[arg(long, value_name = "LIST", conflicts_with = "cpumask")]
    lcores: Option<String>,
    /// More options for DPDK's environment
    #[arg(long, value_name = "OPTIONS")]
    env_context: Option<String>,
    /// Trace groups to enable
    #[arg(short = 'e', long, value_name = "MASK")]
    tpoint_group_mask: Option<String>,
    /// Trace entries to keep for each core (32768 with -e, else 0: no tracing)
    #[arg(long, value_name = "N")]
    num_trace_entries: Option<u64>,
    /// Let idle reactors sleep. Serves no iSCSI, which can only poll
    #[arg(long)]
    interrupt_mode: bool,
    /// Debug log of a component of SPDK
    #[arg(short = 'L', long, value_name = "FLAG")]
    logflag: Vec<String>,
    /// How much SPDK says
    #[arg(long, value_enum, default_value_t = Level::Notice)]
    log_level: Level,
    /// Say only warnings and errors
    #[arg(long)]
    silence_noticelog: bool,
    /// Print the manual page
    #[arg(long, hide = true)]
    man: bool,
    /// Print a script for a shell that completes the command line
    #[arg(long, hide = true, value_name = "SHELL")]
    completions: Option<clap_complete::Shell>,
    /// Print the version
    #[arg(short = 'V', short_alias = 'v', long)]
    version: bool,
}

fn parse_mem_size(text: &str) -> Result<u32, String> {
    let (digits, mib) = match text.trim_end_matches(['b', 'B']).strip_suffix(['m', 'M', 'g', 'G']) {
        Some(digits) if text.to_ascii_lowercase().contains('g') => (digits, 1024),
        Some(digits) => (digits, 1),
        None => (text, 1),
    };
    let number: u32 = digits.parse().map_err(|_| format!("{text:?} is no size; write 512, 512M or 2G"))?;
    number.checked_mul(mib).filter(|&n| n > 0 && n <= i32::MAX as u32).ok_or_else(|| format!("{text} is out of range"))
}

fn parse_number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is no number"))
}

/// The manual page, as scripts/install.sh puts it in place.
fn manual() -> Vec<u8> {
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(Args::command()).section("8").manual("lloop");
    man.render(&mut page).expect("memory takes what is written to it");
    page.extend(MANUAL_END.bytes());
    page
}

fn printed(text: &[u8]) -> ExitCode {
    if std::io::stdout().write_all(text).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.version {
        println!("lloop_tgt {VERSION}{SPDK_VERSION})");
        return ExitCode::SUCCESS;
    }
    if args.man {
        return printed(&manual());
    }
    if let Some(shell) = args.completions {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Args::command(), "lloop_tgt", &mut script);
        return printed(&script);
    }
    let quiet = args.silence_noticelog;
    let filter = tracing_subscriber::EnvFilter::try_from_env("LLOOP_LOG")
        // (How much SPDK says is up to --log-level.)
        .unwrap_or_else(|_| {
            tracing_subscriber::EnvFilter::new(if quiet { "warn,spdk=debug" } else { "info,spdk=debug" })
        });
    let terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(terminal).with_env_filter(filter).init();
    tracing::debug!(module = ?lloop::lloop::linked(), "linked");

    match prepared(&args) {
        Ok(account) => run(args, account),
        Err(error) => {
            eprintln!("lloop_tgt: {error}");
            ExitCode::from(2)
        }
    }
}

/// Confines the process as the command line says; whom to become later.
fn prepared(args: &Args) -> Result<Option<Account>> {
    let account = args.user.as_deref().map(user::account).transpose()?;
    user::keep_to_oneself();
    if !args.root.is_empty() {
        root::confine(&args.root)?;
    }
    Ok(account)
}

/// The saved configuration, if there is one yet.
fn config(file: PathBuf) -> Option<PathBuf> {
    // (What is there and cannot be read is for SPDK to refuse.)
    if matches!(file.try_exists(), Ok(false)) {
        tracing::info!("{} is not there yet: starting with no devices; lloop save writes it", file.display());
        return None;
    }
    Some(file)
}

/// The last steps, on the application's thread: the socket is closed to others, and rights that are needed no more are given up.
fn settle(rpc_socket: &Path, account: Option<&Account>) -> Result<()> {
    user::folders_are_made();
    let failed = |e: std::io::Error| {
        Error::os(e.raw_os_error().unwrap_or(libc::EIO), format!("closing {} to others", rpc_socket.display()))
    };
    std::fs::set_permissions(rpc_socket, Permissions::from_mode(0o600)).map_err(failed)?;
    if let Some(account) = account {
        account.own(rpc_socket)?;
        account.assume()?;
    }
    Ok(())
}

fn run(args: Args, account: Option<Account>) -> ExitCode {
    let quiet = args.silence_noticelog;
    let rpc_socket = args.rpc_socket.clone();
    let tracing = args.tpoint_group_mask.is_some();
    let options = AppOptions {
        name: "lloop_tgt".into(),
        reactor_mask: args.lcores.is_none().then_some(args.cpumask),
        lcore_map: args.lcores,
        disable_cpumask_locks: args.disable_cpumask_locks,
        main_core: args.main_core,
        mem_size_mib: args.mem_size,
        rpc_socket: Some(args.rpc_socket),
        vhost_dir: Some(args.vhost_dir),
        json_config: args.json.or(args.config.and_then(config)),
        json_ignore_errors: args.json_ignore_init_errors,
        wait_for_rpc: args.wait_for_rpc,
        no_pci: !args.pci && args.pci_allowed.is_empty(),
        pci_allowed: args.pci_allowed,
        pci_blocked: args.pci_blocked,
        shm_id: args.shm_id,
        huge_dir: args.huge_dir,
        huge_unlink: args.huge_unlink || account.is_some(),
        single_file_segments: args.single_file_segments,
        no_huge: args.no_huge,
        iova_mode: args.iova_mode,
        base_virtaddr: args.base_virtaddr,
        mem_channels: args.mem_channels,
        env_context: args.env_context,
        tpoint_group_mask: args.tpoint_group_mask,
        num_trace_entries: args.num_trace_entries.or(tracing.then_some(32768)).or(Some(0)),
        interrupt_mode: args.interrupt_mode,
        log_level: Some(if quiet { Level::Warn } else { args.log_level }),
        log_flags: args.logflag,
        on_end: Some(lloop::lloop::watch_the_end),
    };
    let sleeps = args.interrupt_mode;
    let started = move || match settle(Path::new(&rpc_socket), account.as_ref()) {
        Ok(()) => {
            if sleeps {
                poller::put_iscsi_to_sleep();
                tracing::info!("in interrupt mode iSCSI serves nobody: SPDK's would keep polling");
            }
            tracing::info!("lloop_tgt {VERSION}{SPDK_VERSION}) is ready; RPCs on {rpc_socket}");
            // (Where nobody asked to be told, this does nothing.)
            if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
                tracing::warn!("telling the service manager: {error}");
            }
        }
        Err(error) => {
            tracing::error!("{error}");
            app::stop(1);
        }
    };
    match app::run(&options, started) {
        Ok(0) => {
            tracing::info!("lloop_tgt has ended");
            ExitCode::SUCCESS
        }
        Ok(_) => {
            eprintln!("lloop_tgt: SPDK did not start or ended with an error; the lines above say why");
            eprintln!("lloop_tgt: (no hugepages? scripts/setup.sh reserves them)");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("lloop_tgt: {error}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes() {
        for (text, mib) in [("512", 512), ("512M", 512), ("2G", 2048), ("2gb", 2048), ("64MB", 64)] {
            assert_eq!(parse_mem_size(text), Ok(mib), "{text}");
        }
        for text in ["", "x", "0", "5T", "99999999G"] {
            assert!(parse_mem_size(text).is_err(), "{text}");
        }
    }
}
