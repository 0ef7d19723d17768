//! The appliance as a station on an Ethernet, behind a TAP device: what bridges and virtual machines plug in to.
//!
//! It has the router's addresses and one hardware address, and answers who asks for them: by ARP (RFC 826) and by
//! neighbour discovery (RFC 4861). Hosts there use it as their gateway. Where their addresses are is learned from what
//! they send, also through a router of their own, and asked for when it has been forgotten. Frames to other stations
//! and to groups are not for the appliance; it sends no router advertisements and leaves DHCP to others.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::{Icmpv6PayloadSlice, NdpOptionSlice, NeighborAdvertisementHeader};
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, ArpPacketSlice, EtherType, Ethernet2Slice, Icmpv6Slice, Icmpv6Type,
    IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice, PacketBuilder,
};

/// Length of an Ethernet header without tags.
pub(super) const ETHERNET_HEADER_LEN: usize = 14;

type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const NO_MAC: Mac = [0; 6];
/// Neighbour discovery is between neighbours: no router has touched it (RFC 4861, section 7.1).
const HOP_LIMIT: u8 = 255;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
// RFC 4861, section 4.6.1.
const SOURCE_MAC_OPTION: u8 = 1;
const TARGET_MAC_OPTION: u8 = 2;
/// A generation of neighbours; two are kept.
const GENERATION: usize = 16 << 10;

/// The station.
pub(super) struct Ethernet {
    mac: Mac,
    router_v4: Ipv4Addr,
    router_v6: Ipv6Addr,
    neighbours: Neighbours,
}

/// What is to be done with a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken<'a> {
    /// It has a packet for the appliance.
    Packet(&'a [u8]),
    /// This frame answers it.
    Answer(Vec<u8>),
    Nothing,
}

/// Where addresses are. Those that were not used while a generation of others came are forgotten.
#[derive(Default)]
struct Neighbours {
    young: HashMap<IpAddr, Mac>,
    old: HashMap<IpAddr, Mac>,
}

impl Ethernet {
    /// A station with these addresses. Its hardware address is made of the IPv4 address, so that it is the same after
    /// the next start, when neighbours remember it, and no other appliance's on the same Ethernet.
    pub(super) fn new(router_v4: Ipv4Addr, router_v6: Ipv6Addr) -> Self {
        let [a, b, c, d] = router_v4.octets();
        Self {
            mac: [0x02, 0x74, a, b, c, d], // locally administered
            router_v4,
            router_v6,
            neighbours: Neighbours::default(),
        }
    }

    /// Takes a frame from the device.
    pub(super) fn take<'a>(&mut self, frame: &'a [u8]) -> Taken<'a> {
        let Ok(ethernet) = Ethernet2Slice::from_slice_without_fcs(frame) else {
            return Taken::Nothing;
        };
        let payload = &frame[ETHERNET_HEADER_LEN..];
        let to_us = ethernet.destination() == self.mac;
        match ethernet.ether_type() {
            EtherType::ARP => self.take_arp(payload),
            EtherType::IPV4 if to_us => {
                if let Ok(ipv4) = Ipv4HeaderSlice::from_slice(payload) {
                    self.learn(ipv4.source_addr().into(), ethernet.source());
                }
                Taken::Packet(payload)
            }
            EtherType::IPV6 => {
                let Ok(ipv6) = Ipv6HeaderSlice::from_slice(payload) else {
                    return Taken::Nothing;
                };
                if let Some(message) = discovery(&ipv6, payload) {
                    return self.take_discovery(&ipv6, &message, ethernet.source(), to_us);
                }
                if !to_us {
                    return Taken::Nothing;
                }
                self.learn(ipv6.source_addr().into(), ethernet.source());
                Taken::Packet(payload)
            }
            _ => Taken::Nothing,
        }
    }

    /// The header of a frame with `packet`, or a frame that asks where its destination is.
    pub(super) fn header_for(&mut self, packet: &[u8]) -> Result<[u8; ETHERNET_HEADER_LEN], Vec<u8>> {
        let (destination, ether_type) = match packet[0] >> 4 {
            6 => (
                IpAddr::from(*packet[24..40].first_chunk::<16>().expect("an IPv6 header")),
                EtherType::IPV6,
            ),
            _ => (
                IpAddr::from(*packet[16..20].first_chunk::<4>().expect("an IPv4 header")),
                EtherType::IPV4,
            ),
        };
        let Some(mac) = self.neighbours.find(destination) else {
            return Err(match destination {
                IpAddr::V4(address) => self.ask_v4(address),
                IpAddr::V6(address) => self.ask_v6(address),
            });
        };
        let mut header = [0; ETHERNET_HEADER_LEN];
        header[..6].copy_from_slice(&mac);
        header[6..12].copy_from_slice(&self.mac);
        header[12..].copy_from_slice(&ether_type.0.to_be_bytes());
        Ok(header)
    }

    fn learn(&mut self, address: IpAddr, mac: Mac) {
        let is_ours = address == self.router_v4 || address == self.router_v6;
        let is_group_mac = mac[0] & 1 != 0;
        if !is_ours && !is_group_mac && !address.is_unspecified() && !address.is_multicast() {
            self.neighbours.insert(address, mac);
        }
    }

    fn take_arp(&mut self, payload: &[u8]) -> Taken<'static> {
        let Some(arp) = ArpPacketSlice::from_slice(payload)
            .ok()
            .and_then(|arp| arp.to_packet().try_eth_ipv4().ok())
        else {
            return Taken::Nothing;
        };
        let sender = IpAddr::from(arp.sender_ipv4);
        let for_us = arp.target_ipv4 == self.router_v4.octets();
        // RFC 826: who is known is corrected by whatever comes; who asks us is learned.
        if for_us || self.neighbours.find(sender).is_some() {
            self.learn(sender, arp.sender_mac);
        }
        if !for_us || arp.operation != ArpOperation::REQUEST {
            return Taken::Nothing;
        }
        let answer = ArpEthIpv4Packet {
            operation: ArpOperation::REPLY,
            sender_mac: self.mac,
            sender_ipv4: self.router_v4.octets(),
            target_mac: arp.sender_mac,
            target_ipv4: arp.sender_ipv4,
        };
        Taken::Answer(self.arp_frame(arp.sender_mac, answer))
    }

    fn ask_v4(&self, address: Ipv4Addr) -> Vec<u8> {
        let question = ArpEthIpv4Packet {
            operation: ArpOperation::REQUEST,
            sender_mac: self.mac,
            sender_ipv4: self.router_v4.octets(),
            target_mac: NO_MAC,
            target_ipv4: address.octets(),
        };
        self.arp_frame(BROADCAST, question)
    }

    fn arp_frame(&self, destination: Mac, arp: ArpEthIpv4Packet) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(self.mac, destination)
            .arp(arp.into())
            .write(&mut frame)
            .expect("a vector takes everything");
        frame
    }

    fn take_discovery(
        &mut self,
        ipv6: &Ipv6HeaderSlice<'_>,
        message: &Icmpv6Slice<'_>,
        sender: Mac,
        to_us: bool,
    ) -> Taken<'static> {
        let source = ipv6.source_addr();
        // RFC 4861, sections 7.1.1 and 7.1.2.
        let is_valid = ipv6.hop_limit() == HOP_LIMIT
            && message.is_checksum_valid(source.octets(), ipv6.destination_addr().octets());
        if !is_valid {
            return Taken::Nothing;
        }
        match message.payload_slice() {
            Ok(Icmpv6PayloadSlice::NeighborSolicitation(solicitation))
                if solicitation.target_address() == self.router_v6 =>
            {
                if source.is_unspecified() {
                    // Somebody wants our address (RFC 4862, section 5.4.3), and all have to hear that it is taken:
                    // RFC 4861, section 7.2.4.
                    return Taken::Answer(self.advertise(multicast_mac(ALL_NODES), ALL_NODES, false));
                }
                self.learn(source.into(), sender);
                Taken::Answer(self.advertise(sender, source, true))
            }
            Ok(Icmpv6PayloadSlice::NeighborAdvertisement(advertisement)) => {
                let target = IpAddr::from(advertisement.target_address());
                let mac = advertisement
                    .options_iterator()
                    .map_while(Result::ok)
                    .find_map(|option| match option {
                        NdpOptionSlice::TargetLinkLayerAddress(option) => {
                            Mac::try_from(option.link_layer_address()).ok()
                        }
                        _ => None,
                    });
                if let Some(mac) = mac
                    && (to_us || self.neighbours.find(target).is_some())
                {
                    self.learn(target, mac);
                }
                Taken::Nothing
            }
            Ok(_) | Err(_) => Taken::Nothing,
        }
    }

    fn advertise(&self, mac: Mac, destination: Ipv6Addr, solicited: bool) -> Vec<u8> {
        let header = NeighborAdvertisementHeader {
            router: true,
            solicited,
            r#override: true,
        };
        let kind = Icmpv6Type::NeighborAdvertisement(header);
        self.discovery_frame(mac, destination, kind, self.router_v6, TARGET_MAC_OPTION)
    }

    fn ask_v6(&self, address: Ipv6Addr) -> Vec<u8> {
        // The solicited-node address (RFC 4291, section 2.7.1).
        let group = Ipv6Addr::from_bits((0xff02 << 112) | (0x1_ff << 24) | (address.to_bits() & 0xff_ffff));
        let kind = Icmpv6Type::NeighborSolicitation;
        self.discovery_frame(multicast_mac(group), group, kind, address, SOURCE_MAC_OPTION)
    }

    fn discovery_frame(
        &self,
        mac: Mac,
        destination: Ipv6Addr,
        kind: Icmpv6Type,
        target: Ipv6Addr,
        option: u8,
    ) -> Vec<u8> {
        let mut body = target.octets().to_vec();
        body.extend_from_slice(&[option, 1]); // in units of 8 bytes
        body.extend_from_slice(&self.mac);
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(self.mac, mac)
            .ipv6(self.router_v6.octets(), destination.octets(), HOP_LIMIT)
            .icmpv6(kind)
            .write(&mut frame, &body)
            .expect("a vector takes everything");
        frame
    }
}

impl Neighbours {
    fn find(&mut self, address: IpAddr) -> Option<Mac> {
        if let Some(&mac) = self.young.get(&address) {
            return Some(mac);
        }
        let mac = self.old.remove(&address)?;
        self.insert(address, mac);
        Some(mac)
    }

    fn insert(&mut self, address: IpAddr, mac: Mac) {
        if self.young.len() >= GENERATION && !self.young.contains_key(&address) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(address, mac);
    }
}

/// A packet's message of neighbour discovery, if it is one. They come without extension headers.
fn discovery<'a>(ipv6: &Ipv6HeaderSlice<'_>, packet: &'a [u8]) -> Option<Icmpv6Slice<'a>> {
    if ipv6.next_header() != IpNumber::IPV6_ICMP {
        return None;
    }
    let end = packet.len().min(40 + usize::from(ipv6.payload_length()));
    let message = Icmpv6Slice::from_slice(&packet[40..end]).ok()?;
    let is_discovery = (133..=137).contains(&message.type_u8()); // RFC 4861, section 4
    is_discovery.then_some(message)
}

/// The hardware address of an IPv6 group (RFC 2464, section 7).
fn multicast_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Mac = [0x02, 0x74, 198, 18, 0, 1];
    const CLIENT: Mac = [0x52, 0x54, 0, 0, 0, 9];
    const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 9);

    fn router_v6() -> Ipv6Addr {
        "fd74:756e::1".parse().unwrap()
    }

    fn client_v6() -> Ipv6Addr {
        "fd74:756e::9".parse().unwrap()
    }

    fn station() -> Ethernet {
        Ethernet::new(Ipv4Addr::new(198, 18, 0, 1), router_v6())
    }

    fn arp_request(sender: Ipv4Addr, target: [u8; 4]) -> Vec<u8> {
        let request = ArpEthIpv4Packet {
            operation: ArpOperation::REQUEST,
            sender_mac: CLIENT,
            sender_ipv4: sender.octets(),
            target_mac: NO_MAC,
            target_ipv4: target,
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(CLIENT, BROADCAST)
            .arp(request.into())
            .write(&mut frame)
            .unwrap();
        frame
    }

    fn solicitation(source: Ipv6Addr, hop_limit: u8) -> Vec<u8> {
        let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
        let mut body = router_v6().octets().to_vec();
        if !source.is_unspecified() {
            body.extend_from_slice(&[1, 1]);
            body.extend_from_slice(&CLIENT);
        }
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(CLIENT, [0x33, 0x33, 0xff, 0, 0, 1])
            .ipv6(source.octets(), group.octets(), hop_limit)
            .icmpv6(Icmpv6Type::NeighborSolicitation)
            .write(&mut frame, &body)
            .unwrap();
        frame
    }

    fn datagram(destination: Mac, source: Ipv4Addr) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(CLIENT, destination)
            .ipv4(source.octets(), [192, 0, 2, 7], 64)
            .udp(1000, 53)
            .write(&mut frame, b"query")
            .unwrap();
        frame
    }

    fn packet_to(destination: [u8; 4]) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([192, 0, 2, 7], destination, 64)
            .udp(53, 1000)
            .write(&mut packet, b"answer")
            .unwrap();
        packet
    }

    #[test]
    fn who_asks_for_the_router_is_told_and_remembered() {
        let mut station = station();
        let Taken::Answer(answer) = station.take(&arp_request(CLIENT_V4, [198, 18, 0, 1])) else {
            panic!("no answer");
        };
        // RFC 826: hardware 1, protocol 0x0800, lengths 6 and 4, operation 2; sender, then target.
        let mut expected = [CLIENT, OURS].concat();
        expected.extend_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
        expected.extend_from_slice(&[&OURS[..], &[198, 18, 0, 1], &CLIENT, &[198, 18, 0, 9]].concat());
        assert_eq!(answer[..42], expected);
        let header = station.header_for(&packet_to([198, 18, 0, 9])).unwrap();
        assert_eq!(header, *[&CLIENT[..], &OURS, &[0x08, 0]].concat());
        // Who asks whether an address is free (RFC 5227) has none yet; who asks for others is not our business.
        assert!(matches!(
            station.take(&arp_request(Ipv4Addr::UNSPECIFIED, [198, 18, 0, 1])),
            Taken::Answer(_)
        ));
        assert_eq!(
            station.take(&arp_request(CLIENT_V4, [198, 18, 0, 8])),
            Taken::Nothing
        );
    }

    #[test]
    fn solicitations_from_neighbours_are_answered() {
        let mut station = station();
        let Taken::Answer(answer) = station.take(&solicitation(client_v6(), 255)) else {
            panic!("no answer");
        };
        assert_eq!(answer[..14], *[&CLIENT[..], &OURS, &[0x86, 0xdd]].concat());
        assert_eq!(answer[21], 255);
        assert_eq!(
            answer[22..54],
            [router_v6().octets(), client_v6().octets()].concat()
        );
        let message = Icmpv6Slice::from_slice(&answer[54..]).unwrap();
        assert!(message.is_checksum_valid(router_v6().octets(), client_v6().octets()));
        // Type 136; router, solicited, override; the target, and its hardware address as option 2.
        assert_eq!(
            (message.type_u8(), message.bytes5to8()),
            (136, [0b1110_0000, 0, 0, 0])
        );
        assert_eq!(
            message.payload(),
            [&router_v6().octets()[..], &[2, 1], &OURS].concat()
        );

        let Taken::Answer(answer) = station.take(&solicitation(Ipv6Addr::UNSPECIFIED, 255)) else {
            panic!("no answer");
        };
        assert_eq!(answer[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(answer[38..54], ALL_NODES.octets());
        assert_eq!(answer[58], 0b1010_0000, "nobody has solicited it");

        assert_eq!(station.take(&solicitation(client_v6(), 254)), Taken::Nothing);
        let mut damaged = solicitation(client_v6(), 255);
        damaged[80] ^= 1;
        assert_eq!(station.take(&damaged), Taken::Nothing);
    }

    #[test]
    fn packets_go_back_to_where_they_came_from_and_the_unknown_is_asked_for() {
        let mut station = station();
        let remote = Ipv4Addr::new(10, 1, 1, 1);
        let question = station.header_for(&packet_to(remote.octets())).unwrap_err();
        assert_eq!(question[..6], BROADCAST);
        assert_eq!(question[38..42], remote.octets());
        let frame = datagram(OURS, remote);
        assert_eq!(station.take(&frame), Taken::Packet(&frame[14..]));
        let header = station.header_for(&packet_to(remote.octets())).unwrap();
        assert_eq!(header[..6], CLIENT);
        // Frames for others teach nothing.
        let other = Ipv4Addr::new(10, 1, 1, 2);
        assert_eq!(station.take(&datagram(BROADCAST, other)), Taken::Nothing);
        assert_eq!(station.take(&datagram(CLIENT, other)), Taken::Nothing);
        assert!(station.header_for(&packet_to(other.octets())).is_err());
    }

    #[test]
    fn those_in_use_outlive_any_number_of_others() {
        let mut station = station();
        for number in 0..100_000_u32 {
            station.learn(Ipv4Addr::from_bits(0x0a00_0000 + number).into(), CLIENT);
            station.learn(CLIENT_V4.into(), CLIENT);
            assert!(station.neighbours.find(CLIENT_V4.into()).is_some());
        }
        let kept = station.neighbours.young.len() + station.neighbours.old.len();
        assert!(kept <= 2 * GENERATION, "{kept}");
    }
}
