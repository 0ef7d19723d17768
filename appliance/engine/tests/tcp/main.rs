//! TCP flows as a client sees them, and the traps that a stack per flow has to keep clear of.

mod delay;
mod ends;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use support::*;
use tungate_engine::io::{Unreachable, UpstreamError, UpstreamEvent};
use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};
use tungate_engine::{CloseReason, Config, DropReason, Event};

fn closed(rig: &mut Rig) -> Vec<CloseReason> {
    let reason = |event| {
        if let Event::Closed { reason, .. } = event {
            Some(reason)
        } else {
            None
        }
    };
    rig.events().into_iter().filter_map(reason).collect()
}

// ---- set-up --------------------------------------------------------------------------------------------------------

#[test]
fn the_syn_ack_waits_for_the_upstream() {
    for (client, target) in [(CLIENT, TARGET), (CLIENT6, TARGET6)] {
        let mut rig = Rig::new();
        let client = Client::new(client, target);
        let flow = rig.packet(&client.syn()).flow.expect("accepted");
        assert!(
            matches!(rig.commands()[..], [Command::Open(open)] if open.target == client.target && open.client == client.address)
        );
        rig.pass(Duration::from_secs(5));
        assert_eq!(rig.segments(), []);
        rig.upstream(flow, UpstreamEvent::Connected);
        let syn_ack = rig.segment();
        assert_eq!(syn_ack.flags, SYN | ACK);
        assert_eq!(syn_ack.acknowledgment, client.sequence + 1);
        let headers = if client.address.is_ipv4() { 40 } else { 60 };
        assert_eq!(syn_ack.max_segment_size, Some(1500 - headers));
        assert!(syn_ack.window_scale.is_some());
    }
}

#[test]
fn repeated_syns_open_one_upstream() {
    let mut rig = Rig::new();
    let client = Client::new(CLIENT, TARGET);
    let first = rig.packet(&client.syn());
    for _ in 0..3 {
        assert_eq!(rig.packet(&client.syn()), first);
    }
    assert_eq!(rig.commands().len(), 1);
    assert_eq!(rig.engine.open_flows(), 1);
}

/// The client waits no longer for a SYN-ACK that was lost than until it asks again, which an ACK would not help with: it
/// has to ignore one (RFC 9293, section 3.10.7.3). Another SYN is not its own.
#[test]
fn a_repeated_syn_is_answered_by_the_syn_ack_again() {
    let mut rig = Rig::new();
    let mut client = Client::new(CLIENT, TARGET);
    let flow = rig.packet(&client.syn()).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    let lost = rig.segment();
    for _ in 0..3 {
        rig.pass(Duration::from_millis(300));
        assert_eq!(rig.segments(), []);
        rig.packet(&client.syn());
        assert_eq!(rig.segment(), lost);
    }
    let foreign = Client {
        sequence: client.sequence.wrapping_add(7),
        ..Client::new(CLIENT, TARGET)
    };
    rig.packet(&foreign.syn());
    assert_eq!(rig.segment().flags, ACK);
    rig.packet(&client.syn());
    client.finish_handshake(&mut rig);
    assert_eq!(rig.engine.open_flows(), 1);
}

#[test]
fn a_client_without_options_gets_none() {
    let mut rig = Rig::new();
    let client = Client::new(CLIENT, TARGET);
    let flow = rig.packet(&client.syn_with(&[])).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    assert_eq!(rig.segment().window_scale, None);
}

#[test]
fn refused_upstream_resets_the_client() {
    let mut rig = Rig::new();
    let client = Client::new(CLIENT, TARGET);
    let flow = rig.packet(&client.syn()).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Failed(UpstreamError::Refused));
    let reset = rig.segment();
    assert_eq!(
        (reset.flags, reset.sequence, reset.acknowledgment),
        (RST | ACK, 0, client.sequence + 1)
    );
    assert_eq!(
        closed(&mut rig),
        [CloseReason::ConnectFailed(UpstreamError::Refused)]
    );
    assert_eq!(rig.engine.open_flows(), 0);
}

#[test]
fn unreachable_upstream_is_told_by_icmp() {
    // (family, ICMP type and code for "host unreachable": RFC 792 and RFC 4443)
    for (client, target, protocol, kind, code) in [(CLIENT, TARGET, 1, 3, 1), (CLIENT6, TARGET6, 58, 1, 3)] {
        let mut rig = Rig::new();
        let client = Client::new(client, target);
        let flow = rig.packet(&client.syn()).flow.expect("accepted");
        rig.upstream(
            flow,
            UpstreamEvent::Failed(UpstreamError::Unreachable(Unreachable::Host)),
        );
        let sent = rig.sent();
        let ip = etherparse::SlicedPacket::from_ip(&sent[0].1).expect("sound");
        let payload = ip
            .net
            .as_ref()
            .and_then(|net| net.ip_payload_ref())
            .expect("an IP packet");
        assert_eq!(payload.ip_number.0, protocol);
        assert_eq!(payload.payload[..2], [kind, code]);
        let quoted =
            etherparse::LaxSlicedPacket::from_ip(&payload.payload[8..]).expect("quotes an IP packet");
        let Some(etherparse::TransportSlice::Tcp(tcp)) = quoted.transport else {
            panic!("quotes the SYN")
        };
        assert_eq!(
            (tcp.source_port(), tcp.destination_port()),
            (client.address.port(), client.target.port())
        );
        assert_eq!(tcp.sequence_number(), client.sequence);
    }
}

#[test]
fn silent_upstream_is_met_by_silence() {
    let mut rig = Rig::new();
    rig.packet(&Client::new(CLIENT, TARGET).syn());
    rig.commands();
    rig.pass(Duration::from_secs(129));
    assert_eq!(rig.engine.open_flows(), 1);
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.sent(), []);
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_eq!(closed(&mut rig), [CloseReason::ConnectTimeout]);
}

#[test]
fn rejected_flows_are_reset_and_dropped_ones_are_not() {
    for (action, answers) in [(Action::Reject, 1), (Action::Drop, 0)] {
        let rule = Rule {
            name: "no".into(),
            matches: RuleMatch::default(),
            action,
        };
        let mut rig = Rig::with(
            Config::default(),
            PolicySpec {
                rules: vec![rule],
                ..PolicySpec::default()
            },
        );
        assert!(rig.packet(&Client::new(CLIENT, TARGET).syn()).dropped.is_some());
        assert_eq!(rig.commands(), []);
        assert_eq!(rig.segments().len(), answers);
    }
}

#[test]
fn a_client_that_resets_the_syn_ack_ends_the_flow() {
    let mut rig = Rig::new();
    let mut client = Client::new(CLIENT, TARGET);
    let flow = rig.packet(&client.syn()).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    rig.segment();
    client.sequence += 1;
    rig.commands();
    rig.packet(&client.segment(RST, &[]));
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_eq!(closed(&mut rig), [CloseReason::ClientReset]);
}

#[test]
fn a_handshake_that_is_not_finished_ends() {
    let mut rig = Rig::new();
    let client = Client::new(CLIENT, TARGET);
    let flow = rig.packet(&client.syn()).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    rig.commands();
    rig.pass(Duration::from_secs(15));
    let segments = rig.segments();
    assert!(segments.len() > 2, "the SYN-ACK is repeated");
    assert!(
        segments[..segments.len() - 1]
            .iter()
            .all(|segment| segment.flags == SYN | ACK)
    );
    assert_eq!(segments[segments.len() - 1].flags & RST, RST);
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_eq!(closed(&mut rig), [CloseReason::HandshakeTimeout]);
}

#[test]
fn a_split_handshake_is_refused() {
    let mut rig = Rig::new();
    let mut client = Client::new(CLIENT, TARGET);
    let flow = rig.packet(&client.syn()).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    client.expected = rig.segment().sequence.wrapping_add(1);
    assert_eq!(
        rig.packet(&client.segment(SYN | ACK, &[])).dropped,
        Some(DropReason::SplitHandshake)
    );
    assert_eq!(rig.segment().flags, RST);
}

#[test]
fn a_stray_segment_is_reset() {
    let mut rig = Rig::new();
    let mut client = Client::new(CLIENT, TARGET);
    client.expected = 77;
    assert_eq!(
        rig.packet(&client.segment(ACK, b"x")).dropped,
        Some(DropReason::NoFlow)
    );
    let reset = rig.segment();
    assert_eq!((reset.flags, reset.sequence), (RST, 77));
    assert_eq!(
        rig.packet(&client.segment(RST, &[])).dropped,
        Some(DropReason::NoFlow)
    );
    assert_eq!(rig.segments(), [], "a reset is not answered");
}

// ---- data ----------------------------------------------------------------------------------------------------------

#[test]
fn bytes_pass_both_ways() {
    for (client, target) in [(CLIENT, TARGET), (CLIENT6, TARGET6)] {
        let mut rig = Rig::new();
        let (mut client, flow) = Client::open(client, target, &mut rig);
        client.send(&mut rig, b"GET / HTTP/1.0\r\n\r\n");
        assert_eq!(rig.commands(), [Command::Readable]);
        assert_eq!(rig.read_all(flow), b"GET / HTTP/1.0\r\n\r\n");
        assert_eq!(rig.segment().acknowledgment, client.sequence);
        assert_eq!(rig.write(flow, b"HTTP/1.0 200 OK\r\n"), 17);
        assert_eq!(client.receive(&mut rig).0, b"HTTP/1.0 200 OK\r\n");
    }
}

#[test]
fn bulk_data_leaves_in_super_packets_of_whole_segments() {
    for (client, target, mss, header_len) in [(CLIENT, TARGET, 1460, 40), (CLIENT6, TARGET6, 1440, 60)] {
        let mut rig = Rig::new();
        let (mut client, flow) = Client::open(client, target, &mut rig);
        let data = pattern(900_000);
        let mut given = rig.write(flow, &data);
        let mut received = Vec::new();
        let mut largest = 0;
        while received.len() < data.len() {
            let sent = std::mem::take(&mut rig.world.packets);
            for (out, bytes) in &sent {
                assert!(
                    bytes.len() + 14 < 65_536,
                    "the kernel would split {} bytes again",
                    bytes.len()
                );
                let payload = bytes.len() - header_len;
                if payload > mss {
                    assert_eq!(
                        out.segment_size.map(|size| usize::from(size.get())),
                        Some(mss.min(1460))
                    );
                }
                largest = largest.max(payload);
            }
            rig.world.packets = sent;
            let (bytes, _) = client.receive(&mut rig);
            assert!(!bytes.is_empty(), "stuck after {} bytes", received.len());
            received.extend(bytes);
            given += rig.write(flow, &data[given..]);
        }
        assert!(received == data);
        assert!(largest > 60_000, "the largest was {largest}");
        assert_eq!(largest % mss, 0);
    }
}

#[test]
fn a_small_segment_size_is_kept_in_bulk() {
    let mut rig = Rig::new();
    let mut client = Client::new(CLIENT, TARGET);
    let syn = client.syn_with(&[
        etherparse::TcpOptionElement::MaximumSegmentSize(536),
        etherparse::TcpOptionElement::WindowScale(7),
    ]);
    let flow = rig.packet(&syn).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    client.finish_handshake(&mut rig);
    let data = pattern(200_000);
    let mut given = rig.write(flow, &data);
    let mut received = Vec::new();
    while received.len() < data.len() {
        let sent = std::mem::take(&mut rig.world.packets);
        assert!(!sent.is_empty());
        for (out, bytes) in sent {
            let mut whole = bytes.clone();
            tungate_engine::packet::segments(&mut whole, &out, |packet| assert!(packet.len() <= 40 + 536));
            rig.world.packets.push((out, bytes));
        }
        received.extend(client.receive(&mut rig).0);
        given += rig.write(flow, &data[given..]);
    }
    assert!(received == data);
}

#[test]
fn a_super_packet_from_the_client_is_taken_whole() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    let data = pattern(65_495);
    assert_eq!(client.send(&mut rig, &data).dropped, None);
    assert!(rig.read_all(flow) == data);
}

#[test]
fn large_segments_pass_by_the_buffer_as_far_as_the_upstream_takes_them() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    let bytes = pattern(200_010);
    let (first, rest) = bytes.split_at(10);
    rig.packet(&client.segment(ACK, first));
    client.sequence += 10;
    let mut read = rig.read_all(flow); // what comes first is looked at
    rig.commands();
    rig.sent();

    rig.world.appetite = 70_000;
    for (at, piece) in rest.chunks(20_000).enumerate() {
        rig.packet(&client.segment(ACK, piece));
        client.sequence += piece.len() as u32;
        assert_eq!(rig.segment().acknowledgment, client.sequence);
        // Three and a half pieces pass; what is left waits, and all behind it though the upstream would take more.
        let passed = rig.world.passed.len();
        assert_eq!(passed, ((at + 1) * 20_000).min(70_000));
        let told: &[Command] = if at == 3 { &[Command::Readable] } else { &[] };
        assert_eq!(rig.commands(), told);
        if passed == 70_000 {
            rig.world.appetite = usize::MAX;
        }
    }
    read.append(&mut rig.world.passed);
    read.extend(rig.read_all(flow));
    assert!(read == bytes);

    // What is out of order does not pass, nor what is small; nor what was there before, a second time.
    rig.world.appetite = usize::MAX;
    let base = client.sequence;
    let more = pattern(60_000);
    let piece = |client: &Client, from: usize, to: usize| {
        client.segment_at(base.wrapping_add(from as u32), ACK, &more[from..to])
    };
    rig.packet(&piece(&client, 20_000, 40_000));
    rig.packet(&piece(&client, 0, 20_000));
    assert_eq!(rig.world.passed.len(), 0);
    assert!(rig.read_all(flow) == more[..40_000]);
    rig.packet(&piece(&client, 20_000, 40_000));
    rig.packet(&piece(&client, 40_000, 40_100));
    assert_eq!(rig.world.passed.len(), 0);
    assert!(rig.read_all(flow) == more[40_000..40_100]);
    rig.commands();
    client.sequence = base.wrapping_add(40_100);
    rig.packet(&client.segment(ACK | FIN, &more[40_100..]));
    assert!(rig.world.passed == more[40_100..]);
    assert_eq!(rig.commands(), [Command::CloseWrite]);
    let progress = rig.engine.progress(flow).expect("it lives on");
    assert_eq!(progress.to_upstream, 260_010);
}

#[test]
fn a_full_device_loses_nothing() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    let data = pattern(300_000);
    let mut given = 0;
    let mut received = Vec::new();
    for turn in 0.. {
        rig.world.full = turn % 3 != 0;
        given += rig.write(flow, &data[given..]);
        if rig.world.full {
            assert_eq!(rig.sent().iter().filter(|(_, bytes)| bytes.len() > 60).count(), 0);
        }
        received.extend(client.receive(&mut rig).0);
        if received.len() == data.len() {
            break;
        }
        assert!(turn < 100, "stuck after {} bytes", received.len());
    }
    assert!(received == data);
}

#[test]
fn a_slow_upstream_closes_the_window_and_opens_it_again() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    let capacity = 1 << 20;
    let data = pattern(capacity);
    for chunk in data.chunks(32_768) {
        assert_eq!(client.send(&mut rig, chunk).dropped, None);
    }
    assert_eq!(rig.segments().last().map(|ack| ack.window), Some(0));
    // A probe beyond the window is answered, and not taken.
    assert_eq!(
        rig.packet(&client.segment(ACK, b"!")).dropped,
        Some(DropReason::TcpWindow)
    );
    let answer = rig.segment();
    assert_eq!((answer.window, answer.acknowledgment), (0, client.sequence));
    assert!(rig.read_all(flow) == data);
    let update = rig.segment();
    assert!(update.window > 0, "the client hears that it may go on");
    assert_eq!(client.send(&mut rig, b"!").dropped, None);
    assert_eq!(rig.read_all(flow), b"!");
}

#[test]
fn an_idle_flow_gives_its_memory_back_and_goes_on_unharmed() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.send(&mut rig, b"question");
    assert_eq!(rig.read_all(flow), b"question");
    rig.write(flow, b"answer");
    assert_eq!(client.receive(&mut rig).0, b"answer");
    rig.pass(Duration::from_secs(4));
    assert_eq!(rig.world.vacated, 0, "it may be needed soon");
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.world.vacated, 2, "one buffer for each direction");
    rig.pass(Duration::from_secs(600));
    assert_eq!(rig.world.vacated, 2, "once until it is used again");
    client.send(&mut rig, b"another question");
    assert_eq!(rig.read_all(flow), b"another question");
    rig.write(flow, b"another answer");
    assert_eq!(client.receive(&mut rig).0, b"another answer");
    rig.pass(Duration::from_secs(6));
    assert_eq!(rig.world.vacated, 4);
}

#[test]
fn memory_with_bytes_in_it_is_kept() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    // The second of two segments: it waits for the first, out of order.
    let second = client.segment_at(client.sequence.wrapping_add(5), ACK, b" world");
    rig.packet(&second);
    rig.pass(Duration::from_secs(30));
    assert_eq!(rig.world.vacated, 0);
    client.send(&mut rig, b"hello");
    client.sequence = client.sequence.wrapping_add(6);
    // In order, but not read.
    rig.pass(Duration::from_secs(30));
    assert_eq!(rig.world.vacated, 0);
    assert_eq!(rig.read_all(flow), b"hello world");
    // On its way to a client that does not acknowledge it.
    rig.segments();
    rig.write(flow, b"are you there?");
    rig.pass(Duration::from_secs(30));
    assert_eq!(rig.world.vacated, 0);
    assert_eq!(client.receive(&mut rig).0, b"are you there?");
    rig.pass(Duration::from_secs(6));
    assert_eq!(rig.world.vacated, 2);
}

#[test]
fn holes_beyond_what_the_stack_remembers_are_filled_by_retransmission() {
    let mut rig = Rig::new();
    let (client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    let data = pattern(80 * 100);
    let piece = |rig: &mut Rig, index: usize| {
        let at = client.sequence.wrapping_add(index as u32 * 100);
        rig.packet(&client.segment_at(at, ACK, &data[index * 100..][..100]));
    };
    for index in (1..80).step_by(2) {
        piece(&mut rig, index); // forty holes
    }
    for index in 0..80 {
        piece(&mut rig, index);
    }
    assert!(rig.read_all(flow) == data);
}

// ---- the window guard ------------------------------------------------------------------------------------------------

#[test]
fn a_client_that_ignores_the_window_hurts_only_itself() {
    for capacity in [16 << 10, 64 << 10, 256 << 10, 1 << 20_u32] {
        let mut config = Config::default();
        config.limits.buffer_per_flow = capacity;
        let mut rig = Rig::with(config, PolicySpec::default());
        let (client, flow) = Client::open(CLIENT, TARGET, &mut rig);
        let data = pattern(4 << 20);
        let mut at = 0;
        while at < data.len() {
            let len = 65_000.min(data.len() - at);
            let sequence = client.sequence.wrapping_add(at as u32);
            rig.packet(&client.segment_at(sequence, ACK, &data[at..at + len]));
            at += len;
        }
        let received = rig.read_all(flow);
        assert_eq!(
            received.len(),
            capacity as usize,
            "what the buffer holds is taken"
        );
        assert!(received == data[..received.len()]);
        assert_eq!(rig.engine.counters().drops(DropReason::Internal), 0);
    }
}

#[test]
fn acknowledging_what_was_never_sent_changes_nothing() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.window = 10; // 1,280 bytes by its scale
    rig.packet(&client.segment(ACK, &[]));
    rig.write(flow, &pattern(10_000));
    // Less than a segment, and than half of what the client offered at first: it may be about to offer more.
    assert_eq!(rig.segments(), []);
    rig.pass(Duration::from_millis(300));
    let sent: usize = rig.segments().iter().map(|segment| segment.payload.len()).sum();
    assert_eq!(sent, 1_280);
    let honest = client.expected;
    client.expected = honest.wrapping_add(5_000);
    assert_eq!(
        rig.packet(&client.segment(ACK, &[])).dropped,
        Some(DropReason::TcpWindow)
    );
    client.expected = honest.wrapping_add(1_280);
    client.window = 65_535;
    rig.segments();
    rig.packet(&client.segment(ACK, &[]));
    assert_eq!(client.receive(&mut rig).0, pattern(10_000)[1_280..]);
}

// ---- resets and SYNs on a live connection ----------------------------------------------------------------------------

#[test]
fn a_forged_reset_outside_the_window_changes_nothing() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    for off in [1u32, 1_000, 70_000, 1 << 30, 1 << 31, u32::MAX, u32::MAX - 1_000] {
        let forged = client.segment_at(client.sequence.wrapping_add(off), RST, &[]);
        assert_eq!(
            rig.packet(&forged).dropped,
            Some(DropReason::TcpWindow),
            "offset {off}"
        );
    }
    let challenges = rig.segments();
    assert!(
        challenges.iter().all(|segment| segment.flags == ACK),
        "RFC 5961: a challenge ACK, no more"
    );
    assert_eq!(challenges.len(), 1, "and those are limited");
    client.send(&mut rig, b"still here");
    assert_eq!(rig.read_all(flow), b"still here");
}

#[test]
fn a_reset_delivers_what_came_before_it() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.send(&mut rig, b"last words");
    rig.packet(&client.segment(RST | ACK, &[]));
    assert_eq!(rig.commands(), [Command::Readable], "not yet aborted");
    assert_eq!(rig.read_all(flow), b"last words");
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_eq!(closed(&mut rig), [CloseReason::ClientReset]);
    assert_eq!(rig.engine.buffer_bytes(), 0);
}

#[test]
fn a_reset_does_not_wait_for_a_stalled_upstream_for_ever() {
    let mut rig = Rig::new();
    let (mut client, _) = Client::open(CLIENT, TARGET, &mut rig);
    client.send(&mut rig, b"last words");
    rig.packet(&client.segment(RST | ACK, &[]));
    rig.pass(Duration::from_secs(10));
    assert_eq!(rig.commands(), [Command::Readable, Command::Abort]);
    assert_eq!(rig.engine.open_flows(), 0);
}

#[test]
fn upstream_reset_sends_what_came_before_and_resets_the_client() {
    let mut rig = Rig::new();
    let (client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.engine.write(rig.now, flow, |space| {
        space[..3].copy_from_slice(b"bye");
        3
    });
    rig.upstream(flow, UpstreamEvent::Reset);
    let segments = rig.segments();
    assert_eq!(segments[0].payload, b"bye");
    assert_eq!(segments[1].flags & RST, RST);
    assert_eq!(segments[1].sequence, client.expected.wrapping_add(3));
    assert_eq!(rig.commands(), [], "the upstream knows");
    assert_eq!(closed(&mut rig), [CloseReason::UpstreamReset]);
    assert_eq!(rig.engine.buffer_bytes(), 0);
}

#[test]
fn a_syn_on_a_live_connection_is_challenged() {
    let mut rig = Rig::new();
    let (client, _) = Client::open(CLIENT, TARGET, &mut rig);
    let again = Client {
        sequence: client.sequence + 100_000,
        ..client.clone()
    };
    rig.packet(&again.syn());
    let challenge = rig.segment();
    assert_eq!(
        (challenge.flags, challenge.acknowledgment),
        (ACK, client.sequence)
    );
    // A client that has forgotten the connection answers with a reset at just that number.
    rig.packet(&client.segment_at(challenge.acknowledgment, RST, &[]));
    assert_eq!(closed(&mut rig), [CloseReason::ClientReset]);
    assert!(rig.packet(&again.syn()).dropped.is_none());
    assert!(matches!(rig.commands()[..], [Command::Abort, Command::Open(_)]));
}

// ---- sequence numbers --------------------------------------------------------------------------------------------------

#[test]
fn sequence_numbers_wrap_without_notice() {
    let mut rig = Rig::new();
    let mut client = Client::new(CLIENT, TARGET);
    client.sequence = u32::MAX - 5_000;
    let flow = client.connect(&mut rig);
    let data = pattern(40_000);
    for chunk in data.chunks(1_000) {
        assert_eq!(client.send(&mut rig, chunk).dropped, None);
    }
    assert!(rig.read_all(flow) == data);
}

#[test]
fn initial_sequence_numbers_follow_no_pattern() {
    let mut rig = Rig::new();
    let mut numbers = Vec::new();
    for port in 1..=200 {
        let client = Client::new(&format!("10.0.0.2:{port}"), TARGET);
        let flow = rig.packet(&client.syn()).flow.expect("accepted");
        rig.upstream(flow, UpstreamEvent::Connected);
        numbers.push(rig.segment().sequence);
    }
    let mut steps: Vec<_> = numbers
        .windows(2)
        .map(|pair| pair[1].wrapping_sub(pair[0]))
        .collect();
    steps.sort_unstable();
    steps.dedup();
    assert_eq!(steps.len(), 199, "no step comes twice");
    let high = numbers.iter().filter(|number| **number > u32::MAX / 2).count();
    assert!((60..140).contains(&high), "{high} of 200 in the upper half");
}
