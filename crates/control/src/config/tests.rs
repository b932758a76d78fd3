use consort_api::deployment::Balancing;

use super::*;

fn refused(source: &str) -> String {
    read("consort.toml", source).unwrap_err().to_string()
}

const WHOLE: &str = include_str!("../../../../examples/consort.toml");

#[test]
fn the_example_is_accepted_and_says_what_it_means() {
    let read = read("examples/consort.toml", WHOLE).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(read, Deployment::of("chat", "smollm2-135m-instruct", 2), "the example shows the defaults");
    // What stands there as a comment is right too, where it is no alternative to something else.
    let mut all = String::new();
    for line in WHOLE.lines() {
        let bare = line.strip_prefix("# ").filter(|l| l.starts_with('[') || l.contains(" = "));
        all += bare.filter(|l| !l.starts_with("self_signed")).unwrap_or(line);
        all.push('\n');
    }
    let all = super::read("examples/consort.toml", &all).unwrap_or_else(|e| panic!("{e}"));
    assert!(all.tls.is_some() && all.models[0].canary.is_some());
}

#[test]
fn the_shortest_file_has_the_defaults() {
    let read = read("f", "[models.chat]\nsource = \"smollm2-135m-instruct\"\n").unwrap();
    assert_eq!(read, Deployment::of("chat", "smollm2-135m-instruct", 1));
}

#[test]
fn a_way_to_balance_is_one_of_four() {
    let file = |way: &str| format!("balancing = {way}\n[models.chat]\nsource = \"x\"\n");
    let read = read("f", &file("\"least_requests\"")).unwrap();
    assert_eq!(read.balancing, Balancing::LeastRequests);
    let said = refused(&file("\"fastest\""));
    assert!(said.contains("no such way") && said.contains("\"round_robin\""), "{said}");
    assert!(refused(&file("3")).contains("expected a string"));
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let said = refused("[models.chat]\nsource = \"x\"\nreplcas = 2\n");
    let expected = "\
error: unknown key `replcas`
 --> consort.toml:3:1
  |
3 | replcas = 2
  | ^^^^^^^ [models.chat] has no such key
  |
  = help: did you mean `replicas`?

consort.toml was not accepted: 1 error";
    assert_eq!(said, expected);
    assert!(refused("zzz = 1\n[models.a]\nsource = \"x\"\n").contains("the keys here are allowed_hosts, "));
    assert!(
        refused("[models.a]\nsource = \"x\"\nautoscale.tolrance = 1\n").contains("did you mean `tolerance`?")
    );
}

#[test]
fn every_mistake_is_shown_at_its_place() {
    let source = "\
listen = 8080
[timeouts]
try = 30
route = \"soon\"
[retries]
budget = 3
[tls]
certificate = \"a.pem\"
[models.chat]
source = \"x\"
replicas = { min = 4, max = 2 }
kv_cache = \"lots\"
threads = \"two\"
prefix_cache = 1
[models.\"white space\"]
source = \"x\"
[models.other]
";
    let problems = read("f", source).unwrap_err();
    let lines: Vec<_> = problems.places.iter().map(|p| p.0).collect();
    assert_eq!(lines, [1, 3, 4, 6, 8, 11, 12, 13, 14, 15, 17], "{problems}");
    for said in [
        "expected a string, found a whole number",
        "this number has no unit",
        "this is no time",
        "must be from 0 to 1",
        "its private key is missing",
        "`min` is 4 and `max` is 2",
        "this is no number of bytes",
        "has no `source`",
    ] {
        assert!(problems.to_string().contains(said), "{said} is missing in\n{problems}");
    }
}

#[test]
fn deadlines_that_cannot_hold_each_other_are_refused_where_they_stand() {
    let with = |timeouts: &str| refused(&format!("[timeouts]\n{timeouts}\n[models.a]\nsource = \"x\"\n"));
    let said = with("try = \"5m\"\nroute = \"1m\"");
    assert!(said.contains("consort.toml:2:7"), "{said}");
    assert!(said.contains("`try` (5m) is longer than `route` (1m)"), "{said}");
    assert!(said.contains("help: make `try` at most 1m, or `route` at least 5m"), "{said}");
    for (timeouts, pair) in [
        ("connect = \"50s\"\ntry = \"40s\"", "`connect` (50s) is longer than `try` (40s)"),
        ("route = \"20m\"", "`route` (20m) is longer than `drain` (11m)"),
        ("drain = \"10s\"", "`route` (10m) is longer than `drain` (10s)"),
        ("token = \"30m\"", "`token` (30m) is longer than `route` (10m)"),
        ("start = \"1s\"", "`probe` (5s) is longer than `start` (1s)"),
    ] {
        let said = with(timeouts);
        assert!(said.contains(pair), "{pair} is missing in\n{said}");
        assert!(said.ends_with("1 error"), "one mistake is said once:\n{said}");
    }
    let hedge = "[hedging]\nenabled = true\nafter = \"2m\"\n[models.a]\nsource = \"x\"\n";
    assert!(refused(hedge).contains("hedging that can't happen"));
    let t = Timeouts::default();
    assert!(t.connect <= t.attempt && t.attempt <= t.route && t.route <= t.drain);
    assert!(t.token <= t.route && t.probe <= t.start && t.probe <= t.step);
}

#[test]
fn an_open_door_needs_keys() {
    let model = "[models.a]\nsource = \"x\"\n";
    assert!(refused(&format!("listen = \"0.0.0.0:8080\"\n{model}")).contains("consort key create"));
    assert!(refused(&format!("listen = \"[::]:8080\"\n{model}")).contains("no key is required"));
    for fine in ["127.0.0.1:1", "localhost:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        read("f", &format!("listen = \"{fine}\"\n{model}")).unwrap();
    }
    read("f", &format!("listen = \"0.0.0.0:8080\"\nkeys.required = true\n{model}")).unwrap();
}

#[test]
fn a_canary_begins_with_its_incumbents_settings() {
    let source = "[models.a]\nsource = \"x\"\nthreads = 3\nreplicas = 4\n[models.a.canary]\nsource = \"y\"\nweight = 10\n";
    let read = read("f", source).unwrap();
    let canary = read.models[0].canary.as_ref().unwrap();
    assert_eq!((canary.weight, canary.version.threads, canary.version.min), (10, Some(3), 1));
    assert_eq!((canary.version.name.as_str(), canary.version.source.as_str()), ("canary", "y"));
    assert!(refused(&format!("{source}version = \"stable\"\n")).contains("both versions"));
}

#[test]
fn nothing_a_file_holds_can_panic() {
    for source in [
        "",
        "\0",
        "=",
        "[",
        "[[models]]",
        "models = 3",
        "[models]\n",
        "models.a = 1",
        "[models.a]\nsource = 3",
        "\u{feff}[models.a]\nsource='x'",
    ] {
        let _ = read("f", source).map_err(|e| e.to_string());
    }
    let deep = format!("a = {}1{}", "[".repeat(10_000), "]".repeat(10_000));
    assert!(read("f", &deep).is_err());
    assert!(read("f", &"#\n".repeat(MOST_BYTES)).unwrap_err().to_string().contains("bytes"));
}

proptest::proptest! {
    #[test]
    fn any_damage_to_the_example_is_answered(at in 0usize..4000, with in ".{0,3}") {
        let mut source = WHOLE.to_owned();
        let mut at = at.min(source.len());
        while !source.is_char_boundary(at) { at -= 1; }
        let end = source[at..].char_indices().nth(2).map_or(source.len(), |(n, _)| at + n);
        source.replace_range(at..end, &with);
        let _ = read("f", &source).map_err(|e| e.to_string());
    }
}
