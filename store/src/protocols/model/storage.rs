//! What has been saved of an execution, and what can be rebuilt from it.

use std::collections::BTreeSet;

use super::{DependencyMatrix, Execution, Sii};

/// Checkpoints and logged messages of every process (Johnson, §2.1.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StableStorage {
    checkpoints: Vec<BTreeSet<Sii>>,
    logged: Vec<BTreeSet<Sii>>,
}

impl StableStorage {
    /// What is stored when the processes are created: their initial states.
    pub fn new(units: usize) -> Self {
        Self { checkpoints: vec![BTreeSet::from([0]); units], logged: vec![BTreeSet::new(); units] }
    }

    /// The message that began interval `sii` of process `i` is stored with that index.
    pub fn log(&mut self, i: usize, sii: Sii) {
        self.logged[i].insert(sii);
    }

    /// Process `i` is checkpointed in interval `sii`. Nothing has to be coordinated with logging.
    pub fn checkpoint(&mut self, i: usize, sii: Sii) {
        self.checkpoints[i].insert(sii);
    }

    /// The predicate *logged* (Johnson, §2.1.5).
    pub fn logged(&self, i: usize, sii: Sii) -> bool {
        self.logged[i].contains(&sii)
    }

    /// The stored checkpoint to rebuild interval `sii` from (Johnson, definition 2.5). `None` if it
    /// was removed, and then the interval can't be rebuilt.
    pub fn effective_checkpoint(&self, i: usize, sii: Sii) -> Option<Sii> {
        self.checkpoints[i].range(..=sii).next_back().copied()
    }

    /// Interval `sii` can be rebuilt: everything after its effective checkpoint is logged (Johnson,
    /// definition 2.6).
    pub fn stable(&self, i: usize, sii: Sii) -> bool {
        self.effective_checkpoint(i, sii).is_some_and(|epsilon| (epsilon + 1..=sii).all(|a| self.logged(i, a)))
    }

    /// The stable intervals of process `i`, ascending.
    pub fn stable_intervals(&self, execution: &Execution, i: usize) -> Vec<Sii> {
        (0..=execution.newest(i)).filter(|&sii| self.stable(i, sii)).collect()
    }

    /// Consistent, and every interval in it stable (Johnson, definition 2.7). Recoverable states form a
    /// sublattice (theorem 2.3), so one of them is above all others.
    pub fn recoverable(&self, state: &DependencyMatrix) -> bool {
        state.is_consistent() && state.diagonal().iter().enumerate().all(|(i, &sii)| self.stable(i, sii))
    }

    /// Removes what no recovery will ever need, given the current recovery state: checkpoints below
    /// the effective one (Johnson, lemma 2.4) and messages up to it (lemma 2.5). Returns how many
    /// checkpoints and messages went.
    pub fn collect_garbage(&mut self, recovery_state: &[Sii]) -> (usize, usize) {
        let mut removed = (0, 0);
        for (i, &rho) in recovery_state.iter().enumerate() {
            let epsilon = self.effective_checkpoint(i, rho).expect("a recovery state is stable");
            let (checkpoints, logged) = (self.checkpoints[i].len(), self.logged[i].len());
            self.checkpoints[i].retain(|&sii| sii >= epsilon);
            self.logged[i].retain(|&sii| sii > epsilon);
            removed.0 += checkpoints - self.checkpoints[i].len();
            removed.1 += logged - self.logged[i].len();
        }
        removed
    }
}

/// The current recovery state by looking at every system state: the join of all recoverable ones
/// (Johnson, theorem 2.4 and definition 2.8). It never goes back as more becomes stable (lemma 2.1), so output
/// of an interval in it may leave (lemma 2.3); and when all is logged, it is where the processes are: there
/// is no domino effect (lemma 2.2). Exponential; the oracle for the algorithms.
pub fn recovery_state_exhaustive(execution: &Execution, storage: &StableStorage) -> Vec<Sii> {
    let stable: Vec<Vec<Sii>> = (0..execution.units()).map(|i| storage.stable_intervals(execution, i)).collect();
    let mut best: Option<Vec<Sii>> = None;
    let mut at = vec![0; stable.len()];
    loop {
        let siis: Vec<Sii> = at.iter().zip(&stable).map(|(&a, of)| of[a]).collect();
        let vectors = || siis.iter().enumerate().map(|(i, &sii)| execution.vector(i, sii));
        if vectors().all(|vector| vector.iter().all(|(j, sii)| sii <= siis[j])) {
            best = Some(match best {
                None => siis,
                Some(best) => best.iter().zip(&siis).map(|(&a, &b)| a.max(b)).collect(),
            });
        }
        let Some(i) = (0..at.len()).find(|&i| at[i] + 1 < stable[i].len()) else {
            return best.expect("some state is always recoverable");
        };
        at[..i].fill(0);
        at[i] += 1;
    }
}
