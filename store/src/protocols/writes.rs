//! What a node is writing to its stable storage.

use std::collections::VecDeque;

use super::machine::Action;

/// Records under way, in order, by the name of their write. Dropped, they are lost.
#[derive(Clone, Debug, Hash)]
pub(super) struct Writes<R> {
    under_way: VecDeque<(u64, R)>,
    next: u64,
}

impl<R> Writes<R> {
    pub(super) fn new() -> Self {
        Self { under_way: VecDeque::new(), next: 0 }
    }

    /// Begins to write a record; its name is returned.
    pub(super) fn begin<P>(&mut self, record: R, bytes: u64, actions: &mut Vec<Action<P>>) -> u64 {
        // A name is free again when nothing is under way, so that equal states have equal names.
        let token = if self.under_way.is_empty() { 0 } else { self.next };
        self.next = token + 1;
        self.under_way.push_back((token, record));
        actions.push(Action::Write { token, bytes });
        token
    }

    /// A record under way.
    pub(super) fn get(&self, token: u64) -> Option<&R> {
        self.under_way.iter().find(|(of, _)| *of == token).map(|(_, record)| record)
    }

    /// Its write is done.
    pub(super) fn done(&mut self, token: u64) -> Option<R> {
        let at = self.under_way.iter().position(|(of, _)| *of == token)?;
        self.under_way.remove(at).map(|(_, record)| record)
    }

    /// All records under way.
    pub(super) fn iter(&self) -> impl Iterator<Item = &R> {
        self.under_way.iter().map(|(_, record)| record)
    }

    /// The same, to be changed.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut R> {
        self.under_way.iter_mut().map(|(_, record)| record)
    }

    /// Those that were begun before this one.
    pub(super) fn before(&self, token: u64) -> impl Iterator<Item = &R> {
        self.under_way.iter().take_while(move |(of, _)| *of < token).map(|(_, record)| record)
    }

    /// They are lost.
    pub(super) fn clear(&mut self) {
        self.under_way.clear();
    }
}
