//! One process under sender-based logging.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::log::Log;
use super::recovery::Recovery;
use super::storage::{Checkpoint, Disk, Record};
use super::{Body, Bug, Counters, Event, Extension, Message, Options, Packet, Phase, Process, Rsn};
use crate::protocols::process::Effect;
use crate::protocols::writes::Writes;

pub(super) type Action = super::Action<Packet>;

const RETRANSMIT: u64 = 0;
const FLUSH: u64 = 1;
const COMPUTED: u64 = 2;
/// Microseconds between retransmissions.
const RETRANSMIT_EVERY: u64 = 4_000;
/// Microseconds that RSNs and acknowledgements wait for a message to go with.
const FLUSH_AFTER: u64 = 1_000;

/// Whether a process computes. What it receives meanwhile is acknowledged as always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Computing {
    #[default]
    NotYet,
    Now,
    Done,
}

/// A process, its message log and its protocol state.
#[derive(Clone, Debug, Hash)]
pub struct Unit {
    pub(super) options: Options,
    pub(super) id: usize,
    pub(super) disk: Disk,
    writes: Writes<Record>,
    pub(super) process: Process,
    pub(super) log: Log,
    /// RSN history list: what RSN was returned for each message since the last checkpoint.
    pub(super) history: Vec<BTreeMap<u64, Rsn>>,
    /// RSNs returned (or to be) and not acknowledged, by sender.
    unacknowledged: Vec<BTreeMap<u64, Option<Rsn>>>,
    /// Whether some of these have not been returned even once.
    unreturned: Vec<bool>,
    /// Acknowledgements that wait for a packet, by receiver.
    acks: Vec<Vec<(u64, Option<Rsn>)>>,
    /// The last life of each other process that is known.
    lives: Vec<u32>,
    /// Which others were being replayed when they were last heard of.
    pub(super) replaying: BTreeSet<usize>,
    /// Held sends and outputs.
    held: VecDeque<Effect>,
    /// The first of these waits for acknowledgements.
    waiting: bool,
    /// What the process computes before the first of these is sent.
    computing: Computing,
    flushing: bool,
    pub(super) recovery: Recovery,
    /// Messages sent during replay whose RSNs have not come back.
    pub(super) unrestored: BTreeSet<(usize, u64)>,
    shown: u64,
    since_checkpoint: u64,
    returned: u64,
    spilled: u64,
    counters: Counters,
}

impl Unit {
    pub(super) fn new(process: Process, options: Options) -> Self {
        Self::restored(options, Disk::new(process, &options))
    }

    fn restored(options: Options, disk: Disk) -> Self {
        let Checkpoint { process, log, .. } = disk.checkpoints.last().expect("one is always kept").clone();
        let n = process.sent.len();
        Self {
            options,
            id: process.id,
            disk,
            writes: Writes::new(),
            process,
            log,
            history: vec![BTreeMap::new(); n],
            unacknowledged: vec![BTreeMap::new(); n],
            unreturned: vec![false; n],
            acks: vec![Vec::new(); n],
            lives: vec![0; n],
            replaying: BTreeSet::new(),
            held: VecDeque::new(),
            waiting: false,
            computing: Computing::default(),
            flushing: false,
            recovery: Recovery::NotNeeded,
            unrestored: BTreeSet::new(),
            shown: 0,
            since_checkpoint: 0,
            returned: 0,
            spilled: 0,
            counters: Counters::default(),
        }
    }

    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let id = self.id;
        (0..self.process.sent.len()).filter(move |&other| other != id)
    }

    pub(super) fn happen(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Start => {
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                let effects = self.process.start();
                self.carry_out(effects, actions);
            }
            Event::Restarted { shown } => {
                self.shown = shown;
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                self.gather(None, actions);
            }
            Event::Timer(RETRANSMIT) => {
                self.retransmit(actions);
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
            }
            Event::Timer(COMPUTED) => {
                self.computing = Computing::Done;
                self.release(actions);
                self.return_what_holds(actions);
            }
            Event::Timer(_) => {
                self.flushing = false;
                for other in self.others() {
                    if self.unreturned[other] || !self.acks[other].is_empty() {
                        self.send(other, Body::Nothing, actions);
                    }
                }
            }
            // Of a life that is over; what is still true will be said again.
            Event::Packet { from, packet } if packet.life < self.lives[from] => {}
            Event::Packet { from, packet } => {
                match packet.replaying {
                    true => self.replaying.insert(from),
                    false => self.replaying.remove(&from),
                };
                // "The piggybacked RSNs and RSN acknowledgements must be handled before the message
                // carried by the packet" (§3.2.5).
                self.rsns(from, &packet);
                if packet.acked_life == self.disk.life {
                    for (ssn, rsn) in &packet.acks {
                        if self.unacknowledged[from].get(ssn) == Some(rsn) {
                            self.unacknowledged[from].remove(ssn);
                        }
                    }
                }
                self.body(from, packet.life, packet.body, actions);
                self.release(actions);
                self.flush_soon(actions);
            }
            Event::Written(token) => self.written(token, actions),
            Event::Down(_) => {}
        }
    }

    /// RSNs come back: the messages are now fully logged, and that is acknowledged.
    fn rsns(&mut self, from: usize, packet: &Packet) {
        self.new_life(from, packet.life);
        for &(ssn, rsn) in &packet.rsns {
            // After a failure a message may be known to its receiver before it has been sent again here.
            if ssn <= self.process.sent[from] {
                self.returned += 1;
                let dropped = self.options.bug == Some(Bug::DropRsn) && self.returned.is_multiple_of(3);
                match rsn {
                    Some(rsn) => self.log.returned(from, ssn, packet.life, if dropped { 0 } else { rsn }),
                    None => self.log.remove(from, ssn, packet.life),
                }
                if self.options.bug == Some(Bug::ForgetEarly) {
                    self.log.remove_up_to(from, ssn, packet.life);
                }
                self.unrestored.remove(&(from, ssn));
                if !self.acks[from].contains(&(ssn, rsn)) {
                    self.acks[from].push((ssn, rsn));
                }
            }
        }
    }

    fn body(&mut self, from: usize, of_life: u32, body: Body, actions: &mut Vec<Action>) {
        match body {
            Body::Nothing => {}
            Body::Message(message) => self.message(of_life, message, actions),
            Body::Checkpointed { received } => {
                self.log.remove_up_to(from, received, of_life);
                self.unrestored.retain(|&(to, ssn)| to != from || ssn > received);
            }
            Body::WantLog { life, sii } => self.give_log(from, life, sii, actions),
            Body::Log { .. } => self.log_arrived(from, of_life, body, actions),
            Body::Replayed { life, sii, received } => self.other_replayed(from, life, sii, received, actions),
            Body::Noted { life } => self.noted(from, life, actions),
        }
    }

    fn new_life(&mut self, of: usize, life: u32) {
        if life > self.lives[of] {
            self.lives[of] = life;
            self.acks[of].clear();
        }
    }

    /// A message arrives (§3.2.3, step 2, and duplicates).
    fn message(&mut self, of_life: u32, message: Message, actions: &mut Vec<Action>) {
        let Message { from, ssn, .. } = message;
        // With an extension, nobody that has still to be rolled back may be heard.
        let hears_all = self.options.extension == Extension::None || self.options.bug == Some(Bug::HearOrphans);
        if self.is_gathering() || !hears_all && !self.has_told() {
            return; // It will be retransmitted.
        }
        if self.process.is_duplicate(&message) {
            let known = self.history[from].get(&ssn).copied();
            let rsn = match self.options.bug {
                Some(Bug::NewRsnForDuplicate) => Some(self.process.sii()),
                _ => known,
            };
            self.unacknowledged[from].insert(ssn, rsn);
            self.unreturned[from] = true;
            return;
        }
        if !self.process.is_next(&message) {
            return;
        }
        let effects = self.process.receive(&message);
        let rsn = self.process.sii();
        self.history[from].insert(ssn, rsn);
        if self.options.log_behind {
            let bytes = 64 + u64::from(message.bytes);
            self.write(Record::Received(rsn, of_life, message), bytes, actions);
        }
        self.unacknowledged[from].insert(ssn, Some(rsn));
        self.unreturned[from] = true;
        self.since_checkpoint += 1;
        if !self.options.piggyback {
            self.send(from, Body::Nothing, actions);
        }
        self.carry_out(effects, actions);
        if self.options.checkpoint_every > 0 && self.since_checkpoint >= self.options.checkpoint_every {
            self.since_checkpoint = 0;
            self.checkpoint(actions);
        }
    }

    pub(super) fn carry_out(&mut self, effects: Vec<Effect>, actions: &mut Vec<Action>) {
        for effect in effects {
            match &effect {
                // "Copies message m into its local volatile message log before transmitting" (§3.2.3).
                Effect::Send(message) => self.log.add(message.clone()),
                Effect::Show(output) if output.number < self.shown => continue,
                Effect::Show(_) => {}
            }
            self.held.push_back(effect);
        }
        self.spill(actions);
        self.release(actions);
        self.return_what_holds(actions);
    }

    /// What is held waits for RSNs to be acknowledged, so they are returned at once (§3.2.5); without the
    /// optimisations they have been.
    fn return_what_holds(&mut self, actions: &mut Vec<Action>) {
        for other in self.others() {
            if self.waiting && self.options.piggyback && self.unreturned[other] {
                self.send(other, Body::Nothing, actions);
            }
        }
    }

    /// Lets out what need not be held (any more).
    fn release(&mut self, actions: &mut Vec<Action>) {
        while let Some(effect) = self.held.front() {
            if let Effect::Send(message) = effect
                && self.computing != Computing::Done
                && !self.is_gathering()
            {
                let after = self.process.computes_before(message);
                if after > 0 {
                    if self.computing == Computing::NotYet {
                        self.computing = Computing::Now;
                        actions.push(Action::Timer { timer: COMPUTED, after });
                    }
                    break;
                }
            }
            let outstanding: Vec<usize> =
                self.others().filter(|&other| !self.unacknowledged[other].is_empty()).collect();
            let free = outstanding.is_empty() || self.is_gathering() || self.options.bug == Some(Bug::NoHold);
            match effect {
                Effect::Send(message) if free || self.options.piggyback && outstanding == [message.to] => {
                    let message = message.clone();
                    let Counters { held, sent_free, sent_piggybacked, .. } = &mut self.counters;
                    *if self.waiting {
                        held
                    } else if free {
                        sent_free
                    } else {
                        sent_piggybacked
                    } += 1;
                    self.computing = Computing::NotYet;
                    self.held.pop_front();
                    self.send(message.to, Body::Message(message), actions);
                }
                Effect::Show(output) if free => {
                    let output = output.clone();
                    self.counters.held += u64::from(self.waiting);
                    self.held.pop_front();
                    self.shown = output.number + 1;
                    actions.push(Action::Show(output));
                }
                _ => {
                    self.waiting = true;
                    return;
                }
            }
        }
        self.waiting = false;
    }

    /// Sends a packet with all RSNs and acknowledgements for that node.
    pub(super) fn send(&mut self, to: usize, body: Body, actions: &mut Vec<Action>) {
        self.unreturned[to] = false;
        let packet = Packet {
            life: self.disk.life,
            replaying: self.is_gathering(),
            rsns: self.unacknowledged[to].iter().map(|(&ssn, &rsn)| (ssn, rsn)).collect(),
            acked_life: self.lives[to],
            acks: std::mem::take(&mut self.acks[to]),
            body,
        };
        actions.push(Action::Send { to, packet });
    }

    fn flush_soon(&mut self, actions: &mut Vec<Action>) {
        let waiting = |unit: &Self, other: usize| unit.unreturned[other] || !unit.acks[other].is_empty();
        if self.others().any(|other| waiting(self, other)) && !self.flushing {
            if !self.options.piggyback {
                for other in self.others() {
                    if !self.acks[other].is_empty() {
                        self.send(other, Body::Nothing, actions);
                    }
                }
                return;
            }
            self.flushing = true;
            actions.push(Action::Timer { timer: FLUSH, after: FLUSH_AFTER });
        }
    }

    /// Messages to a process that may not have arrived and are not held.
    pub(super) fn sendable(&self, to: usize) -> Vec<Message> {
        let held = self.held.iter().find_map(|effect| match effect {
            Effect::Send(message) if message.to == to => Some(message.ssn),
            _ => None,
        });
        let upto = held.unwrap_or(u64::MAX);
        self.log.partially_logged(to).filter(|message| message.ssn < upto).cloned().collect()
    }

    fn retransmit(&mut self, actions: &mut Vec<Action>) {
        if self.is_gathering() {
            self.want_logs(actions);
            return;
        }
        for other in self.others() {
            let again = self.sendable(other);
            if again.is_empty() && !self.unacknowledged[other].is_empty() {
                self.send(other, Body::Nothing, actions);
            }
            again.into_iter().for_each(|message| self.send(other, Body::Message(message), actions));
            self.say_replayed_again(other, actions);
        }
    }

    fn checkpoint(&mut self, actions: &mut Vec<Action>) {
        let outputs = self.held.iter().filter_map(|effect| match effect {
            Effect::Show(output) => Some(output.clone()),
            Effect::Send(_) => None,
        });
        let checkpoint =
            Checkpoint { outputs: outputs.collect(), process: self.process.clone(), log: self.log.clone() };
        let bytes = checkpoint.process.checkpoint_bytes() + checkpoint.log.bytes();
        self.write(Record::Checkpoint(Box::new(checkpoint)), bytes, actions);
    }

    /// "When a block has been written from volatile memory to the file, that space in memory may be
    /// reused" (§3.3.5). Nothing is recovered from that file: messages after the checkpoint are sent again.
    fn spill(&mut self, actions: &mut Vec<Action>) {
        let bytes = self.log.bytes();
        self.spilled = self.spilled.min(bytes);
        if bytes - self.spilled > self.options.memory_bytes {
            self.write(Record::Nothing, bytes - self.spilled, actions);
            self.spilled = bytes;
        }
    }

    pub(super) fn write(&mut self, record: Record, bytes: u64, actions: &mut Vec<Action>) {
        self.writes.begin(record, bytes, actions);
    }

    pub(super) fn stored(&mut self, token: u64) {
        if let Some(record) = self.writes.get(token) {
            self.disk.store(record);
        }
    }

    fn written(&mut self, token: u64, actions: &mut Vec<Action>) {
        match self.writes.done(token) {
            Some(Record::Checkpoint(checkpoint)) => {
                let Process { received, .. } = checkpoint.process;
                for other in self.others() {
                    // "The RSN history list may be purged when the process is checkpointed" (§3.2.2).
                    self.history[other] = self.history[other].split_off(&(received[other] + 1));
                    self.send(other, Body::Checkpointed { received: received[other] }, actions);
                }
            }
            Some(Record::Replayed { .. }) => self.replay_stored(actions),
            _ => {}
        }
    }

    pub(super) fn fail(&mut self) {
        self.disk.life += 1;
        *self = Self::restored(self.options, self.disk.clone());
    }

    /// The process and its log are lost as in a failure, and what is being written is not to count.
    pub(super) fn roll_back(&mut self) {
        self.writes.iter_mut().for_each(|record| *record = Record::Nothing);
        let mut before = self.clone();
        self.fail();
        std::mem::swap(&mut self.writes, &mut before.writes);
        std::mem::swap(&mut self.lives, &mut before.lives);
        std::mem::swap(&mut self.replaying, &mut before.replaying);
        (self.shown, self.counters) = (before.shown, before.counters);
    }

    pub(super) fn the_process(&self) -> Option<&Process> {
        Some(&self.process)
    }

    pub(super) fn the_phase(&self) -> Phase {
        if self.has_told() && self.unrestored.is_empty() { Phase::Live } else { Phase::Recovering }
    }

    pub(super) fn figures(&self) -> Counters {
        let bytes = self.log.bytes();
        let log_bytes = bytes - self.spilled.min(bytes);
        Counters { log_bytes, log_messages: self.log.len() as u64, ..self.counters }
    }
}
