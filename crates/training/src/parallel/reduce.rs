//! A bucket's gradients, from one worker's to everybody's.
//!
//! Exact: the sums are integers, 8 bytes a value. They are only needed where they are read back as floats, so each
//! worker reads a chunk (after `reduce_scatter`) and hands the floats out (`all_gather`): 12 bytes a value and worker
//! instead of the 16 of an all-reduce of integers, with the same bits, and each value is read once. A bucket goes
//! in segments that stay in the cache between the three.

use std::time::{Duration, Instant};

use consort_collectives::{Algorithm, Error, Group, Operation, ReduceOp};
use consort_tensor::buffer::Buffer;
use consort_tensor::train::exact::Grid;
use consort_tensor::{Cpu, Pool};

use super::wire::Feedback;

/// Values of a segment.
const SEGMENT: usize = 1 << 18;

/// A bucket that was reduced.
pub(super) struct Reduced {
    pub(super) bucket: usize,
    pub(super) values: Buffer<f32>,
    /// The integers, to be used again; of no meaning now.
    pub(super) sums: Option<Buffer<i64>>,
    /// What rounding took away, where something is rounded.
    pub(super) feedback: Feedback,
    pub(super) start: Instant,
    pub(super) end: Instant,
}

impl Reduced {
    /// How long it was on its way before `moment`.
    pub(super) fn before(&self, moment: Instant) -> Duration {
        self.end.min(moment).saturating_duration_since(self.start)
    }
}

/// Adds `sums` over all workers and fills `values` with what they come to.
pub(super) fn exact(
    group: &mut Group,
    algorithm: Option<Algorithm>,
    cpu: Cpu,
    grid: Grid,
    sums: &mut [i64],
    values: &mut [f32],
) -> Result<(), Error> {
    let pool = Pool::new(1, cpu);
    if group.world_size() == 1 {
        grid.read(&pool, sums, values);
        return Ok(());
    }
    // An algorithm that was asked for by name is used, if it takes a whole all-reduce.
    let whole = algorithm.is_some_and(|a| !Algorithm::of(Operation::ReduceScatter).contains(&a));
    for (sums, values) in sums.chunks_mut(SEGMENT).zip(values.chunks_mut(SEGMENT)) {
        if whole {
            group.all_reduce(sums, ReduceOp::Sum)?;
            grid.read(&pool, sums, values);
        } else {
            let mine = group.reduce_scatter(sums, ReduceOp::Sum)?;
            grid.read(&pool, &sums[mine.clone()], &mut values[mine]);
            group.all_gather(values)?;
        }
    }
    Ok(())
}

/// Adds `values` over all workers as they are, in the algorithm's order.
pub(super) fn plain(group: &mut Group, values: &mut [f32]) -> Result<(), Error> {
    values.chunks_mut(SEGMENT).try_for_each(|values| group.all_reduce(values, ReduceOp::Sum))
}
