//! SIGKILL at random instants of a real process under load.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use ftrun_store::{
    Batch, Durability, Engine, EngineOptions, NewCheckpoint, OpenOptions, Page, StableStore, UnitName, each_record,
};

const LONG: Duration = Duration::from_secs(60);
const UNITS: u64 = 4;

fn options() -> EngineOptions {
    EngineOptions { segment_bytes_first: 32 << 10, segment_bytes_max: 128 << 10, ..EngineOptions::default() }
}

fn record(unit: u64, sii: u64) -> Vec<u8> {
    let mut bytes = format!("{unit} {sii} ").into_bytes();
    bytes.resize(20 + (sii % 300) as usize, b'.');
    bytes
}

fn page(sii: u64) -> Page {
    let mut page = [0; 4096];
    page[..8].copy_from_slice(&(sii + 1).to_le_bytes());
    page
}

/// The process that is killed: prints what has been acknowledged.
#[test]
#[ignore = "run by the test below"]
fn writer() {
    let Some(dir) = std::env::var_os("FTRUN_TEST_STORE") else { return };
    let engine = Engine::open(Path::new(&dir), options()).unwrap();
    assert!(engine.damage().is_empty(), "{:?}", engine.damage());
    std::thread::scope(|scope| {
        for n in 0..UNITS {
            let engine = &engine;
            scope.spawn(move || {
                let durability = if n % 2 == 0 { Durability::Disk } else { Durability::Cache };
                let options = OpenOptions { holder: "writer".into(), ttl: LONG, durability };
                let unit = engine.open(&UnitName::new(format!("unit-{n}")).unwrap(), &options).unwrap();
                let mut at = unit.log().unwrap().end;
                let mut parent = unit.checkpoints().unwrap().last().map(|c| c.sii);
                loop {
                    let next = at + 1 + at % 5;
                    let batch = Batch::of(at, (at..next).map(|sii| record(n, sii)));
                    at = next;
                    let told = at.is_multiple_of(3);
                    let stored = if told { unit.commit(batch, LONG) } else { unit.append(batch) };
                    stored.unwrap();
                    if told {
                        println!("acknowledged {n} {}", at - 1);
                    }
                    if at.is_multiple_of(50) {
                        let pages: &[(u64, Page)] = &[(at % 64 * 4096, page(at))];
                        let manifest = at.to_le_bytes();
                        let new = NewCheckpoint { sii: at, parent, manifest: &manifest, gone: &[], pages: &pages };
                        if parent.is_none_or(|p| p < at) {
                            unit.put_checkpoint(&new).unwrap();
                            println!("checkpoint {n} {at}");
                            parent = Some(at);
                            unit.collect(at, 1).unwrap();
                        }
                    }
                }
            });
        }
    });
}

/// Break it: acknowledge before writing; skip the mark or the tail at recovery.
#[test]
fn a_killed_process_has_lost_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let kills = std::env::var("FTRUN_TEST_KILLS").ok().and_then(|k| k.parse().ok()).unwrap_or(25);
    let mut acknowledged = [None::<u64>; UNITS as usize];
    let mut checkpoint = [None::<u64>; UNITS as usize];
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "writer", "--nocapture"])
            .env("FTRUN_TEST_STORE", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // The instant is drawn from the work itself, and by the scheduler.
        let stop_after = kill * 37 % 400;
        let mut seen = 0;
        for line in lines.by_ref().map_while(Result::ok) {
            let mut words = line.split(' ');
            let (what, numbers): (_, Vec<u64>) = (words.next(), words.filter_map(|w| w.parse().ok()).collect());
            match (what, &numbers[..]) {
                (Some("acknowledged"), [unit, sii]) => acknowledged[*unit as usize] = Some(*sii),
                (Some("checkpoint"), [unit, sii]) => checkpoint[*unit as usize] = Some(*sii),
                _ => continue,
            }
            seen += 1;
            if seen == stop_after.max(1) {
                child.kill().unwrap();
            }
        }
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "it failed by itself: {status}");
        let engine = Engine::open(dir.path(), options()).unwrap();
        assert!(engine.damage().is_empty(), "kill {kill}: {:?}", engine.damage());
        for n in 0..UNITS {
            let Ok(view) = engine.view(&UnitName::new(format!("unit-{n}")).unwrap()) else {
                assert_eq!(acknowledged[n as usize], None);
                continue;
            };
            let log = view.log().unwrap();
            let sure = acknowledged[n as usize].map_or(0, |sii| sii + 1);
            assert!(log.end >= sure, "kill {kill}: unit {n} ends at {}, {sure} were acknowledged", log.end);
            let mut at = log.start;
            each_record(&*view, log.start, &mut |sii, bytes| {
                assert_eq!((sii, bytes), (at, &record(n, at)[..]));
                at += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(at, log.end);
            let checkpoints = view.checkpoints().unwrap();
            let newest = checkpoints.last().map(|c| c.sii);
            assert!(newest >= checkpoint[n as usize], "kill {kill}: {newest:?} {checkpoint:?}");
            if let Some(newest) = newest {
                assert!(log.start <= newest + 1, "events behind the checkpoint are there");
                assert_eq!(view.manifest(newest).unwrap(), newest.to_le_bytes());
                let mut found = false;
                view.pages(newest, 0..u64::MAX, &mut |address, got| {
                    found |= address == newest % 64 * 4096 && got == Some(&page(newest));
                    Ok(())
                })
                .unwrap();
                assert!(found);
            }
        }
        let report = engine.fsck().unwrap();
        assert!(report.findings.is_empty(), "kill {kill}: {:?}", report.findings);
        engine.close().unwrap();
    }
    assert!(acknowledged.iter().all(|a| *a > Some(100)), "{acknowledged:?}");
}
