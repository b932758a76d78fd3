//! ln p of tokens in the two shapes OpenAI has for it.

use consort_api::{ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob};
use consort_inference::TokenEvent;
use consort_model::Tokenizer;
use serde_json::{Map, Value};

/// JSON has no −∞.
const IMPOSSIBLE: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(IMPOSSIBLE) } else { IMPOSSIBLE }
}

/// A token's text, with U+FFFD for what is no character by itself; a special token shows its name.
fn text(tokenizer: &Tokenizer, id: u32) -> String {
    if tokenizer.is_special(id) {
        return tokenizer.token_text(id).unwrap_or_default().to_owned();
    }
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}

/// As `text`, but a part of a character reads `bytes:\xe2\x80`: the keys of one map must differ.
fn key(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_special(id) || std::str::from_utf8(bytes).is_ok() {
        return text(tokenizer, id);
    }
    let hex: String = bytes.iter().map(|b| format!("\\x{b:02x}")).collect();
    format!("bytes:{hex}")
}

fn bytes(tokenizer: &Tokenizer, id: u32) -> Option<Vec<u8>> {
    (!tokenizer.is_special(id)).then(|| tokenizer.token_bytes(id).to_vec())
}

/// For chat: one entry a token, with its bytes.
pub(crate) fn chat(tokenizer: &Tokenizer, tokens: &[TokenEvent]) -> ChatLogprobs {
    let entry = |token: &TokenEvent| TokenLogprob {
        token: text(tokenizer, token.id),
        logprob: finite(token.logprob.unwrap_or(IMPOSSIBLE)),
        bytes: bytes(tokenizer, token.id),
        top_logprobs: token
            .top
            .iter()
            .map(|(id, logprob)| TopLogprob {
                token: text(tokenizer, *id),
                logprob: finite(*logprob),
                bytes: bytes(tokenizer, *id),
            })
            .collect(),
    };
    ChatLogprobs { content: tokens.iter().map(entry).collect() }
}

/// For completions: four lists. `offset` is the characters of text before the first token, and moves on.
pub(crate) fn completion(
    tokenizer: &Tokenizer,
    tokens: &[TokenEvent],
    offset: &mut usize,
) -> CompletionLogprobs {
    let mut lists = CompletionLogprobs::default();
    for token in tokens {
        lists.tokens.push(key(tokenizer, token.id));
        lists.token_logprobs.push(token.logprob.map(finite));
        lists.text_offset.push(*offset);
        lists.top_logprobs.push(token.logprob.map(|_| {
            let pair = |(id, logprob): &(u32, f32)| (key(tokenizer, *id), Value::from(finite(*logprob)));
            token.top.iter().map(pair).collect::<Map<_, _>>()
        }));
        *offset += characters(tokenizer, token.id);
    }
    lists
}

/// Characters that begin in a token: bytes that go on with one add none.
pub(crate) fn characters(tokenizer: &Tokenizer, id: u32) -> usize {
    tokenizer.token_bytes(id).iter().filter(|b| **b & 0xC0 != 0x80).count()
}
