//! The HTTP API: what the operator program and scripts talk to.
//!
//! Owns routes, status codes and the OpenAPI description (`GET /openapi.json`). Leaves every decision to `job`. On the unix socket
//! whoever may write to it may command; over TCP only operators' certificates may. Promises that every error answer is
//! `{"error": "a sentence"}`.

mod connections;
mod events;
mod listen;
mod orders;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use longhaul_common::telemetry::MetricsText;
use longhaul_common::wire::session::chain;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use crate::job::driver::Wish;
use crate::job::plan::{self, Plan};
use crate::job::prepare::{self as preparing, PreparedReport};
use crate::job::spec::JobSpec;
use crate::job::table::{JobError, Jobs};
use crate::metrics::Gauges;
use crate::store::JobRecord;

pub use events::Event;
pub use listen::{ApiError, serve};

/// What handlers work with.
#[derive(Clone)]
pub struct Api {
    jobs: Arc<Jobs>,
    metrics: MetricsText,
    /// What the metrics are of.
    gauges: Arc<Gauges>,
    identity: String,
    /// Places for streams of events.
    watchers: Arc<Semaphore>,
}

/// Streams of events at once.
const WATCHERS_MAX: usize = 64;

impl Api {
    /// Over the gateway's jobs; `identity` is how it calls itself.
    pub fn new(jobs: Arc<Jobs>, metrics: MetricsText, gauges: Gauges, identity: String) -> Self {
        Self {
            jobs,
            metrics,
            gauges: Arc::new(gauges),
            identity,
            watchers: Arc::new(Semaphore::new(WATCHERS_MAX)),
        }
    }
}

/// The gateway at one moment.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Status {
    pub version: String,
    pub identity: String,
    /// Agents linked right now.
    pub agents: Vec<String>,
    pub peers: Vec<PeerStatus>,
    /// Jobs that are not at rest, and the newest others.
    pub jobs: Vec<JobRecord>,
    /// Running VMs whose dirty bitmaps are on ahead of a run.
    #[serde(default)]
    pub prepared: Vec<PreparedReport>,
}

/// The connections to one peer.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PeerStatus {
    pub site: String,
    pub address: String,
    pub connections: usize,
    pub rtt_ms: u64,
    pub sent_bytes: u64,
    pub lost_packets: u64,
    /// How much work each lane's data is worth right now, from "raw" to "zstd9": how the link stands to the processors.
    #[serde(default)]
    pub levels: BTreeMap<String, String>,
    pub problem: Option<String>,
}

/// How many jobs a list holds.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
pub struct ListQuery {
    /// At most 1000; 20 without it.
    pub limit: Option<u32>,
}

/// Every error answer.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Problem {
    /// A sentence with cause and remedy.
    pub error: String,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Longhaul gateway",
        description = "Jobs of one site gateway",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(
        status,
        submit,
        list,
        find,
        pause,
        resume,
        cancel,
        orders::resolve,
        orders::forget,
        make_plan,
        prepare,
        end_prepared,
        events::events,
        metrics_text,
        openapi
    )
)]
struct Description;

/// The OpenAPI description, as JSON.
pub fn description() -> String {
    Description::openapi().to_pretty_json().unwrap_or_default()
}

/// All routes.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/jobs", post(submit).get(list))
        .route("/v1/jobs/{id}", get(find))
        .route("/v1/jobs/{id}/events", get(events::events))
        .route("/v1/jobs/{id}/pause", post(pause))
        .route("/v1/jobs/{id}/resume", post(resume))
        .route("/v1/jobs/{id}/cancel", post(cancel))
        .route("/v1/jobs/{id}/resolve", post(orders::resolve))
        .route("/v1/jobs/{id}/forget", post(orders::forget))
        .route("/v1/plan", post(make_plan))
        .route("/v1/prepare", post(prepare))
        .route("/v1/prepare/end", post(end_prepared))
        .route("/metrics", get(metrics_text))
        .route("/openapi.json", get(openapi))
        .fallback(|| async {
            problem(
                StatusCode::NOT_FOUND,
                "there is nothing here; see /openapi.json".to_owned(),
            )
        })
        .layer(middleware::from_fn_with_state(words::bodies(), words::whole_body))
        .layer(middleware::map_response(words::in_words))
        .with_state(api)
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem { error })).into_response()
}

impl IntoResponse for JobError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Spec(_) | Self::NoSuchPeer { .. } | Self::NoSuchTenant { .. } => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            Self::NoSuchJob(_) => StatusCode::NOT_FOUND,
            Self::NotLive | Self::Ambiguous(_) | Self::WrongState { .. } => StatusCode::CONFLICT,
            Self::Agent(refusal) if refusal.kind.is_transient() => StatusCode::SERVICE_UNAVAILABLE,
            Self::Agent(_) => StatusCode::CONFLICT,
            Self::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::TooManyWatchers => StatusCode::SERVICE_UNAVAILABLE,
        };
        problem(status, chain(&self))
    }
}

/// A body that is no job, said in words.
fn read_spec(body: &[u8]) -> Result<JobSpec, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        Box::new(problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("the body is not a job: {error}"),
        ))
    })
}

/// The gateway, its agents, peers and jobs.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(api): State<Api>) -> Result<Json<Status>, JobError> {
    let peer = |peer: &Arc<crate::send::transmit::Peer>| {
        let stats = peer.stats();
        PeerStatus {
            site: peer.settings.site.clone(),
            address: peer.settings.address.clone(),
            connections: stats.connections,
            rtt_ms: stats.rtt_ms,
            sent_bytes: stats.sent_bytes,
            lost_packets: stats.lost_packets,
            levels: peer
                .levels()
                .map(|(lane, level)| (lane.to_owned(), level.to_string()))
                .into(),
            problem: stats.problem,
        }
    };
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        identity: api.identity.clone(),
        agents: api.jobs.agents().names(),
        peers: api.jobs.peers().iter().map(peer).collect(),
        jobs: api.jobs.newest(20).await?,
        prepared: preparing::list(api.jobs.agents()).await,
    }))
}

/// Metrics, in Prometheus' text format 0.0.4.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain; version=0.0.4")))]
async fn metrics_text(State(api): State<Api>) -> Result<Response, JobError> {
    api.gauges.refresh(&api.jobs).await?;
    Ok((
        [(CONTENT_TYPE, "text/plain; version=0.0.4")],
        api.metrics.render(),
    )
        .into_response())
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json")))]
async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/json")], description()).into_response()
}

/// Takes a job and starts it.
#[utoipa::path(post, path = "/v1/jobs", request_body = JobSpec,
    responses((status = 201, body = JobRecord), (status = 422, body = Problem)))]
async fn submit(State(api): State<Api>, body: axum::body::Bytes) -> Response {
    let spec = match read_spec(&body) {
        Ok(spec) => spec,
        Err(refused) => return *refused,
    };
    match api.jobs.submit(spec).await {
        Ok(record) => (StatusCode::CREATED, Json(record)).into_response(),
        Err(error) => error.into_response(),
    }
}

/// The newest jobs, newest first.
#[utoipa::path(get, path = "/v1/jobs", params(ListQuery), responses((status = 200, body = Vec<JobRecord>)))]
async fn list(
    State(api): State<Api>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<JobRecord>>, JobError> {
    Ok(Json(api.jobs.newest(query.limit.unwrap_or(20).min(1000)).await?))
}

/// One job, by its number or the start of it.
#[utoipa::path(get, path = "/v1/jobs/{id}", responses((status = 200, body = JobRecord), (status = 404, body = Problem)))]
async fn find(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<JobRecord>, JobError> {
    Ok(Json(api.jobs.find(&id).await?))
}

/// Ends the attempt; what is durable stays.
#[utoipa::path(post, path = "/v1/jobs/{id}/pause",
    responses((status = 200, body = JobRecord), (status = 404, body = Problem), (status = 409, body = Problem)))]
async fn pause(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<JobRecord>, JobError> {
    Ok(Json(api.jobs.wish(&id, Wish::Pause).await?))
}

/// Goes on with a paused or failed job.
#[utoipa::path(post, path = "/v1/jobs/{id}/resume",
    responses((status = 200, body = JobRecord), (status = 404, body = Problem), (status = 409, body = Problem)))]
async fn resume(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<JobRecord>, JobError> {
    Ok(Json(api.jobs.wish(&id, Wish::Run).await?))
}

/// Ends the job and removes its partial copy.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel",
    responses((status = 200, body = JobRecord), (status = 404, body = Problem), (status = 409, body = Problem)))]
async fn cancel(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<JobRecord>, JobError> {
    Ok(Json(api.jobs.wish(&id, Wish::Cancel).await?))
}

/// Asks both sides what a run would do; touches nothing.
#[utoipa::path(post, path = "/v1/plan", request_body = JobSpec,
    responses((status = 200, body = Plan), (status = 422, body = Problem)))]
async fn make_plan(State(api): State<Api>, body: axum::body::Bytes) -> Response {
    let spec = match read_spec(&body) {
        Ok(spec) => spec,
        Err(refused) => return *refused,
    };
    let context = spec
        .check()
        .map_err(JobError::from)
        .and_then(|()| api.jobs.context(&spec));
    match context {
        Ok(context) => {
            let measured = api.jobs.measured(&spec.target.site).await;
            Json(plan::plan(&context, &spec, measured).await).into_response()
        }
        Err(error) => error.into_response(),
    }
}

/// Switches the dirty bitmaps of a running VM on ahead of a run.
#[utoipa::path(post, path = "/v1/prepare", request_body = JobSpec,
    responses((status = 200, body = PreparedReport), (status = 409, body = Problem), (status = 422, body = Problem),
        (status = 503, body = Problem)))]
async fn prepare(State(api): State<Api>, body: axum::body::Bytes) -> Response {
    ask_to_prepare(&api, &body, preparing::Wish::Begin).await
}

/// Takes them away again.
#[utoipa::path(post, path = "/v1/prepare/end", request_body = JobSpec,
    responses((status = 200, body = PreparedReport), (status = 409, body = Problem), (status = 422, body = Problem),
        (status = 503, body = Problem)))]
async fn end_prepared(State(api): State<Api>, body: axum::body::Bytes) -> Response {
    ask_to_prepare(&api, &body, preparing::Wish::End).await
}

async fn ask_to_prepare(api: &Api, body: &[u8], wish: preparing::Wish) -> Response {
    let spec = match read_spec(body) {
        Ok(spec) => spec,
        Err(refused) => return *refused,
    };
    match preparing::prepare(api.jobs.agents(), &spec, wish).await {
        Ok(report) => Json(report).into_response(),
        Err(error) => error.into_response(),
    }
}
