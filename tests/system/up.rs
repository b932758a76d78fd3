//! `consort up`: replicas that are killed, hang or can't start; edits of the file; restarts under load; and what is left
//! when it is itself killed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{self, PATIENCE, Response};
use crate::replica::{Lane, chat, model, signal, turn};

const CHAT: &str = "/v1/chat/completions";

/// A running `consort up` with state of its own.
pub(crate) struct Up {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) folder: tempfile::TempDir,
    _machine: MutexGuard<'static, ()>,
}

/// Two replicas of the model.
pub(crate) fn up() -> Up {
    let model = model();
    start(tempfile::tempdir().unwrap(), &["--model", model.to_str().unwrap(), "--name", "smol"])
}

/// A deployment from a file in a folder of its own; `{model}` in it is the model's path.
pub(crate) fn up_file(text: &str) -> Up {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("consort.toml");
    fs::write(&file, text.replace("{model}", model().to_str().unwrap())).unwrap();
    start(folder, &[file.to_str().unwrap()])
}

pub(crate) fn start(folder: tempfile::TempDir, arguments: &[&str]) -> Up {
    start_with(folder, arguments, &[])
}

/// With further variables in its environment.
pub(crate) fn start_with(folder: tempfile::TempDir, arguments: &[&str], environment: &[(&str, &str)]) -> Up {
    start_program(Path::new(env!("CARGO_BIN_EXE_consort")), folder, arguments, environment)
}

/// By another name of the program.
pub(crate) fn start_program(
    program: &Path,
    folder: tempfile::TempDir,
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> Up {
    let machine = turn(Lane::Models);
    let mut child = program_on(program, folder.path())
        .envs(environment.iter().copied())
        .arg("up")
        .args(arguments)
        .args(["--port", "0", "--json"])
        .stdout(Stdio::piped())
        .stderr(fs::File::create(folder.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap_or_else(|_| {
        panic!("consort up said {line:?} and {}", fs::read_to_string(folder.path().join("log")).unwrap())
    });
    let address = said["address"].as_str().unwrap().parse().unwrap();
    Up { child, address, folder, _machine: machine }
}

pub(crate) fn command(folder: &Path) -> Command {
    program_on(Path::new(env!("CARGO_BIN_EXE_consort")), folder)
}

fn program_on(program: &Path, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("CONSORT_STATE", folder.join("state")).env_remove("CONSORT_API_KEY").stdin(Stdio::null());
    command
}

impl Up {
    pub(crate) fn fleet(&self) -> Value {
        client::send(self.address, "GET", "/fleet", b"").unwrap().json()
    }

    pub(crate) fn post(&self, body: &Value) -> Response {
        client::post(self.address, CHAT, body).unwrap()
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        let fleet = self.fleet();
        let slots = fleet["slots"].as_array().unwrap().iter().flat_map(|s| s["replicas"].as_array().unwrap());
        slots.filter_map(|r| r["pid"].as_u64()).map(|pid| pid as u32).collect()
    }

    /// Ids of the ready replicas.
    pub(crate) fn ready(&self) -> Vec<String> {
        let fleet = self.fleet();
        let slots = fleet["slots"].as_array().unwrap().iter().flat_map(|s| s["replicas"].as_array().unwrap());
        slots.filter(|r| r["phase"] == "ready").map(|r| r["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until the fleet's state is as told.
    pub(crate) fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let fleet = self.fleet();
            if holds(&fleet) {
                return fleet;
            }
            assert!(begun.elapsed() < PATIENCE, "waited until {what}: {fleet:#}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the log says it.
    pub(crate) fn until_log(&self, what: &str, said: &str) {
        let begun = Instant::now();
        while !self.log().contains(said) {
            assert!(begun.elapsed() < PATIENCE, "waited until {what}:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs another command on the same state.
    pub(crate) fn consort(&self, arguments: &[&str]) -> std::process::Output {
        command(self.folder.path()).args(arguments).output().unwrap()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process's state letter; `None` where there is no such process.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next().filter(|state| *state != 'Z')
}

fn gone(pids: &[u32]) {
    let begun = Instant::now();
    while pids.iter().any(|pid| state(*pid).is_some()) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{pids:?} live on");
        thread::sleep(Duration::from_millis(20));
    }
}

fn slot_is(fleet: &Value, slot: usize, state: &str) -> bool {
    fleet["slots"][slot]["state"] == state
}

fn all_ready(fleet: &Value, count: usize) -> bool {
    let slots = fleet["slots"].as_array().unwrap();
    slots.len() == count
        && slots.iter().all(|s| s["state"] == "ready" && s["replicas"].as_array().unwrap().len() == 1)
}

#[test]
fn a_killed_replica_is_replaced_and_its_stream_goes_on() {
    const TOKENS: usize = 400;
    let up = up();
    let body = chat("Tell me about the sea.", TOKENS);
    let whole = up.post(&body).json()["choices"][0]["message"]["content"].clone();
    let mut events = client::stream(up.address, CHAT, &body).unwrap();
    let mut seen = vec![events.next().unwrap().unwrap(), events.next().unwrap().unwrap()];
    // Whichever serves it: both of them, the second once the first is back.
    let before = up.fleet();
    let pids = up.pids();
    signal(pids[0], "KILL");
    up.until("the first is back", |fleet| all_ready(fleet, 2) && fleet["slots"][0]["restarts"] == 1);
    signal(pids[1], "KILL");
    while let Some(event) = events.next().unwrap() {
        seen.push(event);
    }
    let text: String = seen.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(Value::from(text), whole);
    let fleet = up.until("both are back", |fleet| all_ready(fleet, 2));
    for slot in 0..2 {
        assert_ne!(fleet["slots"][slot]["replicas"][0]["id"], before["slots"][slot]["replicas"][0]["id"]);
        assert!(fleet["slots"][slot]["last_failure"].as_str().unwrap().contains("signal: 9"));
    }
    assert_eq!(up.post(&body).json()["choices"][0]["message"]["content"], whole);
}

#[test]
fn a_stopped_replica_is_noticed_and_replaced() {
    let up = up_file("timeouts.probe = \"1s\"\n[models.smol]\nsource = \"{model}\"\nreplicas = 2\n");
    let pids = up.pids();
    signal(pids[0], "STOP");
    let fleet = up.until("it is replaced", |fleet| all_ready(fleet, 2) && fleet["slots"][0]["restarts"] == 1);
    assert!(fleet["slots"][0]["last_failure"].as_str().unwrap().contains("it hangs"), "{fleet}");
    gone(&pids[..1]);
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200);
}

#[test]
fn nothing_is_left_when_it_is_killed() {
    let mut up = up();
    let pids = up.pids();
    // One of them can't even notice.
    signal(pids[0], "STOP");
    // A signal is sent at once and obeyed when its process runs next.
    let begun = Instant::now();
    while state(pids[0]) != Some('T') {
        assert!(begun.elapsed() < PATIENCE, "{:?}", state(pids[0]));
        thread::sleep(Duration::from_millis(5));
    }
    up.signal("KILL");
    up.wait();
    // The stopped one may be woken by the kernel (SIGHUP to a group that is orphaned with a stopped member, once all its
    // threads have stopped); where it isn't, the next one ends it.
    gone(&pids[1..]);
    // The next one isn't held up by what the last one left in the state folder.
    let folder = std::mem::replace(&mut up.folder, tempfile::tempdir().unwrap());
    drop(up);
    let model = model();
    let next = start(folder, &["--model", model.to_str().unwrap(), "--replicas", "1"]);
    gone(&pids[..1]);
    assert_eq!(next.post(&chat("Hello.", 3)).status, 200);
}

#[test]
fn a_crash_loop_is_reported_and_slows_down_until_it_is_mended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::copy(model(), &path).unwrap();
    let up = start(folder, &["--model", path.to_str().unwrap(), "--name", "smol", "--replicas", "1"]);
    let kept = up.folder.path().join("kept.gguf");
    fs::rename(&path, &kept).unwrap();
    fs::write(&path, b"GGUF, and then nothing of the kind").unwrap();
    // A replaced file rolls; a replica that can't start leaves the old one alone.
    let fleet = up.until("the roll has failed", |fleet| fleet["slots"][0]["failures"].as_u64().unwrap() >= 2);
    assert!(matches!(fleet["slots"][0]["state"].as_str(), Some("ready" | "rolling")), "{fleet}");
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200, "the old one serves on");
    signal(up.pids()[0], "KILL");
    let fleet = up.until("the loop is seen", |fleet| slot_is(fleet, 0, "crash_loop"));
    let why = fleet["slots"][0]["last_failure"].as_str().unwrap();
    assert!(why.contains("exit status: 1") && why.contains("model.gguf"), "{why}");
    assert!(up.log().contains("fails again and again"), "{}", up.log());
    let shown = up.consort(&["status"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("crash loop"), "{shown:?}");
    let failures = fleet["slots"][0]["failures"].as_u64().unwrap();
    fs::rename(&kept, &path).unwrap();
    let fleet = up.until("it is mended", |fleet| all_ready(fleet, 1));
    assert!(fleet["slots"][0]["restarts"].as_u64().unwrap() < failures + 8, "it did not spin: {fleet}");
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200);
}

#[test]
fn a_rolling_restart_under_load_fails_no_request_and_changes_no_byte() {
    let up = up();
    let bodies: Vec<_> = (0..4).map(|i| chat(&format!("Count to {}.", 5 + i), 24)).collect();
    let alone: Vec<_> = bodies.iter().map(|b| up.post(b).json()["choices"].clone()).collect();
    let before = up.ready();
    let done = AtomicBool::new(false);
    let answered: usize = thread::scope(|scope| {
        let lanes: Vec<_> = bodies
            .iter()
            .zip(&alone)
            .map(|(body, alone)| {
                let (up, done) = (&up, &done);
                scope.spawn(move || {
                    let mut answered = 0;
                    while !done.load(Ordering::Relaxed) {
                        let response = up.post(body);
                        assert_eq!(response.status, 200, "{}\n{}", response.text(), up.log());
                        assert_eq!(response.json()["choices"], *alone);
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        up.signal("HUP");
        let rolled = thread::scope(|inner| {
            inner
                .spawn(|| {
                    up.until("all are new", |fleet| {
                        let ids: Vec<_> = fleet["slots"]
                            .as_array()
                            .unwrap()
                            .iter()
                            .map(|s| s["replicas"][0]["id"].clone())
                            .collect();
                        all_ready(fleet, 2) && ids.iter().all(|id| !before.iter().any(|old| id == old))
                    })
                })
                .join()
        });
        done.store(true, Ordering::Relaxed);
        rolled.unwrap();
        lanes.into_iter().map(|lane| lane.join().unwrap()).sum()
    });
    println!("{answered} requests answered during the restart of everything");
    assert!(answered > 4);
    assert_eq!(up.fleet()["slots"][0]["restarts"], 0, "nothing was lost");
}

#[test]
fn a_restart_hands_a_long_answer_over_after_its_budget_of_tokens() {
    const TOKENS: usize = 600;
    let up = up_file("drain.tokens = 20\n[models.smol]\nsource = \"{model}\"\nreplicas = 2\nthreads = 1\n");
    let body = chat("Tell me about the sea.", TOKENS);
    let whole = up.post(&body).json()["choices"][0]["message"]["content"].clone();
    let before = up.ready();
    let mut events = client::stream(up.address, CHAT, &body).unwrap();
    let mut seen = vec![events.next().unwrap().unwrap(), events.next().unwrap().unwrap()];
    let resumes = up.fleet()["gateway"]["totals"]["resumes"].as_u64().unwrap();
    up.signal("HUP");
    // The client reads nothing from here on, so the answer can't have ended when its replica is told to stop: what is
    // sent on is bounded by what the connection holds.
    let fleet = up.until("both are new, while the answer goes on", |fleet| {
        let ids: Vec<_> =
            fleet["slots"].as_array().unwrap().iter().map(|s| &s["replicas"][0]["id"]).collect();
        all_ready(fleet, 2) && ids.iter().all(|id| !before.iter().any(|old| *id == old))
    });
    while let Some(event) = events.next().unwrap() {
        seen.push(event);
    }
    let text: String = seen.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(Value::from(text), whole);
    assert_eq!(fleet["slots"][0]["restarts"], 0, "nothing was lost");
    let moved = up.fleet()["gateway"]["totals"]["resumes"].as_u64().unwrap() - resumes;
    println!("the answer moved {moved} times");
    assert!(moved <= 2, "once for each replica that left");
}

#[test]
fn the_file_is_applied_live_and_a_wrong_edit_changes_nothing() {
    let text = "[models.smol]\nsource = \"{model}\"\nreplicas = 1\nthreads = 1\n";
    let up = up_file(text);
    let file = up.folder.path().join("consort.toml");
    let edit = |text: &str| {
        // As editors do it: a new file under the old name.
        let part = up.folder.path().join("new.toml");
        fs::write(&part, text.replace("{model}", model().to_str().unwrap())).unwrap();
        fs::rename(part, &file).unwrap();
    };
    let first = up.ready();
    edit(&text.replace("replicas = 1", "replicas = 2"));
    up.until("there are two", |fleet| all_ready(fleet, 2));
    assert_eq!(up.ready()[0], first[0], "what didn't change didn't restart");

    let before = up.ready();
    edit(&text.replace("replicas = 1", "replcas = 3"));
    let fleet = up.until("it is refused", |fleet| fleet["file_error"].is_string());
    let said = fleet["file_error"].as_str().unwrap();
    assert!(said.contains("consort.toml:3:1") && said.contains("did you mean `replicas`?"), "{said}");
    assert!(up.log().contains("unknown key `replcas`"), "{}", up.log());
    assert_eq!(up.ready(), before);
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200);

    edit("[models.smol]\nsource = \"/no/such/model.gguf\"\n");
    up.until("it is refused too", |fleet| {
        fleet["file_error"].as_str().is_some_and(|said| said.contains("/no/such/model.gguf"))
    });
    assert_eq!(up.ready(), before);

    edit(&text.replace("threads = 1", "max_running = 8"));
    let fleet = up.until("the other setting rolls", |fleet| {
        all_ready(fleet, 1) && !before.iter().any(|old| fleet["slots"][0]["replicas"][0]["id"] == *old)
    });
    assert!(fleet["file_error"].is_null());
    assert_eq!(fleet["slots"][0]["restarts"], 0);
}

#[test]
fn the_front_doors_settings_are_applied_live_and_what_cannot_be_is_named() {
    let text = "[models.smol]\nsource = \"{model}\"\nreplicas = 1\n";
    let up = up_file(text);
    let file = up.folder.path().join("consort.toml");
    let edit = |more: &str| {
        let part = up.folder.path().join("new.toml");
        fs::write(&part, format!("{more}{text}").replace("{model}", model().to_str().unwrap())).unwrap();
        fs::rename(part, &file).unwrap();
    };
    let before = up.ready();
    let long = chat(&"sea ".repeat(500), 3);
    assert_eq!(up.post(&long).status, 200);
    edit("limits.body = 1024\nlisten = \"127.0.0.1:1\"\n");
    let fleet = up.until("the edit is answered", |fleet| fleet["restart_needed"][0].is_string());
    assert_eq!(fleet["restart_needed"], json!(["listen"]));
    assert_eq!(up.post(&long).status, 413);
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200);
    assert!(up.log().contains("wait for the next start of consort up: listen"), "{}", up.log());

    edit("timeouts = { route = \"3s\", try = \"1s\", token = \"16s\" }\n");
    up.until_log("what can't work is refused", "`token` (16s) is longer than `route` (3s)");
    assert_eq!(up.post(&long).status, 413, "everything is as it was");

    edit("page = false\nallowed_origins = [\"https://example.org\"]\n");
    up.until("it is taken", |fleet| fleet["restart_needed"] == json!([]) && fleet["file_error"].is_null());
    assert_eq!(client::send(up.address, "GET", "/", b"").unwrap().status, 404);
    assert_eq!(up.post(&long).status, 200);

    edit("keys.required = true\n");
    up.until_log("requests need a key", "the edit is applied");
    let begun = Instant::now();
    while up.post(&chat("Hello.", 3)).status != 401 {
        assert!(begun.elapsed() < PATIENCE, "{}", up.log());
    }
    edit("");
    let begun = Instant::now();
    while up.post(&chat("Hello.", 3)).status != 200 {
        assert!(begun.elapsed() < PATIENCE, "{}", up.log());
    }
    assert_eq!(up.ready(), before, "no replica restarted for any of it");
}

#[test]
fn replicas_follow_the_load() {
    let up = up_file(
        "[models.smol]\nsource = \"{model}\"\nreplicas = { min = 1, max = 2 }\n\
         [models.smol.autoscale]\ntarget_tokens = 256\ndown_window = \"2s\"\n",
    );
    assert_eq!(up.ready().len(), 1);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(up.post(&chat("Tell me a story.", 200)).status, 200, "{}", up.log());
                }
            });
        }
        let grown =
            thread::scope(|inner| inner.spawn(|| up.until("there are two", |f| all_ready(f, 2))).join());
        done.store(true, Ordering::Relaxed);
        grown.unwrap();
    });
    let fleet = up.until("there is one", |fleet| all_ready(fleet, 1));
    assert!(up.log().contains("tokens a replica, 256 wanted"), "{}", up.log());
    assert_eq!(fleet["scaling"][0]["replicas"], 1);
}

#[test]
fn an_idle_model_ends_its_last_replica_and_the_next_request_waits_for_one() {
    let up = up_file(
        "[models.smol]\nsource = \"{model}\"\nreplicas = { min = 0, max = 1 }\n\
         [models.smol.autoscale]\nidle = \"1s\"\ndown_window = \"1s\"\n",
    );
    for _ in 0..2 {
        up.until("there is none", |fleet| all_ready(fleet, 0));
        let response = up.post(&chat("Hello.", 3));
        assert_eq!(response.status, 200, "{}\n{}", response.text(), up.log());
    }
    assert!(up.log().contains("requests wait and there is no replica"), "{}", up.log());
}

#[test]
fn sigterm_lets_short_answers_finish_and_exits_0() {
    const TOKENS: usize = 100;
    let mut up = up();
    let pids = up.pids();
    let mut body = chat("Tell me a story.", TOKENS);
    body["stream_options"] = json!({"include_usage": true});
    let mut events = client::stream(up.address, CHAT, &body).unwrap();
    events.next().unwrap().unwrap();
    events.next().unwrap().unwrap();
    up.signal("TERM");
    let rest = events.all().unwrap();
    let usage = rest.iter().find_map(|event| event["usage"].as_object()).unwrap();
    assert_eq!(usage["completion_tokens"], TOKENS);
    assert_eq!(up.wait().code(), Some(0), "{}", up.log());
    gone(&pids);
}

#[test]
fn an_answer_that_is_too_long_for_the_drain_ends_with_an_error_and_holds_nothing_up() {
    let mut up = up_file("drain.tokens = 10\n[models.smol]\nsource = \"{model}\"\nreplicas = 2\n");
    let mut events = client::stream(up.address, CHAT, &chat("Tell me a story.", 6000)).unwrap();
    events.next().unwrap().unwrap();
    events.next().unwrap().unwrap();
    let begun = Instant::now();
    up.signal("TERM");
    let last = loop {
        match events.next() {
            Ok(Some(event)) if event["error"].is_object() => break event,
            Ok(Some(_)) => {}
            other => panic!("no error event, but {other:?}\n{}", up.log()),
        }
    };
    assert!(last["error"]["message"].is_string());
    assert_eq!(up.wait().code(), Some(0), "{}", up.log());
    // What is waited for is the drain of ten tokens, and no deadline (the shortest of them is 30 s).
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
}

#[test]
fn a_door_that_needs_keys_opens_to_a_new_one_at_once() {
    let up = up_file("keys.required = true\n[models.smol]\nsource = \"{model}\"\n");
    let ask = |key: Option<&str>| {
        let body = chat("Hello.", 3).to_string();
        let bearer = key.map_or(String::new(), |key| format!("authorization: Bearer {key}\r\n"));
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/json\r\n{bearer}content-length: {}\r\n\r\n{body}",
            up.address,
            body.len()
        );
        let mut stream = client::connect(up.address).unwrap();
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        client::read(stream).unwrap().status
    };
    assert_eq!((ask(None), ask(Some("sk-consort-wrong"))), (401, 401));
    let made = up.consort(&["key", "create", "--name", "alice", "--requests-per-minute", "2", "--json"]);
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    let secret = made["secret"].as_str().unwrap();
    assert_eq!((ask(Some(secret)), ask(Some(secret)), ask(Some(secret))), (200, 200, 429));
    assert_eq!(client::send(up.address, "GET", "/fleet", b"").unwrap().status, 401);
    assert!(up.consort(&["key", "revoke", made["key"]["id"].as_str().unwrap()]).status.success());
    assert_eq!(ask(Some(secret)), 401);
}

#[test]
fn keys_and_status_reach_the_running_one_and_a_second_one_is_refused() {
    let up = up();
    let made = up.consort(&["key", "create", "--name", "alice", "--json"]);
    assert!(made.status.success(), "{made:?}");
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    let listed: Value = serde_json::from_slice(&up.consort(&["key", "list", "--json"]).stdout).unwrap();
    assert_eq!(listed[0], made["key"]);
    assert!(!listed.to_string().contains(made["secret"].as_str().unwrap().trim_start_matches("sk-consort-")));
    let id = made["key"]["id"].as_str().unwrap();
    assert!(up.consort(&["key", "revoke", id]).status.success());
    let again = up.consort(&["key", "revoke", id]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(String::from_utf8_lossy(&again.stderr).contains("consort key list"));

    let status: Value = serde_json::from_slice(&up.consort(&["status", "--json"]).stdout).unwrap();
    assert_eq!(status["slots"].as_array().unwrap().len(), 2);
    let shown = up.consort(&["status"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("2 of 2 replicas ready"), "{shown:?}");

    let model = model();
    let second = up.consort(&["up", "--model", model.to_str().unwrap(), "--port", "0"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("CONSORT_STATE"), "{second:?}");
    assert_eq!(up.ready().len(), 2, "the first one didn't feel it");
}

#[test]
fn only_the_page_on_this_machine_can_kill() {
    let up = up();
    let id = up.ready()[0].clone();
    let body = json!({ "id": id }).to_string();
    let attempt = |headers: &[(&str, &str)]| {
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!(
            "POST /fleet/kill HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n{lines}\r\n{body}",
            body.len()
        );
        let mut stream = client::connect(up.address).unwrap();
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        client::read(stream).unwrap().status
    };
    let host = up.address.to_string();
    let own = format!("http://{host}");
    let mark = ("x-consort-page", "1");
    assert_eq!(attempt(&[("host", &host), ("origin", &own)]), 403, "a form has no such header");
    assert_eq!(attempt(&[("host", &host), mark]), 403, "no origin");
    assert_eq!(attempt(&[("host", &host), ("origin", "https://evil.example"), mark]), 403);
    let rebound = format!("evil.example:{}", up.address.port());
    assert_eq!(attempt(&[("host", &rebound), ("origin", &format!("http://{rebound}")), mark]), 403);
    assert_eq!(up.fleet()["slots"][0]["restarts"], 0);
    assert_eq!(attempt(&[("host", &host), ("origin", &own), mark]), 200);
    up.until("it is replaced", |fleet| all_ready(fleet, 2) && fleet["slots"][0]["restarts"] == 1);
    assert_eq!(attempt(&[("host", &host), ("origin", &own), mark]), 404, "that one is gone");
}
