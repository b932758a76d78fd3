//! Documents as tokens, and which of them are to be predicted.
//!
//! Of a text every token is. Of a conversation those are that the assistant said, its end of turn among them: what
//! follows the prompt that would have made it speak. The template decides what that is, so it is asked: a turn's tokens
//! are what the template adds when the turn is there. Where a template writes a turn otherwise once others follow (some
//! drop a turn's thoughts), each turn becomes a document of its own.

use consort_model::Tokenizer;
use consort_model::chat::{ChatOptions, ChatTemplate};
use consort_model::tokenizer::Specials;
use serde_json::Value;

/// Tokens, and whether each is to be predicted.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Encoded {
    pub(super) tokens: Vec<u32>,
    pub(super) predicted: Vec<bool>,
}

/// A text, or a part of one: the first part begins the sequence, the last one ends it.
pub(super) fn text(tokenizer: &Tokenizer, text: &str, first: bool, last: bool) -> Encoded {
    let mut tokens = Vec::new();
    tokens.extend(tokenizer.bos().filter(|_| first));
    tokens.extend(tokenizer.encode(text, Specials::AsText));
    let end = || tokenizer.token_id(tokenizer.eos_text()?);
    tokens.extend(if last { end() } else { None });
    Encoded { predicted: vec![true; tokens.len()], tokens }
}

/// A conversation.
///
/// # Errors
/// What is wrong with it, for the person who wrote the line.
pub(super) fn chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Value],
    tools: &[Value],
) -> Result<Vec<Encoded>, String> {
    let encode = |messages: &[Value], add_generation_prompt: bool| {
        let options = ChatOptions { tools: tools.to_vec(), add_generation_prompt, ..ChatOptions::default() };
        template.encode(tokenizer, messages, &options).map_err(|e| e.to_string())
    };
    let mut turns = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        if message["role"] != "assistant" {
            continue;
        }
        let (before, after) = (encode(&messages[..i], true)?, encode(&messages[..=i], false)?);
        // A prompt may hold more than the turn has later, such as an empty thought.
        let start = before.iter().zip(&after).take_while(|(a, b)| a == b).count();
        let ends = |token: &u32| tokenizer.end_tokens().contains(token);
        let end = after[start..].iter().rposition(ends).map_or(after.len(), |end| start + end + 1);
        turns.push((start..end, start == before.len(), after));
    }
    if turns.is_empty() {
        return Err("no message is the assistant's: there is nothing to learn".to_owned());
    }
    let whole = encode(messages, false)?;
    if turns.iter().all(|(_, plain, after)| *plain && whole.starts_with(after)) {
        let mut predicted = vec![false; whole.len()];
        turns.into_iter().for_each(|(turn, ..)| predicted[turn].fill(true));
        return Ok(vec![Encoded { tokens: whole, predicted }]);
    }
    let alone = turns.into_iter().map(|(turn, _, mut tokens)| {
        tokens.truncate(turn.end);
        let predicted = (0..tokens.len()).map(|i| turn.contains(&i)).collect();
        Encoded { tokens, predicted }
    });
    Ok(alone.collect())
}
