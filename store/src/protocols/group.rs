//! Process groups that are virtually synchronous: what will replicate the store and its recovery
//! manager (CBCAST, §3 and §4; ISIS, §3).
//!
//! Each node is a site with one process, all of which form one group. From the bottom up:
//!
//! | part | what | source |
//! |---|---|---|
//! | `link` | ordered, lossless channels between incarnations of sites | §4.1 |
//! | `views` | every site sees the same failures and recoveries in the same order: two phases | §4.2 |
//! | `ordered` | ABCAST: a total order for each label, by priorities; taken over when a sender fails | §4.3.1 |
//! | `causal` | CBCAST: causal order, by passing on what came before; flush; forgetting of ids | §4.3.2, 4.4, 4.5 |
//! | `cuts` | GBCAST: changes of the group, ordered against everything | §4.3.3 |
//! | `app` | the replicated process: requests by coordinator and cohorts, state transfer | §3.7, ISIS §6 |
//!
//! What differs from the paper, and why:
//!
//! - GBCASTs are coordinated by the oldest operational site, so there are never two coordinators of one.
//! - The flush that precedes a failure's GBCAST is done again when somebody fails during it.
//! - A site view may grow at any time: a recovered site takes part in nothing before the GBCAST that
//!   joins it to the group, so the read locks on the site view (§4.2) are not needed. That GBCAST locks
//!   the group view (§4.3.3), and every broadcast under way is finished before it.
//! - A site acknowledges that an id may be forgotten only when it is not on its wait queue
//!   ([`Bug::ForgetWhileWaiting`]): else a CBCAST that one site delivered before a GBCAST may be missing
//!   from the list of those to be delivered before it, and be delivered after it elsewhere; and an ABCAST
//!   that some have delivered and forgotten may be ordered anew, and delivered again.
//! - [`Options::safe`] is the additional phase that §3.2 alludes to: an ABCAST is delivered when all
//!   operational destinations have its final priority, and priorities are proposed anew when a
//!   destination fails.

mod app;
mod causal;
mod cost;
mod cuts;
mod link;
mod member;
mod ordered;
#[cfg(test)]
mod tests;
mod views;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::machine::{Action, Counters, Event, Machine, Phase};
use super::process::{Process, Workload};
pub use app::{Entry, Replica};
pub(in crate::protocols) use app::{digest_of, met, output_number};
pub use cost::{Broadcasts, Cost, Routine, broadcasts, cost};
pub use member::Member;

/// Variants of the protocol.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Options {
    /// ABCASTs are delivered in one more phase, so that what a failed site has seen and shown is true.
    pub safe: bool,
    /// Sites stop when most of those of the last view are gone (§4.2, footnote).
    pub quorum: bool,
    /// The first site takes the second for failed, wrongly, at this round of its timer; 0 is never.
    pub wrong_suspicion: u32,
    /// Only this primitive is used; for counting messages.
    pub only: Option<Primitive>,
    /// A deliberate mistake.
    pub bug: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Self { safe: true, quorum: false, wrong_suspicion: 0, only: None, bug: None }
    }
}

/// The broadcast primitives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Primitive {
    /// In causal order.
    Cbcast,
    /// In the same order everywhere.
    Abcast,
    /// Ordered against everything.
    Gbcast,
}

/// Deliberate mistakes, to show that the checks see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// An ABCAST is deliverable when it has a proposed priority.
    DeliverProposed,
    /// A CBCAST is sent without what came before it.
    NoPiggyback,
    /// Failure GBCASTs do not wait for the messages of the failed site.
    NoFlush,
    /// A GBCAST is delivered as soon as it has its final priority, without a list of what comes before.
    NoBeforeList,
    /// The final priority of a GBCAST stays what it is when a member joins that was not asked.
    KeepCutPriority,
    /// Proposed views are taken for committed.
    OnePhaseViews,
    /// Frames of incarnations that are out of the view are accepted.
    AcceptDead,
    /// Ids are forgotten when all is sent, without asking.
    ForgetEarly,
    /// That an id may be forgotten is acknowledged while it is on the wait queue.
    ForgetWhileWaiting,
    /// Output does not wait for a flush.
    OutputBeforeFlush,
    /// Broadcasts go on while a site is joined to the group.
    NoLock,
}

/// An incarnation of a site.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// Its node.
    pub node: usize,
    /// Counts its recoveries; on its stable storage.
    pub incarnation: u32,
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}.{}", self.node, self.incarnation)
    }
}

/// A change of the site view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Change {
    /// A site became operational.
    Recovered(Site),
    /// A site failed.
    Failed(Site),
}

/// What orders a broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// CBCAST.
    Causal,
    /// ABCAST with this label.
    Ordered(u8),
    /// GBCAST.
    Cut,
}

/// Labels of ABCASTs.
pub const LABELS: u8 = 2;

/// Identifies a broadcast. CBCASTs of a site are numbered from 1 without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id {
    /// Who sent it.
    pub from: Site,
    /// With what.
    pub kind: Kind,
    /// Its number.
    pub number: u64,
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Causal => "c".to_owned(),
            Kind::Ordered(label) => format!("a{label}-"),
            Kind::Cut => "g".to_owned(),
        };
        write!(f, "{kind}{}@{:?}", self.number, self.from)
    }
}

/// What a broadcast says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Payload {
    /// Leads to so many more.
    Work(u32),
    /// Something to be done and shown by one of the group (coordinator and cohorts).
    Request,
    /// That has been done.
    Reply(Id),
    /// This site has the group's state.
    Transferred(Site),
}

/// A broadcast.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Broadcast {
    /// Its identity.
    pub id: Id,
    /// Its content.
    pub payload: Payload,
    /// Label: how many CBCASTs of each site came before it. `B` precedes `B'` if `B'` counts it.
    pub clabel: BTreeMap<Site, u64>,
}

impl Broadcast {
    /// How many CBCASTs came before it: fewer than before any that it precedes.
    fn depth(&self) -> u64 {
        self.clabel.values().sum()
    }
}

/// What GBCASTs are used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cut {
    /// A site becomes a member of the group.
    Joined(Site),
    /// A member has failed.
    Failed(Site),
    /// Something else that is to be ordered against everything.
    Update(Id),
}

/// What a new member is sent: the group's state as of its joining.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The process's.
    pub replica: Replica,
    /// GBCASTs pending then, with their priorities, and whether these are final.
    pub cuts: Vec<(Cut, Priority, bool)>,
}

/// A priority: a number with the node that gave it.
pub type Priority = (u64, usize);

/// What goes over a channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the fields are what they are called")]
pub enum Frame {
    /// View manager: the sequence of views, and how many changes of it are committed.
    Propose { changes: Vec<Change>, committed: usize },
    /// To the view manager; what is missing from the proposal of that length.
    ViewAcknowledged { length: usize, missing: Vec<Change> },
    /// View manager: these views are committed.
    Commit { changes: Vec<Change> },
    /// A CBCAST, and who else is to get it (REM_DESTS).
    Causal { message: Broadcast, remaining: BTreeSet<Site> },
    /// ABCAST, steps 1 and 2: a message that is to get a priority.
    Ordered { message: Broadcast, dests: Vec<Site>, attempt: u64, anew: bool },
    /// The priority that it was given, and whether that is final.
    Proposed { id: Id, attempt: u64, priority: Priority, is_final: bool },
    /// Step 3.
    Final { id: Id, priority: Priority },
    /// The additional phase: everybody has the final priority.
    Deliver { id: Id },
    /// To the oldest site: an ABCAST whose coordinator has failed.
    Stranded { message: Broadcast, dests: Vec<Site> },
    /// GBCAST, part 1: flush, or lock the view.
    Begin { cut: Cut, attempt: u64 },
    /// That is done.
    Flushed { cut: Cut, attempt: u64 },
    /// Part 2: give it a priority.
    Order { cut: Cut, attempt: u64 },
    /// The priority.
    CutProposed { cut: Cut, attempt: u64, priority: Priority, is_final: bool },
    /// The final priority.
    CutFinal { cut: Cut, attempt: u64, priority: Priority },
    /// Part 3: it is at the head of all queues; the CBCASTs delivered, or those that were to be
    /// delivered before it if that is over here.
    AtHead { cut: Cut, attempt: u64, ids: BTreeSet<Id>, done: bool },
    /// Part 4: what is to be delivered before it.
    Before { cut: Cut, ids: BTreeSet<Id> },
    /// Everybody has delivered it.
    Over { cut: Cut },
    /// To the oldest site: a GBCAST that is wanted or not finished, and whether it is queued.
    Wanted { cut: Cut, queued: bool },
    /// State transfer to a site that was joined.
    State(Box<State>),
    /// These ids are disposable (§4.4).
    Disposable { ids: Vec<Id>, round: u64 },
    /// Noted.
    Disposed { round: u64 },
}

/// What goes over the network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the fields are what they are called")]
pub enum Packet {
    /// A frame in its place of a channel.
    Data { from: Site, to: Site, number: u64, frame: Frame },
    /// All frames below that number have arrived.
    Acknowledged { from: Site, to: Site, below: u64 },
    /// A sign of life.
    Hello { from: Site },
    /// A site has recovered and asks to be taken in.
    TakeIn { from: Site },
    /// "You are dead" (§4.2).
    Dead { to: Site },
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data { from, number, frame, .. } => write!(f, "[{number}] {frame} ({from:?})"),
            Self::Acknowledged { below, .. } => write!(f, "has everything below [{below}]"),
            Self::Hello { from } => write!(f, "alive ({from:?})"),
            Self::TakeIn { from } => write!(f, "take {from:?} in"),
            Self::Dead { to } => write!(f, "you are dead, {to:?}"),
        }
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let says = |message: &Broadcast| format!("{:?} {:?}", message.id, message.payload);
        match self {
            Self::Propose { changes, committed } => {
                write!(f, "proposes views {changes:?}, {committed} of them committed")
            }
            Self::ViewAcknowledged { length, missing } if missing.is_empty() => write!(f, "takes {length} views"),
            Self::ViewAcknowledged { length, missing } => write!(f, "of {length} views misses {missing:?}"),
            Self::Commit { changes } => write!(f, "commits {} views", changes.len()),
            Self::Causal { message, remaining } => write!(f, "CBCAST {}, remaining {remaining:?}", says(message)),
            Self::Ordered { message, attempt, .. } => write!(f, "ABCAST {}, attempt {attempt}", says(message)),
            Self::Proposed { id, priority, is_final, .. } => {
                write!(f, "{} priority {priority:?} for {id:?}", if *is_final { "has final" } else { "proposes" })
            }
            Self::Final { id, priority } => write!(f, "final priority {priority:?} for {id:?}"),
            Self::Deliver { id } => write!(f, "deliver {id:?}"),
            Self::Stranded { message, .. } => write!(f, "{:?} has lost its coordinator", message.id),
            Self::Begin { cut, attempt } => write!(f, "GBCAST {cut:?}: flush or lock, attempt {attempt}"),
            Self::Flushed { cut, attempt } => write!(f, "GBCAST {cut:?}: flushed or locked, attempt {attempt}"),
            Self::Order { cut, attempt } => write!(f, "GBCAST {cut:?}: give it a priority, attempt {attempt}"),
            Self::CutProposed { cut, priority, is_final, .. } => {
                let word = if *is_final { "has final" } else { "proposes" };
                write!(f, "GBCAST {cut:?}: {word} priority {priority:?}")
            }
            Self::CutFinal { cut, priority, .. } => write!(f, "GBCAST {cut:?}: final priority {priority:?}"),
            Self::AtHead { cut, ids, done, .. } => {
                let word = if *done { "done" } else { "at the head" };
                write!(f, "GBCAST {cut:?}: {word}, after {ids:?}")
            }
            Self::Before { cut, ids } => write!(f, "GBCAST {cut:?}: before it {ids:?}"),
            Self::Over { cut } => write!(f, "GBCAST {cut:?}: over"),
            Self::Wanted { cut, queued } => {
                write!(f, "GBCAST {cut:?}: wanted, {}", if *queued { "queued" } else { "new" })
            }
            Self::State(state) => write!(f, "the group's state, {} deliveries", state.replica.log.len()),
            Self::Disposable { ids, .. } => write!(f, "forget {ids:?}"),
            Self::Disposed { .. } => write!(f, "forgotten"),
        }
    }
}

impl Machine for Member {
    type Packet = Packet;
    type Options = Options;

    fn system(workload: Workload, options: &Options) -> Vec<Self> {
        (0..workload.units).map(|node| Self::created(node, workload, *options)).collect()
    }

    fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action<Packet>>) {
        self.happen(event, actions);
    }

    fn persist(&mut self, _token: u64) {}

    fn crash(&mut self) {
        self.fail();
    }

    fn process(&self) -> Option<&Process> {
        None
    }

    fn heeds_failures(&self) -> bool {
        true
    }

    fn is_inert(&self, packet: &Packet) -> bool {
        self.is_unmoved_by(packet)
    }

    fn phase(&self) -> Phase {
        if self.replica().is_some() { Phase::Live } else { Phase::Recovering }
    }

    fn counters(&self) -> Counters {
        self.figures()
    }

    fn packet_bytes(packet: &Packet) -> u64 {
        64 + match packet {
            Packet::Data { frame, .. } => match frame {
                Frame::Causal { .. } | Frame::Ordered { .. } | Frame::Stranded { .. } => 100,
                Frame::State(state) => 64 * state.replica.log.len() as u64,
                Frame::AtHead { ids, .. } | Frame::Before { ids, .. } => 16 * ids.len() as u64,
                Frame::Disposable { ids, .. } => 16 * ids.len() as u64,
                Frame::Propose { changes, .. } | Frame::Commit { changes } => 12 * changes.len() as u64,
                _ => 16,
            },
            _ => 0,
        }
    }
}
