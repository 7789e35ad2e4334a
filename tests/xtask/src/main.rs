//! Project tasks, run as `cargo xtask TASK`.

mod bench;
mod fuzz;
mod install;
mod soak_store;
mod soak_unit;
mod vm;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use ftrun_tests::binaries::{FEATURES, build_ftrun, cargo, target_dir};
use ftrun_tests::load::Load;
use ftrun_tests::scenarios;
use ftrun_tests::{Error, error};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Tasks of the ftrun project")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a real redis-server under ftrun, kill it ten times, and show what its clients noticed
    Demo {
        /// How many times to kill it
        #[arg(long, default_value_t = 10)]
        kills: u64,
        /// How many clients
        #[arg(long, default_value_t = 8)]
        clients: usize,
    },
    /// Install what the tests need, build, and run every test
    Test {
        /// Arguments for `cargo test --workspace`
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Measure
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Run programs under ftrun on a Debian kernel in a virtual machine, where dirty pages are found another way
    Vm {
        /// The way that is expected there
        #[arg(long, default_value = "soft-dirty")]
        backend: String,
    },
    /// Let the store's readers read mutated bytes for some time; what is found is added to store/fuzz-seeds
    Fuzz {
        /// Only this reader
        #[arg(long)]
        target: Option<String>,
        /// For how long
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Begin with this seed; by default with the time
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Kill one program many times while clients check every reply; or, as `--program store`, have many units write,
    /// take checkpoints and collect garbage in one store for --seconds (600 by default); or, as `--program unit`, send --events
    /// (10^8 by default, or as many as --seconds give time for) through one unit of durability `node`
    Soak {
        /// Which program; `list` shows them
        #[arg(long, default_value = "redis")]
        program: String,
        /// How many times to kill it
        #[arg(long, default_value_t = 1000)]
        kills: u64,
        /// How many clients
        #[arg(long, default_value_t = 8)]
        clients: usize,
        /// How long it lasts at least; `store`, `unit`: at most
        #[arg(long)]
        seconds: Option<u64>,
        /// How many events go through `unit`
        #[arg(long)]
        events: Option<u64>,
        /// Repeat the run with this seed
        #[arg(long)]
        seed: Option<u64>,
    },
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Time from SIGKILL to the next reply on the same connection, for redis with so much data
    Recovery(bench::recovery::Options),
    /// Time to replay what a saturated redis did in a minute
    Replay(bench::replay::Options),
    /// What programs do in a second: bare, under ftrun with and without its fast path, and under strace
    Throughput(bench::throughput::Options),
    /// What one system call costs: bare, and under ftrun with and without its fast path
    Calls(bench::calls::Options),
    /// Acknowledged appends to stable storage, beside a bare file on the same disk
    Store(bench::store::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Demo { kills, clients } => demo(kills, clients),
        Task::Test { args } => return test(&args).unwrap_or_else(|e| complain(&e)),
        Task::Bench { what } => bench(&what),
        Task::Fuzz { target, seconds, seed } => fuzz::run(target.as_deref(), seconds, seed),
        Task::Vm { backend } => vm::run(&backend),
        Task::Soak { program, seconds, events, .. } if program == "unit" => soak_unit(events, seconds),
        Task::Soak { program, kills, clients, seconds, seed, .. } => soak(&program, kills, clients, seconds, seed),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => complain(&e),
    }
}

fn complain(e: &Error) -> ExitCode {
    eprintln!("xtask: {e}");
    ExitCode::FAILURE
}

/// Makes sure that there is a fresh release build (or a given `FTRUN_BIN`) before anything is timed.
fn under_release() -> Result<(), Error> {
    eprintln!("xtask: building ftrun in release mode");
    ftrun_tests::binaries::mode().map(|_| ())
}

fn bench(what: &Bench) -> Result<(), Error> {
    let needed = match what {
        Bench::Recovery(_) => vec!["redis-server"],
        Bench::Throughput(options) => options.programs()?,
        Bench::Replay(_) => vec!["redis-server", "redis-benchmark"],
        Bench::Calls(_) => vec!["cc"],
        Bench::Store(options) => return bench::store::run(options),
    };
    install::ensure(&needed)?;
    under_release()?;
    match what {
        Bench::Recovery(options) => bench::recovery::run(options),
        Bench::Replay(options) => bench::replay::run(options),
        Bench::Throughput(options) => bench::throughput::run(options),
        Bench::Calls(options) => bench::calls::run(options),
        Bench::Store(options) => bench::store::run(options),
    }
}

fn demo(kills: u64, clients: usize) -> Result<(), Error> {
    install::ensure(&["redis-server"])?;
    under_release()?;
    println!("ftrun -- redis-server: {clients} clients, each on one connection; {kills} times kill -9");
    let load = Load { clients, ..Load::from_env().kills(kills) };
    let report = scenarios::redis(&load)?;
    println!("{report}");
    Ok(())
}

fn soak_unit(events: Option<u64>, seconds: Option<u64>) -> Result<(), Error> {
    install::ensure(&["cc"])?;
    under_release()?;
    let most = if seconds.is_some() { u64::MAX } else { 100_000_000 };
    soak_unit::run(events.unwrap_or(most), seconds.map_or(Duration::MAX, Duration::from_secs))
}

fn soak(program: &str, kills: u64, clients: usize, seconds: Option<u64>, seed: Option<u64>) -> Result<(), Error> {
    if program == "list" {
        for (name, _) in scenarios::ALL {
            println!("{name}");
        }
        println!("store\nunit");
        return Ok(());
    }
    if program == "store" {
        return soak_store::run(Duration::from_secs(seconds.unwrap_or(600)));
    }
    let scenario =
        scenarios::named(program).ok_or_else(|| error!("no program {program}; --program list shows them"))?;
    install::ensure(install::SERVERS)?;
    under_release()?;
    let defaults = Load::from_env().kills(kills);
    let at_least = seconds.map_or(defaults.at_least, Duration::from_secs);
    let load = Load { clients, at_least, seed: seed.unwrap_or(defaults.seed), ..defaults };
    println!("{program}: {clients} clients, {kills} kills, seed {}", load.seed);
    println!("{}", scenario(&load)?);
    Ok(())
}

/// Runs everything; says nothing afterwards, so that the last lines are cargo's.
fn test(args: &[String]) -> Result<ExitCode, Error> {
    install::ensure(install::SERVERS)?;
    let ftrun = build_ftrun()?;
    let mut command = cargo();
    command.args(["test", "--workspace", "--features", FEATURES, "--no-fail-fast", "--target-dir"]).arg(target_dir()?);
    command.env("FTRUN_NATS_SERVER", install::nats_server()?).env("FTRUN_BIN", ftrun);
    if args.is_empty() {
        // Each test of a real program keeps about one core busy.
        command.args(["--", "--test-threads=2"]);
    } else {
        command.args(args);
    }
    let status = command.status()?;
    Ok(u8::try_from(status.code().unwrap_or(1)).map_or(ExitCode::FAILURE, ExitCode::from))
}
