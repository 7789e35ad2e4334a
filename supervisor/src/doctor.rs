//! `ftrun doctor`: what this kernel and this user can do, found by trying it.

mod probes;
mod sandbox;

use std::fmt;
use std::path::Path;

use serde::Serialize;

use ftrun_ckpt::dirty;

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// Short name.
    pub name: &'static str,
    /// It works.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// `ftrun run` does not work without it.
    pub needed: bool,
    /// What to do when it does not work, or what happens instead.
    pub remedy: Option<String>,
}

/// Which way is taken for what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chosen {
    /// How written pages are found.
    pub dirty_backend: String,
    /// `kernel`: a program keeps its pid when it is brought back; `virtual`: in its own eyes only.
    pub process_ids: &'static str,
    /// `faulting`: the program sees the CPU that we show it; `native`: the real one.
    pub cpuid: &'static str,
}

/// What `ftrun doctor` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `ftrun run` would work.
    pub ok: bool,
    /// Kernel release.
    pub kernel: String,
    /// Effective user id.
    pub uid: u32,
    /// What was tried.
    pub probes: Vec<Probe>,
    /// What follows from it.
    pub chosen: Chosen,
}

/// Result of a probe: what was found, or what is wrong.
type Outcome = Result<String, String>;

/// A probe: its name, whether `run` needs it, the remedy, and how to try.
struct Row {
    name: &'static str,
    needed: bool,
    remedy: &'static str,
    attempt: fn() -> Outcome,
}

const CONTAINER: &str = "inside a container, allow it in the container's seccomp profile and capabilities";
const SET_TID: &str = "process-id";
const CPUID: &str = "cpuid-faulting";

/// Every probe that needs no argument, in the order in which they are shown.
const ROWS: &[Row] = &[
    Row { name: "kernel", needed: true, remedy: "use Linux 5.6 or newer on x86-64", attempt: probes::kernel },
    Row {
        name: "yama",
        needed: true,
        remedy: "now: sysctl kernel.yama.ptrace_scope=1; for good: put that in /etc/sysctl.d/. 3 can only be \
                 changed by a reboot",
        attempt: probes::yama,
    },
    Row { name: "ptrace", needed: true, remedy: CONTAINER, attempt: probes::ptrace },
    Row {
        name: "seccomp-trace",
        needed: true,
        remedy: "the kernel needs CONFIG_SECCOMP_FILTER",
        attempt: probes::seccomp_trace,
    },
    Row {
        name: "no-new-privs",
        needed: true,
        remedy: "the kernel needs CONFIG_SECCOMP_FILTER",
        attempt: probes::no_new_privs,
    },
    Row { name: "shared-descriptors", needed: true, remedy: CONTAINER, attempt: probes::shared_descriptors },
    Row { name: "subreaper", needed: true, remedy: CONTAINER, attempt: probes::subreaper },
    Row { name: "process-memory", needed: true, remedy: CONTAINER, attempt: probes::process_memory },
    Row { name: "memfd", needed: true, remedy: CONTAINER, attempt: probes::memfd },
    Row {
        name: "memory-layout",
        needed: true,
        remedy: "the kernel needs CONFIG_CHECKPOINT_RESTORE (PR_SET_MM_MAP)",
        attempt: probes::mm_map,
    },
    Row { name: "tsc-trap", needed: true, remedy: CONTAINER, attempt: probes::tsc_trap },
    Row {
        name: CPUID,
        needed: false,
        remedy: "this CPU or hypervisor has no CPUID faulting, so RDRAND, RDSEED and TSX cannot be \
                 hidden from a program: one that executes them itself may diverge in replay",
        attempt: probes::cpuid_faulting,
    },
    Row {
        name: SET_TID,
        needed: false,
        remedy: "virtual process ids are used instead: the program sees its old id, the system a new one. Root \
                 (or CAP_CHECKPOINT_RESTORE) keeps the real one",
        attempt: probes::set_tid,
    },
    Row {
        name: "pidfd-getfd",
        needed: false,
        remedy: "the dirty backend wp-async needs it (Linux 5.6); another one is used",
        attempt: probes::pidfd_getfd,
    },
    Row {
        name: "dirty-wp-async",
        needed: false,
        remedy: "it needs Linux 6.7 with CONFIG_USERFAULTFD; otherwise the next backend is used",
        attempt: || self_test(dirty::Kind::WpAsync),
    },
    Row {
        name: "dirty-soft-dirty",
        needed: false,
        remedy: "it needs a kernel with CONFIG_MEM_SOFT_DIRTY; otherwise the next backend is used",
        attempt: || self_test(dirty::Kind::SoftDirty),
    },
    Row {
        name: "dirty-full",
        needed: true,
        remedy: "/proc must be mounted and process_vm_readv allowed",
        attempt: || self_test(dirty::Kind::Full),
    },
    Row {
        name: "descriptors",
        needed: true,
        remedy: "raise it: ulimit -n 4096; for good: LimitNOFILE= in the unit file or /etc/security/limits.conf",
        attempt: probes::descriptor_limit,
    },
];

fn self_test(kind: dirty::Kind) -> Outcome {
    sandbox::in_child(|| dirty::self_test(kind).map(|()| "finds exactly the written pages".into()))
}

/// Tries everything.
pub fn examine(state_dir: &Path) -> Report {
    let mut found: Vec<Probe> =
        ROWS.iter().map(|row| probe(row.name, row.needed, row.remedy, (row.attempt)())).collect();
    let remedy = "choose another directory with --state-dir DIR or FTRUN_STATE_DIR";
    found.push(probe("state-directory", true, remedy, probes::state_dir(state_dir)));
    let works = |name| found.iter().any(|p| p.name == name && p.ok);
    let chosen = Chosen {
        dirty_backend: dirty::choose().name().to_owned(),
        process_ids: if works(SET_TID) { "kernel" } else { "virtual" },
        cpuid: if works(CPUID) { "faulting" } else { "native" },
    };
    Report {
        ok: found.iter().all(|p| p.ok || !p.needed),
        kernel: probes::kernel_release(),
        uid: nix::unistd::geteuid().as_raw(),
        probes: found,
        chosen,
    }
}

fn probe(name: &'static str, needed: bool, remedy: &str, outcome: Outcome) -> Probe {
    let ok = outcome.is_ok();
    let (Ok(detail) | Err(detail)) = outcome;
    Probe { name, ok, detail, needed, remedy: (!ok).then(|| remedy.to_owned()) }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Linux {}, uid {}\n", self.kernel, self.uid)?;
        for p in &self.probes {
            let mark = match (p.ok, p.needed) {
                (true, _) => "ok",
                (false, true) => "FAIL",
                (false, false) => "no",
            };
            writeln!(f, "{mark:<5} {:<19} {}", p.name, p.detail)?;
            if let Some(remedy) = &p.remedy {
                writeln!(f, "      {:<19} -> {remedy}", "")?;
            }
        }
        writeln!(f, "\ndirty pages   {}", self.chosen.dirty_backend)?;
        writeln!(f, "process ids   {}", self.chosen.process_ids)?;
        writeln!(f, "cpuid         {}", self.chosen.cpuid)?;
        let verdict = if self.ok { "works here" } else { "does not work here: see FAIL above" };
        writeln!(f, "\nftrun run {verdict}.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This machine is one where ftrun works; every failing probe must say what to do.
    #[test]
    fn this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("not/yet/there");
        let report = examine(&state);
        assert!(report.ok, "{report}");
        assert!(!state.exists(), "looking leaves no trace");
        assert_eq!(report.probes.len(), ROWS.len() + 1);
        for p in &report.probes {
            assert!(!p.detail.is_empty(), "{}", p.name);
            assert_eq!(p.remedy.is_some(), !p.ok, "{}", p.name);
        }
        let json = serde_json::to_value(&report).unwrap();
        for field in ["name", "ok", "detail", "needed", "remedy"] {
            assert!(json["probes"][0].get(field).is_some(), "{field}");
        }
    }

    #[test]
    fn a_needed_probe_that_fails_fails_the_whole() {
        let report = examine(Path::new("/proc/nowhere"));
        assert!(!report.ok);
        let text = report.to_string();
        assert!(text.contains("FAIL  state-directory") && text.contains("--state-dir"), "{text}");
    }
}
