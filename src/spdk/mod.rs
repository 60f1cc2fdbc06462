//! A safe layer over SPDK. Knows nothing of lloop.
//!
//! SPDK calls back through C function pointers. A panic in one of them must not unwind into C: callbacks of the control plane
//! are guarded (`guard`), so that a bug there costs one request; in the I/O path a panic ends the process, since an I/O whose
//! state is unknown can be neither completed nor kept. (Rust ends it: unwinding out of an `extern "C"` function aborts.)

pub mod app;
pub mod bdev;
pub mod bdev_io;
pub mod io_channel;
pub mod json;
pub mod log;
pub mod memory;
pub mod poller;
pub mod rpc;
pub mod thread;

pub use spdk_sys::compat::HAS_FUA;
pub use spdk_sys::{SPDK_DIR, SPDK_VERSION};

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs a callback of the control plane; `None` when it panicked, which is logged.
fn guard<R>(what: &str, callback: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(callback)) {
        Ok(value) => Some(value),
        Err(panic) => {
            tracing::error!("a bug in lloop: {what} panicked: {}", panic_text(panic.as_ref()));
            None
        }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Makes `$name` the entry of the bdev module `$module` ([`bdev::Module`]), and registers it and the RPC methods `$method`
/// ([`rpc::Method`]) before `main`, as SPDK's own modules do.
#[macro_export]
macro_rules! spdk_module {
    ($name:ident: $module:ty, $($method:ty),* $(,)?) => {
        static $name: $crate::spdk::bdev::ModuleEntry<$module> = $crate::spdk::bdev::ModuleEntry::new();

        #[used]
        // SAFETY: the section holds pointers to functions that the C runtime calls once before main, as this one expects; it
        // uses nothing of Rust's runtime and only appends to lists that SPDK initialises statically.
        #[unsafe(link_section = ".init_array")]
        static REGISTER_BEFORE_MAIN: extern "C" fn() = {
            extern "C" fn register() {
                $name.register();
                $($crate::spdk::rpc::register::<$method>();)*
            }
            register
        };
    };
}
