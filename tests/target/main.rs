//! lloop_tgt as its users meet it: driven by RPC, tested by SPDK's own suites, read and written by an NVMe-oF initiator.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod cli;
mod composition;
mod durability;
mod interrupt;
mod fio;
mod io;
mod iscsi;
mod life;
mod programs;
mod scripts;
mod slow;
mod standin;
mod suites;
