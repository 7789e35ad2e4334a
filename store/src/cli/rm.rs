//! `ftstore rm`.

use super::{Answer, At};
use crate::{Error, UnitName};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Rm {
    #[command(flatten)]
    at: At,
    /// The unit
    unit: String,
}

impl Rm {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        let name = UnitName::new(&self.unit[..])?;
        self.at.open()?.remove(&name)?;
        Ok(Answer { text: format!("{name}: removed\n"), json: serde_json::Value::Null, bad: false })
    }
}
