//! Disks that refuse.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::crash::Work;
use super::small;
use crate::disk::fault::{FaultDisk, Faults};
use crate::engine::{Engine, Options};
use crate::{Batch, Durability, Error, OpenOptions, StableStore, UnitName, UnitStore, each_record};

const LONG: Duration = Duration::from_secs(60);

fn open(engine: &Engine, durability: Durability) -> Arc<dyn UnitStore> {
    let options = OpenOptions { holder: "t".into(), ttl: LONG, durability };
    engine.open(&UnitName::new("a").unwrap(), &options).unwrap()
}

fn count(unit: &dyn UnitStore) -> u64 {
    let mut n = 0;
    let log = unit.log().unwrap();
    each_record(unit, log.start, &mut |_, _| {
        n += 1;
        Ok(())
    })
    .unwrap();
    n
}

/// What is queued while another one commits for itself is written, though nobody waits for it and the log is not idle for
/// long.
///
/// Break it: have `Queue::committed` wake nobody.
#[test]
fn what_comes_during_a_commit_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(dir.path(), Options { idle: 60 * LONG, ..Options::default() }).unwrap();
    let unit = |name: &str| {
        let options = OpenOptions { holder: "t".into(), ttl: LONG, durability: Durability::Disk };
        engine.open(&UnitName::new(name).unwrap(), &options).unwrap()
    };
    let (one, other) = (unit("one"), unit("other"));
    let (told, hear) = std::sync::mpsc::channel();
    other.notify(Box::new(move || told.send(()).unwrap()));
    for sii in 0..300 {
        std::thread::scope(|scope| {
            scope.spawn(|| one.commit(Batch::of(sii, ["x"]), LONG).unwrap());
            other.append(Batch::of(sii, ["y"])).unwrap();
        });
        while other.acknowledged().unwrap() <= sii {
            hear.recv_timeout(LONG).unwrap();
        }
    }
}

/// Break it: try the sync again, or go on after it.
#[test]
fn after_a_failed_sync_nothing_is_acknowledged() {
    for at in 0..12 {
        let disk = FaultDisk::new(at);
        let engine = Engine::on(Arc::new(disk.clone()), small()).unwrap();
        let unit = open(&engine, Durability::Disk);
        unit.append(Batch::of(0, ["sure"])).unwrap();
        unit.wait(0, LONG).unwrap();
        disk.arm(Faults { sync_error_at: Some(at), ..Faults::default() });
        let mut sii = 1;
        let failed = loop {
            let e = unit.append(Batch::of(sii, [[7; 900]])).and_then(|()| unit.wait(sii, LONG));
            match e {
                Ok(()) => sii += 1,
                Err(e) => break e,
            }
        };
        assert!(matches!(&failed, Error::Poisoned { .. }), "{failed}");
        for _ in 0..3 {
            assert_eq!(unit.append(Batch::of(sii + 1, ["more"])).unwrap_err(), failed);
            assert_eq!(unit.wait(sii, LONG).unwrap_err(), failed);
            assert_eq!(unit.acknowledged().unwrap_err(), failed);
            assert_eq!(engine.healthy().unwrap_err(), failed);
        }
        assert!(engine.close().is_err());
        drop(unit);
        drop(engine);
        // The page cache still shows what the disk has not got. Opened again, it is either gone or made durable.
        disk.kill();
        let engine = Engine::on(Arc::new(disk.clone()), small()).unwrap();
        let shown = count(&*engine.view(&UnitName::new("a").unwrap()).unwrap());
        assert!(shown >= sii, "{shown} {sii}");
        drop(engine);
        disk.lose_power();
        let engine = Engine::on(Arc::new(disk.clone()), small()).unwrap();
        assert!(engine.damage().is_empty(), "{:?}", engine.damage());
        assert_eq!(count(&*engine.view(&UnitName::new("a").unwrap()).unwrap()), shown, "what was shown stays");
    }
}

#[test]
fn failing_and_read_only_disks_lose_nothing_acknowledged() {
    for seed in 0..60 {
        for faults in [
            Faults { write_error_at: Some(seed * 2), ..Faults::default() },
            Faults { sync_error_at: Some(seed * 2), ..Faults::default() },
            Faults { read_only_at: Some(seed * 2), ..Faults::default() },
            Faults { slow: Duration::from_micros(200), die_at: Some(seed * 2), ..Faults::default() },
        ] {
            let mut work = Work::new(seed, Durability::Disk);
            work.disk.arm(faults);
            let _ = work.work(60);
            work.disk.lose_power();
            work.check(&format!("seed {seed}, {faults:?}")).unwrap();
        }
    }
}

/// Break it: keep what was refused; poison the store.
#[test]
fn a_full_disk_refuses_and_goes_on_when_there_is_space() {
    for background in [false, true] {
        let disk = FaultDisk::new(3);
        let options = super::Options { background, ..small() };
        let engine = Engine::on(Arc::new(disk.clone()), options.clone()).unwrap();
        let unit = open(&engine, Durability::Disk);
        disk.arm(Faults { space: Some(60 << 10), ..Faults::default() });
        let (mut sii, mut accepted) = (0, 0);
        let e = loop {
            match unit.append(Batch::of(sii, [[7; 500]])) {
                Ok(()) => accepted = sii + 1,
                Err(e) => break e,
            }
            match unit.wait(sii, LONG) {
                Ok(()) => sii += 1,
                Err(e) => break e,
            }
        };
        assert!(e.is_full(), "{e}");
        assert!(sii > 20, "{sii}");
        assert!(e.to_string().contains("the test disk") && e.to_string().contains("free space"), "{e}");
        assert_eq!(unit.log().unwrap().end, accepted);
        disk.arm(Faults::default());
        unit.wait(accepted.max(1) - 1, LONG).or_else(|e| if e.is_full() { Ok(()) } else { Err(e) }).unwrap();
        let mut next = accepted;
        let began = std::time::Instant::now();
        while next < accepted + 50 {
            match unit.append(Batch::of(next, [[8; 500]])) {
                Ok(()) => next += 1,
                Err(e) => assert!(e.is_full() && began.elapsed() < LONG, "{e}"),
            }
        }
        let began = std::time::Instant::now();
        while let Err(e) = unit.wait(next - 1, LONG) {
            assert!(e.is_full() && began.elapsed() < LONG, "{e}");
        }
        assert_eq!(count(&*unit), next);
        drop(unit);
        drop(engine);
        let engine = Engine::on(Arc::new(disk), options).unwrap();
        assert_eq!(count(&*engine.view(&UnitName::new("a").unwrap()).unwrap()), next);
    }
}

#[test]
fn a_quota_is_kept() {
    let options = super::Options { quota_bytes: 10_000, ..small() };
    let engine = Engine::on(Arc::new(FaultDisk::new(1)), options).unwrap();
    let unit = open(&engine, Durability::Cache);
    let mut sii = 0;
    let e = loop {
        match unit.append(Batch::of(sii, [[1; 400]])) {
            Ok(()) => sii += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(&e, Error::Quota { limit: 10_000, used, .. } if *used > 9000), "{e}");
    unit.wait(sii - 1, LONG).unwrap();
    unit.truncate_below(10).unwrap();
    unit.append(Batch::of(sii, [[1; 400]])).expect("there is room again");
    // A checkpoint that never ends is refused long before its end.
    let put = AtomicU64::new(0);
    let pages = Endless(&put);
    let new = crate::NewCheckpoint { sii: 1, parent: None, manifest: b"m", gone: &[], pages: &pages };
    let e = unit.put_checkpoint(&new).unwrap_err();
    assert!(matches!(e, Error::Quota { .. }) && put.load(Ordering::SeqCst) < 100, "{e}");
    assert!(engine.gc().unwrap().bytes > 0);
}

/// Pages that do not compress, until one is refused.
struct Endless<'a>(&'a AtomicU64);

impl crate::Pages for Endless<'_> {
    fn each(&self, put: &mut dyn FnMut(u64, &crate::Page) -> Result<(), Error>) -> Result<(), Error> {
        loop {
            let n = self.0.fetch_add(1, Ordering::SeqCst);
            put(n * 4096, &noise(n))?;
        }
    }
}

fn noise(seed: u64) -> crate::Page {
    let mut page = [0; 4096];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

/// What the files of a store with small segments may need beyond twice what was live at most: ARCHITECTURE.md, "Space", for
/// a queue of so many bytes and two streams.
fn slack(queue_bytes: u64) -> u64 {
    let segment = 16 << 10;
    2 * (5 * segment + 3 * queue_bytes.max(segment))
}

/// One unit writes and truncates as fast as it can, another one truncates, too. Break it: flush for each dead segment, and do
/// not let writers wait.
#[test]
fn truncation_keeps_up_with_writers() {
    let queue_bytes_max = 64 << 10;
    let disk = FaultDisk::new(1);
    disk.arm(Faults { slow: Duration::from_micros(200), ..Faults::default() });
    let engine = Engine::on(Arc::new(disk), super::Options { background: true, queue_bytes_max, ..small() }).unwrap();
    let unit = open(&engine, Durability::Disk);
    let options = OpenOptions { holder: "t".into(), ttl: LONG, durability: Durability::Disk };
    let other = engine.open(&UnitName::new("other").unwrap(), &options).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut sii = 0;
            while !ended.load(Ordering::Relaxed) {
                // Each second one changes nothing.
                other.truncate_below(sii / 2).unwrap();
                sii += 1;
            }
        });
        let (mut bytes_most, mut live_most) = (0, 0);
        let result = (0..4000).try_for_each(|sii: u64| {
            unit.append(Batch::of(sii, [[7; 900]]))?;
            unit.truncate_below(sii.saturating_sub(10))?;
            let (bytes, live) = engine.space();
            (bytes_most, live_most) = (bytes_most.max(bytes), live_most.max(live));
            Ok::<(), Error>(())
        });
        ended.store(true, Ordering::Relaxed);
        result.unwrap();
        assert!(bytes_most <= 2 * live_most + slack(queue_bytes_max as u64), "{bytes_most} {live_most}");
    });
    let written = engine.commits().1;
    assert!(written > 3_600_000, "{written}");
}

#[test]
fn a_truncation_that_changes_nothing_writes_nothing() {
    let engine = Engine::on(Arc::new(FaultDisk::new(1)), small()).unwrap();
    let unit = open(&engine, Durability::Cache);
    unit.append(Batch::of(0, ["a", "b", "c"])).unwrap();
    unit.truncate_below(2).unwrap();
    // The group of the truncation is over when that of a later batch is.
    unit.append(Batch::of(3, ["d"])).unwrap();
    unit.wait(3, LONG).unwrap();
    let before = engine.commits();
    for sii in [0, 1, 2] {
        unit.truncate_below(sii).unwrap();
    }
    unit.append(Batch::of(4, ["e"])).unwrap();
    unit.wait(4, LONG).unwrap();
    let batch = crate::engine::frame::frame_bytes(Batch::of(4, ["e"]).body().len()) as u64;
    assert_eq!(engine.commits(), (before.0 + 1, before.1 + batch));
}

/// Units append for long and take checkpoints: what the files need stays in proportion to what is live.
#[test]
fn disk_use_is_bounded() {
    for background in [false, true] {
        let options = super::Options { background, queue_bytes_max: 16 << 10, ..small() };
        let engine = Engine::on(Arc::new(FaultDisk::new(1)), options.clone()).unwrap();
        let unit = open(&engine, Durability::Cache);
        let idle = engine.open(
            &UnitName::new("idle").unwrap(),
            &OpenOptions { holder: "t".into(), ttl: LONG, durability: Durability::Cache },
        );
        idle.unwrap().append(Batch::of(0, [[9; 3000]])).unwrap();
        let mut live_most = 0;
        for round in 0..400u64 {
            for n in 0..20 {
                unit.append(Batch::of(round * 20 + n, [[round as u8; 300]])).unwrap();
            }
            let mut page = [0; 4096];
            page[..8].copy_from_slice(&(round + 1).to_le_bytes());
            let pages: &[(u64, [u8; 4096])] = &[(round % 7 * 4096, page)];
            unit.put_checkpoint(&crate::NewCheckpoint {
                sii: round * 20 + 19,
                parent: round.checked_sub(1).map(|r| r * 20 + 19),
                manifest: b"m",
                gone: &[],
                pages: &pages,
            })
            .unwrap();
            live_most = live_most.max(engine.space().1);
            unit.collect(u64::MAX, 1).unwrap();
            if !background {
                engine.gc().unwrap();
            }
            let (bytes, live) = engine.space();
            live_most = live_most.max(live);
            assert!(bytes <= 2 * live_most + slack(options.queue_bytes_max as u64), "{bytes} {live_most}");
        }
        assert_eq!(count(&*engine.view(&UnitName::new("idle").unwrap()).unwrap()), 1);
        assert!(engine.fsck().unwrap().findings.is_empty());
    }
}

/// Works step by step while no garbage can be collected; gives files and live bytes of the stream that the work fills, when it
/// waits. Then lets garbage be collected, and the work end.
fn held_back(engine: &Engine, steps: u64, fills: Fills, step: impl Fn(u64) -> Result<(), Error> + Sync) -> (u64, u64) {
    let shared = &engine.shared;
    let (done, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let collecting = crate::engine::lock(&shared.gc);
        let worker = scope.spawn(|| {
            let result = (0..steps).try_for_each(|n| {
                step(n)?;
                done.fetch_add(1, Ordering::SeqCst);
                Ok::<(), Error>(())
            });
            ended.store(true, Ordering::SeqCst);
            result
        });
        // Whoever waits while it is crowded waits for a pass, and none can begin. What is queued is still written.
        let waits = || {
            let inner = shared.queue.lock();
            inner.crowded && inner.waiting_for_room > 0 && inner.done == inner.group
        };
        // One that waits only for the queue is soon further on.
        let mut seen = None;
        while !waits() || seen != Some(done.load(Ordering::SeqCst)) {
            assert!(!ended.load(Ordering::SeqCst), "nothing held the writer back: {:?}", fills(engine));
            seen = Some(done.load(Ordering::SeqCst));
            std::thread::sleep(Duration::from_millis(20));
        }
        let (there, before) = (fills(engine), done.load(Ordering::SeqCst));
        assert!(before < steps);
        drop(collecting);
        worker.join().unwrap().unwrap();
        assert_eq!(done.load(Ordering::SeqCst), steps);
        there
    })
}

type Fills = fn(&Engine) -> (u64, u64);

fn total<'a>(uses: impl Iterator<Item = &'a crate::engine::live::Use>) -> (u64, u64) {
    uses.fold((0, 0), |sum, used| (sum.0 + used.bytes, sum.1 + used.live))
}

const LOG: Fills = |engine| total(engine.shared.queue.lock().uses.values());
const PACK: Fills = |engine| total(crate::engine::lock(&engine.shared.pack.index).uses.values());

/// What ARCHITECTURE, "Space", argues: writers wait from 2L + 4S on, and so files stay below 2L + 5S + 3Q. Break it: let writers
/// go on while it is crowded (`room_for`), do not ask when a segment begins (`rotate`) or when a checkpoint does (`press`).
#[test]
fn writers_wait_for_garbage_collection() {
    let segment = 16 << 10;
    let options = super::Options { background: true, queue_bytes_max: 16 << 10, ..small() };
    let engine = || Engine::on(Arc::new(FaultDisk::new(1)), options.clone()).unwrap();
    let bounded = |(bytes, live): (u64, u64), more: u64| {
        assert!(bytes > 4 * segment, "{bytes} {live}: they waited too early");
        assert!(bytes <= 2 * live + (5 + 3) * segment + more, "{bytes} {live}");
    };

    let log = engine();
    let unit = open(&log, Durability::Cache);
    let step = |sii: u64| {
        unit.append(Batch::of(sii, [[7; 900]]))?;
        unit.truncate_below(sii.saturating_sub(3))
    };
    bounded(held_back(&log, 2000, LOG, step), 0);

    // Pages that do not compress, so few changes that the log is never full of them.
    let pack = engine();
    let unit = open(&pack, Durability::Cache);
    let checkpoint_bytes = 6 * 4096;
    let step = |sii: u64| {
        let pages: Vec<(u64, crate::Page)> = (0..6).map(|n| (n * 4096, noise(sii * 8 + n))).collect();
        unit.append(Batch::of(sii, ["x"]))?;
        let new = crate::NewCheckpoint { sii, parent: None, manifest: b"m", gone: &[], pages: &&pages[..] };
        unit.put_checkpoint(&new)?;
        unit.collect(u64::MAX, 0).map(drop)
    };
    bounded(held_back(&pack, 60, PACK, step), 2 * (checkpoint_bytes + segment));
    assert!(!crate::engine::gc::crowded(&pack.shared.queue.lock().uses, segment));
}
