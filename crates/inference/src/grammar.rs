//! Answers that follow a grammar: JSON, a JSON schema, a regular expression or a Lark grammar (tool calls).
//!
//! llguidance compiles a grammar to an Earley parser over derivatives of regular expressions. Before each pick it
//! walks a trie of all token bytes once and yields one bit a token; [`GrammarState::apply`] turns the zeros into
//! −∞. The masks are a function of the grammar and of the ids accepted so far, of nothing else: a replica that
//! replays the emitted ids gets the same masks.
//!
//! Tokens are never forced in groups: the model picks among every spelling of the allowed bytes, so that an answer
//! under a grammar that allows what the model wanted to say is the answer without it.
//!
//! Cost: the trie is built at the first grammar (about 30 ms for 49,000 tokens); a mask takes some 50 µs on average.
//! The last few grammars are kept compiled: the answers of one request share one, and so do the requests of a program
//! that always sends the same schema.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use consort_model::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::request::Grammar;

/// Longest grammar taken, in bytes (a schema is counted as compact JSON).
pub const MAX_GRAMMAR_BYTES: usize = 256 * 1024;
/// Longest regular expression taken, in bytes.
pub const MAX_REGEX_BYTES: usize = 16 * 1024;
/// Deepest nesting of a schema.
pub const MAX_SCHEMA_DEPTH: usize = 64;
/// Deepest nesting of brackets in a regular expression or a Lark grammar (which may hold a schema).
pub const MAX_NESTING: usize = 160;

/// Tokens longer than this are never allowed under a grammar: the trie's walk recurses once a byte.
const MAX_TOKEN_BYTES: usize = 200;

/// Grammars kept compiled. The limits bound what one takes.
const KEPT: usize = 4;

/// The white space a model may put between two JSON tokens: one space, or a line break with its indentation. A
/// model that could write more would now and then write nothing else.
const JSON_SPACE: &str = r"( |\n {0,40}|\n\t{0,12})";

/// Why a grammar was refused, or why a state can't go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GrammarError {
    /// The grammar is wrong, or uses what isn't supported; the caller changes it. The text names the part.
    #[error("{reason}")]
    Invalid {
        /// What is wrong, in the grammar's own words.
        reason: String,
    },
    /// The grammar is past a limit; the caller makes it smaller.
    #[error("the {what} is {got}; at most {limit} is taken")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// How much it is.
        got: usize,
        /// How much it may be.
        limit: usize,
    },
    /// [`GrammarState::accept`] got a token that the mask forbids.
    #[error("the grammar doesn't allow token {token} here")]
    Forbidden {
        /// The token.
        token: u32,
    },
    /// This state took more work than the limits allow; the request fails.
    #[error("the grammar took too much work at this point: {reason}")]
    Exhausted {
        /// Which limit.
        reason: String,
    },
}

/// Compiles grammars for one tokenizer. Cheap to make: the token trie is built at the first grammar, once.
pub struct GrammarEngine {
    tokenizer: Arc<Tokenizer>,
    factory: OnceLock<Result<ParserFactory, String>>,
    /// Where answers under the last grammars begin, the latest first.
    kept: Mutex<VecDeque<(Key, GrammarState)>>,
}

/// A grammar's kind and text. Not the grammar itself: two JSON objects are equal whatever their order, and the order of
/// a schema's properties is part of what it means here.
#[derive(PartialEq)]
struct Key(std::mem::Discriminant<Grammar>, String);

impl Key {
    fn of(grammar: &Grammar) -> Key {
        let text = match grammar {
            Grammar::JsonObject => String::new(),
            Grammar::JsonSchema(schema) => schema.to_string(),
            Grammar::Lark(source) | Grammar::Regex(source) => source.clone(),
        };
        Key(std::mem::discriminant(grammar), text)
    }
}

impl fmt::Debug for GrammarEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarEngine").field("built", &self.factory.get().is_some()).finish()
    }
}

impl GrammarEngine {
    /// For this tokenizer. Does no work yet.
    pub fn new(tokenizer: Arc<Tokenizer>) -> GrammarEngine {
        GrammarEngine { tokenizer, factory: OnceLock::new(), kept: Mutex::default() }
    }

    /// Compiles a grammar (some 1 to 20 ms, bounded by the limits above: not for the engine's thread), or copies it
    /// from the last few.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`] names the keyword or the line; [`GrammarError::TooLarge`].
    pub fn compile(&self, grammar: &Grammar) -> Result<GrammarState, GrammarError> {
        let key = Key::of(grammar);
        if let Some(state) = self.kept(&key) {
            return Ok(state);
        }
        // Not under the lock: who asks for another grammar doesn't wait for this one.
        let state = self.compile_new(grammar)?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(KEPT - 1);
        kept.push_front((key, state.clone()));
        Ok(state)
    }

    /// A copy of the state kept under `key`, which is then the latest.
    fn kept(&self, key: &Key) -> Option<GrammarState> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == key)?;
        let latest = kept.remove(at)?;
        let state = latest.1.clone();
        kept.push_front(latest);
        Some(state)
    }

    fn compile_new(&self, grammar: &Grammar) -> Result<GrammarState, GrammarError> {
        let top = match grammar {
            Grammar::JsonObject => {
                TopLevelGrammar::from_json_schema(prepare_schema(&json!({"type": "object"}))?)
            }
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(prepare_schema(schema)?),
            Grammar::Lark(source) => {
                check_length("grammar", source.len(), MAX_GRAMMAR_BYTES)?;
                check_brackets(source)?;
                TopLevelGrammar::from_lark(source.clone())
            }
            Grammar::Regex(source) => {
                check_length("regular expression", source.len(), MAX_REGEX_BYTES)?;
                check_brackets(source)?;
                TopLevelGrammar::from_regex(source)
            }
        };
        let factory = self
            .factory
            .get_or_init(|| build_factory(&self.tokenizer))
            .as_ref()
            .map_err(|reason| GrammarError::Invalid { reason: reason.clone() })?;
        let parser = factory
            .create_parser(top)
            .map_err(|e| GrammarError::Invalid { reason: explain(&e.to_string()) })?;
        let matcher = Matcher::new(Ok(parser));
        if let Some(reason) = matcher.get_error() {
            return Err(GrammarError::Invalid { reason: explain(&reason) });
        }
        let mut state = GrammarState { matcher, mask: None };
        // The first mask too, here and not on the engine's thread. There is none where nothing can be said.
        if state.mask().is_err() {
            return Err(GrammarError::Invalid { reason: "no answer can satisfy this grammar".into() });
        }
        Ok(state)
    }
}

/// Where one answer stands in its grammar. A clone goes on independently.
pub struct GrammarState {
    matcher: Matcher,
    mask: Option<SimpleVob>,
}

impl Clone for GrammarState {
    fn clone(&self) -> GrammarState {
        // Deep: the lexers' caches too, so that clones on two threads don't wait for each other's lock.
        GrammarState { matcher: self.matcher.deep_clone(), mask: self.mask.clone() }
    }
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarState").field("finished", &self.is_finished()).finish_non_exhaustive()
    }
}

impl GrammarState {
    /// The tokens allowed next: bit `id % 32` of word `id / 32`. End tokens are in it exactly where the grammar
    /// can end. Ids past the last word are forbidden. Computed once for each accepted token.
    ///
    /// # Errors
    /// [`GrammarError::Exhausted`].
    pub fn mask(&mut self) -> Result<&[u32], GrammarError> {
        if self.mask.is_none() {
            let mask = self
                .matcher
                .compute_mask_or_eos()
                .map_err(|e| GrammarError::Exhausted { reason: explain(&e.to_string()) })?;
            self.mask = Some(mask);
        }
        Ok(self.mask.as_ref().map_or(&[], |m| m.as_slice()))
    }

    /// Sets the logits (one for each token id) of every forbidden token to −∞.
    ///
    /// # Errors
    /// [`GrammarError::Exhausted`].
    pub fn apply(&mut self, logits: &mut [f32]) -> Result<(), GrammarError> {
        let mask = self.mask()?;
        let mut rows = logits.chunks_mut(32);
        for (&word, row) in mask.iter().zip(&mut rows) {
            match word {
                u32::MAX => {}
                0 => row.fill(f32::NEG_INFINITY),
                _ => {
                    for (bit, logit) in row.iter_mut().enumerate() {
                        if word & (1 << bit) == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        for row in rows {
            row.fill(f32::NEG_INFINITY);
        }
        Ok(())
    }

    /// Whether `token` may come next.
    ///
    /// # Errors
    /// [`GrammarError::Exhausted`].
    pub fn allows(&mut self, token: u32) -> Result<bool, GrammarError> {
        let mask = self.mask()?;
        Ok(mask.get(token as usize / 32).is_some_and(|word| word & (1 << (token % 32)) != 0))
    }

    /// Goes past `token`. After an end token the state is finished.
    ///
    /// # Errors
    /// [`GrammarError::Forbidden`] (the state is unchanged), [`GrammarError::Exhausted`].
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        if !self.allows(token)? {
            return Err(GrammarError::Forbidden { token });
        }
        if self.matcher.is_stopped() {
            return Ok(()); // Only an end token was allowed, and nothing comes after it.
        }
        self.mask = None;
        self.matcher
            .consume_token(token)
            .map_err(|e| GrammarError::Exhausted { reason: explain(&e.to_string()) })
    }

    /// Nothing can follow but an end token: the answer is complete.
    pub fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// The answer so far is complete, though more might follow. Where this holds the mask has the end tokens.
    pub fn can_end(&mut self) -> bool {
        self.is_finished() || self.matcher.is_accepting().unwrap_or(false)
    }
}

/// Checks a JSON schema against the limits and sets how its white space is bounded. For schemas put into a Lark
/// grammar with `%json`; [`Grammar::JsonSchema`] does it itself.
///
/// # Errors
/// [`GrammarError::TooLarge`]; [`GrammarError::Invalid`] for what is no schema.
pub fn prepare_schema(schema: &Value) -> Result<Value, GrammarError> {
    check_depth(schema, 0)?;
    check_length("schema in bytes", schema.to_string().len(), MAX_GRAMMAR_BYTES)?;
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        _ => {
            return Err(GrammarError::Invalid { reason: "a JSON schema must be an object".into() });
        }
    };
    // A name of llguidance's own; what a client put there is no part of JSON Schema and must not set options.
    schema["x-guidance"] = json!({ "whitespace_pattern": JSON_SPACE });
    Ok(schema)
}

fn check_length(what: &'static str, got: usize, limit: usize) -> Result<(), GrammarError> {
    if got > limit { Err(GrammarError::TooLarge { what, got, limit }) } else { Ok(()) }
}

fn check_depth(value: &Value, depth: usize) -> Result<(), GrammarError> {
    check_length("schema's nesting", depth, MAX_SCHEMA_DEPTH)?;
    match value {
        Value::Array(items) => items.iter().try_for_each(|v| check_depth(v, depth + 1)),
        Value::Object(map) => map.values().try_for_each(|v| check_depth(v, depth + 1)),
        _ => Ok(()),
    }
}

/// Refuses sources that could nest deeper than a recursive parser's stack: counts opening brackets as if none in a
/// string or a class were text, which errs on the safe side.
fn check_brackets(source: &str) -> Result<(), GrammarError> {
    let mut depth = 0usize;
    let mut deepest = 0;
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    check_length("grammar's nesting", deepest, MAX_NESTING)
}

/// llguidance's messages, without backtraces and parser state, in terms of the request.
fn explain(message: &str) -> String {
    let end = ["\n<backtrace>", "\n<state>", "\n<non-verbose/>"].iter().filter_map(|m| message.find(m)).min();
    let message = message[..end.unwrap_or(message.len())].trim();
    if let Some(keys) = message.strip_prefix("Unimplemented keys: ") {
        return format!("the schema keywords {keys} are not supported; leave them out");
    }
    if message.starts_with("oneOf constraints are not supported") {
        return "oneOf is supported only where its options can't overlap; use anyOf".into();
    }
    if message.contains("referencing") {
        return format!("only references within the schema (#/…) are supported: {message}");
    }
    message.to_owned()
}

fn limits() -> ParserLimits {
    ParserLimits {
        // 1 to 2 KiB each: bounds what one hostile grammar holds to some 40 MiB.
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

fn build_factory(tokenizer: &Tokenizer) -> Result<ParserFactory, String> {
    let mut words: Vec<Vec<u8>> = Vec::with_capacity(tokenizer.vocab());
    for id in 0..tokenizer.vocab() as u32 {
        words.push(trie_word(tokenizer, id));
    }
    let ends: Vec<u32> =
        tokenizer.end_tokens().iter().copied().filter(|&id| (id as usize) < words.len()).collect();
    let info = TokRxInfo::new(words.len() as u32, ends.first().copied().unwrap_or(INVALID_TOKEN));
    let mut trie = TokTrie::from(&info, &words);
    if !ends.is_empty() {
        trie = trie.with_eos_tokens(&ends);
    }
    // "Approximate": bytes are split into tokens greedily, which we never ask for, and nothing is forced.
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&env).map_err(|e| format!("no token trie: {e}"))?;
    *factory.limits_mut() = limits();
    factory.quiet();
    Ok(factory)
}

/// A token's word in the trie: its bytes, or marker and name for a special one. Empty words are never allowed.
fn trie_word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    if tokenizer.is_special(id) {
        let name = tokenizer.token_text(id).unwrap_or("");
        let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        word.extend_from_slice(name.as_bytes());
        return if name.is_empty() || word.len() > MAX_TOKEN_BYTES { Vec::new() } else { word };
    }
    let bytes = tokenizer.token_bytes(id);
    // 0xFF is in no UTF-8 text and marks special tokens in the trie.
    let taken = bytes.len() <= MAX_TOKEN_BYTES && bytes.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER);
    if taken { bytes.to_vec() } else { Vec::new() }
}

#[cfg(test)]
mod tests;
