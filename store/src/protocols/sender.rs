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
//! - The recovery from a failure is not over (and the next failure not yet tolerated) when the process
//!   has been replayed, but when the RSNs of the messages that it sent again have come back.

mod log;
#[cfg(test)]
mod tests;
mod unit;

use std::fmt;

use super::machine::{Action, Counters, Event, Machine, Phase};
use super::model::Sii;
use super::process::{Message, Process, Workload};
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
    /// The hybrid: a receiver also logs what it receives on stable storage, waiting for nothing.
    pub log_behind: bool,
    /// A deliberate mistake.
    pub bug: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Self { checkpoint_every: 8, piggyback: true, memory_bytes: 1 << 20, log_behind: false, bug: None }
    }
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
}

/// Receive sequence number; equals the state interval index that the message began.
pub type Rsn = u64;

/// What is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Packet {
    /// The life of the receiver of messages that `rsns` are from.
    pub life: u32,
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
        /// Fully logged messages after the checkpoint.
        messages: Vec<(Rsn, Message)>,
        /// The interval of the asking process that the answering one depends on.
        depends_on: Option<Sii>,
    },
    /// The sender of the packet has replayed everything and has received so many messages of the receiver.
    Replayed {
        /// Which of its lives this is.
        life: u32,
        /// So many.
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
                let all: Vec<String> = messages.iter().map(|(rsn, message)| format!("{rsn}: {message}")).collect();
                let on = depends_on.map_or("nothing".to_owned(), |sii| format!("interval {sii}"));
                parts.push(format!("log [{}]; depends on {on} of it", all.join(", ")));
            }
            Body::Replayed { received, .. } => parts.push(format!("has replayed {received} of its messages")),
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
            Body::Log { messages, .. } => messages.iter().map(|(_, m)| 32 + u64::from(m.bytes)).sum(),
            _ => 0,
        };
        64 + 12 * (packet.rsns.len() + packet.acks.len()) as u64 + body
    }
}
