//! Reading captured segments: what each of them says about the client and the target.

use std::ops::Range;

use tungate_engine::Timestamp;
use tungate_engine::packet::{PacketView, TcpFlags, TcpView, Transport};

use super::client::GAP_MAX;
use super::rewrite::Made;
use super::upstream::{Answer, State};
use super::{FIRST, SYN_PATIENCE, TcpFlow};
use crate::outcome::Side;
use crate::replay::card::Anomaly;
use crate::replay::item::Packet;
use crate::replay::repair::{self, Checksums, Soundness};
use crate::replay::stream::{Origin, SYN};
use crate::replay::timer::Timer;

/// The largest window scale (RFC 7323, section 2.3), which stands for one that was not captured.
const SHIFT_MAX: u8 = 14;

const PROTOCOL_TCP: u8 = 6;

/// A captured segment's header, and where its parts are in the packet.
#[derive(Debug, Clone)]
pub(super) struct Captured {
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    pub(super) flags: TcpFlags,
    pub(super) window: u16,
    window_scale: Option<u8>,
    /// Left and right edges of what was received out of order, in the first [`Self::sack_blocks`] places.
    sack: [(u32, u32); 4],
    sack_blocks: usize,
    /// Where the TCP header is.
    pub(super) transport: usize,
    /// Where the data is.
    pub(super) payload: Range<usize>,
    /// How much at the end of the data was cut off by the snap length.
    pub(super) cut: usize,
    /// Length of the IP packet.
    pub(super) end: usize,
}

/// The edges of a SACK block.
fn edges(&[a, b, c, d, e, f, g, h]: &[u8; 8]) -> (u32, u32) {
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

/// A captured packet that is a segment.
#[derive(Debug)]
pub(in super::super) struct CapturedSegment {
    pub(super) header: Captured,
    /// Of a target's, only where it may be lost for that; else it counts as sound.
    pub(super) soundness: Soundness,
}

impl CapturedSegment {
    /// Reads the segment in a captured packet; `None` if there is none with a sound header.
    pub(in super::super) fn read(
        side: Side,
        packet: &Packet,
        ip: &[u8],
        checksums: Checksums,
    ) -> Option<Self> {
        let view = PacketView::parse(ip).ok()?;
        if view.protocol() != Some(PROTOCOL_TCP) {
            return None;
        }
        let transport = view.transport();
        let soundness = if side == Side::Client || checksums == Checksums::Strict {
            repair::soundness(packet, &view, &transport, checksums)
        } else {
            Soundness::Sound
        };
        let Ok(Transport::Tcp(tcp)) = &transport else {
            return None;
        };
        Some(Self {
            header: Captured::new(tcp, view.transport_offset(), view.bytes().len(), packet),
            soundness,
        })
    }
}

impl Captured {
    fn new(tcp: &TcpView<'_>, transport: usize, end: usize, packet: &Packet) -> Self {
        let start = transport + usize::from(tcp.header_len);
        let mut sack = [(0, 0); 4];
        for (place, block) in sack.iter_mut().zip(tcp.options.sack) {
            *place = edges(block);
        }
        Self {
            sequence: tcp.sequence,
            acknowledgment: tcp.acknowledgment,
            flags: tcp.flags,
            window: tcp.window,
            window_scale: tcp.options.window_scale,
            sack,
            sack_blocks: tcp.options.sack.len().min(4),
            transport,
            payload: start..end,
            cut: end - (packet.captured as usize).clamp(start, end),
            end,
        }
    }

    /// The captured part of the data.
    pub(super) fn real<'a>(&self, ip: &'a [u8]) -> &'a [u8] {
        &ip[self.payload.start..self.payload.end - self.cut]
    }

    /// Writes the packet with no more than the first `keep` bytes of its data.
    pub(super) fn write_cut(&self, ip: &[u8], keep: usize, into: &mut Vec<u8>) {
        into.clear();
        into.extend_from_slice(&ip[..self.payload.start + keep]);
        into[self.transport + 13] &= !(TcpFlags::FIN | TcpFlags::PSH);
        if into[0] >> 4 == 4 {
            repair::write_total_length(into);
        } else {
            let len = (into.len() - 40) as u16;
            into[4..6].copy_from_slice(&len.to_be_bytes());
        }
    }
}

impl TcpFlow {
    /// Whether the client has not opened the connection but was asked for it.
    pub(super) fn is_inbound(&self) -> bool {
        self.inbound
    }

    /// Notes what is peculiar about a segment whoever sent it.
    pub(super) fn note_header(&mut self, header: &Captured) {
        let anomalies = &mut self.card.anomalies;
        if header.cut > 0 {
            anomalies.add(Anomaly::SnapCut);
        }
        if header.flags.0 & TcpFlags::URG != 0 {
            anomalies.add(Anomaly::Urgent);
        }
        if header.window == 0 && header.flags.ack() && !header.flags.rst() && !header.flags.syn() {
            anomalies.add(Anomaly::ZeroWindow);
        }
        if header.flags.rst() && !header.payload.is_empty() {
            anomalies.add(Anomaly::ResetData);
        }
    }

    // ---- of the client -----------------------------------------------------------------------------------------

    /// Takes a captured SYN; says whether it is this flow's.
    pub(super) fn prepare_syn(&mut self, header: &Captured) -> bool {
        match self.client.origin {
            None => {
                self.client.begin(header.sequence);
                self.client.on_syn(header.window, header.window_scale);
                if let Some(scale) = self.upstream.syn_ack {
                    self.on_scales(scale);
                }
                self.upstream.wait_for_syn = Timer::OFF;
                if !header.payload.is_empty() {
                    self.card.anomalies.add(Anomaly::SynData);
                }
                true
            }
            Some(origin) if origin.0 == header.sequence => {
                self.card.anomalies.add(Anomaly::SynRetransmit);
                true
            }
            Some(_) => false,
        }
    }

    /// Where a captured segment of the client has its first byte.
    pub(super) fn position_of_client(&self, header: &Captured) -> u64 {
        let Some(origin) = self.client.origin else {
            return SYN;
        };
        origin.position(header.sequence, self.client.sent) + u64::from(header.flags.syn())
    }

    /// How many bytes of a segment fit into the engine's window, if not all do and the captured server had offered
    /// more: the client would have sent the rest later.
    pub(super) fn hold(&self, header: &Captured, at: u64) -> Option<usize> {
        let client = &self.client;
        let len = header.payload.len() as u64;
        let room = client.room(at);
        let may_hold = client.is_answered() && !client.is_over && !client.has_reset && !header.flags.rst();
        let was_allowed = self.upstream.window_edge.is_none_or(|edge| at + len <= edge);
        (may_hold && len > room && was_allowed).then_some(room as usize)
    }

    /// Notes a segment of the client that the engine has taken, `held` to so many bytes.
    pub(super) fn on_sent(
        &mut self,
        now: Timestamp,
        header: &Captured,
        at: u64,
        held: Option<usize>,
        real: &[u8],
    ) {
        let flags = header.flags;
        let end = at + header.payload.len() as u64;
        let sent = match held {
            Some(keep) => at + keep as u64,
            None => end + u64::from(flags.fin()),
        };
        // What a SYN carries counts as sent only when it has been taken.
        self.client.sent = self.client.sent.max(if flags.syn() { FIRST } else { sent });
        if flags.ack()
            && !flags.syn()
            && let Some(server) = self.upstream.origin
        {
            let position = server.position(header.acknowledgment, self.upstream.next.max(SYN));
            self.on_client_acknowledged(now, position, header.window);
            for &(left, right) in header.sack.iter().take(header.sack_blocks) {
                let range = server.position(left, position)..server.position(right, position);
                if range.end <= self.upstream.captured_end() + GAP_MAX {
                    self.upstream.on_received(range);
                    self.upstream.writable = true;
                }
            }
        }
        if flags.rst() {
            // What the client has received is not lost with the connection.
            if let Some(end) = self.upstream.gaps.take_acknowledged() {
                self.fill_target_gaps(end);
            }
            return self.client.reset();
        }
        if self.upstream.has_reset {
            return; // nobody is there to take it
        }
        self.note_client_data(header, at);
        if flags.syn() {
            self.client.keep(at, real, header.cut);
        }
        self.client.on_captured(at, real, header.cut);
        if flags.fin() {
            self.client.fin.get_or_insert(end);
            if self.client.waits_for_bytes() {
                self.client.gaps.on_fin(now);
            }
        }
    }

    fn note_client_data(&mut self, header: &Captured, at: u64) {
        let len = header.payload.len() as u64;
        let (next, fin) = (self.client.next, self.client.fin);
        let anomalies = &mut self.card.anomalies;
        if header.flags.syn() || (len == 0 && at + 1 != next) {
            return;
        }
        if len <= 1 && at + 1 == next && !header.flags.fin() && fin.is_none_or(|fin| next < fin) {
            anomalies.add(Anomaly::KeepAlive);
        } else if fin.is_some_and(|fin| at + len > fin) && len > 0 {
            anomalies.add(Anomaly::DataAfterFin);
        } else if len > 0 && at < next {
            anomalies.add(Anomaly::Retransmission);
        } else if len > 0 && at > next {
            anomalies.add(Anomaly::OutOfOrder);
        }
    }

    /// Keeps what of a segment the engine has not acknowledged.
    pub(super) fn keep(&mut self, header: &Captured, at: u64, real: &[u8]) {
        if header.payload.is_empty() || header.flags.rst() || header.flags.syn() || self.upstream.has_reset {
            return;
        }
        let end = at + header.payload.len() as u64;
        if self.client.fin.is_some_and(|fin| end > fin) {
            return;
        }
        if self.client.keep(at, real, header.cut) {
            self.card.anomalies.add(Anomaly::Overlap);
        }
    }

    /// The captured client has everything of the target's before `position`.
    fn on_client_acknowledged(&mut self, now: Timestamp, position: u64, window: u16) {
        if position < SYN || position > self.upstream.captured_end() + GAP_MAX {
            return;
        }
        self.client.on_captured_ack(position, window);
        if position > self.upstream.next && self.upstream.fin.is_none_or(|fin| self.upstream.next < fin) {
            self.upstream.gaps.on_acknowledged(now, position);
        }
    }

    /// Fills what is missing of the client's stream before `end`.
    pub(super) fn fill_client_gaps(&mut self, end: u64) {
        let began_at = self.client.next;
        match self.client.fill_gaps(end) {
            0 => {}
            1 if self.began_empty && began_at == FIRST => {
                self.card.anomalies.add(Anomaly::KeepAlive);
                self.upstream.excused = 1;
            }
            _ => self.card.anomalies.add(Anomaly::Hole),
        }
    }

    // ---- of the target -----------------------------------------------------------------------------------------

    /// Fills what is missing of the target's stream before `end`.
    pub(super) fn fill_target_gaps(&mut self, end: u64) {
        if self.upstream.fill_gaps(end) > 0 {
            self.card.anomalies.add(Anomaly::Hole);
            self.upstream.writable = true;
        }
    }

    /// Takes a captured RST of the target's.
    pub(super) fn on_captured_reset(&mut self, header: &Captured) {
        let Some(origin) = self.client.origin else { return };
        let acknowledges_syn = header.flags.ack() && self.answers_syn(origin, header.acknowledgment);
        let upstream = &mut self.upstream;
        match upstream.answer {
            None if acknowledges_syn => upstream.answer = Some(Answer::Refused),
            Some(Answer::Connected) => {
                let Some(server) = upstream.origin else { return };
                // Whoever resets a connection for want of it takes the number from the segment that it answers.
                let at = server.position(header.sequence, upstream.next);
                let first = self.client.highest.min(upstream.next);
                let last = self.client.highest_edge.unwrap_or(0).max(upstream.next + 1);
                let is_next = at == upstream.sent;
                if is_next || (first..=last).contains(&at) || self.client.highest_edge.is_none() {
                    upstream.has_reset = true;
                } else {
                    self.card.anomalies.add(Anomaly::OutsideWindow);
                }
            }
            None | Some(Answer::Refused | Answer::Unreachable(_)) => {}
        }
    }

    /// Takes a captured SYN of the target's; says whether it is the answer to the client's.
    pub(super) fn on_captured_syn_ack(&mut self, now: Timestamp, header: &Captured) -> bool {
        if !header.flags.ack() {
            self.card.anomalies.add(Anomaly::SplitHandshake);
            self.inbound |= self.client.origin.is_none();
            return false;
        }
        if self.upstream.answer.is_some() {
            return false; // sent again
        }
        match self.client.origin {
            Some(origin) if !self.answers_syn(origin, header.acknowledgment) => return false,
            Some(_) => {}
            None => {
                self.upstream.expected = header.acknowledgment;
                self.upstream.wait_for_syn = Timer::at(now + SYN_PATIENCE);
            }
        }
        self.upstream.begin(header.sequence);
        self.upstream.answer = Some(Answer::Connected);
        self.upstream.syn_ack = Some(header.window_scale);
        if self.client.origin.is_some() {
            self.on_scales(header.window_scale);
        }
        true
    }

    /// Whether a number acknowledges the SYN, with all, some or none of the data on it (RFC 7413, section 3).
    fn answers_syn(&self, origin: Origin, acknowledgment: u32) -> bool {
        let position = origin.position(acknowledgment, FIRST);
        (FIRST..=self.client.next.max(FIRST)).contains(&position)
    }

    /// Both captured SYNs are known.
    fn on_scales(&mut self, of_target: Option<u8>) {
        self.handshake = true;
        match (self.client.offered_shift, of_target) {
            (Some(_), Some(shift)) => self.upstream.captured_shift = shift,
            (None, _) | (_, None) => {
                self.client.captured_shift = 0;
                self.upstream.captured_shift = 0;
            }
        }
    }

    /// Takes a captured segment of the target's. Returns how many bytes of it nobody was there for.
    pub(super) fn on_script(&mut self, now: Timestamp, header: &Captured, real: &[u8]) -> u64 {
        let len = header.payload.len() as u64;
        if self.client.has_reset {
            if len > 0 {
                self.card.anomalies.add(Anomaly::DataAfterReset);
            }
            return len;
        }
        if self.upstream.has_reset {
            return 0;
        }
        self.on_target_acknowledged(now, header);
        let Some(server) = self.upstream.origin else {
            return 0;
        };
        if len == 0 && !header.flags.fin() {
            return 0;
        }
        if self.upstream.answer.is_none() {
            // Whoever sends data has completed the handshake.
            self.upstream.answer = Some(Answer::Connected);
            self.card.anomalies.add(Anomaly::NoSynAck);
        }
        if !header.flags.syn() {
            self.client.on_proven_handshake();
        }
        let at = server.position(header.sequence, self.upstream.next) + u64::from(header.flags.syn());
        let end = at + len;
        if end <= self.upstream.next + GAP_MAX {
            self.upstream.sent = self.upstream.sent.max(end + u64::from(header.flags.fin()));
        }
        if len > 0 {
            self.on_target_data(at, end, real);
        }
        if header.flags.fin() && end <= self.upstream.next.saturating_add(GAP_MAX) {
            self.upstream.fin.get_or_insert(end.max(self.upstream.next));
            if self.upstream.waits_for_bytes() {
                self.upstream.gaps.on_fin(now);
            }
        }
        self.upstream.writable = true;
        if self.upstream.state == State::Gone {
            self.upstream.pending.clear();
        }
        0
    }

    fn on_target_data(&mut self, at: u64, end: u64, real: &[u8]) {
        let upstream = &mut self.upstream;
        let anomalies = &mut self.card.anomalies;
        if end == at + 1 && end == upstream.next {
            anomalies.add(Anomaly::KeepAlive);
            return;
        }
        if upstream.fin.is_some_and(|fin| end > fin) {
            anomalies.add(Anomaly::DataAfterFin);
        }
        let window = match self.client.highest_edge {
            Some(edge) if self.handshake => edge,
            Some(_) | None => upstream.next + GAP_MAX,
        };
        let limit = upstream.fin.map_or(window, |fin| window.min(fin));
        let kept = limit.saturating_sub(at).min(end - at) as usize;
        if end > window {
            anomalies.add(Anomaly::OutsideWindow);
            let beyond = real.get(kept..).unwrap_or_default();
            if end <= upstream.next + GAP_MAX && upstream.fin.is_none() {
                upstream.on_data_beyond(at + kept as u64, beyond);
            }
        }
        let real = &real[..real.len().min(kept)];
        let found = upstream.on_data(at, real, kept - real.len());
        for (is_so, anomaly) in [
            (found.out_of_order, Anomaly::OutOfOrder),
            (found.retransmission, Anomaly::Retransmission),
            (found.overlap, Anomaly::Overlap),
        ] {
            if is_so {
                anomalies.add(anomaly);
            }
        }
    }

    /// What the captured target acknowledges of the client's.
    fn on_target_acknowledged(&mut self, now: Timestamp, header: &Captured) {
        let Some(origin) = self.client.origin.filter(|_| header.flags.ack()) else {
            return;
        };
        let position = origin.position(header.acknowledgment, self.client.next);
        if position < SYN || position > self.client.captured_end() + GAP_MAX {
            return;
        }
        let shift = match (header.flags.syn(), self.handshake) {
            (true, _) => 0,
            (false, true) => self.upstream.captured_shift,
            (false, false) => SHIFT_MAX,
        };
        let edge = position + (u64::from(header.window) << shift);
        let known = self.upstream.window_edge.unwrap_or(0);
        self.upstream.window_edge = Some(known.max(edge));
        let is_complete = self.client.fin.is_some_and(|fin| self.client.next >= fin);
        if position > self.client.next && !self.client.is_over && !is_complete {
            self.client.gaps.on_acknowledged(now, position);
        }
    }

    // ---- of the client's own making ----------------------------------------------------------------------------

    /// A segment from the client with these numbers: sequence, acknowledgment and window.
    pub(super) fn made<'a>(
        &'a self,
        (sequence, acknowledgment, window): (u32, u32, u16),
        flags: u8,
        payload: &'a [u8],
    ) -> Made<'a> {
        Made {
            client: self.card.client,
            target: self.card.target,
            sequence,
            acknowledgment,
            flags,
            window,
            options: &[],
            payload,
        }
    }

    /// An RST with this sequence number.
    pub(super) fn reset(&self, sequence: u32) -> Option<Made<'_>> {
        Some(self.made((sequence, 0, 0), TcpFlags::RST, &[]))
    }
}
