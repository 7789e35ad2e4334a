//! The suite that every backend of [`StableStore`] passes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{
    Batch, Durability, Error, NewCheckpoint, OpenOptions, PAGE_BYTES, Page, StableStore, UnitName, UnitStore,
    each_record,
};

/// Long enough for any acknowledgement on any machine.
const LONG: Duration = Duration::from_secs(60);
const LEVELS: [Durability; 3] = [Durability::Memory, Durability::Cache, Durability::Disk];

type Case = fn(&dyn StableStore);

/// Runs every case on a store of its own.
///
/// # Panics
/// The backend does not do what the trait says.
pub fn run(fresh: &mut dyn FnMut() -> Box<dyn StableStore>) {
    let cases: [(&str, Case); 14] = [
        ("records come back", records_come_back),
        ("the order is kept", the_order_is_kept),
        ("acknowledgements arrive", acknowledgements_arrive),
        ("what is committed is acknowledged", what_is_committed_is_acknowledged),
        ("prefixes and suffixes go", prefixes_and_suffixes_go),
        ("a stale writer is refused", a_stale_writer_is_refused),
        ("leases are exclusive", leases_are_exclusive),
        ("a reader reads", a_reader_reads),
        ("checkpoints come back", checkpoints_come_back),
        ("a failed checkpoint is not there", a_failed_checkpoint_is_not_there),
        ("long chains of checkpoints", long_chains_of_checkpoints),
        ("collecting keeps what recovery needs", collecting_keeps_what_recovery_needs),
        ("units are apart", units_are_apart),
        ("many units at once", many_units_at_once),
    ];
    for (name, case) in cases {
        eprintln!("conformance: {name}");
        case(&*fresh());
    }
}

fn name(name: &str) -> UnitName {
    UnitName::new(name).expect("a name")
}

fn options(holder: &str, durability: Durability) -> OpenOptions {
    OpenOptions { holder: holder.to_owned(), ttl: Duration::from_secs(30), durability }
}

fn open(store: &dyn StableStore, unit: &str, durability: Durability) -> Arc<dyn UnitStore> {
    store.open(&name(unit), &options("tester", durability)).expect("opened")
}

fn record(sii: u64) -> Vec<u8> {
    let len = usize::try_from(sii % 97).expect("small");
    let mut bytes = sii.to_le_bytes().to_vec();
    bytes.resize(8 + len, sii as u8);
    bytes
}

fn batch(range: Range<u64>) -> Batch {
    Batch::of(range.start, range.map(record))
}

/// All records from `from` on, which must be those of their SIIs.
fn read(unit: &dyn UnitStore, from: u64) -> Range<u64> {
    let mut next = from;
    each_record(unit, from, &mut |sii, bytes| {
        assert_eq!(sii, next);
        assert_eq!(bytes, record(sii));
        next += 1;
        Ok(())
    })
    .expect("read");
    from..next
}

fn records_come_back(store: &dyn StableStore) {
    for durability in LEVELS {
        let unit = open(store, &format!("unit-{durability:?}"), durability);
        assert_eq!(unit.log().unwrap(), 0..0);
        assert!(unit.read(0, 1).unwrap().is_empty());
        let mut at = 5;
        for n in [1, 2, 7, 30, 1, 200] {
            unit.append(batch(at..at + n)).unwrap();
            at += n;
        }
        unit.append(Batch::new(999)).expect("an empty batch is nothing");
        assert_eq!(unit.log().unwrap(), 5..at);
        unit.wait(at - 1, LONG).unwrap();
        assert_eq!(unit.acknowledged().unwrap(), at);
        for from in [5, 6, 7, 100, at - 1, at] {
            assert_eq!(read(&*unit, from), from..at);
        }
        assert_eq!(unit.read(5, 1).unwrap(), [batch(5..6)], "no more than asked for");
        let stored = |from| unit.read(from, 1).unwrap_err();
        assert!(matches!(stored(4), Error::NotStored { wanted: 4, first: 5, .. }), "{}", stored(4));
        assert!(matches!(stored(at + 1), Error::NotStored { .. }));
        // A large record, and none.
        unit.append(Batch::of(at, [vec![7; 3 << 20], Vec::new()])).unwrap();
        let got = unit.read(at, 1).unwrap();
        assert_eq!(got[0].records().map(|(_, r)| r.len()).collect::<Vec<_>>(), [3 << 20, 0]);
    }
}

fn the_order_is_kept(store: &dyn StableStore) {
    let unit = open(store, "a", Durability::Cache);
    unit.append(batch(10..20)).unwrap();
    for first in [0, 9, 19, 21] {
        let e = unit.append(batch(first..first + 1)).unwrap_err();
        assert!(matches!(e, Error::OutOfOrder { expected: 20, .. }), "{e}");
    }
    unit.append(batch(20..21)).unwrap();
    assert_eq!(read(&*unit, 10), 10..21);
}

fn acknowledgements_arrive(store: &dyn StableStore) {
    for durability in LEVELS {
        let unit = open(store, &format!("unit-{durability:?}"), durability);
        let calls = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = std::sync::mpsc::channel();
        let counted = Arc::clone(&calls);
        unit.notify(Box::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = sender.send(());
        }));
        let e = unit.wait(3, Duration::from_millis(30)).unwrap_err();
        assert!(matches!(e, Error::Timeout { sii: 3, .. }), "{e}");
        for sii in 0..100 {
            unit.append(batch(sii..sii + 1)).unwrap();
        }
        unit.wait(99, LONG).unwrap();
        assert_eq!(unit.acknowledged().unwrap(), 100);
        if durability != Durability::Memory {
            receiver.recv_timeout(LONG).expect("called");
        }
        // Without anybody who waits, too.
        unit.append(batch(100..101)).unwrap();
        while unit.acknowledged().unwrap() < 101 {
            receiver.recv_timeout(LONG).expect("called");
        }
    }
}

/// Some wait for each of their records, beside others who do not. Break it: have `Shared::await_group` not wait for a group that
/// somebody else commits.
fn what_is_committed_is_acknowledged(store: &dyn StableStore) {
    for durability in LEVELS {
        let units: Vec<_> = (0..6).map(|n| open(store, &format!("unit-{durability:?}-{n}"), durability)).collect();
        std::thread::scope(|scope| {
            for (n, unit) in units.iter().enumerate() {
                scope.spawn(move || {
                    for sii in 0..60 {
                        if n % 3 == 2 {
                            unit.append(batch(sii..sii + 1)).unwrap();
                            continue;
                        }
                        unit.commit(batch(sii..sii + 1), LONG).unwrap();
                        assert_eq!(unit.acknowledged().unwrap(), sii + 1);
                    }
                });
            }
        });
        for unit in &units {
            unit.wait(59, LONG).unwrap();
            assert_eq!(read(&**unit, 0), 0..60);
        }
        assert!(matches!(units[0].commit(batch(70..71), LONG), Err(Error::OutOfOrder { .. })));
        units[0].commit(batch(60..60), LONG).expect("nothing to wait for");
    }
}

fn prefixes_and_suffixes_go(store: &dyn StableStore) {
    let unit = open(store, "a", Durability::Disk);
    for first in (0..100).step_by(10) {
        unit.append(batch(first..first + 10)).unwrap();
    }
    unit.truncate_below(35).unwrap();
    assert_eq!(unit.log().unwrap(), 35..100);
    assert_eq!(read(&*unit, 35), 35..100);
    assert!(matches!(unit.read(34, 1), Err(Error::NotStored { first: 35, .. })));
    unit.truncate_from(82).unwrap();
    assert_eq!(read(&*unit, 35), 35..82);
    assert_eq!(unit.acknowledged().unwrap(), 82);
    unit.truncate_from(95).unwrap();
    unit.append(batch(82..90)).unwrap();
    unit.wait(89, LONG).unwrap();
    assert_eq!(read(&*unit, 40), 40..90);
    unit.truncate_from(0).unwrap();
    assert!(unit.log().unwrap().is_empty());
    let start = unit.log().unwrap().end;
    // An empty log may skip.
    unit.append(batch(start + 7..start + 9)).unwrap();
    assert_eq!(unit.log().unwrap(), start + 7..start + 9);
    unit.truncate_below(500).unwrap();
    assert_eq!(unit.log().unwrap(), 500..500);
    assert!(unit.append(batch(499..501)).is_err());
    unit.append(batch(500..501)).unwrap();
    unit.wait(500, LONG).unwrap();
    assert_eq!(read(&*unit, 500), 500..501);
}

fn a_stale_writer_is_refused(store: &dyn StableStore) {
    let old = open(store, "a", Durability::Disk);
    old.append(batch(0..5)).unwrap();
    let new = open(store, "a", Durability::Disk);
    assert!(new.epoch() > old.epoch());
    let fenced = |r: Result<(), Error>| assert!(r.as_ref().is_err_and(Error::is_fenced), "{r:?}");
    // Elsewhere, a refusal may come after the call.
    fenced(old.append(batch(5..6)).and_then(|()| old.wait(5, LONG)));
    fenced(old.append(batch(5..6)));
    fenced(old.truncate_below(3));
    fenced(old.truncate_from(3));
    fenced(old.renew());
    fenced(old.release());
    fenced(old.collect(9, 0).map(drop));
    fenced(put(&*old, 3, None, &[], &[]));
    assert_eq!(read(&*new, 0), 0..5, "what it had queued before is there");
    new.append(batch(5..6)).unwrap();
    new.wait(5, LONG).unwrap();
}

fn leases_are_exclusive(store: &dyn StableStore) {
    let take = |holder: &str, ttl| {
        let options = OpenOptions { ttl: Duration::from_millis(ttl), ..options(holder, Durability::Cache) };
        store.open(&name("a"), &options)
    };
    let first = take("one", 60_000).unwrap();
    let e = take("two", 60_000).unwrap_err();
    assert!(matches!(&e, Error::Held { holder, .. } if holder == "one"), "{e}");
    assert!(matches!(store.remove(&name("a")), Err(Error::Held { .. })));
    let again = take("one", 60_000).expect("its own");
    assert!(again.epoch() > first.epoch());
    again.release().unwrap();
    let short = take("two", 300).unwrap();
    short.append(batch(0..1)).unwrap();
    // It runs out when nothing is heard of its holder.
    let began = std::time::Instant::now();
    let third = loop {
        match take("three", 60_000) {
            Ok(unit) => break unit,
            Err(Error::Held { remaining_ms, .. }) => std::thread::sleep(Duration::from_millis(remaining_ms)),
            Err(e) => panic!("{e}"),
        }
        assert!(began.elapsed() < LONG);
    };
    assert!(short.append(batch(1..2)).and_then(|()| short.wait(1, LONG)).unwrap_err().is_fenced());
    third.release().unwrap();
    store.remove(&name("a")).unwrap();
    assert!(matches!(store.remove(&name("a")), Err(Error::NoUnit { .. })));
    assert!(matches!(store.view(&name("a")), Err(Error::NoUnit { .. })));
    assert!(take("four", 1).unwrap().log().unwrap().is_empty(), "a new unit of the same name is empty");
}

fn a_reader_reads(store: &dyn StableStore) {
    let unit = open(store, "a", Durability::Disk);
    unit.append(batch(0..10)).unwrap();
    let view = store.view(&name("a")).unwrap();
    assert_eq!(read(&*view, 0), 0..10);
    unit.append(batch(10..11)).unwrap();
    assert_eq!(read(&*view, 0), 0..11);
    let refused = |r: Result<(), Error>| assert!(matches!(r, Err(Error::ReadOnly { .. })), "{r:?}");
    refused(view.append(batch(11..12)));
    refused(view.truncate_below(1));
    refused(put(&*view, 1, None, &[], &[]));
    unit.renew().expect("the writer is not disturbed");
}

fn page(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    if seed > 0 {
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.to_le_bytes()).finalize_xof().fill(&mut page[..1024]);
    }
    page
}

fn put(
    unit: &dyn UnitStore,
    sii: u64,
    parent: Option<u64>,
    gone: &[Range<u64>],
    pages: &[(u64, u64)],
) -> Result<(), Error> {
    let pages: Vec<(u64, Page)> = pages.iter().map(|(n, seed)| (n * 4096, page(*seed))).collect();
    let manifest = format!("manifest of {sii}");
    let pages: &[(u64, Page)] = &pages;
    unit.put_checkpoint(&NewCheckpoint { sii, parent, manifest: manifest.as_bytes(), gone, pages: &pages })
}

/// The pages of a checkpoint: number and seed.
fn get(unit: &dyn UnitStore, sii: u64, range: Range<u64>) -> Vec<(u64, u64)> {
    assert_eq!(unit.manifest(sii).unwrap(), format!("manifest of {sii}").as_bytes());
    let mut pages = Vec::new();
    let mut hashes = BTreeMap::new();
    for seed in 0..300 {
        hashes.insert(page(seed), seed);
    }
    unit.pages(sii, range.start * 4096..range.end * 4096, &mut |address, page| {
        let seed = page.map_or(Some(0), |page| hashes.get(page).copied());
        pages.push((address / 4096, seed.expect("a page that was put")));
        Ok(())
    })
    .unwrap();
    assert!(pages.is_sorted());
    pages
}

fn checkpoints_come_back(store: &dyn StableStore) {
    for durability in LEVELS {
        let unit = open(store, &format!("unit-{durability:?}"), durability);
        assert!(unit.checkpoints().unwrap().is_empty());
        assert!(matches!(unit.manifest(1), Err(Error::NoCheckpoint { sii: 1, .. })));
        let base: Vec<(u64, u64)> = (10..60).map(|n| (n, n % 7)).collect();
        put(&*unit, 4, None, &[], &base).unwrap();
        assert_eq!(get(&*unit, 4, 0..1000), base);
        // Changed, zeroed, gone and back, new.
        put(
            &*unit,
            9,
            Some(4),
            std::slice::from_ref(&(12 * 4096..20 * 4096)),
            &[(11, 100), (13, 101), (30, 0), (400, 5)],
        )
        .unwrap();
        let mut want: BTreeMap<u64, u64> = base.iter().copied().collect();
        want.retain(|n, _| !(12..20).contains(n));
        want.extend([(11, 100), (13, 101), (30, 0), (400, 5)]);
        assert_eq!(get(&*unit, 9, 0..1000), want.clone().into_iter().collect::<Vec<_>>());
        assert_eq!(get(&*unit, 9, 11..31), want.range(11..31).map(|(n, s)| (*n, *s)).collect::<Vec<_>>());
        assert_eq!(get(&*unit, 4, 0..1000), base, "the parent is as it was");
        put(&*unit, 9, Some(4), &[], &[(1, 1)]).expect("replaced");
        assert_eq!(get(&*unit, 9, 0..5), [(1, 1)]);
        let infos = unit.checkpoints().unwrap();
        assert_eq!(infos.iter().map(|i| (i.sii, i.pages)).collect::<Vec<_>>(), [(4, 50), (9, 1)]);
        put(&*unit, 20, None, &[], &[]).expect("no pages at all");
        assert!(get(&*unit, 20, 0..1000).is_empty());
    }
    let stored = |unit: &str| store.units().unwrap().into_iter().find(|u| u.name == name(unit)).unwrap().bytes;
    assert!(stored("unit-Disk") < stored("unit-Memory"), "pages that another unit has are not stored again");
}

fn a_failed_checkpoint_is_not_there(store: &dyn StableStore) {
    struct Broken;
    impl crate::Pages for Broken {
        fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), Error>) -> Result<(), Error> {
            for n in 0..40 {
                put(n * 4096, &page(n + 1))?;
            }
            Err(Error::Invalid { what: "the source".into(), why: "it broke".into() })
        }
    }
    let unit = open(store, "a", Durability::Disk);
    let new = NewCheckpoint { sii: 3, parent: None, manifest: b"", gone: &[], pages: &Broken };
    let e = unit.put_checkpoint(&new).unwrap_err();
    assert!(e.to_string().contains("it broke"), "{e}");
    assert!(unit.checkpoints().unwrap().is_empty());
    let invalid = |r: Result<(), Error>| assert!(matches!(r, Err(Error::Invalid { .. })), "{r:?}");
    invalid(put(&*unit, 3, None, &[], &[(1, 1), (1, 2)]));
    invalid(put(&*unit, 3, Some(3), &[], &[]));
    assert!(matches!(put(&*unit, 3, Some(2), &[], &[]), Err(Error::NoCheckpoint { sii: 2, .. })));
    let odd: &[(u64, Page)] = &[(5, page(1))];
    invalid(unit.put_checkpoint(&NewCheckpoint { pages: &odd, ..new }));
    put(&*unit, 3, None, &[], &[(1, 1)]).expect("all that did no harm");
    assert_eq!(get(&*unit, 3, 0..9), [(1, 1)]);
}

fn long_chains_of_checkpoints(store: &dyn StableStore) {
    let unit = open(store, "a", Durability::Cache);
    let mut want: BTreeMap<u64, u64> = (0..40).map(|n| (n, n)).collect();
    put(&*unit, 1, None, &[], &want.clone().into_iter().collect::<Vec<_>>()).unwrap();
    for sii in 2..100 {
        let (page, seed) = (sii * 7 % 50, sii % 9 + 200);
        let gone = sii * 11 % 50;
        want.remove(&gone);
        want.insert(page, seed);
        put(&*unit, sii, Some(sii - 1), std::slice::from_ref(&(gone * 4096..gone * 4096 + 4096)), &[(page, seed)])
            .unwrap();
        unit.collect(sii, 1).unwrap();
        assert_eq!(unit.checkpoints().unwrap().iter().map(|c| c.sii).collect::<Vec<_>>(), [sii - 1, sii]);
    }
    assert_eq!(get(&*unit, 99, 0..100), want.into_iter().collect::<Vec<_>>());
    let report = store.fsck().unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

fn collecting_keeps_what_recovery_needs(store: &dyn StableStore) {
    let unit = open(store, "a", Durability::Disk);
    unit.append(batch(1..101)).unwrap();
    assert_eq!(unit.collect(50, 0).unwrap().effective, None, "without a checkpoint everything is needed");
    assert_eq!(unit.log().unwrap(), 1..101);
    for sii in [10, 40, 70] {
        put(&*unit, sii, None, &[], &[(sii, sii)]).unwrap();
    }
    let collected = unit.collect(69, 0).unwrap();
    assert_eq!((collected.effective, collected.checkpoints, collected.records), (Some(40), 1, 40));
    assert_eq!(unit.log().unwrap(), 41..101);
    let siis = || unit.checkpoints().unwrap().iter().map(|c| c.sii).collect::<Vec<_>>();
    assert_eq!(siis(), [40, 70]);
    let collected = unit.collect(70, 1).unwrap();
    assert_eq!((collected.effective, collected.checkpoints, collected.records), (Some(70), 0, 0));
    unit.collect(1000, 0).unwrap();
    assert_eq!((siis(), unit.log().unwrap()), (vec![70], 71..101));
    assert_eq!(get(&*unit, 70, 0..100), [(70, 70)]);
    assert_eq!(read(&*unit, 71), 71..101);
    store.gc().unwrap();
    assert_eq!(get(&*unit, 70, 0..100), [(70, 70)]);
    assert_eq!(read(&*unit, 71), 71..101);
}

fn units_are_apart(store: &dyn StableStore) {
    for bad in ["", "a//b", "/a", "ä", "a b", &"x".repeat(201)] {
        assert!(UnitName::new(bad).is_err(), "{bad}");
    }
    let names = ["a", "a/b", "b.c_d-e"];
    let units: Vec<_> = names.iter().map(|n| open(store, n, Durability::Cache)).collect();
    for (n, unit) in units.iter().enumerate() {
        let n = n as u64;
        unit.append(batch(n..20 + n)).unwrap();
        put(&**unit, 5 + n, None, &[], &[(n, n + 1)]).unwrap();
    }
    units[0].release().unwrap();
    store.remove(&name("a")).unwrap();
    let infos = store.units().unwrap();
    let seen: Vec<_> = infos.iter().map(|i| (i.name.as_str(), i.log.clone(), i.checkpoints.clone())).collect();
    assert_eq!(seen, [("a/b", 1..21, vec![6]), ("b.c_d-e", 2..22, vec![7])]);
    for (n, unit) in (1u64..).zip(&units[1..]) {
        assert_eq!(read(&**unit, n), n..20 + n);
        assert_eq!(get(&**unit, 5 + n, 0..10), [(n, n + 1)]);
    }
    assert!(matches!(units[0].read(1, 1), Err(Error::NoUnit { .. })));
}

fn many_units_at_once(store: &dyn StableStore) {
    std::thread::scope(|scope| {
        for n in 0..16 {
            scope.spawn(move || {
                let unit = open(store, &format!("unit-{n}"), LEVELS[n % 3]);
                let mut at = 0;
                for round in 0..20u64 {
                    let next = at + 1 + (round + n as u64) % 9;
                    unit.append(batch(at..next)).unwrap();
                    if round % 3 == 0 {
                        unit.wait(next - 1, LONG).unwrap();
                    }
                    if round % 7 == 6 {
                        put(&*unit, next - 1, None, &[], &[(round, round + 1), (100 + n as u64, 1)]).unwrap();
                        unit.collect(next - 1, 0).unwrap();
                    }
                    at = next;
                }
                unit.wait(at - 1, LONG).unwrap();
                let log = unit.log().unwrap();
                assert_eq!(log.end, at);
                assert_eq!(read(&*unit, log.start), log);
            });
        }
    });
    let report = store.fsck().unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!(report.checkpoints, 16);
}
