//! Every order of events of a small system.
//!
//! A state is made of nodes, of packets in order between each pair of them, of writes in order at each
//! disk, and of what else is due. What a node does in a state of its own is computed once (`local`), and
//! the state it was in is put away and made again when it is wanted (`nodes`);
//! a state of the system is a handful of numbers (`system`), and of those that were found a fingerprint
//! is kept (`table`). Two states of a node are one if they hash the same, and those that nothing that follows can
//! tell from each other do: what order concurrent CBCASTs were delivered in is left out of a group's log
//! ([`Replica`](crate::protocols::group::Replica)), so what a step does is checked before its state is looked
//! up. Times do not belong to a state: whatever may happen
//! happens next, in one branch or another; a timer runs out only where nothing else can happen, and the
//! nodes take turns with that.
//!
//! # The reduction
//!
//! With [`Bounds::reduce`] not everything that may happen is tried where no failure is left. What happens
//! at two nodes commutes: each step changes its node, takes a packet from the front of a lane to it, and
//! puts packets at the end of lanes from it. A node is *closed* if nothing that others do can add to what
//! may happen at it next: all lanes to it have packets (more of them go behind), but for those from
//! nodes that only answer and have nothing of it to answer. Then whatever follows is, up to the order of
//! what commutes, something that begins with a step of this node: its first one, which is among those that
//! are possible now, moved to the front. So the steps of one closed node are enough (a *persistent set*,
//! Godefroid 1996). What is not so local makes a node not closed: that it has to learn of a failure, or
//! that it runs again before others have learned. That a node ends another that is up
//! is asserted to happen by timers only; these run out when nothing else can happen, so what is put off is
//! not put off for ever, and that the search never comes back to a state without a timer is asserted, too.
//!
//! And some packets make no difference wherever they arrive ([`Machine::is_inert`](
//! crate::protocols::machine::Machine::is_inert)): acknowledgements of frames whose arrival nobody waits for,
//! signs of life, what is meant for an incarnation that is over. The arrival commutes with all that may
//! happen, failures too, and shows nothing. So it is taken at once, at whatever place of its lane: a persistent set of
//! one step, also where failures are left. A test compares both orders in all that a search meets.
//!
//! Ends are the same: everything is at rest in the same states. What a node does by itself is seen in any
//! order: shown twice, shown and undone, history lost. What two nodes say of each other is compared at
//! each step of either; a contradiction that lasts is seen, and it lasts where nobody is
//! rolled back: in `sender` without an extension, `family` and `group`. Where a store's state is compared
//! with what is shown it need not last, so the reduction is not for `local` and `optimistic`.

mod local;
mod nodes;
mod pool;
mod system;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;

use super::subject::Subject;
use super::tell::Tale;
use super::{Plan, Violation};
use system::{State, Step, System};
use table::{Fingerprint, Seen, Table};

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
    /// Leave out orders that differ from others in nothing that can be told (see the module's page).
    pub reduce: bool,
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
    let told = |steps: Vec<Step>, violation| Err(counterexample::<M>(plan, bounds, &steps, violation));
    let (mut system, started) = match System::<M>::started(plan, bounds, false) {
        Ok(started) => started,
        Err(violation) => return told(Vec::new(), violation),
    };
    let mut explored = Explored { states: 1, steps: 0, ends: 0, complete: true };
    let delays = u8::try_from(bounds.delays.unwrap_or(0)).unwrap_or(u8::MAX);
    let mut found = Table::new(bounds.delays.is_some());
    let fingerprint = started.fingerprint();
    found.add(fingerprint, delays);
    // States of which it is not known that the end can be reached, and where they lead.
    let mut open: Vec<(Fingerprint, Vec<Fingerprint>)> = Vec::new();
    let mut path = vec![Visit::new(&mut system, started, fingerprint, None, delays, bounds)];
    while let Some(visit) = path.last_mut() {
        let Some((step, delays)) = visit.left.pop() else {
            let visit = path.pop().expect("it is the last");
            explored.ends += usize::from(visit.done);
            if visit.ends || visit.leads_to.iter().any(|&to| found.ends(to)) {
                found.set_ends(visit.fingerprint);
            } else {
                open.push((visit.fingerprint, visit.leads_to));
            }
            continue;
        };
        let mut next = visit.state.clone();
        if let Err(violation) = system.take(&mut next, step) {
            return told(steps_of(&path, Some(step)), violation);
        }
        // Who is restarted is failed for others, whatever they had to do next.
        assert!(!bounds.reduce || step == Step::Turn || !system.forced, "nodes end themselves only by timers");
        system.forced = false;
        explored.steps += 1;
        let fingerprint = next.fingerprint();
        let seen = found.add(fingerprint, delays);
        if !matches!(step, Step::Crash { .. }) && !visit.ends {
            visit.ends = seen != Seen::Never && found.ends(fingerprint);
            if !visit.ends {
                visit.leads_to.push(fingerprint);
            }
        }
        explored.states = found.len();
        if explored.states >= bounds.states {
            explored.complete = false;
            return Ok(explored);
        }
        if seen != Seen::Enough {
            path.push(Visit::new(&mut system, next, fingerprint, Some(step), delays, bounds));
        } else if bounds.reduce {
            assert!(!is_round(&path, fingerprint, step), "what is put off must not be put off for ever");
        }
    }
    match without_end(&mut found, open) {
        None => Ok(explored),
        Some(stuck) => {
            let steps = path_to::<M>(plan, bounds, stuck);
            told(steps, Violation::Stuck("nothing leads to the end from here".to_owned()))
        }
    }
}

/// A state that the search is in, and what it has not tried there.
struct Visit {
    state: State,
    fingerprint: Fingerprint,
    /// What led there.
    by: Option<Step>,
    done: bool,
    /// The end can be reached.
    ends: bool,
    /// With how many delays are left after each.
    left: Vec<(Step, u8)>,
    /// As long as that is not known: where it leads.
    leads_to: Vec<Fingerprint>,
}

impl Visit {
    fn new<M: Subject>(
        system: &mut System<'_, M>,
        state: State,
        fingerprint: Fingerprint,
        by: Option<Step>,
        delays: u8,
        bounds: Bounds,
    ) -> Self {
        let done = system.is_done(&state);
        let failures = system.failures(&state, bounds.nodes).map(|step| (step, delays));
        let mut left: Vec<(Step, u8)> = failures.collect();
        let possible = system.possible(&state, done);
        let costs = |at: usize| u8::from(at > 0 && bounds.delays.is_some());
        left.extend(
            possible.into_iter().enumerate().filter_map(|(at, step)| Some((step, delays.checked_sub(costs(at))?))),
        );
        Self { state, fingerprint, by, done, ends: done, left, leads_to: Vec::new() }
    }
}

/// Whether the search is back where it was without a timer having run out.
fn is_round(path: &[Visit], to: Fingerprint, last: Step) -> bool {
    let mut by = Some(last);
    for visit in path.iter().rev() {
        if matches!(by, Some(Step::Turn | Step::Crash { .. })) {
            return false;
        }
        if visit.fingerprint == to {
            return true;
        }
        by = visit.by;
    }
    false
}

fn steps_of(path: &[Visit], last: Option<Step>) -> Vec<Step> {
    path.iter().filter_map(|visit| visit.by).chain(last).collect()
}

/// A state from which no end can be reached.
fn without_end(found: &mut Table, mut open: Vec<(Fingerprint, Vec<Fingerprint>)>) -> Option<Fingerprint> {
    loop {
        let before = open.len();
        open.retain(|(state, leads_to)| {
            let ends_there = leads_to.iter().any(|&to| found.ends(to));
            if ends_there {
                found.set_ends(*state);
            }
            !ends_there
        });
        if open.len() == before {
            return open.first().map(|(state, _)| *state);
        }
    }
}

/// How the search gets to a state: it is made once more, up to there.
fn path_to<M: Subject>(plan: &Plan<M::Options>, bounds: Bounds, to: Fingerprint) -> Vec<Step> {
    let Ok((mut system, started)) = System::<M>::started(plan, bounds, false) else { return Vec::new() };
    let delays = u8::try_from(bounds.delays.unwrap_or(0)).unwrap_or(u8::MAX);
    let mut found = Table::new(bounds.delays.is_some());
    let fingerprint = started.fingerprint();
    found.add(fingerprint, delays);
    let mut path = vec![Visit::new(&mut system, started, fingerprint, None, delays, bounds)];
    while let Some(visit) = path.last_mut() {
        if visit.fingerprint == to {
            break;
        }
        let Some((step, delays)) = visit.left.pop() else {
            path.pop();
            continue;
        };
        let mut next = visit.state.clone();
        let _ = system.take(&mut next, step);
        let fingerprint = next.fingerprint();
        if found.add(fingerprint, delays) != Seen::Enough {
            path.push(Visit::new(&mut system, next, fingerprint, Some(step), delays, bounds));
        }
    }
    steps_of(&path, None)
}

/// Takes these steps again, and tells.
fn counterexample<M: Subject>(
    plan: &Plan<M::Options>,
    bounds: Bounds,
    steps: &[Step],
    violation: Violation,
) -> Box<Counterexample> {
    let timeline = match System::<M>::started(plan, bounds, true) {
        Ok((mut system, mut state)) => {
            // What is broken is broken by the last step, and known.
            steps.iter().for_each(|&step| drop(system.take(&mut state, step)));
            system.tale.map(Tale::into_lines).unwrap_or_default()
        }
        Err(_) => Vec::new(),
    };
    Box::new(Counterexample { violation, timeline })
}
