//! The control state: what the store knows of its units, apart from where things are.
//!
//! In the embedded engine it is the result of the control records and of the SIIs of the batches, in the order of the
//! log; writing and recovery apply them by the same functions. In a cluster each unit's part of it is one stored value.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::UnitName;

/// A change of the control state, as it is in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Control {
    /// Only there to be committed.
    Nothing,
    Create {
        unit: u64,
        name: UnitName,
    },
    Lease {
        unit: u64,
        epoch: u64,
        holder: String,
        ttl_ms: u64,
    },
    Release {
        unit: u64,
    },
    Below {
        unit: u64,
        sii: u64,
    },
    From {
        unit: u64,
        sii: u64,
    },
    Publish {
        unit: u64,
        id: u64,
        table: Table,
    },
    Hide {
        unit: u64,
        below: u64,
    },
    Remove {
        unit: u64,
    },
}

/// A stored table: a checkpoint, or what is left of one that others are changes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Table {
    pub(crate) sii: u64,
    /// Number of the table that this one changes.
    pub(crate) parent: Option<u64>,
    /// Tables under this one.
    pub(crate) depth: u32,
    /// It is no checkpoint any more.
    pub(crate) hidden: bool,
    /// Pages that it names.
    pub(crate) pages: u64,
    /// Bytes stored for it.
    pub(crate) bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unit {
    pub(crate) name: String,
    pub(crate) epoch: u64,
    pub(crate) holder: Option<String>,
    pub(crate) ttl_ms: u64,
    /// The log is `first..next`.
    pub(crate) first: u64,
    pub(crate) next: u64,
    /// By number.
    pub(crate) tables: BTreeMap<u64, Table>,
}

/// What [`State::apply`] made needless.
#[derive(Debug, Default)]
pub(crate) struct Needless {
    /// Tables (unit, number).
    pub(crate) tables: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) units: BTreeMap<u64, Unit>,
    /// Numbers of units and tables are never used twice.
    pub(crate) next_id: u64,
}

impl State {
    /// Takes note of a batch that was appended.
    pub(crate) fn batch(&mut self, unit: u64, first: u64, next: u64) {
        if let Some(unit) = self.units.get_mut(&unit) {
            if unit.first == unit.next {
                unit.first = first;
            }
            unit.next = next;
        }
    }

    pub(crate) fn apply(&mut self, control: &Control) -> Needless {
        let mut needless = Needless::default();
        let unit = match control {
            Control::Nothing => return needless,
            Control::Create { unit, .. }
            | Control::Lease { unit, .. }
            | Control::Release { unit }
            | Control::Below { unit, .. }
            | Control::From { unit, .. }
            | Control::Publish { unit, .. }
            | Control::Hide { unit, .. }
            | Control::Remove { unit } => *unit,
        };
        if let Control::Create { name, .. } = control {
            self.next_id = self.next_id.max(unit.saturating_add(1));
            self.units.insert(unit, Unit { name: name.as_str().to_owned(), ..Unit::default() });
            return needless;
        }
        if let Control::Remove { .. } = control {
            let gone = self.units.remove(&unit);
            needless.tables.extend(gone.iter().flat_map(|u| u.tables.keys()).map(|id| (unit, *id)));
            return needless;
        }
        let Some(it) = self.units.get_mut(&unit) else { return needless };
        let gone = match control {
            Control::Nothing | Control::Create { .. } | Control::Remove { .. } => Vec::new(),
            Control::Lease { epoch, holder, ttl_ms, .. } => {
                it.epoch = it.epoch.max(*epoch);
                it.holder = Some(holder.clone());
                it.ttl_ms = *ttl_ms;
                Vec::new()
            }
            Control::Release { .. } => {
                it.holder = None;
                Vec::new()
            }
            Control::Below { sii, .. } => {
                it.below(*sii);
                Vec::new()
            }
            Control::From { sii, .. } => {
                it.next = it.next.min((*sii).max(it.first));
                Vec::new()
            }
            Control::Publish { id, table, .. } => {
                self.next_id = self.next_id.max(id.saturating_add(1));
                it.publish(*id, table.clone())
            }
            Control::Hide { below, .. } => it.hide(*below),
        };
        needless.tables = gone.into_iter().map(|id| (unit, id)).collect();
        needless
    }
}

impl Unit {
    /// Drops the records below `sii`.
    pub(crate) fn below(&mut self, sii: u64) {
        self.first = self.first.max(sii);
        self.next = self.next.max(self.first);
    }

    /// Adds a checkpoint; one at the same SII is replaced. Returns the tables that are needless by it.
    pub(crate) fn publish(&mut self, id: u64, table: Table) -> Vec<u64> {
        for old in self.tables.values_mut().filter(|t| t.sii == table.sii) {
            old.hidden = true;
        }
        self.tables.insert(id, table);
        self.drop_needless()
    }

    /// Drops the checkpoints before `below`. Returns the tables that are needless by it.
    pub(crate) fn hide(&mut self, below: u64) -> Vec<u64> {
        for old in self.tables.values_mut().filter(|t| t.sii < below) {
            old.hidden = true;
        }
        self.drop_needless()
    }

    /// Removes hidden tables that no checkpoint builds on.
    fn drop_needless(&mut self) -> Vec<u64> {
        let mut needed = std::collections::BTreeSet::new();
        for (id, table) in &self.tables {
            if !table.hidden {
                let mut next = Some(*id);
                while let Some(id) = next {
                    if !needed.insert(id) {
                        break;
                    }
                    next = self.tables.get(&id).and_then(|t| t.parent);
                }
            }
        }
        let gone: Vec<u64> = self.tables.keys().filter(|id| !needed.contains(id)).copied().collect();
        for id in &gone {
            self.tables.remove(id);
        }
        gone
    }

    /// The checkpoints, by SII.
    pub(crate) fn checkpoints(&self) -> BTreeMap<u64, (u64, &Table)> {
        self.tables.iter().filter(|(_, t)| !t.hidden).map(|(id, t)| (t.sii, (*id, t))).collect()
    }

    /// The table and those that it builds on, newest first.
    pub(crate) fn lineage(&self, id: u64) -> Vec<u64> {
        let mut out = vec![id];
        while let Some(parent) = out.last().and_then(|id| self.tables.get(id)).and_then(|t| t.parent) {
            if out.contains(&parent) {
                break;
            }
            out.push(parent);
        }
        out
    }
}

/// Johnson's lemmas 2.4 and 2.5 (§2.1.9) for one unit: of `checkpoints`, ascending, and with the unit's entry `recovery` of
/// the current recovery state, the effective checkpoint for that interval, and the oldest one to keep when `spare` more
/// are wanted. Checkpoints before the kept one and events up to it can go. `None` if there is no effective one: then
/// everything from the beginning is needed.
pub(crate) fn effective(checkpoints: &[u64], recovery: u64, spare: usize) -> Option<(u64, u64)> {
    let before: Vec<u64> = checkpoints.iter().copied().take_while(|sii| *sii <= recovery).collect();
    let effective = *before.last()?;
    Some((effective, before[before.len() - 1 - spare.min(before.len() - 1)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The definition: recovery to any interval from `recovery` on begins at its effective checkpoint and
        /// needs the events behind it. Nothing of that may be dropped, and everything else is.
        #[test]
        fn the_lemmas_keep_what_recovery_needs_and_no_more(mut siis in prop::collection::btree_set(0u64..60, 0..9), recovery in 0u64..70) {
            let checkpoints: Vec<u64> = siis.iter().copied().collect();
            let kept = effective(&checkpoints, recovery, 0);
            if let Some((effective, oldest)) = kept {
                prop_assert_eq!(effective, oldest);
                siis = siis.split_off(&oldest);
                prop_assert!(siis.contains(&effective));
            }
            for goal in recovery..80 {
                let definition = |among: &mut dyn Iterator<Item = &u64>| among.filter(|c| **c <= goal).max().copied();
                prop_assert_eq!(definition(&mut checkpoints.iter()), definition(&mut siis.iter()));
            }
            let used: std::collections::BTreeSet<u64> =
                (recovery..80).filter_map(|goal| checkpoints.iter().filter(|c| **c <= goal).max().copied()).collect();
            if kept.is_some() {
                prop_assert_eq!(used, siis);
            }
        }
    }

    #[test]
    fn spare_checkpoints_are_before_the_effective_one() {
        assert_eq!(effective(&[1, 5, 9, 20], 10, 0), Some((9, 9)));
        assert_eq!(effective(&[1, 5, 9, 20], 10, 1), Some((9, 5)));
        assert_eq!(effective(&[1, 5, 9, 20], 10, 7), Some((9, 1)));
        assert_eq!(effective(&[5], 4, 1), None);
    }
}
