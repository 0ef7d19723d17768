//! The flow table: every flow of one shard, found by key or by id in constant time.

use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, SocketAddr};

use foldhash::quality::FixedState;
use hashbrown::HashTable;
use siphasher::sip::SipHasher13;

use crate::addr::{FlowId, IngressId, ShardId};
use crate::policy::EgressId;
use crate::session::Session;
use crate::tcp::TcpFlow;

/// Anything the flow table holds.
#[allow(clippy::large_enum_variant)] // most flows are TCP, and their stacks are boxed already
pub(crate) enum Flow {
    Tcp(TcpFlow),
    Session(Session),
}

impl Keyed for Flow {
    fn key(&self) -> FlowKey {
        match self {
            Self::Tcp(flow) => flow.key(),
            Self::Session(session) => session.key(),
        }
    }
}

/// Something that the flow table can find.
pub(crate) trait Keyed {
    /// The key it is found by, the same for as long as it is in the table.
    fn key(&self) -> FlowKey;
}

/// What tells one flow from another. VLAN tags are no part of it: some paths tag one direction only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowKey {
    /// A TCP connection: the 4-tuple.
    Tcp {
        ingress: IngressId,
        client: SocketAddr,
        target: SocketAddr,
    },
    /// A UDP mapping: endpoint-independent (RFC 4787, REQ-1), so the target is no part of it.
    Udp {
        ingress: IngressId,
        client: SocketAddr,
        route: Route,
    },
    /// An echo session: identifier and both addresses (RFC 5508).
    Icmp {
        ingress: IngressId,
        client: IpAddr,
        identifier: u16,
        target: IpAddr,
        route: Route,
    },
}

/// The way out of a datagram session. Two targets with different ways out need two upstream sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// To the target itself.
    Direct,
    /// By way of a named egress.
    Egress(EgressId),
    /// To another address in the place of `target`, which replies must seem to come from.
    Redirect { to: SocketAddr, target: SocketAddr },
}

/// Hashes keys under a secret, so that no client can aim at one bucket.
#[derive(Debug, Clone)]
pub(crate) struct KeyHasher {
    /// For the tables: fast, and its output never leaves the engine.
    tables: FixedState,
    /// For numbers that clients get to see: SipHash, a pseudorandom function.
    numbers: (u64, u64),
}

impl KeyHasher {
    pub(crate) fn new(tables: u64, numbers: (u64, u64)) -> Self {
        Self {
            tables: FixedState::with_seed(tables),
            numbers,
        }
    }

    pub(crate) fn flow(&self, key: &FlowKey) -> u64 {
        let mut hasher = self.tables.build_hasher();
        match *key {
            FlowKey::Tcp {
                ingress,
                client,
                target,
            } => {
                return self.tcp(
                    ingress,
                    (client.ip(), client.port()),
                    (target.ip(), target.port()),
                );
            }
            FlowKey::Udp {
                ingress,
                client,
                route,
            } => {
                hash_endpoint(&mut hasher, client.ip(), client.port());
                hash_route(&mut hasher, route);
                hasher.write_u32(1 << 16 | u32::from(ingress.0));
            }
            FlowKey::Icmp {
                ingress,
                client,
                identifier,
                target,
                route,
            } => {
                hash_endpoint(&mut hasher, client, identifier);
                hash_endpoint(&mut hasher, target, 0);
                hash_route(&mut hasher, route);
                hasher.write_u32(2 << 16 | u32::from(ingress.0));
            }
        }
        hasher.finish()
    }

    /// What [`KeyHasher::flow`] makes of a TCP key, from its parts: a packet's fields can be loaded at once, those of a
    /// key just written only once the stores have gone through.
    #[inline(always)]
    pub(crate) fn tcp(&self, ingress: IngressId, client: (IpAddr, u16), target: (IpAddr, u16)) -> u64 {
        let mut hasher = self.tables.build_hasher();
        hash_endpoint(&mut hasher, client.0, client.1);
        hash_endpoint(&mut hasher, target.0, target.1);
        hasher.write_u32(u32::from(ingress.0));
        hasher.finish()
    }

    /// Hash of one client of one ingress.
    pub(crate) fn client(&self, ingress: IngressId, client: IpAddr) -> u64 {
        let mut hasher = self.tables.build_hasher();
        hash_endpoint(&mut hasher, client, ingress.0);
        hasher.finish()
    }

    /// An initial sequence number that nobody without the secret can tell, for the connection made at `nanos`
    /// (RFC 6528: a keyed hash of the 4-tuple, and time).
    pub(crate) fn initial_sequence(&self, client: SocketAddr, target: SocketAddr, nanos: u64) -> u32 {
        let mut hasher = SipHasher13::new_with_keys(self.numbers.0, self.numbers.1);
        hash_endpoint(&mut hasher, client.ip(), client.port());
        hash_endpoint(&mut hasher, target.ip(), target.port());
        hasher.write_u64(nanos);
        hasher.finish() as u32
    }
}

#[inline(always)]
fn hash_endpoint(hasher: &mut impl Hasher, address: IpAddr, port: u16) {
    match address {
        IpAddr::V4(v4) => hasher.write_u64(u64::from(v4.to_bits()) << 16 | u64::from(port)),
        IpAddr::V6(v6) => {
            hasher.write_u128(v6.to_bits());
            hasher.write_u16(port);
        }
    }
}

fn hash_route(hasher: &mut impl Hasher, route: Route) {
    match route {
        Route::Direct => {}
        Route::Egress(egress) => hasher.write_u16(egress.0),
        Route::Redirect { to, target } => {
            hash_endpoint(hasher, to.ip(), to.port());
            hash_endpoint(hasher, target.ip(), target.port());
        }
    }
}

/// Flows in a slab, indexed by key; slots are used again under a new generation.
pub(crate) struct FlowTable<F> {
    shard: ShardId,
    hasher: KeyHasher,
    slots: Vec<Slot<F>>,
    free: Vec<u32>,
    by_key: HashTable<u32>,
}

struct Slot<F> {
    generation: u32,
    flow: Option<F>,
}

impl<F: Keyed> FlowTable<F> {
    pub(crate) fn new(shard: ShardId, hasher: KeyHasher) -> Self {
        Self {
            shard,
            hasher,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashTable::new(),
        }
    }

    /// Finds the flow with this key.
    pub(crate) fn find(&self, key: &FlowKey) -> Option<FlowId> {
        self.find_hashed(self.hasher.flow(key), |flow| flow.key() == *key)
    }

    /// Finds the flow whose key has this hash.
    #[inline(always)]
    pub(crate) fn find_hashed(&self, hash: u64, is_it: impl Fn(&F) -> bool) -> Option<FlowId> {
        let is_there = |&slot: &u32| self.slots[slot as usize].flow.as_ref().is_some_and(&is_it);
        let slot = *self.by_key.find(hash, is_there)?;
        Some(FlowId::new(
            self.shard,
            self.slots[slot as usize].generation,
            slot,
        ))
    }

    /// Puts a flow in, whose key is not in use.
    pub(crate) fn insert(&mut self, flow: F) -> FlowId {
        let hash = self.hasher.flow(&flow.key());
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                flow: None,
            });
            (self.slots.len() - 1) as u32
        });
        let place = &mut self.slots[slot as usize];
        debug_assert!(place.flow.is_none());
        place.flow = Some(flow);
        let id = FlowId::new(self.shard, place.generation, slot);
        let Self {
            hasher,
            slots,
            by_key,
            ..
        } = self;
        by_key.insert_unique(hash, slot, |&slot| hasher.flow(&slots[slot as usize].key()));
        id
    }

    /// The flow with this id, if it still lives.
    pub(crate) fn get(&self, id: FlowId) -> Option<&F> {
        let slot = self.slots.get(id.slot() as usize)?;
        if slot.generation != id.generation() || id.shard() != self.shard {
            return None;
        }
        slot.flow.as_ref()
    }

    /// The same, to change it.
    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut F> {
        let slot = self.slots.get_mut(id.slot() as usize)?;
        if slot.generation != id.generation() || id.shard() != self.shard {
            return None;
        }
        slot.flow.as_mut()
    }

    /// Takes the flow with this id out; the id names nothing from then on.
    pub(crate) fn remove(&mut self, id: FlowId) -> Option<F> {
        self.get_mut(id)?;
        let slot = &mut self.slots[id.slot() as usize];
        let flow = slot.flow.take()?;
        // 24 bits of generation: a slot may be used 16 million times before an id comes again.
        slot.generation = (slot.generation + 1) & 0x00ff_ffff;
        self.free.push(id.slot());
        let hash = self.hasher.flow(&flow.key());
        let entry = self.by_key.find_entry(hash, |&slot| slot == id.slot());
        entry.expect("every flow in the slab is indexed").remove();
        Some(flow)
    }

    /// How many flows there are.
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The ids of all flows by slot: for changes of policy, not for packets.
    pub(crate) fn ids(&self) -> Vec<FlowId> {
        let of = |(slot, place): (usize, &Slot<F>)| {
            place
                .flow
                .is_some()
                .then(|| FlowId::new(self.shard, place.generation, slot as u32))
        };
        self.slots.iter().enumerate().filter_map(of).collect()
    }
}

impl<F: Keyed> Slot<F> {
    fn key(&self) -> FlowKey {
        self.flow.as_ref().expect("indexed slots are in use").key()
    }
}

/// How many flows each client has, for the limit per client.
pub(crate) struct ClientCounts {
    hasher: KeyHasher,
    counts: HashTable<(IngressId, IpAddr, u32)>,
}

impl ClientCounts {
    pub(crate) fn new(hasher: KeyHasher) -> Self {
        Self {
            hasher,
            counts: HashTable::new(),
        }
    }

    pub(crate) fn of(&self, ingress: IngressId, client: IpAddr) -> u32 {
        let hash = self.hasher.client(ingress, client);
        self.counts
            .find(hash, |entry| (entry.0, entry.1) == (ingress, client))
            .map_or(0, |entry| entry.2)
    }

    pub(crate) fn add(&mut self, ingress: IngressId, client: IpAddr) {
        let Self { hasher, counts } = self;
        let hash = hasher.client(ingress, client);
        match counts.find_mut(hash, |entry| (entry.0, entry.1) == (ingress, client)) {
            Some(entry) => entry.2 += 1,
            None => {
                counts.insert_unique(hash, (ingress, client, 1), |entry| {
                    hasher.client(entry.0, entry.1)
                });
            }
        }
    }

    pub(crate) fn subtract(&mut self, ingress: IngressId, client: IpAddr) {
        let hash = self.hasher.client(ingress, client);
        if let Ok(mut entry) = self
            .counts
            .find_entry(hash, |entry| (entry.0, entry.1) == (ingress, client))
        {
            entry.get_mut().2 -= 1;
            if entry.get().2 == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Number(u16);

    impl Keyed for Number {
        fn key(&self) -> FlowKey {
            key(self.0)
        }
    }

    fn hasher() -> KeyHasher {
        KeyHasher::new(1, (2, 3))
    }

    fn key(port: u16) -> FlowKey {
        FlowKey::Tcp {
            ingress: IngressId(0),
            client: SocketAddr::from(([10, 0, 0, 2], port)),
            target: SocketAddr::from(([192, 0, 2, 1], 80)),
        }
    }

    fn table() -> FlowTable<Number> {
        FlowTable::new(ShardId(3), hasher())
    }

    #[test]
    fn an_id_names_nothing_after_its_flow_is_gone() {
        let mut table = table();
        let first = table.insert(Number(1));
        assert_eq!(table.remove(first), Some(Number(1)));
        let second = table.insert(Number(2));
        assert_eq!(first.slot(), second.slot(), "the slot is used again");
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.get_mut(second), Some(&mut Number(2)));
    }

    #[test]
    fn flows_are_found_by_key_through_growth_and_removal() {
        let mut table = table();
        let ids: Vec<_> = (0..5000).map(|port| table.insert(Number(port))).collect();
        for id in ids.iter().step_by(2) {
            table.remove(*id);
        }
        for (port, id) in ids.iter().enumerate() {
            let expected = (port % 2 == 1).then_some(*id);
            assert_eq!(table.find(&key(port as u16)), expected);
        }
        assert_eq!(table.len(), 2500);
        assert_eq!(table.ids().len(), 2500);
    }

    #[test]
    fn an_id_of_another_shard_is_no_ones() {
        let mut table = table();
        let id = table.insert(Number(1));
        assert_eq!(
            table.get_mut(FlowId::new(ShardId(4), id.generation(), id.slot())),
            None
        );
    }

    #[test]
    fn a_client_without_flows_takes_no_room() {
        let mut counts = ClientCounts::new(hasher());
        let client = IpAddr::from([10, 0, 0, 2]);
        counts.add(IngressId(0), client);
        counts.add(IngressId(0), client);
        counts.add(IngressId(1), client);
        assert_eq!(counts.of(IngressId(0), client), 2);
        assert_eq!(counts.of(IngressId(1), client), 1);
        counts.subtract(IngressId(0), client);
        counts.subtract(IngressId(0), client);
        counts.subtract(IngressId(1), client);
        assert_eq!(counts.counts.len(), 0);
    }
}
