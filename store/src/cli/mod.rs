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
    fn every_protocol_answers() {
        for protocol in ["local", "sender", "optimistic", "family", "group"] {
            let answer =
                answer(&format!("simulate --protocol {protocol} --units 4 --runs 3 --crashes 1")).expect("runs");
            assert!(!answer.bad && answer.json["messages"].as_u64() > Some(0), "{protocol}: {}", answer.text);
        }
    }

    /// What `store/PAPERS.md` says of them.
    #[test]
    fn presets_show_what_the_papers_claim() {
        let rows = |preset: &str| {
            let answer = answer(&format!("simulate --preset {preset}")).expect("runs");
            assert!(!answer.bad && answer.text.lines().count() > 4, "{preset}: {}", answer.text);
            answer.json.as_array().expect("rows").clone()
        };
        let number = |row: &serde_json::Value, name: &str| row[name].as_f64().expect("a number");
        // ISIS, §7: messages in a row; table I: broadcasts of coord_cohort.
        let isis = rows("isis");
        let in_a_row: Vec<u64> = isis.iter().filter_map(|row| row["in_a_row"].as_u64()).collect();
        assert_eq!(in_a_row, [1, 3, 5, 5]);
        let cohort = isis.iter().find(|row| row["routine"] == "coord_cohort").expect("it is counted");
        assert_eq!((number(cohort, "cbcasts"), number(cohort, "abcasts")), (2.0, 0.0));
        // Elnozahy, §5: as fast, and nobody live is blocked; in a failure during a recovery, for the time of one.
        for both in rows("elnozahy").chunks(2) {
            let [new, blocking] = both else { panic!("two recoveries of each") };
            assert!((number(new, "recovering_ms") / number(blocking, "recovering_ms") - 1.0).abs() < 0.01);
            assert_eq!(number(new, "blocked_ms_per_live_process"), 0.0);
            let second = new["experiment"] != "one failure";
            assert!(number(blocking, "blocked_ms_per_live_process") > if second { 2_000.0 } else { 1.0 });
        }
        // Publishing, §5: one disk saturates at the maximum disk rate, and with writes of 4 kB not with five nodes.
        let publishing = rows("publishing");
        let disk = |buffered: bool, nodes: u64| {
            let of = |row: &&serde_json::Value| {
                row["point"] == "maximum disk access rate"
                    && row["buffered"] == buffered
                    && row["nodes"] == nodes
                    && row["disks"] == 1
            };
            number(publishing.iter().find(of).expect("it is there"), "disk")
        };
        assert!(disk(false, 2) >= 1.0 && disk(true, 5) < 1.0, "{} {}", disk(false, 2), disk(true, 5));
        let carried: Vec<u64> = rows("publishing-today").iter().filter_map(|row| row["nodes"].as_u64()).collect();
        assert!(carried.iter().all(|&nodes| nodes > 400), "{carried:?}");
        // Johnson, table 3.7: of every program, three kinds of sends make all; most of gauss's wait.
        let johnson = rows("johnson");
        for row in johnson.iter().filter(|row| !row["delayed"].is_null()) {
            let all: f64 = ["none_pending", "piggybacked", "delayed"].map(|kind| number(row, kind)).iter().sum();
            assert!((all - 100.0).abs() < 1e-6, "{row}");
            assert_eq!(number(row, "delayed") > 40.0, row["program"] == "gauss", "{row}");
        }
    }

    /// A workload of one's own, every order of a small system, and a run in words.
    #[test]
    fn workloads_searches_and_timelines_answer() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("mine.json");
        std::fs::write(&file, r#"{"units": 3, "first": 1, "hops": 4, "forks": 0, "pattern": "ring"}"#)
            .expect("written");
        let mine = answer(&format!("simulate --workload {} --runs 2", file.display())).expect("runs");
        // One message of each of three, followed four times, in each of two runs.
        assert_eq!(mine.json["messages"], 2 * 3 * 5, "{}", mine.text);
        std::fs::write(&file, r#"{"pattern": "spiral"}"#).expect("written");
        let wrong = answer(&format!("simulate --workload {}", file.display()));
        assert!(wrong.is_err_and(|e| e.contains("spiral")));
        let searched = "simulate --protocol sender --exhaustive 100000 --crashes 1 --checkpoint-every 0";
        let searched = answer(searched).expect("runs");
        assert!(searched.json.as_array().is_some_and(|systems| systems.iter().all(|s| s["complete"] == true)));
        let told = answer("simulate --protocol local --timeline --crashes 1").expect("runs");
        assert!(told.text.contains("FAILS") && told.text.ends_with("everything delivered\n"), "{}", told.text);
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
