//! How long an operation takes: the measurement behind `consort bench collectives` and the tables in `docs/`.
//!
//! The time of a call is the median over calls, each taken on its slowest rank, from a barrier on. Short vectors are
//! timed in batches, since a clock costs as much as a few of them. Bandwidths follow NCCL's tests
//! (`doc/PERFORMANCE.md` there): *algorithm* bandwidth is the vector's bytes over the time, *bus* bandwidth that times
//! what each rank must at least send, as a part of the vector, so that it can be held against a link's or a memory's
//! speed whatever the number of ranks.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::call::Operation;
use crate::element::ReduceOp;
use crate::error::Error;
use crate::group::Group;
use crate::schedule::Algorithm;

/// The longest vector: room for two of them is taken.
const MOST_BYTES: usize = 4 << 30;

/// What one operation of one length took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes of the vector that the operation is about: all chunks together.
    pub bytes: usize,
    /// Microseconds of a call.
    pub micros: f64,
    /// Timed calls.
    pub calls: usize,
    /// Bytes over time, in 10⁹ bytes a second.
    pub algorithm_gb_per_s: f64,
    /// That times [`bus_factor`].
    pub bus_gb_per_s: f64,
}

/// Operations that can be measured.
pub const OPERATIONS: [Operation; 5] = [
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::Broadcast,
    Operation::AllToAll,
];

/// The part of the vector that each rank must at least send.
pub fn bus_factor(operation: Operation, world_size: usize) -> f64 {
    let n = world_size.max(1) as f64;
    match operation {
        Operation::AllReduce => 2.0 * (n - 1.0) / n,
        Operation::ReduceScatter | Operation::AllGather | Operation::AllToAll => (n - 1.0) / n,
        _ => 1.0,
    }
}

/// Measures `operation` over f32 (sums, where it reduces) for about `budget`. All ranks must call it alike.
///
/// # Errors
/// Those of the operation; [`Error::Invalid`] for one that isn't in [`OPERATIONS`], or for too many bytes.
pub fn measure(
    group: &mut Group,
    operation: Operation,
    bytes: usize,
    budget: Duration,
) -> Result<Measured, Error> {
    let n = group.world_size();
    if !OPERATIONS.contains(&operation) || bytes > MOST_BYTES {
        let what =
            format!("{} of {bytes} bytes cannot be measured (most are {MOST_BYTES})", operation.name());
        return Err(Error::Invalid { what });
    }
    // What all-to-all sends must be a multiple of the ranks.
    let count = (bytes / 4).next_multiple_of(if operation == Operation::AllToAll { n } else { 1 });
    let mut buffer = vec![0f32; count];
    let mut output = if operation == Operation::AllToAll { vec![0f32; count] } else { Vec::new() };
    let batch = (65_536 / (count + 1)).clamp(1, 100);
    let mut times: Vec<f32> = Vec::new();
    let mut again = [1i32];
    let started = Instant::now();
    while again[0] == 1 {
        let check = times.len().is_multiple_of(16) && operation == Operation::AllReduce && batch == 1;
        buffer.fill(if check { 1.0 } else { 0.0 });
        group.barrier()?;
        let start = Instant::now();
        for _ in 0..batch {
            match operation {
                Operation::AllReduce => group.all_reduce(&mut buffer, ReduceOp::Sum)?,
                Operation::ReduceScatter => {
                    group.reduce_scatter(&mut buffer, ReduceOp::Sum)?;
                }
                Operation::AllGather => group.all_gather(&mut buffer)?,
                Operation::Broadcast => group.broadcast(&mut buffer, 0)?,
                _ => group.all_to_all(&buffer, &mut output)?,
            }
        }
        times.push(start.elapsed().as_secs_f32() * 1e6 / batch as f32);
        if check && buffer.iter().any(|x| *x != n as f32) {
            return Err(Error::Invalid { what: format!("a wrong sum of {count} numbers: this is a defect") });
        }
        // Who has taken longest decides, so that all stop together.
        again[0] = i32::from(times.len() < 5 || started.elapsed() < budget && times.len() < 1000);
        group.all_reduce(&mut again, ReduceOp::Max)?;
    }
    group.all_reduce(&mut times, ReduceOp::Max)?;
    times.sort_by(f32::total_cmp);
    let micros = f64::from(times[times.len() / 2]).max(1e-3);
    let algorithm = (count * 4) as f64 / micros / 1e3;
    Ok(Measured {
        bytes,
        micros,
        calls: times.len() * batch,
        algorithm_gb_per_s: algorithm,
        bus_gb_per_s: algorithm * bus_factor(operation, n),
    })
}

/// What one algorithm took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    /// Its name.
    pub algorithm: String,
    /// Microseconds of a call.
    pub micros: f64,
}

/// What each algorithm takes for one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// The operation's name.
    pub operation: String,
    /// Bytes of the vector.
    pub bytes: usize,
    /// Every algorithm of the operation.
    pub times: Vec<Timed>,
    /// The one that a call takes when nobody names one.
    pub chosen: String,
}

/// Measures `operation` by each of its algorithms, for about `budget` each. Afterwards none is forced.
///
/// # Errors
/// As [`measure`].
pub fn compare(
    group: &mut Group,
    operation: Operation,
    bytes: usize,
    budget: Duration,
) -> Result<Compared, Error> {
    let mut times = Vec::new();
    for algorithm in Algorithm::of(operation) {
        group.set_algorithm(Some(*algorithm));
        let micros = measure(group, operation, bytes, budget)?.micros;
        times.push(Timed { algorithm: algorithm.name().into(), micros });
    }
    group.set_algorithm(None);
    let chosen = Algorithm::choose(operation, group.transport(), group.hosts(), bytes).name().into();
    Ok(Compared { operation: operation.name().into(), bytes, times, chosen })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bus_factors_are_those_of_nccl_tests() {
        assert_eq!(bus_factor(Operation::AllReduce, 4), 1.5);
        assert_eq!(bus_factor(Operation::AllGather, 4), 0.75);
        assert_eq!((bus_factor(Operation::Broadcast, 4), bus_factor(Operation::AllReduce, 1)), (1.0, 0.0));
    }
}
