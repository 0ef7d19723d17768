//! Roles in UDP, ICMP and the rest.

use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};

use tungate_engine::{Protocol, ShardId};

use super::key::Key;
use super::{Begins, Endpoint, Entry, Role, Roles, Silence, icmp_number};

const DNS_PORT: u16 = 53;

impl Roles {
    pub(super) fn udp(
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

    pub(super) fn endpoint(&self, address: SocketAddr) -> Option<&Endpoint> {
        self.endpoints.find(self.hasher.hash_one(address), |endpoint| {
            endpoint.address == address
        })
    }

    pub(super) fn echo_request(
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
    pub(super) fn quoted(
        &mut self,
        now: u64,
        protocol: u8,
        sender: (IpAddr, u16),
        receiver: (IpAddr, u16),
    ) -> Option<Role> {
        let tcp = (protocol == 6).then(|| Key::tcp(sender, receiver).0);
        let (sender, receiver) = (SocketAddr::from(sender), SocketAddr::from(receiver));
        let (key, other) = match protocol {
            6 => (tcp?, None),
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

    pub(super) fn pair(
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
}

fn is_unicast(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !address.is_multicast() && !address.is_unspecified() && !is_broadcast
}
