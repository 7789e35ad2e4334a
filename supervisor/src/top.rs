//! `ftrun top`: what units do now, as a table that is refreshed, as JSON, and for Prometheus.
//!
//! All three show the same [`METRICS`]: a new one is a row there, and a field of [`Status`] that it is taken from. Rates
//! are differences between two answers of a supervisor, over the time between them as it saw it.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control;
use crate::report::Error;
use crate::status::{State, Status};

/// What is shown, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Time between two refreshes; rates are over this time.
    pub interval: Duration,
    /// One refresh and no more.
    pub once: bool,
    /// One JSON object for each refresh and unit, instead of the table.
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Only grows while the same supervisor runs.
    Counter,
    Gauge,
}

/// What of a metric the table shows.
#[derive(Clone, Copy, Debug)]
enum Column {
    None,
    /// The number itself.
    Number(&'static str, Format),
    /// Its growth in a second.
    Rate(&'static str, Format),
}

/// A number for people.
#[derive(Clone, Copy, Debug)]
enum Format {
    Count,
    Bytes,
    Seconds,
}

/// A number that a running unit has.
struct Metric {
    /// Its name in JSON; with the prefix `ftrun_`, and `_total` behind a counter's, for Prometheus. The name tells the
    /// unit of measure: `bytes`, `seconds`, or none for counts.
    name: &'static str,
    kind: Kind,
    help: &'static str,
    column: Column,
    of: fn(&Status) -> Option<f64>,
}

const METRICS: [Metric; 16] = [
    Metric {
        name: "events",
        kind: Kind::Counter,
        help: "Events logged since the unit was started.",
        column: Column::Rate("EVENTS/s", Format::Count),
        of: |s| Some(s.events as f64),
    },
    Metric {
        name: "log_bytes",
        kind: Kind::Counter,
        help: "Bytes of the events logged.",
        column: Column::Rate("LOG/s", Format::Bytes),
        of: |s| Some(s.log.bytes as f64),
    },
    Metric {
        name: "log_resident_bytes",
        kind: Kind::Gauge,
        help: "Memory that the event log takes now.",
        column: Column::Number("LOG MEM", Format::Bytes),
        of: |s| Some(s.log.resident_bytes as f64),
    },
    Metric {
        name: "checkpoints",
        kind: Kind::Counter,
        help: "Checkpoints taken.",
        column: Column::Rate("CKPT/s", Format::Count),
        of: |s| Some(s.checkpoints.count as f64),
    },
    Metric {
        name: "checkpoint_bytes",
        kind: Kind::Counter,
        help: "Bytes of the pages that checkpoints have copied.",
        column: Column::Rate("COPIED/s", Format::Bytes),
        of: |s| Some(s.checkpoints.bytes as f64),
    },
    Metric {
        name: "checkpoint_pause_seconds",
        kind: Kind::Counter,
        help: "Time that the program has stood still for checkpoints.",
        column: Column::None,
        of: |s| Some(s.checkpoints.pause_us as f64 / 1e6),
    },
    Metric {
        name: "last_pause_seconds",
        kind: Kind::Gauge,
        help: "Time that the program stood still for the newest checkpoint.",
        column: Column::Number("PAUSE", Format::Seconds),
        of: |s| Some(s.last_checkpoint.as_ref()?.pause_us as f64 / 1e6),
    },
    Metric {
        name: "recoveries",
        kind: Kind::Counter,
        help: "How often the program was brought back.",
        column: Column::Number("RECOV", Format::Count),
        of: |s| Some(s.recoveries as f64),
    },
    Metric {
        name: "last_recovery_seconds",
        kind: Kind::Gauge,
        help: "Time from the notice of the last death until the program went on.",
        column: Column::Number("TOOK", Format::Seconds),
        of: |s| Some(s.last_recovery.as_ref()?.total_ms / 1e3),
    },
    Metric {
        name: "uncommitted_events",
        kind: Kind::Gauge,
        help: "Events that are not in stable storage yet.",
        column: Column::Number("BEHIND", Format::Count),
        of: |s| Some(s.store.as_ref()?.lag as f64),
    },
    Metric {
        name: "queued_output_bytes",
        kind: Kind::Gauge,
        help: "Output that waits until it may leave.",
        column: Column::None,
        of: |s| Some(s.store.as_ref()?.queued as f64),
    },
    Metric {
        name: "commit_seconds",
        kind: Kind::Gauge,
        help: "What it takes to commit a group of events: a moving mean.",
        column: Column::Number("COMMIT", Format::Seconds),
        of: |s| Some(f64::from(s.store.as_ref()?.commit_us) / 1e6),
    },
    Metric {
        name: "supervisors",
        kind: Kind::Counter,
        help: "Supervisors started.",
        column: Column::None,
        of: |s| Some(f64::from(s.supervisors)),
    },
    Metric {
        name: "slow_calls",
        kind: Kind::Counter,
        help: "System calls made through the tracer.",
        column: Column::Rate("SLOW/s", Format::Count),
        of: |s| Some(s.calls.slow as f64),
    },
    Metric {
        name: "fast_calls",
        kind: Kind::Counter,
        help: "System calls served inside the program.",
        column: Column::None,
        of: |s| Some(s.calls.fast as f64),
    },
    Metric {
        name: "unloggable_intervals",
        kind: Kind::Counter,
        help: "Intervals that only the checkpoint after them can stand for.",
        column: Column::None,
        of: |s| Some(s.unloggable.count as f64),
    },
];

impl Metric {
    /// The number of a unit. While one is recovered, its supervisor counts up again to where it was; and while none answers,
    /// there is what one has written when it began, which names no process.
    fn number(&self, status: &Status) -> Option<f64> {
        (status.state == State::Running && status.pid.is_some()).then(|| (self.of)(status)).flatten()
    }

    fn json(&self, status: &Status) -> Value {
        match self.number(status) {
            Some(n) if self.name.ends_with("seconds") => json!(n),
            Some(n) => json!(n as u64),
            None => Value::Null,
        }
    }

    /// Growth in a second since an earlier answer.
    fn rate(&self, before: &Status, now: &Status) -> Option<f64> {
        let seconds = now.updated_at.0.checked_sub(before.updated_at.0).filter(|ns| *ns > 0)? as f64 / 1e9;
        let same = before.supervisor_pid == now.supervisor_pid && before.started_at == now.started_at;
        let grown = self.number(now)? - self.number(before)?;
        // An event is taken back when its process dies before what must follow it.
        (same && self.kind == Kind::Counter).then_some(grown.max(0.0) / seconds)
    }
}

/// Shows the running units of a state directory, again and again or once.
///
/// # Errors
/// The state directory cannot be read, or the output cannot be written.
pub fn run(out: &mut impl Write, state_dir: &Path, options: Options) -> Result<(), Error> {
    let redraw = io::stdout().is_terminal() && !options.once;
    let mut before: HashMap<String, Status> = HashMap::new();
    // There are no rates before the second look.
    let mut begin = Instant::now();
    let mut first = true;
    loop {
        let units: Vec<Status> = control::statuses(state_dir)?.into_iter().filter(Status::is_live).collect();
        if !first || (redraw && !options.json) {
            let text = if options.json { json_lines(&units, &before)? } else { table(&units, &before) };
            let text = if redraw && !options.json { fitted(&text) } else { text };
            out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)?;
        }
        if options.once && !first {
            return Ok(());
        }
        first = false;
        before = units.into_iter().map(|s| (s.name.clone(), s)).collect();
        begin += options.interval;
        match begin.checked_duration_since(Instant::now()) {
            Some(left) => thread::sleep(left),
            // We have been stopped for a while.
            None => begin = Instant::now(),
        }
    }
}

fn json_lines(units: &[Status], before: &HashMap<String, Status>) -> Result<String, Error> {
    let mut lines = String::new();
    for status in units {
        let mut object = json!({
            "at": status.updated_at,
            "name": status.name,
            "state": status.state,
            "pid": status.pid,
            "program": status.program,
            "durability": status.durability,
        });
        for m in &METRICS {
            object[m.name] = m.json(status);
            if m.kind == Kind::Counter {
                object[format!("{}_per_second", m.name)] =
                    before.get(&status.name).and_then(|b| m.rate(b, status)).map_or(Value::Null, Value::from);
            }
        }
        let line = serde_json::to_string(&object);
        lines += &line.map_err(|e| Error::bug(format!("an answer cannot be written as JSON: {e}")))?;
        lines.push('\n');
    }
    Ok(lines)
}

fn table(units: &[Status], before: &HashMap<String, Status>) -> String {
    let mut rows = vec![vec!["NAME".to_owned(), "STATE".into(), "PID".into()]];
    rows[0].extend(METRICS.iter().filter_map(|m| match m.column {
        Column::None => None,
        Column::Number(heading, _) | Column::Rate(heading, _) => Some(heading.to_owned()),
    }));
    rows[0].push("PROGRAM".into());
    for status in units {
        let mut row = vec![status.name.clone(), status.state.to_string()];
        row.push(status.pid.map_or_else(|| "-".into(), |p| p.to_string()));
        row.extend(METRICS.iter().filter_map(|m| {
            let (number, format) = match m.column {
                Column::None => return None,
                Column::Number(_, format) => (m.number(status), format),
                Column::Rate(_, format) => (before.get(&status.name).and_then(|b| m.rate(b, status)), format),
            };
            Some(number.map_or_else(|| "-".into(), |n| format.show(n)))
        }));
        row.push(status.program.clone());
        rows.push(row);
    }
    let columns = rows[0].len();
    let widths: Vec<usize> =
        (0..columns).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            text += &match i {
                // Words to the left, numbers to the right, and nothing behind the last word.
                0 | 1 => format!("{cell:<width$}  "),
                _ if i + 1 == columns => cell.clone(),
                _ => format!("{cell:>width$}  "),
            };
        }
        text.push('\n');
    }
    text
}

/// The text in place of what the terminal shows, without what has no room there.
fn fitted(text: &str) -> String {
    // SAFETY: plain integers; the kernel writes one such structure.
    let (rows, columns) = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        match libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) {
            0 if size.ws_row > 1 && size.ws_col > 0 => (usize::from(size.ws_row), usize::from(size.ws_col)),
            _ => (24, 80),
        }
    };
    // Home; clear the rest of each line, and below (ECMA-48: CUP, EL, ED).
    let mut screen = "\x1b[H".to_owned();
    for line in text.lines().take(rows - 1) {
        screen.extend(line.chars().take(columns));
        screen += "\x1b[K\n";
    }
    screen + "\x1b[J"
}

impl Format {
    fn show(self, n: f64) -> String {
        match self {
            Self::Count => scaled(n, 1000.0, &["", "k", "M", "G"]),
            Self::Bytes => scaled(n, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"]),
            Self::Seconds if n < 1e-3 => format!("{:.0}us", n * 1e6),
            Self::Seconds if n < 1.0 => format!("{:.1}ms", n * 1e3),
            Self::Seconds => format!("{n:.1}s"),
        }
    }
}

/// Three or four digits, and what they count.
fn scaled(mut n: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while n >= 10.0 * step.min(1000.0) && unit + 1 < units.len() {
        n /= step;
        unit += 1;
    }
    if unit == 0 || n >= 100.0 { format!("{n:.0}{}", units[unit]) } else { format!("{n:.1}{}", units[unit]) }
}

/// Every unit of a state directory in the text format that Prometheus reads (its "Exposition formats", version 0.0.4).
///
/// # Errors
/// The state directory cannot be read.
pub fn prometheus(state_dir: &Path) -> Result<String, Error> {
    Ok(exposition(&control::statuses(state_dir)?))
}

fn exposition(units: &[Status]) -> String {
    let mut text =
        String::from("# HELP ftrun_unit_state The state that a unit is in.\n# TYPE ftrun_unit_state gauge\n");
    for status in units {
        for state in [State::Running, State::Recovering, State::Stopped, State::Failed] {
            let is = u8::from(status.state == state);
            text += &format!("ftrun_unit_state{{unit=\"{}\",state=\"{state}\"}} {is}\n", escaped(&status.name));
        }
    }
    for m in &METRICS {
        let (kind, name) = match m.kind {
            Kind::Counter => ("counter", format!("ftrun_{}_total", m.name)),
            Kind::Gauge => ("gauge", format!("ftrun_{}", m.name)),
        };
        text += &format!("# HELP {name} {}\n# TYPE {name} {kind}\n", m.help);
        for (status, n) in units.iter().filter_map(|s| Some((s, m.number(s)?))) {
            text += &format!("{name}{{unit=\"{}\"}} {n}\n", escaped(&status.name));
        }
    }
    text
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Timestamp;

    fn unit(events: u64, seconds: u64) -> Status {
        Status {
            name: "a".into(),
            pid: Some(7),
            supervisor_pid: Some(6),
            program: "prog".into(),
            events,
            updated_at: Timestamp(seconds * 1_000_000_000),
            ..Status::default()
        }
    }

    fn by_name(unit: Status) -> HashMap<String, Status> {
        HashMap::from([(unit.name.clone(), unit)])
    }

    /// Break it: take the time between two refreshes for the time between two answers.
    #[test]
    fn a_rate_is_growth_over_time() {
        let line = json_lines(&[unit(5000, 12)], &by_name(unit(1000, 10))).unwrap();
        let object: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&object["events"], &object["events_per_second"]), (&json!(5000), &json!(2000.0)));
        assert_eq!(object["last_recovery_seconds"], Value::Null);
        let shown = table(&[unit(5000, 12)], &by_name(unit(1000, 10)));
        assert!(shown.lines().nth(1).is_some_and(|l| l.contains(" 2000 ")), "{shown}");
    }

    /// Another supervisor counts from where it begins, and one that recovers its unit has not counted up yet.
    ///
    /// Break it: compare what any two answers say.
    #[test]
    fn there_is_no_rate_across_supervisors_and_recoveries() {
        let after = Status { supervisor_pid: Some(9), ..unit(5000, 12) };
        let recovering = Status { state: State::Recovering, ..unit(3, 12) };
        let written = Status { pid: None, ..unit(0, 12) };
        for now in [after, recovering, written] {
            let object: Value = serde_json::from_str(&json_lines(&[now], &by_name(unit(1000, 10))).unwrap()).unwrap();
            assert_eq!(object["events_per_second"], Value::Null);
        }
        for silent in [Status { state: State::Recovering, ..unit(3, 12) }, Status { pid: None, ..unit(3, 12) }] {
            assert!(!exposition(&[silent]).contains("ftrun_events_total{"));
        }
    }

    #[test]
    fn the_exposition_has_each_metric_once() {
        let text = exposition(&[unit(3, 1), Status { name: "b\"\\".into(), ..unit(4, 1) }]);
        assert!(
            text.contains("ftrun_events_total{unit=\"a\"} 3\nftrun_events_total{unit=\"b\\\"\\\\\"} 4\n"),
            "{text}"
        );
        assert!(text.contains("ftrun_unit_state{unit=\"a\",state=\"running\"} 1\n"), "{text}");
        let helps: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# HELP ")?.split(' ').next()).collect();
        assert_eq!(helps.len(), METRICS.len() + 1);
        assert_eq!(helps.iter().collect::<std::collections::BTreeSet<_>>().len(), helps.len(), "{helps:?}");
    }

    #[test]
    fn numbers_for_people() {
        let shown = [0.0, 999.0, 9999.0, 12_345.0, 1_234_567.0].map(|n| Format::Count.show(n));
        assert_eq!(shown, ["0", "999", "9999", "12.3k", "1235k"]);
        let shown = [0.0, 2048.0, 20_480.0, (64u64 << 20) as f64].map(|n| Format::Bytes.show(n));
        assert_eq!(shown, ["0B", "2048B", "20.0KiB", "64.0MiB"]);
        assert_eq!([0.000_25, 0.0125, 2.5].map(|n| Format::Seconds.show(n)), ["250us", "12.5ms", "2.5s"]);
    }
}
