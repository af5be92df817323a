//! A job's progress as it happens: one JSON object per line until the job is at rest.
//!
//! Owns the lines' form: `{"event": "progress", "state": .., "progress": {..}}`, in the end `{"event": "report", "job": {..}}`. A slow
//! reader skips states instead of queueing them.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{Api, Problem};
use crate::job::progress::{JobState, Progress};
use crate::job::table::JobError;
use crate::store::JobRecord;

/// Between two looks at a job.
const STEP: Duration = Duration::from_millis(200);
/// A line is sent at least so often, so that a reader knows the gateway is there.
const ALIVE: Duration = Duration::from_secs(5);

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Something has changed.
    Progress {
        job: String,
        name: String,
        state: JobState,
        progress: Box<Progress>,
    },
    /// The job is at rest; the last line.
    Report { job: Box<JobRecord> },
}

/// A job's progress, one JSON object per line, until it is at rest.
#[utoipa::path(get, path = "/v1/jobs/{id}/events",
    responses((status = 200, body = Event, content_type = "application/x-ndjson"), (status = 404, body = Problem),
        (status = 503, body = Problem)))]
pub(super) async fn events(State(api): State<Api>, Path(id): Path<String>) -> Result<Response, JobError> {
    let first = api.jobs.find(&id).await?;
    let place = Arc::clone(&api.watchers).try_acquire_owned();
    let place = place.map_err(|_| JobError::TooManyWatchers)?;
    let (say, mut said) = mpsc::channel::<Bytes>(4);
    tokio::spawn(async move {
        tokio::select! {
            () = watch(api, first, say.clone()) => {}
            // Nobody reads any more.
            () = say.closed() => {}
        }
        drop(place);
    });
    let lines = futures_lines(move |context| said.poll_recv(context));
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// A stream of whatever `poll` gives.
fn futures_lines(
    mut poll: impl FnMut(&mut std::task::Context<'_>) -> std::task::Poll<Option<Bytes>> + Send + 'static,
) -> impl futures_core::Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
    struct Lines<F>(F);
    impl<F: FnMut(&mut std::task::Context<'_>) -> std::task::Poll<Option<Bytes>> + Unpin> futures_core::Stream
        for Lines<F>
    {
        type Item = Result<Bytes, Infallible>;

        fn poll_next(
            mut self: std::pin::Pin<&mut Self>,
            context: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Self::Item>> {
            (self.0)(context).map(|line| line.map(Ok))
        }
    }
    Lines(Box::new(move |context: &mut std::task::Context<'_>| {
        poll(context)
    }))
}

/// Looks at the job again and again. Ends with the job or with the reader.
async fn watch(api: Api, first: JobRecord, say: mpsc::Sender<Bytes>) {
    let id = first.id.clone();
    let mut shown: Option<(JobState, Progress)> = None;
    let mut shown_at = tokio::time::Instant::now();
    loop {
        let Ok(record) = api.jobs.find(&id).await else {
            return;
        };
        if record.state.is_at_rest() || record.state == JobState::Paused {
            let _ = say
                .send(line(&Event::Report {
                    job: Box::new(record),
                }))
                .await;
            return;
        }
        let now = (record.state, record.progress);
        if shown.as_ref() != Some(&now) || shown_at.elapsed() > ALIVE {
            let (state, progress) = now.clone();
            let name = record.spec.name;
            let event = Event::Progress {
                job: id.clone(),
                name,
                state,
                progress: Box::new(progress),
            };
            if say.send(line(&event)).await.is_err() {
                return;
            }
            (shown, shown_at) = (Some(now), tokio::time::Instant::now());
        }
        tokio::time::sleep(STEP).await;
    }
}

fn line(event: &Event) -> Bytes {
    // Every field is plain data: it always has a JSON form.
    let mut text = serde_json::to_vec(event).unwrap_or_default();
    text.push(b'\n');
    text.into()
}
