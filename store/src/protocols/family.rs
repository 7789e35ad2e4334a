//! Family-based logging: the receipt order of a message is kept in the memories of `f + 1` hosts, its
//! data in that of its sender; `f` failures are tolerated and nobody is rolled back (Elnozahy, §2).
//!
//! The receipt order of one message is a [`Determinant`]. A process adds to what it sends the
//! determinants that are not known to be held by `f + 1` hosts. Nothing is held back but output, which
//! waits until all that it depends on is held by enough.
//!
//! Recovery is Elnozahy's (§3): incarnation numbers, a leader that is the recovering process with the
//! lowest ordinal, which collects the determinants of all live processes while these go on; or, for
//! comparison, the one in which live processes block meanwhile.
//!
//! Nodes `0..n` are units. Node `n` stands for what the paper takes for given: the system-wide ordinal,
//! and for `f = n` the "stable storage \[modelled\] as an additional process that never fails" (§3.3).
//!
//! What the paper leaves open and has to be so: `incarnation ← incarnation + 1` (§3.4, step 2) must
//! reach stable storage before anything is sent. Restored with the checkpoint and incremented, it would be the same after a
//! second failure as after the first, and messages of the failed incarnation would be taken for new
//! ([`Bug::IncarnationFromCheckpoint`]). The recovering processes, too, have to answer, with the receipt
//! orders in their checkpoints: a checkpoint may depend on the interval of another that fails at the
//! same time, and nobody else may hold its receipt orders ([`Bug::OnlyLiveAnswer`]). And a leader must give the lead away when it has gathered and
//! not when it is live again: if a process fails after it answered, the leader needs messages from it
//! that only its recovery regenerates, and that recovery waits for the lead.

mod registrar;
#[cfg(test)]
mod tests;
mod unit;

use std::collections::BTreeMap;
use std::fmt;

use super::machine::{Action, Counters, Event, Machine, Phase};
use super::model::Sii;
use super::process::{Message, Outbox, Output, Process, Workload};
pub use registrar::Registrar;
pub use unit::Unit;

/// Variants of the protocol.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Options {
    /// How many failures are tolerated at a time, from 1 to the number of units. With the number of
    /// units, determinants also go to stable storage.
    pub failures: usize,
    /// A process is checkpointed after so many messages; 0 is never.
    pub checkpoint_every: u64,
    /// Live processes receive nothing from when they are asked until the recovery is over.
    pub blocking: bool,
    /// A deliberate mistake.
    pub bug: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Self { failures: 1, checkpoint_every: 8, blocking: false, bug: None }
    }
}

/// Deliberate mistakes, to show that the checks see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// Determinants are held by the receiver alone.
    NoPiggyback,
    /// Output does not wait.
    OutputAtOnce,
    /// Live processes accept messages of earlier incarnations.
    AcceptStale,
    /// The leader does not wait for one of the live processes.
    MissOneReply,
    /// Recovering processes do not tell the leader what their checkpoints hold (as printed, §3.4).
    OnlyLiveAnswer,
    /// The incarnation is what the checkpoint says, and one more.
    IncarnationFromCheckpoint,
}

/// Which message began which interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Receipt {
    /// The receiver.
    pub unit: usize,
    /// The interval that began.
    pub sii: Sii,
}

/// The receipt order of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Determinant {
    /// Sender of the message.
    pub from: usize,
    /// Its number.
    pub ssn: u64,
    /// Which nodes are known to hold this, a bit for each.
    pub holders: u64,
}

/// Determinants by what they determine: `depinfo` (Elnozahy, §3.2).
pub type Determinants = BTreeMap<Receipt, Determinant>;

/// What is sent. `incarnation` is always that of the sender.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// The sender's incarnation.
    pub incarnation: u32,
    /// What.
    pub body: Body,
}

/// What a packet carries.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Body {
    /// An application message with determinants.
    Message(Message, Determinants),
    /// So many messages of the other were received (with their determinants).
    Received(u64),
    /// Please hold these, too.
    Hold(Determinants),
    /// These are held.
    Held(Vec<Receipt>),
    /// The sender was checkpointed in this interval, having received so many messages of the other.
    Checkpointed(Sii, u64),
    /// To the registrar: a process starts recovery. To a unit: is it live?
    Register,
    /// From the registrar: who is recovering, as (ordinal, unit, incarnation).
    Recovering(Vec<(u64, usize, u32)>),
    /// Leader to live: the incarnations, and a request for determinants (§3.4, step 5).
    Ask(u64, Vec<u32>),
    /// The answer to the attempt of that number.
    Answer(u64, Determinants),
    /// Leader to recovering: what was gathered (step 6).
    Gathered(Determinants, Vec<u32>),
    /// A recovering process has received so many messages of the other and wants the rest.
    Replaying(u64),
    /// To units: the process is live again. To the registrar: it has what was gathered.
    Live,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let orders = |determinants: &Determinants| {
            let one = |(receipt, d): (&Receipt, &Determinant)| {
                format!("{}:{} is message {} of {}", receipt.unit, receipt.sii, d.ssn, d.from)
            };
            determinants.iter().map(one).collect::<Vec<_>>().join(", ")
        };
        match &self.body {
            Body::Message(message, with) if with.is_empty() => write!(f, "{message}")?,
            Body::Message(message, with) => write!(f, "{message} with [{}]", orders(with))?,
            Body::Received(ssn) => write!(f, "received {ssn} messages")?,
            Body::Hold(with) => write!(f, "hold [{}]", orders(with))?,
            Body::Held(receipts) => {
                let all: Vec<String> =
                    receipts.iter().map(|receipt| format!("{}:{}", receipt.unit, receipt.sii)).collect();
                write!(f, "holds [{}]", all.join(", "))?;
            }
            Body::Checkpointed(sii, received) => {
                write!(f, "checkpointed in interval {sii} with {received} messages received")?;
            }
            Body::Register => write!(f, "starts recovery, or asks whether that is over")?,
            Body::Recovering(list) => {
                let all: Vec<String> =
                    list.iter().map(|(ord, unit, inc)| format!("{ord}: unit {unit} ({inc})")).collect();
                write!(f, "recovering are [{}]", all.join(", "))?;
            }
            Body::Ask(_, incarnations) => write!(f, "asks for receipt orders; incarnations {incarnations:?}")?,
            Body::Answer(_, with) => write!(f, "knows [{}]", orders(with))?,
            Body::Gathered(with, incarnations) => {
                write!(f, "gathered [{}]; incarnations {incarnations:?}", orders(with))?;
            }
            Body::Replaying(received) => write!(f, "has {received} of its messages and wants the rest")?,
            Body::Live => write!(f, "has what it needs")?,
        }
        if self.incarnation > 0 { write!(f, "; incarnation {}", self.incarnation) } else { Ok(()) }
    }
}

/// A node.
#[derive(Clone, Debug, Hash)]
pub enum Node {
    /// Of a process.
    Unit(Box<Unit>),
    /// The ordinal and stable storage.
    Registrar(Registrar),
}

impl Machine for Node {
    type Packet = Packet;
    type Options = Options;

    fn system(workload: Workload, options: &Options) -> Vec<Self> {
        let units = (0..workload.units).map(|id| Self::Unit(Box::new(Unit::new(Process::new(id, workload), *options))));
        units.chain([Self::Registrar(Registrar::default())]).collect()
    }

    fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action<Packet>>) {
        match self {
            Self::Unit(unit) => unit.step(event, actions),
            Self::Registrar(registrar) => registrar.step(event, actions),
        }
    }

    fn persist(&mut self, token: u64) {
        if let Self::Unit(unit) = self {
            unit.persist(token);
        }
    }

    fn crash(&mut self) {
        match self {
            Self::Unit(unit) => unit.crash(),
            Self::Registrar(_) => unreachable!("it never fails"),
        }
    }

    fn process(&self) -> Option<&Process> {
        match self {
            Self::Unit(unit) => Some(unit.process()),
            Self::Registrar(_) => None,
        }
    }

    fn role(&self) -> &'static str {
        match self {
            Self::Unit(_) => "unit",
            Self::Registrar(_) => "registrar",
        }
    }

    fn heeds_failures(&self) -> bool {
        matches!(self, Self::Registrar(_))
    }

    fn only_answers(&self) -> bool {
        matches!(self, Self::Registrar(_))
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Unit(unit) => unit.phase(),
            Self::Registrar(_) => Phase::Live,
        }
    }

    fn blocked(&self) -> bool {
        match self {
            Self::Unit(unit) => unit.blocked(),
            Self::Registrar(_) => false,
        }
    }

    fn counters(&self) -> Counters {
        match self {
            Self::Unit(unit) => unit.counters(),
            Self::Registrar(_) => Counters::default(),
        }
    }

    fn packet_bytes(packet: &Packet) -> u64 {
        64 + match &packet.body {
            Body::Message(message, determinants) => u64::from(message.bytes) + 24 * determinants.len() as u64,
            Body::Hold(determinants) | Body::Answer(_, determinants) | Body::Gathered(determinants, _) => {
                24 * determinants.len() as u64
            }
            _ => 0,
        }
    }
}
