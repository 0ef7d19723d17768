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

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use ipnet::IpNet;
use tungate_engine::config::Timeouts;
use tungate_engine::packet::TcpFlags;
use tungate_engine::{Protocol, ShardId, Timestamp};

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

/// What a conversation is found by: its endpoints as numbers, which are compared and hashed at one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    addresses: (u128, u128),
    /// Ports, and what the endpoints have in common.
    rest: u64,
}

impl Key {
    /// Of both directions.
    fn tcp(one: SocketAddr, other: SocketAddr) -> Self {
        let (one, other) = ((number(one.ip()), one.port()), (number(other.ip()), other.port()));
        Self::new(1, one.min(other), one.max(other))
    }

    fn udp(client: SocketAddr, target: SocketAddr) -> Self {
        let end = |address: SocketAddr| (number(address.ip()), address.port());
        Self::new(2, end(client), end(target))
    }

    /// The client's port is the identifier.
    fn echo(client: SocketAddr, target: IpAddr) -> Self {
        Self::new(3, (number(client.ip()), client.port()), (number(target), 0))
    }

    /// Of both directions.
    fn pair(one: IpAddr, other: IpAddr, protocol: u8) -> Self {
        let (low, high) = sorted(one, other);
        Self::new(4, (number(low), protocol.into()), (number(high), 0))
    }

    fn new(kind: u64, (first, first_port): (u128, u16), (second, second_port): (u128, u16)) -> Self {
        Self {
            addresses: (first, second),
            rest: kind << 32 | u64::from(first_port) << 16 | u64::from(second_port),
        }
    }

    fn is_tcp(&self) -> bool {
        self.rest >> 32 == 1
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u128(self.addresses.0);
        state.write_u128(self.addresses.1);
        state.write_u64(self.rest);
    }
}

/// An address as a number. IPv4 addresses stand where no IPv6 address does that could be on a network: those that begin
/// with zeros and `0xfffe` are not assigned.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => 0xfffe_0000_0000 | u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
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

/// As much of a TCP connection's state as can be seen from outside.
#[derive(Debug, Clone, Copy, Default)]
struct TcpState {
    isn: Option<u32>,
    /// The target has sent something.
    answered: bool,
    reset: bool,
    client_fin: bool,
    target_fin: bool,
}

impl TcpState {
    fn has_ended(&self) -> bool {
        self.reset || (self.client_fin && self.target_fin)
    }
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
                let (source, destination) = endpoints(source, destination, ports);
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
            6 => (Key::tcp(source, destination), None),
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

    /// The slots of conversations that have been silent for too long, at `now`. Their places are free for new ones.
    pub(super) fn forget(&mut self, now: Timestamp, mut gone: impl FnMut(Gone)) {
        let now = now.as_nanos();
        for queue in 0..SILENCES {
            while let Some((_, entry)) = self.queues[queue].pop_front_if(|(at, _)| *at < now) {
                match entry {
                    Entry::Conversation { index, generation } => {
                        let conversation = &self.conversations[index as usize];
                        if conversation.generation != generation {
                            continue;
                        }
                        if self.is_silent(now, conversation.last, conversation.silence) {
                            self.remove(now, index);
                        } else {
                            self.enqueue(now, conversation.silence, entry);
                        }
                    }
                    Entry::Endpoint(address) => {
                        let Some(endpoint) = self.endpoint(address) else {
                            continue;
                        };
                        let (last, silence) = (endpoint.last, endpoint.silence);
                        if self.is_silent(now, last, silence) {
                            let hash = self.hasher.hash_one(address);
                            let found = self
                                .endpoints
                                .find_entry(hash, |endpoint| endpoint.address == address);
                            found.expect("just found").remove();
                        } else {
                            self.enqueue(now, silence, entry);
                        }
                    }
                }
            }
        }
        while let Some((_, retired)) = self.retired.pop_front_if(|(at, _)| *at < now) {
            self.gone.push(retired);
        }
        for each in self.gone.drain(..) {
            gone(each);
            self.slots[usize::from(each.shard.0)].free.push(each.slot);
        }
    }

    // ---- TCP ---------------------------------------------------------------------------------------------------

    fn tcp(
        &mut self,
        now: u64,
        source: SocketAddr,
        destination: SocketAddr,
        (flags, sequence, acknowledgment): (TcpFlags, u32, u32),
        owner: impl FnOnce(SocketAddr) -> ShardId,
    ) -> Role {
        let key = Key::tcp(source, destination);
        let is_syn = flags.syn() && !flags.ack();
        let is_syn_ack = flags.syn() && flags.ack();
        let found = self.find(now, &key);
        let begins = match found {
            None => true,
            Some(index) => {
                let conversation = &self.conversations[index as usize];
                let tcp = &conversation.tcp;
                let from_client = conversation.client == source;
                if is_syn && from_client {
                    tcp.isn != Some(sequence) || tcp.has_ended()
                } else if is_syn {
                    tcp.has_ended()
                } else if is_syn_ack && !from_client {
                    tcp.has_ended() && tcp.isn != Some(acknowledgment.wrapping_sub(1))
                } else {
                    false
                }
            }
        };
        let index = if begins {
            let (mut client, mut target) = match found {
                // The ends keep their roles, unless the other side now opens a connection.
                Some(index) if !is_syn => {
                    let client = self.conversations[index as usize].client;
                    (client, if client == source { destination } else { source })
                }
                _ if is_syn_ack => (destination, source),
                _ => (source, destination),
            };
            if !self.counts(client.ip()) {
                if !self.counts(target.ip()) {
                    return Role::Outside;
                }
                std::mem::swap(&mut client, &mut target);
            }
            let replaces = found.map(|index| self.conversations[index as usize].place.slot);
            if let Some(index) = found {
                self.remove(now, index);
            }
            let isn = match (is_syn, is_syn_ack) {
                (true, _) if client == source => Some(sequence),
                (_, true) if client == destination => Some(acknowledgment.wrapping_sub(1)),
                _ => None,
            };
            let begins = Begins {
                protocol: Some(Protocol::Tcp),
                client,
                target,
                replaces,
            };
            let index = self.begin(now, key, Silence::Short, begins, owner(client));
            self.conversations[index as usize].tcp.isn = isn;
            index
        } else {
            found.expect("a conversation that does not begin was found")
        };
        let conversation = &mut self.conversations[index as usize];
        let from_client = conversation.client == source;
        let tcp = &mut conversation.tcp;
        tcp.reset |= flags.rst();
        tcp.answered |= !from_client;
        if from_client {
            tcp.client_fin |= flags.fin();
        } else {
            tcp.target_fin |= flags.fin();
        }
        let silence = if tcp.has_ended() || (!tcp.answered && is_syn) {
            Silence::Short
        } else {
            Silence::Long
        };
        self.settle_silence(now, index, silence);
        let place = self.touch(now, index);
        if from_client {
            Role::Client(place)
        } else {
            Role::Target(place)
        }
    }

    // ---- UDP, ICMP and the rest --------------------------------------------------------------------------------

    fn udp(
        &mut self,
        now: u64,
        source: SocketAddr,
        destination: SocketAddr,
        owner: impl FnOnce(SocketAddr) -> ShardId,
    ) -> Role {
        let to_client = match self.endpoint(destination) {
            Some(endpoint) => {
                let (last, silence) = (endpoint.last, endpoint.silence);
                !self.is_silent(now, last, silence)
            }
            None => !self.counts(source.ip()),
        };
        let (client, target) = if to_client {
            (destination, source)
        } else {
            (source, destination)
        };
        if !self.counts(client.ip()) {
            return Role::Outside;
        }
        // What no socket could be asked for makes no mapping.
        if to_client || is_unicast(target.ip()) {
            self.use_endpoint(now, client, target.port(), to_client);
        }
        let silence = if target.port() == DNS_PORT {
            Silence::Dns
        } else {
            Silence::Udp
        };
        let key = Key::udp(client, target);
        let index = match self.find(now, &key) {
            Some(index) => index,
            None => {
                let begins = Begins {
                    protocol: Some(Protocol::Udp),
                    client,
                    target,
                    replaces: None,
                };
                self.begin(now, key, silence, begins, owner(client))
            }
        };
        let place = self.touch(now, index);
        if to_client {
            Role::Target(place)
        } else {
            Role::Client(place)
        }
    }

    fn use_endpoint(&mut self, now: u64, client: SocketAddr, port: u16, from_outside: bool) {
        let hash = self.hasher.hash_one(client);
        let known = self
            .endpoints
            .find_mut(hash, |endpoint| endpoint.address == client);
        match known {
            Some(endpoint) => {
                let was_silent = now.saturating_sub(endpoint.last) > self.silences[endpoint.silence as usize];
                endpoint.last = now;
                if was_silent {
                    endpoint.silence = Silence::Dns;
                }
                if port != DNS_PORT && !from_outside {
                    endpoint.silence = Silence::Udp;
                }
            }
            None if from_outside => {}
            None => {
                let silence = if port == DNS_PORT {
                    Silence::Dns
                } else {
                    Silence::Udp
                };
                let hasher = &self.hasher;
                let endpoint = Endpoint {
                    address: client,
                    last: now,
                    silence,
                };
                self.endpoints
                    .insert_unique(hash, endpoint, |endpoint| hasher.hash_one(endpoint.address));
                self.enqueue(now, silence, Entry::Endpoint(client));
            }
        }
    }

    fn endpoint(&self, address: SocketAddr) -> Option<&Endpoint> {
        self.endpoints.find(self.hasher.hash_one(address), |endpoint| {
            endpoint.address == address
        })
    }

    fn echo_request(
        &mut self,
        now: u64,
        client: SocketAddr,
        target: IpAddr,
        owner: impl FnOnce(SocketAddr) -> ShardId,
    ) -> Role {
        if !self.counts(client.ip()) {
            return self.pair(now, client.ip(), target, icmp_number(target), owner);
        }
        let key = Key::echo(client, target);
        let index = match self.find(now, &key) {
            Some(index) => index,
            None => {
                let begins = Begins {
                    protocol: Some(Protocol::Icmp),
                    client,
                    target: SocketAddr::new(target, 0),
                    replaces: None,
                };
                self.begin(now, key, Silence::Echo, begins, owner(client))
            }
        };
        Role::Client(self.touch(now, index))
    }

    /// The role of an ICMP error in the conversation of the packet it quotes.
    fn quoted(
        &mut self,
        now: u64,
        protocol: u8,
        sender: (IpAddr, u16),
        receiver: (IpAddr, u16),
    ) -> Option<Role> {
        let (sender, receiver) = (SocketAddr::from(sender), SocketAddr::from(receiver));
        let (key, other) = match protocol {
            6 => (Key::tcp(sender, receiver), None),
            17 => (Key::udp(sender, receiver), Some(Key::udp(receiver, sender))),
            1 | 58 => (Key::echo(sender, receiver.ip()), None),
            _ => return None,
        };
        let index = self.find(now, &key).or_else(|| self.find(now, &other?))?;
        let client = self.conversations[index as usize].client;
        let place = self.touch(now, index);
        Some(if client == sender {
            Role::Target(place)
        } else {
            Role::Client(place)
        })
    }

    fn pair(
        &mut self,
        now: u64,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        owner: impl FnOnce(SocketAddr) -> ShardId,
    ) -> Role {
        let key = Key::pair(source, destination, protocol);
        let index = match self.find(now, &key) {
            Some(index) => index,
            None => {
                let (mut client, mut target) = (SocketAddr::new(source, 0), SocketAddr::new(destination, 0));
                if !self.counts(source) {
                    if !self.counts(destination) {
                        return Role::Outside;
                    }
                    std::mem::swap(&mut client, &mut target);
                }
                let begins = Begins {
                    protocol: None,
                    client,
                    target,
                    replaces: None,
                };
                self.begin(now, key, Silence::Short, begins, owner(client))
            }
        };
        let place = self.touch(now, index);
        if self.conversations[index as usize].client.ip() == source {
            Role::Client(place)
        } else {
            Role::Target(place)
        }
    }

    // ---- tables ------------------------------------------------------------------------------------------------

    fn counts(&self, address: IpAddr) -> bool {
        self.clients.is_empty() || self.clients.iter().any(|network| network.contains(&address))
    }

    fn is_silent(&self, now: u64, last: u64, silence: Silence) -> bool {
        now.saturating_sub(last) > self.silences[silence as usize]
    }

    fn find(&mut self, now: u64, key: &Key) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        let conversations = &self.conversations;
        let index = *self
            .by_key
            .find(hash, |index| conversations[*index as usize].key == *key)?;
        let conversation = &self.conversations[index as usize];
        if self.is_silent(now, conversation.last, conversation.silence) {
            self.remove(now, index);
            return None;
        }
        Some(index)
    }

    /// Notes a packet of a conversation.
    fn touch(&mut self, now: u64, index: u32) -> Place {
        let conversation = &mut self.conversations[index as usize];
        conversation.last = now;
        conversation.place
    }

    fn begin(&mut self, now: u64, key: Key, silence: Silence, begins: Begins, shard: ShardId) -> u32 {
        let slots = &mut self.slots[usize::from(shard.0)];
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.used += 1;
            slots.used - 1
        });
        let flow = if begins.protocol.is_some() {
            self.flows += 1;
            self.flows
        } else {
            0
        };
        let mut conversation = Conversation {
            key,
            generation: 0,
            client: begins.client,
            target: begins.target.ip(),
            place: Place { shard, slot, flow },
            last: now,
            silence,
            tcp: TcpState::default(),
        };
        let index = match self.free.pop() {
            Some(index) => {
                let place = &mut self.conversations[index as usize];
                conversation.generation = place.generation;
                *place = conversation;
                index
            }
            None => {
                self.conversations.push(conversation);
                (self.conversations.len() - 1) as u32
            }
        };
        let (hasher, conversations) = (&self.hasher, &self.conversations);
        self.by_key.insert_unique(hasher.hash_one(key), index, |index| {
            hasher.hash_one(conversations[*index as usize].key)
        });
        self.enqueue_conversation(now, index);
        self.add_pair(begins.client.ip(), begins.target.ip());
        self.begun = Some(begins);
        index
    }

    /// Forgets a conversation. Its slot is free only when what is still on its way there has been played.
    fn remove(&mut self, now: u64, index: u32) {
        let conversation = &mut self.conversations[index as usize];
        conversation.generation += 1;
        let (key, place) = (conversation.key, conversation.place);
        let (client, target) = (conversation.client.ip(), conversation.target);
        let conversations = &self.conversations;
        let found = self.by_key.find_entry(self.hasher.hash_one(key), |at| {
            *at == index && conversations[*at as usize].key == key
        });
        found.expect("every conversation is in the table").remove();
        self.free.push(index);
        let gone = Gone {
            shard: place.shard,
            slot: place.slot,
        };
        if key.is_tcp() {
            self.retired.push_back((now.saturating_add(GRACE), gone));
        } else {
            self.gone.push(gone);
        }
        self.remove_pair(client, target);
    }

    fn settle_silence(&mut self, now: u64, index: u32, silence: Silence) {
        let conversation = &mut self.conversations[index as usize];
        if conversation.silence != silence {
            conversation.silence = silence;
            self.enqueue_conversation(now, index);
        }
    }

    fn enqueue_conversation(&mut self, now: u64, index: u32) {
        let conversation = &self.conversations[index as usize];
        let entry = Entry::Conversation {
            index,
            generation: conversation.generation,
        };
        self.enqueue(now, conversation.silence, entry);
    }

    fn enqueue(&mut self, now: u64, silence: Silence, entry: Entry) {
        let at = now.saturating_add(self.silences[silence as usize]);
        self.queues[silence as usize].push_back((at, entry));
    }

    fn add_pair(&mut self, client: IpAddr, target: IpAddr) {
        let addresses = sorted(client, target);
        let hash = self.hasher.hash_one(addresses);
        if let Some(pair) = self.pairs.find_mut(hash, |pair| pair.addresses == addresses) {
            pair.client = client;
            pair.conversations += 1;
            return;
        }
        let hasher = &self.hasher;
        let pair = Pair {
            addresses,
            client,
            conversations: 1,
        };
        self.pairs
            .insert_unique(hash, pair, |pair| hasher.hash_one(pair.addresses));
    }

    fn remove_pair(&mut self, client: IpAddr, target: IpAddr) {
        let addresses = sorted(client, target);
        let hash = self.hasher.hash_one(addresses);
        let entry = self.pairs.find_entry(hash, |pair| pair.addresses == addresses);
        let mut entry = entry.expect("every conversation has counted its pair");
        entry.get_mut().conversations -= 1;
        if entry.get().conversations == 0 {
            entry.remove();
        }
    }
}

const DNS_PORT: u16 = 53;

fn endpoints(source: IpAddr, destination: IpAddr, ports: (u16, u16)) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(source, ports.0),
        SocketAddr::new(destination, ports.1),
    )
}

fn sorted(a: IpAddr, b: IpAddr) -> (IpAddr, IpAddr) {
    (a.min(b), a.max(b))
}

fn icmp_number(address: IpAddr) -> u8 {
    if address.is_ipv6() { 58 } else { 1 }
}

fn is_unicast(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !address.is_multicast() && !address.is_unspecified() && !is_broadcast
}
