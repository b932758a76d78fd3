//! Reads one table of the file key by key, remembers what was wrong, and at the end names the keys that nobody asked
//! for. Reading goes on after a mistake, so that one run shows them all.
//!
//! serde would stop at the first and could not say which of two values that contradict each other stands where.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::report::Problem;
use crate::values::{Wrong, kind, printable};

/// A table being read.
pub struct Section<'a> {
    /// As in its header: `models.chat`; empty for the file itself.
    path: String,
    table: &'a DeTable<'a>,
    asked: Vec<&'static str>,
}

/// A value and where it stands; the place is missing for defaults.
#[derive(Clone, Debug)]
pub struct Placed<T> {
    /// What it is.
    pub value: T,
    /// Where, in bytes of the file.
    pub span: Option<Range<usize>>,
}

impl<'a> Section<'a> {
    /// The table under that path.
    pub fn new(path: impl Into<String>, table: &'a DeTable<'a>) -> Section<'a> {
        Section { path: path.into(), table, asked: Vec::new() }
    }

    /// For messages: `[models.chat]`.
    pub fn name(&self) -> String {
        if self.path.is_empty() { "the file".to_owned() } else { format!("[{}]", self.path) }
    }

    fn find(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.asked.push(key);
        self.table.iter().find(|(k, _)| k.get_ref() == key).map(|(_, value)| value)
    }

    /// The table under `key`, for a section of its own.
    pub fn table(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<Section<'a>> {
        let value = self.find(key)?;
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        if let DeValue::Table(table) = value.get_ref() {
            return Some(Section::new(path, table));
        }
        problems.push(Problem {
            span: value.span(),
            message: format!("`{key}` must be a table"),
            label: format!("this is {}", kind(value.get_ref())),
            help: Some(format!("write it as [{path}]")),
        });
        None
    }

    /// Every entry of this section, where names are the user's own: name, its place, and what it is.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, Range<usize>, &'a Spanned<DeValue<'a>>)> {
        let table = self.table;
        table.iter().map(|(key, value)| (key.get_ref().as_ref(), key.span(), value))
    }

    /// A value read by `read`, or `default`.
    pub fn get<T>(
        &mut self,
        key: &'static str,
        default: T,
        problems: &mut Vec<Problem>,
        read: impl FnOnce(&'a DeValue<'a>) -> Result<T, Wrong>,
    ) -> Placed<T> {
        let Some(value) = self.find(key) else { return Placed { value: default, span: None } };
        match read(value.get_ref()) {
            Ok(read) => Placed { value: read, span: Some(value.span()) },
            Err((label, help)) => {
                let message = format!("`{key}` in {} is wrong", self.name());
                problems.push(Problem { span: value.span(), message, label, help });
                Placed { value: default, span: None }
            }
        }
    }

    /// Whether the table holds `key`, right or wrong.
    pub fn has(&self, key: &str) -> bool {
        self.table.iter().any(|(k, _)| k.get_ref() == key)
    }

    /// Where the value of `key` stands; the beginning of the file where it doesn't.
    pub fn place(&self, key: &str) -> Range<usize> {
        self.table
            .iter()
            .find(|(k, _)| k.get_ref() == key)
            .map_or(0..0, |(k, value)| k.span().start..value.span().end)
    }

    /// Where the table's first key stands, for what is missing in it.
    pub fn header(&self) -> Range<usize> {
        self.table.iter().map(|(key, _)| key.span()).min_by_key(|span| span.start).unwrap_or(0..0)
    }

    /// These keys exist, whether they are asked for or not.
    pub fn know(&mut self, keys: &[&'static str]) {
        self.asked.extend(keys);
    }

    /// Names the keys that nothing asked for.
    pub fn finish(self, problems: &mut Vec<Problem>) {
        for (key, _) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if self.asked.contains(&name) {
                continue;
            }
            let near = self.asked.iter().map(|known| (strsim::jaro_winkler(known, name), *known));
            let near = near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness > 0.75);
            let mut known = self.asked.clone();
            known.sort_unstable();
            problems.push(Problem {
                span: key.span(),
                message: format!("unknown key `{}`", printable(name)),
                label: format!("{} has no such key", self.name()),
                help: Some(match near {
                    Some((_, known)) => format!("did you mean `{known}`?"),
                    None => format!("the keys here are {}", known.join(", ")),
                }),
            });
        }
    }
}
