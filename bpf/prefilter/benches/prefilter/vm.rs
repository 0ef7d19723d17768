//! The virtual machine: packets per second of one thread.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tungate_prefilter::{Sampling, Vm};

use super::Figures;
use super::lists::{deny, network, policy};

/// Different frames, so that neither caches nor branches know them by heart.
const FRAMES: u32 = 20_000;

/// How often all of them go through.
const ROUNDS: u32 = 50;

/// Runs mixed frames: of ten, six IPv4 (of which one each has options, a VLAN tag, and is a later fragment), four
/// IPv6 (two with extension headers, one in two VLAN tags). Half of the IPv4 sources are listed.
pub(crate) fn measure(entries: u32) -> Figures {
    let mut policy = policy(entries);
    let in_v6 = ["2001:db8::/32", "2001:db8:1::/48", "2001:db8:2::1/128"].map(|network| {
        let mut entry = deny(network_of_nothing());
        entry.network = network.parse().expect("a network");
        entry
    });
    policy.lists.extend(in_v6);
    let mut vm = Vm::simulated(Sampling::default()).expect("the committed object is sound");
    vm.apply(&policy, 0).expect("it fits");
    let frames: Vec<Vec<u8>> = (0..FRAMES).map(|number| frame(number, entries)).collect();
    let start = processor_time();
    for _ in 0..ROUNDS {
        for frame in &frames {
            vm.run(frame).expect("no frame makes the program fail");
        }
    }
    let nanos = (processor_time() - start).as_nanos() as f64;
    vec![(
        "ns_per_packet".to_owned(),
        nanos / f64::from(FRAMES) / f64::from(ROUNDS),
    )]
}

fn network_of_nothing() -> ipnet::Ipv4Net {
    network(0)
}

/// Numbers that look random, the same in every run.
fn mixed(number: u32) -> u32 {
    let mixed = (number ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
    (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35)
}

fn frame(number: u32, entries: u32) -> Vec<u8> {
    let kind = number % 10;
    let noise = mixed(number);
    let mut frame = vec![2; 12];
    let tags = match kind {
        2 => 1,
        9 => 2,
        _ => 0,
    };
    for _ in 0..tags {
        frame.extend([0x81, 0x00, 0, 7]);
    }
    let segment = [
        0x30, 0x39, 0x01, 0xbb, 0, 20, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    ];
    if kind < 6 {
        let options = usize::from(kind == 3) * 8;
        let source = if noise & 1 == 0 {
            network(noise % entries).network().to_bits()
        } else {
            0x6400_0000 | noise >> 10
        };
        frame.extend([0x08, 0x00, 0x45 + options as u8 / 4, 0]);
        frame.extend(((20 + options + segment.len()) as u16).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(u16::to_be_bytes(if kind == 4 { 185 } else { 0 }));
        frame.extend([64, if kind.is_multiple_of(2) { 6 } else { 17 }, 0, 0]);
        frame.extend(source.to_be_bytes());
        frame.extend([203, 0, 113, 1]);
        frame.extend(vec![1; options]);
    } else {
        let extensions: &[u8] = match kind {
            7 => &[6, 0, 1, 4, 0, 0, 0, 0],
            8 => &[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0],
            _ => &[],
        };
        let next = match kind {
            6 | 9 => 6,
            _ => 0,
        };
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(((extensions.len() + segment.len()) as u16).to_be_bytes());
        frame.extend([next, 64, 0x20, 0x01, 0x0d, 0xb8 + (noise & 1) as u8]);
        frame.extend([0; 8]);
        frame.extend(noise.to_be_bytes());
        frame.extend([0x20, 0x01, 0x0d, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend(extensions);
    }
    frame.extend(segment);
    frame
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
