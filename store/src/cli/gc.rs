//! `ftstore gc`.

use serde_json::json;

use super::{Answer, At};
use crate::Error;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Gc {
    #[command(flatten)]
    at: At,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Gc {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        let got = self.at.open()?.gc()?;
        let text = format!(
            "{} files or messages with {} bytes given back, {} bytes moved\n",
            got.segments, got.bytes, got.moved
        );
        Ok(Answer { text, json: json!(got), bad: false })
    }
}
