//! Upstreams: the sockets that stand for flows outside.

pub(crate) mod address;
pub(crate) mod batch;
pub(crate) mod errors;
mod headers;
pub(crate) mod ping;
pub(crate) mod relayed;
pub(crate) mod socket;
pub(crate) mod stock;
pub(crate) mod tcp;
pub(crate) mod udp;

use mio::event::Event;
use socket2::Socket;
use tokio::task::AbortHandle;

pub(crate) use batch::Batch;
pub(crate) use ping::Ping;
pub(crate) use relayed::{Associating, Relayed};
pub(crate) use socket::{SocketSetup, Transport};
pub(crate) use stock::Broker;
pub(crate) use tcp::Tcp;
pub(crate) use udp::Udp;

/// What the poll says of a socket.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Readiness {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other side has sent FIN, or the connection is gone.
    pub(crate) read_closed: bool,
    pub(crate) error: bool,
}

impl From<&Event> for Readiness {
    fn from(event: &Event) -> Self {
        Self {
            readable: event.is_readable(),
            writable: event.is_writable(),
            read_closed: event.is_read_closed(),
            error: event.is_error(),
        }
    }
}

/// A flow's upstream.
#[derive(Debug)]
pub(crate) enum Upstream {
    Tcp(Tcp),
    Udp(Udp),
    Ping(Ping),
    Relayed(Relayed),
    /// Somebody else connects it.
    Dialing(#[expect(dead_code, reason = "it is there to be dropped")] Dialing),
    /// Somebody else makes its association.
    Associating(Associating),
}

/// A connection that is being made elsewhere; given up when dropped.
#[derive(Debug)]
pub(crate) struct Dialing(pub(crate) AbortHandle);

impl Drop for Dialing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Upstream {
    /// The sockets to poll.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        let (first, second) = match self {
            Self::Tcp(tcp) => (Some(tcp.socket()), None),
            Self::Udp(udp) => (Some(udp.socket()), None),
            Self::Ping(ping) => (Some(ping.socket()), None),
            Self::Relayed(relayed) => {
                let [datagrams, control] = relayed.sockets();
                (Some(datagrams), Some(control))
            }
            Self::Dialing(_) | Self::Associating(_) => (None, None),
        };
        first.into_iter().chain(second)
    }

    /// Takes note of what the poll says.
    pub(crate) fn on_ready(&mut self, ready: Readiness) {
        match self {
            Self::Tcp(tcp) => tcp.on_ready(ready),
            Self::Udp(udp) => udp.on_ready(ready),
            Self::Ping(ping) => ping.on_ready(ready),
            Self::Relayed(relayed) => relayed.on_ready(ready),
            Self::Dialing(_) | Self::Associating(_) => {}
        }
    }
}
