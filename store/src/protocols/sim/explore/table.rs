//! The states found, each as a fingerprint of 63 bits.
//!
//! Two different states with the same fingerprint would be taken for one. With 10⁸ states that
//! happens in one search of 2,000, and what it could hide is what follows from one state of them.

/// Tables that grow one at a time, so that growing never takes twice the memory.
const SHARDS: usize = 256;
const SHARD_SHIFT: u32 = 54;

/// The end can be reached from there without a further failure.
const ENDS: u64 = 1;

/// A set of fingerprints, with what is known of each.
pub(super) struct Table {
    shards: Vec<Shard>,
    /// In a search with a bound, how many delays were left is kept, too.
    bounded: bool,
    len: usize,
}

/// Open addressing, linear probing; zero is free.
#[derive(Default)]
struct Shard {
    entries: Vec<u64>,
    delays: Vec<u8>,
    len: usize,
}

/// Whether a state was found before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    Never,
    /// With fewer delays left: more follows from it now.
    WithLess,
    Enough,
}

/// A state as the table knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    pub(super) fn of(hash: u64) -> Self {
        Self(hash.max(2) & !ENDS)
    }
}

impl Table {
    pub(super) fn new(bounded: bool) -> Self {
        Self { shards: (0..SHARDS).map(|_| Shard::default()).collect(), bounded, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn shard(&mut self, of: Fingerprint) -> &mut Shard {
        &mut self.shards[(of.0 >> SHARD_SHIFT) as usize % SHARDS]
    }

    /// A state is found with so many delays left.
    pub(super) fn add(&mut self, state: Fingerprint, delays: u8) -> Seen {
        let bounded = self.bounded;
        let shard = self.shard(state);
        if shard.len * 4 >= shard.entries.len() * 3 {
            shard.grow(bounded);
        }
        let at = shard.position(state);
        if shard.entries[at] == 0 {
            shard.entries[at] = state.0;
            shard.len += 1;
            if bounded {
                shard.delays[at] = delays;
            }
            self.len += 1;
            return Seen::Never;
        }
        match bounded.then(|| &mut shard.delays[at]) {
            Some(before) if *before < delays => {
                *before = delays;
                Seen::WithLess
            }
            _ => Seen::Enough,
        }
    }

    /// Whether it is known that the end can be reached from a state that was found.
    pub(super) fn ends(&mut self, state: Fingerprint) -> bool {
        let shard = self.shard(state);
        shard.entries[shard.position(state)] & ENDS != 0
    }

    /// It can.
    pub(super) fn set_ends(&mut self, state: Fingerprint) {
        let shard = self.shard(state);
        let at = shard.position(state);
        shard.entries[at] |= ENDS;
    }
}

impl Shard {
    /// Where a state is, or would be.
    fn position(&self, of: Fingerprint) -> usize {
        let mask = self.entries.len() - 1;
        let mut at = (of.0 >> 1) as usize & mask;
        while self.entries[at] != 0 && self.entries[at] & !ENDS != of.0 {
            at = (at + 1) & mask;
        }
        at
    }

    fn grow(&mut self, bounded: bool) {
        let slots = (self.entries.len() * 2).max(16);
        let before = std::mem::replace(&mut self.entries, vec![0; slots]);
        let delays = std::mem::replace(&mut self.delays, vec![0; if bounded { slots } else { 0 }]);
        for (index, entry) in before.into_iter().enumerate().filter(|(_, entry)| *entry != 0) {
            let at = self.position(Fingerprint(entry & !ENDS));
            self.entries[at] = entry;
            if bounded {
                self.delays[at] = delays[index];
            }
        }
    }
}
