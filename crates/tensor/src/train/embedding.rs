//! Rows of the embedding, forward and backward.
//!
//! Backward adds each row's gradient to that of its token. Threads share the columns, not the rows, so a token that
//! occurs many times has its gradients added in the order of the rows, and no two threads meet.

use crate::Pool;
use crate::norm::each_row;
use crate::pool::Disjoint;

/// Columns that one thread takes at a time: whole cache lines.
const GRAIN: usize = 16;

/// `out[row] = table[tokens[row]]`, rows of `width` values.
///
/// # Panics
/// If a token is outside the table or lengths don't fit.
pub fn embed(pool: &Pool, table: &[f32], width: usize, tokens: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), tokens.len() * width, "one row a token");
    each_row(pool, out, width, |rows, out| {
        for (&token, out) in tokens[rows].iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&table[token as usize * width..][..width]);
        }
    });
}

/// `dtable[tokens[row]] += d[row]`, in the order of the rows.
///
/// # Panics
/// If a token is outside the table or lengths don't fit.
pub fn embed_backward(pool: &Pool, dtable: &mut [f32], width: usize, tokens: &[u32], d: &[f32]) {
    assert_eq!(d.len(), tokens.len() * width, "one row a token");
    let parts = Disjoint::new(dtable);
    pool.run(|worker| {
        let cols = worker.split(width, GRAIN);
        for (&token, d) in tokens.iter().zip(d.chunks_exact(width)) {
            let from = token as usize * width;
            // SAFETY: workers have different columns, and one worker's parts live one after the other.
            let sums = unsafe { parts.part(from + cols.start..from + cols.end) };
            for (sum, d) in sums.iter_mut().zip(&d[cols.clone()]) {
                *sum += d;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools, uniform};

    #[test]
    fn rows_come_and_gradients_go_in_order() {
        let (vocab, width) = (11, 40);
        let tokens: Vec<u32> = (0..900).map(|i| (i * i % 11) as u32).collect();
        let (table, d) = (uniform(1, vocab * width), uniform(2, tokens.len() * width));
        let mut want = vec![0.0f32; table.len()];
        for (row, &token) in tokens.iter().enumerate() {
            for col in 0..width {
                want[token as usize * width + col] += d[row * width + col];
            }
        }
        for pool in pools() {
            let mut out = vec![0.0; d.len()];
            embed(&pool, &table, width, &tokens, &mut out);
            for (out, &token) in out.chunks(width).zip(&tokens) {
                assert_eq!(out, &table[token as usize * width..][..width]);
            }
            let mut sums = vec![0.0; table.len()];
            embed_backward(&pool, &mut sums, width, &tokens, &d);
            assert_eq!(bits(&sums), bits(&want));
        }
    }
}
