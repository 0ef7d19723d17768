//! What the reader makes of sound, odd and damaged files.

mod files;

use std::io::{Cursor, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use self::files::{
    Dribble, File, Kept, MICROSECONDS, MODIFIED, NANOSECONDS, gzip, open_bytes, read_all, read_rest,
};
use super::*;

const BOTH_ORDERS: [ByteOrder; 2] = [ByteOrder::Little, ByteOrder::Big];

#[test]
fn pcap_is_read_in_both_byte_orders_and_all_three_variants() {
    for order in BOTH_ORDERS {
        for (magic, kind, nanos) in [
            (MICROSECONDS, FileKind::Pcap, 1_700_000_000_123_456_000),
            (NANOSECONDS, FileKind::PcapNanoseconds, 1_700_000_000_000_123_456),
            (MODIFIED, FileKind::PcapModified, 1_700_000_000_123_456_000),
        ] {
            let mut file = File::pcap(order, magic, 101);
            file.record(1_700_000_000, 123_456, b"first", 5)
                .record(1_700_000_001, 0, b"second, cut", 1400);
            let capture = file.open();
            assert_eq!(
                capture.format(),
                Format {
                    kind,
                    byte_order: order,
                    gzip: false
                }
            );
            let (packets, damage) = read_all(capture);
            assert_eq!(damage, None);
            assert_eq!(packets.len(), 2);
            assert_eq!(
                packets[0],
                Kept {
                    number: 1,
                    unix_nanos: nanos,
                    interface: 0,
                    link_type: LinkType::RAW,
                    bytes: b"first".to_vec(),
                    original_length: 5
                }
            );
            assert_eq!(packets[1].bytes, b"second, cut");
            assert_eq!(packets[1].original_length, 1400);
        }
    }
}

#[test]
fn the_frame_check_sequence_bits_are_no_part_of_the_link_type() {
    // FCS length 4 in the top nibble, the bit that says so below it.
    let file = File::pcap(ByteOrder::Little, MICROSECONDS, 0x4400_0001);
    assert_eq!(file.open().interfaces()[0].link_type, LinkType::ETHERNET);
}

#[test]
fn a_record_longer_than_the_snap_length_is_read() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    let longest = vec![7; MAX_CAPTURED_LENGTH as usize];
    file.patch_u32(16, 96)
        .record(1, 0, &[1; 80_000], 80_000)
        .record(2, 0, &longest, 262_144);
    let (packets, damage) = read_all(file.open());
    assert_eq!(
        packets
            .iter()
            .map(|packet| packet.bytes.len())
            .collect::<Vec<_>>(),
        [80_000, 262_144]
    );
    assert_eq!(damage, None);
}

#[test]
fn an_absurd_record_length_ends_the_capture_and_keeps_what_came_before() {
    let mut file = File::pcap(ByteOrder::Big, MICROSECONDS, 1);
    file.record(1, 0, b"sound", 5);
    let at = file.bytes.len();
    file.record(2, 0, b"damaged", 7)
        .patch_u32(at + 8, MAX_CAPTURED_LENGTH + 1);
    let (packets, damage) = read_all(file.open());
    assert_eq!(packets.len(), 1);
    assert_eq!(
        damage.unwrap().to_string(),
        "damaged after packet 1: the record at byte 45 claims 262145 captured bytes; the most is 262144"
    );
}

#[test]
fn a_cut_record_is_damage_once_and_then_the_capture_has_ended() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    file.record(1, 0, b"whole", 5).record(2, 0, b"cut", 3);
    file.bytes.pop();
    let mut capture = file.open();
    assert!(capture.next_record().unwrap().is_some());
    assert_eq!(
        capture.next_record().unwrap_err(),
        Damage {
            after_packet: 1,
            what: "the file ends in the data of the record at byte 45: 18 of 19 bytes are there".to_owned()
        }
    );
    assert_eq!(capture.next_record(), Ok(None));
}

#[test]
fn pcap_files_joined_byte_by_byte_are_not_read_as_packets() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    file.record(1, 0, b"packet", 6);
    file.bytes.extend_from_within(..);
    let (packets, damage) = read_all(file.open());
    assert_eq!(packets.len(), 1);
    assert!(
        damage
            .unwrap()
            .what
            .contains("second pcap file header at byte 46")
    );
}

#[test]
fn pcapng_packet_blocks_of_every_kind_are_read_and_other_blocks_passed_over() {
    for order in BOTH_ORDERS {
        let mut file = File::pcapng(order);
        file.interface(1, 8, &[]).interface(101, 0, &[]);
        file.block(0x0bad, b"a custom block..")
            .block(5, &[0; 12])
            .block(0x7777_7777, &[]);
        file.enhanced(1, 2_000_000, b"enhanced", 8);
        file.simple(14, b"longer than 8 ");
        file.obsolete(0, 3_000_000, b"old", 3);
        file.enhanced(0, 1_000_000, b"time goes back", 14);
        let capture = file.open();
        let format = Format {
            kind: FileKind::Pcapng,
            byte_order: order,
            gzip: false,
        };
        assert_eq!(capture.format(), format);
        let (packets, damage) = read_all(capture);
        assert_eq!(damage, None);
        let seen: Vec<_> = packets
            .iter()
            .map(|p| {
                (
                    p.number,
                    p.unix_nanos,
                    p.interface,
                    p.link_type.0,
                    &p.bytes[..],
                    p.original_length,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (1, 2_000_000_000, 1, 101, &b"enhanced"[..], 8),
                (2, 2_000_000_000, 0, 1, b"longer t", 14),
                (3, 3_000_000_000, 0, 1, b"old", 3),
                (4, 1_000_000_000, 0, 1, b"time goes back", 14),
            ]
        );
    }
}

#[test]
fn each_pcapng_section_has_its_own_byte_order_and_interfaces() {
    let mut file = File::pcapng(ByteOrder::Little);
    file.interface(1, 0, &[])
        .interface(12, 0, &[])
        .enhanced(1, 1, b"little", 6);
    let mut second = File::pcapng(ByteOrder::Big);
    second.interface(113, 0, &[]).enhanced(0, 2, b"big", 3);
    file.bytes.extend(&second.bytes);
    let (packets, damage) = read_all(file.open());
    assert_eq!(damage, None);
    let seen: Vec<_> = packets
        .iter()
        .map(|p| (p.link_type.0, p.unix_nanos, &p.bytes[..]))
        .collect();
    assert_eq!(seen, [(12, 1_000, &b"little"[..]), (113, 2_000, b"big")]);
}

#[test]
fn pcapng_times_follow_resolution_and_offset_of_their_interface() {
    let cases: [(Option<u8>, i64, u64, u64); 14] = [
        (None, 0, 1_500_000, 1_500_000_000), // microseconds unless said otherwise
        (Some(0), 0, 3, 3_000_000_000),
        (Some(3), 0, 1_500, 1_500_000_000),
        (Some(9), 0, 1_700_000_000_123_456_789, 1_700_000_000_123_456_789),
        (Some(12), 0, 1_999, 1),
        (Some(100), 0, u64::MAX, 0),
        (Some(0x80), 0, 2, 2_000_000_000),
        (Some(0x80 | 10), 0, 1_536, 1_500_000_000),
        (Some(0x80 | 32), 0, (7 << 32) + (1 << 31), 7_500_000_000),
        (Some(0xff), 0, u64::MAX, 0),
        (Some(6), 1_700_000_000, 5, 1_700_000_000_000_005_000),
        (Some(9), -1, 1_000_000_007, 7),
        (Some(9), -2, 1_000_000_000, 0), // before 1970
        (Some(0), 0, u64::MAX, u64::MAX),
    ];
    for order in BOTH_ORDERS {
        for (resolution, offset, ticks, expected) in cases {
            let mut options = Vec::new();
            if let Some(resolution) = resolution {
                options.push((9, vec![resolution]));
            }
            if offset != 0 {
                options.push((14, File::u64_in(order, offset.cast_unsigned())));
            }
            let mut file = File::pcapng(order);
            file.interface(1, 0, &options).enhanced(0, ticks, b"", 0);
            let (packets, _) = read_all(file.open());
            assert_eq!(
                packets[0].unix_nanos, expected,
                "resolution {resolution:?}, offset {offset}, {ticks} ticks"
            );
        }
    }
}

#[test]
fn a_contradictory_pcapng_block_ends_the_capture_and_keeps_what_came_before() {
    let mut sound = File::pcapng(ByteOrder::Little);
    sound.interface(1, 0, &[]).enhanced(0, 1, b"kept", 4);
    let at = sound.bytes.len();
    type Damaging = fn(&mut File, usize);
    let damages: [(&str, Damaging); 8] = [
        ("two lengths, 36 in front and 40 at its end", |file, at| {
            file.enhanced(0, 2, b"lost", 4).patch_u32(at + 32, 40);
        }),
        ("interface 1, which the section has not declared", |file, _| {
            file.enhanced(1, 2, b"lost", 4);
        }),
        ("36 bytes claims to hold a packet of 5", |file, at| {
            file.enhanced(0, 2, b"lost", 4).patch_u32(at + 20, 5);
        }),
        ("claims a length of 14 bytes", |file, at| {
            file.block(9, &[]).patch_u32(at + 4, 14);
        }),
        ("claims a length of 4294967292 bytes", |file, at| {
            file.enhanced(0, 2, b"lost", 4).patch_u32(at + 4, u32::MAX - 3);
        }),
        ("no byte-order magic", |file, at| {
            file.block(0x0a0d_0d0a, &[0; 16]).patch_u32(at + 8, 0x1a2b_3c4e);
        }),
        ("version 2.0", |file, at| {
            file.bytes.extend(File::pcapng(ByteOrder::Little).bytes);
            file.bytes[at + 12] = 2;
        }),
        ("the file ends in the block", |file, _| {
            file.enhanced(0, 2, b"lost", 4).bytes.pop();
        }),
    ];
    for (expected, damage) in damages {
        let mut file = sound.clone();
        damage(&mut file, at);
        let (packets, found) = read_all(file.open());
        assert_eq!(packets.len(), 1, "{expected}");
        let found = found.unwrap_or_else(|| panic!("no damage was found: {expected}"));
        assert_eq!(found.after_packet, 1);
        assert!(
            found.what.contains(expected) && found.what.contains(&format!("byte {at}")),
            "{expected}: {found}"
        );
    }
}

#[test]
fn blocks_that_are_passed_over_are_not_held_in_memory() {
    let mut file = File::pcapng(ByteOrder::Little);
    file.interface(1, 0, &[])
        .block(0x0bad, &vec![0; 20_000_000])
        .enhanced(0, 1, b"behind", 6);
    let mut capture = file.open();
    assert_eq!(capture.next_record().unwrap().unwrap().bytes, b"behind");
    assert_eq!(capture.input.buffer_bytes(), 256 * 1024);
}

#[test]
fn a_claimed_length_takes_no_memory_before_its_bytes_come() {
    let mut file = File::pcapng(ByteOrder::Little);
    file.interface(1, 0, &[]);
    let at = file.bytes.len();
    file.enhanced(0, 1, b"short", 5).patch_u32(at + 4, 16_000_000);
    let mut capture = file.open();
    assert!(capture.next_record().is_err());
    assert_eq!(capture.input.buffer_bytes(), 256 * 1024);
}

#[test]
fn gzip_is_unpacked_around_pcap_and_pcapng_whatever_its_members() {
    let mut pcap = File::pcap(ByteOrder::Big, NANOSECONDS, 1);
    let mut pcapng = File::pcapng(ByteOrder::Big);
    pcapng.interface(1, 0, &[]);
    for number in 0..100 {
        pcap.record(number, 0, &[number as u8; 64], 64);
        pcapng.enhanced(0, u64::from(number), &[number as u8; 64], 64);
    }
    for file in [pcap, pcapng] {
        let plain = read_all(file.open());
        assert_eq!(plain.0.len(), 100);
        let (front, back) = file.bytes.split_at(1_001);
        for packed in [gzip(&file.bytes), [gzip(front), gzip(&[]), gzip(back)].concat()] {
            let length = packed.len() as u64;
            let mut capture = open_bytes(packed).unwrap();
            assert!(capture.format().gzip);
            assert_eq!(
                (read_rest(&mut capture), capture.position()),
                (plain.clone(), length)
            );
        }
    }
}

#[test]
fn a_gzip_stream_that_ends_early_keeps_the_packets_before() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    let mut packed = GzEncoder::new(Vec::new(), Compression::none());
    for number in 0..10 {
        file.record(number, 0, &[0; 84], 84);
    }
    packed.write_all(&file.bytes).unwrap();
    let mut packed = packed.finish().unwrap();
    packed.truncate(10 + 5 + 24 + 350); // gzip header, stored block header, file header, three and a half records
    let (packets, damage) = read_all(open_bytes(packed).unwrap());
    assert_eq!(packets.len(), 3);
    assert!(
        damage
            .unwrap()
            .what
            .contains("the gzip stream ends early in the data of the record at byte 324")
    );
}

#[test]
fn a_wrong_gzip_checksum_is_damage_after_the_last_packet() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    file.record(1, 0, b"packet", 6);
    let mut packed = gzip(&file.bytes);
    let at = packed.len() - 8;
    packed[at] ^= 1;
    let (packets, damage) = read_all(open_bytes(packed).unwrap());
    assert_eq!(packets.len(), 1);
    assert!(
        damage
            .unwrap()
            .what
            .contains("the gzip stream cannot be unpacked")
    );
}

#[test]
fn what_follows_a_gzip_stream_is_damage_after_the_last_packet() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    file.record(1, 0, b"packet", 6);
    for tail in [&[0; 8][..], b"something else"] {
        let (packets, damage) = read_all(open_bytes([&gzip(&file.bytes), tail].concat()).unwrap());
        assert_eq!(packets.len(), 1);
        let damage = damage.unwrap();
        assert!(
            damage.what.contains("gzip") && damage.what.ends_with("at byte 46, behind a whole record"),
            "{damage}"
        );
    }
}

#[test]
fn a_source_may_give_single_bytes_and_be_interrupted() {
    let mut file = File::pcapng(ByteOrder::Little);
    file.interface(1, 0, &[])
        .block(0x0bad, &[0; 16])
        .enhanced(0, 1, b"first", 5)
        .enhanced(0, 2, b"second", 6);
    let whole = read_all(file.open());
    let dribble = Dribble {
        bytes: Cursor::new(file.bytes),
        interrupt: false,
        failure: None,
    };
    assert_eq!(read_all(Capture::from_reader("a pipe", dribble).unwrap()), whole);
}

#[test]
fn a_source_that_fails_is_damage_with_its_reason() {
    let mut file = File::pcap(ByteOrder::Little, MICROSECONDS, 1);
    file.record(1, 0, b"packet", 6);
    let failing = Dribble {
        bytes: Cursor::new(file.bytes),
        interrupt: false,
        failure: Some("cable pulled"),
    };
    let (packets, damage) = read_all(Capture::from_reader("a pipe", failing).unwrap());
    assert_eq!(packets.len(), 1);
    assert!(damage.unwrap().what.starts_with("cable pulled"));
}

#[test]
fn what_is_no_capture_is_named_together_with_what_was_found() {
    let mut cut_header = File::pcap(ByteOrder::Little, MICROSECONDS, 1).bytes;
    cut_header.truncate(23);
    let mut version = File::pcap(ByteOrder::Little, MICROSECONDS, 1).bytes;
    version[4] = 3;
    let mut section = File::pcapng(ByteOrder::Little).bytes;
    section.truncate(20);
    let mut damaged_gzip = gzip(&[0; 100]);
    damaged_gzip.truncate(12);
    let cases: [(Vec<u8>, &str); 11] = [
        (vec![], "capture \"memory\" is empty\nhint: "),
        (gzip(&[]), "capture \"memory\" is empty\nhint: "),
        (
            b"<html>hello".to_vec(),
            "\"memory\" is not a capture: it begins with the text \"<html>hello\"\nhint: ",
        ),
        (
            vec![0xca, 0xfe, 0, 1],
            "\"memory\" is not a capture: it begins with the bytes ca fe 00 01\nhint: ",
        ),
        (
            b"\x28\xb5\x2f\xfd etc.".to_vec(),
            "\"memory\" is a Zstandard file, which is not supported\nhint: ",
        ),
        (
            gzip(&gzip(b"x")),
            "\"memory\" is gzip inside gzip, which is not supported\nhint: ",
        ),
        (
            b"snoop\0\0\0\0\0\0\x02".to_vec(),
            "\"memory\" is a Solaris snoop capture, which is not supported\nhint: ",
        ),
        (
            cut_header,
            "capture \"memory\" cannot be used: the pcap file header is cut: 23 of its 24 bytes",
        ),
        (
            version,
            "capture \"memory\" cannot be used: pcap version 3.4; only version 2 is known",
        ),
        (
            section,
            "capture \"memory\" cannot be used: the file ends in the block at byte 0: 20 of 28 bytes",
        ),
        (
            damaged_gzip,
            "cannot read capture \"memory\": the gzip stream ends early",
        ),
    ];
    for (bytes, expected) in cases {
        let error = open_bytes(bytes).expect_err(expected).to_string();
        assert!(
            error.starts_with(expected),
            "expected {expected:?}, found {error:?}"
        );
    }
}

#[test]
fn a_missing_file_and_a_directory_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("missing.pcap");
    let missing = Capture::open(&path).unwrap_err().to_string();
    assert!(
        missing.contains("missing.pcap\": No such file or directory"),
        "{missing}"
    );
    let directory = Capture::open(directory.path()).unwrap_err().to_string();
    assert!(
        directory.contains("directory") && directory.contains("\nhint: "),
        "{directory}"
    );
}

#[test]
fn a_capture_without_packets_is_sound() {
    for file in [
        File::pcap(ByteOrder::Little, MICROSECONDS, 1),
        File::pcapng(ByteOrder::Big),
    ] {
        assert_eq!(read_all(file.open()), (vec![], None));
    }
}

proptest! {
    #[test]
    fn no_bytes_panic_the_reader(
        beginning in prop::sample::select(vec![
            File::pcap(ByteOrder::Little, MICROSECONDS, 1).bytes,
            File::pcap(ByteOrder::Big, MODIFIED, 1).bytes,
            File::pcapng(ByteOrder::Little).bytes,
            {
                let mut file = File::pcapng(ByteOrder::Big);
                file.interface(1, 64, &[(9, vec![9])]).enhanced(0, 1, &[0; 20], 20).simple(20, &[0; 20]);
                file.bytes
            },
            gzip(&File::pcap(ByteOrder::Little, MICROSECONDS, 1).bytes),
            vec![],
        ]),
        noise in prop::collection::vec(any::<u8>(), 0..400),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let mut bytes = beginning;
        bytes.extend(noise);
        for (index, value) in flips {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
        }
        let length = bytes.len() as u64;
        if let Ok(mut capture) = open_bytes(bytes) {
            let (packets, damage) = read_rest(&mut capture);
            prop_assert!(capture.position() <= length);
            prop_assert!(packets.iter().zip(1..).all(|(packet, number)| packet.number == number));
            if let Some(damage) = damage {
                prop_assert_eq!(damage.after_packet, packets.len() as u64);
            }
        }
    }

    #[test]
    fn a_truncated_capture_gives_a_prefix_of_the_packets_of_the_whole(
        shape in 0..5,
        order in prop::sample::select(BOTH_ORDERS.to_vec()),
        packets in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 0..80)), 0..12),
        packed in any::<bool>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut file = match shape {
            0 => File::pcap(order, MICROSECONDS, 1),
            1 => File::pcap(order, NANOSECONDS, 1),
            2 => File::pcap(order, MODIFIED, 1),
            _ => File::pcapng(order),
        };
        if shape > 2 {
            file.interface(1, 0, &[]);
        }
        let mut ends = vec![file.bytes.len()];
        for (time, bytes) in &packets {
            match shape {
                3 => file.enhanced(0, u64::from(*time), bytes, bytes.len() as u32),
                4 => file.block(0x0bad, &[0; 8]).simple(bytes.len() as u32, bytes),
                // A first word like the magic number would look like a second file.
                _ => file.record(time >> 1, 0, bytes, bytes.len() as u32),
            };
            ends.push(file.bytes.len());
        }
        let (whole, damage) = read_all(file.open());
        prop_assert_eq!(damage, None);
        let (contents, expected): (Vec<_>, Vec<_>) =
            whole.iter().zip(&packets).map(|(packet, (_, bytes))| (&packet.bytes, bytes)).unzip();
        prop_assert_eq!(contents, expected);
        prop_assert_eq!(whole.len(), packets.len());

        if packed {
            file.bytes = gzip(&file.bytes);
        }
        let cut = cut.index(file.bytes.len() + 1);
        let is_whole = cut == file.bytes.len();
        file.bytes.truncate(cut);
        let Ok(capture) = open_bytes(file.bytes) else { return Ok(()) };
        let (part, damage) = read_all(capture);
        prop_assert!(whole.starts_with(&part));
        if packed {
            prop_assert_eq!(damage.is_none(), is_whole);
        } else {
            let complete = ends.iter().filter(|&&end| end <= cut).count();
            prop_assert_eq!(part.len(), complete.saturating_sub(1));
        }
    }

    #[test]
    fn no_bytes_panic_the_link_walk_and_what_it_finds_lies_in_the_frame(
        link_type in prop::sample::select(vec![0u16, 1, 9, 12, 14, 50, 51, 101, 104, 108, 113, 228, 229, 276, 147]),
        header in prop::collection::vec(prop::sample::select(vec![
            0u8, 1, 2, 4, 6, 8, 0x06, 0x0f, 0x11, 0x21, 0x45, 0x47, 0x48, 0x57, 0x60, 0x64, 0x81, 0x86, 0x88, 0x91, 0xa8,
            0xaa, 0xdd, 0xff,
        ]), 0..64),
        tags in 0..20usize,
        rest in prop::collection::vec(any::<u8>(), 0..32),
    ) {
        let mut frame = header;
        frame.extend([0x81, 0x00, 0x00, 0x01].repeat(tags));
        frame.extend(rest);
        if let LinkView::Ip(range) = link::ip_of(LinkType(link_type), &frame) {
            prop_assert!(range.start <= range.end && range.end <= frame.len());
        }
    }
}
