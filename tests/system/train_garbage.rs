//! What a process that knows the job's token may send: garbage, halves of messages, lengths that nobody has, right messages
//! with wrong numbers. The job goes on to the same bits and says who was refused.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use consort_collectives::link::Link;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::train::{Place, STEPS, Training, expected, send, wait};

/// Far more than the job's largest body.
const BODY: usize = 64 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Where the job's processes meet, and what lets one in.
struct Meeting {
    coordinator: String,
    token: Vec<u8>,
}

impl Meeting {
    fn read(place: &Place) -> Meeting {
        let path = place.out().join("job/meeting.json");
        wait("the meeting", || path.exists());
        let meeting: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let text = |key: &str| meeting[key].as_str().unwrap().to_owned();
        Meeting { coordinator: text("store"), token: text("token").into_bytes() }
    }

    /// Asks the coordinator, over a connection of its own.
    fn ask(&self, question: &Value) -> Value {
        let mut link = Link::connect(&self.coordinator, &self.token, BODY, soon()).unwrap();
        let answer = link.ask(question.to_string().as_bytes(), &[], soon()).unwrap();
        serde_json::from_slice(&answer.head).unwrap()
    }

    /// The coordinator, and the shards' primaries with their epochs.
    fn places(&self) -> (Vec<String>, Vec<(String, u64)>) {
        let mut routes = Vec::new();
        wait("servers", || self.ask(&json!("routes"))["routes"].as_array().is_some_and(|r| r.len() == 2));
        for route in self.ask(&json!("routes"))["routes"].as_array().unwrap() {
            routes.push((route["address"].as_str().unwrap().to_owned(), route["epoch"].as_u64().unwrap()));
        }
        let servers = routes.iter().map(|(address, _)| address.clone());
        (std::iter::once(self.coordinator.clone()).chain(servers).collect(), routes)
    }
}

/// What isn't even a message.
fn garbage(meeting: &Meeting, address: &str) {
    // A stranger, with and without TLS.
    let mut plain = TcpStream::connect(address).unwrap();
    let _ = plain.write_all(b"GET / HTTP/1.1\r\n\r\n");
    assert!(Link::connect(address, b"a token that somebody guessed", BODY, soon()).is_err());
    let connect = || Link::connect(address, &meeting.token, BODY, soon()).unwrap();
    let lengths = |head: u32, body: u64| [&head.to_le_bytes()[..], &body.to_le_bytes()[..]].concat();
    for bytes in [
        // Lengths that nobody has.
        lengths(u32::MAX, u64::MAX),
        lengths(2, u64::MAX),
        lengths(u32::MAX, 0),
        // Half a message, and nothing more.
        [lengths(100, 1000), b"{\"claim\":{\"wor".to_vec()].concat(),
        lengths(100, 1000)[..7].to_vec(),
    ] {
        connect().write_raw(&bytes, soon()).unwrap();
    }
    // Right lengths, and a head that makes no sense.
    let deep = "[".repeat(100_000);
    let heads =
        [&b"\xff\xfe\x00garbage"[..], b"", b"{}", b"{\"claim\":{\"worker\":-1}}", b"null", deep.as_bytes()];
    for head in heads {
        assert!(
            connect().ask(head, &[&[7; 100]], soon()).is_err(),
            "{:?} was answered",
            &head[..head.len().min(20)]
        );
    }
}

/// Right messages to a shard's primary, with what isn't right in them. `worker` and `group` are really one's own.
fn wrong_numbers(
    meeting: &Meeting,
    (shard, route): (usize, &(String, u64)),
    spec: &Value,
    worker: u64,
    claim: &Value,
) {
    let number = |key: &str| claim[key].as_u64().unwrap();
    let (group, attempt) = (number("group"), number("attempt"));
    let (address, epoch) = route;
    let bucket = spec["shards"][shard][0].as_u64().unwrap();
    let len = spec["buckets"][bucket as usize]["len"].as_u64().unwrap() as usize;
    let push = |bucket: u64, group: u64, attempt: u64, largest: f32, exponent: i64| {
        let terms = json!({"sums": {"exponent": exponent, "largest": largest.to_bits()}});
        let push =
            json!({"worker": worker, "group": group, "attempt": attempt, "bucket": bucket, "terms": terms});
        json!({"change": {"shard": shard, "epoch": epoch, "op": {"push": push}}})
    };
    let mut link = Link::connect(address, &meeting.token, BODY, soon()).unwrap();
    let mut ask = |head: &Value, body: &[u8]| {
        let answer = link.ask(head.to_string().as_bytes(), &[body], soon()).unwrap();
        serde_json::from_slice::<Value>(&answer.head).unwrap().to_string()
    };
    let right = vec![0u8; 8 * len];
    // Of another tensor: longer, shorter, not even numbers.
    for body in [&right[8..], &[&right[..], &[0; 800]].concat()[..], &right[..8 * len - 3], &[]] {
        let answer = ask(&push(bucket, group, attempt, 1.0, 40), body);
        assert!(answer.contains("refused") && answer.contains("bytes of sums"), "{answer}");
    }
    // Numbers that are none.
    for largest in [f32::NAN, f32::INFINITY] {
        let answer = ask(&push(bucket, group, attempt, largest, 40), &right);
        assert!(answer.contains("not_finite"), "{answer}");
    }
    for (foreign, what) in [
        (push(9999, group, attempt, 1.0, 40), "is not here"),
        (push(bucket, u64::MAX, attempt, 1.0, 40), "group 18446744073709551615 of"),
        (push(bucket, group, 4_000_000_000, 1.0, 40), "try 4000000000"),
        (push(bucket, group + 100, attempt, 1.0, 40), "is not over"),
    ] {
        let answer = ask(&foreign, &right);
        assert!(answer.contains("refused") && answer.contains(what), "{answer}");
    }
    let gradient = json!({"worker": worker, "group": group, "attempt": attempt, "bucket": bucket, "terms": {"gradient": {"scale": u64::MAX}}});
    let gradient = json!({"change": {"shard": shard, "epoch": epoch, "op": {"push": gradient}}});
    assert!(ask(&gradient, &right[..4 * len]).contains("refused"));
    // What isn't a worker's to say or to ask.
    for (head, expected) in [
        (json!({"pull": {"shard": 9999, "epoch": 0, "bucket": 0, "step": 0}}), "elsewhere"),
        (json!({"pull": {"shard": shard, "epoch": u64::MAX, "bucket": bucket, "step": 0}}), "elsewhere"),
        (
            json!({"replicate": {"shard": shard, "epoch": epoch, "log": 1, "op": {"fence": {"worker": 1}}}}),
            "elsewhere",
        ),
        (json!({"copy": {"shard": shard, "epoch": epoch, "part": 0, "head": [], "hash": "x"}}), "elsewhere"),
        (
            json!({"change": {"shard": shard, "epoch": epoch, "op": {"load": {"bucket": bucket, "step": 0, "updates": 0}}}}),
            "known",
        ),
    ] {
        let answer = ask(&head, &right);
        assert!(answer.contains(expected), "{head}: {answer}");
    }
    let fence = json!({"change": {"shard": shard, "epoch": epoch, "op": {"fence": {"worker": 1}}}});
    assert!(link.ask(fence.to_string().as_bytes(), &[], soon()).is_err(), "anybody may fence");
}

/// Speaks as a server or worker that there never was.
fn nobody(meeting: &Meeting) {
    for question in [
        json!({"claim": {"worker": u64::MAX}}),
        json!({"duty": {"server": u64::MAX, "version": 0}}),
        json!({"report": {"server": u64::MAX, "shard": 9999, "epoch": 1, "report": "suspect"}}),
        json!({"not_finite": {"worker": u64::MAX, "group": 0, "attempt": 0}}),
    ] {
        assert_eq!(meeting.ask(&question), json!("unknown"), "{question}");
    }
}

/// Joins as a worker, takes a group, and sends everything but what it should.
fn mallory(meeting: &Meeting, routes: &[(String, u64)]) {
    let spec = meeting.ask(&json!("job"))["job"]["spec"].clone();
    let mut link = Link::connect(&meeting.coordinator, &meeting.token, BODY, soon()).unwrap();
    let mut ask = |question: &Value| -> Value {
        let answer = link.ask(question.to_string().as_bytes(), &[], soon()).unwrap();
        serde_json::from_slice(&answer.head).unwrap()
    };
    let worker = ask(&json!({"join": {"name": "mallory"}}))["joined"]["worker"].as_u64().unwrap();
    let until = soon();
    let claim = loop {
        let told = ask(&json!({"claim": {"worker": worker}}));
        if told["grant"]["work"].is_object() {
            break told["grant"]["work"].clone();
        }
        assert!(Instant::now() < until, "{told}");
    };
    for (shard, route) in routes.iter().enumerate() {
        // It lives, so that nobody gives it up meanwhile.
        assert_eq!(ask(&json!({"beat": {"worker": worker}})), json!("fine"));
        wrong_numbers(meeting, (shard, route), &spec, worker, &claim);
    }
    nobody(meeting);
    let (group, attempt) = (&claim["group"], &claim["attempt"]);
    assert_eq!(
        ask(&json!({"not_finite": {"worker": worker, "group": group, "attempt": attempt}})),
        json!("fine")
    );
    // Its connection closes, and it is gone with what it had.
}

#[test]
fn who_sends_garbage_is_refused_by_name_and_the_job_goes_on() {
    let expected = expected();
    let place =
        Place::with(STEPS, |job| job.replace("[train]", "[train]\nsync = \"server\"\ndeadline = \"60s\""));
    let mut training: Training = place.train(&["--json", "--workers", "2"]);
    let honest = training.pid(1);
    // Before the first step, which waits for a second worker: that is Mallory at first.
    send(honest, Signal::STOP);
    let meeting = Meeting::read(&place);
    let (addresses, _) = meeting.places();
    addresses.iter().for_each(|address| garbage(&meeting, address));
    training.hear("each with a backup");
    let (_, routes) = meeting.places();
    mallory(&meeting, &routes);
    send(honest, Signal::CONT);
    // And while steps are taken.
    place.wait_for_step(5);
    addresses.iter().for_each(|address| garbage(&meeting, address));
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    for said in [
        "the launcher refused 127.0.0.1:",
        "server 0 refused 127.0.0.1:",
        "server 1 refused 127.0.0.1:",
        "server 0 refused mallory: bucket ",
        "refused mallory: its gradient is no number",
        "it didn't prove that it belongs to the job",
    ] {
        assert!(ended.errors.contains(said), "no {said:?} in:\n{}", ended.errors);
    }
    assert!(!ended.errors.contains("panicked"), "{}", ended.errors);
}
