//! What `cargo xtask bench throughput` measures: how each program is started, checked and loaded.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::{need, own_release};
use ftrun_tests::clients::{Http, Redis, pattern};
use ftrun_tests::load::{Client, Progress};
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::{guest_launch, memcached_launch, nginx_launch, python_launch, redis_launch};
use ftrun_tests::unit::{LIMIT, Launch, Ready, Unit};
use ftrun_tests::wire::excerpt;
use ftrun_tests::{Error, error};

use super::drive::{CONNECTIONS, REDIS_KEY, RedisLoad, Sample, Seen, Steady, own_load, sampled, wrk};
use super::mode::Mode;

/// How long a server is loaded before it is measured.
const WARM_UP: Duration = Duration::from_millis(300);
/// Size of the messages to memcached and the echo servers.
const SMALL: usize = 100;
/// Transactions of `sqlite`, and those before them that are not measured.
const INSERTS: u64 = 10_000;
const INSERTS_BEFORE: u64 = 500;
/// Steps of `checksum` for each second asked for: about what a processor of today does.
const STEPS_PER_SECOND: u64 = 250_000_000;

/// What kind of program it is.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Redis(RedisLoad),
    Memcached { threads: &'static str },
    Nginx { size: usize, close: bool },
    Asyncio,
    Tokio,
    Compute,
    Sqlite,
}

/// One program under one load.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) name: String,
    kind: Kind,
}

/// What one run of a workload showed.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) seen: Seen,
    pub(crate) steady: Option<Steady>,
}

/// All of them, in the order of the table.
pub(crate) fn all() -> Vec<Workload> {
    let mut all = Vec::new();
    let mut add = |name: &str, kind| all.push(Workload { name: name.into(), kind });
    for pipeline in [1, 16] {
        for (command, set) in [("get", false), ("set", true)] {
            for (bytes, size) in [("100", 100), ("4k", 4096)] {
                add(&format!("redis-P{pipeline}-{command}-{bytes}"), Kind::Redis(RedisLoad { set, size, pipeline }));
            }
        }
    }
    add("memcached-t1", Kind::Memcached { threads: "1" });
    add("memcached-t4", Kind::Memcached { threads: "4" });
    add("nginx-small", Kind::Nginx { size: 600, close: false });
    add("nginx-100k", Kind::Nginx { size: 100 << 10, close: false });
    add("nginx-small-close", Kind::Nginx { size: 600, close: true });
    add("nginx-100k-close", Kind::Nginx { size: 100 << 10, close: true });
    add("python-asyncio", Kind::Asyncio);
    add("tokio-echo", Kind::Tokio);
    add("compute", Kind::Compute);
    add("sqlite", Kind::Sqlite);
    all
}

impl Workload {
    /// The installed programs that it needs.
    pub(crate) fn programs(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Redis(_) => &["redis-server", "redis-benchmark"],
            Kind::Memcached { .. } => &["memcached"],
            Kind::Nginx { .. } => &["nginx", "wrk"],
            Kind::Asyncio => &["python3"],
            Kind::Tokio => &[],
            Kind::Compute => &["cc"],
            Kind::Sqlite => &["sqlite3"],
        }
    }

    /// What is counted.
    pub(crate) fn unit(&self) -> &'static str {
        match self.kind {
            Kind::Compute => "steps",
            Kind::Sqlite => "transactions",
            _ => "requests",
        }
    }

    /// Starts a fresh program in this mode, checks it, measures it, checks it again, ends it.
    pub(crate) fn measure(&self, mode: Mode, seconds: u64) -> Result<Measured, Error> {
        match self.kind {
            Kind::Redis(load) => redis(load, mode, seconds),
            Kind::Memcached { threads } => echoes(memcached_launch(threads)?, "memcached", mode, seconds),
            Kind::Nginx { size, close } => nginx(size, close, mode, seconds),
            Kind::Asyncio => {
                let mut launch = python_launch("asyncio_echo.py")?;
                launch.ready(Ready::Line);
                echoes(launch, "echo", mode, seconds)
            }
            Kind::Tokio => {
                let mut launch = Launch::new("tokio-echo")?;
                launch.run(own_release("tokio_echo")?, [] as [&str; 0]).ready(Ready::Line);
                echoes(launch, "echo", mode, seconds)
            }
            Kind::Compute => compute(mode, seconds),
            Kind::Sqlite => sqlite(mode),
        }
    }
}

fn start(mut launch: Launch, mode: Mode) -> Result<Unit, Error> {
    mode.apply(&mut launch)?;
    launch.start()
}

fn redis(load: RedisLoad, mode: Mode, seconds: u64) -> Result<Measured, Error> {
    let unit = start(redis_launch(&["--save", ""])?, mode)?;
    let value: String = pattern(1, load.size).into_iter().map(|b| char::from(b'a' + b % 26)).collect();
    let mut client = Redis::connect(unit.port, 0, Rng::new(1))?;
    client.ask(&["SET", REDIS_KEY, &value])?;
    let expect = |client: &mut Redis, want: &str| -> Result<(), Error> {
        let got = client.ask(&["GET", REDIS_KEY])?;
        if got == want {
            return Ok(());
        }
        Err(error!("GET: expected {}, got {}", excerpt(want.as_bytes()), excerpt(got.as_bytes())))
    };
    expect(&mut client, &value)?;
    // Two short runs tell how many requests the long one has to make.
    let mut rate = load.run(unit.port, 2000, WARM_UP)?.per_second;
    rate = load.run(unit.port, requests(rate, WARM_UP), WARM_UP)?.per_second;
    let time = Duration::from_secs(seconds);
    let mut measured = None;
    // Connecting is slow in some modes, so that short runs promise too little: then once more, with what is known now.
    for _ in 0..2 {
        let count = requests(rate, time);
        let (seen, steady) = sampled(&unit, time, || load.run(unit.port, count, time))?;
        rate = seen.per_second;
        measured = Some(Measured { seen, steady });
        if count as f64 / rate > time.as_secs_f64() * 0.8 {
            break;
        }
    }
    if load.set {
        // redis-benchmark has overwritten it with a value of its own.
        let got = client.ask(&["GET", REDIS_KEY])?;
        if got.len() != load.size || got == value {
            return Err(error!("after SETs of {} bytes, GET: {}", load.size, excerpt(got.as_bytes())));
        }
    } else {
        expect(&mut client, &value)?;
    }
    for _ in 0..20 {
        client.step(&Progress::default())?;
    }
    unit.stop()?;
    measured.ok_or_else(|| error!("redis was not measured"))
}

fn requests(rate: f64, time: Duration) -> u64 {
    (rate * time.as_secs_f64()).clamp(f64::from(CONNECTIONS), 1e9) as u64
}

/// A server for which we have a generator of our own; that one checks every reply.
fn echoes(launch: Launch, protocol: &str, mode: Mode, seconds: u64) -> Result<Measured, Error> {
    let unit = start(launch, mode)?;
    own_load(protocol, unit.port, SMALL, WARM_UP)?;
    let time = Duration::from_secs(seconds);
    let (seen, steady) = sampled(&unit, time, || own_load(protocol, unit.port, SMALL, time))?;
    unit.stop()?;
    Ok(Measured { seen, steady })
}

fn nginx(size: usize, close: bool, mode: Mode, seconds: u64) -> Result<Measured, Error> {
    let launch = nginx_launch("access_log off; sendfile on; tcp_nopush on;", "")?;
    let content = pattern(2, size);
    std::fs::write(launch.work().join("file"), &content)?;
    let unit = start(launch, mode)?;
    let files = std::sync::Arc::new(vec![("/file".to_owned(), content)]);
    let check = || -> Result<(), Error> {
        let client = Http::connect(unit.port, 0, Rng::new(1), &files)?;
        let mut client = if close { client.reconnecting() } else { client };
        for _ in 0..5 {
            client.step(&Progress::default())?;
        }
        Ok(())
    };
    check()?;
    wrk(&unit, "/file", close, 1)?;
    let (seen, steady) = sampled(&unit, Duration::from_secs(seconds), || wrk(&unit, "/file", close, seconds))?;
    check()?;
    unit.stop()?;
    Ok(Measured { seen, steady })
}

/// Looks at `found` until it finds something; the program must not end before that.
fn watch<T>(unit: &Unit, limit: Duration, mut found: impl FnMut() -> Result<Option<T>, Error>) -> Result<T, Error> {
    let start = Instant::now();
    loop {
        let ended = unit.has_ended()?;
        if let Some(found) = found()? {
            return Ok(found);
        }
        if ended {
            return Err(error!("{} has ended too soon: {}", unit.name, unit.stderr()?));
        }
        if start.elapsed() > limit {
            return Err(error!("{}: nothing for {} s", unit.name, limit.as_secs()));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// The step of the sequence that `checksum.c` computes.
fn mix(x: u64) -> u64 {
    Rng::new(x).next()
}

/// The checksum that `checksum.c` has to print.
fn compute_checksum(steps: u64) -> u64 {
    const SLOTS: u64 = 32768;
    let mut table = vec![0u64; SLOTS as usize];
    let mut value = 1;
    for _ in 0..steps {
        value = mix(value);
        let slot = &mut table[(value % SLOTS) as usize];
        *slot = slot.wrapping_add(value);
    }
    table.iter().fold(value, |value, slot| mix(value ^ slot))
}

/// Timed from outside, from the line `ready` to the line with the checksum.
fn compute(mode: Mode, seconds: u64) -> Result<Measured, Error> {
    let steps = STEPS_PER_SECOND * seconds;
    let mut launch = guest_launch("checksum")?;
    launch.add_args([steps.to_string()]).ready(Ready::AtOnce);
    let unit = start(launch, mode)?;
    let has =
        |lines: usize| Ok(unit.stdout()?).map(|text: String| (text.matches('\n').count() >= lines).then_some(text));
    watch(&unit, LIMIT, || has(1))?;
    let begun = Instant::now();
    let begin = mode.has_ftrun().then(|| Sample::take(&unit)).transpose()?;
    let text = watch(&unit, LIMIT + Duration::from_secs(20 * seconds), || has(2))?;
    let took = begun.elapsed().as_secs_f64();
    let end = mode.has_ftrun().then(|| Sample::take(&unit)).transpose()?;
    let want = format!("ready 0\n{steps} {}\n", checksum(steps));
    if text != want {
        return Err(error!("checksum printed {text:?} instead of {want:?}"));
    }
    unit.wait()?;
    // A thousand steps are nothing: no calls are told for each thousand of them, only the counts.
    let steady = begin.zip(end).map(|(begin, end)| Steady::counted(begin, end, 0.0));
    Ok(Measured { seen: Seen { per_second: steps as f64 / took, p50_us: None, p99_us: None }, steady })
}

/// The same number of steps is asked for in each round.
fn checksum(steps: u64) -> u64 {
    static KNOWN: std::sync::Mutex<Option<(u64, u64)>> = std::sync::Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match *known {
        Some((of, sum)) if of == steps => sum,
        _ => known.insert((steps, compute_checksum(steps))).1,
    }
}

/// `sqlite3` reads statements from a FIFO: some inserts, then a mark, then those that are measured, then a mark.
fn sqlite(mode: Mode) -> Result<Measured, Error> {
    let mut launch = Launch::new("sqlite")?;
    let work = launch.work();
    let fifo = work.join("statements");
    if !Command::new("mkfifo").arg(&fifo).status()?.success() {
        return Err(error!("mkfifo {} failed", fifo.display()));
    }
    // Open for both: neither end waits for the other.
    let mut statements = OpenOptions::new().read(true).write(true).open(&fifo)?;
    launch.run(need("sqlite3")?, ["-batch", "bench.db", ".read statements"]);
    let unit = start(launch, mode)?;
    statements.write_all(b"PRAGMA journal_mode=WAL;\nPRAGMA synchronous=OFF;\nCREATE TABLE t(a INTEGER, b TEXT);\n")?;
    insert(&mut statements, 0..INSERTS_BEFORE)?;
    mark(&unit, &mut statements, &work.join("begun"), INSERTS_BEFORE)?;
    let begin = mode.has_ftrun().then(|| Sample::take(&unit)).transpose()?;
    let begun = Instant::now();
    insert(&mut statements, INSERTS_BEFORE..INSERTS_BEFORE + INSERTS)?;
    mark(&unit, &mut statements, &work.join("done"), INSERTS_BEFORE + INSERTS)?;
    let took = begun.elapsed().as_secs_f64();
    let end = mode.has_ftrun().then(|| Sample::take(&unit)).transpose()?;
    statements.write_all(b".quit\n")?;
    let status = unit.wait()?;
    if !status.success() {
        unit.failed();
        return Err(error!("sqlite3: {status}: {}", unit.stderr()?));
    }
    let per_second = INSERTS as f64 / took;
    let steady = begin.zip(end).map(|(begin, end)| Steady::counted(begin, end, INSERTS as f64));
    Ok(Measured { seen: Seen { per_second, p50_us: None, p99_us: None }, steady })
}

/// Writes so many inserts, each a transaction of its own.
fn insert(statements: &mut File, rows: std::ops::Range<u64>) -> Result<(), Error> {
    let text: String = rows.map(|n| format!("INSERT INTO t VALUES({n}, 'the text of row {n}');\n")).collect();
    Ok(statements.write_all(text.as_bytes())?)
}

/// Has sqlite3 write into a file what the table holds, waits for that, and checks it.
fn mark(unit: &Unit, statements: &mut File, file: &Path, rows: u64) -> Result<(), Error> {
    let name = file.file_name().unwrap_or_default().display();
    statements.write_all(format!(".once {name}\nSELECT count(*), sum(a), max(b) IS NULL FROM t;\n").as_bytes())?;
    let text = watch(unit, 4 * LIMIT, || Ok(std::fs::read_to_string(file).ok().filter(|text| text.ends_with('\n'))))?;
    let want = format!("{rows}|{}|0\n", rows * (rows - 1) / 2);
    if text == want { Ok(()) } else { Err(error!("sqlite3 answered {text:?} instead of {want:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_has_a_name_of_its_own() {
        let mut names: Vec<_> = all().into_iter().map(|w| w.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn requests_are_asked_for_within_reason() {
        assert_eq!(requests(1000.0, Duration::from_secs(2)), 2000);
        assert_eq!(requests(0.0, Duration::from_secs(2)), 50);
    }
}
