//! Reads JSON in place: where the members of an object lie, without building them.
//!
//! A proxy looks at a few fields of a body and passes the rest on as it came, so values are skipped, not made: no
//! allocation beside a key with escapes, one pass over the bytes. The grammar is RFC 8259's and strict, so what is
//! found whole here is whole JSON for every other reader; depth is bounded as serde_json bounds it.

use std::borrow::Cow;
use std::ops::Range;

/// Lists and objects within each other.
const MAX_DEPTH: u32 = 128;

/// The text isn't JSON, or not of the kind asked for, at this byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) at: usize,
}

type Scan<T> = Result<T, Malformed>;

/// One member of an object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Member<'a> {
    pub(crate) key: Cow<'a, str>,
    /// From the key's quote to the value's end.
    pub(crate) whole: Range<usize>,
    pub(crate) value: Range<usize>,
}

/// Reads a text from its beginning to its end, once: whoever walks it goes into the values it wants and skips the others.
/// Where an object's members are wanted one by one, [`Object`] is easier.
pub(crate) struct Cursor<'a> {
    /// As far as may be read.
    bytes: &'a [u8],
    text: &'a str,
    at: usize,
}

/// The members of an object, one after the other. It must be read to its end before all of it is known to be JSON.
pub(crate) struct Object<'a> {
    cursor: Cursor<'a>,
    begun: bool,
}

/// The elements of a list.
pub(crate) struct List<'a> {
    cursor: Cursor<'a>,
    begun: bool,
}

impl<'a> Object<'a> {
    /// `text` must hold one object and nothing but white space around it.
    pub(crate) fn new(text: &'a str) -> Scan<Object<'a>> {
        Object::within(text, 0..text.len())
    }

    /// The object that lies at `range` of `text`; its members' ranges are `text`'s.
    pub(crate) fn within(text: &'a str, range: Range<usize>) -> Scan<Object<'a>> {
        let mut cursor = Cursor { bytes: &text.as_bytes()[..range.end], text, at: range.start };
        cursor.space();
        cursor.expect(b'{')?;
        Ok(Object { cursor, begun: false })
    }

    /// The next member; none at the object's end.
    pub(crate) fn next(&mut self) -> Scan<Option<Member<'a>>> {
        let cursor = &mut self.cursor;
        cursor.space();
        if cursor.peek() == Some(b'}') {
            cursor.at += 1;
            return cursor.end().map(|()| None);
        }
        if self.begun {
            cursor.expect(b',')?;
            cursor.space();
        }
        self.begun = true;
        let start = cursor.at;
        let key = cursor.key()?;
        cursor.space();
        cursor.expect(b':')?;
        cursor.space();
        let value = cursor.at;
        cursor.value(MAX_DEPTH)?;
        Ok(Some(Member { key, whole: start..cursor.at, value: value..cursor.at }))
    }
}

impl<'a> List<'a> {
    /// The list that lies at `range` of `text`.
    pub(crate) fn within(text: &'a str, range: Range<usize>) -> Scan<List<'a>> {
        let mut cursor = Cursor { bytes: &text.as_bytes()[..range.end], text, at: range.start };
        cursor.space();
        cursor.expect(b'[')?;
        Ok(List { cursor, begun: false })
    }

    /// The next element's place; none at the list's end.
    pub(crate) fn next(&mut self) -> Scan<Option<Range<usize>>> {
        let cursor = &mut self.cursor;
        cursor.space();
        if cursor.peek() == Some(b']') {
            cursor.at += 1;
            return cursor.end().map(|()| None);
        }
        if self.begun {
            cursor.expect(b',')?;
            cursor.space();
        }
        self.begun = true;
        let start = cursor.at;
        cursor.value(MAX_DEPTH)?;
        Ok(Some(start..cursor.at))
    }
}

/// The text of a JSON string with its quotes.
pub(crate) fn string(literal: &str) -> Option<Cow<'_, str>> {
    let inner = literal.strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') {
        serde_json::from_str::<String>(literal).ok().map(Cow::Owned)
    } else {
        Some(Cow::Borrowed(inner))
    }
}

/// What kind of value a literal is, in the words errors use.
pub(crate) fn kind(literal: &str) -> &'static str {
    match literal.as_bytes().first() {
        Some(b'"') => "a string",
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

/// Bytes that end a string, begin an escape or may not stand in one.
const SPECIAL: [bool; 256] = {
    let mut special = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        special[byte] = true;
        byte += 1;
    }
    special[b'"' as usize] = true;
    special[b'\\' as usize] = true;
    special
};

impl<'a> Cursor<'a> {
    /// At the beginning of a text.
    pub(crate) fn new(text: &'a str) -> Cursor<'a> {
        let mut cursor = Cursor { bytes: text.as_bytes(), text, at: 0 };
        cursor.space();
        cursor
    }

    /// Where it is.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Reads an object. `member` is called at each member's value, with its key and where the key began, and must read
    /// that value: by [`Cursor::skip`], [`Cursor::object`] or [`Cursor::list`].
    pub(crate) fn object(
        &mut self,
        mut member: impl FnMut(&mut Cursor<'a>, &str, usize) -> Scan<()>,
    ) -> Scan<()> {
        self.expect(b'{')?;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        self.members(&mut member)
    }

    /// The rest of an object whose members before `at`, where a key begins, are known from another text with the same
    /// beginning. (Nothing before `at` is read again.)
    pub(crate) fn object_from(
        &mut self,
        at: usize,
        mut member: impl FnMut(&mut Cursor<'a>, &str, usize) -> Scan<()>,
    ) -> Scan<()> {
        self.at = at;
        self.space();
        self.members(&mut member)
    }

    fn members(&mut self, member: &mut impl FnMut(&mut Cursor<'a>, &str, usize) -> Scan<()>) -> Scan<()> {
        loop {
            let start = self.at;
            let key = self.key()?;
            self.space();
            self.expect(b':')?;
            self.space();
            member(self, &key, start)?;
            self.space();
            if self.peek() == Some(b'}') {
                self.at += 1;
                return Ok(());
            }
            self.expect(b',')?;
            self.space();
        }
    }

    /// Reads a list. `element` is called at each element and must read it.
    pub(crate) fn list(&mut self, mut element: impl FnMut(&mut Cursor<'a>) -> Scan<()>) -> Scan<()> {
        self.expect(b'[')?;
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            element(self)?;
            self.space();
            if self.peek() == Some(b']') {
                self.at += 1;
                return Ok(());
            }
            self.expect(b',')?;
            self.space();
        }
    }

    /// Reads a value; where it lies.
    pub(crate) fn skip(&mut self) -> Scan<Range<usize>> {
        let start = self.at;
        self.value(MAX_DEPTH)?;
        Ok(start..self.at)
    }

    /// Whether the value here is `null`.
    pub(crate) fn is_null(&self) -> bool {
        self.bytes[self.at..].starts_with(b"null")
    }

    /// Nothing may follow but white space.
    pub(crate) fn finish(&mut self) -> Scan<()> {
        self.end()
    }

    /// A whole number that is not negative, and fits.
    pub(crate) fn number_u32(&mut self) -> Scan<u32> {
        let start = self.at;
        let range = self.skip()?;
        self.text[range].parse().map_err(|_| Malformed { at: start })
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn fail<T>(&self) -> Scan<T> {
        Err(Malformed { at: self.at })
    }

    fn expect(&mut self, byte: u8) -> Scan<()> {
        if self.peek() != Some(byte) {
            return self.fail();
        }
        self.at += 1;
        Ok(())
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    /// Nothing may follow.
    fn end(&mut self) -> Scan<()> {
        self.space();
        if self.at == self.bytes.len() { Ok(()) } else { self.fail() }
    }

    fn key(&mut self) -> Scan<Cow<'a, str>> {
        let start = self.at;
        self.string()?;
        string(&self.text[start..self.at]).ok_or(Malformed { at: start })
    }

    fn string(&mut self) -> Scan<()> {
        self.expect(b'"')?;
        loop {
            let rest = self.bytes.get(self.at..).unwrap_or_default();
            let Some(plain) = rest.iter().position(|byte| SPECIAL[usize::from(*byte)]) else {
                self.at = self.bytes.len();
                return self.fail();
            };
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    self.at += 1;
                    match self.peek() {
                        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
                        Some(b'u') => {
                            let digits = self.bytes.get(self.at + 1..self.at + 5);
                            if !digits.is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit)) {
                                return self.fail();
                            }
                            self.at += 5;
                        }
                        _ => return self.fail(),
                    }
                }
                _ => return self.fail(),
            }
        }
    }

    fn digits(&mut self) -> Scan<()> {
        let start = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start { self.fail() } else { Ok(()) }
    }

    fn number(&mut self) -> Scan<()> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1
        } else {
            self.digits()?
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn literal(&mut self, literal: &[u8]) -> Scan<()> {
        if !self.bytes[self.at..].starts_with(literal) {
            return self.fail();
        }
        self.at += literal.len();
        Ok(())
    }

    fn value(&mut self, depth: u32) -> Scan<()> {
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            Some(open @ (b'{' | b'[')) if depth > 0 => {
                let close = if open == b'{' { b'}' } else { b']' };
                self.at += 1;
                self.space();
                if self.peek() == Some(close) {
                    self.at += 1;
                    return Ok(());
                }
                loop {
                    if open == b'{' {
                        self.space();
                        self.string()?;
                        self.space();
                        self.expect(b':')?;
                    }
                    self.space();
                    self.value(depth - 1)?;
                    self.space();
                    if self.peek() == Some(close) {
                        self.at += 1;
                        return Ok(());
                    }
                    self.expect(b',')?;
                }
            }
            _ => self.fail(),
        }
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    fn members(text: &str) -> Scan<Vec<(String, &str)>> {
        let mut object = Object::new(text)?;
        let mut found = Vec::new();
        while let Some(member) = object.next()? {
            assert_eq!(text[member.whole.clone()].as_bytes()[0], b'"');
            found.push((member.key.into_owned(), &text[member.value]));
        }
        Ok(found)
    }

    #[test]
    fn members_lie_where_they_are_said_to() {
        let found = members(" { \"a\" : [1, {\"b\":2}] ,\"\\u0062\":\"x\\\"}\",\"c\":-1.5e+3 }\n").unwrap();
        let expected = [("a", "[1, {\"b\":2}]"), ("b", "\"x\\\"}\""), ("c", "-1.5e+3")];
        assert_eq!(found, expected.map(|(k, v)| (k.to_owned(), v)));
        assert_eq!(members("{}").unwrap(), []);
    }

    /// A cursor that skips everything agrees with [`Object`], and with what it reads on the way.
    #[test]
    fn a_walk_finds_the_same() {
        let text = " {\"a\" : [1, {\"b\":2} ] ,\"c\":{ \"d\" : \"x\\\"}\"},\"e\":[ ]} ";
        let (mut numbers, mut inner, mut keys) = (Vec::new(), None, Vec::new());
        let mut cursor = Cursor::new(text);
        cursor
            .object(|cursor, key, start| {
                assert_eq!(text.as_bytes()[start], b'"');
                keys.push(key.to_owned());
                match key {
                    "a" => cursor.list(|cursor| {
                        numbers.push(&text[cursor.skip()?]);
                        Ok(())
                    }),
                    "c" => cursor.object(|cursor, _, _| {
                        inner = Some(&text[cursor.skip()?]);
                        Ok(())
                    }),
                    _ => cursor.list(|cursor| cursor.skip().map(|_| ())),
                }
            })
            .unwrap();
        cursor.finish().unwrap();
        assert_eq!((numbers, inner), (vec!["1", "{\"b\":2}"], Some("\"x\\\"}\"")));
        assert_eq!(keys, ["a", "c", "e"]);
        for wrong in ["", "{", "{\"a\"", "{\"a\":1", "{\"a\":1,}", "{,}", "[]", "{\"a\":1} x"] {
            let mut cursor = Cursor::new(wrong);
            let read = cursor.object(|cursor, _, _| cursor.skip().map(|_| ())).and_then(|()| cursor.finish());
            assert!(read.is_err(), "{wrong}");
        }
    }

    #[test]
    fn elements_too() {
        let text = "x[1, \"two\" ,[3]]";
        let mut list = List::within(text, 1..text.len()).unwrap();
        let mut found = Vec::new();
        while let Some(range) = list.next().unwrap() {
            found.push(&text[range]);
        }
        assert_eq!(found, ["1", "\"two\"", "[3]"]);
    }

    /// Whatever serde_json takes as an object is taken, whatever it refuses is refused: on a sound text, and on a
    /// thousand texts with a byte changed, lost or added.
    #[test]
    fn it_agrees_with_serde_json_on_damaged_text() {
        let sound = r#"{"a":[1,2.5,-0,1e9,true,false,null],"b\n":{"c":"d\u00e9\\","e":[[],{}]},"é":"\/"}"#;
        let mut rng = Philox::new(11, 0);
        let mut refused = 0;
        for round in 0..20_000 {
            let mut bytes = sound.as_bytes().to_vec();
            if round > 0 {
                let at = rng.next_u64() as usize % bytes.len();
                let byte = b"{}[],:\"\\ 0-.eu1tn\x01"[rng.next_u64() as usize % 18];
                match rng.next_u64() % 3 {
                    0 => bytes[at] = byte,
                    1 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, byte),
                }
            }
            let Ok(text) = String::from_utf8(bytes) else { continue };
            let theirs = serde_json::from_str::<std::collections::HashMap<String, serde_json::Value>>(&text);
            refused += usize::from(theirs.is_err());
            assert_eq!(members(&text).is_ok(), theirs.is_ok(), "round {round}: {text}");
            let mut cursor = Cursor::new(&text);
            let walked =
                cursor.object(|cursor, _, _| cursor.skip().map(|_| ())).and_then(|()| cursor.finish());
            assert_eq!(walked.is_ok(), theirs.is_ok(), "round {round}: {text}");
        }
        assert!((1000..19_000).contains(&refused), "{refused}");
    }

    #[test]
    fn depth_is_bounded() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(members(&deep).is_err());
        let fine = format!("{{\"a\":{}{}}}", "[".repeat(100), "]".repeat(100));
        assert!(members(&fine).is_ok());
    }
}
