//! `cargo xtask bench store`: acknowledged appends to stable storage, beside a bare file on the same disk, a NATS cluster and
//! PostgreSQL.

mod beside;
#[cfg(feature = "engines")]
mod engines;
mod raw;
mod served;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftrun_store::{Batch, Durability, Engine, EngineOptions, OpenOptions, StableStore, UnitName, UnitStore};
use ftrun_tests::{Error, error};
use serde_json::json;

use super::stats::{Table, median, ratio, show};
use raw::RawFile;
use served::Served;

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each case is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long one measurement takes, milliseconds
    #[arg(long, default_value_t = 1000)]
    ms: u64,
    /// A directory on the disk to measure
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Only these backends
    #[arg(long, value_name = "NAME")]
    only: Vec<Backend>,
    /// Only this level
    #[arg(long)]
    level: Option<Level>,
    /// Only this many units
    #[arg(long)]
    units: Vec<usize>,
    /// Only records of so many bytes
    #[arg(long)]
    bytes: Vec<usize>,
    /// Only writers that wait for each record, or only those that go on
    #[arg(long)]
    way: Option<Way>,
    /// Measure instead what storing a checkpoint of so many MiB costs the appends of the same unit
    #[arg(long, value_name = "MIB")]
    checkpoint: Option<u64>,
    /// Also write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Backend {
    Raw,
    File,
    Unix,
    Tcp,
    /// One NATS server that syncs each message; what it does without group commit
    Nats,
    /// A cluster of three of them
    Nats3,
    /// PostgreSQL, one INSERT for each record
    Postgres,
}

impl Backend {
    /// Whether it is one of other people, which is measured at level disk alone.
    fn is_foreign(self) -> bool {
        matches!(self, Self::Nats | Self::Nats3 | Self::Postgres)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Level {
    Memory,
    Cache,
    Disk,
}

impl Level {
    fn durability(self) -> Durability {
        match self {
            Self::Memory => Durability::Memory,
            Self::Cache => Durability::Cache,
            Self::Disk => Durability::Disk,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Way {
    /// One record at a time
    Single,
    /// 64 records ahead
    Ahead,
}

/// Records that a pipelined writer has under way.
const WINDOW: u64 = 64;
/// Bytes of records that all units together keep, as if checkpoints let the others go.
const KEPT_BYTES: u64 = 64 << 20;
/// How long a record may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Somebody who appends records and waits for them.
trait Writer: Send {
    fn append(&mut self, n: u64, record: &[u8]) -> Result<(), Error>;
    fn wait(&mut self, n: u64) -> Result<(), Error>;

    /// Both.
    fn commit(&mut self, n: u64, record: &[u8]) -> Result<(), Error> {
        self.append(n, record)?;
        self.wait(n)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    level: Level,
    bytes: usize,
    units: usize,
    pipelined: bool,
}

#[derive(Clone, Copy, Debug)]
struct Figure {
    rate: f64,
    p50: f64,
    p99: f64,
}

/// Runs the benchmark; prints a table.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    if cfg!(debug_assertions) {
        // What is measured is linked into this program.
        let mut command = ftrun_tests::binaries::cargo();
        command
            .args(["run", "--quiet", "--release", "--package", "xtask", "--features", "engines", "--"])
            .args(std::env::args_os().skip(1));
        let status = command.status()?;
        return if status.success() { Ok(()) } else { Err(error!("the release build of xtask failed: {status}")) };
    }
    let given = options.dir.clone().unwrap_or_else(ftrun_tests_dir);
    std::fs::create_dir_all(&given)?;
    let all = <Backend as clap::ValueEnum>::value_variants();
    let backends: Vec<Backend> =
        all.iter().copied().filter(|b| options.only.is_empty() || options.only.contains(b)).collect();
    if let Some(mib) = options.checkpoint {
        return beside(options, mib, &backends, &given);
    }
    let mut figures: BTreeMap<(Case, Backend), Vec<Figure>> = BTreeMap::new();
    for round in 0..options.rounds.max(1) {
        for level in [Level::Disk, Level::Cache, Level::Memory] {
            if options.level.is_some_and(|only| only != level) {
                continue;
            }
            for n in 0..backends.len() {
                let backend = backends[(n + round) % backends.len()];
                if backend == Backend::Raw && level == Level::Memory || backend.is_foreign() && level != Level::Disk {
                    continue;
                }
                let result = in_directory(&given, |dir| measure_all(backend, level, dir, options, &mut figures));
                eprintln!("xtask: round {} of {}: {level:?}, {backend:?}", round + 1, options.rounds);
                result?;
            }
        }
    }
    report(options, &backends, &figures)
}

/// Has a directory for as long as `work` takes.
fn in_directory(parent: &Path, work: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let dir = parent.join(format!("bench-store-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = work(&dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

/// Appends beside a checkpoint: a line for each backend and round.
fn beside(options: &Options, mib: u64, backends: &[Backend], parent: &Path) -> Result<(), Error> {
    let mut table = beside::table();
    for _ in 0..options.rounds {
        for backend in backends {
            in_directory(parent, |dir| match Target::open(*backend, Level::Disk, dir)?.store() {
                Some(store) => {
                    let name = format!("{backend:?}").to_lowercase();
                    beside::measure(store, &name, mib, Duration::from_millis(options.ms), &mut table)
                }
                // It has no checkpoints.
                None => Ok(()),
            })?;
        }
    }
    println!("{table}");
    Ok(())
}

fn ftrun_tests_dir() -> PathBuf {
    // Next to the build, which is on a disk: a temporary directory may be memory.
    ftrun_tests::binaries::target_dir().unwrap_or_else(|_| std::env::temp_dir())
}

fn measure_all(
    backend: Backend,
    level: Level,
    dir: &Path,
    options: &Options,
    figures: &mut BTreeMap<(Case, Backend), Vec<Figure>>,
) -> Result<(), Error> {
    let target = Target::open(backend, level, dir)?;
    let mut name = 0;
    let wanted = |only: &[usize], what| only.is_empty() || only.contains(&what);
    for bytes in [200, 4096] {
        for units in [1, 8, 64] {
            if !wanted(&options.units, units) || !wanted(&options.bytes, bytes) {
                continue;
            }
            for pipelined in [false, true] {
                if options.way.is_some_and(|way| (way == Way::Ahead) != pipelined) {
                    continue;
                }
                // One INSERT is answered before the next one is sent.
                if backend == Backend::Postgres && pipelined {
                    continue;
                }
                let case = Case { level, bytes, units, pipelined };
                let mut writers = Vec::new();
                for _ in 0..units {
                    name += 1;
                    writers.push(target.writer(name, case)?);
                }
                let figure = measure(writers, case, Duration::from_millis(options.ms))?;
                figures.entry((case, backend)).or_default().push(figure);
            }
        }
    }
    Ok(())
}

fn measure(writers: Vec<Box<dyn Writer>>, case: Case, time: Duration) -> Result<Figure, Error> {
    let start = Instant::now();
    let work = |mut writer: Box<dyn Writer>| -> Result<Vec<Duration>, Error> {
        let record = vec![b'r'; case.bytes];
        let (mut n, mut taken) = (0, Vec::new());
        while start.elapsed() < time {
            let began = Instant::now();
            if !case.pipelined {
                writer.commit(n, &record)?;
                taken.push(began.elapsed());
            } else {
                writer.append(n, &record)?;
                if n >= WINDOW {
                    writer.wait(n - WINDOW)?;
                }
            }
            n += 1;
        }
        // A thread that was not run in time has nothing to wait for.
        if n > 0 {
            writer.wait(n - 1)?;
        }
        if case.pipelined {
            // Only how many there were is of interest.
            taken.resize(usize::try_from(n).unwrap_or(usize::MAX), Duration::ZERO);
        }
        Ok(taken)
    };
    let mut all = Vec::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = writers.into_iter().map(|writer| scope.spawn(|| work(writer))).collect();
        for thread in threads {
            all.extend(thread.join().map_err(|_| error!("a writer panicked"))??);
        }
        Ok::<(), Error>(())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    all.sort_unstable();
    let at = |part: f64| all.get((all.len() as f64 * part) as usize).map_or(0.0, |d| d.as_secs_f64() * 1e6);
    Ok(Figure { rate: all.len() as f64 / seconds, p50: at(0.5), p99: at(0.99) })
}

/// A place where records go.
enum Target {
    Raw(Arc<RawFile>),
    Store(Box<dyn StableStore>),
    Served(Served),
    #[cfg(feature = "engines")]
    Cluster(engines::Cluster),
    #[cfg(feature = "engines")]
    Postgres(engines::Postgres),
}

impl Target {
    fn open(backend: Backend, level: Level, dir: &Path) -> Result<Self, Error> {
        Ok(match backend {
            Backend::Raw => Self::Raw(RawFile::start(&dir.join("raw"), level == Level::Disk)?),
            Backend::File => {
                let engine = Engine::open(dir, EngineOptions::default()).map_err(|e| error!("{e}"))?;
                Self::Store(Box::new(engine))
            }
            Backend::Unix => Self::Served(Served::start(dir, false)?),
            Backend::Tcp => Self::Served(Served::start(dir, true)?),
            #[cfg(feature = "engines")]
            Backend::Nats => Self::Cluster(engines::Cluster::start(dir, 1)?),
            #[cfg(feature = "engines")]
            Backend::Nats3 => Self::Cluster(engines::Cluster::start(dir, 3)?),
            #[cfg(feature = "engines")]
            Backend::Postgres => Self::Postgres(engines::Postgres::start(dir)?),
            #[cfg(not(feature = "engines"))]
            Backend::Nats | Backend::Nats3 | Backend::Postgres => return Err(error!("built without `engines`")),
        })
    }

    fn store(&self) -> Option<&dyn StableStore> {
        match self {
            Self::Raw(_) => None,
            Self::Store(store) => Some(&**store),
            Self::Served(served) => Some(served.store()),
            #[cfg(feature = "engines")]
            Self::Cluster(cluster) => Some(cluster.store()),
            #[cfg(feature = "engines")]
            Self::Postgres(_) => None,
        }
    }

    fn writer(&self, n: usize, case: Case) -> Result<Box<dyn Writer>, Error> {
        match self {
            Self::Raw(file) => return Ok(Box::new(file.writer())),
            #[cfg(feature = "engines")]
            Self::Postgres(postgres) => return Ok(Box::new(postgres.writer(n)?)),
            _ => {}
        }
        let store = self.store().ok_or_else(|| error!("no store"))?;
        let of = |e: ftrun_store::Error| error!("{e}");
        let name = UnitName::new(format!("unit-{n}")).map_err(of)?;
        let ttl = Duration::from_secs(60);
        let options = OpenOptions { holder: "bench".into(), ttl, durability: case.level.durability() };
        let unit = store.open(&name, &options).map_err(of)?;
        let kept = KEPT_BYTES / (case.units * case.bytes) as u64;
        Ok(Box::new(StoreWriter { unit, kept }))
    }
}

struct StoreWriter {
    unit: Arc<dyn UnitStore>,
    /// Records that are kept.
    kept: u64,
}

impl StoreWriter {
    /// What a unit with checkpoints does as well: old events go.
    fn drop_old(&self, n: u64) -> Result<(), Error> {
        if n % self.kept == self.kept - 1 {
            self.unit.truncate_below(n - self.kept / 2).map_err(|e| error!("{e}"))?;
        }
        Ok(())
    }
}

impl Writer for StoreWriter {
    fn append(&mut self, n: u64, record: &[u8]) -> Result<(), Error> {
        self.drop_old(n)?;
        self.unit.append(Batch::of(n, [record])).map_err(|e| error!("{e}"))
    }

    fn wait(&mut self, n: u64) -> Result<(), Error> {
        self.unit.wait(n, PATIENCE).map_err(|e| error!("{e}"))
    }

    fn commit(&mut self, n: u64, record: &[u8]) -> Result<(), Error> {
        self.drop_old(n)?;
        self.unit.commit(Batch::of(n, [record]), PATIENCE).map_err(|e| error!("{e}"))
    }
}

fn report(
    options: &Options,
    backends: &[Backend],
    figures: &BTreeMap<(Case, Backend), Vec<Figure>>,
) -> Result<(), Error> {
    let mut table = Table::new(
        2,
        [
            "level",
            "backend",
            "bytes",
            "units",
            "1 at a time/s",
            "p50 µs",
            "p99 µs",
            "×raw",
            "×file",
            "64 ahead/s",
            "×raw",
            "×file",
        ],
    );
    let mut rows = Vec::new();
    let of = |case: Case, backend: Backend, what: fn(&Figure) -> f64| {
        figures.get(&(case, backend)).and_then(|all| median(all.iter().map(what)))
    };
    let cases: BTreeSet<Case> = figures.keys().map(|(case, _)| Case { pipelined: false, ..*case }).collect();
    for case in cases {
        let ahead = Case { pipelined: true, ..case };
        for &backend in backends {
            let (rate, fast) = (of(case, backend, |f| f.rate), of(ahead, backend, |f| f.rate));
            if rate.is_none() && fast.is_none() {
                continue;
            }
            let (p50, p99) = (of(case, backend, |f| f.p50), of(case, backend, |f| f.p99));
            let part = ratio(rate, of(case, Backend::Raw, |f| f.rate));
            let fast_part = ratio(fast, of(ahead, Backend::Raw, |f| f.rate));
            let of_file = ratio(rate, of(case, Backend::File, |f| f.rate));
            let fast_of_file = ratio(fast, of(ahead, Backend::File, |f| f.rate));
            let name = |v: &dyn std::fmt::Debug| format!("{v:?}").to_lowercase();
            table.line([
                name(&case.level),
                name(&backend),
                case.bytes.to_string(),
                case.units.to_string(),
                show(rate, 0),
                show(p50, 0),
                show(p99, 0),
                show(part, 2),
                show(of_file, 2),
                show(fast, 0),
                show(fast_part, 2),
                show(fast_of_file, 2),
            ]);
            rows.push(json!({
                "level": name(&case.level), "backend": name(&backend), "bytes": case.bytes, "units": case.units,
                "one_at_a_time_per_s": rate, "p50_us": p50, "p99_us": p99, "of_raw": part, "of_file": of_file,
                "ahead_per_s": fast, "ahead_of_raw": fast_part, "ahead_of_file": fast_of_file,
            }));
        }
    }
    println!("{table}");
    if let Some(path) = &options.json {
        let all = json!({ "bench": "store", "machine": super::machine(), "rounds": options.rounds, "ms": options.ms,
                          "window": WINDOW, "rows": rows });
        super::write_json(path, &all)?;
    }
    Ok(())
}
