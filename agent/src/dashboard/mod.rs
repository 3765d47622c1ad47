//! The dashboard: a page and a small JSON API over [`Live`], for the browser of the person who started the run.
//!
//! | route | gives |
//! |---|---|
//! | `/`, `/app.js`, `/app.css`, ... | the page; nothing of it comes from elsewhere |
//! | `/api/run` | the run's facts, totals, ranks, notices, revisions of its hooks |
//! | `/api/modules` | module trees and every series |
//! | `/api/series?model=&module=[&kind=&path=&train=&since=]` | points over steps |
//! | `/api/records?model=&module=[&kind=&path=&train=&limit=]` | the newest records |
//! | `/api/tensor?model=&module=&kind=&path=&step=[&micro=&call=&repeat=&train=&apart=&rank=]` | one tensor's picture |
//! | `/api/hooks[?job=]` | the hooks of the running job; with POST it changes them ([`hooks`]) |
//! | `/api/token` | to a page of ours alone: the token that a change wants |
//! | `/events` | what changes, as server-sent events |
//!
//! It listens on loopback only, answers GET, and POST on that one route, and every route wants the token ([`guard`]).
//! Connections are bounded in number and in time ([`connections`]).

mod api;
mod assets;
mod connections;
mod events;
mod guard;
pub mod hooks;
mod picture;
mod source;
mod tensor;
mod windows;

use std::{io, path::PathBuf, sync::Arc};

use axum::{Router, middleware, routing::get};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::live::Live;
use connections::Limits;
use hooks::Changer;

/// Event streams at a time; a browser tab holds one.
const MAX_STREAMS: usize = 32;
/// Tensors read at a time; further requests wait for their turn.
const MAX_READS: usize = 2;

/// What a dashboard is of, and for whom.
pub struct Served {
    /// What is known of the run.
    pub live: Arc<Live>,
    /// Where it lies.
    pub run_dir: PathBuf,
    /// What every request must show.
    pub token: String,
    /// Who knows and changes the job's hooks; `None`: no job runs any more.
    pub changer: Option<Box<dyn Changer>>,
    /// Hooks are shown and never changed.
    pub read_only: bool,
}

/// What the handlers share.
pub struct Shared {
    live: Arc<Live>,
    token: String,
    changer: Option<Box<dyn Changer>>,
    read_only: bool,
    tensors: tensor::Tensors,
    streams: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

/// Serves the dashboard until the future is dropped. Refuses a listener that is not on loopback.
pub async fn serve(listener: TcpListener, served: Served) -> io::Result<()> {
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the dashboard does not listen on {address}: only on 127.0.0.1 or [::1]; forward the port with ssh"
            ),
        ));
    }
    if served.token.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the dashboard needs a token that is not empty"));
    }
    let limits = Limits::now();
    let never = connections::serve(listener, router(served, address.port(), limits), limits).await;
    match never {}
}

fn router(served: Served, port: u16, limits: Limits) -> Router {
    let Served { live, run_dir, token, changer, read_only } = served;
    let guard = Arc::new(guard::Guard::new(token.clone(), port));
    let shared = Arc::new(Shared {
        live,
        token,
        changer,
        read_only,
        tensors: tensor::Tensors::new(run_dir),
        streams: Arc::new(Semaphore::new(MAX_STREAMS.min(limits.known / 2))),
        reads: Arc::new(Semaphore::new(MAX_READS)),
    });
    assets::routes()
        .route("/api/run", get(api::run))
        .route("/api/modules", get(api::modules))
        .route("/api/series", get(api::series))
        .route("/api/records", get(api::records))
        .route("/api/tensor", get(api::tensor))
        .route(hooks::ROUTE, get(hooks::hooks).post(hooks::change))
        .route(hooks::TOKEN_ROUTE, get(hooks::token))
        .route("/events", get(events::events))
        .fallback(api::not_found)
        .with_state(shared)
        .layer(middleware::from_fn_with_state(guard, guard::check))
}

#[cfg(test)]
mod tests;
