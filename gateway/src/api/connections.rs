//! One connection of an API client, from its first byte to its last.
//!
//! Owns what a client may cost: how many there are at once, how long a head may take, and how long a client may take nothing of its
//! answer. Leaves requests to the router, and sockets to `listen`. Promises that a slow or silent client gives its place back within
//! seconds, and that nobody else notices it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// Clients at once; others wait until one leaves.
const CONNECTIONS_MAX: usize = 256;
/// A request's head, and silence between two requests.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// A client that takes nothing for so long is gone.
const TAKE_TIME: Duration = Duration::from_secs(30);

/// Serves clients, as many as there are places for.
#[derive(Clone)]
pub(super) struct Connections {
    routes: Router,
    places: Arc<Semaphore>,
}

impl Connections {
    pub(super) fn new(routes: Router) -> Self {
        Self {
            routes,
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// Waits for a place for the next client.
    pub(super) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    /// Serves one client in a task of its own.
    pub(super) fn serve(
        &self,
        client: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        place: OwnedSemaphorePermit,
    ) {
        let service = TowerToHyperService::new(self.routes.clone());
        let client = Patient {
            client,
            until: Box::pin(tokio::time::sleep(TAKE_TIME)),
            waiting: false,
        };
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .serve_connection(TokioIo::new(client), service);
        tokio::spawn(async move {
            // A client that breaks off or says nonsense is its own affair; it got its answer, if it can read one.
            if let Err(error) = serving.await {
                tracing::debug!("a client of the API was sent away: {error}");
            }
            drop(place);
        });
    }
}

/// A client whose writes fail when it takes nothing for [`TAKE_TIME`].
struct Patient<C> {
    client: C,
    until: Pin<Box<Sleep>>,
    /// Whether the last write had to wait, and `until` runs.
    waiting: bool,
}

impl<C> Patient<C> {
    fn watch<T>(&mut self, context: &mut Context<'_>, progress: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.waiting = false;
            return progress;
        }
        if !std::mem::replace(&mut self.waiting, true) {
            self.until.as_mut().reset(Instant::now() + TAKE_TIME);
        }
        match self.until.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Patient<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.client).poll_read(context, buf)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Patient<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.client).poll_write(context, buf);
        self.watch(context, progress)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.client).poll_flush(context);
        self.watch(context, progress)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.client).poll_shutdown(context);
        self.watch(context, progress)
    }
}
