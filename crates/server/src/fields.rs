//! Reads a JSON object field by field; every complaint names the field.
//!
//! Why not derive it: an error has to say *which* parameter, what range, and what was meant by a name that nobody
//! knows; and a field must be either obeyed or refused. Here a field that no one took is refused at the end.
//! `null` counts as absent, as it does for OpenAI.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult};

/// An object being read.
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
    /// Names that were asked for: what an unknown name could have meant.
    known: Vec<&'static str>,
}

/// How a kind of value is called in a message, never with its content.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Fields {
    /// `path` names the object in messages; empty at the top.
    pub(crate) fn new(value: Value, path: impl Into<String>) -> ApiResult<Fields> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { path, map, known: Vec::new() }),
            other if path.is_empty() => Err(ApiError::new(
                axum::http::StatusCode::BAD_REQUEST,
                "invalid_value",
                format!("the body must be a JSON object, not {}", kind(&other)),
            )),
            other => Err(ApiError::param(&path, format!("{path} must be an object, not {}", kind(&other)))),
        }
    }

    /// A field's full name.
    pub(crate) fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// The field's value; none where it is absent or null.
    pub(crate) fn take(&mut self, field: &'static str) -> Option<Value> {
        self.known.push(field);
        self.map.remove(field).filter(|v| !v.is_null())
    }

    fn wrong(&self, field: &str, expected: &str, got: &Value) -> ApiError {
        let name = self.name(field);
        ApiError::param(&name, format!("{name} must be {expected}, not {}", kind(got))).code("invalid_type")
    }

    pub(crate) fn bool(&mut self, field: &'static str) -> ApiResult<Option<bool>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(field, "true or false", &other)),
        }
    }

    pub(crate) fn string(&mut self, field: &'static str) -> ApiResult<Option<String>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(field, "a string", &other)),
        }
    }

    pub(crate) fn array(&mut self, field: &'static str) -> ApiResult<Option<Vec<Value>>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Array(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(field, "an array", &other)),
        }
    }

    pub(crate) fn object(&mut self, field: &'static str) -> ApiResult<Option<Map<String, Value>>> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Object(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(field, "an object", &other)),
        }
    }

    /// A nested object, to be read the same way.
    pub(crate) fn nested(&mut self, field: &'static str) -> ApiResult<Option<Fields>> {
        let path = self.name(field);
        self.take(field).map(|value| Fields::new(value, path)).transpose()
    }

    /// A number within `range`. JSON has no NaN; a number too large for f64 doesn't parse in the first place.
    pub(crate) fn number(
        &mut self,
        field: &'static str,
        range: RangeInclusive<f64>,
    ) -> ApiResult<Option<f32>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let name = self.name(field);
        let Some(number) = value.as_f64() else { return Err(self.wrong(field, "a number", &value)) };
        if !range.contains(&number) {
            let (low, high) = (range.start(), range.end());
            return Err(ApiError::param(
                &name,
                format!("{name} is {number}; it must be from {low} to {high}"),
            ));
        }
        Ok(Some(number as f32))
    }

    /// A whole number within `range`; `2.0` counts as one, `2.5` doesn't.
    pub(crate) fn integer(
        &mut self,
        field: &'static str,
        range: RangeInclusive<i64>,
    ) -> ApiResult<Option<i64>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let name = self.name(field);
        let whole = value
            .as_i64()
            .or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15).map(|f| f as i64));
        let Some(number) = whole else {
            if value.is_number() {
                return Err(ApiError::param(&name, format!("{name} is {value}; it must be a whole number")));
            }
            return Err(self.wrong(field, "a whole number", &value));
        };
        if !range.contains(&number) {
            let (low, high) = (range.start(), range.end());
            let range =
                if *high == i64::MAX { format!("at least {low}") } else { format!("from {low} to {high}") };
            return Err(ApiError::param(&name, format!("{name} is {number}; it must be {range}")));
        }
        Ok(Some(number))
    }

    /// A list of whole numbers below 2³²: token ids. `max` bounds its length.
    pub(crate) fn token_ids(&mut self, field: &'static str, max: usize) -> ApiResult<Option<Vec<u32>>> {
        let name = self.name(field);
        self.array(field)?.map(|values| token_ids(&values, &name, max)).transpose()
    }

    /// Refuses the field unless it is absent or has a value that changes nothing.
    pub(crate) fn refuse_unless(
        &mut self,
        field: &'static str,
        harmless: impl Fn(&Value) -> bool,
        reason: &str,
    ) -> ApiResult<()> {
        // Kept out of `known`: nobody who mistypes a name should be sent to a field that is refused.
        match self.map.remove(field) {
            Some(value) if !value.is_null() && !harmless(&value) => {
                let name = self.name(field);
                Err(ApiError::unsupported(&name, format!("{name} is not supported: {reason}")))
            }
            _ => Ok(()),
        }
    }

    /// Takes a field that by its definition changes no answer.
    pub(crate) fn ignore(&mut self, field: &'static str) {
        let _ = self.take(field);
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> ApiResult<()> {
        let Some(unknown) = self.map.keys().next() else { return Ok(()) };
        let unknown: String = unknown.chars().take(64).collect();
        let name = self.name(&unknown);
        let hint = self
            .known
            .iter()
            .map(|known| (distance(known, &unknown), known))
            .filter(|(d, known)| *d <= 1 + known.len() / 4)
            .min_by_key(|(d, _)| *d)
            .map(|(_, known)| format!("; did you mean {known}?"))
            .unwrap_or_default();
        Err(ApiError {
            code: Some("unknown_parameter"),
            ..ApiError::param(&name, format!("unknown parameter {name}{hint}"))
        })
    }
}

/// Reads token ids out of a JSON array.
pub(crate) fn token_ids(values: &[Value], name: &str, max: usize) -> ApiResult<Vec<u32>> {
    if values.len() > max {
        return Err(ApiError::param(
            name,
            format!("{name} has {} entries; at most {max} are taken", values.len()),
        ));
    }
    let id = |(i, value): (usize, &Value)| {
        value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            ApiError::param(
                name,
                format!("{name}[{i}] must be a token id, a whole number from 0 to {}", u32::MAX),
            )
        })
    };
    values.iter().enumerate().map(id).collect()
}

/// Edits between two short names (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::new(value, "").unwrap()
    }

    #[test]
    fn numbers_keep_their_range_and_kind() {
        for (value, ok) in [
            (json!(0), true),
            (json!(2.0), true),
            (json!(2.1), false),
            (json!(-0.1), false),
            (json!("1"), false),
        ] {
            let got = fields(json!({"temperature": value})).number("temperature", 0.0..=2.0);
            assert_eq!(got.is_ok(), ok, "{value}");
            if let Err(error) = got {
                assert_eq!(error.param.as_deref(), Some("temperature"));
            }
        }
        for (value, want) in [
            (json!(3), Some(3)),
            (json!(3.0), Some(3)),
            (json!(3.5), None),
            (json!(0), None),
            (json!(1e300), None),
        ] {
            assert_eq!(fields(json!({"n": value})).integer("n", 1..=16).ok().flatten(), want, "{value}");
        }
        assert_eq!(fields(json!({"n": null})).integer("n", 1..=16).unwrap(), None);
    }

    #[test]
    fn an_unknown_field_is_refused_with_a_hint() {
        let mut f = fields(json!({"temprature": 1}));
        f.number("temperature", 0.0..=2.0).unwrap();
        let error = f.finish().unwrap_err();
        assert_eq!(error.param.as_deref(), Some("temprature"));
        assert!(error.message.contains("did you mean temperature?"), "{}", error.message);
        let mut f = fields(json!({"zzz": 1}));
        f.number("temperature", 0.0..=2.0).unwrap();
        assert!(!f.finish().unwrap_err().message.contains("did you mean"));
    }

    #[test]
    fn token_ids_are_whole_and_bounded() {
        assert_eq!(token_ids(&[json!(1), json!(4294967295u32)], "prompt", 4).unwrap(), [1, u32::MAX]);
        for bad in [json!(-1), json!(1.5), json!("1"), json!(4294967296u64), json!(null)] {
            assert!(token_ids(&[bad], "prompt", 4).is_err());
        }
        assert!(token_ids(&vec![json!(1); 5], "prompt", 4).is_err());
    }
}
