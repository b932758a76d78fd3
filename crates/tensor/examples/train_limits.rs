//! How near the training kernels come to the machine's limits.
//!
//! ```text
//! cargo run --release -p consort-tensor --example train_limits -- [THREADS]
//! ```
//!
//! Products in Gflop/s for the shapes of two models, in both precisions; everything else in GB/s of what it must read
//! and write. Medians of several runs.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::time::Instant;

use consort_tensor::train::attention::{Heads, Saved, attention, attention_backward};
use consort_tensor::train::cross_entropy::{Gradients, Scratch, Targets, cross_entropy};
use consort_tensor::train::matmul::{Extent, Store, View, matmul};
use consort_tensor::train::norm::{Vectors, rms_norm, rms_norm_backward};
use consort_tensor::train::optimizer::{AdamW, square_sum};
use consort_tensor::train::swiglu::{swiglu, swiglu_backward};
use consort_tensor::train::{Precision, copy};
use consort_tensor::{Cpu, Pool};

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |n| n.parse().unwrap());
    let pool = Pool::new(threads, Cpu::detect());
    println!("{threads} threads, {:?}", pool.cpu().family());
    for precision in [Precision::F32, Precision::Bf16] {
        products(&pool, precision);
        attentions(&pool, precision);
        heads(&pool, precision);
    }
    streams(&pool);
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 1024) as f32 / 1024.0 - 0.5).collect()
}

/// Seconds of a run, the median of enough of them for a third of a second.
fn seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut times = Vec::new();
    let begun = Instant::now();
    while times.len() < 3 || begun.elapsed().as_secs_f64() < 0.3 {
        let begun = Instant::now();
        run();
        times.push(begun.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn products(pool: &Pool, precision: Precision) {
    // Rows, outputs, inputs of a linear layer.
    for (rows, outputs, inputs) in [
        (2048, 1152, 384),
        (2048, 384, 384),
        (2048, 2048, 384),
        (2048, 384, 1024),
        (1024, 3072, 576),
        (1024, 576, 1536),
    ] {
        let (x, w, y) = (values(rows * inputs), values(outputs * inputs), values(rows * outputs));
        let (mut out, mut dx, mut dw) =
            (vec![0.0; rows * outputs], vec![0.0; rows * inputs], vec![0.0; outputs * inputs]);
        let operations = 2.0 * (rows * outputs * inputs) as f64 / 1e9;
        let forward = seconds(|| {
            let extent = Extent { rows, cols: outputs, inner: inputs };
            let (a, b) = (View::new(&x, inputs), View::new(&w, inputs).turned());
            matmul(pool, precision, extent, a, b, (&mut out, outputs), Store::Replace);
        });
        let input = seconds(|| {
            let extent = Extent { rows, cols: inputs, inner: outputs };
            let (a, b) = (View::new(&y, outputs), View::new(&w, inputs));
            matmul(pool, precision, extent, a, b, (&mut dx, inputs), Store::Replace);
        });
        let weight = seconds(|| {
            let extent = Extent { rows: outputs, cols: inputs, inner: rows };
            let (a, b) = (View::new(&y, outputs).turned(), View::new(&x, inputs));
            matmul(pool, precision, extent, a, b, (&mut dw, inputs), Store::Add);
        });
        println!(
            "{precision:?} product {rows}×{inputs}→{outputs}: forward {:.0}, dX {:.0}, dW {:.0} Gflop/s",
            operations / forward,
            operations / input,
            operations / weight
        );
    }
}

fn attentions(pool: &Pool, precision: Precision) {
    for (heads, kv_heads, sequences, len) in [(6, 6, 8, 256), (9, 3, 4, 256), (9, 3, 1, 2048)] {
        let shape = Heads { heads, kv_heads, head_dim: 64, scale: 0.125 };
        let rows = sequences * len;
        let qkv = values(rows * shape.qkv_width());
        let (mut out, mut lse) = (vec![0.0; rows * shape.width()], vec![0.0; rows * heads]);
        let starts: Vec<usize> = (0..sequences).map(|i| i * len).collect();
        // Visible pairs only.
        let operations = (4 * sequences * len * (len + 1) / 2 * shape.width()) as f64 / 1e9;
        let forward = seconds(|| attention(pool, precision, shape, &starts, &qkv, &mut out, &mut lse));
        let (d, mut dqkv) = (values(out.len()), vec![0.0; qkv.len()]);
        let backward = seconds(|| {
            let saved = Saved { qkv: &qkv, out: &out, lse: &lse };
            attention_backward(pool, precision, shape, &starts, saved, &d, &mut dqkv);
        });
        println!(
            "{precision:?} attention {heads}/{kv_heads} heads of 64, {sequences} × {len}: forward {:.0}, backward {:.0} Gflop/s",
            operations / forward,
            2.5 * operations / backward
        );
    }
}

fn heads(pool: &Pool, precision: Precision) {
    for (rows, vocab, width) in [(2048, 4096, 384), (1024, 49_152, 576)] {
        let (x, head) = (values(rows * width), values(vocab * width));
        let tokens: Vec<u32> = (0..rows).map(|i| (i * 31 % vocab) as u32).collect();
        let weights = vec![1.0; rows];
        let (mut dx, mut dhead) = (vec![0.0; x.len()], vec![0.0; head.len()]);
        let mut scratch = Scratch::default();
        let time = seconds(|| {
            let targets = Targets { tokens: &tokens, weights: &weights };
            let gradients = Some(Gradients { input: &mut dx, head: &mut dhead, store: Store::Add });
            cross_entropy(pool, precision, &x, &head, width, targets, gradients, &mut scratch).unwrap();
        });
        let operations = 6.0 * (rows * vocab * width) as f64 / 1e9;
        println!("{precision:?} head and loss {rows}×{width}→{vocab}: {:.0} Gflop/s", operations / time);
    }
}

fn streams(pool: &Pool) {
    let (rows, width) = (2048, 1024);
    let (x, weight, gate_up) = (values(rows * width), values(width), values(2 * rows * width));
    let (mut out, mut both) = (values(rows * width), values(2 * rows * width));
    let mut dweight = vec![0.0; width];
    let gigabytes = |passes: usize, time: f64| (passes * rows * width * 4) as f64 / time / 1e9;
    let at = Vectors::rows(width);
    let time = seconds(|| rms_norm(pool, at, &x, &weight, 1e-5, &mut out));
    println!("norm forward: {:.0} GB/s", gigabytes(2, time));
    let time = seconds(|| {
        rms_norm_backward(pool, at, &x, &weight, 1e-5, &gate_up[..x.len()], (&mut out, true), &mut dweight)
    });
    println!("norm backward: {:.0} GB/s", gigabytes(4, time));
    let time = seconds(|| swiglu(pool, width, (&gate_up, 2 * width), (&mut out, width)));
    println!("swiglu forward: {:.0} GB/s", gigabytes(3, time));
    // Fresh values each time: gradients of gradients would soon be too small to be normal numbers.
    let time = seconds(|| {
        copy(pool, &gate_up, &mut both);
        swiglu_backward(pool, width, (&mut both, 2 * width), (&x, width));
    });
    println!("swiglu backward and a copy: {:.0} GB/s", gigabytes(9, time));
    let time = seconds(|| copy(pool, &x, &mut out));
    println!("copy: {:.0} GB/s", gigabytes(2, time));
    let len = 32 << 20;
    let (gradient, mut weights) = (values(len), values(len));
    let (mut mean, mut square) = (vec![0.0; len], vec![0.0; len]);
    let adam = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 10,
        gradient_scale: 1.0,
    };
    let time = seconds(|| adam.update(pool, &mut weights, &gradient, &mut mean, &mut square));
    println!("AdamW: {:.0} GB/s", 28.0 * len as f64 / time / 1e9);
    let time = seconds(|| {
        square_sum(pool, &gradient);
    });
    println!("norm of a gradient: {:.0} GB/s", 4.0 * len as f64 / time / 1e9);
}
