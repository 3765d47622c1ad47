//! One request to an agent, over loopback.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context, anyhow};
use axum::{
    body::{Body, to_bytes},
    http::{Method, Request, StatusCode, header},
};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::value::RawValue;
use tokio::{net::TcpStream, time::timeout};

use super::find::Agent;
use crate::{
    cli::Usage,
    dashboard::hooks::{Asked, ROUTE},
    server::changes::BOUND,
    text::{clip, safe},
};

/// How long all of it may take: what the agent may, and what its answer takes to come.
const PATIENCE: Duration = BOUND.saturating_add(Duration::from_secs(5));
/// Most bytes of an answer. Clauses have [`MAX_PLAN`](wire::revision::MAX_PLAN), six times that where JSON spells them out.
const MAX_ANSWER: usize = 1 << 20;

/// The hooks of a job, as JSON.
///
/// # Errors
/// There is no answer in time, or the agent refuses.
pub fn hooks(agent: &Agent, job: Option<u32>) -> anyhow::Result<Box<RawValue>> {
    let query = job.map(|job| format!("?job={job}")).unwrap_or_default();
    send(agent, Method::GET, &format!("{ROUTE}{query}"), Body::empty())
}

/// What a change has come to, as JSON.
///
/// # Errors
/// There is no answer in time, or the agent refuses; [`Usage`] where what is asked for cannot be done at all.
pub fn change(agent: &Agent, asked: &Asked) -> anyhow::Result<Box<RawValue>> {
    send(agent, Method::POST, ROUTE, Body::from(serde_json::to_vec(asked)?))
}

fn send(agent: &Agent, method: Method, path: &str, body: Body) -> anyhow::Result<Box<RawValue>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asked = runtime.block_on(async { timeout(PATIENCE, exchange(agent, method, path, body)).await });
    let run = agent.run.display();
    let (status, answer) = asked
        .map_err(|_| anyhow!("the agent of {run} has not answered within {} s; is it stopped?", PATIENCE.as_secs()))?
        .with_context(|| format!("the agent of {run} does not answer on 127.0.0.1:{}", agent.port))?;
    if status == StatusCode::OK {
        return serde_json::from_slice(&answer).with_context(|| format!("the agent of {run} answers what is no JSON"));
    }
    let refused = serde_json::from_slice::<Refused>(&answer);
    let Ok(Refused { error }) = refused else {
        return Err(anyhow!("the agent of {run} answers {status} without a reason"));
    };
    let error = safe(&clip(&error));
    Err(if status == StatusCode::BAD_REQUEST { Usage(error).into() } else { anyhow!(error) })
}

/// Why not.
#[derive(serde::Deserialize)]
struct Refused {
    error: String,
}

async fn exchange(agent: &Agent, method: Method, path: &str, body: Body) -> anyhow::Result<(StatusCode, Vec<u8>)> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, format!("{}:{}", Ipv4Addr::LOCALHOST, agent.port))
        .header(header::AUTHORIZATION, format!("Bearer {}", agent.token))
        .header(header::CONTENT_TYPE, "application/json")
        .body(body)?;
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, agent.port)).await?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // How it ends is seen by who waits for the answer.
    tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    Ok((head.status, to_bytes(Body::new(body), MAX_ANSWER).await?.into()))
}
