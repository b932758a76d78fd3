//! Accepts connections, drives them, and closes them when the gateway ends.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

use super::front::Front;
use super::socket::Timed;
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
    places: Arc<Places>,
    closing: watch::Sender<bool>,
}

impl Server {
    pub(crate) fn new(gateway: Arc<Gateway>) -> Server {
        Server {
            front: Arc::new(Front::new(gateway)),
            places: Arc::default(),
            closing: watch::channel(false).0,
        }
    }

    /// Accepts until `shutdown` completes, then waits for what runs.
    pub(crate) async fn run(&self, listener: &TcpListener, shutdown: impl Future<Output = ()>) {
        tokio::select! {
            () = self.accept(listener, &self.places, None) => {}
            () = shutdown => {}
        }
        tracing::info!("draining");
        self.front.gateway.start_draining();
        self.closing.send_replace(true);
        // Places of their own: accepting holds one while nobody comes, and would be waited for.
        let late = Arc::new(Places::default());
        tokio::select! {
            // Whoever comes now gets a 503 with Retry-After rather than a refused connection.
            () = self.accept(listener, &late, Some(LATE)) => {}
            done = tokio::time::timeout(CLOSING, self.places.empty()) => {
                if done.is_err() {
                    tracing::warn!(left = self.places.taken(), "connections were cut");
                }
            }
        }
    }

    /// At most `most` at one time, else as many as the settings say at that time.
    async fn accept(&self, listener: &TcpListener, places: &Arc<Places>, most: Option<usize>) {
        let gateway = &self.front.gateway;
        loop {
            let place = loop {
                let edited = gateway.live().replaced.notified();
                let most = most.unwrap_or_else(|| gateway.settings().clients.max_connections.max(1));
                tokio::select! {
                    place = places.take(most) => break place,
                    () = edited => {}
                }
            };
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let (front, closing) = (self.front.clone(), self.closing.subscribe());
                    tokio::spawn(async move {
                        open(front, stream, peer, closing).await;
                        drop(place);
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

/// Connections that are open, counted.
#[derive(Default)]
struct Places {
    taken: AtomicUsize,
    /// One was given back.
    freed: Notify,
}

/// One connection's place, until it is dropped.
struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.freed.notify_waiters();
    }
}

impl Places {
    fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// A place, once fewer than `most` are taken. One task alone may take them.
    async fn take(self: &Arc<Places>, most: usize) -> Place {
        self.below(most).await;
        self.taken.fetch_add(1, Ordering::Relaxed);
        Place(self.clone())
    }

    /// Waits until none is taken.
    async fn empty(&self) {
        self.below(1).await;
    }

    async fn below(&self, most: usize) {
        loop {
            let freed = self.freed.notified();
            if self.taken() < most {
                return;
            }
            freed.await;
        }
    }
}

async fn open(front: Arc<Front>, stream: TcpStream, peer: SocketAddr, closing: watch::Receiver<bool>) {
    // Tokens are small writes that must not wait for each other.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let Some(tls) = front.gateway.tls() else { return serve(front, stream, peer, closing).await };
    let handshake = HANDSHAKE.min(front.gateway.settings().clients.header_timeout);
    match tokio::time::timeout(handshake, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => serve(front, stream, peer, closing).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    front: Arc<Front>,
    stream: S,
    peer: SocketAddr,
    mut closing: watch::Receiver<bool>,
) {
    let settings = &front.gateway.settings().clients;
    let socket = TokioIo::new(Timed::new(stream, settings.write_timeout));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(settings.header_timeout)
        .max_headers(settings.max_headers)
        .max_buf_size(settings.max_header_bytes.max(8 << 10));
    let service = service_fn(|request| {
        let front = front.clone();
        async move { Ok::<_, Infallible>(front.answer(request, peer).await) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_place_is_waited_for_and_the_end_waits_for_all() {
        let places = Arc::<Places>::default();
        let first = places.take(1).await;
        {
            let mut second = std::pin::pin!(places.take(1));
            assert!(polled(second.as_mut()).await.is_none(), "one is all there is");
            // A higher bound is seen by whoever asks again, as `accept` does when the settings are replaced.
            let raised = places.take(2).await;
            assert_eq!(places.taken(), 2);
            drop(raised);
            assert!(polled(second.as_mut()).await.is_none());
            drop(first);
            drop(second.await);
        }
        places.empty().await;
    }

    /// What a future gives when it is polled once.
    async fn polled<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(match future.as_mut().poll(context) {
                std::task::Poll::Ready(output) => Some(output),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
