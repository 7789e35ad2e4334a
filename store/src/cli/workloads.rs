//! Workloads that the user names or describes.

use std::path::Path;

use serde_json::Value;

use crate::Error;
use crate::protocols::process::{Pattern, Workload};

/// A workload by its name: the programs of Johnson, §3.4.4, and two plain ones.
pub(super) fn named(name: &str, units: usize) -> Option<Workload> {
    let (pattern, computing) = (Pattern::Random, 0);
    let base = Workload { units, first: 2, hops: 8, forks: 50, outputs: 100, bytes: 100, pattern, computing, seed: 0 };
    let program = Workload { first: 1, forks: 0, outputs: 0, ..base };
    Some(match name {
        "random" => base,
        "ring" => Workload { pattern: Pattern::Ring, ..base },
        // As they solve the smallest problem of §3.4.4, without what they compute.
        "nqueens" => Workload { pattern: Pattern::Ask, hops: 7, bytes: 240, ..program },
        "tsp" => Workload { pattern: Pattern::Search, hops: 47, bytes: 130, ..program },
        "gauss" => Workload { pattern: Pattern::Eliminate, hops: 400, bytes: 190, ..program },
        _ => return None,
    })
}

pub(super) fn from_file(path: &Path, units: usize) -> Result<Workload, Error> {
    let wrong = |why: String| Error::invalid(format!("--workload {}", path.display()), why);
    let text = std::fs::read_to_string(path).map_err(|error| {
        wrong(format!("neither a known name (nqueens, tsp, gauss, random, ring) nor readable: {error}"))
    })?;
    let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let number = |name: &str, default: u64| match &value[name] {
        Value::Null => Ok(default),
        given => given
            .as_u64()
            .filter(|&n| n <= 1_000_000)
            .ok_or_else(|| wrong(format!("{name} is {given}; it must be a number from 0 to 1000000"))),
    };
    let pattern = match value["pattern"].as_str().unwrap_or("random") {
        "random" => Pattern::Random,
        "main" => Pattern::Main,
        "exchange" => Pattern::Exchange,
        "ring" => Pattern::Ring,
        "ask" => Pattern::Ask,
        "search" => Pattern::Search,
        "eliminate" => Pattern::Eliminate,
        other => {
            let known = "random, main, exchange, ring, ask, search, eliminate";
            return Err(wrong(format!("pattern {other:?}; known are {known}")));
        }
    };
    let narrow = |n: u64| u32::try_from(n).expect("bounded above");
    Ok(Workload {
        units: usize::try_from(number("units", units as u64)?).expect("bounded above"),
        first: narrow(number("first", 2)?),
        hops: narrow(number("hops", 8)?),
        forks: narrow(number("forks", 50)?),
        outputs: narrow(number("outputs", 100)?),
        bytes: narrow(number("bytes", 100)?),
        pattern,
        computing: narrow(number("computing_us", 0)?),
        seed: 0,
    })
}
