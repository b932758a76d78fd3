//! The events of a stream, as bytes.
//!
//! Most of a chunk is the same in all of an answer, so it is written once; a token costs one copy of it, its text
//! escaped in place, and no serialiser. At 600 tokens a second that is what keeps HTTP off the cores that compute.

use bytes::{BufMut as _, BytesMut};
use consort_api::{FunctionCallDelta, ToolCallDelta, Usage};
use consort_inference::TokenEvent;

use super::{Envelope, Shape};
use crate::answer::{Finish, Piece};
use crate::error::ApiError;
use crate::logprobs;
use crate::tools::ToolPiece;

/// Writes the chunks of one response.
pub(crate) struct ChunkWriter {
    /// `data: {"id":…,"choices":[`
    head: Vec<u8>,
    /// `]}` and what a reader of usage expects in each chunk.
    tail: &'static [u8],
    /// Characters of text so far, for each choice.
    offsets: Vec<usize>,
}

/// Appends `value` as JSON. Values here are strings, numbers and structs of them, which always serialise.
fn put_json(out: &mut BytesMut, value: &(impl serde::Serialize + ?Sized)) {
    let _ = serde_json::to_writer(out.writer(), value);
}

impl ChunkWriter {
    pub(crate) fn new(envelope: &Envelope) -> ChunkWriter {
        let mut head = BytesMut::with_capacity(256);
        head.put_slice(b"data: {\"id\":");
        put_json(&mut head, &envelope.id);
        head.put_slice(b",\"object\":");
        put_json(&mut head, envelope.object(true));
        head.put_slice(b",\"created\":");
        put_json(&mut head, &envelope.created);
        head.put_slice(b",\"model\":");
        put_json(&mut head, &envelope.model);
        head.put_slice(b",\"system_fingerprint\":");
        put_json(&mut head, &envelope.fingerprint);
        head.put_slice(b",\"choices\":[");
        let tail: &[u8] = if envelope.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        ChunkWriter { head: head.to_vec(), tail, offsets: envelope.said.clone() }
    }

    /// Role-first: says who speaks, before anything is said.
    pub(crate) fn role(&self, out: &mut BytesMut, choice: usize) {
        out.put_slice(&self.head);
        out.put_slice(b"{\"index\":");
        put_json(out, &choice);
        out.put_slice(
            b",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}",
        );
        out.put_slice(self.tail);
    }

    /// A prompt, repeated before its answer.
    pub(crate) fn echo(
        &mut self,
        out: &mut BytesMut,
        envelope: &Envelope,
        choice: usize,
        text: &str,
        tokens: Option<&[TokenEvent]>,
    ) {
        out.put_slice(&self.head);
        out.put_slice(b"{\"index\":");
        put_json(out, &choice);
        out.put_slice(b",\"text\":");
        put_json(out, text);
        self.logprobs(out, envelope, choice, tokens.unwrap_or_default());
        out.put_slice(b",\"finish_reason\":null}");
        out.put_slice(self.tail);
    }

    /// More of an answer; `finish` in its last chunk.
    pub(crate) fn piece(
        &mut self,
        out: &mut BytesMut,
        envelope: &Envelope,
        choice: usize,
        piece: &Piece,
        finish: Option<Finish>,
    ) {
        out.put_slice(&self.head);
        out.put_slice(b"{\"index\":");
        put_json(out, &choice);
        match envelope.shape {
            Shape::Chat => {
                out.put_slice(b",\"delta\":{");
                Self::delta(out, envelope, choice, piece);
                out.put_slice(b"}");
            }
            Shape::Completion => {
                out.put_slice(b",\"text\":");
                put_json(out, &text_of(piece));
            }
        }
        self.logprobs(out, envelope, choice, &piece.tokens);
        out.put_slice(b",\"finish_reason\":");
        put_json(out, &finish.map(Finish::as_str));
        if envelope.return_token_ids {
            let ids: Vec<u32> = piece.tokens.iter().map(|t| t.id).collect();
            out.put_slice(b",\"token_ids\":");
            put_json(out, &ids);
        }
        out.put_slice(b"}");
        out.put_slice(self.tail);
    }

    fn delta(out: &mut BytesMut, envelope: &Envelope, choice: usize, piece: &Piece) {
        let text = text_of(piece);
        if !text.is_empty() {
            out.put_slice(b"\"content\":");
            put_json(out, &text);
        }
        let calls = calls_of(piece, envelope, choice);
        if !calls.is_empty() {
            out.put_slice(if text.is_empty() { b"\"tool_calls\":" } else { b",\"tool_calls\":" });
            put_json(out, &calls);
        }
    }

    fn logprobs(&mut self, out: &mut BytesMut, envelope: &Envelope, choice: usize, tokens: &[TokenEvent]) {
        out.put_slice(b",\"logprobs\":");
        if !envelope.logprobs || tokens.is_empty() {
            out.put_slice(b"null");
            return;
        }
        match envelope.shape {
            Shape::Chat => put_json(out, &logprobs::chat(&envelope.tokenizer, tokens)),
            Shape::Completion => {
                let offset = &mut self.offsets[choice];
                put_json(out, &logprobs::completion(&envelope.tokenizer, tokens, offset));
            }
        }
    }

    /// The usage of the whole response, in a chunk without choices.
    pub(crate) fn usage(&self, out: &mut BytesMut, usage: &Usage) {
        out.put_slice(&self.head);
        out.put_slice(b"],\"usage\":");
        put_json(out, usage);
        out.put_slice(b"}\n\n");
    }
}

/// The stream broke; nothing follows.
pub(crate) fn error(out: &mut BytesMut, error: &ApiError) {
    out.put_slice(b"event: error\ndata: ");
    out.put_slice(error.json().as_bytes());
    out.put_slice(b"\n\n");
}

/// The ordinary text of a piece.
pub(crate) fn text_of(piece: &Piece) -> std::borrow::Cow<'_, str> {
    let mut texts = piece.parts.iter().filter_map(|part| match part {
        ToolPiece::Text(text) => Some(text.as_str()),
        _ => None,
    });
    match (texts.next(), texts.next()) {
        (None, _) => "".into(),
        (Some(only), None) => only.into(),
        (Some(first), Some(second)) => {
            let mut all = format!("{first}{second}");
            texts.for_each(|t| all.push_str(t));
            all.into()
        }
    }
}

/// The calls of a piece, one entry a call.
fn calls_of(piece: &Piece, envelope: &Envelope, choice: usize) -> Vec<ToolCallDelta> {
    let mut calls: Vec<ToolCallDelta> = Vec::new();
    for part in &piece.parts {
        match part {
            ToolPiece::Text(_) => {}
            ToolPiece::Call { index, name } => calls.push(ToolCallDelta {
                index: *index,
                id: Some(envelope.call_id(choice, *index)),
                kind: Some("function".to_owned()),
                function: FunctionCallDelta { name: Some(name.clone()), arguments: Some(String::new()) },
            }),
            ToolPiece::Arguments { index, text } => {
                match calls.last_mut().filter(|call| call.index == *index) {
                    Some(call) => call.function.arguments.get_or_insert_default().push_str(text),
                    None => calls.push(ToolCallDelta {
                        index: *index,
                        function: FunctionCallDelta { name: None, arguments: Some(text.clone()) },
                        ..ToolCallDelta::default()
                    }),
                }
            }
        }
    }
    calls
}
