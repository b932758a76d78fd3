//! The decoder that learns, beside the one that answers ([`crate::arch`]): same configuration, same names, `f32`
//! weights in one flat buffer instead of packed and quantized ones.
//!
//! - [`Layout`] says where each tensor lies in the flat buffer, under its Hugging Face name, and in which buckets
//!   gradients are born.
//! - [`Decoder`] computes loss and gradients of a [`MicroBatch`] of packed sequences.
//! - [`Layout::initialize`], [`Opened::read_weights`](crate::Opened::read_weights) and [`save()`] bring weights in and
//!   out.
//!
//! Families: Llama (SmolLM2 is one), Mistral without its window, Qwen 2 and Qwen 3.

mod arena;
mod backward;
mod batch;
mod decoder;
mod gguf;
mod initial;
mod layout;
mod save;

pub use arena::Arena;
pub use batch::MicroBatch;
pub use consort_tensor::train::Precision;
pub use consort_tensor::train::cross_entropy::Loss;
pub use decoder::{Decoder, Options};
pub use gguf::export_gguf;
pub use initial::Normal;
pub use layout::{Gradients, Layout, Parameter};
pub use save::{SavedType, config_file, save, tokenizer_files};
