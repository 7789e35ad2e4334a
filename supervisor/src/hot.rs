//! Which call sites keep the supervisor busy, and why they are not served in the process.

use std::collections::HashMap;

use ftrun_abi::table;
use object::{Object, ObjectSegment, ObjectSymbol, SymbolKind};

use crate::status::SlowSite;
use crate::unit::Unit;

/// How many are shown.
const SHOWN: usize = 8;

/// Slow calls by site.
#[derive(Debug, Default)]
pub struct Hot {
    sites: HashMap<u64, Count>,
    symbols: HashMap<u64, Option<String>>,
}

#[derive(Debug, Default)]
struct Count {
    calls: u64,
    nr: u64,
}

impl Unit {
    /// Counts a call that stopped; `back` is the address behind its site.
    pub(crate) fn count_slow(&mut self, back: u64, nr: u64) {
        let count = self.hot.sites.entry(back - 2).or_default();
        count.calls += 1;
        count.nr = nr;
    }

    /// The sites with the most slow calls, for the status.
    pub(crate) fn slow_sites(&mut self) -> Vec<SlowSite> {
        let mut order: Vec<(u64, u64, u64)> = self.hot.sites.iter().map(|(at, c)| (c.calls, *at, c.nr)).collect();
        order.sort_unstable_by(|a, b| b.cmp(a));
        order.truncate(SHOWN);
        order.into_iter().map(|(calls, at, nr)| self.slow_site(calls, at, nr)).collect()
    }

    fn slow_site(&mut self, calls: u64, at: u64, nr: u64) -> SlowSite {
        let mapping = self.files.mapping(at);
        let place = mapping.as_ref().map(|m| (m.path.clone(), at - m.start + m.offset));
        if !self.hot.symbols.contains_key(&at) {
            let found = place.clone().and_then(|(path, offset)| self.service.run(|| symbol(&path, offset)));
            self.hot.symbols.insert(at, found);
        }
        let sites = &self.model.sites;
        let why = match sites.refused.get(&at) {
            _ if !self.uses_shim() => "there is no shim".to_owned(),
            Some(why) => why.clone(),
            None if sites.sites.contains_key(&at) => "the call needs the supervisor".to_owned(),
            None => "the site has been used only a few times".to_owned(),
        };
        SlowSite {
            address: format!("{at:#x}"),
            file: place.map_or(String::new(), |p| p.0),
            symbol: self.hot.symbols.get(&at).cloned().flatten(),
            call: table::lookup(nr, &[0; 6]).name.to_owned(),
            calls,
            why,
        }
    }
}

/// The function at a file offset.
fn symbol(path: &str, offset: u64) -> Option<String> {
    let file = std::fs::File::open(path).ok()?;
    // SAFETY: the file is only read, and what comes of it is only shown.
    let data = unsafe { memmap2::Mmap::map(&file) }.ok()?;
    let elf = object::File::parse(&*data).ok()?;
    let within = |s: &object::Segment<'_, '_>| {
        let (begin, size) = s.file_range();
        (begin..begin + size).contains(&offset)
    };
    let address = elf.segments().find(within).map(|s| offset - s.file_range().0 + s.address())?;
    elf.symbols()
        .chain(elf.dynamic_symbols())
        .filter(|s| s.kind() == SymbolKind::Text && (s.address()..s.address() + s.size()).contains(&address))
        .find_map(|s| Some(s.name().ok()?.to_owned()))
}
