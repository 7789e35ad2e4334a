//! The message log of a sender (Johnson, §3.2.2).

use std::collections::BTreeMap;
use std::ops::Bound;

use super::Rsn;
use crate::protocols::process::Message;

/// A message sent. Without an RSN it is *partially logged*; with it, *fully logged*.
#[derive(Clone, Debug, Hash)]
struct Entry {
    message: Message,
    /// The RSN returned, and in which life of the receiver.
    rsn: Option<(u32, Rsn)>,
}

/// What the log has instead of an RSN for a message that need not be logged: less than any.
const NEED_NOT_BE_LOGGED: Rsn = 0;

/// Messages sent, by receiver and number.
#[derive(Clone, Debug, Hash)]
pub(super) struct Log {
    to: Vec<BTreeMap<u64, Entry>>,
    /// The last life of each receiver in which it told what it had replayed.
    replayed: Vec<u32>,
    /// A receiver may be put into an older checkpoint than its last (§3.5): nothing is removed.
    keep_all: bool,
    bytes: u64,
}

impl Log {
    pub(super) fn new(units: usize, keep_all: bool) -> Self {
        Self { to: vec![BTreeMap::new(); units], replayed: vec![0; units], keep_all, bytes: 0 }
    }

    pub(super) fn add(&mut self, message: Message) {
        self.bytes += u64::from(message.bytes);
        self.to[message.to].insert(message.ssn, Entry { message, rsn: None });
    }

    /// The receiver, in this life, returned an RSN for message `ssn`.
    pub(super) fn returned(&mut self, to: usize, ssn: u64, life: u32, rsn: Rsn) {
        if let Some(entry) = self.to[to].get_mut(&ssn) {
            entry.rsn = entry.rsn.max(Some((life, rsn)));
        }
    }

    /// The receiver, in this life, has a checkpoint for which it does not need message `ssn`.
    pub(super) fn remove(&mut self, to: usize, ssn: u64, life: u32) {
        if self.keep_all {
            if let Some(entry) = self.to[to].get_mut(&ssn) {
                entry.rsn.get_or_insert((life, NEED_NOT_BE_LOGGED));
            }
        } else if let Some(entry) = self.to[to].remove(&ssn) {
            self.bytes -= u64::from(entry.message.bytes);
        }
    }

    /// The receiver, in this life, was checkpointed after message `ssn`.
    pub(super) fn remove_up_to(&mut self, to: usize, ssn: u64, life: u32) {
        let all: Vec<u64> = self.to[to].range(..=ssn).map(|(&ssn, _)| ssn).collect();
        all.into_iter().for_each(|ssn| self.remove(to, ssn, life));
    }

    /// Fully logged messages to a process that begin intervals after `sii`, with their RSNs and the lives
    /// that these are from.
    pub(super) fn fully_logged(&self, to: usize, sii: Rsn) -> Vec<(u32, Rsn, Message)> {
        let all = self.to[to].values().filter_map(|entry| entry.rsn.map(|(life, rsn)| (life, rsn, &entry.message)));
        all.filter(|&(_, rsn, _)| rsn > sii).map(|(life, rsn, message)| (life, rsn, message.clone())).collect()
    }

    /// The last life of a receiver in which it told what it had replayed.
    pub(super) fn last_replay(&self, of: usize) -> u32 {
        self.replayed[of]
    }

    /// The receiver failed and in its new life has replayed our messages up to `ssn`. What it had received
    /// of ours beyond a gap is only partially logged from now on.
    pub(super) fn replayed(&mut self, to: usize, life: u32, ssn: u64) {
        if life <= self.replayed[to] {
            return;
        }
        self.replayed[to] = life;
        for (_, entry) in self.to[to].range_mut((Bound::Excluded(ssn), Bound::Unbounded)) {
            entry.rsn = entry.rsn.filter(|&(of, _)| of >= life);
        }
    }

    /// Messages to a process that are partially logged.
    pub(super) fn partially_logged(&self, to: usize) -> impl Iterator<Item = &Message> {
        self.to[to].values().filter(|entry| entry.rsn.is_none()).map(|entry| &entry.message)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.to.iter().map(BTreeMap::len).sum()
    }
}
