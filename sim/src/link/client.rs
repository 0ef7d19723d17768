//! A client's connection over an imperfect path: it receives like Linux, and may send something itself.
//!
//! What it sends it repeats with a doubling timeout, or once after three duplicate acknowledgments, from the first byte
//! that is missing on: enough to bring an upload through, not a model of a good sender.

use std::net::SocketAddr;
use std::time::Duration;

use tungate_engine::Timestamp;
use tungate_engine::packet::TcpFlags;

use super::receiver::{Acknowledging, Receiver, Window};
use super::wire::{Header, Offer, stream};

const SYN_TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_millis(300);
const TIMEOUT_MAX: Duration = Duration::from_secs(10);
const TIME_WAIT: Duration = Duration::from_secs(60);
/// The most that it has on the way.
const IN_FLIGHT: u64 = 64 << 10;
/// Windows of up to 64 MB.
const SHIFT: u8 = 10;

/// What a client is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Manner {
    /// Largest payload of a segment for it, in bytes.
    pub segment_size: u16,
    /// Whether it reports what comes out of order.
    pub sack: bool,
    /// When it acknowledges.
    pub acknowledging: Acknowledging,
    /// How much it lets come.
    pub window: Window,
    /// What it sends.
    pub upload: Option<Upload>,
    /// It closes its direction behind what it sends, not only when the other side has closed.
    pub closes_first: bool,
    /// When it takes nothing.
    pub pause: Option<Pause>,
}

impl Default for Manner {
    /// Behind Ethernet, with SACK and a window of 60 MB; it sends nothing.
    fn default() -> Self {
        Self {
            segment_size: 1460,
            sack: true,
            acknowledging: Acknowledging::Linux,
            window: Window::Fixed(60_000_000),
            upload: None,
            closes_first: false,
            pause: None,
        }
    }
}

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upload {
    /// Bytes in all.
    pub bytes: u64,
    /// Bits per second at which they come to be.
    pub rate: u64,
}

/// A time in which a client says that it has no room; counted from its SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pause {
    /// When it begins.
    pub from: Duration,
    /// When it ends.
    pub until: Duration,
    /// The window is 0 at once, also for what is on its way (and taken); else it closes as it fills.
    pub shrinks: bool,
    /// The news that there is room is lost.
    pub is_update_lost: bool,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its SYN is not answered.
    Connecting,
    /// At least one direction is open.
    Open,
    /// Both sides have sent FIN and got everything.
    Finished,
    /// The other side has reset it.
    Reset,
}

/// One connection of a client.
#[derive(Debug, Clone)]
pub(super) struct Client {
    index: usize,
    address: SocketAddr,
    target: SocketAddr,
    manner: Manner,
    stage: Stage,
    began: Timestamp,
    initial: u32,
    peer_initial: u32,
    receiver: Receiver,
    /// The offset of the other side's FIN.
    fin_at: Option<u64>,
    finished_receiving: Option<Timestamp>,
    /// Offsets of what it sends; its FIN is the byte behind the last.
    acked: u64,
    sent: u64,
    edge: u64,
    peer_shift: u8,
    duplicates: u32,
    timeout: Duration,
    timer: Option<Timestamp>,
    is_paused: bool,
    /// Its FIN came before the other's.
    closed_first: bool,
    outbox: Vec<Header>,
}

impl Client {
    /// Starts connecting from `address` to `target`; the SYN is in the outbox. `index` is what its packets carry.
    pub(super) fn connect(
        index: usize,
        (address, target): (SocketAddr, SocketAddr),
        manner: Manner,
        initial: u32,
        now: Timestamp,
    ) -> Self {
        let mut client = Self {
            index,
            address,
            target,
            manner,
            stage: Stage::Connecting,
            began: now,
            initial,
            peer_initial: 0,
            receiver: Receiver::new(0, manner.acknowledging, manner.window, Duration::ZERO),
            fin_at: None,
            finished_receiving: None,
            acked: 0,
            sent: 0,
            edge: 0,
            peer_shift: 0,
            duplicates: 0,
            timeout: SYN_TIMEOUT,
            timer: Some(now + SYN_TIMEOUT),
            is_paused: false,
            closed_first: false,
            outbox: Vec::new(),
        };
        client.send_syn();
        client
    }

    /// Its own address, and the one it is connected to.
    pub(super) fn addresses(&self) -> (SocketAddr, SocketAddr) {
        (self.address, self.target)
    }

    /// How far it is.
    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    /// Bytes received in order.
    pub(super) fn received(&self) -> u64 {
        self.receiver.next() - u64::from(self.has_fin())
    }

    /// Segments received that brought nothing new.
    pub(super) fn duplicates(&self) -> u64 {
        self.receiver.duplicates()
    }

    /// When everything had been received, FIN included.
    pub(super) fn finished_receiving(&self) -> Option<Timestamp> {
        self.finished_receiving
    }

    /// Packets to send since the last call.
    pub(super) fn outbox(&mut self) -> std::vec::Drain<'_, Header> {
        self.outbox.drain(..)
    }

    /// When [`Client::handle_time`] is to be called.
    pub(super) fn next(&self) -> Option<Timestamp> {
        let is_open = self.stage == Stage::Open;
        let report = self.receiver.due().filter(|_| is_open);
        let pause = self.pause_change().filter(|_| is_open);
        [self.timer, report, pause, self.next_upload()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what is due.
    pub(super) fn handle_time(&mut self, now: Timestamp) {
        let is_due = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
        if is_due(self.timer) {
            match self.stage {
                Stage::Connecting => {
                    self.back_off(now);
                    self.send_syn();
                }
                Stage::Open => {
                    self.back_off(now);
                    self.sent = self.acked;
                    self.transmit(now, true);
                }
                Stage::Finished | Stage::Reset => self.timer = None, // the end of TIME-WAIT
            }
        }
        if self.stage != Stage::Open {
            return;
        }
        if is_due(self.pause_change()) {
            self.change_pause();
        }
        self.transmit(now, false);
        if is_due(self.receiver.due()) {
            self.acknowledge();
        }
    }

    /// Takes a segment.
    pub(super) fn handle(&mut self, now: Timestamp, segment: &Header) {
        match self.stage {
            Stage::Connecting => self.handle_while_connecting(now, segment),
            Stage::Open => self.handle_while_open(now, segment),
            Stage::Finished if self.timer.is_some() => {
                if segment.len > 0 || segment.flags.fin() {
                    self.acknowledge();
                }
            }
            Stage::Finished | Stage::Reset => {}
        }
    }

    fn handle_while_connecting(&mut self, now: Timestamp, segment: &Header) {
        if segment.flags.rst() {
            self.stage = Stage::Reset;
            self.timer = None;
            return;
        }
        let Some(offer) = segment.offer else { return };
        self.stage = Stage::Open;
        self.peer_initial = segment.sequence;
        self.peer_shift = offer.shift;
        self.edge = segment.window.into();
        self.timer = None;
        self.timeout = TIMEOUT;
        self.receiver = Receiver::new(
            self.manner.segment_size.into(),
            self.manner.acknowledging,
            self.manner.window,
            now.since(self.began),
        );
        self.acknowledge();
        self.transmit(now, false);
    }

    fn handle_while_open(&mut self, now: Timestamp, segment: &Header) {
        if segment.flags.rst() {
            self.stage = Stage::Reset;
            self.timer = None;
            return;
        }
        if segment.flags.syn() {
            return self.acknowledge();
        }
        self.handle_acknowledgment(now, segment);
        let ahead = segment
            .sequence
            .wrapping_sub(self.peer_sequence(self.receiver.next())) as i32;
        let Some(start) = self.receiver.next().checked_add_signed(ahead.into()) else {
            return self.acknowledge(); // a probe from before the first byte
        };
        let end = start + u64::from(segment.len) + u64::from(segment.flags.fin());
        if segment.flags.fin() {
            self.fin_at = Some(end - 1);
        }
        if self.receiver.reports_before(start, end) {
            self.acknowledge();
        }
        let must_report = self.receiver.take(now, start, end);
        if self.has_fin() && self.finished_receiving.is_none() {
            self.finished_receiving = Some(now);
        }
        let before = self.outbox.len();
        self.transmit(now, false);
        if self.outbox.len() == before && (must_report || (segment.flags.fin() && self.has_fin())) {
            self.acknowledge();
        }
        if self.has_fin() && self.acked > self.stream_len() {
            self.stage = Stage::Finished;
            self.timer = self.closed_first.then_some(now + TIME_WAIT);
        }
    }

    fn handle_acknowledgment(&mut self, now: Timestamp, segment: &Header) {
        let ahead = segment.acknowledgment.wrapping_sub(self.sequence(self.acked)) as i32;
        let acked = self.acked + u64::try_from(ahead).unwrap_or(0);
        self.edge = self
            .edge
            .max(acked + (u64::from(segment.window) << self.peer_shift));
        if ahead > 0 {
            self.acked = acked;
            self.sent = self.sent.max(acked);
            self.duplicates = 0;
            self.timeout = TIMEOUT;
            self.timer = (self.sent > self.acked).then_some(now + self.timeout);
        } else if ahead == 0 && segment.len == 0 && self.sent > self.acked {
            self.duplicates += 1;
            if self.duplicates == 3 {
                let sent = std::mem::replace(&mut self.sent, self.acked);
                self.send_segment(now);
                self.sent = self.sent.max(sent);
            }
        }
    }

    /// What a data segment of its own carries.
    pub(super) fn payload(&self, segment: &Header) -> &'static [u8] {
        let offset = segment.sequence.wrapping_sub(self.sequence(0));
        stream(u64::from(offset) + 997 * self.index as u64, segment.len.into())
    }

    /// Whether the other side's FIN has come, and everything before it.
    fn has_fin(&self) -> bool {
        self.fin_at.is_some_and(|at| at < self.receiver.next())
    }

    // ---- what it sends -----------------------------------------------------------------------------------------

    fn stream_len(&self) -> u64 {
        self.manner.upload.map_or(0, |upload| upload.bytes)
    }

    /// Up to which offset there is something to send by now.
    fn ready(&self, now: Timestamp) -> u64 {
        let len = self.stream_len();
        let ready = self.manner.upload.map_or(0, |upload| {
            let bits = now.since(self.began).as_nanos() * u128::from(upload.rate) / 1_000_000_000;
            u64::try_from(bits / 8).unwrap_or(u64::MAX).min(len)
        });
        ready + u64::from(ready == len && (self.manner.closes_first || self.has_fin()))
    }

    /// When there will be a next whole segment of an upload.
    fn next_upload(&self) -> Option<Timestamp> {
        let upload = self.manner.upload.filter(|_| self.stage == Stage::Open)?;
        let until = (self.sent + u64::from(self.manner.segment_size)).min(upload.bytes);
        (self.sent < upload.bytes && self.sent < self.acked + IN_FLIGHT && until <= self.edge).then(|| {
            let nanos = u128::from(until) * 8 * 1_000_000_000 / u128::from(upload.rate);
            self.began + Duration::from_nanos(nanos as u64 + 8_000_000_000 / upload.rate + 1)
        })
    }

    /// Sends whole segments that there is room for, and the last; with `force` at least one of whatever length.
    fn transmit(&mut self, now: Timestamp, mut force: bool) {
        loop {
            let ready = self.ready(now);
            let whole = self.sent + u64::from(self.manner.segment_size);
            let is_worth = ready > self.stream_len() || ready >= whole || ready == self.stream_len();
            let fits =
                self.sent < self.acked + IN_FLIGHT && (self.sent < self.edge || ready > self.stream_len());
            if self.sent >= ready || !(force || (is_worth && fits)) {
                return;
            }
            force = false;
            self.send_segment(now);
        }
    }

    /// Sends what follows at `sent`, and at least a byte or FIN.
    fn send_segment(&mut self, now: Timestamp) {
        let ready = self.ready(now);
        let data_end = ready.min(self.stream_len());
        let room = self.edge.saturating_sub(self.sent).max(1);
        let len = (data_end.saturating_sub(self.sent))
            .min(self.manner.segment_size.into())
            .min(room);
        let is_last = self.sent + len == self.stream_len() && ready > self.stream_len();
        if is_last && !self.has_fin() {
            self.closed_first = true;
        }
        self.emit(
            TcpFlags::ACK | if is_last { TcpFlags::FIN } else { 0 },
            len as u16,
        );
        self.sent += len + u64::from(is_last);
        self.timer = self.timer.or(Some(now + self.timeout));
    }

    fn back_off(&mut self, now: Timestamp) {
        self.timeout = (2 * self.timeout).min(TIMEOUT_MAX);
        self.timer = Some(now + self.timeout);
    }

    fn send_syn(&mut self) {
        let offer = Offer {
            segment_size: self.manner.segment_size,
            shift: SHIFT,
            sack: self.manner.sack,
        };
        self.outbox.push(Header {
            client: self.index,
            flags: TcpFlags(TcpFlags::SYN),
            sequence: self.initial,
            acknowledgment: 0,
            window: u16::MAX,
            len: 0,
            offer: Some(offer),
            blocks: [(0, 0); 4],
        });
    }

    fn acknowledge(&mut self) {
        self.emit(TcpFlags::ACK, 0);
    }

    /// Sends a segment at `sent`, with what the receiver has to report.
    fn emit(&mut self, flags: u8, len: u16) {
        let report = self.receiver.report();
        let mut blocks = [(0, 0); 4];
        if self.manner.sack {
            for (to, (start, end)) in blocks.iter_mut().zip(report.blocks()) {
                *to = (self.peer_sequence(*start), self.peer_sequence(*end));
            }
        }
        let shrinks = self.is_paused && self.manner.pause.is_some_and(|pause| pause.shrinks);
        let window = if shrinks { 0 } else { report.window >> SHIFT };
        self.outbox.push(Header {
            client: self.index,
            flags: TcpFlags(flags),
            sequence: self.sequence(self.sent),
            acknowledgment: self.peer_sequence(report.next),
            window: u16::try_from(window).unwrap_or(u16::MAX),
            len,
            offer: None,
            blocks,
        });
    }

    fn sequence(&self, offset: u64) -> u32 {
        self.initial.wrapping_add(1).wrapping_add(offset as u32)
    }

    fn peer_sequence(&self, offset: u64) -> u32 {
        self.peer_initial.wrapping_add(1).wrapping_add(offset as u32)
    }

    // ---- pauses ------------------------------------------------------------------------------------------------

    /// When the pause begins, or ends.
    fn pause_change(&self) -> Option<Timestamp> {
        let pause = self.manner.pause?;
        let change = if self.is_paused { pause.until } else { pause.from };
        Some(self.began + change)
    }

    fn change_pause(&mut self) {
        let Some(pause) = self.manner.pause else { return };
        self.is_paused = !self.is_paused;
        self.receiver.set_reading(!self.is_paused || pause.shrinks);
        if !self.is_paused {
            self.manner.pause = None;
            if !pause.is_update_lost {
                self.acknowledge();
            }
        }
    }
}
