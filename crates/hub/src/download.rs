//! One file over HTTP: resumed after a cut, hashed as it passes, whole or absent under its name.
//!
//! Bytes go to `NAME.part`; `NAME.part.json` remembers which content they belong to (the checksum we want, or the
//! server's ETag). A later try asks for the rest with `Range` and, where there is an ETag, `If-Range`, so that a file
//! that changed in between starts over. Cost of a resume: the part is hashed again (about 1 GB/s with SHA instructions).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::http::{Http, HttpFailure, RANGE_REFUSED, header, host, read_reason};
use crate::{Error, Event};

/// What to fetch.
pub(crate) struct Job<'a> {
    pub(crate) url: &'a str,
    /// A header with its value, where the source wants one.
    pub(crate) authorization: Option<String>,
    /// The final path; the `.part` lies beside it.
    pub(crate) dest: &'a Path,
    /// The name shown.
    pub(crate) name: &'a str,
    /// The size it must have, where known.
    pub(crate) bytes: Option<u64>,
    /// No more than this is ever written, whatever the server says.
    pub(crate) limit: u64,
    /// The SHA-256 it must have, where known.
    pub(crate) sha256: Option<&'a str>,
    /// Tries without a single new byte before the source is given up.
    pub(crate) tries: u32,
}

/// A finished file.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// Why a file didn't come.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The source's fault: another may serve.
    Source(String),
    /// This machine's fault: no source can help.
    Local(Error),
}

impl From<HttpFailure> for Failure {
    fn from(failure: HttpFailure) -> Failure {
        Failure::Source(failure.reason)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Local(error)
    }
}

/// Which content a `.part` file's bytes belong to.
#[derive(Serialize, Deserialize, PartialEq, Eq, Default, Clone, Debug)]
struct Validator {
    sha256: Option<String>,
    url: Option<String>,
    etag: Option<String>,
}

enum Attempt {
    Done(Finished),
    /// May be tried again; `have` bytes are here.
    Again {
        failure: HttpFailure,
        have: u64,
    },
}

/// Fetches a file to `job.dest`.
///
/// A server that doesn't do ranges starts over each time; a resumed file with a wrong checksum is fetched once more
/// from its first byte before the source is given up.
pub(crate) fn download(
    http: &Http,
    job: &Job<'_>,
    report: &mut dyn FnMut(Event<'_>),
) -> Result<Finished, Failure> {
    let mut fruitless = 0;
    // Only bytes past every earlier try count as progress: a server without ranges that always cuts at the same place
    // would else be asked for ever.
    let mut furthest = 0;
    let mut pause = Duration::from_millis(250);
    loop {
        match attempt(http, job, report)? {
            Attempt::Done(finished) => return Ok(finished),
            Attempt::Again { failure, have } => {
                if have > furthest {
                    (furthest, fruitless, pause) = (have, 0, Duration::from_millis(250));
                } else {
                    fruitless += 1;
                }
                if !failure.retry || fruitless >= job.tries {
                    return Err(Failure::Source(failure.reason));
                }
                report(Event::Retry { reason: &failure.reason });
                std::thread::sleep(failure.retry_after.unwrap_or(pause));
                pause = (pause * 2).min(Duration::from_secs(4));
            }
        }
    }
}

fn attempt(http: &Http, job: &Job<'_>, report: &mut dyn FnMut(Event<'_>)) -> Result<Attempt, Failure> {
    let part = with_suffix(job.dest, ".part");
    let note = with_suffix(job.dest, ".part.json");
    let kept = read_validator(&note);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&part)
        .map_err(Error::disk("create", &part))?;
    let mut have = file.metadata().map_err(Error::disk("read", &part))?.len();
    let resumable = match (&kept.sha256, job.sha256) {
        (Some(was), Some(wanted)) => was == wanted,
        _ => kept.etag.is_some() && kept.url.as_deref() == Some(job.url),
    };
    if have > 0 && (!resumable || job.bytes.is_some_and(|b| have > b) || have > job.limit) {
        have = 0;
    }
    let resumed_from = have;
    let mut hash = Sha256::new();
    if have == 0 {
        file.set_len(0).map_err(Error::disk("write", &part))?;
    } else {
        std::io::copy(&mut (&mut file).take(have), &mut hash).map_err(Error::disk("read", &part))?;
    }
    report(Event::File { name: job.name, resumed: have, total: job.bytes });

    let whole = job.bytes == Some(have) && job.sha256.is_some();
    if !whole {
        let range = format!("bytes={have}-");
        let mut headers: Vec<(&str, &str)> = Vec::new();
        if let Some(value) = &job.authorization {
            headers.push(("authorization", value));
        }
        if have > 0 {
            headers.push(("range", &range));
            // With a checksum to come the ETag is not needed, and two mirrors of one file may differ in it.
            if let (Some(etag), None) = (&kept.etag, job.sha256) {
                headers.push(("if-range", etag));
            }
        }
        let response = match http.get(job.url, &headers) {
            Ok(response) => response,
            Err(failure) => {
                if failure.reason == RANGE_REFUSED {
                    discard(&part, &note);
                }
                return Ok(Attempt::Again { failure, have: 0 });
            }
        };
        let length: Option<u64> = header(&response, "content-length").and_then(|v| v.parse().ok());
        let total = if response.status().as_u16() == 206 {
            match content_range(&header(&response, "content-range").unwrap_or_default()) {
                Some((start, total)) if start == have && have > 0 => {
                    total.or_else(|| length.and_then(|l| have.checked_add(l)))
                }
                _ => {
                    discard(&part, &note);
                    let failure =
                        HttpFailure::passing(format!("{} sent another range than asked", host(job.url)));
                    return Ok(Attempt::Again { failure, have: 0 });
                }
            }
        } else {
            if have > 0 {
                // The whole file comes again: the server does no ranges, or the file changed.
                have = 0;
                hash = Sha256::new();
                file = File::create(&part).map_err(Error::disk("create", &part))?;
                report(Event::File { name: job.name, resumed: 0, total: job.bytes });
            }
            length
        };
        if let (Some(expected), Some(got)) = (job.bytes, total)
            && expected != got
        {
            return Err(Failure::Source(format!(
                "{} has {got} bytes under this name, {expected} were expected: it is another file",
                host(job.url)
            )));
        }
        let total = job.bytes.or(total);
        if total.is_some_and(|t| t > job.limit) {
            return Err(Failure::Source(format!(
                "{} announces {} bytes, at most {} were expected",
                host(job.url),
                total.unwrap_or(0),
                job.limit
            )));
        }
        let validator = Validator {
            sha256: job.sha256.map(str::to_string),
            url: Some(job.url.to_string()),
            etag: header(&response, "etag").filter(|e| !e.starts_with("W/")),
        };
        if validator != kept || resumed_from == 0 {
            let text = serde_json::to_vec(&validator).unwrap_or_default();
            fs::write(&note, text).map_err(Error::disk("write", &note))?;
        }
        let outcome = copy(
            response.into_body().into_reader(),
            &mut file,
            &part,
            &mut hash,
            job,
            &mut have,
            total,
            report,
        )?;
        file.sync_all().map_err(Error::disk("write", &part))?;
        if let Some(reason) = outcome {
            return Ok(Attempt::Again { failure: HttpFailure::passing(reason), have });
        }
        if total.is_some_and(|t| have < t) {
            let reason = format!("{}: the connection was cut", host(job.url));
            return Ok(Attempt::Again { failure: HttpFailure::passing(reason), have });
        }
    }
    let sha256 = hex(&hash.finalize());
    if job.sha256.is_some_and(|wanted| wanted != sha256) {
        discard(&part, &note);
        let reason = format!(
            "{} served other bytes: SHA-256 is {sha256}, expected {}",
            host(job.url),
            job.sha256.unwrap_or_default()
        );
        // Bytes kept from an earlier try may be the wrong ones: once more from the first byte.
        return if resumed_from > 0 {
            Ok(Attempt::Again { failure: HttpFailure::passing(reason), have: 0 })
        } else {
            Err(Failure::Source(reason))
        };
    }
    finish(&part, job.dest)?;
    let _ = fs::remove_file(&note);
    Ok(Attempt::Done(Finished { bytes: have, sha256 }))
}

/// Copies a body to the file; returns why it stopped early, if it did.
#[allow(clippy::too_many_arguments)] // One loop with the state of one attempt.
fn copy(
    mut body: impl Read,
    file: &mut File,
    part: &Path,
    hash: &mut Sha256,
    job: &Job<'_>,
    have: &mut u64,
    total: Option<u64>,
    report: &mut dyn FnMut(Event<'_>),
) -> Result<Option<String>, Failure> {
    let cap = total.unwrap_or(job.limit);
    let mut buffer = vec![0u8; 128 << 10];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Ok(Some(format!("{}: {}", host(job.url), read_reason(&e)))),
        };
        if *have + n as u64 > cap {
            return Err(Failure::Source(format!(
                "{} sends more than the {cap} bytes expected",
                host(job.url)
            )));
        }
        file.write_all(&buffer[..n]).map_err(Error::disk("write", part))?;
        hash.update(&buffer[..n]);
        *have += n as u64;
        report(Event::Bytes { done: *have, total });
    }
}

/// Flushes a finished part to the disk and gives it its name.
pub(crate) fn finish(part: &Path, dest: &Path) -> Result<(), Error> {
    File::open(part).and_then(|f| f.sync_all()).map_err(Error::disk("write", part))?;
    fs::rename(part, dest).map_err(Error::disk("write", dest))?;
    sync_folder(dest);
    Ok(())
}

/// Makes a rename in this folder last through a power cut, where the system can.
fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().and_then(|p| File::open(p).ok()) {
        // Some file systems refuse to sync a folder; the file itself is safe already.
        let _ = folder.sync_all();
    }
}

/// SHA-256 and size of a file on disk.
pub(crate) fn hash_file(path: &Path) -> Result<Finished, Error> {
    let mut file = File::open(path).map_err(Error::disk("read", path))?;
    let mut hash = Sha256::new();
    let bytes = std::io::copy(&mut file, &mut hash).map_err(Error::disk("read", path))?;
    Ok(Finished { bytes, sha256: hex(&hash.finalize()) })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

/// Start and total of a `Content-Range: bytes start-end/total`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

fn read_validator(note: &Path) -> Validator {
    fs::read(note).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn discard(part: &Path, note: &Path) {
    let _ = fs::remove_file(part);
    let _ = fs::remove_file(note);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(content_range("bytes */10"), None);
        assert_eq!(content_range("5-9/10"), None);
    }
}
