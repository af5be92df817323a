//! HTTP to a gateway's unix socket.
//!
//! Owns the connection and the sentence when there is none. Leaves what answers mean to the commands.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use longhaul_common::wire::words::cleaned;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::Problem;

/// Largest answer that is held at once.
const ANSWER_MAX: usize = 64 << 20;

/// Why the gateway did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("no gateway answers on {path}; start longhaul-gateway on this host, or say --api SOCKET")]
    NoGateway { path: PathBuf, source: std::io::Error },
    #[error("the connection to the gateway broke")]
    Broken(#[from] hyper::Error),
    #[error("{0}")]
    Refused(String),
    #[error("the gateway's answer is not understood; it may be another version")]
    Answer(#[from] serde_json::Error),
    #[error("the request cannot be made")]
    Request(#[from] hyper::http::Error),
}

/// The API's path of a job, which has a number of hex digits or the start of one.
pub(super) fn job_path(job: &str, rest: &str) -> Result<String, ClientError> {
    let is_start = !job.is_empty() && job.bytes().all(|byte| byte.is_ascii_hexdigit());
    match is_start {
        true => Ok(format!("/v1/jobs/{job}{rest}")),
        false => Err(ClientError::Refused(format!(
            "there is no job '{}'",
            cleaned(job)
        ))),
    }
}

/// A gateway's API.
#[derive(Clone, Debug)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::NoGateway {
            path: self.socket.clone(),
            source,
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "gateway");
        let request = request
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = collect(response).await?;
        let said = serde_json::from_slice::<Problem>(&body).map(|problem| problem.error);
        Err(ClientError::Refused(
            said.unwrap_or_else(|_| format!("the gateway answered {status}")),
        ))
    }

    /// Asks for something.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let response = self.send(Method::GET, path, Vec::new()).await?;
        Ok(serde_json::from_slice(&collect(response).await?)?)
    }

    /// Says something and takes the answer.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let response = self.send(Method::POST, path, body).await?;
        Ok(serde_json::from_slice(&collect(response).await?)?)
    }

    /// The lines of a stream.
    pub(super) async fn lines(&self, path: &str) -> Result<Lines, ClientError> {
        let response = self.send(Method::GET, path, Vec::new()).await?;
        Ok(Lines {
            body: response.into_body(),
            rest: Vec::new(),
        })
    }
}

async fn collect(response: Response<Incoming>) -> Result<Vec<u8>, ClientError> {
    let mut body = response.into_body();
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            all.extend_from_slice(&data);
        }
        if all.len() > ANSWER_MAX {
            return Err(ClientError::Refused(
                "the gateway's answer is too large".to_owned(),
            ));
        }
    }
    Ok(all)
}

/// A stream of lines.
pub(super) struct Lines {
    body: Incoming,
    rest: Vec<u8>,
}

impl Lines {
    /// The next line without its end; `None` at the stream's end.
    pub(super) async fn next(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            if self.rest.len() > ANSWER_MAX {
                return Err(ClientError::Refused(
                    "the gateway sends a line without end".to_owned(),
                ));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.rest.extend_from_slice(&data);
                    }
                }
                None => return Ok(None),
            }
        }
    }
}
