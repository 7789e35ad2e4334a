//! What the service manager has told us in the environment and means the program.
//!
//! Some variables hold the process id of who they are for (sd_listen_fds(3), sd_watchdog_enabled(3), systemd.exec(5)). Where
//! that is ours, the program is meant, which has another one: it is not known yet when the environment is made, so a
//! place is left for it, and filled in by [`name_process`] as soon as it is.

use std::ffi::{OsStr, OsString};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use ftrun_ckpt::state::MmFields;

use crate::tracee;

/// The first descriptor that is passed (`SD_LISTEN_FDS_START`).
const LISTEN_FDS_START: i32 = 3;
/// They hold a process id.
const FOR_PROCESS: [&str; 3] = ["LISTEN_PID", "WATCHDOG_PID", "SYSTEMD_EXEC_PID"];
/// Tells by another number that `LISTEN_PID` is meant. It says nothing that the program could not do without.
const LISTEN_PIDFD: &str = "LISTEN_PIDFDID";
/// A place for a process id. No process has this one.
const PLACE: &str = "0000000000";
/// Longer environments are not looked through. The kernel takes none beyond 6 MiB (execve(2)).
const BLOCK_BYTES_MAX: u64 = 8 << 20;

/// What the service manager has passed under a name (sd_listen_fds_with_names(3)) is taken from what process `own`, with
/// one thread, was given: it is not the program's. The others keep their order.
pub fn take_passed(env: &mut Vec<(OsString, OsString)>, own: u32, name: &str) -> Vec<OwnedFd> {
    let get = |key: &str| env.iter().find(|(k, _)| k == key).and_then(|(_, v)| v.to_str());
    let count = get("LISTEN_FDS").and_then(|n| n.parse().ok()).unwrap_or(0);
    let names: Vec<_> = get("LISTEN_FDNAMES").unwrap_or_default().split(':').map(str::to_owned).collect();
    if get("LISTEN_PID") != Some(own.to_string().as_str()) || names.len() != count {
        return Vec::new();
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (fd, passed) in (LISTEN_FDS_START..).zip(names) {
        // SAFETY: numbers of what we were given, which nothing here owns.
        unsafe {
            if passed == name {
                let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, LISTEN_FDS_START + count as i32);
                libc::close(fd);
                if copy >= 0 {
                    ours.push(OwnedFd::from_raw_fd(copy));
                }
                continue;
            }
            let to = LISTEN_FDS_START + theirs.len() as i32;
            if to != fd {
                libc::dup2(fd, to);
                libc::close(fd);
            }
        }
        theirs.push(passed);
    }
    if theirs.len() < count {
        if theirs.is_empty() {
            env.retain(|(k, _)| k != "LISTEN_PID" && k != "LISTEN_FDS" && k != "LISTEN_FDNAMES" && k != LISTEN_PIDFD);
        }
        for (key, value) in env.iter_mut() {
            match key.to_str() {
                Some("LISTEN_FDS") => *value = theirs.len().to_string().into(),
                Some("LISTEN_FDNAMES") => *value = theirs.join(":").into(),
                _ => {}
            }
        }
    }
    ours
}

/// Makes the environment that process `own` was given that of its program. `notify` is what `NOTIFY_SOCKET` shall say.
pub fn for_program(env: &mut Vec<(OsString, OsString)>, own: u32, notify: Option<&OsStr>) {
    let own = own.to_string();
    let ours =
        |(k, v): &mut (OsString, OsString)| FOR_PROCESS.iter().any(|name| k == name) && v.as_bytes() == own.as_bytes();
    // At the end: what is behind a process id that is shorter than its place belongs to no variable, and some programs
    // measure the environment up to the first such gap to write their title there.
    let mut last: Vec<_> = env.extract_if(.., ours).collect();
    for (name, value) in &mut last {
        if name == "LISTEN_PID" {
            env.retain(|(k, _)| k != LISTEN_PIDFD);
        }
        *value = PLACE.into();
    }
    if let Some(notify) = notify {
        for (_, value) in env.iter_mut().filter(|(k, _)| k == "NOTIFY_SOCKET") {
            *value = notify.to_owned();
        }
    }
    env.append(&mut last);
}

/// Writes its process id into the environment of a stopped process that has just executed its program.
pub fn name_process(tid: i32, mm: &MmFields, pid: i32) -> tracee::Result<()> {
    let bytes = mm.env_end.saturating_sub(mm.env_start);
    if bytes == 0 || bytes > BLOCK_BYTES_MAX {
        return Ok(());
    }
    let mut block = vec![0; bytes as usize];
    tracee::read_mem(tid, mm.env_start, &mut block)?;
    let mut id = pid.to_string().into_bytes();
    id.resize(PLACE.len(), 0);
    for at in places(&block) {
        tracee::write_mem(tid, mm.env_start + at as u64, &id)?;
    }
    Ok(())
}

/// Where an environment has places for a process id.
fn places(block: &[u8]) -> Vec<usize> {
    let mut start = 0;
    let mut found = Vec::new();
    for variable in block.split(|b| *b == 0) {
        let value = FOR_PROCESS.iter().find_map(|name| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
        if value == Some(PLACE.as_bytes()) {
            found.push(start + variable.len() - PLACE.len());
        }
        start += variable.len() + 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(text: &str) -> Vec<(OsString, OsString)> {
        text.split_whitespace().filter_map(|v| v.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn what_means_us_means_the_program() {
        let mut theirs = env("LISTEN_PID=77 LISTEN_FDS=2 LISTEN_PIDFDID=9 A=77 WATCHDOG_PID=77 NOTIFY_SOCKET=/run/n");
        for_program(&mut theirs, 77, Some(OsStr::new("@ours")));
        let place = format!("LISTEN_FDS=2 A=77 NOTIFY_SOCKET=@ours LISTEN_PID={PLACE} WATCHDOG_PID={PLACE}");
        assert_eq!(theirs, env(&place));

        // For somebody else: left as it is.
        let others = env("LISTEN_PID=78 LISTEN_FDS=2 LISTEN_PIDFDID=9 SYSTEMD_EXEC_PID=1 NOTIFY_SOCKET=/run/n");
        let mut theirs = others.clone();
        for_program(&mut theirs, 77, None);
        assert_eq!(theirs, others);
    }

    #[test]
    fn places_are_found_in_the_block() {
        let block = format!("A=1\0LISTEN_PID={PLACE}\0XLISTEN_PID={PLACE}\0LISTEN_PID=5\0\0WATCHDOG_PID={PLACE}\0");
        let found = places(block.as_bytes());
        assert_eq!(found.len(), 2);
        for (at, before) in found.iter().zip(["\0LISTEN_PID=", "\0WATCHDOG_PID="]) {
            assert!(block[..*at].ends_with(before));
            assert!(block[*at..].starts_with(PLACE));
        }
        assert_eq!(places(b""), Vec::<usize>::new());
    }
}
