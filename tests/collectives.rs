//! `consort bench collectives` as a person runs it: real processes over each transport.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};

fn bench(words: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_consort"));
    command
        .args(["bench", "collectives", "--seconds", "0.02"])
        .args(words.split_whitespace())
        .output()
        .unwrap()
}

#[test]
fn every_operation_is_measured_over_every_transport() {
    for transport in ["shm", "tcp", "tls"] {
        for operation in ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"] {
            let words =
                format!("--ranks 3 --transport {transport} --operation {operation} --bytes 4k,100000 --json");
            let out = bench(&words);
            assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
            let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!((&report["operation"], &report["ranks"]), (&operation.into(), &3.into()));
            let lengths = report["lengths"].as_array().unwrap();
            assert_eq!(lengths.len(), 2);
            assert!(lengths.iter().all(|m| m["micros"].as_f64().unwrap() > 0.0), "{report}");
        }
    }
}

#[test]
fn a_table_for_people_and_refusals_that_say_what_would_be_right() {
    let out = bench("--bytes 64k");
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.starts_with("vector") && text.lines().count() == 2, "{text}");
    for (words, cure) in [
        ("--operation all_gather --algorithm tree", "it has ring, one_shot"),
        ("--transport ip", "write shm, tcp, tls or mixed"),
        ("--bytes 9T", "at most 1G"),
    ] {
        let out = bench(words);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(2) && said.contains(cure), "{words}: {said}");
    }
}
