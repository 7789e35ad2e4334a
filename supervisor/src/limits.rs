//! Resource limits of the unit's process and of ours (prlimit(2)); how many descriptors each may have.

use std::io;

/// `fs.nr_open`, as it is by default.
const MOST: u64 = 1 << 20;
/// How many there are.
const COUNT: u32 = 16;

/// A limit of a process (0 is the calling one), soft and hard; sets another one if there is one to set.
fn limit(pid: i32, resource: u32, new: Option<(u64, u64)>) -> io::Result<(u64, u64)> {
    let new = new.map(|(soft, hard)| libc::rlimit { rlim_cur: soft, rlim_max: hard });
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: structures that outlive the call.
    match unsafe { libc::prlimit(pid, resource, new, &raw mut old) } {
        0 => Ok((old.rlim_cur, old.rlim_max)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// All limits of a process, soft and hard.
pub(crate) fn all_of(pid: i32) -> Vec<(u64, u64)> {
    (0..COUNT).map(|resource| limit(pid, resource, None).unwrap_or_default()).collect()
}

/// Descriptors of this process have numbers below this.
pub(crate) fn numbers() -> u64 {
    limit(0, libc::RLIMIT_NOFILE, None).map_or(0, |(soft, _)| soft)
}

/// Lets a process of ours have descriptors with numbers below this, and no others.
pub(crate) fn follow_numbers(pid: i32, soft: u64) {
    // Of a keeper that has been killed there are none.
    let _followed = limit(pid, libc::RLIMIT_NOFILE, None)
        .and_then(|(_, hard)| limit(pid, libc::RLIMIT_NOFILE, Some((soft, hard.max(soft)))));
}

/// Lets this process have, and send, as many descriptors as it may; more than that if it is privileged.
pub(crate) fn raise_numbers() {
    if let Ok((_, hard)) = limit(0, libc::RLIMIT_NOFILE, None) {
        let set = |max| limit(0, libc::RLIMIT_NOFILE, Some((max, max))).is_ok();
        let _is_raised = set(MOST.max(hard)) || set(hard);
    }
}

/// Lets this process have so many descriptors. The unit's own limit follows with its next checkpoint.
///
/// # Errors
/// The hard limit does not allow it.
pub(crate) fn allow_numbers(count: u64) -> io::Result<()> {
    let (soft, hard) = limit(0, libc::RLIMIT_NOFILE, None)?;
    if soft < count {
        limit(0, libc::RLIMIT_NOFILE, Some((count, hard.max(count)))).map_err(|e| {
            io::Error::new(
                e.kind(),
                format!("{count} open descriptors (ulimit -n) are needed, {hard} are allowed: {e}"),
            )
        })?;
    }
    Ok(())
}
