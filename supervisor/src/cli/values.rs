//! Values of options: names, variables, times and sizes.

use std::ffi::OsString;
use std::str::FromStr;
use std::time::Duration;

use crate::unitdir::check_name;

/// Checkpoints further apart than this are a mistake in the unit of time.
const CHECKPOINT_EVERY_MAX: Duration = Duration::from_secs(7 * 86400);
/// The log between two checkpoints takes at least a few large events.
const CHECKPOINT_LOG_MIN: u64 = 64 << 10;

pub(super) fn parse_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

pub(super) fn parse_env(text: OsString) -> Result<(OsString, OsString), String> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = text.as_bytes();
    match bytes.iter().position(|&b| b == b'=') {
        None | Some(0) => Err("write it as NAME=VALUE".into()),
        Some(at) => Ok((OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec()))),
    }
}

/// A decimal number and what follows it, trimmed.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    Some((f64::from_str(number).ok()?, unit.trim()))
}

/// Reads a time such as `1s`, `500ms` or `1.5m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: write a number and ms, s, m or h, such as 500ms");
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "" => return Err(format!("{text:?} has no unit: write {text}s or {text}ms")),
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())
}

/// Reads a size such as `64MiB`, `1G` or `4096`. `K`, `M` and `G` count in 1024s.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write a number and KiB, MiB or GiB, such as 64MiB");
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" | "mb" | "gb" | "tb" => {
            return Err(format!("{text:?}: sizes count in 1024s, write KiB, MiB or GiB"));
        }
        _ => return Err(wrong()),
    };
    let bytes = number * factor as f64;
    if bytes >= (1u64 << 53) as f64 {
        return Err(format!("{text:?} is more than any disk holds"));
    }
    Ok(bytes as u64)
}

pub(super) fn parse_checkpoint_every(text: &str) -> Result<Duration, String> {
    let every = parse_duration(text)?;
    if every < Duration::from_millis(1) || every > CHECKPOINT_EVERY_MAX {
        return Err("it must be between 1ms and 168h".into());
    }
    Ok(every)
}

pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    if interval < Duration::from_millis(100) || interval > Duration::from_secs(86400) {
        return Err("it must be between 100ms and 24h".into());
    }
    Ok(interval)
}

pub(super) fn parse_checkpoint_log(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < CHECKPOINT_LOG_MIN {
        return Err(format!("it must be at least {}KiB", CHECKPOINT_LOG_MIN >> 10));
    }
    Ok(bytes)
}
