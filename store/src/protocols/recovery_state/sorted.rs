//! A queue of things by state interval, in ascending order, most of which come at its end.

use std::collections::VecDeque;

use crate::protocols::model::Sii;

/// Things by interval, without duplicates.
#[derive(Clone, Debug, Hash)]
pub(super) struct Sorted<T>(VecDeque<(Sii, T)>);

impl<T> Default for Sorted<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T> Sorted<T> {
    /// Adds what belongs to an interval that has nothing yet.
    pub(super) fn insert(&mut self, sii: Sii, thing: T) {
        match self.0.back() {
            Some((last, _)) if *last > sii => self.0.insert(self.position(sii), (sii, thing)),
            _ => self.0.push_back((sii, thing)),
        }
    }

    /// Index of the first thing at or after an interval.
    pub(super) fn position(&self, sii: Sii) -> usize {
        self.0.partition_point(|(at, _)| *at < sii)
    }

    pub(super) fn at(&self, index: usize) -> Option<&(Sii, T)> {
        self.0.get(index)
    }

    pub(super) fn contains(&self, sii: Sii) -> bool {
        self.at(self.position(sii)).is_some_and(|(at, _)| *at == sii)
    }

    pub(super) fn first(&self) -> Option<&(Sii, T)> {
        self.0.front()
    }

    pub(super) fn last(&self) -> Option<Sii> {
        self.0.back().map(|(sii, _)| *sii)
    }

    pub(super) fn remove(&mut self, sii: Sii) -> Option<T> {
        let index = self.position(sii);
        let (at, _) = self.0.get(index)?;
        if *at == sii { self.0.remove(index).map(|(_, thing)| thing) } else { None }
    }

    /// Drops everything up to an interval, and memory that is not needed for the rest.
    pub(super) fn drop_up_to(&mut self, sii: Sii) {
        while self.0.front().is_some_and(|(at, _)| *at <= sii) {
            self.0.pop_front();
        }
        if self.0.capacity() > 16 && self.0.len() < self.0.capacity() / 4 {
            self.0.shrink_to(self.0.len() * 2);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(Sii, T)> {
        self.0.iter()
    }

    /// Bytes of memory that the queue takes.
    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<(Sii, T)>()
    }
}
