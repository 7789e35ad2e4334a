//! A process that is logged behind its back (Johnson, §4.2).

use std::collections::{BTreeMap, VecDeque};

use super::{Bug, Counters, Event, Message, Options, Outbox, Output, Packet, Phase, Process, Saved, Sii};
use crate::protocols::process::Effect;

type Action = super::Action<Packet>;

const RETRANSMIT: u64 = 0;
/// Microseconds between retransmissions; also the longest that a message stays unlogged.
const RETRANSMIT_EVERY: u64 = 4_000;

/// A process, and what has not been logged of it. Nothing survives a failure.
#[derive(Clone, Debug, Hash)]
pub struct Unit {
    options: Options,
    units: usize,
    process: Option<Process>,
    outbox: Outbox,
    /// "A buffer of messages received by the process that have not yet been logged" (§4.2.1).
    buffer: BTreeMap<Sii, Message>,
    /// How many of the buffer are new since it was last written.
    unwritten: usize,
    /// Output waiting for the recovery state.
    outputs: VecDeque<Output>,
    shown: u64,
    /// This process's interval in the current recovery state.
    recovered: Sii,
    since_checkpoint: u64,
    /// The round that the process was put into its state by.
    round: u64,
    /// The last round heard of; above `round` while that is under way.
    heard: u64,
    counters: Counters,
    /// Counts failures; on stable storage, or a clock.
    life: u32,
}

impl Unit {
    pub(super) fn new(process: Process, options: Options) -> Self {
        let units = process.sent.len();
        Self { process: Some(process), ..Self::empty(units, options) }
    }

    fn empty(units: usize, options: Options) -> Self {
        Self {
            options,
            units,
            process: None,
            outbox: Outbox::new(units),
            buffer: BTreeMap::new(),
            unwritten: 0,
            outputs: VecDeque::new(),
            shown: 0,
            recovered: 0,
            since_checkpoint: 0,
            round: 0,
            heard: 0,
            counters: Counters::default(),
            life: 0,
        }
    }

    pub(super) fn crash(&mut self) {
        *self = Self { life: self.life + 1, ..Self::empty(self.units, self.options) };
    }

    fn to_store(&self, packet: Packet, actions: &mut Vec<Action>) {
        actions.push(Action::Send { to: self.units, packet });
    }

    pub(super) fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Start => {
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                let effects = self.process.as_mut().expect("created with one").start();
                self.carry_out(effects, actions);
            }
            Event::Restarted { shown } => {
                self.shown = shown;
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                self.to_store(Packet::Hello { heard: self.heard, life: self.life }, actions);
            }
            Event::Timer(_) => {
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                if self.phase() == Phase::Recovering {
                    self.to_store(Packet::Hello { heard: self.heard, life: self.life }, actions);
                    return;
                }
                let again = self.outbox.unreceived().cloned();
                let round = self.round;
                actions.extend(
                    again.map(|message| Action::Send { to: message.to, packet: Packet::Message { round, message } }),
                );
                self.write_buffer(actions);
            }
            Event::Packet { from, packet } => self.packet(from, packet, actions),
            Event::Written(_) | Event::Down(_) => {}
        }
    }

    fn packet(&mut self, from: usize, packet: Packet, actions: &mut Vec<Action>) {
        match packet {
            Packet::Message { round, message } => {
                let old = round != self.round && self.options.bug != Some(Bug::OldRounds);
                if !old && self.phase() == Phase::Live {
                    self.message(message, actions);
                    self.say_received(from, actions);
                }
            }
            Packet::Received { round, received, safe } if round == self.round => {
                self.outbox.received(from, received);
                self.outbox.safe(from, safe);
            }
            Packet::Logged { round, siis, recovered } if round == self.round && self.phase() == Phase::Live => {
                self.buffer.retain(|sii, _| !siis.contains(sii));
                self.advance(recovered, actions);
            }
            Packet::Stop { round } if round > self.round => {
                self.heard = self.heard.max(round);
                if round < self.heard {
                    return;
                }
                let saved = self.saved().map(Box::new);
                let messages = std::iter::empty().chain(&self.buffer).map(|(&sii, m)| (sii, m.clone())).collect();
                self.to_store(Packet::Stopped { round, of: self.round, saved, messages, life: self.life }, actions);
            }
            Packet::Resume { round, unless, to, saved, messages, life } if life == self.life => {
                if round > self.round && round >= self.heard {
                    self.resume(round, unless, to, *saved, messages, actions);
                }
                if round == self.round {
                    self.to_store(Packet::Resumed { round }, actions);
                }
            }
            _ => {}
        }
    }

    /// §4.2.2.
    fn message(&mut self, message: Message, actions: &mut Vec<Action>) {
        let process = self.process.as_mut().expect("it is live");
        if !process.is_next(&message) {
            return;
        }
        let effects = process.receive(&message);
        let sii = process.sii();
        self.buffer.insert(sii, message);
        self.unwritten += 1;
        self.since_checkpoint += 1;
        self.carry_out(effects, actions);
        if self.unwritten >= self.options.log_every {
            self.write_buffer(actions);
        }
        if self.options.checkpoint_every > 0 && self.since_checkpoint >= self.options.checkpoint_every {
            self.since_checkpoint = 0;
            let saved = Box::new(self.saved().expect("it is live"));
            self.to_store(Packet::Checkpoint { round: self.round, saved }, actions);
        }
    }

    fn write_buffer(&mut self, actions: &mut Vec<Action>) {
        self.unwritten = 0;
        // Also with nothing to log: the answer says how far the recovery state is.
        if !self.buffer.is_empty() || !self.outputs.is_empty() || !self.outbox.is_empty() {
            let messages = self.buffer.iter().map(|(&sii, message)| (sii, message.clone())).collect();
            self.to_store(Packet::Log { round: self.round, messages }, actions);
        }
    }

    /// Says what has been received from a unit, and what of it for good.
    fn say_received(&mut self, from: usize, actions: &mut Vec<Action>) {
        let process = self.process.as_ref().expect("it is live");
        let received = process.received[from];
        // What was received after the recoverable interval is not safe.
        let after =
            process.history.iter().skip(self.recovered as usize).filter(|interval| interval.from == from).count();
        let packet = Packet::Received { round: self.round, received, safe: received - after as u64 };
        actions.push(Action::Send { to: from, packet });
    }

    fn carry_out(&mut self, effects: Vec<Effect>, actions: &mut Vec<Action>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => {
                    self.outbox.keep(message.clone());
                    let packet = Packet::Message { round: self.round, message: message.clone() };
                    actions.push(Action::Send { to: message.to, packet });
                }
                Effect::Show(output) if output.number < self.shown => {}
                Effect::Show(output) => {
                    self.counters.held += 1;
                    self.outputs.push_back(output);
                }
            }
        }
        self.release(actions);
    }

    /// The recovery state has advanced: output is released (lemma 2.3) and messages need not be logged
    /// any more (lemma 2.5).
    fn advance(&mut self, recovered: Sii, actions: &mut Vec<Action>) {
        if recovered <= self.recovered {
            return;
        }
        self.recovered = recovered;
        self.buffer = self.buffer.split_off(&(recovered + 1));
        self.release(actions);
        for other in 0..self.units {
            if self.process.as_ref().is_some_and(|process| process.received[other] > 0) {
                self.say_received(other, actions);
            }
        }
    }

    fn release(&mut self, actions: &mut Vec<Action>) {
        let recovered = if self.options.bug == Some(Bug::OutputAtOnce) { Sii::MAX } else { self.recovered };
        while let Some(output) = self.outputs.pop_front_if(|output| output.made_in <= recovered) {
            self.shown = output.number + 1;
            actions.push(Action::Show(output));
        }
    }

    fn saved(&self) -> Option<Saved> {
        let process = self.process.clone()?;
        Some(Saved { process, outbox: self.outbox.clone(), outputs: self.outputs.iter().cloned().collect() })
    }

    /// "Any other process currently executing in a state interval beyond its state interval in the
    /// current recovery state must be rolled back" (§4.2.3).
    fn resume(
        &mut self,
        round: u64,
        unless: u64,
        to: Sii,
        saved: Saved,
        messages: Vec<Message>,
        actions: &mut Vec<Action>,
    ) {
        let there = |process: &Process| process.sii() == to || self.options.bug == Some(Bug::KeepOrphans);
        let there = self.round == unless && self.process.as_ref().is_some_and(there);
        (self.round, self.heard) = (round, round);
        if !there {
            *self = Self {
                shown: self.shown,
                recovered: saved.process.sii().min(to),
                round,
                heard: round,
                counters: self.counters,
                life: self.life,
                outbox: saved.outbox,
                outputs: saved.outputs.into_iter().filter(|output| output.number >= self.shown).collect(),
                process: Some(saved.process),
                ..Self::empty(self.units, self.options)
            };
            let effects = self.process.as_mut().expect("just put in").start();
            self.carry_out(effects, actions);
            for message in messages {
                let effects = self.process.as_mut().expect("just put in").receive(&message);
                self.carry_out(effects, actions);
            }
        }
        // Others may have been rolled back to before they received what they said they had.
        (0..self.units).for_each(|other| self.outbox.received_only(other, 0));
        self.buffer.clear();
        self.advance(to, actions);
        let again = self.outbox.unreceived().cloned();
        actions
            .extend(again.map(|message| Action::Send { to: message.to, packet: Packet::Message { round, message } }));
    }

    pub(super) fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    pub(super) fn phase(&self) -> Phase {
        if self.process.is_some() && self.heard == self.round { Phase::Live } else { Phase::Recovering }
    }

    pub(super) fn counters(&self) -> Counters {
        let log_bytes = self.buffer.values().map(|message| u64::from(message.bytes)).sum();
        Counters { log_bytes, log_messages: self.buffer.len() as u64, ..self.counters }
    }
}
