//! `ftrun verify`: what is stored is read, checked, and replayed in a shadow.

use std::collections::BTreeSet;
use std::fmt;

use ftrun_abi::record::{Kind, Record, flag};
use ftrun_ckpt::image::Chain;
use ftrun_store::{LogError, LogReader};

use crate::report::Error;
use crate::service::Service;
use crate::shadow::{self, Finding, State};
use crate::unitdir::UnitDir;

/// How often reading is begun again because a running unit has removed what was to be read.
const READS: u32 = 5;

/// What came of the events between two checkpoints.
#[derive(Debug)]
struct Interval {
    from: u64,
    to: u64,
    /// Damaged checkpoints between, which the older one and its events stand in for.
    over: Vec<u64>,
    finding: Finding,
}

/// What was found.
#[derive(Debug, Default)]
pub struct VerifyOutcome {
    intervals: Vec<Interval>,
    problems: Vec<String>,
}

impl VerifyOutcome {
    /// Nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty() && !self.intervals.iter().any(|i| matches!(i.finding, Finding::Different(_)))
    }
}

impl fmt::Display for VerifyOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "damaged: {problem}")?;
        }
        for Interval { from, to, over, finding } in &self.intervals {
            write!(f, "checkpoint at event {from}, events to {to}: ")?;
            for sii in over {
                write!(f, "over the damaged checkpoint at event {sii}: ")?;
            }
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

/// What is on disk.
#[derive(Default)]
struct Stored {
    /// The checkpoints that the unit keeps for recovery, ascending; None for a damaged one.
    checkpoints: Vec<(u64, Option<State>)>,
    /// The events up to the first damaged one.
    records: Vec<(u64, Box<[u8]>)>,
    problems: Vec<String>,
}

impl Stored {
    /// The events behind the oldest checkpoint have been removed since it was read.
    fn is_overtaken(&self) -> bool {
        let (oldest, first) = (self.checkpoints.first(), self.records.first());
        self.checkpoints.len() > 1 && oldest.zip(first).is_some_and(|((sii, _), (first, _))| *first > sii + 1)
    }
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
        if (stored.problems.is_empty() && !stored.is_overtaken()) || !dir.is_running() {
            break;
        }
        stored = read(dir)?;
    }
    if dir.is_running() {
        // What it has given up while we were reading cannot be verified any more.
        while stored.is_overtaken() {
            stored.checkpoints.remove(0);
        }
    }
    let os = |e: std::io::Error| Error::bug(format!("the shadow's threads: {e}"));
    let service = Service::start(Vec::new()).map_err(os)?;
    // SAFETY: no arguments.
    crate::run::start_ticks(&service, unsafe { libc::syscall(libc::SYS_gettid) })?;
    // Read before the tracer shares its descriptors with a shadow.
    crate::vdso::areas();
    let mut outcome = VerifyOutcome { problems: stored.problems, ..VerifyOutcome::default() };
    let last = stored.records.last().map_or(0, |r| r.0);
    let at = |sii: u64| stored.records.partition_point(|r| r.0 <= sii);
    let mut rest = stored.checkpoints.into_iter().peekable();
    while let Some((begin, from)) = rest.next() {
        let Some(from) = from else { continue };
        let mut over = Vec::new();
        while let Some((sii, _)) = rest.next_if(|(_, state)| state.is_none()) {
            over.push(sii);
        }
        let next = rest.peek().and_then(|(sii, state)| Some((*sii, state.as_ref()?)));
        let known = over.last().copied().unwrap_or(begin);
        let mut end = next.map_or(last.max(known), |(sii, _)| sii);
        if end == begin {
            continue;
        }
        let mut records = stored.records[at(begin)..at(end)].to_vec();
        if records.len() as u64 != end - begin {
            let n = records.len();
            outcome.problems.push(format!("the log holds {n} of the {} events from {begin} to {end}", end - begin));
            continue;
        }
        let mut next = next.map(|(_, state)| state);
        if let Some(i) = irreplayable(&records, next.is_some()) {
            // At the very end of a log its checkpoint was never taken, and the call is made again.
            if i + 1 < records.len() || next.is_some() || !over.is_empty() {
                outcome.problems.push(format!("event {} needs the checkpoint after it", records[i].0));
            }
            records.truncate(i);
            end = records.last().map_or(begin, |r| r.0);
            next = None;
        }
        match shadow::replay(&service, from, records, next) {
            Ok(finding) => outcome.intervals.push(Interval { from: begin, to: end, over, finding }),
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

/// The first event whose effect is in the checkpoint after it alone. The last one may be followed by that
/// checkpoint.
fn irreplayable(records: &[(u64, Box<[u8]>)], followed: bool) -> Option<usize> {
    let inner = records.len() - usize::from(followed && !records.is_empty());
    records[..inner].iter().position(|(_, bytes)| {
        Record::parse(bytes).is_ok_and(|(r, _)| r.kind == Kind::Exec || r.header.flags & flag::UNLOGGABLE != 0)
    })
}

fn read(dir: &UnitDir) -> Result<Stored, Error> {
    let mut stored = Stored::default();
    match Chain::open(&dir.ckpt_dir()) {
        Ok(chain) => {
            stored.problems.extend(chain.damaged().map(|(_, e)| e.to_string()));
            for sii in kept(&chain) {
                let damaged = chain.damaged().any(|(d, _)| d == sii);
                let state = (!damaged)
                    .then(|| chain.load(sii))
                    .and_then(|loaded| loaded.map_err(|e| stored.problems.push(e.to_string())).ok());
                stored.checkpoints.push((sii, state));
            }
            if stored.checkpoints.is_empty() {
                stored.problems.push(format!("there is no checkpoint in {}", dir.ckpt_dir().display()));
            }
        }
        Err(e) => stored.problems.push(e.to_string()),
    }
    if let Err(e) = read_log(dir, &mut stored) {
        stored.problems.push(e.to_string());
    }
    if !dir.is_running() {
        read_end(dir, &mut stored);
    }
    // A running unit goes on: events behind a checkpoint that was not there yet may need it.
    let seen = stored.checkpoints.last().map_or(0, |c| c.0);
    let newer: Vec<u64> = Chain::open(&dir.ckpt_dir()).map(|c| kept(&c)).unwrap_or_default();
    let newer: Vec<u64> = newer.into_iter().filter(|sii| *sii > seen).collect();
    let end = match newer[..] {
        [] => u64::MAX,
        [next] => next,
        // There may have been more, which are gone already.
        _ => seen,
    };
    stored.records.retain(|(sii, _)| *sii <= end);
    Ok(stored)
}

fn read_log(dir: &UnitDir, stored: &mut Stored) -> Result<(), LogError> {
    let reader = LogReader::open(&dir.log_dir())?;
    let Some(first) = reader.first_sii() else { return Ok(()) };
    for record in reader.records(first) {
        let (sii, bytes) = record?;
        match Record::parse(&bytes) {
            Ok((r, _)) if r.header.sii == sii => stored.records.push((sii, bytes.into())),
            Ok(_) => stored.problems.push(format!("event {sii} is stored under another number")),
            Err(e) => stored.problems.push(format!("event {sii}: {e:?}")),
        }
    }
    Ok(())
}

/// A log that is cut between two events looks like one that ended there; the status knows better.
fn read_end(dir: &UnitDir, stored: &mut Stored) {
    let status = match dir.read_status() {
        Ok(status) => status,
        Err(e) => return stored.problems.push(e.to_string()),
    };
    if matches!(status.state, crate::status::State::Running | crate::status::State::Recovering) {
        // Its supervisor was killed: what it had not written is lost with it.
        return;
    }
    let end = stored.records.last().map_or(0, |r| r.0);
    let checkpoint = stored.checkpoints.last().map_or(0, |c| c.0);
    if end.max(checkpoint) < status.events {
        stored.problems.push(format!(
            "the log in {} ends at event {end}; the unit ended at event {}",
            dir.log_dir().display(),
            status.events
        ));
    }
}

/// The checkpoints that the unit keeps for recovery: the newest two. Older files are there because these
/// are stored as changes to them; loading reads and checks them, too.
fn kept(chain: &Chain) -> Vec<u64> {
    let all: BTreeSet<u64> = chain.entries().map(|e| e.sii).chain(chain.damaged().map(|(sii, _)| sii)).collect();
    let older = all.len().saturating_sub(crate::journal::KEPT);
    all.into_iter().skip(older).collect()
}
