//! What single nodes do: each of it is computed once.
//!
//! A search goes through far more states of the system than through states of its nodes. So the
//! states of nodes, packets, outputs, and what the world has been shown are kept once and have
//! numbers; what a node does in a state when something happens to it is kept by these, and so is that
//! two nodes in two states do not contradict each other.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::rc::Rc;

use super::super::checks::{Checks, both_ways, went_back};
use super::super::group_checks::{GroupChecks, members};
use super::super::subject::Subject;
use super::super::{Plan, Violation};
use super::nodes::{Nodes, Traits};
use super::pool::{Pool, Scattering};
use crate::protocols::machine::{Action, Event, Phase};
use crate::protocols::process::{Output, Process};

/// What happens to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Happening {
    Start,
    Packet {
        from: u8,
        packet: u32,
    },
    Timer(u8),
    Written(u32),
    Restarted {
        shown: u32,
    },
    Down(u8),
    /// It fails when so many writes from this one on have reached its disk.
    Fails {
        first: u32,
        written: u8,
    },
}

/// What a node wants done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Send { to: u8, packet: u32 },
    Timer(u8),
    Write { token: u32, bytes: u64 },
    Show(u32),
    Restart(u8),
    Unrecoverable,
}

/// What a node does when something happens to it.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The state that it is in then.
    pub(super) node: u32,
    pub(super) acts: Box<[Act]>,
    broken: Option<Violation>,
}

/// What the world has been shown.
#[derive(Clone, Debug, Hash)]
pub(super) struct Shown {
    pub(super) checks: Checks,
    pub(super) groups: GroupChecks,
}

/// The nodes of a system, in all states that they were met in.
pub(super) struct Locals<M: Subject> {
    nodes: Nodes<M>,
    packets: Pool<M::Packet>,
    outputs: Pool<Output>,
    shown: Pool<Shown>,
    outcome_of: HashMap<(u32, Happening), u32, Scattering>,
    outcomes: Vec<Outcome>,
    /// Whether a packet makes no difference to a node in a state.
    inert: HashMap<(u32, u32), bool, Scattering>,
    /// Nodes in these states do not contradict each other.
    agree: HashSet<(u32, u32), Scattering>,
    /// Nor does a node in this state what was shown.
    shown_agrees: HashSet<(u32, u32), Scattering>,
}

impl<M: Subject> Locals<M> {
    /// The nodes as they are created, and that nothing has been shown.
    pub(super) fn created(plan: &Plan<M::Options>) -> (Self, Vec<u32>, u32) {
        let mut locals = Self {
            nodes: Nodes::new(),
            packets: Pool::default(),
            outputs: Pool::default(),
            shown: Pool::default(),
            outcome_of: HashMap::default(),
            outcomes: Vec::new(),
            inert: HashMap::default(),
            agree: HashSet::default(),
            shown_agrees: HashSet::default(),
        };
        let units = plan.workload.units;
        let nothing = Shown { checks: Checks::new(units), groups: GroupChecks::new(units) };
        let nodes = M::system(plan.workload, &plan.options).into_iter();
        let nodes = nodes.map(|machine| locals.nodes.keep(machine, None)).collect();
        let shown = locals.shown.number(nothing);
        (locals, nodes, shown)
    }

    pub(super) fn traits(&self, state: u32) -> Traits {
        self.nodes.traits(state)
    }

    pub(super) fn machine(&mut self, state: u32) -> Rc<M> {
        let Self { nodes, packets, .. } = self;
        nodes.machine(state, |before, what| step(before, what, packets).0)
    }

    pub(super) fn packet(&self, number: u32) -> &M::Packet {
        self.packets.get(number)
    }

    pub(super) fn output(&self, number: u32) -> &Output {
        self.outputs.get(number)
    }

    pub(super) fn shown(&self, number: u32) -> &Shown {
        self.shown.get(number)
    }

    pub(super) fn keep_shown(&mut self, shown: Shown) -> u32 {
        self.shown.number(shown)
    }

    pub(super) fn outcome(&self, number: u32) -> &Outcome {
        &self.outcomes[number as usize]
    }

    /// Something happens to a node in a state. The number of what it does is returned.
    pub(super) fn happen(&mut self, state: u32, what: Happening) -> Result<u32, Violation> {
        let number = match self.outcome_of.get(&(state, what)) {
            Some(&number) => number,
            None => {
                let outcome = self.compute(state, what);
                let number = u32::try_from(self.outcomes.len()).expect("fewer than fit into memory");
                self.outcomes.push(outcome);
                self.outcome_of.insert((state, what), number);
                number
            }
        };
        match &self.outcomes[number as usize].broken {
            Some(violation) => Err(violation.clone()),
            None => Ok(number),
        }
    }

    /// The event that it is; a failure is none.
    pub(super) fn event(&self, what: Happening) -> Option<Event<M::Packet>> {
        event(what, &self.packets)
    }

    fn compute(&mut self, state: u32, what: Happening) -> Outcome {
        let before = self.machine(state);
        let (machine, actions) = step(&*before, what, &self.packets);
        if machine.only_answers() {
            let asks = |to: usize| !matches!(what, Happening::Packet { from, .. } if usize::from(from) == to);
            let sent = |action: &Action<M::Packet>| matches!(action, Action::Send { to, .. } if asks(*to));
            assert!(!actions.iter().any(sent), "a node that only answers has sent something else");
        }
        let fails = matches!(what, Happening::Fails { .. });
        let broken = if fails { None } else { local_violation(&*before, &machine) };
        let acts = actions.into_iter().map(|action| self.act(action)).collect();
        Outcome { node: self.nodes.keep(machine, Some((state, what))), acts, broken }
    }

    /// Whether it makes no difference when a packet arrives at a node in this state.
    pub(super) fn is_inert(&mut self, state: u32, packet: u32) -> bool {
        if let Some(&inert) = self.inert.get(&(state, packet)) {
            return inert;
        }
        let inert = self.machine(state).is_inert(self.packet(packet));
        self.inert.insert((state, packet), inert);
        inert
    }

    fn act(&mut self, action: Action<M::Packet>) -> Act {
        let small = |number: u64| u8::try_from(number).expect("few nodes and timers");
        match action {
            Action::Send { to, packet } => Act::Send { to: small(to as u64), packet: self.packets.number(packet) },
            Action::Timer { timer, .. } => Act::Timer(small(timer)),
            Action::Write { token, bytes } => {
                Act::Write { token: u32::try_from(token).expect("few writes at a time"), bytes }
            }
            Action::Show(output) => Act::Show(self.outputs.number(output)),
            Action::Restart(node) => Act::Restart(small(node as u64)),
            Action::Unrecoverable => Act::Unrecoverable,
        }
    }

    /// A live node in one state and another in another, both up: neither has received what the other has
    /// not sent; members of a group agree.
    pub(super) fn check_pair(&mut self, one: u32, other: u32) -> Result<(), Violation> {
        let pair = (one.min(other), one.max(other));
        if self.agree.contains(&pair) {
            return Ok(());
        }
        let (a, b) = (self.machine(one), self.machine(other));
        match (a.member(), b.member()) {
            (Some(me), Some(them)) => members(me, them)?,
            _ => {
                if let (Some(a), Some(b)) = (live(&*a), live(&*b)) {
                    both_ways(a, b)?;
                }
            }
        }
        self.agree.insert(pair);
        Ok(())
    }

    /// A node against what was shown.
    pub(super) fn check_shown(&mut self, node: usize, state: u32, shown: u32) -> Result<(), Violation> {
        if self.shown_agrees.contains(&(state, shown)) {
            return Ok(());
        }
        let (machine, seen) = (self.machine(state), self.shown(shown));
        match machine.member() {
            Some(member) => member.replica().map_or(Ok(()), |replica| seen.groups.member(node, replica))?,
            None => live(&*machine).map_or(Ok(()), |process| seen.checks.undone(process))?,
        }
        self.shown_agrees.insert((state, shown));
        Ok(())
    }
}

/// What happens to a node, and what it wants done.
fn step<M: Subject>(before: &M, what: Happening, packets: &Pool<M::Packet>) -> (M, Vec<Action<M::Packet>>) {
    let mut machine = before.clone();
    let mut actions = Vec::new();
    match what {
        Happening::Written(token) => machine.persist(u64::from(token)),
        Happening::Fails { first, written } => {
            (first..).take(usize::from(written)).for_each(|token| machine.persist(u64::from(token)));
            machine.crash();
        }
        _ => {}
    }
    if let Some(event) = event(what, packets) {
        machine.step(event, &mut actions);
    }
    (machine, actions)
}

fn event<P: Clone + Hash>(what: Happening, packets: &Pool<P>) -> Option<Event<P>> {
    Some(match what {
        Happening::Start => Event::Start,
        Happening::Packet { from, packet } => {
            Event::Packet { from: usize::from(from), packet: packets.get(packet).clone() }
        }
        Happening::Timer(timer) => Event::Timer(u64::from(timer)),
        Happening::Written(token) => Event::Written(u64::from(token)),
        Happening::Restarted { shown } => Event::Restarted { shown: u64::from(shown) },
        Happening::Down(node) => Event::Down(usize::from(node)),
        Happening::Fails { .. } => return None,
    })
}

fn live<M: Subject>(machine: &M) -> Option<&Process> {
    machine.process().filter(|_| machine.phase() == Phase::Live)
}

/// What a node must not do, whatever the others are in.
fn local_violation<M: Subject>(before: &M, now: &M) -> Option<Violation> {
    // States of a group that differ in the order of their logs only are the same to the search.
    if let Some(member) = now.member()
        && let Some(replica) = member.replica()
        && let Err(violation) = GroupChecks::new(0).member(member.site().node, replica)
    {
        return Some(violation);
    }
    if let (Some(before), Some(now)) = (before.recovery_state(), now.recovery_state())
        && let Err(violation) = went_back(&before, &now)
    {
        return Some(violation);
    }
    if before.phase() == Phase::Live
        && now.phase() == Phase::Live
        && let (Some(before), Some(now)) = (before.process(), now.process())
        && now.sii() < before.sii()
    {
        return Some(Violation::Broken(format!("unit {} lost history without having failed", now.id)));
    }
    None
}
