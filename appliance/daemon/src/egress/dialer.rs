//! Tasks that make connections which take more than a call of the system.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use socket2::Socket;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tungate_engine::FlowId;
use tungate_engine::io::{Open, Unreachable, UpstreamError};

use super::proxy::connect;
use super::{Egress, Kind, http, socks5};
use crate::driver::{Mailbox, Message};
use crate::upstream::Transport;
use crate::upstream::errors::connect_error;

/// Makes connections on behalf of shards.
#[derive(Debug, Clone)]
pub(crate) struct Dialer(Handle);

/// A SOCKS5 association.
#[derive(Debug)]
pub(crate) struct Association {
    /// Connected to the proxy's relay.
    pub(crate) socket: Socket,
    /// The association lives as long as this connection (RFC 1928, section 7).
    pub(crate) control: Socket,
}

/// Why a connection was not made.
#[derive(Debug)]
pub(super) enum DialError {
    /// The target's doing: another way out would meet the same.
    Target(UpstreamError),
    /// The way out has failed.
    Egress(anyhow::Error),
}

impl From<anyhow::Error> for DialError {
    fn from(error: anyhow::Error) -> Self {
        Self::Egress(error)
    }
}

impl Dialer {
    /// A dialer whose tasks run on `runtime`.
    pub(crate) fn new(runtime: Handle) -> Self {
        Self(runtime)
    }

    /// Connects a flow by `egress`, and reports to the shard by `mailbox`.
    pub(crate) fn connect(
        &self,
        egress: Arc<Egress>,
        open: &Open,
        flow: FlowId,
        mailbox: Arc<Mailbox>,
    ) -> AbortHandle {
        let (client, target) = (open.client.ip(), open.target);
        let task = async move {
            let dialed = egress.connect(Some(client), target).await;
            let dialed = dialed.map_err(|error| error.told(&egress.name, target));
            mailbox.send(Message::Dialed(flow, dialed));
        };
        self.0.spawn(task).abort_handle()
    }

    /// Makes a SOCKS5 association for a mapping, and reports to the shard by `mailbox`.
    pub(crate) fn associate(
        &self,
        egress: Arc<Egress>,
        open: &Open,
        flow: FlowId,
        mailbox: Arc<Mailbox>,
    ) -> AbortHandle {
        let (client, target) = (open.client.ip(), open.target);
        let task = async move {
            let associated = egress.associate(client).await;
            let associated = associated.map_err(|error| error.told(&egress.name, target));
            mailbox.send(Message::Associated(flow, associated));
        };
        self.0.spawn(task).abort_handle()
    }
}

impl Egress {
    /// Connects to `target` this way.
    pub(super) async fn connect(
        &self,
        client: Option<IpAddr>,
        target: SocketAddr,
    ) -> Result<Socket, DialError> {
        match &self.kind {
            Kind::Direct(setup) => match connect(setup, target, client).await {
                Ok(stream) => into_socket(stream),
                Err(error) => Err(match connect_error(&error) {
                    // No route by this interface or address.
                    UpstreamError::Egress | UpstreamError::Unreachable(Unreachable::Network) => {
                        DialError::Egress(error.into())
                    }
                    error @ (UpstreamError::Refused
                    | UpstreamError::Unreachable(_)
                    | UpstreamError::TimedOut
                    | UpstreamError::Exhausted) => DialError::Target(error),
                }),
            },
            Kind::Socks5(proxy) => {
                let mut stream = proxy.connect(client).await?;
                socks5::connect(&mut stream, proxy.login.as_ref(), target).await?;
                into_socket(stream)
            }
            Kind::Http(proxy) => {
                let mut stream = proxy.connect(client).await?;
                http::connect(&mut stream, proxy.login.as_ref(), target).await?;
                into_socket(stream)
            }
            Kind::Group(group) => Box::pin(group.connect(client, target)).await,
        }
    }

    async fn associate(&self, client: IpAddr) -> Result<Association, DialError> {
        let Kind::Socks5(proxy) = &self.kind else {
            unreachable!("only SOCKS5 proxies are asked for associations")
        };
        let mut stream = proxy.connect(Some(client)).await?;
        let server = stream
            .peer_addr()
            .map_err(|error| DialError::Egress(error.into()))?;
        let mut relay = socks5::associate(&mut stream, proxy.login.as_ref()).await?;
        if relay.ip().is_unspecified() {
            relay.set_ip(server.ip());
        }
        let connect = || {
            let socket = proxy.setup.open(Transport::Udp, relay.ip(), Some(client))?;
            socket.connect(&relay.into())?;
            Ok::<_, io::Error>(socket)
        };
        let socket = connect().map_err(|error| DialError::Egress(error.into()))?;
        let control = into_socket(stream)?;
        Ok(Association { socket, control })
    }
}

impl DialError {
    /// What the engine is told; the log hears of failed ways out.
    fn told(self, egress: &str, target: SocketAddr) -> UpstreamError {
        match self {
            Self::Target(error) => error,
            Self::Egress(error) => {
                tracing::warn!(egress, %target, error = format_args!("{error:#}"), "the way out has failed");
                UpstreamError::Egress
            }
        }
    }
}

fn into_socket(stream: tokio::net::TcpStream) -> Result<Socket, DialError> {
    match stream.into_std() {
        Ok(stream) => Ok(stream.into()),
        Err(error) => Err(DialError::Egress(error.into())),
    }
}
