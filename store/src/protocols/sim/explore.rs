//! Every order of events of a small system.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::world::Coming;
use super::{Plan, Violation, World};
use crate::protocols::machine::Machine;

/// When something comes, and how many things were caused before it.
type Key = (u64, u64);

/// What an exhaustive search saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explored {
    /// Different states of the system.
    pub states: usize,
    /// States in which everything was delivered.
    pub ends: usize,
    /// Nothing was left out: the search did not stop at its limit.
    pub complete: bool,
}

/// Goes through every interleaving of deliveries, writes, restarts and up to `crashes` failures of the
/// nodes below `nodes`, each of which can happen after any step. Packets between two nodes stay in order and none is lost but
/// those to a node that is down; a timer runs out only when nothing else can happen (or the system
/// would never be finite). Stops at the first violation or after `states_max` states.
pub fn explore<M: Machine>(
    plan: &Plan<M::Options>,
    crashes: usize,
    nodes: usize,
    states_max: usize,
) -> Result<Explored, Violation> {
    let plan = Plan { crashes: Vec::new(), loss: 0, repeat: 0, ..plan.clone() };
    let mut seen: HashSet<u64> = HashSet::new();
    let mut created = World::<M>::new(&plan, false);
    for node in 0..created.machines.len() {
        let start = created.coming.remove(&(0, node as u64)).expect("every node is to start");
        created.happen(start)?;
    }
    let mut stack = vec![(created, crashes, 0u32)];
    let mut explored = Explored { states: 0, ends: 0, complete: true };
    while let Some((world, crashes, rounds)) = stack.pop() {
        if !seen.insert(fingerprint(&world, crashes)) {
            continue;
        }
        explored.states += 1;
        if explored.states >= states_max {
            explored.complete = false;
            return Ok(explored);
        }
        if world.unrecoverable() {
            continue;
        }
        let done = world.missing();
        if done.is_none() {
            explored.ends += 1;
            if crashes == 0 {
                continue;
            }
        }
        for node in (0..nodes).filter(|&node| crashes > 0 && world.may_crash(node)) {
            let mut next = world.clone();
            next.crash(node);
            stack.push((next, crashes - 1, 0));
        }
        if done.is_none() {
            continue;
        }
        let (ready, timers) = ready(&world);
        // Timers only get things going again; if many rounds of them do not, they never will.
        let (ready, rounds) = if ready.is_empty() { (timers, rounds + 1) } else { (ready, rounds) };
        if ready.is_empty() || rounds > 200 {
            return Err(Violation::Stuck(done.unwrap_or_default()));
        }
        for key in ready {
            let mut next = world.clone();
            let coming = next.coming.remove(&key).expect("it is ready");
            // So that timers take turns.
            if matches!(coming, Coming::Timer { .. }) {
                next.now = next.now.max(key.0);
            }
            next.happen(coming)?;
            stack.push((next, crashes, rounds));
        }
    }
    Ok(explored)
}

/// What can happen next: the first packet of each pair of nodes, the first write of each node, and all
/// else that is no timer; and the timer that comes first.
fn ready<M: Machine>(world: &World<M>) -> (Vec<Key>, Vec<Key>) {
    let mut ready = Vec::new();
    let mut timers = Vec::new();
    let mut taken = HashSet::new();
    // By cause, which is the order in which things were sent.
    let mut keys: Vec<&(u64, u64)> = world.coming.keys().collect();
    keys.sort_by_key(|key| key.1);
    for key in keys {
        let lane = match &world.coming[key] {
            Coming::Packet { from, to, .. } => (0, *from, *to),
            Coming::Written { node, life, .. } if *life == world.life[*node] => (1, *node, 0),
            Coming::Timer { node, life, .. } => {
                if *life == world.life[*node] {
                    timers.push(*key);
                }
                continue;
            }
            Coming::Written { .. } => continue,
            Coming::Start { .. } => continue,
            Coming::Restart { node } => (2, *node, 0),
            Coming::Detected { by, node } => (3, *by, *node),
        };
        if taken.insert(lane) {
            ready.push(*key);
        }
    }
    timers.sort_unstable();
    timers.truncate(1);
    (ready, timers)
}

/// The same for the same state, whatever the times are.
fn fingerprint<M: Machine>(world: &World<M>, crashes: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.machines.hash(&mut hasher);
    world.up.hash(&mut hasher);
    crashes.hash(&mut hasher);
    world.outputs_shown().hash(&mut hasher);
    let mut keys: Vec<&(u64, u64)> = world.coming.keys().collect();
    keys.sort_by_key(|key| key.1);
    for key in keys {
        match &world.coming[key] {
            Coming::Timer { life, node, timer } if *life == world.life[*node] => (1, node, timer).hash(&mut hasher),
            Coming::Written { life, node, token } if *life == world.life[*node] => (2, node, token).hash(&mut hasher),
            Coming::Timer { .. } | Coming::Written { .. } => {}
            other => other.hash(&mut hasher),
        }
    }
    hasher.finish()
}
