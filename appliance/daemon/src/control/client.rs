//! The commands' side of the control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Refused, api};

/// How long an appliance may take to answer: a change of large lists takes seconds, names of proxies are looked up.
const ANSWER_TIME: Duration = Duration::from_secs(90);

/// Speaks with the appliance behind a control socket.
#[derive(Debug)]
pub(crate) struct Client {
    path: PathBuf,
}

/// Why there is no speaking with an appliance.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    #[error(
        "no appliance is running here: nobody listens at {path}\n\
         hint: `tungate run` starts one; where [control] names another socket, so must --control",
        path = .0.display()
    )]
    NotRunning(PathBuf),
    #[error(
        "{path} may not be opened: permission denied\n\
         hint: root may, and the group that `group` in [control] names",
        path = .0.display()
    )]
    NotPermitted(PathBuf),
    #[error("the appliance has ended before it answered")]
    Ended,
    #[error("the appliance does not answer")]
    Silent,
}

/// Text that comes line by line, for as long as it is read.
pub(crate) struct Lines {
    body: Incoming,
    read: Vec<u8>,
}

impl std::error::Error for Refused {}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl Client {
    /// To the socket at `path`, which is opened for each request.
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Asks something.
    ///
    /// # Errors
    ///
    /// [`Unreachable`], [`Refused`], and others.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// Asks for a change.
    ///
    /// # Errors
    ///
    /// As with [`Self::get`].
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.call(Method::POST, path, serde_json::to_vec(body)?.into())
            .await
    }

    /// The same, to have something and nothing else.
    ///
    /// # Errors
    ///
    /// As with [`Self::get`].
    pub(crate) async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.call(Method::PUT, path, serde_json::to_vec(body)?.into())
            .await
    }

    /// Asks for what comes in lines.
    ///
    /// # Errors
    ///
    /// As with [`Self::get`].
    pub(crate) async fn lines(&self, path: &str) -> Result<Lines> {
        let body = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(Lines {
            body,
            read: Vec::new(),
        })
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let work = async {
            let body = self.send(method, path, body).await?;
            let bytes = body.collect().await.map_err(|_| Unreachable::Ended)?.to_bytes();
            serde_json::from_slice(&bytes)
                .context("the appliance's answer is not understood: is it of another version?")
        };
        timeout(ANSWER_TIME, work)
            .await
            .map_err(|_| Unreachable::Silent)?
    }

    /// Sends a request, and returns the body of a success.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Incoming> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| self.explain(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|_| Unreachable::Ended)?;
        tokio::spawn(connection); // it ends with the request
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "tungate")
            .body(Full::new(body))?;
        let response: Response<Incoming> = sender
            .send_request(request)
            .await
            .map_err(|_| Unreachable::Ended)?;
        let status = response.status();
        let body = response.into_body();
        if status.is_success() {
            return Ok(body);
        }
        let bytes = body.collect().await.map_err(|_| Unreachable::Ended)?.to_bytes();
        let failure: api::Failure = serde_json::from_slice(&bytes)
            .with_context(|| format!("the appliance refuses, and its answer is not understood: {status}"))?;
        let api::Error { kind, message } = failure.error;
        Err(Refused { kind, message }.into())
    }

    fn explain(&self, error: io::Error) -> anyhow::Error {
        let path = self.path.clone();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Unreachable::NotRunning(path).into()
            }
            io::ErrorKind::PermissionDenied => Unreachable::NotPermitted(path).into(),
            _ => anyhow::Error::from(error).context(format!("cannot open {}", path.display())),
        }
    }
}

impl Lines {
    /// The next line, without its end.
    ///
    /// # Errors
    ///
    /// [`Unreachable::Ended`] when there are no more.
    pub(crate) async fn next(&mut self) -> Result<Vec<u8>> {
        loop {
            if let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.read.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
                Some(Err(_)) | None => return Err(Unreachable::Ended.into()),
            }
        }
    }
}
