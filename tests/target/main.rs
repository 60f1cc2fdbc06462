//! lloop_tgt as its users meet it: driven by RPC, tested by SPDK's own suites, read and written by an NVMe-oF initiator.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod cli;
mod client;
mod composition;
mod control;
mod create;
mod docs;
mod durability;
mod fio;
mod harness;
mod initiator;
mod install;
mod interrupt;
mod io;
mod iscsi;
mod life;
mod lustre;
mod memory;
mod metrics;
mod programs;
mod rules;
mod scripts;
mod security;
mod setup;
mod sharing;
mod slow;
mod soak;
mod standin;
mod suites;
