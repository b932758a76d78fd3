//! The server's life: accept, answer, drain, close.
//!
//! One thread does it all ([`runtime`]). It was chosen over a pool because the work per token is a few microseconds,
//! and every core a pool would use is one that computes; what could take long (tokenizing a book, compiling a grammar)
//! goes to a thread of its own.

mod app;
mod context;
mod router;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use consort_edge::{Connection, Connections, Timed, is_loopback};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::engine::Slot;
use crate::options::Options;

pub(crate) use app::App;
pub(crate) use context::Context;

/// What open connections get to finish writing after the drain.
const CLOSING: Duration = Duration::from_secs(5);

/// Why a server didn't start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Anyone on the network could use it.
    #[error(
        "{address} can be reached from other machines: that needs an API key; set one, or bind 127.0.0.1"
    )]
    KeyNeeded {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// The socket is unusable.
    #[error("the listening socket failed: {0}")]
    Socket(#[from] io::Error),
}

/// The runtime a server should run on: one thread, and a few more for work that takes long.
///
/// # Errors
/// Where the system gives no event queue or thread.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_name("consort-http")
        .build()
}

/// Serves `replica` on `listener` until `shutdown` completes; then drains and returns.
///
/// While it drains, `/ready` says no and new requests are refused with 503; running ones finish within
/// [`Options::drain_budget`] or are handed over.
///
/// # Errors
/// [`ServeError::KeyNeeded`] where the address isn't loopback and there is no key.
pub async fn serve(
    listener: TcpListener,
    replica: impl Into<Slot>,
    options: Options,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let address = listener.local_addr()?;
    let loopback = is_loopback(address.ip());
    if !loopback && options.api_key.is_none() {
        return Err(ServeError::KeyNeeded { address });
    }
    let connections = Arc::new(Connections::default());
    let app = App::new(replica.into(), options, loopback, &connections);
    let server =
        Server { service: router::router(app.clone()), connections, app, closing: watch::channel(false).0 };
    tracing::info!(%address, "listening");
    let accepting = server.accept(&listener);
    tokio::pin!(accepting, shutdown);
    tokio::select! {
        () = &mut accepting => {}
        () = &mut shutdown => {}
    }
    tracing::info!("draining");
    server.app.start_draining();
    // Still accepting: whoever asks gets a 503 with Retry-After rather than a refused connection.
    tokio::select! {
        () = &mut accepting => {}
        () = server.app.drain() => {}
    }
    server.closing.send_replace(true);
    if tokio::time::timeout(CLOSING, server.connections.none_left()).await.is_err() {
        tracing::warn!(left = server.connections.count(), "connections were cut");
    }
    Ok(())
}

struct Server {
    app: App,
    service: axum::Router,
    connections: Arc<Connections>,
    closing: watch::Sender<bool>,
}

impl Server {
    async fn accept(&self, listener: &TcpListener) {
        let max = self.app.options.max_connections.max(1);
        loop {
            self.connections.make_room(max).await;
            match listener.accept().await {
                Ok((stream, _)) => self.spawn(stream),
                Err(error) => {
                    // Out of file descriptors, or a client that was gone already: neither ends the server.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream) {
        let connection = self.connections.open();
        let handle = connection.handle();
        let router = self.service.clone().layer(axum::Extension(handle));
        let options = self.app.options.clone();
        let closing = self.closing.subscribe();
        // Tokens are small writes that must not wait for each other.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        tokio::spawn(async move {
            let socket = TokioIo::new(Timed::new(stream, options.write_timeout));
            let mut builder = http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(options.header_timeout)
                .max_headers(options.max_headers)
                .max_buf_size(options.max_header_bytes.max(8 << 10));
            let served = builder.serve_connection(socket, TowerToHyperService::new(router));
            run(served, connection, closing).await;
        });
    }
}

/// Drives one connection to its end, or to where it must go.
async fn run<S>(
    served: http1::Connection<TokioIo<Timed<TcpStream>>, S>,
    connection: Connection,
    mut closing: watch::Receiver<bool>,
) where
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = axum::body::Body>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    tokio::pin!(served);
    let mut graceful = false;
    loop {
        tokio::select! {
            result = served.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = connection.closed() => return,
            changed = closing.wait_for(|closing| *closing), if !graceful => {
                graceful = true;
                if changed.is_ok() {
                    served.as_mut().graceful_shutdown();
                }
            }
        }
    }
}
