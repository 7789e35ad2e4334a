//! `cargo xtask bench recovery`: how long a killed redis is away, and what its checkpoints cost.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::is_bare;
use ftrun_tests::clients::Redis;
use ftrun_tests::load::{Client, Progress, quantile};
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::redis_launch;
use ftrun_tests::{Error, error};
use serde_json::{Value, json};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// MiB of data in redis
    #[arg(long, value_delimiter = ',', default_value = "1,64,512")]
    sizes: Vec<u64>,
    /// Kills for each size
    #[arg(long, default_value_t = 100)]
    kills: u64,
    /// Also write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Repeat the run with this seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Sorted measurements of one kind.
#[derive(Debug, Default)]
struct Series(Vec<f64>);

impl Series {
    fn push(&mut self, value: Option<f64>) {
        if let Some(value) = value {
            let at = self.0.partition_point(|v| *v < value);
            self.0.insert(at, value);
        }
    }

    fn at(&self, share: f64) -> f64 {
        quantile(&self.0, share)
    }

    fn json(&self) -> Value {
        json!({ "median": self.at(0.5), "p99": self.at(0.99), "worst": self.at(1.0), "count": self.0.len() })
    }
}

/// What was measured with one amount of data.
#[derive(Debug, Default)]
struct Row {
    mib: u64,
    reply_ms: Series,
    total_ms: Series,
    restore_ms: Series,
    replay_ms: Series,
    replayed_events: Series,
    pause_ms: Series,
    checkpoint_kib: Series,
}

impl Row {
    fn json(&self) -> Value {
        json!({
            "mib": self.mib,
            "kill_to_reply_ms": self.reply_ms.json(),
            "recovery_total_ms": self.total_ms.json(),
            "restore_ms": self.restore_ms.json(),
            "replay_ms": self.replay_ms.json(),
            "replayed_events": self.replayed_events.json(),
            "checkpoint_pause_ms": self.pause_ms.json(),
            "checkpoint_kib": self.checkpoint_kib.json(),
        })
    }
}

/// Runs the benchmark; prints a table.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    if is_bare() {
        return Err(error!("FTRUN_TEST_BARE is set: there is nothing to measure"));
    }
    let mut rows = Vec::new();
    for mib in &options.sizes {
        rows.push(measure(*mib, options)?);
    }
    print(&rows);
    if let Some(path) = &options.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        let program = "redis-server --save ''";
        super::write_json(
            path,
            &json!({ "bench": "recovery", "program": program, "machine": super::machine(), "rows": rows }),
        )?;
    }
    Ok(())
}

/// One connection works for a random while; then the kill, and the next request on that connection.
fn measure(mib: u64, options: &Options) -> Result<Row, Error> {
    let mut row = Row { mib, ..Row::default() };
    let mut rng = Rng::part(options.seed, mib);
    let unit = redis_launch(&["--save", ""])?.start()?;
    let mut client = Redis::connect(unit.port, 0, Rng::part(options.seed, 1000 + mib))?;
    eprintln!("xtask: filling redis with {mib} MiB");
    client.fill(mib)?;
    let mut checkpoint = Value::Null;
    for n in 1..=options.kills {
        let until = Instant::now() + Duration::from_millis(rng.within(100..=1500));
        while Instant::now() < until {
            client.step(&Progress::default())?;
        }
        let status = unit.status()?;
        if status["last_checkpoint"]["sii"] != checkpoint["sii"] {
            checkpoint = status["last_checkpoint"].clone();
            row.pause_ms.push(checkpoint["pause_us"].as_f64().map(|us| us / 1000.0));
            row.checkpoint_kib.push(checkpoint["bytes"].as_f64().map(|b| b / 1024.0));
        }
        let recoveries = status["recoveries"].as_u64().unwrap_or(0);
        let killed = unit.kill9()?;
        client.ask(&["PING"])?;
        row.reply_ms.push(Some(killed.sent.elapsed().as_secs_f64() * 1000.0));
        let last = unit.await_recoveries(recoveries + 1)?["last_recovery"].clone();
        row.total_ms.push(last["total_ms"].as_f64());
        row.restore_ms.push(last["restore_ms"].as_f64());
        row.replay_ms.push(last["replay_ms"].as_f64());
        row.replayed_events.push(last["events"].as_f64());
        if n % 10 == 0 {
            eprintln!("xtask: {mib} MiB: {n} of {} kills", options.kills);
        }
    }
    client.verify()?;
    unit.stop()?;
    Ok(row)
}

fn print(rows: &[Row]) {
    let mut out = std::io::stdout().lock();
    let mut line = |text: String| {
        // Whoever has closed our output does not want to know.
        let _ = writeln!(out, "{text}");
    };
    line("recovery of redis, in ms: median / p99 / worst".into());
    line(format!("{:>6}  {:>24}  {:>24}  {:>24}", "MiB", "SIGKILL to next reply", "restore", "replay"));
    let three = |s: &Series| format!("{:.1} / {:.1} / {:.1}", s.at(0.5), s.at(0.99), s.at(1.0));
    for row in rows {
        let (reply, restore, replay) = (three(&row.reply_ms), three(&row.restore_ms), three(&row.replay_ms));
        line(format!("{:>6}  {reply:>24}  {restore:>24}  {replay:>24}", row.mib));
    }
    line("checkpoints: median / p99 / worst".into());
    line(format!("{:>6}  {:>24}  {:>24}  {:>24}", "MiB", "pause ms", "KiB written", "events replayed"));
    for row in rows {
        let (pause, kib) = (three(&row.pause_ms), three(&row.checkpoint_kib));
        line(format!("{:>6}  {pause:>24}  {kib:>24}  {:>24}", row.mib, three(&row.replayed_events)));
    }
}
