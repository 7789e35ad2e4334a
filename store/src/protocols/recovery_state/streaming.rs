//! The incremental algorithm for a store: told what is logged, forgets what is recoverable.
//!
//! Differences from figures 4.2 and 4.3, none of which changes the answer:
//!
//! - An interval stands for what its process *added* to its dependencies there, not for the whole
//!   vector: one entry for a logged message. Its `DEFER` entries are those, and one in the set of
//!   the pending interval right below it, on which it depends like on any other. The transitive
//!   closure that lemma 4.4 walks is the same.
//! - A search that fails leaves behind why: the [`Obstacle`], an interval `(i, β)` such that no
//!   stable interval of `i` is at or above `β`. Until `i` has one, whatever depends on the searched
//!   interval fails as well (lemma 4.5) and is not searched. A dependency that was transferred
//!   (definition 4.1) to a later interval may be transferred to an earlier one when that becomes
//!   stable: an obstacle met beyond such a transfer holds only until an interval becomes stable
//!   below another stable one.
//! - `NEWCRS` is changed in place and put back by a trail when a search fails, instead of being copied.
//! - When a process moves from `a` to `b`, all `DEFER` sets above `a` and up to `b` are taken and
//!   dropped. Each entry is therefore looked at once.
//!
//! Memory is proportional to what is not yet recoverable: pending intervals, their `DEFER` entries,
//! and messages logged above a gap.

use std::collections::BTreeMap;

use crate::protocols::model::Sii;

/// A process and one of its intervals.
type At = (usize, Sii);

/// Why a search failed.
#[derive(Clone, Copy, Debug, Hash)]
struct Obstacle {
    /// No interval of this process is stable at or above this one.
    missing: At,
    /// It was met beyond a transfer to a later interval, and this was [`RecoveryState::filled`].
    unless_filled: Option<u64>,
}

/// A stable interval beyond the recovery state.
#[derive(Clone, Debug, Hash)]
struct Pending {
    /// What it depends on: of a checkpoint, everything (that is not recoverable already); of a
    /// logged message, what the message added.
    adds: Vec<At>,
    /// It says everything itself, and the intervals below it need not be looked at.
    whole: bool,
    /// Why the last search for it failed.
    obstacle: Option<Obstacle>,
}

/// One process as the recovery state sees it.
#[derive(Clone, Debug, Default, Hash)]
struct Unit {
    /// Its interval in the current recovery state.
    recovered: Sii,
    /// Stable intervals beyond that.
    pending: BTreeMap<Sii, Pending>,
    /// Messages logged beyond an interval that is not stable.
    beyond_gap: BTreeMap<Sii, At>,
    /// `DEFER`: for an interval of this process, who waits for it.
    defer: BTreeMap<Sii, Vec<At>>,
}

impl Unit {
    fn is_stable(&self, sii: Sii) -> bool {
        sii == self.recovered || self.pending.contains_key(&sii)
    }

    /// The newest stable interval.
    fn newest(&self) -> Sii {
        self.pending.last_key_value().map_or(self.recovered, |(&sii, _)| sii)
    }
}

/// The current recovery state, kept up to date with what becomes stable (Johnson, §4.4).
#[derive(Clone, Debug, Hash)]
pub struct RecoveryState {
    units: Vec<Unit>,
    /// Intervals of units changed by the search under way, with what they were.
    trail: Vec<At>,
    /// How often an interval became stable below one that already was.
    filled: u64,
    /// Dependencies that the search under way still has to satisfy.
    wanted: Vec<At>,
}

impl RecoveryState {
    /// At the creation of the processes, whose initial states are stored.
    pub fn new(units: usize) -> Self {
        Self { units: vec![Unit::default(); units], trail: Vec::new(), filled: 0, wanted: Vec::new() }
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

    /// How many intervals and `DEFER` entries are kept, as a measure of memory.
    pub fn kept(&self) -> usize {
        let of =
            |unit: &Unit| unit.pending.len() + unit.beyond_gap.len() + unit.defer.values().map(Vec::len).sum::<usize>();
        self.units.iter().map(of).sum()
    }

    /// The message that began interval `sii` of process `i` is logged; it was sent by process
    /// `from` in interval `sent_in`. Messages may be logged in any order. Returns whether the
    /// recovery state advanced.
    pub fn message_logged(&mut self, i: usize, sii: Sii, from: usize, sent_in: Sii) -> bool {
        if sii <= self.units[i].recovered || self.units[i].pending.contains_key(&sii) {
            return false;
        }
        if !self.units[i].is_stable(sii - 1) {
            self.units[i].beyond_gap.insert(sii, (from, sent_in));
            return false;
        }
        let adds = if from == i { Vec::new() } else { vec![(from, sent_in)] };
        self.became_stable(i, sii, adds, false) | self.after_gap(i, sii)
    }

    /// Process `i` is checkpointed in interval `sii` with these dependencies on others. Returns
    /// whether the recovery state advanced.
    pub fn checkpointed(&mut self, i: usize, sii: Sii, depends_on: impl IntoIterator<Item = At>) -> bool {
        if sii <= self.units[i].recovered || self.units[i].pending.contains_key(&sii) {
            return false;
        }
        let unsettled = |&(j, beta): &At| j != i && beta > self.units[j].recovered;
        let adds = depends_on.into_iter().filter(unsettled).collect();
        self.units[i].beyond_gap.remove(&sii);
        self.became_stable(i, sii, adds, true) | self.after_gap(i, sii)
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
        while let Some((from, sent_in)) = self.units[i].beyond_gap.remove(&(sii + 1)) {
            sii += 1;
            advanced |= self.message_logged(i, sii, from, sent_in);
        }
        let recovered = self.units[i].recovered;
        if self.units[i].beyond_gap.first_key_value().is_some_and(|(&sii, _)| sii <= recovered) {
            self.units[i].beyond_gap = self.units[i].beyond_gap.split_off(&(recovered + 1));
        }
        advanced
    }

    /// Figure 4.3.
    fn became_stable(&mut self, k: usize, sigma: Sii, adds: Vec<At>, whole: bool) -> bool {
        if self.units[k].newest() > sigma {
            self.filled += 1;
        }
        self.units[k].pending.insert(sigma, Pending { adds, whole, obstacle: None });
        let before: Option<Sii> = self.units[k].pending.range(..sigma).next_back().map(|(&sii, _)| sii);
        if let Err(obstacle) = self.find_rec((k, sigma)) {
            let pending = self.units[k].pending.get_mut(&sigma).expect("just inserted");
            pending.obstacle = Some(obstacle);
            let (adds, whole) = (pending.adds.clone(), pending.whole);
            for (i, beta) in adds {
                if beta > self.units[i].recovered {
                    self.units[i].defer.entry(beta).or_default().push((k, sigma));
                }
            }
            if let (Some(before), false) = (before, whole) {
                self.units[k].defer.entry(before).or_default().push((k, sigma));
            }
            return false;
        }
        let mut work = Vec::new();
        self.settle(&mut work);
        while let Some((x, theta)) = work.pop() {
            if theta <= self.units[x].recovered {
                continue;
            }
            match self.find_rec((x, theta)) {
                Ok(()) => self.settle(&mut work),
                Err(obstacle) => {
                    // It stays in the sets of those of its dependencies that are beyond.
                    if let Some(pending) = self.units[x].pending.get_mut(&theta) {
                        pending.obstacle = Some(obstacle);
                    }
                }
            }
        }
        true
    }

    /// The search succeeded: forgets what is now recoverable and takes what waited for it.
    fn settle(&mut self, work: &mut Vec<At>) {
        for (i, _) in std::mem::take(&mut self.trail) {
            let unit = &mut self.units[i];
            while unit.pending.first_key_value().is_some_and(|(&sii, _)| sii <= unit.recovered) {
                unit.pending.pop_first();
            }
            while unit.defer.first_key_value().is_some_and(|(&beta, _)| beta <= unit.recovered) {
                work.extend(unit.defer.pop_first().expect("there is one").1);
            }
        }
    }

    /// Figure 4.2 (lemma 4.1). On success the units' intervals are those found and `trail` names the
    /// units moved; on failure they are as before, and the error is what the search ran into.
    fn find_rec(&mut self, (k, sigma): At) -> Result<(), Obstacle> {
        self.trail.clear();
        self.wanted.clear();
        self.wanted.push((k, sigma));
        let found = self.satisfy_wanted();
        if found.is_err() {
            for (i, sii) in self.trail.drain(..).rev() {
                self.units[i].recovered = sii;
            }
        }
        found
    }

    fn stands(&self, obstacle: &Obstacle) -> bool {
        let (i, beta) = obstacle.missing;
        obstacle.unless_filled.is_none_or(|filled| filled == self.filled) && beta > self.units[i].newest()
    }

    fn satisfy_wanted(&mut self) -> Result<(), Obstacle> {
        let mut unless_filled = None;
        while let Some((i, beta)) = self.wanted.pop() {
            let reached = self.units[i].recovered;
            if beta <= reached {
                continue;
            }
            let Some((&alpha, _)) = self.units[i].pending.range(beta..).next() else {
                return Err(Obstacle { missing: (i, beta), unless_filled });
            };
            if alpha != beta {
                unless_filled = Some(self.filled);
            }
            for (_, pending) in self.units[i].pending.range(reached + 1..=alpha).rev() {
                if let Some(obstacle) = pending.obstacle.filter(|obstacle| self.stands(obstacle)) {
                    return Err(Obstacle { unless_filled: unless_filled.or(obstacle.unless_filled), ..obstacle });
                }
                self.wanted.extend(pending.adds.iter().filter(|&&(j, gamma)| gamma > self.units[j].recovered));
                if pending.whole {
                    break;
                }
            }
            self.trail.push((i, reached));
            self.units[i].recovered = alpha;
        }
        Ok(())
    }
}
