//! The Internet checksum (RFC 1071): sums, pseudo-headers and incremental updates.
//!
//! A *sum* here is the folded ones'-complement sum of big-endian words, which is not yet complemented; a
//! *checksum* is what stands in a header.

use std::net::{IpAddr, Ipv6Addr};

/// The sum of `bytes`; an odd last byte counts as the high half of a word.
pub fn sum(bytes: &[u8]) -> u16 {
    // The sum is the same in either byte order but for a final swap (RFC 1071, section 2 (B)), and carries may be
    // folded late (2 (A)): 32-bit words in native order go into 64-bit lanes, which compilers vectorise.
    let (blocks, rest) = bytes.as_chunks::<64>();
    let mut total = 0;
    if !blocks.is_empty() {
        let mut lanes = [0u64; 16];
        for block in blocks {
            for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        total = lanes.iter().sum();
    }
    // Headers are short: eight bytes at a time, whose carry goes round.
    let (words, mut rest) = rest.as_chunks::<8>();
    for word in words {
        let (sum, carry) = total.overflowing_add(u64::from_ne_bytes(*word));
        total = sum + u64::from(carry);
    }
    total = (total & 0xffff_ffff) + (total >> 32);
    if let Some((word, behind)) = rest.split_first_chunk() {
        total += u64::from(u32::from_ne_bytes(*word));
        rest = behind;
    }
    if let Some((word, behind)) = rest.split_first_chunk() {
        total += u64::from(u16::from_ne_bytes(*word));
        rest = behind;
    }
    if let [last] = rest {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u16::from_be(fold(total))
}

/// The sum of two parts, of which the first has an even number of bytes.
pub fn add(first: u16, second: u16) -> u16 {
    let (sum, carry) = first.overflowing_add(second);
    sum + u16::from(carry)
}

/// The sum of the pseudo-header of RFC 9293, section 3.1 for IPv4 and RFC 8200, section 8.1 for IPv6; `len` is the
/// length of transport header and data in bytes.
///
/// # Panics
///
/// If the addresses are of different versions.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> u16 {
    // Addresses are sums of words already: numbers in network order, whose carries are folded late.
    let words_of_v6 = |address: Ipv6Addr| {
        let bits = address.to_bits();
        [bits >> 96, bits >> 64, bits >> 32, bits].map(|word| u64::from(word as u32))
    };
    let addresses = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            u64::from(source.to_bits()) + u64::from(destination.to_bits())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (source, destination) = (words_of_v6(source), words_of_v6(destination));
            source.iter().sum::<u64>() + destination.iter().sum::<u64>()
        }
        _ => panic!("a packet has addresses of one version"),
    };
    fold(addresses + len as u64 + u64::from(protocol))
}

/// The part of [`pseudo_header`] that is not addresses.
pub(crate) fn pseudo_len(protocol: u8, len: usize) -> u16 {
    fold(len as u64 + u64::from(protocol))
}

/// The checksum for `sum`, where zero stands for none and is sent as all ones, its equal (RFC 768).
pub fn nonzero(sum: u16) -> u16 {
    match !sum {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// What `checksum` becomes when a word that it covers changes from `old` to `new` (RFC 1624, equation 3).
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    !add(add(!checksum, !old), new)
}

/// What `checksum` becomes where `change` is the sum of the words that were taken away, each complemented, and of those
/// that have taken their places.
pub fn update_all(checksum: u16, change: u64) -> u16 {
    !fold(u64::from(!checksum) + change)
}

/// The sum of the 16-bit words that make up `sum`'s summands.
pub(crate) fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sums_the_example_of_rfc_1071() {
        // Section 3: ddf2 after the carries are folded.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }

    #[test]
    fn updates_the_example_of_rfc_1624() {
        // Section 4: a word changes from 5555 to 3285 under the checksum dd2f, which becomes 0000.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn all_ones_do_not_overflow() {
        assert_eq!(sum(&vec![0xff; 65_536]), 0xffff);
    }

    proptest! {
        #[test]
        fn sum_is_that_of_words_added_one_by_one(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert_eq!(sum(&bytes), naive(&bytes));
        }

        #[test]
        fn parts_add_up_to_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..200), at: usize) {
            let at = at % (bytes.len() / 2 + 1) * 2;
            prop_assert_eq!(add(sum(&bytes[..at]), sum(&bytes[at..])), sum(&bytes));
        }

        #[test]
        fn updating_is_summing_again(mut words in proptest::collection::vec(any::<u16>(), 2..40), new: u16) {
            words[0] |= 1; // an all-zero packet has two checksums
            let before = !naive(&to_bytes(&words));
            let old = std::mem::replace(&mut words[1], new);
            prop_assert_eq!(update(before, old, new), !naive(&to_bytes(&words)));
        }

        #[test]
        fn pseudo_header_v4_is_the_sum_of_its_bytes(source: [u8; 4], destination: [u8; 4], protocol: u8, len: u16) {
            let bytes = [&source[..], &destination, &[0, protocol], &len.to_be_bytes()].concat();
            let sum = pseudo_header(
                Ipv4Addr::from(source).into(), Ipv4Addr::from(destination).into(), protocol, len.into());
            prop_assert_eq!(sum, naive(&bytes));
        }

        #[test]
        fn pseudo_header_v6_is_the_sum_of_its_bytes(source: [u8; 16], destination: [u8; 16], protocol: u8, len: u16) {
            let bytes = [&source[..], &destination, &u32::from(len).to_be_bytes(), &[0, 0, 0, protocol]].concat();
            let sum = pseudo_header(
                Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into(), protocol, len.into());
            prop_assert_eq!(sum, naive(&bytes));
        }
    }

    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    fn to_bytes(words: &[u16]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }
}
