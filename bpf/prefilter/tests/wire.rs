//! Real frames between two virtual interfaces, in namespaces that each test makes and removes. Without root and
//! BPF, tests are skipped aloud.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::wire::{Tap, on_a_wire, run};
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PolicySpec, RuleRef};
use tungate_prefilter::kernel::{self, Kernel, KernelError, Mode, Options, Wanted};
use tungate_prefilter::{Error, Prefilter};

/// Frames that may be on the way at once: fewer than a virtual interface's queue holds.
const WINDOW: usize = 64;

fn loaded() -> Option<Prefilter<Kernel>> {
    match Prefilter::load(Options::default()) {
        Ok(kernel) => Some(kernel),
        Err(Error::Kernel(error @ (KernelError::NotPermitted { .. } | KernelError::TooOld { .. }))) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
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

fn apply(prefilter: &mut Prefilter<Kernel>, lists: Vec<ListEntry>) {
    prefilter
        .apply(
            &PolicySpec {
                lists,
                ..PolicySpec::default()
            },
            0,
        )
        .expect("lists fit");
}

/// Where all datagrams go.
const TARGET: [u8; 4] = [203, 0, 113, 1];

/// A UDP datagram with this source and a number.
fn datagram(source: [u8; 4], number: u32) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00];
    frame.extend([0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend(source);
    frame.extend(TARGET);
    frame.extend([0x30, 0x39, 0, 53, 0, 26, 0, 0]);
    frame.extend(number.to_be_bytes());
    frame.resize(60, 0);
    frame
}

/// The source of a frame that [`datagram`] made.
fn source(frame: &[u8]) -> Option<[u8; 4]> {
    (frame.len() == 60 && frame[12..14] == [0x08, 0x00])
        .then(|| *frame[26..].first_chunk().expect("60 bytes"))
}

#[test]
fn what_is_sent_is_dropped_and_counted_or_received() {
    for wanted in [Wanted::Native, Wanted::Generic] {
        on_a_wire(|| {
            let Some(mut prefilter) = loaded() else { return };
            let attached = prefilter
                .backend_mut()
                .attach("far", wanted)
                .expect("a veth takes both modes");
            let mode = if wanted == Wanted::Native {
                Mode::Native
            } else {
                Mode::Generic
            };
            assert_eq!((attached.mode, &attached.why), (mode, &None));
            apply(
                &mut prefilter,
                vec![deny("192.0.2.0/25"), deny("198.51.100.7/32")],
            );
            let (near, far) = (Tap::open("near"), Tap::open("far"));
            let (mut sent, mut received) = ([0u64; 2], 0);
            for number in 0..20_000u32 {
                // Half of the /24 is denied, and one other host.
                let host = number as u8;
                near.send(&datagram([192, 0, 2, host], number));
                sent[usize::from(host >= 128)] += 1;
                if number % 100 == 0 {
                    near.send(&datagram([198, 51, 100, 7], number));
                }
                if sent[1] - received >= WINDOW as u64 {
                    received += u64::from(next_passes(&far, |[.., host]| host >= 128));
                }
            }
            while received < sent[1] {
                received += u64::from(next_passes(&far, |[.., host]| host >= 128));
            }
            let counters = prefilter.counters().expect("counters can be read");
            let packets: Vec<_> = counters
                .rules
                .iter()
                .map(|&(rule, count)| (rule, count.packets))
                .collect();
            assert_eq!(packets, [(RuleRef::List(0), sent[0]), (RuleRef::List(1), 200)]);
            assert_nothing_left(&far);
        });
    }
}

/// Waits for a datagram and checks that its source may pass.
fn next_passes(tap: &Tap, may_pass: impl Fn([u8; 4]) -> bool) -> bool {
    let frame = tap.receive().expect("what was sent and not dropped is received");
    let Some(source) = source(&frame) else {
        return false;
    };
    assert!(may_pass(source), "{source:?} passed");
    true
}

/// What the kernel sends by itself may still be there, but no datagram of the test's.
fn assert_nothing_left(tap: &Tap) {
    let left = std::iter::from_fn(|| tap.receive_within(Duration::ZERO));
    assert_eq!(
        left.filter_map(|frame| source(&frame)).collect::<Vec<_>>(),
        [] as [[u8; 4]; 0]
    );
}

#[test]
fn lists_change_under_load_without_one_wrong_verdict() {
    for wanted in [Wanted::Native, Wanted::Generic] {
        on_a_wire(|| {
            let Some(mut prefilter) = loaded() else { return };
            // Only this differs from one list to the next, besides everyone's numbers.
            let lists = |round: u8| {
                let others = (0..=round % 7).map(|last| deny(&format!("100.64.{round}.{last}/32")));
                let fixed = [deny("192.0.2.0/24"), deny("2001:db8::/32")];
                others.chain(fixed).collect::<Vec<_>>()
            };
            apply(&mut prefilter, lists(0));
            prefilter
                .backend_mut()
                .attach("far", wanted)
                .expect("a veth takes both modes");
            let (near, far) = (Tap::open("near"), Tap::open("far"));
            let is_over = AtomicBool::new(false);
            let (sent, received) = thread::scope(|scope| {
                let traffic = scope.spawn(|| {
                    let (mut sent, mut received) = (0u64, 0u64);
                    while !is_over.load(Ordering::Relaxed) {
                        near.send(&datagram([192, 0, 2, sent as u8], sent as u32));
                        near.send(&datagram([203, 0, 113, sent as u8], sent as u32));
                        sent += 1;
                        while sent - received >= WINDOW as u64 / 2 {
                            received += u64::from(next_passes(&far, |[first, ..]| first == 203));
                        }
                    }
                    while received < sent {
                        received += u64::from(next_passes(&far, |[first, ..]| first == 203));
                    }
                    (sent, received)
                });
                for round in 1..60 {
                    apply(&mut prefilter, lists(round));
                    // In place: new prefixes, a port table over an address that is denied, and back.
                    let udp = ListEntry {
                        protocol: ListProtocol::Udp,
                        ..deny("192.0.2.0/24")
                    };
                    prefilter.add(deny("100.65.0.0/32"), 0).expect("it fits");
                    prefilter.add(udp, 0).expect("it fits");
                    let last = prefilter.entries().len() as u32 - 1;
                    prefilter.remove(last).expect("it is there");
                    prefilter.remove(last - 1).expect("it is there");
                }
                is_over.store(true, Ordering::Relaxed);
                traffic.join().expect("no wrong verdict")
            });
            assert!(sent > 1000, "{sent} datagrams are no load");
            assert_eq!(sent, received);
            assert_nothing_left(&far);
        });
    }
}

#[test]
fn a_large_mtu_means_generic_mode_and_a_line_that_says_so() {
    on_a_wire(|| {
        let Some(mut prefilter) = loaded() else { return };
        run("ip link set near mtu 9000");
        run("ip link set far mtu 9000");
        let attached = prefilter
            .backend_mut()
            .attach("far", Wanted::Best)
            .expect("generic mode takes any MTU");
        assert_eq!(attached.mode, Mode::Generic);
        let line = attached.to_string();
        assert!(
            line.starts_with("far: generic XDP, since the MTU is too large"),
            "{line}"
        );
        let refused = prefilter
            .backend_mut()
            .attach("far", Wanted::Native)
            .expect_err("native mode does not");
        assert!(matches!(refused, KernelError::Attach { .. }), "{refused}");
        assert!(prefilter.backend().attached().is_none());
    });
}

#[test]
fn faults_name_the_interface_and_the_way_out() {
    on_a_wire(|| {
        let (Some(mut first), Some(mut second)) = (loaded(), loaded()) else {
            return;
        };
        let error = first
            .backend_mut()
            .attach("nowhere", Wanted::Best)
            .expect_err("there is no such interface");
        assert!(matches!(error, KernelError::NoInterface { .. }), "{error}");
        first
            .backend_mut()
            .attach("far", Wanted::Best)
            .expect("a veth takes it");
        let error = second
            .backend_mut()
            .attach("far", Wanted::Best)
            .expect_err("there is one already");
        assert!(
            error.to_string().contains("hint: `ip link show dev far`"),
            "{error}"
        );
        first.backend_mut().detach().expect("it can go");
        second
            .backend_mut()
            .attach("far", Wanted::Best)
            .expect("the place is free");
    });
}

#[test]
fn a_crash_leaves_nothing_attached() {
    on_a_wire(|| {
        if loaded().is_none() {
            return;
        }
        let mut holder = hold(&[]);
        assert!(has_program("far"));
        holder.kill().expect("it runs");
        holder.wait().expect("it ends");
        assert!(!has_program("far"));
    });
}

#[test]
fn a_pinned_program_outlives_its_loader_and_is_opened_changed_and_removed() {
    on_a_wire(|| {
        if loaded().is_none() {
            return;
        }
        let root = std::env::temp_dir().join(format!("tungate-pin-{}", std::process::id()));
        let folder = root.join("far");
        // The holder mounts the file system where the next loader does not see it, so it is mounted before.
        fs::create_dir(&root).expect("the folder is new");
        run(&format!("mount -t bpf bpf {}", root.display()));
        let mut holder = hold(&[("TUNGATE_TEST_PIN", folder.to_str().expect("a plain path"))]);
        holder.kill().expect("it runs");
        holder.wait().expect("it ends");
        assert!(has_program("far"));

        let open = || Kernel::open("far", &folder).expect("nothing is in the way");
        let (near, far) = (Tap::open("near"), Tap::open("far"));
        let mut number = 0;
        let mut passes = |address: [u8; 4]| {
            let (asked, last) = (datagram(address, number), datagram([203, 0, 113, 1], number));
            number += 1;
            near.send(&asked);
            near.send(&last);
            let mut passed = false;
            loop {
                let frame = far.receive().expect("what no list denies passes");
                if frame == last {
                    return passed;
                }
                passed |= frame == asked;
            }
        };
        assert!(passes([192, 0, 2, 1]));

        let lists = [deny("192.0.2.0/24"), deny("198.51.100.0/24")];
        let mut prefilter = Prefilter::resume(open().expect("it is pinned"), 0, &[], []).expect("it fits");
        assert_eq!(prefilter.backend().attached().expect("it is").mode, Mode::Native);
        apply(&mut prefilter, lists.to_vec());
        drop(prefilter);
        assert!(!passes([192, 0, 2, 1]));
        assert!(!passes([198, 51, 100, 1]));

        let kernel = open().expect("it is pinned");
        let generation = kernel.generation();
        let mut prefilter = Prefilter::resume(kernel, generation, &lists, []).expect("it fits");
        apply(&mut prefilter, vec![deny("198.51.100.0/24")]);
        assert!(passes([192, 0, 2, 1]));
        assert!(!passes([198, 51, 100, 1]));
        prefilter
            .set_local(&[IpAddr::from([192, 0, 2, 9]), IpAddr::from(TARGET)])
            .expect("addresses fit");
        let counted = prefilter.counters().expect("counters can be read").rules;
        let [(RuleRef::List(0), count)] = counted[..] else {
            panic!("{counted:?}")
        };
        assert_eq!(count.packets, 2, "one by each loader's lists");
        drop(prefilter);

        // Nothing is denied to the host itself, until its address is another one.
        let everything = [deny("0.0.0.0/0")];
        let kernel = open().expect("it is pinned");
        let generation = kernel.generation();
        let mut prefilter =
            Prefilter::resume(kernel, generation, &[deny("198.51.100.0/24")], []).expect("it fits");
        apply(&mut prefilter, everything.to_vec());
        assert!(passes([192, 0, 2, 1]));
        drop(prefilter);
        let kernel = open().expect("it is pinned");
        let generation = kernel.generation();
        let mut prefilter = Prefilter::resume(kernel, generation, &everything, []).expect("it fits");
        prefilter
            .set_local(&[IpAddr::from([192, 0, 2, 9])])
            .expect("addresses fit");
        near.send(&datagram([192, 0, 2, 1], number));
        let deadline = Instant::now() + Duration::from_secs(30);
        while prefilter
            .counters()
            .expect("counters can be read")
            .rules
            .is_empty()
        {
            assert!(Instant::now() < deadline, "the datagram was not dropped");
            thread::yield_now();
        }
        assert_nothing_left(&far);
        drop(prefilter);

        assert!(kernel::remove_pinned(&folder).expect("the files can be removed"));
        assert!(!has_program("far"));
        assert!(!kernel::remove_pinned(&folder).expect("nothing is in the way"));
        assert!(open().is_none());
        run(&format!("umount {}", root.display()));
        fs::remove_dir(&root).expect("it is empty");
    });
}

#[test]
fn what_is_pinned_for_an_interface_that_is_gone_is_not_opened() {
    on_a_wire(|| {
        let Some(mut prefilter) = loaded() else { return };
        let root = std::env::temp_dir().join(format!("tungate-bpffs-{}", std::process::id()));
        let folder = root.join("far");
        let backend = prefilter.backend_mut();
        backend.attach("far", Wanted::Best).expect("a veth takes it");
        backend.pin(&folder).expect("root may mount");
        drop(prefilter);
        assert!(has_program("far"));
        run("ip link delete far");
        assert!(
            Kernel::open("far", &folder)
                .expect("nothing is in the way")
                .is_none()
        );
        assert!(kernel::remove_pinned(&folder).expect("the files can be removed"));
        run(&format!("umount {}", root.display()));
        fs::remove_dir(&root).expect("it is empty");
    });
}

/// Whether an interface has an XDP program.
fn has_program(interface: &str) -> bool {
    run(&format!("ip link show dev {interface}")).contains("xdp")
}

/// Starts a process that holds the program on `far`, and waits until it does.
fn hold(environment: &[(&str, &str)]) -> Child {
    let mut holder = Command::new(std::env::current_exe().expect("this test has a path"))
        .args(["--exact", "holder", "--nocapture", "--ignored"])
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test can be started again");
    let output = BufReader::new(holder.stdout.take().expect("it is piped"));
    let mut lines = output.lines().map(|line| line.expect("it prints text"));
    assert!(lines.any(|line| line.contains("holding")), "it could not attach");
    holder
}

/// The process that [`hold`] starts; no test by itself.
#[test]
#[ignore = "started by other tests"]
fn holder() {
    let mut prefilter =
        Prefilter::load(Options::default()).expect("the test that started this has loaded it too");
    prefilter
        .backend_mut()
        .attach("far", Wanted::Best)
        .expect("a veth takes it");
    if let Some(folder) = std::env::var_os("TUNGATE_TEST_PIN") {
        prefilter
            .backend_mut()
            .pin(Path::new(&folder))
            .expect("the folder is in a BPF file system");
    }
    println!("\nholding");
    // Ended from outside; if nobody does, at some time.
    thread::sleep(Duration::from_secs(60));
}
