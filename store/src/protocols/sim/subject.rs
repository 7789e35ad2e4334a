//! What the simulator runs: a protocol, and where its checks look for a group.

use crate::protocols::group::Member;
use crate::protocols::machine::Machine;
use crate::protocols::{family, local, optimistic, sender};

/// A node of a protocol that can be checked.
pub trait Subject: Machine {
    /// The member of a group that it is; other nodes carry a process.
    fn member(&self) -> Option<&Member> {
        None
    }
}

impl Subject for local::Node {}
impl Subject for sender::Unit {}
impl Subject for optimistic::Node {}
impl Subject for family::Node {}

impl Subject for Member {
    fn member(&self) -> Option<&Member> {
        Some(self)
    }
}
