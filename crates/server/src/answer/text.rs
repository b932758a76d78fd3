//! The engine's text assembler, and how far it is: how many bytes of text came in, and how many were told.
//!
//! The two differ where text is held back (a part of a character, what may become a stop string); by them an answer
//! knows which of its tokens lie within a stop string.

use consort_inference::{Piece, TextAssembler};
use consort_model::Tokenizer;

/// The text of one answer.
pub(crate) struct AnswerText {
    assembler: TextAssembler,
    taken: usize,
    told: usize,
}

impl AnswerText {
    pub(crate) fn new(stops: &[String]) -> AnswerText {
        AnswerText { assembler: TextAssembler::new(stops.to_vec()), taken: 0, told: 0 }
    }

    /// Bytes of text taken so far, told or not.
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

    /// Bytes of text told so far.
    pub(crate) fn told(&self) -> usize {
        self.told
    }

    /// Whether a stop string came; nothing after it is text.
    pub(crate) fn stopped(&self) -> bool {
        self.assembler.stop().is_some()
    }

    /// The text that `id` makes tellable.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.taken += tokenizer.token_bytes(id).len();
        let piece = self.assembler.push(tokenizer, id);
        self.tell(piece)
    }

    /// What is left when the answer ends.
    pub(crate) fn finish(&mut self) -> String {
        let piece = self.assembler.finish();
        self.tell(piece)
    }

    fn tell(&mut self, piece: Piece) -> String {
        self.told += piece.text.len();
        piece.text
    }
}
