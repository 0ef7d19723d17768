//! A world that keeps the packets it is sent.

use crate::addr::{FlowId, ShardId};
use crate::dns::Learned;
use crate::event::Event;
use crate::io::{PacketIn, PacketOut, UpstreamCommand, World};

/// Packets as they left the engine.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    buffer: Vec<u8>,
    pub(super) packets: Vec<(PacketOut, Vec<u8>)>,
}

impl Outbox {
    /// The packets as a device without offloads would send them.
    pub(super) fn on_the_wire(&self) -> Vec<Vec<u8>> {
        let mut wire = Vec::new();
        for (out, packet) in &self.packets {
            super::segments(&mut packet.clone(), out, |packet| wire.push(packet.to_vec()));
        }
        wire
    }
}

impl World for Outbox {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= 65_535, "no buffer is larger");
        self.buffer = vec![0xaa; len]; // "any content"
        &mut self.buffer
    }

    fn send_packet(&mut self, packet: PacketOut) {
        self.packets.push((packet, std::mem::take(&mut self.buffer)));
    }

    fn upstream(&mut self, _: FlowId, _: UpstreamCommand<'_>) {
        unreachable!("only packets are sent");
    }

    fn event(&mut self, _: &Event) {
        unreachable!("only packets are sent");
    }

    fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {
        unreachable!("only packets are sent");
    }

    fn learned(&mut self, _: &Learned) {
        unreachable!("only packets are sent");
    }
}
