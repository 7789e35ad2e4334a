//! The incremental algorithm for a store: told what is logged, forgets what is recoverable.
//!
//! Figure 4.3 searches from every interval that becomes stable, and again from all that waits in `DEFER`
//! sets. With many units nearly all of these searches fail. Here most are not needed:
//!
//! - Dependency vectors only grow, so if a process can advance at all it can advance to its **first**
//!   stable interval beyond the recovery state. Only that one is looked at.
//! - An interval stands for what its process *added* to its dependencies there: one entry for a logged
//!   message. When all that the first interval added is below the recovery state, the process
//!   advances to it. Until then it waits in **one** `DEFER` set, for one interval of one process.
//! - So "waits for" leads from each process to at most one other. If the recovery state can advance
//!   though every process waits, those that can advance wait for each other in a **cycle**: what each
//!   of them waits for is below what all of them advance to. (Such a cycle needs a checkpoint that
//!   stands for unlogged intervals below it, else intervals would depend on themselves.) And if
//!   somebody in the cycle waits for an interval at or above which its process has none that is
//!   stable, nobody in it can advance (lemma 4.5).
//! - A search (figure 4.2) is therefore made only from a cycle in which all that is waited for is
//!   there. If it fails it has met an interval that is not there, and the process waits for that
//!   one instead: lemma 4.5 again. This holds until an interval becomes stable that a dependency on the
//!   way there, transferred to a later one before (definition 4.1), is transferred to instead.
//!
//! Memory is proportional to what is not yet recoverable: stable intervals beyond the recovery state
//! and messages logged above a gap.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};

use super::sorted::Sorted;
use crate::protocols::model::Sii;

/// A process and one of its intervals.
type At = (usize, Sii);

/// What an interval depends on beyond the one right below it.
#[derive(Clone, Debug, Hash)]
enum Adds {
    /// Of a logged message: the interval that it was sent in.
    Message(At),
    /// Of a checkpoint: its dependency vector, without what was recoverable already. The intervals below
    /// it need not be looked at, nor be there.
    Everything(Box<[At]>),
}

impl Adds {
    fn as_slice(&self) -> &[At] {
        match self {
            Self::Message(at) => std::slice::from_ref(at),
            Self::Everything(all) => all,
        }
    }
}

/// One process as the recovery state sees it.
#[derive(Clone, Debug, Default)]
struct Unit {
    /// Its interval in the current recovery state.
    recovered: Sii,
    /// Stable intervals beyond that.
    pending: Sorted<Adds>,
    /// Messages logged beyond an interval that is not stable.
    beyond_gap: Sorted<At>,
    /// What keeps the first pending interval from being recoverable.
    waits_for: Option<At>,
    /// So many of what the first pending interval added are recoverable.
    satisfied: usize,
    /// `DEFER`: which processes wait for which interval of this one.
    defer: BTreeSet<(Sii, usize)>,
    /// Which processes wait for something because a dependency on an interval of this one was
    /// transferred to a later one.
    leaning: BTreeSet<usize>,
    /// The last walk that came here.
    walked: u64,
}

impl Unit {
    fn is_stable(&self, sii: Sii) -> bool {
        sii == self.recovered || self.pending.contains(sii)
    }

    /// The newest stable interval.
    fn newest(&self) -> Sii {
        self.pending.last().unwrap_or(self.recovered)
    }
}

/// A process that a search has moved.
#[derive(Clone, Copy, Debug)]
struct Moved {
    unit: usize,
    /// The interval that it was in.
    from: Sii,
    /// Whose dependency moved it, as an index into the trail.
    because_of: usize,
    /// That dependency was transferred to a later interval.
    transferred: bool,
}

/// The current recovery state, kept up to date with what becomes stable (Johnson, §4.4).
#[derive(Clone, Debug)]
pub struct RecoveryState {
    units: Vec<Unit>,
    /// Processes whose first pending interval is to be looked at.
    work: Vec<usize>,
    /// Processes that may have become part of a cycle.
    suspects: Vec<usize>,
    walks: u64,
    /// Processes that the search under way has moved.
    trail: Vec<Moved>,
    /// Dependencies that it still has to satisfy, and whose they are (an index into the trail).
    wanted: Vec<(At, usize)>,
}

/// Only what the state is, not how it is kept.
impl Hash for RecoveryState {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        for unit in &self.units {
            (unit.recovered, &unit.pending, &unit.beyond_gap).hash(hasher);
        }
    }
}

impl RecoveryState {
    /// At the creation of the processes, whose initial states are stored.
    pub fn new(units: usize) -> Self {
        Self {
            units: vec![Unit::default(); units],
            work: Vec::new(),
            suspects: Vec::new(),
            walks: 0,
            trail: Vec::new(),
            wanted: Vec::new(),
        }
    }

    /// Interval of process `i` in the current recovery state. It never decreases (lemma 2.1), and
    /// output from intervals up to it may leave (lemma 2.3).
    pub fn of(&self, i: usize) -> Sii {
        self.units[i].recovered
    }

    /// The current recovery state (definition 2.8).
    pub fn current(&self) -> Vec<Sii> {
        self.units.iter().map(|unit| unit.recovered).collect()
    }

    /// How many intervals are kept.
    pub fn kept(&self) -> usize {
        self.units.iter().map(|unit| unit.pending.len() + unit.beyond_gap.len()).sum()
    }

    /// How many bytes of memory are taken: by intervals, and by the processes' own entries.
    pub fn bytes(&self) -> usize {
        let vectors = |unit: &Unit| {
            let of = unit.pending.iter().map(|(_, adds)| match adds {
                Adds::Message(_) => 0,
                Adds::Everything(all) => size_of_val::<[At]>(all),
            });
            of.sum::<usize>()
        };
        let sets = |unit: &Unit| unit.defer.len() * size_of::<(Sii, usize)>() + unit.leaning.len() * size_of::<usize>();
        let of = |unit: &Unit| {
            size_of::<Unit>() + unit.pending.bytes() + unit.beyond_gap.bytes() + vectors(unit) + sets(unit)
        };
        self.units.iter().map(of).sum()
    }

    /// The message that began interval `sii` of process `i` is logged; it was sent by process
    /// `from` in interval `sent_in`. Messages may be logged in any order. Returns whether the
    /// recovery state advanced.
    pub fn message_logged(&mut self, i: usize, sii: Sii, from: usize, sent_in: Sii) -> bool {
        let unit = &mut self.units[i];
        if sii <= unit.recovered || unit.pending.contains(sii) || unit.beyond_gap.contains(sii) {
            return false;
        }
        if !unit.is_stable(sii - 1) {
            unit.beyond_gap.insert(sii, (from, sent_in));
            return false;
        }
        self.became_stable(i, sii, Adds::Message((from, sent_in))) | self.after_gap(i, sii)
    }

    /// Process `i` is checkpointed in interval `sii` with these dependencies on others. Returns
    /// whether the recovery state advanced.
    pub fn checkpointed(&mut self, i: usize, sii: Sii, depends_on: impl IntoIterator<Item = At>) -> bool {
        let unit = &mut self.units[i];
        if sii <= unit.recovered || unit.pending.contains(sii) {
            return false;
        }
        unit.beyond_gap.remove(sii);
        let unsettled = |&(j, beta): &At| j != i && beta > self.units[j].recovered;
        let adds = depends_on.into_iter().filter(unsettled).collect();
        self.became_stable(i, sii, Adds::Everything(adds)) | self.after_gap(i, sii)
    }

    /// Everything beyond the current recovery state is gone: the system has been rolled back to it,
    /// and intervals beyond it will be begun anew.
    pub fn roll_back(&mut self) {
        for unit in &mut self.units {
            *unit = Unit { recovered: unit.recovered, ..Unit::default() };
        }
    }

    /// Messages logged above `sii` may have become stable with it.
    fn after_gap(&mut self, i: usize, mut sii: Sii) -> bool {
        let mut advanced = false;
        while let Some(sent) = self.units[i].beyond_gap.remove(sii + 1) {
            sii += 1;
            let known = sii <= self.units[i].recovered || self.units[i].pending.contains(sii);
            advanced |= !known && self.became_stable(i, sii, Adds::Message(sent));
        }
        let recovered = self.units[i].recovered;
        self.units[i].beyond_gap.drop_up_to(recovered);
        advanced
    }

    fn became_stable(&mut self, k: usize, sigma: Sii, adds: Adds) -> bool {
        let unit = &mut self.units[k];
        let before = unit.newest();
        let is_first = unit.pending.first().is_none_or(|(first, _)| sigma < *first);
        unit.pending.insert(sigma, adds);
        if is_first {
            self.look_again(k);
        }
        if sigma < before {
            for other in std::mem::take(&mut self.units[k].leaning) {
                self.look_again(other);
            }
        } else if self.units[k].defer.range((before + 1, 0)..(sigma + 1, 0)).next().is_some() {
            // What others wait for is there now.
            self.suspects.push(k);
        }
        let mut advanced = self.advance();
        while let Some(k) = self.find_cycle() {
            if self.find_rec(k) {
                advanced = true;
                self.settle();
                self.advance();
            }
        }
        advanced
    }

    /// Lets processes advance to what has become recoverable, until all wait.
    fn advance(&mut self) -> bool {
        let mut advanced = false;
        while let Some(i) = self.work.pop() {
            while let Some((sii, adds)) = self.units[i].pending.first().filter(|_| self.units[i].waits_for.is_none()) {
                let unsatisfied = |&(j, beta): &At| beta > self.units[j].recovered;
                let rest = &adds.as_slice()[self.units[i].satisfied..];
                match rest.iter().position(unsatisfied) {
                    None => {
                        self.units[i].recovered = *sii;
                        self.passed(i);
                        advanced = true;
                    }
                    Some(ahead) => {
                        let at = rest[ahead];
                        self.units[i].satisfied += ahead;
                        self.wait(i, at);
                    }
                }
            }
        }
        advanced
    }

    fn wait(&mut self, i: usize, at: At) {
        self.units[i].waits_for = Some(at);
        self.units[at.0].defer.insert((at.1, i));
        self.suspects.push(i);
    }

    /// What a process waits for may have changed.
    fn look_again(&mut self, i: usize) {
        if let Some((j, beta)) = self.units[i].waits_for.take() {
            self.units[j].defer.remove(&(beta, i));
        }
        self.units[i].satisfied = 0;
        self.work.push(i);
    }

    /// A process has advanced: what is recoverable is forgotten, and what waited for it is looked at.
    fn passed(&mut self, i: usize) {
        let unit = &mut self.units[i];
        unit.pending.drop_up_to(unit.recovered);
        unit.satisfied = 0;
        if unit.pending.len() == 0 {
            unit.leaning.clear();
        }
        while let Some(&(beta, other)) =
            self.units[i].defer.first().filter(|(beta, _)| *beta <= self.units[i].recovered)
        {
            self.units[i].defer.remove(&(beta, other));
            self.units[other].waits_for = None;
            self.work.push(other);
        }
    }

    /// After a search that succeeded.
    fn settle(&mut self) {
        for Moved { unit, .. } in std::mem::take(&mut self.trail) {
            self.passed(unit);
            self.look_again(unit);
        }
    }

    /// A process in a cycle of processes that wait for each other, where all that is waited for is there.
    fn find_cycle(&mut self) -> Option<usize> {
        let first_walk = self.walks + 1;
        while let Some(start) = self.suspects.pop() {
            self.walks += 1;
            let mut at = start;
            loop {
                let walked = std::mem::replace(&mut self.units[at].walked, self.walks);
                if walked == self.walks {
                    self.suspects.push(start);
                    return Some(at);
                }
                match self.units[at].waits_for {
                    Some((j, beta)) if walked < first_walk && beta <= self.units[j].newest() => at = j,
                    _ => break,
                }
            }
        }
        None
    }

    /// Figure 4.2 (lemma 4.1) for the first pending interval of a process. On success `trail` names the
    /// processes moved. On failure they are where they were, and the process waits for what the search ran
    /// into.
    fn find_rec(&mut self, k: usize) -> bool {
        self.trail.clear();
        self.wanted.clear();
        let Some(&(sigma, _)) = self.units[k].pending.first() else { return false };
        self.wanted.push(((k, sigma), usize::MAX));
        let Err((missing, mut step)) = self.satisfy_wanted() else { return true };
        for moved in self.trail.iter().rev() {
            self.units[moved.unit].recovered = moved.from;
        }
        self.look_again(k);
        self.work.pop();
        self.wait(k, missing);
        while let Some(moved) = self.trail.get(step) {
            if moved.transferred {
                self.units[moved.unit].leaning.insert(k);
            }
            step = moved.because_of;
        }
        false
    }

    /// The error is what is missing, and whose dependency it is.
    fn satisfy_wanted(&mut self) -> Result<(), (At, usize)> {
        while let Some(((i, beta), because_of)) = self.wanted.pop() {
            let reached = self.units[i].recovered;
            if beta <= reached {
                continue;
            }
            let pending = &self.units[i].pending;
            let position = pending.position(beta);
            let Some(&(alpha, _)) = pending.at(position) else { return Err(((i, beta), because_of)) };
            let step = self.trail.len();
            self.trail.push(Moved { unit: i, from: reached, because_of, transferred: alpha != beta });
            for index in (0..=position).rev() {
                let (sii, adds) = pending.at(index).expect("it is not after one that is there");
                if *sii <= reached {
                    break;
                }
                for &(j, gamma) in adds.as_slice() {
                    if gamma > self.units[j].newest() {
                        return Err(((j, gamma), step));
                    }
                    if gamma > self.units[j].recovered {
                        self.wanted.push(((j, gamma), step));
                    }
                }
                if matches!(adds, Adds::Everything(_)) {
                    break;
                }
            }
            self.units[i].recovered = alpha;
        }
        Ok(())
    }
}
