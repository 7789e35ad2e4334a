//! What a protocol is to the simulator, and later to the sockets: a state machine for each node.

use std::fmt::{Debug, Display};
use std::hash::{Hash, Hasher};

use super::model::Sii;
use super::process::{Output, Process, Workload};

/// Something that happens to a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event<P> {
    /// The system is created.
    Start,
    /// A packet arrives. Packets may be lost, repeated, reordered, and older than a failure.
    Packet {
        /// The node that sent it.
        from: usize,
        /// What is in it.
        packet: P,
    },
    /// A timer that was set has run out.
    Timer(u64),
    /// A write to stable storage is done; [`Machine::persist`] has been called.
    Written(u64),
    /// The node runs again after a failure, with what is on its stable storage.
    Restarted {
        /// How many outputs of this node's process the world outside has taken. The kernel's own counters
        /// say that for real connections.
        shown: u64,
    },
    /// Somebody's failure was detected.
    Down(usize),
}

/// Something that a node wants done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action<P> {
    /// Send a packet.
    Send {
        /// To which node.
        to: usize,
        /// What.
        packet: P,
    },
    /// Be told [`Event::Timer`] after so many microseconds.
    Timer {
        /// Name of the timer.
        timer: u64,
        /// Microseconds.
        after: u64,
    },
    /// Write to stable storage. Writes of a node are done in order.
    Write {
        /// Name of the write; ascending.
        token: u64,
        /// How much.
        bytes: u64,
    },
    /// Show something to the world outside. It can't be taken back.
    Show(Output),
    /// End a node for certain and start it again, perhaps on another machine.
    Restart(usize),
    /// No consistent state can be recovered (Johnson, §3.2.4): a failure beyond what the protocol
    /// tolerates was detected.
    Unrecoverable,
}

/// Whether a node takes part normally.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It does.
    Live,
    /// It is being recovered or rolled back.
    Recovering,
}

/// Figures that a node keeps about itself, since its last failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sends and outputs that had to wait.
    pub held: u64,
    /// Application messages that were sent at once with nothing outstanding.
    pub sent_free: u64,
    /// Application messages that carried outstanding protocol data.
    pub sent_piggybacked: u64,
    /// Most bytes of message log held in memory.
    pub log_bytes: u64,
    /// Messages in that log.
    pub log_messages: u64,
}

/// Figures do not make two states of a node different.
impl Hash for Counters {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// A node's part of a protocol. It has no clock, no randomness and does no input or output.
pub trait Machine: Clone + Debug + Hash {
    /// What it sends.
    type Packet: Clone + Debug + Display + Hash;
    /// Variants and deliberate bugs.
    type Options: Clone + Debug + Default;

    /// The nodes of a system; the units come first.
    fn system(workload: Workload, options: &Self::Options) -> Vec<Self>;

    /// Something happens.
    fn step(&mut self, event: Event<Self::Packet>, actions: &mut Vec<Action<Self::Packet>>);

    /// This write has reached stable storage.
    fn persist(&mut self, token: u64);

    /// The node fails: everything but its stable storage is lost.
    fn crash(&mut self);

    /// The process that it carries.
    fn process(&self) -> Option<&Process>;

    /// What kind of node it is.
    fn role(&self) -> &'static str {
        "unit"
    }

    /// Whether [`Event::Down`] means anything to it.
    fn heeds_failures(&self) -> bool {
        false
    }

    /// How it takes part.
    fn phase(&self) -> Phase;

    /// Whether the process can't go on although its node is up.
    fn blocked(&self) -> bool {
        self.phase() == Phase::Recovering
    }

    /// A failed node stays down until [`Action::Restart`].
    fn waits_for_manager(&self) -> bool {
        false
    }

    /// It sends only to whom it has just heard from.
    fn only_answers(&self) -> bool {
        false
    }

    /// When this packet arrives, now or at any time later, and even if the node fails first, makes no
    /// difference to anything but the packet's own bookkeeping: it may as well arrive at once.
    fn is_inert(&self, _packet: &Self::Packet) -> bool {
        false
    }

    /// The recovery state that the node knows, if it keeps one.
    fn recovery_state(&self) -> Option<Vec<Sii>> {
        None
    }

    /// Figures about itself.
    fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Bytes on the wire.
    fn packet_bytes(packet: &Self::Packet) -> u64;
}
