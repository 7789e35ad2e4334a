//! Definitions, lemmas and theorems of Johnson's chapter 2 over random executions, and its figures.

use proptest::prelude::*;

use super::*;

/// What happens to a system, as numbers to be reduced to what is possible.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Receive { to: usize, from: usize, sent_in: u64 },
    Log { i: usize, sii: u64 },
    Checkpoint { i: usize },
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0..64usize, 0..64usize, 0..64u64).prop_map(|(to, from, sent_in)| Happening::Receive { to, from, sent_in }),
        3 => (0..64usize, 0..64u64).prop_map(|(i, sii)| Happening::Log { i, sii }),
        1 => (0..64usize).prop_map(|i| Happening::Checkpoint { i }),
    ]
}

fn happen(execution: &mut Execution, storage: &mut StableStorage, what: Happening) {
    let n = execution.units();
    match what {
        Happening::Receive { to, from, sent_in } => {
            let (to, from) = (to % n, (to % n + 1 + from % (n - 1)) % n);
            // Mostly recent messages, so that dependencies are deep.
            let sent_in = execution.newest(from) - (sent_in % 3).min(execution.newest(from));
            execution.receive(to, from, sent_in);
        }
        Happening::Log { i, sii } => {
            if execution.newest(i % n) > 0 {
                storage.log(i % n, 1 + sii % execution.newest(i % n));
            }
        }
        Happening::Checkpoint { i } => storage.checkpoint(i % n, execution.newest(i % n)),
    }
}

fn run(units: usize, happenings: &[Happening]) -> (Execution, StableStorage) {
    let (mut execution, mut storage) = (Execution::new(units), StableStorage::new(units));
    for &what in happenings {
        happen(&mut execution, &mut storage, what);
    }
    (execution, storage)
}

fn history() -> impl Strategy<Value = (Execution, StableStorage)> {
    (2..5usize, prop::collection::vec(happening(), 0..30)).prop_map(|(units, what)| run(units, &what))
}

/// A system state of the execution: each process in some interval that it reached.
fn some_state(execution: &Execution, picks: &[u64]) -> DependencyMatrix {
    let siis: Vec<Sii> = (0..execution.units()).map(|i| picks[i] % (execution.newest(i) + 1)).collect();
    execution.state(&siis)
}

/// The greatest consistent state that `picks` leads to, by going down from it.
fn some_consistent_state(execution: &Execution, picks: &[u64]) -> DependencyMatrix {
    let mut state = some_state(execution, picks);
    while let Some((_, j)) = state.inconsistency() {
        state.replace(j, execution.vector(j, state.sii(j) - 1).clone());
    }
    state
}

fn picks() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(0..64u64, 5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// §2.1.1: no component of a dependency vector decreases, and the own one is the interval.
    #[test]
    fn dependency_vectors_only_grow((execution, _) in history()) {
        for i in 0..execution.units() {
            for sii in 0..=execution.newest(i) {
                prop_assert_eq!(execution.vector(i, sii).get(i), Some(sii));
                if sii > 0 {
                    for j in 0..execution.units() {
                        prop_assert!(execution.vector(i, sii - 1).get(j) <= execution.vector(i, sii).get(j));
                    }
                }
            }
        }
    }

    /// Definition 2.1: reflexive, antisymmetric, transitive.
    #[test]
    fn the_system_history_relation_is_a_partial_order((execution, _) in history(), a in picks(), b in picks(), c in picks()) {
        let [a, b, c] = [a, b, c].map(|picks| some_state(&execution, &picks));
        prop_assert!(a.precedes(&a));
        prop_assert!(!(a.precedes(&b) && b.precedes(&a)) || a == b);
        prop_assert!(!(a.precedes(&b) && b.precedes(&c)) || a.precedes(&c));
    }

    /// Theorem 2.1 with definitions 2.2 and 2.3: meet and join are the bounds of a lattice.
    #[test]
    fn meet_and_join_are_the_bounds((execution, _) in history(), a in picks(), b in picks(), c in picks()) {
        let [a, b, c] = [a, b, c].map(|picks| some_state(&execution, &picks));
        let (meet, join) = (a.meet(&b), a.join(&b));
        prop_assert!(meet.precedes(&a) && meet.precedes(&b) && a.precedes(&join) && b.precedes(&join));
        prop_assert!(!(c.precedes(&a) && c.precedes(&b)) || c.precedes(&meet));
        prop_assert!(!(a.precedes(&c) && b.precedes(&c)) || join.precedes(&c));
        prop_assert_eq!((a.meet(&b), a.join(&b)), (b.meet(&a), b.join(&a)));
        prop_assert_eq!((a.meet(&join), a.join(&meet)), (a.clone(), a.clone()), "absorption");
        // They are states of the same execution.
        prop_assert_eq!(&execution.state(&meet.diagonal()), &meet);
        prop_assert_eq!(&execution.state(&join.diagonal()), &join);
    }

    /// Theorem 2.2: consistent states form a sublattice; and definition 2.4 by its meaning, that
    /// everything received in the state was sent in it.
    #[test]
    fn consistent_states_form_a_sublattice((execution, _) in history(), a in picks(), b in picks()) {
        let [a, b] = [a, b].map(|picks| some_consistent_state(&execution, &picks));
        prop_assert!(a.is_consistent() && b.is_consistent());
        prop_assert!(a.meet(&b).is_consistent() && a.join(&b).is_consistent());
    }

    /// Definition 2.4 against its meaning: walk every message received in the state.
    #[test]
    fn consistent_means_that_what_was_received_was_sent((execution, _) in history(), a in picks()) {
        let state = some_state(&execution, &a);
        let sent = (0..execution.units()).all(|i| {
            (1..=state.sii(i)).all(|sii| execution.vector(i, sii).iter().all(|(j, sent_in)| sent_in <= state.sii(j)))
        });
        prop_assert_eq!(state.is_consistent(), sent);
    }

    /// Theorem 2.3: recoverable states form a sublattice.
    #[test]
    fn recoverable_states_form_a_sublattice((execution, storage) in history(), a in picks(), b in picks()) {
        let rebuilt = |picks: &[u64]| {
            let of: Vec<Vec<Sii>> = (0..execution.units()).map(|i| storage.stable_intervals(&execution, i)).collect();
            let mut at: Vec<usize> = of.iter().enumerate().map(|(i, of)| picks[i] as usize % of.len()).collect();
            loop {
                let siis: Vec<Sii> = at.iter().zip(&of).map(|(&at, of)| of[at]).collect();
                let state = execution.state(&siis);
                match state.inconsistency() {
                    None => return state,
                    Some((_, j)) => at[j] -= 1,
                }
            }
        };
        let (a, b) = (rebuilt(&a), rebuilt(&b));
        prop_assert!(storage.recoverable(&a) && storage.recoverable(&b));
        prop_assert!(storage.recoverable(&a.meet(&b)) && storage.recoverable(&a.join(&b)));
    }

    /// Definitions 2.5 and 2.6: the newest checkpoint at or below; stable by replaying.
    #[test]
    fn stable_means_that_replay_reaches_it((execution, storage) in history()) {
        for i in 0..execution.units() {
            let mut reached = false;
            for sii in 0..=execution.newest(i) {
                let checkpointed = storage.effective_checkpoint(i, sii) == Some(sii);
                reached = checkpointed || reached && storage.logged(i, sii);
                prop_assert_eq!(storage.stable(i, sii), reached);
            }
        }
    }

    /// Theorem 2.4: the maximum recoverable state exists, is recoverable and above all others.
    #[test]
    fn there_is_one_maximum_recoverable_state((execution, storage) in history(), a in picks()) {
        let maximum = execution.state(&recovery_state_exhaustive(&execution, &storage));
        prop_assert!(storage.recoverable(&maximum));
        let other = some_state(&execution, &a);
        prop_assert!(!storage.recoverable(&other) || other.precedes(&maximum));
    }

    /// Lemma 2.1: the current recovery state never goes back; so lemma 2.3's released output is
    /// never undone. Lemmas 2.4 and 2.5: collecting garbage on the way changes no later recovery.
    #[test]
    fn the_recovery_state_only_advances_and_needs_no_garbage(
        units in 2..4usize,
        happenings in prop::collection::vec(happening(), 0..24),
        collect_at in prop::collection::vec(any::<bool>(), 24),
    ) {
        let (mut execution, mut storage) = (Execution::new(units), StableStorage::new(units));
        let mut collected = storage.clone();
        let mut before = vec![0; units];
        for (&what, &collect) in happenings.iter().zip(&collect_at) {
            happen(&mut execution.clone(), &mut storage, what);
            happen(&mut execution, &mut collected, what);
            let now = recovery_state_exhaustive(&execution, &storage);
            prop_assert!(before.iter().zip(&now).all(|(before, now)| before <= now), "{:?} then {:?}", before, now);
            if collect {
                collected.collect_garbage(&now);
            }
            prop_assert_eq!(&recovery_state_exhaustive(&execution, &collected), &now);
            before = now;
        }
    }

    /// Lemma 2.2: once everything is logged there is no domino effect; the recovery state is where
    /// the processes are.
    #[test]
    fn logging_everything_rules_the_domino_effect_out((execution, mut storage) in history()) {
        for i in 0..execution.units() {
            (1..=execution.newest(i)).for_each(|sii| storage.log(i, sii));
        }
        let newest: Vec<Sii> = (0..execution.units()).map(|i| execution.newest(i)).collect();
        prop_assert_eq!(recovery_state_exhaustive(&execution, &storage), newest);
    }
}

/// One more removed than lemma 2.4 allows does lose a recovery state.
#[test]
fn the_effective_checkpoint_itself_is_needed() {
    let mut execution = Execution::new(2);
    execution.receive(0, 1, 0);
    let mut storage = StableStorage::new(2);
    storage.checkpoint(0, 1);
    assert_eq!(storage.collect_garbage(&[1, 0]), (1, 0));
    assert!(storage.stable(0, 1));
    assert!(!storage.stable(0, 0), "what is below is gone");
}

fn matrix<const N: usize>(rows: [[i64; N]; N]) -> DependencyMatrix {
    let component = |value: i64| u64::try_from(value).ok();
    DependencyMatrix::new(rows.iter().map(|row| row.iter().map(|&v| component(v)).collect::<Vec<_>>().into()).collect())
}

/// ⊥ in [`matrix`].
const NO: i64 = -1;

/// Johnson, figure 2.1 and the matrices of §2.1.2 and §2.1.3.
#[test]
fn figure_2_1_the_system_history_partial_order() {
    let mut execution = Execution::new(4);
    execution.receive(0, 1, 0);
    execution.receive(2, 1, 0);
    execution.receive(2, 3, 0);
    execution.receive(0, 1, 0); // message a
    execution.receive(3, 2, 2); // message b
    let a = execution.state(&[2, 0, 2, 0]);
    let b = execution.state(&[1, 0, 2, 1]);
    assert_eq!(a, matrix([[2, 0, NO, NO], [NO, 0, NO, NO], [NO, 0, 2, 0], [NO, NO, NO, 0]]));
    assert_eq!(b, matrix([[1, 0, NO, NO], [NO, 0, NO, NO], [NO, 0, 2, 0], [NO, NO, 2, 1]]));
    assert!(!a.precedes(&b) && !b.precedes(&a), "neither must have been received first");
    assert_eq!(a.meet(&b), matrix([[1, 0, NO, NO], [NO, 0, NO, NO], [NO, 0, 2, 0], [NO, NO, NO, 0]]));
    assert_eq!(a.join(&b), matrix([[2, 0, NO, NO], [NO, 0, NO, NO], [NO, 0, 2, 0], [NO, NO, 2, 1]]));
    assert!(a.is_consistent() && b.is_consistent() && a.join(&b).is_consistent());
}

/// Johnson, figure 2.2: process 1 has received what process 2 sends only later.
#[test]
fn figure_2_2_an_inconsistent_system_state() {
    let state = matrix([[1, 4, NO], [0, 2, 0], [NO, 2, 1]]);
    assert!(!state.is_consistent());
    assert_eq!(state.inconsistency(), Some((1, 0)), "column 2, row 1 in the thesis");
    // With process 2 in interval 4 it would be consistent, whatever it received on the way.
    let mut later = state.clone();
    later.replace(1, vec![Some(0), Some(4), Some(1)].into());
    assert!(later.is_consistent());
}

/// Johnson, figure 2.3: checkpoints between which messages cross, nothing logged; both processes
/// fall back to their initial states. Logging stops it (lemma 2.2).
#[test]
fn figure_2_3_the_domino_effect() {
    let (mut execution, mut storage) = (Execution::new(2), StableStorage::new(2));
    let (mut at, mut sent_in) = (0, 0);
    for _ in 0..3 {
        let other = 1 - at;
        sent_in = execution.receive(other, at, sent_in);
        at = other;
        // Checkpointed after receiving and before the send that follows would be safe; the other
        // side is checkpointed with the unlogged message already in it.
        sent_in = execution.receive(1 - at, at, sent_in);
        storage.checkpoint(1 - at, sent_in);
        at = 1 - at;
    }
    // Process 0 has checkpoints; each depends on an interval of process 1 that is lost.
    assert_eq!(storage.stable_intervals(&execution, 0).len(), 4);
    assert_eq!(recovery_state_exhaustive(&execution, &storage), [0, 0]);
    for sii in 1..=execution.newest(1) {
        storage.log(1, sii);
    }
    let newest = [execution.newest(0), execution.newest(1)];
    assert_eq!(recovery_state_exhaustive(&execution, &storage), newest);
}

/// The same with checkpoints on both sides, as the figure is drawn.
#[test]
fn figure_2_3_with_checkpoints_on_both_sides() {
    let (mut execution, mut storage) = (Execution::new(2), StableStorage::new(2));
    let send = |execution: &mut Execution, from: usize| {
        let sent_in = execution.newest(from);
        execution.receive(1 - from, from, sent_in);
    };
    send(&mut execution, 1);
    for _ in 0..3 {
        // Each process is checkpointed when it has received what the other sent after its own last
        // checkpoint: every line between two checkpoints is crossed by a message.
        for i in [1, 0] {
            send(&mut execution, 1 - i);
            storage.checkpoint(i, execution.newest(i));
            send(&mut execution, 1 - i);
        }
    }
    assert!((0..2).all(|i| storage.stable_intervals(&execution, i).len() == 4));
    assert_eq!(recovery_state_exhaustive(&execution, &storage), [0, 0], "the checkpoints help nobody");
}
