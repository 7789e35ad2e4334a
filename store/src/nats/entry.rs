//! What a cluster knows of a unit beside its events and pages: one message, changed only by who knows the last one.

use serde::{Deserialize, Serialize};

use super::cluster::{Cluster, PATIENCE};
use crate::state::Unit;
use crate::{Error, UnitName};

/// First byte of a message of the state.
pub(super) const FORMAT: u8 = 1;

/// A unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Of its log only `first` is used: where it ends is what its messages say.
    pub(super) unit: Unit,
    /// The last sweep that has looked at the unit.
    pub(super) swept: u64,
    /// The unit has been removed. Its epoch is kept, lest it be given out twice.
    pub(super) removed: bool,
}

impl Entry {
    /// Judges an entry that was read.
    fn check(&self, name: &UnitName) -> Result<(), String> {
        if !self.removed && self.unit.name != name.as_str() {
            return Err(format!("the entry of unit {name} is that of unit {:?}", self.unit.name));
        }
        self.unit.check()
    }
}

/// An entry as it is stored.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) entry: Entry,
    /// Number of its message; 0 if there is none.
    pub(super) sequence: u64,
    /// When it was stored, by the cluster's clock, nanoseconds.
    pub(super) time: i128,
}

/// A value of the state, with its format.
pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_extend(value, vec![FORMAT]).expect("memory takes everything")
}

/// Judges any bytes.
pub(super) fn decode<T: for<'a> Deserialize<'a>>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    match bytes.split_first() {
        Some((&FORMAT, rest)) => postcard::from_bytes(rest).map_err(|e| Error::Damaged {
            file: what.to_owned(),
            offset: 0,
            what: e.to_string(),
        }),
        Some((found, _)) => {
            Err(Error::Version { what: what.to_owned(), found: u32::from(*found), known: u32::from(FORMAT) })
        }
        None => Err(Error::Damaged { file: what.to_owned(), offset: 0, what: "nothing is there".into() }),
    }
}

/// The entry of a unit that was ever opened.
pub(super) async fn ever(cluster: &Cluster, name: &UnitName) -> Result<Option<Known>, Error> {
    let subject = cluster.subject("unit", name);
    let Some(message) = cluster.last(&subject).await? else { return Ok(None) };
    let entry: Entry = decode(&subject, &message.payload)?;
    entry.check(name).map_err(|what| Error::Damaged { file: subject, offset: 0, what })?;
    Ok(Some(Known { entry, sequence: message.sequence, time: message.time.unix_timestamp_nanos() }))
}

/// The entry of a unit that is there.
pub(super) async fn load(cluster: &Cluster, name: &UnitName) -> Result<Option<Known>, Error> {
    Ok(ever(cluster, name).await?.filter(|known| !known.entry.removed))
}

/// Stores an entry in the place of message `after`; gives its number, or `None` if another one is there.
pub(super) async fn store(cluster: &Cluster, name: &UnitName, entry: &Entry, after: u64) -> Result<Option<u64>, Error> {
    cluster.publish(&cluster.subject("unit", name), "", encode(entry), Some(after), PATIENCE).await
}
