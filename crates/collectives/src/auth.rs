//! Both ends of a new connection prove that they know the job's token, without sending it.
//!
//! ```text
//! connector → magic, version, purpose, nonce
//! acceptor  → magic, nonce, MAC(token, "accept", purpose, both nonces, binding)
//! connector → statement (who it is), MAC(token, "connect", purpose, both nonces, binding, statement)
//! acceptor  → 1
//! ```
//!
//! The MAC is keyed BLAKE3. A replay fails by its nonces, a reflection by the two roles' words. Over TLS the *binding* is
//! what only this session's two ends know, so a proof cannot be passed on through somebody in between; without TLS it
//! is zeros. The acceptor answers a stranger's nonce with a MAC, so a token must not be guessable: use at least 16
//! random bytes.

use std::io;
use std::time::Instant;

use crate::net::Stream;

const MAGIC: [u8; 4] = *b"CSC1";
const NONCE: usize = 16;
/// Bytes that a connector says about itself.
pub(crate) const STATEMENT: usize = 32;

/// A key made from the job's token.
#[derive(Clone)]
pub(crate) struct Key([u8; 32]);

/// What a connection is for; a proof for one purpose is none for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Purpose {
    Store = 1,
    Mesh = 2,
    Link = 3,
}

impl Key {
    pub(crate) fn new(token: &[u8]) -> Self {
        Self(blake3::derive_key("consort collectives 2026 join token", token))
    }

    fn mac(
        &self,
        role: &[u8],
        purpose: Purpose,
        nonces: [&[u8; NONCE]; 2],
        binding: &[u8; 32],
        statement: &[u8],
    ) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        // Roles have one length each and everything else is of fixed length, so no two inputs run together.
        hasher
            .update(role)
            .update(&[purpose as u8])
            .update(nonces[0])
            .update(nonces[1])
            .update(binding)
            .update(statement);
        hasher.finalize()
    }
}

fn nonce() -> io::Result<[u8; NONCE]> {
    let mut nonce = [0; NONCE];
    getrandom::fill(&mut nonce).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(nonce)
}

fn stranger(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, what)
}

/// The connector's side.
pub(crate) fn connect(
    stream: &Stream,
    key: &Key,
    purpose: Purpose,
    statement: &[u8; STATEMENT],
    deadline: Instant,
) -> io::Result<()> {
    let binding = stream.binding()?;
    let mine = nonce()?;
    let mut hello = [0; 8 + NONCE];
    hello[..4].copy_from_slice(&MAGIC);
    hello[4] = purpose as u8;
    hello[8..].copy_from_slice(&mine);
    stream.write_whole(&hello, deadline)?;
    let mut answer = [0; 4 + NONCE + 32];
    stream.read_all(&mut answer, Some(deadline))?;
    if answer[..4] != MAGIC {
        return Err(stranger("it is no store or worker of this version"));
    }
    let mut theirs = [0; NONCE];
    theirs.copy_from_slice(&answer[4..4 + NONCE]);
    let mut mac = [0; 32];
    mac.copy_from_slice(&answer[4 + NONCE..]);
    // Comparing two hashes takes the same time wherever they differ.
    if key.mac(b"accept", purpose, [&mine, &theirs], &binding, &[]) != blake3::Hash::from_bytes(mac) {
        // No proof at all, which tells nothing of the token: the other side knows then why this one goes.
        let _ = stream.write_whole(&[0; STATEMENT + 32], deadline);
        return Err(stranger("its token is another one"));
    }
    let mut proof = [0; STATEMENT + 32];
    proof[..STATEMENT].copy_from_slice(statement);
    let mac = key.mac(b"connect", purpose, [&mine, &theirs], &binding, statement);
    proof[STATEMENT..].copy_from_slice(mac.as_bytes());
    stream.write_whole(&proof, deadline)?;
    let mut welcome = [0];
    stream.read_all(&mut welcome, Some(deadline))?;
    Ok(())
}

/// The acceptor's side: what the connector says about itself.
pub(crate) fn accept(
    stream: &Stream,
    key: &Key,
    purpose: Purpose,
    deadline: Instant,
) -> io::Result<[u8; STATEMENT]> {
    let binding = stream.binding()?;
    let mut hello = [0; 8 + NONCE];
    stream.read_all(&mut hello, Some(deadline))?;
    if hello[..4] != MAGIC || hello[4] != purpose as u8 {
        return Err(stranger("it speaks something else"));
    }
    let mut theirs = [0; NONCE];
    theirs.copy_from_slice(&hello[8..]);
    let mine = nonce()?;
    let mut answer = [0; 4 + NONCE + 32];
    answer[..4].copy_from_slice(&MAGIC);
    answer[4..4 + NONCE].copy_from_slice(&mine);
    let mac = key.mac(b"accept", purpose, [&theirs, &mine], &binding, &[]);
    answer[4 + NONCE..].copy_from_slice(mac.as_bytes());
    stream.write_whole(&answer, deadline)?;
    let mut proof = [0; STATEMENT + 32];
    stream.read_all(&mut proof, Some(deadline))?;
    let mut statement = [0; STATEMENT];
    statement.copy_from_slice(&proof[..STATEMENT]);
    let mut mac = [0; 32];
    mac.copy_from_slice(&proof[STATEMENT..]);
    if key.mac(b"connect", purpose, [&theirs, &mine], &binding, &statement) != blake3::Hash::from_bytes(mac) {
        return Err(stranger("its token is another one"));
    }
    stream.write_whole(&[1], deadline)?;
    Ok(statement)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    fn meet(tokens: [&str; 2], purposes: [Purpose; 2]) -> (io::Result<()>, io::Result<[u8; STATEMENT]>) {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Stream::Unix(a), Stream::Unix(b));
        let deadline = Instant::now() + Duration::from_secs(5);
        let keys = tokens.map(|t| Key::new(t.as_bytes()));
        std::thread::scope(|scope| {
            let connector = scope.spawn(|| {
                let a = a;
                connect(&a, &keys[0], purposes[0], &[7; STATEMENT], deadline)
            });
            let accepted = {
                let b = b;
                accept(&b, &keys[1], purposes[1], deadline)
            };
            (connector.join().unwrap(), accepted)
        })
    }

    #[test]
    fn the_same_token_opens_and_another_does_not() {
        let (connected, accepted) = meet(["a", "a"], [Purpose::Mesh, Purpose::Mesh]);
        assert!(connected.is_ok());
        assert_eq!(accepted.unwrap(), [7; STATEMENT]);
        let (connected, accepted) = meet(["a", "b"], [Purpose::Mesh, Purpose::Mesh]);
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(accepted.is_err());
        let (connected, accepted) = meet(["a", "a"], [Purpose::Store, Purpose::Mesh]);
        assert!(connected.is_err() && accepted.is_err());
    }
}
