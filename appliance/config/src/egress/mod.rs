//! Named ways out, in full.

mod section;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tungate_engine::policy::EgressId;

pub(crate) use section::{ReadEgresses, read_egresses, undefined};

/// A named way out with all the driver needs to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Egress {
    /// Unique name, as rules and reports use it.
    pub name: String,
    /// What it does.
    pub kind: EgressKind,
}

/// What an egress does with the flows that rules give it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EgressKind {
    /// Relays to the target itself.
    Direct {
        /// How its sockets are set up.
        socket: SocketOptions,
    },
    /// Relays by way of a SOCKS5 proxy, RFC 1928: TCP by CONNECT, UDP by UDP ASSOCIATE.
    Socks5(Proxy),
    /// Relays TCP by way of an HTTP proxy's CONNECT, RFC 9110 section 9.3.6.
    Http(Proxy),
    /// Relays by way of one of other egresses.
    Group(Group),
}

/// A proxy server and how to get to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxy {
    /// Where the proxy listens.
    pub address: Endpoint,
    /// Who to be there (RFC 1929 for SOCKS5, RFC 7617 for HTTP).
    pub login: Option<Login>,
    /// How the sockets towards it are set up.
    pub socket: SocketOptions,
}

/// A user of a proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    /// The user's name.
    pub username: String,
    /// The user's password, or where it is.
    pub password: Password,
}

/// A password, or where to find it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Password {
    /// The password itself; never printed.
    Inline(String),
    /// A file whose first line is the password. It has not been opened yet.
    File(PathBuf),
}

/// How a socket is set up before it connects.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SocketOptions {
    /// The firewall mark of its packets (SO_MARK).
    pub mark: Option<u32>,
    /// The interface it is bound to (SO_BINDTODEVICE).
    pub interface: Option<String>,
    /// The source address it is bound to.
    pub source: Source,
}

/// The source address of connections that leave by an egress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Source {
    /// Whatever the host's routes say.
    #[default]
    Host,
    /// This address of the host.
    Address(IpAddr),
    /// The client's own address, where the host may use it (IP_TRANSPARENT).
    Client,
}

/// A host and port to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The host.
    pub host: Host,
    /// The port, never 0.
    pub port: u16,
}

/// A host by address or by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Host {
    /// An address.
    Address(IpAddr),
    /// A name to be looked up when it is needed.
    Name(String),
}

/// Several egresses of which one is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The members in the order in which they are written; never groups themselves.
    pub members: Vec<EgressId>,
    /// Which of the healthy members is used.
    pub mode: GroupMode,
    /// How members are found healthy.
    pub check: HealthCheck,
}

/// Which of the healthy members of a [`Group`] is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GroupMode {
    /// The first one.
    #[default]
    Failover,
    /// The one whose checks are answered soonest.
    Latency,
}

/// How members of a [`Group`] are found healthy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Where each member must be able to connect to by TCP; without it a member is healthy until it fails.
    pub target: Option<Endpoint>,
    /// Time between two checks of a member.
    pub interval: Duration,
    /// When a check that was not answered has failed.
    pub timeout: Duration,
}

impl Default for HealthCheck {
    /// No checks, and the times that hold when there is a target: every 10 s, failed after 3 s.
    fn default() -> Self {
        Self {
            target: None,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(3),
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("Inline(…)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Address(address) => SocketAddr::new(*address, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}
