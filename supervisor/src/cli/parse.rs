//! From words to [`Cli`].

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches};

use super::args::{Cli, Command, Global, RunArgs};
use super::config::Config;

/// Reads the words of a command line.
pub(super) fn parse<T: Into<OsString>>(args: impl IntoIterator<Item = T>) -> Result<Cli, clap::Error> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let config = config_of(&args)?;
    // What the file says counts for what is not on the command line.
    let command = config.apply(Cli::command()).mut_subcommand("run", |run| config.apply(run));
    let matches = command.try_get_matches_from(&args).map_err(|e| ask_for_dashes(e, &args))?;
    if matches.subcommand_name().is_some() {
        refuse_run_options(&matches)?;
    }
    let mut cli = Cli::from_arg_matches(&matches)?;
    match &mut cli.command {
        None => config.put_env(&mut cli.run),
        Some(Command::Run(run)) => config.put_env(run),
        Some(_) => {}
    }
    if let (Some(Command::InstallUnit(install)), Some((_, given))) = (&mut cli.command, matches.subcommand()) {
        if install.run.name.is_some() {
            let text = "the name of the unit is the word after install-unit, not --name";
            return Err(Cli::command().error(ErrorKind::ArgumentConflict, text));
        }
        install.options = run_options(given);
    }
    Ok(cli)
}

/// What the file says that `ftrun run` is given, if it is given one. That of a service is read when the service is started: it is
/// only looked at.
fn config_of(args: &[OsString]) -> Result<Config, clap::Error> {
    // The program may stand in the file.
    let relaxed = |command: clap::Command| command.mut_arg("command", |arg| arg.required(false));
    let command = relaxed(Cli::command()).mut_subcommand("run", relaxed);
    // What is wrong with the words themselves is told by who reads them next.
    let Ok(matches) = command.try_get_matches_from(args) else { return Ok(Config::default()) };
    let (word, given) = matches.subcommand().unwrap_or(("run", &matches));
    let path = given.try_get_one::<PathBuf>("config").ok().flatten();
    let read = |path: &PathBuf| Config::read(path).map_err(|why| Cli::command().error(ErrorKind::InvalidValue, why));
    let config = path.map(read).transpose()?.unwrap_or_default();
    Ok(if word == "run" { config } else { Config::default() })
}

/// The options for `ftrun run` that were given, but for the name and what depends on the directory that we stand in.
fn run_options(given: &ArgMatches) -> Vec<OsString> {
    let all = Global::augment_args(RunArgs::augment_args(clap::Command::new("run")));
    let mut options = Vec::new();
    for arg in all.get_arguments().filter(|a| !matches!(a.get_id().as_str(), "name" | "cwd" | "state_dir" | "config")) {
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
