//! A state of the system, and what may happen in it.

use std::hash::Hasher;
use std::rc::Rc;

use super::super::subject::Subject;
use super::super::tell::Tale;
use super::super::{Plan, Violation};
use super::Bounds;
use super::local::{Act, Happening, Locals};
use super::nodes::Traits;
use super::pool::Scatter;
use super::table::Fingerprint;
use crate::protocols::machine::Action;

/// Nodes of a system that is searched.
pub(super) const NODES_MAX: usize = 5;

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Packet { from: u8, to: u8 },
    Written { node: u8 },
    Restart { node: u8 },
    Detected { by: u8, node: u8 },
    Crash { node: u8, written: u8 },
    Turn,
}

impl Step {
    /// Whether it happens to this node.
    fn is_of(self, node: u8) -> bool {
        match self {
            Self::Packet { to: of, .. } | Self::Written { node: of } | Self::Restart { node: of } => of == node,
            Self::Detected { by: of, .. } | Self::Crash { node: of, .. } => of == node,
            Self::Turn => false,
        }
    }
}

/// Writes under way at a disk: their names follow each other.
#[derive(Clone, Copy, Default)]
struct Writes {
    first: u32,
    count: u8,
}

/// A state of the system. Nodes, packets and what was shown are numbers of [`Locals`].
#[derive(Clone)]
pub(super) struct State {
    nodes: [u32; NODES_MAX],
    /// A bit for each node; for each pair, of who learns of whom.
    up: u8,
    restarts: u8,
    detections: u64,
    timers: [u8; NODES_MAX],
    writes: [Writes; NODES_MAX],
    /// Whose timers run out next.
    turn: u8,
    crashes: u8,
    unrecoverable: bool,
    shown: u32,
    /// By sender and receiver; between two in the order in which they were sent.
    packets: Vec<(u8, u8, u32)>,
}

fn bits(of: u64) -> impl Iterator<Item = u8> {
    (0..64).filter(move |bit| of >> bit & 1 == 1)
}

/// A system that is searched.
pub(super) struct System<'a, M: Subject> {
    plan: &'a Plan<M::Options>,
    pub(super) locals: Locals<M>,
    nodes: u8,
    pub(super) tale: Option<Tale>,
    /// A node that was up was restarted.
    pub(super) forced: bool,
    reduce: bool,
}

impl<'a, M: Subject> System<'a, M> {
    /// The state in which all nodes have started.
    pub(super) fn started(plan: &'a Plan<M::Options>, bounds: Bounds, tell: bool) -> Result<(Self, State), Violation> {
        let (mut locals, created, shown) = Locals::<M>::created(plan);
        let count = created.len();
        assert!(count <= NODES_MAX, "a small system");
        let machines: Vec<_> = created.iter().map(|&node| locals.machine(node)).collect();
        let tale = tell.then(|| Tale::of(machines.iter().map(Rc::as_ref)));
        let mut nodes = [0; NODES_MAX];
        nodes[..count].copy_from_slice(&created);
        let mut state = State {
            nodes,
            up: (1 << count) - 1,
            restarts: 0,
            detections: 0,
            timers: [0; NODES_MAX],
            writes: [Writes::default(); NODES_MAX],
            turn: 0,
            crashes: u8::try_from(bounds.crashes).expect("few failures"),
            unrecoverable: false,
            shown,
            packets: Vec::new(),
        };
        let mut system = Self { plan, locals, nodes: count as u8, tale, forced: false, reduce: bounds.reduce };
        for node in 0..system.nodes {
            system.happen(&mut state, node, Happening::Start)?;
        }
        system.receive_inert(&mut state)?;
        Ok((system, state))
    }

    fn traits(&self, state: &State, node: u8) -> Traits {
        self.locals.traits(state.nodes[usize::from(node)])
    }

    fn machines(&mut self, state: &State) -> (Vec<Rc<M>>, Vec<bool>) {
        let nodes = &state.nodes[..usize::from(self.nodes)];
        let machines = nodes.iter().map(|&node| self.locals.machine(node)).collect();
        (machines, (0..self.nodes).map(|node| state.is_up(node)).collect())
    }

    /// Everything was delivered, or the protocol has given up.
    pub(super) fn is_done(&mut self, state: &State) -> bool {
        let may_be = |node| state.is_up(node) && self.traits(state, node).may_be_done;
        state.unrecoverable || (0..self.nodes).all(may_be) && self.missing(state).is_none()
    }

    fn missing(&mut self, state: &State) -> Option<String> {
        let (machines, up) = self.machines(state);
        let shown = self.locals.shown(state.shown);
        match machines[0].member() {
            Some(_) => shown.groups.missing::<M, _>(&machines, &up),
            None => shown.checks.missing::<M, _>(&machines, &up),
        }
    }

    /// Who of the first nodes may fail now.
    pub(super) fn failures(&self, state: &State, nodes: usize) -> impl Iterator<Item = Step> {
        let out = |node: u8| !state.is_up(node) || !self.traits(state, node).live;
        let count = (0..self.nodes).filter(|&node| out(node)).count();
        let may = move |node: &u8| {
            let others = count - usize::from(out(*node));
            state.crashes > 0 && state.is_up(*node) && others < self.plan.down_at_most
        };
        let nodes = u8::try_from(nodes).expect("few nodes");
        let of = move |node: u8| {
            (0..=state.writes[usize::from(node)].count).map(move |written| Step::Crash { node, written })
        };
        (0..nodes).filter(may).flat_map(of)
    }

    /// What may happen next, failures apart; with a reduction, a part of it that is enough (see the module's
    /// page).
    pub(super) fn possible(&self, state: &State, done: bool) -> Vec<Step> {
        let mut all = state.possible();
        if !self.reduce {
            return if done { Vec::new() } else { all };
        }
        if done && all == [Step::Turn] {
            return Vec::new();
        }
        let closed = (0..self.nodes).filter(|&node| state.crashes == 0 && self.is_closed(state, node));
        let own = closed.map(|node| (all.iter().filter(|step| step.is_of(node)).count(), node));
        if let Some((_, node)) = own.filter(|&(own, _)| own > 0).min() {
            all.retain(|step| step.is_of(node));
        }
        all
    }

    /// Whether nothing that other nodes do can add anything to what may happen at this node next.
    fn is_closed(&self, state: &State, node: u8) -> bool {
        let learns = state.detections >> (8 * node) & 0xff != 0;
        let restarts = state.restarts >> node & 1 == 1;
        let learned_of = (0..self.nodes).any(|by| state.detections >> (8 * by + node) & 1 == 1);
        let cannot_add = |other: u8| {
            state.has_packets(other, node) || self.traits(state, other).only_answers && !state.has_packets(node, other)
        };
        let misses = learns || restarts && learned_of;
        !misses && (0..self.nodes).filter(|&other| other != node).all(cannot_add)
    }

    pub(super) fn take(&mut self, state: &mut State, step: Step) -> Result<(), Violation> {
        self.carry_out(state, step)?;
        self.receive_inert(state)
    }

    /// With a reduction, packets that make no difference arrive at once (see the module's page).
    fn receive_inert(&mut self, state: &mut State) -> Result<(), Violation> {
        let mut at = 0;
        while self.reduce && at < state.packets.len() {
            let (from, to, packet) = state.packets[at];
            if !self.locals.is_inert(state.nodes[usize::from(to)], packet) {
                at += 1;
                continue;
            }
            state.packets.remove(at);
            if state.is_up(to) {
                self.happen(state, to, Happening::Packet { from, packet })?;
                at = 0;
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, state: &mut State, step: Step) -> Result<(), Violation> {
        match step {
            Step::Packet { from, to } => {
                let at = state.packets.iter().position(|&(f, t, _)| (f, t) == (from, to)).expect("it is there");
                let (_, _, packet) = state.packets.remove(at);
                if !state.is_up(to) {
                    return Ok(());
                }
                self.happen(state, to, Happening::Packet { from, packet })
            }
            Step::Written { node } => {
                let writes = &mut state.writes[usize::from(node)];
                let token = writes.first;
                *writes = Writes { first: token + 1, count: writes.count - 1 };
                self.happen(state, node, Happening::Written(token))
            }
            Step::Restart { node } => {
                state.restarts &= !(1 << node);
                state.up |= 1 << node;
                let shown = self.locals.shown(state.shown).checks.shown(usize::from(node));
                self.happen(state, node, Happening::Restarted { shown: shown as u32 })
            }
            Step::Detected { by, node } => {
                state.detections &= !(1 << (8 * by + node));
                match state.is_up(by) && !state.is_up(node) {
                    true => self.happen(state, by, Happening::Down(node)),
                    false => Ok(()),
                }
            }
            Step::Crash { node, written } => {
                state.crashes -= 1;
                self.crash(state, node, written)
            }
            Step::Turn => {
                let node = state.turn;
                state.turn = (node + 1) % self.nodes;
                let timers = std::mem::take(&mut state.timers[usize::from(node)]);
                bits(timers.into()).try_for_each(|timer| self.happen(state, node, Happening::Timer(timer)))
            }
        }
    }

    /// How many packets that make no difference are on their way to where this step happens. None makes one.
    #[cfg(test)]
    pub(super) fn inert_commutes(&mut self, state: &State, step: Step) -> usize {
        let Some((node, what)) = self.happening(state, step) else { return 0 };
        let before = state.nodes[usize::from(node)];
        let mut compared = 0;
        for &(from, to, packet) in &state.packets {
            let arrives = Happening::Packet { from, packet };
            if to != node || arrives == what || !self.locals.is_inert(before, packet) {
                continue;
            }
            let [one, other] = [[arrives, what], [what, arrives]].map(|order| {
                order.into_iter().fold((before, Vec::new()), |(at, mut acts), what| {
                    let number = self.locals.happen(at, what).expect("no violation");
                    let outcome = self.locals.outcome(number);
                    let says = |act: &&Act| !matches!(act, Act::Send { packet, .. } if self.locals.packet(*packet).to_string().contains("you are dead"));
                    acts.extend(outcome.acts.iter().filter(says).map(|act| format!("{act:?}")));
                    (outcome.node, acts)
                })
            });
            assert_eq!(one, other, "{:?} and {what:?}", self.locals.packet(packet));
            compared += 1;
        }
        compared
    }

    #[cfg(test)]
    fn happening(&self, state: &State, step: Step) -> Option<(u8, Happening)> {
        match step {
            Step::Packet { from, to } if state.is_up(to) => {
                let &(.., packet) = state.packets.iter().find(|&&(f, t, _)| (f, t) == (from, to))?;
                Some((to, Happening::Packet { from, packet }))
            }
            Step::Detected { by, node } if state.is_up(by) && !state.is_up(node) => Some((by, Happening::Down(node))),
            Step::Crash { node, .. } => Some((node, Happening::Fails { first: 0, written: 0 })),
            _ => None,
        }
    }

    /// Something happens to a node, and what it wants done is done.
    fn happen(&mut self, state: &mut State, node: u8, what: Happening) -> Result<(), Violation> {
        if let Some(tale) = &mut self.tale
            && let Some(event) = self.locals.event(what)
        {
            tale.event(None, usize::from(node), &event);
        }
        let outcome = self.locals.happen(state.nodes[usize::from(node)], what)?;
        state.nodes[usize::from(node)] = self.locals.outcome(outcome).node;
        for at in 0..self.locals.outcome(outcome).acts.len() {
            let act = self.locals.outcome(outcome).acts[at];
            self.tell(act);
            self.act(state, node, act)?;
        }
        let now = state.nodes[usize::from(node)];
        if !state.is_up(node) {
            return Ok(());
        }
        self.locals.check_shown(usize::from(node), now, state.shown)?;
        for other in (0..self.nodes).filter(|&other| other != node && state.is_up(other)) {
            self.locals.check_pair(now, state.nodes[usize::from(other)])?;
        }
        Ok(())
    }

    fn act(&mut self, state: &mut State, node: u8, act: Act) -> Result<(), Violation> {
        match act {
            Act::Send { to, packet } => state.send(node, to, packet),
            Act::Timer(timer) => state.timers[usize::from(node)] |= 1 << timer,
            Act::Write { token, .. } => {
                let writes = &mut state.writes[usize::from(node)];
                let first = if writes.count == 0 { token } else { writes.first };
                assert_eq!(first + u32::from(writes.count), token, "writes are named one after the other");
                *writes = Writes { first, count: writes.count + 1 };
            }
            Act::Show(output) => self.show(state, node, output)?,
            Act::Restart(other) => {
                if state.is_up(other) {
                    self.forced = true;
                    self.crash(state, other, 0)?;
                }
                state.restarts |= 1 << other;
            }
            Act::Unrecoverable if self.plan.must_recover => {
                return Err(Violation::Broken(format!("node {node} gave up on failures that should be tolerated")));
            }
            Act::Unrecoverable => {
                state.unrecoverable = true;
                let (machines, up) = self.machines(state);
                let shown = self.locals.shown(state.shown);
                shown.checks.gave_up::<M, _>(usize::from(node), &machines, &up)?;
            }
        }
        Ok(())
    }

    fn show(&mut self, state: &mut State, node: u8, output: u32) -> Result<(), Violation> {
        let output = &self.locals.output(output).clone();
        let mut shown = self.locals.shown(state.shown).clone();
        let (machines, _) = self.machines(state);
        match machines[usize::from(node)].member() {
            Some(member) => shown.groups.show(output, Some(member))?,
            None => {
                let recoverable = machines.iter().find_map(|machine| machine.recovery_state());
                let by = machines[output.unit].process().filter(|_| output.unit == usize::from(node));
                shown.checks.show(output, by, recoverable.as_deref())?;
            }
        }
        state.shown = self.locals.keep_shown(shown);
        Ok(())
    }

    /// A node fails when its first writes have reached its disk.
    fn crash(&mut self, state: &mut State, node: u8, written: u8) -> Result<(), Violation> {
        let at = usize::from(node);
        let first = std::mem::take(&mut state.writes[at]).first;
        if let Some(tale) = &mut self.tale {
            let tokens: Vec<u64> = (u64::from(first)..).take(usize::from(written)).collect();
            tale.failure(None, at, &tokens);
        }
        let first = if written == 0 { 0 } else { first };
        let outcome = self.locals.happen(state.nodes[at], Happening::Fails { first, written })?;
        state.nodes[at] = self.locals.outcome(outcome).node;
        state.up &= !(1 << node);
        state.timers[at] = 0;
        if !self.traits(state, node).waits_for_manager {
            state.restarts |= 1 << node;
        }
        for by in (0..self.nodes).filter(|&by| by != node) {
            if self.traits(state, by).heeds_failures {
                state.detections |= 1 << (8 * by + node);
            }
        }
        Ok(())
    }

    fn tell(&mut self, act: Act) {
        let Some(tale) = &mut self.tale else { return };
        tale.action(&match act {
            Act::Send { to, packet } => {
                Action::Send { to: usize::from(to), packet: self.locals.packet(packet).clone() }
            }
            Act::Timer(timer) => Action::Timer { timer: u64::from(timer), after: 0 },
            Act::Write { token, bytes } => Action::Write { token: u64::from(token), bytes },
            Act::Show(output) => Action::Show(self.locals.output(output).clone()),
            Act::Restart(node) => Action::Restart(usize::from(node)),
            Act::Unrecoverable => Action::Unrecoverable,
        });
    }
}

impl State {
    fn is_up(&self, node: u8) -> bool {
        self.up >> node & 1 == 1
    }

    fn send(&mut self, from: u8, to: u8, packet: u32) {
        let at = self.packets.partition_point(|&(f, t, _)| (f, t) <= (from, to));
        self.packets.insert(at, (from, to, packet));
    }

    fn has_packets(&self, from: u8, to: u8) -> bool {
        self.packets.iter().any(|&(f, t, _)| (f, t) == (from, to))
    }

    /// What may happen next, failures apart.
    fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::with_capacity(8);
        let mut last = None;
        for &(from, to, _) in &self.packets {
            if last.replace((from, to)) != Some((from, to)) {
                steps.push(Step::Packet { from, to });
            }
        }
        let writing = (0u8..).zip(&self.writes).filter(|(_, writes)| writes.count > 0);
        steps.extend(writing.map(|(node, _)| Step::Written { node }));
        steps.extend(bits(self.restarts.into()).map(|node| Step::Restart { node }));
        steps.extend(bits(self.detections).map(|bit| Step::Detected { by: bit / 8, node: bit % 8 }));
        if steps.is_empty() {
            steps.push(Step::Turn);
        }
        steps
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        let mut hasher = Scatter::default();
        let mut pair = |high: u32, low: u32| hasher.write_u64(u64::from(high) << 32 | u64::from(low));
        pair(self.nodes[0], self.nodes[1]);
        pair(self.nodes[2], self.nodes[3]);
        pair(self.nodes[4], self.shown);
        for (writes, &timers) in self.writes.iter().zip(&self.timers) {
            pair(if writes.count == 0 { 0 } else { writes.first }, u32::from_le_bytes([writes.count, timers, 0, 0]));
        }
        pair(u32::from_le_bytes([self.up, self.restarts, self.turn, self.crashes]), u32::from(self.unrecoverable));
        pair((self.detections >> 32) as u32, self.detections as u32);
        for &(from, to, packet) in &self.packets {
            pair(u32::from_le_bytes([1, from, to, 0]), packet);
        }
        Fingerprint::of(hasher.finish())
    }
}
