//! A store in a real cluster of three NATS servers on loopback. They are started by the tests; see `servers`.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ftrun_store::nats::servers::{Servers, program};
use ftrun_store::{
    Batch, Durability, Error, Location, NewCheckpoint, OpenOptions, Page, StableStore, UnitName, conformance,
    each_record,
};

const LONG: Duration = Duration::from_secs(120);

fn store(servers: &Servers, name: &str) -> Box<dyn StableStore> {
    servers.url(name).parse::<Location>().unwrap().open().unwrap()
}

fn name(name: impl Into<String>) -> UnitName {
    UnitName::new(name).unwrap()
}

fn options(durability: Durability) -> OpenOptions {
    OpenOptions { holder: "tester".into(), ttl: Duration::from_secs(30), durability }
}

#[test]
fn conforms_with_three_replicas() {
    let dir = tempfile::tempdir().unwrap();
    let servers = Servers::start(&program(), dir.path(), 3).unwrap();
    let mut stores = 0;
    conformance::run(&mut || {
        stores += 1;
        store(&servers, &format!("s{stores}"))
    });
}

#[test]
fn conforms_with_one_server() {
    let dir = tempfile::tempdir().unwrap();
    let servers = Servers::start(&program(), dir.path(), 1).unwrap();
    let mut stores = 0;
    conformance::run(&mut || {
        stores += 1;
        store(&servers, &format!("s{stores}"))
    });
}

fn record(unit: u64, sii: u64) -> Vec<u8> {
    let mut bytes = format!("{unit} {sii} ").into_bytes();
    bytes.resize(20 + (sii % 300) as usize, b'.');
    bytes
}

fn page(seed: u64) -> Page {
    let mut page = [0; 4096];
    page[..8].copy_from_slice(&(seed + 1).to_le_bytes());
    page
}

/// Units write, one takes checkpoints, while servers are killed one at a time at random instants. What was
/// acknowledged is there, each record once.
///
/// Break it: leave out the condition of a publication, or take any `WrongLastSequence` for success.
#[test]
fn servers_are_killed_under_load() {
    let seed = std::env::var("FTRUN_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap()
    });
    let kills: u64 = std::env::var("FTRUN_TEST_KILLS").ok().and_then(|s| s.parse().ok()).unwrap_or(6);
    eprintln!("FTRUN_TEST_SEED={seed} FTRUN_TEST_KILLS={kills}");
    let mut random = seed | 1;
    let mut below = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    let dir = tempfile::tempdir().unwrap();
    let mut servers = Servers::start(&program(), dir.path(), 3).unwrap();
    let written = store(&servers, "s");
    let ending = AtomicBool::new(false);
    let (acknowledged, checkpoints) = ([const { AtomicU64::new(0) }; 4], AtomicU64::new(0));
    std::thread::scope(|scope| {
        for (n, acknowledged) in (0..).zip(&acknowledged) {
            let (store, ending) = (&written, &ending);
            scope.spawn(move || {
                let unit = store.open(&name(format!("unit-{n}")), &options(Durability::Disk)).unwrap();
                let mut at = 0;
                while !ending.load(Ordering::Relaxed) {
                    let count = 1 + at % 5;
                    unit.append(Batch::of(at, (at..at + count).map(|sii| record(n, sii)))).unwrap();
                    at += count;
                    // Some are waited for one by one, others are under way by the hundred.
                    if n % 2 == 0 || at > acknowledged.load(Ordering::Relaxed) + 100 {
                        unit.wait(at - 1, LONG).unwrap();
                    }
                    acknowledged.store(unit.acknowledged().unwrap(), Ordering::Relaxed);
                }
            });
        }
        let (store, ending, checkpoints) = (&written, &ending, &checkpoints);
        scope.spawn(move || {
            let unit = store.open(&name("pages"), &options(Durability::Disk)).unwrap();
            while !ending.load(Ordering::Relaxed) {
                let sii = checkpoints.load(Ordering::Relaxed) + 1;
                let pages: Vec<(u64, Page)> = (0..40).map(|n| (n * 4096, page(sii * 100 + n))).collect();
                let pages: &[(u64, Page)] = &pages;
                let new = NewCheckpoint { sii, parent: None, manifest: b"m", gone: &[], pages: &pages };
                unit.put_checkpoint(&new).unwrap();
                checkpoints.store(sii, Ordering::Relaxed);
                unit.collect(sii, 1).unwrap();
            }
        });
        for kill in 0..kills {
            let victim = usize::try_from(below(3)).unwrap();
            std::thread::sleep(Duration::from_millis(below(1500)));
            servers.kill(victim).unwrap();
            // In the middle of an election, or after it.
            std::thread::sleep(Duration::from_millis(below(8000)));
            servers.restart(victim).unwrap();
            let so_far: Vec<u64> = acknowledged.iter().map(|a| a.load(Ordering::Relaxed)).collect();
            eprintln!("kill {kill} of server {victim}: {so_far:?} acknowledged");
        }
        ending.store(true, Ordering::Relaxed);
    });
    drop(written);
    let read = store(&servers, "s");
    for (n, acknowledged) in (0..).zip(&acknowledged) {
        let mut next = 0;
        let view = read.view(&name(format!("unit-{n}"))).unwrap();
        each_record(&*view, 0, &mut |sii, bytes| {
            assert_eq!((sii, bytes), (next, &record(n, sii)[..]));
            next += 1;
            Ok(())
        })
        .unwrap();
        let acknowledged = acknowledged.load(Ordering::Relaxed);
        assert!(next >= acknowledged && acknowledged > 0, "unit {n}: {next} stored, {acknowledged} acknowledged");
    }
    let report = read.fsck().unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let published = read.view(&name("pages")).unwrap().checkpoints().unwrap().pop().unwrap();
    assert!(published.sii >= checkpoints.load(Ordering::Relaxed), "{published:?}");
}

/// Without a majority nothing is acknowledged; with one again, what was appended meanwhile is.
#[test]
fn a_minority_acknowledges_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut servers = Servers::start(&program(), dir.path(), 3).unwrap();
    let store = store(&servers, "s");
    let unit = store.open(&name("a"), &options(Durability::Disk)).unwrap();
    unit.append(Batch::of(0, ["first"])).unwrap();
    unit.wait(0, LONG).unwrap();
    servers.kill(0).unwrap();
    servers.kill(1).unwrap();
    unit.append(Batch::of(1, ["second"])).unwrap();
    let e = unit.wait(1, Duration::from_secs(3)).unwrap_err();
    assert!(matches!(e, Error::Timeout { sii: 1, .. }), "{e}");
    assert_eq!(unit.acknowledged().unwrap(), 1);
    servers.restart(0).unwrap();
    unit.wait(1, LONG).unwrap();
    servers.restart(1).unwrap();
    let mut records = Vec::new();
    each_record(&*store.view(&name("a")).unwrap(), 0, &mut |_, record| {
        records.push(record.to_vec());
        Ok(())
    })
    .unwrap();
    assert_eq!(records, [b"first".to_vec(), b"second".to_vec()]);
}

/// Two processes share a cluster: the later opener's events follow, the earlier one can append no more.
#[test]
fn a_writer_elsewhere_is_overtaken() {
    let dir = tempfile::tempdir().unwrap();
    let servers = Servers::start(&program(), dir.path(), 1).unwrap();
    let (one, two) = (store(&servers, "s"), store(&servers, "s"));
    let old = one.open(&name("a"), &options(Durability::Cache)).unwrap();
    old.append(Batch::of(0, ["a", "b"])).unwrap();
    old.wait(1, LONG).unwrap();
    let new = two.open(&name("a"), &options(Durability::Cache)).unwrap();
    old.append(Batch::of(2, ["lost"])).unwrap();
    let e = old.wait(2, LONG).unwrap_err();
    assert!(e.is_fenced(), "{e}");
    new.append(Batch::of(2, ["c"])).unwrap();
    new.wait(2, LONG).unwrap();
    assert_eq!(one.view(&name("a")).unwrap().log().unwrap(), 0..3);
    let stranger = OpenOptions { holder: "stranger".into(), ..options(Durability::Cache) };
    assert!(matches!(one.open(&name("a"), &stranger), Err(Error::Held { .. })));
    // Another store in the same cluster has units of its own.
    assert!(store(&servers, "other").units().unwrap().is_empty());
}

/// Sweeps give back what no checkpoint names, while others store checkpoints that name the same pages.
///
/// Break it: rely on stored packs whatever a sweep does, or sweep without coming by the units.
#[test]
fn sweeps_and_checkpoints_do_not_hurt_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let servers = Servers::start(&program(), dir.path(), 1).unwrap();
    let (one, two) = (store(&servers, "s"), store(&servers, "s"));
    let until = Instant::now() + Duration::from_secs(5);
    let swept = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (n, store) in [(0, &one), (1, &two), (2, &two)] {
            let (until, swept) = (&until, &swept);
            scope.spawn(move || {
                let unit = store.open(&name(format!("unit-{n}")), &options(Durability::Cache)).unwrap();
                for sii in 1.. {
                    // The same few pages again and again, so that a pack is often dropped just when it is named anew.
                    let pages: Vec<(u64, Page)> = (0..32).map(|at| (at * 4096, page(sii / 3 % 4 * 100 + at))).collect();
                    let pages: &[(u64, Page)] = &pages;
                    let new = NewCheckpoint { sii, parent: None, manifest: b"", gone: &[], pages: &pages };
                    unit.put_checkpoint(&new).unwrap();
                    unit.collect(sii, 0).unwrap();
                    let mut found = 0;
                    unit.pages(sii, 0..u64::MAX, &mut |_, _| {
                        found += 1;
                        Ok(())
                    })
                    .unwrap();
                    assert_eq!(found, 32);
                    if Instant::now() > *until && swept.load(Ordering::Relaxed) > 3 {
                        break;
                    }
                }
            });
        }
        while Instant::now() < until || swept.load(Ordering::Relaxed) <= 3 {
            one.gc().unwrap();
            swept.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(two.gc().unwrap().bytes > 0 || one.gc().unwrap().segments == 0);
    let report = two.fsck().unwrap();
    assert!(report.findings.is_empty() && report.checkpoints == 3, "{report:?}");
    assert_eq!(two.gc().unwrap().segments, 0, "nothing is left to be given back");
}

/// Disk is promised only by servers that sync what they store.
#[test]
fn servers_are_asked_whether_they_sync() {
    let dir = tempfile::tempdir().unwrap();
    let servers = Servers::start(&program(), dir.path(), 1).unwrap();
    let url = servers.url("s");
    let (plain, monitor) = url.split_once("&monitor=").unwrap();
    let open = |url: &str, durability| {
        url.parse::<Location>().unwrap().open().and_then(|store| store.open(&name("a"), &options(durability)).map(drop))
    };
    open(&url, Durability::Disk).unwrap();
    open(&format!("{plain}&sync=always"), Durability::Disk).unwrap();
    let e = open(plain, Durability::Disk).unwrap_err();
    assert!(e.to_string().contains("sync_interval: always"), "{e}");
    open(plain, Durability::Cache).unwrap();
    // Servers that do not say so: the same, with another configuration.
    let config = dir.path().join("n0/config");
    let text = std::fs::read_to_string(&config).unwrap().replace(", sync_interval: always", "");
    std::fs::write(&config, text).unwrap();
    let mut servers = servers;
    servers.kill(0).unwrap();
    servers.restart(0).unwrap();
    let e = open(&format!("{plain}&monitor={monitor}"), Durability::Disk).unwrap_err();
    assert!(e.to_string().contains("has no `sync_interval: always`"), "{e}");
}

/// A unit is opened, at level disk, while one server is down: a supervisor that takes over must not wait for that one.
///
/// Break it: have every server answer before a unit is opened (`monitor::check_sync`).
#[test]
fn a_unit_is_opened_while_a_server_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let mut servers = Servers::start(&program(), dir.path(), 3).unwrap();
    let first = store(&servers, "s");
    let unit = first.open(&name("a"), &options(Durability::Disk)).unwrap();
    unit.append(Batch::of(0, ["first"])).unwrap();
    unit.wait(0, LONG).unwrap();
    for down in 0..3 {
        servers.kill(down).unwrap();
        let next = store(&servers, "s");
        let unit = next.open(&name("a"), &options(Durability::Disk)).unwrap();
        unit.append(Batch::of(down as u64 + 1, ["next"])).unwrap();
        unit.wait(down as u64 + 1, LONG).unwrap();
        servers.restart(down).unwrap();
    }
}

/// A unit's entry that contradicts itself. Break it: leave out `Entry::check`.
#[test]
fn an_entry_that_contradicts_itself_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let servers = Servers::start(&program(), dir.path(), 1).unwrap();
    let store = store(&servers, "s");
    for unit in ["a", "b"] {
        store.open(&name(unit), &options(Durability::Cache)).unwrap().release().unwrap();
    }
    // Format; name, epoch, no holder, ttl, first, next, no tables; swept, removed.
    let entry = [1, 1, b'a', 1, 0, 0, 9, 3, 0, 0, 0];
    let url = servers.url("s");
    let address = url.strip_prefix("nats://").unwrap().split('/').next().unwrap();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let (head, tail) = (format!("CONNECT {{\"verbose\":false}}\r\nPUB s.unit.a {}\r\n", entry.len()), "\r\nPING\r\n");
    stream.write_all(&[head.as_bytes(), &entry, tail.as_bytes()].concat()).unwrap();
    let mut said = String::new();
    while !said.contains("PONG") {
        let mut part = [0; 4096];
        let n = stream.read(&mut part).unwrap();
        assert!(n > 0, "{said}");
        said += &String::from_utf8_lossy(&part[..n]);
    }
    let want = "begins at event 9 and ends before event 3";
    // The message is stored a little after the server has taken it.
    let began = Instant::now();
    let refused = loop {
        match store.open(&name("a"), &options(Durability::Cache)) {
            Err(e) => break e.to_string(),
            Ok(_) => assert!(began.elapsed() < LONG),
        }
    };
    assert!(refused.contains(want) && refused.contains("s.unit.a"), "{refused}");
    let report = store.fsck().unwrap();
    let [found] = &report.findings[..] else { panic!("{report:?}") };
    assert!(found.what.contains(want) && found.lost == "unit a", "{found}");
    store.open(&name("b"), &options(Durability::Cache)).unwrap();
}
