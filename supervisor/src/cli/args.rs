//! The definition of the command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::options::{Durability, Stable};
use super::values::{parse_checkpoint_every, parse_checkpoint_log, parse_env, parse_interval, parse_name};
use crate::systemd::Ready;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

/// Runs an unmodified program so that its death costs its users nothing: killed at any instant, it
/// goes on within a fraction of a second with its memory and its open connections.
#[derive(Debug, Parser)]
#[command(
    name = "ftrun",
    version,
    subcommand_negates_reqs = true,
    arg_required_else_help = true,
    override_usage = "ftrun [run] [OPTIONS] -- PROGRAM [ARGS]...\n       ftrun COMMAND"
)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(flatten)]
    pub(super) run: RunArgs,
    #[command(subcommand)]
    pub(super) command: Option<Command>,
}

#[derive(Debug, Args)]
pub(super) struct Global {
    /// Directory of all units [default: /var/lib/ftrun as root, otherwise $XDG_STATE_HOME/ftrun]
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) state_dir: Option<PathBuf>,
    /// Log more to standard error: -v lifecycle, -vv checkpoints, -vvv every call
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(super) verbose: u8,
    /// Format of log lines
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    pub(super) log_format: LogFormat,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Name of the unit [default: the program's name and ftrun's pid]
    #[arg(long, value_parser = parse_name)]
    pub(super) name: Option<String>,
    /// What the unit survives
    #[arg(long, value_name = "LEVEL", default_value = "process")]
    pub(super) durability: Durability,
    /// Stable storage for --durability node: file:DIR, unix:PATH, tcp:HOST:PORT [default: in the unit's
    /// directory]
    #[arg(long, value_name = "URL")]
    pub(super) store: Option<String>,
    /// Where an event has to be in the store before what follows from it is given out
    #[arg(long, value_name = "WHERE", default_value = "disk")]
    pub(super) stable: Stable,
    /// Longest time between checkpoints (500ms, 1s, 2m)
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_checkpoint_every)]
    pub(super) checkpoint_every: Duration,
    /// Take a checkpoint earlier when replay would take longer than this (150ms, 1s)
    #[arg(long, value_name = "TIME", default_value = "150ms", value_parser = parse_checkpoint_every)]
    pub(super) recover_within: Duration,
    /// Take a checkpoint when the log since the last one has grown to this (64MiB, 1GiB)
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_checkpoint_log)]
    pub(super) checkpoint_log: u64,
    /// Write every event and checkpoint to the state directory as it comes, for `ftrun log` and `ftrun verify`
    #[arg(long)]
    pub(super) journal: bool,
    /// Add a variable to the program's environment; may be repeated
    #[arg(long, value_name = "K=V", value_parser = OsStringValueParser::new().try_map(parse_env))]
    pub(super) env: Vec<(OsString, OsString)>,
    /// Working directory of the program
    #[arg(long, value_name = "DIR")]
    pub(super) cwd: Option<PathBuf>,
    /// Go on with the unit of this name, if it was killed with all of ftrun, as `ftrun resume` does; start it otherwise
    #[arg(long)]
    pub(super) resume: bool,
    /// Leave the unit's descriptors with the service manager (NOTIFY_SOCKET), if it takes them, so that its connections outlive
    /// keeper, supervisor and program
    #[arg(long)]
    pub(super) hold_descriptors: bool,
    /// Have the files that memory is mapped from (the program, its libraries) in checkpoints, so that the unit can go on where
    /// they are missing or others
    #[arg(long)]
    pub(super) self_contained: bool,
    /// Serve no call inside the program: slower, and as right
    #[arg(long)]
    pub(super) no_shim: bool,
    /// When a service manager (NOTIFY_SOCKET) is told that the unit is ready: when the program has been started, or when
    /// the program says so itself
    #[arg(long, value_name = "WHEN", default_value = "started")]
    pub(super) ready: Ready,
    /// Take options from this file, for what is not on the command line (ftrun.toml(5))
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub(super) command: Vec<OsString>,
}

#[derive(Debug, Args)]
#[command(mut_arg("name", |arg| arg.hide(true)))]
pub(super) struct InstallArgs {
    /// Name of the unit, and of the service's instance: ftrun@NAME.service
    #[arg(value_name = "NAME", value_parser = parse_name)]
    pub(super) unit: String,
    /// Write it for your own service manager instead of the system's
    #[arg(long)]
    pub(super) user: bool,
    /// Run it as another user than root
    #[arg(long = "as", value_name = "USER")]
    pub(super) as_user: Option<String>,
    /// Have a socket opened by the service manager and handed to the program (a port, HOST:PORT or a path); may be repeated
    #[arg(long, value_name = "ADDRESS")]
    pub(super) listen: Vec<String>,
    /// Print the files and write none
    #[arg(long)]
    pub(super) print: bool,
    /// Replace the template ftrun@.service even if it is not this ftrun's
    #[arg(long)]
    pub(super) force: bool,
    /// Directory of unit files [default: /etc/systemd/system, or with --user ~/.config/systemd/user]
    #[arg(long, value_name = "DIR")]
    pub(super) dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) run: RunArgs,
    /// The options for `run` among what was given.
    #[arg(skip)]
    pub(super) options: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a program as a unit (the word `run` may be left out)
    #[command(override_usage = "ftrun [run] [OPTIONS] -- PROGRAM [ARGS]...")]
    Run(RunArgs),
    /// Go on with a unit (durability supervisor) whose program, supervisor and keeper were all killed
    Resume {
        /// Name of the unit
        name: String,
        /// Go on although descriptors cannot be made again: they are at their end
        #[arg(long)]
        lossy: bool,
        /// Take it from this store, where a unit of durability `node` has left it, on any machine
        #[arg(long, value_name = "URL")]
        store: Option<String>,
        /// Where an event has to be in that store before what follows from it is given out
        #[arg(long, value_name = "WHERE", default_value = "disk")]
        stable: Stable,
    },
    /// List the units
    Ls {
        /// Print JSON: an array of what `status --json` prints
        #[arg(long)]
        json: bool,
    },
    /// Show the state of a unit
    Status {
        /// Name of the unit
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what the running units do, again and again until it is interrupted
    Top {
        /// Time between two refreshes, over which rates are taken (500ms, 1s, 1m)
        #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_interval)]
        interval: Duration,
        /// Stop after one refresh
        #[arg(long)]
        once: bool,
        /// Print JSON: one object a line for each refresh and unit
        #[arg(long)]
        json: bool,
        /// Print every unit's counters once, in the text format of Prometheus
        #[arg(long, conflicts_with_all = ["once", "json", "interval"])]
        prometheus: bool,
    },
    /// Take a checkpoint of a running unit now, and store it with the events since the one before
    Checkpoint {
        /// Name of the unit
        name: String,
    },
    /// Stop a running unit for good
    Stop {
        /// Name of the unit
        name: String,
    },
    /// Remove a unit that does not run, with its log and checkpoints
    Rm {
        /// Name of the unit
        name: String,
    },
    /// Print the event log of a unit like strace does; of a running one from its last checkpoint but one
    Log {
        /// Name of the unit
        name: String,
        /// First event [default: the first that is kept]
        #[arg(long, value_name = "SII")]
        from: Option<u64>,
        /// Last event [default: the last one]
        #[arg(long, value_name = "SII")]
        to: Option<u64>,
    },
    /// Replay the stored events of a unit and check them; of a running one those since its last checkpoint
    Verify {
        /// Name of the unit
        name: String,
    },
    /// Write a systemd service that runs a program as a unit, and say what to do next
    #[command(override_usage = "ftrun install-unit [OPTIONS] NAME -- PROGRAM [ARGS]...")]
    InstallUnit(InstallArgs),
    /// Say what this kernel and this user can do; fails if `run` would not work
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}
