//! Batch = incremental as printed = streaming = exhaustive search.

use super::*;
use crate::protocols::model::{Execution, Sii, StableStorage, recovery_state_exhaustive};
use crate::protocols::rng::Rng;

/// A system with everything that computes its recovery state, checked after each change.
struct Bench {
    execution: Execution,
    storage: StableStorage,
    /// Which intervals figure 4.3 has been told about; it is told one by one.
    told: Vec<Vec<bool>>,
    printed: Incremental,
    streaming: RecoveryState,
    /// Compare with exhaustive search too.
    exhaustive: bool,
}

impl Bench {
    fn new(units: usize, exhaustive: bool) -> Self {
        Self {
            execution: Execution::new(units),
            storage: StableStorage::new(units),
            told: vec![vec![true]; units],
            printed: Incremental::new(units),
            streaming: RecoveryState::new(units),
            exhaustive,
        }
    }

    fn receive(&mut self, to: usize, from: usize, sent_in: Sii) {
        self.execution.receive(to, from, sent_in);
        self.told[to].push(false);
    }

    fn log(&mut self, i: usize, sii: Sii, from: usize, sent_in: Sii) {
        self.storage.log(i, sii);
        self.streaming.message_logged(i, sii, from, sent_in);
        self.compare();
    }

    fn checkpoint(&mut self, i: usize, sii: Sii) {
        self.storage.checkpoint(i, sii);
        let vector = self.execution.vector(i, sii).clone();
        self.streaming.checkpointed(i, sii, vector.iter());
        self.compare();
    }

    fn compare(&mut self) {
        for i in 0..self.told.len() {
            for sii in 0..self.told[i].len() {
                if !self.told[i][sii] && self.storage.stable(i, sii as Sii) {
                    self.told[i][sii] = true;
                    let told = &self.told;
                    self.printed.became_stable(&self.execution, |i, sii| told[i][sii as usize], (i, sii as Sii));
                }
            }
        }
        let batch = batch(&self.execution, &self.storage);
        assert_eq!(self.printed.current(), batch, "figure 4.3 against figure 4.1: {self:?}");
        assert_eq!(self.streaming.current(), batch, "streaming against figure 4.1: {self:?}");
        if self.exhaustive {
            assert_eq!(batch, recovery_state_exhaustive(&self.execution, &self.storage), "figure 4.1: {self:?}");
        }
    }
}

impl std::fmt::Debug for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}\n{:?}\n{:?}", self.execution, self.storage, self.streaming)
    }
}

fn random_history(seed: u64, units: usize, happenings: usize, exhaustive: bool) -> Bench {
    let mut rng = Rng::new(seed);
    let mut bench = Bench::new(units, exhaustive);
    let mut messages: Vec<(usize, Sii, usize, Sii)> = Vec::new();
    // From logging nearly nothing to logging nearly everything.
    let (logging, checkpointing) = (rng.below(10), 1 + rng.below(3));
    for _ in 0..happenings {
        match rng.below(12) {
            what if what < logging && !messages.is_empty() => {
                let (i, sii, from, sent_in) = messages.swap_remove(rng.index(messages.len()));
                bench.log(i, sii, from, sent_in);
            }
            what if what >= 12 - checkpointing => {
                let i = rng.index(units);
                // Also of an earlier interval: checkpoints are written in the background.
                let newest = bench.execution.newest(i);
                bench.checkpoint(i, newest - rng.below(3).min(newest));
            }
            _ => {
                let to = rng.index(units);
                let from = (to + 1 + rng.index(units - 1)) % units;
                let newest = bench.execution.newest(from);
                let sent_in = newest - rng.below(3).min(newest);
                bench.receive(to, from, sent_in);
                messages.push((to, bench.execution.newest(to), from, sent_in));
            }
        }
    }
    bench
}

/// The claim of §4.3 and §4.4 on 10⁵ histories, each after everything that happens, against exhaustive
/// search too.
#[test]
fn all_algorithms_agree_on_a_hundred_thousand_random_histories() {
    for seed in 0..100_000 {
        let units = 2 + (seed % 4) as usize;
        let happenings = 6 + (seed % 13) as usize;
        random_history(seed, units, happenings, true);
    }
}

/// Fewer but longer ones, in which chains and gaps get deep.
#[test]
fn all_algorithms_agree_on_long_histories() {
    for seed in 0..10_000 {
        random_history(seed, 2 + (seed % 4) as usize, 19 + (seed % 10) as usize, false);
    }
    for seed in 0..200 {
        random_history(seed, 2 + (seed % 7) as usize, 200, false);
    }
}

/// Every history of two processes with up to three messages, with everything that can be logged or
/// checkpointed in every order.
#[test]
fn all_algorithms_agree_on_all_small_histories() {
    let mut checked = 0;
    let messages = |execution: &Execution| -> Vec<(usize, usize, Sii)> {
        let from = |to: usize| (0..=execution.newest(1 - to)).map(move |sent_in| (to, 1 - to, sent_in));
        from(0).chain(from(1)).collect()
    };
    let mut histories = vec![Vec::new()];
    for _ in 0..3 {
        histories = histories
            .into_iter()
            .flat_map(|history: Vec<(usize, usize, Sii)>| {
                let mut execution = Execution::new(2);
                for &(to, from, sent_in) in &history {
                    execution.receive(to, from, sent_in);
                }
                messages(&execution).into_iter().map(move |next| [history.clone(), vec![next]].concat())
            })
            .collect();
    }
    for history in &histories {
        // Each interval is logged, checkpointed, both or neither, in every order of up to four steps.
        let mut things = Vec::new();
        let mut execution = Execution::new(2);
        for &(to, from, sent_in) in history {
            let sii = execution.receive(to, from, sent_in);
            things.push((to, sii, Some((from, sent_in))));
            things.push((to, sii, None));
        }
        let mut orders: Vec<Vec<usize>> = vec![Vec::new()];
        for _ in 0..4 {
            orders = orders
                .iter()
                .flat_map(|order| {
                    (0..things.len()).filter(|t| !order.contains(t)).map(|t| [order.clone(), vec![t]].concat())
                })
                .collect();
        }
        for order in orders {
            let mut bench = Bench::new(2, true);
            history.iter().for_each(|&(to, from, sent_in)| bench.receive(to, from, sent_in));
            for thing in order {
                match things[thing] {
                    (i, sii, Some((from, sent_in))) => bench.log(i, sii, from, sent_in),
                    (i, sii, None) => bench.checkpoint(i, sii),
                }
            }
            checked += 1;
        }
    }
    assert!(checked > 5_000, "{checked}");
}

/// Johnson, figure 4.4 and §4.4.3, step by step, `DEFER` sets included.
#[test]
fn figure_4_4_an_example_system_execution() {
    let mut execution = Execution::new(3);
    execution.receive(1, 0, 0); // begins interval 1 of process 2
    execution.receive(0, 1, 1); // message a
    execution.receive(2, 1, 1); // message b
    execution.receive(1, 2, 1); // begins interval 2 of process 2
    assert_eq!(format!("{:?}", execution.vector(0, 1)), "⟨1, 1, ⊥⟩");
    assert_eq!(format!("{:?}", execution.vector(1, 2)), "⟨0, 2, 1⟩");
    assert_eq!(format!("{:?}", execution.vector(2, 1)), "⟨⊥, 1, 1⟩");

    let mut storage = StableStorage::new(3);
    let (mut printed, mut streaming) = (Incremental::new(3), RecoveryState::new(3));
    let only = |i, sii| std::collections::BTreeSet::from([(i, sii)]);

    storage.log(0, 1);
    printed.became_stable(&execution, |i, sii| storage.stable(i, sii), (0, 1));
    assert!(!streaming.message_logged(0, 1, 1, 1));
    assert_eq!((printed.current(), printed.deferred(1, 1)), (&[0, 0, 0][..], only(0, 1)));

    storage.checkpoint(1, 2);
    printed.became_stable(&execution, |i, sii| storage.stable(i, sii), (1, 2));
    assert!(!streaming.checkpointed(1, 2, [(0, 0), (2, 1)]));
    assert_eq!((printed.current(), printed.deferred(2, 1)), (&[0, 0, 0][..], only(1, 2)));

    storage.log(2, 1);
    printed.became_stable(&execution, |i, sii| storage.stable(i, sii), (2, 1));
    assert!(streaming.message_logged(2, 1, 1, 1));
    assert_eq!(printed.current(), [1, 2, 1]);
    assert_eq!(streaming.current(), [1, 2, 1], "though two of the four messages were never logged");
    assert_eq!(streaming.kept(), 0, "everything is recoverable, nothing is kept");
    assert_eq!(batch(&execution, &storage), [1, 2, 1]);
}

/// The memory goal: what is kept follows what is not yet recoverable, not the length of the run.
#[test]
fn memory_follows_what_is_not_recoverable() {
    let mut state = RecoveryState::new(3);
    for round in 1..=1_000 {
        // 1 depends on 0, 2 on 1; logged with the newest dependency last.
        state.message_logged(2, round, 1, round);
        state.message_logged(1, round, 0, round);
        assert!(state.kept() <= 4);
        state.message_logged(0, round, 2, round - 1);
        assert_eq!((state.current(), state.kept()), (vec![round; 3], 0));
    }
}

/// After a rollback, intervals are begun anew with other dependencies.
#[test]
fn a_rollback_forgets_what_was_beyond() {
    let mut state = RecoveryState::new(2);
    assert!(!state.message_logged(0, 1, 1, 5));
    state.roll_back();
    assert_eq!(state.kept(), 0);
    assert!(state.message_logged(0, 1, 1, 0));
    assert_eq!(state.current(), [1, 0]);
}

/// Figure 4.3 as printed never removes anything from a `DEFER` set. Two checkpoints that wait for each
/// other (through the unlogged intervals below them) and for a third interval then put each other
/// back into `WORK` for ever. [`Incremental`] takes what it has looked at out of the set.
#[test]
fn figure_4_3_would_go_round_if_defer_sets_were_not_emptied() {
    let mut execution = Execution::new(3);
    execution.receive(2, 0, 0); // interval 1 of process 2, for which both will wait
    execution.receive(0, 2, 1);
    execution.receive(1, 2, 1);
    execution.receive(0, 1, 1);
    execution.receive(1, 0, 1);
    let mut storage = StableStorage::new(3);
    let mut printed = Incremental::new(3);
    for i in [0, 1] {
        storage.checkpoint(i, 2);
        printed.became_stable(&execution, |i, sii| storage.stable(i, sii), (i, 2));
    }
    assert!(printed.deferred(0, 1).contains(&(1, 2)), "DEFER of 0:1, which checkpoint 0:2 stands for");
    assert!(printed.deferred(1, 1).contains(&(0, 2)), "DEFER of 1:1, which checkpoint 1:2 stands for");
    storage.log(2, 1);
    printed.became_stable(&execution, |i, sii| storage.stable(i, sii), (2, 1));
    assert_eq!(printed.current(), [2, 2, 1]);
    assert!(printed.deferred(0, 1).is_empty() && printed.deferred(1, 1).is_empty());
}

/// The load that costs are measured with ends recovered but for what lags.
#[test]
fn the_measured_load_advances() {
    let mut state = RecoveryState::new(100);
    let mut most = 0;
    for what in stored_by(100, 100_000, 1) {
        match what {
            Stored::Message { unit, sii, from, sent_in } => state.message_logged(unit, sii, from, sent_in),
            Stored::Checkpoint { unit, sii, depends_on } => state.checkpointed(unit, sii, depends_on),
        };
        most = most.max(state.kept());
    }
    let recovered: Sii = state.current().iter().sum();
    assert!(recovered > 90_000, "{recovered}");
    assert!(most < 10_000, "{most}");
}
