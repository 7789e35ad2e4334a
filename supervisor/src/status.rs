//! The state of a unit as `ftrun status` shows it. The JSON form is a contract: fields are added,
//! never changed or removed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Whether a unit runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The program runs.
    #[default]
    Running,
    /// The program died and is being brought back.
    Recovering,
    /// The program ended by itself or was stopped.
    Stopped,
    /// The program cannot be brought back; everything is kept.
    Failed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Recovering => "recovering",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// A wall-clock time in nanoseconds since the epoch; in JSON as RFC 3339 in UTC with microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The time now.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self(since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Reads what [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
        let mut date = date.splitn(3, '-').map(str::parse::<u64>);
        let mut next = || date.next()?.ok();
        let days = days_from_civil(next()?, next()?, next()?)?;
        let (time, micros) = time.split_once('.')?;
        let mut time = time.splitn(3, ':').map(str::parse::<u64>);
        let mut next = || time.next()?.ok().filter(|&n| n < 61);
        let seconds = next()? * 3600 + next()? * 60 + next()?;
        let micros: u64 = micros.parse().ok().filter(|_| micros.len() == 6)?;
        let ns = (days * 86400 + seconds).checked_mul(1_000_000_000)?;
        Some(Self(ns.checked_add(micros * 1000)?))
    }
}

/// Days since 1970-01-01, for years from 1970 to 9999 (Howard Hinnant's algorithm).
fn days_from_civil(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..10000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let y = if month <= 2 { year - 1 } else { year };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let of_era = (y % 400) * 365 + (y % 400) / 4 - (y % 400) / 100 + of_year;
    (y / 400 * 146_097 + of_era).checked_sub(719_468)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / 1_000_000_000;
        let z = seconds / 86400 + 719_468;
        let of_era = z % 146_097;
        let year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let mp = (5 * of_year + 2) / 153;
        let day = of_year - (153 * mp + 2) / 5 + 1;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = year + z / 146_097 * 400 + u64::from(month <= 2);
        let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let micros = self.0 / 1000 % 1_000_000;
        write!(f, "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{micros:06}Z")
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom(format!("not a time: {text}")))
    }
}

/// Intervals that can only be rebuilt from a checkpoint after them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unloggable {
    /// How many so far.
    pub count: u64,
    /// By what caused them.
    pub by_cause: BTreeMap<String, u64>,
}

impl Unloggable {
    /// Counts one more.
    pub fn add(&mut self, cause: &str) {
        self.count += 1;
        match self.by_cause.get_mut(cause) {
            Some(n) => *n += 1,
            None => drop(self.by_cause.insert(cause.to_owned(), 1)),
        }
    }
}

/// A checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// It holds the state after this many events.
    pub sii: u64,
    /// How long the program stood still for it, microseconds.
    pub pause_us: u64,
    /// Pages in it.
    pub pages: u64,
    /// Bytes that it takes in the state directory.
    pub bytes: u64,
    /// When it was taken.
    pub at: Timestamp,
}

/// Checkpoints of one supervisor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoints {
    /// How many it has taken.
    pub count: u64,
    /// Bytes of the pages that it has copied for them.
    pub bytes: u64,
    /// How long the program stood still for them, microseconds.
    pub pause_us: u64,
}

/// The event log in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogInfo {
    /// Bytes of all events so far.
    pub bytes: u64,
    /// Bytes of memory that it takes now.
    pub resident_bytes: u64,
}

/// A recovery.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RecoveryInfo {
    /// From the notice of the death until the program went on, milliseconds.
    pub total_ms: f64,
    /// The part that restored memory and registers.
    pub restore_ms: f64,
    /// The part that replayed events.
    pub replay_ms: f64,
    /// Events replayed.
    pub events: u64,
}

/// System calls by the way they took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// Through the tracer.
    pub slow: u64,
    /// Through the shim.
    pub fast: u64,
}

/// A call site whose calls stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowSite {
    /// Its address in the program.
    pub address: String,
    /// The file that is mapped there; empty if none is.
    pub file: String,
    /// The function that it is in, if the file says.
    pub symbol: Option<String>,
    /// The call that was made there last.
    pub call: String,
    /// How often.
    pub calls: u64,
    /// Why its calls are not served in the process.
    pub why: String,
}

/// What is known of a unit's stable storage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreInfo {
    /// Its URL.
    pub url: String,
    /// Every event up to this one is stable.
    pub committed: u64,
    /// Events behind it.
    pub lag: u64,
    /// Output that is queued until it may leave, bytes.
    #[serde(default)]
    pub queued: u64,
    /// What it takes to commit a group of events, microseconds (a moving mean).
    pub commit_us: u32,
    /// The newest checkpoint there: the state after this many events.
    pub checkpoint: u64,
    /// What keeps events from being stored.
    pub error: Option<String>,
}

/// The state of a unit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the unit.
    pub name: String,
    /// Whether it runs.
    pub state: State,
    /// Process id of the unit's root process now; none when it does not run.
    pub pid: Option<i32>,
    /// Process that traces the unit.
    pub supervisor_pid: Option<i32>,
    /// Process that holds the unit's kernel objects.
    pub keeper_pid: Option<i32>,
    /// How many times the program was started or brought back, from 1.
    pub incarnation: u32,
    /// How many times it was brought back.
    pub recoveries: u64,
    /// Events so far: the state interval index.
    pub events: u64,
    /// Intervals that could not be logged.
    pub unloggable: Unloggable,
    /// Durability level.
    pub durability: String,
    /// Stable storage, at durability `node`.
    #[serde(default)]
    pub store: Option<StoreInfo>,
    /// Supervisors so far: more than one when some were killed.
    #[serde(default)]
    pub supervisors: u32,
    /// How written pages are found.
    pub dirty_backend: String,
    /// The newest published checkpoint.
    pub last_checkpoint: Option<CheckpointInfo>,
    /// The checkpoints of this supervisor.
    #[serde(default)]
    pub checkpoints: Checkpoints,
    /// The event log.
    #[serde(default)]
    pub log: LogInfo,
    /// The newest checkpoint in the state directory: the state after this many events.
    pub stored_checkpoint: Option<u64>,
    /// The newest finished recovery.
    pub last_recovery: Option<RecoveryInfo>,
    /// System calls so far.
    pub calls: Calls,
    /// The sites with the most slow calls, as of the last checkpoint.
    #[serde(default)]
    pub slow_sites: Vec<SlowSite>,
    /// The program as given.
    pub program: String,
    /// Its arguments, without the program.
    pub args: Vec<String>,
    /// When the unit was started.
    pub started_at: Timestamp,
    /// When this was written.
    #[serde(default)]
    pub updated_at: Timestamp,
    /// Exit status of the program (128+n for signal n) once it ended.
    #[serde(default)]
    pub exit_code: Option<i32>,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
    /// `lost` when ftrun itself died and the unit with it; `killed` when `ftrun resume` can go on with it.
    #[serde(default)]
    pub note: Option<String>,
}

impl Status {
    /// True while there is or will soon be a process again.
    pub fn is_live(&self) -> bool {
        matches!(self.state, State::Running | State::Recovering)
    }

    /// What this says when nobody holds the unit's lock any more.
    pub(crate) fn without_supervisor(mut self) -> Self {
        if self.is_live() {
            self.state = State::Stopped;
            self.note = Some("lost".into());
        }
        self.pid = None;
        self.supervisor_pid = None;
        self.keeper_pid = None;
        self
    }

    /// One line for `ftrun ls`; see [`LIST_HEADING`].
    pub fn list_line(&self) -> String {
        let state = match &self.note {
            Some(note) => format!("{} ({note})", self.state),
            None => self.state.to_string(),
        };
        format!(
            "{:<24} {state:<15} {:>8} {:>10} {:>12} {}",
            self.name,
            self.pid.map_or_else(|| "-".into(), |p| p.to_string()),
            self.recoveries,
            self.events,
            self.program,
        )
    }
}

/// Heading over [`Status::list_line`].
pub const LIST_HEADING: &str = "NAME                     STATE                PID RECOVERIES       EVENTS PROGRAM";

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = |p: Option<i32>| p.map_or_else(|| "-".to_owned(), |p| p.to_string());
        write!(f, "{}: {}", self.name, self.state)?;
        match self.note.as_deref() {
            Some("lost") => writeln!(f, " (lost: ftrun itself died, and the unit with it)")?,
            Some("killed") => writeln!(f, " (killed with all of ftrun; ftrun resume {} goes on with it)", self.name)?,
            Some(note) => writeln!(f, " ({note})")?,
            None => writeln!(f)?,
        }
        if let Some(reason) = &self.reason {
            writeln!(f, "  reason       {reason}")?;
        }
        if let Some(code) = self.exit_code {
            writeln!(f, "  exit status  {code}")?;
        }
        let args = self.args.iter().map(|a| format!(" {a}")).collect::<String>();
        writeln!(f, "  program      {}{args}", self.program)?;
        writeln!(f, "  started      {}", self.started_at)?;
        writeln!(
            f,
            "  processes    program {}, supervisor {}, keeper {}",
            pid(self.pid),
            pid(self.supervisor_pid),
            pid(self.keeper_pid)
        )?;
        writeln!(f, "  incarnation  {} ({} recoveries)", self.incarnation, self.recoveries)?;
        writeln!(f, "  events       {}", self.events)?;
        writeln!(f, "  calls        {} slow, {} fast", self.calls.slow, self.calls.fast)?;
        for s in &self.slow_sites {
            let place = s.symbol.as_deref().unwrap_or(&s.address);
            writeln!(f, "    {:>10} {} at {place} in {}: {}", s.calls, s.call, s.file, s.why)?;
        }
        write!(f, "  unloggable   {}", self.unloggable.count)?;
        let causes = self.unloggable.by_cause.iter();
        let causes: Vec<_> = causes.map(|(cause, n)| format!("{cause} {n}")).collect();
        match causes.is_empty() {
            true => writeln!(f)?,
            false => writeln!(f, " ({})", causes.join(", "))?,
        }
        writeln!(f, "  durability   {}", self.durability)?;
        if let Some(s) = &self.store {
            write!(f, "  store        {}: {} events committed, {} behind, ", s.url, s.committed, s.lag)?;
            writeln!(
                f,
                "{} bytes of output queued, {} us a group, checkpoint {}",
                s.queued, s.commit_us, s.checkpoint
            )?;
            if let Some(error) = &s.error {
                writeln!(f, "               {error}")?;
            }
        }
        writeln!(f, "  dirty pages  {}", self.dirty_backend)?;
        match &self.last_checkpoint {
            None => writeln!(f, "  checkpoint   none yet")?,
            Some(c) => writeln!(
                f,
                "  checkpoint   at event {}, {}: {} pages, {} bytes, pause {} us",
                c.sii, c.at, c.pages, c.bytes, c.pause_us
            )?,
        }
        match &self.last_recovery {
            None => writeln!(f, "  recovery     none yet"),
            Some(r) => writeln!(
                f,
                "  recovery     {:.1} ms (restore {:.1}, replay {:.1} for {} events)",
                r.total_ms, r.restore_ms, r.replay_ms, r.events
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_contract() {
        let mut status = Status {
            name: "a".into(),
            last_checkpoint: Some(CheckpointInfo::default()),
            last_recovery: Some(RecoveryInfo::default()),
            ..Status::default()
        };
        status.unloggable.add("fork");
        status.unloggable.add("fork");
        let json = serde_json::to_value(&status).unwrap();
        for field in [
            "name",
            "state",
            "pid",
            "supervisor_pid",
            "keeper_pid",
            "incarnation",
            "recoveries",
            "events",
            "unloggable",
            "durability",
            "dirty_backend",
            "last_checkpoint",
            "checkpoints",
            "log",
            "stored_checkpoint",
            "last_recovery",
            "calls",
            "program",
            "args",
            "started_at",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for field in ["sii", "pause_us", "pages", "bytes", "at"] {
            assert!(json["last_checkpoint"].get(field).is_some(), "{field}");
        }
        for field in ["total_ms", "restore_ms", "replay_ms", "events"] {
            assert!(json["last_recovery"].get(field).is_some(), "{field}");
        }
        assert_eq!(json["checkpoints"], serde_json::json!({"count": 0, "bytes": 0, "pause_us": 0}));
        assert_eq!(json["log"], serde_json::json!({"bytes": 0, "resident_bytes": 0}));
        assert_eq!(json["calls"], serde_json::json!({"slow": 0, "fast": 0}));
        assert_eq!(json["unloggable"], serde_json::json!({"count": 2, "by_cause": {"fork": 2}}));
        assert_eq!(json["state"], "running");
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), status);
    }

    #[test]
    fn times_as_rfc3339() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00.000000Z"),
            (1_795_237_199_123_456_000, "2026-11-21T04:59:59.123456Z"),
            (4_107_542_399_000_001_000, "2100-02-28T23:59:59.000001Z"),
        ];
        for (ns, text) in cases {
            assert_eq!(Timestamp(ns).to_string(), text);
            assert_eq!(Timestamp::parse(text), Some(Timestamp(ns)));
        }
        for bad in ["", "2026", "2026-13-01T00:00:00.000000Z", "1969-12-31T00:00:00.000000Z"] {
            assert_eq!(Timestamp::parse(bad), None, "{bad}");
        }
        for day in 0..60_000 {
            let t = Timestamp(day * 86_400_000_000_000);
            assert_eq!(Timestamp::parse(&t.to_string()), Some(t));
        }
    }

    #[test]
    fn a_running_unit_without_a_supervisor_is_lost() {
        let status = Status { pid: Some(5), ..Status::default() };
        let seen = status.without_supervisor();
        assert_eq!((seen.state, seen.pid, seen.note.as_deref()), (State::Stopped, None, Some("lost")));
        assert!(seen.to_string().contains("lost"));
        let failed = Status { state: State::Failed, ..Status::default() };
        assert_eq!(failed.without_supervisor().state, State::Failed);
    }
}
