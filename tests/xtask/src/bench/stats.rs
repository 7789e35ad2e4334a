//! Medians, ratios, and tables of them.

use std::fmt;

/// The middle value, or the mean of the two in the middle; none of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    sorted.get(sorted.len() / 2 - 1).map(|lower| lower.midpoint(upper))
}

/// How many times `base` the value is; none where that has no meaning.
pub(crate) fn ratio(value: Option<f64>, base: Option<f64>) -> Option<f64> {
    let (value, base) = (value?, base?);
    (base > 0.0).then_some(value / base)
}

/// A number with so many digits behind the point, or a dash.
pub(crate) fn show(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
}

/// Lines of cells under a heading: the first `left` columns are flush left, the others flush right.
#[derive(Debug)]
pub(crate) struct Table {
    left: usize,
    lines: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(left: usize, heading: [&str; N]) -> Self {
        Self { left, lines: vec![heading.map(str::to_owned).to_vec()] }
    }

    pub(crate) fn line(&mut self, cells: impl IntoIterator<Item = String>) {
        self.lines.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = Vec::new();
        for line in &self.lines {
            widths.resize(widths.len().max(line.len()), 0);
            // The last cell of a line that is shorter than the heading is a remark and may run on.
            let aligned = if line.len() < self.lines[0].len() { line.len().saturating_sub(1) } else { line.len() };
            for (width, cell) in widths.iter_mut().zip(&line[..aligned]) {
                *width = cell.chars().count().max(*width);
            }
        }
        for line in &self.lines {
            let mut text = String::new();
            for (n, (cell, width)) in line.iter().zip(&widths).enumerate() {
                let gap = if n == 0 { "" } else { "  " };
                let remark = n + 1 == line.len() && line.len() < self.lines[0].len();
                if n < self.left || remark {
                    text += &format!("{gap}{cell:<width$}");
                } else {
                    text += &format!("{gap}{cell:>width$}");
                }
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([]), None);
        assert_eq!(median([7.0]), Some(7.0));
        assert_eq!(median([9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 9.0, 2.0]), Some(3.0));
    }

    #[test]
    fn a_ratio_needs_both_and_a_base() {
        assert_eq!(ratio(Some(3.0), Some(4.0)), Some(0.75));
        assert_eq!(ratio(Some(3.0), Some(0.0)), None);
        assert_eq!(ratio(None, Some(4.0)), None);
        assert_eq!(ratio(Some(3.0), None), None);
    }

    #[test]
    fn numbers_are_rounded_and_missing_ones_dashed() {
        assert_eq!(show(Some(2.345), 1), "2.3");
        assert_eq!(show(Some(1234.5678), 0), "1235");
        assert_eq!(show(None, 3), "-");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_remarks_run_on() {
        let mut table = Table::new(1, ["name", "a", "ratio"]);
        table.line(["x".into(), "12345".into(), "0.50".into()]);
        table.line(["longer".into(), "failed: a long remark".into()]);
        table.line(["z".into(), "-".into(), "-".into()]);
        let want = "name        a  ratio\nx       12345   0.50\nlonger  failed: a long remark\nz           -      -\n";
        assert_eq!(table.to_string(), want);
    }
}
