//! Recovery protocols between units.
//!
//! | module | what | source |
//! |---|---|---|
//! | [`model`] | process and system states, consistent, stable, recoverable | Johnson, ch. 2 |
//! | [`recovery_state`] | the current recovery state: batch, incremental, streaming | Johnson, ch. 4 |
//! | [`process`] | the processes that are carried, and their messages | |
//! | [`machine`] | what a protocol is: a state machine for each node | |
//! | `writes` | what a node is writing to its stable storage | |
//! | [`local`] | messages are stored before their receiver gets them | Publishing |
//! | [`sender`] | messages are logged by their senders, in memory | Johnson, ch. 3 |
//! | [`optimistic`] | messages are logged later, orphans are rolled back | Johnson, ch. 4 |
//! | [`family`] | receipt orders are kept by f + 1 hosts | Elnozahy |
//! | [`group`] | groups of processes that are virtually synchronous | CBCAST, ISIS |
//! | [`sim`] | the simulator and its checks | |
//!
//! Citations name the paper and its section, lemma, theorem or figure: *Publishing* is Powell and
//! Presotto (1983), *Johnson* the thesis of D. B. Johnson (1989), *Elnozahy* the paper of 1995 on
//! family-based logging, *ISIS* Birman and Joseph (SOSP 1987), *CBCAST* Birman and Joseph (TOCS
//! 1987).
//!
//! Invariant: nothing here does input or output, reads a clock, or draws randomness that does not
//! come from a seed; no result depends on the order of a hash table.

pub mod family;
pub mod group;
pub mod local;
pub mod machine;
pub mod model;
pub mod optimistic;
pub mod process;
pub mod recovery_state;
pub mod rng;
pub mod sender;
pub mod sim;
mod writes;
