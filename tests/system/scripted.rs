//! A candidate that is broken by script, below a real `consort up`.
//!
//! `consort up` starts its replicas by starting its own program again. Here that program is replaced once it runs, as an
//! upgrade would, by a shell script: for every model but one it is the program still, for that one it says that it listens
//! where a thread of the test does. Health checks are answered as a replica would; answers are what the script says.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::replica::model;
use crate::up::{Up, start_program};

/// How the candidate answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Candidate {
    /// 500.
    Fails,
    /// Not at all.
    Hangs,
    /// With signs of life and nothing else.
    Dawdles,
    /// With one token, and then the connection ends.
    Breaks,
    /// 400, whatever is asked.
    Refuses,
}

/// A `consort up` with one real replica whose candidate, `scripted.gguf` in its folder, answers by script.
pub(crate) fn up(file: &str, candidate: Candidate) -> (Up, PathBuf) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            // A connection that breaks is its client's to notice.
            thread::spawn(move || serve(&client, candidate));
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let (program, source) = (folder.path().join("consort"), folder.path().join("scripted.gguf"));
    let real = Path::new(env!("CARGO_BIN_EXE_consort"));
    for (from, to) in [(real, &program), (&model(), &source)] {
        fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(|_| ())).unwrap();
    }
    let config = folder.path().join("consort.toml");
    fs::write(&config, file.replace("{model}", model().to_str().unwrap())).unwrap();
    let up = start_program(&program, folder, &[config.to_str().unwrap()], &[]);
    fs::write(up.folder.path().join("script"), script(real, address)).unwrap();
    let script = up.folder.path().join("script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(script, program).unwrap();
    (up, source)
}

fn script(real: &Path, address: SocketAddr) -> String {
    format!(
        "#!/bin/sh\ncase \"$*\" in\n*scripted.gguf*)\n\
         \x20 echo '{{\"event\":\"listening\",\"address\":\"{address}\"}}'\n  echo '{{\"event\":\"ready\"}}'\n\
         \x20 exec cat >/dev/null ;;\n*) exec {real:?} \"$@\" ;;\nesac\n"
    )
}

/// Answers the requests of one connection, one after the other.
fn serve(client: &TcpStream, candidate: Candidate) -> Option<()> {
    let mut reader = BufReader::new(client.try_clone().ok()?);
    loop {
        let (mut head, mut line) = (String::new(), String::new());
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            head += &line.to_ascii_lowercase();
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.trim().parse().unwrap())];
        reader.read_exact(&mut body).ok()?;
        if head.starts_with("get /ready") {
            whole(client, 200, r#"{"status":"ready","model":"smol","system_fingerprint":"scripted"}"#)?;
        } else if head.starts_with("post /v1/") {
            answer(client, candidate)?;
        } else {
            whole(client, 200, r#"{"object":"list","data":[]}"#)?;
        }
    }
}

fn whole(mut client: &TcpStream, status: u16, body: &str) -> Option<()> {
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    client.write_all((head + body).as_bytes()).ok()
}

fn answer(mut client: &TcpStream, candidate: Candidate) -> Option<()> {
    let error = |kind: &str| format!(r#"{{"error":{{"message":"by script","type":"{kind}","code":"x"}}}}"#);
    let mut say = |text: &str| client.write_all(text.as_bytes()).ok();
    let event = |data: &str| format!("{:x}\r\n{data}\n\n\r\n", data.len() + 2);
    let chunk =
        |rest: &str| event(&format!(r#"data: {{"system_fingerprint":"scripted","choices":[{rest}]}}"#));
    const STREAM: &str =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    match candidate {
        Candidate::Fails => whole(client, 500, &error("server_error")),
        Candidate::Refuses => whole(client, 400, &error("invalid_request_error")),
        Candidate::Hangs => {
            // Until whoever asked gives up.
            client.read_exact(&mut [0; 1]).ok()?;
            None
        }
        Candidate::Dawdles => {
            say(STREAM)?;
            loop {
                say(&event(": keep-alive"))?;
                thread::sleep(Duration::from_millis(100));
            }
        }
        Candidate::Breaks => {
            say(STREAM)?;
            say(&chunk(r#"{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}"#))?;
            say(&chunk(r#"{"index":0,"delta":{"content":"Wrong"},"finish_reason":null,"token_ids":[5]}"#))?;
            None
        }
    }
}
