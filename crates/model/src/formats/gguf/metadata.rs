//! GGUF's typed key-value pairs. Values stay in the file; what is kept of each is where it is.

use std::collections::HashMap;
use std::ops::Range;

use super::Fault;
use super::cursor::Cursor;

/// Pairs in one file; real files have under a hundred.
const MAX_PAIRS: u64 = 1 << 16;
/// Bytes of a key, as the format's specification says.
const MAX_KEY_BYTES: usize = 65_535;
/// Arrays inside arrays. Nothing known nests at all.
const MAX_NESTING: usize = 4;

/// The type of a value or of an array's elements, with the number that stands for it in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32, what: &str) -> Result<Kind, Fault> {
        Ok(match id {
            0 => Kind::U8,
            1 => Kind::I8,
            2 => Kind::U16,
            3 => Kind::I16,
            4 => Kind::U32,
            5 => Kind::I32,
            6 => Kind::F32,
            7 => Kind::Bool,
            8 => Kind::String,
            9 => Kind::Array,
            10 => Kind::U64,
            11 => Kind::I64,
            12 => Kind::F64,
            _ => return Err(Fault::Malformed(format!("{what} has the unknown value type {id}"))),
        })
    }

    /// Bytes of one element, for those that all have the same.
    fn fixed_bytes(self) -> Option<u64> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String | Kind::Array => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Bool => "a boolean",
            Kind::F32 | Kind::F64 => "a float",
            Kind::String => "a string",
            Kind::Array => "an array",
            _ => "an integer",
        }
    }
}

/// Where a value is and what it is.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) kind: Kind,
    /// For an array: its elements' kind.
    pub(super) element: Option<Kind>,
    /// Elements of an array, else 1.
    pub(super) count: usize,
    /// The payload: a scalar, a string with its length, or an array's elements.
    pub(super) bytes: Range<usize>,
}

/// All pairs by key.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    pairs: HashMap<String, Value>,
}

impl Metadata {
    /// Reads `count` pairs from `cursor`, checking every one.
    pub(super) fn read(cursor: &mut Cursor<'_>, count: u64) -> Result<Metadata, Fault> {
        if count > MAX_PAIRS {
            return Err(Fault::Malformed(format!(
                "it claims {count} metadata pairs; {MAX_PAIRS} at most are read"
            )));
        }
        let mut pairs = HashMap::new();
        for index in 0..count {
            let key = cursor.string(&format!("the key of metadata pair {index}"))?;
            if key.is_empty() || key.len() > MAX_KEY_BYTES {
                return Err(Fault::Malformed(format!(
                    "the key of metadata pair {index} has {} bytes",
                    key.len()
                )));
            }
            let value = read_value(cursor, key)?;
            if pairs.insert(key.to_string(), value).is_some() {
                return Err(Fault::Malformed(format!("the metadata key {} comes twice", clip(key))));
            }
        }
        Ok(Metadata { pairs })
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.pairs.get(key)
    }

    /// Keys and values in the order of the keys.
    pub(super) fn sorted(&self) -> Vec<(&str, &Value)> {
        let mut pairs: Vec<_> = self.pairs.iter().map(|(k, v)| (k.as_str(), v)).collect();
        pairs.sort_unstable_by_key(|(key, _)| *key);
        pairs
    }
}

fn read_value(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, Fault> {
    let what = clip(key);
    let kind = Kind::from_id(cursor.u32(what)?, what)?;
    if kind != Kind::Array {
        let start = cursor.position();
        skip(cursor, kind, what)?;
        return Ok(Value { kind, element: None, count: 1, bytes: start..cursor.position() });
    }
    let (element, count) = read_array_header(cursor, what)?;
    let start = cursor.position();
    skip_elements(cursor, element, count, what, 1)?;
    // Every element takes a byte or more, so a count that got here is below the file's length.
    let count =
        usize::try_from(count).map_err(|_| Fault::Malformed(format!("{what} has {count} elements")))?;
    Ok(Value { kind, element: Some(element), count, bytes: start..cursor.position() })
}

fn read_array_header(cursor: &mut Cursor<'_>, what: &str) -> Result<(Kind, u64), Fault> {
    let element = Kind::from_id(cursor.u32(what)?, what)?;
    Ok((element, cursor.u64(what)?))
}

fn skip_elements(
    cursor: &mut Cursor<'_>,
    element: Kind,
    count: u64,
    what: &str,
    depth: usize,
) -> Result<(), Fault> {
    if let Some(bytes) = element.fixed_bytes() {
        let total = count
            .checked_mul(bytes)
            .ok_or_else(|| Fault::Malformed(format!("{what} claims {count} elements")))?;
        let taken = cursor.take(total, what)?;
        if element == Kind::Bool && taken.iter().any(|&b| b > 1) {
            return Err(Fault::Malformed(format!("{what} holds a boolean that is neither 0 nor 1")));
        }
        return Ok(());
    }
    if depth > MAX_NESTING {
        return Err(Fault::Malformed(format!("{what} nests arrays more than {MAX_NESTING} deep")));
    }
    // Strings and arrays take eight bytes or more each; a larger claim ends here and not after a long loop.
    if count > (cursor.left() / 8) as u64 {
        return Err(Fault::Malformed(format!(
            "{what} claims {count} elements, {} bytes are left",
            cursor.left()
        )));
    }
    for _ in 0..count {
        if element == Kind::Array {
            let (inner, inner_count) = read_array_header(cursor, what)?;
            skip_elements(cursor, inner, inner_count, what, depth + 1)?;
        } else {
            skip(cursor, element, what)?;
        }
    }
    Ok(())
}

/// Steps over one scalar or string, checking it.
fn skip(cursor: &mut Cursor<'_>, kind: Kind, what: &str) -> Result<(), Fault> {
    match kind.fixed_bytes() {
        Some(_) => skip_elements(cursor, kind, 1, what, 0),
        None => cursor.string(what).map(drop),
    }
}

/// A name from the file, short enough for an error message.
pub(super) fn clip(name: &str) -> &str {
    let mut end = name.len().min(80);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}
