//! The command with a real model: answers, conversations, servers and signals.
//!
//! Needs `CONSORT_TEST_SMOLLM2`, the path of SmolLM2-135M-Instruct's Q4_1 file; without it these tests fail.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // Also in helpers, which the lints don't count as tests.
#![cfg(unix)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Consort, err, model, out};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn only_the_answer_is_on_standard_output_and_it_repeats() {
    let model = model();
    let (consort, model) = (Consort::new(), model.to_str().unwrap().to_string());
    let arguments =
        ["run", &model, "What is the capital of France?", "--max-tokens", "12", "--temperature", "0"];
    let first = consort.run(&arguments);
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    let answer = out(&first);
    assert!(answer.trim().len() > 5 && answer.ends_with('\n'), "{answer:?}");
    assert!(!err(&first).contains(answer.trim()), "{}", err(&first));
    // Piped, the same prompt gives the same bytes.
    let piped = consort.run_with_input(
        &["run", &model, "--max-tokens", "12", "--temperature", "0"],
        b"What is the capital of France?\n",
    );
    assert_eq!(out(&piped), out(&first));
}

#[test]
fn json_says_everything_and_a_seed_repeats() {
    let model = model();
    let (consort, model) = (Consort::new(), model.to_str().unwrap().to_string());
    let ask = |seed: &str, threads: &str| -> Value {
        let output = consort.run(&[
            "run",
            &model,
            "Tell me a story.",
            "--max-tokens",
            "24",
            "--temperature",
            "1",
            "--seed",
            seed,
            "--threads",
            threads,
            "--json",
        ]);
        assert_eq!(output.status.code(), Some(0), "{}", err(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let one = ask("7", "1");
    assert_eq!(one["text"], ask("7", "2")["text"]);
    assert_ne!(one["text"], ask("8", "2")["text"]);
    assert_eq!(one["seed"], 7);
    assert_eq!(one["finish_reason"], "length");
    assert_eq!(one["usage"]["completion_tokens"], 24);
    assert!(one["usage"]["prompt_tokens"].as_u64().unwrap() > 4);
    assert!(one["system_fingerprint"].as_str().unwrap().len() > 8);
    assert!(one["timings"]["start_to_first_token_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_reader_that_has_enough_ends_the_answer_quietly() {
    let model = model();
    let consort = Consort::new();
    let mut child = consort
        .command(&["run", model.to_str().unwrap(), "Write a very long story.", "--max-tokens", "2000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(!err(&output).contains("error"), "{}", err(&output));
}

#[test]
fn a_prompt_past_the_context_is_refused_with_the_numbers() {
    let model = model();
    let consort = Consort::new();
    let output = consort.run_with_input(&["run", model.to_str().unwrap()], "river ".repeat(9000).as_bytes());
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    assert!(err(&output).contains("8192"), "{}", err(&output));
}

/// A conversation in a terminal of its own.
struct Terminal {
    child: Child,
    master: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    #[cfg(target_os = "linux")]
    fn start(consort: &Consort, arguments: &[&str]) -> Terminal {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        // Wide enough that the line editor never wraps, and so never draws what was typed a second time.
        let size = rustix::termios::Winsize { ws_row: 50, ws_col: 400, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let side = || File::options().read(true).write(true).open(&name).unwrap();
        // `setsid --ctty` makes the terminal the process's own, so that Ctrl-C is a signal to it and nobody else.
        let mut command = Command::new("setsid");
        consort.environment(&mut command);
        let child = command
            .arg("--ctty")
            .arg(env!("CARGO_BIN_EXE_consort"))
            .args(arguments)
            .env("TERM", "xterm")
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The terminal's other end is gone when reading fails.
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal { child, master, screen, seen: String::new() }
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads the screen until `wanted` holds of what came since the last call.
    fn until(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + PATIENCE;
        while !wanted(&self.seen) {
            let left = end.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("waited for {what}; the screen says: {}", self.seen),
            }
        }
        std::mem::take(&mut self.seen)
    }

    fn ends(mut self) -> i32 {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap();
            }
            assert!(Instant::now() < end, "the program doesn't end");
            // Its output must be taken, or it can't.
            let _ = self.screen.recv_timeout(Duration::from_millis(20));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Only where a test failed half-way: the program would go on computing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the editor took the keyboard (it turns bracketed paste on) after the last `text`. What is typed before
/// that is lost, as it would be for a person.
#[cfg(target_os = "linux")]
fn listens_after(screen: &str, text: &str) -> bool {
    screen.rsplit_once(text).is_some_and(|(_, rest)| rest.contains("\u{1b}[?2004h"))
}

#[cfg(target_os = "linux")]
#[test]
fn in_a_conversation_control_c_stops_the_answer_and_not_the_program() {
    let model = model();
    let consort = Consort::new();
    let mut terminal = Terminal::start(&consort, &["run", model.to_str().unwrap(), "--temperature", "0"]);
    terminal.until("the prompt", |s| listens_after(s, "Ctrl-D ends"));
    terminal.press("/help\r");
    terminal.until("the help", |s| s.contains("/reset") && listens_after(s, "Ctrl-C"));
    terminal.press("Write a very long story.\r");
    terminal.until("some of the answer", |s| s.rsplit_once("story.").is_some_and(|(_, a)| a.len() > 80));
    terminal.press("typed meanwhile\u{3}");
    let stopped = terminal.until("word of the stop", |s| listens_after(s, "(stopped)"));
    assert!(!stopped.contains("meanwhile") && !stopped.contains("^C"), "{stopped}");
    terminal.press("/reset\r");
    terminal.until("word of the reset", |s| listens_after(s, "a new conversation"));
    terminal.press("/stats\r");
    terminal.until("word of the figures", |s| listens_after(s, "figures on"));
    terminal.press("Say one word.\r");
    terminal.until("figures of an answer after a stopped one", |s| {
        s.contains("first token") && listens_after(s, "seed")
    });
    terminal.press("/nonsense\r");
    terminal.until("word of the mistake", |s| listens_after(s, "no command"));
    // Ctrl-C at the prompt neither.
    terminal.press("\u{3}");
    terminal.until("the hint", |s| listens_after(s, "Ctrl-D"));
    terminal.press("\u{4}");
    assert_eq!(terminal.ends(), 0);
}

/// A server and the line it printed once ready.
struct Server {
    child: Child,
    ready: Value,
}

impl Server {
    fn start(consort: &Consort, arguments: &[&str]) -> Server {
        let mut child = consort.command(arguments).arg("--json").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        Server { child, ready }
    }

    fn request(&self, method: &str, path: &str, key: Option<&str>, body: &str) -> (u16, String) {
        let address = self.ready["url"].as_str().unwrap().strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let key = key.map(|k| format!("authorization: Bearer {k}\r\n")).unwrap_or_default();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\n{key}content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let status = response.split(' ').nth(1).unwrap().parse().unwrap();
        (status, response)
    }

    /// Tells it to stop and returns its exit status.
    fn stop(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

const CHAT: &str = r#"{"model":"any","messages":[{"role":"user","content":"Hi"}],"max_tokens":3}"#;

#[test]
fn a_server_says_where_it_is_and_ends_cleanly_when_told() {
    let model = model();
    let consort = Consort::new();
    let server = Server::start(
        &consort,
        &["serve", model.to_str().unwrap(), "--port", "0", "--name", "small", "--ctx", "512"],
    );
    assert_eq!(server.ready["model"], "small");
    assert_eq!(server.ready["max_context"], 512);
    assert_eq!(server.ready["api_key"], Value::Null);
    let (status, body) = server.request("POST", "/v1/chat/completions", None, &CHAT.replace("any", "small"));
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(server.ready["fingerprint"].as_str().unwrap()), "{body}");
    let (status, page) = server.request("GET", "/", None, "");
    assert!(status == 200 && page.contains("<title>Consort</title>") && page.contains("sha256-"));
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn beyond_loopback_the_key_that_was_made_is_shown_and_demanded() {
    let model = model();
    let consort = Consort::new();
    let server = Server::start(
        &consort,
        &["serve", model.to_str().unwrap(), "--port", "0", "--host", "0.0.0.0", "--name", "any"],
    );
    let key = server.ready["api_key"].as_str().unwrap().to_string();
    assert!(key.len() > 40, "{key}");
    assert_eq!(server.request("POST", "/v1/chat/completions", None, CHAT).0, 401);
    assert_eq!(server.request("POST", "/v1/chat/completions", Some("sk-wrong-key"), CHAT).0, 401);
    let (status, body) = server.request("POST", "/v1/chat/completions", Some(&key), CHAT);
    assert_eq!(status, 200, "{body}");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn up_moves_from_a_taken_port_and_its_curl_line_works_as_pasted() {
    let model = model();
    let consort = Consort::new();
    // Held by this test, or by whoever has it already: taken either way.
    let _taken = TcpListener::bind("127.0.0.1:8080");
    let mut child = consort
        .command(&["up", "--model", model.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let curl = lines.by_ref().map(|l| l.unwrap()).find(|l| l.trim_start().starts_with("curl ")).unwrap();
    assert!(!curl.contains(":8080/"), "{curl}");
    if Command::new("curl").arg("--version").output().is_ok() {
        let output = Command::new("sh").args(["-c", &curl]).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(answer["choices"][0]["message"]["content"].is_string(), "{answer}");
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(err(&output).contains("port 8080 is taken"), "{}", err(&output));
}
