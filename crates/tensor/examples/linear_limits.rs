//! How near the matrix products come to this machine's limits.
//!
//! `cargo run --release -p consort-tensor --example linear_limits [-- THREADS [TYPE…]]`
//!
//! The matrices are those of SmolLM2-135M (30 layers and the output projection), in each type. One row of inputs is
//! a decode step, 8 and 16 are concurrent ones, 512 a prefill; the output projection runs for at most 16 rows, as
//! it does when serving. The limits are measured in the same run: how fast the threads read memory, and how many
//! int8, bf16 and f32 operations they finish from registers. Limits and rates are those of the fastest round, so that
//! another program's share of the machine is not counted; `median` tells how much of that there was. One thread is
//! timed by the processor time that it got, for the same reason.

#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use consort_tensor::activation::Activation;
use consort_tensor::linear::{Inputs, Product, gated, linear};
use consort_tensor::matrix::{GatedMatrix, InputKind, Matrix};
use consort_tensor::train::Precision;
use consort_tensor::{Cpu, DType, Family, Pool, limits};

const LAYERS: usize = 30;
const WIDTH: usize = 576;
const KV: usize = 192;
const HIDDEN: usize = 1536;
const VOCAB: usize = 49152;

struct Layer {
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    gate_up: GatedMatrix,
    down: Matrix,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = match arguments.next() {
        Some(threads) => threads.parse()?,
        None => std::thread::available_parallelism()?.get(),
    };
    let wanted: Vec<String> = arguments.collect();
    let cpu = match std::env::var("CONSORT_KERNELS") {
        Ok(name) => Cpu::force(Family::from_name(&name).ok_or("no such kernel family")?)?,
        Err(_) => Cpu::detect(),
    };
    let pool = Pool::new(threads, cpu);
    let read = limits::read_bandwidth(&pool)? / 1e9;
    println!("{} kernels, {threads} threads; memory read {read:.1} GB/s", pool.cpu().family().name());
    let peaks = [
        int8_peak(&pool),
        limits::peak(&pool, Precision::Bf16) / 1e9,
        limits::peak(&pool, Precision::F32) / 1e9,
    ];
    println!("peak Gop/s: int8 {:.0}, bf16 {:.0}, f32 {:.0}", peaks[0], peaks[1], peaks[2]);
    println!(
        "{:6} {:>5} {:>9} {:>7} {:>6} {:>8} {:>6}",
        "type", "rows", "ms", "GB/s", "% mem", "Gop/s", "% peak"
    );
    for dtype in DType::ALL {
        if wanted.is_empty() || wanted.iter().any(|name| name == dtype.name()) {
            measure(&pool, dtype, read, peaks)?;
        }
    }
    Ok(())
}

fn measure(pool: &Pool, dtype: DType, read: f64, peaks: [f64; 3]) -> Result<(), consort_tensor::Error> {
    // K types need rows of whole 256s; the nearest shape with about the same bytes stands in.
    let (width, hidden) = if WIDTH.is_multiple_of(dtype.block_len()) { (WIDTH, HIDDEN) } else { (512, 1536) };
    let start = Instant::now();
    let layers = (0..LAYERS).map(|_| layer(pool, dtype, width, hidden)).collect::<Result<Vec<_>, _>>()?;
    let vocabulary = pack(pool, dtype, VOCAB, width)?;
    let packing = start.elapsed();
    let bytes: usize = layers
        .iter()
        .map(|l| {
            [&l.query, &l.key, &l.value, &l.output, &l.down].iter().map(|m| m.packed_bytes()).sum::<usize>()
                + l.gate_up.packed_bytes()
        })
        .sum::<usize>()
        + vocabulary.packed_bytes();
    for rows in [1, 2, 4, 8, 12, 16, 24, 32, 64, 512] {
        let mut step = Step::new(pool, &layers, &vocabulary, rows, width, hidden);
        let (seconds, median) = time(pool, || step.run());
        let outputs = LAYERS * (width * (2 * width + 2 * KV) + 3 * width * hidden);
        let operations = 2.0 * (rows * outputs + rows.min(16) * VOCAB * width) as f64;
        let peak = match InputKind::of(dtype) {
            InputKind::Int8 => peaks[0],
            InputKind::Bf16 => peaks[1],
            InputKind::F32 => peaks[2],
        };
        let (gigabytes, gigaops) = (bytes as f64 / seconds / 1e9, operations / seconds / 1e9);
        println!(
            "{:6} {rows:5} {:9.2} {:9.2} {gigabytes:7.1} {:6.0} {gigaops:8.0} {:6.0}",
            dtype.name(),
            seconds * 1e3,
            median * 1e3,
            100.0 * gigabytes / read,
            100.0 * gigaops / peak,
        );
    }
    println!(
        "{:6} {:.1} MB, made and packed in {:.0} ms",
        dtype.name(),
        bytes as f64 / 1e6,
        packing.as_secs_f64() * 1e3
    );
    Ok(())
}

fn layer(pool: &Pool, dtype: DType, width: usize, hidden: usize) -> Result<Layer, consort_tensor::Error> {
    let (gate, up) = (file(dtype, hidden * width), file(dtype, hidden * width));
    Ok(Layer {
        query: pack(pool, dtype, width, width)?,
        key: pack(pool, dtype, KV, width)?,
        value: pack(pool, dtype, KV, width)?,
        output: pack(pool, dtype, width, width)?,
        gate_up: GatedMatrix::pack(pool, (dtype, &gate), (dtype, &up), hidden, width)?,
        down: pack(pool, dtype, width, hidden)?,
    })
}

fn pack(pool: &Pool, dtype: DType, rows: usize, cols: usize) -> Result<Matrix, consort_tensor::Error> {
    Matrix::pack(pool, dtype, &file(dtype, rows * cols), rows, cols)
}

/// Bytes of weights. What they are doesn't matter for speed as long as no number is denormal or infinite: as a
/// half, as a quarter of an f32 and as codes alike, 0x2e is an ordinary value.
fn file(dtype: DType, values: usize) -> Vec<u8> {
    vec![0x2e; dtype.bytes(values).unwrap_or(0)]
}

/// One pass over all matrices.
struct Step<'a> {
    pool: &'a Pool,
    layers: &'a [Layer],
    vocabulary: &'a Matrix,
    rows: usize,
    width: usize,
    hidden: usize,
    inputs: Inputs,
    x: Vec<f32>,
    qkv: [Vec<f32>; 3],
    gated: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> Step<'a> {
    fn new(
        pool: &'a Pool,
        layers: &'a [Layer],
        vocabulary: &'a Matrix,
        rows: usize,
        width: usize,
        hidden: usize,
    ) -> Step<'a> {
        Step {
            pool,
            layers,
            vocabulary,
            rows,
            width,
            hidden,
            inputs: Inputs::new(),
            x: (0..rows * width).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect(),
            qkv: [vec![0.0; rows * width], vec![0.0; rows * KV], vec![0.0; rows * KV]],
            gated: vec![0.0; rows * hidden],
            logits: vec![0.0; rows.min(16) * VOCAB],
        }
    }

    fn run(&mut self) {
        let Step { pool, inputs, width, hidden, .. } = self;
        let kind = self.vocabulary.input_kind();
        let mut projected = vec![0.0; self.x.len()];
        for layer in self.layers {
            inputs.prepare(pool, &self.x, *width, kind);
            let [q, k, v] = &mut self.qkv;
            linear(
                pool,
                inputs,
                &mut [product(&layer.query, q), product(&layer.key, k), product(&layer.value, v)],
            );
            inputs.prepare(pool, &self.qkv[0], *width, kind);
            linear(pool, inputs, &mut [product(&layer.output, &mut projected)]);
            inputs.prepare(pool, &self.x, *width, kind);
            gated(pool, inputs, &layer.gate_up, Activation::Silu, &mut self.gated);
            // A non-zero, ordinary input for the next product, whatever the weights were.
            inputs.prepare(pool, &self.gated, *hidden, kind);
            linear(pool, inputs, &mut [product(&layer.down, &mut projected)]);
        }
        inputs.prepare(pool, &self.x[..self.rows.min(16) * *width], *width, kind);
        linear(pool, inputs, &mut [product(self.vocabulary, &mut self.logits)]);
        black_box(&self.logits);
    }
}

fn product<'a>(weights: &'a Matrix, out: &'a mut [f32]) -> Product<'a> {
    Product { weights, bias: None, out, accumulate: false }
}

/// Seconds of the fastest and of the median call, over about half a second.
fn time(pool: &Pool, mut call: impl FnMut()) -> (f64, f64) {
    call();
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || begin.elapsed() < Duration::from_millis(400) {
        let start = now(pool);
        call();
        times.push(now(pool) - start);
    }
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}

/// Seconds since some moment: of the clock on the wall, or of this thread's own where it is the only one.
fn now(pool: &Pool) -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    #[cfg(unix)]
    if pool.threads() == 1 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: it writes the structure that it is given.
        if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } == 0 {
            return time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
        }
    }
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Gop/s of all threads for int8 products from registers; a multiply and an add are two.
fn int8_peak(pool: &Pool) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if pool.cpu().family() == Family::Avx512 {
        const ROUNDS: usize = 200_000;
        // SAFETY: the family is AVX-512.
        let (seconds, _) = time(pool, || pool.run(|_| unsafe { registers::int8(ROUNDS) }));
        return (pool.threads() * ROUNDS * registers::CHAINS * 128) as f64 / seconds / 1e9;
    }
    let _ = pool;
    f64::NAN
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent sums, enough to hide an instruction's latency.
    pub(crate) const CHAINS: usize = 16;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(crate) fn int8(rounds: usize) {
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        let x = black_box(_mm512_set1_epi8(1));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, x);
            }
        }
        black_box(sums);
    }
}
