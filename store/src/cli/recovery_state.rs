//! `ftstore simulate --bench-recovery-state`.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Answer;
use crate::protocols::recovery_state::{RecoveryState, Stored, stored_by};

/// Feeds the recovery state what 10, 100 and 1,000 units store, and measures. What generates the load
/// is measured by itself and taken off.
pub(super) fn measure(intervals: usize, seed: u64) -> Answer {
    let mut text = format!(
        "{:>6} {:>10} {:>12} {:>12} {:>12} {:>12} {:>10}\n",
        "units", "stored", "µs/interval", "slowest µs", "most kept", "most kB", "recovered"
    );
    let mut rows = Vec::new();
    for units in [10, 100, 1_000] {
        let begun = Instant::now();
        let count = stored_by(units, intervals, seed).count();
        let generating = begun.elapsed();
        let mut state = RecoveryState::new(units);
        let (mut kept, mut bytes, mut slowest) = (0, 0, 0.0f64);
        let mut looking = Duration::ZERO;
        let begun = Instant::now();
        for (index, what) in stored_by(units, intervals, seed).enumerate() {
            let one = index.is_multiple_of(64).then(Instant::now);
            match what {
                Stored::Message { unit, sii, from, sent_in } => state.message_logged(unit, sii, from, sent_in),
                Stored::Checkpoint { unit, sii, depends_on } => state.checkpointed(unit, sii, depends_on),
            };
            if let Some(one) = one {
                slowest = slowest.max(one.elapsed().as_secs_f64() * 1e6);
            }
            if index.is_multiple_of(4096) {
                let begun = Instant::now();
                (kept, bytes) = (kept.max(state.kept()), bytes.max(state.bytes()));
                looking += begun.elapsed();
            }
        }
        let spent = begun.elapsed().saturating_sub(generating).saturating_sub(looking);
        let each = spent.as_secs_f64() * 1e6 / count.max(1) as f64;
        let recovered: u64 = state.current().iter().sum();
        let kilobytes = bytes / 1000;
        let _ = writeln!(
            text,
            "{units:>6} {count:>10} {each:>12.3} {slowest:>12.1} {kept:>12} {kilobytes:>12} {recovered:>10}"
        );
        rows.push(json!({ "units": units, "stored": count, "us_per_interval": each, "slowest_sampled_us": slowest, "most_kept": kept, "most_bytes": bytes, "recovered": recovered }));
    }
    Answer { text, json: json!(rows), bad: false }
}
