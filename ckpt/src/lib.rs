//! Checkpoints of a process: what they hold ([`state`]), which pages changed since the last one
//! ([`dirty`]), the pages of the newest one in memory ([`pages`]), moving pages between a target
//! and us ([`copy`]), the files that memory is mapped from ([`files`]), and those on disk ([`image`]).
//!
//! Nothing here traces a process or knows what the model of the supervisor means: the supervisor
//! reads and restores the process and hands plain data over.

pub mod copy;
pub mod dirty;
pub mod files;
pub mod image;
pub mod maps;
pub mod pages;
pub mod runs;
pub mod state;

mod anon;
