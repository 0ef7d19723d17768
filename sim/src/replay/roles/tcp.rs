//! Roles in TCP.

use std::net::{IpAddr, SocketAddr};

use tungate_engine::packet::TcpFlags;
use tungate_engine::{Protocol, ShardId};

use super::key::Key;
use super::{Begins, Role, Roles, Silence};

/// As much of a TCP connection's state as can be seen from outside.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TcpState {
    isn: Option<u32>,
    /// The client's end comes first in the key.
    client_is_first: bool,
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

impl Roles {
    pub(super) fn tcp(
        &mut self,
        now: u64,
        source: (IpAddr, u16),
        destination: (IpAddr, u16),
        (flags, sequence, acknowledgment): (TcpFlags, u32, u32),
        owner: impl FnOnce(SocketAddr) -> ShardId,
    ) -> Role {
        let (key, source_is_first) = Key::tcp(source, destination);
        let is_syn = flags.syn() && !flags.ack();
        let is_syn_ack = flags.syn() && flags.ack();
        let found = self.find(now, &key);
        let begins = match found {
            None => true,
            Some(index) => {
                let conversation = &self.conversations[index as usize];
                let tcp = &conversation.tcp;
                let from_client = tcp.client_is_first == source_is_first;
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
            let (source, destination) = (SocketAddr::from(source), SocketAddr::from(destination));
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
            let tcp = &mut self.conversations[index as usize].tcp;
            tcp.isn = isn;
            tcp.client_is_first = (client == source) == source_is_first;
            index
        } else {
            found.expect("a conversation that does not begin was found")
        };
        let conversation = &mut self.conversations[index as usize];
        let tcp = &mut conversation.tcp;
        let from_client = tcp.client_is_first == source_is_first;
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
        let place = conversation.place;
        conversation.last = now;
        if conversation.silence != silence {
            conversation.silence = silence;
            self.enqueue_conversation(now, index);
        }
        if from_client {
            Role::Client(place)
        } else {
            Role::Target(place)
        }
    }
}
