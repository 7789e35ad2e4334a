//! The states that nodes were met in, each under a number.
//!
//! There can be millions, of some kilobytes each. So most of them are put away after a while, and made again
//! from what they were made of when they are asked for.

use std::collections::VecDeque;
use std::rc::Rc;

use super::super::subject::Subject;
use super::local::Happening;
use super::pool::Numbers;
use crate::protocols::machine::Phase;

/// Of the states that lead to each other every so many is kept.
const KEPT_EVERY: u32 = 16;
/// And of the others those met last.
const RECENT_MAX: usize = 10_000;

/// What the search asks of a state again and again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traits {
    /// It takes part normally.
    pub(super) live: bool,
    /// It is a member of a group and at rest, or carries a process.
    pub(super) may_be_done: bool,
    pub(super) waits_for_manager: bool,
    pub(super) heeds_failures: bool,
    pub(super) only_answers: bool,
}

struct Node<M> {
    traits: Traits,
    /// The state before, and what happened; `None` as it was created.
    made_of: Option<(u32, Happening)>,
    /// So many states before it.
    depth: u32,
    machine: Option<Rc<M>>,
}

/// All states that were met.
pub(super) struct Nodes<M> {
    numbers: Numbers,
    nodes: Vec<Node<M>>,
    recent: VecDeque<u32>,
}

impl<M: Subject> Nodes<M> {
    pub(super) fn new() -> Self {
        Self { numbers: Numbers::default(), nodes: Vec::new(), recent: VecDeque::new() }
    }

    pub(super) fn traits(&self, state: u32) -> Traits {
        self.nodes[state as usize].traits
    }

    /// The number of a state that came of another.
    pub(super) fn keep(&mut self, machine: M, made_of: Option<(u32, Happening)>) -> u32 {
        let (number, new) = self.numbers.of(&machine);
        if new {
            let depth = made_of.map_or(0, |(before, _)| self.nodes[before as usize].depth + 1);
            let traits = Traits {
                live: machine.phase() == Phase::Live,
                may_be_done: match machine.member() {
                    Some(member) => member.unfinished().is_none(),
                    None => machine.phase() == Phase::Live,
                },
                waits_for_manager: machine.waits_for_manager(),
                heeds_failures: machine.heeds_failures(),
                only_answers: machine.only_answers(),
            };
            self.nodes.push(Node { traits, made_of, depth, machine: None });
            self.put(number, Rc::new(machine));
        }
        number
    }

    /// The node in a state; `again` makes it of the one before.
    pub(super) fn machine(&mut self, state: u32, again: impl Fn(&M, Happening) -> M) -> Rc<M> {
        let mut missing = Vec::new();
        let mut at = state;
        let mut machine = loop {
            match (&self.nodes[at as usize].machine, self.nodes[at as usize].made_of) {
                (Some(machine), _) => break Rc::clone(machine),
                (None, Some((before, what))) => {
                    missing.push((at, what));
                    at = before;
                }
                (None, None) => unreachable!("it is kept as it was created"),
            }
        };
        for (at, what) in missing.into_iter().rev() {
            machine = Rc::new(again(&machine, what));
            self.put(at, Rc::clone(&machine));
        }
        machine
    }

    fn put(&mut self, state: u32, machine: Rc<M>) {
        self.nodes[state as usize].machine = Some(machine);
        if self.nodes[state as usize].depth.is_multiple_of(KEPT_EVERY) {
            return;
        }
        self.recent.push_back(state);
        if self.recent.len() > RECENT_MAX {
            let old = self.recent.pop_front().expect("there are many");
            self.nodes[old as usize].machine = None;
        }
    }
}
