//! `/api/hooks`: the hooks of the running job, and the one way in to change something. `/api/token`: what the page shows there.
//!
//! Clauses are text and never the path of a file, which `wire::hooks::parse_clauses` sees to.

use std::{pin::Pin, sync::Arc, time::Duration};

use axum::{
    Json,
    body::{Body, to_bytes},
    extract::{Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    Shared,
    api::{Answer, Refusal, parse},
};
use crate::server::{
    Server,
    changes::{Changed, Hooks, Op, Refused},
};

/// Where hooks are told and changed.
pub const ROUTE: &str = "/api/hooks";
/// Where the page gets the token that it shows for a change.
pub const TOKEN_ROUTE: &str = "/api/token";
/// Most bytes of a change.
pub const MAX_BODY: usize = 64 << 10;
/// How long they may take to come.
pub const BODY: Duration = Duration::from_secs(10);

/// What comes later.
pub type Later<T> = Pin<Box<dyn Future<Output = Result<T, Refused>> + Send>>;

/// Who knows the hooks of a running job, and changes them.
pub trait Changer: Send + Sync {
    /// The hooks of a job; `None`: of the only one.
    fn hooks(&self, job: Option<u32>) -> Later<Hooks>;

    /// Changes them.
    fn change(&self, job: Option<u32>, op: Op) -> Later<Changed>;
}

impl Changer for Arc<Server> {
    fn hooks(&self, job: Option<u32>) -> Later<Hooks> {
        let server = self.clone();
        Box::pin(async move { server.hooks(job).await })
    }

    fn change(&self, job: Option<u32>, op: Op) -> Later<Changed> {
        let server = self.clone();
        Box::pin(async move { server.change(job, op).await })
    }
}

/// What a change is asked for with.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Asked {
    /// Clauses beside those that are there.
    Add {
        /// As text.
        clauses: String,
        /// Of which job; `None`: of the only one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<u32>,
    },
    /// Clauses in place of those that are there.
    Set {
        /// As text.
        clauses: String,
        /// Of which job; `None`: of the only one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<u32>,
    },
    /// Clauses go.
    Remove {
        /// Which.
        ids: Vec<u32>,
        /// Of which job; `None`: of the only one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<u32>,
    },
}

impl Asked {
    fn split(self) -> (Option<u32>, Op) {
        match self {
            Self::Add { clauses, job } => (job, Op::Add(clauses)),
            Self::Set { clauses, job } => (job, Op::Set(clauses)),
            Self::Remove { ids, job } => (job, Op::Remove(ids)),
        }
    }
}

/// Whose hooks.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    job: Option<u32>,
}

pub async fn hooks(State(shared): State<Arc<Shared>>, wanted: Result<Query<Wanted>, QueryRejection>) -> Answer<Hooks> {
    let Wanted { job } = parse(wanted)?;
    Ok(Json(changer(&shared)?.hooks(job).await?))
}

pub async fn change(State(shared): State<Arc<Shared>>, body: Body) -> Answer<Changed> {
    let changer = changer(&shared)?;
    if shared.read_only {
        let text = "the hooks of this run cannot be changed: it was started with --read-only";
        return Err(Refusal(StatusCode::FORBIDDEN, text.into()));
    }
    let (job, op) = read(body).await?.split();
    // What is begun is carried to its end, also where whoever asked does not wait for it.
    let changed = tokio::spawn(changer.change(job, op)).await;
    let Ok(changed) = changed else {
        let text = "the change failed inside the agent; flexmodel hooks RUN tells what is in force";
        return Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, text.into()));
    };
    Ok(Json(changed?))
}

pub async fn token(State(shared): State<Arc<Shared>>) -> Json<serde_json::Value> {
    Json(serde_json::json!({ "token": shared.token }))
}

fn changer(shared: &Shared) -> Result<&dyn Changer, Refusal> {
    shared.changer.as_deref().ok_or_else(|| Refusal(StatusCode::CONFLICT, "this run is over".into()))
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Bad(why) => Self(StatusCode::BAD_REQUEST, why),
            Refused::Conflict(why) => Self(StatusCode::CONFLICT, why),
        }
    }
}

/// What is asked for, as far as it comes in time and is not too long.
async fn read(body: Body) -> Result<Asked, Refusal> {
    let bad = |why: String| Refusal(StatusCode::BAD_REQUEST, why);
    let Ok(bytes) = timeout(BODY, to_bytes(body, MAX_BODY)).await else {
        return Err(bad(format!("the change did not come within {} s", BODY.as_secs())));
    };
    let bytes = bytes.map_err(|_| bad(format!("the change has more than {MAX_BODY} bytes, or did not come whole")))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let forms = r#"{"op": "add" or "set", "clauses": "..."} and {"op": "remove", "ids": [1]}, both with "job": 0 or without"#;
        bad(format!("no change can be read from this: {e}; write {forms}"))
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use futures_util::stream;

    use super::*;

    async fn refusal(body: Body) -> String {
        let Refusal(status, text) = read(body).await.unwrap_err();
        assert_eq!(status, StatusCode::BAD_REQUEST);
        text
    }

    #[tokio::test]
    async fn a_change_is_one_object_and_nothing_beside_it() {
        for (text, asked) in [
            (r#"{"op":"add","clauses":"a"}"#, Asked::Add { clauses: "a".into(), job: None }),
            (r#"{"op":"set","clauses":"","job":2}"#, Asked::Set { clauses: String::new(), job: Some(2) }),
            (r#" {"ids":[1,2],"op":"remove","job":null} "#, Asked::Remove { ids: vec![1, 2], job: None }),
        ] {
            assert_eq!(read(Body::from(text)).await.unwrap_or_else(|e| panic!("{}", e.1)), asked);
        }
        for text in [
            "",
            "{}",
            "null",
            "[]",
            r#"{"op":"add"}"#,
            r#"{"op":"clear"}"#,
            r#"{"op":"add","clauses":["a"]}"#,
            r#"{"op":"add","clauses":"a","ids":[1]}"#,
            r#"{"op":"add","clauses":"a","file":"x.toml"}"#,
            r#"{"op":"add","op":"set","clauses":"a"}"#,
            r#"{"op":"add","clauses":"a","clauses":"b"}"#,
            r#"{"op":"add","clauses":"a"}{}"#,
            r#"{"op":"remove","ids":[-1]}"#,
            r#"{"op":"remove","ids":[4294967296]}"#,
            r#"{"op":"remove","ids":"1"}"#,
            "op=add&clauses=a",
            "\u{0}",
        ] {
            assert!(refusal(Body::from(text)).await.contains("\"op\""), "{text}");
        }
        let deep = "[".repeat(60_000);
        assert!(refusal(Body::from(deep)).await.contains("\"op\""));
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_is_too_long_or_never_ends_is_refused() {
        let clauses = |len: usize| format!(r#"{{"op":"add","clauses":"{}"}}"#, "x".repeat(len));
        let around = clauses(0).len();
        assert!(read(Body::from(clauses(MAX_BODY - around))).await.is_ok());
        assert!(refusal(Body::from(clauses(MAX_BODY - around + 1))).await.contains("65536 bytes"));
        let endless = stream::pending::<Result<Bytes, std::io::Error>>();
        assert!(refusal(Body::from_stream(endless)).await.contains("within 10 s"));
        let broken = stream::iter([Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("gone"))]);
        assert!(refusal(Body::from_stream(broken)).await.contains("did not come whole"));
    }
}
