//! `lloop`: attach files as block devices, look at them, export them. It speaks JSON-RPC to a running lloop_tgt and links no
//! SPDK.
#![deny(unsafe_code)]

mod args;
mod attach;
mod client;
mod create;
mod device;
mod error;
mod export;
mod list;
mod listen;
/// The library's own Lustre calls. Not by the library, which has SPDK in it.
#[allow(dead_code, unsafe_code)]
#[path = "../../os/lustre/mod.rs"]
mod lustre;
mod nvmf;
mod options;
mod output;
mod plan;
mod size;
mod stat;
mod table;
mod unexport;
mod watch;

use args::{Args, Command, Export};
use clap::{CommandFactory, Parser};
use client::Client;
use error::{Error, Result};
use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has enough (`lloop list | head -1`); what was asked for was done.
        Err(Error::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => {
            // Where even this cannot be written, the exit status has to do.
            let _ = writeln!(io::stderr(), "lloop: {}", table::printable(&e.to_string()));
            ExitCode::from(e.exit_status())
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let target = || Client::connect(&args.address(), args.timeout());
    let report = match &args.command {
        Command::Attach(command) => attach::attach(&mut target()?, command)?,
        Command::Detach { name, force } => attach::detach(&mut target()?, name, *force)?,
        Command::List => list::list(&mut target()?)?,
        Command::Info { name } => list::info(&mut target()?, name)?,
        Command::Create(command) => create::create(command)?,
        Command::Resize { name, size, size_option } => {
            attach::resize(&mut target()?, name, size.or(*size_option).unwrap_or(0))?
        }
        Command::Resume { name } => attach::resume(&mut target()?, name)?,
        Command::Stat { name, watch } => {
            let (name, interval) = watch::what(name.as_deref(), watch.as_ref().map(Option::as_deref))?;
            match interval {
                Some(interval) => return watch::watch(&mut target()?, name, interval, args.json),
                None => stat::once(&mut target()?, name)?,
            }
        }
        Command::Export(Export::Nvmf(command)) => {
            let hosts = export::Hosts::chosen(command)?;
            export::nvmf(&mut target()?, command, &hosts)?
        }
        Command::Unexport { name, nqn } => unexport::unexport(&mut target()?, name, nqn.as_deref())?,
        Command::Options { set } => options::options(&mut target()?, set)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "lloop", &mut script);
            return output::write(&script);
        }
    };
    report.print(args.json)
}
