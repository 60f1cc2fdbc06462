//! Finds a built SPDK tree, generates the bindings from its headers and links it whole.
//!
//! Which tree: `SPDK_DIR`, else the newest one that `scripts/setup.sh` left in its cache. It is v24.09 or later; or v20.07, the
//! last resort, for which `cfg(spdk_fallback)` is set. Only `src/compat.rs` looks at that.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The oldest release that hands FUA to a bdev module. v20.07, the last resort of `scripts/spdk.sh`, is the one exception.
const OLDEST: (u32, u32) = (24, 9);
const FALLBACK: (u32, u32) = (20, 7);

const FUNCTIONS: &[&str] = &[
    "spdk_app_(opts_init|start|stop|fini|start_shutdown)",
    "spdk_bdev_(register|unregister|destruct_done|notify_blockcnt_change|module_list_add|module_fini(sh)?_done)",
    "spdk_bdev_(get_by_name|get_name|get_block_size|get_num_blocks|open_ext|close)",
    "spdk_bdev_io_(complete|complete_nvme_status|complete_scsi_status|get_buf|get_thread)",
    "spdk_(dma_malloc|dma_zmalloc|dma_free|env_get_first_core|env_get_next_core|get_ticks|get_ticks_hz)",
    "spdk_(get_thread|thread_send_msg|thread_get_name|thread_get_by_id|thread_get_id)",
    "spdk_for_each_thread",
    "spdk_(poller_register_named|poller_unregister|poller_register_interrupt)",
    "spdk_interrupt_(register|unregister|mode_is_enabled)",
    "spdk_(io_device_register|io_device_unregister|get_io_channel|put_io_channel|for_each_channel|for_each_channel_continue)",
    "spdk_io_channel_(get_thread|get_io_device|iter_get_channel|iter_get_ctx)",
    "spdk_mem_map_(alloc|free)",
    "spdk_json_write_.*",
    "spdk_jsonrpc_(begin_result|end_result|send_error_response)",
    "spdk_rpc_register_method",
    "spdk_log(|_set_level|_set_print_level|_get_print_level|_set_flag|_get_flag)",
    "spdk_pci_addr_(parse|fmt)",
    "spdk_vhost_set_socket_path",
    "vsnprintf",
];

const CONSTANTS: &[&str] = &["SPDK_IO_CHANNEL_STRUCT_SIZE"];

const TYPES: &[&str] = &[
    "spdk_app_opts",
    "spdk_bdev",
    "spdk_bdev_io",
    "spdk_bdev_io_type",
    "spdk_bdev_io_status",
    "spdk_bdev_fn_table",
    "spdk_bdev_module",
    "spdk_io_channel",
    "spdk_json_val",
    "spdk_mem_map_(ops|notify_action)",
    "spdk_log_(level|flag)",
    "spdk_scsi_(status|sense|asc|ascq)",
    "spdk_nvme_(status_code_type|generic_command_status_code|media_error_status_code)",
];

/// A test double of half of SPDK, left by the unit tests; and the reader of traces, a program's part, which is C++.
const NOT_FOR_TARGETS: &[&str] = &["spdk_ut_mock", "spdk_trace_parser"];

/// v20.07 has no pkg-config files. The DPDK libraries that SPDK needs there, and the system's.
const DPDK_LIBS_WITHOUT_PKG_CONFIG: &[&str] = &[
    "eal",
    "mempool",
    "ring",
    "mbuf",
    "mempool_ring",
    "pci",
    "bus_pci",
    "kvargs",
    "telemetry",
    "vhost",
    "net",
    "cryptodev",
    "hash",
    "ethdev",
    "meter",
    // The crypto bdev's.
    "bus_vdev",
    "compressdev",
    "reorder",
    "pmd_aesni_mb",
    "pmd_qat",
];
const SYSTEM_LIBS_WITHOUT_PKG_CONFIG: &[&str] =
    &["numa", "dl", "rt", "uuid", "crypto", "ssl", "aio", "uring", "pthread", "m"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=wrapper.h");
    println!("cargo::rerun-if-env-changed=SPDK_DIR");
    println!("cargo::rerun-if-env-changed=LLOOP_CACHE");

    let spdk = find_spdk();
    let (major, minor) = read_version(&spdk);
    println!("cargo::rerun-if-changed={}", spdk.join("include/spdk/version.h").display());
    println!("cargo::rerun-if-changed={}", spdk.join("build/lib").display());
    println!("cargo::rustc-env=SPDK_SYS_VERSION={major}.{minor:02}");
    println!("cargo::rustc-env=SPDK_SYS_DIR={}", spdk.display());

    println!("cargo::rustc-check-cfg=cfg(spdk_fallback)");
    if (major, minor) == FALLBACK {
        println!("cargo::rustc-cfg=spdk_fallback");
    }
    // A tree can be built without vhost; its header is there all the same.
    println!("cargo::rustc-check-cfg=cfg(spdk_vhost)");
    if spdk.join("build/lib/libspdk_vhost.a").exists() {
        println!("cargo::rustc-cfg=spdk_vhost");
    }
    // Ceph's branch, which Debian carries, uses this log flag in its NVMe-oF target and defines it in its RBD module.
    println!("cargo::rustc-check-cfg=cfg(spdk_log_reservation)");
    let lib = spdk.join("build/lib");
    if mentions(&lib.join("libspdk_nvmf.a"), RESERVATION_FLAG) && !lib.join("libspdk_bdev_rbd.a").exists() {
        println!("cargo::rustc-cfg=spdk_log_reservation");
    }
    generate_bindings(&spdk);
    link(&spdk);
}

const RESERVATION_FLAG: &[u8] = b"SPDK_LOG_reservation";

/// Whether the bytes of `file` contain `text`.
fn mentions(file: &Path, text: &[u8]) -> bool {
    fs::read(file).is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text))
}

fn find_spdk() -> PathBuf {
    if let Some(dir) = env::var_os("SPDK_DIR") {
        let dir = PathBuf::from(dir);
        if is_built(&dir) {
            return fs::canonicalize(&dir).unwrap_or(dir);
        }
        give_up(&format!(
            "SPDK_DIR={} is not a built SPDK tree (it has no include/spdk/version.h with build/lib/libspdk_bdev.a)",
            dir.display()
        ));
    }
    let cache = env::var_os("LLOOP_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache/lloop")));
    let mut trees: Vec<PathBuf> = cache
        .iter()
        .filter_map(|cache| fs::read_dir(cache).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join(".lloop-complete").exists() && is_built(path))
        .collect();
    trees.sort_by_key(|path| {
        (read_version(path), fs::metadata(path.join(".lloop-complete")).and_then(|m| m.modified()).ok())
    });
    trees.pop().unwrap_or_else(|| give_up("no SPDK found"))
}

fn give_up(why: &str) -> ! {
    println!("cargo::error={why}");
    println!(
        "cargo::error=run scripts/setup.sh, which fetches and builds SPDK, or set SPDK_DIR to a built tree (v24.09 or later)"
    );
    println!(
        "cargo::error=(the lloop command line alone builds without SPDK: cargo build --no-default-features --bin lloop)"
    );
    std::process::exit(1);
}

fn is_built(dir: &Path) -> bool {
    dir.join("include/spdk/version.h").exists() && dir.join("build/lib/libspdk_bdev.a").exists()
}

fn read_version(spdk: &Path) -> (u32, u32) {
    let header = spdk.join("include/spdk/version.h");
    let text = fs::read_to_string(&header).unwrap_or_else(|e| give_up(&format!("{}: {e}", header.display())));
    let number = |name: &str| {
        text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("#define") && words.next() == Some(name)).then(|| words.next()?.parse().ok())?
        })
    };
    match (number("SPDK_VERSION_MAJOR"), number("SPDK_VERSION_MINOR")) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST || spdk.join(".lloop-fallback").exists() => {
            (major, minor)
        }
        (Some(major), Some(minor)) => {
            give_up(&format!("{} is SPDK v{major}.{minor:02}, which is older than v24.09", spdk.display()))
        }
        _ => give_up(&format!("{} states no version", header.display())),
    }
}

fn generate_bindings(spdk: &Path) {
    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_arg(format!("-I{}", spdk.join("include").display()))
        .clang_arg("-D_GNU_SOURCE")
        .rust_target(bindgen::RustTarget::stable(85, 0).unwrap_or_default())
        .rust_edition(bindgen::RustEdition::Edition2024)
        .default_enum_style(bindgen::EnumVariation::ModuleConsts)
        .prepend_enum_name(false)
        .derive_default(false)
        .derive_debug(false)
        .layout_tests(true)
        .generate_comments(false)
        .wrap_unsafe_ops(true)
        // Packed structures around aligned ones, which Rust cannot express (E0588); nobody here looks inside.
        .opaque_type("spdk_nvme_.*_(cmd|cpl|data|desc.*|page|status|register.*|cap.*|rsvd.*)")
        .opaque_type("spdk_nvme_(cmd|cpl|status|ctrlr.*|ns.*|sgl.*|registers|uevent|transport.*|tcp.*|health.*|error.*|firmware.*|fw.*|zns.*|cdw.*|feat.*|ana.*|resv.*|reservation.*|host.*|format|protection.*|dsm.*|scc.*|pmr.*|cmb.*|aq.*|xfer.*|intel.*|ocssd.*)")
        .opaque_type("spdk_nvmf_.*")
        .opaque_type("spdk_bdev_ext_io_opts")
        // libc's, so that the os layer, which knows no SPDK, speaks of the same type.
        .blocklist_type("iovec")
        .raw_line("use libc::iovec;");
    for function in FUNCTIONS {
        builder = builder.allowlist_function(function);
    }
    for constant in CONSTANTS {
        builder = builder.allowlist_var(constant);
    }
    for ty in TYPES {
        builder = builder.allowlist_type(ty);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    let bindings = builder.generate().unwrap_or_else(|e| {
        give_up(&format!("bindgen could not read the headers of {}: {e} (is libclang-dev installed?)", spdk.display()))
    });
    bindings.write_to_file(&out).unwrap_or_else(|e| give_up(&format!("{}: {e}", out.display())));
}

/// Whole-archive: SPDK registers its modules, RPCs and mempool operations in constructors that nothing refers to by name.
/// `-bundle` keeps SPDK out of liblloop.a and makes cargo hand the archives on to every binary.
fn link_whole(name: &str) {
    println!("cargo::rustc-link-lib=static:+whole-archive,-bundle={name}");
}

fn link(spdk: &Path) {
    let lib_dir = spdk.join("build/lib");
    println!("cargo::rustc-link-search=native={}", lib_dir.display());
    for name in archives(&lib_dir, "libspdk_") {
        if !NOT_FOR_TARGETS.contains(&name.as_str()) {
            link_whole(&name);
        }
    }
    if lib_dir.join("pkgconfig/spdk_syslibs.pc").exists() {
        link_by_pkg_config(spdk, &lib_dir);
    } else {
        let dpdk = dpdk_lib_dir(spdk);
        println!("cargo::rustc-link-search=native={}", dpdk.display());
        for name in DPDK_LIBS_WITHOUT_PKG_CONFIG {
            if dpdk.join(format!("librte_{name}.a")).exists() {
                link_whole(&format!("rte_{name}"));
            }
        }
        // What pmd_aesni_mb computes with, in the tree itself.
        let ipsec = spdk.join("intel-ipsec-mb");
        if ipsec.join("libIPSec_MB.a").exists() {
            println!("cargo::rustc-link-search=native={}", ipsec.display());
            println!("cargo::rustc-link-lib=static:-bundle=IPSec_MB");
        }
        for name in SYSTEM_LIBS_WITHOUT_PKG_CONFIG {
            println!("cargo::rustc-link-lib=dylib={name}");
        }
    }
}

fn link_by_pkg_config(spdk: &Path, lib_dir: &Path) {
    // SAFETY: the build script has one thread.
    unsafe { env::set_var("PKG_CONFIG_PATH", lib_dir.join("pkgconfig")) };
    let query = |name: &str| {
        pkg_config::Config::new()
            .cargo_metadata(false)
            .env_metadata(false)
            .print_system_libs(false)
            .probe(name)
            .unwrap_or_else(|e| give_up(&format!("pkg-config {name} of {}: {e}", spdk.display())))
    };
    let dpdk = query("spdk_dpdklibs");
    for path in &dpdk.link_paths {
        println!("cargo::rustc-link-search=native={}", path.display());
    }
    for name in dpdk.libs.iter().collect::<BTreeSet<_>>() {
        link_whole(name);
    }
    let system = query("spdk_syslibs");
    for file in &system.link_files {
        // An archive by full path (isa-l of the tree itself).
        if let (Some(dir), Some(stem)) = (file.parent(), file.file_stem().and_then(|s| s.to_str())) {
            println!("cargo::rustc-link-search=native={}", dir.display());
            println!("cargo::rustc-link-lib=static:-bundle={}", stem.trim_start_matches("lib"));
        }
    }
    for path in &system.link_paths {
        println!("cargo::rustc-link-search=native={}", path.display());
    }
    for name in &system.libs {
        println!("cargo::rustc-link-lib=dylib={name}");
    }
    // pkg-config leaves -pthread to the compiler driver.
    println!("cargo::rustc-link-lib=dylib=pthread");
}

fn archives(dir: &Path, prefix: &str) -> BTreeSet<String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .filter_map(|name| Some(name.strip_suffix(".a")?.strip_prefix("lib")?.to_owned()))
        .collect()
}

/// The DPDK that SPDK was configured with.
fn dpdk_lib_dir(spdk: &Path) -> PathBuf {
    let config = fs::read_to_string(spdk.join("mk/config.mk")).unwrap_or_default();
    let dpdk = config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_DPDK_DIR")?.trim_start_matches(['?', ':']).strip_prefix('='))
        .map(str::trim)
        .filter(|dir| Path::new(dir).join("lib").is_dir());
    dpdk.map_or_else(|| spdk.join("dpdk/build"), PathBuf::from).join("lib")
}
