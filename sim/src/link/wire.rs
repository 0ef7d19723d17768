//! The packets of the simulation: headers travel, payloads are known from their place in the stream.

use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use tungate_engine::packet::{PacketView, TcpFlags, Transport};

/// What is the same byte for byte only after so many: a prime, so that no power of two repeats it.
const PERIOD: usize = 65_521;

/// Random bytes, and again as many as one packet can hold.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; PERIOD];
    ChaCha8Rng::seed_from_u64(0).fill_bytes(&mut bytes);
    bytes.extend_from_within(..);
    bytes
});

/// The `len` bytes at `offset` of a stream; at most 65,521 of them.
pub(super) fn stream(offset: u64, len: usize) -> &'static [u8] {
    let start = (offset % PERIOD as u64) as usize;
    &BYTES[start..start + len]
}

/// What the options of a SYN say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Offer {
    pub(super) segment_size: u16,
    pub(super) shift: u8,
    pub(super) sack: bool,
}

/// A TCP segment without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Which of the clients it is from or for.
    pub(super) client: usize,
    pub(super) flags: TcpFlags,
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    pub(super) window: u16,
    /// Bytes of payload.
    pub(super) len: u16,
    pub(super) offer: Option<Offer>,
    /// Start and end of SACK blocks; those not used are empty.
    pub(super) blocks: [(u32, u32); 4],
}

impl Header {
    /// Reads a packet of the engine's, a super-packet too.
    pub(super) fn read(packet: &[u8], client: usize) -> Self {
        let view = PacketView::parse(packet).expect("the engine sends sound packets");
        let Ok(Transport::Tcp(tcp)) = view.transport() else {
            panic!("the engine sends TCP to TCP clients")
        };
        let offer = tcp.flags.syn().then(|| Offer {
            segment_size: tcp.options.max_segment_size.expect("a SYN says its segment size"),
            shift: tcp.options.window_scale.unwrap_or(0),
            sack: tcp.options.sack_permitted,
        });
        Self {
            client,
            flags: tcp.flags,
            sequence: tcp.sequence,
            acknowledgment: tcp.acknowledgment,
            window: tcp.window,
            len: tcp.payload.len() as u16,
            offer,
            blocks: [(0, 0); 4],
        }
    }

    /// Length of the packet on the wire.
    pub(super) fn packet_len(&self, family: IpAddr) -> usize {
        let ip = if family.is_ipv4() { 20 } else { 40 };
        ip + 20 + self.options_len() + usize::from(self.len)
    }

    fn blocks(&self) -> impl Iterator<Item = (u32, u32)> {
        self.blocks.into_iter().filter(|(start, end)| start != end)
    }

    fn options_len(&self) -> usize {
        match (self.offer, self.blocks().count()) {
            (Some(_), _) => 12,
            (None, 0) => 0,
            (None, blocks) => 4 + 8 * blocks,
        }
    }

    /// Writes the packet into `buffer`, without checksums: nobody on the way looks.
    pub(super) fn write(&self, from: SocketAddr, to: SocketAddr, payload: &[u8], buffer: &mut Vec<u8>) {
        buffer.clear();
        let tcp_len = 20 + self.options_len() + payload.len();
        match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                buffer.extend([0x45, 0]);
                buffer.extend((20 + tcp_len as u16).to_be_bytes());
                buffer.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
                buffer.extend(from.octets());
                buffer.extend(to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                buffer.extend([0x60, 0, 0, 0]);
                buffer.extend((tcp_len as u16).to_be_bytes());
                buffer.extend([6, 64]);
                buffer.extend(from.octets());
                buffer.extend(to.octets());
            }
            _ => panic!("addresses of one family"),
        }
        buffer.extend(from.port().to_be_bytes());
        buffer.extend(to.port().to_be_bytes());
        buffer.extend(self.sequence.to_be_bytes());
        buffer.extend(self.acknowledgment.to_be_bytes());
        buffer.extend([((20 + self.options_len()) / 4 * 16) as u8, self.flags.0]);
        buffer.extend(self.window.to_be_bytes());
        buffer.extend([0; 4]);
        if let Some(offer) = self.offer {
            buffer.extend([2, 4]);
            buffer.extend(offer.segment_size.to_be_bytes());
            buffer.extend([1, 3, 3, offer.shift]);
            buffer.extend(if offer.sack { [1, 1, 4, 2] } else { [1; 4] });
        } else if self.options_len() > 0 {
            buffer.extend([1, 1, 5, (self.options_len() - 2) as u8]);
            for (start, end) in self.blocks() {
                buffer.extend(start.to_be_bytes());
                buffer.extend(end.to_be_bytes());
            }
        }
        buffer.extend(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: [(u32, u32); 4] = [(100, 200), (300, 400), (0, 0), (0, 0)];

    fn written(from: &str, to: &str, header: Header) -> Vec<u8> {
        let mut packet = Vec::new();
        let payload = stream(7, header.len.into());
        header.write(from.parse().unwrap(), to.parse().unwrap(), payload, &mut packet);
        packet
    }

    #[test]
    fn what_is_written_is_what_the_engine_reads() {
        for (from, to) in [
            ("10.0.0.2:1000", "192.0.2.7:80"),
            ("[fd00::2]:1000", "[2001:db8::7]:80"),
        ] {
            let header = Header {
                client: 0,
                flags: TcpFlags(0x10),
                sequence: 5,
                acknowledgment: 6,
                window: 7,
                len: 9,
                offer: None,
                blocks: BLOCKS,
            };
            let packet = written(from, to, header);
            let from: SocketAddr = from.parse().unwrap();
            assert_eq!(packet.len(), header.packet_len(from.ip()));
            let view = PacketView::parse(&packet).unwrap();
            let Ok(Transport::Tcp(tcp)) = view.transport() else {
                panic!("not TCP")
            };
            let blocks: Vec<_> = BLOCKS[..2]
                .iter()
                .map(|(start, end)| (start.to_be_bytes(), end.to_be_bytes()))
                .map(|(start, end)| <[u8; 8]>::try_from([start, end].concat()).unwrap())
                .collect();
            assert_eq!(tcp.options.sack, blocks);
            assert_eq!(tcp.payload, stream(7, 9));
            let offer = Offer {
                segment_size: 1460,
                shift: 10,
                sack: true,
            };
            let syn = Header {
                flags: TcpFlags(TcpFlags::SYN),
                len: 0,
                offer: Some(offer),
                blocks: [(0, 0); 4],
                ..header
            };
            let to_string = from.to_string();
            assert_eq!(Header::read(&written(&to_string, to, syn), 0), syn);
        }
    }
}
