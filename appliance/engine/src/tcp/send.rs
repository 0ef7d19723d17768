//! The send half of a flow: bytes for the client, from the upstream's read to the client's acknowledgment.
//!
//! [`Recovery`] decides what leaves when; this module translates between its offsets and sequence numbers, and writes
//! the segments.

use std::num::NonZeroU16;
use std::time::Duration;

use super::receive::Told;
use super::recovery::{Ack, Block, CongestionControl, Recovery, Setup, Transmit, Unacceptable};
use super::ring::Ring;
use super::segment::{Fields, HEADERS_MAX};
use super::stack::Way;
use crate::io::World;
use crate::packet::{TcpFlags, TcpView};
use crate::time::Timestamp;

/// The kernel splits a super-packet again when its IP length and an Ethernet header exceed 65,535 bytes.
const LARGEST_PACKET: usize = 65_535 - 14;

/// Where the send buffer of a flow under congestion control begins.
const RING_INITIAL: usize = 128 << 10;

/// The most selective acknowledgments that a segment has room for.
const BLOCKS_MAX: usize = 4;

/// What a send half starts from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    /// Length of both headers, without options.
    pub(super) headers_len: usize,
    /// Payload bytes per packet on the wire.
    pub(super) segment_size: u16,
    /// Our initial sequence number.
    pub(super) isn: u32,
    /// The client's window scale.
    pub(super) shift: u8,
    pub(super) selective: bool,
    pub(super) handshake_rtt: Option<Duration>,
    pub(super) congestion: CongestionControl,
}

#[derive(Debug)]
pub(super) struct SendHalf {
    recovery: Recovery,
    start: Start,
    /// Bytes given in all.
    given: u64,
    /// FIN follows them.
    finished: bool,
}

impl SendHalf {
    /// Starts with the segment that completes the handshake.
    pub(super) fn new(start: Start, first: &TcpView<'_>, ring: &mut Ring, now: Timestamp) -> Self {
        if start.congestion != CongestionControl::None {
            ring.begin_with(RING_INITIAL);
        }
        let setup = Setup {
            segment_size: start.segment_size,
            packet_limit: packet_limit(&start),
            window: u64::from(first.window) << start.shift,
            selective: start.selective,
            handshake_rtt: start.handshake_rtt,
            congestion: start.congestion,
        };
        Self {
            recovery: Recovery::new(&setup, now),
            start,
            given: 0,
            finished: false,
        }
    }

    /// SND.NXT.
    pub(super) fn sequence(&self) -> u32 {
        self.sequence_of(self.recovery.sent())
    }

    fn sequence_of(&self, offset: u64) -> u32 {
        self.start.isn.wrapping_add(1).wrapping_add(offset as u32)
    }

    /// The offset next to what is not acknowledged that has this sequence number; `None` if it would be below 0.
    fn offset_of(&self, sequence: u32) -> Option<u64> {
        let base = self.recovery.acknowledged();
        let distance = sequence.wrapping_sub(self.sequence_of(base)) as i32;
        base.checked_add_signed(i64::from(distance))
    }

    /// Takes the acknowledgment in a segment, and frees what it acknowledges. For a client that is near, the ring grows to
    /// `buffer` bytes at most.
    pub(super) fn on_segment(
        &mut self,
        now: Timestamp,
        segment: &TcpView<'_>,
        ring: &mut Ring,
        buffer: impl FnOnce() -> usize,
    ) -> Result<(), Unacceptable> {
        let Some(acknowledged) = self.offset_of(segment.acknowledgment) else {
            return Err(Unacceptable);
        };
        let ack = Ack {
            acknowledged,
            window: u64::from(segment.window) << self.start.shift,
            sequence: segment.sequence,
            carries_data: segment.sequence_len() > 0,
        };
        if segment.options.sack.is_empty() {
            let freed = self.recovery.on_ack(now, &ack, &[])?;
            if freed == 0 {
                return Ok(());
            }
            self.free(freed, ring, buffer);
        } else {
            let mut blocks = [Block { start: 0, end: 0 }; BLOCKS_MAX];
            let count = self.blocks_of(segment.options.sack, &mut blocks);
            let freed = self.recovery.on_ack(now, &ack, &blocks[..count])?;
            self.free(freed, ring, buffer);
        }
        Ok(())
    }

    /// Writes down the sound ones of a segment's selective acknowledgments. Returns how many there are.
    fn blocks_of(&self, sack: &[[u8; 8]], blocks: &mut [Block; BLOCKS_MAX]) -> usize {
        let mut count = 0;
        for block in sack.iter().take(BLOCKS_MAX) {
            let [a, b, c, d, e, f, g, h] = *block;
            let start = self.offset_of(u32::from_be_bytes([a, b, c, d]));
            let end = self.offset_of(u32::from_be_bytes([e, f, g, h]));
            if let (Some(start), Some(end)) = (start, end)
                && start < end
            {
                blocks[count] = Block { start, end };
                count += 1;
            }
        }
        count
    }

    /// Forgets bytes that the client has, and lets the ring grow with the window; `buffer` as in [`SendHalf::on_segment`].
    fn free(&mut self, freed: u64, ring: &mut Ring, buffer: impl FnOnce() -> usize) {
        ring.release(ring.len().min(usize::try_from(freed).unwrap_or(usize::MAX)));
        ring.rewind();
        if self.start.congestion != CongestionControl::None {
            // More than the window, since a loss holds the first byte back while others are acknowledged.
            let window = self.recovery.window().saturating_mul(3);
            let window = usize::try_from(window).unwrap_or(usize::MAX);
            // What is on its way to somebody near waits in queues: more would only make others wait.
            ring.grow(if self.recovery.is_near() {
                window.min(buffer())
            } else {
                window
            });
        }
    }

    /// `bytes` more have been put into the ring.
    pub(super) fn give(&mut self, bytes: usize) {
        self.given += bytes as u64;
    }

    /// FIN is to follow what has been given.
    pub(super) fn finish(&mut self) {
        self.finished = true;
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether FIN has been sent.
    pub(super) fn has_sent_fin(&self) -> bool {
        self.finished && self.recovery.sent() > self.given
    }

    /// Whether the client has acknowledged FIN.
    pub(super) fn is_acknowledged(&self) -> bool {
        self.finished && self.recovery.acknowledged() > self.given
    }

    fn end(&self) -> u64 {
        self.given + u64::from(self.finished)
    }

    /// Whether the client has yet to acknowledge something given or sent.
    pub(super) fn is_outstanding(&self) -> bool {
        self.recovery.acknowledged() < self.end()
    }

    /// Whether it may have something to send now.
    pub(super) fn may_send(&self) -> bool {
        self.recovery.may_transmit(self.end())
    }

    pub(super) fn deadline(&self) -> Option<Timestamp> {
        self.recovery.deadline()
    }

    pub(super) fn on_timer(&mut self, now: Timestamp) {
        self.recovery.on_timer(now);
    }

    pub(super) fn set_segment_size(&mut self, bytes: u16) {
        self.start.segment_size = bytes;
        self.recovery.set_segment_size(bytes, packet_limit(&self.start));
    }

    /// Sends one packet, if there is one to send. Returns whether it did.
    pub(super) fn send(
        &mut self,
        now: Timestamp,
        ring: &Ring,
        told: Told,
        way: &Way,
        world: &mut dyn World,
    ) -> bool {
        let base = self.recovery.acknowledged();
        let Some(transmit) = self.recovery.next_transmit(now, self.end()) else {
            return false;
        };
        let (start, end) = match transmit {
            Transmit::Data { start, end, .. } => (start, end),
            Transmit::WindowProbe { at } => (at, at),
        };
        let mut flags = TcpFlags::ACK;
        let data_end = end.min(self.given);
        let payload = if data_end > start {
            ring.get((start - base) as usize, (data_end - base) as usize)
        } else {
            (&[][..], &[][..])
        };
        let len = payload.0.len() + payload.1.len();
        if end > self.given && end != start {
            flags |= TcpFlags::FIN;
        } else if len > 0 && end == self.given {
            flags |= TcpFlags::PSH;
        }
        let mut headers = [0; HEADERS_MAX];
        let headers = &mut headers[..way.headers.len()];
        let fields = Fields {
            flags,
            sequence: self.sequence_of(start),
            acknowledgment: told.acknowledgment,
            window: told.window,
        };
        way.headers.write(headers, fields, &[], len);
        let segment_size = if len > usize::from(self.start.segment_size) {
            NonZeroU16::new(self.start.segment_size)
        } else {
            None
        };
        world.send_parts(way.packet(segment_size), headers, payload);
        true
    }
}

/// The largest payload: whole segments only, or a short one in the middle would become a packet of its own.
fn packet_limit(start: &Start) -> u32 {
    let size = usize::from(start.segment_size);
    ((LARGEST_PACKET - start.headers_len) / size * size) as u32
}
