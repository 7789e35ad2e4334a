//! What must hold of every system at every step, whatever the protocol.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};

use crate::protocols::machine::{Machine, Phase};
use crate::protocols::model::Sii;
use crate::protocols::process::{Interval, Output, Process};

/// An invariant that a run broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A process has received a message that its sender, live, never sent in its present history.
    Orphan {
        /// The process.
        unit: usize,
        /// Its interval that began with the message.
        sii: Sii,
        /// The sender.
        from: usize,
    },
    /// Something was shown to the world outside that had been shown before, or out of order.
    ShownTwice(Output),
    /// Something was shown that was made beyond the current recovery state (Johnson, lemma 2.3).
    ShownEarly(Output),
    /// A process came back with a history in which something shown was not made.
    ShownUndone(Output),
    /// The recovery state went back.
    WentBack {
        /// Whose part of it.
        unit: usize,
        /// From where.
        from: Sii,
        /// To where.
        to: Sii,
    },
    /// Not everybody got live again with everything delivered and shown.
    Stuck(String),
    /// A protocol's own invariant.
    Broken(String),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Orphan { unit, sii, from } => {
                write!(f, "orphan: unit {unit} began interval {sii} with a message that unit {from} has not sent")
            }
            Self::ShownTwice(output) => {
                write!(f, "shown twice: {output}")
            }
            Self::ShownEarly(output) => write!(f, "shown early: {output} is not recoverable"),
            Self::ShownUndone(output) => write!(f, "shown but undone: {output}"),
            Self::WentBack { unit, from, to } => {
                write!(f, "recovery state of unit {unit} went back from {from} to {to}")
            }
            Self::Stuck(why) => write!(f, "stuck: {why}"),
            Self::Broken(what) => f.write_str(what),
        }
    }
}

/// What has been seen of a run.
#[derive(Clone, Debug)]
pub(super) struct Checks {
    /// Up to where each process's history has been checked while it is live; `None` when it is not.
    checked: Vec<Option<Sii>>,
    /// What the world outside has been shown by each process.
    shown: Vec<Vec<Output>>,
    recovery_state: Vec<Sii>,
}

/// What later checks depend on, but for what is a function of the nodes.
impl Hash for Checks {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.shown.hash(hasher);
    }
}

impl Checks {
    pub(super) fn new(units: usize) -> Self {
        Self { checked: vec![Some(0); units], shown: vec![Vec::new(); units], recovery_state: vec![0; units] }
    }

    /// How many outputs of a process the world has taken.
    pub(super) fn shown(&self, unit: usize) -> u64 {
        self.shown.get(unit).map_or(0, |shown| shown.len() as u64)
    }

    /// The world outside takes an output. `recoverable` is the current recovery state, where some node
    /// keeps one.
    pub(super) fn show(
        &mut self,
        output: &Output,
        by: Option<&Process>,
        recoverable: Option<&[Sii]>,
    ) -> Result<(), Violation> {
        if output.number != self.shown(output.unit) {
            return Err(Violation::ShownTwice(output.clone()));
        }
        if recoverable.is_some_and(|state| output.made_in > state[output.unit]) {
            return Err(Violation::ShownEarly(output.clone()));
        }
        if by.is_some_and(|process| process.digest_in(output.made_in) != Some(output.data)) {
            return Err(Violation::ShownUndone(output.clone()));
        }
        self.shown[output.unit].push(output.clone());
        Ok(())
    }

    /// After a step of `node`.
    pub(super) fn stepped<M: Machine, B: Borrow<M>>(
        &mut self,
        node: usize,
        machines: &[B],
        up: &[bool],
    ) -> Result<(), Violation> {
        if let Some(state) = machines[node].borrow().recovery_state() {
            went_back(&self.recovery_state, &state)?;
            self.recovery_state = state;
        }
        let Some(process) = live::<M, _>(node, machines, up) else {
            if let Some(checked) = self.checked.get_mut(node) {
                *checked = None;
            }
            return Ok(());
        };
        match self.checked[node] {
            Some(sii) if sii == process.sii() => Ok(()),
            Some(sii) if sii < process.sii() => {
                self.checked[node] = Some(process.sii());
                self.check_received::<M, _>(node, sii, machines, up)
            }
            Some(_) => Err(Violation::Broken(format!("unit {node} lost history without having failed"))),
            None => {
                self.checked[node] = Some(process.sii());
                self.became_live::<M, _>(node, machines, up)
            }
        }
    }

    /// A process is back: against all that is live, both ways, and against what was shown.
    fn became_live<M: Machine, B: Borrow<M>>(&self, node: usize, machines: &[B], up: &[bool]) -> Result<(), Violation> {
        let process = machines[node].borrow().process().expect("it is live");
        self.undone(process)?;
        for other in (0..self.checked.len()).filter(|&other| other != node) {
            if let Some(peer) = live::<M, _>(other, machines, up) {
                both_ways(process, peer)?;
            }
        }
        Ok(())
    }

    /// What was shown of a live process is in its history.
    pub(super) fn undone(&self, process: &Process) -> Result<(), Violation> {
        let undone = |output: &&Output| process.digest_in(output.made_in) != Some(output.data);
        match self.shown[process.id].iter().find(undone) {
            Some(output) => Err(Violation::ShownUndone(output.clone())),
            None => Ok(()),
        }
    }

    /// What a live process received after `sii` was sent by its sender, as far as that is live.
    fn check_received<M: Machine, B: Borrow<M>>(
        &self,
        node: usize,
        sii: Sii,
        machines: &[B],
        up: &[bool],
    ) -> Result<(), Violation> {
        let process = machines[node].borrow().process().expect("it is live");
        for from in (0..self.checked.len()).filter(|&from| from != node) {
            if let Some(sender) = live::<M, _>(from, machines, up) {
                let received = process.history.iter().zip(1..).skip(sii as usize);
                check(node, received.filter(|(interval, _)| interval.from == from), sender)?;
            }
        }
        Ok(())
    }

    /// A process says that no consistent state can be recovered: then another depends on an interval
    /// beyond the one that it got to (Johnson, definition 2.4), or did and has failed since it said so.
    pub(super) fn gave_up<M: Machine, B: Borrow<M>>(
        &self,
        node: usize,
        machines: &[B],
        up: &[bool],
    ) -> Result<(), Violation> {
        let reached = machines[node].borrow().process().map(Process::sii);
        let depends = |unit| live::<M, _>(unit, machines, up).is_none_or(|other| other.depends_on.get(node) > reached);
        if (0..self.checked.len()).any(|unit| unit != node && depends(unit)) {
            return Ok(());
        }
        Err(Violation::Broken(format!("node {node} gave up, and nobody depends on what it can't recover")))
    }

    /// A node failed.
    pub(super) fn crashed(&mut self, node: usize) {
        if let Some(checked) = self.checked.get_mut(node) {
            *checked = None;
        }
    }

    /// Why the run is not at its end; `None` when everybody is live, everything sent was received and
    /// everything made was shown.
    pub(super) fn missing<M: Machine, B: Borrow<M>>(&self, machines: &[B], up: &[bool]) -> Option<String> {
        let units = self.checked.len();
        for unit in 0..units {
            if !live::<M, _>(unit, machines, up).is_some_and(Process::has_started) {
                return Some(format!("unit {unit} is not live"));
            }
        }
        let process = |unit: usize| machines[unit].borrow().process().expect("it is live");
        for from in 0..units {
            if process(from).outputs != self.shown(from) {
                return Some(format!(
                    "{} of {} outputs of unit {from} were shown",
                    self.shown(from),
                    process(from).outputs
                ));
            }
            for to in 0..units {
                let (sent, received) = (process(from).sent[to], process(to).received[from]);
                if sent != received {
                    return Some(format!("unit {to} received {received} of {sent} messages from unit {from}"));
                }
            }
        }
        None
    }
}

fn live<'a, M: Machine + 'a, B: Borrow<M>>(node: usize, machines: &'a [B], up: &[bool]) -> Option<&'a Process> {
    let machine = machines[node].borrow();
    machine.process().filter(|_| up[node] && machine.phase() == Phase::Live)
}

/// A recovery state is followed by another.
pub(super) fn went_back(before: &[Sii], now: &[Sii]) -> Result<(), Violation> {
    match before.iter().zip(now).enumerate().find(|(_, (from, to))| to < from) {
        Some((unit, (&from, &to))) => Err(Violation::WentBack { unit, from, to }),
        None => Ok(()),
    }
}

/// What two live processes received of each other was sent.
pub(super) fn both_ways(one: &Process, other: &Process) -> Result<(), Violation> {
    for (receiver, sender) in [(one, other), (other, one)] {
        check(
            receiver.id,
            receiver.history.iter().zip(1..).filter(|(interval, _)| interval.from == sender.id),
            sender,
        )?;
    }
    Ok(())
}

fn check<'a>(
    unit: usize,
    received: impl Iterator<Item = (&'a Interval, Sii)>,
    sender: &Process,
) -> Result<(), Violation> {
    for (interval, sii) in received {
        if sender.digest_in(interval.sent_in) != Some(interval.sender) {
            return Err(Violation::Orphan { unit, sii, from: interval.from });
        }
    }
    Ok(())
}
