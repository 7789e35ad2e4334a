//! `cargo xtask bench calls`: what one system call costs, and what the shim adds to it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::Ready;
use ftrun_tests::{Error, error};
use serde_json::{Value, json};

use super::mode::{Mode, available, order};
use super::stats::{Table, median, show};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each way of running is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How many times each call is made; the slow path makes a tenth of it
    #[arg(long, default_value_t = 100_000)]
    calls: u64,
    /// Also write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// How long one run of the program may take.
const LIMIT: Duration = Duration::from_secs(120);

/// One run: nanoseconds for each call, in the order of the program's output, and how ftrun served the calls.
struct Round {
    ns: Vec<(String, f64)>,
    slow_and_fast: Option<(u64, u64)>,
}

/// Runs the benchmark; prints a table.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let modes = available(&[Mode::Bare, Mode::Slow, Mode::Shim])?;
    let mut rounds: BTreeMap<&str, Vec<Round>> = BTreeMap::new();
    for n in 0..options.rounds.max(1) {
        for mode in order(&modes, n) {
            eprintln!("xtask: round {} of {}: {}", n + 1, options.rounds, mode.name());
            let count = if mode == Mode::Slow { options.calls.div_ceil(10) } else { options.calls };
            rounds.entry(mode.name()).or_default().push(measure(mode, count)?);
        }
    }
    let names: Vec<String> = rounds
        .get(Mode::Bare.name())
        .and_then(|r| r.first())
        .map(|r| r.ns.iter().map(|(name, _)| name.clone()).collect())
        .unwrap_or_default();
    print(&names, &rounds);
    if let Some(path) = &options.json {
        let rows: Vec<Value> = names.iter().map(|name| row(name, &modes, &rounds)).collect();
        let served: BTreeMap<_, Vec<Value>> = modes
            .iter()
            .filter(|m| m.has_ftrun())
            .map(|m| (m.name(), rounds[m.name()].iter().map(|r| json!(r.slow_and_fast)).collect()))
            .collect();
        super::write_json(
            path,
            &json!({ "bench": "calls", "unit": "ns per call", "machine": super::machine(), "calls": options.calls,
                     "rows": rows, "slow_and_fast_calls": served }),
        )?;
    }
    Ok(())
}

fn measure(mode: Mode, count: u64) -> Result<Round, Error> {
    let mut launch = guest_launch("calls")?;
    launch.add_args([count.to_string()]).ready(Ready::AtOnce);
    mode.apply(&mut launch)?;
    let unit = launch.start()?;
    let start = Instant::now();
    while !unit.has_ended()? {
        if start.elapsed() > LIMIT {
            let said = unit.stdout()?;
            return Err(error!("{}: not done after {} s; it said: {said}", mode.name(), LIMIT.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let slow_and_fast = if mode.has_ftrun() { Some(unit.calls()?) } else { None };
    let (text, complaint) = (unit.stdout()?, unit.stderr()?);
    let ns = parse(&text).ok_or_else(|| error!("{}: said `{text}`, complained `{complaint}`", mode.name()))?;
    let status = unit.wait()?;
    if !status.success() {
        unit.failed();
        return Err(error!("{}: {status}: {complaint}", mode.name()));
    }
    Ok(Round { ns, slow_and_fast })
}

/// The lines `NAME NANOSECONDS` between `ready` and `done`; none if there is anything else.
fn parse(text: &str) -> Option<Vec<(String, f64)>> {
    let inner = text.strip_prefix("ready 0\n")?.strip_suffix("done\n")?;
    inner.lines().map(|line| line.split_once(' ').and_then(|(n, v)| Some((n.to_owned(), v.parse().ok()?)))).collect()
}

fn values(name: &str, rounds: &[Round]) -> Vec<f64> {
    rounds.iter().filter_map(|r| r.ns.iter().find(|(n, _)| n == name).map(|(_, ns)| *ns)).collect()
}

fn of(name: &str, mode: Mode, rounds: &BTreeMap<&str, Vec<Round>>) -> Option<f64> {
    median(values(name, rounds.get(mode.name())?))
}

fn added(name: &str, mode: Mode, rounds: &BTreeMap<&str, Vec<Round>>) -> Option<f64> {
    Some(of(name, mode, rounds)? - of(name, Mode::Bare, rounds)?)
}

fn row(name: &str, modes: &[Mode], rounds: &BTreeMap<&str, Vec<Round>>) -> Value {
    let mut by_mode = serde_json::Map::new();
    for mode in modes {
        let entry = json!({
            "median": of(name, *mode, rounds),
            "added": added(name, *mode, rounds),
            "rounds": rounds.get(mode.name()).map(|r| values(name, r)),
        });
        by_mode.insert(mode.name().into(), entry);
    }
    json!({ "call": name, "modes": by_mode })
}

fn print(names: &[String], rounds: &BTreeMap<&str, Vec<Round>>) {
    let mut table = Table::new(1, ["call", "bare", "no-shim", "ftrun", "no-shim adds", "shim adds"]);
    for name in names {
        let cell = |mode| show(of(name, mode, rounds), 0);
        let more = |mode| show(added(name, mode, rounds), 0);
        let (slow, shim) = (Mode::Slow, Mode::Shim);
        table.line([name.clone(), cell(Mode::Bare), cell(slow), cell(shim), more(slow), more(shim)]);
    }
    println!("cost of a call in ns, medians (read and write: a Unix stream socket, so many bytes)\n{table}");
    for mode in [Mode::Slow, Mode::Shim] {
        let Some((slow, fast)) = rounds.get(mode.name()).and_then(|r| r.last()?.slow_and_fast) else { continue };
        println!("{}: {slow} slow calls and {fast} fast ones in the last round", mode.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_the_program_is_read_or_refused() {
        let good = "ready 0\ngetppid 204.1\nread-1 690.3\ndone\n";
        assert_eq!(parse(good), Some(vec![("getppid".into(), 204.1), ("read-1".into(), 690.3)]));
        assert_eq!(parse("ready 0\ngetppid 204.1\n"), None, "it has not finished");
        assert_eq!(parse("ready 0\ngetppid\ndone\n"), None);
    }

    #[test]
    fn what_is_added_is_the_difference_of_the_medians() {
        let round = |ns| Round { ns: vec![("x".into(), ns)], slow_and_fast: None };
        let rounds =
            BTreeMap::from([("bare", vec![round(10.0), round(30.0), round(11.0)]), ("ftrun", vec![round(25.0)])]);
        assert_eq!(added("x", Mode::Shim, &rounds), Some(14.0));
        assert_eq!(added("x", Mode::Slow, &rounds), None);
        assert_eq!(added("y", Mode::Shim, &rounds), None);
    }
}
