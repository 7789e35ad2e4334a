//! Sorted runs of pages and the set operations on them.

use crate::state::PAGE_BYTES;

/// `pages` pages in a row from address `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageRun {
    /// Address of the first page, page aligned.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

impl PageRun {
    /// The run that covers `start..end` (both page aligned).
    pub fn span(start: u64, end: u64) -> Self {
        Self { start, pages: end.saturating_sub(start) / PAGE_BYTES }
    }

    /// First address after the run.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE_BYTES
    }

    /// Addresses of its pages.
    pub fn addrs(&self) -> impl Iterator<Item = u64> + use<> {
        let start = self.start;
        (0..self.pages).map(move |i| start + i * PAGE_BYTES)
    }
}

/// Number of pages in all runs.
pub fn total(runs: &[PageRun]) -> u64 {
    runs.iter().map(|r| r.pages).sum()
}

/// Appends `start..end`; joins it with the last run when they touch. Runs must come in ascending
/// order.
pub fn push(runs: &mut Vec<PageRun>, start: u64, end: u64) {
    if end <= start {
        return;
    }
    if let Some(last) = runs.last_mut()
        && last.end() >= start
    {
        if end > last.end() {
            last.pages = (end - last.start) / PAGE_BYTES;
        }
        return;
    }
    runs.push(PageRun::span(start, end));
}

/// Appends one page; joins it with the last run when it follows that. Any order.
pub(crate) fn push_any(runs: &mut Vec<PageRun>, addr: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == addr => last.pages += 1,
        _ => runs.push(PageRun { start: addr, pages: 1 }),
    }
}

/// Sorts runs and joins those that touch or overlap.
pub fn normalize(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    runs.sort_unstable();
    let mut out = Vec::with_capacity(runs.len());
    for run in runs {
        push(&mut out, run.start, run.end());
    }
    out
}

/// What is in `a` and not in `b`; both sorted and joined.
pub fn subtract(a: &[PageRun], b: &[PageRun]) -> Vec<PageRun> {
    let mut out = Vec::new();
    let mut cuts = b.iter().peekable();
    for run in a {
        let mut at = run.start;
        while let Some(cut) = cuts.peek() {
            if cut.end() <= at {
                cuts.next();
                continue;
            }
            if cut.start >= run.end() {
                break;
            }
            push(&mut out, at, cut.start);
            at = cut.end();
            if at >= run.end() {
                break;
            }
            cuts.next();
        }
        push(&mut out, at, run.end());
    }
    out
}

/// What is in `a` and in `b`; both sorted and joined.
pub fn intersect(a: &[PageRun], b: &[PageRun]) -> Vec<PageRun> {
    let mut out = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        push(&mut out, x.start.max(y.start), x.end().min(y.end()));
        if x.end() <= y.end() {
            i += 1;
        } else {
            j += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(0u64..40, 0..30)
    }

    fn runs(set: &BTreeSet<u64>) -> Vec<PageRun> {
        let mut out = Vec::new();
        for p in set {
            push(&mut out, p * PAGE_BYTES, (p + 1) * PAGE_BYTES);
        }
        out
    }

    fn pages(runs: &[PageRun]) -> BTreeSet<u64> {
        runs.iter().flat_map(PageRun::addrs).map(|a| a / PAGE_BYTES).collect()
    }

    proptest! {
        #[test]
        fn set_operations(a in set(), b in set()) {
            let (x, y) = (runs(&a), runs(&b));
            prop_assert_eq!(pages(&subtract(&x, &y)), &a - &b);
            prop_assert_eq!(pages(&intersect(&x, &y)), &a & &b);
            let both = normalize([x, y].concat());
            prop_assert_eq!(pages(&both), &a | &b);
            prop_assert!(both.windows(2).all(|w| w[0].end() < w[1].start));
        }
    }
}
