//! Text to token ids and back.

/// Whether the text of a special token in the input becomes that token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Never: user text. `<|im_end|>` typed by a person is seven ordinary characters or so.
    AsText,
    /// Yes: text that a template made.
    Parse,
}

/// A model's tokenizer. Cheap to share behind an `Arc`.
pub struct Tokenizer {}

impl Tokenizer {
    /// Token ids of `text`, without any that a post-processor would add (see [`Tokenizer::bos`]).
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let _ = (text, specials);
        todo!()
    }

    /// The token that starts every sequence, where the model wants one.
    pub fn bos(&self) -> Option<u32> {
        todo!()
    }

    /// Tokens that end an answer (end of text, end of turn).
    pub fn end_tokens(&self) -> &[u32] {
        todo!()
    }

    /// Tokens in the vocabulary; ids are below it.
    pub fn vocab(&self) -> usize {
        todo!()
    }

    /// The bytes a token stands for (a part of a character, perhaps); empty for special tokens and unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let _ = id;
        todo!()
    }

    /// The token's name as the vocabulary spells it (`<|im_end|>`, `Ġthe`).
    pub fn token_text(&self, id: u32) -> Option<&str> {
        let _ = id;
        todo!()
    }

    /// Whether the token is special: it has no text of its own.
    pub fn is_special(&self, id: u32) -> bool {
        let _ = id;
        todo!()
    }

    /// Text of whole ids; bytes that are no UTF-8 become U+FFFD. Special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let _ = ids;
        todo!()
    }
}

/// Turns one answer's token ids into text as they come; a character that spans tokens comes out whole.
#[derive(Debug, Default, Clone)]
pub struct StreamDecoder {
    _pending: Vec<u8>,
}

impl StreamDecoder {
    /// At the start of an answer.
    pub fn new() -> StreamDecoder {
        StreamDecoder::default()
    }

    /// The text that `id` completes (often one token's, sometimes none).
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let _ = (tokenizer, id);
        todo!()
    }

    /// What is left at the end: an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> String {
        todo!()
    }
}
