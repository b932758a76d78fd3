//! One event of a replica's stream, read in place, once, and passed on with small cuts.
//!
//! A chunk isn't parsed into values: the gateway finds where the fields lie that it needs (`choices[0].index`,
//! `token_ids`, `finish_reason`) or must take out (`token_ids` and `usage` where the client didn't ask for them), and
//! copies what lies between. Whoever needs more of it (the text, to put a whole answer together) looks where it was found
//! to lie. A chunk costs one pass and one copy.

use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::json::{Cursor, Malformed};

/// A chunk of an answer, and where things lie in it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chunk {
    data: Bytes,
    /// None in the chunk that carries the usage.
    pub(crate) choice: Option<Choice>,
    fingerprint: Option<Range<usize>>,
    /// Where it isn't null.
    usage: Option<Range<usize>>,
    model: Option<Range<usize>>,
    /// With the comma before it.
    usage_member: Option<Range<usize>>,
    /// Where something can be added as the last member.
    end: usize,
}

/// What is new in one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) index: usize,
    /// None in the chunk that opens an answer: it says who speaks, or repeats the prompt.
    pub(crate) token_ids: Option<Vec<u32>>,
    /// With the comma before it.
    token_ids_member: Option<Range<usize>>,
    finish_reason: Option<Range<usize>>,
    content: Option<Range<usize>>,
    logprobs: Option<Range<usize>>,
}

/// What the chunks of one stream begin with, up to their choices.
#[derive(Clone, Debug, Default)]
pub(crate) struct Head {
    bytes: Bytes,
    fingerprint: Option<Range<usize>>,
    model: Option<Range<usize>>,
}

/// What the client is to get of a chunk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Edit<'a> {
    /// Leave `token_ids` in.
    pub(crate) token_ids: bool,
    /// Leave `usage` in.
    pub(crate) usage: bool,
    /// The model's name as JSON, where it is another than the replica's.
    pub(crate) model: Option<&'a str>,
    /// A last member, as JSON without the comma before it.
    pub(crate) extra: Option<&'a str>,
}

impl Chunk {
    /// Reads the data of an event.
    ///
    /// # Errors
    /// Where it isn't JSON or not a chunk of one choice.
    #[cfg(test)]
    pub(crate) fn read(data: Bytes) -> Result<Chunk, Malformed> {
        Chunk::read_after(&mut Head::default(), data)
    }

    /// Reads the data of a stream's next event. Where it begins as the one before did, which `head` remembers, that
    /// beginning isn't read again: two texts with the same beginning have the same members there.
    ///
    /// # Errors
    /// Where it isn't JSON or not a chunk of one choice.
    pub(crate) fn read_after(head: &mut Head, data: Bytes) -> Result<Chunk, Malformed> {
        let text = std::str::from_utf8(&data).map_err(|e| Malformed { at: e.valid_up_to() })?;
        let (mut choice, mut choices, mut first) = (None, false, None);
        let same = !head.bytes.is_empty() && data.starts_with(&head.bytes);
        let (mut fingerprint, mut model) =
            if same { (head.fingerprint.clone(), head.model.clone()) } else { (None, None) };
        let (mut usage, mut usage_member) = (None, None);
        let mut cursor = Cursor::new(text);
        let member = |cursor: &mut Cursor<'_>, key: &str, start: usize| {
            match key {
                "choices" => {
                    choices = true;
                    first.get_or_insert((start, usage_member.is_none()));
                    cursor.list(|cursor| {
                        let at = cursor.at();
                        match choice.replace(Choice::read(cursor, text)?) {
                            None => Ok(()),
                            Some(_) => Err(Malformed { at }),
                        }
                    })?;
                }
                "system_fingerprint" => {
                    fingerprint = Some(cursor.skip()?).filter(|range| text[range.clone()].starts_with('"'));
                }
                "model" => model = Some(cursor.skip()?),
                "usage" => {
                    usage = present(cursor)?;
                    usage_member = Some(with_comma(text, start..cursor.at()));
                }
                _ => {
                    cursor.skip()?;
                }
            }
            Ok(())
        };
        if same {
            cursor.object_from(head.bytes.len(), member)?;
        } else {
            cursor.object(member)?;
        }
        let end = cursor.at().saturating_sub(1);
        cursor.finish()?;
        let Some((begins, plain)) = first.filter(|_| choices) else { return Err(Malformed { at: 0 }) };
        if !same && plain {
            let before = |range: &Option<Range<usize>>| range.clone().filter(|range| range.end <= begins);
            let (fingerprint, model) = (before(&fingerprint), before(&model));
            // A copy: a part would keep the whole read in memory for as long as the stream lasts.
            *head = Head { bytes: Bytes::copy_from_slice(&data[..begins]), fingerprint, model };
        }
        Ok(Chunk { choice, fingerprint, usage, model, usage_member, end, data })
    }

    /// A part of it; it was read as text, and parts end where characters do.
    fn text(&self, range: &Range<usize>) -> &str {
        self.data.get(range.clone()).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// The numerics class.
    pub(crate) fn fingerprint(&self) -> Option<&str> {
        self.fingerprint.as_ref().map(|range| self.text(range).trim_matches('"'))
    }

    /// The value of `usage`, where it isn't null.
    pub(crate) fn usage(&self) -> Option<&str> {
        self.usage.as_ref().map(|range| self.text(range))
    }

    /// The model's name as JSON.
    pub(crate) fn model(&self) -> Option<&str> {
        self.model.as_ref().map(|range| self.text(range))
    }

    /// The value of its choice's `delta` or `text`.
    pub(crate) fn content(&self) -> Option<&str> {
        self.choice.as_ref()?.content.as_ref().map(|range| self.text(range))
    }

    /// The value of its choice's `logprobs`, where it isn't null.
    pub(crate) fn logprobs(&self) -> Option<&str> {
        self.choice.as_ref()?.logprobs.as_ref().map(|range| self.text(range))
    }

    /// `stop`, `length`, …, in an answer's last chunk.
    pub(crate) fn finish_reason(&self) -> Option<&str> {
        self.choice.as_ref()?.finish_reason.as_ref().map(|range| self.text(range).trim_matches('"'))
    }

    /// Its bytes.
    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }

    /// Appends the chunk as the client is to see it.
    pub(crate) fn write(&self, out: &mut BytesMut, edit: &Edit<'_>) {
        let mut at = 0;
        let mut cut = |out: &mut BytesMut, range: &Range<usize>, instead: &str| {
            // Members come in the order of the text; one that overlaps what was cut already went with it.
            if range.start >= at {
                out.put_slice(&self.data[at..range.start]);
                out.put_slice(instead.as_bytes());
                at = range.end;
            }
        };
        let mut cuts: [Option<(&Range<usize>, &str)>; 3] = [
            edit.model.and_then(|model| self.model.as_ref().map(|range| (range, model))),
            self.choice
                .as_ref()
                .and_then(|c| c.token_ids_member.as_ref())
                .filter(|_| !edit.token_ids)
                .map(|r| (r, "")),
            self.usage_member.as_ref().filter(|_| !edit.usage).map(|r| (r, "")),
        ];
        cuts.sort_by_key(|cut| cut.map_or(usize::MAX, |(range, _)| range.start));
        for (range, instead) in cuts.into_iter().flatten() {
            cut(out, range, instead);
        }
        if let Some(extra) = edit.extra {
            cut(out, &(self.end..self.end), ",");
            out.put_slice(extra.as_bytes());
        }
        out.put_slice(&self.data[at..]);
    }
}

impl Choice {
    fn read(cursor: &mut Cursor<'_>, text: &str) -> Result<Choice, Malformed> {
        let wrong = Malformed { at: cursor.at() };
        let (mut choice, mut index) = (Choice::default(), None);
        cursor.object(|cursor, key, start| {
            match key {
                "index" => index = text[cursor.skip()?].parse().ok(),
                "token_ids" if !cursor.is_null() => {
                    let mut ids = Vec::with_capacity(1);
                    cursor.list(|cursor| {
                        ids.push(cursor.number_u32()?);
                        Ok(())
                    })?;
                    choice.token_ids = Some(ids);
                    choice.token_ids_member = Some(with_comma(text, start..cursor.at()));
                }
                "finish_reason" => choice.finish_reason = present(cursor)?,
                "delta" | "text" => choice.content = Some(cursor.skip()?),
                "logprobs" => choice.logprobs = present(cursor)?,
                _ => {
                    cursor.skip()?;
                }
            }
            Ok(())
        })?;
        choice.index = index.ok_or(wrong)?;
        Ok(choice)
    }
}

/// Where a value lies, unless it is null.
fn present(cursor: &mut Cursor<'_>) -> Result<Option<Range<usize>>, Malformed> {
    let null = cursor.is_null();
    cursor.skip().map(|range| Some(range).filter(|_| !null))
}

/// A member's range from the comma before it, so that cutting it leaves JSON; where it is the first, to the comma
/// behind it.
fn with_comma(text: &str, member: Range<usize>) -> Range<usize> {
    let before = text[..member.start].trim_ascii_end();
    if before.ends_with(',') {
        return before.len() - 1..member.end;
    }
    let after = &text[member.end..];
    let space = after.len() - after.trim_ascii_start().len();
    let comma = usize::from(after.trim_ascii_start().starts_with(','));
    member.start..member.end + if comma == 1 { space + 1 } else { 0 }
}

/// A JSON literal for a string.
pub(crate) fn literal(text: &str) -> String {
    // A string always serialises.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: &str = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","system_fingerprint":"fp","choices":[{"index":3,"delta":{"content":"a\",b"},"logprobs":null,"finish_reason":null,"token_ids":[5,6]}],"usage":null}"#;

    fn read(text: &str) -> Result<Chunk, Malformed> {
        Chunk::read(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn written(text: &str, edit: &Edit<'_>) -> String {
        let mut out = BytesMut::new();
        read(text).unwrap().write(&mut out, edit);
        let text = String::from_utf8(out.to_vec()).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        text
    }

    #[test]
    fn a_chunk_is_found_and_passed_on_without_what_was_not_asked_for() {
        let chunk = read(CHUNK).unwrap();
        let choice = chunk.choice.as_ref().unwrap();
        assert_eq!((choice.index, choice.token_ids.as_deref()), (3, Some(&[5, 6][..])));
        assert_eq!((chunk.fingerprint(), chunk.usage(), chunk.finish_reason()), (Some("fp"), None, None));
        assert_eq!((chunk.content(), chunk.logprobs()), (Some(r#"{"content":"a\",b"}"#), None));
        let all = Edit { token_ids: true, usage: true, ..Edit::default() };
        assert_eq!(written(CHUNK, &all), CHUNK);
        let bare = CHUNK.replace(",\"token_ids\":[5,6]", "").replace(",\"usage\":null", "");
        assert_eq!(written(CHUNK, &Edit::default()), bare);
        let edit = Edit { model: Some("\"other\""), extra: Some("\"consort\":1"), ..all };
        let expected = CHUNK.replace("\"m\"", "\"other\"").replace("null}", "null,\"consort\":1}");
        assert_eq!(written(CHUNK, &edit), expected);
        assert_eq!(
            written(&format!("{CHUNK} \n"), &edit),
            format!("{expected} \n"),
            "white space stays where it is"
        );
    }

    /// A stream's chunks are read after one another as each alone would be, whatever its beginning has in common with
    /// the one before: damaged, cut or changed at every place.
    #[test]
    fn a_chunk_after_another_is_what_it_is_alone() {
        let other = CHUNK.replace("chatcmpl-1", "chatcmpl-2");
        let late = CHUNK
            .replace(",\"model\":\"m\"", "")
            .replace("\"usage\":null", "\"usage\":null,\"model\":\"late\"");
        let mut texts = vec![CHUNK.to_owned(), CHUNK.to_owned(), other, CHUNK.to_owned(), late.clone(), late];
        for at in 0..CHUNK.len() {
            texts.push(CHUNK[..at].to_owned());
            for byte in ["}", ",", "\"", "x", "]", " "] {
                texts.push(format!("{}{byte}{}", &CHUNK[..at], &CHUNK[at + 1..]));
                texts.push(format!("{}{byte}{}", &CHUNK[..at], &CHUNK[at..]));
            }
        }
        let (mut head, mut sound) = (Head::default(), 0);
        for text in texts {
            let after = Chunk::read_after(&mut head, text.clone().into());
            let alone = read(&text);
            assert_eq!(after.is_ok(), alone.is_ok(), "{text}");
            if let (Ok(after), Ok(alone)) = (after, alone) {
                assert_eq!(after, alone, "{text}");
                sound += 1;
            }
            let _ = Chunk::read_after(&mut head, CHUNK.into()).unwrap();
        }
        assert!(sound > 100, "{sound}");
    }

    #[test]
    fn members_are_cut_wherever_they_stand() {
        let text = r#"{"usage":null , "choices":[{"token_ids":[1],"index":0}]}"#;
        assert_eq!(written(text, &Edit::default()), r#"{ "choices":[{"index":0}]}"#);
        let only = r#"{"choices":[],"usage":{"prompt_tokens":3}}"#;
        assert_eq!(read(only).unwrap().usage(), Some(r#"{"prompt_tokens":3}"#));
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for text in [
            "",
            "[DONE]",
            "{\"choices\":[{}]}",
            "{\"object\":\"x\"}",
            &CHUNK[..100],
            "{\"choices\":[{\"index\":0},{\"index\":1}]}",
            "{\"choices\":[{\"index\":0,\"token_ids\":[-1]}]}",
            "{\"choices\":[{\"index\":0,\"token_ids\":[4294967296]}]}",
            "{\"choices\":[{\"index\":0,\"token_ids\":7}]}",
            "{\"choices\":{\"index\":0}}",
            "{\"choices\":[]} {}",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        assert!(Chunk::read(Bytes::from_static(b"{\"choices\":[],\"a\":\"\xff\"}")).is_err());
    }
}
