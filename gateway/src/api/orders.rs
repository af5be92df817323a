//! Orders to one agent past every attempt: a handover in doubt decided, a shadow removed.
//!
//! Owns their routes. Leaves what they mean to `job::order` and the agent.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;

use super::{Api, Problem, problem};
use crate::job::order::{ForgetOrder, OrderDone, ResolveOrder};

/// A body that is no such order, said in words.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        Box::new(problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("the body is not an order: {error}"),
        ))
    })
}

/// Decides a handover in doubt without the other side; says what that risks unless it is sure.
#[utoipa::path(post, path = "/v1/jobs/{id}/resolve", request_body = ResolveOrder,
    responses((status = 200, body = OrderDone), (status = 404, body = Problem), (status = 409, body = Problem),
        (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn resolve(State(api): State<Api>, Path(id): Path<String>, body: Bytes) -> Response {
    match read::<ResolveOrder>(&body) {
        Ok(order) => answer(api.jobs.resolve(&id, order).await),
        Err(refused) => *refused,
    }
}

/// Removes the images that a completed move of a running VM left at its source.
#[utoipa::path(post, path = "/v1/jobs/{id}/forget", request_body = ForgetOrder,
    responses((status = 200, body = OrderDone), (status = 404, body = Problem), (status = 409, body = Problem),
        (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn forget(State(api): State<Api>, Path(id): Path<String>, body: Bytes) -> Response {
    match read::<ForgetOrder>(&body) {
        Ok(order) => answer(api.jobs.forget(&id, order).await),
        Err(refused) => *refused,
    }
}

fn answer(done: Result<OrderDone, crate::job::table::JobError>) -> Response {
    match done {
        Ok(done) => Json(done).into_response(),
        Err(error) => error.into_response(),
    }
}
