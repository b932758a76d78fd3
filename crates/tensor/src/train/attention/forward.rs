//! Outputs and the logarithms of the denominators.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::{Heads, KEYS, ROWS, STRIDE, columns_of, left, rows_of, run_longest_first, sequence};
use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;
use crate::train::matmul::{
    Begin, Bf16, F32, Multiply, PackedA, PackedB, Precision, Reach, Steps, TILE_ROWS, View, multiply,
};

/// Rows of a task: they share the packed keys and values.
const TASK_ROWS: usize = 256;

/// `out` (`[rows × width]`) and `lse` (`[heads × rows]`) of the packed sequences in `qkv` (`[rows × qkv_width]`), which
/// begin at the rows `starts`.
///
/// # Panics
/// If shapes don't fit or `starts` doesn't ascend from 0.
pub fn attention(
    pool: &Pool,
    precision: Precision,
    heads: Heads,
    starts: &[usize],
    qkv: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let rows = heads.check(starts, qkv.len());
    assert_eq!(out.len(), rows * heads.width(), "one output a row");
    assert_eq!(lse.len(), rows * heads.heads, "one number a row and head");
    let mut tasks = Vec::new();
    for index in 0..starts.len() {
        let (first, len) = sequence(starts, rows, index);
        for begin in (0..len).step_by(TASK_ROWS) {
            let end = len.min(begin + TASK_ROWS);
            tasks.extend((0..heads.kv_heads).map(|kv_head| Task { first, begin, end, kv_head }));
        }
    }
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    run_longest_first(
        pool,
        tasks,
        |task| task.end * (task.end - task.begin),
        |task| {
            SCRATCH.with_borrow_mut(|scratch| {
                let attend = Attend { heads, rows, qkv, out: &out, lse: &lse, task, scratch };
                match precision {
                    Precision::F32 => lanes::dispatch(pool.cpu(), Call::<F32>(attend, PhantomData)),
                    Precision::Bf16 => lanes::dispatch(pool.cpu(), Call::<Bf16>(attend, PhantomData)),
                }
            });
        },
    );
}

/// Rows `begin..end` of the sequence that starts at row `first`, with the query heads of one group.
struct Task {
    first: usize,
    begin: usize,
    end: usize,
    kv_head: usize,
}

#[derive(Default)]
struct Scratch {
    keys: PackedB,
    values: PackedB,
    packed: PackedA,
    /// A tile of scores, then of probabilities.
    scores: Vec<f32>,
    /// Maximum and denominator so far, of each head of the group and row of the task.
    maxima: Vec<f32>,
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Attend<'a> {
    heads: Heads,
    rows: usize,
    qkv: &'a [f32],
    out: &'a Disjoint<'a, f32>,
    lse: &'a Disjoint<'a, f32>,
    task: &'a Task,
    scratch: &'a mut Scratch,
}

struct Call<'a, M>(Attend<'a>, PhantomData<M>);

impl<M: Multiply> Kernel for Call<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Attend { heads, rows, qkv, out, lse, task, scratch } = self.0;
        let &Task { first, begin, end, kv_head } = task;
        let (dim, stride, group) = (heads.head_dim, heads.qkv_width(), heads.group());
        let Scratch { keys, values, packed, scores, maxima, sums } = scratch;
        let count = end - begin;
        scores.resize(ROWS * STRIDE, 0.0);
        maxima.clear();
        maxima.resize(group * count, f32::MIN);
        sums.clear();
        sums.resize(group * count, 0.0);
        let dims = Steps { from: 0, len: dim };
        for key in (0..end).step_by(KEYS) {
            let block = KEYS.min(end - key);
            let from = &qkv[(first + key) * stride..];
            keys.pack::<L, M>(l, View::new(&from[heads.key(kv_head)..], stride).turned(), dims, (0, block));
            let values =
                columns_of::<L, M>(l, View::new(&from[heads.value(kv_head)..], stride), block, dim, values);
            for head in 0..group {
                let query_head = kv_head * group + head;
                // Rows before the block see none of it.
                let visible = begin + (key.saturating_sub(begin) / ROWS * ROWS);
                for row in (visible..end).step_by(ROWS) {
                    let tile_rows = ROWS.min(end - row);
                    let seen = block.min(row + tile_rows - key);
                    // What the last row of a panel sees is all that the panel needs.
                    let sees = |panel: usize| {
                        let last = row + tile_rows.min(panel + TILE_ROWS);
                        last.saturating_sub(key).min(seen)
                    };
                    let queries = View::new(&qkv[(first + row) * stride + query_head * dim..], stride);
                    let queries = rows_of::<L, M>(l, queries, tile_rows, dims, packed);
                    // SAFETY: the tile has ROWS rows of STRIDE values.
                    unsafe {
                        // Whole vectors where there are any: the others are overwritten.
                        let cols = |panel| sees(panel).next_multiple_of(LANES).min(block);
                        let reach = |panel| Reach { cols: cols(panel), ..Reach::all(queries, 0) };
                        multiply::<L, M>(
                            l,
                            queries,
                            keys.right(),
                            reach,
                            (scores.as_mut_ptr(), STRIDE),
                            Begin::Zero,
                        );
                    }
                    for index in 0..tile_rows {
                        let at = head * count + row - begin + index;
                        // SAFETY: this task alone has these rows of this head; parts live one after the other.
                        let out = unsafe {
                            let from = (first + row + index) * heads.width() + query_head * dim;
                            out.part(from..from + dim)
                        };
                        let scores = &mut scores[index * STRIDE..][..STRIDE];
                        let sees = (row + index + 1).saturating_sub(key).min(seen);
                        let state = (&mut maxima[at], &mut sums[at]);
                        softmax(l, scores, (sees, seen), heads.scale, state, out);
                    }
                    let left = left::<L, M>(l, scores, (tile_rows, seen), false, packed);
                    // SAFETY: this task alone has these rows of this head, and they are inside `out`.
                    unsafe {
                        let out = out.at((first + row) * heads.width() + query_head * dim).cast_mut();
                        let reach = |panel| Reach { cols: dim, steps: 0..sees(panel).div_ceil(M::VALUES) };
                        let first = if key == 0 { Begin::Zero } else { Begin::There };
                        multiply::<L, M>(l, left, values, reach, (out, heads.width()), first);
                    }
                }
            }
        }
        for head in 0..group {
            let query_head = kv_head * group + head;
            let from = query_head * rows + first + begin;
            // SAFETY: this task alone has these rows of this head.
            let lse = unsafe { lse.part(from..from + count) };
            for (index, lse) in lse.iter_mut().enumerate() {
                let at = head * count + index;
                *lse = maxima[at] + sums[at].ln();
                let from = (first + begin + index) * heads.width() + query_head * dim;
                // SAFETY: as above; parts live one after the other.
                scale(l, unsafe { out.part(from..from + dim) }, 1.0 / sums[at]);
            }
        }
    }
}

/// One row of scores to probabilities under the maximum so far: the row sees `sees` keys of the block, the tile `seen`.
/// What was summed under the older maximum is scaled to the new one.
#[inline(always)]
fn softmax<L: Lanes>(
    l: L,
    scores: &mut [f32],
    (sees, seen): (usize, usize),
    factor: f32,
    (maximum, sum): (&mut f32, &mut f32),
    out: &mut [f32],
) {
    let whole = sees.next_multiple_of(LANES);
    scores[sees..whole].fill(f32::NEG_INFINITY);
    // No other row of its panel sees more than a panel's rows further.
    let zeros = whole..seen.min(sees + TILE_ROWS);
    if !zeros.is_empty() {
        scores[zeros].fill(0.0);
    }
    if sees == 0 {
        return;
    }
    let factor = l.splat(factor);
    let mut max = l.splat(*maximum);
    for x in scores[..whole].chunks_exact_mut(LANES) {
        let score = l.mul(l.load(x), factor);
        max = l.max(max, score);
        l.store(score, x);
    }
    let max = l.largest(max);
    let all = l.splat(max);
    let mut total = l.splat(0.0);
    for x in scores[..whole].chunks_exact_mut(LANES) {
        let p = l.exp(l.sub(l.load(x), all));
        total = l.add(total, p);
        l.store(p, x);
    }
    if max > *maximum && *sum > 0.0 {
        let older = l.array(l.exp(l.splat(*maximum - max)))[0];
        *sum *= older;
        scale(l, out, older);
    }
    *maximum = max;
    *sum += l.sum(total);
}

#[inline(always)]
fn scale<L: Lanes>(l: L, x: &mut [f32], factor: f32) {
    for x in x.chunks_mut(LANES) {
        let n = x.len();
        l.store_first(l.mul(l.load_first(x, n), l.splat(factor)), x, n);
    }
}
