//! Johnson's definition 4.1 and lemmas 4.1 to 4.5, each by its statement, over random executions of
//! which one interval after the other becomes stable.

use std::collections::BTreeSet;

use super::printed::find_rec;
use crate::protocols::model::{Execution, Sii};
use crate::protocols::rng::Rng;

/// A process and one of its intervals.
type At = (usize, Sii);

/// A run, and which of its intervals are stable.
struct History {
    execution: Execution,
    stable: Vec<BTreeSet<Sii>>,
}

impl History {
    fn random(rng: &mut Rng) -> Self {
        let units = 2 + rng.index(3);
        let mut execution = Execution::new(units);
        for _ in 0..3 + rng.index(9) {
            let to = rng.index(units);
            let from = (to + 1 + rng.index(units - 1)) % units;
            execution.receive(to, from, rng.below(execution.newest(from) + 1));
        }
        Self { execution, stable: vec![BTreeSet::from([0]); units] }
    }

    fn stable(&self) -> impl Fn(usize, Sii) -> bool + '_ {
        |i, sii| self.stable[i].contains(&sii)
    }

    /// Every recoverable system state (definition 2.7), by looking at all.
    fn recoverable(&self) -> Vec<Vec<Sii>> {
        let mut states = vec![Vec::new()];
        for of in &self.stable {
            states = states.iter().flat_map(|s: &Vec<Sii>| of.iter().map(move |&i| [&s[..], &[i]].concat())).collect();
        }
        states.retain(|state| self.execution.state(state).is_consistent());
        states
    }

    /// The current recovery state: the join of all recoverable states.
    fn current(&self) -> Vec<Sii> {
        let join = |a: Vec<Sii>, b: Vec<Sii>| a.iter().zip(&b).map(|(&a, &b)| a.max(b)).collect();
        self.recoverable().into_iter().reduce(join).expect("the initial state is recoverable")
    }

    /// Whether some recoverable state has process `x` at least in interval `theta`.
    fn reaches(&self, (x, theta): At) -> bool {
        self.recoverable().iter().any(|state| state[x] >= theta)
    }

    /// Definition 4.1: what interval `sigma` of process `k` has transferred dependencies on.
    fn transferred(&self, (k, sigma): At) -> impl Iterator<Item = At> + '_ {
        let least = |(i, delta): At| Some((i, *self.stable[i].range(delta..).next()?));
        self.execution.vector(k, sigma).iter().filter_map(least)
    }

    /// The transitive closure of that relation.
    fn closure(&self, at: At) -> BTreeSet<At> {
        let (mut reached, mut work) = (BTreeSet::new(), vec![at]);
        while let Some(at) = work.pop() {
            work.extend(self.transferred(at).filter(|&next| reached.insert(next)));
        }
        reached
    }

    /// Stable intervals beyond this state.
    fn beyond<'a>(&'a self, state: &'a [Sii]) -> impl Iterator<Item = At> + 'a {
        self.stable.iter().zip(state).enumerate().flat_map(|(i, (of, &rho))| of.range(rho + 1..).map(move |&s| (i, s)))
    }
}

/// Lets all intervals of many runs become stable, in random order, and hands each step to a check: the
/// history after it, the current recovery state before it, and what became stable.
fn at_each_step(check: impl Fn(&History, &[Sii], At)) {
    for seed in 0..1_500 {
        let mut rng = Rng::new(seed);
        let mut history = History::random(&mut rng);
        let of = |i: usize| (1..=history.execution.newest(i)).map(move |sii| (i, sii));
        let mut coming: Vec<At> = (0..history.execution.units()).flat_map(of).collect();
        let mut before = history.current();
        while !coming.is_empty() {
            let (k, sigma) = coming.swap_remove(rng.index(coming.len()));
            history.stable[k].insert(sigma);
            check(&history, &before, (k, sigma));
            before = history.current();
        }
    }
}

/// Lemma 4.1, from every recoverable state to every stable interval beyond it; and what it finds is the
/// least state that there is.
#[test]
fn lemma_4_1_find_rec_finds_a_state_if_there_is_one() {
    at_each_step(|history, _, _| {
        let recoverable = history.recoverable();
        for from in recoverable.iter().step_by(3) {
            for (k, sigma) in history.beyond(from) {
                let above = |state: &&Vec<Sii>| state[k] >= sigma && state.iter().zip(from).all(|(s, f)| s >= f);
                let mut rv = from.clone();
                let found = find_rec(&history.execution, &history.stable(), &mut rv, (k, sigma));
                assert_eq!(found, recoverable.iter().any(|state| above(&state)), "{from:?} to {k}:{sigma}");
                if found {
                    assert!(recoverable.contains(&rv));
                    assert!(recoverable.iter().filter(above).all(|state| state.iter().zip(&rv).all(|(s, r)| s >= r)));
                }
            }
        }
    });
}

#[test]
fn lemma_4_2_if_the_recovery_state_changes_the_new_interval_is_in_it() {
    at_each_step(|history, before, (k, sigma)| {
        let now = history.current();
        assert!(now == before || now[k] == sigma, "{before:?} {now:?} {k}:{sigma}");
    });
}

#[test]
fn lemma_4_3_if_the_first_search_fails_the_recovery_state_has_not_changed() {
    at_each_step(|history, before, (k, sigma)| {
        if sigma > before[k] && !find_rec(&history.execution, &history.stable(), &mut before.to_vec(), (k, sigma)) {
            assert_eq!(history.current(), before);
        }
    });
}

#[test]
fn lemma_4_4_only_what_depends_on_the_new_interval_can_advance() {
    at_each_step(|history, before, new| {
        for at in history.beyond(before) {
            assert!(history.closure(at).contains(&new) || !history.reaches(at), "{before:?} {new:?} {at:?}");
        }
    });
}

#[test]
fn lemma_4_5_what_depends_on_the_unreachable_is_unreachable() {
    at_each_step(|history, before, _| {
        for at in history.beyond(before) {
            let blocked = history.closure(at).into_iter().any(|on| !history.reaches(on));
            assert!(!blocked || !history.reaches(at), "{at:?}");
        }
    });
}
