//! `cargo xtask bench replay`: how long the replay of a saturated redis takes, beside how long it ran.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::is_bare;
use ftrun_tests::clients::Redis;
use ftrun_tests::load::{Client, Progress};
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::redis_launch;
use ftrun_tests::{Error, error};
use serde_json::json;

use super::drive::RedisLoad;

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds of load, which stay in the log: no checkpoint is taken meanwhile. Takes about 100 MiB of memory each
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Also write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What the load is: as `redis-P1-set-100` of `bench throughput`.
const LOAD: RedisLoad = RedisLoad { set: true, size: 100, pipeline: 1 };

/// Runs the benchmark; prints what it saw.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    if is_bare() {
        return Err(error!("FTRUN_TEST_BARE is set: there is nothing to measure"));
    }
    let mut launch = redis_launch(&["--save", ""])?;
    launch.options(["--checkpoint-every", "1h", "--recover-within", "1h", "--checkpoint-log", "20GiB"]);
    let unit = launch.start()?;
    let mut client = Redis::connect(unit.port, 0, Rng::part(1, 0))?;
    for _ in 0..1000 {
        client.step(&Progress::default())?;
    }
    let (time, begin) = (Duration::from_secs(options.seconds), Instant::now());
    let (mut requests, mut rate) = (0, 20_000.0);
    while begin.elapsed() < time {
        // The rate is not known before the first second is over.
        let next = (time - begin.elapsed()).min(if requests == 0 { Duration::from_secs(1) } else { time });
        let count = (rate * next.as_secs_f64()).max(1.0) as u64;
        rate = LOAD.run(unit.port, count, time)?.per_second;
        requests += count;
    }
    let loaded = begin.elapsed().as_secs_f64();
    unit.kill9()?;
    let last = unit.await_recoveries(1)?["last_recovery"].clone();
    client.verify()?;
    unit.stop()?;
    let number = |key: &str| last[key].as_f64().ok_or_else(|| error!("last_recovery: {last}"));
    let (events, replay) = (number("events")?, number("replay_ms")? / 1000.0);
    println!("redis, 50 connections, SET of 100 bytes: {requests} requests in {loaded:.1} s");
    println!(
        "replay of {events} events: {replay:.2} s, {:.2} M/s; {:.3} of the time that they took",
        events / replay / 1e6,
        replay / loaded
    );
    if let Some(path) = &options.json {
        let seen = json!({ "requests": requests, "seconds": loaded, "last_recovery": last, "ratio": replay / loaded });
        super::write_json(path, &json!({ "bench": "replay", "machine": super::machine(), "redis": seen }))?;
    }
    Ok(())
}
