//! What a value may be: each reader takes a TOML value and says what it should have been.

use std::net::SocketAddr;
use std::time::Duration;

use toml::de::DeValue;

/// What is wrong with a value, and what would be right.
pub type Wrong = (String, Option<String>);

/// Someone else's text in a message of ours.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// What a value is, for messages.
pub fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn not(wanted: &str, value: &DeValue<'_>, example: &str) -> Wrong {
    (format!("expected {wanted}, found {}", kind(value)), Some(format!("like {example}")))
}

/// `true` or `false`.
pub fn flag(value: &DeValue<'_>) -> Result<bool, Wrong> {
    value.as_bool().ok_or_else(|| not("true or false", value, "true"))
}

/// A string that isn't empty.
pub fn text(value: &DeValue<'_>) -> Result<String, Wrong> {
    match value.as_str() {
        Some("") => Err(("this is empty".into(), None)),
        Some(text) if text.chars().any(char::is_control) => {
            Err(("this holds a control character".into(), None))
        }
        Some(text) if text.len() > 4096 => Err(("this is longer than 4,096 bytes".into(), None)),
        Some(text) => Ok(text.to_owned()),
        None => Err(not("a string", value, "\"text\"")),
    }
}

/// A list of strings.
pub fn texts(value: &DeValue<'_>) -> Result<Vec<String>, Wrong> {
    let list = value.as_array().ok_or_else(|| not("a list of strings", value, "[\"one\", \"two\"]"))?;
    list.iter().map(|item| text(item.get_ref())).collect()
}

/// A whole number from `low` to `high`.
pub fn whole(low: u64, high: u64) -> impl Fn(&DeValue<'_>) -> Result<u64, Wrong> {
    move |value| {
        let number =
            value.as_integer().ok_or_else(|| not("a whole number", value, &low.max(1).to_string()))?;
        let parsed = u64::from_str_radix(number.as_str(), number.radix()).ok();
        parsed
            .filter(|n| (low..=high).contains(n))
            .ok_or_else(|| (format!("must be from {low} to {high}"), None))
    }
}

/// The same in 32 bits.
pub fn count(low: u32, high: u32) -> impl Fn(&DeValue<'_>) -> Result<u32, Wrong> {
    let read = whole(low.into(), high.into());
    move |value| read(value).map(|n| u32::try_from(n).unwrap_or(high))
}

/// A number from `low` to `high`, whole or not.
pub fn share(low: f64, high: f64) -> impl Fn(&DeValue<'_>) -> Result<f64, Wrong> {
    move |value| {
        let text = match value {
            DeValue::Integer(number) if number.radix() == 10 => number.as_str(),
            DeValue::Float(number) => number.as_str(),
            other => return Err(not("a number", other, "0.2")),
        };
        let number = text.parse::<f64>().ok().filter(|n| (low..=high).contains(n));
        number.ok_or_else(|| (format!("must be from {low} to {high}"), None))
    }
}

/// One of some words, and what it stands for.
pub fn choice<T: Copy>(words: &'static [(&'static str, T)]) -> impl Fn(&DeValue<'_>) -> Result<T, Wrong> {
    move |value| {
        let all = || words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
        let Some(text) = value.as_str() else {
            return Err((
                format!("expected a string, found {}", kind(value)),
                Some(format!("write one of {}", all())),
            ));
        };
        let found = words.iter().find(|(word, _)| *word == text);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let near = words.iter().map(|(word, _)| (strsim::jaro_winkler(word, text), *word));
            let near = near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness > 0.75);
            let help = match near {
                Some((_, word)) => format!("did you mean \"{word}\"?"),
                None => format!("write one of {}", all()),
            };
            (format!("there is no \"{}\" here", printable(text)), Some(help))
        })
    }
}

/// A time: `"500ms"`, `"30s"`, `"5m"`, `"1h"`.
pub fn duration(low: Duration, high: Duration) -> impl Fn(&DeValue<'_>) -> Result<Duration, Wrong> {
    move |value| {
        let text = match value {
            DeValue::String(text) => text.as_ref(),
            DeValue::Integer(number) => {
                let bare = printable(number.as_str());
                let help = format!("write it with its unit, like \"{bare}s\" or \"{bare}ms\"");
                return Err(("this number has no unit".into(), Some(help)));
            }
            other => return Err(not("a time", other, "\"30s\"")),
        };
        let read = parse_duration(text).ok_or_else(|| {
            let help = "write it with its unit, like \"500ms\", \"30s\", \"5m\" or \"1h\"";
            ("this is no time".to_owned(), Some(help.to_owned()))
        })?;
        if (low..=high).contains(&read) {
            Ok(read)
        } else {
            Err((format!("must be from {} to {}", show(low), show(high)), None))
        }
    }
}

/// A time with its unit: `500ms`, `30s`, `5m`, `1h`; `None` where it is none.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(digits);
    let ms_each = match unit {
        "ms" => 1.0,
        "s" => 1e3,
        "m" | "min" => 60e3,
        "h" => 3600e3,
        "d" => 86_400e3,
        _ => return None,
    };
    let ms = number.trim().parse::<f64>().ok()? * ms_each;
    // Ten years; whatever may be written is far less, and the conversion can't overflow.
    (0.0..3.2e11).contains(&ms).then(|| Duration::from_micros((ms * 1e3).round() as u64))
}

/// A time for people: `1500ms`, `5m`.
pub fn show(time: Duration) -> String {
    let ms = time.as_millis();
    match ms {
        0 => "0s".to_owned(),
        _ if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        _ if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ if ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
        _ => format!("{ms}ms"),
    }
}

/// Bytes: a whole number, or `"512M"`, `"2GiB"` (powers of 1024).
pub fn bytes(low: u64, high: u64) -> impl Fn(&DeValue<'_>) -> Result<u64, Wrong> {
    move |value| {
        let read = match value {
            DeValue::Integer(_) => return whole(low, high)(value),
            DeValue::String(text) => parse_bytes(text),
            other => return Err(not("a number of bytes", other, "\"512M\"")),
        };
        let read = read.ok_or_else(|| {
            ("this is no number of bytes".to_owned(), Some("like \"64K\", \"512M\" or \"2G\"".to_owned()))
        })?;
        if (low..=high).contains(&read) {
            Ok(read)
        } else {
            Err((format!("must be from {low} to {high} bytes"), None))
        }
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches('b');
    let (number, factor) = match digits.char_indices().last()? {
        (i, 'k') => (&digits[..i], 1u64 << 10),
        (i, 'm') => (&digits[..i], 1 << 20),
        (i, 'g') => (&digits[..i], 1 << 30),
        _ => (digits, 1),
    };
    let value = number.trim().parse::<f64>().ok()? * factor as f64;
    (0.0..(1u64 << 50) as f64).contains(&value).then_some(value as u64)
}

/// An address and port.
pub fn address(value: &DeValue<'_>) -> Result<SocketAddr, Wrong> {
    let text = text(value)?;
    let plain = text.strip_prefix("localhost:").map_or(text.clone(), |port| format!("127.0.0.1:{port}"));
    plain.parse().map_err(|_| {
        let help = "write an IP address and a port: \"127.0.0.1:8080\" for this machine, \"0.0.0.0:8080\" for every network it is on";
        ("this is no address with a port".into(), Some(help.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_bytes_are_read_with_their_units() {
        let cases = [
            ("500ms", 500),
            ("30s", 30_000),
            ("1.5s", 1500),
            ("5m", 300_000),
            ("1 h", 3_600_000),
            ("2d", 172_800_000),
        ];
        for (text, ms) in cases {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "30", "s", "-1s", "1y", "nans", "infs", "1e300h", "1s2", "１s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        assert_eq!(parse_bytes("512M"), Some(512 << 20));
        assert_eq!(parse_bytes("1.5GiB"), Some(3 << 29));
        for bad in ["", "M", "-1", "nan", "1e30", "ten"] {
            assert_eq!(parse_bytes(bad), None, "{bad}");
        }
        for ms in [0, 1, 999, 1000, 60_000, 3_600_000, 90_000] {
            let time = Duration::from_millis(ms);
            assert_eq!(parse_duration(&show(time)), Some(time));
        }
    }
}
