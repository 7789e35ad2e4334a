//! `ftrun verify`: what is stored is read, checked, and replayed in a shadow.

use std::fmt;

use ftrun_abi::record::Record;
use ftrun_ckpt::image::Chain;
use ftrun_store::LogReader;

use crate::report::Error;
use crate::service::Service;
use crate::shadow::{self, Finding, State};
use crate::unitdir::UnitDir;

/// How often reading is begun again because a running unit has removed what was to be read.
const READS: u32 = 5;

/// What was found.
#[derive(Debug, Default)]
pub struct VerifyOutcome {
    intervals: Vec<(u64, u64, Finding)>,
    problems: Vec<String>,
}

impl VerifyOutcome {
    /// Nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty() && !self.intervals.iter().any(|i| matches!(i.2, Finding::Different(_)))
    }
}

impl fmt::Display for VerifyOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "damaged: {problem}")?;
        }
        for (from, to, finding) in &self.intervals {
            write!(f, "checkpoint at event {from}, events to {to}: ")?;
            match finding {
                Finding::Equal => writeln!(f, "replayed; registers and memory equal the next checkpoint")?,
                Finding::Replayed => writeln!(f, "replayed; no later checkpoint to compare with")?,
                Finding::NotComparable(cause) => {
                    writeln!(
                        f,
                        "replayed; not compared, because the next checkpoint was taken for what replay cannot make: {cause}"
                    )?;
                }
                Finding::Different(what) => writeln!(f, "DIFFERENT\n{what}")?,
            }
        }
        f.write_str(if self.is_ok() { "no divergence" } else { "verification failed" })
    }
}

/// What is on disk, as far as it is sound.
struct Stored {
    checkpoints: Vec<State>,
    records: Vec<(u64, Box<[u8]>)>,
    problems: Vec<String>,
}

/// Checks every stored checkpoint and event of a unit, replays each checkpoint's events in a shadow of the
/// unit and compares the outcome with the next checkpoint (DESIGN, invariant of replay). The calling
/// process becomes a tracer and should end afterwards.
///
/// # Errors
/// The state directory cannot be read, or this process may not trace.
pub fn verify(dir: &UnitDir) -> Result<VerifyOutcome, Error> {
    let mut stored = read(dir)?;
    for _ in 1..READS {
        if stored.problems.is_empty() || !dir.is_running() {
            break;
        }
        stored = read(dir)?;
    }
    let os = |e: std::io::Error| Error::bug(format!("the shadow's threads: {e}"));
    let service = Service::start(Vec::new()).map_err(os)?;
    // SAFETY: no arguments.
    crate::run::start_ticks(&service, unsafe { libc::syscall(libc::SYS_gettid) })?;
    // Read before the tracer shares its descriptors with a shadow.
    crate::vdso::areas();
    let mut outcome = VerifyOutcome { problems: stored.problems, ..VerifyOutcome::default() };
    let last = stored.records.last().map_or(0, |r| r.0);
    let mut rest = stored.checkpoints.into_iter().peekable();
    while let Some(from) = rest.next() {
        let next = rest.peek();
        let (begin, end) = (from.0.sii, next.map_or(last, |n| n.0.sii));
        if next.is_none() && end <= begin {
            continue;
        }
        let at = |sii: u64| stored.records.partition_point(|r| r.0 <= sii);
        let records = stored.records[at(begin)..at(end)].to_vec();
        if records.len() as u64 != end - begin {
            let n = records.len();
            outcome.problems.push(format!("the log holds {n} of the {} events from {begin} to {end}", end - begin));
            continue;
        }
        match shadow::replay(&service, from, records, next) {
            Ok(finding) => outcome.intervals.push((begin, end, finding)),
            Err(why) => {
                return Err(Error::environment(
                    format!("the events after checkpoint {begin} cannot be replayed here: {why}"),
                    "see what this machine allows: ftrun doctor",
                ));
            }
        }
    }
    Ok(outcome)
}

fn read(dir: &UnitDir) -> Result<Stored, Error> {
    let mut stored = Stored { checkpoints: Vec::new(), records: Vec::new(), problems: Vec::new() };
    match Chain::open(&dir.ckpt_dir()) {
        Ok(chain) => {
            stored.problems.extend(chain.damaged().iter().map(ToString::to_string));
            for sii in kept(&chain) {
                match chain.load(sii) {
                    Ok(state) => stored.checkpoints.push(state),
                    Err(e) => stored.problems.push(e.to_string()),
                }
            }
        }
        Err(e) => stored.problems.push(e.to_string()),
    }
    let reader = LogReader::open(&dir.log_dir())?;
    let Some(first) = reader.first_sii() else { return Ok(stored) };
    for record in reader.records(first) {
        match record {
            Ok((sii, bytes)) => match Record::parse(&bytes) {
                Ok((r, _)) if r.header.sii == sii => stored.records.push((sii, bytes.into())),
                Ok(_) => stored.problems.push(format!("event {sii} is stored under another number")),
                Err(e) => stored.problems.push(format!("event {sii}: {e:?}")),
            },
            Err(e) => {
                stored.problems.push(e.to_string());
                break;
            }
        }
    }
    Ok(stored)
}

/// The checkpoints that the unit keeps for recovery: the newest two. Older files are there because these
/// are stored as changes to them; loading reads and checks them, too.
fn kept(chain: &Chain) -> Vec<u64> {
    let mut newest: Vec<u64> = chain.entries().rev().take(crate::journal::KEPT).map(|e| e.sii).collect();
    newest.reverse();
    newest
}
