//! What every request and every answer have in common: bodies that end, errors in words.
//!
//! Owns the limits of a request's body, and the form of errors that the router itself makes. Leaves meaning to the handlers. Promises
//! that a handler sees only whole bodies of at most [`BODY_MAX`] bytes, and that every error answer is a `Problem`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{ALLOW, CONTENT_TYPE};
use axum::middleware::Next;
use axum::response::Response;
use longhaul_common::wire::words::cleaned;
use tokio::sync::Semaphore;

use super::problem;

/// Largest body: a job of 256 disks with long paths.
pub(super) const BODY_MAX: usize = 1 << 20;
/// A body must be there by then.
const BODY_TIME: Duration = Duration::from_secs(10);
/// Bodies that are read at once.
const BODIES_MAX: usize = 32;

/// Places for bodies that are being read.
pub(super) fn bodies() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(BODIES_MAX))
}

/// Reads the body before the handler is called.
pub(super) async fn whole_body(
    State(bodies): State<Arc<Semaphore>>,
    request: Request,
    next: Next,
) -> Response {
    let (head, body) = request.into_parts();
    let reading = async {
        let _place = bodies.acquire().await;
        to_bytes(body, BODY_MAX).await
    };
    match tokio::time::timeout(BODY_TIME, reading).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(head, Body::from(bytes))).await,
        Ok(Err(_)) => problem(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is not complete, or larger than {BODY_MAX} bytes"),
        ),
        Err(_) => problem(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body was not there within {} s", BODY_TIME.as_secs()),
        ),
    }
}

/// Puts errors that no handler made into the form of all others.
pub(super) async fn in_words(response: Response) -> Response {
    let status = response.status();
    let json = |response: &Response| {
        let kind = response.headers().get(CONTENT_TYPE);
        kind.is_some_and(|kind| kind == "application/json")
    };
    if !(status.is_client_error() || status.is_server_error()) || json(&response) {
        return response;
    }
    let (head, body) = response.into_parts();
    let said = to_bytes(body, 4096).await.unwrap_or_default();
    let said = cleaned(String::from_utf8_lossy(&said).trim());
    let reason = status.canonical_reason().unwrap_or("refused");
    let mut answer = problem(
        status,
        if said.is_empty() {
            reason.to_lowercase()
        } else {
            said
        },
    );
    if let Some(allowed) = head.headers.get(ALLOW) {
        answer.headers_mut().insert(ALLOW, allowed.clone());
    }
    answer
}
