//! The fields of a request that mean something to the gateway, found in place.

use std::ops::Range;

use super::{ASSUMED_TOKENS, MOST_TOKENS};
use crate::error::{Outcome, Refusal};
use crate::json::{self, List, Malformed, Object};

/// What is wrong with `text`, said as serde_json says it.
pub(crate) fn explain(text: &str, malformed: Malformed) -> String {
    match serde_json::from_str::<serde::de::IgnoredAny>(text) {
        Err(error) => format!("the body is not valid JSON: {error}"),
        Ok(_) if malformed.at <= text.len() - text.trim_ascii_start().len() => {
            format!("the body must be a JSON object, not {}", json::kind(text.trim_ascii_start()))
        }
        Ok(_) => format!("the body is not valid JSON at byte {}", malformed.at),
    }
}

pub(super) enum Reason {
    Refused(Refusal),
    Malformed(Malformed),
}

impl From<Malformed> for Reason {
    fn from(at: Malformed) -> Reason {
        Reason::Malformed(at)
    }
}

impl From<Refusal> for Reason {
    fn from(refusal: Refusal) -> Reason {
        Reason::Refused(refusal)
    }
}

/// The fields that mean something here.
pub(super) struct Fields {
    pub(super) kept: Vec<Range<usize>>,
    pub(super) model: Option<String>,
    pub(super) model_value: Option<Range<usize>>,
    pub(super) stream: bool,
    /// `include_usage`, and what stands beside it.
    pub(super) options: Option<(bool, Vec<Range<usize>>)>,
    pub(super) token_ids: bool,
    pub(super) seed: Option<i64>,
    pub(super) n: u64,
    pub(super) prompts: u64,
    pub(super) prompt: Range<usize>,
    pub(super) max_tokens: u64,
    pub(super) resume: Option<consort_api::Resume>,
    pub(super) logprobs: bool,
    /// Bits of [`KNOWN`].
    pub(super) seen: u32,
}

impl Default for Fields {
    fn default() -> Fields {
        Fields {
            kept: Vec::with_capacity(4),
            model: None,
            model_value: None,
            stream: false,
            options: None,
            token_ids: false,
            seed: None,
            n: 1,
            prompts: 1,
            prompt: 0..0,
            max_tokens: ASSUMED_TOKENS,
            resume: None,
            logprobs: false,
            seen: 0,
        }
    }
}

/// Fields read here. One that stands twice is refused: two readers could take two different ones of them.
const KNOWN: [&str; 12] = [
    "model",
    "stream",
    "stream_options",
    "return_token_ids",
    "seed",
    "consort",
    "n",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
];

impl Fields {
    pub(super) fn read(&mut self, text: &str) -> Result<(), Reason> {
        let mut object = Object::new(text)?;
        // The end of the member before, where it was kept: a run of kept members goes on in one piece.
        let mut run: Option<Range<usize>> = None;
        while let Some(member) = object.next()? {
            let key = member.key.as_ref();
            if let Some(i) = KNOWN.iter().position(|known| *known == key) {
                if self.seen & (1 << i) != 0 {
                    return Err(Refusal::param(key, format!("{key} stands twice; send it once")).into());
                }
                self.seen |= 1 << i;
            }
            let range = member.value.clone();
            let value = Value { name: key, text: &text[range.clone()] };
            let rewritten = match key {
                "model" => {
                    self.model = value.string()?;
                    self.model_value = Some(range);
                    true
                }
                "stream" => {
                    self.stream = value.boolean()?.unwrap_or(false);
                    true
                }
                "stream_options" => {
                    if value.text != "null" {
                        self.options = Some(stream_options(text, range)?);
                    }
                    true
                }
                "return_token_ids" => {
                    self.token_ids = value.boolean()?.unwrap_or(false);
                    true
                }
                "seed" => {
                    self.seed = value.integer()?;
                    true
                }
                "consort" => {
                    if value.text != "null" {
                        let resume = serde_json::from_str(value.text);
                        let wrong = |e| Refusal::param("consort", format!("consort is wrong: {e}"));
                        self.resume = Some(resume.map_err(wrong)?);
                    }
                    true
                }
                // What is wrong with the others is the replica's to say.
                "n" => {
                    self.n = value.text.parse().unwrap_or(1);
                    false
                }
                "max_tokens" | "max_completion_tokens" => {
                    self.max_tokens = value.text.parse().unwrap_or(ASSUMED_TOKENS).min(MOST_TOKENS);
                    false
                }
                "logprobs" => {
                    self.logprobs = !matches!(value.text, "null" | "false");
                    false
                }
                "messages" => {
                    self.prompt = range;
                    false
                }
                "prompt" => {
                    self.prompts = prompts(text, range.clone())?;
                    self.prompt = range;
                    false
                }
                _ => false,
            };
            match (&mut run, rewritten) {
                (Some(run), false) => run.end = member.whole.end,
                (None, false) => run = Some(member.whole),
                (_, true) => self.kept.extend(run.take()),
            }
        }
        self.kept.extend(run);
        Ok(())
    }
}

/// How many prompts there are: one text, one list of ids, or a list of either.
fn prompts(text: &str, range: Range<usize>) -> Result<u64, Malformed> {
    if !text[range.clone()].starts_with('[') {
        return Ok(1);
    }
    let mut list = List::within(text, range)?;
    let mut count = 0;
    while let Some(element) = list.next()? {
        if !text[element].starts_with(['"', '[']) {
            return Ok(1);
        }
        count += 1;
    }
    Ok(count)
}

fn stream_options(text: &str, range: Range<usize>) -> Result<(bool, Vec<Range<usize>>), Reason> {
    if !text[range.clone()].starts_with('{') {
        let kind = json::kind(&text[range]);
        return Err(Refusal::param(
            "stream_options",
            format!("stream_options must be an object, not {kind}"),
        )
        .into());
    }
    let (mut include_usage, mut others) = (None, Vec::new());
    let mut object = Object::within(text, range)?;
    while let Some(member) = object.next()? {
        if member.key == "include_usage" {
            let name = "stream_options.include_usage";
            let value = Value { name, text: &text[member.value] };
            if include_usage.replace(value.boolean()?.unwrap_or(false)).is_some() {
                return Err(Refusal::param(name, format!("{name} stands twice; send it once")).into());
            }
        } else {
            others.push(member.whole);
        }
    }
    Ok((include_usage.unwrap_or(false), others))
}

/// A field that is rewritten here.
struct Value<'a> {
    name: &'a str,
    text: &'a str,
}

impl Value<'_> {
    fn wrong(&self, wanted: &str) -> Refusal {
        Refusal::param(self.name, format!("{} must be {wanted}, not {}", self.name, json::kind(self.text)))
    }

    fn string(&self) -> Outcome<Option<String>> {
        match self.text {
            "null" => Ok(None),
            text => match json::string(text) {
                Some(string) => Ok(Some(string.into_owned())),
                None => Err(self.wrong("a string")),
            },
        }
    }

    fn boolean(&self) -> Outcome<Option<bool>> {
        match self.text {
            "null" => Ok(None),
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(self.wrong("true or false")),
        }
    }

    fn integer(&self) -> Outcome<Option<i64>> {
        match self.text {
            "null" => Ok(None),
            text => match text.parse() {
                Ok(integer) => Ok(Some(integer)),
                Err(_) if json::kind(text) == "a number" => Err(Refusal::param(
                    self.name,
                    format!(
                        "{} is {text}; it must be a whole number from {} to {}",
                        self.name,
                        i64::MIN,
                        i64::MAX
                    ),
                )),
                Err(_) => Err(self.wrong("a whole number")),
            },
        }
    }
}
