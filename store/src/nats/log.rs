//! What the log of a unit is made of: messages on its subject in `NAME-log`.
//!
//! A *group* is what was queued while the one before it was under way: batches, each preceded by the number of its records and
//! the length of its body (u32, little endian). It is cut into as many messages as the servers' limit wants; it is stored
//! when its last part is. A *mark*, from where to the same place and without contents, says where the log ends from now on:
//! each writer begins with one, and so does what follows a cut.
//!
//! The head of a message is `epoch first next part parts crc`: the writer's epoch, the SIIs of the whole group, which part of
//! how many this is, and the CRC-32 of the contents in hexadecimal.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::cluster::{Cluster, Stored};
use crate::bytes::u32_at;
use crate::{Batch, Error, UnitName};

/// The head of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) epoch: u64,
    pub(super) first: u64,
    pub(super) next: u64,
    /// From 1.
    pub(super) part: u32,
    pub(super) parts: u32,
    pub(super) crc: u32,
}

impl Head {
    /// The log ends at `end`.
    pub(super) fn mark(epoch: u64, end: u64) -> Self {
        Self { epoch, first: end, next: end, part: 1, parts: 1, crc: 0 }
    }

    /// Judges any text.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (numbers, crc) = text.rsplit_once(' ')?;
        let numbers: Vec<u64> = numbers.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
        let [epoch, first, next, part, parts] = numbers[..] else { return None };
        let (part, parts) = (part.try_into().ok()?, parts.try_into().ok()?);
        let crc = u32::from_str_radix(crc, 16).ok()?;
        (first <= next && (1..=parts).contains(&part)).then_some(Self { epoch, first, next, part, parts, crc })
    }

    fn is_mark(&self) -> bool {
        self.first == self.next
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { epoch, first, next, part, parts, crc } = self;
        write!(f, "{epoch} {first} {next} {part} {parts} {crc:08x}")
    }
}

/// Where a group is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) first: u64,
    pub(super) next: u64,
    /// Numbers of its messages, and the checksums of their contents.
    pub(super) parts: Vec<(u64, u32)>,
    pub(super) bytes: u64,
}

/// What is stored of a log, from its messages in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    /// By first SII.
    groups: BTreeMap<u64, Group>,
    /// Where the log ends.
    pub(super) next: u64,
    /// The newest writer that has been seen.
    pub(super) epoch: u64,
    /// Number of the last message that was taken.
    pub(super) seen: u64,
    /// Parts of a group that is not whole.
    open: Option<Group>,
}

impl Index {
    /// Takes the next message. One of an older writer than was seen does not count.
    pub(super) fn take(&mut self, head: &Head, sequence: u64, bytes: u64) {
        self.seen = sequence;
        if head.epoch < self.epoch {
            return;
        }
        self.epoch = head.epoch;
        let open = self.open.take();
        if head.is_mark() {
            self.cut(head.next);
            self.next = head.next;
            return;
        }
        let mut group = match open {
            _ if head.part == 1 => Group { first: head.first, next: head.next, parts: Vec::new(), bytes: 0 },
            Some(group) if (group.first, group.next) == (head.first, head.next) => group,
            _ => return,
        };
        if group.parts.len() + 1 != head.part as usize {
            return;
        }
        group.parts.push((sequence, head.crc));
        group.bytes += bytes;
        if head.part < head.parts {
            self.open = Some(group);
            return;
        }
        self.cut(head.first);
        self.next = head.next;
        self.groups.insert(head.first, group);
    }

    /// Takes what has been stored since.
    pub(super) async fn refresh(&mut self, cluster: &Cluster, unit: &UnitName) -> Result<(), Error> {
        let subject = cluster.subject("log", unit);
        let Some(last) = cluster.last(&subject).await? else { return Ok(()) };
        let (mut strange, seen) = (None, self.seen);
        let mut take = |stored: Stored| match Head::parse(&stored.head) {
            Some(head) => self.take(&head, stored.sequence, stored.bytes),
            None => strange = Some(stored.sequence),
        };
        if last.sequence > seen {
            cluster.scan(&cluster.log, &subject, seen + 1, last.sequence, &mut take).await?;
        }
        let what = "a message that is none of a log".to_owned();
        strange.map_or(Ok(()), |at| Err(Error::Damaged { file: subject, offset: at, what }))
    }

    /// Drops the records from `sii` on.
    fn cut(&mut self, sii: u64) {
        drop(self.groups.split_off(&sii));
        if let Some(mut last) = self.groups.last_entry() {
            let last = last.get_mut();
            last.next = last.next.min(sii);
        }
    }

    /// The SIIs of the records that are stored, of which those below `first` have been dropped.
    pub(super) fn log(&self, first: u64) -> Range<u64> {
        let end = self.next.max(first);
        let kept = self.groups.values().find(|group| group.next > first);
        kept.map_or(end, |group| group.first.max(first))..end
    }

    /// Drops the groups below `first`. The messages before the number that is given back are needed by nobody.
    pub(super) fn below(&mut self, first: u64) -> u64 {
        while let Some(group) = self.groups.first_entry().filter(|g| g.get().next <= first) {
            group.remove();
        }
        let first = self.groups.values().next().or(self.open.as_ref());
        first.map_or(self.seen, |group| group.parts[0].0)
    }

    /// The group that holds a record.
    pub(super) fn find(&self, sii: u64) -> Option<&Group> {
        self.groups.range(..=sii).next_back().map(|(_, group)| group).filter(|group| sii < group.next)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.groups.values().map(|g| g.bytes).sum()
    }
}

/// The contents of a group.
#[derive(Debug, Default)]
pub(super) struct Contents {
    bytes: Vec<u8>,
    range: Option<Range<u64>>,
}

impl Contents {
    pub(super) fn push(&mut self, batch: &Batch) {
        let len = u32::try_from(batch.body().len()).expect("a batch is bounded");
        self.bytes.extend_from_slice(&batch.count().to_le_bytes());
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(batch.body());
        let first = self.range.as_ref().map_or(batch.first(), |r| r.start);
        self.range = Some(first..batch.next());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes of it.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The SIIs of its records.
    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone().unwrap_or_default()
    }

    /// The messages: head and contents.
    pub(super) fn parts(&self, epoch: u64, part_bytes: usize) -> impl Iterator<Item = (Head, &[u8])> {
        let Range { start: first, end: next } = self.range();
        let chunks = self.bytes.chunks(part_bytes);
        let parts = u32::try_from(chunks.len()).expect("a group is bounded");
        (1..)
            .zip(chunks)
            .map(move |(part, chunk)| (Head { epoch, first, next, part, parts, crc: crc32fast::hash(chunk) }, chunk))
    }
}

/// The batches of a group that begins at `first`; judges any bytes.
pub(super) fn batches(mut first: u64, mut bytes: &[u8]) -> Option<Vec<Batch>> {
    let mut batches = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at_checked(8)?;
        let (body, rest) = rest.split_at_checked(u32_at(head, 4) as usize)?;
        let batch = Batch::parse(first, u32_at(head, 0), body.to_vec()).ok()?;
        (first, bytes) = (batch.next(), rest);
        batches.push(batch);
    }
    Some(batches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(index: &mut Index, epoch: u64, range: Range<u64>, part: u32, parts: u32) {
        let head = Head { epoch, first: range.start, next: range.end, part, parts, crc: 7 };
        assert_eq!(Head::parse(&head.to_string()), Some(head));
        let sequence = index.seen + 3;
        index.take(&head, sequence, 10);
    }

    #[test]
    fn an_index_follows_the_log() {
        let mut index = Index::default();
        message(&mut index, 1, 5..5, 1, 1);
        assert_eq!(index.log(0), 5..5);
        message(&mut index, 1, 5..9, 1, 1);
        message(&mut index, 1, 9..12, 1, 2);
        assert_eq!(index.log(0), 5..9, "a part is nothing");
        message(&mut index, 1, 9..12, 2, 2);
        assert_eq!((index.log(0), index.log(6), index.log(40)), (5..12, 6..12, 40..40));
        assert_eq!(index.find(11).unwrap().parts, [(9, 7), (12, 7)]);
        // A group whose writer was overtaken by another one stays open for ever.
        message(&mut index, 1, 12..20, 1, 2);
        message(&mut index, 2, 12..12, 1, 1);
        message(&mut index, 1, 12..20, 2, 2);
        assert_eq!(index.log(0), 5..12);
        message(&mut index, 2, 12..14, 1, 1);
        message(&mut index, 1, 12..13, 1, 1);
        assert_eq!(index.log(0), 5..14, "a writer that was overtaken does not count");
        message(&mut index, 2, 7..7, 1, 1);
        assert_eq!((index.log(0), index.find(7), index.find(6).map(|g| g.next)), (5..7, None, Some(7)));
        let needed = index.below(6);
        assert_eq!((needed, index.log(6)), (6, 6..7));
        assert_eq!(index.below(7), index.seen);
        assert_eq!(index.log(7), 7..7);
    }

    #[test]
    fn parts_of_a_group_that_is_under_way_are_needed() {
        let mut index = Index::default();
        message(&mut index, 1, 0..5, 1, 1);
        message(&mut index, 1, 5..9, 1, 3);
        message(&mut index, 1, 5..9, 2, 3);
        assert_eq!((index.below(5), index.seen), (6, 9));
        message(&mut index, 1, 5..9, 3, 3);
        assert_eq!((index.below(6), index.log(6)), (6, 6..9));
    }

    proptest! {
        #[test]
        fn groups_come_back(lens in prop::collection::vec(1usize..60, 1..9), part_bytes in 1usize..50) {
            let mut contents = Contents::default();
            let (mut first, mut put) = (3, Vec::new());
            for len in lens {
                let batch = Batch::of(first, vec![vec![len as u8; len]; 1 + len % 3]);
                first = batch.next();
                contents.push(&batch);
                put.push(batch);
            }
            let (mut index, mut bytes) = (Index::default(), Vec::new());
            for (head, part) in contents.parts(1, part_bytes) {
                prop_assert!(part.len() <= part_bytes && crc32fast::hash(part) == head.crc);
                bytes.extend_from_slice(part);
                let sequence = index.seen + 1;
                index.take(&head, sequence, part.len() as u64);
            }
            prop_assert_eq!(index.log(0), 3..first);
            prop_assert_eq!(index.bytes(), bytes.len() as u64);
            prop_assert_eq!(batches(3, &bytes), Some(put));
        }

        #[test]
        fn any_bytes_are_judged(first: u64, bytes in prop::collection::vec(any::<u8>(), 0..80), text in ".{0,40}") {
            let _ = (batches(first, &bytes), Head::parse(&text));
        }
    }
}
