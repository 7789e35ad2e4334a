//! `ftstore simulate --bench-recovery-state`.

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::json;

use super::Answer;
use crate::protocols::recovery_state::{RecoveryState, Stored, stored_by};

/// Feeds the recovery state what 10, 100 and 1,000 units store, and measures.
pub(super) fn measure(intervals: usize, seed: u64) -> Answer {
    let mut text = format!(
        "{:>6} {:>10} {:>12} {:>12} {:>12} {:>10}\n",
        "units", "intervals", "µs/interval", "slowest µs", "most kept", "recovered"
    );
    let mut rows = Vec::new();
    for units in [10, 100, 1_000] {
        let stored = stored_by(units, intervals, seed);
        let mut state = RecoveryState::new(units);
        let (mut most, mut slowest) = (0, 0.0f64);
        let begun = Instant::now();
        for (index, what) in stored.iter().enumerate() {
            let one = index.is_multiple_of(64).then(Instant::now);
            match what {
                Stored::Message { unit, sii, from, sent_in } => state.message_logged(*unit, *sii, *from, *sent_in),
                Stored::Checkpoint { unit, sii, depends_on } => {
                    state.checkpointed(*unit, *sii, depends_on.iter().copied())
                }
            };
            if let Some(one) = one {
                slowest = slowest.max(one.elapsed().as_secs_f64() * 1e6);
            }
            if index.is_multiple_of(4096) {
                most = most.max(state.kept());
            }
        }
        let each = begun.elapsed().as_secs_f64() * 1e6 / stored.len().max(1) as f64;
        let recovered: u64 = state.current().iter().sum();
        let _ =
            writeln!(text, "{units:>6} {:>10} {each:>12.3} {slowest:>12.1} {most:>12} {recovered:>10}", stored.len());
        rows.push(json!({ "units": units, "intervals": stored.len(), "us_per_interval": each, "slowest_sampled_us": slowest, "most_kept": most, "recovered": recovered }));
    }
    Answer { text, json: json!(rows), bad: false }
}
