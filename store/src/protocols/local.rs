//! Receiver-based pessimistic logging: a recorder stores every message before its receiver gets it
//! (Publishing, §2 and §3).
//!
//! The recorder is the hub of a star: "any messages received incorrectly by the recorder are not passed
//! on" (Publishing, §6.1). It keeps, for each process, the stream of messages in the order in which the
//! process receives them; a message's place in the stream is the state interval that it begins. A
//! message is forwarded when it is on stable storage, so every interval that a process reaches is
//! stable, and what it sends and shows needs no waiting.
//!
//! Nodes `0..n` are units, node `n` is the recorder with its watchdogs and recovery manager.

mod recorder;
#[cfg(test)]
mod tests;
mod unit;

use std::fmt;

use super::machine::{Action, Counters, Event, Machine, Phase};
use super::model::Sii;
use super::process::{Message, Process, Workload};
use recorder::Recorder;
use unit::Unit;

/// Variants of the protocol.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Options {
    /// A process is checkpointed after so many messages; 0 is never (as in §6.4).
    pub checkpoint_every: u64,
    /// A deliberate mistake.
    pub bug: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Self { checkpoint_every: 8, bug: None }
    }
}

/// Deliberate mistakes, to show that the checks see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// The recorder forwards and acknowledges before the message is on stable storage.
    ForwardBeforeStoring,
    /// A recovering process does not ignore what was already shown (§3.4, step 2).
    ShowAgain,
    /// Older messages are discarded when a checkpoint arrives, before it is stored (§3.2).
    DiscardEarly,
    /// Replay leaves out the first message after the checkpoint (§3.4, step 3).
    ReplayOneLess,
}

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Packet {
    /// A unit sends a message, by way of the recorder.
    Publish(Message),
    /// The recorder stored messages of this unit to `to` up to `ssn`.
    Recorded {
        /// Their receiver.
        to: usize,
        /// The last one.
        ssn: u64,
    },
    /// A message in its place of the receiver's stream.
    Forward {
        /// The interval that it begins.
        sii: Sii,
        /// The message.
        message: Message,
    },
    /// The unit has received its stream up to here.
    Reached(Sii),
    /// "It is a good idea for each processor to send a message from time to time" (§3.3).
    Alive,
    /// A checkpoint of the process.
    Checkpoint(Box<Process>),
    /// A unit restarted and wants its process.
    Hello,
    /// Start a process in the recovering state (§3.4, step 2).
    Recover {
        /// Its latest checkpoint.
        checkpoint: Box<Process>,
        /// The last message from it to each process that is recorded: until when to ignore what it sends.
        ignore_up_to: Vec<u64>,
        /// It is recovering until it has received its stream up to here.
        until: Sii,
    },
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Publish(message) => write!(f, "publish {message}"),
            Self::Recorded { to, ssn } => write!(f, "recorded up to message {ssn} to unit {to}"),
            Self::Forward { sii, message } => write!(f, "{message} begins interval {sii}"),
            Self::Reached(sii) => write!(f, "reached interval {sii}"),
            Self::Alive => write!(f, "alive"),
            Self::Checkpoint(process) => write!(f, "checkpoint in interval {}", process.sii()),
            Self::Hello => write!(f, "wants its process"),
            Self::Recover { checkpoint, ignore_up_to, until } => {
                let sii = checkpoint.sii();
                write!(
                    f,
                    "recover from the checkpoint in interval {sii} to {until}, ignoring sends to {ignore_up_to:?}"
                )
            }
        }
    }
}

/// A node.
#[derive(Clone, Debug, Hash)]
pub enum Node {
    /// Of a process.
    Unit(Box<Unit>),
    /// The recorder.
    Recorder(Box<Recorder>),
}

impl Machine for Node {
    type Packet = Packet;
    type Options = Options;

    fn system(workload: Workload, options: &Options) -> Vec<Self> {
        let units = (0..workload.units).map(|id| Self::Unit(Box::new(Unit::new(Process::new(id, workload), *options))));
        units.chain([Self::Recorder(Box::new(Recorder::new(workload, *options)))]).collect()
    }

    fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action<Packet>>) {
        match self {
            Self::Unit(unit) => unit.step(event, actions),
            Self::Recorder(recorder) => recorder.step(event, actions),
        }
    }

    fn persist(&mut self, token: u64) {
        if let Self::Recorder(recorder) = self {
            recorder.persist(token);
        }
    }

    fn crash(&mut self) {
        match self {
            Self::Unit(unit) => unit.crash(),
            Self::Recorder(recorder) => recorder.crash(),
        }
    }

    fn process(&self) -> Option<&Process> {
        match self {
            Self::Unit(unit) => unit.process(),
            Self::Recorder(_) => None,
        }
    }

    fn role(&self) -> &'static str {
        match self {
            Self::Unit(_) => "unit",
            Self::Recorder(_) => "recorder",
        }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Unit(unit) => unit.phase(),
            Self::Recorder(_) => Phase::Live,
        }
    }

    fn waits_for_manager(&self) -> bool {
        matches!(self, Self::Unit(_))
    }

    fn recovery_state(&self) -> Option<Vec<Sii>> {
        match self {
            Self::Unit(_) => None,
            Self::Recorder(recorder) => Some(recorder.recorded()),
        }
    }

    fn counters(&self) -> Counters {
        match self {
            Self::Unit(unit) => unit.counters(),
            Self::Recorder(_) => Counters::default(),
        }
    }

    fn packet_bytes(packet: &Packet) -> u64 {
        match packet {
            Packet::Publish(message) | Packet::Forward { message, .. } => 64 + u64::from(message.bytes),
            Packet::Checkpoint(process) | Packet::Recover { checkpoint: process, .. } => {
                64 + process.checkpoint_bytes()
            }
            _ => 64,
        }
    }
}
