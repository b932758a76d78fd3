use super::*;
use crate::buffer::Buffer;
use crate::test_support::{bits, cpus, uniform};
use crate::train::pitch;

/// The specification: one chain an element.
fn reference(extent: Extent, a: View<'_>, b: View<'_>, out: &mut [f32], add: bool) {
    let at = |view: View<'_>, row: usize, col: usize| {
        let (row, col) = if view.turned { (col, row) } else { (row, col) };
        view.values[row * view.stride + col]
    };
    for row in 0..extent.rows {
        for col in 0..extent.cols {
            let out = &mut out[row * extent.cols + col];
            let mut sum = if add { *out } else { 0.0 };
            for step in 0..extent.inner {
                sum = at(a, row, step).mul_add(at(b, step, col), sum);
            }
            *out = sum;
        }
    }
}

fn extents() -> Vec<Extent> {
    let sizes = [
        (1, 1, 1),
        (12, 32, 16),
        (13, 33, 17),
        (5, 70, 300),
        (100, 90, 515),
        (100, 96, 800),
        (25, 16, 40),
        (3, 4, 0),
    ];
    sizes.map(|(rows, cols, inner)| Extent { rows, cols, inner }).to_vec()
}

/// Values that begin at a cache line, as those of training do: only these are read where they lie.
fn aligned(values: &[f32]) -> Buffer<f32> {
    let mut buffer = Buffer::zeroed(values.len()).unwrap();
    buffer.copy_from_slice(values);
    buffer
}

#[test]
fn f32_is_the_specification_bit_for_bit_in_every_family_and_turn() {
    // Rows that are copied because they begin anywhere, that are read where they lie, and that are copied because they
    // crowd a few sets of a cache.
    let strides: [fn(usize) -> usize; 3] = [|width| width + 3, pitch, |width| width.next_multiple_of(512)];
    for extent in extents() {
        let Extent { rows, cols, inner } = extent;
        let turns = [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 1), (0, 0, 2), (1, 0, 0)];
        for ((turn_a, turn_b, store), stride) in turns.into_iter().flat_map(|t| strides.map(|s| (t, s))) {
            let stride =
                |turned: usize, rows: usize, cols: usize| stride(if turned == 1 { rows } else { cols });
            let (stride_a, stride_b) = (stride(turn_a, rows, inner), stride(turn_b, inner, cols));
            // No more than the last row needs: nothing may be read behind it.
            let len = |turned: usize, rows: usize, cols: usize, stride: usize| {
                let (rows, cols) = if turned == 1 { (cols, rows) } else { (rows, cols) };
                rows.saturating_sub(1) * stride + cols
            };
            let a = aligned(&uniform(1, len(turn_a, rows, inner, stride_a)));
            let b = aligned(&uniform(2, len(turn_b, inner, cols, stride_b)));
            let a = View { values: &a, stride: stride_a, turned: turn_a == 1 };
            let b = View { values: &b, stride: stride_b, turned: turn_b == 1 };
            let (begun, other) = (uniform(3, rows * cols), uniform(4, rows * cols));
            let mut want = if store == 2 { other.clone() } else { begun.clone() };
            reference(extent, a, b, &mut want, store > 0);
            for cpu in cpus() {
                for threads in [1, 3] {
                    let mut out = begun.clone();
                    let store = [Store::Replace, Store::Add, Store::AddTo(&other)][store];
                    matmul(&Pool::new(threads, cpu), Precision::F32, extent, a, b, (&mut out, cols), store);
                    assert!(
                        bits(&out) == bits(&want),
                        "{extent:?} {turn_a}{turn_b} {stride_a} {cpu:?} {threads}"
                    );
                }
            }
        }
    }
}

#[test]
fn bf16_is_close_to_the_exact_sum_of_rounded_inputs_and_alike_in_every_turn_and_thread_count() {
    let round = |x: &[f32]| -> Vec<f32> {
        x.iter().map(|&x| f32::from_bits(crate::lanes::bf16_pair(x, 0.0) << 16)).collect()
    };
    for extent in extents() {
        let Extent { rows, cols, inner } = extent;
        let (a, b) = (uniform(1, rows * inner), uniform(2, inner * cols));
        let turned = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
        };
        let (a_turned, b_turned) = (turned(&a, rows, inner), turned(&b, inner, cols));
        let (ra, rb) = (round(&a), round(&b));
        for cpu in cpus() {
            let mut first: Option<Vec<u32>> = None;
            for threads in [1, 3] {
                for (turn_a, turn_b) in [(false, false), (true, false), (false, true), (true, true)] {
                    let a = if turn_a { View::new(&a_turned, rows).turned() } else { View::new(&a, inner) };
                    let b = if turn_b { View::new(&b_turned, inner).turned() } else { View::new(&b, cols) };
                    let mut out = vec![0.5; rows * cols];
                    let pool = Pool::new(threads, cpu);
                    matmul(&pool, Precision::Bf16, extent, a, b, (&mut out, cols), Store::Replace);
                    assert!(*first.get_or_insert_with(|| bits(&out)) == bits(&out), "{extent:?} {cpu:?}");
                    for (i, out) in out.iter().enumerate() {
                        let terms = (0..inner).map(|k| {
                            f64::from(ra[i / cols * inner + k]) * f64::from(rb[k * cols + i % cols])
                        });
                        let want: f64 = terms.sum();
                        assert!((f64::from(*out) - want).abs() < 2e-5, "{extent:?} {i}: {out} {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn rounding_to_bf16_is_to_nearest_even_and_keeps_what_is_no_number() {
    for (x, want) in [
        (1.0f32, 0x3F80),
        (f32::from_bits(0x3F80_8000), 0x3F80),
        (f32::from_bits(0x3F81_8000), 0x3F82),
        (f32::from_bits(0x3F80_8001), 0x3F81),
        (f32::INFINITY, 0x7F80),
        (f32::MAX, 0x7F80),
        (-1e-40, 0x8000),
    ] {
        assert_eq!(crate::lanes::bf16_pair(x, 0.0), want, "{x}");
    }
    assert!(f32::from_bits(crate::lanes::bf16_pair(f32::from_bits(0x7F80_0001), 0.0) << 16).is_nan());
}

#[test]
#[should_panic(expected = "leave 11 values")]
fn memory_that_is_too_short_is_refused() {
    let extent = Extent { rows: 3, cols: 4, inner: 2 };
    let (a, b) = ([0.0; 6], [0.0; 8]);
    let pool = Pool::new(1, crate::Cpu::detect());
    let mut out = [0.0; 11];
    matmul(&pool, Precision::F32, extent, View::new(&a, 2), View::new(&b, 4), (&mut out, 4), Store::Replace);
}

#[test]
fn every_panel_and_piece_has_one_task_and_threads_get_as_many_each() {
    for threads in [1, 2, 3, 8] {
        for (panels, pieces) in [(171, 12), (96, 4), (32, 2), (29, 3), (5, 40), (1, 7), (1, 1)] {
            let (down, across) = tasks(panels, pieces, threads);
            let mut seen = vec![0; panels * pieces];
            for (row, col) in (0..down).flat_map(|row| (0..across).map(move |col| (row, col))) {
                let (rows, cols) = (part(panels, down, row), part(pieces, across, col));
                assert!((1..=TASK_PANELS).contains(&rows.len()) && !cols.is_empty());
                rows.for_each(|row| cols.clone().for_each(|col| seen[row * pieces + col] += 1));
            }
            assert!(seen.iter().all(|&tasks| tasks == 1), "{panels} × {pieces} on {threads}: {seen:?}");
            let even = (down * across).is_multiple_of(threads) || panels * pieces < 16 * threads;
            assert!(even, "{panels} × {pieces} on {threads}: {down} × {across} tasks");
        }
    }
}

#[test]
fn a_right_side_of_more_than_is_packed_at_a_time_gives_the_same_bits() {
    let extent = Extent { rows: 14, cols: 200, inner: 16_000 };
    let (a, b) = (uniform(1, extent.rows * extent.inner), uniform(2, extent.inner * extent.cols));
    assert!(extent.inner * extent.cols > SHARED_WORDS);
    let (a, b) = (View::new(&a, extent.inner), View::new(&b, extent.cols));
    let mut want = vec![0.0; extent.rows * extent.cols];
    reference(extent, a, b, &mut want, false);
    for threads in [1, 3] {
        let mut out = vec![0.0; want.len()];
        let pool = Pool::new(threads, crate::Cpu::detect());
        matmul(&pool, Precision::F32, extent, a, b, (&mut out, extent.cols), Store::Replace);
        assert!(bits(&out) == bits(&want), "{threads} threads");
    }
}
