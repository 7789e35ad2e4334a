//! Events in the manner of strace(1).

use std::io::{self, Write};

use ftrun_abi::record::{Kind, Record, flag};
use ftrun_abi::table;

/// Longest part of an output that is shown, bytes.
const SHOWN: usize = 32;

/// Prints one event on one line.
pub fn print_record(out: &mut dyn Write, record: &Record<'_>) -> io::Result<()> {
    let h = record.header;
    write!(out, "{:>10} [{}] ", h.sii, h.tid)?;
    match record.kind {
        Kind::Call => {
            let row = table::lookup(u64::from(h.nr), &[0; 6]);
            write!(out, "{}() = ", row.name)?;
            if (-4095..0).contains(&h.result) {
                let error = io::Error::from_raw_os_error(-h.result as i32);
                write!(out, "-1 ({error})")?;
            } else if h.result as u64 > 0xffff_ffff {
                write!(out, "{:#x}", h.result)?;
            } else {
                write!(out, "{}", h.result)?;
            }
        }
        Kind::Signal => {
            let how = if h.flags & flag::SUSPENDED != 0 {
                "inside a wait with its own mask"
            } else if h.flags & flag::AFTER_CALL != 0 {
                "after the call"
            } else {
                "before the call"
            };
            write!(out, "--- signal {} {how} ---", h.nr)?;
        }
        Kind::Sched => write!(out, "+++ gets the turn +++")?,
        Kind::Insn => write!(out, "{}", if h.nr == 0xa2 { "cpuid" } else { "rdtsc" })?,
        Kind::Exit => write!(out, "+++ exited with {} +++", h.result & 0xff)?,
        Kind::Exec => write!(out, "+++ new image +++")?,
    }
    if record.kind == Kind::Call {
        if h.flags & flag::FAST != 0 {
            write!(out, " fast")?;
        }
        for (addr, bytes) in record.outputs() {
            let text: String =
                bytes.iter().take(SHOWN).flat_map(|b| std::ascii::escape_default(*b)).map(char::from).collect();
            let more = if bytes.len() > SHOWN { "…" } else { "" };
            write!(out, " {addr:#x}:\"{text}\"{more}({})", bytes.len())?;
        }
    }
    writeln!(out)
}
