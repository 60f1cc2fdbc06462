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
mod exporter;
mod exports;
mod iscsi;
mod iscsi_export;
mod layout;
mod list;
mod listen;
mod live;
/// The library's own Lustre calls. Not by the library, which has SPDK in it.
#[allow(dead_code, unsafe_code)]
#[path = "../../os/lustre/mod.rs"]
mod lustre;
mod man;
/// The library's own look at mounts, likewise.
#[allow(dead_code, unsafe_code)]
#[path = "../../os/mount.rs"]
mod mount;
mod nvmf;
mod options;
mod output;
mod peers;
mod plan;
mod pool;
mod prometheus;
mod save;
mod size;
mod stat;
mod table;
mod unexport;
mod vhost;
mod vhost_export;
mod watch;

use args::{Args, Command, Export};
use client::Client;
use error::{Error, Result};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let args = Args::read(std::env::args_os()).unwrap_or_else(|e| e.exit());
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
        Command::Stat { prometheus: true, .. } if args.json => {
            return Err(Error::Usage("--prometheus is a format of its own, it goes without --json".to_owned()));
        }
        Command::Stat { name, prometheus: true, .. } => {
            return output::write(prometheus::collect(&mut target()?, name.as_deref())?.as_bytes());
        }
        Command::Stat { name, watch, .. } => {
            let (name, interval) = watch::what(name.as_deref(), watch.as_ref().map(Option::as_deref))?;
            match interval {
                Some(interval) => return watch::watch(&target, &args.address(), name, interval, args.json),
                None => stat::once(&mut target()?, name)?,
            }
        }
        Command::Exporter { listen } => {
            let (address, timeout) = (args.address(), args.timeout());
            return exporter::serve(Arc::new(move || Client::connect(&address, timeout)), *listen);
        }
        Command::Save { file } => save::save(&mut target()?, file)?,
        Command::Export(Export::Nvmf(command)) => {
            let hosts = export::Hosts::chosen(command)?;
            export::nvmf(&mut target()?, command, &hosts)?
        }
        Command::Export(Export::VhostScsi(command)) => {
            vhost_export::scsi(&mut target()?, &command.name, &command.socket)?
        }
        Command::Export(Export::VhostBlk(command)) => {
            vhost_export::block(&mut target()?, &command.name, &command.socket, command.read_only)?
        }
        Command::Export(Export::Iscsi(command)) => {
            let allowed = iscsi::Allowed::chosen(command)?;
            iscsi_export::export(&mut target()?, command, &allowed)?
        }
        Command::Unexport { name, nqn, kind } => {
            let (name, which) = unexport::Which::chosen(name.as_deref(), nqn.as_deref(), kind.as_ref());
            unexport::unexport(&mut target()?, name, &which)?
        }
        Command::Options { set } => options::options(&mut target()?, set)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Args::described(), "lloop", &mut script);
            return output::write(&script);
        }
        Command::Man => return output::write(&man::page()?),
    };
    report.print(args.json)
}
