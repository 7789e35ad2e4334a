//! One simulated system: nodes, what is on its way to them, and the time.

use std::collections::BTreeMap;

use super::checks::Checks;
use super::group_checks::GroupChecks;
use super::subject::Subject;
use super::tell::Tale;
use super::{Crash, Plan, Report, Victim, Violation};
use crate::protocols::machine::{Action, Event, Phase};
use crate::protocols::rng::Rng;

/// What is on its way. `life` says to which life of the node it belongs.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Coming<P> {
    Start { node: usize },
    Packet { from: usize, to: usize, packet: P },
    Timer { node: usize, life: u32, timer: u64 },
    Written { node: usize, life: u32, token: u64 },
    Restart { node: usize },
    Detected { by: usize, node: usize },
}

impl<P> Coming<P> {
    /// Whom it happens to.
    fn node(&self) -> usize {
        match *self {
            Self::Packet { to: node, .. } | Self::Detected { by: node, .. } | Self::Start { node } => node,
            Self::Timer { node, .. } | Self::Written { node, .. } | Self::Restart { node } => node,
        }
    }
}

/// A system in the course of a run.
#[derive(Clone, Debug)]
pub struct World<M: Subject> {
    machines: Vec<M>,
    up: Vec<bool>,
    life: Vec<u32>,
    /// By time, then in the order in which they were caused.
    coming: BTreeMap<(u64, u64), Coming<M::Packet>>,
    plan: Plan<M::Options>,
    rng: Rng,
    now: u64,
    caused: u64,
    /// When a node's disk has done what it was asked to.
    disk_free: Vec<u64>,
    /// When its processor has.
    processor_free: Vec<u64>,
    /// Since when a node is not live after its failure, or blocked without one.
    failed_at: Vec<Option<u64>>,
    blocked_at: Vec<Option<u64>>,
    /// Left to happen, in order.
    crashes: Vec<Crash>,
    /// Steps in which several packets were sent since a failure was detected or a node has run again.
    responses: u64,
    checks: Checks,
    groups: GroupChecks,
    report: Report,
    tale: Option<Tale>,
    /// The last unit that showed something.
    shown: Option<usize>,
    actions: Vec<Action<M::Packet>>,
}

impl<M: Subject> World<M> {
    /// A system as it is created.
    pub fn new(plan: &Plan<M::Options>, keep_timeline: bool) -> Self {
        let machines = M::system(plan.workload, &plan.options);
        let nodes = machines.len();
        let mut crashes = plan.crashes.clone();
        crashes.sort_by_key(|crash| std::cmp::Reverse(crash.after_step));
        let start = (0..nodes).map(|node| ((0, node as u64), Coming::Start { node })).collect();
        Self {
            up: vec![true; nodes],
            life: vec![0; nodes],
            coming: start,
            rng: Rng::new(plan.seed),
            now: 0,
            caused: nodes as u64,
            disk_free: vec![0; nodes],
            processor_free: vec![0; nodes],
            failed_at: vec![None; nodes],
            blocked_at: vec![None; nodes],
            crashes,
            responses: 0,
            checks: Checks::new(plan.workload.units),
            groups: GroupChecks::new(plan.workload.units),
            report: Report::default(),
            tale: keep_timeline.then(|| Tale::of(machines.iter())),
            shown: None,
            actions: Vec::new(),
            plan: plan.clone(),
            machines,
        }
    }

    /// Runs to its end.
    pub fn finish(mut self) -> Result<Report, Violation> {
        while self.next()? {}
        Ok(self.report())
    }

    /// One step; false when the run is at its end.
    #[allow(clippy::should_implement_trait, reason = "it fails, and an iterator can't")]
    pub fn next(&mut self) -> Result<bool, Violation> {
        if self.report.given_up > 0 || self.report.steps.is_multiple_of(16) && self.missing().is_none() {
            return Ok(false);
        }
        if self.report.steps >= self.plan.steps_max {
            return Err(Violation::Stuck(self.missing().unwrap_or_default()));
        }
        let Some(((time, caused), coming)) = self.coming.pop_first() else {
            return match self.missing() {
                None => Ok(false),
                Some(why) => Err(Violation::Stuck(why)),
            };
        };
        self.now = self.now.max(time);
        let free = self.processor_free[coming.node()];
        if free > self.now {
            // It waits its turn among what its node has still to do.
            self.coming.insert((free, caused), coming);
            return Ok(true);
        }
        self.happen(coming)?;
        while let Some(Victim::Node(node)) = self.due() {
            self.crashes.pop();
            if self.may_crash(node) {
                self.crash(node);
            }
        }
        Ok(true)
    }

    /// Who is to fail now.
    fn due(&self) -> Option<Victim> {
        self.crashes.last().filter(|crash| crash.after_step <= self.report.steps).map(|crash| crash.victim)
    }

    /// What keeps the run from its end.
    pub fn missing(&self) -> Option<String> {
        match self.machines[0].member() {
            Some(_) => self.groups.missing::<M, _>(&self.machines, &self.up),
            None => self.checks.missing::<M, _>(&self.machines, &self.up),
        }
    }

    /// Who has shown something since this was asked last.
    pub(super) fn take_shown(&mut self) -> Option<usize> {
        self.shown.take()
    }

    /// Whether the plan lets this node fail now.
    pub(super) fn may_crash(&self, node: usize) -> bool {
        let out = |node: &usize| !self.up[*node] || self.machines[*node].phase() == Phase::Recovering;
        self.up[node] && (0..self.up.len()).filter(|other| *other != node).filter(out).count() < self.plan.down_at_most
    }

    /// Lets something that was coming happen.
    fn happen(&mut self, coming: Coming<M::Packet>) -> Result<(), Violation> {
        let (node, event) = match coming {
            Coming::Start { node } if self.life[node] == 0 => (node, Event::Start),
            Coming::Packet { from, to, packet } if self.up[to] => (to, Event::Packet { from, packet }),
            Coming::Timer { node, life, timer } if life == self.life[node] && self.up[node] => {
                (node, Event::Timer(timer))
            }
            Coming::Written { node, life, token } if life == self.life[node] && self.up[node] => {
                self.machines[node].persist(token);
                (node, Event::Written(token))
            }
            Coming::Restart { node } if !self.up[node] => {
                self.up[node] = true;
                (node, Event::Restarted { shown: self.checks.shown(node) })
            }
            Coming::Detected { by, node } if self.up[by] && !self.up[node] => (by, Event::Down(node)),
            _ => return Ok(()),
        };
        self.report.steps += 1;
        self.processor_free[node] = self.now + self.plan.costs.processor;
        if let Some(tale) = &mut self.tale {
            tale.event(Some(self.now), node, &event);
        }
        if matches!(event, Event::Down(_) | Event::Restarted { .. }) {
            self.responses = 0;
        }
        let mut actions = std::mem::take(&mut self.actions);
        self.machines[node].step(event, &mut actions);
        let fails = self.fails_responding(node, &mut actions);
        for action in actions.drain(..) {
            self.act(node, action)?;
        }
        self.actions = actions;
        if fails {
            self.crash(node);
        }
        self.account(node);
        if self.machines[node].member().is_some() {
            return self.groups.stepped::<M, _>(node, &self.machines, &self.up);
        }
        self.checks.stepped::<M, _>(node, &self.machines, &self.up)
    }

    fn act(&mut self, node: usize, action: Action<M::Packet>) -> Result<(), Violation> {
        if let Some(tale) = &mut self.tale {
            tale.action(&action);
        }
        match action {
            Action::Send { to, packet } => {
                let bytes = M::packet_bytes(&packet);
                self.report.packets += 1;
                self.report.bytes += bytes;
                let copies = match () {
                    () if self.plan.partitions.iter().any(|parts| parts.severs(self.now, node, to)) => 0,
                    () if self.rng.per_mille(self.plan.loss) => 0,
                    () if self.rng.per_mille(self.plan.repeat) => 2,
                    () => 1,
                };
                let costs = self.plan.costs;
                self.processor_free[node] += costs.processor;
                let sent = self.processor_free[node] - self.now;
                for _ in 0..copies {
                    let after = sent + costs.link + bytes / costs.link_bytes_per_us + self.rng.below(costs.jitter + 1);
                    self.cause(after, Coming::Packet { from: node, to, packet: packet.clone() });
                }
            }
            Action::Timer { timer, after } => {
                let after = after + self.rng.below(after / 4 + 1);
                self.cause(after, Coming::Timer { node, life: self.life[node], timer });
            }
            Action::Write { token, bytes } => {
                self.report.writes += 1;
                self.report.written += bytes;
                let costs = &self.plan.costs;
                let asked = self.processor_free[node];
                self.disk_free[node] = self.disk_free[node].max(asked) + costs.disk + bytes / costs.disk_bytes_per_us;
                self.cause(self.disk_free[node] - self.now, Coming::Written { node, life: self.life[node], token });
            }
            Action::Show(output) => {
                self.report.outputs += 1;
                self.shown = Some(node);
                if self.machines[node].member().is_some() {
                    return self.groups.show(&output, self.machines[node].member());
                }
                let by = output.unit;
                let recoverable = self.machines.iter().find_map(|machine| machine.recovery_state());
                self.checks.show(
                    &output,
                    self.machines[by].process().filter(|_| by == node),
                    recoverable.as_deref(),
                )?;
            }
            Action::Restart(other) => {
                if self.up[other] {
                    self.crash(other);
                }
                let coming = self.coming.values().any(|c| matches!(c, Coming::Restart { node } if *node == other));
                if !coming {
                    self.cause(self.plan.costs.restart, Coming::Restart { node: other });
                }
            }
            Action::Unrecoverable if self.plan.must_recover => {
                return Err(Violation::Broken(format!("node {node} gave up on failures that should be tolerated")));
            }
            Action::Unrecoverable => {
                self.report.given_up = 1;
                return self.checks.gave_up::<M, _>(node, &self.machines, &self.up);
            }
        }
        Ok(())
    }

    /// Whether a node is to fail in the midst of a step; the actions are those up to then.
    fn fails_responding(&mut self, node: usize, actions: &mut Vec<Action<M::Packet>>) -> bool {
        let sends = actions.iter().enumerate().filter(|(_, action)| matches!(action, Action::Send { .. }));
        let sends: Vec<usize> = sends.map(|(at, _)| at).collect();
        if sends.len() < 2 {
            return false;
        }
        self.responses += 1;
        let now = matches!(self.due(), Some(Victim::Responding(after)) if self.responses == after + 1);
        if now && self.may_crash(node) {
            self.crashes.pop();
            actions.truncate(sends[1 + self.rng.index(sends.len() - 1)]);
            return true;
        }
        false
    }

    /// A node fails. Of the writes that are under way, some reach the disk.
    pub(super) fn crash(&mut self, node: usize) {
        let writing = |coming: &Coming<M::Packet>| match coming {
            Coming::Written { node: of, life, token } if *of == node && *life == self.life[node] => Some(*token),
            _ => None,
        };
        let mut tokens: Vec<u64> = self.coming.values().filter_map(writing).collect();
        tokens.sort_unstable();
        tokens.truncate(self.rng.index(tokens.len() + 1));
        if let Some(tale) = &mut self.tale {
            tale.failure(Some(self.now), node, &tokens);
        }
        for token in tokens {
            self.machines[node].persist(token);
        }
        self.fail(node);
        if !self.machines[node].waits_for_manager() {
            self.cause(self.plan.costs.restart, Coming::Restart { node });
        }
        for by in (0..self.up.len()).filter(|&by| by != node) {
            if !self.machines[by].heeds_failures() {
                continue;
            }
            let after = self.plan.costs.detect / 2 + self.rng.below(self.plan.costs.detect);
            self.cause(after, Coming::Detected { by, node });
        }
    }

    fn fail(&mut self, node: usize) {
        self.report.crashes += 1;
        self.count(node);
        self.machines[node].crash();
        self.up[node] = false;
        self.life[node] += 1;
        self.disk_free[node] = 0;
        self.processor_free[node] = self.now;
        self.checks.crashed(node);
        self.groups.crashed(node);
        self.failed_at[node].get_or_insert(self.now);
        self.blocked_at[node] = None;
    }

    /// Keeps account of who is not live and why.
    fn account(&mut self, node: usize) {
        let machine = &self.machines[node];
        if let Some(since) = self.failed_at[node] {
            if machine.phase() == Phase::Live {
                self.report.recovering += self.now - since;
                self.failed_at[node] = None;
            }
            return;
        }
        match (machine.blocked(), self.blocked_at[node]) {
            (true, None) => self.blocked_at[node] = Some(self.now),
            (false, Some(since)) => {
                self.report.blocked += self.now - since;
                self.blocked_at[node] = None;
            }
            _ => {}
        }
    }

    /// Takes over a node's own figures.
    fn count(&mut self, node: usize) {
        let counters = self.machines[node].counters();
        self.report.held += counters.held;
        self.report.sent_free += counters.sent_free;
        self.report.sent_piggybacked += counters.sent_piggybacked;
        self.report.log_bytes += counters.log_bytes;
    }

    /// Figures of the run so far, with those that nodes keep.
    pub fn report(&mut self) -> Report {
        (0..self.machines.len()).for_each(|node| self.count(node));
        self.report.time = self.now;
        self.report.messages = self.machines.iter().filter_map(|m| m.process()).map(|p| p.sii()).sum();
        let delivered = self.machines.iter().filter_map(|m| m.member()?.replica()).map(|r| r.log.len() as u64);
        self.report.messages += delivered.sum::<u64>();
        std::mem::take(&mut self.report)
    }

    fn cause(&mut self, after: u64, coming: Coming<M::Packet>) {
        self.coming.insert((self.now + after, self.caused), coming);
        self.caused += 1;
    }

    /// The lines told so far.
    pub fn take_timeline(&mut self) -> Vec<String> {
        self.tale.take().map(Tale::into_lines).unwrap_or_default()
    }
}
