//! A unit under a recorder.

use super::{Bug, Counters, Event, Options, Packet, Phase, Process};
use crate::protocols::process::{Effect, Outbox};

type Action = super::Action<Packet>;

const RETRANSMIT: u64 = 0;
const ALIVE: u64 = 1;
/// Microseconds between retransmissions.
const RETRANSMIT_EVERY: u64 = 4_000;
/// Microseconds between signs of life.
const ALIVE_EVERY: u64 = 5_000;

/// A process and its kernel. Nothing of it survives a failure.
#[derive(Clone, Debug, Hash)]
pub struct Unit {
    options: Options,
    id: usize,
    units: usize,
    /// `None` between a restart and the recorder's [`Packet::Recover`].
    process: Option<Process>,
    /// What the recorder has not acknowledged.
    outbox: Outbox,
    /// While recovering: the last message to each process that was recorded.
    ignore_up_to: Vec<u64>,
    /// How many outputs the world has taken.
    shown: u64,
    /// Recovering until this interval is reached.
    until: u64,
    since_checkpoint: u64,
}

impl Unit {
    pub(super) fn new(process: Process, options: Options) -> Self {
        let units = process.sent.len();
        Self {
            options,
            id: process.id,
            units,
            process: Some(process),
            outbox: Outbox::new(units),
            ignore_up_to: vec![0; units],
            shown: 0,
            until: 0,
            since_checkpoint: 0,
        }
    }

    fn recorder(&self) -> usize {
        self.units
    }

    pub(super) fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Start => {
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                actions.push(Action::Timer { timer: ALIVE, after: ALIVE_EVERY });
                let effects = self.process.as_mut().expect("created with one").start();
                self.carry_out(effects, actions);
            }
            Event::Restarted { shown } => {
                self.shown = if self.options.bug == Some(Bug::ShowAgain) { 0 } else { shown };
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                actions.push(Action::Timer { timer: ALIVE, after: ALIVE_EVERY });
                actions.push(Action::Send { to: self.recorder(), packet: Packet::Hello });
            }
            Event::Timer(RETRANSMIT) => {
                let to = self.recorder();
                if self.process.is_none() {
                    actions.push(Action::Send { to, packet: Packet::Hello });
                }
                let again = self.outbox.unreceived().cloned();
                actions.extend(again.map(|message| Action::Send { to, packet: Packet::Publish(message) }));
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
            }
            Event::Timer(_) => {
                // Also says how far it is, in case the last word about that was lost.
                let packet = self.process.as_ref().map_or(Packet::Alive, |process| Packet::Reached(process.sii()));
                actions.push(Action::Send { to: self.recorder(), packet });
                actions.push(Action::Timer { timer: ALIVE, after: ALIVE_EVERY });
            }
            Event::Packet { packet, .. } => self.packet(packet, actions),
            Event::Written(_) | Event::Down(_) => {}
        }
    }

    fn packet(&mut self, packet: Packet, actions: &mut Vec<Action>) {
        match packet {
            Packet::Recorded { to, ssn } => self.outbox.safe(to, ssn),
            Packet::Forward { sii, message } => {
                let Some(process) = &mut self.process else { return };
                if sii == process.sii() + 1 {
                    let effects = process.receive(&message);
                    self.since_checkpoint += 1;
                    self.carry_out(effects, actions);
                    self.maybe_checkpoint(actions);
                }
                let reached = self.process.as_ref().expect("checked above").sii();
                actions.push(Action::Send { to: self.recorder(), packet: Packet::Reached(reached) });
            }
            Packet::Recover { checkpoint, ignore_up_to, until } => {
                if self.process.as_ref().is_some_and(|process| process.sii() >= checkpoint.sii()) {
                    return; // A repeated answer to a repeated question.
                }
                self.ignore_up_to = ignore_up_to;
                self.until = until;
                let effects = self.process.insert(*checkpoint).start();
                self.carry_out(effects, actions);
                let reached = self.process.as_ref().expect("just inserted").sii();
                actions.push(Action::Send { to: self.recorder(), packet: Packet::Reached(reached) });
            }
            _ => {}
        }
    }

    /// "It is up to the kernel on the new processor to ignore all messages sent by the recovering
    /// process until the process sends a message it had not sent before the crash" (§3.4).
    fn carry_out(&mut self, effects: Vec<Effect>, actions: &mut Vec<Action>) {
        for effect in effects {
            match effect {
                Effect::Send(message) if message.ssn <= self.ignore_up_to[message.to] => {}
                Effect::Send(message) => {
                    self.outbox.keep(message.clone());
                    actions.push(Action::Send { to: self.recorder(), packet: Packet::Publish(message) });
                }
                Effect::Show(output) if output.number < self.shown => {}
                Effect::Show(output) => {
                    self.shown = output.number + 1;
                    actions.push(Action::Show(output));
                }
            }
        }
    }

    /// A checkpoint is the process's state when everything that it sent is recorded: the recorder then
    /// needs nothing else of this unit.
    fn maybe_checkpoint(&mut self, actions: &mut Vec<Action>) {
        let due = self.options.checkpoint_every > 0 && self.since_checkpoint >= self.options.checkpoint_every;
        if due && self.outbox.is_empty() && self.phase() == Phase::Live {
            self.since_checkpoint = 0;
            let process = self.process.clone().expect("it just received");
            actions.push(Action::Send { to: self.recorder(), packet: Packet::Checkpoint(Box::new(process)) });
        }
    }

    pub(super) fn crash(&mut self) {
        *self = Self {
            options: self.options,
            id: self.id,
            units: self.units,
            process: None,
            outbox: Outbox::new(self.units),
            ignore_up_to: vec![0; self.units],
            shown: 0,
            until: 0,
            since_checkpoint: 0,
        };
    }

    pub(super) fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    pub(super) fn phase(&self) -> Phase {
        match &self.process {
            Some(process) if process.sii() >= self.until => Phase::Live,
            _ => Phase::Recovering,
        }
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { log_bytes: self.outbox.bytes(), log_messages: self.outbox.len() as u64, ..Counters::default() }
    }
}
