use super::*;
use crate::test_support::{assert_gradient, bits, pools, uniform};
use crate::train::Precision;

const HEADS: Heads = Heads { heads: 4, kv_heads: 2, head_dim: 10, scale: 0.4 };

/// `Σ out · d` by the definition.
fn loss(qkv: &[f64], d: &[f64], starts: &[usize]) -> f64 {
    let (dim, stride, rows) = (HEADS.head_dim, HEADS.qkv_width(), d.len() / HEADS.width());
    let mut loss = 0.0;
    for index in 0..starts.len() {
        let (first, len) = sequence(starts, rows, index);
        for head in 0..HEADS.heads {
            let kv = head / HEADS.group();
            for row in first..first + len {
                let q = &qkv[row * stride + head * dim..][..dim];
                let scores: Vec<f64> = (first..=row)
                    .map(|key| {
                        let k = &qkv[key * stride + HEADS.key(kv)..][..dim];
                        q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(HEADS.scale)
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|s| s.exp()).sum();
                for (key, score) in (first..=row).zip(&scores) {
                    let v = &qkv[key * stride + HEADS.value(kv)..][..dim];
                    let d = &d[row * HEADS.width() + head * dim..][..dim];
                    loss += score.exp() / sum * v.iter().zip(d).map(|(v, d)| v * d).sum::<f64>();
                }
            }
        }
    }
    loss
}

struct Run {
    out: Vec<f32>,
    lse: Vec<f32>,
    dqkv: Vec<f32>,
}

fn run(pool: &Pool, precision: Precision, starts: &[usize], qkv: &[f32], d: &[f32]) -> Run {
    let rows = d.len() / HEADS.width();
    let (mut out, mut lse) = (vec![7.0; d.len()], vec![7.0; rows * HEADS.heads]);
    let mut dqkv = vec![7.0; qkv.len()];
    attention(pool, precision, HEADS, starts, qkv, &mut out, &mut lse);
    let saved = Saved { qkv, out: &out, lse: &lse };
    attention_backward(pool, precision, HEADS, starts, saved, d, &mut dqkv);
    Run { out, lse, dqkv }
}

fn inputs(rows: usize) -> (Vec<f32>, Vec<f32>) {
    let qkv = uniform(1, rows * HEADS.qkv_width()).iter().map(|x| 3.0 * x).collect();
    (qkv, uniform(2, rows * HEADS.width()))
}

#[test]
fn output_and_gradients_are_those_of_the_definition() {
    let pool = Pool::new(2, crate::Cpu::detect());
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    // A lone row, an empty sequence, tiles that end inside and at their edge; then more than one block of keys.
    for (starts, rows) in [(vec![0, 1, 1, 18, 66], 130), (vec![0], 300)] {
        let (qkv, d) = inputs(rows);
        let Run { out, dqkv, .. } = run(&pool, Precision::F32, &starts, &qkv, &d);
        let got: f64 = out.iter().zip(&d).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum();
        assert!((got - loss(&wide(&qkv), &wide(&d), &starts)).abs() < 1e-4);
        assert_gradient(&[&qkv, &d], 0, &dqkv, 1e-4, |v| loss(&v[0], &v[1], &starts));
        let rounded = run(&pool, Precision::Bf16, &starts, &qkv, &d);
        for (exact, rounded) in [(&out, &rounded.out), (&dqkv, &rounded.dqkv)] {
            let error: f64 = exact.iter().zip(rounded).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let size: f64 = exact.iter().map(|&a| f64::from(a).powi(2)).sum();
            assert!((error / size).sqrt() < 0.01 && error > 0.0, "{}", (error / size).sqrt());
        }
    }
}

#[test]
fn sequences_know_nothing_of_each_other_and_threads_and_families_change_no_bit() {
    let starts = [0, 5, 60, 400];
    let (qkv, d) = inputs(460);
    let mut first: Option<[Vec<u32>; 3]> = None;
    for pool in pools() {
        let all = run(&pool, Precision::F32, &starts, &qkv, &d);
        let got = [bits(&all.out), bits(&all.lse), bits(&all.dqkv)];
        assert!(*first.get_or_insert_with(|| got.clone()) == got);
        let (width, stride) = (HEADS.width(), HEADS.qkv_width());
        let alone =
            run(&pool, Precision::F32, &[0], &qkv[60 * stride..400 * stride], &d[60 * width..400 * width]);
        assert_eq!(bits(&alone.out), bits(&all.out[60 * width..400 * width]));
        assert_eq!(bits(&alone.dqkv), bits(&all.dqkv[60 * stride..400 * stride]));
    }
}
