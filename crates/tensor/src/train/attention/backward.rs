//! Gradients of queries, keys and values.
//!
//! With `P = exp(S − lse)` and `D = Σ dims dO·O` of each row: `dV = Pᵀ·dO`, `dP = dO·Vᵀ`, `dS = P·(dP − D)·scale`,
//! `dQ = dS·K`, `dK = dSᵀ·Q`.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::{Heads, KEYS, ROWS, STRIDE, columns_of, left, rows_of, run_longest_first, sequence};
use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;
use crate::train::matmul::{
    Begin, Bf16, F32, Left, Multiply, PackedA, PackedB, Precision, Reach, Steps, TILE_ROWS, View, multiply,
};

/// What forward read and wrote.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// `[rows × qkv_width]`.
    pub qkv: &'a [f32],
    /// `[rows × width]`.
    pub out: &'a [f32],
    /// `[heads × rows]`.
    pub lse: &'a [f32],
}

/// `dqkv` (`[rows × qkv_width]`, replaced) from the gradient `dout` of the output.
///
/// # Panics
/// If shapes don't fit or `starts` doesn't ascend from 0.
pub fn attention_backward(
    pool: &Pool,
    precision: Precision,
    heads: Heads,
    starts: &[usize],
    saved: Saved<'_>,
    dout: &[f32],
    dqkv: &mut [f32],
) {
    let rows = heads.check(starts, saved.qkv.len());
    assert_eq!(dqkv.len(), saved.qkv.len(), "a gradient has its value's length");
    assert_eq!(saved.out.len(), rows * heads.width(), "one output a row");
    assert_eq!(dout.len(), rows * heads.width(), "a gradient has its value's length");
    assert_eq!(saved.lse.len(), rows * heads.heads, "one number a row and head");
    let mut tasks = Vec::new();
    for index in 0..starts.len() {
        let (first, len) = sequence(starts, rows, index);
        if len > 0 {
            tasks.extend((0..heads.kv_heads).map(|kv_head| Task { first, len, kv_head }));
        }
    }
    let dqkv = Disjoint::new(dqkv);
    run_longest_first(
        pool,
        tasks,
        |task| task.len,
        |task| {
            SCRATCH.with_borrow_mut(|scratch| {
                let call = Backward { heads, rows, saved, dout, dqkv: &dqkv, task, scratch };
                match precision {
                    Precision::F32 => lanes::dispatch(pool.cpu(), Call::<F32>(call, PhantomData)),
                    Precision::Bf16 => lanes::dispatch(pool.cpu(), Call::<Bf16>(call, PhantomData)),
                }
            });
        },
    );
}

/// One sequence and one key-value head.
struct Task {
    first: usize,
    len: usize,
    kv_head: usize,
}

#[derive(Default)]
struct Scratch {
    /// Keys and values of the block, turned; and keys as they lie.
    keys_turned: PackedB,
    values_turned: PackedB,
    keys: PackedB,
    /// Queries, or gradients of outputs, of a tile's rows.
    right: PackedB,
    packed: PackedA,
    /// A tile of probabilities, and of their gradients.
    p: Vec<f32>,
    d: Vec<f32>,
    /// `D` of each head of the group and row of the sequence.
    dots: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Backward<'a> {
    heads: Heads,
    rows: usize,
    saved: Saved<'a>,
    dout: &'a [f32],
    dqkv: &'a Disjoint<'a, f32>,
    task: &'a Task,
    scratch: &'a mut Scratch,
}

struct Call<'a, M>(Backward<'a>, PhantomData<M>);

impl<M: Multiply> Kernel for Call<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Backward { heads, rows, saved: Saved { qkv, out, lse }, dout, dqkv, task, scratch } = self.0;
        let &Task { first, len, kv_head } = task;
        let (dim, stride, width, group) = (heads.head_dim, heads.qkv_width(), heads.width(), heads.group());
        let Scratch { keys_turned, values_turned, keys, right, packed, p, d, dots } = scratch;
        p.resize(ROWS * STRIDE, 0.0);
        d.resize(ROWS * STRIDE, 0.0);
        dots.clear();
        for head in 0..group {
            let at = (kv_head * group + head) * dim;
            for row in first..first + len {
                let from = row * width + at;
                dots.push(dot(l, &out[from..from + dim], &dout[from..from + dim]));
            }
        }
        let clear = |from: usize, count: usize| {
            for row in first..first + len {
                // SAFETY: this task alone has these rows of these heads; parts live one after the other.
                unsafe { dqkv.part(row * stride + from..row * stride + from + count) }.fill(0.0);
            }
        };
        // Gradients of queries begin with the first block of keys; those of keys and values are added to by every tile.
        clear(heads.key(kv_head), dim);
        clear(heads.value(kv_head), dim);
        let dims = Steps { from: 0, len: dim };
        // SAFETY: every use adds to rows and columns of this task's own heads, inside `dqkv`.
        let gradient = |row: usize, col: usize| (dqkv.at((first + row) * stride + col).cast_mut(), stride);
        for key in (0..len).step_by(KEYS) {
            let block = KEYS.min(len - key);
            let from = &qkv[(first + key) * stride..];
            let (k, v) = (&from[heads.key(kv_head)..], &from[heads.value(kv_head)..]);
            keys_turned.pack::<L, M>(l, View::new(k, stride).turned(), dims, (0, block));
            values_turned.pack::<L, M>(l, View::new(v, stride).turned(), dims, (0, block));
            let keys = columns_of::<L, M>(l, View::new(k, stride), block, dim, keys);
            for head in 0..group {
                let query_head = kv_head * group + head;
                for row in (key / ROWS * ROWS..len).step_by(ROWS) {
                    let tile_rows = ROWS.min(len - row);
                    let seen = block.min((row + tile_rows).saturating_sub(key));
                    if seen == 0 {
                        continue;
                    }
                    // What the last row of a panel sees, and the first row of the tile that sees any key of a panel.
                    let sees = |panel: usize| {
                        let last = row + tile_rows.min(panel + TILE_ROWS);
                        last.saturating_sub(key).min(seen)
                    };
                    // Whole vectors where there are any: the others are overwritten.
                    let scores = |a: Left<'_>, panel| {
                        let cols = sees(panel).next_multiple_of(LANES).min(block);
                        Reach { cols, ..Reach::all(a, 0) }
                    };
                    let queries_of = |a: Left<'_>, panel: usize| {
                        let first = (key + panel).saturating_sub(row).min(tile_rows) / M::VALUES;
                        Reach { cols: dim, steps: first..Reach::all(a, 0).steps.end }
                    };
                    let queries = View::new(&qkv[(first + row) * stride + query_head * dim..], stride);
                    let dout = View::new(&dout[(first + row) * width + query_head * dim..], width);
                    // SAFETY: the tiles have ROWS rows of STRIDE values.
                    unsafe {
                        let (keys, values) = (keys_turned.right(), values_turned.right());
                        let a = rows_of::<L, M>(l, queries, tile_rows, dims, packed);
                        let out = (p.as_mut_ptr(), STRIDE);
                        multiply::<L, M>(l, a, keys, |i| scores(a, i), out, Begin::Zero);
                        let a = rows_of::<L, M>(l, dout, tile_rows, dims, packed);
                        let out = (d.as_mut_ptr(), STRIDE);
                        multiply::<L, M>(l, a, values, |i| scores(a, i), out, Begin::Zero);
                    }
                    for index in 0..tile_rows {
                        let sees = (row + index + 1).saturating_sub(key).min(seen);
                        let lse = lse[query_head * rows + first + row + index];
                        let dot = dots[head * len + row + index];
                        let p = &mut p[index * STRIDE..][..STRIDE];
                        let d = &mut d[index * STRIDE..][..STRIDE];
                        probabilities(l, p, d, (sees, seen), (heads.scale, lse, dot));
                    }
                    let tile = (tile_rows, seen);
                    // SAFETY: `gradient` is inside `dqkv`, in rows and columns that this task alone has.
                    unsafe {
                        let dout = columns_of::<L, M>(l, dout, tile_rows, dim, right);
                        let a = left::<L, M>(l, p, tile, true, packed);
                        let out = gradient(key, heads.value(kv_head));
                        multiply::<L, M>(l, a, dout, |i| queries_of(a, i), out, Begin::There);
                        let queries = columns_of::<L, M>(l, queries, tile_rows, dim, right);
                        let a = left::<L, M>(l, d, tile, true, packed);
                        let out = gradient(key, heads.key(kv_head));
                        multiply::<L, M>(l, a, queries, |i| queries_of(a, i), out, Begin::There);
                        let a = left::<L, M>(l, d, tile, false, packed);
                        let reach = |panel| Reach { cols: dim, steps: 0..sees(panel).div_ceil(M::VALUES) };
                        let out = gradient(row, query_head * dim);
                        let begin = if key == 0 { Begin::Zero } else { Begin::There };
                        multiply::<L, M>(l, a, keys, reach, out, begin);
                    }
                }
            }
        }
    }
}

/// A row of scores in `p` to probabilities, and of their gradients in `d` to gradients of scores before the scale. The
/// row sees `sees` keys of the block, the tile `seen`; both are 0 past what it sees.
#[inline(always)]
fn probabilities<L: Lanes>(
    l: L,
    p: &mut [f32],
    d: &mut [f32],
    (sees, seen): (usize, usize),
    (scale, lse, dot): (f32, f32, f32),
) {
    let whole = sees.next_multiple_of(LANES);
    p[sees..whole].fill(f32::NEG_INFINITY);
    d[sees..whole].fill(0.0);
    // Neither another row of its panel sees more than a panel's rows further, nor do its keys' panels reach further.
    let zeros = whole..seen.min(sees + TILE_ROWS);
    if !zeros.is_empty() {
        p[zeros.clone()].fill(0.0);
        d[zeros].fill(0.0);
    }
    let (scale, lse, dot) = (l.splat(scale), l.splat(lse), l.splat(dot));
    for (p, d) in p[..whole].chunks_exact_mut(LANES).zip(d[..whole].chunks_exact_mut(LANES)) {
        let probability = l.exp(l.sub(l.mul(l.load(p), scale), lse));
        l.store(l.mul(l.mul(probability, l.sub(l.load(d), dot)), scale), d);
        l.store(probability, p);
    }
}

#[inline(always)]
fn dot<L: Lanes>(l: L, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = l.splat(0.0);
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sum = l.fma(l.load_first(a, a.len()), l.load_first(b, b.len()), sum);
    }
    l.sum(sum)
}
