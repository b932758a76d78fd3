//! The parameters that chat and plain completions share: read, checked, and put into the engine's words.
//!
//! Defaults are OpenAI's: temperature 1, top_p 1, everything else off. Ranges are OpenAI's where it has one.

use consort_inference::Sampling;
use serde_json::Value;

use crate::error::{ApiError, ApiResult};
use crate::fields::{self, Fields};

/// Stop strings a request may have, and the bytes of each.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Entries of `logit_bias`.
const MAX_LOGIT_BIAS: usize = 1024;
/// Answers to one prompt.
const MAX_N: i64 = 16;
/// Token ids of an answer begun elsewhere; no model's context is longer.
const MAX_EMITTED: usize = 1 << 20;

/// What both endpoints read the same way.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    pub(crate) model: Option<String>,
    pub(crate) sampling: Sampling,
    pub(crate) n: usize,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_end: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) resume: consort_api::Resume,
}

impl Common {
    /// Takes the shared fields out of `fields`; ids must be below `vocab`.
    pub(crate) fn read(fields: &mut Fields, vocab: usize) -> ApiResult<Common> {
        let model = fields.string("model")?;
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
        let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0).max(0);
        let mut sampling = Sampling {
            temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_k: u32::try_from(top_k).unwrap_or(u32::MAX),
            top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", 0.01..=2.0)?.unwrap_or(1.0),
            logit_bias: logit_bias(fields, vocab)?,
            seed: 0,
        };
        let n = fields.integer("n", 1..=MAX_N)?.unwrap_or(1) as usize;
        let stops = stops(fields)?;
        let stop_token_ids = fields.token_ids("stop_token_ids", MAX_STOPS)?.unwrap_or_default();
        below_vocab(&stop_token_ids, "stop_token_ids", vocab)?;
        let ignore_end = fields.bool("ignore_eos")?.unwrap_or(false);
        let stream = fields.bool("stream")?.unwrap_or(false);
        let include_usage = stream_options(fields, stream)?;
        let return_token_ids = fields.bool("return_token_ids")?.unwrap_or(false);
        let resume = resume(fields, vocab)?;
        if !resume.emitted_token_ids.is_empty() && n != 1 {
            return Err(ApiError::param(
                "n",
                "an answer that goes on with consort.emitted_token_ids is one answer: n must be 1, or send consort.choices",
            ));
        }
        let resumes = !resume.emitted_token_ids.is_empty() || !resume.choices.is_empty();
        if resumes && seed.is_none() && sampling.temperature > 0.0 {
            return Err(ApiError::param(
                "seed",
                "an answer goes on with the seed that it began with: send seed (or temperature 0)",
            ));
        }
        sampling.seed = match seed {
            Some(seed) => seed as u64,
            None => random_seed(),
        };
        fields.ignore("user");
        fields.ignore("metadata");
        fields.ignore("safety_identifier");
        fields.ignore("prompt_cache_key");
        fields.refuse_unless("cache_prompt", |v| v == &Value::Bool(true), CACHE_REASON)?;
        fields.refuse_unless("timeout", |_| false, "send the header X-Request-Timeout-Ms instead")?;
        fields.refuse_unless("min_tokens", |v| v.as_u64() == Some(0), "use ignore_eos with max_tokens")?;
        fields.refuse_unless("prompt_logprobs", |_| false, "use echo with logprobs on /v1/completions")?;
        fields.refuse_unless("use_beam_search", is_false, "answers are sampled, never searched")?;
        for name in
            ["typical_p", "typ_p", "tfs_z", "mirostat", "mirostat_tau", "mirostat_eta", "dynatemp_range"]
        {
            fields.refuse_unless(name, |_| false, "the samplers are temperature, top_k, top_p and min_p")?;
        }
        fields.refuse_unless("repeat_penalty", |_| false, "it is called repetition_penalty here")?;
        fields.refuse_unless("n_predict", |_| false, "it is called max_tokens here")?;
        for name in
            ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema"]
        {
            fields.refuse_unless(
                name,
                |_| false,
                "use response_format with a json_schema on /v1/chat/completions",
            )?;
        }
        Ok(Common {
            model,
            sampling,
            n,
            stops,
            stop_token_ids,
            ignore_end,
            stream,
            include_usage,
            return_token_ids,
            resume,
        })
    }

    /// The seed of choice `index`: the first choice has the request's own, so that `n` adds answers and changes none.
    pub(crate) fn choice_seed(&self, index: usize) -> u64 {
        self.sampling.seed.wrapping_add((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }
}

impl Common {
    /// The ids of choice `index` that were emitted elsewhere.
    pub(crate) fn emitted(&self, index: usize) -> &[u32] {
        match self.resume.choices.get(index) {
            Some(ids) => ids,
            None if index == 0 => &self.resume.emitted_token_ids,
            None => &[],
        }
    }
}

const CACHE_REASON: &str = "finished prompts always stay in the prefix cache; answers don't depend on it";

/// For [`Fields::refuse_unless`].
pub(crate) fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

/// A seed for a request without one: 53 bits, so that every JSON reader gets back what the header says.
fn random_seed() -> u64 {
    random() >> 11
}

/// 64 bits that an outsider can't guess: `RandomState` is keyed by the system's generator.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

/// Every id must be in the vocabulary.
pub(crate) fn below_vocab(ids: &[u32], name: &str, vocab: usize) -> ApiResult<()> {
    match ids.iter().position(|id| *id as usize >= vocab) {
        None => Ok(()),
        Some(i) => {
            let id = ids[i];
            Err(ApiError::param(
                name,
                format!("{name}[{i}] is {id}; this model's token ids are below {vocab}"),
            ))
        }
    }
}

fn logit_bias(fields: &mut Fields, vocab: usize) -> ApiResult<Vec<(u32, f32)>> {
    let name = "logit_bias";
    let Some(map) = fields.object(name)? else { return Ok(Vec::new()) };
    if map.len() > MAX_LOGIT_BIAS {
        return Err(ApiError::param(
            name,
            format!("{name} has {} entries; at most {MAX_LOGIT_BIAS} are taken", map.len()),
        ));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (key, value) in map {
        let Some(id) = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab) else {
            let key: String = key.chars().take(32).collect();
            return Err(ApiError::param(
                name,
                format!("{name}'s key {key:?} must be a token id below {vocab}"),
            ));
        };
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => biases.push((id, bias as f32)),
            _ => {
                return Err(ApiError::param(name, format!("{name}[{id}] must be a number from -100 to 100")));
            }
        }
    }
    biases.sort_by_key(|(id, _)| *id);
    if let Some(twice) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(ApiError::param(name, format!("{name} names token {} twice", twice[0].0)));
    }
    Ok(biases)
}

fn stops(fields: &mut Fields) -> ApiResult<Vec<String>> {
    let stops = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(values)) => {
            if values.len() > MAX_STOPS {
                return Err(ApiError::param(
                    "stop",
                    format!("stop has {} strings; at most {MAX_STOPS} are taken", values.len()),
                ));
            }
            let text = |value: Value| match value {
                Value::String(stop) => Ok(stop),
                other => Err(ApiError::param(
                    "stop",
                    format!("stop must hold strings, not {}", fields::kind(&other)),
                )),
            };
            values.into_iter().map(text).collect::<ApiResult<_>>()?
        }
        Some(other) => {
            let kind = fields::kind(&other);
            return Err(ApiError::param(
                "stop",
                format!("stop must be a string or an array of strings, not {kind}"),
            ));
        }
    };
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::param("stop", "a stop string can't be empty"));
    }
    if let Some(long) = stops.iter().find(|s| s.len() > MAX_STOP_BYTES) {
        return Err(ApiError::param(
            "stop",
            format!("a stop string has {} bytes; at most {MAX_STOP_BYTES} are taken", long.len()),
        ));
    }
    Ok(stops)
}

fn stream_options(fields: &mut Fields, stream: bool) -> ApiResult<bool> {
    let Some(mut options) = fields.nested("stream_options")? else { return Ok(false) };
    let include_usage = options.bool("include_usage")?.unwrap_or(false);
    options.refuse_unless("include_obfuscation", is_false, "chunks are never padded")?;
    options.refuse_unless("continuous_usage_stats", is_false, "usage comes once, in the last chunk")?;
    options.finish()?;
    if !stream {
        return Err(ApiError::param("stream_options", "stream_options is for stream: true"));
    }
    Ok(include_usage)
}

fn resume(fields: &mut Fields, vocab: usize) -> ApiResult<consort_api::Resume> {
    let Some(mut inner) = fields.nested("consort")? else { return Ok(consort_api::Resume::default()) };
    let emitted_token_ids = inner.token_ids("emitted_token_ids", MAX_EMITTED)?.unwrap_or_default();
    below_vocab(&emitted_token_ids, "consort.emitted_token_ids", vocab)?;
    let choices = resumed_choices(&mut inner, vocab)?;
    if !choices.is_empty() && !emitted_token_ids.is_empty() {
        let message = "send consort.emitted_token_ids or consort.choices, not both";
        return Err(ApiError::param("consort.choices", message));
    }
    let id = inner.string("id")?;
    if let Some(id) = &id
        && (id.is_empty()
            || id.len() > 128
            || !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_'))
    {
        return Err(ApiError::param("consort.id", "consort.id must be 1 to 128 letters, digits, - or _"));
    }
    let created = inner.integer("created", 0..=i64::MAX)?.map(|seconds| seconds as u64);
    inner.finish()?;
    Ok(consort_api::Resume { emitted_token_ids, choices, id, created })
}

/// Ids of several choices; [`MAX_EMITTED`] in all.
fn resumed_choices(inner: &mut Fields, vocab: usize) -> ApiResult<Vec<Vec<u32>>> {
    let name = "consort.choices";
    let Some(lists) = inner.array("choices")? else { return Ok(Vec::new()) };
    let (mut choices, mut left) = (Vec::new(), MAX_EMITTED);
    for list in lists {
        let Value::Array(ids) = list else {
            let message = format!("{name} must hold lists of token ids, not {}", fields::kind(&list));
            return Err(ApiError::param(name, message));
        };
        let ids = fields::token_ids(&ids, name, left)?;
        below_vocab(&ids, name, vocab)?;
        left -= ids.len();
        choices.push(ids);
    }
    Ok(choices)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> ApiResult<Common> {
        let mut fields = Fields::new(value, "").unwrap();
        let common = Common::read(&mut fields, 100)?;
        fields.finish()?;
        Ok(common)
    }

    /// Value, and whether it is taken; a refusal names the field.
    #[test]
    fn every_shared_parameter_is_taken_or_refused_by_name() {
        let table: &[(&str, Value, bool)] = &[
            ("temperature", json!(0), true),
            ("temperature", json!(2), true),
            ("temperature", json!(2.01), false),
            ("temperature", json!(-1), false),
            ("temperature", json!("hot"), false),
            ("temperature", json!(null), true),
            ("top_p", json!(1), true),
            ("top_p", json!(0), true),
            ("top_p", json!(-0.1), false),
            ("top_p", json!(1.5), false),
            ("top_k", json!(-1), true),
            ("top_k", json!(40), true),
            ("top_k", json!(-2), false),
            ("min_p", json!(0.05), true),
            ("min_p", json!(-0.05), false),
            ("presence_penalty", json!(-2), true),
            ("presence_penalty", json!(3), false),
            ("frequency_penalty", json!(2), true),
            ("frequency_penalty", json!(-2.5), false),
            ("repetition_penalty", json!(1.1), true),
            ("repetition_penalty", json!(0), false),
            ("logit_bias", json!({"99": -100, "3": 5.5}), true),
            ("logit_bias", json!({"100": 1}), false),
            ("logit_bias", json!({"a": 1}), false),
            ("logit_bias", json!({"1": 101}), false),
            ("logit_bias", json!({"1": 1, "01": 2}), false),
            ("logit_bias", json!([1]), false),
            ("seed", json!(-5), true),
            ("seed", json!(i64::MAX), true),
            ("seed", json!(u64::MAX), false),
            ("seed", json!(1.5), false),
            ("n", json!(16), true),
            ("n", json!(0), false),
            ("n", json!(17), false),
            ("stop", json!("a"), true),
            ("stop", json!(["a", "b"]), true),
            ("stop", json!(""), false),
            ("stop", json!(["a", 1]), false),
            ("stop", json!(vec!["a"; 17]), false),
            ("stop", json!("a".repeat(1025)), false),
            ("stop_token_ids", json!([1, 2]), true),
            ("stop_token_ids", json!([100]), false),
            ("ignore_eos", json!(true), true),
            ("ignore_eos", json!(1), false),
            ("stream", json!(true), true),
            ("stream", json!("yes"), false),
            ("stream_options", json!({"include_usage": true}), false),
            ("return_token_ids", json!(true), true),
            ("user", json!("someone"), true),
            ("metadata", json!({"a": "b"}), true),
            ("cache_prompt", json!(true), true),
            ("cache_prompt", json!(false), false),
            ("timeout", json!(3), false),
            ("min_tokens", json!(3), false),
            ("mirostat", json!(2), false),
            ("n_predict", json!(5), false),
            ("guided_json", json!({}), false),
            ("prompt_logprobs", json!(1), false),
            ("no_such_thing", json!(1), false),
        ];
        for (name, value, taken) in table {
            let got = read(json!({*name: value}));
            assert_eq!(got.is_ok(), *taken, "{name}: {value}");
            if let Err(error) = got {
                assert_eq!(error.param.as_deref(), Some(*name), "{name}: {value}");
                assert_eq!(error.status, 400);
            }
        }
    }

    #[test]
    fn stream_options_are_read_and_strict() {
        assert!(
            read(json!({"stream": true, "stream_options": {"include_usage": true}})).unwrap().include_usage
        );
        let error = read(json!({"stream": true, "stream_options": {"include_use": true}})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("stream_options.include_use"));
    }

    #[test]
    fn a_continuation_needs_its_seed_and_stays_single() {
        let ids = json!({"emitted_token_ids": [1, 2]});
        assert_eq!(read(json!({"consort": ids})).unwrap_err().param.as_deref(), Some("seed"));
        assert!(read(json!({"consort": ids, "temperature": 0})).is_ok());
        assert!(read(json!({"consort": ids, "seed": 4})).is_ok());
        assert_eq!(read(json!({"consort": ids, "seed": 4, "n": 2})).unwrap_err().param.as_deref(), Some("n"));
        let error = read(json!({"consort": {"emitted_token_ids": [100]}, "seed": 1})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("consort.emitted_token_ids"));
    }

    #[test]
    fn choices_have_seeds_of_their_own_and_the_first_the_requests() {
        let common = read(json!({"seed": 7, "n": 3})).unwrap();
        assert_eq!(common.choice_seed(0), 7);
        assert_ne!(common.choice_seed(1), common.choice_seed(2));
    }
}
