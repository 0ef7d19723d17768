//! When the client hears that its bytes have come: at once, or with the answer where answers come soon (RFC 9293, section
//! 3.8.6.3).

use tungate_engine::FlowId;

use super::*;

const SOON: Duration = Duration::from_millis(1);
/// Longer than an acknowledgment waits.
const LATE: Duration = Duration::from_millis(26);

/// A flow whose last requests have been answered soon.
fn conversation() -> (Rig, Client, FlowId) {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    for _ in 0..3 {
        ask(&mut rig, &mut client, flow);
        let at_once = rig.segment();
        assert_eq!((at_once.flags, at_once.acknowledgment), (ACK, client.sequence));
        answer(&mut rig, &mut client, flow);
    }
    (rig, client, flow)
}

fn ask(rig: &mut Rig, client: &mut Client, flow: FlowId) {
    client.send(rig, b"question");
    assert_eq!(rig.read_all(flow), b"question");
}

fn answer(rig: &mut Rig, client: &mut Client, flow: FlowId) {
    rig.pass(SOON);
    rig.write(flow, b"answer");
    assert_eq!(client.receive(rig).0, b"answer");
    assert_eq!(rig.segments(), []);
}

#[test]
fn answers_that_come_soon_carry_the_acknowledgment() {
    let (mut rig, mut client, flow) = conversation();
    for _ in 0..10 {
        ask(&mut rig, &mut client, flow);
        assert_eq!(rig.segments(), []);
        rig.pass(SOON);
        rig.write(flow, b"answer");
        let segment = rig.segment();
        assert_eq!(
            (&segment.payload[..], segment.acknowledgment),
            (&b"answer"[..], client.sequence)
        );
        client.expected = client.expected.wrapping_add(6);
        rig.packet(&client.segment(ACK, &[]));
    }
}

/// Something else than an answer is waited for: the client, perhaps, for the acknowledgment, to send the rest of its request.
#[test]
fn an_acknowledgment_that_waits_in_vain_leaves_by_itself_and_others_do_not_wait() {
    let (mut rig, mut client, flow) = conversation();
    ask(&mut rig, &mut client, flow);
    assert_eq!(rig.segments(), []);
    rig.pass(LATE);
    let alone = rig.segment();
    assert_eq!((alone.flags, alone.acknowledgment), (ACK, client.sequence));
    rig.write(flow, b"answer");
    client.receive(&mut rig);
    for _ in 0..32 {
        ask(&mut rig, &mut client, flow);
        assert_eq!(rig.segment().acknowledgment, client.sequence);
        answer(&mut rig, &mut client, flow);
    }
}

#[test]
fn answers_that_come_late_are_not_waited_for() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    for _ in 0..10 {
        ask(&mut rig, &mut client, flow);
        assert_eq!(rig.segment().acknowledgment, client.sequence);
        rig.pass(LATE);
        rig.write(flow, b"answer");
        client.receive(&mut rig);
    }
}

/// RFC 5681, section 4.2: a second segment, and what is out of order.
#[test]
fn a_second_segment_a_whole_one_a_gap_and_a_fin_are_acknowledged_at_once() {
    let second = |rig: &mut Rig, client: &mut Client| {
        client.send(rig, b"first");
        assert_eq!(rig.segments(), []);
        client.send(rig, b"second");
    };
    let whole = |rig: &mut Rig, client: &mut Client| {
        client.send(rig, &pattern(1460));
    };
    let finish = |rig: &mut Rig, client: &mut Client| {
        client.send(rig, b"last words");
        assert_eq!(rig.segments(), []);
        client.finish(rig);
    };
    for send in [second, whole, finish] {
        let (mut rig, mut client, _) = conversation();
        send(&mut rig, &mut client);
        assert_eq!(rig.segment().acknowledgment, client.sequence);
    }
    let (mut rig, client, _) = conversation();
    rig.packet(&client.segment_at(client.sequence.wrapping_add(10), ACK, b"ahead"));
    assert_eq!(rig.segment().acknowledgment, client.sequence);
}
