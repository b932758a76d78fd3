//! Number formats, packed weights, kernels and the compute thread pool.
//!
//! Every operation takes the [`Pool`] that runs it and is one fork and join. Kernels come in families
//! ([`cpu::Family`]): `scalar` is the specification, the SIMD files mirror its names.
//!
//! # Rows are independent
//!
//! Row *i* of an output depends on row *i* of the input and on the weights alone: not on how many rows came
//! along, not on the number of threads. Each output element is one sequential chain of operations whose order
//! is part of the specification, so families that follow it give the same bits too.

pub mod activation;
pub mod attention;
pub mod buffer;
pub mod cpu;
pub mod dtype;
pub mod kv;
pub mod limits;
pub mod linear;
pub mod map;
pub mod matrix;
pub mod norm;
pub mod pool;
pub mod quant;
pub mod reduce;
pub mod rope;
pub mod train;

mod error;
mod lanes;
#[cfg(test)]
mod test_support;

pub use cpu::{Cpu, Family};
pub use dtype::DType;
pub use error::Error;
pub use pool::Pool;
