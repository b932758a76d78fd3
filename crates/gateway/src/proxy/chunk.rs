//! One event of a replica's stream, read in place and passed on with small cuts.
//!
//! A chunk isn't parsed into values: the gateway finds where the fields lie that it needs (`choices[0].index`,
//! `token_ids`, `finish_reason`) or must take out (`token_ids` and `usage` where the client didn't ask for them), and
//! copies what lies between. A chunk costs one pass and one copy.

use std::ops::Range;

use bytes::{BufMut as _, BytesMut};

use crate::json::{List, Malformed, Object};

/// A chunk of an answer, as it lies in its text.
#[derive(Debug, PartialEq)]
pub(crate) struct Chunk<'a> {
    text: &'a str,
    /// None in the chunk that carries the usage.
    pub(crate) choice: Option<Choice<'a>>,
    pub(crate) fingerprint: Option<&'a str>,
    /// The value of `usage`, where it isn't null.
    pub(crate) usage: Option<&'a str>,
    model: Option<Range<usize>>,
    /// With the comma before it.
    usage_member: Option<Range<usize>>,
    /// Where something can be added as the last member.
    end: usize,
}

/// What is new in one answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Choice<'a> {
    pub(crate) index: usize,
    /// None in the chunk that opens an answer: it says who speaks, or repeats the prompt.
    pub(crate) token_ids: Option<Vec<u32>>,
    /// With the comma before it.
    token_ids_member: Option<Range<usize>>,
    /// `stop`, `length`, …, in the last chunk.
    pub(crate) finish_reason: Option<&'a str>,
    /// The value of `delta` or `text`.
    pub(crate) content: Option<&'a str>,
    /// The value of `logprobs`, where it isn't null.
    pub(crate) logprobs: Option<&'a str>,
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

impl<'a> Chunk<'a> {
    /// Reads the data of an event.
    ///
    /// # Errors
    /// Where it isn't JSON or not a chunk of one choice.
    pub(crate) fn read(text: &'a str) -> Result<Chunk<'a>, Malformed> {
        let mut object = Object::new(text)?;
        let mut chunk = Chunk {
            text,
            choice: None,
            fingerprint: None,
            usage: None,
            model: None,
            usage_member: None,
            end: text.trim_end().len().saturating_sub(1),
        };
        let mut choices = false;
        while let Some(member) = object.next()? {
            match member.key.as_ref() {
                "choices" => {
                    choices = true;
                    let mut list = List::within(text, member.value)?;
                    while let Some(element) = list.next()? {
                        let at = element.start;
                        if chunk.choice.replace(Choice::read(text, element)?).is_some() {
                            return Err(Malformed { at });
                        }
                    }
                }
                "system_fingerprint" => {
                    let value = &text[member.value];
                    chunk.fingerprint = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
                }
                "model" => chunk.model = Some(member.value),
                "usage" => {
                    chunk.usage = Some(&text[member.value]).filter(|usage| *usage != "null");
                    chunk.usage_member = Some(with_comma(text, member.whole));
                }
                _ => {}
            }
        }
        if choices { Ok(chunk) } else { Err(Malformed { at: 0 }) }
    }

    /// The model's name as JSON.
    pub(crate) fn model(&self) -> Option<&'a str> {
        self.model.clone().map(|range| &self.text[range])
    }

    /// Appends the chunk as the client is to see it.
    pub(crate) fn write(&self, out: &mut BytesMut, edit: &Edit<'_>) {
        let mut at = 0;
        let mut cut = |out: &mut BytesMut, range: &Range<usize>, instead: &str| {
            // Members come in the order of the text; one that overlaps what was cut already went with it.
            if range.start >= at {
                out.put_slice(&self.text.as_bytes()[at..range.start]);
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
        out.put_slice(&self.text.as_bytes()[at..]);
    }
}

impl<'a> Choice<'a> {
    fn read(text: &'a str, range: Range<usize>) -> Result<Choice<'a>, Malformed> {
        let wrong = Malformed { at: range.start };
        let mut object = Object::within(text, range)?;
        let mut index = None;
        let mut choice = Choice {
            index: 0,
            token_ids: None,
            token_ids_member: None,
            finish_reason: None,
            content: None,
            logprobs: None,
        };
        while let Some(member) = object.next()? {
            let value = &text[member.value.clone()];
            match member.key.as_ref() {
                "index" => index = value.parse().ok(),
                "token_ids" if value != "null" => {
                    choice.token_ids = Some(token_ids(text, member.value).ok_or(wrong)?);
                    choice.token_ids_member = Some(with_comma(text, member.whole));
                }
                "finish_reason" if value != "null" => {
                    choice.finish_reason = Some(value.trim_matches('"'));
                }
                "delta" | "text" => choice.content = Some(value),
                "logprobs" if value != "null" => choice.logprobs = Some(value),
                _ => {}
            }
        }
        choice.index = index.ok_or(wrong)?;
        Ok(choice)
    }
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

fn token_ids(text: &str, range: Range<usize>) -> Option<Vec<u32>> {
    let mut list = List::within(text, range).ok()?;
    let mut ids = Vec::with_capacity(1);
    while let Some(element) = list.next().ok()? {
        ids.push(text[element].parse().ok()?);
    }
    Some(ids)
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

    fn written(text: &str, edit: &Edit<'_>) -> String {
        let mut out = BytesMut::new();
        Chunk::read(text).unwrap().write(&mut out, edit);
        let text = String::from_utf8(out.to_vec()).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        text
    }

    #[test]
    fn a_chunk_is_found_and_passed_on_without_what_was_not_asked_for() {
        let chunk = Chunk::read(CHUNK).unwrap();
        let choice = chunk.choice.as_ref().unwrap();
        assert_eq!((choice.index, choice.token_ids.as_deref()), (3, Some(&[5, 6][..])));
        assert_eq!((chunk.fingerprint, chunk.usage, choice.finish_reason), (Some("fp"), None, None));
        assert_eq!(choice.content, Some(r#"{"content":"a\",b"}"#));
        let all = Edit { token_ids: true, usage: true, ..Edit::default() };
        assert_eq!(written(CHUNK, &all), CHUNK);
        let bare = CHUNK.replace(",\"token_ids\":[5,6]", "").replace(",\"usage\":null", "");
        assert_eq!(written(CHUNK, &Edit::default()), bare);
        let edit = Edit { model: Some("\"other\""), extra: Some("\"consort\":1"), ..all };
        let expected = CHUNK.replace("\"m\"", "\"other\"").replace("null}", "null,\"consort\":1}");
        assert_eq!(written(CHUNK, &edit), expected);
    }

    #[test]
    fn members_are_cut_wherever_they_stand() {
        let text = r#"{"usage":null , "choices":[{"token_ids":[1],"index":0}]}"#;
        assert_eq!(written(text, &Edit::default()), r#"{ "choices":[{"index":0}]}"#);
        let only = r#"{"choices":[],"usage":{"prompt_tokens":3}}"#;
        assert_eq!(Chunk::read(only).unwrap().usage, Some(r#"{"prompt_tokens":3}"#));
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
        ] {
            assert!(Chunk::read(text).is_err(), "{text}");
        }
    }
}
