//! Every order of events of a small system.
//!
//! A state is made of nodes, of packets in order between each pair of them, of writes in order at each
//! disk, and of what else is due. Nodes and packets are shared between states and carry their hashes, so
//! a step costs the one node that it is of. Times do not belong to a state: whatever may happen
//! happens next, in one branch or another; a timer runs out only where nothing else can happen, and the
//! nodes take turns with that.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use super::checks::Checks;
use super::group_checks::GroupChecks;
use super::subject::Subject;
use super::tell::Tale;
use super::{Plan, Violation};
use crate::protocols::machine::{Action, Event, Phase};

/// How far a search goes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// How many failures there are,
    pub crashes: usize,
    /// of nodes below this one.
    pub nodes: usize,
    /// How many times something may be put off: without a bound every order is gone through. Otherwise
    /// the first of what may happen does, in the order of senders, receivers, disks, restarts and
    /// detections, or, so many times in a run, anything else (delay-bounded scheduling, Emmi, Qadeer and
    /// Rakamarić 2011). Failures happen anywhere all the same.
    pub delays: Option<usize>,
    /// Stop after so many states.
    pub states: usize,
}

/// What an exhaustive search saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explored {
    /// Different states of the system.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// States in which everything was delivered.
    pub ends: usize,
    /// Nothing was left out: the search did not stop at its limit.
    pub complete: bool,
}

/// How a search ended in a violation.
#[derive(Clone, Debug)]
pub struct Counterexample {
    /// What was broken.
    pub violation: Violation,
    /// What happened, line by line.
    pub timeline: Vec<String>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.violation, self.timeline.join("\n"))
    }
}

/// Goes through every order of deliveries, writes, restarts, detections and failures within `bounds`. A
/// failure can happen after any step and with any of the node's writes done. Packets between two nodes
/// stay in order, and none is lost but those to a node that is down.
///
/// In every state the checks must hold, and from every state the end must be reachable without further
/// failures. That is not checked if the search stops at its limit of states.
pub fn explore<M: Subject>(plan: &Plan<M::Options>, bounds: Bounds) -> Result<Explored, Box<Counterexample>> {
    let crashes = bounds.crashes;
    let mut found = Found::default();
    let tell =
        |found: &Found, index, last, violation| Err(counterexample::<M>(plan, crashes, found, index, last, violation));
    let mut created = State::<M>::created(plan, crashes);
    if let Err(violation) = created.start() {
        return tell(&found, 0, None, violation);
    }
    let mut explored = Explored { states: 1, steps: 0, ends: 0, complete: true };
    let delays = bounds.delays.unwrap_or(0);
    found.add(created.fingerprint(), 0, Step::Turn, delays);
    let mut path = vec![Visit::new(created, 0, delays, bounds, plan)];
    while let Some(visit) = path.last_mut() {
        let Some((step, delays)) = visit.left.pop() else {
            let visit = path.pop().expect("it is the last");
            explored.ends += usize::from(visit.done);
            found.leave(&visit);
            continue;
        };
        let mut next = visit.state.clone();
        if let Err(violation) = next.take(step, plan) {
            return tell(&found, visit.index, Some(step), violation);
        }
        explored.steps += 1;
        let (index, seen) = found.add(next.fingerprint(), visit.index, step, delays);
        if !matches!(step, Step::Crash { .. }) {
            visit.leads_to.push(index);
        }
        explored.states += usize::from(seen == Seen::Never);
        if explored.states >= bounds.states {
            explored.complete = false;
            return Ok(explored);
        }
        if seen != Seen::Enough {
            path.push(Visit::new(next, index, delays, bounds, plan));
        }
    }
    match found.without_end() {
        None => Ok(explored),
        Some(index) => tell(&found, index, None, Violation::Stuck("nothing leads to the end from here".to_owned())),
    }
}

/// A state that the search is in, and what it has not tried there.
struct Visit<M: Subject> {
    state: State<M>,
    index: u32,
    done: bool,
    /// With how many delays are left after each.
    left: Vec<(Step, usize)>,
    leads_to: Vec<u32>,
}

impl<M: Subject> Visit<M> {
    fn new(state: State<M>, index: u32, delays: usize, bounds: Bounds, plan: &Plan<M::Options>) -> Self {
        let done = state.unrecoverable || state.missing().is_none();
        let failures = state.failures(bounds.nodes, plan.down_at_most).into_iter().map(|step| (step, delays));
        let mut left: Vec<(Step, usize)> = failures.collect();
        let possible = if done { Vec::new() } else { state.possible() };
        let costs = |at: usize| usize::from(at > 0 && bounds.delays.is_some());
        left.extend(
            possible.into_iter().enumerate().filter_map(|(at, step)| Some((step, delays.checked_sub(costs(at))?))),
        );
        Self { state, index, done, left, leads_to: Vec::new() }
    }
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Packet { from: u8, to: u8 },
    Written { node: u8 },
    Restart { node: u8 },
    Detected { by: u8, node: u8 },
    Crash { node: u8, written: u8 },
    Turn,
}

/// The states found, and how each was reached first.
#[derive(Default)]
struct Found {
    index: HashMap<u64, u32>,
    reached: Vec<(u32, Step)>,
    /// With how many delays left each was gone on from.
    delays: Vec<usize>,
    /// The end can be reached from there.
    ends: Vec<bool>,
    /// Of states of which that is not known yet: where they lead.
    open: Vec<(u32, Vec<u32>)>,
}

/// Whether a state was found before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Never,
    /// With fewer delays left: more follows from it now.
    WithLess,
    Enough,
}

impl Found {
    fn add(&mut self, fingerprint: u64, from: u32, step: Step, delays: usize) -> (u32, Seen) {
        let next = u32::try_from(self.reached.len()).expect("fewer states than fit into memory");
        let index = *self.index.entry(fingerprint).or_insert(next);
        if index == next {
            self.reached.push((from, step));
            self.ends.push(false);
            self.delays.push(delays);
            return (index, Seen::Never);
        }
        let before = &mut self.delays[index as usize];
        let seen = if *before < delays { Seen::WithLess } else { Seen::Enough };
        *before = delays.max(*before);
        (index, seen)
    }

    /// All that follows from a state has been tried, but for what is further up on the path.
    fn leave<M: Subject>(&mut self, visit: &Visit<M>) {
        if visit.done || visit.leads_to.iter().any(|&to| self.ends[to as usize]) {
            self.ends[visit.index as usize] = true;
        } else {
            self.open.push((visit.index, visit.leads_to.clone()));
        }
    }

    /// A state from which no end can be reached.
    fn without_end(&mut self) -> Option<u32> {
        loop {
            let before = self.open.len();
            let Self { ends, open, .. } = self;
            open.retain(|(index, leads_to)| {
                let ends_there = leads_to.iter().any(|&to| ends[to as usize]);
                ends[*index as usize] |= ends_there;
                !ends_there
            });
            if open.len() == before {
                return open.first().map(|(index, _)| *index);
            }
        }
    }
}

/// Goes again to a state, and one step further, and tells.
fn counterexample<M: Subject>(
    plan: &Plan<M::Options>,
    crashes: usize,
    found: &Found,
    mut index: u32,
    last: Option<Step>,
    violation: Violation,
) -> Box<Counterexample> {
    let mut steps: Vec<Step> = last.into_iter().collect();
    while index > 0 {
        let (from, step) = found.reached[index as usize];
        steps.push(step);
        index = from;
    }
    let mut state = State::<M>::created(plan, crashes);
    state.tale = Some(Tale::of(state.nodes.iter().map(|node| &node.0.of)));
    // What is broken is broken by the last step, and known.
    let _ = state.start();
    for step in steps.into_iter().rev() {
        let _ = state.take(step, plan);
    }
    let timeline = state.tale.map(Tale::into_lines).unwrap_or_default();
    Box::new(Counterexample { violation, timeline })
}

/// A node, or a packet, with its hash.
#[derive(Debug)]
struct Hashed<T> {
    of: T,
    hash: u64,
}

impl<T: Hash> Hashed<T> {
    fn new(of: T) -> Rc<Self> {
        let mut hasher = DefaultHasher::new();
        of.hash(&mut hasher);
        Rc::new(Self { of, hash: hasher.finish() })
    }
}

impl<T> std::borrow::Borrow<T> for Shared<T> {
    fn borrow(&self) -> &T {
        &self.0.of
    }
}

/// A node shared between states.
#[derive(Debug)]
struct Shared<T>(Rc<Hashed<T>>);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

type Lane<P> = VecDeque<Shared<P>>;

/// A state of the system.
#[derive(Clone)]
struct State<M: Subject> {
    nodes: Vec<Shared<M>>,
    up: Vec<bool>,
    packets: BTreeMap<(u8, u8), Lane<M::Packet>>,
    writes: Vec<VecDeque<u64>>,
    timers: Vec<BTreeSet<u64>>,
    restarts: BTreeSet<u8>,
    detections: BTreeSet<(u8, u8)>,
    /// Whose timers run out next.
    turn: u8,
    crashes: usize,
    unrecoverable: bool,
    checks: Rc<Checks>,
    groups: Rc<GroupChecks>,
    tale: Option<Tale>,
}

impl<M: Subject> State<M> {
    fn created(plan: &Plan<M::Options>, crashes: usize) -> Self {
        let nodes: Vec<Shared<M>> =
            M::system(plan.workload, &plan.options).into_iter().map(|m| Shared(Hashed::new(m))).collect();
        let n = nodes.len();
        Self {
            up: vec![true; n],
            packets: BTreeMap::new(),
            writes: vec![VecDeque::new(); n],
            timers: vec![BTreeSet::new(); n],
            restarts: BTreeSet::new(),
            detections: BTreeSet::new(),
            turn: 0,
            crashes,
            unrecoverable: false,
            checks: Rc::new(Checks::new(plan.workload.units)),
            groups: Rc::new(GroupChecks::new(plan.workload.units)),
            tale: None,
            nodes,
        }
    }

    fn start(&mut self) -> Result<(), Violation> {
        (0..self.nodes.len()).try_for_each(|node| self.step(node, Event::Start, false))
    }

    fn node(&self, node: usize) -> &M {
        &self.nodes[node].0.of
    }

    fn missing(&self) -> Option<String> {
        match self.node(0).member() {
            Some(_) => self.groups.missing::<M, _>(&self.nodes, &self.up),
            None => self.checks.missing::<M, _>(&self.nodes, &self.up),
        }
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.nodes.iter().for_each(|node| node.0.hash.hash(&mut hasher));
        for (lane, packets) in self.packets.iter().filter(|(_, packets)| !packets.is_empty()) {
            (lane, packets.len()).hash(&mut hasher);
            packets.iter().for_each(|packet| packet.0.hash.hash(&mut hasher));
        }
        (&self.up, &self.writes, &self.timers, &self.restarts, &self.detections).hash(&mut hasher);
        (self.crashes, self.turn, self.unrecoverable).hash(&mut hasher);
        (&self.checks, &self.groups).hash(&mut hasher);
        hasher.finish()
    }

    /// Who may fail now.
    fn failures(&self, nodes: usize, down_at_most: usize) -> Vec<Step> {
        let of = |node: usize| u8::try_from(node).expect("few nodes");
        let may = (0..nodes).filter(|&node| self.crashes > 0 && self.may_crash(node, down_at_most));
        let after = |node: usize| (0..=self.writes[node].len()).map(move |written| (node, written));
        may.flat_map(after).map(|(node, written)| Step::Crash { node: of(node), written: of(written) }).collect()
    }

    /// What else may happen next.
    fn possible(&self) -> Vec<Step> {
        let of = |node: usize| u8::try_from(node).expect("few nodes");
        let lanes = self.packets.iter().filter(|(_, packets)| !packets.is_empty());
        let mut steps: Vec<Step> = lanes.map(|(&(from, to), _)| Step::Packet { from, to }).collect();
        let writing = (0..self.nodes.len()).filter(|&node| !self.writes[node].is_empty());
        steps.extend(writing.map(|node| Step::Written { node: of(node) }));
        steps.extend(self.restarts.iter().map(|&node| Step::Restart { node }));
        steps.extend(self.detections.iter().map(|&(by, node)| Step::Detected { by, node }));
        if steps.is_empty() {
            steps.push(Step::Turn);
        }
        steps
    }

    fn may_crash(&self, node: usize, down_at_most: usize) -> bool {
        let out = |node: &usize| !self.up[*node] || self.node(*node).phase() == Phase::Recovering;
        self.up[node] && (0..self.up.len()).filter(|other| *other != node).filter(out).count() < down_at_most
    }

    fn take(&mut self, step: Step, plan: &Plan<M::Options>) -> Result<(), Violation> {
        match step {
            Step::Packet { from, to } => {
                let packet = self.packets.get_mut(&(from, to)).and_then(VecDeque::pop_front).expect("it is there");
                let (from, to) = (usize::from(from), usize::from(to));
                if !self.up[to] {
                    return Ok(());
                }
                self.step(to, Event::Packet { from, packet: packet.0.of.clone() }, plan.must_recover)
            }
            Step::Written { node } => {
                let node = usize::from(node);
                let token = self.writes[node].pop_front().expect("it is there");
                self.persist(node, &[token]);
                self.step(node, Event::Written(token), plan.must_recover)
            }
            Step::Restart { node } => {
                self.restarts.remove(&node);
                let node = usize::from(node);
                self.up[node] = true;
                let shown = self.checks.shown(node);
                self.step(node, Event::Restarted { shown }, plan.must_recover)
            }
            Step::Detected { by, node } => {
                self.detections.remove(&(by, node));
                let (by, node) = (usize::from(by), usize::from(node));
                if self.up[by] && !self.up[node] { self.step(by, Event::Down(node), plan.must_recover) } else { Ok(()) }
            }
            Step::Crash { node, written } => {
                self.crashes -= 1;
                self.crash(usize::from(node), usize::from(written));
                Ok(())
            }
            Step::Turn => {
                let node = usize::from(self.turn);
                self.turn = (self.turn + 1) % u8::try_from(self.nodes.len()).expect("few nodes");
                let timers = std::mem::take(&mut self.timers[node]);
                timers.into_iter().try_for_each(|timer| self.step(node, Event::Timer(timer), plan.must_recover))
            }
        }
    }

    fn step(&mut self, node: usize, event: Event<M::Packet>, must_recover: bool) -> Result<(), Violation> {
        if let Some(tale) = &mut self.tale {
            tale.event(None, node, &event);
        }
        let mut machine = self.node(node).clone();
        let mut actions = Vec::new();
        machine.step(event, &mut actions);
        self.nodes[node] = Shared(Hashed::new(machine));
        for action in actions {
            if let Some(tale) = &mut self.tale {
                tale.action(&action);
            }
            self.act(node, action, must_recover)?;
        }
        let State { nodes, up, checks, groups, .. } = self;
        match nodes[node].0.of.member() {
            Some(_) => Rc::make_mut(groups).stepped::<M, _>(node, nodes, up),
            None => Rc::make_mut(checks).stepped::<M, _>(node, nodes, up),
        }
    }

    fn act(&mut self, node: usize, action: Action<M::Packet>, must_recover: bool) -> Result<(), Violation> {
        let of = |node: usize| u8::try_from(node).expect("few nodes");
        match action {
            Action::Send { to, packet } => {
                let lane = self.packets.entry((of(node), of(to))).or_default();
                lane.push_back(Shared(Hashed::new(packet)));
            }
            Action::Timer { timer, .. } => {
                self.timers[node].insert(timer);
            }
            Action::Write { token, .. } => self.writes[node].push_back(token),
            Action::Show(output) => {
                let State { nodes, checks, groups, .. } = self;
                if let Some(member) = nodes[node].0.of.member() {
                    return Rc::make_mut(groups).show(&output, Some(member));
                }
                let recoverable = nodes.iter().find_map(|node| node.0.of.recovery_state());
                let by = nodes[output.unit].0.of.process().filter(|_| output.unit == node);
                return Rc::make_mut(checks).show(&output, by, recoverable.as_deref());
            }
            Action::Restart(other) => {
                if self.up[other] {
                    self.crash(other, 0);
                }
                self.restarts.insert(of(other));
            }
            Action::Unrecoverable if must_recover => {
                return Err(Violation::Broken(format!("node {node} gave up on failures that should be tolerated")));
            }
            Action::Unrecoverable => {
                self.unrecoverable = true;
                return self.checks.gave_up::<M, _>(node, &self.nodes, &self.up);
            }
        }
        Ok(())
    }

    fn persist(&mut self, node: usize, tokens: &[u64]) {
        let mut machine = self.node(node).clone();
        tokens.iter().for_each(|&token| machine.persist(token));
        self.nodes[node] = Shared(Hashed::new(machine));
    }

    /// A node fails when its first writes have reached its disk.
    fn crash(&mut self, node: usize, written: usize) {
        let of = |node: usize| u8::try_from(node).expect("few nodes");
        let tokens: Vec<u64> = std::mem::take(&mut self.writes[node]).into_iter().take(written).collect();
        if let Some(tale) = &mut self.tale {
            tale.failure(None, node, &tokens);
        }
        self.persist(node, &tokens);
        let mut machine = self.node(node).clone();
        machine.crash();
        self.nodes[node] = Shared(Hashed::new(machine));
        self.up[node] = false;
        self.timers[node].clear();
        Rc::make_mut(&mut self.checks).crashed(node);
        Rc::make_mut(&mut self.groups).crashed(node);
        if !self.node(node).waits_for_manager() {
            self.restarts.insert(of(node));
        }
        let heeding = (0..self.up.len()).filter(|&by| by != node && self.node(by).heeds_failures());
        self.detections.extend(heeding.map(|by| (of(by), of(node))).collect::<Vec<_>>());
    }
}
