//! Reductions over a row of logits.

use crate::Cpu;

/// The index of the largest value; of equals the first. NaN never wins; an all-NaN or empty row gives 0.
pub fn argmax(cpu: Cpu, row: &[f32]) -> usize {
    let _ = (cpu, row);
    todo!()
}

/// `ln Σ exp(x)`, in one fixed order of lanes.
pub fn log_sum_exp(cpu: Cpu, row: &[f32]) -> f32 {
    let _ = (cpu, row);
    todo!()
}
