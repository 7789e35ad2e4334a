//! The rows of all areas, merged by number when the crate is compiled.

use super::{Row, file, memory, net, other, process, signal, time};

const AREAS: [&[Row]; 7] = [file::ROWS, net::ROWS, memory::ROWS, process::ROWS, signal::ROWS, time::ROWS, other::ROWS];

const COUNT: usize = {
    let mut n = 0;
    let mut a = 0;
    while a < AREAS.len() {
        n += AREAS[a].len();
        a += 1;
    }
    n
};

/// Numbers from here on have no row.
pub(super) const NUMBERS: usize = 512;

/// Where each number's row stands: area and position in it.
const PLACES: [Option<(u8, u16)>; NUMBERS] = {
    let mut places = [None; NUMBERS];
    let mut a = 0;
    while a < AREAS.len() {
        let mut i = 0;
        while i < AREAS[a].len() {
            let nr = AREAS[a][i].nr as usize;
            assert!(places[nr].is_none(), "two rows for one number");
            places[nr] = Some((a as u8, i as u16));
            i += 1;
        }
        a += 1;
    }
    places
};

static TABLE: [Row; COUNT] = {
    let mut all = [AREAS[0][0]; COUNT];
    let (mut n, mut nr) = (0, 0);
    while nr < NUMBERS {
        if let Some((area, i)) = PLACES[nr] {
            all[n] = AREAS[area as usize][i as usize];
            n += 1;
        }
        nr += 1;
    }
    all
};

/// All rows, in ascending order of number.
pub static ROWS: &[Row] = &TABLE;

/// For each number the position of its row in [`ROWS`], or `u16::MAX`.
pub(super) static POSITIONS: [u16; NUMBERS] = {
    let mut positions = [u16::MAX; NUMBERS];
    let (mut n, mut nr) = (0, 0);
    while nr < NUMBERS {
        if PLACES[nr].is_some() {
            positions[nr] = n;
            n += 1;
        }
        nr += 1;
    }
    positions
};
