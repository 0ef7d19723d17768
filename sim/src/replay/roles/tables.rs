//! The tables of conversations, endpoints and pairs.

use std::hash::BuildHasher;
use std::net::IpAddr;

use tungate_engine::{ShardId, Timestamp};

use super::key::{Key, sorted};
use super::tcp::TcpState;
use super::{Begins, Conversation, Entry, GRACE, Gone, Pair, Place, Roles, SILENCES, Silence};

impl Roles {
    /// The slots of conversations that have been silent for too long, at `now`. Their places are free for new ones.
    pub(in super::super) fn forget(&mut self, now: Timestamp, mut gone: impl FnMut(Gone)) {
        let now = now.as_nanos();
        if now <= self.quiet_until && self.gone.is_empty() {
            return; // as for nearly all packets
        }
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
        let queues = self.queues.iter();
        let fronts = queues.filter_map(|queue| queue.front().map(|(at, _)| *at));
        let retired = self.retired.front().map(|(at, _)| *at);
        self.quiet_until = fronts.chain(retired).min().unwrap_or(u64::MAX);
        for each in self.gone.drain(..) {
            gone(each);
            self.slots[usize::from(each.shard.0)].free.push(each.slot);
        }
    }

    pub(super) fn counts(&self, address: IpAddr) -> bool {
        self.clients.is_empty() || self.clients.iter().any(|network| network.contains(&address))
    }

    pub(super) fn is_silent(&self, now: u64, last: u64, silence: Silence) -> bool {
        now.saturating_sub(last) > self.silences[silence as usize]
    }

    pub(super) fn find(&mut self, now: u64, key: &Key) -> Option<u32> {
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
    pub(super) fn touch(&mut self, now: u64, index: u32) -> Place {
        let conversation = &mut self.conversations[index as usize];
        conversation.last = now;
        conversation.place
    }

    pub(super) fn begin(
        &mut self,
        now: u64,
        key: Key,
        silence: Silence,
        begins: Begins,
        shard: ShardId,
    ) -> u32 {
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
    pub(super) fn remove(&mut self, now: u64, index: u32) {
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
            let at = now.saturating_add(GRACE);
            self.retired.push_back((at, gone));
            self.quiet_until = self.quiet_until.min(at);
        } else {
            self.gone.push(gone);
        }
        self.remove_pair(client, target);
    }

    pub(super) fn enqueue_conversation(&mut self, now: u64, index: u32) {
        let conversation = &self.conversations[index as usize];
        let entry = Entry::Conversation {
            index,
            generation: conversation.generation,
        };
        self.enqueue(now, conversation.silence, entry);
    }

    pub(super) fn enqueue(&mut self, now: u64, silence: Silence, entry: Entry) {
        let at = now.saturating_add(self.silences[silence as usize]);
        self.queues[silence as usize].push_back((at, entry));
        self.quiet_until = self.quiet_until.min(at);
    }

    pub(super) fn add_pair(&mut self, client: IpAddr, target: IpAddr) {
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

    pub(super) fn remove_pair(&mut self, client: IpAddr, target: IpAddr) {
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
