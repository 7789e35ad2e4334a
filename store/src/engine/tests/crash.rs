//! Random work, a crash at any point, and what must be there afterwards.
//!
//! The changes of a unit have one order in the log. So after a crash a unit must be as after some prefix of the
//! changes that were made, and that prefix must have everything that was acknowledged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::small;
use crate::disk::fault::{FaultDisk, Faults};
use crate::engine::{Engine, Options};
use crate::{
    Batch, Durability, Error, NewCheckpoint, OpenOptions, Page, StableStore, UnitName, UnitStore, each_record,
};

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n.max(1)
    }
}

type Pages = BTreeMap<u64, u64>;

#[derive(Clone)]
enum Change {
    Append(u64, Vec<Vec<u8>>),
    Below(u64),
    From(u64),
    Hide(u64),
    Publish(u64, Pages),
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Append(first, records) => write!(f, "Append({first}, {} records)", records.len()),
            Self::Below(sii) => write!(f, "Below({sii})"),
            Self::From(sii) => write!(f, "From({sii})"),
            Self::Hide(below) => write!(f, "Hide({below})"),
            Self::Publish(sii, pages) => write!(f, "Publish({sii}, {} pages)", pages.len()),
        }
    }
}

/// A unit as it must be.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    first: u64,
    records: Vec<Vec<u8>>,
    checkpoints: BTreeMap<u64, Pages>,
}

impl Model {
    fn next(&self) -> u64 {
        self.first + self.records.len() as u64
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Append(first, records) => {
                if self.records.is_empty() {
                    self.first = *first;
                }
                self.records.extend(records.iter().cloned());
            }
            Change::Below(sii) if *sii >= self.next() => {
                self.first = *sii;
                self.records.clear();
            }
            Change::Below(sii) => {
                let drop = sii.saturating_sub(self.first) as usize;
                self.records.drain(..drop);
                self.first += drop as u64;
            }
            Change::From(sii) => self.records.truncate(sii.saturating_sub(self.first) as usize),
            Change::Hide(below) => self.checkpoints = self.checkpoints.split_off(below),
            Change::Publish(sii, pages) => drop(self.checkpoints.insert(*sii, pages.clone())),
        }
    }

    /// What is there, with every record and page compared to what it says itself.
    pub(super) fn read(unit: &dyn UnitStore) -> Result<Self, Error> {
        let log = unit.log()?;
        let mut model = Self { first: log.start, ..Self::default() };
        each_record(unit, log.start, &mut |_, record| {
            model.records.push(record.to_vec());
            Ok(())
        })?;
        assert_eq!(model.next(), log.end);
        for info in unit.checkpoints()? {
            assert_eq!(unit.manifest(info.sii)?, info.sii.to_le_bytes());
            let mut pages = Pages::new();
            unit.pages(info.sii, 0..u64::MAX, &mut |address, page| {
                let seed = page.map_or(0, |p| u64::from_le_bytes(*p.first_chunk().expect("a page")));
                assert_eq!(page.copied(), (seed > 0).then(|| page_of(seed)));
                pages.insert(address / 4096, seed);
                Ok(())
            })?;
            model.checkpoints.insert(info.sii, pages);
        }
        Ok(model)
    }
}

fn page_of(seed: u64) -> Page {
    let mut page = [0; 4096];
    let mut random = Random(seed);
    for word in page[..600].as_chunks_mut::<8>().0 {
        *word = random.below(u64::MAX).to_le_bytes();
    }
    page[..8].copy_from_slice(&seed.to_le_bytes());
    page
}

#[derive(Debug, Default)]
struct Tracked {
    /// As of the last acknowledgement.
    sure: Model,
    /// Made since, in order.
    unsure: Vec<Change>,
}

impl Tracked {
    fn made(&self) -> Model {
        let mut model = self.sure.clone();
        self.unsure.iter().for_each(|change| model.apply(change));
        model
    }

    fn acknowledged(&mut self) {
        self.sure = self.made();
        self.unsure.clear();
    }

    /// The record of `sii` is acknowledged, and so is what was made before it; not a truncation behind it.
    fn acknowledged_record(&mut self, sii: u64) {
        let holds =
            |c: &Change| matches!(c, Change::Append(first, r) if (*first..first + r.len() as u64).contains(&sii));
        if let Some(last) = self.unsure.iter().rposition(holds) {
            self.unsure.drain(..=last).for_each(|change| self.sure.apply(&change));
        }
    }

    /// Takes over what was found, which must be a prefix of what was made.
    fn found(&mut self, found: &Model, context: &str) {
        let mut model = self.sure.clone();
        let mut fits = model == *found;
        for change in &self.unsure {
            model.apply(change);
            fits |= model == *found;
        }
        let brief = |m: &Model| format!("{}..{}, {:?}", m.first, m.next(), m.checkpoints.keys());
        assert!(fits, "{context}: found {}, sure is {}, then {:?}", brief(found), brief(&self.sure), self.unsure);
        *self = Self { sure: found.clone(), unsure: Vec::new() };
    }
}

/// Three units and somebody who works on them.
pub(super) struct Work {
    pub(super) disk: FaultDisk,
    options: Options,
    durability: Durability,
    random: Random,
    units: [Tracked; 3],
    version: u64,
}

fn name(n: usize) -> UnitName {
    UnitName::new(format!("unit-{n}")).expect("a name")
}

impl Work {
    pub(super) fn new(seed: u64, durability: Durability) -> Self {
        let mut random = Random(seed);
        let idle = Duration::from_millis([0, 20][random.below(2) as usize]);
        let options = Options { idle, background: random.below(4) == 0, ..small() };
        let units = Default::default();
        Self { disk: FaultDisk::new(seed), options, durability, random, units, version: 0 }
    }

    pub(super) fn open(&self) -> Result<Engine, Error> {
        Engine::on(Arc::new(self.disk.clone()), self.options.clone())
    }

    /// Works until it is done or something fails.
    pub(super) fn work(&mut self, steps: u64) -> Result<(), Error> {
        let engine = self.open()?;
        let options = OpenOptions { holder: "t".into(), ttl: Duration::from_secs(9), durability: self.durability };
        let mut handles = Vec::new();
        for n in 0..self.units.len() {
            handles.push(engine.open(&name(n), &options)?);
        }
        for _ in 0..steps {
            let n = self.random.below(3) as usize;
            self.step(n, &*handles[n], &engine)?;
        }
        if self.random.below(2) == 0 {
            engine.close()?;
            self.units.iter_mut().for_each(Tracked::acknowledged);
        }
        Ok(())
    }

    fn step(&mut self, n: usize, unit: &dyn UnitStore, engine: &Engine) -> Result<(), Error> {
        let (random, tracked) = (&mut self.random, &mut self.units[n]);
        let made = tracked.made();
        match random.below(20) {
            0..10 => {
                let records: Vec<Vec<u8>> = (0..=random.below(4))
                    .map(|_| {
                        self.version += 1;
                        let mut record = self.version.to_le_bytes().to_vec();
                        record.resize(8 + random.below(700) as usize, self.version as u8);
                        record
                    })
                    .collect();
                let skip = if made.records.is_empty() { random.below(3) } else { 0 };
                tracked.unsure.push(Change::Append(made.next() + skip, records.clone()));
                let batch = Batch::of(made.next() + skip, records);
                if random.below(3) > 0 {
                    unit.append(batch)?;
                } else {
                    let last = batch.next() - 1;
                    unit.commit(batch, Duration::from_secs(60))?;
                    tracked.acknowledged_record(last);
                }
            }
            10..14 if !made.records.is_empty() => {
                unit.wait(made.next() - 1, Duration::from_secs(60))?;
                tracked.acknowledged_record(made.next() - 1);
            }
            14 => {
                let sii = made.first + random.below(made.records.len() as u64 + 3);
                tracked.unsure.push(Change::Below(sii));
                unit.truncate_below(sii)?;
            }
            15 => {
                let sii = made.next().saturating_sub(random.below(6));
                tracked.unsure.push(Change::From(sii));
                unit.truncate_from(sii)?;
            }
            16 | 17 => {
                let newest = made.checkpoints.last_key_value();
                let parent = newest.filter(|_| random.below(4) > 0).map(|(sii, pages)| (*sii, pages.clone()));
                let sii = newest.map_or(0, |(sii, _)| *sii) + 1 + random.below(3);
                let mut all = parent.as_ref().map_or_else(Pages::new, |(_, pages)| pages.clone());
                let gone = random.below(40);
                all.retain(|page, _| !(gone..gone + 3).contains(page));
                let mut changed = BTreeMap::new();
                for _ in 0..random.below(40) {
                    let seed = random.below(60);
                    changed.insert(random.below(50), seed);
                }
                all.extend(&changed);
                tracked.unsure.push(Change::Publish(sii, all));
                let page = |seed: u64| if seed == 0 { [0; 4096] } else { page_of(seed) };
                let pages: Vec<(u64, Page)> = changed.iter().map(|(n, seed)| (n * 4096, page(*seed))).collect();
                unit.put_checkpoint(&NewCheckpoint {
                    sii,
                    parent: parent.map(|(sii, _)| sii),
                    manifest: &sii.to_le_bytes(),
                    gone: std::slice::from_ref(&(gone * 4096..(gone + 3) * 4096)),
                    pages: &&pages[..],
                })?;
                tracked.acknowledged();
            }
            18 => {
                let spare = random.below(2) as usize;
                let checkpoints: Vec<u64> = made.checkpoints.keys().copied().collect();
                if let Some(newest) = checkpoints.len().checked_sub(1) {
                    let oldest = checkpoints[newest - spare.min(newest)];
                    tracked.unsure.push(Change::Hide(oldest));
                    if oldest + 1 > made.first {
                        tracked.unsure.push(Change::Below((oldest + 1).min(made.next())));
                    }
                }
                unit.collect(u64::MAX, spare)?;
            }
            _ => drop(engine.gc()?),
        }
        Ok(())
    }

    /// Opens the store after a crash and compares; the disk may fail while that is done.
    pub(super) fn check(&mut self, context: &str) -> Result<(), Error> {
        let engine = self.open()?;
        assert!(engine.damage().is_empty(), "{context}: {:?}", engine.damage());
        for n in 0..self.units.len() {
            let found = match engine.view(&name(n)) {
                Ok(view) => Model::read(&*view)?,
                Err(Error::NoUnit { .. }) => Model::default(),
                Err(e) => return Err(e),
            };
            self.units[n].found(&found, &format!("{context}, unit {n}"));
        }
        let report = engine.fsck()?;
        assert!(report.findings.is_empty(), "{context}: {:?}", report.findings);
        Ok(())
    }
}

/// Runs until the process dies in an operation, then looks. Dies in looking, too, now and then.
fn crash(seed: u64, durability: Durability, power: bool, steps: u64, at: Option<u64>) -> u64 {
    let mut work = Work::new(seed, durability);
    let mut first = 0;
    for round in 0..3 {
        let context = format!("seed {seed}, {durability:?}, power {power}, at {at:?}, round {round}");
        let die_at = at.filter(|_| round == 0).or_else(|| (at.is_none()).then(|| work.random.below(150)));
        work.disk.arm(Faults { die_at, ..Faults::default() });
        // Whatever fails is the crash; what must be there is looked at afterwards.
        let worked = work.work(steps);
        if round == 0 {
            first = work.disk.operations();
        }
        let dies = work.random.below(3) == 0;
        for again in 0..=u64::from(dies) {
            if power {
                work.disk.lose_power();
            } else {
                work.disk.kill();
            }
            if dies && again == 0 {
                let die_at = Some(work.random.below(12));
                work.disk.arm(Faults { die_at, ..Faults::default() });
                drop(work.open());
            } else {
                work.check(&context).unwrap_or_else(|e| panic!("{context}: {e}; worked: {worked:?}"));
            }
        }
    }
    first
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse().ok());
    let first = number("FTRUN_TEST_SEED").unwrap_or(1);
    first..first + number("FTRUN_TEST_RUNS").unwrap_or(default)
}

/// Break it: acknowledge before the sync; go on in the segment that was found; do not write the tail again.
#[test]
fn nothing_acknowledged_is_lost_without_power() {
    for seed in seeds(250) {
        crash(seed, Durability::Disk, true, 60, None);
    }
}

/// Break it: acknowledge before the write.
#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    for seed in seeds(150) {
        crash(seed, Durability::Cache, false, 60, None);
        crash(seed, Durability::Disk, false, 60, None);
    }
}

#[test]
fn a_crash_in_every_operation() {
    for seed in [7, 8] {
        let operations = crash(seed, Durability::Disk, true, 50, Some(u64::MAX));
        assert!(operations > 50, "{operations}");
        for at in 0..operations {
            crash(seed, Durability::Disk, true, 50, Some(at));
        }
    }
}
