//! `cargo xtask bench throughput`: what programs do in a second in each mode, and how long a request takes.

use std::path::PathBuf;

use ftrun_tests::{Error, error};
use serde_json::{Map, Value, json};

use super::mode::{Mode, StoreService, available, order};
use super::stats::{Table, median, ratio, show};
use super::workloads::{Measured, Workload, all};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each mode of each workload is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each measurement takes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Only these workloads: names, or beginnings of names followed by `*` (an unknown name lists all)
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these columns, beside `bare`: no-shim, ftrun, supervisor, held, node-file (each commit on disk), node-tcp (in a
    /// service's memory), strace
    #[arg(long, value_name = "MODE", value_delimiter = ',')]
    modes: Vec<String>,
    /// Also write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const MODES: [Mode; 8] =
    [Mode::Bare, Mode::Slow, Mode::Shim, Mode::Supervisor, Mode::Held, Mode::NodeFile, Mode::NodeTcp, Mode::Strace];

const CAPTION: &str = "\
throughput, as ratio to bare, and latency: medians of all rounds
  redis: redis-benchmark -c 50, no saving; memcached: 50 connections, half sets and half gets of 100 bytes;
  nginx: wrk -c 50, one process, no access log, sendfile, files of 600 bytes and of 100 KiB (close: a connection
  for each request); echo servers: 50 connections, lines of 100 bytes; sqlite: 10,000 inserts, each a transaction,
  with synchronous=OFF and journal_mode=WAL, so that the disk is not what is measured.
  slow/1000, fast/1000: calls through the tracer, and through the shim, for each 1,000 requests in steady state.";

impl Options {
    /// The programs that have to be installed for what was asked for.
    pub(crate) fn programs(&self) -> Result<Vec<&'static str>, Error> {
        let mut programs: Vec<_> = self.chosen()?.iter().flat_map(|w| w.programs()).copied().collect();
        programs.push("strace");
        programs.sort_unstable();
        programs.dedup();
        Ok(programs)
    }

    fn chosen(&self) -> Result<Vec<Workload>, Error> {
        choose(&self.only)
    }
}

fn choose(only: &[String]) -> Result<Vec<Workload>, Error> {
    let all = all();
    let fits = |name: &str, pattern: &str| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    };
    if let Some(unknown) = only.iter().find(|p| !all.iter().any(|w| fits(&w.name, p))) {
        let names: Vec<_> = all.iter().map(|w| w.name.as_str()).collect();
        return Err(error!("no workload {unknown}; there are {}", names.join(", ")));
    }
    Ok(all.into_iter().filter(|w| only.is_empty() || only.iter().any(|p| fits(&w.name, p))).collect())
}

/// All rounds of one workload in one mode. The first failure is the last round.
#[derive(Debug)]
struct Series {
    mode: Mode,
    rounds: Vec<Measured>,
    failed: Option<String>,
}

impl Series {
    fn new(mode: Mode) -> Self {
        Self { mode, rounds: Vec::new(), failed: None }
    }

    fn per_second(&self) -> Option<f64> {
        median(self.rounds.iter().map(|r| r.seen.per_second))
    }

    fn p50_us(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.seen.p50_us))
    }

    fn p99_us(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.seen.p99_us))
    }

    fn slow_per_1000(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.steady?.slow_per_1000()))
    }

    fn fast_per_1000(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.steady?.fast_per_1000()))
    }

    fn json(&self, bare: Option<f64>) -> Value {
        let rounds: Vec<Value> = self
            .rounds
            .iter()
            .map(|r| {
                json!({ "per_second": r.seen.per_second, "p50_us": r.seen.p50_us, "p99_us": r.seen.p99_us,
                        "steady_calls": r.steady.map(|s| s.json()) })
            })
            .collect();
        json!({
            "per_second": self.per_second(), "ratio": ratio(self.per_second(), bare), "p50_us": self.p50_us(),
            "p99_us": self.p99_us(), "slow_per_1000": self.slow_per_1000(),
            "fast_per_1000": self.fast_per_1000(), "failed": self.failed, "rounds": rounds,
        })
    }
}

/// The series of one workload.
#[derive(Debug)]
struct Row {
    workload: Workload,
    series: Vec<Series>,
}

impl Row {
    fn bare(&self) -> Option<f64> {
        self.series.iter().find(|s| s.mode == Mode::Bare)?.per_second()
    }

    fn json(&self) -> Value {
        let modes: Map<String, Value> =
            self.series.iter().map(|s| (s.mode.name().to_owned(), s.json(self.bare()))).collect();
        json!({ "workload": self.workload.name, "unit": self.workload.unit(), "modes": modes })
    }
}

/// Runs the benchmark; prints a table. A program that answers wrongly, or not at all, is shown as failed, and then
/// the benchmark as a whole has failed.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let wanted = |m: &Mode| *m == Mode::Bare || options.modes.is_empty() || options.modes.iter().any(|n| n == m.name());
    if let Some(unknown) = options.modes.iter().find(|n| MODES.iter().all(|m| m.name() != n.as_str())) {
        return Err(error!("no mode {unknown}; there are: {}", MODES.map(Mode::name).join(", ")));
    }
    let modes = available(&MODES.into_iter().filter(wanted).collect::<Vec<_>>())?;
    let _ended_with_this = StoreService;
    let mut rows = Vec::new();
    for workload in options.chosen()? {
        if let Some(missing) = workload.programs().iter().find(|p| ftrun_tests::binaries::installed(p).is_none()) {
            eprintln!("xtask: skipping {}: {missing} is not installed", workload.name);
            continue;
        }
        rows.push(rounds(workload, &modes, options));
        // A run takes long: what is there is kept although the rest may never come.
        write(options, &rows)?;
    }
    println!("{CAPTION}\n{}", table(&rows));
    let failures: Vec<_> = rows
        .iter()
        .flat_map(|r| r.series.iter().map(move |s| (r, s)))
        .filter_map(|(r, s)| Some(format!("{} {}: {}", r.workload.name, s.mode.name(), s.failed.as_ref()?)))
        .collect();
    if failures.is_empty() { Ok(()) } else { Err(error!("failed:\n{}", failures.join("\n"))) }
}

fn rounds(workload: Workload, modes: &[Mode], options: &Options) -> Row {
    let mut row = Row { workload, series: modes.iter().map(|m| Series::new(*m)).collect() };
    for n in 0..options.rounds {
        for mode in order(modes, n) {
            let Some(series) = row.series.iter_mut().find(|s| s.mode == mode) else { continue };
            if series.failed.is_some() {
                continue;
            }
            match row.workload.measure(mode, options.seconds) {
                Ok(measured) => {
                    let rate = measured.seen.per_second;
                    eprintln!("xtask: {} round {} {}: {rate:.0}/s", row.workload.name, n + 1, mode.name());
                    series.rounds.push(measured);
                }
                Err(e) => {
                    eprintln!("xtask: {} round {} {}: FAILED: {e}", row.workload.name, n + 1, mode.name());
                    series.failed = Some(format!("round {}: {e}", n + 1));
                }
            }
        }
    }
    row
}

fn write(options: &Options, rows: &[Row]) -> Result<(), Error> {
    let Some(path) = &options.json else { return Ok(()) };
    let rows: Vec<_> = rows.iter().map(Row::json).collect();
    super::write_json(
        path,
        &json!({ "bench": "throughput", "machine": super::machine(), "rounds": options.rounds,
                 "seconds": options.seconds, "rows": rows }),
    )
}

fn table(rows: &[Row]) -> Table {
    let mut table =
        Table::new(2, ["workload", "mode", "per second", "ratio", "p50 us", "p99 us", "slow/1000", "fast/1000"]);
    for row in rows {
        for (n, series) in row.series.iter().enumerate() {
            let name = if n == 0 { row.workload.name.clone() } else { String::new() };
            let mode = series.mode.name().to_owned();
            if let Some(failed) = &series.failed {
                let first = failed.lines().next().unwrap_or_default();
                table.line([name, mode, format!("FAILED: {first}")]);
                continue;
            }
            let per_second = series.per_second();
            table.line([
                name,
                mode,
                show(per_second, 0),
                show(ratio(per_second, row.bare()), 3),
                show(series.p50_us(), 0),
                show(series.p99_us(), 0),
                show(series.slow_per_1000(), 2),
                show(series.fast_per_1000(), 0),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::drive::Seen;
    use super::*;

    fn series(mode: Mode, rates: &[f64]) -> Series {
        let seen = |per_second| Seen { per_second, p50_us: Some(1e6 / per_second), p99_us: None };
        let rounds = rates.iter().map(|r| Measured { seen: seen(*r), steady: None }).collect();
        Series { rounds, ..Series::new(mode) }
    }

    #[test]
    fn workloads_are_chosen_by_name_and_by_beginning() -> Result<(), Error> {
        let names = |only: &[&str]| -> Result<Vec<String>, Error> {
            let only: Vec<_> = only.iter().map(|o| (*o).to_owned()).collect();
            Ok(choose(&only)?.into_iter().map(|w| w.name).collect())
        };
        assert_eq!(names(&["sqlite", "memcached*"])?, ["memcached-t1", "memcached-t4", "sqlite"]);
        assert_eq!(names(&[])?.len(), all().len());
        assert!(names(&["sqlight"]).is_err());
        Ok(())
    }

    #[test]
    fn ratios_are_of_medians_and_a_failure_is_told() -> Result<(), Error> {
        let mut broken = series(Mode::Slow, &[10.0]);
        broken.failed = Some("round 2: a wrong reply".into());
        let row = Row {
            workload: choose(&["sqlite".into()])?.remove(0),
            series: vec![series(Mode::Bare, &[100.0, 300.0, 200.0]), broken, series(Mode::Shim, &[150.0, 130.0])],
        };
        let text = table(std::slice::from_ref(&row)).to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["sqlite", "bare", "200", "1.000", "5000", "-", "-", "-"]);
        assert_eq!(lines[2][..4], ["no-shim", "FAILED:", "round", "2:"]);
        assert_eq!(lines[3][..3], ["ftrun", "140", "0.700"]);
        let json = row.json();
        assert_eq!(json["modes"]["ftrun"]["ratio"], json!(0.7));
        assert_eq!(json["modes"]["no-shim"]["failed"], json!("round 2: a wrong reply"));
        Ok(())
    }
}
