//! The command line.

mod args;
mod config;
mod options;
mod parse;
#[cfg(test)]
mod tests;
mod values;

use std::ffi::OsString;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use ftrun_abi::record::Record;
use ftrun_store::LogReader;

use crate::report::{EXIT_FAILURE, Error};
use crate::status::LIST_HEADING;
use crate::systemd::install::{Request, install};
use crate::unitdir::UnitDir;
use crate::{control, doctor, logging, top};
use args::{Cli, Command, Global, InstallArgs, LogFormat, RunArgs};
pub use options::{Durability, RunOptions, Stable, StoreOptions};
use parse::parse;
pub use values::{parse_duration, parse_size};

/// Names the state directory.
const STATE_DIR_VAR: &str = "FTRUN_STATE_DIR";

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
        self_contained: args.self_contained,
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
    for (option, path) in [("--config=", args.run.config), ("--cwd=", args.run.cwd)] {
        if let Some(path) = path {
            let mut option = OsString::from(option);
            option.push(std::path::absolute(&path).map_err(Error::state("find", &path))?);
            options.push(option);
        }
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
