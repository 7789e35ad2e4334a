//! The store: logging server, checkpoint server, recovery server (Johnson, §4.5.4 to §4.5.6).

use std::collections::{BTreeMap, BTreeSet};

use super::{Bug, Event, Message, Options, Packet, Process, Saved, Sii, Workload};
use crate::protocols::process::Outbox;
use crate::protocols::recovery_state::RecoveryState;
use crate::protocols::writes::Writes;

type Action = super::Action<Packet>;

const AGAIN: u64 = 0;
/// Microseconds between repetitions of a round's packets.
const AGAIN_EVERY: u64 = 3_000;

/// What is to be stored.
#[derive(Clone, Debug, Hash)]
enum Record {
    Log { unit: usize, round: u64, messages: Vec<(Sii, Message)>, last_of_round: Option<u64> },
    Checkpoint { unit: usize, round: u64, saved: Box<Saved> },
    RollBack { round: u64 },
}

/// Stable storage.
#[derive(Clone, Debug, Hash)]
struct Disk {
    checkpoints: Vec<BTreeMap<Sii, Saved>>,
    logged: Vec<BTreeMap<Sii, Message>>,
    /// A function of what is stored, and kept with it.
    state: RecoveryState,
    /// The last round that ended with a rollback.
    round: u64,
}

/// A recovery under way.
#[derive(Clone, Debug, Hash)]
struct Round {
    number: u64,
    /// The round whose states are collected.
    of: u64,
    stopped: BTreeSet<usize>,
    /// The newest life of each unit that was heard of before the rollback.
    lives: BTreeMap<usize, u32>,
    rolled_back: bool,
    resumed: BTreeSet<usize>,
}

/// The store.
#[derive(Clone, Debug, Hash)]
pub struct Store {
    options: Options,
    units: usize,
    disk: Disk,
    writes: Writes<Record>,
    round: Option<Round>,
}

impl Store {
    pub(super) fn new(workload: Workload, options: Options) -> Self {
        let n = workload.units;
        // "When a process is created, its initial state is saved on stable storage" (§2.1.5).
        let created = |id| Saved { process: Process::new(id, workload), outbox: Outbox::new(n), outputs: Vec::new() };
        let disk = Disk {
            checkpoints: (0..n).map(|id| BTreeMap::from([(0, created(id))])).collect(),
            logged: vec![BTreeMap::new(); n],
            state: RecoveryState::new(n),
            round: 0,
        };
        Self { options, units: n, disk, writes: Writes::new(), round: None }
    }

    pub(super) fn recovery_state(&self) -> Vec<Sii> {
        self.disk.state.current()
    }

    pub(super) fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Start | Event::Restarted { .. } => actions.push(Action::Timer { timer: AGAIN, after: AGAIN_EVERY }),
            Event::Timer(_) => {
                actions.push(Action::Timer { timer: AGAIN, after: AGAIN_EVERY });
                self.ask(actions);
            }
            Event::Packet { from, packet } => self.packet(from, packet, actions),
            Event::Written(token) => self.written(token, actions),
            Event::Down(_) => {}
        }
    }

    fn packet(&mut self, from: usize, packet: Packet, actions: &mut Vec<Action>) {
        match packet {
            Packet::Log { round, messages } if round == self.disk.round => {
                if self.options.bug == Some(Bug::AcknowledgeEarly) {
                    self.say_logged(from, messages.iter().map(|(sii, _)| *sii).collect(), actions);
                }
                // What is repeated is not written again, or a slow disk would never catch up.
                let (stored, new): (Vec<_>, Vec<_>) =
                    messages.into_iter().partition(|(sii, _)| self.is_stored(from, *sii));
                let new: Vec<_> =
                    new.into_iter().filter(|(sii, _)| !self.is_being_written(from, round, *sii)).collect();
                if !new.is_empty() {
                    self.write(Record::Log { unit: from, round, messages: new, last_of_round: None }, actions);
                }
                self.say_logged(from, stored.into_iter().map(|(sii, _)| sii).collect(), actions);
            }
            Packet::Checkpoint { round, saved } if round == self.disk.round => {
                self.write(Record::Checkpoint { unit: from, round, saved }, actions);
            }
            Packet::Hello { heard, life } => {
                // A unit that was put into its state and has lost it again needs another round.
                // And one that has heard of a later round, of an earlier life of this store, takes no part in
                // this one.
                // One that has failed since the rollback may have been put into its state and gone on.
                let later = |round: &Round| round.rolled_back && round.lives.get(&from).is_none_or(|&of| life > of);
                let useless = |round: &Round| round.resumed.contains(&from) || heard > round.number || later(round);
                if let Some(round) = self.round.as_mut().filter(|round| !round.rolled_back) {
                    let known = round.lives.entry(from).or_insert(life);
                    *known = life.max(*known);
                }
                if self.round.as_ref().is_none_or(useless) {
                    let number = self.round.as_ref().map_or(self.disk.round, |round| round.number).max(heard) + 1;
                    let (stopped, resumed) = (BTreeSet::new(), BTreeSet::new());
                    let (of, lives) = (self.disk.round, BTreeMap::from([(from, life)]));
                    self.round = Some(Round { number, of, stopped, lives, rolled_back: false, resumed });
                    self.ask(actions);
                }
            }
            Packet::Stopped { round, of, saved, messages, life } => {
                if self.round.as_ref().is_none_or(|current| current.number != round || current.rolled_back) {
                    return;
                }
                if let Some(current) = &mut self.round {
                    let known = current.lives.entry(from).or_insert(life);
                    *known = life.max(*known);
                }
                let being_written = |record: &Record| matches!(record, Record::Log { unit, last_of_round, .. } if *unit == from && *last_of_round == Some(round));
                if self.writes.iter().any(being_written) {
                    return;
                }
                if let Some(saved) = saved {
                    self.write(Record::Checkpoint { unit: from, round: of, saved }, actions);
                }
                self.write(Record::Log { unit: from, round: of, messages, last_of_round: Some(round) }, actions);
            }
            Packet::Resumed { round } => {
                if let Some(current) = self.round.as_mut().filter(|current| current.number == round) {
                    current.resumed.insert(from);
                    if current.resumed.len() == self.units {
                        self.round = None;
                    }
                }
            }
            _ => {}
        }
    }

    /// Sends whatever the round under way has not got an answer to.
    fn ask(&self, actions: &mut Vec<Action>) {
        let Some(round) = &self.round else { return };
        for unit in 0..self.units {
            if !round.rolled_back && !round.stopped.contains(&unit) {
                actions.push(Action::Send { to: unit, packet: Packet::Stop { round: round.number } });
            }
            if round.rolled_back && self.disk.round == round.number && !round.resumed.contains(&unit) {
                let to = self.disk.state.of(unit);
                let Some((&epsilon, saved)) = self.disk.checkpoints[unit].range(..=to).next_back() else {
                    actions.push(Action::Unrecoverable);
                    continue;
                };
                let messages = self.disk.logged[unit].range(epsilon + 1..).take_while(|&(&sii, _)| sii <= to);
                let messages = messages.map(|(_, m)| m.clone()).collect();
                let saved = Box::new(saved.clone());
                let life = round.lives.get(&unit).copied().unwrap_or(0);
                let packet = Packet::Resume { round: round.number, unless: round.of, to, saved, messages, life };
                actions.push(Action::Send { to: unit, packet });
            }
        }
    }

    fn is_stored(&self, unit: usize, sii: Sii) -> bool {
        sii <= self.disk.state.of(unit) || self.disk.logged[unit].contains_key(&sii)
    }

    fn is_being_written(&self, by: usize, of: u64, sii: Sii) -> bool {
        self.writes.iter().any(|record| match record {
            Record::Log { unit, round, messages, .. } => {
                *unit == by && *round == of && messages.iter().any(|(s, _)| *s == sii)
            }
            _ => false,
        })
    }

    fn write(&mut self, record: Record, actions: &mut Vec<Action>) {
        let bytes = match &record {
            Record::Log { messages, .. } => messages.iter().map(|(_, m)| 64 + u64::from(m.bytes)).sum(),
            Record::Checkpoint { saved, .. } => saved.process.checkpoint_bytes() + saved.outbox.bytes(),
            Record::RollBack { .. } => 64,
        };
        self.writes.begin(record, bytes, actions);
    }

    pub(super) fn persist(&mut self, token: u64) {
        let Some(record) = self.writes.get(token) else { return };
        match record.clone() {
            Record::Log { unit, round, messages, .. } if round == self.disk.round => {
                for (sii, message) in messages {
                    let (from, sent_in) = (message.from, message.sent_in);
                    self.disk.logged[unit].insert(sii, message);
                    self.disk.state.message_logged(unit, sii, from, sent_in);
                }
            }
            Record::Checkpoint { unit, round, saved } if round == self.disk.round => {
                let sii = saved.process.sii();
                let vector = saved.process.depends_on.clone();
                if sii >= self.disk.state.of(unit) {
                    self.disk.checkpoints[unit].insert(sii, *saved);
                    self.disk.state.checkpointed(unit, sii, vector.iter());
                }
            }
            Record::RollBack { round } if round > self.disk.round => {
                self.disk.round = round;
                self.disk.state.roll_back();
                for unit in 0..self.units {
                    let to = self.disk.state.of(unit);
                    self.disk.checkpoints[unit].retain(|&sii, _| sii <= to);
                    self.disk.logged[unit].retain(|&sii, _| sii <= to);
                }
            }
            _ => {}
        }
        self.collect_garbage();
    }

    /// Lemmas 2.4 and 2.5.
    fn collect_garbage(&mut self) {
        for unit in 0..self.units {
            let recovered = self.disk.state.of(unit);
            let checkpoints = &mut self.disk.checkpoints[unit];
            let Some((&effective, _)) = checkpoints.range(..=recovered).next_back() else { continue };
            let mut epsilon = effective;
            if self.options.bug == Some(Bug::CollectTooMuch) {
                epsilon = *checkpoints.last_key_value().expect("never collected").0;
            }
            *checkpoints = checkpoints.split_off(&epsilon);
            self.disk.logged[unit] = self.disk.logged[unit].split_off(&(epsilon + 1));
        }
    }

    fn written(&mut self, token: u64, actions: &mut Vec<Action>) {
        let Some(record) = self.writes.done(token) else { return };
        match record {
            Record::Log { unit, messages, last_of_round: None, .. } => {
                self.say_logged(unit, messages.into_iter().map(|(sii, _)| sii).collect(), actions);
            }
            Record::Log { unit, last_of_round: Some(number), .. } => {
                // "The surviving process states and received messages must be written to stable storage
                // before determining the current recovery state" (§4.2.3).
                let n = self.units;
                if let Some(round) = self.round.as_mut().filter(|r| r.number == number && !r.rolled_back) {
                    round.stopped.insert(unit);
                    if round.stopped.len() == n {
                        round.rolled_back = true;
                        self.write(Record::RollBack { round: number }, actions);
                    }
                }
            }
            Record::Checkpoint { unit, .. } => self.say_logged(unit, Vec::new(), actions),
            Record::RollBack { .. } => self.ask(actions),
        }
    }

    fn say_logged(&self, unit: usize, siis: Vec<Sii>, actions: &mut Vec<Action>) {
        let (round, recovered) = (self.disk.round, self.disk.state.of(unit));
        actions.push(Action::Send { to: unit, packet: Packet::Logged { round, siis, recovered } });
    }

    pub(super) fn crash(&mut self) {
        self.writes.clear();
        self.round = None;
    }
}
