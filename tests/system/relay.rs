//! A wire between a gateway and a replica that breaks where a request says it shall.
//!
//! A request's field `user` (which replicas ignore) names the faults, one an attempt: `cut:17,silent:3` cuts the
//! first attempt's stream behind its 17th event, lets the second fall silent behind its third, and leaves further
//! attempts alone. So every place of every stream can be broken without starting a process for it, and many requests
//! can be broken at the same time.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What happens to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection ends.
    Cut,
    /// It ends in the middle of the next event.
    Half,
    /// An event that is none.
    Garbage,
    /// Bytes that aren't even HTTP.
    Noise,
    /// Nothing more comes, and the connection stays.
    Silent,
}

impl Fault {
    pub(crate) const ALL: [Fault; 5] = [Fault::Cut, Fault::Half, Fault::Garbage, Fault::Noise, Fault::Silent];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Fault::Cut => "cut",
            Fault::Half => "half",
            Fault::Garbage => "garbage",
            Fault::Noise => "noise",
            Fault::Silent => "silent",
        }
    }
}

/// Attempts seen of each `user`; shared by the relays of one fleet.
#[derive(Clone, Default)]
pub(crate) struct Faults(Arc<Mutex<HashMap<String, usize>>>);

impl Faults {
    /// The fault of this attempt, with the events before it. `field` is `name#fault:events,fault:events`.
    fn next(&self, field: &str) -> Option<(Fault, usize)> {
        let mut seen = self.0.lock().unwrap();
        let attempts = seen.entry(field.to_owned()).or_default();
        let mine = field.split_once('#')?.1.split(',').nth(*attempts)?;
        let (name, events) = mine.split_once(':').expect("a fault and a number of events");
        let fault = Fault::ALL.into_iter().find(|fault| fault.name() == name).expect("a fault's name");
        *attempts += 1;
        Some((fault, events.parse().unwrap()))
    }

    /// How many attempts with a fault were seen of `field`.
    pub(crate) fn suffered(&self, field: &str) -> usize {
        self.0.lock().unwrap().get(field).copied().unwrap_or(0)
    }
}

/// Starts a relay to `replica`; it lives as long as the test's process.
pub(crate) fn start(replica: SocketAddr, faults: &Faults) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let faults = faults.clone();
    thread::spawn(move || {
        for client in listener.incoming() {
            let faults = faults.clone();
            thread::spawn(move || {
                // A dead replica is a closed connection, as it would be without a relay.
                if let (Ok(client), Ok(server)) = (client, TcpStream::connect(replica)) {
                    relay(client, server, &faults);
                }
            });
        }
    });
    address
}

fn relay(mut client: TcpStream, mut server: TcpStream, faults: &Faults) {
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let next: Arc<Mutex<Option<(Fault, usize)>>> = Arc::default();
    let there = {
        let (mut client, mut server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let (next, faults) = (next.clone(), faults.clone());
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count) = client.read(&mut buffer) {
                // Requests of these tests fit one read.
                if let Some(field) = user(&buffer[..count]) {
                    *next.lock().unwrap() = faults.next(&field);
                }
                if count == 0 || server.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = server.shutdown(Shutdown::Both);
        })
    };
    let mut buffer = vec![0; 64 << 10];
    let mut events = 0;
    while let Ok(count) = server.read(&mut buffer) {
        if count == 0 {
            break;
        }
        let mut bytes = &buffer[..count];
        let fault = *next.lock().unwrap();
        if let Some((fault, after)) = fault {
            match end_of_event(bytes, after.saturating_sub(events), after == 0) {
                Ok(end) => {
                    let rest = bytes.len() - end;
                    bytes = &bytes[..end];
                    let _ = client.write_all(bytes);
                    break_off(fault, &mut client, &buffer[end..end + rest / 2], &mut server, after);
                    break;
                }
                Err(passed) => events += passed,
            }
        }
        if client.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
    let _ = there.join();
}

/// Behind the `wanted`-th end of an event within `bytes`, or how many there are. With `at_head`, behind the response's
/// head.
fn end_of_event(bytes: &[u8], wanted: usize, at_head: bool) -> Result<usize, usize> {
    if at_head {
        return bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4).ok_or(0);
    }
    let ends: Vec<usize> =
        bytes.windows(2).enumerate().filter(|(_, w)| w == b"\n\n").map(|(at, _)| at + 2).collect();
    ends.get(wanted - 1).copied().ok_or(ends.len())
}

fn break_off(fault: Fault, client: &mut TcpStream, half: &[u8], server: &mut TcpStream, after: usize) {
    let _ = match fault {
        Fault::Cut => Ok(()),
        // Behind an event comes the end of its HTTP chunk, then the beginning of the next one.
        Fault::Half if half.is_empty() => client.write_all(b"\r\n40\r\ndata: {\"id\":\"chatcmpl-"),
        Fault::Half => client.write_all(half),
        Fault::Garbage if after == 0 => client.write_all(b"d\r\ndata: {\"x\":\n\n\r\n"),
        Fault::Garbage => client.write_all(b"\r\nd\r\ndata: {\"x\":\n\n\r\n"),
        Fault::Noise => client.write_all(b"\x00\xff\x80 no chunk at all \x1b"),
        Fault::Silent => {
            // The replica is told that nobody listens; the gateway is told nothing.
            let _ = server.shutdown(Shutdown::Both);
            let mut rest = [0; 1024];
            while client.read(&mut rest).is_ok_and(|count| count > 0) {}
            Ok(())
        }
    };
}

/// The field `user` of a request.
fn user(request: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(request);
    let rest = text.split_once("\"user\":\"")?.1;
    Some(rest.split_once('"')?.0.to_owned())
}
