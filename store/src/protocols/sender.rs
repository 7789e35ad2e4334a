//! Sender-based pessimistic logging: a message is logged in the memory of its sender, with the receive
//! sequence number that the receiver returns (Johnson, ch. 3).
//!
//! A process may run on after receiving a message, but what it sends and shows is **held** until the
//! senders of all that it received have acknowledged the RSNs. So nobody depends on an interval that
//! can't be replayed, and one failure at a time rolls nobody else back. With more, the dependency
//! vectors tell whether what can be replayed is consistent (§3.2.4); if not that is reported.
//!
//! What the thesis leaves open and has to be so:
//!
//! - A message whose RSN lies beyond the first gap in the sequence of fully logged messages is neither
//!   in that sequence nor partially logged. It has to be treated as partially logged: resent, and
//!   given a new RSN that replaces the old one.
//! - RSNs and acknowledgements of a receiver's earlier life may still be on their way. They carry the
//!   number of the life, and old ones are ignored.
//! - In the extensions of §3.5 ([`Extension`]) a process that was replayed receives nothing before all that
//!   depend on what it has lost are rolled back, and all that depend on what these lose in turn: else a
//!   rollback can follow the messages of those that have still to be rolled back for ever. How far
//!   a replay went is on stable storage before anybody is told, so that no later replay gets further with
//!   RSNs of a history that is gone. And if older checkpoints are used, logs must be as old.
//! - The recovery from a failure is not over (and the next failure not yet tolerated) when the process
//!   has been replayed, but when the RSNs of the messages that it sent again have come back.

mod log;
mod recovery;
mod storage;
#[cfg(test)]
mod tests;
mod unit;

use std::fmt;

use super::machine::{Action, Counters, Event, Machine, Phase};
use super::model::Sii;
use super::process::{Message, Output, Process, Workload};
pub use unit::Unit;

/// Variants of the protocol.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Options {
    /// A process is checkpointed after so many messages; 0 is never.
    pub checkpoint_every: u64,
    /// Return RSNs and acknowledgements on messages that go the same way, several in a packet (the
    /// optimisations of §3.2.5).
    pub piggyback: bool,
    /// Bytes of message log in memory; what is more is spilled to a file (§3.3.5).
    pub memory_bytes: u64,
    /// What is done about more failures than one at a time.
    pub extension: Extension,
    /// The hybrid: a receiver also logs what it receives on stable storage, waiting for nothing.
    pub log_behind: bool,
    /// A deliberate mistake.
    pub bug: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        let extension = Extension::None;
        Self { checkpoint_every: 8, piggyback: true, memory_bytes: 1 << 20, extension, log_behind: false, bug: None }
    }
}

impl Options {
    /// Whether a process may be put into another checkpoint than its last.
    fn keeps_all_checkpoints(&self) -> bool {
        self.extension == Extension::AllCheckpoints && self.bug != Some(Bug::LastCheckpoint)
    }
}

/// What is done about processes that depend on what several failures have lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Extension {
    /// They are noticed, and the system is given up (§3.2.4).
    #[default]
    None,
    /// They are rolled back to their last checkpoints, one at a time; if one of these depends on what was
    /// lost, that is noticed and the system is given up (the first extension of §3.5).
    RollBack,
    /// All checkpoints are kept, so that one is always old enough (the second). Logs are kept with them.
    AllCheckpoints,
}

/// Deliberate mistakes, to show that the checks see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// Sends and outputs are not held until RSNs are acknowledged.
    NoHold,
    /// RSNs are acknowledged but the third of every process is not put in the log.
    DropRsn,
    /// A sender forgets messages as soon as their RSN arrives.
    ForgetEarly,
    /// A duplicate is given a new RSN.
    NewRsnForDuplicate,
    /// Messages beyond a gap are not resent.
    KeepBeyondGap,
    /// A process that depends on what was lost is not rolled back.
    KeepOrphans,
    /// All that have to be rolled back are, at the same time. More of the log is lost; that is no mistake.
    AllAtOnce,
    /// A process that was replayed receives messages before all that have to be are rolled back.
    HearOrphans,
    /// Only the last checkpoint is kept, and it is used whatever it depends on.
    LastCheckpoint,
}

/// Receive sequence number; equals the state interval index that the message began.
pub type Rsn = u64;

/// What is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Packet {
    /// The life of the receiver of messages that `rsns` are from.
    pub life: u32,
    /// The sender of the packet is waiting for logs, or being replayed.
    pub replaying: bool,
    /// RSNs returned: number of the message, and what it was given, or nothing if it need not be logged
    /// (DONT_LOG in §3.3.3). To be handled before `message`.
    pub rsns: Vec<(u64, Option<Rsn>)>,
    /// The life of the receiver of messages that `acks` are for.
    pub acked_life: u32,
    /// RSNs acknowledged.
    pub acks: Vec<(u64, Option<Rsn>)>,
    /// What else.
    pub body: Body,
}

/// What a packet carries besides RSNs and acknowledgements.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Body {
    /// Nothing.
    #[default]
    Nothing,
    /// An application message.
    Message(Message),
    /// The sender of the packet was checkpointed when it had received so many messages of the receiver.
    Checkpointed {
        /// So many.
        received: u64,
    },
    /// The sender of the packet failed, was restored from a checkpoint and wants what is logged for it.
    WantLog {
        /// Which of its lives this is.
        life: u32,
        /// The interval of the checkpoint.
        sii: Sii,
    },
    /// The answer.
    Log {
        /// To which life.
        life: u32,
        /// And to the request for what is after this interval.
        sii: Sii,
        /// Fully logged messages after it, with their RSNs and the lives of the asking process that these
        /// are from.
        messages: Vec<(u32, Rsn, Message)>,
        /// The interval of the asking process that the answering one depends on.
        depends_on: Option<Sii>,
        /// If the answering process has been replayed: up to which interval, and how many messages of the
        /// asking one it had received then.
        replayed: Option<(Sii, u64)>,
    },
    /// The sender of the packet has replayed everything.
    Replayed {
        /// Which of its lives this is.
        life: u32,
        /// Up to this interval.
        sii: Sii,
        /// It has received so many messages of the receiver.
        received: u64,
    },
    /// The answer to that life.
    Noted {
        /// Which.
        life: u32,
    },
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = |pairs: &[(u64, Option<Rsn>)]| {
            let rsn = |rsn: Option<Rsn>| rsn.map_or("none".to_owned(), |rsn| rsn.to_string());
            pairs.iter().map(|&(ssn, of)| format!("message {ssn} RSN {}", rsn(of))).collect::<Vec<_>>().join(", ")
        };
        let mut parts = Vec::new();
        if !self.rsns.is_empty() {
            parts.push(format!("returns {}", pairs(&self.rsns)));
        }
        if !self.acks.is_empty() {
            parts.push(format!("acknowledges {}", pairs(&self.acks)));
        }
        match &self.body {
            Body::Nothing => {}
            Body::Message(message) => parts.push(message.to_string()),
            Body::Checkpointed { received } => parts.push(format!("checkpointed with {received} messages received")),
            Body::WantLog { sii, .. } => parts.push(format!("wants what is logged for it after interval {sii}")),
            Body::Log { messages, depends_on, .. } => {
                let all: Vec<String> = messages.iter().map(|(_, rsn, message)| format!("{rsn}: {message}")).collect();
                let on = depends_on.map_or("nothing".to_owned(), |sii| format!("interval {sii}"));
                parts.push(format!("log [{}]; depends on {on} of it", all.join(", ")));
            }
            Body::Replayed { sii, received, .. } => {
                parts.push(format!("has been replayed up to interval {sii}, with {received} of its messages"));
            }
            Body::Noted { .. } => parts.push("noted".to_owned()),
        }
        if self.life > 0 {
            parts.push(format!("life {}", self.life));
        }
        f.write_str(&parts.join("; "))
    }
}

impl Machine for Unit {
    type Packet = Packet;
    type Options = Options;

    fn system(workload: Workload, options: &Options) -> Vec<Self> {
        (0..workload.units).map(|id| Self::new(Process::new(id, workload), *options)).collect()
    }

    fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action<Packet>>) {
        self.happen(event, actions);
    }

    fn persist(&mut self, token: u64) {
        self.stored(token);
    }

    fn crash(&mut self) {
        self.fail();
    }

    fn process(&self) -> Option<&Process> {
        self.the_process()
    }

    fn phase(&self) -> Phase {
        self.the_phase()
    }

    fn counters(&self) -> Counters {
        self.figures()
    }

    fn packet_bytes(packet: &Packet) -> u64 {
        let body = match &packet.body {
            Body::Message(message) => u64::from(message.bytes),
            Body::Log { messages, .. } => messages.iter().map(|(_, _, m)| 32 + u64::from(m.bytes)).sum(),
            _ => 0,
        };
        64 + 12 * (packet.rsns.len() + packet.acks.len()) as u64 + body
    }
}
