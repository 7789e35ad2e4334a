//! The algorithms as the thesis prints them, but for one repair (see `Incremental::defer`).

use std::collections::{BTreeMap, BTreeSet};

use crate::protocols::model::{Execution, Sii, StableStorage};

/// The batch recovery state algorithm (Johnson, §4.3, figure 4.1; theorem 4.1).
pub fn batch(execution: &Execution, storage: &StableStorage) -> Vec<Sii> {
    let n = execution.units();
    let newest_stable = |i: usize, below: Sii| (0..below).rev().find(|&sii| storage.stable(i, sii));
    let siis: Vec<Sii> = (0..n)
        .map(|i| newest_stable(i, execution.newest(i) + 1).expect("the initial state or a checkpoint above is stable"))
        .collect();
    let mut dm = execution.state(&siis);
    while let Some((i, j)) = dm.inconsistency() {
        let mut alpha = dm.sii(j);
        loop {
            alpha = newest_stable(j, alpha).expect("some recoverable state exists (theorem 4.1)");
            if execution.vector(j, alpha).get(i) <= dm.row(i).get(i) {
                break;
            }
        }
        dm.replace(j, execution.vector(j, alpha).clone());
    }
    dm.diagonal()
}

/// A process and one of its intervals.
type At = (usize, Sii);

/// The incremental recovery state algorithm (Johnson, §4.4, figures 4.2 and 4.3; theorem 4.2).
///
/// To be called once for each interval that becomes stable. Everything below the recovery state
/// must still be known to `execution` and `storage`.
#[derive(Clone, Debug)]
pub struct Incremental {
    crs: Vec<Sii>,
    /// `DEFER`: who waits for an interval of a process. The thesis never empties a set, and then two
    /// checkpoints that wait for each other keep the loop going for ever; what was taken is removed.
    defer: BTreeMap<At, BTreeSet<At>>,
}

impl Incremental {
    /// At the creation of the processes.
    pub fn new(units: usize) -> Self {
        Self { crs: vec![0; units], defer: BTreeMap::new() }
    }

    /// `CRS`, the current recovery state.
    pub fn current(&self) -> &[Sii] {
        &self.crs
    }

    /// `DEFER_i^β`.
    pub fn deferred(&self, i: usize, beta: Sii) -> BTreeSet<At> {
        self.defer.get(&(i, beta)).cloned().unwrap_or_default()
    }

    /// Figure 4.3, when interval `sigma` of process `k` has become stable and `stable` tells which
    /// intervals are.
    ///
    /// If the first search fails, nothing has changed (lemma 4.3); else the new interval is in the recovery state
    /// (lemma 4.2), and only what depends on it can advance with it (lemma 4.4), unless that depends on something
    /// that can't be reached (lemma 4.5).
    pub fn became_stable(&mut self, execution: &Execution, stable: impl Fn(usize, Sii) -> bool, (k, sigma): At) {
        if sigma <= self.crs[k] {
            return;
        }
        let mut newcrs = self.crs.clone();
        if !find_rec(execution, &stable, &mut newcrs, (k, sigma)) {
            for (i, beta) in execution.vector(k, sigma).iter().filter(|&(i, _)| i != k) {
                if beta > self.crs[i] {
                    self.defer.entry((i, beta)).or_default().insert((k, sigma));
                }
            }
            return;
        }
        let mut work = BTreeSet::new();
        self.add_deferred(&mut work, &stable, (k, sigma));
        while let Some((x, theta)) = work.pop_first() {
            if theta > newcrs[x] {
                let mut rv = newcrs.clone();
                if find_rec(execution, &stable, &mut rv, (x, theta)) {
                    newcrs = rv;
                }
            }
            if theta <= newcrs[x] {
                self.add_deferred(&mut work, &stable, (x, theta));
            }
        }
        self.crs = newcrs;
    }

    /// Adds what waits for `sigma` or for the unstable intervals right below it. What has been
    /// taken is removed: it is settled, and `WORK` must not go round.
    fn add_deferred(&mut self, work: &mut BTreeSet<At>, stable: &impl Fn(usize, Sii) -> bool, (k, sigma): At) {
        let mut beta = sigma;
        loop {
            work.extend(self.defer.remove(&(k, beta)).unwrap_or_default());
            if beta == 0 || stable(k, beta - 1) {
                return;
            }
            beta -= 1;
        }
    }
}

/// `FIND_REC` (Johnson, figure 4.2; lemma 4.1): a recoverable state above `rv` in which process `k`
/// is at least in `sigma`. The least one; in `rv` if there is one.
pub(super) fn find_rec(
    execution: &Execution,
    stable: &impl Fn(usize, Sii) -> bool,
    rv: &mut [Sii],
    (k, sigma): At,
) -> bool {
    rv[k] = sigma;
    let mut max: Vec<Sii> = rv.to_vec();
    let raise = |max: &mut Vec<Sii>, at: At| {
        execution.vector(at.0, at.1).iter().for_each(|(j, sii)| max[j] = max[j].max(sii));
    };
    raise(&mut max, (k, sigma));
    while let Some(i) = (0..rv.len()).find(|&i| max[i] > rv[i]) {
        let Some(alpha) = (max[i]..=execution.newest(i)).find(|&alpha| stable(i, alpha)) else {
            return false;
        };
        rv[i] = alpha;
        raise(&mut max, (i, alpha));
    }
    true
}
