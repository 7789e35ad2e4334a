//! Optimistic logging: messages are logged behind the receiver's back; after a failure the system is
//! rolled back to the current recovery state (Johnson, ch. 4).
//!
//! Nodes `0..n` are units. Node `n` is the store: logging server, checkpoint server and recovery
//! server in one (Johnson, §4.5), with the incremental recovery state algorithm running on what it has
//! stored. Output waits in its unit until the recovery state has reached the interval that made it
//! (lemma 2.3).
//!
//! A recovery is a **round** of the store with all units: those that survive record their state and
//! what they had not logged, the store finds the recovery state, and every unit is put into it
//! (§4.2.3). Rounds are numbered; a message carries the round that its sender was put into by, so what
//! was sent before a rollback is not received after it. Messages are kept by their senders until the
//! interval that received them is recoverable, and sent again after a round.

mod store;
#[cfg(test)]
mod tests;
mod unit;

use std::fmt;

use super::machine::{Action, Counters, Event, Machine, Phase};
use super::model::Sii;
use super::process::{Message, Outbox, Output, Process, Workload};
pub use store::Store;
pub use unit::Unit;

/// Variants of the protocol.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Options {
    /// A process is checkpointed after so many messages; 0 is never.
    pub checkpoint_every: u64,
    /// The buffer of received messages is written when it holds so many, or after some milliseconds.
    pub log_every: usize,
    /// A deliberate mistake.
    pub bug: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Self { checkpoint_every: 16, log_every: 4, bug: None }
    }
}

/// Deliberate mistakes, to show that the checks see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// Output leaves at once.
    OutputAtOnce,
    /// Survivors are not rolled back though they are beyond the recovery state.
    KeepOrphans,
    /// Messages from before a rollback are received after it.
    OldRounds,
    /// Messages are acknowledged as logged when they arrive at the store.
    AcknowledgeEarly,
    /// Only the newest checkpoint is kept, though it may be beyond the recovery state (lemma 2.4).
    CollectTooMuch,
}

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Saved {
    /// The process.
    pub process: Process,
    /// What it sent and may have to send again.
    pub outbox: Outbox,
    /// Output that was not released.
    pub outputs: Vec<Output>,
}

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Packet {
    /// An application message, tagged with the round of its sender.
    Message {
        /// The round.
        round: u64,
        /// The message.
        message: Message,
    },
    /// Messages of the other unit that were received, and that are received for good.
    Received {
        /// The round.
        round: u64,
        /// Received.
        received: u64,
        /// In intervals that are recoverable.
        safe: u64,
    },
    /// To the store: messages received, with the intervals that they began.
    Log {
        /// The round.
        round: u64,
        /// The messages.
        messages: Vec<(Sii, Message)>,
    },
    /// From the store: these are logged; and how far the unit's state is recoverable.
    Logged {
        /// The round.
        round: u64,
        /// Intervals whose messages are logged.
        siis: Vec<Sii>,
        /// The unit's interval in the current recovery state.
        recovered: Sii,
    },
    /// To the store: a checkpoint.
    Checkpoint {
        /// The round.
        round: u64,
        /// The checkpoint.
        saved: Box<Saved>,
    },
    /// To the store: a unit has lost its process, or is waiting for the end of a round.
    Hello {
        /// The last round that it has heard of.
        heard: u64,
        /// Counts the unit's failures.
        life: u32,
    },
    /// From the store: stop and hand over everything.
    Stop {
        /// The new round.
        round: u64,
    },
    /// To the store: everything (§4.2.3). Nothing from a unit that has failed.
    Stopped {
        /// The new round.
        round: u64,
        /// The round that the state is of.
        of: u64,
        /// The state as a checkpoint.
        saved: Option<Box<Saved>>,
        /// What was not logged.
        messages: Vec<(Sii, Message)>,
        /// Counts the unit's failures.
        life: u32,
    },
    /// From the store: go on from here.
    Resume {
        /// The new round.
        round: u64,
        /// A unit that stopped in this round of state and in interval `to` is already there.
        unless: u64,
        /// Its interval in the recovery state.
        to: Sii,
        /// For this life of the unit: a later one may have lost what was done after this already.
        life: u32,
        /// The effective checkpoint.
        saved: Box<Saved>,
        /// Messages from there on.
        messages: Vec<Message>,
    },
    /// To the store: the unit goes on.
    Resumed {
        /// The round.
        round: u64,
    },
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |siis: &mut dyn Iterator<Item = Sii>| siis.map(|s| s.to_string()).collect::<Vec<_>>().join(", ");
        let intervals = |messages: &[(Sii, Message)]| list(&mut messages.iter().map(|(sii, _)| *sii));
        match self {
            Self::Message { round, message } => write!(f, "{message}, round {round}"),
            Self::Received { round, received, safe } => {
                write!(f, "received {received} messages, {safe} of them for good, round {round}")
            }
            Self::Log { round, messages } => write!(f, "log intervals [{}], round {round}", intervals(messages)),
            Self::Logged { round, siis, recovered } => {
                let siis = list(&mut siis.iter().copied());
                write!(f, "logged intervals [{siis}]; recoverable up to {recovered}, round {round}")
            }
            Self::Checkpoint { round, saved } => {
                write!(f, "checkpoint in interval {}, round {round}", saved.process.sii())
            }
            Self::Hello { heard, life } => write!(f, "wants its process; has heard of round {heard}; life {life}"),
            Self::Stop { round } => write!(f, "stop for round {round}"),
            Self::Stopped { round, of, saved, messages, life } => {
                let state = saved.as_ref().map_or("nothing".to_owned(), |s| format!("interval {}", s.process.sii()));
                let unlogged = intervals(messages);
                write!(f, "stopped for round {round} with {state} of round {of}, unlogged [{unlogged}]; life {life}")
            }
            Self::Resume { round, to, saved, life, .. } => {
                let from = saved.process.sii();
                write!(f, "resume in interval {to} from the checkpoint in {from}, round {round}; life {life}")
            }
            Self::Resumed { round } => write!(f, "resumed, round {round}"),
        }
    }
}

/// A node.
#[derive(Clone, Debug, Hash)]
pub enum Node {
    /// Of a process.
    Unit(Box<Unit>),
    /// The store.
    Store(Box<Store>),
}

impl Machine for Node {
    type Packet = Packet;
    type Options = Options;

    fn system(workload: Workload, options: &Options) -> Vec<Self> {
        let units = (0..workload.units).map(|id| Self::Unit(Box::new(Unit::new(Process::new(id, workload), *options))));
        units.chain([Self::Store(Box::new(Store::new(workload, *options)))]).collect()
    }

    fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action<Packet>>) {
        match self {
            Self::Unit(unit) => unit.step(event, actions),
            Self::Store(store) => store.step(event, actions),
        }
    }

    fn persist(&mut self, token: u64) {
        if let Self::Store(store) = self {
            store.persist(token);
        }
    }

    fn crash(&mut self) {
        match self {
            Self::Unit(unit) => unit.crash(),
            Self::Store(store) => store.crash(),
        }
    }

    fn process(&self) -> Option<&Process> {
        match self {
            Self::Unit(unit) => unit.process(),
            Self::Store(_) => None,
        }
    }

    fn role(&self) -> &'static str {
        match self {
            Self::Unit(_) => "unit",
            Self::Store(_) => "store",
        }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Unit(unit) => unit.phase(),
            Self::Store(_) => Phase::Live,
        }
    }

    fn recovery_state(&self) -> Option<Vec<Sii>> {
        match self {
            Self::Unit(_) => None,
            Self::Store(store) => Some(store.recovery_state()),
        }
    }

    fn counters(&self) -> Counters {
        match self {
            Self::Unit(unit) => unit.counters(),
            Self::Store(_) => Counters::default(),
        }
    }

    fn packet_bytes(packet: &Packet) -> u64 {
        let messages = |messages: &[(Sii, Message)]| messages.iter().map(|(_, m)| 32 + u64::from(m.bytes)).sum::<u64>();
        64 + match packet {
            Packet::Message { message, .. } => u64::from(message.bytes),
            Packet::Log { messages: of, .. } => messages(of),
            Packet::Checkpoint { saved, .. } => saved.process.checkpoint_bytes(),
            Packet::Stopped { saved, messages: of, .. } => {
                messages(of) + saved.as_ref().map_or(0, |saved| saved.process.checkpoint_bytes())
            }
            Packet::Resume { saved, messages, .. } => {
                saved.process.checkpoint_bytes() + messages.iter().map(|m| 32 + u64::from(m.bytes)).sum::<u64>()
            }
            _ => 0,
        }
    }
}
