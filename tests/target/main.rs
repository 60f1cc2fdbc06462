//! lloop_tgt as its users meet it: driven by RPC, tested by SPDK's own suites, read and written by an NVMe-oF initiator.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod cli;
mod durability;
mod initiator;
mod io;
mod life;
mod scripts;
mod slow;
mod suites;
