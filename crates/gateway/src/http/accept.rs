//! Accepts connections, drives them, and closes them when the gateway ends.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use consort_edge::{ConnectionHandle, Connections, Timed};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::front::Front;
use super::timer::AlarmTimer;
use crate::Gateway;

/// What open connections get to finish when the gateway ends.
const CLOSING: Duration = Duration::from_secs(35);

/// Connections at one time that are told so while the gateway ends.
const LATE: usize = 64;

/// A TLS handshake must be over within this, or within the time for headers where that is less; half-open ones cost a
/// place each, and no longer.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// The server's side of a gateway.
pub(crate) struct Server {
    front: Arc<Front>,
    connections: Arc<Connections>,
    closing: watch::Sender<bool>,
}

impl Server {
    pub(crate) fn new(gateway: Arc<Gateway>) -> Server {
        Server {
            front: Arc::new(Front::new(gateway)),
            connections: Arc::default(),
            closing: watch::channel(false).0,
        }
    }

    /// Accepts until `shutdown` completes, then waits for what runs.
    pub(crate) async fn run(&self, listener: &TcpListener, shutdown: impl Future<Output = ()>) {
        tokio::select! {
            () = self.accept(listener, &self.connections, None) => {}
            () = shutdown => {}
        }
        tracing::info!("draining");
        self.front.gateway.start_draining();
        self.closing.send_replace(true);
        // A table of their own: they aren't waited for.
        let late = Arc::new(Connections::default());
        tokio::select! {
            // Whoever comes now gets a 503 with Retry-After rather than a refused connection.
            () = self.accept(listener, &late, Some(LATE)) => {}
            done = tokio::time::timeout(CLOSING, self.connections.none_left()) => {
                if done.is_err() {
                    tracing::warn!(left = self.connections.count(), "connections were cut");
                }
            }
        }
    }

    /// At most `most` at one time, else as many as the settings say at that time. Past it, whoever has been without a
    /// request for longest goes.
    async fn accept(&self, listener: &TcpListener, connections: &Arc<Connections>, most: Option<usize>) {
        let gateway = &self.front.gateway;
        loop {
            loop {
                let edited = gateway.live().replaced.notified();
                let most = most.unwrap_or_else(|| gateway.settings().clients.max_connections.max(1));
                tokio::select! {
                    () = connections.make_room(most) => break,
                    () = edited => {}
                }
            }
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let (front, closing) = (self.front.clone(), self.closing.subscribe());
                    let connection = connections.open();
                    tokio::spawn(async move {
                        tokio::select! {
                            () = open(front, stream, peer, closing, connection.handle()) => {}
                            () = connection.closed() => {}
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, or a client that was gone already: neither ends the server.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

async fn open(
    front: Arc<Front>,
    stream: TcpStream,
    peer: SocketAddr,
    closing: watch::Receiver<bool>,
    handle: ConnectionHandle,
) {
    // Tokens are small writes that must not wait for each other.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let Some(tls) = front.gateway.tls() else { return serve(front, stream, peer, closing, handle).await };
    let handshake = HANDSHAKE.min(front.gateway.settings().clients.header_timeout);
    match tokio::time::timeout(handshake, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => serve(front, stream, peer, closing, handle).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    front: Arc<Front>,
    stream: S,
    peer: SocketAddr,
    mut closing: watch::Receiver<bool>,
    handle: ConnectionHandle,
) {
    let settings = &front.gateway.settings().clients;
    let socket = TokioIo::new(Timed::new(stream, settings.write_timeout));
    let mut builder = http1::Builder::new();
    builder
        .timer(AlarmTimer::default())
        .header_read_timeout(settings.header_timeout)
        .max_headers(settings.max_headers)
        .max_buf_size(settings.max_header_bytes.max(8 << 10));
    let service = service_fn(|request| {
        let (front, busy) = (front.clone(), handle.busy());
        async move { Ok::<_, Infallible>(front.answer(request, peer, busy).await) }
    });
    let mut connection = std::pin::pin!(builder.serve_connection(socket, service));
    let mut graceful = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            changed = closing.wait_for(|closing| *closing), if !graceful => {
                graceful = true;
                if changed.is_ok() {
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}
