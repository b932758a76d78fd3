//! Kernels that learn: forward and backward of every block of a decoder, the loss, and the optimizers.
//!
//! Everything is `f32` in memory. [`Precision`] says what products round their inputs to; sums are `f32` always.
//!
//! # The same bits for any number of threads
//!
//! Every output element is one chain of operations whose order is part of the specification:
//!
//! - a product's element is one chain over the inner dimension, in order ([`matmul`]);
//! - what is summed over rows (gradients of norms and biases) is summed in blocks of a fixed number of rows, each from
//!   its first row to its last, and the blocks in order;
//! - a sum of squares is made of blocks of a fixed length, in `f64`, added in order.
//!
//! So neither the number of threads nor which of them came first changes a bit, and in `f32` neither does the kernel
//! family. Forward rows are independent of each other but for attention, where they depend on the rows before them in
//! their own sequence alone.
//!
//! Blocks are checked against finite differences of their own forward in `f64`, and the whole against PyTorch
//! (`consort-model`). The way each backward is derived and laid out owes much to llm.c (`train_gpt2.c`) and to
//! FlashAttention 2 (Dao 2023), which their modules cite.

pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod exact;
pub mod matmul;
pub mod norm;
pub mod optimizer;
pub mod swiglu;

mod rows;

pub use matmul::Precision;
pub use rows::{add, add_bias, add_column_sums, clear, copy, pitch};
