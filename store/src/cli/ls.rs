//! `ftstore ls`.

use std::fmt::Write as _;

use serde_json::json;

use super::{Answer, At};
use crate::Error;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Ls {
    #[command(flatten)]
    at: At,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Ls {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        let units = self.at.open()?.units()?;
        let width = units.iter().map(|u| u.name.as_str().len()).max().unwrap_or(0).max(4);
        let mut text =
            format!("{:<width$}  {:>12}  {:>21}  {:>11}  holder\n", "unit", "bytes", "events", "checkpoints");
        for unit in &units {
            let events = format!("{}..{}", unit.log.start, unit.log.end);
            let _ = writeln!(
                text,
                "{:<width$}  {:>12}  {events:>21}  {:>11}  {}",
                unit.name.as_str(),
                unit.bytes,
                unit.checkpoints.len(),
                unit.holder.as_deref().unwrap_or("-")
            );
        }
        Ok(Answer { text, json: json!(units), bad: false })
    }
}
