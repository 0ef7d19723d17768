//! What can happen in a scenario: the simplest first, since failures shrink towards it.

use proptest::prelude::*;
use proptest::sample::select;
use tungate_engine::config::{Clients, Filtering};
use tungate_tests::client::Manner;
use tungate_tests::world::scenario::{Answer, CLIENTS, Denial, ENDPOINTS, Setup, Step, TARGETS, Target};

use super::Connection;

pub(super) fn setups() -> impl Strategy<Value = Setup> {
    let peers = (
        0..4u8,
        select(vec![Clients::Local, Clients::Routed]),
        select(vec![Filtering::EndpointIndependent, Filtering::AddressDependent]),
        select(vec![1500, 1280, 9000u16]),
        select(vec![1 << 20, 64 << 10, 16 << 10u32]),
        select(vec![1, 8u8]),
        select(vec![1 << 20, 1000, 17u32]),
    );
    let clients = (
        select(vec![Some(1460), None, Some(88), Some(8960)]),
        select(vec![Some(7), None, Some(0), Some(2)]),
        select(vec![256 << 10, 65_535, 5000u32]),
        select(vec![1460, 40_000u32]),
        select(vec![Manner::Linux, Manner::Bsd]),
    );
    (peers, clients).prop_map(
        |(peers, (max_segment_size, window_scale, client_buffer, client_largest, client_manner))| {
            let (seed, clients, filtering, mtu, buffer_per_flow, batch, chunk) = peers;
            Setup {
                seed,
                clients,
                filtering,
                mtu,
                buffer_per_flow,
                batch,
                chunk,
                max_segment_size,
                window_scale,
                client_buffer,
                client_largest,
                client_manner,
            }
        },
    )
}

pub(super) fn times() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => 1..300u32,
        4 => 300..5_000u32,
        2 => 5_000..40_000u32,
        1 => 40_000..400_000u32,
        1 => 7_000_000..8_000_000u32,
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 1..100u32, 3 => 100..5_000u32, 2 => 5_000..30_000u32, 1 => 30_000..150_000u32]
}

/// What may happen to a connection.
pub(super) fn conversation(client: u8, connection: Connection) -> BoxedStrategy<Step> {
    let one = |weight: u32, step: Step| (weight, Just(step).boxed());
    let mut choices = vec![one(1, Step::ClientConnects { client })];
    if connection.answer.is_none() {
        let answers = vec![Answer::Accepts; 6].into_iter().chain([
            Answer::Refuses,
            Answer::IsUnreachable,
            Answer::TimesOut,
        ]);
        let answers = select(answers.collect::<Vec<_>>());
        choices.push((
            12,
            answers
                .prop_map(move |answer| Step::UpstreamAnswers { client, answer })
                .boxed(),
        ));
    }
    if connection.client.may_write() {
        choices.push((
            10,
            lengths()
                .prop_map(move |bytes| Step::ClientSends { client, bytes })
                .boxed(),
        ));
        choices.push(one(3, Step::ClientCloses { client }));
    }
    if connection.upstream.may_write() {
        choices.push((
            10,
            lengths()
                .prop_map(move |bytes| Step::UpstreamSends { client, bytes })
                .boxed(),
        ));
        choices.push(one(3, Step::UpstreamCloses { client }));
    }
    if !connection.client.reset {
        choices.push(one(1, Step::ClientResets { client }));
    }
    if !connection.upstream.reset {
        choices.push(one(1, Step::UpstreamResets { client }));
    }
    choices.push(if connection.client.stalled {
        one(3, Step::ClientResumes { client })
    } else {
        one(2, Step::ClientStalls { client })
    });
    choices.push(if connection.upstream.stalled {
        one(3, Step::UpstreamResumes { client })
    } else {
        one(2, Step::UpstreamStalls { client })
    });
    prop::strategy::Union::new_weighted(choices).boxed()
}

pub(super) fn datagrams() -> BoxedStrategy<Step> {
    let bytes = || prop_oneof![0..100u16, 100..3_000u16, 3_000..20_000u16];
    prop_oneof![
        3 => (0..ENDPOINTS, 0..TARGETS, bytes())
            .prop_map(|(endpoint, target, bytes)| Step::DatagramSent { endpoint, target, bytes }),
        // One beyond the targets is a stranger.
        3 => (0..ENDPOINTS, 0..=TARGETS, bytes())
            .prop_map(|(endpoint, source, bytes)| Step::DatagramAnswered { endpoint, source, bytes }),
        3 => (0..ENDPOINTS, 0..TARGETS, bytes())
            .prop_map(|(endpoint, target, bytes)| Step::PingSent { endpoint, target, bytes }),
        1 => (0..ENDPOINTS, 0..TARGETS, bytes())
            .prop_map(|(endpoint, target, bytes)| Step::PingAnswered { endpoint, target, bytes }),
    ]
    .boxed()
}

/// What changes for all.
pub(super) fn surroundings(device_full: bool) -> BoxedStrategy<Step> {
    let target = prop_oneof![
        (0..CLIENTS).prop_map(Target::OfClient),
        (0..TARGETS).prop_map(Target::OfEndpoints),
    ];
    let how = select(vec![Denial::List, Denial::Drop, Denial::Reject]);
    prop_oneof![
        8 => (select(vec![0, 1, 10, 40, 100u8]), select(vec![0, 1, 20u8]), 0..200u16, select(vec![0, 5, 300u16]))
            .prop_map(|(loss, repeats, delay_millis, jitter_millis)| Step::LinkBecomes {
                loss,
                repeats,
                delay_millis,
                jitter_millis
            }),
        8 => Just(if device_full { Step::DeviceDrains } else { Step::DeviceFills }),
        3 => (target, how).prop_map(|(target, how)| Step::TargetDenied { target, how }),
        2 => Just(Step::AllAllowed),
        1 => Just(Step::EngineDrains),
    ]
    .boxed()
}
