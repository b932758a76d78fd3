//! One step's gradients, bucket by bucket as backward completes them.

use std::time::Instant;

use consort_tensor::buffer::Buffer;
use consort_tensor::train::exact::Grid;
use consort_tensor::{Cpu, Pool};

use super::link::{Link, Pending};
use super::plan::{Plan, Wire};
use super::reduce::{self, Reduced};
use super::wire::{self, Feedback};

/// One step's work on gradients, as buckets are completed.
pub(super) struct Buckets<'s> {
    pub(super) sums: &'s mut [Option<Buffer<i64>>],
    pub(super) feedback: &'s mut [Feedback],
    pub(super) grids: &'s [Grid],
    /// What stands in for a bucket that is on its way.
    pub(super) empty: Vec<Buffer<f32>>,
    pub(super) largest: Vec<f32>,
    pub(super) sent: Vec<Sent>,
    pub(super) way: Option<Way<'s>>,
    pub(super) exact: bool,
}

/// A bucket on its way.
pub(super) struct Sent {
    pub(super) bucket: usize,
    pub(super) ready: Instant,
    pub(super) pending: Pending<Reduced>,
}

/// The way to the others.
#[derive(Clone, Copy)]
pub(super) struct Way<'s> {
    pub(super) link: &'s Link,
    pub(super) epoch: u64,
    pub(super) step: u64,
    pub(super) plan: &'s Plan,
    pub(super) cpu: Cpu,
}

impl Buckets<'_> {
    /// A micro-batch's gradients of a bucket are complete.
    pub(super) fn completed(
        &mut self,
        pool: &Pool,
        bucket: usize,
        values: &mut Buffer<f32>,
        first: bool,
        last: bool,
    ) {
        if self.exact
            && let Some(sums) = &mut self.sums[bucket]
        {
            let grid = self.grids[bucket];
            let most = if first { grid.set(pool, values, sums) } else { grid.add(pool, values, sums) };
            // Magnitudes order as their bits do, and NaN comes last.
            self.largest[bucket] = f32::from_bits(self.largest[bucket].to_bits().max(most.to_bits()));
            if last && self.way.is_none() {
                grid.read(pool, sums, values);
            }
        }
        if last {
            self.send(bucket, values);
        }
    }

    pub(super) fn send(&mut self, bucket: usize, values: &mut Buffer<f32>) {
        let (Some(way), Some(empty)) = (self.way, self.empty.pop()) else { return };
        let ready = Instant::now();
        let mut values = std::mem::replace(values, empty);
        let mut sums = self.sums.get_mut(bucket).and_then(Option::take);
        let mut feedback = self.feedback.get_mut(bucket).map(std::mem::take).unwrap_or_default();
        let (wire, exact) = (way.plan.wire, self.exact);
        let (grid, algorithm, cpu) = (self.grids[bucket], way.plan.algorithm, way.cpu);
        let what = format!("bucket {bucket} of step {}", way.step);
        let pending = way.link.start(way.epoch, what, move |group| {
            let start = Instant::now();
            match &mut sums {
                Some(sums) if exact => reduce::exact(group, algorithm, cpu, grid, sums, &mut values)?,
                _ if wire == Wire::F32 => reduce::plain(group, &mut values)?,
                _ => wire::all_reduce(group, wire, &mut values, &mut feedback)?,
            }
            Ok(Reduced { bucket, values, sums, feedback, start, end: Instant::now() })
        });
        self.sent.push(Sent { bucket, ready, pending });
    }
}
