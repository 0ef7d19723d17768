//! Changes to captured TCP headers, each with its checksum adjusted (RFC 1624): a checksum that was wrong stays wrong.

use tungate_engine::packet::{TcpFlags, checksum};

const CHECKSUM: usize = 16;
const END: u8 = 0;
const NO_OPERATION: u8 = 1;

/// What kinds of options were found that do not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Removed {
    /// A signature (RFC 2385) or an authentication option (RFC 5925), which covers what is changed here.
    pub(super) authentication: bool,
}

/// A captured segment whose header is being changed. [`Header::finish`] sees to its checksum.
pub(super) struct Header<'a> {
    /// From the TCP header on, with a sound header length.
    bytes: &'a mut [u8],
    /// Length of the header.
    len: usize,
    /// The sum of what was taken away, complemented, and of what has taken its place.
    change: u64,
}

impl<'a> Header<'a> {
    /// Takes the TCP header at the start of `bytes`, which was parsed before.
    pub(super) fn new(bytes: &'a mut [u8]) -> Self {
        Self {
            len: usize::from(bytes[12] >> 4) * 4,
            bytes,
            change: 0,
        }
    }

    pub(super) fn set_acknowledgment(&mut self, number: u32) {
        let field = self.bytes[8..].first_chunk_mut().expect("the header is whole");
        let before = std::mem::replace(field, number.to_be_bytes());
        self.change += u64::from(!u32::from_be_bytes(before)) + u64::from(number);
    }

    pub(super) fn set_window(&mut self, window: u16) {
        let field = self.bytes[14..].first_chunk_mut().expect("the header is whole");
        let before = std::mem::replace(field, window.to_be_bytes());
        self.change += u64::from(!u16::from_be_bytes(before)) + u64::from(window);
    }

    /// Replaces the options that cannot hold behind a relay by padding, and has `map` translate the edges of
    /// selective acknowledgments.
    pub(super) fn clean_options(&mut self, mut map: impl FnMut(u32) -> u32) -> Removed {
        let mut removed = Removed::default();
        let end = self.len;
        let mut at = 20;
        while at < end {
            let len = match self.bytes[at] {
                END => break,
                NO_OPERATION => {
                    at += 1;
                    continue;
                }
                _ => usize::from(self.bytes[at + 1]),
            };
            match self.bytes[at] {
                5 => {
                    for edge in (at + 2..at + len).step_by(4) {
                        let number = self.bytes[edge..edge + 4].try_into().expect("four bytes");
                        let mapped = map(u32::from_be_bytes(number));
                        self.replace(edge, &mapped.to_be_bytes());
                    }
                }
                // Behind the last option the list may as well end: then nobody walks the padding.
                8 if at + len == end => self.replace(at, &[END; 10][..len.min(10)]),
                8 => self.replace(at, &[NO_OPERATION; 10][..len.min(10)]),
                19 | 29 => {
                    removed.authentication = true;
                    self.replace(at, &[NO_OPERATION; 40][..len]);
                }
                _ => {}
            }
            at += len;
        }
        removed
    }

    /// Adjusts the checksum to what has been changed.
    pub(super) fn finish(self) {
        if self.change != 0 {
            let field = self.bytes[CHECKSUM..]
                .first_chunk_mut()
                .expect("the header is whole");
            let sum = checksum::update_all(u16::from_be_bytes(*field), self.change);
            *field = sum.to_be_bytes();
        }
    }

    /// Writes `new` at `at`.
    fn replace(&mut self, at: usize, new: &[u8]) {
        let place = &mut self.bytes[at..at + new.len()];
        let (before, after) = (checksum::sum(place), checksum::sum(new));
        place.copy_from_slice(new);
        // Behind an odd number of bytes the halves of words are the other way round.
        let word = |sum: u16| {
            if at.is_multiple_of(2) {
                sum
            } else {
                sum.swap_bytes()
            }
        };
        self.change += u64::from(!word(before)) + u64::from(word(after));
    }
}

/// A segment of the client model's own making.
#[derive(Debug, Clone, Copy)]
pub(super) struct Made<'a> {
    pub(super) client: std::net::SocketAddr,
    pub(super) target: std::net::SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Padded to words.
    pub(super) options: &'a [u8],
    pub(super) payload: &'a [u8],
}

impl Made<'_> {
    /// Writes it as an IP packet. Its checksum is left out: the engine is told to trust it.
    pub(super) fn write(&self, packet: &mut Vec<u8>) {
        use std::net::IpAddr;
        let tcp_len = 20 + self.options.len() + self.payload.len();
        packet.clear();
        match (self.client.ip(), self.target.ip()) {
            (IpAddr::V4(client), IpAddr::V4(target)) => {
                packet.extend_from_slice(&[0x45, 0]);
                packet.extend_from_slice(&((20 + tcp_len) as u16).to_be_bytes());
                packet.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
                packet.extend_from_slice(&client.octets());
                packet.extend_from_slice(&target.octets());
                let sum = !checksum::sum(packet);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(client), IpAddr::V6(target)) => {
                packet.extend_from_slice(&[0x60, 0, 0, 0]);
                packet.extend_from_slice(&(tcp_len as u16).to_be_bytes());
                packet.extend_from_slice(&[6, 64]);
                packet.extend_from_slice(&client.octets());
                packet.extend_from_slice(&target.octets());
            }
            _ => unreachable!("both ends of a flow are of one family"),
        }
        packet.extend_from_slice(&self.client.port().to_be_bytes());
        packet.extend_from_slice(&self.target.port().to_be_bytes());
        packet.extend_from_slice(&self.sequence.to_be_bytes());
        packet.extend_from_slice(&self.acknowledgment.to_be_bytes());
        let header_words = 5 + self.options.len() / 4;
        let push = if self.payload.is_empty() { 0 } else { TcpFlags::PSH };
        packet.extend_from_slice(&[(header_words << 4) as u8, self.flags | push]);
        packet.extend_from_slice(&self.window.to_be_bytes());
        packet.extend_from_slice(&[0; 4]);
        packet.extend_from_slice(self.options);
        packet.extend_from_slice(self.payload);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tungate_engine::packet::checksum::{add, sum};

    use super::*;

    /// A TCP header with these options, summed so that all of it comes to `total`.
    fn segment(options: &[u8], total: u16) -> Vec<u8> {
        let mut bytes = vec![0x5a; 20];
        bytes[12] = (((20 + options.len()) / 4) << 4) as u8;
        bytes.extend_from_slice(options);
        bytes.extend_from_slice(b"payload!");
        bytes[16..18].fill(0);
        let checksum = add(total, !sum(&bytes));
        bytes[16..18].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn changes_keep_the_sum_whether_right_or_wrong(
            total in 1..0xffff_u16, acknowledgment: u32, window: u16, edge: u32,
        ) {
            // Timestamps at an odd offset, and one block of selective acknowledgments.
            let mut options = vec![1, 8, 10];
            options.extend_from_slice(&[7; 8]);
            options.extend_from_slice(&[5, 10]);
            options.extend_from_slice(&[9; 8]);
            options.extend_from_slice(&[1, 1, 1]);
            let mut bytes = segment(&options, total);
            let mut header = Header::new(&mut bytes);
            header.set_acknowledgment(acknowledgment);
            header.set_window(window);
            header.clean_options(|_| edge);
            header.finish();
            prop_assert_eq!(sum(&bytes), total);
            prop_assert_eq!(&bytes[8..12], acknowledgment.to_be_bytes());
            prop_assert_eq!(&bytes[14..16], window.to_be_bytes());
            prop_assert_eq!(&bytes[20..31], [1; 11]);
            prop_assert_eq!(&bytes[33..37], edge.to_be_bytes());
        }
    }

    #[test]
    fn signatures_are_taken_off_and_told() {
        let mut options = vec![19, 18];
        options.extend_from_slice(&[3; 16]);
        options.extend_from_slice(&[1, 1]);
        let mut bytes = segment(&options, 77);
        let mut header = Header::new(&mut bytes);
        let removed = header.clean_options(|edge| edge);
        header.finish();
        assert!(removed.authentication);
        assert_eq!(&bytes[20..40], [1; 20]);
        assert_eq!(sum(&bytes), 77);
    }
}
