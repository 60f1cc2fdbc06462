//! lloop: a Lustre file as a block device, in user space.
//!
//! `lloop` is an SPDK bdev module; see README.md for what it is and ARCHITECTURE.md for how the layers below stand on each
//! other. `engine` and `os` know nothing of SPDK and can be used and tested without it.

pub mod engine;
pub mod error;
#[cfg(feature = "spdk")]
pub mod lloop;
pub mod os;
#[cfg(feature = "spdk")]
pub mod spdk;
