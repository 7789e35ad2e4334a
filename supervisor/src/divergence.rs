//! What is said when replay does not reproduce the log.

use ftrun_abi::record::{Header, Kind};
use ftrun_abi::table;

/// The first event at which replay differed.
#[derive(Debug, Clone)]
pub struct Divergence {
    /// The event.
    pub sii: u64,
    /// Thread that the event belongs to.
    pub tid: i32,
    /// What the log says.
    pub expected: String,
    /// What the replayed program did.
    pub found: String,
}

impl std::error::Error for Divergence {}

impl std::fmt::Display for Divergence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "replay diverged at event {} (thread {})", self.sii, self.tid)?;
        writeln!(f, "  logged:   {}", self.expected)?;
        writeln!(f, "  replayed: {}", self.found)?;
        write!(f, "the unit's checkpoints and log are kept; nothing was sent or received from the replayed state")
    }
}

/// A logged event in a few words.
pub fn describe(h: &Header) -> String {
    if h.kind == Kind::Call as u16 {
        let row = table::lookup(u64::from(h.nr), &[0; 6]);
        format!("{}(…) = {} [digest {:016x}]", row.name, h.result, h.digest)
    } else if h.kind == Kind::Signal as u16 {
        format!("signal {}", h.nr)
    } else {
        format!("event of kind {}", h.kind)
    }
}

/// A call in a few words.
pub fn describe_call(nr: u64, args: &[u64; 6], digest: u64) -> String {
    let row = table::lookup(nr, args);
    let shown: Vec<String> = args.iter().take(row.args.len().max(1)).map(|a| format!("{a:#x}")).collect();
    format!("{}({}) [digest {digest:016x}]", row.name, shown.join(", "))
}
