//! The dashboard: a page and a small JSON API over [`Live`], for the browser of the person who started the run.
//!
//! | route | gives |
//! |---|---|
//! | `/`, `/app.js`, `/app.css`, ... | the page; nothing of it comes from elsewhere |
//! | `/api/run` | the run's facts, totals, ranks, notices |
//! | `/api/modules` | module trees and every series |
//! | `/api/series?model=&module=[&kind=&path=&train=&since=]` | points over steps |
//! | `/api/records?model=&module=[&kind=&path=&train=&limit=]` | the newest records |
//! | `/api/tensor?model=&module=&kind=&path=&step=[&micro=&call=&repeat=&train=&apart=&rank=]` | one tensor's picture |
//! | `/events` | what changes, as server-sent events |
//!
//! It listens on loopback only, answers GET only, and every route wants the token ([`guard`]). Connections are bounded in
//! number and in time ([`connections`]).

mod api;
mod assets;
mod connections;
mod events;
mod guard;
mod picture;
mod source;
mod tensor;
mod windows;

use std::{io, path::PathBuf, sync::Arc};

use axum::{Router, middleware, routing::get};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::live::Live;
use connections::Limits;

/// Event streams at a time; a browser tab holds one.
const MAX_STREAMS: usize = 32;
/// Tensors read at a time; further requests wait for their turn.
const MAX_READS: usize = 2;

/// What the handlers share.
struct Shared {
    live: Arc<Live>,
    tensors: tensor::Tensors,
    streams: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

/// Serves the dashboard until the future is dropped. Refuses a listener that is not on loopback.
pub async fn serve(listener: TcpListener, live: Arc<Live>, run_dir: PathBuf, token: String) -> io::Result<()> {
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the dashboard does not listen on {address}: only on 127.0.0.1 or [::1]; forward the port with ssh"
            ),
        ));
    }
    if token.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the dashboard needs a token that is not empty"));
    }
    let limits = Limits::now();
    let never = connections::serve(listener, router(live, run_dir, token, address.port(), limits), limits).await;
    match never {}
}

fn router(live: Arc<Live>, run_dir: PathBuf, token: String, port: u16, limits: Limits) -> Router {
    let shared = Arc::new(Shared {
        live,
        tensors: tensor::Tensors::new(run_dir),
        streams: Arc::new(Semaphore::new(MAX_STREAMS.min(limits.known / 2))),
        reads: Arc::new(Semaphore::new(MAX_READS)),
    });
    let guard = Arc::new(guard::Guard::new(token, port));
    assets::routes()
        .route("/api/run", get(api::run))
        .route("/api/modules", get(api::modules))
        .route("/api/series", get(api::series))
        .route("/api/records", get(api::records))
        .route("/api/tensor", get(api::tensor))
        .route("/events", get(events::events))
        .fallback(api::not_found)
        .with_state(shared)
        .layer(middleware::from_fn_with_state(guard, guard::check))
}

#[cfg(test)]
mod tests;
