//! Waking by sockets those who sleep in a poll.
//!
//! A rank that listens to sockets of other hosts too can't sleep on a futex. It says so, and whoever moves a head or tail
//! that it may wait for writes a byte to it. The first to see that it sleeps is the only one to write: a sleep costs one
//! byte, however many pieces come meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use super::mapping::{Mapping, Sleep};
use crate::error::Error;
use crate::net::{Interest, Stream};

/// A socket to each of the other ranks of the host.
pub(super) struct Bells(Vec<Option<Stream>>);

impl Bells {
    pub(super) fn new(sockets: Vec<Option<Stream>>) -> Result<Self, Error> {
        for socket in sockets.iter().flatten() {
            socket.set_nonblocking(true).map_err(|e| Error::system("set up a local socket", &e))?;
        }
        Ok(Self(sockets))
    }

    /// Wakes `peer`, unless somebody has.
    pub(super) fn ring(&self, map: &Mapping, peer: usize) {
        let (poll, awake) = (Sleep::Poll as u32, Sleep::Awake as u32);
        let first =
            map.asleep(peer).compare_exchange(poll, awake, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if let (true, Some(socket)) = (first, &self.0[peer]) {
            // A full socket wakes as well; of one that is closed the control plane knows.
            let _ = (&mut &*socket).write(&[1]);
        }
    }

    /// What to poll for.
    pub(super) fn interests(&self) -> impl Iterator<Item = Interest> + '_ {
        self.0.iter().flatten().map(|bell| Interest { fd: bell.as_raw_fd(), read: true, write: false })
    }

    /// Takes what was written. A bell whose other end is closed is taken down: it would ring for ever.
    pub(super) fn silence(&mut self) {
        for bell in &mut self.0 {
            let Some(socket) = bell else { continue };
            let mut bytes = [0; 64];
            loop {
                match (&mut &*socket).read(&mut bytes) {
                    Ok(0) => {
                        *bell = None;
                        break;
                    }
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => {
                        if error.kind() != ErrorKind::WouldBlock {
                            *bell = None;
                        }
                        break;
                    }
                }
            }
        }
    }
}
