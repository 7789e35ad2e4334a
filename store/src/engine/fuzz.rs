//! Stored bytes that were changed, with their checksums made right again: what the readers behind the checksums do.
//!
//! Whatever is stored, opening, checking and reading end, with an answer or an error.

use std::sync::Arc;
use std::time::Duration;

use super::frame::{HEAD_BYTES, Head, Kind, body_crc};
use super::stream::Which;
use super::{Engine, Options};
use crate::disk::Disk;
use crate::disk::fault::FaultDisk;
use crate::net::{Answer, Incoming, Op, Request, Response, encode};
use crate::table::TableBody;
use crate::{Batch, Durability, NewCheckpoint, OpenOptions, Page, StableStore, UnitName, each_record};

/// A reader, and a function that lets it read what follows from a seed. It panics if the reader is wrong.
pub type Target = (&'static str, fn(u64));

/// All of them.
pub const TARGETS: [Target; 3] = [("wire", wire), ("segments", segments), ("table", table)];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) % n.max(1) as u64).expect("below a usize")
    }

    fn mutate(&mut self, bytes: &mut [u8]) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.below(bytes.len());
            match self.below(4) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                2 => bytes[at..].fill([0, 0xff][self.below(2)]),
                _ => {
                    let to = self.below(at + 1);
                    bytes.copy_within(at.., to);
                }
            }
        }
    }
}

fn wire(seed: u64) {
    let mut random = Random(seed);
    let mut stream = Vec::new();
    for id in 0..4 {
        let from = stream.len();
        let handle = 3;
        match random.below(5) {
            0 => encode(&mut stream, &Request { id, op: Op::Append { handle, first: 9, count: 2 } }, &[1; 30]),
            1 => encode(&mut stream, &Request { id, op: Op::Pages { handle, sii: 5, range: 0..9 } }, &[]),
            2 => encode(&mut stream, &Response::Acknowledged(vec![(1, 2), (3, 4)]), &[]),
            3 => {
                let answer = Answer::Pages { pages: vec![(4096, true)], next: Some(7) };
                encode(&mut stream, &Response::Reply { id, result: Ok(answer) }, &[0; 4096]);
            }
            _ => encode(&mut stream, &Request { id, op: Op::Units }, &[]),
        }
        random.mutate(&mut stream[from + 8..]);
        if random.below(8) > 0 {
            let crc = body_crc(&stream[from + 8..]);
            stream[from + 4..from + 8].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let mut requests = Incoming::default();
    let mut responses = Incoming::default();
    let cut = 1 + random.below(90);
    for part in stream.chunks(cut) {
        requests.push(part);
        while let Ok(Some((request, bytes))) = requests.next::<Request>(1 << 16) {
            if let Op::Append { first, count, .. } = request.op
                && let Ok(batch) = Batch::parse(first, count, bytes)
            {
                assert_eq!(batch.records().count(), count as usize);
            }
        }
        responses.push(part);
        while let Ok(Some(_)) = responses.next::<Response>(1 << 16) {}
    }
}

fn table(seed: u64) {
    let mut random = Random(seed);
    let range = |random: &mut Random| {
        let from = random.below(50) as u64 * 4096;
        from..from + 4096
    };
    let table = TableBody {
        parent: Some(1 + random.below(3) as u64),
        gone: (0..random.below(3)).map(|_| range(&mut random)).collect(),
        zero: (0..random.below(3)).map(|_| range(&mut random)).collect(),
        pages: (0..random.below(5) as u64).map(|n| (n * 4096, [7; 32])).collect(),
        manifest: vec![1; random.below(20)],
    };
    let mut bytes = table.encode().expect("small");
    random.mutate(&mut bytes);
    if let Some(table) = TableBody::decode(&bytes) {
        let mut all = std::collections::BTreeMap::new();
        table.apply(&(0..u64::MAX), &mut all);
        assert_eq!(table.encode().expect("small"), bytes);
    }
}

fn options() -> Options {
    let background = false;
    Options { segment_bytes_first: 4 << 10, segment_bytes_max: 8 << 10, background, ..Options::default() }
}

/// A store with something of everything.
fn stored(random: &mut Random) -> FaultDisk {
    let disk = FaultDisk::new(random.0);
    let engine = Engine::on(Arc::new(disk.clone()), options()).expect("an empty disk");
    let opening = OpenOptions { holder: "f".into(), ttl: Duration::from_secs(9), durability: Durability::Cache };
    for n in 0..2 {
        let name = UnitName::new(format!("unit-{n}")).expect("a name");
        let unit = engine.open(&name, &opening).expect("opened");
        let mut parent = None;
        for sii in 0..(5 + random.below(20) as u64) {
            unit.append(Batch::of(sii, [vec![7; random.below(500)]])).expect("appended");
            if random.below(6) == 0 {
                let pages: &[(u64, Page)] = &[(sii * 4096, [sii as u8 + 1; 4096]), (4096 * 99, [0; 4096])];
                let new = NewCheckpoint { sii, parent, manifest: b"m", gone: &[], pages: &pages };
                unit.put_checkpoint(&new).expect("stored");
                parent = Some(sii);
                if random.below(3) == 0 {
                    unit.collect(sii, 0).expect("collected");
                }
            }
        }
    }
    engine.close().expect("closed");
    disk
}

fn segments(seed: u64) {
    let mut random = Random(seed);
    let disk = stored(&mut random);
    let mut names = disk.list().expect("listed");
    names.retain(|n| n.starts_with("log-") || n.starts_with("pack-"));
    for _ in 0..=random.below(3) {
        let name = &names[random.below(names.len())];
        let number = Which::Log.number(name).or(Which::Pack.number(name)).expect("a segment");
        disk.damage(name, |bytes| {
            let (mut at, mut frames) = (0, Vec::new());
            while let Some(head) = bytes.get(at..).and_then(|b| Head::decode(b, number)) {
                frames.push((at, head));
                at += head.frame_bytes();
            }
            if frames.is_empty() {
                return;
            }
            let (at, mut head) = frames[random.below(frames.len())];
            let body = at + HEAD_BYTES..at + HEAD_BYTES + head.len as usize;
            if random.below(3) > 0 {
                random.mutate(&mut bytes[body.clone()]);
            } else {
                // What the header says.
                let mut parts = [head.unit, head.first, u64::from(head.count), head.durable].map(u64::to_le_bytes);
                random.mutate(parts.as_flattened_mut());
                let [unit, first, count, durable] = parts.map(u64::from_le_bytes);
                (head.unit, head.first, head.count, head.durable) = (unit, first, count as u32, durable);
            }
            head.body_crc = body_crc(&bytes[body.clone()]);
            if head.kind == Kind::Pages {
                let keys = body.start..body.end.min(body.start + (head.count as usize).saturating_mul(32));
                head.keys_crc = body_crc(&bytes[keys]);
            }
            bytes[at..at + HEAD_BYTES].copy_from_slice(&head.encode());
        });
    }
    drop(Engine::fsck_on(&disk));
    let Ok(engine) = Engine::on(Arc::new(disk), options()) else { return };
    for info in engine.units().unwrap_or_default() {
        let Ok(unit) = engine.view(&info.name) else { continue };
        drop(each_record(&*unit, info.log.start, &mut |_, _| Ok(())));
        for sii in info.checkpoints {
            drop(unit.manifest(sii));
            drop(unit.pages(sii, 0..u64::MAX, &mut |_, _| Ok(())));
        }
        let opening = OpenOptions { holder: "g".into(), ttl: Duration::ZERO, durability: Durability::Disk };
        if let Ok(unit) = engine.open(&info.name, &opening) {
            drop(unit.append(Batch::of(info.log.end, ["more"])));
            drop(unit.collect(u64::MAX, 0));
        }
    }
    drop(engine.gc());
    drop(engine.fsck());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A first part of what `cargo xtask fuzz` runs for long, and all that it has found.
    #[test]
    fn seeds_that_were_kept_and_some_more() {
        for (name, target) in TARGETS {
            (0..300).for_each(target);
            let kept = include_str!("../../fuzz-seeds");
            for line in kept.lines().filter(|line| !line.starts_with('#')) {
                let (of, seed) = line.split_once(' ').expect("target and seed");
                if of == name {
                    target(seed.parse().expect("a number"));
                }
            }
        }
    }
}
