//! The current recovery state of a system, found from what is stable (Johnson, ch. 4).
//!
//! Three ways to the same answer:
//! - [`batch`]: figure 4.1, downwards from the newest stable intervals, each time from scratch;
//! - [`Incremental`]: figures 4.2 and 4.3 as they are printed, upwards from the last answer;
//! - [`RecoveryState`]: the incremental algorithm for a store that has to run it at every message
//!   logged by a thousand units. It is told what was logged, keeps nothing that is below the
//!   recovery state, and searches only where searching can help.
//!
//! [`recovery_state_exhaustive`](super::model::recovery_state_exhaustive) is the oracle of all.

#[cfg(test)]
mod lemmas;
mod load;
mod printed;
mod sorted;
mod streaming;
#[cfg(test)]
mod tests;

pub use load::{Stored, stored_by};
pub use printed::{Incremental, batch};
pub use streaming::RecoveryState;
