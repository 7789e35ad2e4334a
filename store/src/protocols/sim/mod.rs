//! A deterministic simulator of nodes, network, disks and failures.
//!
//! A [`Plan`] is everything that a run depends on; the same plan gives the same run. [`run`] carries
//! it out and checks the invariants at every step ([`Violation`]); [`Failing`] makes a failing plan
//! small; [`explore()`] tries every order of events of a small system instead of a random one,
//! or every one in which few events are put off.

mod checks;
mod explore;
mod group_checks;
pub mod recorder_load;
mod shrink;
mod subject;
mod tell;
mod world;

pub use checks::Violation;
pub use explore::{Bounds, Counterexample, Explored, explore};
pub use shrink::{Failing, sweep};
pub use subject::Subject;
pub use world::World;

use super::process::{Pattern, Workload};
use super::rng::Rng;

/// Costs of hardware, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// A packet's way through the network at least.
    pub link: u64,
    /// And up to so much more, at random: what reorders packets.
    pub jitter: u64,
    /// Bytes that a link carries in a microsecond.
    pub link_bytes_per_us: u64,
    /// A write to stable storage.
    pub disk: u64,
    /// Bytes that a disk writes in a microsecond.
    pub disk_bytes_per_us: u64,
    /// A node's processor, for each packet, timer or write done that it handles, and each packet it sends.
    pub processor: u64,
    /// Until a failed node runs again, its state read back.
    pub restart: u64,
    /// Until others learn of a failure.
    pub detect: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            link: 100,
            jitter: 2_000,
            link_bytes_per_us: 100,
            disk: 500,
            disk_bytes_per_us: 100,
            processor: 0,
            restart: 10_000,
            detect: 3_000,
        }
    }
}

/// A node fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// After how many steps of the run.
    pub after_step: u64,
    /// Which node.
    pub victim: Victim,
}

/// Which node fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// This one, between two steps.
    Node(usize),
    /// Whoever responds to the last failure: the sender in this step, from 0, of those in which several
    /// packets are sent after a failure was detected or a node has run again; in the midst of it, when some
    /// have left. So those that coordinate something are hit while they do.
    Responding(u64),
}

/// For a while the network falls apart: nothing gets from one side to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// From when, in virtual microseconds.
    pub from: u64,
    /// Until when.
    pub until: u64,
    /// The nodes on one side, a bit for each.
    pub side: u64,
}

impl Partition {
    fn severs(&self, now: u64, a: usize, b: usize) -> bool {
        (self.from..self.until).contains(&now) && self.side >> a & 1 != self.side >> b & 1
    }
}

/// Everything that a run depends on.
#[derive(Clone, Debug)]
pub struct Plan<O> {
    /// Chooses delays, losses and repetitions.
    pub seed: u64,
    /// What the processes do.
    pub workload: Workload,
    /// Variant of the protocol.
    pub options: O,
    /// Who fails when.
    pub crashes: Vec<Crash>,
    /// When the network is in two parts.
    pub partitions: Vec<Partition>,
    /// A crash is left out if so many nodes are down or recovering already.
    pub down_at_most: usize,
    /// The failures are within what the protocol tolerates: it must not give up.
    pub must_recover: bool,
    /// In thousandths: packets lost.
    pub loss: u64,
    /// In thousandths: packets repeated.
    pub repeat: u64,
    /// Costs of hardware.
    pub costs: Costs,
    /// Give up (and call it stuck) after so many steps.
    pub steps_max: u64,
}

impl<O: Default> Plan<O> {
    /// A plan chosen by a seed: a system of two to five processes, with up to `crashes` failures, half
    /// of which fall into the recovery from another, and some into the midst of a step of that.
    pub fn random(seed: u64, crashes: usize, store_fails: bool) -> Self {
        let mut rng = Rng::new(seed);
        let units = 2 + rng.index(4);
        let workload = Workload {
            units,
            first: 1 + rng.below(3) as u32,
            hops: 2 + rng.below(8) as u32,
            forks: rng.below(150) as u32,
            outputs: 300,
            bytes: 100,
            pattern: [Pattern::Random, Pattern::Main, Pattern::Exchange, Pattern::Ring][rng.index(4)],
            computing: 0,
            seed: rng.bits(),
        };
        let nodes = units + usize::from(store_fails);
        let mut at = 0;
        let mut victims = Rng::new(!seed);
        let crashes = (0..rng.index(crashes + 1))
            .map(|k| {
                at += if rng.below(2) == 0 { rng.below(30) } else { rng.below(400) };
                let node = rng.index(nodes);
                let responding = k > 0 && victims.below(3) > 0;
                let victim = if responding { Victim::Responding(victims.below(12)) } else { Victim::Node(node) };
                Crash { after_step: at, victim }
            })
            .collect();
        let calm = rng.below(4) == 0;
        Self {
            seed,
            workload,
            options: O::default(),
            crashes,
            partitions: Vec::new(),
            down_at_most: usize::MAX,
            must_recover: true,
            loss: if calm { 0 } else { rng.below(150) },
            repeat: if calm { 0 } else { rng.below(100) },
            costs: Costs { disk: [100, 500, 10_000][rng.index(3)], ..Costs::default() },
            steps_max: 60_000,
        }
    }
}

/// What a run cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Steps simulated.
    pub steps: u64,
    /// Virtual microseconds.
    pub time: u64,
    /// Messages received by processes, counting only final histories.
    pub messages: u64,
    /// Packets sent.
    pub packets: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Accesses to stable storage.
    pub writes: u64,
    /// Bytes written.
    pub written: u64,
    /// Outputs shown.
    pub outputs: u64,
    /// Crashes that took place.
    pub crashes: u64,
    /// Microseconds from failures to being live again, summed.
    pub recovering: u64,
    /// Microseconds that nodes that did not fail could not go on, summed.
    pub blocked: u64,
    /// Sends and outputs held back.
    pub held: u64,
    /// Messages sent with nothing outstanding.
    pub sent_free: u64,
    /// Messages that carried what was outstanding.
    pub sent_piggybacked: u64,
    /// Bytes of message log in memory at the end.
    pub log_bytes: u64,
    /// Runs that the protocol gave up: failures that it does not tolerate were noticed.
    pub given_up: u64,
}

impl Report {
    /// Adds another run's figures.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.time += other.time;
        self.messages += other.messages;
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.writes += other.writes;
        self.written += other.written;
        self.outputs += other.outputs;
        self.crashes += other.crashes;
        self.recovering += other.recovering;
        self.blocked += other.blocked;
        self.held += other.held;
        self.sent_free += other.sent_free;
        self.sent_piggybacked += other.sent_piggybacked;
        self.log_bytes += other.log_bytes;
        self.given_up += other.given_up;
    }
}

/// Carries out a plan.
pub fn run<M: Subject>(plan: &Plan<M::Options>) -> Result<Report, Violation> {
    World::<M>::new(plan, false).finish()
}

/// Carries out a plan, and on the side what would happen if, right after something was shown, the
/// unit that showed it failed, with as many others as are tolerated. So what was shown has to be
/// recoverable then and there. Returns how many times something was shown.
pub fn run_failing_after_output<M: Subject>(plan: &Plan<M::Options>) -> Result<u64, Violation> {
    let mut world = World::<M>::new(plan, false);
    let mut shows = 0;
    while world.next()? {
        if let Some(unit) = world.take_shown() {
            shows += 1;
            let mut failing = world.clone();
            let nodes = plan.workload.units;
            for node in (unit..unit + nodes).map(|node| node % nodes) {
                if failing.may_crash(node) {
                    failing.crash(node);
                }
            }
            failing.finish()?;
        }
    }
    Ok(shows)
}

/// Carries out a plan and tells what happened, line by line.
pub fn timeline<M: Subject>(plan: &Plan<M::Options>) -> (Vec<String>, Result<Report, Violation>) {
    let mut world = World::<M>::new(plan, true);
    let result = loop {
        match world.next() {
            Ok(true) => {}
            Ok(false) => break Ok(world.report()),
            Err(violation) => break Err(violation),
        }
    };
    (world.take_timeline(), result)
}

/// A workload of exactly `messages` messages, an even number: the first process sends half of them to
/// the second, which follows each with one to the third. What was received before a message decides
/// what is sent after it. With outputs.
pub fn small(units: usize, messages: u32) -> Workload {
    let pattern = Pattern::Chain;
    Workload { units, first: messages / 2, hops: 1, forks: 0, outputs: 700, bytes: 10, pattern, computing: 0, seed: 1 }
}

/// A workload of four messages whose order of receipt is open: two processes each send one to the first, which
/// answers both. With outputs.
pub fn race() -> Workload {
    Workload { first: 1, pattern: Pattern::Ask, ..small(3, 4) }
}
