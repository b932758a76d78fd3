//! Wires between workers on which something happens behind the n-th byte of everything that they say to each other.
//!
//! Every worker is found at a relay that passes its connections on. All relays count together, in the order in which bytes
//! go over: so a number is a place in the job's traffic, most often in the middle of a message. The bytes before it have
//! arrived, those behind it haven't, when it happens.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What happens.
pub enum Strike {
    /// Nothing.
    Never,
    /// The connection that carries the byte ends, for both of its ends.
    Cut { behind: u64 },
    /// This runs, while the rest of the message waits.
    Call { behind: u64, call: Box<dyn FnOnce() + Send> },
}

/// Wires that count together.
#[derive(Clone)]
pub struct Wires(Arc<Mutex<State>>);

struct State {
    bytes: u64,
    strike: Strike,
    struck: bool,
}

impl Wires {
    pub fn new() -> Wires {
        Wires(Arc::new(Mutex::new(State { bytes: 0, strike: Strike::Never, struck: false })))
    }

    /// What shall happen, before the first byte.
    pub fn plan(&self, strike: Strike) {
        self.0.lock().unwrap().strike = strike;
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.0.lock().unwrap().bytes
    }

    /// Whether it happened.
    pub fn struck(&self) -> bool {
        self.0.lock().unwrap().struck
    }

    /// An address for a worker to listen on, and the one of a relay to it; both live as long as the test's process.
    pub fn place(&self) -> (SocketAddr, SocketAddr) {
        // A free port; somebody else may take it before the worker does, which a test would see as a worker that fails.
        let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let advertise = listener.local_addr().unwrap();
        let wires = self.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // A worker that is gone is a closed connection, as it would be without a relay.
                let Ok(server) = TcpStream::connect(listen) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    to.set_nodelay(true).unwrap();
                    let wires = wires.clone();
                    thread::spawn(move || wires.carry(from, to));
                }
            }
        });
        (listen, advertise)
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count) = from.read(&mut buffer) {
            if count == 0 || !self.pass(&buffer[..count], &mut to) {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    /// Passes bytes on, one connection after the other; whether the connection goes on.
    fn pass(&self, bytes: &[u8], to: &mut TcpStream) -> bool {
        let before = {
            let mut state = self.0.lock().unwrap();
            let behind = match &state.strike {
                Strike::Never => u64::MAX,
                Strike::Cut { behind } | Strike::Call { behind, .. } => *behind,
            };
            let first = state.bytes;
            state.bytes += bytes.len() as u64;
            if behind >= state.bytes || behind < first {
                None
            } else {
                state.struck = true;
                let strike = std::mem::replace(&mut state.strike, Strike::Never);
                Some(((behind - first) as usize, strike))
            }
        };
        // Nobody holds the lock while it writes: a receiver that is slow holds up its own wire alone.
        match before {
            None => to.write_all(bytes).is_ok(),
            Some((before, strike)) => {
                let _ = to.write_all(&bytes[..before]);
                match strike {
                    Strike::Call { call, .. } => {
                        call();
                        to.write_all(&bytes[before..]).is_ok()
                    }
                    Strike::Cut { .. } | Strike::Never => false,
                }
            }
        }
    }
}
