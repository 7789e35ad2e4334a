//! `cargo xtask soak --program store`: units write, take checkpoints and drop what they no longer need, while the store gives
//! space back by itself. Disk use has to stay in proportion to what is live, and quotas have to hold.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ftrun_store::{
    Batch, Durability, Engine, EngineOptions, Error as StoreError, NewCheckpoint, OpenOptions, Page, StableStore,
    UnitName, UnitStore, each_record,
};
use ftrun_tests::{Error, error};

const UNITS: u64 = 16;
/// What a unit may store, bytes.
const QUOTA: u64 = 16 << 20;
/// Records between two checkpoints.
const EVENTS: u64 = 2000;
/// Segments that may be in the directory beyond twice what is live. For each of the two streams eight (ARCHITECTURE.md, "Space"; the
/// queue is as large as a segment here), four that are ready for use, and two since the hog may have truncated a segment's
/// worth since the last pass.
const SLACK_SEGMENTS: u64 = 2 * 8 + 4 + 2;

/// What was done, and the most that was seen.
#[derive(Debug, Default)]
struct Figures {
    events: AtomicU64,
    bytes: AtomicU64,
    checkpoints: AtomicU64,
    refusals: AtomicU64,
}

fn of(e: StoreError) -> Error {
    error!("{e}")
}

fn record(unit: u64, sii: u64) -> Vec<u8> {
    let len = 50 + usize::try_from(sii * 7919 % 900).unwrap_or(0);
    let mut bytes = format!("{unit} {sii} ").into_bytes();
    bytes.resize(len.max(bytes.len()), b'.');
    bytes
}

fn open(engine: &Engine, name: String) -> Result<Arc<dyn UnitStore>, Error> {
    let options = OpenOptions { holder: "soak".into(), ttl: Duration::from_secs(60), durability: Durability::Disk };
    engine.open(&UnitName::new(name).map_err(of)?, &options).map_err(of)
}

/// A unit as ftrun has it: events, now and then a checkpoint of what has changed, and what it made needless goes.
fn write(engine: &Engine, n: u64, ending: &AtomicBool, figures: &Figures) -> Result<(), Error> {
    let unit = open(engine, format!("unit-{n}"))?;
    let (mut sii, mut parent) = (0, None);
    while !ending.load(Ordering::Relaxed) {
        for _ in 0..EVENTS / 20 {
            let batch = Batch::of(sii, (sii..sii + 20).map(|sii| record(n, sii)));
            figures.bytes.fetch_add(batch.body().len() as u64, Ordering::Relaxed);
            sii = batch.next();
            unit.append(batch).map_err(of)?;
        }
        unit.wait(sii - 1, Duration::from_secs(60)).map_err(of)?;
        figures.events.fetch_add(EVENTS, Ordering::Relaxed);
        let pages: Vec<(u64, Page)> = (0..64)
            .map(|k| {
                let mut page: Page = [0; 4096];
                page[..8].copy_from_slice(&(sii * UNITS + n).to_le_bytes());
                (((sii / EVENTS + k * 7) % 512) * 4096, page)
            })
            .collect();
        let pages: &[(u64, Page)] = &pages;
        let new = NewCheckpoint { sii: sii - 1, parent, manifest: b"soak", gone: &[], pages: &pages };
        unit.put_checkpoint(&new).map_err(of)?;
        parent = Some(sii - 1);
        figures.checkpoints.fetch_add(1, Ordering::Relaxed);
        unit.collect(sii - 1, 1).map_err(of)?;
        // What is kept is what was written.
        let from = unit.log().map_err(of)?.start;
        each_record(&*unit, from, &mut |sii, bytes| {
            assert_eq!(bytes, record(n, sii), "unit {n}, event {sii}");
            Ok(())
        })
        .map_err(of)?;
    }
    Ok(())
}

/// A unit that collects nothing before it has used up its quota.
fn hog(engine: &Engine, ending: &AtomicBool, figures: &Figures) -> Result<(), Error> {
    let unit = open(engine, "hog".into())?;
    let mut sii = 0;
    while !ending.load(Ordering::Relaxed) {
        match unit.append(Batch::of(sii, [record(UNITS, sii)])) {
            Ok(()) => sii += 1,
            Err(StoreError::Quota { used, limit, .. }) if used <= limit => {
                figures.refusals.fetch_add(1, Ordering::Relaxed);
                unit.truncate_below(sii).map_err(of)?;
            }
            Err(e) => return Err(of(e)),
        }
    }
    Ok(())
}

/// Bytes that the files of a directory take on the disk.
pub(crate) fn disk_bytes(dir: &Path) -> Result<u64, Error> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for file in std::fs::read_dir(dir)? {
        // One that is removed meanwhile takes nothing.
        bytes += file?.metadata().map_or(0, |m| m.blocks() * 512);
    }
    Ok(bytes)
}

/// Memory of this process, KiB.
fn memory_kib() -> Result<u64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()).and_then(|kib| kib.parse().ok());
    kib.ok_or_else(|| error!("/proc/self/status has no VmRSS"))
}

/// Runs for so long; prints the figures.
pub(crate) fn run(time: Duration) -> Result<(), Error> {
    let dir = ftrun_tests::binaries::target_dir()?.join(format!("soak-store-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = soak(&dir, time);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn soak(dir: &Path, time: Duration) -> Result<(), Error> {
    let options = EngineOptions { segment_bytes_max: 16 << 20, quota_bytes: QUOTA, ..EngineOptions::default() };
    let slack = SLACK_SEGMENTS * options.segment_bytes_max;
    let engine = Engine::open(dir, options.clone()).map_err(of)?;
    let (ending, figures, began) = (AtomicBool::new(false), Figures::default(), Instant::now());
    let (mut disk_most, mut live_most, mut over_most, mut memory_most) = (0, 0, 0, 0);
    std::thread::scope(|scope| {
        let (engine, ending, figures) = (&engine, &ending, &figures);
        let mut writers: Vec<_> = (0..UNITS).map(|n| scope.spawn(move || write(engine, n, ending, figures))).collect();
        writers.push(scope.spawn(move || hog(engine, ending, figures)));
        let watched = (|| {
            while began.elapsed() < time && !writers.iter().any(|w| w.is_finished()) {
                std::thread::sleep(Duration::from_millis(500));
                let (disk, (_, live)) = (disk_bytes(dir)?, engine.space());
                disk_most = disk_most.max(disk);
                live_most = live_most.max(live);
                over_most = over_most.max(disk.saturating_sub(2 * live));
                memory_most = memory_most.max(memory_kib()?);
            }
            Ok::<(), Error>(())
        })();
        ending.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().map_err(|_| error!("a writer panicked"))??;
        }
        watched
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let get = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "{seconds:.0} s: {} events ({:.0}/s), {} MiB of records, {} checkpoints, {} refusals by quota; at most {} MiB on disk, \
         {} MiB live, {} MiB on disk beyond twice what was live, {} MiB of memory",
        get(&figures.events),
        get(&figures.events) as f64 / seconds,
        mib(get(&figures.bytes)),
        get(&figures.checkpoints),
        get(&figures.refusals),
        mib(disk_most),
        mib(live_most),
        mib(over_most),
        memory_most >> 10
    );
    for unit in engine.units().map_err(of)? {
        if unit.bytes > QUOTA {
            return Err(error!("unit {} has {} bytes, its quota is {QUOTA}", unit.name, unit.bytes));
        }
    }
    if over_most > slack {
        return Err(error!("{over_most} bytes on disk beyond twice what was live; {slack} are expected at most"));
    }
    engine.close().map_err(of)?;
    drop(engine);
    let engine = Engine::open(dir, options).map_err(of)?;
    let report = engine.fsck().map_err(of)?;
    println!(
        "opened again: {} records, {} pages, {} checkpoints are whole",
        report.records, report.pages, report.checkpoints
    );
    if report.findings.is_empty() { Ok(()) } else { Err(error!("{:?}", report.findings)) }
}
