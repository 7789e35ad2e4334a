//! Load generators, run as programs of their own: what they are told, and what they say.

use std::collections::HashMap;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::{need, own_release};
use ftrun_tests::process::Process;
use ftrun_tests::unit::Unit;
use ftrun_tests::{Error, error};
use serde_json::{Value, json};

/// The same number on every architecture.
const SIGKILL: i32 = 9;
/// Connections of every generator: as many as redis-benchmark makes by default.
pub(crate) const CONNECTIONS: u32 = 50;
/// The key that redis-benchmark sets and gets unless it is told to vary it.
pub(crate) const REDIS_KEY: &str = "key:__rand_int__";

/// What a generator saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Seen {
    pub(crate) per_second: f64,
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
}

/// System calls as ftrun counts them, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    at: Instant,
    slow: u64,
    fast: u64,
}

impl Sample {
    pub(crate) fn take(unit: &Unit) -> Result<Self, Error> {
        let (slow, fast) = unit.calls()?;
        Ok(Self { at: Instant::now(), slow, fast })
    }
}

/// Two samples of a steady state, and how many requests were served between them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steady {
    begin: Sample,
    end: Sample,
    requests: f64,
}

impl Steady {
    /// Between two samples requests were served at this rate.
    pub(crate) fn at_rate(begin: Sample, end: Sample, per_second: f64) -> Self {
        Self { begin, end, requests: per_second * end.at.duration_since(begin.at).as_secs_f64() }
    }

    /// Between two samples so many requests were served.
    pub(crate) fn counted(begin: Sample, end: Sample, requests: f64) -> Self {
        Self { begin, end, requests }
    }

    pub(crate) fn slow_per_1000(&self) -> Option<f64> {
        self.per_1000(self.begin.slow, self.end.slow)
    }

    pub(crate) fn fast_per_1000(&self) -> Option<f64> {
        self.per_1000(self.begin.fast, self.end.fast)
    }

    fn per_1000(&self, begin: u64, end: u64) -> Option<f64> {
        (self.requests > 0.0).then(|| end.saturating_sub(begin) as f64 * 1000.0 / self.requests)
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "slow_begin": self.begin.slow, "slow_end": self.end.slow,
            "fast_begin": self.begin.fast, "fast_end": self.end.fast,
            "requests": self.requests.round(), "slow_per_1000": self.slow_per_1000(),
            "fast_per_1000": self.fast_per_1000(),
        })
    }
}

/// Runs a generator for about `time`; under ftrun, counts the calls in the middle of that time.
///
/// The beginning and the end are left out: there the generator connects and hangs up. A generator that ended
/// sooner than expected leaves no steady state.
pub(crate) fn sampled(
    unit: &Unit,
    time: Duration,
    generator: impl FnOnce() -> Result<Seen, Error>,
) -> Result<(Seen, Option<Steady>), Error> {
    if unit.is_bare() {
        return Ok((generator()?, None));
    }
    let (done, ended) = mpsc::channel::<()>();
    let between = move || -> Result<Option<(Sample, Sample)>, Error> {
        let still_running = |time| ended.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout);
        if !still_running(time.mul_f64(0.25)) {
            return Ok(None);
        }
        let begin = Sample::take(unit)?;
        if !still_running(time.mul_f64(0.45)) {
            return Ok(None);
        }
        let end = Sample::take(unit)?;
        // It may have ended while the status was asked for.
        Ok(still_running(Duration::ZERO).then_some((begin, end)))
    };
    std::thread::scope(|scope| {
        let sampler = scope.spawn(between);
        let seen = generator();
        drop(done);
        let samples = sampler.join().map_err(|_| error!("the sampler panicked"))?;
        let (seen, samples) = (seen?, samples?);
        Ok((seen, samples.map(|(begin, end)| Steady::at_rate(begin, end, seen.per_second))))
    })
}

/// Runs a generator; returns what it printed. One that is not done within `limit` is ended.
fn output(command: &mut Command, limit: Duration) -> Result<String, Error> {
    let name = command.get_program().display().to_string();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| error!("{name}: {e}"))?;
    let pid = i32::try_from(child.id()).map_err(|_| error!("a pid beyond int"))?;
    let (process, out, err) = (Process::open(pid)?, child.stdout.take(), child.stderr.take());
    let read = |from: Option<&mut dyn Read>| {
        let mut bytes = Vec::new();
        from.map_or(Ok(0), |from| from.read_to_end(&mut bytes)).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    };
    let (mut out, mut err) = (out, err);
    let (in_time, out, err) = std::thread::scope(|scope| {
        let out = scope.spawn(|| read(out.as_mut().map(|r| r as &mut dyn Read)));
        let err = scope.spawn(|| read(err.as_mut().map(|r| r as &mut dyn Read)));
        let in_time = process.ended_within(limit);
        if !in_time {
            let _already_gone = process.signal(SIGKILL);
        }
        (in_time, out.join(), err.join())
    });
    let status = child.wait()?;
    let text = |read: std::thread::Result<std::io::Result<String>>| read.ok().and_then(Result::ok).unwrap_or_default();
    let (out, err) = (text(out), text(err));
    if !in_time {
        return Err(error!("{name}: not done within {} s; it said: {out}{err}", limit.as_secs()));
    }
    if !status.success() {
        return Err(error!("{name}: {status}: {}{}", out.trim(), err.trim()));
    }
    Ok(out)
}

fn limit(time: Duration) -> Duration {
    Duration::from_secs(40) + time * 4
}

/// What redis-benchmark does: `requests` times GET or SET with `size` bytes, in groups of `pipeline`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RedisLoad {
    pub(crate) set: bool,
    pub(crate) size: usize,
    pub(crate) pipeline: u32,
}

impl RedisLoad {
    pub(crate) fn run(&self, port: u16, requests: u64, time: Duration) -> Result<Seen, Error> {
        let mut command = Command::new(need("redis-benchmark")?);
        command.args(["--csv", "-e", "-t", if self.set { "set" } else { "get" }]);
        let numbers = [("-p", u64::from(port)), ("-c", u64::from(CONNECTIONS)), ("-P", u64::from(self.pipeline))];
        for (flag, number) in numbers.into_iter().chain([("-d", self.size as u64), ("-n", requests)]) {
            command.args([flag, &number.to_string()]);
        }
        let text = output(&mut command, limit(time))?;
        redis_benchmark(&text).ok_or_else(|| error!("redis-benchmark said: {text}"))
    }
}

/// The figures of `redis-benchmark --csv` for one kind of request; its latencies are in milliseconds.
fn redis_benchmark(text: &str) -> Option<Seen> {
    let fields = |line: &str| line.split(',').map(|f| f.trim_matches('"').to_owned()).collect::<Vec<_>>();
    let at = text.lines().position(|l| l.starts_with("\"test\""))?;
    let mut lines = text.lines().skip(at).map(fields);
    let (heading, values) = (lines.next()?, lines.next()?);
    let number = |name: &str| values.get(heading.iter().position(|h| h == name)?)?.parse::<f64>().ok();
    let us = |name: &str| number(name).map(|ms| ms * 1000.0);
    Some(Seen { per_second: number("rps")?, p50_us: us("p50_latency_ms"), p99_us: us("p99_latency_ms") })
}

/// Loads a server with our own generator, which checks every reply.
pub(crate) fn own_load(protocol: &str, port: u16, size: usize, time: Duration) -> Result<Seen, Error> {
    let mut command = Command::new(own_release("load")?);
    let seconds = time.as_secs_f64().to_string();
    command.args([protocol, &port.to_string(), &CONNECTIONS.to_string(), &seconds, &size.to_string()]);
    let text = output(&mut command, limit(time))?;
    let said: Value = serde_json::from_str(&text).map_err(|e| error!("load said: {text}: {e}"))?;
    let number = |key: &str| said[key].as_f64().ok_or_else(|| error!("load said: {text}"));
    Ok(Seen {
        per_second: number("requests")? / number("seconds")?,
        p50_us: Some(number("p50_us")?),
        p99_us: Some(number("p99_us")?),
    })
}

/// What wrk is to print at its end. Its own report rounds the latencies.
const WRK_REPORT: &str = "done = function(summary, latency, requests)
    local e = summary.errors
    local errors = e.connect + e.read + e.write + e.status + e.timeout
    io.write(string.format('requests=%d\\nduration_us=%d\\nerrors=%d\\np50_us=%f\\np99_us=%f\\n',
        summary.requests, summary.duration, errors, latency:percentile(50), latency:percentile(99)))
end
";

/// Loads a web server with wrk; it measures for whole seconds.
pub(crate) fn wrk(unit: &Unit, path: &str, close: bool, seconds: u64) -> Result<Seen, Error> {
    let script = unit.path().join("report.lua");
    std::fs::write(&script, WRK_REPORT)?;
    let mut command = Command::new(need("wrk")?);
    command.args(["-t", "1", "-c", &CONNECTIONS.to_string(), "-d", &format!("{seconds}s"), "--timeout", "30s", "-s"]);
    command.arg(script);
    if close {
        command.args(["-H", "Connection: close"]);
    }
    command.arg(format!("http://127.0.0.1:{}{path}", unit.port));
    let text = output(&mut command, limit(Duration::from_secs(seconds)))?;
    wrk_report(&text)
}

fn wrk_report(text: &str) -> Result<Seen, Error> {
    let said: HashMap<&str, f64> =
        text.lines().filter_map(|l| l.split_once('=')).filter_map(|(k, v)| Some((k, v.parse().ok()?))).collect();
    let number = |key: &str| said.get(key).copied().ok_or_else(|| error!("wrk: no {key} in: {text}"));
    if number("errors")? > 0.0 {
        return Err(error!("wrk saw errors: {text}"));
    }
    let per_second = number("requests")? * 1e6 / number("duration_us")?;
    Ok(Seen { per_second, p50_us: Some(number("p50_us")?), p99_us: Some(number("p99_us")?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_benchmark_tells_milliseconds() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                    \"p99_latency_ms\",\"max_latency_ms\"\n\
                    \"GET\",\"33955.86\",\"1.057\",\"0.088\",\"0.839\",\"2.271\",\"5.119\",\"21.919\"\n";
        let want = Seen { per_second: 33955.86, p50_us: Some(839.0), p99_us: Some(5119.0) };
        assert_eq!(redis_benchmark(text), Some(want));
        assert_eq!(redis_benchmark("WARNING: nothing\n"), None);
    }

    #[test]
    fn an_error_of_wrk_is_ours() {
        let text =
            |errors| format!("Running\nrequests=500\nduration_us=2000000\nerrors={errors}\np50_us=80.5\np99_us=99\n");
        let want = Seen { per_second: 250.0, p50_us: Some(80.5), p99_us: Some(99.0) };
        assert_eq!(wrk_report(&text(0)).ok(), Some(want));
        assert!(wrk_report(&text(1)).is_err());
        assert!(wrk_report("Running\n").is_err());
    }

    #[test]
    fn slow_calls_are_counted_for_each_thousand_requests() {
        let at = Instant::now();
        let sample = |slow, ms| Sample { at: at + Duration::from_millis(ms), slow, fast: 7 };
        let steady = Steady::at_rate(sample(100, 0), sample(150, 500), 10_000.0);
        assert_eq!((steady.slow_per_1000(), steady.fast_per_1000()), (Some(10.0), Some(0.0)));
        assert_eq!(Steady::counted(sample(1, 0), sample(2, 1), 0.0).slow_per_1000(), None);
    }
}
