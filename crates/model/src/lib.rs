//! Model files, tokenizers, chat templates and architectures.
//!
//! A model is *opened* (headers read and checked: [`Opened`]), then its weights are loaded and packed
//! ([`arch::Model`]). The architecture is defined once, over ragged packed tokens.

pub mod arch;
pub mod chat;
pub mod formats;
pub mod tokenizer;
pub mod train;

mod error;

pub use arch::{Batch, Model, ModelConfig, Scratch};
pub use chat::ChatTemplate;
pub use error::Error;
pub use formats::{Opened, open};
pub use tokenizer::Tokenizer;
