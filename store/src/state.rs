//! The control state: what the store knows of its units, apart from where things are.
//!
//! In the embedded engine it is the result of the control records and of the SIIs of the batches, in the order of the
//! log; writing and recovery apply them by the same functions. In a cluster each unit's part of it is one stored value.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::UnitName;
use crate::table::DEPTH_MAX;

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
            // One below the log comes only after damage.
            if unit.first == unit.next || first < unit.first {
                unit.first = first;
            }
            unit.next = next;
        }
    }

    /// Judges a state that was read: whether it can have come about.
    ///
    /// # Errors
    /// What contradicts what.
    pub(crate) fn check(&self) -> Result<(), String> {
        // Numbers go up by one: nothing has ever used up all of them.
        if self.next_id == u64::MAX {
            return Err("no number is left for another unit".into());
        }
        let (mut names, mut ids) = (BTreeSet::new(), BTreeSet::new());
        for (number, unit) in &self.units {
            let of = |what: String| format!("unit {:?}: {what}", unit.name);
            UnitName::new(&unit.name[..]).map_err(|e| e.to_string())?;
            if !names.insert(&unit.name) {
                return Err(of("there are two of this name".into()));
            }
            unit.check().map_err(of)?;
            for id in unit.tables.keys().chain([number]) {
                if *id == 0 || *id >= self.next_id {
                    return Err(of(format!(
                        "number {id} is none that was given out, the next one is {}",
                        self.next_id
                    )));
                }
                if !ids.insert(*id) {
                    return Err(of(format!("number {id} was given out twice")));
                }
            }
        }
        Ok(())
    }

    /// Judges a batch that was read: whether it can follow.
    ///
    /// # Errors
    /// What it contradicts.
    pub(crate) fn admits_batch(&self, unit: u64, first: u64, count: u32) -> Result<(), String> {
        let Some(unit) = self.units.get(&unit) else {
            return Err(format!("events of unit {unit}, which is not there"));
        };
        let of = |what: &str| format!("unit {:?}: events from {first} on, {count} of them, {what}", unit.name);
        let follows = if unit.first == unit.next { first >= unit.next } else { first == unit.next };
        match first.checked_add(u64::from(count)) {
            None => Err(of("are more than there are numbers")),
            Some(next) if next == first => Err(of("are none")),
            Some(_) if !follows => Err(of(&format!("cannot follow {}..{}", unit.first, unit.next))),
            Some(_) => Ok(()),
        }
    }

    /// Judges a change that was read: whether it can be applied.
    ///
    /// # Errors
    /// What it contradicts.
    pub(crate) fn admits(&self, control: &Control) -> Result<(), String> {
        let (number, what) = match control {
            Control::Nothing => return Ok(()),
            // Whether the name is free is seen when all are there: see `check`.
            Control::Create { unit, .. } if *unit >= self.next_id.max(1) && *unit < u64::MAX => return Ok(()),
            Control::Create { unit, name } => {
                return Err(format!("unit {name} is made under number {unit}, which is not free"));
            }
            Control::Lease { unit, .. } => (unit, "a lease"),
            Control::Release { unit } => (unit, "the end of a lease"),
            Control::Below { unit, .. } | Control::From { unit, .. } => (unit, "a truncation"),
            Control::Publish { unit, .. } | Control::Hide { unit, .. } => (unit, "checkpoints"),
            Control::Remove { unit } => (unit, "the removal"),
        };
        let it = self.units.get(number).ok_or_else(|| format!("{what} of unit {number}, which is not there"))?;
        let of = |what: String| Err(format!("unit {:?}: {what}", it.name));
        match control {
            Control::Lease { epoch, .. } if *epoch <= it.epoch || *epoch == u64::MAX => {
                of(format!("epoch {epoch} cannot follow epoch {}", it.epoch))
            }
            Control::Publish { id, table, .. } => {
                // Numbers are given out when tables are written, and published in any order.
                let used = || self.units.iter().any(|(n, u)| n == id || u.tables.contains_key(id));
                if *id == 0 || *id == u64::MAX || (*id < self.next_id && used()) {
                    return of(format!("checkpoint {} has number {id}, which is not free", table.sii));
                }
                it.check_table(*id, table).map_err(|what| format!("unit {:?}: {what}", it.name))
            }
            _ => Ok(()),
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
    /// Judges a unit that was read: whether it can have come about.
    ///
    /// # Errors
    /// What contradicts what.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.first > self.next {
            return Err(format!("its log begins at event {} and ends before event {}", self.first, self.next));
        }
        if self.epoch == u64::MAX {
            return Err("no epoch is left for another writer".into());
        }
        if self.holder.is_some() && self.epoch == 0 {
            return Err("somebody holds it, and nobody has ever opened it".into());
        }
        let mut bytes = 0u64;
        let mut shown = BTreeSet::new();
        for (id, table) in &self.tables {
            self.check_table(*id, table)?;
            if !table.hidden && !shown.insert(table.sii) {
                return Err(format!("there are two checkpoints at event {}", table.sii));
            }
            bytes = bytes.saturating_add(table.bytes);
        }
        if bytes > i64::MAX as u64 {
            return Err("its checkpoints have more bytes than any disk".into());
        }
        Ok(())
    }

    /// Judges a table: whether it can be one of this unit's.
    fn check_table(&self, id: u64, table: &Table) -> Result<(), String> {
        let sii = table.sii;
        let Some(parent) = table.parent else {
            return match table.depth {
                0 => Ok(()),
                depth => Err(format!("checkpoint {sii} is change number {depth} to none")),
            };
        };
        match self.tables.get(&parent) {
            None => Err(format!("checkpoint {sii} changes table {parent}, which is not there")),
            Some(_) if parent >= id => Err(format!("checkpoint {sii} changes table {parent}, which is a later one")),
            Some(below) if below.sii >= sii => {
                Err(format!("checkpoint {sii} changes one at event {}, which is not before it", below.sii))
            }
            Some(below) if below.depth.checked_add(1) != Some(table.depth) || table.depth >= DEPTH_MAX => Err(format!(
                "checkpoint {sii} is change number {}, and number {} to another one",
                table.depth, below.depth
            )),
            Some(_) => Ok(()),
        }
    }

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
        let mut needed = BTreeSet::new();
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
