//! The page's connections: how many, and for how long.
//!
//! Every user of the machine reaches the port, so a connection is worth nothing until it has shown the token.
//!
//! | connection | may be open |
//! |---|---|
//! | that has not shown the token | a quarter of the page's share at a time, [`TOKEN`] each; the oldest goes for a new one |
//! | that has | the rest of it; one more is answered 503 |
//! | between two requests, or within a request's head | [`IDLE`] |
//! | within the body of a change of hooks | [`BODY`](super::hooks::BODY); no other body is read |
//! | whose peer takes nothing of an answer | [`STUCK`] |
//!
//! The page's share is one of the agent's descriptors ([`descriptors`]).

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};

use crate::{
    descriptors,
    newcomers::{Newcomer, Newcomers},
};

/// How long a connection may take to show the token.
const TOKEN: Duration = Duration::from_secs(10);
/// How long a connection may take to ask for something.
const IDLE: Duration = Duration::from_secs(60);
/// How long a peer may take nothing of what it asked for.
const STUCK: Duration = Duration::from_secs(60);
/// Longest head of a request in bytes.
const MAX_HEAD: usize = 16 << 10;
/// First and longest pause after the system had no connection to give.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How many connections of each kind there may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// That have not shown the token.
    pub newcomers: usize,
    /// That have.
    pub known: usize,
}

impl Limits {
    /// Of the agent's share of descriptors.
    pub fn now() -> Self {
        let page = descriptors::Shares::now().page;
        let newcomers = (page / 4).max(1);
        Self { newcomers, known: page - newcomers }
    }
}

/// Who is at the other end of a connection; an extension of its requests.
#[derive(Clone, Debug)]
pub struct Visitor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    place: Mutex<Place>,
    known: Arc<Semaphore>,
}

#[derive(Debug)]
enum Place {
    /// It has not shown the token.
    Newcomer { _place: Newcomer },
    /// It has.
    Known { _place: OwnedSemaphorePermit },
}

impl Visitor {
    /// It has shown the token. `false`: as many as may be are connected.
    pub fn let_in(&self) -> bool {
        let mut place = self.place();
        if let Place::Newcomer { .. } = *place {
            let Ok(permit) = self.0.known.clone().try_acquire_owned() else { return false };
            *place = Place::Known { _place: permit };
        }
        true
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.0.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts connections until the future is dropped.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits) -> Infallible {
    let newcomers = Newcomers::new(limits.newcomers);
    let known = Arc::new(Semaphore::new(limits.known));
    let mut pause = PAUSES.0;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                pause = PAUSES.0;
                let newcomer = newcomers.admit().await;
                tokio::spawn(connection(stream, router.clone(), newcomer, known.clone()));
            }
            Err(e) if is_of_one_connection(&e) => {}
            Err(_) => {
                // No descriptors, or no memory: they come back when others close theirs.
                sleep(pause).await;
                pause = (2 * pause).min(PAUSES.1);
            }
        }
    }
}

/// Whether it was the connection that failed, and not accepting.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

async fn connection(stream: TcpStream, router: Router, newcomer: Newcomer, known: Arc<Semaphore>) {
    let over = newcomer.over(TOKEN);
    let place = Mutex::new(Place::Newcomer { _place: newcomer });
    let visitor = Visitor(Arc::new(Inner { place, known }));
    let service = TowerToHyperService::new(router.layer(Extension(visitor.clone())));
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(Patient::new(stream)), service);
    let unknown_for_too_long = async {
        over.await;
        if matches!(*visitor.place(), Place::Known { .. }) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        // However it ends, it was this connection's matter.
        _ = http => {}
        () = unknown_for_too_long => {}
    }
}

/// A stream whose writes fail when the peer has taken nothing for [`STUCK`].
struct Patient<S> {
    stream: S,
    stuck: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    fn new(stream: S) -> Self {
        Self { stream, stuck: None }
    }

    fn bound<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stuck = None;
            return written;
        }
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(sleep(STUCK)));
        stuck.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.bound(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.bound(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.bound(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        use tokio::io::AsyncReadExt;
        let (ours, mut theirs) = tokio::io::duplex(8);
        let mut ours = Patient::new(ours);
        let slow = tokio::spawn(async move {
            for _ in 0..4 {
                sleep(STUCK / 2).await;
                theirs.read_exact(&mut [0; 8]).await.unwrap();
            }
            theirs
        });
        ours.write_all(&[0; 40]).await.unwrap();
        let _open = slow.await.unwrap();
        let error = ours.write_all(&[0; 40]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
