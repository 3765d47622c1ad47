//! A tensor as a small picture in the terminal: a heat map of cells and a histogram in one line.

use flexmodel_run::stats;
use serde::Serialize;
use wire::dtype::DType;

use crate::text;

/// Most text lines of a heat map.
const LINES: usize = 16;
/// Widest heat map.
const COLUMNS: usize = 120;

/// Elements as numbers; complex ones by magnitude.
pub struct Values<'a> {
    dtype: DType,
    bytes: &'a [u8],
}

impl<'a> Values<'a> {
    /// Over row-major elements.
    pub fn new(dtype: DType, bytes: &'a [u8]) -> Self {
        Self { dtype, bytes }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Element `i`; NaN past the end.
    pub fn get(&self, i: usize) -> f64 {
        let size = self.dtype.size();
        self.bytes.get(i * size..(i + 1) * size).map_or(f64::NAN, |bytes| stats::to_f64(self.dtype, bytes))
    }
}

/// Counts of finite elements between the smallest and the largest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Histogram {
    /// Left edge of the first bin; `null` without a finite element.
    pub low: Option<f64>,
    /// Right edge of the last.
    pub high: Option<f64>,
    /// Elements in each bin.
    pub counts: Vec<u64>,
}

/// A histogram of at most `bins` bins; one bin where all elements are equal.
pub fn histogram(values: &Values<'_>, bins: usize) -> Histogram {
    let finite = || (0..values.len()).map(|i| values.get(i)).filter(|x| x.is_finite());
    let (low, high) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
    if low > high {
        return Histogram::default();
    }
    if low == high {
        return Histogram { low: Some(low), high: Some(high), counts: vec![finite().count() as u64] };
    }
    let mut counts = vec![0u64; bins];
    for x in finite() {
        // Halved first: the width of all float64 does not fit into one.
        let at = (x / 2.0 - low / 2.0) / (high / 2.0 - low / 2.0) * bins as f64;
        counts[(at as usize).min(bins - 1)] += 1;
    }
    Histogram { low: Some(low), high: Some(high), counts }
}

/// The histogram in one line.
pub fn sparkline(h: &Histogram) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let (Some(low), Some(high)) = (h.low, h.high) else { return String::new() };
    let top = h.counts.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&n: &u64| BARS[(n as f64 / top as f64 * 8.0).ceil() as usize];
    format!("{} {} {}\n", text::number(low), h.counts.iter().map(bar).collect::<String>(), text::number(high))
}

/// Columns of the terminal, 80 where there is none.
pub fn terminal_width() -> usize {
    // SAFETY: TIOCGWINSZ writes one winsize, which any bytes make; zeroed is one too.
    let columns = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size) == 0).then_some(size.ws_col)
    };
    columns.filter(|&c| c > 0).map_or(80, usize::from)
}

/// A heat map of the tensor seen as a matrix: rows are all leading dimensions, columns the last one.
///
/// In colour a cell is the mean of its elements, blue below zero and red above; in plain text the mean of magnitudes.
pub fn draw(values: &Values<'_>, shape: &[u64], width: usize, colour: bool) -> String {
    let n = values.len();
    if n == 0 {
        return "(no elements)\n".into();
    }
    if n == 1 {
        return format!("value {}\n", text::number(values.get(0)));
    }
    let columns = shape.last().map_or(1, |&c| c as usize).clamp(1, n);
    let rows = n / columns;
    // A plain cell is a character; in colour a character is two cells, one above the other.
    let lines = if colour { 2 * LINES } else { LINES };
    let (height, width) = (rows.min(lines), columns.min(width.saturating_sub(1).clamp(1, COLUMNS)));
    let mut cells = vec![0.0f64; height * width];
    for y in 0..height {
        let (top, bottom) = (y * rows / height, (y + 1) * rows / height);
        for x in 0..width {
            let (left, right) = (x * columns / width, (x + 1) * columns / width);
            let mut sum = 0.0;
            for row in top..bottom {
                for column in left..right {
                    let v = values.get(row * columns + column);
                    sum += if colour { v } else { v.abs() };
                }
            }
            cells[y * width + x] = sum / ((bottom - top) * (right - left)) as f64;
        }
    }
    let peak = cells.iter().filter(|c| c.is_finite()).fold(0.0f64, |m, c| m.max(c.abs()));
    let mut out = if colour { paint(&cells, width, peak) } else { shade(&cells, width, peak) };
    let elements = |a: usize, b: usize| a.div_ceil(b);
    let what = if colour { "mean" } else { "mean |x|" };
    out += &format!(
        "{rows} x {columns}; a cell is the {what} of up to {} x {} elements, the strongest {}",
        elements(rows, height),
        elements(columns, width),
        text::number(peak)
    );
    if cells.iter().any(|c| !c.is_finite()) {
        out += if colour { "; green: NaN or infinite" } else { "; !: NaN or infinite" };
    }
    out.push('\n');
    out
}

fn shade(cells: &[f64], width: usize, peak: f64) -> String {
    const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];
    let one = |&c: &f64| match c.is_finite() {
        false => '!',
        true if c == 0.0 || peak == 0.0 => ' ',
        true => SHADES[1 + ((c / peak * 4.0) as usize).min(3)],
    };
    cells.chunks(width).map(|row| row.iter().map(one).collect::<String>().trim_end().to_owned() + "\n").collect()
}

fn paint(cells: &[f64], width: usize, peak: f64) -> String {
    let rows: Vec<&[f64]> = cells.chunks(width).collect();
    let mut out = String::new();
    for pair in rows.chunks(2) {
        for x in 0..width {
            let (r, g, b) = tint(pair[0][x], peak);
            out += &format!("\x1b[38;2;{r};{g};{b}m");
            match pair.get(1) {
                Some(below) => {
                    let (r, g, b) = tint(below[x], peak);
                    out += &format!("\x1b[48;2;{r};{g};{b}m▀");
                }
                None => out += "\x1b[49m▀",
            }
        }
        out += "\x1b[0m\n";
    }
    out
}

/// White at zero, red towards `peak`, blue towards `-peak`, green where it is not finite.
fn tint(x: f64, peak: f64) -> (u8, u8, u8) {
    if !x.is_finite() {
        return (0, 160, 60);
    }
    // The square root keeps small values visible beside one large one.
    let t = if peak > 0.0 { (x.abs() / peak).min(1.0).sqrt() } else { 0.0 };
    let towards = |from: f64, to: f64| (from + (to - from) * t).round() as u8;
    let end = if x < 0.0 { (33.0, 90.0, 190.0) } else { (190.0, 40.0, 45.0) };
    (towards(245.0, end.0), towards(245.0, end.1), towards(245.0, end.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn a_plain_picture_has_the_tensors_rows_and_shades() {
        let bytes = floats(&[0.0, 1.0, 4.0, 0.1, f32::NAN, -4.0]);
        let out = draw(&Values::new(DType::Float32, &bytes), &[2, 3], 80, false);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[0], " ▒█");
        assert_eq!(lines[1], "░!█");
        assert!(lines[2].starts_with("2 x 3;"), "{out}");
    }

    #[test]
    fn colour_uses_half_blocks_and_ends_every_line_plain() {
        let bytes = floats(&[-1.0, 1.0, 0.5]);
        let out = draw(&Values::new(DType::Float32, &bytes), &[3, 1], 80, true);
        assert_eq!(out.matches('▀').count(), 2);
        assert_eq!(out.matches("\x1b[0m\n").count(), 2);
    }

    #[test]
    fn empty_single_and_constant_tensors_have_a_picture_too() {
        assert_eq!(draw(&Values::new(DType::Float32, &[]), &[0, 4], 80, false), "(no elements)\n");
        let bytes = floats(&[2.5]);
        assert_eq!(draw(&Values::new(DType::Float32, &bytes), &[], 80, false), "value 2.5\n");
        let bytes = floats(&[3.0; 8]);
        let h = histogram(&Values::new(DType::Float32, &bytes), 40);
        assert_eq!(h.counts, [8]);
    }

    #[test]
    fn a_histogram_counts_every_finite_element_once() {
        let bytes = floats(&[-1.0, 0.0, 1.0, f32::INFINITY, f32::NAN, 0.99]);
        let h = histogram(&Values::new(DType::Float32, &bytes), 4);
        assert_eq!(h.counts, [1, 0, 1, 2]);
        assert!(sparkline(&h).starts_with("-1 "));
    }

    #[test]
    fn a_huge_range_does_not_overflow() {
        let bytes: Vec<u8> = [f64::MIN, f64::MAX].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(histogram(&Values::new(DType::Float64, &bytes), 2).counts, [1, 1]);
    }
}
