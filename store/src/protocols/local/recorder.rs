//! The recording node: stores every message, watches the units, brings back those that fail.

use std::collections::BTreeMap;

use super::{Bug, Event, Options, Packet, Process, Workload};
use crate::protocols::model::Sii;
use crate::protocols::process::Message;
use crate::protocols::writes::Writes;

type Action = super::Action<Packet>;

const FORWARD: u64 = 0;
const WATCH: u64 = 1;
/// Microseconds between retransmissions to units that lag.
const FORWARD_EVERY: u64 = 4_000;
/// Microseconds between looks of the watchdogs.
const WATCH_EVERY: u64 = 10_000;
/// Looks without a sign of life before a unit is taken for crashed.
const MISSED: u8 = 3;

/// What is to be stored.
#[derive(Clone, Debug, Hash)]
enum Record {
    Message(Message),
    Checkpoint(Box<Process>),
}

/// Stable storage, by process (Publishing, §3.2).
#[derive(Clone, Debug, Hash)]
struct Disk {
    /// The latest checkpoint.
    checkpoint: Vec<Process>,
    /// Messages received after it, by the interval that they begin.
    stream: Vec<BTreeMap<Sii, Message>>,
    /// The last interval that is recorded.
    last: Vec<Sii>,
    /// "The highest numbered message that a process has sent", to each other process.
    sent: Vec<Vec<u64>>,
}

/// The recorder, its watchdogs and the recovery manager.
#[derive(Clone, Debug, Hash)]
pub struct Recorder {
    options: Options,
    workload: Workload,
    disk: Disk,
    writes: Writes<Record>,
    /// Accepted, stored or being written: the highest number from each process to each other.
    accepted: Vec<Vec<u64>>,
    /// Up to where each unit says that it has received.
    reached: Vec<Sii>,
    /// Watchdogs: looks since the last sign of life.
    silent: Vec<u8>,
}

impl Recorder {
    pub(super) fn new(workload: Workload, options: Options) -> Self {
        let n = workload.units;
        Self {
            options,
            workload,
            disk: Disk {
                checkpoint: (0..n).map(|id| Process::new(id, workload)).collect(),
                stream: vec![BTreeMap::new(); n],
                last: vec![0; n],
                sent: vec![vec![0; n]; n],
            },
            writes: Writes::new(),
            accepted: vec![vec![0; n]; n],
            reached: vec![0; n],
            silent: vec![0; n],
        }
    }

    /// Every interval recorded is stable, and nothing depends on any other.
    pub(super) fn recorded(&self) -> Vec<Sii> {
        self.disk.last.clone()
    }

    pub(super) fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Start | Event::Restarted { .. } => {
                actions.push(Action::Timer { timer: FORWARD, after: FORWARD_EVERY });
                actions.push(Action::Timer { timer: WATCH, after: WATCH_EVERY });
            }
            Event::Timer(FORWARD) => {
                for unit in 0..self.workload.units {
                    // A checkpoint that was under way when its unit failed may have been stored after the
                    // unit was put into an older one, and what it would replay from there is discarded.
                    if self.reached[unit] < self.disk.checkpoint[unit].sii() {
                        self.recover(unit, actions);
                    }
                    self.forward_from(unit, self.reached[unit] + 1, actions);
                }
                actions.push(Action::Timer { timer: FORWARD, after: FORWARD_EVERY });
            }
            Event::Timer(_) => self.watch(actions),
            Event::Packet { from, packet } => {
                self.silent[from] = 0;
                self.packet(from, packet, actions);
            }
            Event::Written(token) => self.written(token, actions),
            Event::Down(_) => {}
        }
    }

    fn packet(&mut self, from: usize, packet: Packet, actions: &mut Vec<Action>) {
        match packet {
            Packet::Publish(message) => {
                let accepted = &mut self.accepted[from][message.to];
                if message.ssn == *accepted + 1 {
                    *accepted += 1;
                    let bytes = 64 + u64::from(message.bytes);
                    let token = self.writes.begin(Record::Message(message), bytes, actions);
                    if self.options.bug == Some(Bug::ForwardBeforeStoring) {
                        self.announce(token, actions);
                    }
                } else if message.ssn <= self.disk.sent[from][message.to] {
                    let ssn = self.disk.sent[from][message.to];
                    actions.push(Action::Send { to: from, packet: Packet::Recorded { to: message.to, ssn } });
                }
            }
            // The last word counts, not the greatest: it may be older than the unit's last failure, and
            // what it then skips would not be sent again. The unit soon speaks for itself.
            Packet::Reached(sii) => self.reached[from] = sii,
            Packet::Checkpoint(process) if process.sii() > self.disk.checkpoint[from].sii() => {
                if self.options.bug == Some(Bug::DiscardEarly) {
                    self.disk.stream[from] = self.disk.stream[from].split_off(&(process.sii() + 1));
                }
                let bytes = process.checkpoint_bytes();
                self.writes.begin(Record::Checkpoint(process), bytes, actions);
            }
            Packet::Hello => {
                self.reached[from] = self.disk.checkpoint[from].sii();
                // Skipping the first message shifts the stream by one.
                if self.options.bug == Some(Bug::ReplayOneLess) {
                    let after: Vec<Message> = self.disk.stream[from].values().skip(1).cloned().collect();
                    if !after.is_empty() {
                        self.disk.stream[from] = (self.reached[from] + 1..).zip(after).collect();
                        self.disk.last[from] -= 1;
                    }
                }
                self.recover(from, actions);
                self.forward_from(from, self.reached[from] + 1, actions);
            }
            _ => {}
        }
    }

    /// Puts a process into the state of its latest checkpoint (§3.4, step 2).
    fn recover(&self, unit: usize, actions: &mut Vec<Action>) {
        let packet = Packet::Recover {
            ignore_up_to: self.disk.sent[unit].clone(),
            until: self.disk.last[unit],
            checkpoint: Box::new(self.disk.checkpoint[unit].clone()),
        };
        actions.push(Action::Send { to: unit, packet });
    }

    fn forward_from(&self, unit: usize, sii: Sii, actions: &mut Vec<Action>) {
        let stream = self.disk.stream[unit].range(sii..);
        actions.extend(stream.map(|(&sii, message)| Action::Send {
            to: unit,
            packet: Packet::Forward { sii, message: message.clone() },
        }));
    }

    /// "If no messages have been seen in a while, the processor is considered to have crashed and is
    /// restarted" (§3.3). The restart ends it for certain first, so a wrong guess does no harm.
    fn watch(&mut self, actions: &mut Vec<Action>) {
        for unit in 0..self.workload.units {
            self.silent[unit] += 1;
            if self.silent[unit] > MISSED {
                self.silent[unit] = 0;
                actions.push(Action::Restart(unit));
            }
        }
        actions.push(Action::Timer { timer: WATCH, after: WATCH_EVERY });
    }

    pub(super) fn persist(&mut self, token: u64) {
        let Some(record) = self.writes.get(token) else { return };
        match record.clone() {
            Record::Message(message) => {
                let sii = self.disk.last[message.to] + 1;
                self.disk.last[message.to] = sii;
                self.disk.sent[message.from][message.to] = message.ssn;
                self.disk.stream[message.to].insert(sii, message);
            }
            Record::Checkpoint(process) => {
                let id = process.id;
                if process.sii() > self.disk.checkpoint[id].sii() {
                    // "After the checkpoint has been reliably stored, older checkpoints and messages can be
                    // discarded" (§3.2).
                    self.disk.stream[id] = self.disk.stream[id].split_off(&(process.sii() + 1));
                    self.disk.checkpoint[id] = *process;
                }
            }
        }
    }

    fn written(&mut self, token: u64, actions: &mut Vec<Action>) {
        if self.options.bug != Some(Bug::ForwardBeforeStoring) {
            self.announce(token, actions);
        }
        self.writes.done(token);
    }

    /// The message is recorded: says so to the sender and passes it on.
    fn announce(&self, token: u64, actions: &mut Vec<Action>) {
        let Some(Record::Message(message)) = self.writes.get(token) else { return };
        let recorded = Packet::Recorded { to: message.to, ssn: message.ssn };
        actions.push(Action::Send { to: message.from, packet: recorded });
        let early = self.options.bug == Some(Bug::ForwardBeforeStoring);
        let last = self.disk.last[message.to];
        let same = |record: &&Record| matches!(record, Record::Message(m) if m.to == message.to);
        let ahead = self.writes.before(token).filter(same).count() as Sii;
        let sii = if early { last + ahead + 1 } else { last };
        actions.push(Action::Send { to: message.to, packet: Packet::Forward { sii, message: message.clone() } });
    }

    pub(super) fn crash(&mut self) {
        let n = self.workload.units;
        self.writes.clear();
        self.accepted = self.disk.sent.clone();
        self.reached = self.disk.checkpoint.iter().map(Process::sii).collect();
        self.silent = vec![0; n];
    }
}
