//! Control states that cannot have come about, with every checksum right: a fault of a program, or of memory before the
//! checksum was made. None is opened, and fsck says why.

use std::sync::Arc;

use super::small;
use crate::disk::Disk;
use crate::disk::fault::FaultDisk;
use crate::engine::frame::{HEAD_BYTES, Head, Kind, body_crc, frame_bytes};
use crate::engine::recover::{CLEAN, Loaded, load};
use crate::engine::spares::Spares;
use crate::engine::stream::{Bodies, Which};
use crate::engine::{Engine, begin, lock};
use crate::state::{Control, State, Table, Unit};
use crate::{Batch, Durability, Error, NewCheckpoint, OpenOptions, Page, StableStore, UnitName};

fn options() -> OpenOptions {
    OpenOptions { holder: "t".into(), ttl: std::time::Duration::ZERO, durability: Durability::Disk }
}

/// A store with units `a` (number 1) and `b` (number 2), both with events 0..3; `a` has checkpoints at 1 (table 3) and, changing
/// that, at 2 (table 4).
fn open_store() -> (FaultDisk, Engine) {
    let disk = FaultDisk::new(1);
    let engine = Engine::on(Arc::new(disk.clone()), small()).unwrap();
    let [a, b] = ["a", "b"].map(|name| engine.open(&UnitName::new(name).unwrap(), &options()).unwrap());
    for unit in [&a, &b] {
        unit.append(Batch::of(0, ["x", "y", "z"])).unwrap();
    }
    for (sii, parent) in [(1, None), (2, Some(1))] {
        let pages: &[(u64, Page)] = &[(0, [sii as u8; 4096])];
        a.put_checkpoint(&NewCheckpoint { sii, parent, manifest: b"m", gone: &[], pages: &pages }).unwrap();
    }
    (disk, engine)
}

fn stored() -> FaultDisk {
    let (disk, engine) = open_store();
    engine.close().unwrap();
    disk
}

fn contents(disk: &FaultDisk) -> Vec<(String, Option<Vec<u8>>)> {
    disk.list().unwrap().into_iter().map(|name| (name.clone(), disk.content(&name))).collect()
}

/// Neither opened nor passed over, and left as it is.
fn is_refused(disk: &FaultDisk, want: &str) {
    let before = contents(disk);
    let error = Engine::on(Arc::new(disk.clone()), small()).expect_err(want);
    assert!(matches!(&error, Error::Contradiction { .. }), "{want}: {error}");
    let message = error.to_string();
    assert!(message.contains(want) && message.contains("the test disk"), "wanted {want:?}: {message}");
    let report = Engine::fsck_on(disk).unwrap();
    let found = report.findings.iter().any(|f| f.what.contains(want) && f.lost.contains("which units there are"));
    assert!(found, "{want}: {report:?}");
    assert!(contents(disk) == before, "{want}: it was changed");
}

/// A closed store behind which a segment was begun with a state that `change` has changed.
fn with_state(change: impl FnOnce(&mut State)) -> FaultDisk {
    let disk = stored();
    disk.remove(CLEAN).unwrap();
    let on: Arc<dyn Disk> = Arc::new(disk.clone());
    let mut loaded: Loaded = load(&*on, None, Bodies::Keys).unwrap();
    change(&mut loaded.proven_state);
    let spares = Arc::new(Spares::new(on, 4 << 10, 16 << 10));
    begin(&spares, &mut loaded, Which::Log).unwrap();
    disk
}

fn unit(state: &mut State) -> &mut Unit {
    state.units.get_mut(&1).unwrap()
}

fn table(state: &mut State) -> &mut Table {
    unit(state).tables.get_mut(&4).unwrap()
}

#[test]
fn a_state_that_was_not_changed_is_opened() {
    let disk = with_state(|_| {});
    assert!(Engine::fsck_on(&disk).unwrap().findings.is_empty());
    let engine = Engine::on(Arc::new(disk), small()).unwrap();
    assert_eq!(engine.units().unwrap().iter().map(|u| u.log.clone()).collect::<Vec<_>>(), [0..3, 0..3]);
}

/// Break it: leave any one question out of `State::check` or `Unit::check`.
#[test]
fn a_state_that_contradicts_itself_is_refused() {
    type Change = fn(&mut State);
    let cases: [(&str, Change); 17] = [
        ("begins at event 9 and ends before event 3", |s| unit(s).first = 9),
        ("number 4 is none that was given out, the next one is 4", |s| s.next_id = 4),
        ("no number is left", |s| s.next_id = u64::MAX),
        ("number 0 is none", |s| {
            let unit = s.units.remove(&1).unwrap();
            s.units.insert(0, unit);
        }),
        ("number 2 was given out twice", |s| {
            let table = unit(s).tables.remove(&4).unwrap();
            unit(s).tables.insert(2, Table { parent: None, depth: 0, ..table });
        }),
        ("there are two of this name", |s| unit(s).name = "b".into()),
        ("unit name \"\"", |s| unit(s).name.clear()),
        ("no epoch is left", |s| unit(s).epoch = u64::MAX),
        ("nobody has ever opened it", |s| unit(s).epoch = 0),
        ("two checkpoints at event 2", |s| {
            let two = Table { parent: None, depth: 0, ..table(s).clone() };
            s.next_id = 9;
            unit(s).tables.insert(8, two);
        }),
        ("more bytes than any disk", |s| table(s).bytes = u64::MAX),
        ("changes table 7, which is not there", |s| table(s).parent = Some(7)),
        ("changes table 4, which is a later one", |s| table(s).parent = Some(4)),
        ("changes one at event 1, which is not before it", |s| table(s).sii = 1),
        ("is change number 7, and number 0 to another one", |s| table(s).depth = 7),
        ("is change number 1 to none", |s| table(s).parent = None),
        ("is change number 32, and number 31 to another one", |s| {
            for id in 5..40 {
                let next = Table { sii: id, parent: Some(id - 1), depth: id as u32 - 3, ..table(s).clone() };
                unit(s).tables.insert(id, next);
            }
            s.next_id = 40;
        }),
    ];
    for (want, change) in cases {
        is_refused(&with_state(change), want);
    }
}

/// Break it: apply what `State::admits` does not admit.
#[test]
fn a_record_that_contradicts_the_state_is_refused() {
    let name = |name: &str| UnitName::new(name).unwrap();
    let publish = |id, sii, parent, depth| {
        let table = Table { sii, parent, depth, hidden: false, pages: 1, bytes: 1 };
        Control::Publish { unit: 1, id, table }
    };
    let lease = |unit, epoch| Control::Lease { unit, epoch, holder: "x".into(), ttl_ms: 1 };
    for (want, control) in [
        ("made under number 2, which is not free", Control::Create { unit: 2, name: name("c") }),
        ("made under number 18446744073709551615", Control::Create { unit: u64::MAX, name: name("c") }),
        ("there are two of this name", Control::Create { unit: 50, name: name("a") }),
        ("epoch 1 cannot follow epoch 1", lease(1, 1)),
        ("epoch 18446744073709551615 cannot follow", lease(1, u64::MAX)),
        ("a lease of unit 9", lease(9, 5)),
        ("the end of a lease of unit 9", Control::Release { unit: 9 }),
        ("a truncation of unit 9", Control::Below { unit: 9, sii: 1 }),
        ("a truncation of unit 9", Control::From { unit: 9, sii: 1 }),
        ("checkpoints of unit 9", Control::Hide { unit: 9, below: 1 }),
        ("the removal of unit 9", Control::Remove { unit: 9 }),
        ("has number 4, which is not free", publish(4, 5, None, 0)),
        ("has number 2, which is not free", publish(2, 5, None, 0)),
        ("changes table 77, which is not there", publish(90, 5, Some(77), 1)),
        ("changes one at event 2", publish(90, 2, Some(4), 2)),
        ("is change number 9, and number 1 to another one", publish(90, 5, Some(4), 9)),
    ] {
        let (disk, engine) = open_store();
        {
            let queue = &engine.shared.queue;
            let mut inner = queue.room(0).unwrap();
            queue.control(&mut inner, control, Durability::Disk);
        }
        engine.close().unwrap();
        is_refused(&disk, want);
    }
}

#[test]
fn events_that_cannot_follow_are_refused() {
    for (want, number, first) in [
        ("events from 9 on, 1 of them, cannot follow 0..3", 1, 9),
        ("events from 2 on, 1 of them, cannot follow 0..3", 1, 2),
        ("events of unit 9, which is not there", 9, 0),
    ] {
        let (disk, engine) = open_store();
        {
            let queue = &engine.shared.queue;
            let batch = Batch::of(first, ["w"]);
            queue.append(&mut queue.room(0).unwrap(), number, &batch, body_crc(batch.body()), Durability::Disk);
        }
        engine.close().unwrap();
        is_refused(&disk, want);
    }
    let (disk, engine) = open_store();
    engine.close().unwrap();
    rewrite(&disk, Kind::Batch, |head, _| head.count = 0);
    is_refused(&disk, "events from 0 on, 0 of them, are none");
    rewrite(&disk, Kind::Batch, |head, _| (head.first, head.count) = (u64::MAX, 3));
    is_refused(&disk, "are more than there are numbers");
}

/// Changes the first frame of a kind in the log, and makes its checksums right.
fn rewrite(disk: &FaultDisk, kind: Kind, change: impl FnOnce(&mut Head, &mut [u8])) {
    let name = Which::file_name(Which::Log.first_number());
    disk.damage(&name, |bytes| {
        let mut at = 0;
        let mut head = loop {
            let head = Head::decode(&bytes[at..], Which::Log.first_number()).expect("a frame of this kind");
            if head.kind == kind {
                break head;
            }
            at += frame_bytes(head.len as usize);
        };
        let body = at + HEAD_BYTES..at + HEAD_BYTES + head.len as usize;
        change(&mut head, &mut bytes[body.clone()]);
        head.body_crc = body_crc(&bytes[body]);
        bytes[at..at + HEAD_BYTES].copy_from_slice(&head.encode());
    });
}

#[test]
fn bodies_that_cannot_be_read_are_refused() {
    for (kind, want) in [(Kind::Segment, "not a control state"), (Kind::Control, "not a control record")] {
        let disk = stored();
        rewrite(&disk, kind, |_, body| body.fill(0xff));
        is_refused(&disk, want);
    }
}

/// An idle log says where the units' logs end.
#[test]
fn a_mark_that_contradicts_the_log_is_refused() {
    for (byte, want) in [(2, "the log of unit \"a\" ends at 3, not at 4"), (0, "not a mark")] {
        let (disk, engine) = open_store();
        // It is written when the log has been idle.
        let name = Which::file_name(Which::Log.first_number());
        let marked = || {
            let (bytes, mut at) = (disk.content(&name).unwrap(), 0);
            while let Some(head) = Head::decode(&bytes[at..], Which::Log.first_number()) {
                if head.kind == Kind::Mark {
                    return true;
                }
                at += frame_bytes(head.len as usize);
            }
            false
        };
        while !marked() {
            std::thread::yield_now();
        }
        engine.close().unwrap();
        // Number of entries, then unit and end of each.
        rewrite(&disk, Kind::Mark, |_, body| body[byte] = if byte == 0 { 0x7f } else { body[byte] + 1 });
        is_refused(&disk, want);
    }
}

/// The first frame of a segment repeats what the one before it has said. When that one is gone nothing else says it. Break it:
/// open the store with the units that are known.
#[test]
fn a_store_whose_only_control_state_is_damaged_is_not_opened() {
    let (disk, engine) = open_store();
    engine.close().unwrap();
    let segments = || disk.list().unwrap().into_iter().filter(|n| Which::Log.number(n).is_some()).collect::<Vec<_>>();
    let engine = Engine::on(Arc::new(disk.clone()), small()).unwrap();
    engine.gc().unwrap();
    for name in ["a", "b"] {
        let unit = engine.open(&UnitName::new(name).unwrap(), &options()).unwrap();
        unit.truncate_below(3).unwrap();
        unit.append(Batch::of(3, ["w"])).unwrap();
        unit.wait(3, std::time::Duration::from_secs(60)).unwrap();
    }
    engine.gc().unwrap();
    assert!(lock(&engine.shared.log_files).len() == 1, "{:?}", segments());
    engine.close().unwrap();
    let [only] = &segments()[..] else { panic!("{:?}", segments()) };
    assert!(Engine::fsck_on(&disk).unwrap().findings.is_empty());
    disk.damage(only, |bytes| bytes[HEAD_BYTES + 3] ^= 4);
    is_refused(&disk, "the control state is missing");
}
