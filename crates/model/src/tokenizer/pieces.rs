//! Tokens that are matched whole, by their spelling, before a text is encoded.

use aho_corasick::{AhoCorasick, MatchKind};

use super::vocabulary::Vocabulary;

/// How an added token is matched (`tokenizer.json`; a GGUF has none of it).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Matching {
    /// Takes the white space before it along.
    pub(crate) strip_left: bool,
    /// Takes the white space after it along.
    pub(crate) strip_right: bool,
    /// Only where no letter or digit is next to it.
    pub(crate) single_word: bool,
}

/// A text's parts, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// A set of spellings; where several match, the leftmost longest wins.
#[derive(Debug, Default)]
pub(crate) struct Spellings {
    ids: Vec<u32>,
    matching: Vec<Matching>,
    automaton: Option<AhoCorasick>,
    /// The spellings in order, and the characters of the longest.
    sorted: Vec<Box<str>>,
    longest: usize,
}

impl Spellings {
    /// Of these tokens. Tokens without a spelling are never matched.
    ///
    /// # Errors
    /// Says that there are too many to search for.
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        tokens: impl Iterator<Item = (u32, Matching)>,
    ) -> Result<Spellings, String> {
        let spelled = |&(id, _): &(u32, Matching)| vocabulary.text(id).is_some_and(|text| !text.is_empty());
        let (ids, matching): (Vec<u32>, Vec<Matching>) = tokens.filter(spelled).unzip();
        if ids.is_empty() {
            return Ok(Spellings::default());
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().filter_map(|&id| vocabulary.text(id)))
            .map_err(|e| format!("its special tokens can't be searched for: {e}"))?;
        let mut sorted: Vec<Box<str>> =
            ids.iter().filter_map(|&id| vocabulary.text(id)).map(Box::from).collect();
        sorted.sort_unstable();
        let longest = sorted.iter().map(|s| s.chars().count()).max().unwrap_or(0);
        Ok(Spellings { ids, matching, automaton: Some(automaton), sorted, longest })
    }

    /// Cuts `text` at every match. Empty parts are left out.
    pub(crate) fn cut<'a>(&self, text: &'a str, mut piece: impl FnMut(Piece<'a>)) {
        let mut done = 0;
        if let Some(automaton) = &self.automaton {
            for found in automaton.find_iter(text) {
                let Matching { strip_left, strip_right, single_word } = self.matching[found.pattern()];
                // A token before may have taken white space that this one would begin with.
                if found.start() < done || single_word && touches_a_word(text, found.range()) {
                    continue;
                }
                let before = &text[done..found.start()];
                let before = if strip_left { before.trim_end() } else { before };
                if !before.is_empty() {
                    piece(Piece::Text(before));
                }
                piece(Piece::Token(self.ids[found.pattern()]));
                done = found.end();
                if strip_right {
                    done = text.len() - text[done..].trim_start().len();
                }
            }
        }
        if done < text.len() {
            piece(Piece::Text(&text[done..]));
        }
    }

    /// `text` with `mark` after the first character of every spelling in it, and of every suffix that begins one: so
    /// neither it nor it with more text behind has a spelling. `None` where nothing had to be done.
    ///
    /// A spelling of one character can't be broken: special tokens must not have such.
    pub(crate) fn broken(&self, text: &str, mark: char) -> Option<String> {
        let automaton = self.automaton.as_ref()?;
        let mut cuts = Vec::new();
        let mut from = 0;
        // Overlapping spellings too: the search goes on behind the first character.
        while let Some(found) = automaton.find(&text[from..]) {
            from += found.start() + text[from + found.start()..].chars().next().map_or(1, char::len_utf8);
            cuts.push(from);
        }
        let suffixes = text.char_indices().rev().take(self.longest);
        cuts.extend(
            suffixes.filter(|&(at, _)| self.begins_one(&text[at..])).map(|(at, c)| at + c.len_utf8()),
        );
        if cuts.is_empty() {
            return None;
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut broken = String::with_capacity(text.len() + 3 * cuts.len());
        let mut done = 0;
        for cut in cuts {
            broken.push_str(&text[done..cut]);
            broken.push(mark);
            done = cut;
        }
        broken.push_str(&text[done..]);
        Some(broken)
    }

    fn begins_one(&self, text: &str) -> bool {
        let at = self.sorted.partition_point(|spelling| spelling.as_ref() < text);
        self.sorted.get(at).is_some_and(|spelling| spelling.len() > text.len() && spelling.starts_with(text))
    }
}

fn touches_a_word(text: &str, range: std::ops::Range<usize>) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    text[..range.start].chars().next_back().is_some_and(word)
        || text[range.end..].chars().next().is_some_and(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TokenKind;

    fn spellings(tokens: &[(&str, Matching)]) -> Spellings {
        let mut vocabulary = Vocabulary::with_capacity(0, 0);
        for (text, _) in tokens {
            vocabulary.push(text, TokenKind::Special, |_| {});
        }
        Spellings::new(&vocabulary, (0..).zip(tokens.iter().map(|&(_, m)| m))).expect("few")
    }

    fn parts<'a>(spellings: &Spellings, text: &'a str) -> Vec<Piece<'a>> {
        let mut parts = Vec::new();
        spellings.cut(text, |p| parts.push(p));
        parts
    }

    #[test]
    fn the_leftmost_longest_wins() {
        let plain = Matching::default();
        let s = spellings(&[("<a>", plain), ("<a><b>", plain), ("", plain), ("b", plain)]);
        use Piece::{Text, Token};
        assert_eq!(parts(&s, "x<a><b><a>y"), [Text("x"), Token(1), Token(0), Text("y")]);
        assert_eq!(parts(&s, "ab"), [Text("a"), Token(3)]);
        assert_eq!(parts(&s, ""), []);
    }

    #[test]
    fn white_space_and_words_around_a_token() {
        let strip = Matching { strip_left: true, strip_right: true, single_word: false };
        let word = Matching { single_word: true, ..Matching::default() };
        let s = spellings(&[("<m>", strip), ("yes", word)]);
        use Piece::{Text, Token};
        assert_eq!(parts(&s, "a <m>\n b"), [Text("a"), Token(0), Text("b")]);
        assert_eq!(parts(&s, " <m> <m>"), [Token(0), Token(0)]);
        assert_eq!(parts(&s, "yes eyes yes!"), [Token(1), Text(" eyes "), Token(1), Text("!")]);
    }

    #[test]
    fn the_start_of_a_spelling_at_the_end_is_broken() {
        let plain = Matching::default();
        let s = spellings(&[("<|a|>", plain), ("[x]", plain)]);
        // Templates may write two strings of a message side by side.
        for (first, second) in [("<|", "a|>"), ("b<", "|a|>"), ("<<|a", "|>"), ("[x", "]"), ("<|a|", ">")] {
            let broken = s.broken(first, '#').expect("begins a spelling");
            assert_eq!(broken.replace('#', ""), first);
            let whole = broken + second;
            assert_eq!(parts(&s, &whole), [Piece::Text(&whole)]);
        }
        assert_eq!(s.broken("a < b", '#'), None);
    }

    #[test]
    fn broken_spellings_match_nothing() {
        let plain = Matching::default();
        let s = spellings(&[("<|a|>", plain), ("aa", plain), ("éa", plain)]);
        assert_eq!(s.broken("no", '#'), None);
        for text in ["<|a|>", "<<|a|><|a|>", "aaaa", "aéa<|aa|>", "éaa"] {
            let broken = s.broken(text, '#').expect("has one");
            assert_eq!(broken.replace('#', ""), text);
            assert_eq!(parts(&s, &broken), [Piece::Text(&broken)]);
        }
    }
}
