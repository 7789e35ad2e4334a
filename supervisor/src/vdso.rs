//! The kernel's shared object, vdso(7): hidden from the program, whose time has to be logged, and used by
//! the shim, which reads the time there without a system call.

use std::fs;
use std::sync::OnceLock;

use ftrun_abi::fast::VDSO_BASE;
use object::{Object, ObjectSymbol};

/// Where the kernel has mapped the object and its data in this process, and so in each one forked from it:
/// begin and end, ascending. Reads a file when it is called first.
pub fn areas() -> &'static [(u64, u64)] {
    static AREAS: OnceLock<Vec<(u64, u64)>> = OnceLock::new();
    AREAS.get_or_init(|| {
        let maps = fs::read("/proc/self/maps").ok().and_then(|text| ftrun_ckpt::maps::parse_maps(&text).ok());
        let ours = |path: &str| path.starts_with("[vvar") || path == "[vdso]";
        maps.unwrap_or_default().into_iter().filter(|m| ours(&m.path)).map(|m| (m.start, m.end)).collect()
    })
}

/// Where an area lies in a unit: all keep their distance from each other.
pub fn moved(areas: &[(u64, u64)], at: u64) -> u64 {
    VDSO_BASE + at - areas.first().map_or(at, |a| a.0)
}

/// Address in a unit of `__vdso_clock_gettime`; 0 if there is none.
pub fn clock_gettime(areas: &[(u64, u64)]) -> u64 {
    // SAFETY: a query without side effects.
    let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    let Some((_, end)) = areas.iter().find(|a| a.0 == base) else { return 0 };
    // SAFETY: the kernel maps these bytes, readable, for as long as the process lives.
    let image = unsafe { std::slice::from_raw_parts(base as *const u8, (end - base) as usize) };
    let Ok(elf) = object::File::parse(image) else { return 0 };
    let found = elf.dynamic_symbols().find(|s| s.name() == Ok("__vdso_clock_gettime")).map(|s| s.address());
    found.map_or(0, |offset| moved(areas, base + offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_found_in_the_object() {
        let areas = areas();
        let at = clock_gettime(areas);
        let object = areas.last().copied().unwrap_or_default();
        let end = moved(areas, object.1);
        assert!((moved(areas, object.0)..end).contains(&at), "{at:#x} in {areas:x?}");
    }
}
