//! Breaks a streamed answer's lines between words. A word is written as it comes; where it turns out not to fit, it is
//! taken back and written again on the next line. Code between fences is left as it is, so that it can be copied.

use unicode_width::UnicodeWidthChar as _;

const FENCE: &str = "```";

/// Where a streamed text stands on the screen.
#[derive(Debug, Default)]
pub(crate) struct Wrap {
    column: usize,
    /// The word under way, as far as it is written, and its cells; empty where it can't be taken back.
    word: String,
    cells: usize,
    /// The first characters of the line, as many as a fence has.
    start: String,
    code: bool,
}

impl Wrap {
    /// What to write so that `text` continues what was written before, on a screen of `width` cells.
    pub(crate) fn take(&mut self, text: &str, width: usize) -> String {
        // The last column stays free: a cursor that stands behind it is in different places on different terminals.
        let room = width.saturating_sub(1).max(1);
        let mut out = String::with_capacity(text.len() + 8);
        for c in text.chars() {
            self.put(c, room, &mut out);
        }
        out
    }

    fn put(&mut self, c: char, room: usize, out: &mut String) {
        if c == '\n' {
            self.code ^= self.start == FENCE;
            (self.column, self.cells) = (0, 0);
            self.word.clear();
            self.start.clear();
            out.push(c);
            return;
        }
        if self.start.len() < FENCE.len() {
            self.start.push(c);
        }
        let cells = if c == '\t' { 8 - self.column % 8 } else { c.width().unwrap_or(0) };
        if self.code || self.start == FENCE {
            out.push(c);
            return;
        }
        if c.is_whitespace() {
            self.word.clear();
            self.cells = 0;
            if self.column + cells <= room {
                self.column += cells;
                out.push(c);
            } else {
                // The line ends here anyway.
                self.column = room;
            }
            return;
        }
        if self.column + cells > room {
            let carried = self.cells < self.column;
            if carried && self.cells > 0 {
                out.push_str(&format!("\u{1b}[{}D\u{1b}[K", self.cells));
            }
            out.push('\n');
            self.column = 0;
            if carried {
                out.push_str(&self.word);
                self.column = self.cells;
            } else {
                self.word.clear();
                self.cells = 0;
            }
        }
        out.push(c);
        self.column += cells;
        if cells > 1 {
            // Scripts of wide characters break anywhere.
            self.word.clear();
            self.cells = 0;
        } else {
            self.word.push(c);
            self.cells += cells;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a screen shows after the pieces.
    fn shown(pieces: &[&str], width: usize) -> Vec<String> {
        let mut wrap = Wrap::default();
        let text: String = pieces.iter().map(|piece| wrap.take(piece, width)).collect();
        let mut lines = vec![Vec::new()];
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            let line = lines.last_mut().unwrap();
            match c {
                '\n' => lines.push(Vec::new()),
                '\u{1b}' => {
                    let code: String =
                        std::iter::from_fn(|| rest.next_if(|c| !c.is_ascii_alphabetic())).collect();
                    match rest.next() {
                        Some('D') => line.truncate(line.len() - code[1..].parse::<usize>().unwrap()),
                        Some('K') => {}
                        other => panic!("{other:?}"),
                    }
                }
                c => line.push(c),
            }
        }
        lines.iter().map(|line| line.iter().collect()).collect()
    }

    #[test]
    fn lines_break_between_words_wherever_the_pieces_do() {
        let text = "The sea is wide and the whale is blue.\n\nEnd";
        let lines = ["The sea is", "wide and", "the whale", "is blue.", "", "End"];
        for cut in 1..text.len() {
            let pieces: Vec<&str> = [&text[..cut], &text[cut..]].to_vec();
            let trimmed: Vec<String> = shown(&pieces, 11).iter().map(|l| l.trim_end().to_owned()).collect();
            assert_eq!(trimmed, lines, "cut at {cut}");
        }
    }

    #[test]
    fn what_has_no_place_to_break_is_cut() {
        assert_eq!(shown(&["abcdefghijkl xyz"], 6), ["abcde", "fghij", "kl ", "xyz"]);
        assert_eq!(shown(&["海は広いな"], 7), ["海は広", "いな"]);
        assert_eq!(shown(&["ab"], 0), ["a", "b"]);
        assert_eq!(shown(&["a    b"], 4), ["a  ", "b"], "blanks at the end vanish");
    }

    #[test]
    fn code_is_left_as_it_is() {
        let code = "```sh\nmake all the things\n```\nand so on";
        assert_eq!(
            shown(&[code], 8),
            ["```sh", "make all the things", "```", "and so", "on"].map(|l| match l {
                "and so" => "and so ".to_owned(),
                l => l.to_owned(),
            })
        );
    }
}
