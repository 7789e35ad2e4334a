//! The file that `--config` names: options of `ftrun run` by their long names, its variables and its program (ftrun.toml(5)).

use std::ffi::OsString;
use std::ops::Range;
use std::path::Path;

use clap::{Arg, ArgAction, Args};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::args::RunArgs;

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Config {
    /// Values of arguments, by their ids.
    values: Vec<(String, Vec<String>)>,
    /// Variables for the program's environment.
    env: Vec<(OsString, OsString)>,
}

impl Config {
    /// Reads a file; what is wrong with it is told with file, line, column and key.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("--config {}: {e}", path.display()))?;
        Self::parse(&text).map_err(|(span, why)| {
            let before = &text[..span.map_or(0, |s| s.start.min(text.len()))];
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            format!("{}:{line}:{column}: {why}", path.display())
        })
    }

    fn parse(text: &str) -> Result<Self, (Option<Range<usize>>, String)> {
        let table = DeTable::parse(text).map_err(|e| (e.span(), e.message().to_owned()))?;
        let run = RunArgs::augment_args(clap::Command::new("run").no_binary_name(true));
        let mut config = Self::default();
        for (key, value) in table.get_ref() {
            let name = &**key.get_ref();
            let wrong = |at: &Spanned<DeValue<'_>>, why: String| (Some(at.span()), format!("{name}: {why}"));
            match name {
                "env" => {
                    let Some(variables) = value.get_ref().as_table() else {
                        return Err(wrong(value, "it is a table: [env] and below it NAME = \"VALUE\"".into()));
                    };
                    for (variable, value) in variables {
                        let text = value.get_ref().as_str().ok_or_else(|| {
                            wrong(value, format!("the value of {} has to be a string", variable.get_ref()))
                        })?;
                        config.env.push((variable.get_ref().to_string().into(), text.into()));
                    }
                }
                "command" => {
                    let words = value.get_ref().as_array().filter(|words| !words.is_empty());
                    let words =
                        words.and_then(|w| w.iter().map(|word| word.get_ref().as_str()).collect::<Option<Vec<_>>>());
                    let words = words.ok_or_else(|| {
                        wrong(value, "it is an array of strings: [\"PROGRAM\", \"ARGUMENT\", ...]".into())
                    })?;
                    config.values.push(("command".into(), words.into_iter().map(str::to_owned).collect()));
                }
                _ => {
                    let arg = run.get_arguments().find(|a| a.get_long() == Some(name) && a.get_id() != "config");
                    let arg = arg.ok_or_else(|| {
                        (
                            Some(key.span()),
                            format!("unknown key `{name}`; keys are the long options of `ftrun run`, env and command"),
                        )
                    })?;
                    if let Some(text) = of_option(arg, value.get_ref()).map_err(|why| wrong(value, why))? {
                        check(&run, arg, name, &text).map_err(|why| wrong(value, why))?;
                        config.values.push((arg.get_id().to_string(), vec![text]));
                    }
                }
            }
        }
        Ok(config)
    }

    /// The definition of `run`, with what the file says for what is not on the command line.
    pub(super) fn apply(&self, mut command: clap::Command) -> clap::Command {
        for (id, values) in &self.values {
            // Clap keeps them for ever; they are of one file.
            let values: Vec<&'static str> = values.iter().map(|v| &*Box::leak(v.clone().into_boxed_str())).collect();
            command = command.mut_arg(id, |arg| arg.required(false).default_values(values));
        }
        command
    }

    /// Puts the file's variables before those of the command line, which count.
    pub(super) fn put_env(self, run: &mut RunArgs) {
        let mut env = self.env;
        env.append(&mut run.env);
        run.env = env;
    }
}

/// An option's value as it would stand on the command line; none for a flag that is not wanted.
fn of_option(arg: &Arg, value: &DeValue<'_>) -> Result<Option<String>, String> {
    match (arg.get_action(), value) {
        (ArgAction::SetTrue, DeValue::Boolean(on)) => Ok(on.then(|| "true".into())),
        (ArgAction::SetTrue, other) => Err(format!("it is true or false, not of type {}", other.type_str())),
        (_, DeValue::String(text)) => Ok(Some(text.to_string())),
        (_, DeValue::Integer(number)) if number.radix() == 10 => Ok(Some(number.as_str().to_owned())),
        (_, other) => Err(format!("it is a string, not of type {}", other.type_str())),
    }
}

/// Has clap look at a value.
fn check(run: &clap::Command, arg: &Arg, name: &str, value: &str) -> Result<(), String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return Ok(());
    }
    let words = [format!("--{name}={value}"), "--".into(), "program".into()];
    run.clone().try_get_matches_from(words).map(drop).map_err(|e| {
        let text = e.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let text = text.split("\n\n").next().unwrap_or(text);
        text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
    })
}
