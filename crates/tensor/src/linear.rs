//! Matrix products of packed weights with rows of activations.
//!
//! A product walks the weights' panels (sixteen output rows each); for each panel a kernel computes all rows of a
//! tile of up to twelve input rows, with every output element one chain over the columns (`scalar` is the
//! specification). Few rows are bound by reading the weights: each thread streams one contiguous share of the bytes,
//! once. Many rows are bound by arithmetic: the inputs are cut into chunks that stay in a core's second-level cache
//! while the panels pass by, and threads claim panels as they get free. Which of the two happens, who computes what
//! and in which order changes no bit.

use std::ops::Range;

use crate::activation::Activation;
use crate::lanes::{self, Lanes};
use crate::matrix::panel::{LANES, Layout};
use crate::matrix::{GatedMatrix, Matrix};
use crate::pool::{Disjoint, Worker};
use crate::{Cpu, DType, Family, Pool};
use inputs::TileInputs;
use tile::{Kernel, Sums, TILE, Tile};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod inputs;
#[cfg(target_arch = "aarch64")]
mod neon;
mod quantize;
mod scalar;
mod tile;

pub use inputs::Inputs;

/// One product of a [`linear`] call.
pub struct Product<'a> {
    /// The weights, `rows` by `cols`.
    pub weights: &'a Matrix,
    /// Added to each output row, if any (`rows` values).
    pub bias: Option<&'a [f32]>,
    /// `n` rows of `rows` values.
    pub out: &'a mut [f32],
    /// Adds to `out` instead of replacing it (the residual stream).
    pub accumulate: bool,
}

/// `out = weights · x (+ bias) (+ out)` for several matrices that read the same inputs, in one fork and join.
///
/// # Panics
/// If a shape doesn't fit or `x` was prepared for another kind.
pub fn linear(pool: &Pool, x: &Inputs, products: &mut [Product<'_>]) {
    let jobs: Vec<Job<'_>> = products
        .iter_mut()
        .map(|product| {
            let weights = product.weights;
            check(x, weights.layout(), weights.rows(), product.out.len());
            if let Some(bias) = product.bias {
                assert_eq!(bias.len(), weights.rows(), "a bias has a value for each output feature");
            }
            Job {
                panels: weights.panels(),
                unit_bytes: weights.layout().bytes,
                rows: weights.rows(),
                layout: weights.layout(),
                kernels: Kernels::new(pool.cpu(), weights.layout().dtype, x),
                finish: Finish::Add { bias: product.bias, accumulate: product.accumulate },
                out: Disjoint::new(product.out),
            }
        })
        .collect();
    run(pool, x, &jobs);
}

/// `out = activation(gate · x) * (up · x)`, `n` rows of `rows` values. The same bits as the two products apart.
///
/// # Panics
/// As [`linear`].
pub fn gated(pool: &Pool, x: &Inputs, weights: &GatedMatrix, activation: Activation, out: &mut [f32]) {
    let (gate, up) = weights.layouts();
    check(x, gate, weights.rows(), out.len());
    let job = Job {
        panels: weights.panels(),
        unit_bytes: gate.bytes + up.bytes,
        rows: weights.rows(),
        layout: gate,
        kernels: Kernels::new(pool.cpu(), gate.dtype, x),
        finish: Finish::Gate { up, kernels: Kernels::new(pool.cpu(), up.dtype, x), activation },
        out: Disjoint::new(out),
    };
    run(pool, x, &[job]);
}

fn check(x: &Inputs, layout: &Layout, rows: usize, out: usize) {
    let kind = crate::matrix::InputKind::of(layout.dtype);
    assert_eq!(x.kind(), Some(kind), "inputs for {} weights", layout.dtype.name());
    assert_eq!(x.cols(), layout.cols, "input features");
    assert_eq!(out, x.rows() * rows, "output values for {} rows of {rows}", x.rows());
}

/// A product as the threads see it: *units* (a panel, or a gate and an up panel) one after the other.
struct Job<'a> {
    panels: &'a [u8],
    unit_bytes: usize,
    /// Output features.
    rows: usize,
    /// Of the panel, or of the gate's.
    layout: &'a Layout,
    kernels: Kernels,
    finish: Finish<'a>,
    out: Disjoint<'a, f32>,
}

/// What becomes of a panel's sums.
enum Finish<'a> {
    Add { bias: Option<&'a [f32]>, accumulate: bool },
    Gate { up: &'a Layout, kernels: Kernels, activation: Activation },
}

/// The kernels for a batch: its tiles have one number of rows, or two that differ by one.
#[derive(Clone, Copy)]
struct Kernels {
    /// Rows of the larger tiles.
    most: usize,
    larger: Kernel,
    smaller: Kernel,
}

impl Kernels {
    fn new(cpu: Cpu, dtype: DType, x: &Inputs) -> Kernels {
        let most = x.tiles().tile(0).1;
        let kernel = |rows: usize| kernel(cpu.family(), dtype, rows.max(1));
        Kernels { most, larger: kernel(most), smaller: kernel(most.saturating_sub(1)) }
    }

    /// Computes the sums of a tile.
    fn run(self, tile: &Tile<'_>, sums: &mut Sums) {
        assert!(tile.panel.len() == tile.layout.bytes && (1..=TILE).contains(&tile.rows));
        assert!(tile.rows == self.most || tile.rows + 1 == self.most);
        // SAFETY: a `Cpu` exists only where its family's instructions do.
        unsafe { if tile.rows == self.most { (self.larger)(tile, sums) } else { (self.smaller)(tile, sums) } }
    }
}

/// Up to this many tiles a thread keeps the share of the weights that it has; beyond, threads claim panels.
const STATIC_TILES: usize = 6;

/// Panels that a thread claims at a time.
const CLAIM_UNITS: usize = 2;

/// Bytes of prepared inputs that stay in a core's second-level cache beside the weights.
const CHUNK_BYTES: usize = 512 << 10;

/// How far ahead of its own reading a kernel prefetches where one tile is all there is.
const PREFETCH_BYTES: usize = 8192;

/// Up to this many rows the output stays in the first-level cache by itself. More are spread over as many pages, and
/// another core may have written them last; asking for their lines before the sums are computed hides the way.
const FEW: usize = 2;

fn run(pool: &Pool, x: &Inputs, jobs: &[Job<'_>]) {
    let tiles = &x.each_tile()[..];
    let Some(first) = tiles.first() else { return };
    if jobs.iter().all(|job| job.units() == 0) {
        return;
    }
    if tiles.len() <= STATIC_TILES {
        return pool.run(|worker| {
            let mut sums = Both::new();
            for (job, units) in shares(jobs, worker) {
                for unit in units {
                    job.run(pool.cpu(), unit, tiles, &mut sums);
                }
            }
        });
    }
    let chunk = (CHUNK_BYTES / size_of_val(first.words).max(1)).clamp(1, tiles.len());
    // As even as possible: no short chunk at the end.
    let chunks = tiles.len().div_ceil(chunk);
    let claims: usize = jobs.iter().map(Job::claims).sum();
    pool.run(|worker| {
        let mut sums = Both::new();
        while let Some(index) = worker.claim(chunks * claims) {
            let (chunk, mut claim) = (index / claims, index % claims);
            let tiles = &tiles[chunk * tiles.len() / chunks..(chunk + 1) * tiles.len() / chunks];
            for job in jobs {
                if claim < job.claims() {
                    let units = claim * CLAIM_UNITS..((claim + 1) * CLAIM_UNITS).min(job.units());
                    units.for_each(|unit| job.run(pool.cpu(), unit, tiles, &mut sums));
                    break;
                }
                claim -= job.claims();
            }
        }
    });
}

/// This worker's share of all units: contiguous, and as even in bytes as units allow.
fn shares<'j, 'a>(
    jobs: &'j [Job<'a>],
    worker: &Worker<'_>,
) -> impl Iterator<Item = (&'j Job<'a>, Range<usize>)> + use<'j, 'a> {
    let total: usize = jobs.iter().map(|job| job.units() * job.unit_bytes).sum();
    let bound = |rank: usize| (total as u128 * rank as u128 / worker.count as u128) as usize;
    let (low, high) = (bound(worker.rank), bound(worker.rank + 1));
    let mut start = 0;
    jobs.iter().map(move |job| {
        // A unit belongs to whom its first byte belongs.
        let at = |bound: usize| bound.saturating_sub(start).div_ceil(job.unit_bytes.max(1)).min(job.units());
        let range = at(low)..at(high);
        start += job.units() * job.unit_bytes;
        (job, range)
    })
}

/// Room for the sums of a panel and, in gated products, of its partner.
struct Both {
    sums: Sums,
    up: Sums,
}

impl Both {
    fn new() -> Both {
        Both { sums: Sums([[0.0; LANES]; TILE]), up: Sums([[0.0; LANES]; TILE]) }
    }
}

impl Job<'_> {
    fn units(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    fn claims(&self) -> usize {
        self.units().div_ceil(CLAIM_UNITS)
    }

    /// Computes one unit for `tiles`.
    fn run(&self, cpu: Cpu, unit: usize, tiles: &[TileInputs<'_>], both: &mut Both) {
        let bytes = &self.panels[unit * self.unit_bytes..][..self.unit_bytes];
        let (panel, partner) = bytes.split_at(self.layout.bytes);
        // One tile reads on from where it is; several have the time to fetch the next unit during the first.
        let distance = if tiles.len() == 1 { PREFETCH_BYTES } else { self.unit_bytes };
        for (index, &TileInputs { first, rows, words, halves }) in tiles.iter().enumerate() {
            let ahead = |panel: &[u8]| match index {
                0 => panel.as_ptr().wrapping_add(distance),
                _ => std::ptr::null(),
            };
            if rows > FEW {
                (first..first + rows)
                    .for_each(|row| lanes::prefetch_write(self.out.at(row * self.rows + unit * LANES)));
            }
            let tile = Tile { layout: self.layout, panel, rows, words, halves, ahead: ahead(panel) };
            self.kernels.run(&tile, &mut both.sums);
            if let Finish::Gate { up, kernels, .. } = self.finish {
                let tile = Tile { layout: up, panel: partner, ahead: ahead(partner), ..tile };
                kernels.run(&tile, &mut both.up);
            }
            self.finish(cpu, unit, first, rows, both);
        }
    }

    /// Turns a tile's sums into output values.
    fn finish(&self, cpu: Cpu, unit: usize, first: usize, rows: usize, both: &Both) {
        let column = unit * LANES;
        let store = Store {
            job: self,
            sums: &both.sums.0[..rows],
            up: &both.up.0[..rows],
            first: first * self.rows + column,
            column,
            lanes: LANES.min(self.rows - column),
        };
        lanes::dispatch(cpu, store);
    }
}

/// What follows the sums of a tile: activation, bias, residual; then they are written.
struct Store<'a, 'j> {
    job: &'a Job<'j>,
    sums: &'a [[f32; LANES]],
    up: &'a [[f32; LANES]],
    /// Where the first row's values go in the output.
    first: usize,
    /// Output feature of the first lane, and features from it on.
    column: usize,
    lanes: usize,
}

impl lanes::Kernel for Store<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Store { job, sums, up, lanes, .. } = self;
        let whole = lanes == LANES;
        let load = |x: &[f32]| if whole { l.load(x) } else { l.load_first(x, lanes) };
        for (row, (sums, up)) in sums.iter().zip(up).enumerate() {
            let at = self.first + row * job.rows;
            // SAFETY: a unit's columns of a tile's rows are written by the one worker that has both.
            let out = unsafe { job.out.part(at..at + lanes) };
            let mut y = l.load(sums);
            match job.finish {
                Finish::Gate { activation, .. } => y = l.mul(activation.apply_lanes(l, y), l.load(up)),
                Finish::Add { bias, accumulate } => {
                    if let Some(bias) = bias {
                        y = l.add(y, load(&bias[self.column..]));
                    }
                    if accumulate {
                        y = l.add(y, load(out));
                    }
                }
            }
            if whole {
                l.store(y, out);
            } else {
                l.store_first(y, out, lanes);
            }
        }
    }
}

/// The kernel of a family for a format and a number of rows.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(unused_variables, reason = "one kernel for any number of rows")
)]
fn kernel(family: Family, dtype: DType, rows: usize) -> Kernel {
    match family {
        #[cfg(target_arch = "x86_64")]
        Family::Avx512 => avx512::kernel(dtype, rows),
        #[cfg(target_arch = "x86_64")]
        Family::Avx2 => avx2::kernel(dtype),
        #[cfg(target_arch = "aarch64")]
        Family::Neon => neon::kernel(dtype),
        _ => scalar::kernel(dtype),
    }
}

#[cfg(test)]
mod tests;
