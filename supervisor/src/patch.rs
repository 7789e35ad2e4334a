//! Where a call site can be rewritten safely.
//!
//! `syscall` has two bytes. They become a short jump (two bytes as well, so no other instruction is touched
//! and no jump of the program can enter in the middle) into padding between functions within 127 bytes,
//! where a near jump of five bytes leads to the stub. Padding is what the file's own tables say belongs to
//! no function (frame descriptions in `.eh_frame`, sizes in `.symtab`), that follows one directly, and that
//! holds nothing but instructions without effect.
//!
//! Where the instruction before it is `mov $nr,%eax`, of five bytes, that one becomes the near jump instead, and
//! the stub loads the number. Whether an instruction begins there is found by decoding its function from the
//! beginning. A site with neither stays as it is.

use std::collections::HashMap;
use std::rc::Rc;

use ftrun_abi::fast::{REGION_BASE, REGION_END};
use ftrun_ckpt::maps::read_maps;
use ftrun_ckpt::state::Mapping;
use gimli::{BaseAddresses, CieOrFde, EhFrame, LittleEndian, UnwindSection};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind};

use crate::fast::{STUB_BYTES, Site, poke_bytes, stub};
use crate::scan::is_instruction;
use crate::tracee;
use crate::unit::{Result, Unit};

/// Bytes of a mapping of stubs.
const PAGE_BYTES: u64 = 4096;
/// A near jump.
const JUMP_BYTES: u64 = 5;
/// An instruction of that length without effect.
const NOTHING: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// What a program or library says of its code.
#[derive(Debug)]
struct Code {
    /// Begin and end of each function; ascending.
    functions: Vec<(u64, u64)>,
    /// Parts that are loaded: begin, end, offset in the file.
    segments: Vec<(u64, u64, u64)>,
    /// Ranges, by offset, that are padding between functions; ascending.
    padding: Vec<(u64, u64)>,
}

/// What is known of files, by device and inode.
#[derive(Debug, Default)]
pub struct Files {
    code: HashMap<(u64, u64), Rc<Code>>,
    maps: Vec<Mapping>,
}

impl Files {
    /// The mapping at an address, as of the last look.
    pub(crate) fn mapping(&self, at: u64) -> Option<Mapping> {
        self.maps.iter().find(|m| (m.start..m.end).contains(&at)).cloned()
    }
}

/// Reads what a file says of its code.
fn code_of(path: &str) -> std::result::Result<Code, String> {
    let file = std::fs::File::open(path).map_err(|e| format!("{path}: {e}"))?;
    // SAFETY: the file is only read; should it be changed meanwhile, sites are compared with the bytes in
    // memory before anything is written.
    let data = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| format!("{path}: {e}"))?;
    let elf = object::File::parse(&*data).map_err(|e| format!("{path}: {e}"))?;
    let functions = functions(&elf);
    if functions.is_empty() {
        return Err(format!("{path} does not say where its functions are"));
    }
    let segments: Vec<(u64, u64, u64)> =
        elf.segments().map(|s| (s.address(), s.address() + s.file_range().1, s.file_range().0)).collect();
    let mut padding = Vec::new();
    let mut end = 0;
    for &(begin, stop) in &functions {
        if end != 0 && begin > end {
            let segment = segments.iter().find(|s| (s.0..s.1).contains(&end) && begin <= s.1);
            if let Some((address, _, offset)) = segment {
                let at = end - address + offset;
                let gap = data.get(at as usize..(begin - address + offset) as usize).unwrap_or_default();
                let idle = idle_bytes(gap) as u64;
                if idle >= JUMP_BYTES {
                    padding.push((at, at + idle));
                }
            }
        }
        end = end.max(stop);
    }
    Ok(Code { functions, segments, padding })
}

/// Where functions begin and end, as far as the file says; ascending.
pub(crate) fn functions(elf: &object::File<'_>) -> Vec<(u64, u64)> {
    let mut functions = frames(elf);
    for symbol in elf.symbols().chain(elf.dynamic_symbols()) {
        if symbol.kind() == SymbolKind::Text && symbol.size() > 0 {
            functions.push((symbol.address(), symbol.address() + symbol.size()));
        }
    }
    functions.sort_unstable();
    functions
}

/// Functions that `.eh_frame` describes.
fn frames(elf: &object::File<'_>) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let Some(section) = elf.section_by_name(".eh_frame") else { return out };
    let Ok(data) = section.data() else { return out };
    let frame = EhFrame::new(data, LittleEndian);
    let mut bases = BaseAddresses::default().set_eh_frame(section.address());
    if let Some(text) = elf.section_by_name(".text") {
        bases = bases.set_text(text.address());
    }
    if let Some(got) = elf.section_by_name(".got") {
        bases = bases.set_got(got.address());
    }
    let mut entries = frame.entries(&bases);
    while let Ok(Some(entry)) = entries.next() {
        if let CieOrFde::Fde(partial) = entry
            && let Ok(fde) = partial.parse(|section, bases, offset| section.cie_from_offset(bases, offset))
        {
            out.push((fde.initial_address(), fde.end_address()));
        }
    }
    out
}

/// Length of the instructions without effect that `code` begins with: `nop` in its lengths, and `int3`.
fn idle_bytes(code: &[u8]) -> usize {
    let mut at = 0;
    loop {
        let rest = &code[at..];
        let prefixes = rest.iter().take_while(|b| matches!(b, 0x66 | 0x2e)).count();
        let body = &rest[prefixes..];
        let length = match body {
            [0xcc, ..] if prefixes == 0 => 1,
            [0x90, ..] => 1,
            [0x0f, 0x1f, 0x00, ..] => 3,
            [0x0f, 0x1f, 0x40, 0x00, ..] => 4,
            [0x0f, 0x1f, 0x44, 0x00, 0x00, ..] => 5,
            [0x0f, 0x1f, 0x80, 0, 0, 0, 0, ..] => 7,
            [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, ..] => 8,
            _ => return at,
        };
        at += prefixes + length;
    }
}

/// The instruction before the site, if it is the one that loads the number: `mov $nr,%eax` has the five bytes of a
/// near jump. A jump of the program to the `syscall` itself still finds it, and stops there.
fn number_before(tid: i32, m: &Mapping, file: &Code, site: u64) -> Result<Option<[u8; 5]>> {
    let at = site - JUMP_BYTES;
    let mut mov = [0u8; 5];
    if at < m.start || tracee::read_mem(tid, at, &mut mov).is_err() || mov[0] != 0xb8 {
        return Ok(None);
    }
    let offset = at - m.start + m.offset;
    let Some(segment) = file.segments.iter().find(|s| (s.2..s.2 + s.1 - s.0).contains(&offset)) else {
        return Ok(None);
    };
    let target = offset - segment.2 + segment.0;
    let before = file.functions.partition_point(|f| f.0 <= target);
    let Some(&(begin, end)) = before.checked_sub(1).and_then(|i| file.functions.get(i)) else { return Ok(None) };
    // Rewriting keeps the lengths of instructions, so what is in memory is decoded as the file would be.
    let mut code = vec![0u8; (target - begin + JUMP_BYTES) as usize];
    if target >= end || code.len() > 1 << 20 || tracee::read_mem(tid, at - (target - begin), &mut code).is_err() {
        return Ok(None);
    }
    let begins = is_instruction(begin, &code, (target - begin) as usize, &[(begin, end)]);
    Ok((begins == Some(true)).then_some(mov))
}

impl Unit {
    /// Rewrites the call site at `site`, or says why not. The thread stands behind it.
    pub(crate) fn patch_site(&mut self, vtid: i32, site: u64) -> Result<std::result::Result<Site, String>> {
        let tid = self.tid(vtid);
        let mut code = [0u8; 2];
        if tracee::read_mem(tid, site, &mut code).is_err() || code != [0x0f, 0x05] {
            return Ok(Err("no plain call instruction".into()));
        }
        let Some(m) = self.mapping_of(site)? else { return Ok(Err("the code is not in a mapping".into())) };
        let exec = libc::PROT_READ as u32 | libc::PROT_EXEC as u32;
        if m.inode == 0 || m.shared || m.prot != exec {
            return Ok(Err("the code is not that of a file".into()));
        }
        let known = self.files.code.get(&(m.dev, m.inode)).cloned();
        let file = match known {
            Some(file) => file,
            None => {
                let path = m.path.clone();
                let file = match self.service.run(move || code_of(&path)) {
                    Ok(file) => Rc::new(file),
                    Err(why) => return Ok(Err(why)),
                };
                self.files.code.insert((m.dev, m.inode), Rc::clone(&file));
                file
            }
        };
        let number = number_before(tid, &m, &file, site)?;
        let (at, original, first) = match (number, self.free_padding(tid, &m, &file.padding, site)?) {
            (Some(mov), _) => (site - JUMP_BYTES, mov, mov),
            (None, Some((at, original))) => (at, original, NOTHING),
            (None, None) => return Ok(Err("no padding in reach".into())),
        };
        let Some(stub_at) = self.stub_memory(vtid, &m)? else {
            return Ok(Err("no memory in reach".into()));
        };
        poke_bytes(tid, stub_at, &stub(stub_at, site + 2, first))?;
        let mut jump = [0xe9, 0, 0, 0, 0];
        jump[1..].copy_from_slice(&(stub_at.wrapping_sub(at + JUMP_BYTES) as u32).to_le_bytes());
        poke_bytes(tid, at, &jump)?;
        if number.is_none() {
            poke_bytes(tid, site, &[0xeb, at.wrapping_sub(site + 2) as u8])?;
        }
        Ok(Ok(Site { stub: stub_at, padding: at, original: (code, original) }))
    }

    /// Executable mappings that meet a range, as they are now; ours and the kernel's are left out.
    pub(crate) fn executable(&mut self, range: &std::ops::Range<u64>) -> Result<Vec<Mapping>> {
        self.mapping_of(range.start)?;
        let ours = |m: &Mapping| {
            (REGION_BASE..REGION_END).contains(&m.start)
                || m.path.starts_with("[v")
                || self.model.sites.pages.iter().any(|p| p.0 == m.start)
        };
        let exec = |m: &&Mapping| m.prot & libc::PROT_EXEC as u32 != 0 && m.start < range.end && range.start < m.end;
        Ok(self.files.maps.iter().filter(exec).filter(|m| !ours(m)).cloned().collect())
    }

    fn mapping_of(&mut self, at: u64) -> Result<Option<Mapping>> {
        let pid = self.pid;
        let maps = self.service.run(move || read_maps(pid));
        self.files.maps = maps.map_err(|e| crate::unit::Halt::Broken(format!("reading the memory layout: {e}")))?;
        Ok(self.files.mapping(at))
    }

    /// Padding that a short jump from the site reaches and no other site uses, and what is in it.
    fn free_padding(&self, tid: i32, m: &Mapping, gaps: &[(u64, u64)], site: u64) -> Result<Option<(u64, [u8; 5])>> {
        let used: Vec<u64> = self.model.sites.sites.values().map(|s| s.padding).collect();
        let offset = |at: u64| at - m.start + m.offset;
        let low = (site + 2).saturating_sub(128).max(m.start);
        let high = (site + 2 + 127).min(m.end - JUMP_BYTES);
        let first = gaps.partition_point(|g| g.1 <= offset(low));
        for gap in gaps[first..].iter().take_while(|g| g.0 <= offset(high)) {
            let (begin, end) = (gap.0.max(m.offset) - m.offset + m.start, gap.1 - m.offset + m.start);
            let mut at = begin;
            while at + JUMP_BYTES <= end {
                let taken = used.iter().find(|u| **u < at + JUMP_BYTES && at < **u + JUMP_BYTES);
                if let Some(taken) = taken {
                    at = taken + JUMP_BYTES;
                    continue;
                }
                if (low..=high).contains(&at) {
                    let mut original = [0u8; 5];
                    tracee::read_mem(tid, at, &mut original)?;
                    return Ok(Some((at, original)));
                }
                if at > high {
                    break;
                }
                at = (at + JUMP_BYTES).max(low.min(end));
            }
        }
        Ok(None)
    }

    /// Room for a stub within reach of the mapping, in executable memory of ours.
    fn stub_memory(&mut self, vtid: i32, m: &Mapping) -> Result<Option<u64>> {
        const REACH: u64 = 1 << 30;
        let near = |at: u64| at.abs_diff(m.start) < REACH && at.abs_diff(m.end) < REACH;
        if let Some(page) = self.model.sites.pages.iter_mut().find(|p| near(p.0) && p.1 + STUB_BYTES <= PAGE_BYTES) {
            page.1 += STUB_BYTES;
            return Ok(Some(page.0 + page.1 - STUB_BYTES));
        }
        // The free memory nearest below, with room around it: what lies below may grow upwards (the heap).
        let room = 64 << 10;
        let mut below = m.start;
        let mut place = None;
        for other in self.files.maps.iter().rev().filter(|o| o.end <= m.start) {
            if below - other.end >= 4 * room {
                place = Some(below - room);
                break;
            }
            below = other.start;
        }
        let Some(at) = place.or_else(|| below.checked_sub(room).filter(|a| *a > 1 << 20)).filter(|a| near(*a)) else {
            return Ok(None);
        };
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let made = self.gate(vtid, libc::SYS_mmap, [at, PAGE_BYTES, prot, flags, u64::MAX, 0])?;
        if made != at as i64 {
            return Ok(None);
        }
        self.note_code(&(at..at + PAGE_BYTES));
        self.model.sites.pages.push((at, STUB_BYTES));
        Ok(Some(at))
    }
}

#[cfg(test)]
mod tests {
    use super::idle_bytes;

    #[test]
    fn only_instructions_without_effect_are_padding() {
        assert_eq!(idle_bytes(&[0x90, 0x66, 0x90, 0x0f, 0x1f, 0x40, 0x00, 0xc3]), 7);
        assert_eq!(idle_bytes(&[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0x55]), 10);
        assert_eq!(idle_bytes(&[0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0x48]), 5);
        assert_eq!(idle_bytes(&[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 1]), 0);
        assert_eq!(idle_bytes(&[0x66, 0xcc]), 0);
        assert_eq!(idle_bytes(&[0x55]), 0);
        assert_eq!(idle_bytes(&[]), 0);
    }
}
