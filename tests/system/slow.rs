//! Clients that send a byte at a time, and one that reads nothing: they are cut off, and others don't notice.
//!
//! That takes the half minute for which they are borne, in which next to nothing is computed.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{connect, request, stream};
use crate::hostile::{CHAT, ROOM};
use crate::replica::{Lane, chat, serve_in};

/// Both kinds of slow client at once, because both tests would mostly wait: 60 that send a header a byte at a time,
/// and one that asks for a long answer and reads nothing of it.
#[test]
fn slow_clients_are_cut_off_and_others_feel_nothing() {
    /// "closed within 30 s", and a little for a busy machine.
    const SLOWLORIS_LIMIT: Duration = Duration::from_secs(35);
    let mut replica = serve_in(Lane::Waits, &[]);
    replica.must_answer();
    let before = replica.settled_memory();

    // 20 alternatives a token make some kilobytes of each event, and eight answers at once fill what sockets buffer.
    let mut body = chat("Count to a million.", 7000);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(20);
    body["n"] = json!(8);
    let mut deaf = stream(replica.address, CHAT, &body).unwrap();
    assert_eq!(deaf.status, 200);
    deaf.next().unwrap();

    let opened = Instant::now();
    let mut slow: Vec<_> = (0..60)
        .map(|_| {
            let stream = connect(replica.address).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            Some(stream)
        })
        .collect();
    let text = request("POST", CHAT, replica.address, b"{}");
    let mut sent = 0;
    let mut answered = 0;
    while slow.iter().any(Option::is_some) {
        assert!(opened.elapsed() < SLOWLORIS_LIMIT, "slow clients still hold their connections");
        for slot in &mut slow {
            let Some(stream) = slot else { continue };
            let mut byte = [0; 256];
            let closed = stream.write_all(&text[sent..=sent]).is_err()
                || match stream.read(&mut byte) {
                    Ok(_) => true,
                    Err(e) => !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
                };
            if closed {
                *slot = None;
            }
        }
        sent += 1;
        assert!(sent < text.len() - 4, "the headers came to their end: send slower");
        replica.must_answer();
        answered += 1;
        std::thread::sleep(Duration::from_millis(400));
    }
    println!(
        "60 slow clients were gone after {:.1?}; {answered} healthy requests meanwhile",
        opened.elapsed()
    );
    replica.await_that("the client that doesn't read is cut off", |r| r.metric("consort_running") == 0.0);
    println!("the client that doesn't read was gone after {:.1?}", opened.elapsed());
    let after = replica.settled_memory();
    assert!(after < before + ROOM, "memory went from {before} to {after} bytes");
    replica.must_answer();
    drop(deaf);
}
