//! Breaks special tokens' spellings in a request's strings, so that no text becomes a special token.

use serde_json::Value;

use crate::Tokenizer;

/// A private-use character that is neither in `template` nor in any string of `values`.
pub(super) fn unused_character<'a>(template: &str, values: impl Iterator<Item = &'a Value>) -> Option<char> {
    // Private use: no vocabulary has words with these, no template treats them specially, no trimming takes them.
    let private = |c: &char| ('\u{E000}'..='\u{F8FF}').contains(c);
    let mut used: Vec<char> = template.chars().filter(private).collect();
    values.for_each(|value| collect(value, &mut |text| used.extend(text.chars().filter(private))));
    used.sort_unstable();
    used.dedup();
    ('\u{E000}'..='\u{F8FF}').find(|c| used.binary_search(c).is_err())
}

fn collect(value: &Value, see: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => see(text),
        Value::Array(items) => items.iter().for_each(|item| collect(item, see)),
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            see(key);
            collect(item, see);
        }),
        _ => {}
    }
}

/// `value` with `mark` inside every special token's spelling, in strings and keys, and inside what begins one at a
/// string's end (a template may write two strings side by side).
pub(super) fn broken(value: &Value, tokenizer: &Tokenizer, mark: char) -> Value {
    match value {
        Value::String(text) => {
            tokenizer.break_specials(text, mark).map_or_else(|| value.clone(), Value::String)
        }
        Value::Array(items) => items.iter().map(|item| broken(item, tokenizer, mark)).collect(),
        Value::Object(map) => map
            .iter()
            .map(|(key, item)| {
                let key = tokenizer.break_specials(key, mark).unwrap_or_else(|| key.clone());
                (key, broken(item, tokenizer, mark))
            })
            .collect(),
        _ => value.clone(),
    }
}
