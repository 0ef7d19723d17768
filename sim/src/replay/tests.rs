//! What leaves the engines decides: a replay whose outputs are tampered with must not count as faithful.

use std::fmt::Arguments;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::outcome::{Emitted, FlowRecord, PacketRecord};

struct Nobody;

impl Sink for Nobody {
    fn started(&mut self, _: u64) {}
    fn packet(&mut self, _: &PacketRecord) {}
    fn flow(&mut self, _: FlowRecord) {}
    fn emitted(&mut self, _: &Emitted<'_>) {}
    fn line(&mut self, _: Timestamp, _: Arguments<'_>) {}

    fn wants_emitted(&self) -> bool {
        false
    }

    fn wants_lines(&self) -> bool {
        false
    }

    fn wants_packets(&self) -> bool {
        false
    }
}

/// Replays two DNS questions over TCP; returns how many of the relayed flows are faithful, of how many.
fn faithful(tamper: Option<fn(&mut [u8]) -> bool>) -> (u64, u64) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../captures/dns-tcp.pcap");
    let mut capture = Capture::open(&path).unwrap();
    let tampered = |setup| shard::Setup { tamper, ..setup };
    let outcome = run_with(
        &mut capture,
        &Options::default(),
        None,
        &mut Nobody,
        &mut |_| {},
        tampered,
    )
    .unwrap();
    (outcome.totals.fidelity_exact, outcome.totals.fidelity_flows)
}

/// Whether an IPv4 packet is a TCP segment with payload.
fn has_payload(packet: &[u8]) -> bool {
    packet.len() > 32 && packet.len() > 20 + usize::from(packet[32] >> 4) * 4
}

#[test]
fn untouched_outputs_are_faithful() {
    assert_eq!(faithful(None), (2, 2));
}

#[test]
fn one_corrupted_byte_breaks_fidelity() {
    static DONE: AtomicBool = AtomicBool::new(false);
    let corrupt = |packet: &mut [u8]| {
        if has_payload(packet) && !DONE.swap(true, Ordering::Relaxed) {
            *packet.last_mut().unwrap() ^= 1;
        }
        false
    };
    assert_eq!(faithful(Some(corrupt)), (1, 2));
}

/// One that is lost once only, the engine may send again, and then all bytes arrive after all.
#[test]
fn outputs_that_never_arrive_break_fidelity() {
    assert_eq!(faithful(Some(|packet| has_payload(packet))), (0, 2));
}
