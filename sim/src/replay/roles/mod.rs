//! Who is client, who is target, and which conversation a captured packet belongs to.
//!
//! The client of a TCP conversation is the sender of its SYN, else the receiver of its SYN-ACK, else the sender of its
//! first packet; when both sides send a SYN, the first is the client. A UDP packet to an endpoint that has sent
//! something within the mapping's idle time comes from the target, whoever sent it. An echo request comes from the
//! client, a reply to one from the target, and so does an ICMP error that quotes what a client has sent. Everything
//! else goes by address pair and protocol: the sender of the first packet is the client. Where only some networks
//! count as clients, nobody else becomes one.
//!
//! A SYN with another initial sequence number, or one after RST, refusal or both FINs, starts a new flow on the same
//! 4-tuple; other packets belong to the last flow there.
//!
//! Conversations are forgotten when they have been silent for longer than the engine holds their flows, so the tables
//! are bounded by what is open. Whether one is still remembered is decided when a packet looks for it; the queues only
//! see to it that memory is given back.

mod datagram;
mod key;
mod tables;
mod tcp;

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use ipnet::IpNet;
use tungate_engine::config::Timeouts;
use tungate_engine::packet::TcpFlags;
use tungate_engine::{Protocol, ShardId, Timestamp};

use self::key::{Key, sorted};
use self::tcp::TcpState;
use super::SHARDS;

/// What of a packet decides about roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Facts {
    Tcp {
        ports: (u16, u16),
        flags: TcpFlags,
        sequence: u32,
        acknowledgment: u32,
    },
    Udp {
        ports: (u16, u16),
    },
    EchoRequest {
        identifier: u16,
    },
    EchoReply {
        identifier: u16,
    },
    /// An ICMP error; the conversation of the packet it quotes, seen from who had sent that.
    Error {
        protocol: u8,
        sender: (IpAddr, u16),
        receiver: (IpAddr, u16),
    },
    /// Anything else, by IP protocol number.
    Other {
        protocol: u8,
    },
}

/// Where a packet belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It comes from the client of this conversation.
    Client(Place),
    /// It comes from the target of this conversation.
    Target(Place),
    /// Neither end counts as a client.
    Outside,
}

/// Who has sent a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    Client,
    Target,
}

/// A conversation's place in a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) shard: ShardId,
    /// Where in the shard's list of flows it is played.
    pub(super) slot: u32,
    /// Its number in the report; 0 where it is no flow.
    pub(super) flow: u64,
}

/// The beginning of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Begins {
    /// `None` for what is no flow.
    pub(super) protocol: Option<Protocol>,
    pub(super) client: SocketAddr,
    pub(super) target: SocketAddr,
    /// The slot of the flow on the same 4-tuple before.
    pub(super) replaces: Option<u32>,
}

/// Idle times after which conversations are forgotten.
const SILENCES: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silence {
    /// A question and answer over UDP.
    Dns,
    /// An echo session.
    Echo,
    /// A UDP mapping.
    Udp,
    /// TCP that nobody has answered, or that has ended; or no flow.
    Short,
    /// TCP that may go on.
    Long,
}

/// The conversations of a capture.
pub(super) struct Roles {
    clients: Vec<IpNet>,
    silences: [u64; SILENCES],
    hasher: FixedState,
    conversations: Vec<Conversation>,
    free: Vec<u32>,
    by_key: HashTable<u32>,
    endpoints: HashTable<Endpoint>,
    pairs: HashTable<Pair>,
    /// What to look at when, by [`Silence`].
    queues: [VecDeque<(u64, Entry)>; SILENCES],
    /// Slots of TCP flows that have made room for another, in which something may still be on its way.
    retired: VecDeque<(u64, Gone)>,
    /// Nothing in these queues is to be looked at up to this time.
    quiet_until: u64,
    gone: Vec<Gone>,
    /// What began with the packet that was asked about last.
    begun: Option<Begins>,
    slots: [Slots; SHARDS as usize],
    flows: u64,
}

/// A slot that is not needed any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) shard: ShardId,
    pub(super) slot: u32,
}

#[derive(Debug, Default)]
struct Slots {
    free: Vec<u32>,
    used: u32,
}

struct Conversation {
    key: Key,
    generation: u32,
    client: SocketAddr,
    target: IpAddr,
    place: Place,
    last: u64,
    silence: Silence,
    tcp: TcpState,
}

/// A UDP endpoint that has sent as a client.
#[derive(Debug)]
struct Endpoint {
    address: SocketAddr,
    last: u64,
    silence: Silence,
}

/// Which of two addresses was last seen as a client of the other.
#[derive(Debug)]
struct Pair {
    addresses: (IpAddr, IpAddr),
    client: IpAddr,
    conversations: u32,
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    Conversation { index: u32, generation: u32 },
    Endpoint(SocketAddr),
}

/// How much longer than the engine the tables remember.
const GRACE: u64 = 300_000_000_000;

impl Roles {
    /// Tables for a capture in which addresses of `clients` count as clients; all do if it is empty.
    pub(super) fn new(clients: &[IpNet], timeouts: &Timeouts) -> Self {
        let nanos = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            clients: clients.to_vec(),
            silences: [
                nanos(timeouts.dns),
                nanos(timeouts.icmp),
                nanos(timeouts.udp),
                nanos(timeouts.connect.max(timeouts.half_close)).saturating_add(GRACE),
                nanos(timeouts.tcp_idle).saturating_add(GRACE),
            ],
            hasher: FixedState::with_seed(0),
            conversations: Vec::new(),
            free: Vec::new(),
            by_key: HashTable::new(),
            endpoints: HashTable::new(),
            pairs: HashTable::new(),
            queues: Default::default(),
            retired: VecDeque::new(),
            quiet_until: u64::MAX,
            gone: Vec::new(),
            begun: None,
            slots: Default::default(),
            flows: 0,
        }
    }

    /// Finds the conversation of a packet, or begins one. `owner` says which shard owns what the given client sends.
    pub(super) fn role(
        &mut self,
        now: Timestamp,
        source: IpAddr,
        destination: IpAddr,
        facts: &Facts,
        owner: impl FnOnce(SocketAddr) -> ShardId,
    ) -> Role {
        let now = now.as_nanos();
        match *facts {
            Facts::Tcp {
                ports,
                flags,
                sequence,
                acknowledgment,
            } => {
                let (source, destination) = ((source, ports.0), (destination, ports.1));
                self.tcp(now, source, destination, (flags, sequence, acknowledgment), owner)
            }
            Facts::Udp { ports } => {
                let (source, destination) = endpoints(source, destination, ports);
                self.udp(now, source, destination, owner)
            }
            Facts::EchoRequest { identifier } => {
                let client = SocketAddr::new(source, identifier);
                self.echo_request(now, client, destination, owner)
            }
            Facts::EchoReply { identifier } => {
                let client = SocketAddr::new(destination, identifier);
                let key = Key::echo(client, source);
                match self.find(now, &key) {
                    Some(index) => Role::Target(self.touch(now, index)),
                    None => self.pair(now, source, destination, icmp_number(source), owner),
                }
            }
            Facts::Error {
                protocol,
                sender,
                receiver,
            } => match self.quoted(now, protocol, sender, receiver) {
                Some(role) => role,
                None => self.pair(now, source, destination, icmp_number(source), owner),
            },
            Facts::Other { protocol } => self.pair(now, source, destination, protocol, owner),
        }
    }

    /// The conversation that began with the packet that was asked about last, if one did: it is told once.
    pub(super) fn take_begun(&mut self) -> Option<Begins> {
        self.begun.take()
    }

    /// Who sends a fragment, and the conversation it belongs to where that is known already. `ports` are those of a
    /// first fragment of this protocol.
    pub(super) fn of_fragment(
        &mut self,
        now: Timestamp,
        source: IpAddr,
        destination: IpAddr,
        ports: Option<(u8, (u16, u16))>,
    ) -> (Sender, Option<Place>) {
        let now = now.as_nanos();
        if !self.counts(source) && !self.counts(destination) {
            return (Sender::Target, None);
        }
        let sender = |from_client| {
            if from_client {
                Sender::Client
            } else {
                Sender::Target
            }
        };
        let guess = sender(self.is_client(source, destination));
        let Some((protocol, ports)) = ports else {
            return (guess, None);
        };
        let (source, destination) = endpoints(source, destination, ports);
        let (key, from_client) = match protocol {
            6 => {
                let end = |address: SocketAddr| (address.ip(), address.port());
                (Key::tcp(end(source), end(destination)).0, None)
            }
            17 => {
                let endpoint = self
                    .endpoint(destination)
                    .map(|endpoint| (endpoint.last, endpoint.silence));
                let to_client = endpoint.is_some_and(|(last, silence)| !self.is_silent(now, last, silence));
                let (client, target) = if to_client {
                    (destination, source)
                } else {
                    (source, destination)
                };
                (Key::udp(client, target), Some(!to_client))
            }
            _ => return (guess, None),
        };
        match self.find(now, &key) {
            Some(index) => {
                let conversation = &self.conversations[index as usize];
                (sender(conversation.client == source), Some(conversation.place))
            }
            None => (from_client.map_or(guess, sender), None),
        }
    }

    /// Whether `source` is the client of `destination`, as far as the pair is known; where it is not, it is one.
    fn is_client(&self, source: IpAddr, destination: IpAddr) -> bool {
        let addresses = sorted(source, destination);
        let found = self.pairs.find(self.hasher.hash_one(addresses), |pair| {
            pair.addresses == addresses
        });
        match found {
            Some(pair) => pair.client == source,
            None => self.counts(source) || !self.counts(destination),
        }
    }
}

fn endpoints(source: IpAddr, destination: IpAddr, ports: (u16, u16)) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(source, ports.0),
        SocketAddr::new(destination, ports.1),
    )
}

fn icmp_number(address: IpAddr) -> u8 {
    if address.is_ipv6() { 58 } else { 1 }
}
