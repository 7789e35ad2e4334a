//! A stream of logged messages to measure [`RecoveryState`](super::RecoveryState) with.

use crate::protocols::model::Sii;
use crate::protocols::rng::Rng;

/// One message logged, or one checkpoint stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The message that began interval `sii` of `unit`, sent by `from` in its interval `sent_in`.
    Message {
        /// Receiver.
        unit: usize,
        /// The interval that it began.
        sii: Sii,
        /// Sender.
        from: usize,
        /// Interval of the sender.
        sent_in: Sii,
    },
    /// A checkpoint with the dependencies of its interval.
    Checkpoint {
        /// Of which unit.
        unit: usize,
        /// In which interval.
        sii: Sii,
        /// Its dependency vector without ⊥.
        depends_on: Vec<(usize, Sii)>,
    },
}

/// What a store of `units` units is told in the course of `intervals` intervals: every message goes
/// between random units; each unit writes its buffer after 1 to 64 messages, so that units lag behind
/// each other; one buffer in 32 is lost behind a checkpoint, which stands for it (§4.4.3).
pub fn stored_by(units: usize, intervals: usize, seed: u64) -> impl Iterator<Item = Stored> {
    let mut rng = Rng::new(seed);
    let mut buffers: Vec<Vec<Stored>> = vec![Vec::new(); units];
    let mut newest: Vec<Sii> = vec![0; units];
    let mut vectors: Vec<std::collections::BTreeMap<usize, Sii>> = vec![Default::default(); units];
    (0..intervals).flat_map(move |_| {
        let unit = rng.index(units);
        // Most units talk to few others.
        let from = (unit + 1 + rng.index((units - 1).min(8))) % units;
        newest[unit] += 1;
        vectors[unit].insert(from, newest[from]);
        buffers[unit].push(Stored::Message { unit, sii: newest[unit], from, sent_in: newest[from] });
        if rng.below(64) >= buffers[unit].len() as u64 {
            return Vec::new();
        }
        let buffer = std::mem::take(&mut buffers[unit]);
        if rng.below(32) > 0 {
            return buffer;
        }
        let depends_on = vectors[unit].iter().map(|(&j, &sii)| (j, sii)).collect();
        vec![Stored::Checkpoint { unit, sii: newest[unit], depends_on }]
    })
}
