//! Byte-level byte-pair encoding (GPT-2 and after): cut into words, merge bytes by the order of learned merges.

use hashbrown::HashMap;

use super::byte_level;
use super::merge::{Pairs, Symbol, merge};
use super::split::Splitter;
use super::vocabulary::Vocabulary;

/// The merges of a byte-level vocabulary.
#[derive(Debug)]
pub(crate) struct Bpe {
    splitter: Splitter,
    /// The token of each single byte.
    bytes: Vec<Option<u32>>,
    /// (left, right) → (order, what they make).
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// A word that is a token is that token, whatever merges would make of it (Llama 3).
    whole_words: bool,
    /// Texts are brought to Unicode's composed form first (Qwen).
    compose: bool,
}

impl Bpe {
    /// `merges` are pairs of spellings with one space between, in the order they were learned. One that names an
    /// unknown token can't happen and is left out.
    pub(crate) fn new<'a>(
        splitter: Splitter,
        vocabulary: &Vocabulary,
        merges: impl ExactSizeIterator<Item = &'a str>,
    ) -> Bpe {
        let mut table = HashMap::with_capacity(merges.len());
        let mut made = String::new();
        for (order, merge) in (0u32..).zip(merges) {
            // From the second byte on: the first symbol may be a space in vocabularies that don't map bytes.
            let Some(space) = merge.bytes().skip(1).position(|b| b == b' ').map(|at| at + 1) else {
                continue;
            };
            let (Some(left), Some(right)) = (merge.get(..space), merge.get(space + 1..)) else { continue };
            made.clear();
            made.push_str(left);
            made.push_str(right);
            let ids = (vocabulary.id(left), vocabulary.id(right), vocabulary.id(&made));
            if let (Some(left), Some(right), Some(made)) = ids {
                table.entry((left, right)).or_insert((order, made));
            }
        }
        let bytes =
            (0..=255).map(|b| vocabulary.id(byte_level::char_of(b).encode_utf8(&mut [0; 4]))).collect();
        Bpe {
            splitter,
            bytes,
            merges: table,
            whole_words: splitter == Splitter::Llama3,
            compose: splitter == Splitter::Qwen2,
        }
    }

    pub(crate) fn encode(&self, vocabulary: &Vocabulary, text: &str, out: &mut Vec<u32>) {
        let composed;
        let text = if self.compose && !text.is_ascii() {
            let mut normalized = tokenizers::NormalizedString::from(text);
            normalized.nfc();
            composed = normalized;
            composed.get()
        } else {
            text
        };
        let mut spelling = String::new();
        let mut symbols = Vec::new();
        self.splitter.split(text, |word| {
            if self.whole_words && word.len() <= vocabulary.longest() {
                spelling.clear();
                spelling.extend(word.bytes().map(byte_level::char_of));
                if let Some(id) = vocabulary.id(&spelling) {
                    out.push(id);
                    return;
                }
            }
            symbols.clear();
            let spelled = (0u32..).zip(word.bytes());
            // A byte without a token is left out, as the reference implementations do.
            symbols.extend(spelled.filter_map(|(at, byte)| {
                self.bytes[byte as usize].map(|id| Symbol { token: Some(id), start: at, end: at + 1 })
            }));
            if let [only] = symbols[..] {
                out.extend(only.token);
            } else {
                merge(&symbols, self, |symbol| out.extend(symbol.token));
            }
        });
    }
}

impl Pairs for Bpe {
    fn pair(&self, left: Symbol, right: Symbol) -> Option<(u32, u32)> {
        self.merges.get(&(left.token?, right.token?)).copied()
    }
}
