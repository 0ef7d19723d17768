//! The worker's side: HTTP on the control socket.
//!
//! Whoever could open the socket may ask everything and change lists; that is what the file's rights are for. Requests
//! cost the packet path nothing but what shards answer, in parts. There are bounds for connections, for what a request
//! may hold, and for how long its header may take.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, channel::Channel};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tungate_config::{Egress, parse_list};
use tungate_engine::Policy;
use tungate_engine::policy::ListEntry;

use super::lists::What;
use super::{Ask, Done, ListChange, Refused, Report, answers, api};
use crate::driver::{Asker, unix_time};

/// Connections that are served at once; others wait.
const CONNECTIONS_MAX: usize = 32;
/// Most that a request's body may hold, in bytes: lists of a million entries.
const BODY_MAX: usize = 64 << 20;
/// How long a request's header may take.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// Time between two lines of a watch, unless another is asked for, and what may be asked for.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const WATCH_INTERVALS: std::ops::RangeInclusive<u64> = 100..=3_600_000;
/// Longest that an entry may be asked to hold, in seconds: what a configuration may say of times.
const TTL_MAX: u64 = 365 * 24 * 60 * 60;

/// The paths there are, and what may be done with each.
const PATHS: [(&str, &[Method]); 10] = [
    (api::STATUS, &[Method::GET]),
    (api::FLOWS, &[Method::GET]),
    (api::FLOWS_WATCH, &[Method::GET]),
    (api::COUNTERS, &[Method::GET]),
    (api::POLICY, &[Method::GET]),
    (api::POLICY_RELOAD, &[Method::POST]),
    (api::LISTS, &[Method::GET, Method::PUT]),
    (api::LISTS_ADD, &[Method::POST]),
    (api::LISTS_REMOVE, &[Method::POST]),
    (api::DRAIN, &[Method::POST]),
];

type Body = BoxBody<Bytes, Infallible>;

/// What holds now.
#[derive(Debug, Clone)]
pub(crate) struct Current {
    pub(crate) policy: Arc<Policy>,
    /// How many of the last list entries have come by this socket.
    pub(crate) added: usize,
    pub(crate) egresses: Arc<[Egress]>,
    pub(crate) draining: bool,
}

/// Something to be asked of the supervisor, and who waits for its answer.
pub(crate) type Asked = (Ask, oneshot::Sender<Result<Done, Refused>>);

/// Serves the control socket.
pub(crate) struct Server {
    pub(crate) asker: Asker,
    pub(crate) shards: usize,
    pub(crate) current: watch::Receiver<Current>,
    pub(crate) asks: mpsc::Sender<Asked>,
}

struct Serving {
    server: Server,
    since: Instant,
}

impl Server {
    /// Serves as long as the runtime runs.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn start(self, listener: StdUnixListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let serving = Arc::new(Serving {
            server: self,
            since: Instant::now(),
        });
        tokio::spawn(accept(listener, serving));
        Ok(())
    }
}

async fn accept(listener: UnixListener, serving: Arc<Serving>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return; // it is never closed
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot take a connection");
                tokio::time::sleep(Duration::from_millis(100)).await; // descriptors may have run out
                continue;
            }
        };
        let user = stream.peer_cred().ok().map(|peer| peer.uid());
        let serving = serving.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let serving = serving.clone();
                async move { Ok::<_, Infallible>(serving.answer(request, user).await) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIME)
                .serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection to the control socket has broken");
            }
            drop(place);
        });
    }
}

impl Serving {
    async fn answer(&self, request: Request<Incoming>, user: Option<u32>) -> Response<Body> {
        match self.serve(request, user).await {
            Ok(response) => response,
            Err(Refused { kind, message }) => {
                let failure = api::Failure {
                    error: api::Error { kind, message },
                };
                json(StatusCode::from_u16(kind.status()).unwrap_or_default(), &failure)
            }
        }
    }

    async fn serve(&self, request: Request<Incoming>, user: Option<u32>) -> Result<Response<Body>, Refused> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path();
        let Some((path, methods)) = PATHS.into_iter().find(|(known, _)| *known == path) else {
            let paths = PATHS.map(|(path, _)| path).join(", ");
            let message = format!("there is no {path}: there are {paths}");
            return Err(Refused::new(api::ErrorKind::NoSuchPath, message));
        };
        if !methods.contains(&parts.method) {
            let allowed = methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
            let message = format!("{path} is for {allowed}, not for {}", parts.method);
            let error = api::Error {
                kind: api::ErrorKind::Method,
                message,
            };
            let mut response = json(StatusCode::METHOD_NOT_ALLOWED, &api::Failure { error });
            response
                .headers_mut()
                .extend(allowed.parse().map(|allowed| (ALLOW, allowed)));
            return Ok(response);
        }
        let query = Query::of(path, parts.uri.query())?;
        match (path, &parts.method) {
            (api::STATUS, _) => self.status().await,
            (api::FLOWS, _) => {
                let (flows, _) = answers::flows(&self.server.asker, query.limit, None).await;
                Ok(ok(&flows))
            }
            (api::FLOWS_WATCH, _) => Ok(self.watch(query)),
            (api::COUNTERS, _) => {
                let report = self.report().await?;
                Ok(ok(&answers::counters(self.server.asker.totals().await, report)))
            }
            (api::POLICY, _) => {
                let current = self.current();
                Ok(ok(&answers::policy(&current.policy, &current.egresses)))
            }
            (api::LISTS, &Method::GET) => {
                let current = self.current();
                let lists = &current.policy.spec().lists;
                Ok(ok(&answers::entries(
                    lists,
                    current.added,
                    unix_time(),
                    query.address,
                    query.limit,
                )))
            }
            (api::LISTS, _) => {
                let named: api::Named = required(body).await?;
                self.change(What::Replace(parse(&named.entries, true)?), user)
                    .await
            }
            (api::LISTS_REMOVE, _) => {
                let named: api::Named = required(body).await?;
                self.change(What::Remove(parse(&named.entries, false)?), user)
                    .await
            }
            (api::LISTS_ADD, _) => {
                let add: api::Add = required(body).await?;
                let mut entries = parse(&add.entries, false)?;
                if let Some(ttl) = add.ttl_seconds {
                    if !(1..=TTL_MAX).contains(&ttl) {
                        return Err(bad(format!("ttl_seconds is from 1 to {TTL_MAX}, not {ttl}")));
                    }
                    let expires = unix_time() + ttl;
                    entries.iter_mut().for_each(|entry| entry.expires = Some(expires));
                }
                self.change(What::Add(entries), user).await
            }
            (api::POLICY_RELOAD, _) => {
                tracing::info!(user, "the control socket asks for a reload");
                match self.ask(Ask::Reload).await? {
                    Done::Reloaded(reloaded) => Ok(ok(&reloaded)),
                    other => Err(unexpected(&other)),
                }
            }
            (_, _) => {
                let drain: api::Drain = optional(body).await?.unwrap_or_default();
                tracing::info!(user, "the control socket asks for the end");
                let open_flows = answers::open_flows(&self.server.asker.totals().await);
                match self
                    .ask(Ask::Drain {
                        seconds: drain.seconds,
                    })
                    .await?
                {
                    Done::Draining { seconds } => Ok(ok(&api::Draining { seconds, open_flows })),
                    other => Err(unexpected(&other)),
                }
            }
        }
    }

    async fn status(&self) -> Result<Response<Body>, Refused> {
        let report = self.report().await?;
        let totals = self.server.asker.totals().await;
        let current = self.current();
        let spec = current.policy.spec();
        Ok(ok(&api::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.since.elapsed().as_secs(),
            draining: current.draining,
            shards: self.server.shards,
            open_flows: answers::open_flows(&totals),
            buffer_bytes: answers::buffer_bytes(&totals),
            configuration: report.configuration,
            list_entries: spec.lists.len(),
            rules: spec.rules.len(),
            prefilter: report.prefilter,
        }))
    }

    /// A line of JSON in each interval, until nobody reads them.
    fn watch(&self, query: Query) -> Response<Body> {
        let asker = self.server.asker.clone();
        let (mut lines, body) = Channel::<Bytes, Infallible>::new(1);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(query.interval);
            let mut before: Option<(answers::Look, Instant)> = None;
            loop {
                ticks.tick().await;
                let now = Instant::now();
                let since = before.as_ref().map(|(look, then)| (look, now - *then));
                let (flows, look) = answers::flows(&asker, query.limit, since).await;
                before = Some((look, now));
                let mut line = serde_json::to_vec(&flows).unwrap_or_default();
                line.push(b'\n');
                if lines.send_data(line.into()).await.is_err() {
                    return;
                }
            }
        });
        let mut response = Response::new(body.boxed());
        let kind = hyper::header::HeaderValue::from_static("application/x-ndjson");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    }

    async fn change(&self, what: What, user: Option<u32>) -> Result<Response<Body>, Refused> {
        let entries = what.to_string();
        let change = ListChange {
            what,
            at: unix_time(),
        };
        match self.ask(Ask::Change(change)).await? {
            Done::Changed(changed) => {
                tracing::info!(
                    user,
                    change = entries,
                    added = changed.added,
                    renewed = changed.renewed,
                    removed = changed.removed,
                    total = changed.total,
                    "lists have been changed"
                );
                Ok(ok(&changed))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn report(&self) -> Result<Report, Refused> {
        match self.ask(Ask::Report).await? {
            Done::Report(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    async fn ask(&self, ask: Ask) -> Result<Done, Refused> {
        let gone = || Refused::new(api::ErrorKind::Failed, "the appliance is about to end");
        let (sender, receiver) = oneshot::channel();
        self.server.asks.send((ask, sender)).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }

    fn current(&self) -> Current {
        self.server.current.borrow().clone()
    }
}

/// What may stand behind a path's `?`.
struct Query {
    limit: usize,
    interval: Duration,
    address: Option<IpAddr>,
}

impl Query {
    fn of(path: &str, text: Option<&str>) -> Result<Self, Refused> {
        let mut query = Self {
            limit: usize::MAX,
            interval: WATCH_INTERVAL,
            address: None,
        };
        for (key, value) in form_urlencoded::parse(text.unwrap_or_default().as_bytes()) {
            match (path, key.as_ref()) {
                (api::FLOWS | api::FLOWS_WATCH | api::LISTS, "limit") => {
                    let limit: NonZeroUsize = value
                        .parse()
                        .map_err(|_| bad(format!("limit is a number from 1, not `{value}`")))?;
                    query.limit = limit.get();
                }
                (api::FLOWS_WATCH, "interval_ms") => {
                    let millis: Option<u64> = value.parse().ok();
                    let Some(millis) = millis.filter(|millis| WATCH_INTERVALS.contains(millis)) else {
                        let (least, most) = WATCH_INTERVALS.into_inner();
                        return Err(bad(format!(
                            "interval_ms is from {least} to {most}, not `{value}`"
                        )));
                    };
                    query.interval = Duration::from_millis(millis);
                }
                (api::LISTS, "address") => {
                    let address = value
                        .parse()
                        .map_err(|_| bad(format!("`{value}` is no address")))?;
                    query.address = Some(address);
                }
                _ => return Err(bad(format!("{path} has no parameter `{key}`"))),
            }
        }
        Ok(query)
    }
}

/// Reads list entries, all of which must be sound.
fn parse(lines: &[String], may_be_none: bool) -> Result<Vec<ListEntry>, Refused> {
    if lines.is_empty() && !may_be_none {
        return Err(bad("entries is empty".to_owned()));
    }
    if let Some(line) = lines.iter().find(|line| line.contains(['\n', '\r', '#'])) {
        return Err(bad(format!("{line:?} is not one entry")));
    }
    let list =
        parse_list(lines.join("\n").as_bytes(), "entries").map_err(|mistakes| bad(mistakes.render(false)))?;
    if list.entries.len() != lines.len() {
        return Err(bad("an entry is empty".to_owned()));
    }
    Ok(list.entries)
}

async fn required<T: DeserializeOwned>(body: Incoming) -> Result<T, Refused> {
    match optional(body).await? {
        Some(value) => Ok(value),
        None => Err(bad("a JSON object is needed as the request's body".to_owned())),
    }
}

async fn optional<T: DeserializeOwned>(body: Incoming) -> Result<Option<T>, Refused> {
    let bytes = match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            return Err(bad(format!("the body has more than {BODY_MAX} bytes")));
        }
        Err(error) => return Err(bad(format!("the body cannot be read: {error}"))),
    };
    if bytes.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| bad(format!("the body is not as it should be: {error}")))
}

fn bad(message: String) -> Refused {
    Refused::new(api::ErrorKind::BadRequest, message)
}

fn unexpected(done: &Done) -> Refused {
    Refused::new(
        api::ErrorKind::Failed,
        format!("the supervisor has answered with {done:?}"),
    )
}

fn ok(value: &impl Serialize) -> Response<Body> {
    json(StatusCode::OK, value)
}

fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n'); // for people with curl
    let mut response = Response::new(Full::new(Bytes::from(bytes)).boxed());
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
