//! Starting and stopping SPDK's application framework.

use super::log::{self, Level};
use crate::error::{Error, Result};
use spdk_sys as sys;
use spdk_sys::compat;
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// What `lloop_tgt`'s command line says; SPDK's default where there is nothing.
#[derive(Debug, Clone, Default)]
pub struct AppOptions {
    /// Name of the application.
    pub name: String,
    /// Cores to run reactors on: a mask (`0x3`) or a list (`[0,1]`).
    pub reactor_mask: Option<String>,
    /// Mapping of cores to processors instead (`0@0,1@1`).
    pub lcore_map: Option<String>,
    /// Share the cores with other SPDK processes (newer SPDKs refuse that otherwise).
    pub disable_cpumask_locks: bool,
    /// Core of the application thread.
    pub main_core: Option<u32>,
    /// Hugepage memory in MiB.
    pub mem_size_mib: Option<u32>,
    /// Where to listen for RPCs.
    pub rpc_socket: Option<String>,
    /// The folder that the names of vhost controllers are sockets in.
    pub vhost_dir: Option<PathBuf>,
    /// A configuration to load at the start.
    pub json_config: Option<PathBuf>,
    /// Go on when a method in it fails.
    pub json_ignore_errors: bool,
    /// Wait for `framework_start_init`.
    pub wait_for_rpc: bool,
    /// Keep away from PCI.
    pub no_pci: bool,
    /// PCI devices to use, no others.
    pub pci_allowed: Vec<String>,
    /// PCI devices not to use.
    pub pci_blocked: Vec<String>,
    /// Shared memory id, for several processes on one set of hugepages.
    pub shm_id: Option<i32>,
    /// Where hugetlbfs is mounted.
    pub huge_dir: Option<PathBuf>,
    /// Remove the hugepage files from there once they are mapped.
    pub huge_unlink: bool,
    /// One hugepage file a segment.
    pub single_file_segments: bool,
    /// No hugepages at all.
    pub no_huge: bool,
    /// `pa` or `va`.
    pub iova_mode: Option<String>,
    /// First address to map hugepages at.
    pub base_virtaddr: Option<u64>,
    /// Memory channels.
    pub mem_channels: Option<u32>,
    /// More for DPDK's environment.
    pub env_context: Option<String>,
    /// Trace groups to enable.
    pub tpoint_group_mask: Option<String>,
    /// Trace entries to keep.
    pub num_trace_entries: Option<u64>,
    /// Reactors sleep when there is nothing to do.
    pub interrupt_mode: bool,
    /// How much SPDK says.
    pub log_level: Option<Level>,
    /// Debug logs of single components.
    pub log_flags: Vec<String>,
    /// Called, on the application's thread, when it is told to end, before it does.
    pub on_end: Option<fn()>,
}

/// Strings that SPDK keeps pointers to while it runs.
#[derive(Default)]
struct Strings(Vec<CString>);

impl Strings {
    fn keep(&mut self, what: &str, text: &str) -> Result<*const c_char> {
        let text = CString::new(text)
            .map_err(|_| Error::new(libc::EINVAL, format!("{what} must not hold a NUL character: {text:?}")))?;
        self.0.push(text);
        // The string's own memory does not move with the vector.
        Ok(self.0.last().map_or(std::ptr::null(), |s| s.as_ptr()))
    }
}

/// Runs SPDK until it is stopped by [`stop`], SIGINT or SIGTERM. `started` is called on the application's thread when the
/// subsystems are up. The result is what the process should exit with.
///
/// # Errors
/// EINVAL for options that this SPDK cannot do or read.
pub fn run(options: &AppOptions, started: impl FnOnce() + 'static) -> Result<i32> {
    let mut strings = Strings::default();
    let mut opts = compat::app_opts_default();
    opts.name = strings.keep("the name", &options.name)?;
    opts.log = Some(log::callback);
    if let Some(mask) = &options.reactor_mask {
        opts.reactor_mask = strings.keep("the core mask", mask)?;
    }
    if let Some(core) = options.main_core {
        compat::app_opts_set_main_core(&mut opts, core as i32);
    }
    if let Some(mib) = options.mem_size_mib {
        opts.mem_size = mib as i32;
    }
    if let Some(socket) = &options.rpc_socket {
        opts.rpc_addr = strings.keep("the RPC socket", socket)?;
    }
    if let Some(dir) = &options.vhost_dir {
        let text = strings.keep("the folder of vhost sockets", &dir.to_string_lossy())?;
        // SAFETY: a C string, and SPDK does not run yet.
        let is_set = unsafe { compat::vhost_set_socket_dir(text) };
        // Without vhost there are no sockets to put anywhere.
        if !is_set && compat::HAS_VHOST {
            return Err(Error::new(libc::EINVAL, format!("{}: too long a path for vhost sockets", dir.display())));
        }
    }
    if let Some(path) = &options.json_config {
        opts.json_config_file = strings.keep("the configuration's path", &path.to_string_lossy())?;
    }
    opts.json_config_ignore_errors = options.json_ignore_errors;
    opts.delay_subsystem_init = options.wait_for_rpc;
    opts.no_pci = options.no_pci;
    opts.hugepage_single_segments = options.single_file_segments;
    opts.unlink_hugepage = options.huge_unlink;
    if let Some(id) = options.shm_id {
        opts.shm_id = id;
    }
    if let Some(dir) = &options.huge_dir {
        opts.hugedir = strings.keep("the hugepage folder", &dir.to_string_lossy())?;
    }
    if let Some(mode) = &options.iova_mode {
        opts.iova_mode = strings.keep("the IOVA mode", mode)?;
    }
    if let Some(address) = options.base_virtaddr {
        opts.base_virtaddr = address;
    }
    if let Some(channels) = options.mem_channels {
        opts.mem_channel = channels as i32;
    }
    if let Some(context) = &options.env_context {
        opts.env_context = strings.keep("the environment's options", context)?.cast_mut().cast();
    }
    if let Some(mask) = &options.tpoint_group_mask {
        opts.tpoint_group_mask = strings.keep("the trace mask", mask)?;
    }
    if let Some(entries) = options.num_trace_entries {
        opts.num_entries = entries;
    }
    let unsupported = |what: &str| {
        Error::new(
            libc::EINVAL,
            format!("{what} needs a newer SPDK than v{}, which this was built with", super::SPDK_VERSION),
        )
    };
    if let Some(map) = &options.lcore_map {
        let map = strings.keep("the mapping of cores", map)?;
        if !compat::app_opts_set_lcore_map(&mut opts, map) {
            return Err(unsupported("mapping cores (--lcores)"));
        }
    }
    if options.no_huge && !compat::app_opts_set_no_huge(&mut opts) {
        return Err(unsupported("running without hugepages"));
    }
    if options.interrupt_mode && !compat::app_opts_set_interrupt_mode(&mut opts) {
        return Err(unsupported("interrupt mode"));
    }
    if options.disable_cpumask_locks {
        compat::app_opts_disable_cpumask_locks(&mut opts);
    }
    if let Some(level) = options.log_level {
        opts.print_level = level.raw();
    }
    for flag in &options.log_flags {
        let name = strings.keep("the log flag", flag)?;
        // SAFETY: a C string; unknown flags are refused.
        if unsafe { sys::spdk_log_set_flag(name) } != 0 {
            return Err(Error::new(libc::EINVAL, format!("SPDK has no log flag {flag:?}")));
        }
    }
    let mut pci = pci_addresses(options, &mut strings)?;
    if !pci.is_empty() {
        compat::app_opts_set_pci_list(&mut opts, &mut pci, !options.pci_allowed.is_empty());
    }

    if let Some(on_end) = options.on_end {
        ON_END.set(on_end).map_err(|_| Error::new(libc::EINVAL, "SPDK runs once in a process"))?;
        opts.shutdown_cb = Some(end);
    }
    let mut started: Option<Box<dyn FnOnce()>> = Some(Box::new(started));
    extern "C" fn start(context: *mut c_void) {
        // SAFETY: points to `started` above, which outlives spdk_app_start.
        let started = unsafe { &mut *context.cast::<Option<Box<dyn FnOnce()>>>() };
        unname_iscsi_memory();
        if let Some(started) = started.take() {
            super::guard("starting", started);
        }
    }
    // SAFETY: the options, and what they point to, live until the call returns, which is when SPDK has ended.
    let rc = unsafe { sys::spdk_app_start(&mut opts, Some(start), (&raw mut started).cast()) };
    // SAFETY: after spdk_app_start, as SPDK wants it.
    unsafe { sys::spdk_app_fini() };
    Ok(if rc == 0 { 0 } else { 1 })
}

static ON_END: OnceLock<fn()> = OnceLock::new();

/// The application was told to end.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Whether the RPC server may be gone, and requests must not be answered any more.
pub(super) fn answers_are_over() -> bool {
    !compat::ANSWERS_OUTLIVE_THE_SERVER && ENDING.load(Ordering::Relaxed)
}

/// SPDK calls this on its application thread after SIGINT and SIGTERM, in the place of stopping by itself.
extern "C" fn end() {
    ENDING.store(true, Ordering::Relaxed);
    if let Some(on_end) = ON_END.get() {
        super::guard("ending", on_end);
    }
    stop(0);
}

fn pci_addresses(options: &AppOptions, strings: &mut Strings) -> Result<Vec<sys::spdk_pci_addr>> {
    if !options.pci_allowed.is_empty() && !options.pci_blocked.is_empty() {
        return Err(Error::new(libc::EINVAL, "PCI devices can be allowed or blocked, not both"));
    }
    let addresses = options.pci_allowed.iter().chain(&options.pci_blocked);
    addresses
        .map(|text| {
            let name = strings.keep("the PCI address", text)?;
            // SAFETY: zeroes are a valid address.
            let mut address: sys::spdk_pci_addr = unsafe { std::mem::zeroed() };
            // SAFETY: a live structure and a C string.
            match unsafe { sys::spdk_pci_addr_parse(&mut address, name) } {
                0 => Ok(address),
                _ => Err(Error::new(libc::EINVAL, format!("{text:?} is no PCI address (domain:bus:device.function)"))),
            }
        })
        .collect()
}

/// SPDK v20.07 keeps its iSCSI connections in shared memory, under one name for all processes that have no shared memory id:
/// each that starts zeroes those of the one that runs already. Called before SPDK makes that memory, so that it gets one of its
/// own, and after, so that nobody else finds it.
pub fn unname_iscsi_memory() {
    // (Where there is none, there is nothing to do.)
    let _ = std::fs::remove_file("/dev/shm/spdk_iscsi_conns.-1");
}

/// Ends the application with an exit code. On the application's thread.
pub fn stop(code: i32) {
    // SAFETY: on an SPDK thread of a running application.
    unsafe { sys::spdk_app_stop(code) };
}
