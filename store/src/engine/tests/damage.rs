//! Bytes that change by themselves.

use std::sync::Arc;

use super::crash::{Random, Work};
use super::small;
use crate::disk::Disk;
use crate::disk::fault::{FaultDisk, SECTOR_BYTES};
use crate::engine::Engine;
use crate::engine::recover::load;
use crate::engine::stream::Bodies;
use crate::{Durability, Error, StableStore};

/// Units of [`Work`].
const UNITS: usize = 3;

/// A store that was worked on and closed.
fn stored(seed: u64) -> FaultDisk {
    let mut work = Work::new(seed, Durability::Disk);
    while work.disk.list().unwrap().iter().all(|n| n != "clean") {
        work.work(60).unwrap();
    }
    work.disk
}

/// Every file that counts, and how many of its bytes do.
fn parts(disk: &FaultDisk) -> Vec<(String, u64)> {
    let loaded = load(disk, None, Bodies::All).unwrap();
    let mut parts = vec![("clean".to_owned(), disk.content("clean").unwrap().len() as u64)];
    for found in [&loaded.log, &loaded.pack] {
        parts.extend(found.segments.iter().map(|(n, (_, end))| (crate::engine::stream::Which::file_name(*n), *end)));
    }
    parts
}

/// What can be read is right; what cannot is said. Opening and reading never panics. Gives false if the store is not opened
/// because nothing says any more which units there are.
fn survives(disk: &FaultDisk, context: &str) -> bool {
    let engine = match Engine::on(Arc::new(disk.copy(1)), small()) {
        Ok(engine) => engine,
        Err(Error::Contradiction { .. }) => return false,
        Err(e) => panic!("{context}: {e}"),
    };
    // A unit is lost only with a record of its making, which is said.
    if !engine.damage().iter().any(|f| f.file.starts_with("log") && f.what != "checksum of a batch") {
        assert_eq!(engine.units().unwrap().len(), UNITS, "{context}: {:?}", engine.damage());
    }
    for info in engine.units().unwrap() {
        let unit = engine.view(&info.name).unwrap();
        // Records and pages say what they are, so this panics if wrong bytes are given out.
        let _ = super::crash::Model::read(&*unit);
    }
    true
}

/// Break it: leave the padding, or the header's spare bytes, out of the checks.
#[test]
fn every_flipped_bit_is_found() {
    let (mut flips, mut opened, mut refused) = (0, 0, 0);
    for seed in 1..4 {
        let disk = stored(seed);
        assert!(Engine::fsck_on(&disk).unwrap().findings.is_empty());
        for (file, end) in parts(&disk) {
            let mut random = Random(end);
            let mut at = 0;
            while at < end {
                let bit = random.below(8);
                let copy = disk.copy(1);
                copy.damage(&file, |bytes| bytes[at as usize] ^= 1 << bit);
                let report = Engine::fsck_on(&copy).unwrap();
                assert!(!report.findings.is_empty(), "seed {seed}: bit {bit} of byte {at} of {file} (of {end})");
                if flips % 8 == 0 {
                    match survives(&copy, &format!("seed {seed}: bit {bit} of byte {at} of {file}")) {
                        true => opened += 1,
                        false => refused += 1,
                    }
                }
                flips += 1;
                at += 1 + random.below(60);
            }
        }
    }
    assert!(flips > 1000 && opened > 20 * refused, "{flips} {opened} {refused}");
}

#[test]
fn every_zeroed_sector_is_found() {
    for seed in 1..6 {
        let disk = stored(seed);
        for (file, end) in parts(&disk) {
            for at in (0..end as usize).step_by(SECTOR_BYTES) {
                let copy = disk.copy(1);
                let mut changed = false;
                copy.damage(&file, |bytes| {
                    let to = bytes.len().min(at + SECTOR_BYTES);
                    changed = bytes[at..to.min(end as usize)].iter().any(|b| *b != 0);
                    bytes[at..to].fill(0);
                });
                let report = Engine::fsck_on(&copy).unwrap();
                assert_eq!(!report.findings.is_empty(), changed, "seed {seed}: sector at {at} of {file}: {report:?}");
                survives(&copy, &format!("seed {seed}: sector at {at} of {file}"));
            }
        }
    }
}

#[test]
fn a_missing_or_cut_file_is_found() {
    for seed in 1..6 {
        let disk = stored(seed);
        for (file, end) in parts(&disk) {
            let copy = disk.copy(1);
            copy.damage(&file, |bytes| bytes.truncate(end as usize / 2));
            assert!(!Engine::fsck_on(&copy).unwrap().findings.is_empty(), "seed {seed}: {file} cut");
            survives(&copy, &format!("seed {seed}: {file} cut"));
        }
    }
}

/// Break it: take a log of which nothing can be read for one that was never begun.
#[test]
fn a_closed_log_that_does_not_begin_is_said() {
    let disk = stored(1);
    for (file, _) in parts(&disk) {
        if file == "clean" || file.starts_with("log") {
            disk.damage(&file, |bytes| bytes.fill(0xa5));
        }
    }
    let report = Engine::fsck_on(&disk).unwrap();
    assert!(report.findings.iter().any(|f| f.file.starts_with("log")), "{:?}", report.findings);
    assert!(!survives(&disk, "nothing of the log is left"));
}

/// Arbitrary bytes in the place of files.
#[test]
fn any_bytes_are_judged() {
    let mut random = Random(5);
    for seed in 1..4 {
        let disk = stored(seed);
        for _ in 0..60 {
            let copy = disk.copy(1);
            for (file, end) in parts(&disk) {
                if random.below(2) == 0 {
                    copy.damage(&file, |bytes| {
                        for _ in 0..=random.below(20) {
                            let at = random.below(end) as usize;
                            match random.below(3) {
                                0 => bytes[at] = random.below(256) as u8,
                                1 => {
                                    let by = random.below((bytes.len() - at) as u64) as usize;
                                    bytes[at..].rotate_left(by);
                                }
                                _ => bytes.copy_within(at.., random.below(at as u64 + 1) as usize),
                            }
                        }
                    });
                }
            }
            drop(Engine::fsck_on(&copy));
            survives(&copy, "any bytes");
        }
    }
}
