//! Asks the running `consort up` of this user, through the door that it wrote down in the state folder.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;

use crate::up::{ADMIN_FILE, Door};

/// An answer is here within this; it comes from this machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of an answer.
const ANSWER: usize = 16 << 20;

/// The running `up`, or `None` where there is none.
pub(crate) fn find(folder: &Path) -> Result<Option<Client>> {
    let path = folder.join(ADMIN_FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("can't read {}", path.display())),
    };
    let door: Door =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    // One that was killed left the file behind; its socket is gone.
    if std::net::TcpStream::connect_timeout(&door.address, Duration::from_secs(2)).is_err() {
        return Ok(None);
    }
    Ok(Some(Client { door }))
}

/// A running `up`.
pub(crate) struct Client {
    door: Door,
}

impl Client {
    /// Reads something.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send(Method::GET, path, Bytes::new())
    }

    /// Changes something.
    pub(crate) fn send<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("can't start the HTTP runtime")?;
        let asking = async { tokio::time::timeout(PATIENCE, self.ask(method, path, body)).await };
        let (status, body) = runtime.block_on(asking).context("consort up doesn't answer")??;
        if !status.is_success() {
            let said: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            bail!("consort up says: {}", said["error"].as_str().unwrap_or(status.as_str()));
        }
        serde_json::from_slice(&body)
            .context("consort up answered something unreadable; is it another version?")
    }

    async fn ask(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes)> {
        let stream = tokio::net::TcpStream::connect(self.door.address).await.context("consort up is gone")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.door.address.to_string())
            .header("authorization", format!("Bearer {}", self.door.token))
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER).collect().await;
        connection.abort();
        let body = body.map_err(|e| anyhow::anyhow!("the answer broke off: {e}"))?;
        Ok((status, body.to_bytes()))
    }
}
