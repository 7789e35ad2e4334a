//! The command `ftstore`.

mod export;
mod fsck;
mod gc;
mod import;
mod ls;
mod rm;
mod serve;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::disk::RealDisk;
use crate::{Error, Location, StableStore};

/// Exit status for what the user can put right.
const USAGE: u8 = 2;

/// Stable storage for ftrun.
#[derive(Debug, Parser)]
#[command(name = "ftstore", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Serve a store to other processes and machines
    Serve(serve::Serve),
    /// Read and check everything that is stored
    Fsck(fsck::Fsck),
    /// Show the units of a store
    Ls(ls::Ls),
    /// Give space back now
    Gc(gc::Gc),
    /// Write one unit, log and checkpoints, into a file
    Export(export::Export),
    /// Store a unit from a file that export wrote
    Import(import::Import),
    /// Remove a unit, log and checkpoints
    Rm(rm::Rm),
}

/// A store on the command line.
#[derive(Clone, Debug, clap::Args)]
struct At {
    /// The store: file:DIR, unix:PATH, tcp:HOST:PORT?name=…&key=FILE&ca=FILE or nats://HOST:PORT,…/NAME
    #[arg(value_name = "STORE", value_parser = |url: &str| url.parse::<Location>().map_err(|e| e.to_string()))]
    store: Location,
}

impl At {
    /// Opens a store that is there: a name that was mistyped makes no other one.
    fn open(&self) -> Result<Box<dyn StableStore>, Error> {
        self.must_be_there()?;
        self.store.open()
    }

    fn must_be_there(&self) -> Result<(), Error> {
        match &self.store {
            Location::File(path) if !RealDisk::has_store(path)? => {
                Err(Error::invalid(path.display().to_string(), "there is no store in this directory"))
            }
            _ => Ok(()),
        }
    }
}

/// What a command has to say: for people, for programs, and whether it is bad news.
#[derive(Debug)]
struct Answer {
    text: String,
    json: serde_json::Value,
    bad: bool,
}

/// Carries out the command line of this process.
pub fn main() -> ExitCode {
    let (json, result) = match Cli::parse().command {
        Command::Serve(command) => (false, command.run()),
        Command::Fsck(command) => (command.json, command.run()),
        Command::Ls(command) => (command.json, command.run()),
        Command::Gc(command) => (command.json, command.run()),
        Command::Export(command) => (false, command.run()),
        Command::Import(command) => (false, command.run()),
        Command::Rm(command) => (false, command.run()),
    };
    match result {
        Ok(answer) => {
            let text = if json { format!("{:#}\n", answer.json) } else { answer.text };
            // A reader that has gone away is not our failure.
            let _ = std::io::stdout().write_all(text.as_bytes());
            if answer.bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ftstore: {error}");
            ExitCode::from(if matches!(error, Error::Poisoned { .. }) { 1 } else { USAGE })
        }
    }
}
