//! Things that are kept once, under a number.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher};

use crate::protocols::rng::scatter;

/// Numbers of things, by their hash.
#[derive(Default)]
pub(super) struct Numbers(HashMap<u128, u32, Scattering>);

impl Numbers {
    /// The number of a thing, from 0 on, and whether it is new.
    pub(super) fn of(&mut self, thing: &impl Hash) -> (u32, bool) {
        let next = u32::try_from(self.0.len()).expect("fewer than fit into memory");
        let number = *self.0.entry(hash(thing)).or_insert(next);
        (number, number == next)
    }
}

/// Things under their numbers.
pub(super) struct Pool<T> {
    numbers: Numbers,
    things: Vec<T>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { numbers: Numbers::default(), things: Vec::new() }
    }
}

impl<T: Hash> Pool<T> {
    pub(super) fn number(&mut self, thing: T) -> u32 {
        let (number, new) = self.numbers.of(&thing);
        if new {
            self.things.push(thing);
        }
        number
    }

    pub(super) fn get(&self, number: u32) -> &T {
        &self.things[number as usize]
    }
}

/// 128 bits: no two of the things that a search meets have the same.
fn hash(thing: &impl Hash) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        thing.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Hashes keys that are a few numbers.
#[derive(Clone, Copy, Default)]
pub(super) struct Scatter(u64);

pub(super) type Scattering = BuildHasherDefault<Scatter>;

impl Hasher for Scatter {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = scatter(self.0.rotate_left(7) ^ word);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }

    fn write_u128(&mut self, word: u128) {
        self.write_u64(word as u64);
        self.write_u64((word >> 64) as u64);
    }
}
