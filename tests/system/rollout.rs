//! `consort rollout` against a running `consort up`: a candidate that is as good, and candidates that are worse, each in
//! its own way. Whatever the candidate is, no client's request fails, and no stream is cut by a decision.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::client;
use crate::replica::{chat, model};
use crate::scripted::{self, Candidate};
use crate::up::{Up, start, up_file};

const CHAT: &str = "/v1/chat/completions";
const FILE: &str = "[models.smol]\nsource = \"{model}\"\nreplicas = 1\nthreads = 1\n";

/// What a rollout is started with so that a test needs seconds.
const QUICK: [&str; 10] =
    ["--steps", "50", "--bake", "1s", "--requests", "8", "--scored", "3", "--shadow", "100"];

fn roll_out(up: &Up, arguments: &[&str]) -> String {
    let mut all = vec!["rollout", "start", "smol", "--json"];
    all.extend(arguments);
    let started = up.consort(&all);
    assert!(started.status.success(), "{started:?}");
    let started: Value = serde_json::from_slice(&started.stdout).unwrap();
    started["spec"]["version"].as_str().unwrap().to_owned()
}

fn stage(fleet: &Value) -> &str {
    fleet["rollouts"][0]["stage"].as_str().unwrap_or("none")
}

/// Asks from `lanes` clients, each beginning another conversation every time, until the rollout has ended. Every request
/// must be answered. Meanwhile `meddle` is called with the fleet, again and again.
fn under_load(up: &Up, lanes: usize, meddle: impl Fn(&Value) + Sync) -> Value {
    let (done, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let number = asked.fetch_add(1, Ordering::Relaxed);
                    let response = up.post(&chat(&format!("Count from {number} to 99."), 12));
                    assert_eq!(response.status, 200, "{}\n{}", response.text(), up.log());
                }
            });
        }
        // In a thread of its own, so that the lanes end when it fails.
        let watching = scope.spawn(|| {
            up.until("the rollout has ended", |fleet| {
                meddle(fleet);
                matches!(stage(fleet), "promoted" | "withdrawn")
            })
        });
        let fleet = watching.join();
        done.store(true, Ordering::Relaxed);
        fleet.unwrap_or_else(|_| panic!("{}", up.log()))
    })
}

#[test]
fn a_candidate_that_is_as_good_becomes_the_model_and_stays_it_after_a_restart() {
    let mut up = up_file(FILE);
    let copy = up.folder.path().join("copy.gguf");
    fs::copy(model(), &copy).unwrap();
    let question = chat("Name a colour.", 8);
    let before = up.post(&question).json()["choices"].clone();
    // The machine of a test is busy now here, now there.
    let patient = ["--source", copy.to_str().unwrap(), "--slowdown", "1000"];
    let version = roll_out(&up, &[&patient[..], &QUICK].concat());
    assert_eq!(version, "v1");
    let fleet = under_load(&up, 3, |_| {});
    let rollout = &fleet["rollouts"][0];
    assert_eq!(stage(&fleet), "promoted", "{rollout:#}");
    assert!(rollout["candidate_did"]["scored"].as_u64().unwrap() >= 3, "{rollout:#}");
    assert_eq!(
        rollout["candidate_did"]["disagreement"], 0.0,
        "the same weights agree bit for bit: {rollout:#}"
    );
    up.until("the incumbent has left", |fleet| {
        fleet["slots"].as_array().unwrap().len() == 1 && fleet["slots"][0]["slot"] == "smol@v1-0"
    });
    assert_eq!(up.post(&question).json()["choices"], before);
    let metrics = client::send(up.address, "GET", "/metrics", b"").unwrap().text();
    for series in [
        "consort_gateway_version_requests_total{model=\"smol\",version=\"v1\",outcome=\"ok\"}",
        "consort_gateway_version_tokens_total{model=\"smol\",version=\"v1\"}",
        "consort_gateway_version_time_to_first_token_seconds_count{model=\"smol\",version=\"v1\"}",
        "consort_gateway_version_inter_token_seconds_count{model=\"smol\",version=\"v1\"}",
        "consort_gateway_shadow_answers{model=\"smol\",version=\"v1\",outcome=\"scored\"}",
        "consort_gateway_shadow_disagreement_nats{model=\"smol\",version=\"v1\"} 0.0",
    ] {
        assert!(metrics.contains(series), "{series} is missing in\n{metrics}");
    }
    let shown = up.consort(&["status"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("smol: v1 beside stable: promoted"), "{shown:?}");

    up.signal("TERM");
    up.wait();
    let at_rest = up.consort(&["rollout", "status", "--json"]);
    assert!(String::from_utf8_lossy(&at_rest.stdout).contains("promoted"), "{at_rest:?}");
    let folder = std::mem::replace(&mut up.folder, tempfile::tempdir().unwrap());
    drop(up);
    let file = folder.path().join("consort.toml");
    let up = start(folder, &[file.to_str().unwrap()]);
    assert_eq!(up.fleet()["slots"][0]["slot"], "smol@v1-0");
    assert_eq!(up.post(&question).json()["choices"], before);
    // The file's own word is the last one.
    fs::write(&file, FILE.replace("{model}", up.folder.path().join("copy.gguf").to_str().unwrap())).unwrap();
    up.until("the file takes over", |fleet| {
        fleet["slots"].as_array().unwrap().len() == 1
            && fleet["slots"][0]["slot"] == "smol-0"
            && fleet["slots"][0]["state"] == "ready"
    });
}

#[test]
fn a_candidate_with_another_models_weights_is_taken_back() {
    let up = up_file(FILE);
    let other = std::env::var("CONSORT_TEST_GEMMA3").expect("CONSORT_TEST_GEMMA3 names the Gemma test model");
    roll_out(&up, &[&["--source", other.as_str(), "--steps", "0,50"][..], &QUICK[2..]].concat());
    let fleet = under_load(&up, 2, |_| {});
    assert_eq!(stage(&fleet), "withdrawn");
    let reason = fleet["rollouts"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("disagrees with") || reason.contains("refuses"), "{reason}");
    let requests = fleet["rollouts"][0]["candidate_did"]["requests"].as_u64().unwrap();
    assert_eq!(requests, 0, "nobody got an answer of it");
    let again = up.consort(&["rollout", "status", "smol", "--watch"]);
    assert_eq!(again.status.code(), Some(1), "it was taken back: {again:?}");
    assert!(String::from_utf8_lossy(&again.stdout).contains(reason), "{again:?}");
}

#[test]
fn a_candidate_that_is_slow_is_taken_back() {
    let up = up_file(FILE);
    roll_out(&up, &[&QUICK[..4], &["--requests", "60", "--no-shadow", "--max-running", "1"]].concat());
    let fleet = under_load(&up, 8, |_| {});
    assert_eq!(stage(&fleet), "withdrawn", "{:#}", fleet["rollouts"]);
    let reason = fleet["rollouts"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("first token takes"), "{reason}");
}

#[test]
fn a_candidate_that_dies_is_taken_back_and_costs_no_client_a_request() {
    let up = up_file(FILE);
    let quick = [
        &QUICK[..4],
        &[
            "--requests",
            "1000000",
            "--no-shadow",
            "--max-running",
            "8",
            "--errors",
            "100",
            "--slowdown",
            "1000",
        ],
    ]
    .concat();
    let version = roll_out(&up, &quick);
    let slot = format!("smol@{version}-0");
    let fleet = under_load(&up, 3, |fleet| {
        let slots = fleet["slots"].as_array().unwrap().iter().filter(|s| s["slot"] == *slot);
        let ready = slots.flat_map(|s| s["replicas"].as_array().unwrap()).find(|r| r["phase"] == "ready");
        if let Some(pid) = ready.and_then(|r| r["pid"].as_u64()).filter(|_| stage(fleet) == "baking") {
            // What the fleet said may be old: that one may be gone already.
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
        }
    });
    assert_eq!(stage(&fleet), "withdrawn");
    let reason = fleet["rollouts"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("were lost 3 times") && reason.contains("signal: 9"), "{reason}");
    let slots: Vec<_> = fleet["slots"].as_array().unwrap().iter().map(|s| s["slot"].clone()).collect();
    assert!(slots.contains(&json!("smol-0")), "{slots:?}");
}

/// A candidate that fails in this way is taken back because of it, and no client sees anything of it.
fn is_taken_back(candidate: Candidate) {
    let file = format!("{FILE}[timeouts]\ntry = \"1s\"\ntoken = \"2s\"\n");
    let (up, source) = scripted::up(&file, candidate);
    let source = ["--source", source.to_str().unwrap(), "--no-shadow", "--slowdown", "1000", "--lost", "99"];
    let version = roll_out(&up, &[&source[..], &QUICK[..6]].concat());
    let fleet = under_load(&up, 3, |_| {});
    assert_eq!(stage(&fleet), "withdrawn", "{candidate:?}: {:#}", fleet["rollouts"]);
    let reason = fleet["rollouts"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("requests failed"), "{candidate:?}: {reason}");
    let metrics = client::send(up.address, "GET", "/metrics", b"").unwrap().text();
    let series = format!(
        "consort_gateway_version_requests_total{{model=\"smol\",version=\"{version}\",outcome=\"diverted\"}} "
    );
    let diverted = metrics.lines().find_map(|line| line.strip_prefix(series.as_str()));
    let diverted: u64 = diverted.unwrap_or_else(|| panic!("no {series} in\n{metrics}")).parse().unwrap();
    assert!(diverted >= 3, "{candidate:?}: {diverted}");
    // What is wrong with a request is the request's fault, and told as the incumbent tells it.
    let wrong = up.post(&json!({"messages": [{"role": "nobody", "content": "x"}]}));
    assert!(wrong.status == 400 && wrong.error() != "by script", "{}", wrong.text());
}

#[test]
fn a_candidate_that_answers_500_is_taken_back() {
    is_taken_back(Candidate::Fails);
}

#[test]
fn a_candidate_that_hangs_is_taken_back() {
    is_taken_back(Candidate::Hangs);
}

#[test]
fn a_candidate_that_gives_signs_of_life_and_no_answer_is_taken_back() {
    is_taken_back(Candidate::Dawdles);
}

#[test]
fn a_candidate_that_breaks_off_is_taken_back_and_whole_answers_begin_anew() {
    is_taken_back(Candidate::Breaks);
}

#[test]
fn a_candidate_that_refuses_what_the_incumbent_takes_is_taken_back() {
    is_taken_back(Candidate::Refuses);
}

#[test]
fn a_stream_of_a_candidate_that_is_aborted_goes_on_to_its_end() {
    const TOKENS: usize = 400;
    let up = up_file(FILE);
    let body = chat("Tell me about the sea.", TOKENS);
    let whole = up.post(&body).json()["choices"][0]["message"]["content"].clone();
    let wrong = up.consort(&["rollout", "start", "smol"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("what runs already"), "{wrong:?}");
    assert_eq!(up.consort(&["rollout", "start", "smol", "--steps", "50,5"]).status.code(), Some(2));
    roll_out(&up, &["--max-running", "8", "--steps", "100", "--bake", "1h", "--no-shadow"]);
    up.until("it bakes", |fleet| stage(fleet) == "baking");
    let second = up.consort(&["rollout", "start", "smol", "--max-running", "9"]);
    assert!(String::from_utf8_lossy(&second.stderr).contains("rollout abort smol"), "{second:?}");
    let mut events = client::stream(up.address, CHAT, &body).unwrap();
    let mut seen = vec![events.next().unwrap().unwrap(), events.next().unwrap().unwrap()];
    let served = |fleet: &Value, version: usize| {
        fleet["gateway"]["models"][0]["versions"][version]["replicas"][0]["outstanding_requests"].as_u64()
    };
    assert_eq!(served(&up.fleet(), 1), Some(1), "the candidate gives it");
    assert!(up.consort(&["rollout", "abort", "smol"]).status.success());
    let fleet = up.until("it is withdrawn", |fleet| fleet["rollouts"][0]["weights"] == json!([100, 0]));
    assert_eq!(stage(&fleet), "withdrawing", "its stream isn't done");
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200);
    while let Some(event) = events.next().unwrap() {
        seen.push(event);
    }
    let text: String = seen.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(Value::from(text), whole);
    let fleet = up.until("it is gone", |fleet| {
        stage(fleet) == "withdrawn" && fleet["slots"].as_array().unwrap().len() == 1
    });
    assert_eq!(fleet["rollouts"][0]["reason"], "aborted by hand");
}

#[test]
fn a_rollout_goes_on_after_a_crash_and_ends_where_its_file_has_changed_meanwhile() {
    let mut up = up_file(FILE);
    roll_out(&up, &["--max-running", "8", "--steps", "50", "--bake", "1h", "--no-shadow"]);
    up.until("it bakes", |fleet| stage(fleet) == "baking");
    let crash = |up: &mut Up| {
        up.signal("KILL");
        up.wait();
        std::mem::replace(&mut up.folder, tempfile::tempdir().unwrap())
    };
    let folder = crash(&mut up);
    drop(up);
    let file = folder.path().join("consort.toml");
    let mut up = start(folder, &[file.to_str().unwrap()]);
    let fleet = up.until("it bakes again", |fleet| {
        let ready = fleet["slots"].as_array().unwrap().iter().filter(|s| s["state"] == "ready").count();
        stage(fleet) == "baking" && ready == 2
    });
    assert_eq!(fleet["rollouts"][0]["weights"], json!([50, 50]));
    let edited =
        fs::read_to_string(&file).unwrap().replace("replicas = 1", "replicas = 1\nversion = \"other\"");
    fs::write(&file, &edited).unwrap();
    up.until_log("an edit of its version is refused", "a rollout of \"smol\" is under way and this edit");
    let folder = crash(&mut up);
    drop(up);
    let up = start(folder, &[file.to_str().unwrap()]);
    let fleet = up.until("it has ended", |fleet| stage(fleet) == "withdrawn");
    assert!(
        fleet["rollouts"][0]["reason"].as_str().unwrap().contains("\"other\""),
        "{:#}",
        fleet["rollouts"]
    );
    assert_eq!(fleet["slots"][0]["slot"], "smol@other-0");
    assert_eq!(up.post(&chat("Hello.", 3)).status, 200);
}
