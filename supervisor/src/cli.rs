//! The command line.

use std::ffi::OsString;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use ftrun_abi::record::Record;
use ftrun_store::LogReader;
use serde::{Deserialize, Serialize};

use crate::report::{EXIT_FAILURE, Error};
use crate::status::LIST_HEADING;
use crate::systemd::Ready;
use crate::systemd::install::{Request, install};
use crate::unitdir::{NAME_BYTES_MAX, UnitDir, check_name};
use crate::{control, doctor, logging, top};

/// Names the state directory.
const STATE_DIR_VAR: &str = "FTRUN_STATE_DIR";
/// Checkpoints further apart than this are a mistake in the unit of time.
const CHECKPOINT_EVERY_MAX: Duration = Duration::from_secs(7 * 86400);
/// The log between two checkpoints takes at least a few large events.
const CHECKPOINT_LOG_MIN: u64 = 64 << 10;

/// What `ftrun run` was asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunOptions {
    /// Name given; see [`RunOptions::unit_name`].
    pub name: Option<String>,
    /// State directory, absolute.
    pub state_dir: PathBuf,
    /// Durability level.
    pub durability: Durability,
    /// Stable storage, at durability `node`.
    pub store: Option<StoreOptions>,
    /// Longest time between checkpoints.
    pub checkpoint_every: Duration,
    /// A checkpoint is taken earlier when replay alone would take longer than this.
    pub recover_within: Duration,
    /// A checkpoint is taken when the log since the last one has this many bytes.
    pub checkpoint_log_bytes: u64,
    /// Whether every event and checkpoint is written to the state directory as it comes.
    pub journal: bool,
    /// Variables to add to the program's environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory of the program, if it is not ours.
    pub cwd: Option<PathBuf>,
    /// Whether the fast path may be used.
    pub shim: bool,
    /// When the service manager is told that the unit is ready.
    pub ready: Ready,
    /// The program as given.
    pub program: OsString,
    /// Its arguments, without the program.
    pub args: Vec<OsString>,
    /// How many `-v`.
    pub verbose: u8,
    /// Log lines as JSON.
    pub log_json: bool,
    /// A recovery may go on without descriptors that cannot be made again.
    pub lossy: bool,
    /// What remains of a unit of this name that was killed with all of ftrun is gone on with.
    pub resume: bool,
    /// Its descriptors are left with the service manager, so that they outlive all of ftrun.
    pub hold: bool,
}

/// Where a unit's events and checkpoints go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreOptions {
    /// URL of the store; `None` for one in the unit's own directory.
    pub url: Option<String>,
    /// When an event counts as stable.
    pub stable: Stable,
}

/// When an event counts as stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Stable {
    /// When the store has it in memory: for a store on another machine.
    Memory,
    /// When it is in the page cache of the store's machine.
    Cache,
    /// When it is on the store's disk.
    Disk,
}

impl From<Stable> for ftrun_store::Durability {
    fn from(stable: Stable) -> Self {
        match stable {
            Stable::Memory => Self::Memory,
            Stable::Cache => Self::Cache,
            Stable::Disk => Self::Disk,
        }
    }
}

impl RunOptions {
    /// The name given, or the program's with our pid.
    pub fn unit_name(&self) -> String {
        self.name.clone().unwrap_or_else(|| default_name(&self.program, process::id()))
    }
}

fn default_name(program: &OsString, pid: u32) -> String {
    let base = Path::new(program).file_name().unwrap_or(program);
    let clean = |c: char| if check_name(&c.to_string()).is_ok() || c == '.' { c } else { '_' };
    let mut name: String = base.to_string_lossy().chars().map(clean).collect();
    let suffix = format!("-{pid}");
    name.truncate(NAME_BYTES_MAX - suffix.len());
    name + &suffix
}

/// What a unit survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Durability {
    /// The death of any process of the unit, however it dies.
    Process,
    /// Also the death of the supervisor.
    Supervisor,
    /// Also the loss of the machine: nothing is given out before what led to it is in the store.
    Node,
}

impl Durability {
    /// Its name on the command line and in the status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Supervisor => "supervisor",
            Self::Node => "node",
        }
    }

    /// Whether the death of the supervisor is survived.
    pub fn survives_supervisor(self) -> bool {
        self != Self::Process
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
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
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Global {
    /// Directory of all units [default: /var/lib/ftrun as root, otherwise $XDG_STATE_HOME/ftrun]
    #[arg(long, value_name = "DIR", global = true)]
    state_dir: Option<PathBuf>,
    /// Log more to standard error: -v lifecycle, -vv checkpoints, -vvv every call
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Format of log lines
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    log_format: LogFormat,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Name of the unit [default: the program's name and ftrun's pid]
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// What the unit survives
    #[arg(long, value_name = "LEVEL", default_value = "process")]
    durability: Durability,
    /// Stable storage for --durability node: file:DIR, unix:PATH, tcp:HOST:PORT [default: in the unit's
    /// directory]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Where an event has to be in the store before what follows from it is given out
    #[arg(long, value_name = "WHERE", default_value = "disk")]
    stable: Stable,
    /// Longest time between checkpoints (500ms, 1s, 2m)
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_checkpoint_every)]
    checkpoint_every: Duration,
    /// Take a checkpoint earlier when replay would take longer than this (150ms, 1s)
    #[arg(long, value_name = "TIME", default_value = "150ms", value_parser = parse_checkpoint_every)]
    recover_within: Duration,
    /// Take a checkpoint when the log since the last one has grown to this (64MiB, 1GiB)
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_checkpoint_log)]
    checkpoint_log: u64,
    /// Write every event and checkpoint to the state directory as it comes, for `ftrun log` and `ftrun verify`
    #[arg(long)]
    journal: bool,
    /// Add a variable to the program's environment; may be repeated
    #[arg(long, value_name = "K=V", value_parser = OsStringValueParser::new().try_map(parse_env))]
    env: Vec<(OsString, OsString)>,
    /// Working directory of the program
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Go on with the unit of this name, if it was killed with all of ftrun, as `ftrun resume` does; start it otherwise
    #[arg(long)]
    resume: bool,
    /// Leave the unit's descriptors with the service manager (NOTIFY_SOCKET), if it takes them, so that its connections outlive
    /// keeper, supervisor and program
    #[arg(long)]
    hold_descriptors: bool,
    /// Serve no call inside the program: slower, and as right
    #[arg(long)]
    no_shim: bool,
    /// When a service manager (NOTIFY_SOCKET) is told that the unit is ready: when the program has been started, or when
    /// the program says so itself
    #[arg(long, value_name = "WHEN", default_value = "started")]
    ready: Ready,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
#[command(mut_arg("name", |arg| arg.hide(true)))]
struct InstallArgs {
    /// Name of the unit, and of the service's instance: ftrun@NAME.service
    #[arg(value_name = "NAME", value_parser = parse_name)]
    unit: String,
    /// Write it for your own service manager instead of the system's
    #[arg(long)]
    user: bool,
    /// Run it as another user than root
    #[arg(long = "as", value_name = "USER")]
    as_user: Option<String>,
    /// Have a socket opened by the service manager and handed to the program (a port, HOST:PORT or a path); may be repeated
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// Print the files and write none
    #[arg(long)]
    print: bool,
    /// Replace the template ftrun@.service even if it is not this ftrun's
    #[arg(long)]
    force: bool,
    /// Directory of unit files [default: /etc/systemd/system, or with --user ~/.config/systemd/user]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    /// The options for `run` among what was given.
    #[arg(skip)]
    options: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum Command {
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

/// The clap definition, for the tests of the manual page.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the command line, does what it says and returns the exit status.
pub fn main() -> ExitCode {
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are answers, not errors. Nobody is left to tell when this fails.
            drop(e.print());
            return ExitCode::from(if e.use_stderr() { EXIT_FAILURE } else { 0 });
        }
    };
    logging::init(cli.global.verbose, cli.global.log_format == LogFormat::Json);
    let result = dispatch(cli);
    logging::flush();
    match result {
        Ok(code) => ExitCode::from(code),
        // The reader of a pipe has seen enough.
        Err(Error::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => {
            let mut text = Vec::new();
            if e.print(&mut text).is_ok() {
                logging::line(text);
                logging::flush();
            }
            ExitCode::from(e.exit_code())
        }
    }
}

fn parse<T: Into<OsString>>(args: impl IntoIterator<Item = T>) -> Result<Cli, clap::Error> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let matches = Cli::command().try_get_matches_from(&args).map_err(|e| ask_for_dashes(e, &args))?;
    if matches.subcommand_name().is_some() {
        refuse_run_options(&matches)?;
    }
    let mut cli = Cli::from_arg_matches(&matches)?;
    if let (Some(Command::InstallUnit(install)), Some((_, given))) = (&mut cli.command, matches.subcommand()) {
        if install.run.name.is_some() {
            let text = "the name of the unit is the word after install-unit, not --name";
            return Err(Cli::command().error(ErrorKind::ArgumentConflict, text));
        }
        install.options = run_options(given);
    }
    Ok(cli)
}

/// The options for `ftrun run` that were given, but for the name and what depends on the directory that we stand in.
fn run_options(given: &ArgMatches) -> Vec<OsString> {
    let all = Global::augment_args(RunArgs::augment_args(clap::Command::new("run")));
    let mut options = Vec::new();
    for arg in all.get_arguments().filter(|a| !matches!(a.get_id().as_str(), "name" | "cwd" | "state_dir")) {
        let (id, Some(long)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
        if given.value_source(id) != Some(ValueSource::CommandLine) {
            continue;
        }
        match arg.get_action() {
            clap::ArgAction::Count => {
                options.extend(std::iter::repeat_n(format!("--{long}").into(), usize::from(given.get_count(id))));
            }
            clap::ArgAction::SetTrue => options.push(format!("--{long}").into()),
            _ => options.extend(given.get_raw(id).into_iter().flatten().map(|value| {
                let mut option = OsString::from(format!("--{long}="));
                option.push(value);
                option
            })),
        }
    }
    options
}

/// `ftrun redis-server` is most likely meant as `ftrun -- redis-server`.
fn ask_for_dashes(e: clap::Error, args: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(word)) = e.get(ContextKind::InvalidArg) else { return e };
    let at = args.iter().position(|a| a.to_str() == Some(word));
    let before = &args[..at.unwrap_or(0)];
    let mut command = Cli::command();
    let in_command =
        before.iter().filter_map(|a| a.to_str()).any(|a| a != "run" && command.find_subcommand(a).is_some());
    if e.kind() != ErrorKind::UnknownArgument || word.starts_with('-') || in_command {
        return e;
    }
    let text = format!("{word} is no command of ftrun; to run it as a program, write `--` before it: ftrun -- {word}");
    command.error(ErrorKind::UnknownArgument, text)
}

/// `ftrun --name x ls` would silently drop the name.
fn refuse_run_options(matches: &ArgMatches) -> Result<(), clap::Error> {
    let run = RunArgs::augment_args(clap::Command::new("run"));
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    match run.get_arguments().find(|a| given(a.get_id().as_str())) {
        None => Ok(()),
        Some(arg) => Err(Cli::command().error(
            ErrorKind::ArgumentConflict,
            match arg.get_long() {
                Some(long) => format!("--{long} belongs to `ftrun run`: write it after the word `run`"),
                None => "a program belongs to `ftrun run`, not to another command".into(),
            },
        )),
    }
}

fn dispatch(cli: Cli) -> Result<u8, Error> {
    let state_dir = || state_dir(cli.global.state_dir.clone());
    let open = |name: &str| UnitDir::open(&state_dir()?, name);
    let out = &mut BufWriter::new(io::stdout());
    match cli.command {
        None => return run(&cli.global, cli.run),
        Some(Command::Run(args)) => return run(&cli.global, args),
        Some(Command::Resume { name, lossy, store, stable }) => {
            let state_dir = state_dir()?;
            let store = store.map(|url| StoreOptions { url: Some(url), stable });
            if store.is_none() {
                // An error for one that does not exist, rather than a new directory.
                open(&name)?;
            }
            let code = crate::run::resume(UnitDir::create(&state_dir, &name)?, lossy, store)?;
            return Ok(code.to_le_bytes()[0]);
        }
        Some(Command::Ls { json }) => list(out, &state_dir()?, json)?,
        Some(Command::Status { name, json }) => {
            let status = control::status(&open(&name)?)?;
            if json { print_json(out, &status)? } else { print(out, &status)? }
        }
        Some(Command::Top { prometheus: true, .. }) => print(out, &top::prometheus(&state_dir()?)?)?,
        Some(Command::Top { interval, once, json, .. }) => {
            top::run(out, &state_dir()?, top::Options { interval, once, json })?;
        }
        Some(Command::Checkpoint { name }) => {
            let status = control::checkpoint(&open(&name)?)?;
            if let Some(c) = status.last_checkpoint {
                let text = format!(
                    "checkpoint at event {}: {} pages, {} bytes, pause {} us\n",
                    c.sii, c.pages, c.bytes, c.pause_us
                );
                print(out, &text)?;
            }
        }
        Some(Command::Stop { name }) => control::stop(&open(&name)?)?,
        Some(Command::Rm { name }) => open(&name)?.remove()?,
        Some(Command::Log { name, from, to }) => log(out, &stored(open(&name)?)?, from, to)?,
        Some(Command::Verify { name }) => {
            let outcome = crate::verify::verify(&stored(open(&name)?)?)?;
            print(out, &format!("{outcome}\n"))?;
            return finish(out, outcome.is_ok());
        }
        Some(Command::InstallUnit(args)) => install_unit(out, args, cli.global.state_dir)?,
        Some(Command::Doctor { json }) => {
            let report = doctor::examine(&state_dir()?);
            if json {
                print_json(out, &report)?;
            } else {
                print(out, &report)?;
            }
            return finish(out, report.ok);
        }
        Some(Command::Completions { shell }) => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ftrun", &mut text);
            out.write_all(&text).map_err(Error::Output)?;
        }
        Some(Command::Man) => print(out, &include_str!("../../man/ftrun.1"))?,
    }
    finish(out, true)
}

fn finish(out: &mut impl Write, ok: bool) -> Result<u8, Error> {
    out.flush().map_err(Error::Output)?;
    Ok(u8::from(!ok))
}

fn print(out: &mut impl Write, text: &impl std::fmt::Display) -> Result<(), Error> {
    write!(out, "{text}").map_err(Error::Output)
}

fn print_json(out: &mut impl Write, value: &impl serde::Serialize) -> Result<(), Error> {
    let json = serde_json::to_string_pretty(value)
        .map_err(|e| Error::bug(format!("an answer cannot be written as JSON: {e}")))?;
    print(out, &format!("{json}\n"))
}

fn run(global: &Global, args: RunArgs) -> Result<u8, Error> {
    if args.store.is_some() && args.durability != Durability::Node {
        return Err(Error::environment("--store is for units that survive their machine", "add --durability node"));
    }
    if args.hold_descriptors && !args.durability.survives_supervisor() {
        let what = "--hold-descriptors is for units that survive their supervisor";
        return Err(Error::environment(what, "add --durability supervisor"));
    }
    let mut command = args.command.into_iter();
    let program = command.next().ok_or_else(|| Error::bug("clap let an empty command pass"))?;
    let options = RunOptions {
        name: args.name,
        state_dir: state_dir(global.state_dir.clone())?,
        durability: args.durability,
        store: (args.durability == Durability::Node)
            .then_some(StoreOptions { url: args.store.clone(), stable: args.stable }),
        checkpoint_every: args.checkpoint_every,
        recover_within: args.recover_within,
        checkpoint_log_bytes: args.checkpoint_log,
        journal: args.journal,
        env: args.env,
        cwd: args.cwd,
        shim: !args.no_shim,
        ready: args.ready,
        program,
        args: command.collect(),
        verbose: global.verbose,
        log_json: global.log_format == LogFormat::Json,
        lossy: false,
        resume: args.resume,
        hold: args.hold_descriptors,
    };
    let dir = UnitDir::create(&options.state_dir, &options.unit_name())?;
    let code = crate::run::run(options, dir)?;
    // As the kernel does it: the low eight bits.
    Ok(code.to_le_bytes()[0])
}

fn install_unit(out: &mut impl Write, args: InstallArgs, state_dir: Option<PathBuf>) -> Result<(), Error> {
    let mut options = args.options;
    if args.run.durability.survives_supervisor() && !args.run.hold_descriptors {
        // The service that is written may leave them there.
        options.push("--hold-descriptors".into());
    }
    if let Some(cwd) = args.run.cwd {
        let mut option = OsString::from("--cwd=");
        option.push(std::path::absolute(&cwd).map_err(Error::state("find", &cwd))?);
        options.push(option);
    }
    let request = Request {
        name: args.unit,
        user_manager: args.user,
        user: args.as_user,
        listen: args.listen,
        print: args.print,
        force: args.force,
        dir: args.dir,
        state_dir: state_dir.or_else(|| variable(STATE_DIR_VAR)),
        options,
        command: args.run.command,
    };
    install(request, out)
}

fn list(out: &mut impl Write, state_dir: &Path, json: bool) -> Result<(), Error> {
    let units = control::statuses(state_dir)?;
    if json {
        return print_json(out, &units);
    }
    if !units.is_empty() {
        print(out, &format!("{LIST_HEADING}\n"))?;
    }
    units.iter().try_for_each(|unit| print(out, &format!("{}\n", unit.list_line())))
}

/// A unit with what happened since its last checkpoint on disk.
fn stored(unit: UnitDir) -> Result<UnitDir, Error> {
    if unit.is_running() {
        control::checkpoint(&unit)?;
    }
    Ok(unit)
}

fn log(out: &mut impl Write, unit: &UnitDir, from: Option<u64>, to: Option<u64>) -> Result<(), Error> {
    let reader = LogReader::open(&unit.log_dir())?;
    let Some(first) = from.or(reader.first_sii()) else {
        return Ok(());
    };
    for record in reader.records(first) {
        let (sii, bytes) = record?;
        if to.is_some_and(|to| sii > to) {
            break;
        }
        print_event(out, sii, &bytes)?;
    }
    Ok(())
}

fn print_event(out: &mut impl Write, sii: u64, bytes: &[u8]) -> Result<(), Error> {
    let (record, _) =
        Record::parse(bytes).map_err(|e| Error::bug(format!("event {sii} of the log cannot be decoded: {e:?}")))?;
    crate::print::print_record(out, &record).map_err(Error::Output)
}

/// The state directory: the option, the variable or the default; absolute, since the directory that
/// we stand in is the program's.
pub(crate) fn state_dir(option: Option<PathBuf>) -> Result<PathBuf, Error> {
    let dir = option
        .or_else(|| variable(STATE_DIR_VAR))
        .or_else(default_state_dir)
        .filter(|dir| !dir.as_os_str().is_empty())
        .ok_or_else(|| {
            Error::environment(
                "there is no place for the state directory: neither XDG_STATE_HOME nor HOME is set",
                format!("name one with --state-dir DIR or {STATE_DIR_VAR}"),
            )
        })?;
    std::path::absolute(&dir).map_err(Error::state("find", &dir))
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

fn default_state_dir() -> Option<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Some("/var/lib/ftrun".into());
    }
    let xdg = variable("XDG_STATE_HOME").filter(|p| p.is_absolute());
    xdg.or_else(|| Some(variable("HOME")?.join(".local/state"))).map(|p| p.join("ftrun"))
}

fn parse_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

fn parse_env(text: OsString) -> Result<(OsString, OsString), String> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = text.as_bytes();
    match bytes.iter().position(|&b| b == b'=') {
        None | Some(0) => Err("write it as NAME=VALUE".into()),
        Some(at) => Ok((OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec()))),
    }
}

/// A decimal number and what follows it, trimmed.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    Some((f64::from_str(number).ok()?, unit.trim()))
}

/// Reads a time such as `1s`, `500ms` or `1.5m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: write a number and ms, s, m or h, such as 500ms");
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "" => return Err(format!("{text:?} has no unit: write {text}s or {text}ms")),
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())
}

/// Reads a size such as `64MiB`, `1G` or `4096`. `K`, `M` and `G` count in 1024s.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write a number and KiB, MiB or GiB, such as 64MiB");
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" | "mb" | "gb" | "tb" => {
            return Err(format!("{text:?}: sizes count in 1024s, write KiB, MiB or GiB"));
        }
        _ => return Err(wrong()),
    };
    let bytes = number * factor as f64;
    if bytes >= (1u64 << 53) as f64 {
        return Err(format!("{text:?} is more than any disk holds"));
    }
    Ok(bytes as u64)
}

fn parse_checkpoint_every(text: &str) -> Result<Duration, String> {
    let every = parse_duration(text)?;
    if every < Duration::from_millis(1) || every > CHECKPOINT_EVERY_MAX {
        return Err("it must be between 1ms and 168h".into());
    }
    Ok(every)
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    if interval < Duration::from_millis(100) || interval > Duration::from_secs(86400) {
        return Err("it must be between 100ms and 24h".into());
    }
    Ok(interval)
}

fn parse_checkpoint_log(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < CHECKPOINT_LOG_MIN {
        return Err(format!("it must be at least {}KiB", CHECKPOINT_LOG_MIN >> 10));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
