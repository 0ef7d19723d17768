//! The client of a TCP flow: it sends what the capture says the client sent, and receives what the engine sends.
//!
//! **Sending.** Its own sequence numbers go on unchanged, so positions in its stream are the captured ones. Captured
//! segments go in as captured; what the engine does not acknowledge is kept and sent again (after the retransmission
//! timeout, three duplicate ACKs, or at once where a SYN-ACK leaves the SYN's data out), and what lies beyond the
//! engine's window is kept until the window opens.
//!
//! **Receiving.** The captured acknowledgments count for the captured peer; here they are positions in the server's
//! stream, and the engine is told `min(captured, received)`. When bytes come that the capture has acknowledged already,
//! they are acknowledged at that instant; others wait for the captured acknowledgment, for 200 ms at most. A FIN alone
//! waits until the engine repeats it, a SYN-ACK until something shows that the handshake was completed: neither is in
//! a hurry, and the captured packets that complete a handshake or a close shall be those that do it here.
//!
//! The path between engine and client loses nothing, so a segment that leaves a gap means that an output of the engine
//! was lost on the way, and the flow does not count as faithful.

use std::time::Duration;

use tungate_engine::Timestamp;
use tungate_engine::packet::TcpFlags;

use super::super::stream::{Delivered, Fillers, Fingerprint, Gaps, Held, Origin, SYN};
use super::super::timer::Timer;

/// How long bytes wait for the captured acknowledgment.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(200);

/// The first retransmission timeout (RFC 6298, section 2.1).
const RESEND_AFTER: Duration = Duration::from_secs(1);

/// Most bytes in one segment of the model's own.
const CHUNK: usize = 16 << 10;

/// The window scale that stands for one that was not captured.
const UNKNOWN_SHIFT: u8 = 7;

/// A gap this large is a stray acknowledgment, not loss.
pub(super) const GAP_MAX: u64 = 16 << 20;

/// One captured or emitted segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment<'a> {
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    pub(super) flags: TcpFlags,
    pub(super) window: u16,
    pub(super) window_scale: Option<u8>,
    pub(super) payload: &'a [u8],
}

#[derive(Default)]
pub(super) struct Client {
    /// Its initial sequence number.
    pub(super) origin: Option<Origin>,

    /// Where the first byte stands that is neither captured nor filled in.
    pub(super) next: u64,
    pub(super) captured: Fingerprint,
    pub(super) kept: Held,
    pub(super) fillers: Fillers,
    /// Where its FIN stands.
    pub(super) fin: Option<u64>,
    pub(super) gaps: Gaps,

    /// SND.UNA.
    pub(super) unacknowledged: u64,
    /// SND.NXT at its highest.
    pub(super) sent: u64,
    /// Right edge of the engine's window.
    pub(super) edge: u64,
    /// Scale of the engine's window.
    shift: u8,
    duplicates: u8,
    timeout: Duration,
    pub(super) resend_at: Timer,

    /// The engine's initial sequence number.
    pub(super) peer: Option<Origin>,
    /// RCV.NXT.
    pub(super) received: u64,
    /// What the engine was told last.
    told: u64,
    /// What the model has acknowledged of its own accord.
    forced: u64,
    /// The highest captured acknowledgment.
    pub(super) highest: u64,
    /// Right edge of the captured window, as captured last.
    right_edge: u64,
    /// The highest that edge has been; `None` before the first acknowledgment.
    pub(super) highest_edge: Option<u64>,
    /// What the client's SYN offers.
    pub(super) offered_shift: Option<u8>,
    /// The window on it, or on one that was made up.
    offered_window: u16,
    /// Scale of the captured windows.
    pub(super) captured_shift: u8,
    /// Scale that the engine applies to this client's windows.
    told_shift: u8,
    pub(super) acknowledge_at: Timer,
    pub(super) delivered: Delivered,
    /// An output of the engine was lost.
    pub(super) lost_output: bool,

    /// It has sent RST.
    pub(super) has_reset: bool,
    /// It has been sent RST, or the engine has let go of the flow.
    pub(super) is_over: bool,
    /// The capture has ended: nothing is waited for.
    pub(super) is_settling: bool,
    pub(super) wants: Wants,
}

/// What the client has to say.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wants {
    pub(super) acknowledge: bool,
    /// From which position on to send what is kept.
    pub(super) send_from: Option<u64>,
    /// An RST with this sequence number.
    pub(super) reset: Option<u32>,
    /// The SYN once more: it met the flow before.
    pub(super) syn: bool,
}

impl Wants {
    pub(super) fn any(&self) -> bool {
        self.acknowledge || self.send_from.is_some() || self.reset.is_some() || self.syn
    }
}

impl Client {
    pub(super) fn begin(&mut self, isn: u32) {
        self.origin = Some(Origin(isn));
        self.next = SYN + 1;
        self.unacknowledged = SYN;
        self.sent = SYN;
        self.edge = SYN;
        self.timeout = RESEND_AFTER;
        self.received = SYN;
        self.told = SYN;
        self.highest = self.highest.max(SYN);
        self.right_edge = self.right_edge.max(SYN);
    }

    /// Whether the engine has answered the SYN.
    pub(super) fn is_answered(&self) -> bool {
        self.peer.is_some()
    }

    /// What the SYN says.
    pub(super) fn on_syn(&mut self, window: u16, window_scale: Option<u8>) {
        self.offered_shift = window_scale;
        self.offered_window = window;
        self.captured_shift = window_scale.unwrap_or(0);
        self.right_edge = SYN + 1 + u64::from(window);
        self.sent = self.sent.max(SYN + 1);
    }

    /// A handshake is made up for it. `scales` is whether windows were scaled, where that is known.
    pub(super) fn on_adopted(&mut self, scales: Option<bool>) {
        let shift = scales.unwrap_or(true).then_some(UNKNOWN_SHIFT);
        self.offered_shift = shift;
        self.offered_window = u16::MAX;
        self.captured_shift = shift.unwrap_or(0);
        self.sent = SYN + 1;
        self.highest = SYN + 1;
        self.right_edge = SYN + 1 + u64::from(u16::MAX);
    }

    // ---- numbers -----------------------------------------------------------------------------------------------

    /// What to tell the engine where the capture says that everything before `position` has been received: the
    /// acknowledgment number and the window field.
    pub(super) fn translate(&self, position: u64, window: u16) -> Option<(u32, u16)> {
        let peer = self.peer?;
        let told = position.min(self.received).max(self.forced);
        let edge = position.saturating_add(u64::from(window) << self.captured_shift);
        Some((peer.number(told), self.window_field(told, edge)))
    }

    /// A sequence number of the captured server's as one of the engine's.
    pub(super) fn translate_edge(&self, server: Origin, number: u32) -> u32 {
        let Some(peer) = self.peer else { return number };
        peer.number(server.position(number, self.received))
    }

    /// The right edge stays where it was captured: what was received there was inside it.
    fn window_field(&self, told: u64, edge: u64) -> u16 {
        let window = edge.saturating_sub(told);
        match window >> self.told_shift {
            0 => u16::from(window > 0),
            field => u16::try_from(field).unwrap_or(u16::MAX),
        }
    }

    /// The right edge of the window, where everything before `position` has been received. Of a client that was never
    /// captured acknowledging anything nothing is known but that it went on receiving.
    fn edge_beyond(&self, position: u64) -> u64 {
        match self.highest_edge {
            Some(_) => self.right_edge,
            None => self.right_edge.max(position + u64::from(self.offered_window)),
        }
    }

    /// Notes what a captured segment of the client acknowledges.
    pub(super) fn on_captured_ack(&mut self, position: u64, window: u16) {
        self.highest = self.highest.max(position);
        self.right_edge = position.saturating_add(u64::from(window) << self.captured_shift);
        self.highest_edge = Some(self.highest_edge.unwrap_or(0).max(self.right_edge));
        self.told = self.told.max(position.min(self.received));
        if self.told >= self.received {
            self.acknowledge_at = Timer::OFF;
        }
        self.note_acknowledgeable();
    }

    /// The sequence number, acknowledgment number and window of a segment that the model sends from `position`.
    pub(super) fn numbers(&mut self, position: u64) -> Option<(u32, u32, u16)> {
        let (origin, peer) = (self.origin?, self.peer?);
        // Whatever it sends completes the handshake, if nothing captured has yet: data on the SYN that the SYN-ACK
        // leaves out goes again before that.
        let told = self
            .told
            .max(self.highest.min(self.received))
            .max(self.forced)
            .max(SYN + 1);
        self.told = told;
        if told >= self.received {
            self.acknowledge_at = Timer::OFF;
        }
        self.wants.acknowledge = false;
        let window = self.window_field(told, self.edge_beyond(told));
        Some((origin.number(position), peer.number(told), window))
    }

    // ---- what the capture has it send --------------------------------------------------------------------------

    /// Takes the data of a captured segment, at `at`: `real` bytes and behind them `cut` that the snap length cut off.
    /// Bytes that wait for others have to be kept.
    pub(super) fn on_captured(&mut self, at: u64, real: &[u8], cut: usize) {
        let end = at + (real.len() + cut) as u64;
        if at > self.next || end <= self.next {
            return;
        }
        let fresh = real.get((self.next - at) as usize..).unwrap_or_default();
        self.captured.add(fresh);
        self.next += fresh.len() as u64;
        self.fill(end);
        self.absorb();
    }

    /// Keeps what of a captured segment the engine has not acknowledged. Returns whether it contradicts what was kept.
    pub(super) fn keep(&mut self, at: u64, real: &[u8], cut: usize) -> bool {
        if self.is_over || self.has_reset {
            return false;
        }
        let from = at.max(self.unacknowledged.max(SYN + 1));
        let skip = (from - at) as usize;
        if skip >= real.len() + cut {
            return false;
        }
        let conflict = match real.get(skip..) {
            Some(rest) if !rest.is_empty() => self.kept.insert(from, rest),
            _ => false,
        };
        let (start, end) = (from.max(at + real.len() as u64), at + (real.len() + cut) as u64);
        self.keep_fillers(start..end);
        self.absorb();
        conflict
    }

    /// Fills all gaps up to `end`. Returns how many bytes were missing.
    pub(super) fn fill_gaps(&mut self, end: u64) -> u64 {
        let end = self.fin.map_or(end, |fin| end.min(fin));
        if end <= self.next {
            return 0;
        }
        let gaps = self.kept.gaps(self.next..end);
        let missing = gaps.iter().map(|gap| gap.end - gap.start).sum();
        gaps.into_iter().for_each(|gap| self.keep_fillers(gap));
        self.absorb();
        self.wants.send_from = Some(self.unacknowledged.max(SYN + 1));
        missing
    }

    /// Where what has been captured ends.
    pub(super) fn captured_end(&self) -> u64 {
        let kept = self.kept.end().unwrap_or(0);
        self.next.max(kept).max(self.fin.unwrap_or(0))
    }

    /// Whether something before the FIN is missing.
    pub(super) fn waits_for_bytes(&self) -> bool {
        self.fin.is_some_and(|fin| self.next < fin)
    }

    /// Moves `next` over fillers that follow it.
    fn fill(&mut self, end: u64) {
        if end > self.next {
            self.fillers.add(self.next..end);
            self.next = end;
        }
    }

    fn keep_fillers(&mut self, range: std::ops::Range<u64>) {
        if range.is_empty() {
            return;
        }
        for gap in self.kept.gaps(range) {
            self.kept
                .insert(gap.start, &vec![0; (gap.end - gap.start) as usize]);
            if gap.end > self.next {
                self.fillers.add(gap.start.max(self.next)..gap.end);
            }
        }
    }

    /// Moves `next` over what is kept behind it.
    fn absorb(&mut self) {
        loop {
            let piece = self.kept.from(self.next);
            if piece.is_empty() {
                return self.gaps.on_filled(self.next, self.fin);
            }
            let captured = &mut self.captured;
            self.fillers.split(self.next, piece, |part, kind| match kind {
                super::super::stream::Kind::Captured => captured.add(part),
                super::super::stream::Kind::Filler => {}
            });
            self.next += piece.len() as u64;
        }
    }

    // ---- what it sends of its own accord -----------------------------------------------------------------------

    /// Whether there is something to send again.
    fn has_outstanding(&self) -> bool {
        let live = self.is_answered() && !self.is_over && !self.has_reset;
        live && (self.fin == Some(self.unacknowledged) || !self.kept.from(self.unacknowledged).is_empty())
    }

    /// Starts or stops the retransmission timer.
    pub(super) fn arm(&mut self, now: Timestamp) {
        if !self.has_outstanding() {
            self.resend_at = Timer::OFF;
        } else if !self.resend_at.is_on() {
            self.resend_at = Timer::at(now + self.timeout);
        }
    }

    /// The retransmission timer has run out.
    pub(super) fn on_resend_timer(&mut self, now: Timestamp) {
        self.timeout *= 2;
        self.resend_at = Timer::at(now + self.timeout);
        self.wants.send_from = Some(self.unacknowledged);
    }

    /// What to send from `from` on, and whether a FIN follows it. Into a closed window goes one byte, as a probe.
    pub(super) fn chunk(&self, from: u64) -> Option<(&[u8], bool)> {
        let bytes = self.kept.from(from);
        let room = match self.edge.saturating_sub(from) {
            0 if from == self.unacknowledged => 1,
            room => usize::try_from(room).unwrap_or(usize::MAX),
        };
        let bytes = &bytes[..bytes.len().min(room).min(CHUNK)];
        let fin = self.fin == Some(from + bytes.len() as u64);
        (!bytes.is_empty() || fin).then_some((bytes, fin))
    }

    /// How many of the bytes that a captured segment has at `at` the engine's window takes.
    pub(super) fn room(&self, at: u64) -> u64 {
        self.edge.saturating_sub(at)
    }

    // ---- what the engine sends ---------------------------------------------------------------------------------

    /// Takes a segment from the engine; `fillers` are those of the server's stream.
    pub(super) fn on_segment(&mut self, now: Timestamp, segment: &Segment<'_>, fillers: &Fillers) {
        let flags = segment.flags;
        let Some(origin) = self.origin else { return };
        if flags.rst() {
            self.end();
            return;
        }
        if self.has_reset {
            // RFC 9293, section 3.10.7.1: CLOSED.
            self.wants.reset = flags.ack().then_some(segment.acknowledgment);
            return;
        }
        let acknowledged = origin.position(segment.acknowledgment, self.sent);
        if flags.syn() {
            self.on_syn_ack(segment, acknowledged);
            return;
        }
        let Some(peer) = self.peer else { return };
        let at = peer.position(segment.sequence, self.received);
        let news = flags.ack() && self.on_acknowledged(now, acknowledged, segment);
        if segment.payload.is_empty() && !flags.fin() {
            let is_probe = at < self.received;
            let is_idle = self.told == self.received && !self.has_outstanding();
            // A keep-alive, or a challenge ACK.
            self.wants.acknowledge |= is_probe || (!news && is_idle);
            return;
        }
        if at > self.received {
            self.lost_output = true;
            return;
        }
        let end = at + segment.payload.len() as u64 + u64::from(flags.fin());
        if end <= self.received {
            self.wants.acknowledge = true; // sent again
            return;
        }
        let fresh = segment
            .payload
            .get((self.received - at) as usize..)
            .unwrap_or_default();
        let edge = self.edge_beyond(self.received);
        let is_window_closed = edge <= self.received && self.highest <= self.received;
        if fresh.len() == 1 && is_window_closed && !self.is_settling {
            self.wants.acknowledge = true; // a window probe
            return;
        }
        self.delivered.take(self.received, fresh, fillers);
        self.received += fresh.len() as u64;
        if self.received > self.highest && !fresh.is_empty() && !self.acknowledge_at.is_on() {
            self.acknowledge_at = Timer::at(now + ACKNOWLEDGE_AFTER);
        }
        self.received += u64::from(flags.fin());
        self.note_acknowledgeable();
    }

    fn on_syn_ack(&mut self, segment: &Segment<'_>, acknowledged: u64) {
        if acknowledged != SYN + 1 {
            return;
        }
        let is_new = self.peer.is_none();
        if is_new {
            self.peer = Some(Origin(segment.sequence));
            if let (Some(shift), Some(offered)) = (segment.window_scale, self.offered_shift) {
                self.shift = shift;
                self.told_shift = offered;
            }
            self.unacknowledged = SYN + 1;
            self.sent = self.sent.max(SYN + 1);
            self.edge = SYN + 1 + u64::from(segment.window); // not scaled, RFC 7323, section 2.2
            self.received = SYN + 1;
            if !self.kept.is_empty() {
                self.wants.send_from = Some(SYN + 1);
            }
        }
        self.wants.acknowledge |= self.highest > SYN;
    }

    /// Takes the acknowledgment and window of a segment; says whether they are news.
    fn on_acknowledged(&mut self, now: Timestamp, acknowledged: u64, segment: &Segment<'_>) -> bool {
        if acknowledged < self.unacknowledged || acknowledged > self.sent {
            return false;
        }
        let edge = acknowledged + (u64::from(segment.window) << self.shift);
        let advances = acknowledged > self.unacknowledged;
        let opens = edge > self.edge;
        let news = advances || edge != self.edge;
        self.edge = edge;
        if advances {
            self.unacknowledged = acknowledged;
            self.kept.forget_before(acknowledged.min(self.next));
            self.timeout = RESEND_AFTER;
            self.resend_at = Timer::OFF;
            self.duplicates = 0;
            self.arm(now);
        } else if !news && segment.payload.is_empty() && !segment.flags.fin() && self.has_outstanding() {
            self.duplicates += 1;
            if self.duplicates == 3 {
                self.wants.send_from = Some(self.unacknowledged);
            }
        }
        if opens && !self.kept.from(self.sent).is_empty() {
            let from = self.wants.send_from.unwrap_or(u64::MAX);
            self.wants.send_from = Some(from.min(self.sent));
        }
        news
    }

    fn note_acknowledgeable(&mut self) {
        if self.is_settling && self.highest > SYN {
            self.forced = self.forced.max(self.received);
        }
        self.wants.acknowledge |= self.highest.min(self.received).max(self.forced) > self.told;
    }

    /// Nothing shows that this was captured, but it must have happened: the handshake was completed.
    pub(super) fn on_proven_handshake(&mut self) {
        if self.highest <= SYN {
            self.highest = SYN + 1;
            if self.is_answered() {
                self.note_acknowledgeable();
            }
        }
    }

    /// Bytes have waited long enough for their captured acknowledgment.
    pub(super) fn on_acknowledge_timer(&mut self) {
        self.acknowledge_at = Timer::OFF;
        self.forced = self.received;
        self.note_acknowledgeable();
    }

    /// The capture has ended: nothing more is captured that could be waited for.
    pub(super) fn settle(&mut self) {
        self.is_settling = true;
        self.acknowledge_at = Timer::OFF;
        if self.is_answered() {
            self.note_acknowledgeable();
        }
    }

    /// The client is about to send a reset: what comes back at once, such as a challenge (RFC 5961, section 3.2), meets
    /// one that knows nothing of the connection.
    pub(super) fn begin_reset(&mut self) {
        self.has_reset = true;
        self.resend_at = Timer::OFF;
    }

    /// The client has reset the connection: from now on it knows nothing of it.
    pub(super) fn reset(&mut self) {
        self.begin_reset();
        let challenged = self.wants.reset;
        self.forget();
        self.wants.reset = challenged;
    }

    /// The connection is gone.
    pub(super) fn end(&mut self) {
        self.is_over = true;
        self.forget();
    }

    fn forget(&mut self) {
        self.kept.clear();
        self.resend_at = Timer::OFF;
        self.acknowledge_at = Timer::OFF;
        self.gaps = Gaps::default();
        self.wants = Wants::default();
    }
}
