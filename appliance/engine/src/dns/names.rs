//! The names of addresses, as each client has learned them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::Learned;
use crate::addr::IngressId;
use crate::time::Timestamp;

/// Addresses that are remembered for one client.
const PER_CLIENT: usize = 1024;
/// A client's library may keep an answer without knowing how long it may; browsers then keep it for a minute.
const KEPT_MIN: Duration = Duration::from_secs(60);

/// The names of addresses, as each client has learned them, each for the time that its answer gave, and for a minute
/// at least.
///
/// A client's names can only be pushed out by its own, or by those of clients that have learned something since,
/// when there are as many names as there may be.
#[derive(Debug)]
pub(crate) struct Names {
    clients: BTreeMap<Client, OfClient>,
    /// Clients in the order in which they have learned something last.
    recency: BTreeMap<u64, Client>,
    /// Counts answers.
    answers: u64,
    /// Addresses of all clients.
    len: usize,
    limit: usize,
}

type Client = (IngressId, IpAddr);

#[derive(Debug, Default)]
struct OfClient {
    names: BTreeMap<IpAddr, Name>,
    /// Its place in [`Names::recency`].
    last: u64,
}

#[derive(Debug)]
struct Name {
    name: String,
    expires: Timestamp,
}

impl Names {
    /// No names yet, and never more than `limit`.
    pub(crate) fn new(limit: u32) -> Self {
        Self {
            clients: BTreeMap::new(),
            recency: BTreeMap::new(),
            answers: 0,
            len: 0,
            limit: limit as usize,
        }
    }

    /// Takes note of what a client has been told at `now`.
    pub(crate) fn learn(&mut self, now: Timestamp, learned: &Learned) {
        let client = (learned.ingress, learned.client);
        self.answers += 1;
        let known = self.clients.entry(client).or_default();
        self.recency.remove(&known.last);
        known.last = self.answers;
        self.recency.insert(self.answers, client);
        for &(address, ttl) in &learned.addresses {
            let name = Name {
                name: learned.name.clone(),
                expires: now + ttl.max(KEPT_MIN),
            };
            if !known.names.contains_key(&address) && known.names.len() >= PER_CLIENT {
                self.len -= known.make_room(now);
            }
            self.len += usize::from(known.names.insert(address, name).is_none());
        }
        while self.len > self.limit {
            let Some((_, client)) = self.recency.pop_first() else {
                break;
            };
            let forgotten = self.clients.remove(&client);
            self.len -= forgotten.map_or(0, |known| known.names.len());
        }
    }

    /// What this client knows `address` by.
    pub(crate) fn find(
        &self,
        now: Timestamp,
        ingress: IngressId,
        client: IpAddr,
        address: IpAddr,
    ) -> Option<&str> {
        let name = self.clients.get(&(ingress, client))?.names.get(&address)?;
        (now < name.expires).then_some(name.name.as_str())
    }
}

impl OfClient {
    /// Forgets what has expired, or else what will first; returns how many addresses.
    fn make_room(&mut self, now: Timestamp) -> usize {
        let before = self.names.len();
        self.names.retain(|_, name| now < name.expires);
        if self.names.len() == before {
            let first = self.names.iter().min_by_key(|(_, name)| name.expires);
            if let Some((&address, _)) = first {
                self.names.remove(&address);
            }
        }
        before - self.names.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(seconds * 1_000_000_000)
    }

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    fn learned(client: u32, name: &str, addresses: impl IntoIterator<Item = u32>, ttl: Duration) -> Learned {
        Learned {
            ingress: IngressId(0),
            client: address(client),
            name: name.into(),
            addresses: addresses
                .into_iter()
                .map(|number| (address(number), ttl))
                .collect(),
        }
    }

    fn find(names: &Names, now: u64, client: u32, target: u32) -> Option<&str> {
        names.find(at(now), IngressId(0), address(client), address(target))
    }

    #[test]
    fn a_name_holds_for_its_time_and_for_its_client() {
        let mut names = Names::new(100);
        names.learn(at(0), &learned(1, "a.test", [7], 5 * MINUTE));
        names.learn(at(0), &learned(2, "b.test", [7], Duration::ZERO));
        assert_eq!(find(&names, 299, 1, 7), Some("a.test"));
        assert_eq!(find(&names, 300, 1, 7), None);
        assert_eq!(find(&names, 59, 2, 7), Some("b.test"));
        assert_eq!(find(&names, 60, 2, 7), None);
        assert_eq!(find(&names, 0, 3, 7), None);
        assert_eq!(
            names.find(at(0), IngressId(1), address(1), address(7)),
            None,
            "the same address elsewhere is another client"
        );
    }

    #[test]
    fn the_latest_answer_names_an_address() {
        let mut names = Names::new(100);
        names.learn(at(0), &learned(1, "a.test", [7], MINUTE));
        names.learn(at(1), &learned(1, "b.test", [7], MINUTE));
        assert_eq!(find(&names, 1, 1, 7), Some("b.test"));
        assert_eq!(names.len, 1);
    }

    #[test]
    fn a_client_pushes_out_its_own_names_what_expires_first_before_others() {
        let mut names = Names::new(1 << 20);
        names.learn(at(0), &learned(1, "other.test", [1], MINUTE));
        names.learn(at(0), &learned(2, "long.test", 0..1023, 10 * MINUTE));
        names.learn(at(0), &learned(2, "short.test", [5000], MINUTE));
        names.learn(at(1), &learned(2, "new.test", [6000], MINUTE));
        assert_eq!(find(&names, 1, 2, 5000), None);
        assert_eq!(find(&names, 1, 2, 6000), Some("new.test"));
        assert_eq!(find(&names, 1, 2, 0), Some("long.test"));
        assert_eq!(find(&names, 1, 1, 1), Some("other.test"));
        // What has expired makes room for more than one.
        names.learn(at(61), &learned(2, "newer.test", [7000], MINUTE));
        assert_eq!(find(&names, 61, 2, 0), Some("long.test"));
        assert_eq!(names.len, 1 + 1023 + 1);
    }

    #[test]
    fn at_the_limit_the_client_goes_that_has_learned_nothing_for_longest() {
        let mut names = Names::new(10);
        names.learn(at(0), &learned(1, "a.test", 0..4, MINUTE));
        names.learn(at(0), &learned(2, "b.test", 0..4, MINUTE));
        names.learn(at(0), &learned(1, "c.test", [4], MINUTE));
        names.learn(at(0), &learned(3, "d.test", 0..4, MINUTE));
        assert_eq!(find(&names, 0, 2, 0), None);
        assert_eq!(find(&names, 0, 1, 0), Some("a.test"));
        assert_eq!(find(&names, 0, 3, 0), Some("d.test"));
        assert_eq!((names.len, names.clients.len(), names.recency.len()), (9, 2, 2));
        for client in 0..1000 {
            names.learn(at(1), &learned(client, "e.test", 0..20, MINUTE));
            assert!(names.len <= 10 && names.clients.len() == names.recency.len());
        }
    }
}
