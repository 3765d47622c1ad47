//! Tests of the picture.

use std::cell::Cell as Counter;

use super::*;

/// Draws a tensor given as its elements.
fn drawn(shape: &[u64], values: &[f64]) -> Picture {
    let leading = &shape[..shape.len().saturating_sub(1)];
    let cols = shape.last().copied().unwrap_or(1) as usize;
    let read = |row: &[u64], start: u64, out: &mut [f64]| {
        let flat = row.iter().zip(leading).fold(0, |flat, (at, dim)| flat * dim + at) as usize;
        let from = flat * cols + start as usize;
        out.copy_from_slice(&values[from..from + out.len()]);
        Ok(())
    };
    draw(shape, &read, None).unwrap()
}

#[test]
fn a_small_tensor_is_drawn_element_by_element() {
    let p = drawn(&[2, 1, 2], &[1.0, -2.0, 3.0, 0.0]);
    assert_eq!((p.heat.rows, p.heat.cols), (2, 2));
    assert_eq!(p.heat.mean, [Some(1.0), Some(-2.0), Some(3.0), Some(0.0)]);
    assert!(p.heat.peak.is_empty() && p.heat.bad.is_empty());
    assert_eq!((p.elements, p.sampled, p.stats.count, p.stats.zero), (4, 4, 4, 1));
    assert_eq!((p.histogram.low, p.histogram.high, p.histogram.bins.iter().sum::<u64>()), (-2.0, 3.0, 4));
    assert_eq!((p.histogram.bins[0], p.histogram.bins[BINS - 1]), (1, 1));
}

#[test]
fn a_cell_of_many_elements_has_their_mean_and_their_peak() {
    let values: Vec<f64> = (0..2 * COLS).map(|i| if i % 2 == 0 { 1.0 } else { -3.0 }).collect();
    let p = drawn(&[2 * COLS], &values);
    assert_eq!((p.heat.rows, p.heat.cols), (1, COLS));
    assert!(p.heat.mean.iter().all(|x| *x == Some(-1.0)));
    assert!(p.heat.peak.iter().all(|x| *x == Some(-3.0)));
}

#[test]
fn empty_and_single_tensors_have_pictures_too() {
    for shape in [vec![0], vec![3, 0, 2], vec![u64::MAX, 7, 0]] {
        let p = drawn(&shape, &[]);
        assert_eq!((p.elements, p.heat.rows, p.heat.mean.len(), p.histogram.bins.len()), (0, 0, 0, 0));
    }
    let p = drawn(&[], &[4.5]);
    assert_eq!((p.heat.rows, p.heat.cols, p.heat.mean[0]), (1, 1, Some(4.5)));
    assert_eq!(p.histogram.bins.iter().sum::<u64>(), 1);
}

#[test]
fn what_is_not_finite_is_marked_and_not_counted() {
    let p = drawn(&[4], &[f64::NAN, f64::INFINITY, 1.0, 2.0]);
    assert_eq!(p.heat.bad, [0, 1]);
    assert_eq!(p.heat.mean, [None, None, Some(1.0), Some(2.0)]);
    assert_eq!((p.stats.nan, p.stats.inf, p.histogram.bins.iter().sum::<u64>()), (1, 1, 2));
    assert!(drawn(&[1], &[f64::NAN]).histogram.bins.is_empty());
}

#[test]
fn the_widest_range_of_numbers_has_a_histogram() {
    let p = drawn(&[3], &[-f64::MAX, 0.0, f64::MAX]);
    assert_eq!((p.histogram.bins[0], p.histogram.bins[BINS / 2], p.histogram.bins[BINS - 1]), (1, 1, 1));
}

#[test]
fn the_work_for_a_huge_tensor_is_bounded() {
    for shape in [vec![1 << 20, 1 << 14], vec![1 << 40], vec![1 << 40, 1], vec![3, 1 << 21], vec![1 << 21, 3]] {
        let read = Counter::new(0u64);
        let count = |_: &[u64], _, out: &mut [f64]| {
            read.set(read.get() + out.len() as u64);
            Ok(())
        };
        let p = draw(&shape, &count, None).unwrap();
        assert!(read.get() <= ROWS * SAMPLE_ROWS * COLS * SAMPLE_RUN, "{shape:?}: {}", read.get());
        assert!(p.stats_sampled && p.sampled == read.get() && p.sampled > 0);
    }
}

#[test]
fn known_statistics_stand_in_for_those_of_a_sample() {
    let known = Stats { count: 1 << 30, mean: Some(1.0), ..Stats::default() };
    let p = draw(&[1 << 30], &|_, _, _| Ok(()), Some(known)).unwrap();
    assert_eq!((p.stats, p.stats_sampled), (known, false));
}

#[test]
fn shares_cover_everything_once() {
    for (pieces, whole) in [(1, 1), (3, 10), (96, 97), (192, 1 << 40)] {
        let mut next = 0;
        for i in 0..pieces {
            let (from, to) = share(i, pieces, whole);
            assert!(from == next && to > from);
            next = to;
        }
        assert_eq!(next, whole);
    }
}
