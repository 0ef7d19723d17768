//! Datagrams of one flow on their way to one target, gathered to leave by one call of the system.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use tungate_engine::FlowId;
use tungate_engine::io::Carriage;

/// Bytes of one super-packet; a UDP datagram, which it looks like at first, holds no more.
const BYTES_MAX: usize = 65_000;
/// Datagrams in one super-packet (UDP_MAX_SEGMENTS of older kernels).
const DATAGRAMS_MAX: usize = 64;

/// Where a datagram goes, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) flow: FlowId,
    pub(super) target: SocketAddr,
    pub(super) carriage: Carriage,
}

/// Datagrams that go one way, all of one size but the last, which may be shorter.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    way: Option<Way>,
    size: usize,
    count: usize,
    bytes: Vec<u8>,
}

impl Gathered {
    /// The flow whose datagrams wait here.
    pub(super) fn flow(&self) -> Option<FlowId> {
        self.way.map(|way| way.flow)
    }

    /// Adds a datagram behind those that are here, if it may be; it may where nothing is.
    pub(super) fn push(&mut self, way: Way, payload: &[u8]) -> bool {
        match self.way {
            None => {
                self.way = Some(way);
                self.size = payload.len();
            }
            Some(present) => {
                let is_whole = self.bytes.len() == self.count * self.size;
                let fits = (1..=self.size).contains(&payload.len())
                    && self.bytes.len() + payload.len() <= BYTES_MAX
                    && self.count < DATAGRAMS_MAX;
                if present != way || !is_whole || !fits {
                    return false;
                }
            }
        }
        self.count += 1;
        self.bytes.extend_from_slice(payload);
        true
    }

    /// Takes what is here, with the size of each datagram where there are several, and leaves room for more.
    pub(super) fn take(&mut self, send: impl FnOnce(Way, &[u8], Option<NonZeroU16>)) {
        let Some(way) = self.way.take() else { return };
        let several = self.count > 1;
        let size = u16::try_from(self.size).ok().filter(|_| several);
        send(way, &self.bytes, size.and_then(NonZeroU16::new));
        self.count = 0;
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use tungate_engine::ShardId;

    use super::*;

    #[test]
    fn what_leaves_is_what_came_in_its_order_sizes_and_ways() {
        let way = |slot, port, hop_limit| Way {
            flow: FlowId::new(ShardId(0), 0, slot),
            target: SocketAddr::from(([192, 0, 2, 7], port)),
            carriage: Carriage {
                hop_limit,
                dont_fragment: port == 55,
            },
        };
        let (first, second) = (way(1, 53, 63), way(1, 54, 63));
        let given = [
            (first, 100, 150),
            (first, 99, 1),
            (first, 99, 1),
            (first, 100, 3),
            (second, 100, 2),
            (way(2, 54, 63), 100, 2),
            (way(2, 54, 62), 100, 2),
            (way(2, 55, 62), 100, 2),
            (first, 0, 3),
            (first, 1400, 100),
            (first, 65_507, 2),
            (first, 1, 2),
        ];
        let mut came = Vec::new();
        let mut left = Vec::new();
        let mut calls = 0;
        let mut gathered = Gathered::default();
        let mut leave = |gathered: &mut Gathered| {
            gathered.take(|way, bytes, size| {
                calls += 1;
                let size = size.map_or(bytes.len(), |size| usize::from(size.get()));
                assert!(bytes.len() <= BYTES_MAX || bytes.len() == size);
                if size == 0 {
                    left.push((way, Vec::new()));
                }
                left.extend(bytes.chunks(size.max(1)).map(|datagram| (way, datagram.to_vec())));
            });
        };
        for (way, len, times) in given {
            for _ in 0..times {
                let datagram = vec![came.len() as u8; len];
                if !gathered.push(way, &datagram) {
                    leave(&mut gathered);
                    assert!(gathered.push(way, &datagram));
                }
                came.push((way, datagram));
            }
        }
        leave(&mut gathered);
        leave(&mut gathered);
        assert!(left == came);
        assert!(calls < came.len() / 5, "runs leave together");
    }
}
