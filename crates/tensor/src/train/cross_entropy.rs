//! The head and its loss in one: logits, softmax, cross-entropy and all three gradients, a few hundred rows at a time.
//!
//! The logits of a batch would be its largest tensor by far (4 × 256 rows of 49,152 values are 200 MB), and each is
//! used once. So a chunk of rows goes all the way: `Zᵀ = E·Xᵀ`, the softmax over columns of `Zᵀ`,
//! `dZ = w·(softmax − one-hot)` over `Z` itself, then `dX = dZ·E` and `dE += dZᵀ·X`. Logits are kept turned, a
//! row a token of the vocabulary, so that the large matrix is on the side whose packing is a plain copy, and
//! sixteen rows' sums share a vector.
//!
//! Rows of weight 0 (prompts, padding) are left out before anything is computed.
//!
//! # The order of sums
//!
//! A row's maximum and sum of exponentials are taken over blocks of 64 tokens, in order, and the blocks' merged in
//! order. Losses are added in `f64` in the order of rows, and `dE` is a chain over the rows in order.

use crate::Pool;
use crate::buffer::Buffer;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::{Error, norm};

use super::matmul::{Extent, Precision, Store, View, matmul};
use super::{clear, pitch};

/// Logits that are in memory at a time, at most: 64 MiB.
const CHUNK_VALUES: usize = 16 << 20;
/// Rows of a chunk, at most; a whole number of vectors.
const CHUNK_ROWS: usize = 512;
/// Tokens of the vocabulary whose exponentials are summed before blocks are merged.
const VOCAB_BLOCK: usize = 64;

/// What every row should have predicted.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The token of each row; any value where the weight is 0.
    pub tokens: &'a [u32],
    /// Multiplies each row's loss and gradient; 0 leaves the row out.
    pub weights: &'a [f32],
}

/// The loss of some rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// `Σ weight · −log p(target)`, in nats.
    pub sum: f64,
    /// `Σ weight`: divide by it for the mean.
    pub weight: f64,
    /// Rows whose weight isn't 0.
    pub rows: usize,
}

impl Loss {
    /// The mean over weights, in nats a token; 0 for no rows.
    pub fn mean(&self) -> f64 {
        if self.weight > 0.0 { self.sum / self.weight } else { 0.0 }
    }
}

impl std::ops::AddAssign for Loss {
    fn add_assign(&mut self, other: Loss) {
        self.sum += other.sum;
        self.weight += other.weight;
        self.rows += other.rows;
    }
}

/// Memory that calls reuse.
#[derive(Default)]
pub struct Scratch {
    /// Turned logits of a chunk.
    logits: Buffer<f32>,
    /// Inputs of a chunk's rows, then their gradients.
    rows: Buffer<f32>,
    /// Maximum and sum of every block and row.
    partial: Buffer<f32>,
}

/// Where gradients go.
pub struct Gradients<'a> {
    /// Of the input, `[rows × width]`: replaced.
    pub input: &'a mut [f32],
    /// Of the head, `[vocab × width]`.
    pub head: &'a mut [f32],
    /// What becomes of the head's gradient that is there.
    pub store: Store<'a>,
}

/// The loss of `x` (`[rows × width]`) under the head `[vocab × width]`, and the gradients of its sum if asked for.
///
/// # Errors
/// [`Error::OutOfMemory`] where the logits of a chunk find no room.
///
/// # Panics
/// If shapes don't fit or a target with a weight is outside the vocabulary.
#[allow(clippy::too_many_arguments, reason = "a fused operation has the operands of its parts")]
pub fn cross_entropy(
    pool: &Pool,
    precision: Precision,
    x: &[f32],
    head: &[f32],
    width: usize,
    targets: Targets<'_>,
    mut gradients: Option<Gradients<'_>>,
    scratch: &mut Scratch,
) -> Result<Loss, Error> {
    let (rows, vocab) = (targets.tokens.len(), head.len() / width.max(1));
    assert!(width > 0 && vocab > 0 && head.len() == vocab * width, "a head of whole rows");
    assert!(x.len() == rows * width && targets.weights.len() == rows, "one row a target");
    if let Some(gradients) = &mut gradients {
        assert!(gradients.input.len() == x.len() && gradients.head.len() == head.len(), "one length");
    }
    let wanted: Vec<usize> = (0..rows).filter(|&row| targets.weights[row] != 0.0).collect();
    if let Some(gradients) = &mut gradients {
        if wanted.len() < rows {
            clear(pool, gradients.input);
        }
        if wanted.is_empty() && gradients.store == Store::Replace {
            clear(pool, gradients.head);
        }
    }
    let most = (CHUNK_VALUES / vocab / LANES * LANES).clamp(LANES, CHUNK_ROWS);
    let chunks = wanted.len().div_ceil(most);
    let mut loss = Loss::default();
    for chunk in 0..chunks {
        let wanted = &wanted[chunk * wanted.len() / chunks..(chunk + 1) * wanted.len() / chunks];
        loss +=
            Chunk { pool, precision, x, head, width, vocab, targets, wanted }.run(&mut gradients, scratch)?;
    }
    Ok(loss)
}

struct Chunk<'a> {
    pool: &'a Pool,
    precision: Precision,
    x: &'a [f32],
    head: &'a [f32],
    width: usize,
    vocab: usize,
    targets: Targets<'a>,
    /// Rows of this chunk.
    wanted: &'a [usize],
}

impl Chunk<'_> {
    fn run(&self, gradients: &mut Option<Gradients<'_>>, scratch: &mut Scratch) -> Result<Loss, Error> {
        let &Chunk { pool, precision, head, width, vocab, wanted, .. } = self;
        let count = wanted.len();
        // Whole vectors; columns past the rows are never read by anything but themselves.
        let stride = pitch(count);
        let blocks = vocab.div_ceil(VOCAB_BLOCK);
        grow(&mut scratch.logits, vocab * stride)?;
        grow(&mut scratch.rows, count * width)?;
        grow(&mut scratch.partial, 2 * blocks * stride)?;
        let logits = &mut scratch.logits[..vocab * stride];
        let copied = &mut scratch.rows[..count * width];
        let first = wanted[0];
        // Rows that lie together are read and written where they are.
        let together = wanted[count - 1] - first + 1 == count;
        let rows = if together {
            &self.x[first * width..][..count * width]
        } else {
            for (row, out) in wanted.iter().zip(copied.chunks_exact_mut(width)) {
                out.copy_from_slice(&self.x[row * width..][..width]);
            }
            &*copied
        };
        let extent = Extent { rows: vocab, cols: count, inner: width };
        let (all, some) = (View::new(head, width), View::new(rows, width));
        matmul(pool, precision, extent, all, some.turned(), (logits, stride), Store::Replace);

        let lse = self.log_sum_exp(logits, stride, &mut scratch.partial[..2 * blocks * stride]);
        let mut loss = Loss::default();
        let mut weights = vec![0.0; stride];
        for (index, &row) in wanted.iter().enumerate() {
            let (target, weight) = (self.targets.tokens[row] as usize, self.targets.weights[row]);
            assert!(target < vocab, "the target {target} is not below the vocabulary's {vocab}");
            weights[index] = weight;
            loss.sum += f64::from(weight) * f64::from(lse[index] - logits[target * stride + index]);
            loss.weight += f64::from(weight);
            loss.rows += 1;
        }
        let Some(gradients) = gradients else { return Ok(loss) };

        norm::each_row(pool, logits, stride, |_, logits| {
            lanes::dispatch(pool.cpu(), SoftmaxBackward { logits, stride, lse: &lse, weights: &weights });
        });
        for (index, &row) in wanted.iter().enumerate() {
            logits[self.targets.tokens[row] as usize * stride + index] -= weights[index];
        }
        let d = View::new(logits, stride);
        let extent = Extent { rows: vocab, cols: width, inner: count };
        matmul(pool, precision, extent, d, View::new(rows, width), (gradients.head, width), gradients.store);
        gradients.store = Store::Add;
        let extent = Extent { rows: count, cols: width, inner: vocab };
        if together {
            let into = &mut gradients.input[first * width..][..count * width];
            matmul(pool, precision, extent, d.turned(), all, (into, width), Store::Replace);
            return Ok(loss);
        }
        matmul(pool, precision, extent, d.turned(), all, (copied, width), Store::Replace);
        for (row, d) in wanted.iter().zip(copied.chunks_exact(width)) {
            gradients.input[row * width..][..width].copy_from_slice(d);
        }
        Ok(loss)
    }

    /// Of every column. `partial` has a vector of maxima and one of sums for each block.
    fn log_sum_exp(&self, logits: &[f32], stride: usize, partial: &mut [f32]) -> Vec<f32> {
        let pool = self.pool;
        norm::each_row(pool, partial, 2 * stride, |blocks, partial| {
            for (block, partial) in blocks.zip(partial.chunks_exact_mut(2 * stride)) {
                let tokens = block * VOCAB_BLOCK..self.vocab.min((block + 1) * VOCAB_BLOCK);
                let logits = &logits[tokens.start * stride..tokens.end * stride];
                lanes::dispatch(pool.cpu(), BlockSums { logits, stride, partial });
            }
        });
        let mut lse = vec![0.0; stride];
        lanes::dispatch(pool.cpu(), Merge { partial, stride, lse: &mut lse });
        lse
    }
}

/// Maximum and sum of exponentials of every column of a block.
struct BlockSums<'a> {
    logits: &'a [f32],
    stride: usize,
    /// Maxima, then sums.
    partial: &'a mut [f32],
}

impl Kernel for BlockSums<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let (maxima, sums) = self.partial.split_at_mut(self.stride);
        for col in (0..self.stride).step_by(LANES) {
            let (mut max, mut sum) = (l.splat(f32::MIN), l.splat(0.0));
            for row in self.logits.chunks_exact(self.stride) {
                max = l.max(max, l.load(&row[col..]));
            }
            for row in self.logits.chunks_exact(self.stride) {
                sum = l.add(sum, l.exp(l.sub(l.load(&row[col..]), max)));
            }
            l.store(max, &mut maxima[col..]);
            l.store(sum, &mut sums[col..]);
        }
    }
}

/// All blocks' maxima and sums to `max + ln Σ`.
struct Merge<'a> {
    partial: &'a [f32],
    stride: usize,
    lse: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        for col in (0..self.stride).step_by(LANES) {
            let (mut max, mut sum) = (l.splat(f32::MIN), l.splat(0.0));
            for block in self.partial.chunks_exact(2 * self.stride) {
                max = l.max(max, l.load(&block[col..]));
            }
            for block in self.partial.chunks_exact(2 * self.stride) {
                let scale = l.exp(l.sub(l.load(&block[col..]), max));
                sum = l.fma(l.load(&block[self.stride + col..]), scale, sum);
            }
            let (max, sum) = (l.array(max), l.array(sum));
            for lane in 0..LANES {
                self.lse[col + lane] = max[lane] + sum[lane].ln();
            }
        }
    }
}

/// `weight · exp(logit − lse)` over the logits.
struct SoftmaxBackward<'a> {
    logits: &'a mut [f32],
    stride: usize,
    lse: &'a [f32],
    weights: &'a [f32],
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        for row in self.logits.chunks_exact_mut(self.stride) {
            let others = self.lse.chunks_exact(LANES).zip(self.weights.chunks_exact(LANES));
            for (x, (lse, weights)) in row.chunks_exact_mut(LANES).zip(others) {
                let p = l.exp(l.sub(l.load(x), l.load(lse)));
                l.store(l.mul(p, l.load(weights)), x);
            }
        }
    }
}

/// At least `len` values; what was there is lost.
pub(crate) fn grow(buffer: &mut Buffer<f32>, len: usize) -> Result<(), Error> {
    if buffer.len() < len {
        *buffer = Buffer::default();
        *buffer = Buffer::zeroed(len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{assert_gradient, bits, pools, uniform};

    const WIDTH: usize = 12;
    const VOCAB: usize = 150;

    fn loss(x: &[f64], head: &[f64], tokens: &[u32], weights: &[f32]) -> f64 {
        let mut loss = 0.0;
        for ((x, &token), &weight) in x.chunks(WIDTH).zip(tokens).zip(weights) {
            if weight != 0.0 {
                let logits: Vec<f64> =
                    head.chunks(WIDTH).map(|e| e.iter().zip(x).map(|(e, x)| e * x).sum()).collect();
                let lse = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
                loss += f64::from(weight) * (lse - logits[token as usize]);
            }
        }
        loss
    }

    #[test]
    fn loss_and_gradients_are_right_and_the_same_bits_everywhere() {
        let rows = 1100;
        let x: Vec<f32> = uniform(1, rows * WIDTH).iter().map(|x| 4.0 * x).collect();
        let head: Vec<f32> = uniform(2, VOCAB * WIDTH).iter().map(|x| 4.0 * x).collect();
        let weights: Vec<f32> = (0..rows).map(|i| [1.0, 0.0, 0.5, 1.0][i % 4]).collect();
        let tokens: Vec<u32> =
            (0..rows as u32).map(|i| if i % 4 == 1 { u32::MAX } else { i * 7 % 150 }).collect();
        let targets = Targets { tokens: &tokens, weights: &weights };
        let mut first: Option<(f64, [Vec<u32>; 2])> = None;
        for pool in pools() {
            let (mut dx, mut dhead) = (vec![9.0; x.len()], vec![0.0; head.len()]);
            let mut scratch = Scratch::default();
            let mut call = |gradients| {
                cross_entropy(&pool, Precision::F32, &x, &head, WIDTH, targets, gradients, &mut scratch)
                    .unwrap()
            };
            let got = call(Some(Gradients { input: &mut dx, head: &mut dhead, store: Store::Add }));
            assert_eq!(call(None), got);
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let want = loss(&wide(&x), &wide(&head), &tokens, &weights);
            assert!((got.sum / want - 1.0).abs() < 1e-6, "{got:?} {want}");
            assert_eq!((got.weight, got.rows), (2.5 * 275.0, 825));
            assert!(dx.chunks(WIDTH).skip(1).step_by(4).all(|dx| dx.iter().all(|&d| d == 0.0)));
            if first.is_none() {
                let loss = |v: &[Vec<f64>]| loss(&v[0], &v[1], &tokens, &weights);
                assert_gradient(&[&x, &head], 0, &dx, 1e-4, loss);
                assert_gradient(&[&x, &head], 1, &dhead, 1e-4, loss);
            }
            let bits = (got.sum, [bits(&dx), bits(&dhead)]);
            assert!(*first.get_or_insert_with(|| bits.clone()) == bits);
        }
    }

    #[test]
    #[should_panic(expected = "the target 150 is not below")]
    fn a_target_outside_the_vocabulary_is_refused() {
        let pool = Pool::new(1, crate::Cpu::detect());
        let targets = Targets { tokens: &[150], weights: &[1.0] };
        let (x, head) = (uniform(1, WIDTH), uniform(2, VOCAB * WIDTH));
        let scratch = &mut Scratch::default();
        let _ = cross_entropy(&pool, Precision::F32, &x, &head, WIDTH, targets, None, scratch);
    }
}
