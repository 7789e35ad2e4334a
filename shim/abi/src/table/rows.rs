//! The rows.
use super::Row;
/// All rows, in ascending order of number.
pub static ROWS: &[Row] = &[];
