//! lloop_tgt as its users meet it: driven by RPC, tested by SPDK's own suites, read and written by an NVMe-oF initiator.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod cli;
mod docs;
mod durability;
mod install;
mod io;
mod life;
mod metrics;
mod scripts;
mod security;
mod slow;
mod suites;
