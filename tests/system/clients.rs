//! Real clients: the chat page in a browser, and OpenAI's own Python library, each a script of its own under `tests/`.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use crate::replica::serve;
use crate::up::up;

/// Runs a script against a fresh replica.
fn drive(script: &str) {
    drive_with(script, &[], &[]);
}

/// Runs a script, with further arguments for the replica and for itself, on the Python that `cargo xtask test` prepared.
fn drive_with(script: &str, replica: &[&str], arguments: &[&str]) {
    let replica = serve(replica);
    run(script, replica.address, arguments);
}

fn run(script: &str, address: SocketAddr, arguments: &[&str]) {
    let python = std::env::var_os("CONSORT_TEST_PYTHON");
    let python =
        python.expect("CONSORT_TEST_PYTHON names no Python; `cargo xtask test` makes one and sets it");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(script);
    let mut command = Command::new(python);
    command.arg(&script).args(["--url", &format!("http://{address}")]).args(arguments);
    if let Some(chromium) = std::env::var_os("CONSORT_TEST_CHROMIUM") {
        command.env("CHROMIUM", chromium);
    }
    let status = command.status().unwrap();
    assert!(status.success(), "{} ended with {status}", script.display());
}

#[test]
fn the_page_works_in_a_browser() {
    drive("page/test_page.py");
}

#[test]
fn the_page_survives_the_death_of_a_replica() {
    let up = up();
    run("page/test_fleet.py", up.address, &[]);
}

#[test]
fn the_page_of_a_fleet_is_the_page_of_a_replica_too() {
    let up = up();
    run("page/test_page.py", up.address, &[]);
}

#[test]
fn the_openai_library_gets_what_the_api_promises() {
    drive("openai_client/test_api.py");
}

#[test]
fn the_openai_library_needs_the_key_where_there_is_one() {
    const KEY: &str = "a-key-for-tests";
    drive_with("openai_client/test_api.py", &["--api-key", KEY], &["--key", KEY, "--only", "key"]);
}
