//! The JSON routes.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use flexmodel_run::format::{Identity, JobId};
use serde::{Deserialize, Serialize};
use serde_json::json;
use wire::hooks::Kind;

use super::{Shared, tensor::layout_lines};
use crate::live::{Live, Picked, RunView, SeriesQuery};

/// Most records of one answer.
const MAX_RECORDS: usize = 500;

/// Why a request gets no answer: a status and one clear line.
#[derive(Debug)]
pub struct Refusal(pub StatusCode, pub String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

/// JSON, or why there is none.
pub type Answer<T> = Result<Json<T>, Refusal>;

/// The run, and where it lies.
#[derive(Serialize)]
struct RunAnswer {
    dir: String,
    #[serde(flatten)]
    run: RunView,
}

pub async fn run(State(shared): State<Arc<Shared>>) -> Response {
    let dir = shared.tensors.run_dir().display().to_string();
    Json(RunAnswer { dir, run: shared.live.run() }).into_response()
}

pub async fn modules(State(shared): State<Arc<Shared>>) -> Response {
    // The trees may be long: few answers are made at a time. The semaphore is closed only with the server.
    let _permit = shared.reads.acquire().await;
    Json(shared.live.models()).into_response()
}

pub async fn not_found() -> Refusal {
    Refusal(StatusCode::NOT_FOUND, "there is no such page here".into())
}

/// Which series or records.
#[derive(Deserialize)]
pub struct Wanted {
    #[serde(default)]
    model: u32,
    module: String,
    kind: Option<Kind>,
    path: Option<String>,
    train: Option<bool>,
    #[serde(default)]
    since: u64,
    limit: Option<usize>,
}

impl Wanted {
    fn query(self) -> SeriesQuery {
        let Self { model, module, kind, path, train, since, .. } = self;
        SeriesQuery { model, module, kind, path, train, since }
    }
}

pub async fn series(
    State(shared): State<Arc<Shared>>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Answer<serde_json::Value> {
    let (clock, series) = shared.live.series(&parse(wanted)?.query());
    // Every kind that there is, in the order in which a step has them: its word and its meaning.
    let kinds: Vec<_> = Kind::in_order().into_iter().map(|kind| (kind.name(), kind.meaning())).collect();
    Ok(Json(json!({ "clock": clock, "series": series, "kinds": kinds })))
}

pub async fn records(
    State(shared): State<Arc<Shared>>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Answer<serde_json::Value> {
    let wanted = parse(wanted)?;
    let limit = wanted.limit.unwrap_or(50).min(MAX_RECORDS);
    let records: Vec<_> =
        shared.live.records(&wanted.query(), limit).iter().map(|picked| RecordView::of(picked, &shared.live)).collect();
    Ok(Json(json!({ "records": records })))
}

/// A record among the newest.
#[derive(Serialize)]
struct RecordView {
    #[serde(flatten)]
    id: Identity,
    name: String,
    class: String,
    dtype: &'static str,
    shapes: Vec<Vec<u64>>,
    ranks: BTreeSet<u32>,
    layout: Vec<String>,
    bytes: u64,
    time_ms: f64,
    /// Of the hooks, where they changed while the job ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
}

impl RecordView {
    fn of(picked: &Picked, live: &Live) -> Self {
        // A record is kept with its first part.
        let first = &picked.parts[0].what;
        Self {
            id: picked.id.clone(),
            name: picked.id.to_string(),
            class: first.class.clone(),
            dtype: first.dtype.name(),
            shapes: picked.parts.iter().map(|p| p.what.shape.clone()).collect(),
            ranks: picked.parts.iter().map(|p| p.what.rank).collect(),
            layout: layout_lines(&first.axes),
            bytes: picked.parts.iter().filter_map(|p| p.at.as_ref()).map(|at| at.len).sum(),
            time_ms: first.time_ns as f64 / 1e6,
            revision: live.revision_of(&picked.parts),
        }
    }
}

/// Which tensor.
#[derive(Deserialize)]
pub struct WantedTensor {
    #[serde(default)]
    job: u32,
    #[serde(default)]
    attempt: u32,
    #[serde(default)]
    model: u32,
    module: String,
    kind: Kind,
    path: String,
    step: u64,
    #[serde(default)]
    micro: u32,
    #[serde(default)]
    call: u32,
    #[serde(default)]
    repeat: u32,
    #[serde(default = "yes")]
    train: bool,
    /// The lowest of the ranks that made its pass, where not all did.
    apart: Option<u32>,
    /// Only what this rank captured.
    rank: Option<u32>,
}

fn yes() -> bool {
    true
}

pub async fn tensor(
    State(shared): State<Arc<Shared>>,
    wanted: Result<Query<WantedTensor>, QueryRejection>,
) -> Response {
    let wanted = match parse(wanted) {
        Ok(wanted) => wanted,
        Err(refusal) => return refusal.into_response(),
    };
    let WantedTensor { job, attempt, model, module, kind, path, step, micro, call, repeat, train, apart, rank } =
        wanted;
    let job = JobId { job, attempt };
    let id = Identity {
        job,
        module,
        kind,
        path,
        model,
        step,
        micro,
        call,
        repeat,
        train,
        again: 0,
        apart,
        own: false,
        pending: false,
    };
    // Closed only with the server.
    let Ok(permit) = shared.reads.clone().acquire_owned().await else {
        return Refusal(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending".into()).into_response();
    };
    let read = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        shared.tensors.look(&shared.live, &id, rank)
    });
    match read.await {
        Ok(Ok(look)) => Json(look).into_response(),
        Ok(Err(reason)) => Refusal(StatusCode::NOT_FOUND, reason).into_response(),
        Err(_) => {
            let text = "reading this tensor failed inside the agent; flexmodel verify RUN tells whether it is damaged";
            Refusal(StatusCode::INTERNAL_SERVER_ERROR, text.into()).into_response()
        }
    }
}

/// What a query asks for.
pub fn parse<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Refusal> {
    match query {
        Ok(Query(wanted)) => Ok(wanted),
        Err(e) => Err(Refusal(StatusCode::BAD_REQUEST, e.body_text())),
    }
}
