//! Raw bindings to SPDK: v24.09 and later, and v20.07 as the last resort.
//!
//! Everything that differs between versions is in [`compat`]; the rest of the project sees one SPDK. The bindings follow the
//! headers of the tree that was found at build time ([`SPDK_DIR`]), with bindgen's layout tests on.

#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals, dead_code)]
#[allow(missing_docs, rustdoc::all, clippy::all, clippy::undocumented_unsafe_blocks)]
#[allow(unsafe_op_in_unsafe_fn, unnecessary_transmutes)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

pub mod compat;

pub use bindings::*;

/// The version of the SPDK that this was built against, `"20.07"` for example.
pub const SPDK_VERSION: &str = env!("SPDK_SYS_VERSION");
/// The tree of that SPDK.
pub const SPDK_DIR: &str = env!("SPDK_SYS_DIR");
