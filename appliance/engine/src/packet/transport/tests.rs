use etherparse::{PacketBuilder, TcpHeader, TcpOptionElement};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn parse_options(bytes: &[u8]) -> Option<TcpOptions<'_>> {
    let mut options = TcpOptions::default();
    options.read(bytes).map(|()| options)
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in vec(any::<u8>(), 0..120)) {
        let _ = (TcpView::parse(&bytes), UdpView::parse(&bytes));
        let _ = (IcmpView::parse_v4(&bytes), IcmpView::parse_v6(&bytes));
        let _ = parse_options(&bytes);
    }

    #[test]
    fn segment_is_read_as_it_was_built(
        ports: (u16, u16), numbers: (u32, u32), window: u16, psh: bool, urg: bool,
        mss: Option<u16>, shift in proptest::option::of(0..=14u8), times: Option<(u32, u32)>,
        payload in vec(any::<u8>(), 0..50),
    ) {
        let mut header = TcpHeader::new(ports.0 | 1, ports.1 | 1, numbers.0, window);
        (header.ack, header.acknowledgment_number, header.psh, header.urg) = (true, numbers.1, psh, urg);
        let options: Vec<_> = [
            mss.map(TcpOptionElement::MaximumSegmentSize),
            shift.map(TcpOptionElement::WindowScale),
            times.map(|(value, echo)| TcpOptionElement::Timestamp(value, echo)),
        ]
        .into_iter()
        .flatten()
        .collect();
        header.set_options(&options).unwrap();
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(&payload);
        let view = TcpView::parse(&bytes).unwrap();
        prop_assert_eq!((view.source_port, view.destination_port), (ports.0 | 1, ports.1 | 1));
        prop_assert_eq!((view.sequence, view.acknowledgment, view.window), (numbers.0, numbers.1, window));
        prop_assert_eq!((view.flags.ack(), view.flags.psh()), (true, psh));
        prop_assert_eq!(view.flags.0 & TcpFlags::URG != 0, urg);
        prop_assert_eq!((view.options.max_segment_size, view.options.window_scale), (mss, shift));
        prop_assert_eq!(view.options.timestamps, times);
        prop_assert_eq!(view.payload, &payload[..]);
        prop_assert_eq!(usize::from(view.header_len), bytes.len() - payload.len());
    }
}

#[test]
fn tcp_header_that_is_cut_or_too_short_is_refused() {
    let segment = segment(TcpFlags::ACK, &[1; 4], &[]);
    assert!(TcpView::parse(&segment).is_ok());
    assert_eq!(TcpView::parse(&segment[..19]), Err(DropReason::TcpHeader));
    assert_eq!(TcpView::parse(&segment[..23]), Err(DropReason::TcpHeader));
    let mut short = segment;
    short[12] = 4 << 4;
    assert_eq!(TcpView::parse(&short), Err(DropReason::TcpHeader));
}

#[test]
fn flags_that_no_tcp_sends_are_refused() {
    let (fin, syn, rst, ack) = (TcpFlags::FIN, TcpFlags::SYN, TcpFlags::RST, TcpFlags::ACK);
    for flags in [
        0,
        TcpFlags::PSH | TcpFlags::URG,
        fin,
        fin | TcpFlags::PSH | TcpFlags::URG,
    ] {
        assert_eq!(
            TcpView::parse(&segment(flags, &[], &[])),
            Err(DropReason::TcpFlags),
            "{flags:#04x}"
        );
    }
    for flags in [syn | fin, syn | rst, syn | fin | ack, syn | rst | ack, 0xff] {
        assert_eq!(
            TcpView::parse(&segment(flags, &[], &[])),
            Err(DropReason::TcpFlags),
            "{flags:#04x}"
        );
    }
    for flags in [
        syn,
        syn | ack,
        syn | TcpFlags::ECE | TcpFlags::CWR,
        ack,
        fin | ack,
        rst,
        rst | ack,
    ] {
        assert!(TcpView::parse(&segment(flags, &[], &[])).is_ok(), "{flags:#04x}");
    }
}

#[test]
fn port_zero_is_refused() {
    for at in [0, 2] {
        let mut bytes = segment(TcpFlags::SYN, &[], &[]);
        bytes[at..at + 2].fill(0);
        assert_eq!(TcpView::parse(&bytes), Err(DropReason::PortZero));
        let mut bytes = [4000u16, 53, 8, 0].map(u16::to_be_bytes).concat();
        bytes[at..at + 2].fill(0);
        assert_eq!(UdpView::parse(&bytes), Err(DropReason::PortZero));
    }
}

#[test]
fn window_scale_is_at_most_14() {
    for (sent, expected) in [(0, 0), (14, 14), (15, 14), (255, 14)] {
        let options = [3, 3, sent];
        let view = parse_options(&options).unwrap();
        assert_eq!(view.window_scale, Some(expected));
    }
}

#[test]
fn options_that_mean_nothing_here_are_passed_over() {
    // Fast open (RFC 7413), multipath (RFC 8684), an experiment (RFC 6994), then a maximum segment size.
    let options = [
        &[34, 2][..],
        &[30, 4, 0, 0],
        &[1, 253, 4, 0xf9, 0x89],
        &[2, 4, 5, 0xb4],
    ]
    .concat();
    let expected = TcpOptions {
        max_segment_size: Some(1460),
        ..TcpOptions::default()
    };
    assert_eq!(parse_options(&options), Some(expected));
    // Behind the end of the list there is nothing.
    assert_eq!(parse_options(&[0, 2, 4, 5, 0xb4]), Some(TcpOptions::default()));
}

#[test]
fn options_of_lengths_that_cannot_be_are_refused() {
    for options in [
        &[2u8][..],      // cut before its length
        &[2, 4, 5],      // and before its end
        &[253, 0, 0, 0], // shorter than kind and length
        &[253, 1, 0, 0],
        &[2, 3, 5], // the lengths that RFC 9293, 7323 and 2018 fix
        &[3, 4, 7, 0],
        &[4, 3, 0],
        &[5, 2],
        &[5, 6, 0, 0, 0, 0],
    ] {
        assert_eq!(parse_options(options), None, "{options:?}");
    }
}

#[test]
fn all_selective_acknowledgments_are_read() {
    let edges: Vec<u8> = (0..32).collect();
    for count in 1..=4 {
        let list = &edges[..count * 8];
        let bytes = [&[5, 2 + list.len() as u8], list].concat();
        assert_eq!(parse_options(&bytes).unwrap().sack.as_flattened(), list);
    }
}

#[test]
fn sequence_length_counts_syn_and_fin() {
    let len = |flags, payload| {
        TcpView::parse(&segment(flags, &[], payload))
            .unwrap()
            .sequence_len()
    };
    assert_eq!(len(TcpFlags::SYN, b"fast open"), 10);
    assert_eq!(len(TcpFlags::FIN | TcpFlags::ACK, b""), 1);
    assert_eq!(len(TcpFlags::ACK, b"abc"), 3);
}

#[test]
fn datagram_ends_where_its_length_says() {
    let datagram = |len: u16| [&[15, 160, 0, 53][..], &len.to_be_bytes(), &[0, 0], b"data"].concat();
    assert_eq!(UdpView::parse(&datagram(12)).unwrap().payload, b"data");
    assert_eq!(UdpView::parse(&datagram(10)).unwrap().payload, b"da");
    assert_eq!(UdpView::parse(&datagram(8)).unwrap().payload, b"");
    for len in [0, 7, 13] {
        assert_eq!(
            UdpView::parse(&datagram(len)),
            Err(DropReason::UdpHeader),
            "{len}"
        );
    }
    assert_eq!(UdpView::parse(&datagram(8)[..7]), Err(DropReason::UdpHeader));
}

#[test]
fn echoes_are_read_in_both_versions() {
    let echo = Echo {
        identifier: 0x1234,
        sequence: 7,
        payload: b"ping",
    };
    let message = |kind| [&[kind, 0, 0, 0, 0x12, 0x34, 0, 7], &b"ping"[..]].concat();
    assert_eq!(
        IcmpView::parse_v4(&message(8)).unwrap().message,
        IcmpMessage::EchoRequest(echo)
    );
    assert_eq!(
        IcmpView::parse_v4(&message(0)).unwrap().message,
        IcmpMessage::EchoReply(echo)
    );
    assert_eq!(
        IcmpView::parse_v6(&message(128)).unwrap().message,
        IcmpMessage::EchoRequest(echo)
    );
    assert_eq!(
        IcmpView::parse_v6(&message(129)).unwrap().message,
        IcmpMessage::EchoReply(echo)
    );
    assert_eq!(
        IcmpView::parse_v4(&message(13)).unwrap().message,
        IcmpMessage::Other { kind: 13, code: 0 }
    );
    assert_eq!(IcmpView::parse_v4(&message(8)[..7]), Err(DropReason::IcmpHeader));
}

#[test]
fn error_quotes_as_much_as_there_is() {
    let mut quoted = Vec::new();
    PacketBuilder::ipv4([192, 0, 2, 7], [10, 0, 0, 2], 64)
        .udp(53, 4000)
        .write(&mut quoted, b"answer")
        .unwrap();
    let expected = QuotedPacket {
        source: [192, 0, 2, 7].into(),
        destination: [10, 0, 0, 2].into(),
        protocol: 17,
        ports: Some((53, 4000)),
    };
    let read = |quoted: &[u8]| {
        let message = [&[3, 4, 0, 0, 0, 0, 5, 20], quoted].concat();
        match IcmpView::parse_v4(&message).unwrap().message {
            IcmpMessage::Error { error, quoted } => {
                assert_eq!(error, IcmpError::PacketTooBig { mtu: 1300 });
                quoted
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(read(&quoted), Some(expected));
    assert_eq!(read(&quoted[..28]), Some(expected)); // the least that RFC 792 asks for
    assert_eq!(
        read(&quoted[..23]),
        Some(QuotedPacket {
            ports: None,
            ..expected
        })
    );
    assert_eq!(read(&quoted[..19]), None);
    quoted[6..8].copy_from_slice(&[0, 8]); // a later fragment
    assert_eq!(
        read(&quoted),
        Some(QuotedPacket {
            ports: None,
            ..expected
        })
    );
}

#[test]
fn quoted_echo_gives_its_identifier_and_sequence_number() {
    let mut quoted = Vec::new();
    let (source, destination) = ([0xfd; 16], [0xfe; 16]);
    PacketBuilder::ipv6(source, destination, 64)
        .icmpv6_echo_reply(0x1234, 7)
        .write(&mut quoted, b"ping")
        .unwrap();
    let message = [&[1, 4, 0, 0, 0, 0, 0, 0], &quoted[..]].concat();
    let expected = IcmpMessage::Error {
        error: IcmpError::Unreachable(Unreachable::Port),
        quoted: Some(QuotedPacket {
            source: source.into(),
            destination: destination.into(),
            protocol: 58,
            ports: Some((0x1234, 7)),
        }),
    };
    assert_eq!(IcmpView::parse_v6(&message).unwrap().message, expected);
}

#[test]
fn mtu_beyond_16_bits_counts_as_the_largest() {
    let message = [2, 0, 0, 0, 0, 1, 0, 0];
    let expected = IcmpMessage::Error {
        error: IcmpError::PacketTooBig { mtu: u16::MAX },
        quoted: None,
    };
    assert_eq!(IcmpView::parse_v6(&message).unwrap().message, expected);
}

fn segment(flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    assert_eq!(options.len() % 4, 0, "options fill words");
    let mut bytes = vec![
        15, 160, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0, flags, 16, 0, 0, 0, 0, 0,
    ];
    bytes[12] = ((5 + options.len() / 4) << 4) as u8;
    bytes.extend(options);
    bytes.extend(payload);
    bytes
}
