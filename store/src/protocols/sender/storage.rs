//! What a unit keeps on stable storage.

use std::collections::BTreeMap;

use super::log::Log;
use super::{Message, Options, Output, Process, Rsn, Sii};

/// What a checkpoint holds: all of §3.2.2 but the RSN history list.
#[derive(Clone, Debug, Hash)]
pub(super) struct Checkpoint {
    pub(super) process: Process,
    pub(super) log: Log,
    /// Outputs that were held at the time. (Held messages are in the log.)
    pub(super) outputs: Vec<Output>,
}

/// What is to be stored.
#[derive(Clone, Debug, Hash)]
pub(super) enum Record {
    Checkpoint(Box<Checkpoint>),
    /// Of the hybrid: a message received, and the life of its sender that it came from.
    Received(Rsn, u32, Message),
    /// What nothing is recovered from: spilled log, and what is taken back before it is written.
    Nothing,
    /// With an extension: this life was replayed from the checkpoint in interval `from` up to `to`.
    Replayed {
        from: Sii,
        to: Sii,
    },
}

/// Stable storage.
#[derive(Clone, Debug, Hash)]
pub(super) struct Disk {
    /// The last one; where all are kept, all that the process has not been rolled back behind.
    pub(super) checkpoints: Vec<Checkpoint>,
    keep_all: bool,
    /// Of the hybrid: what was received since.
    pub(super) received: BTreeMap<Rsn, (u32, Message)>,
    /// Counts failures.
    pub(super) life: u32,
    /// With an extension: how far each life was replayed before it went on.
    replayed: BTreeMap<u32, Sii>,
}

impl Disk {
    pub(super) fn new(process: Process, options: &Options) -> Self {
        let keep_all = options.keeps_all_checkpoints();
        let log = Log::new(process.sent.len(), keep_all);
        let checkpoints = vec![Checkpoint { process, log, outputs: Vec::new() }];
        Self { checkpoints, keep_all, received: BTreeMap::new(), life: 0, replayed: BTreeMap::new() }
    }

    pub(super) fn store(&mut self, record: &Record) {
        match record {
            Record::Checkpoint(checkpoint) => {
                if !self.keep_all {
                    self.checkpoints.clear();
                    self.received = self.received.split_off(&(checkpoint.process.sii() + 1));
                }
                self.checkpoints.push((**checkpoint).clone());
            }
            Record::Received(rsn, life, message) => {
                self.received.insert(*rsn, (*life, message.clone()));
            }
            Record::Nothing => {}
            Record::Replayed { from, to } => {
                self.checkpoints.retain(|checkpoint| checkpoint.process.sii() <= *from);
                self.received.split_off(&(to + 1));
                self.replayed.insert(self.life, *to);
            }
        }
    }

    /// Whether an RSN that was given in an earlier life is of the present history: no replay since has
    /// ended before it.
    pub(super) fn is_of_this_history(&self, life: u32, rsn: Rsn) -> bool {
        self.replayed.range(life + 1..).all(|(_, &to)| rsn <= to)
    }
}
