//! What the engine must withstand.

use std::sync::Arc;

use super::*;
use crate::conformance;
use crate::disk::fault::FaultDisk;

mod control;
mod crash;
mod damage;
mod failures;

/// Small segments, so that every step of their lives happens often.
pub(super) fn small() -> Options {
    Options {
        segment_bytes_first: 4 << 10,
        segment_bytes_max: 16 << 10,
        queue_bytes_max: 64 << 10,
        background: false,
        ..Options::default()
    }
}

#[test]
fn conforms() {
    let mut dirs = Vec::new();
    conformance::run(&mut || {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::open(dir.path(), Options::default()).unwrap();
        dirs.push(dir);
        Box::new(engine)
    });
}

#[test]
fn conforms_with_small_segments() {
    for background in [false, true] {
        conformance::run(&mut || {
            let disk = Arc::new(FaultDisk::new(1));
            Box::new(Engine::on(disk, Options { background, ..small() }).unwrap())
        });
    }
}
