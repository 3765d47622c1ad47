//! `/events`: what changes, pushed to the page.
//!
//! At most four events a second, each with at most [`MAX_SERIES_AN_EVENT`] series; when more change, those that waited
//! longest go first. A comment every ten seconds tells a silent run from a lost agent.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use tokio::{sync::OwnedSemaphorePermit, time};

use super::Shared;
use crate::live::{Live, Watch};

const TICK: Duration = Duration::from_millis(250);
const HEARTBEAT: Duration = Duration::from_secs(10);
const MAX_SERIES_AN_EVENT: usize = 256;

/// One page's place in the run.
struct Reader {
    live: Arc<Live>,
    since: u64,
    series: usize,
    /// The first event is due at once, whatever changed.
    first: bool,
    /// The event before reported the end.
    over: bool,
    watch: Watch,
    _permit: OwnedSemaphorePermit,
}

pub async fn events(State(shared): State<Arc<Shared>>) -> Response {
    let Ok(permit) = shared.streams.clone().try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many pages are open on this dashboard; close one\n")
            .into_response();
    };
    let reader = Reader {
        live: shared.live.clone(),
        since: 0,
        series: 0,
        first: true,
        over: false,
        watch: Watch::new(shared.live.clone()),
        _permit: permit,
    };
    let events = stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await;
        Some((Ok::<_, Infallible>(event), reader))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT).text("alive")).into_response()
}

impl Reader {
    async fn next(&mut self) -> Event {
        if self.over {
            // Asked for the next event: the one before is on its way.
            time::sleep(TICK / 8).await;
            self.watch.heard_the_end();
        }
        loop {
            if !self.first {
                tokio::select! {
                    () = time::sleep(TICK) => {}
                    () = self.live.urgent() => {}
                }
            }
            if !self.first && self.live.clock() == self.since {
                continue;
            }
            self.first = false;
            let delta = self.live.delta(self.since, &mut self.series, MAX_SERIES_AN_EVENT);
            self.since = delta.clock;
            self.over = delta.state == "finished";
            // Numbers, short words and strings always make JSON.
            return Event::default().json_data(&delta).unwrap_or_else(|_| Event::default().comment("lost"));
        }
    }
}
