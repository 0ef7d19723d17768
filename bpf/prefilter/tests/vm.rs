//! The program in the virtual machine decides as a linear scan behind a parser of its own does.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use common::frames::{address4, address6, entry, frame, lists};
use common::model::{Expected, ip_packet, judge};
use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::{FileFailurePersistence, TestRunner};
use tungate_bpf_abi as abi;
use tungate_bpf_abi::map;
use tungate_engine::packet::PacketView;
use tungate_engine::policy::{
    Action as RuleAction, ListAction, ListEntry, ListProtocol, Lists, PolicySpec, PortRange, Rule, RuleMatch,
    RuleRef,
};
use tungate_prefilter::{
    Action, Count, MapShape, NotExported, OBJECT, PacketEvent, Program, Reason, Sampling, Verdict, Vm, Why,
};

const NOW: u64 = 5;

fn vm(lists: &[ListEntry]) -> Vm {
    let mut vm = Vm::simulated(Sampling::default()).expect("the committed object is sound");
    vm.apply(
        &PolicySpec {
            lists: lists.to_vec(),
            ..PolicySpec::default()
        },
        NOW,
    )
    .expect("lists fit");
    vm
}

fn told(verdict: Verdict) -> Expected {
    let entry = match verdict.rule {
        Some(RuleRef::List(index)) => Some(index),
        Some(RuleRef::Rule(_) | RuleRef::Default | RuleRef::Resolver) => {
            panic!("the pre-filter knows list entries only")
        }
        None => None,
    };
    let drop = verdict.action == Action::Drop;
    assert_eq!(drop, verdict.reason.is_drop());
    Expected {
        entry,
        drop,
        by_source: verdict.reason == Reason::ListSource,
    }
}

/// Passes do not say by which address they were allowed.
fn comparable(expected: Expected) -> Expected {
    Expected {
        by_source: expected.by_source && expected.drop,
        ..expected
    }
}

fn config() -> ProptestConfig {
    let regressions = FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases: 1000,
        failure_persistence: Some(Box::new(regressions)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_program_decides_as_the_model_does(lists in lists(), frames in vec(frame(), 1..120)) {
        let mut vm = vm(&lists);
        for frame in frames {
            let verdict = vm.run(&frame).expect("no frame makes the program fail");
            prop_assert_eq!(told(verdict), comparable(judge(&frame, &lists, NOW, &[])), "frame {:02x?}", frame);
        }
    }

    #[test]
    fn the_engine_drops_what_the_program_drops_by_the_same_entry(
        lists in lists(),
        frames in vec(frame(), 1..120),
    ) {
        let mut vm = vm(&lists);
        let engine = Lists::new(&lists);
        for frame in frames {
            let verdict = vm.run(&frame).expect("no frame makes the program fail");
            let dropped = ip_packet(&frame).and_then(|(version, packet)| {
                let view = PacketView::parse(packet).ok()?;
                let (source, destination) = (view.source(), view.destination());
                let found = engine.judge(source, destination, view.protocol(), view.port(), NOW)?;
                // The engine has no Ethernet header that could say something else.
                let is_same_version = source.is_ipv4() == (version == 4);
                (found.action == ListAction::Deny && is_same_version).then_some(RuleRef::List(found.entry))
            });
            let by_program = verdict.rule.filter(|_| verdict.action == Action::Drop);
            prop_assert_eq!(by_program, dropped, "frame {:02x?}", frame);
        }
    }

    #[test]
    fn entries_of_length_0_leave_packets_to_the_host_alone(
        lists in vec(wide_entry(), 1..6),
        frames in vec(frame(), 1..120),
        local in vec(local_address(), 0..4),
    ) {
        let mut vm = vm(&lists);
        vm.set_local(&local).expect("addresses fit");
        for frame in frames {
            let verdict = vm.run(&frame).expect("no frame makes the program fail");
            prop_assert_eq!(told(verdict), comparable(judge(&frame, &lists, NOW, &local)), "frame {:02x?}", frame);
        }
    }

    #[test]
    fn single_changes_come_to_the_same_as_loading_the_result(
        start in lists(),
        changes in vec(change(), 1..24),
        frames in vec(frame(), 12..24),
    ) {
        let mut vm = vm(&start);
        let mut lists = start;
        let mut now = NOW;
        for change in changes {
            match change {
                Change::Add(entry) => {
                    let rule = vm.add(entry.clone(), now).expect("entries fit");
                    prop_assert_eq!(rule, RuleRef::List(lists.len() as u32));
                    lists.push(entry);
                }
                Change::Remove(index) if !lists.is_empty() => {
                    let index = index.index(lists.len());
                    prop_assert_eq!(vm.remove(index as u32).expect("it is there"), lists.remove(index));
                }
                Change::Remove(_) => prop_assert!(vm.remove(0).is_err()),
                Change::TimePasses => {
                    now += 1;
                    let due = lists.iter().filter(|entry| entry.expires == Some(now)).count();
                    prop_assert_eq!(vm.expire(now).expect("entries can go"), due);
                }
            }
            prop_assert_eq!(vm.entries().cloned().collect::<Vec<_>>(), &lists[..]);
            for frame in &frames {
                let verdict = vm.run(frame).expect("no frame makes the program fail");
                prop_assert_eq!(told(verdict), comparable(judge(frame, &lists, now, &[])), "frame {:02x?}", frame);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Change {
    Add(ListEntry),
    Remove(Index),
    TimePasses,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => entry().prop_map(Change::Add),
        3 => any::<Index>().prop_map(Change::Remove),
        1 => Just(Change::TimePasses),
    ]
}

/// Entries of which most have prefix length 0.
fn wide_entry() -> impl Strategy<Value = ListEntry> {
    (entry(), any::<bool>()).prop_map(|(entry, is_wide)| {
        let everything = match entry.network {
            IpNet::V4(_) => "0.0.0.0/0",
            IpNet::V6(_) => "::/0",
        };
        let wide = everything.parse().expect("a network");
        ListEntry {
            network: if is_wide { wide } else { entry.network },
            ..entry
        }
    })
}

fn local_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        address4().prop_map(|address| Ipv4Addr::from_bits(address).into()),
        address6().prop_map(|address| Ipv6Addr::from_bits(address).into()),
    ]
}

#[test]
fn the_generators_reach_every_kind_of_verdict() {
    let mut runner = TestRunner::deterministic();
    let mut seen = BTreeMap::new();
    for _ in 0..400 {
        let lists = lists()
            .new_tree(&mut runner)
            .expect("lists can be made")
            .current();
        let mut vm = vm(&lists);
        for _ in 0..20 {
            let frame = frame()
                .new_tree(&mut runner)
                .expect("frames can be made")
                .current();
            let verdict = vm.run(&frame).expect("no frame makes the program fail");
            *seen.entry(verdict.reason).or_insert(0) += 1;
        }
    }
    for reason in Reason::ALL {
        assert!(
            seen.get(&reason).is_some_and(|&count| count > 100),
            "{reason:?} is rare: {seen:?}"
        );
    }
}

/// An Ethernet frame with a TCP segment from and to these addresses, to a port.
fn segment(source: [u8; 4], destination: [u8; 4], port: u16) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(source);
    frame.extend(destination);
    frame.extend([0x30, 0x39]);
    frame.extend(port.to_be_bytes());
    frame.extend([0; 16]);
    frame
}

fn deny(network: &str) -> ListEntry {
    ListEntry {
        action: ListAction::Deny,
        network: network.parse().expect("a network"),
        protocol: ListProtocol::Any,
        ports: None,
        expires: None,
    }
}

#[test]
fn an_entry_that_decides_below_many_others_goes_everywhere_at_once() {
    let tcp = |network: &str| ListEntry {
        protocol: ListProtocol::Tcp,
        ..deny(network)
    };
    let udp = |network: &str| ListEntry {
        protocol: ListProtocol::Udp,
        ..deny(network)
    };
    for inner in 1..12u8 {
        let networks = (0..inner).map(|third| udp(&format!("10.0.{third}.0/24")));
        let lists: Vec<_> = [tcp("10.0.0.0/8")].into_iter().chain(networks).collect();
        let mut vm = vm(&lists);
        let dropped = |vm: &mut Vm| {
            let frames = (0..inner).map(|third| segment([10, 0, third, 1], [203, 0, 113, 1], 80));
            frames
                .filter(|frame| vm.run(frame).expect("it runs").action == Action::Drop)
                .count()
        };
        assert_eq!(dropped(&mut vm), usize::from(inner));
        vm.remove(0).expect("it is there");
        assert_eq!(dropped(&mut vm), 0);
        vm.add(tcp("10.0.0.0/8"), NOW).expect("it fits");
        assert_eq!(dropped(&mut vm), usize::from(inner));
    }
}

#[test]
fn counts_stay_with_an_entry_while_lists_change_around_it() {
    let (kept, other) = (deny("192.0.2.0/24"), deny("198.51.100.0/24"));
    let mut vm = vm(&[other.clone(), kept.clone()]);
    let frame = segment([192, 0, 2, 7], [203, 0, 113, 1], 80);
    let counted = |vm: &mut Vm| vm.counters().expect("the machine counts").rules;
    for _ in 0..3 {
        vm.run(&frame).expect("it runs");
    }
    assert_eq!(
        counted(&mut vm),
        [(
            RuleRef::List(1),
            Count {
                packets: 3,
                bytes: 162
            }
        )]
    );
    vm.remove(0).expect("it is there");
    vm.run(&frame).expect("it runs");
    assert_eq!(
        counted(&mut vm),
        [(
            RuleRef::List(0),
            Count {
                packets: 4,
                bytes: 216
            }
        )]
    );
    let policy = PolicySpec {
        lists: vec![deny("10.0.0.0/8"), other, kept],
        ..PolicySpec::default()
    };
    vm.apply(&policy, NOW).expect("it fits");
    vm.run(&frame).expect("it runs");
    let counters = vm.counters().expect("the machine counts");
    assert_eq!(
        counters.rules,
        [(
            RuleRef::List(2),
            Count {
                packets: 5,
                bytes: 270
            }
        )]
    );
    assert!(counters.reasons.contains(&(
        Reason::ListSource,
        Count {
            packets: 5,
            bytes: 270
        }
    )));
}

#[test]
fn sampled_events_say_what_happened_also_across_a_change_of_lists() {
    let mut vm = Vm::simulated(Sampling {
        drops: Some(1),
        passes: None,
    })
    .expect("the object is sound");
    let lists = vec![deny("192.0.2.0/24")];
    vm.apply(
        &PolicySpec {
            lists,
            ..PolicySpec::default()
        },
        NOW,
    )
    .expect("it fits");
    for last in 1..=5 {
        vm.run(&segment([192, 0, 2, last], [203, 0, 113, 1], 443))
            .expect("it runs");
        vm.run(&segment([203, 0, 113, last], [203, 0, 113, 1], 443))
            .expect("it runs");
    }
    let lists = vec![deny("10.0.0.0/8"), deny("192.0.2.0/24")];
    vm.apply(
        &PolicySpec {
            lists,
            ..PolicySpec::default()
        },
        NOW,
    )
    .expect("it fits");
    vm.run(&segment([192, 0, 2, 6], [203, 0, 113, 1], 443))
        .expect("it runs");
    let events: Vec<PacketEvent> =
        std::iter::from_fn(|| vm.next_event().expect("the machine has events")).collect();
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.rule, event.addresses.map(|(source, _)| source)))
        .collect();
    let source = |last| Some(IpAddr::from([192, 0, 2, last]));
    // One in two drops; the entry's position is that of the lists in force when the packet came.
    let (before, after) = (Some(RuleRef::List(0)), Some(RuleRef::List(1)));
    assert_eq!(
        told,
        [(before, source(2)), (before, source(4)), (after, source(6))]
    );
    let PacketEvent {
        reason,
        length,
        protocol,
        port,
        ..
    } = events[0];
    assert_eq!(
        (reason, length, protocol, port),
        (Reason::ListSource, 54, Some(6), Some(443))
    );
}

#[test]
fn a_full_ring_buffer_loses_events_and_no_counts() {
    let mut vm = Vm::simulated(Sampling::ALL).expect("the object is sound");
    for _ in 0..2000 {
        vm.run(&segment([192, 0, 2, 1], [203, 0, 113, 1], 443))
            .expect("it runs");
    }
    let events = std::iter::from_fn(|| vm.next_event().expect("the machine has events")).count();
    // 64 KiB of records of 64 bytes, each behind a header of 8.
    assert_eq!(events, (65_536 - 1) / 72);
    let counters = vm.counters().expect("the machine counts");
    assert!(counters.reasons.contains(&(
        Reason::NoMatch,
        Count {
            packets: 2000,
            bytes: 2000 * 54
        }
    )));
}

#[test]
fn what_the_engine_has_to_see_to_is_reported() {
    let icmp = ListEntry {
        protocol: ListProtocol::Icmp,
        ports: Some(PortRange { first: 1, last: 2 }),
        ..deny("192.0.2.0/24")
    };
    let rule = |name: &str, action| Rule {
        name: name.to_owned(),
        matches: RuleMatch::default(),
        action,
    };
    let policy = PolicySpec {
        lists: vec![
            deny("10.0.0.0/8"),
            icmp,
            ListEntry {
                expires: Some(NOW),
                ..deny("10.0.0.0/9")
            },
        ],
        rules: vec![rule("quiet", RuleAction::Drop), rule("loud", RuleAction::Reject)],
        ..PolicySpec::default()
    };
    let mut vm = Vm::simulated(Sampling::default()).expect("the object is sound");
    let applied = vm.apply(&policy, NOW).expect("it fits");
    let expected = [
        NotExported {
            rule: RuleRef::List(1),
            why: Why::NeverFits,
        },
        NotExported {
            rule: RuleRef::Rule(0),
            why: Why::AskedPerFlow,
        },
    ];
    assert_eq!(
        (applied.entries, applied.expired, &applied.not_exported[..]),
        (2, 1, &expected[..])
    );
}

#[test]
fn the_object_has_the_maps_of_the_abi_and_no_atomics_or_other_helpers() {
    let program = Program::parse(OBJECT).expect("the committed object is sound");
    let sizes = |key: usize, value: usize| (key as u32, value as u32);
    let group = size_of::<abi::Group>();
    let expected = [
        (map::ACTIVE, sizes(4, 4), None),
        (map::SETTINGS, sizes(4, size_of::<abi::Settings>()), None),
        (
            map::GROUPS4,
            sizes(4, 4),
            Some(sizes(size_of::<abi::Key4>(), group)),
        ),
        (
            map::GROUPS6,
            sizes(4, 4),
            Some(sizes(size_of::<abi::Key6>(), group)),
        ),
        (map::CELLS, sizes(4, 4), Some(sizes(4, size_of::<abi::Cell>()))),
        (map::LOCAL, sizes(size_of::<abi::Key6>(), 4), None),
        (map::REASONS, sizes(4, size_of::<Count>()), None),
        (map::RULES, sizes(4, size_of::<Count>()), None),
        (map::EVENTS, sizes(0, 0), None),
    ];
    let found: Vec<_> = program
        .maps
        .iter()
        .map(|map| {
            let sizes = |shape: MapShape| (shape.key_size, shape.value_size);
            (map.name.as_str(), sizes(map.shape), map.inner.map(sizes))
        })
        .collect();
    assert_eq!(found, expected);
    let mut helpers = BTreeSet::new();
    for instruction in &program.code {
        let is_store = instruction.code & 0x07 == 0x03;
        assert!(
            !is_store || instruction.code & 0xe0 == 0x60,
            "an atomic: {instruction:?}"
        );
        if instruction.code == 0x85 && instruction.src_reg() == 0 {
            helpers.insert(instruction.imm);
        }
    }
    assert_eq!(helpers, BTreeSet::from([1, 131, 132]));
}
