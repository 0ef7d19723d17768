//! A small correct TCP client on virtual time (RFC 9293), for worlds that lose, repeat and reorder its segments.
//!
//! It retransmits with a doubling timeout from the first unacknowledged byte on, probes closed windows, keeps what
//! arrives out of order, and closes each direction by itself. It has no congestion control and no selective
//! acknowledgments. Bytes of both directions follow a [`Pattern`], so that every one that arrives, in whatever
//! order, is compared with what was sent at its place.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use tungate_engine::Timestamp;

use crate::packet::{ACK, FIN, Options, PSH, RST, SYN, Segment};
use crate::pattern::Pattern;

/// First retransmission timeout (RFC 6298, section 2.1).
const TIMEOUT_FIRST: Duration = Duration::from_secs(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(60);
/// As often as Linux repeats a SYN, and data.
const SYN_RETRIES: u32 = 6;
const DATA_RETRIES: u32 = 15;
/// More than any peer's buffer.
const FAR: u64 = 8 << 20;
const TIME_WAIT: Duration = Duration::from_secs(60);
/// What a peer means that does not say (RFC 9293, section 3.7.1).
const SEGMENT_SIZE_DEFAULT: usize = 536;

/// What a client's SYN says, and how it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Shape {
    pub options: Options,
    /// Bytes of its receive buffer.
    pub buffer: u32,
    /// Largest payload it sends in one packet: above the segment size where its device segments for it.
    pub largest: u32,
    pub manner: Manner,
}

/// Where stacks differ, and each is right in its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Probes a closed window by an old, empty segment, and hears nothing that an unacceptable segment says.
    Linux,
    /// Probes by one byte beyond the window, and hears the acknowledgment of any segment.
    Bsd,
}

/// How a client's connection ended for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides have sent FIN and got everything.
    Finished,
    /// The other side reset it.
    Reset,
    /// The other side answered the SYN by RST.
    Refused,
    /// A router said that the target cannot be reached.
    Unreachable,
    /// Nothing was heard in time.
    TimedOut,
    /// The application reset it.
    Aborted,
    /// The host restarted and knows nothing of it.
    Forgotten,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    SynSent,
    Open,
    TimeWait(Timestamp),
    Closed,
}

/// One connection of a client. Offsets count bytes of a stream; FIN has the one behind the last byte.
#[derive(Debug, Clone)]
pub struct TcpClient {
    address: SocketAddr,
    target: SocketAddr,
    shape: Shape,
    sends: Pattern,
    receives: Pattern,
    state: State,
    end: Option<End>,

    initial: u32,
    queued: u64,
    closing: bool,
    acked: u64,
    next: u64,
    /// Where `next` has been at its highest: SND.NXT.
    sent: u64,
    /// One past the highest offset ever sent, probes of a closed window included.
    highest: u64,
    /// FIN was sent before the peer's came: it is this side that lingers in TIME-WAIT.
    closes_first: bool,
    /// The offset up to which the peer's window reaches.
    limit: u64,
    /// Sequence and acknowledgment number of the segment that said so (RFC 9293: SND.WL1, SND.WL2).
    limit_said: (u32, u32),
    segment_size: usize,
    peer_shift: u8,
    duplicates: u32,
    timer: Option<Timestamp>,
    timeout: Duration,
    retries: u32,

    peer_initial: u32,
    received: u64,
    consumed: u64,
    reading: bool,
    /// Beyond `received`: start and end of runs.
    pieces: BTreeMap<u64, u64>,
    fin_at: Option<u64>,
    /// The highest offset that a window of ours has reached to.
    offered: u64,

    outbox: Vec<Segment>,
}

impl TcpClient {
    /// Starts connecting: the SYN is in the outbox.
    pub fn connect(
        (address, target): (SocketAddr, SocketAddr),
        shape: Shape,
        (sends, receives): (Pattern, Pattern),
        initial: u32,
        now: Timestamp,
    ) -> Self {
        let mut client = Self {
            address,
            target,
            shape,
            sends,
            receives,
            state: State::SynSent,
            end: None,
            initial,
            queued: 0,
            closing: false,
            acked: 0,
            next: 0,
            sent: 0,
            highest: 0,
            closes_first: false,
            limit: 0,
            limit_said: (0, 0),
            segment_size: SEGMENT_SIZE_DEFAULT,
            peer_shift: 0,
            duplicates: 0,
            timer: Some(now + TIMEOUT_FIRST),
            timeout: TIMEOUT_FIRST,
            retries: 0,
            peer_initial: 0,
            received: 0,
            consumed: 0,
            reading: true,
            pieces: BTreeMap::new(),
            fin_at: None,
            offered: 0,
            outbox: Vec::new(),
        };
        client.send_syn();
        client
    }

    // ---- the application ---------------------------------------------------------------------------------------

    /// Writes `len` more bytes.
    pub fn send(&mut self, len: u64, now: Timestamp) {
        assert!(!self.closing, "nothing is written behind FIN");
        self.queued += len;
        self.transmit(now);
    }

    /// Writes no more.
    pub fn close(&mut self, now: Timestamp) {
        self.closing = true;
        self.transmit(now);
    }

    /// Resets the connection.
    pub fn reset(&mut self) {
        match self.state {
            State::Open => {
                let (sequence, acknowledgment) = (self.sequence(self.sent), self.acknowledgment());
                self.emit(RST | ACK, sequence, acknowledgment, Vec::new());
                self.finish(End::Aborted);
            }
            State::SynSent => self.finish(End::Aborted),
            State::TimeWait(_) | State::Closed => {}
        }
    }

    /// Forgets the connection without a word, as by a restart.
    pub fn forget(&mut self) {
        self.finish(End::Forgotten);
        self.outbox.clear();
    }

    /// Starts or stops reading.
    pub fn set_reading(&mut self, reading: bool) {
        self.reading = reading;
        if reading && self.consumed < self.received {
            self.consumed = self.received;
            if self.state == State::Open {
                self.send_ack(); // the window is open again
            }
        }
    }

    /// Asks whether the other side still knows of the connection (RFC 9293, section 3.8.4).
    pub fn keep_alive(&mut self) {
        let (sequence, acknowledgment) = (self.sequence(self.acked).wrapping_sub(1), self.acknowledgment());
        self.emit(ACK, sequence, acknowledgment, Vec::new());
    }

    /// How it ended, once it has.
    pub fn end(&self) -> Option<End> {
        self.end
    }

    /// Whether the SYN-ACK has come.
    pub fn is_connected(&self) -> bool {
        matches!(self.state, State::Open | State::TimeWait(_))
    }

    /// Bytes received in order.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether FIN has been received behind all bytes.
    pub fn has_fin(&self) -> bool {
        self.fin_at == Some(self.received)
    }

    /// Where FIN is said to be, even if bytes before it are missing.
    pub fn fin_at(&self) -> Option<u64> {
        self.fin_at
    }

    /// Bytes that the peer has acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acked.min(self.queued)
    }

    /// Its own address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether a segment belongs to its addresses.
    pub fn is_for(&self, segment: &Segment) -> bool {
        (segment.destination, segment.source) == (self.address, self.target)
    }

    /// Its initial sequence number.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    // ---- the network -------------------------------------------------------------------------------------------

    /// Segments to send, since the last call.
    pub fn take_outbox(&mut self) -> Vec<Segment> {
        std::mem::take(&mut self.outbox)
    }

    /// When [`TcpClient::handle_time`] wants to be called.
    pub fn deadline(&self) -> Option<Timestamp> {
        match self.state {
            State::SynSent | State::Open => self.timer,
            State::TimeWait(until) => Some(until),
            State::Closed => None,
        }
    }

    /// Does what is due.
    pub fn handle_time(&mut self, now: Timestamp) {
        if self.deadline().is_none_or(|at| at > now) {
            return;
        }
        match self.state {
            State::SynSent => {
                if self.retries == SYN_RETRIES {
                    return self.finish(End::TimedOut);
                }
                self.back_off(now);
                self.send_syn();
            }
            State::Open => {
                if self.retries == DATA_RETRIES {
                    return self.finish(End::TimedOut);
                }
                self.back_off(now);
                self.next = self.acked;
                let before = self.outbox.len();
                self.transmit(now);
                if self.outbox.len() == before {
                    self.probe();
                }
            }
            State::TimeWait(_) => self.finish(End::Finished),
            State::Closed => {}
        }
    }

    /// A router says that the target of its SYN cannot be reached.
    pub fn handle_unreachable(&mut self) {
        if self.state == State::SynSent {
            self.finish(End::Unreachable);
        }
    }

    /// Takes a segment.
    ///
    /// # Panics
    ///
    /// If the segment breaks a promise to the client: bytes that are not the stream's, too many, or too large.
    pub fn handle_segment(&mut self, segment: &Segment, now: Timestamp) {
        match self.state {
            State::Closed => self.send_reset_for(segment),
            State::SynSent => self.handle_while_connecting(segment, now),
            State::Open | State::TimeWait(_) => self.handle_while_open(segment, now),
        }
    }

    fn handle_while_connecting(&mut self, segment: &Segment, now: Timestamp) {
        let fits = segment.has(ACK) && segment.acknowledgment == self.initial.wrapping_add(1);
        if segment.has(ACK) && !fits {
            return self.send_reset_for(segment);
        }
        if segment.has(RST) {
            if fits {
                self.finish(End::Refused);
            }
            return;
        }
        if !segment.has(SYN | ACK) {
            return;
        }
        assert!(segment.payload.is_empty(), "data on a SYN-ACK");
        self.state = State::Open;
        self.peer_initial = segment.sequence;
        self.segment_size = segment
            .options
            .max_segment_size
            .map_or(SEGMENT_SIZE_DEFAULT, usize::from);
        self.peer_shift = match self.shape.options.window_scale {
            Some(_) => segment.options.window_scale.unwrap_or(0),
            None => {
                assert_eq!(
                    segment.options.window_scale, None,
                    "an option that was not offered"
                );
                0
            }
        };
        assert!(
            self.shape.options.sack_permitted || !segment.options.sack_permitted,
            "an option that was not offered"
        );
        self.limit = segment.window.into(); // not scaled: RFC 7323, section 2.2
        self.limit_said = (segment.sequence, segment.acknowledgment);
        self.retries = 0;
        self.timeout = TIMEOUT_FIRST;
        self.timer = None;
        self.send_ack();
        self.transmit(now);
    }

    fn handle_while_open(&mut self, segment: &Segment, now: Timestamp) {
        let expected = self.acknowledgment();
        let ahead = segment.sequence.wrapping_sub(expected) as i32;
        let window = self.window() as i32;
        if segment.has(RST) {
            if ahead == 0 && self.state == State::Open {
                self.finish(End::Reset);
            } else if (1..window).contains(&ahead) {
                self.send_ack(); // RFC 5961, section 3.2
            }
            return;
        }
        let len = segment.sequence_len() as i32;
        let acceptable = ahead < window.max(1) && ahead + len >= i32::from(len > 0);
        if !acceptable || segment.has(SYN) {
            self.check(segment, ahead);
            if let State::TimeWait(until) = &mut self.state {
                *until = now + TIME_WAIT;
            }
            if self.shape.manner == Manner::Bsd
                && ahead < 0
                && segment.has(ACK)
                && self.handle_ack(segment, now)
            {
                self.transmit(now);
            }
            return self.send_ack();
        }
        if !segment.has(ACK) {
            return;
        }
        self.check(segment, ahead);
        if !self.handle_ack(segment, now) {
            return self.send_ack();
        }
        if self.state == State::Open {
            self.handle_data(segment, ahead);
            self.transmit(now);
        }
        if self.state == State::Open && self.closing && self.acked > self.queued && self.has_fin() {
            if self.closes_first {
                self.end = Some(End::Finished);
                self.state = State::TimeWait(now + TIME_WAIT);
            } else {
                self.finish(End::Finished);
            }
        }
    }

    /// What must hold for every segment, whenever it comes.
    fn check(&mut self, segment: &Segment, ahead: i32) {
        if segment.payload.is_empty() {
            return;
        }
        let size = self
            .shape
            .options
            .max_segment_size
            .map_or(SEGMENT_SIZE_DEFAULT, |size| usize::from(size.max(48)));
        assert!(
            segment.payload.len() <= size,
            "{self}: a segment of {} bytes to a client that takes {size}",
            segment.payload.len()
        );
        let start = self.received_with_fin() as i64 + i64::from(ahead);
        let Some(start) = u64::try_from(start)
            .ok()
            .filter(|start| *start < self.offered + FAR)
        else {
            return; // a segment of an older connection that was long under way
        };
        let end = start + segment.payload.len() as u64;
        // A retransmission passes over a window that has become smaller than a segment; receivers cut it off. One byte
        // more is a probe of a closed window.
        assert!(
            end <= self.offered + size as u64 + 1,
            "{self}: bytes {start}..{end} sent, and the window reached to {}",
            self.offered
        );
        if let Some(at) = self.receives.mismatch(start, &segment.payload) {
            panic!("{self}: byte {at} from the upstream is not what was sent");
        }
        if let Some(fin_at) = self.fin_at {
            assert!(
                end <= fin_at,
                "{self}: bytes {start}..{end} behind FIN at {fin_at}"
            );
        }
    }

    /// Takes the acknowledgment and window; `false` if it acknowledges what was never sent.
    fn handle_ack(&mut self, segment: &Segment, now: Timestamp) -> bool {
        let ahead = segment.acknowledgment.wrapping_sub(self.sequence(self.acked)) as i32;
        let acknowledged = self.acked as i64 + i64::from(ahead);
        if acknowledged > self.highest as i64 {
            return false;
        }
        self.retries = 0;
        if ahead > 0 {
            self.acked = acknowledged as u64;
            self.next = self.next.max(self.acked);
            self.sent = self.sent.max(self.acked);
            self.duplicates = 0;
            self.timeout = TIMEOUT_FIRST;
            self.timer = (self.next > self.acked).then_some(now + self.timeout);
        } else if ahead == 0 && segment.sequence_len() == 0 && self.next > self.acked {
            self.duplicates += 1;
            if self.duplicates == 3 {
                self.send_data(self.acked); // RFC 5681, section 3.2
            }
        }
        let (sequence, acknowledgment) = self.limit_said;
        let is_newer = |a: u32, b: u32| (a.wrapping_sub(b) as i32) > 0;
        if ahead >= 0
            && (is_newer(segment.sequence, sequence)
                || (segment.sequence == sequence && !is_newer(acknowledgment, segment.acknowledgment)))
        {
            let limit = self.acked + (u64::from(segment.window) << self.peer_shift);
            if self.limit <= self.next && self.next < limit && self.next == self.acked {
                // It was closed, and the timer that of probes.
                self.timeout = TIMEOUT_FIRST;
                self.timer = None;
            }
            self.limit = limit;
            self.limit_said = (segment.sequence, segment.acknowledgment);
        }
        true
    }

    fn handle_data(&mut self, segment: &Segment, ahead: i32) {
        if segment.sequence_len() == 0 {
            return;
        }
        let from = self.received_with_fin() as i64 + i64::from(ahead);
        let end = from + segment.payload.len() as i64;
        let reach = self.received + u64::from(self.window());
        let start = u64::try_from(from).unwrap_or(0).max(self.received);
        let stop = (end.max(0) as u64).min(reach);
        if start < stop {
            self.pieces
                .entry(start)
                .and_modify(|end| *end = (*end).max(stop))
                .or_insert(stop);
        }
        while let Some((&start, &stop)) = self.pieces.first_key_value()
            && start <= self.received
        {
            self.received = self.received.max(stop);
            self.pieces.remove(&start);
        }
        if self.reading {
            self.consumed = self.received;
        }
        if segment.has(FIN) {
            let at = end as u64;
            assert!(
                self.fin_at.is_none_or(|known| known == at),
                "{self}: FIN at {at}, and at {:?} before",
                self.fin_at
            );
            assert!(
                self.received <= at,
                "{self}: FIN at {at}, behind it bytes to {}",
                self.received
            );
            self.fin_at = Some(at);
        }
        self.send_ack();
    }

    // ---- what it sends -----------------------------------------------------------------------------------------

    /// Sends what the window takes.
    fn transmit(&mut self, now: Timestamp) {
        if self.state != State::Open {
            return;
        }
        while self.next < self.queued.min(self.limit) {
            self.next += self.send_data(self.next);
        }
        if self.closing && self.next == self.queued {
            let (sequence, acknowledgment) = (self.sequence(self.next), self.acknowledgment());
            self.emit(FIN | ACK, sequence, acknowledgment, Vec::new());
            self.next += 1;
            self.closes_first |= self.next > self.sent && !self.has_fin();
        }
        self.sent = self.sent.max(self.next);
        self.highest = self.highest.max(self.next);
        let waits = self.next > self.acked || self.next < self.queued;
        if waits && self.timer.is_none() {
            self.timer = Some(now + self.timeout);
        }
    }

    /// Sends one packet of data from `offset` on, within the window. Returns its length.
    fn send_data(&mut self, offset: u64) -> u64 {
        let largest = (self.shape.largest as usize).max(self.segment_size) as u64;
        let largest = largest.min(65_535 - 60);
        let len = largest
            .min(self.queued.saturating_sub(offset))
            .min(self.limit.saturating_sub(offset));
        if len > 0 {
            self.send_bytes(offset, len);
        }
        len
    }

    fn send_bytes(&mut self, offset: u64, len: u64) {
        let mut payload = vec![0; len as usize];
        self.sends.fill(offset, &mut payload);
        let (sequence, acknowledgment) = (self.sequence(offset), self.acknowledgment());
        self.emit(ACK | PSH, sequence, acknowledgment, payload);
        self.highest = self.highest.max(offset + len);
    }

    /// Asks whether the window has opened (RFC 9293, section 3.8.6.1).
    fn probe(&mut self) {
        match self.shape.manner {
            Manner::Linux => self.keep_alive(),
            Manner::Bsd if self.acked < self.queued => self.send_bytes(self.acked, 1),
            Manner::Bsd => {}
        }
    }

    fn send_syn(&mut self) {
        let options = self.shape.options;
        let window = self.shape.buffer.min(65_535) as u16;
        self.offered = window.into();
        self.outbox.push(Segment {
            source: self.address,
            destination: self.target,
            flags: SYN,
            sequence: self.initial,
            acknowledgment: 0,
            window,
            options,
            payload: Vec::new(),
        });
    }

    fn send_ack(&mut self) {
        let (sequence, acknowledgment) = (self.sequence(self.sent), self.acknowledgment());
        self.emit(ACK, sequence, acknowledgment, Vec::new());
    }

    /// RFC 9293, section 3.10.7.1.
    fn send_reset_for(&mut self, segment: &Segment) {
        if segment.has(RST) {
            return;
        }
        if segment.has(ACK) {
            self.emit(RST, segment.acknowledgment, 0, Vec::new());
        } else {
            let end = segment.sequence.wrapping_add(segment.sequence_len());
            self.emit(RST | ACK, 0, end, Vec::new());
        }
    }

    fn emit(&mut self, flags: u8, sequence: u32, acknowledgment: u32, payload: Vec<u8>) {
        let shift = self.shape.options.window_scale.unwrap_or(0);
        let window = (self.window() >> shift).min(65_535);
        if flags & RST == 0 {
            let reach = self.received + (u64::from(window) << shift);
            self.offered = self.offered.max(reach);
        }
        self.outbox.push(Segment {
            source: self.address,
            destination: self.target,
            flags,
            sequence,
            acknowledgment,
            window: window as u16,
            options: Options::default(),
            payload,
        });
    }

    fn back_off(&mut self, now: Timestamp) {
        self.retries += 1;
        self.timeout = (self.timeout * 2).min(TIMEOUT_MAX);
        self.timer = Some(now + self.timeout);
    }

    fn finish(&mut self, end: End) {
        self.end = self.end.or(Some(end));
        self.state = State::Closed;
        self.timer = None;
    }

    // ---- numbers -----------------------------------------------------------------------------------------------

    fn sequence(&self, offset: u64) -> u32 {
        self.initial.wrapping_add(1).wrapping_add(offset as u32)
    }

    fn received_with_fin(&self) -> u64 {
        self.received + u64::from(self.has_fin())
    }

    fn acknowledgment(&self) -> u32 {
        self.peer_initial
            .wrapping_add(1)
            .wrapping_add(self.received_with_fin() as u32)
    }

    /// Bytes it can take behind what it has received.
    fn window(&self) -> u32 {
        self.shape
            .buffer
            .saturating_sub((self.received - self.consumed) as u32)
    }
}

impl fmt::Display for TcpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {} > {}", self.address, self.target)
    }
}
