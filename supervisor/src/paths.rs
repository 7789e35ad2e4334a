//! Paths that mean the caller itself.
//!
//! The supervisor makes calls on paths in the unit's place, so `/proc/self` would be the supervisor.
//! Descriptors are shared, so `/dev/fd` and `/proc/self/fd` mean the same in both.

/// Rewrites `/proc/self/...` and `/proc/thread-self/...` to the unit's own directories.
pub fn rewrite(path: Vec<u8>, pid: i32, tid: i32) -> Vec<u8> {
    let with = |prefix: &str, to: String| {
        let rest = path.strip_prefix(prefix.as_bytes())?;
        if !(rest.is_empty() || rest[0] == b'/') || rest.starts_with(b"/fd") {
            return None;
        }
        let mut out = to.into_bytes();
        out.extend_from_slice(rest);
        Some(out)
    };
    if let Some(p) = with("/proc/self", format!("/proc/{pid}")) {
        return p;
    }
    if let Some(p) = with("/proc/thread-self", format!("/proc/{pid}/task/{tid}")) {
        return p;
    }
    path
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn the_unit_is_self() {
        assert_eq!(rewrite(b"/proc/self/stat".to_vec(), 7, 8), b"/proc/7/stat");
        assert_eq!(rewrite(b"/proc/self".to_vec(), 7, 8), b"/proc/7");
        assert_eq!(rewrite(b"/proc/thread-self/comm".to_vec(), 7, 8), b"/proc/7/task/8/comm");
        assert_eq!(rewrite(b"/proc/self/fd/3".to_vec(), 7, 8), b"/proc/self/fd/3");
        assert_eq!(rewrite(b"/proc/selfish".to_vec(), 7, 8), b"/proc/selfish");
        assert_eq!(rewrite(b"/tmp/x".to_vec(), 7, 8), b"/tmp/x");
    }
}
