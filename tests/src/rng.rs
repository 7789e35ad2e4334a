//! A seeded random number generator, so that a run can be repeated from its printed seed.

use std::ops::RangeInclusive;

/// splitmix64.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator for part `n` of the run, independent of the others.
    pub fn part(seed: u64, n: u64) -> Self {
        let mut rng = Self(seed ^ n.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }

    /// The next 64 random bits.
    #[expect(clippy::should_implement_trait, reason = "an endless sequence of plain numbers is no iterator here")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number of `range`, evenly.
    pub fn within(&mut self, range: RangeInclusive<u64>) -> u64 {
        let (low, high) = (*range.start(), *range.end());
        low + self.next() % (high - low + 1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// `length` printable bytes without blanks.
    pub fn text(&mut self, length: usize) -> Vec<u8> {
        const LETTERS: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";
        let mut out = Vec::with_capacity(length + 10);
        while out.len() < length {
            let mut bits = self.next();
            for _ in 0..10 {
                out.push(LETTERS[(bits & 63) as usize]);
                bits >>= 6;
            }
        }
        out.truncate(length);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_sequence() {
        let (mut a, mut b) = (Rng::part(7, 3), Rng::part(7, 3));
        assert_eq!(a.text(100), b.text(100));
        assert_ne!(Rng::part(7, 3).next(), Rng::part(7, 4).next());
        assert!((0..1000).all(|_| (5..=9).contains(&a.within(5..=9))));
    }
}
