//! Pre-tokenizers: where a text is cut into words before pairs are merged.
//!
//! GGUF files name theirs; its definition is a regular expression with a look-ahead, given beside each scanner.
//! They are scanners by hand because such an expression takes 10 ms to compile (its Unicode classes), runs an order
//! slower, and may fail on a long text, where a scanner can't.

use std::sync::LazyLock;

/// A pre-tokenizer by the name that GGUF's `tokenizer.ggml.pre` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Splitter {
    /// `gpt-2`.
    Gpt2,
    /// `smollm`: every digit alone, then as GPT-2.
    Smollm,
    /// `llama-bpe` (Llama 3): numbers in threes.
    Llama3,
    /// `qwen2`: every digit alone.
    Qwen2,
}

impl Splitter {
    /// Names that [`Splitter::named`] knows, for an error's text.
    pub(crate) const NAMES: &str = "gpt-2, smollm, llama-bpe, qwen2";

    pub(crate) fn named(name: &str) -> Option<Splitter> {
        Some(match name {
            "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" => Splitter::Gpt2,
            "smollm" | "starcoder" | "refact" | "command-r" => Splitter::Smollm,
            "llama-bpe" | "llama3" | "llama-v3" => Splitter::Llama3,
            "qwen2" | "deepseek-r1-qwen" => Splitter::Qwen2,
            _ => return None,
        })
    }

    /// Cuts `text` into words, in order; together they are all of it.
    pub(crate) fn split<'a>(self, text: &'a str, mut word: impl FnMut(&'a str)) {
        match self {
            Splitter::Gpt2 => cut(text, gpt2, &mut word),
            Splitter::Llama3 => cut(text, |t| llama3(t, 3), &mut word),
            Splitter::Qwen2 => cut(text, |t| llama3(t, 1), &mut word),
            Splitter::Smollm => {
                let mut rest = text;
                while let Some((at, digit)) = rest.char_indices().find(|&(_, c)| c.is_numeric()) {
                    let end = at + digit.len_utf8();
                    cut(&rest[..at], gpt2, &mut word);
                    word(&rest[at..end]);
                    rest = &rest[end..];
                }
                cut(rest, gpt2, &mut word);
            }
        }
    }
}

fn cut<'a>(mut text: &'a str, next: impl Fn(&str) -> usize, word: &mut impl FnMut(&'a str)) {
    while !text.is_empty() {
        let (head, tail) = text.split_at(next(text));
        word(head);
        text = tail;
    }
}

/// Bytes of the first word:
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
fn gpt2(text: &str) -> usize {
    if let Some(rest) = text.strip_prefix('\'') {
        for ending in ["s", "t", "re", "ve", "m", "ll", "d"] {
            if rest.starts_with(ending) {
                return 1 + ending.len();
            }
        }
    }
    let after_space = text.strip_prefix(' ').unwrap_or(text);
    match after_space.chars().next().map(Class::of) {
        Some(class) if class != Class::Space => {
            text.len() - after_space.len() + run(after_space, |c| Class::of(c) == class)
        }
        _ => spaces(text),
    }
}

/// Bytes of the first word, with numbers of at most `digits` digits:
/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
fn llama3(text: &str, digits: usize) -> usize {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return 0 };
    let second = chars.next();
    if first == '\'' {
        let third = chars.next();
        match (second, third) {
            // Without regard to case, so U+017F (long s) is an s too.
            (Some(c @ ('s' | 't' | 'm' | 'd' | 'S' | 'T' | 'M' | 'D' | 'ſ')), _) => return 1 + c.len_utf8(),
            (Some('r' | 'R' | 'v' | 'V'), Some('e' | 'E')) | (Some('l' | 'L'), Some('l' | 'L')) => return 3,
            _ => {}
        }
    }
    let class = Class::of(first);
    if class == Class::Letter {
        return run(text, |c| Class::of(c) == Class::Letter);
    }
    if class == Class::Number {
        return text.chars().take(digits).take_while(|c| c.is_numeric()).map(char::len_utf8).sum();
    }
    if !matches!(first, '\r' | '\n') && second.is_some_and(|c| Class::of(c) == Class::Letter) {
        return first.len_utf8() + run(&text[first.len_utf8()..], |c| Class::of(c) == Class::Letter);
    }
    let after_space = text.strip_prefix(' ').unwrap_or(text);
    let others = run(after_space, |c| Class::of(c) == Class::Other);
    if others > 0 {
        let end = text.len() - after_space.len() + others;
        return end + run(&text[end..], |c| matches!(c, '\r' | '\n'));
    }
    let all = run(text, char::is_whitespace);
    match text[..all].rfind(['\r', '\n']) {
        Some(last) => last + 1,
        None => spaces(text),
    }
}

/// `\s+(?!\S)|\s+`: white space, less its last character where something follows and something is left.
fn spaces(text: &str) -> usize {
    let all = run(text, char::is_whitespace);
    if all == text.len() {
        return all;
    }
    match text[..all].char_indices().next_back() {
        Some((last, _)) if last > 0 => last,
        _ => all,
    }
}

fn run(text: &str, member: impl Fn(char) -> bool) -> usize {
    text.find(|c| !member(c)).unwrap_or(text.len())
}

/// `\s`, `\p{L}`, `\p{N}` and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Number,
    Other,
}

impl Class {
    fn of(c: char) -> Class {
        if c.is_ascii() {
            return match c {
                'a'..='z' | 'A'..='Z' => Class::Letter,
                '0'..='9' => Class::Number,
                '\t'..='\r' | ' ' => Class::Space,
                _ => Class::Other,
            };
        }
        if c.is_whitespace() {
            Class::Space
        } else if is_letter(c) {
            Class::Letter
        } else if c.is_numeric() {
            Class::Number
        } else {
            Class::Other
        }
    }
}

/// `\p{L}`, from the tables of `regex-syntax`: the standard library's "alphabetic" has marks and numerals besides.
fn is_letter(c: char) -> bool {
    static LETTERS: LazyLock<Vec<(char, char)>> = LazyLock::new(|| match regex_syntax::parse(r"\p{L}") {
        Ok(hir) => match hir.into_kind() {
            regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(class)) => {
                class.iter().map(|range| (range.start(), range.end())).collect()
            }
            _ => Vec::new(),
        },
        Err(_) => Vec::new(),
    });
    let after = LETTERS.partition_point(|&(start, _)| start <= c);
    after > 0 && c <= LETTERS[after - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    fn words(splitter: Splitter, text: &str) -> Vec<&str> {
        let mut words = Vec::new();
        splitter.split(text, |w| words.push(w));
        words
    }

    fn by_regex<'a>(regex: &fancy_regex::Regex, text: &'a str) -> Vec<&'a str> {
        regex.find_iter(text).map(|m| m.expect("short text").as_str()).collect()
    }

    #[test]
    fn letters_are_letters() {
        for c in ['a', 'é', '日', 'ß', 'ا', 'ª', '𝒳'] {
            assert_eq!(Class::of(c), Class::Letter, "{c}");
        }
        // A mark, a Roman numeral, a circled letter: alphabetic to the standard library, no letters to \p{L}.
        for (c, class) in [('\u{0903}', Class::Other), ('Ⅷ', Class::Number), ('Ⓐ', Class::Other)] {
            assert!(c.is_alphabetic());
            assert_eq!(Class::of(c), class, "{c}");
        }
    }

    #[test]
    fn each_splitter_in_its_own_way() {
        let text = "I'LL pay  12345\r\n\n now's!?\n";
        assert_eq!(
            words(Splitter::Gpt2, text),
            ["I", "'", "LL", " pay", " ", " 12345", "\r\n\n", " now", "'s", "!?", "\n"]
        );
        assert_eq!(
            words(Splitter::Smollm, text),
            ["I", "'", "LL", " pay", "  ", "1", "2", "3", "4", "5", "\r\n\n", " now", "'s", "!?", "\n"]
        );
        assert_eq!(
            words(Splitter::Llama3, text),
            ["I", "'LL", " pay", " ", " ", "123", "45", "\r\n\n", " now", "'s", "!?\n"]
        );
        assert_eq!(
            words(Splitter::Qwen2, text),
            ["I", "'LL", " pay", " ", " ", "1", "2", "3", "4", "5", "\r\n\n", " now", "'s", "!?\n"]
        );
    }

    #[test]
    fn letters_of_the_newest_unicode_are_letters() {
        // TOLONG SIKI DIGIT ZERO, of Unicode 17.
        assert!('\u{11de0}'.is_numeric());
        assert_eq!(words(Splitter::Gpt2, "a\u{11de0}b"), ["a", "\u{11de0}", "b"]);
    }

    proptest! {
        #[test]
        fn scanners_equal_their_expressions(text in r"(?s)([a-zA-Z'ſ0-9 \r\n\t,.!é日ا\u{0301}٣Ⅷ²😀\u{200d}\u{a0}\u{3000}\u{85}]|.){0,40}") {
            let gpt2 = fancy_regex::Regex::new(GPT2).expect("a constant");
            let llama3 = fancy_regex::Regex::new(LLAMA3).expect("a constant");
            let qwen2 = fancy_regex::Regex::new(&LLAMA3.replace("{1,3}", "")).expect("a constant");
            // Letters and digits of a newer Unicode than the expressions' tables are of: those don't know them.
            let unknown = fancy_regex::Regex::new(r"\p{Cn}").expect("a constant");
            let newer = |c: char| {
                (c.is_alphabetic() || c.is_numeric()) && unknown.is_match(&c.to_string()).expect("a constant")
            };
            let text: String = text.chars().filter(|c| !newer(*c)).collect();
            prop_assert_eq!(words(Splitter::Gpt2, &text), by_regex(&gpt2, &text));
            prop_assert_eq!(words(Splitter::Llama3, &text), by_regex(&llama3, &text));
            prop_assert_eq!(words(Splitter::Qwen2, &text), by_regex(&qwen2, &text));
        }
    }
}
