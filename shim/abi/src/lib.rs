//! Types shared by the supervisor and the code that runs inside the traced process.
//!
//! Three things live here: the table of system calls ([`table`]), the layout of an event
//! ([`record`]) and the ring that events pass through ([`ring`]). Nothing here allocates, makes a
//! system call or needs libc, so that the shim can use all of it.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod fast;
pub mod outputs;
pub mod record;
pub mod ring;
pub mod stream;
pub mod table;
