//! Files that hold training data, and the documents in them.
//!
//! A `.jsonl` file has an object a line, with `text` or with `messages` (OpenAI's chat format, and `tools` where there
//! are some). Any other file is text: one document, or one a paragraph, or one a line. Nothing is believed: a line has
//! a bound, bytes that aren't UTF-8 are a bad line, and a bad line is named.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{BadLine, DataError, TextDocuments};

/// Longest line, in bytes.
const MAX_LINE: usize = 32 << 20;
/// A long text goes on in parts of at least this many bytes, cut between lines.
const PART: usize = 256 << 10;
/// Folders within folders.
const MAX_DEPTH: usize = 32;
/// Endings of files that are looked for in folders.
const ENDINGS: [&str; 4] = ["txt", "text", "md", "jsonl"];

/// One document or a part of one.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    /// Text; `last` where its document ends with it.
    Text { text: String, last: bool },
    /// A conversation, as OpenAI messages.
    Chat { messages: Vec<Value>, tools: Vec<Value> },
}

/// What a reader comes upon.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) line: u64,
    /// A document, or what is wrong with the line.
    pub(super) document: Result<Document, String>,
    /// Bytes of the file up to here.
    pub(super) bytes: u64,
}

/// The files that `paths` name: files as they are, folders with what they hold, in the order of names.
///
/// # Errors
/// Where a path can't be read, or none of it holds data.
pub(super) fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for path in paths {
        let kind = fs::metadata(path).map_err(DataError::io(path))?;
        if kind.is_dir() {
            let before = files.len();
            walk(path, 0, &mut files)?;
            if files.len() == before {
                let endings = ENDINGS.join(", .");
                let message = format!(
                    "{}: no file in this folder ends in .{endings}; name a file itself, whatever it ends in, or another folder",
                    path.display()
                );
                return Err(DataError::Empty { message });
            }
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        let message = "no data is named: give a file or a folder".to_owned();
        return Err(DataError::Empty { message });
    }
    Ok(files)
}

fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    if depth > MAX_DEPTH {
        let error = io::Error::other(format!("more than {MAX_DEPTH} folders within each other"));
        return Err(DataError::Io { path: folder.to_owned(), error });
    }
    let entries = fs::read_dir(folder).map_err(DataError::io(folder))?;
    let mut paths = entries.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>();
    let paths = paths.as_mut().map_err(|e| io::Error::new(e.kind(), e.to_string()));
    let paths = paths.map_err(DataError::io(folder))?;
    paths.sort();
    for path in paths {
        let kind = fs::metadata(&*path).map_err(DataError::io(path))?;
        if kind.is_dir() {
            walk(path, depth + 1, files)?;
        } else if kind.is_file() && ending(path).is_some_and(|end| ENDINGS.contains(&end.as_str())) {
            files.push(path.clone());
        }
    }
    Ok(())
}

fn ending(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_ascii_lowercase())
}

/// Reads a file's documents one after the other; `take` ends it by returning an error.
///
/// # Errors
/// What the system says, and what `take` returns.
pub(super) fn read(
    path: &Path,
    documents: TextDocuments,
    take: &mut dyn FnMut(Found) -> Result<(), DataError>,
) -> Result<(), DataError> {
    // Before opening: a named pipe would wait for a writer.
    if !fs::metadata(path).map_err(DataError::io(path))?.is_file() {
        let error =
            io::Error::new(io::ErrorKind::InvalidInput, "not a regular file; name one that holds text");
        return Err(DataError::Io { path: path.to_owned(), error });
    }
    let mut lines = Lines {
        path,
        reader: BufReader::new(File::open(path).map_err(DataError::io(path))?),
        line: 0,
        bytes: 0,
    };
    if ending(path).as_deref() == Some("jsonl") {
        while let Some(line) = lines.next()? {
            let document = match line {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => object(text.trim_end()),
                Err(reason) => Err(reason),
            };
            take(lines.found(document))?;
        }
        return Ok(());
    }
    let mut text = String::new();
    while let Some(line) = lines.next()? {
        let line = match line {
            Ok(line) => line,
            Err(reason) => {
                take(lines.found(Err(reason)))?;
                continue;
            }
        };
        let blank = line.trim().is_empty();
        let (ends, part) = match documents {
            TextDocuments::File => (false, text.len() + line.len() >= PART),
            TextDocuments::Paragraph => (blank, false),
            TextDocuments::Line => (true, false),
        };
        if documents == TextDocuments::File || !blank {
            text.push_str(&line);
        }
        if text.len() > MAX_LINE {
            let reason = format!("a paragraph of more than {MAX_LINE} bytes");
            text.clear();
            take(lines.found(Err(reason)))?;
        } else if part {
            take(lines.found(Ok(Document::Text { text: std::mem::take(&mut text), last: false })))?;
        } else if ends {
            flush(&lines, &mut text, take)?;
        }
    }
    if documents == TextDocuments::File {
        take(lines.found(Ok(Document::Text { text, last: true })))
    } else {
        flush(&lines, &mut text, take)
    }
}

/// Hands out a document that is complete, without the line end behind it.
fn flush(
    lines: &Lines<'_>,
    text: &mut String,
    take: &mut dyn FnMut(Found) -> Result<(), DataError>,
) -> Result<(), DataError> {
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    if text.trim().is_empty() {
        text.clear();
        return Ok(());
    }
    take(lines.found(Ok(Document::Text { text: std::mem::take(text), last: true })))
}

struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    line: u64,
    bytes: u64,
}

impl Lines<'_> {
    /// The next line with its end, or what is wrong with it.
    fn next(&mut self) -> Result<Option<Result<String, String>>, DataError> {
        let mut bytes = Vec::new();
        let limit = MAX_LINE as u64 + 1;
        let read =
            (&mut self.reader).take(limit).read_until(b'\n', &mut bytes).map_err(DataError::io(self.path))?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        self.bytes += read as u64;
        if read as u64 == limit && bytes.last() != Some(&b'\n') {
            self.bytes += self.skip_line().map_err(DataError::io(self.path))?;
            return Ok(Some(Err(format!("longer than {MAX_LINE} bytes"))));
        }
        Ok(Some(String::from_utf8(bytes).map_err(|e| {
            format!("not UTF-8 text: byte {} of the line is wrong", e.utf8_error().valid_up_to() + 1)
        })))
    }

    fn skip_line(&mut self) -> io::Result<u64> {
        let mut skipped = 0;
        loop {
            let buffer = self.reader.fill_buf()?;
            let end = buffer.iter().position(|&b| b == b'\n');
            let used = end.map_or(buffer.len(), |end| end + 1);
            let over = end.is_some() || used == 0;
            self.reader.consume(used);
            skipped += used as u64;
            if over {
                return Ok(skipped);
            }
        }
    }

    fn found(&self, document: Result<Document, String>) -> Found {
        Found { line: self.line.max(1), document, bytes: self.bytes }
    }
}

/// What a line of JSON says.
fn object(line: &str) -> Result<Document, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(mut object) = value else {
        return Err("not a JSON object with `text` or `messages`".to_owned());
    };
    let list = |name: &str, value: Value| match value {
        Value::Array(list) => Ok(list),
        _ => Err(format!("`{name}` is no list")),
    };
    match (object.remove("text"), object.remove("messages")) {
        (Some(Value::String(text)), None) if text.is_empty() => Err("`text` is empty".to_owned()),
        (Some(Value::String(text)), None) => Ok(Document::Text { text, last: true }),
        (Some(_), None) => Err("`text` is no string".to_owned()),
        (None, Some(messages)) => {
            let messages = list("messages", messages)?;
            if let Some(i) = messages.iter().position(|m| m.get("role").and_then(Value::as_str).is_none()) {
                return Err(format!("message {} has no `role`", i + 1));
            }
            let tools = object.remove("tools").filter(|tools| !tools.is_null());
            let tools = tools.map_or_else(|| Ok(Vec::new()), |tools| list("tools", tools))?;
            Ok(Document::Chat { messages, tools })
        }
        (Some(_), Some(_)) => Err("both `text` and `messages`; one of them is the document".to_owned()),
        (None, None) => Err("neither `text` nor `messages`".to_owned()),
    }
}

/// A bad line of `path`.
pub(super) fn bad(path: &Path, line: u64, reason: String) -> BadLine {
    BadLine { path: path.to_owned(), line, reason }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all(name: &str, content: &[u8], documents: TextDocuments) -> Vec<(u64, Result<Document, String>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let mut found = Vec::new();
        read(&path, documents, &mut |f| {
            found.push((f.line, f.document));
            Ok(())
        })
        .unwrap();
        found
    }

    fn text(text: &str, last: bool) -> Result<Document, String> {
        Ok(Document::Text { text: text.to_owned(), last })
    }

    #[test]
    fn text_is_a_file_a_paragraph_or_a_line() {
        let content = b"one\ntwo\n\n\r\nthree\n";
        assert_eq!(all("a.txt", content, TextDocuments::File), [(5, text("one\ntwo\n\n\r\nthree\n", true))]);
        let paragraphs = [(3, text("one\ntwo", true)), (5, text("three", true))];
        assert_eq!(all("a.txt", content, TextDocuments::Paragraph), paragraphs);
        let lines = [(1, text("one", true)), (2, text("two", true)), (5, text("three", true))];
        assert_eq!(all("a.txt", content, TextDocuments::Line), lines);
    }

    #[test]
    fn long_texts_come_in_parts_that_make_the_whole() {
        let content: String = (0..40_000).map(|i| format!("line {i} of it\n")).collect();
        let parts = all("a.md", content.as_bytes(), TextDocuments::File);
        assert!(parts.len() > 2);
        let mut whole = String::new();
        for (i, (_, part)) in parts.iter().enumerate() {
            let Ok(Document::Text { text, last }) = part else { panic!("{part:?}") };
            assert_eq!(*last, i + 1 == parts.len());
            whole += text;
        }
        assert_eq!(whole, content);
    }

    #[test]
    fn json_lines_say_what_is_wrong_with_them() {
        let content = [
            r#"{"text": "a"}"#,
            "",
            "{",
            "[1]",
            r#"{"text": 3}"#,
            r#"{"messages": [{"role": "user", "content": "q"}], "tools": null}"#,
            r#"{"messages": [{"content": "q"}]}"#,
            r#"{"text": "a", "messages": []}"#,
            r#"{"other": 1}"#,
            r#"{"text": ""}"#,
        ]
        .join("\n");
        let found = all("a.jsonl", content.as_bytes(), TextDocuments::File);
        let reasons: Vec<(u64, &str)> =
            found.iter().filter_map(|(line, d)| Some((*line, d.as_ref().err()?.as_str()))).collect();
        let expected = [
            (3, "not JSON: EOF while parsing an object at line 1 column 1"),
            (4, "not a JSON object with `text` or `messages`"),
            (5, "`text` is no string"),
            (7, "message 1 has no `role`"),
            (8, "both `text` and `messages`; one of them is the document"),
            (9, "neither `text` nor `messages`"),
            (10, "`text` is empty"),
        ];
        assert_eq!(reasons, expected);
        let messages = vec![json!({"role": "user", "content": "q"})];
        assert!(found.contains(&(6, Ok(Document::Chat { messages, tools: Vec::new() }))));
    }

    #[test]
    fn bytes_that_are_no_text_and_endless_lines_are_named_and_passed() {
        let mut content = b"good\nb\xffd\n".to_vec();
        content.extend(vec![b'x'; MAX_LINE + 100]);
        content.extend(b"\nlast\n");
        let found = all("a.txt", &content, TextDocuments::Line);
        let expected = [
            (1, text("good", true)),
            (2, Err("not UTF-8 text: byte 2 of the line is wrong".to_owned())),
            (3, Err(format!("longer than {MAX_LINE} bytes"))),
            (4, text("last", true)),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn folders_give_their_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.txt", "a/z.jsonl", "a/c.md", "c.png", "B.TXT"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let names: Vec<_> = files(&[folder.path().to_owned()])
            .unwrap()
            .iter()
            .map(|p| p.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["B.TXT", "a/c.md", "a/z.jsonl", "b.txt"]);
        let missing = files(&[folder.path().join("none")]).unwrap_err().to_string();
        assert!(missing.contains("none: No such file"), "{missing}");
        let empty = tempfile::tempdir().unwrap();
        assert!(
            files(&[empty.path().to_owned()])
                .unwrap_err()
                .to_string()
                .contains("no file in this folder ends in")
        );
    }
}
