//! Rule 9: what a wrong checksum means.

use tungate_sim::outcome::Side;
use tungate_sim::replay::{Checksums, Options};
use tungate_tests::script::{Conversation, Played, Script};

use super::{whole, with_missing};

const TCP_CHECKSUM: usize = 20 + 16;

/// What a tap sees of a question whose packet `change` has been done to, and of the answer.
fn conversation(change: impl Fn(&mut [u8]), from: Side) -> Script {
    let (mut script, mut tcp) = (Script::new(), Conversation::new("10.0.0.2:40000", "192.0.2.7:80"));
    script.segments(&tcp.handshake());
    for side in [Side::Client, Side::Target] {
        let segment = match side {
            Side::Client => tcp.ask(b"question"),
            Side::Target | Side::None => tcp.answer(b"answer"),
        };
        let mut packet = segment.packet();
        if side == from {
            change(&mut packet);
        }
        script.packet(packet);
    }
    script.segments([&tcp.ack()]);
    script
}

fn replay(script: &Script, checksums: Checksums) -> Played {
    script.replay_with(&Options {
        checksums,
        ..Options::default()
    })
}

fn no_checksum(packet: &mut [u8]) {
    packet[TCP_CHECKSUM..TCP_CHECKSUM + 2].fill(0);
}

/// The sum of the pseudo-header, which is what Linux leaves for the card to finish.
fn partial_checksum(packet: &mut [u8], with_length: bool) {
    let words = packet[12..20]
        .chunks_exact(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let length = if with_length { packet.len() as u32 - 20 } else { 0 };
    let sum = words.sum::<u32>() + 6 + length;
    let folded = ((sum & 0xffff) + (sum >> 16)) as u16;
    packet[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&folded.to_be_bytes());
}

fn damage(packet: &mut [u8]) {
    packet[TCP_CHECKSUM] ^= 0x55;
}

#[test]
fn auto_repairs_what_was_left_to_the_card() {
    let changes: [fn(&mut [u8]); 3] = [
        no_checksum,
        |packet| partial_checksum(packet, true),
        |packet| partial_checksum(packet, false),
    ];
    for change in changes {
        let played = replay(&conversation(change, Side::Client), Checksums::Auto);
        assert_eq!(played.flow().to_target, whole(b"question"));
        assert_eq!(played.outcome().totals.repaired_checksums, 1);
        assert_eq!(played.outcome().totals.drop, 0);
    }
}

#[test]
fn auto_repairs_an_ip_checksum_of_zero() {
    let script = conversation(|packet| packet[10..12].fill(0), Side::Client);
    assert_eq!(
        replay(&script, Checksums::Auto).flow().to_target,
        whole(b"question")
    );
    let strict = replay(&script, Checksums::Strict);
    assert_eq!(strict.packets[3].reason, Some("ip-checksum"));
}

#[test]
fn auto_repairs_super_packets() {
    let (mut script, mut tcp) = (Script::new(), Conversation::new("10.0.0.2:40000", "192.0.2.7:80"));
    script.segments(&tcp.handshake());
    let bytes = vec![b'x'; 4000];
    let mut packet = tcp.ask(&bytes).packet();
    damage(&mut packet);
    script.packet(packet);
    let played = script.replay();
    assert_eq!(played.flow().to_target, whole(&bytes));
}

#[test]
fn auto_judges_any_other_wrong_one_of_a_client() {
    let played = replay(&conversation(damage, Side::Client), Checksums::Auto);
    assert_eq!(played.packets[3].reason, Some("tcp-checksum"));
    // The captured server acknowledged those bytes, so it had them; nothing that was captured holds them soundly.
    assert_eq!(played.flow().to_target, with_missing(b"", 8));
}

#[test]
fn strict_judges_as_the_appliance_would() {
    let played = replay(&conversation(no_checksum, Side::Client), Checksums::Strict);
    assert_eq!(played.packets[3].reason, Some("tcp-checksum"));
    assert_eq!(played.outcome().totals.repaired_checksums, 0);
}

#[test]
fn ignore_repairs_all() {
    let played = replay(&conversation(damage, Side::Client), Checksums::Ignore);
    assert_eq!(played.flow().to_target, whole(b"question"));
    assert_eq!(played.outcome().totals.repaired_checksums, 1);
}

#[test]
fn targets_are_script_and_lose_nothing_unless_strict() {
    let script = conversation(damage, Side::Target);
    for checksums in [Checksums::Auto, Checksums::Ignore] {
        assert_eq!(replay(&script, checksums).flow().to_client, whole(b"answer"));
    }
    let strict = replay(&script, Checksums::Strict);
    assert_eq!(strict.flow().to_client, with_missing(b"", 6), "lost on the way");
    assert_eq!(strict.outcome().totals.drop, 0);
}

#[test]
fn a_cut_packet_is_judged_on_the_headers_that_are_there() {
    let (mut script, mut tcp) = (Script::new(), Conversation::new("10.0.0.2:40000", "192.0.2.7:80"));
    script.segments(&tcp.handshake());
    let mut packet = tcp.ask(b"question").packet();
    damage(&mut packet);
    script.cut(packet, 40);
    let played = replay(&script, Checksums::Strict);
    assert_eq!(played.packets[3].reason, None);
    assert_eq!(played.flow().to_target, with_missing(b"", 8));
}

#[test]
fn a_total_length_of_zero_is_the_captured_length() {
    let script = conversation(
        |packet| {
            packet[2..4].fill(0);
            packet[10..12].fill(0);
        },
        Side::Client,
    );
    assert_eq!(script.replay().flow().to_target, whole(b"question"));
}
