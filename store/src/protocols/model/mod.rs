//! The model of recovery that every protocol is judged by (Johnson, ch. 2).
//!
//! A process receives messages; the receipt of each begins a **state interval**, numbered by the
//! **state interval index** ([`Sii`]). A process *depends* on the interval of another from which it
//! received a message. What one process depends on is its [`DependencyVector`]; one vector for each
//! process is a system state, a [`DependencyMatrix`].
//!
//! [`Execution`] is one run of a system, [`StableStorage`] what has been saved of it. From both
//! follow *stable*, *recoverable*, the *current recovery state* and what may be thrown away.
//!
//! Processes are numbered from 0 here and from 1 in the papers.

mod storage;
#[cfg(test)]
mod tests;

use std::fmt;

pub use storage::{StableStorage, recovery_state_exhaustive};

/// State interval index: how many messages a process has received (Johnson, §2.1.1).
pub type Sii = u64;

/// The dependencies of one process state (Johnson, §2.1.1).
///
/// Component `j` is the newest interval of process `j` that a received message came from; `None`
/// is the thesis's ⊥ and orders below every index. Only direct dependencies are recorded.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DependencyVector(Vec<Option<Sii>>);

impl DependencyVector {
    /// The vector of process `owner` as it is created: in interval 0, dependent on nobody.
    pub fn created(owner: usize, units: usize) -> Self {
        let mut vector = vec![None; units];
        vector[owner] = Some(0);
        Self(vector)
    }

    /// Component `j`.
    pub fn get(&self, j: usize) -> Option<Sii> {
        self.0[j]
    }

    /// How many processes there are.
    pub fn units(&self) -> usize {
        self.0.len()
    }

    /// `owner` receives a message that `from` sent in interval `sent_in`: the next interval begins
    /// and the dependency is the maximum of the old and the new (Johnson, §2.1.1 and §4.2.2).
    pub fn receive(&mut self, owner: usize, from: usize, sent_in: Sii) -> Sii {
        let next = self.0[owner].expect("a process is always in some interval") + 1;
        self.0[from] = self.0[from].max(Some(sent_in));
        self.0[owner] = Some(next);
        next
    }

    /// Components that are not ⊥, as (process, interval).
    pub fn iter(&self) -> impl Iterator<Item = (usize, Sii)> + '_ {
        self.0.iter().enumerate().filter_map(|(j, sii)| sii.map(|sii| (j, sii)))
    }
}

impl fmt::Debug for DependencyVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |sii: &Option<Sii>| sii.map_or("⊥".to_owned(), |sii| sii.to_string());
        write!(f, "⟨{}⟩", self.0.iter().map(show).collect::<Vec<_>>().join(", "))
    }
}

impl From<Vec<Option<Sii>>> for DependencyVector {
    fn from(components: Vec<Option<Sii>>) -> Self {
        Self(components)
    }
}

/// A system state: one process state from each process, not necessarily of one moment (Johnson,
/// §2.1.2).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DependencyMatrix(Vec<DependencyVector>);

impl DependencyMatrix {
    /// The state made of these rows; row `i` is a vector of process `i`.
    pub fn new(rows: Vec<DependencyVector>) -> Self {
        assert!(rows.iter().enumerate().all(|(i, row)| row.units() == rows.len() && row.get(i).is_some()));
        Self(rows)
    }

    /// The diagonal: which interval each process is in.
    pub fn sii(&self, i: usize) -> Sii {
        self.0[i].get(i).expect("the diagonal is never ⊥")
    }

    /// All of the diagonal.
    pub fn diagonal(&self) -> Vec<Sii> {
        (0..self.0.len()).map(|i| self.sii(i)).collect()
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &DependencyVector {
        &self.0[i]
    }

    /// Puts another state of process `i` in its row.
    pub fn replace(&mut self, i: usize, row: DependencyVector) {
        self.0[i] = row;
    }

    /// The system history relation `self ⪯ other` (Johnson, definition 2.1). For two states of one
    /// execution; it is a partial order.
    pub fn precedes(&self, other: &Self) -> bool {
        (0..self.0.len()).all(|i| self.sii(i) <= other.sii(i))
    }

    /// Each process has received only what it received in both (Johnson, definition 2.2). The
    /// greatest lower bound (theorem 2.1).
    pub fn meet(&self, other: &Self) -> Self {
        self.row_by_row(other, |mine, others| mine <= others)
    }

    /// Each process has received what it received in either (Johnson, definition 2.3). The least
    /// upper bound (theorem 2.1).
    pub fn join(&self, other: &Self) -> Self {
        self.row_by_row(other, |mine, others| mine >= others)
    }

    fn row_by_row(&self, other: &Self, mine_wins: impl Fn(Sii, Sii) -> bool) -> Self {
        let pick = |i: usize| if mine_wins(self.sii(i), other.sii(i)) { self.row(i) } else { other.row(i) };
        Self((0..self.0.len()).map(|i| pick(i).clone()).collect())
    }

    /// Some process depends on what another has not done yet: `(i, j)` such that process `j`
    /// depends on an interval of process `i` beyond the one that `i` is in.
    pub fn inconsistency(&self) -> Option<(usize, usize)> {
        let n = self.0.len();
        (0..n).flat_map(|i| (0..n).map(move |j| (i, j))).find(|&(i, j)| self.0[j].get(i) > self.0[i].get(i))
    }

    /// No process depends on what another has not done yet (Johnson, definition 2.4). Consistent states form a
    /// sublattice (theorem 2.2).
    pub fn is_consistent(&self) -> bool {
        self.inconsistency().is_none()
    }
}

impl fmt::Debug for DependencyMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}

/// One run of a system: the dependency vector of every interval of every process.
///
/// A process's vector is a function of its interval (Johnson, §2.1.1), so this is the whole run as
/// far as recovery is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Execution {
    vectors: Vec<Vec<DependencyVector>>,
}

impl Execution {
    /// A system in its initial state.
    pub fn new(units: usize) -> Self {
        Self { vectors: (0..units).map(|i| vec![DependencyVector::created(i, units)]).collect() }
    }

    /// How many processes there are.
    pub fn units(&self) -> usize {
        self.vectors.len()
    }

    /// The newest interval of process `i`.
    pub fn newest(&self, i: usize) -> Sii {
        self.vectors[i].len() as Sii - 1
    }

    /// Process `to` receives a message that `from` sent in its interval `sent_in`. Returns the
    /// interval that it begins.
    pub fn receive(&mut self, to: usize, from: usize, sent_in: Sii) -> Sii {
        assert!(to != from && sent_in <= self.newest(from), "a message comes from an interval that was reached");
        let mut vector = self.vectors[to].last().expect("interval 0 is always there").clone();
        let sii = vector.receive(to, from, sent_in);
        self.vectors[to].push(vector);
        sii
    }

    /// The dependency vector of process `i` in interval `sii`.
    pub fn vector(&self, i: usize, sii: Sii) -> &DependencyVector {
        &self.vectors[i][usize::try_from(sii).expect("an index of memory")]
    }

    /// The system state in which each process is in the interval named.
    pub fn state(&self, siis: &[Sii]) -> DependencyMatrix {
        DependencyMatrix::new(siis.iter().enumerate().map(|(i, &sii)| self.vector(i, sii).clone()).collect())
    }
}
