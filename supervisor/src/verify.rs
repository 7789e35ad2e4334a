//! `ftrun verify`: what is stored is read and checked.

use std::fmt;

use ftrun_abi::record::Record;
use ftrun_ckpt::image::Chain;
use ftrun_store::LogReader;

use crate::report::Error;
use crate::unitdir::UnitDir;

/// What was found.
#[derive(Debug)]
pub struct VerifyOutcome {
    checkpoints: usize,
    records: u64,
    problems: Vec<String>,
}

impl VerifyOutcome {
    /// Nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty()
    }
}

impl fmt::Display for VerifyOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for p in &self.problems {
            writeln!(f, "{p}")?;
        }
        write!(f, "{} checkpoints and {} events read, {} problems", self.checkpoints, self.records, self.problems.len())
    }
}

/// Reads every stored checkpoint and every stored event of a unit and checks their checksums and order.
pub fn verify(dir: &UnitDir) -> Result<VerifyOutcome, Error> {
    let mut outcome = VerifyOutcome { checkpoints: 0, records: 0, problems: Vec::new() };
    match Chain::open(&dir.ckpt_dir()) {
        Ok(chain) => {
            outcome.problems.extend(chain.damaged().iter().map(ToString::to_string));
            for sii in chain.entries().map(|e| e.sii).collect::<Vec<_>>() {
                match chain.load(sii) {
                    Ok(_) => outcome.checkpoints += 1,
                    Err(e) => outcome.problems.push(e.to_string()),
                }
            }
        }
        Err(e) => outcome.problems.push(e.to_string()),
    }
    let reader = LogReader::open(&dir.log_dir())?;
    if let Some(first) = reader.first_sii() {
        for record in reader.records(first) {
            match record {
                Ok((sii, bytes)) => match Record::parse(&bytes) {
                    Ok((r, _)) if r.header.sii == sii => outcome.records += 1,
                    Ok(_) => outcome.problems.push(format!("event {sii} is stored under another number")),
                    Err(e) => outcome.problems.push(format!("event {sii}: {e:?}")),
                },
                Err(e) => {
                    outcome.problems.push(e.to_string());
                    break;
                }
            }
        }
    }
    Ok(outcome)
}
