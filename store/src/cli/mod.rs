//! The command `ftstore`.

mod export;
mod fsck;
mod gc;
mod import;
mod ls;
mod presets;
mod recovery_state;
mod rm;
mod serve;
mod simulate;
mod workloads;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::disk::RealDisk;
use crate::{Error, Location, StableStore};

/// Exit status for what the user can put right.
const USAGE: u8 = 2;

/// Stable storage for ftrun, and plans for it.
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
    /// Run a recovery protocol through failures and say what it costs
    Simulate(Box<simulate::Simulate>),
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
        Command::Simulate(command) => (command.json, command.run()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(arguments: &str) -> Result<Answer, String> {
        let cli =
            Cli::try_parse_from(["ftstore"].into_iter().chain(arguments.split(' '))).map_err(|e| e.to_string())?;
        let Command::Simulate(simulate) = cli.command else { return Err("another command".to_owned()) };
        simulate.run().map_err(|e| e.to_string())
    }

    #[test]
    fn every_protocol_and_preset_answers() {
        for protocol in ["local", "sender", "optimistic", "family", "group"] {
            let answer =
                answer(&format!("simulate --protocol {protocol} --units 4 --runs 3 --crashes 1")).expect("runs");
            assert!(!answer.bad && answer.json["messages"].as_u64() > Some(0), "{protocol}: {}", answer.text);
        }
        for preset in ["publishing", "publishing-today", "johnson", "elnozahy", "isis"] {
            let answer = answer(&format!("simulate --preset {preset}")).expect("runs");
            assert!(!answer.bad && answer.text.lines().count() > 4, "{preset}: {}", answer.text);
        }
    }

    #[test]
    fn the_same_command_gives_the_same_answer() {
        let twice =
            [(); 2].map(|()| answer("simulate --protocol sender --runs 5 --seed 7 --crashes 2").expect("runs").text);
        assert_eq!(twice[0], twice[1]);
    }

    /// The manual page has every command and option, and no other.
    #[test]
    fn the_manual_page_is_complete() {
        let page = include_str!("../../../man/ftstore.8").replace("\\-", "-");
        let cli = <Cli as clap::CommandFactory>::command();
        let mut options = std::collections::BTreeSet::new();
        for command in cli.get_subcommands() {
            let name = command.get_name();
            assert!(page.lines().any(|line| line.starts_with(&format!(".B ftstore {name}"))), "no {name} in the page");
            options.extend(command.get_arguments().filter_map(|a| a.get_long()).map(|long| format!("--{long}")));
        }
        let words = page.split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
        let described = words.filter(|word| word.starts_with("--")).map(str::to_owned).collect();
        assert_eq!(options, described);
    }

    /// A rule that does not suffice: the run that shows it is made small and told.
    #[test]
    fn a_run_that_fails_is_told() {
        let answer =
            answer("simulate --protocol family --vary --as-printed incarnation --seed 17 --runs 1").expect("runs");
        assert!(answer.bad && answer.text.contains("FAILS") && answer.text.contains("← unit"), "{}", answer.text);
        assert!(answer.json["timeline"].as_array().is_some_and(|lines| lines.len() > 10));
    }

    #[test]
    fn wrong_input_is_an_error_that_names_it() {
        assert!(answer("simulate --workload nosuch").is_err_and(|e| e.contains("nosuch")));
        assert!(answer("simulate --units 1").is_err_and(|e| e.contains("units")));
        assert!(answer("simulate --protocol sender --failures 9").is_err_and(|e| e.contains("failures")));
    }
}
