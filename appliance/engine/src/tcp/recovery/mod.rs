//! Loss recovery and congestion control for the data that the engine sends to a client.
//!
//! ```text
//!  bytes queued ─▶ next_transmit ─▶ segments ─▶ client
//!                      ▲                          │
//!   congestion ─ window, pace                 ACK, SACK
//!      ▲               │                          │
//!      └── samples ─ scoreboard ◀── on_ack ◀──────┘
//!                      │
//!             RACK: what is overdue is lost;  TLP: a probe for the tail;  RTO: at last
//! ```
//!
//! [`Recovery`] holds no bytes, writes no packets and has no clock: it counts in offsets of the stream (64 bits, so that
//! nothing wraps) and is told the time. After every [`Recovery::on_ack`], every [`Recovery::on_timer`] and whenever there
//! is more to send, call [`Recovery::next_transmit`] until it gives nothing, and come back at [`Recovery::deadline`].
//! FIN is the byte behind the last one.
//!
//! What it follows: RFC 9293 (windows, probes), 2018 and 6675 (selective acknowledgments), 8985 (RACK-TLP), 6937
//! (proportional rate reduction), 6298 (retransmission timeout), 5682 (F-RTO), 2883 and 3708 (duplicate reports and what
//! they undo), 6928 (initial window), 5681 (idle restart), 6582 (NewReno, for clients without selective
//! acknowledgments), 5961 (acceptable acknowledgments). Left out: timestamps and ECN, which the handshake does not offer.

pub mod congestion;
mod prr;
mod rack;
mod rtt;
mod scoreboard;

use std::time::Duration;

pub use self::congestion::CongestionControl;
use self::congestion::{Congestion, Delivery, Sample};
use self::prr::RateReduction;
use self::rack::{Rack, Tolerance, Transmission};
use self::rtt::RoundTrip;
use self::scoreboard::{Piece, Scoreboard};
use crate::time::Timestamp;

/// Selective acknowledgments are rounded to borders at least this far apart, whatever the segment size: what RFC 9293
/// (section 3.7.1) takes for the least.
const SACK_UNIT_MIN: u32 = 536;

/// Duplicate ACKs that make a loss where there are no selective ones (RFC 5681, section 3.2).
const DUPLICATE_ACKS: u32 = 3;

/// What a receiver may delay the ACK of a lone segment by (RFC 8985, section 7.2).
const ACK_DELAY_MAX: Duration = Duration::from_millis(200);

/// A probe timeout before there is a round-trip time (RFC 8985, section 7.2).
const PROBE_TIMEOUT_INITIAL: Duration = Duration::from_secs(1);

/// The least of it: timers are not more exact, and a busy client is not faster.
const PROBE_TIMEOUT_MIN: Duration = Duration::from_millis(10);

/// Zero-window probes are at most this far apart (RFC 9293, section 3.8.6.1 wants back-off).
const WINDOW_PROBE_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// A paced sender that is late may catch up on this much.
const PACING_CREDIT: Duration = Duration::from_millis(1);

/// A paced packet takes about this long at the pacing rate, and is of two segments at least.
const PACING_QUANTUM: Duration = Duration::from_micros(250);

/// Whoever is nearer gets super-packets as soon as the window has room: timers are no finer than such a path's round
/// trip, and its queues are those of hosts, which hold a window. Linux, too, makes packets larger there than its pace
/// asks for (`tcp_tso_rtt_log`).
const NEAR: Duration = Duration::from_millis(1);

/// What a sender starts from.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Payload bytes per packet on the wire, at least 1.
    pub segment_size: u16,
    /// The largest payload to hand out at once, in bytes; whole segments of it are used. The segment size, where there
    /// are no super-packets.
    pub packet_limit: u32,
    /// The client's window, in bytes.
    pub window: u64,
    /// Both sides have permitted selective acknowledgments.
    pub selective: bool,
    /// From the SYN-ACK to its ACK; `None` if it was sent more than once.
    pub handshake_rtt: Option<Duration>,
    /// The congestion control.
    pub congestion: CongestionControl,
}

/// What an ACK says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// One past the last byte the client has in order. FIN counts as the byte behind the last.
    pub acknowledged: u64,
    /// Bytes that it takes from there on.
    pub window: u64,
    /// The sequence number of the segment that says so, which tells newer windows from older ones.
    pub sequence: u32,
    /// The segment takes sequence space itself: it is no duplicate ACK.
    pub carries_data: bool,
}

/// Bytes that the client has out of order, or twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The first of them.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Something to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmit {
    /// Bytes `start..end`, in segments cut from `start` on; the last may be shorter. It counts as sent.
    Data {
        /// The first of them.
        start: u64,
        /// One past the last.
        end: u64,
        /// They have been sent before.
        retransmission: bool,
    },
    /// A segment without data that the client must answer: its sequence number is one below what the client expects.
    WindowProbe {
        /// What the client expects, less 1. Wraps at offset 0.
        at: u64,
    },
}

/// An ACK that is to be answered by an ACK and otherwise ignored: of what was never sent, or too old (RFC 5961,
/// section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("acknowledges what was never sent or long ago")]
pub struct Unacceptable;

/// What a sender has done so far, and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Bytes sent again.
    pub retransmitted: u64,
    /// Packets (super-packets are one) sent again.
    pub retransmissions: u64,
    /// Retransmission timeouts.
    pub timeouts: u64,
    /// Probes for a lost tail.
    pub tail_probes: u64,
    /// Zero-window probes.
    pub window_probes: u64,
    /// Bytes that the client has reported twice.
    pub duplicates: u64,
    /// Recoveries found to be needless.
    pub undone: u64,
    /// What may be in flight, in bytes.
    pub window: u64,
    /// What is, in bytes.
    pub in_flight: u64,
    /// The smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Bytes a second, if paced.
    pub pacing_rate: Option<u64>,
}

/// Where the sender stands towards losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Repairing what was lost; until `until`, SND.NXT when it began, is acknowledged.
    Recovery {
        until: u64,
    },
    /// After a timeout; likewise.
    Timeout {
        until: u64,
        check: Check,
    },
}

/// F-RTO's progress (RFC 5682, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// The ACK of the retransmission is awaited.
    First,
    /// It has come and acknowledged part of the rest; new data is sent to see what comes next.
    Second {
        /// How much new data may still be sent.
        budget: u64,
    },
    /// Settled.
    Done,
}

/// The latest tail loss probe (RFC 8985, section 7).
#[derive(Debug, Clone, Copy)]
struct TailProbe {
    /// SND.NXT behind it.
    end: u64,
    retransmission: bool,
}

/// How a reduction of the window may turn out to be needless (RFC 3708): all retransmissions arrive twice.
#[derive(Debug, Clone, Copy)]
struct Undo {
    /// SND.UNA when it was made.
    from: u64,
    /// Bytes retransmitted since, less those reported twice.
    outstanding: u64,
    any: bool,
}

/// The client's window (RFC 9293, section 3.10.7.4).
#[derive(Debug, Clone, Copy)]
struct Window {
    /// One past the last byte it takes.
    edge: u64,
    /// SND.WND as last said.
    size: u64,
    largest: u64,
    /// SND.WL1 and SND.WL2.
    update: Option<(u32, u64)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Timers {
    /// RACK's: something becomes overdue.
    reorder: Option<Timestamp>,
    probe: Option<Timestamp>,
    timeout: Option<Timestamp>,
    /// The window is closed.
    persist: Option<Timestamp>,
    pace: Option<Timestamp>,
}

/// The sender of one connection.
#[derive(Debug)]
pub struct Recovery {
    segment: u32,
    packet_limit: u32,
    selective: bool,
    /// Where nothing is lost there is no tail to probe for.
    probes_tail: bool,
    board: Scoreboard,
    rack: Rack,
    round_trip: RoundTrip,
    congestion: Box<dyn Congestion>,
    window: Window,
    phase: Phase,
    reduction: Option<RateReduction>,
    undo: Option<Undo>,
    tail_probe: Option<TailProbe>,
    tail_probe_due: bool,
    /// A probe of a window that is closed is to be sent, or bytes into one that is small.
    window_probe_due: bool,
    window_probes_unanswered: u32,
    /// A timeout lets one retransmission out, whatever the window.
    timeout_due: bool,
    duplicate_acks: u32,
    /// Bytes that duplicate ACKs have counted as delivered, where there are no selective ones.
    assumed: u64,
    timers: Timers,
    /// The highest offset that there was anything to send for.
    queued: u64,
    is_window_limited: bool,
    last_sent: Timestamp,
    /// Bytes delivered in all, and when the last were.
    delivered: u64,
    delivered_at: Timestamp,
    first_sent_at: Timestamp,
    lost: u64,
    /// Samples are the application's doing until so much is delivered.
    application_limited_until: u64,
    /// The most recent transmission that a timeout has not touched.
    timeout_transmission: u64,
    paced_until: Timestamp,
    statistics: Statistics,
}

/// What an ACK is found to deliver.
#[derive(Default)]
struct Delivered {
    bytes: u64,
    /// The most recent transmission among it.
    newest: Option<(u64, Transmission)>,
    /// The most recent one that was sent once.
    rtt: Option<(u64, Duration)>,
    /// Something that was sent once, before the last timeout.
    is_original: bool,
}

impl Recovery {
    /// A sender that begins at offset 0.
    pub fn new(setup: &Setup, now: Timestamp) -> Self {
        let segment = u32::from(setup.segment_size.max(1));
        Self {
            segment,
            packet_limit: setup.packet_limit.max(segment),
            selective: setup.selective,
            probes_tail: setup.congestion != CongestionControl::None,
            board: Scoreboard::new(sack_unit(segment)),
            rack: Rack::default(),
            round_trip: RoundTrip::new(setup.handshake_rtt, now),
            congestion: setup.congestion.start(segment, now),
            window: Window {
                edge: setup.window,
                size: setup.window,
                largest: setup.window,
                update: None,
            },
            phase: Phase::Open,
            reduction: None,
            undo: None,
            tail_probe: None,
            tail_probe_due: false,
            window_probe_due: false,
            window_probes_unanswered: 0,
            timeout_due: false,
            duplicate_acks: 0,
            assumed: 0,
            timers: Timers::default(),
            queued: 0,
            is_window_limited: false,
            last_sent: now,
            delivered: 0,
            delivered_at: now,
            first_sent_at: now,
            lost: 0,
            application_limited_until: 0,
            timeout_transmission: 0,
            paced_until: now,
            statistics: Statistics::default(),
        }
    }

    /// One past the last byte acknowledged: SND.UNA.
    pub fn acknowledged(&self) -> u64 {
        self.board.acknowledged()
    }

    /// One past the last byte sent: SND.NXT.
    pub fn sent(&self) -> u64 {
        self.board.sent()
    }

    /// When to call [`Recovery::on_timer`], once [`Recovery::next_transmit`] has nothing to give.
    pub fn deadline(&self) -> Option<Timestamp> {
        let Timers {
            reorder,
            probe,
            timeout,
            persist,
            pace,
        } = self.timers;
        let sooner = earlier(persist, pace);
        if self.is_clear() {
            return sooner; // what the others wait for is on its way
        }
        earlier(sooner, earlier(earlier(reorder, probe), timeout))
    }

    /// Whether the path is so short that it is not paced.
    pub fn is_near(&self) -> bool {
        self.round_trip.minimum().is_some_and(|rtt| rtt < NEAR)
    }

    /// What may be in flight, in bytes.
    pub fn window(&self) -> u64 {
        self.send_window()
    }

    /// Whether [`Recovery::next_transmit`] may have something to give, without asking it; not exact.
    pub fn may_transmit(&self, queued_end: u64) -> bool {
        let has_room = self.in_flight() < self.send_window();
        let sent = self.board.sent();
        self.tail_probe_due
            || self.window_probe_due
            || self.timeout_due
            || (has_room && (self.board.lost() > 0 || (queued_end > sent && self.window.edge > sent)))
    }

    /// What has been done so far.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            window: self.send_window(),
            in_flight: self.board.in_flight(),
            rtt: self.round_trip.smoothed(),
            pacing_rate: self.congestion.pacing_rate(),
            ..self.statistics
        }
    }

    /// The path takes segments of `bytes` now, packets of at most `packet_limit`. What is in flight stays as it is.
    pub fn set_segment_size(&mut self, bytes: u16, packet_limit: u32) {
        self.segment = u32::from(bytes.max(1));
        self.packet_limit = packet_limit.max(self.segment);
        self.board.set_unit(sack_unit(self.segment));
        self.congestion.set_segment_size(self.segment);
    }

    // ---- from the client ---------------------------------------------------------------------------------------

    /// Takes an ACK with its selective acknowledgments in the order in which the segment has them. Returns how many
    /// bytes need not be kept any more.
    ///
    /// # Errors
    ///
    /// [`Unacceptable`]: nothing has changed.
    pub fn on_ack(&mut self, now: Timestamp, ack: &Ack, blocks: &[Block]) -> Result<u64, Unacceptable> {
        let before = self.board.acknowledged();
        if ack.acknowledged > self.board.sent() || ack.acknowledged + self.window.largest < before {
            return Err(Unacceptable);
        }
        let window_changed = self.update_window(ack);
        // A client that sends says so with every segment: nothing was on its way, and nothing is.
        if self.is_clear() && blocks.is_empty() && self.phase == Phase::Open && self.tail_probe.is_none() {
            return Ok(0);
        }
        let in_flight_before = self.in_flight();
        let mut delivered = Delivered::default();
        let freed = ack.acknowledged.saturating_sub(before);
        if freed > 0 {
            self.deliver(now, &mut delivered, |board, take| {
                board.acknowledge(ack.acknowledged, take)
            });
            self.round_trip.forget_backoff();
            self.rack.on_acknowledged(ack.acknowledged);
        }
        if self.selective {
            for block in blocks {
                self.deliver(now, &mut delivered, |board, take| {
                    board.sack(block.start, block.end, take)
                });
            }
        } else {
            self.count_duplicate_ack(ack, freed, window_changed, &mut delivered);
        }
        let mut duplicates = 0;
        if self.selective
            && let [first, rest @ ..] = blocks
        {
            let is_duplicate = first.end <= ack.acknowledged.max(before)
                || rest
                    .first()
                    .is_some_and(|second| second.start <= first.start && first.end <= second.end);
            if is_duplicate {
                duplicates = self.on_duplicate(first);
            }
        }
        if let Some((_, rtt)) = delivered.rtt {
            self.round_trip.take_sample(rtt, now);
        }
        self.delivered += delivered.bytes;
        if delivered.bytes > 0 {
            self.delivered_at = now;
        }
        let lost = self.detect(now, freed);
        self.lost += lost;
        self.settle_tail_probe(now, ack, blocks, duplicates, freed);
        self.settle_phase(now, in_flight_before, lost, freed, duplicates, &delivered);
        if delivered.bytes > 0 || lost > 0 {
            self.tell_congestion(now, in_flight_before, lost, freed, &delivered);
            if let Some(target) = self.congestion.recovery_target()
                && let Some(reduction) = &mut self.reduction
            {
                let in_flight = self.board.in_flight().saturating_sub(self.assumed);
                let segment = u64::from(self.segment);
                reduction.on_ack(
                    delivered.bytes,
                    in_flight,
                    target,
                    segment,
                    freed > 0 && lost == 0,
                );
            }
        }
        self.set_timers(now, delivered.bytes > 0 || freed > 0);
        self.check();
        Ok(freed)
    }

    /// Takes the window if the segment is not older than the one that it was last taken from (RFC 9293, section
    /// 3.10.7.4). Returns whether it is another one.
    fn update_window(&mut self, ack: &Ack) -> bool {
        let acknowledged = self.board.acknowledged();
        let is_newer = ack.acknowledged > acknowledged
            || ack.acknowledged == acknowledged
                && self.window.update.is_none_or(|(sequence, acknowledged)| {
                    let ahead = ack.sequence.wrapping_sub(sequence) as i32;
                    ahead > 0 || (ahead == 0 && acknowledged <= ack.acknowledged)
                });
        if !is_newer {
            return false;
        }
        let changed = self.window.size != ack.window;
        self.window = Window {
            edge: ack.acknowledged + ack.window,
            size: ack.window,
            largest: self.window.largest.max(ack.window),
            update: Some((ack.sequence, ack.acknowledged)),
        };
        if changed {
            self.window_probes_unanswered = 0;
        }
        changed
    }

    /// Lets `apply` change the scoreboard and notes what it finds delivered.
    fn deliver(
        &mut self,
        now: Timestamp,
        delivered: &mut Delivered,
        apply: impl FnOnce(&mut Scoreboard, &mut dyn FnMut(Piece)),
    ) {
        let Self {
            board,
            rack,
            round_trip,
            timeout_transmission,
            ..
        } = self;
        let minimum = round_trip.minimum();
        apply(board, &mut |piece| {
            delivered.bytes += piece.len;
            delivered.is_original |= !piece.retransmitted && piece.transmission < *timeout_transmission;
            let Some(&transmission) = rack.get(piece.transmission) else {
                return;
            };
            let rtt = now.since(transmission.sent_at);
            rack.on_delivered(&piece, rtt, minimum);
            if !piece.retransmitted
                && delivered
                    .rtt
                    .is_none_or(|(newest, _)| newest <= piece.transmission)
            {
                delivered.rtt = Some((piece.transmission, rtt));
            }
            if delivered
                .newest
                .is_none_or(|(newest, _)| newest < piece.transmission)
            {
                delivered.newest = Some((piece.transmission, transmission));
            }
        });
    }

    /// The client has got bytes twice (RFC 2883). Returns how many.
    fn on_duplicate(&mut self, block: &Block) -> u64 {
        let len = block.end.saturating_sub(block.start);
        let is_sound = len > 0
            && block.end <= self.board.sent()
            && len <= self.window.largest
            && (block.end <= self.board.acknowledged() || self.board.is_sacked(block.start, block.end));
        if !is_sound {
            return 0;
        }
        self.statistics.duplicates += len;
        let is_of_probe = self
            .tail_probe
            .is_some_and(|probe| probe.retransmission && probe.end == block.end);
        if !is_of_probe {
            self.rack.on_duplicate_report(self.board.sent());
        }
        if let Some(undo) = &mut self.undo
            && block.start >= undo.from
        {
            undo.outstanding = undo.outstanding.saturating_sub(len);
        }
        len
    }

    /// Without selective acknowledgments, each duplicate ACK stands for a segment that has left the network (RFC 5681,
    /// section 3.2).
    fn count_duplicate_ack(
        &mut self,
        ack: &Ack,
        freed: u64,
        window_changed: bool,
        delivered: &mut Delivered,
    ) {
        let segment = u64::from(self.segment);
        if freed > 0 {
            self.duplicate_acks = 0;
            let known = self.assumed.min(freed.saturating_sub(segment));
            self.assumed -= known;
            delivered.bytes -= known.min(delivered.bytes);
            if self.phase == Phase::Open {
                self.assumed = 0;
            }
            return;
        }
        let is_duplicate = ack.acknowledged == self.board.acknowledged()
            && !ack.carries_data
            && !window_changed
            && self.board.in_flight() > 0;
        if is_duplicate {
            self.duplicate_acks += 1;
            if self.assumed + segment <= self.board.in_flight() {
                self.assumed += segment;
                delivered.bytes += segment;
            }
        }
    }

    /// Finds losses. Returns how many bytes.
    fn detect(&mut self, now: Timestamp, freed: u64) -> u64 {
        if self.selective {
            let tolerance = self.tolerance();
            let found = self.rack.detect(now, &mut self.board, &tolerance);
            self.timers.reorder = found.again_at;
            return found.lost;
        }
        self.rack.retire(&self.board);
        let is_hole = match self.phase {
            Phase::Open => self.duplicate_acks == DUPLICATE_ACKS,
            // A partial ACK shows the next hole (RFC 6582, section 3.2).
            Phase::Recovery { until } => freed > 0 && self.board.acknowledged() < until,
            Phase::Timeout { .. } => false,
        };
        let lost = if is_hole {
            self.board.mark_head_lost(u64::from(self.segment))
        } else {
            0
        };
        self.assumed = self.assumed.min(self.board.in_flight());
        lost
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance {
            minimum: self.round_trip.minimum(),
            smoothed: self.round_trip.smoothed(),
            in_recovery: self.phase != Phase::Open,
            sacked_segments: self.board.sacked() / u64::from(self.segment),
        }
    }

    /// Finds out what the latest tail loss probe has done (RFC 8985, section 7.4.2).
    fn settle_tail_probe(
        &mut self,
        now: Timestamp,
        ack: &Ack,
        blocks: &[Block],
        duplicates: u64,
        freed: u64,
    ) {
        let Some(probe) = self.tail_probe else { return };
        if ack.acknowledged < probe.end {
            return;
        }
        let was_needless = !probe.retransmission
            || (duplicates > 0 && blocks[0].end == probe.end)
            || (ack.acknowledged == probe.end && freed == 0 && blocks.is_empty());
        if was_needless {
            self.tail_probe = None;
        } else if ack.acknowledged > probe.end {
            // It has repaired a loss that nothing else has told of.
            self.tail_probe = None;
            if self.phase == Phase::Open {
                self.congestion.on_congestion(now, self.board.in_flight());
                self.congestion.on_recovered(now, false);
            }
        }
    }

    fn settle_phase(
        &mut self,
        now: Timestamp,
        in_flight_before: u64,
        losses: u64,
        freed: u64,
        duplicates: u64,
        delivered: &Delivered,
    ) {
        if duplicates > 0 && self.undo.is_some_and(|undo| undo.any && undo.outstanding == 0) {
            self.undo_reduction(now);
        }
        let acknowledged = self.board.acknowledged();
        match self.phase {
            Phase::Open => {}
            Phase::Recovery { until } => {
                if acknowledged >= until {
                    self.leave_recovery(now, false);
                }
            }
            Phase::Timeout { until, .. } if acknowledged >= until => self.leave_recovery(now, true),
            Phase::Timeout { until, check } => {
                let check = match check {
                    Check::First if freed > 0 => Check::Second {
                        budget: 2 * u64::from(self.segment),
                    },
                    // Selective ones may still be of what was sent before; else it is the end of it (section 2.1).
                    Check::First if self.selective => Check::First,
                    Check::Second { .. } if delivered.is_original => {
                        self.undo_reduction(now);
                        return;
                    }
                    Check::Second { budget } if freed == 0 && delivered.bytes == 0 => {
                        Check::Second { budget }
                    }
                    Check::First | Check::Second { .. } | Check::Done => Check::Done,
                };
                self.phase = Phase::Timeout { until, check };
            }
        }
        if self.phase == Phase::Open && (losses > 0 || self.board.lost() > 0) {
            self.enter_recovery(now, in_flight_before);
        }
    }

    /// Begins to repair, with `flight` bytes in flight before anything was found lost.
    fn enter_recovery(&mut self, now: Timestamp, flight: u64) {
        self.phase = Phase::Recovery {
            until: self.board.sent(),
        };
        self.congestion.on_congestion(now, flight);
        self.reduction = self
            .congestion
            .recovery_target()
            .map(|_| RateReduction::new(flight));
        self.undo = Some(Undo {
            from: self.board.acknowledged(),
            outstanding: 0,
            any: false,
        });
        self.tail_probe = None;
        self.tail_probe_due = false;
        self.timers.probe = None;
    }

    fn leave_recovery(&mut self, now: Timestamp, after_timeout: bool) {
        self.phase = Phase::Open;
        self.reduction = None;
        self.duplicate_acks = 0;
        self.assumed = 0;
        self.rack.on_recovered();
        self.congestion.on_recovered(now, after_timeout);
    }

    /// What the sender reacted to was no loss: everything is as before.
    fn undo_reduction(&mut self, now: Timestamp) {
        self.statistics.undone += 1;
        self.phase = Phase::Open;
        self.reduction = None;
        self.undo = None;
        self.congestion.undo(now);
        let number = self.rack.next_number();
        if let Some((start, end)) = self.board.restore_lost(number) {
            let transmission = self.transmission(now, start, end);
            self.rack.push(transmission);
        }
    }

    fn tell_congestion(
        &mut self,
        now: Timestamp,
        in_flight_before: u64,
        lost: u64,
        freed: u64,
        delivered: &Delivered,
    ) {
        if self.application_limited_until < self.delivered {
            self.application_limited_until = 0;
        }
        let delivery = delivered.newest.and_then(|(_, transmission)| {
            self.first_sent_at = transmission.sent_at;
            let sending = transmission.sent_at.since(transmission.first_sent_at);
            let interval = sending.max(now.since(transmission.delivered_at));
            let is_plausible = self
                .round_trip
                .minimum()
                .is_some_and(|minimum| interval >= minimum);
            is_plausible.then_some(Delivery {
                delivered: self.delivered - transmission.delivered,
                interval,
                prior_delivered: transmission.delivered,
                lost: self.lost - transmission.lost,
                in_flight: transmission.in_flight,
                is_application_limited: transmission.application_limited,
            })
        });
        self.congestion.on_ack(&Sample {
            now,
            rtt: delivered.rtt.map(|(_, rtt)| rtt),
            rtt_minimum: self.round_trip.minimum(),
            rtt_smoothed: self.round_trip.smoothed(),
            delivered: delivered.bytes,
            is_cumulative: freed > 0,
            lost,
            in_flight_before,
            in_flight: self.in_flight(),
            acknowledged: self.board.acknowledged(),
            sent: self.board.sent(),
            delivered_total: self.delivered,
            is_window_limited: self.is_window_limited,
            in_recovery: matches!(self.phase, Phase::Recovery { .. }),
            delivery,
        });
    }

    // ---- timers ------------------------------------------------------------------------------------------------

    /// After an ACK or a timer: what is waited for. `progress`: the client has told something new.
    fn set_timers(&mut self, now: Timestamp, progress: bool) {
        if self.is_clear() {
            self.timers.timeout = None;
            self.timers.probe = None;
            self.timers.reorder = None;
            self.tail_probe_due = false;
            return;
        }
        if progress {
            self.timers.timeout = Some(now + self.round_trip.timeout());
        }
        if !self.may_probe_tail() {
            self.timers.probe = None;
            self.tail_probe_due = false;
        } else if progress {
            self.set_probe_timer(now);
        }
    }

    /// RFC 8985, section 7.2.
    fn may_probe_tail(&self) -> bool {
        self.selective
            && self.probes_tail
            && self.phase == Phase::Open
            && self.tail_probe.is_none()
            && self.board.sacked() == 0
            && self.board.in_flight() > 0
    }

    fn set_probe_timer(&mut self, now: Timestamp) {
        let after = match self.round_trip.smoothed() {
            None => PROBE_TIMEOUT_INITIAL,
            Some(smoothed) if self.board.in_flight() <= u64::from(self.segment) => {
                2 * smoothed + ACK_DELAY_MAX
            }
            Some(smoothed) => 2 * smoothed + PROBE_TIMEOUT_MIN,
        };
        let at = now + after;
        self.timers.probe = Some(self.timers.timeout.map_or(at, |timeout| at.min(timeout)));
    }

    /// Does what has become due; harmless when early. [`Recovery::next_transmit`] may have something afterwards.
    pub fn on_timer(&mut self, now: Timestamp) {
        let is_due = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
        if is_due(self.timers.reorder) {
            self.timers.reorder = None;
            let in_flight_before = self.in_flight();
            let lost = self.detect(now, 0);
            self.lost += lost;
            if lost > 0 {
                let delivered = Delivered::default();
                self.settle_phase(now, in_flight_before, lost, 0, 0, &delivered);
                self.tell_congestion(now, in_flight_before, lost, 0, &delivered);
                if let Some(target) = self.congestion.recovery_target()
                    && let Some(reduction) = &mut self.reduction
                {
                    reduction.on_ack(0, self.board.in_flight(), target, u64::from(self.segment), false);
                }
                self.set_timers(now, false);
            }
        }
        if is_due(self.timers.probe) {
            self.timers.probe = None;
            if self.may_probe_tail() {
                self.tail_probe_due = true;
                self.timers.timeout = Some(now + self.round_trip.timeout());
            }
        }
        if is_due(self.timers.persist) {
            self.timers.persist = None;
            self.window_probe_due = true;
        }
        if is_due(self.timers.timeout) {
            self.on_timeout(now);
        }
        self.check();
    }

    /// RFC 6298, section 5.
    fn on_timeout(&mut self, now: Timestamp) {
        self.statistics.timeouts += 1;
        let outstanding = self.in_flight();
        let mut lost;
        if self.board.is_reneged() {
            // RFC 2018, section 8: what was said of this data is not true any more.
            lost = self.board.mark_all_lost(true);
            self.rack.forget_all();
        } else if self.selective {
            let tolerance = self.tolerance();
            lost = self.rack.mark_overdue(now, &mut self.board, &tolerance);
            lost += self.board.mark_head_lost(u64::from(self.segment));
        } else {
            lost = self.board.mark_all_lost(false);
            self.rack.forget_all();
            self.duplicate_acks = 0;
            self.assumed = 0;
        }
        self.lost += lost;
        let until = self.board.sent();
        let (check, repeated) = match self.phase {
            Phase::Open => (Check::First, false),
            Phase::Recovery { .. } => (Check::Done, false),
            Phase::Timeout {
                check: Check::Done, ..
            } => (Check::Done, true),
            Phase::Timeout { .. } => (Check::First, true),
        };
        if !repeated {
            self.timeout_transmission = self.rack.next_number();
            self.undo = Some(Undo {
                from: self.board.acknowledged(),
                outstanding: 0,
                any: false,
            });
        }
        self.congestion
            .on_timeout(now, outstanding, self.board.in_flight(), repeated);
        self.phase = Phase::Timeout { until, check };
        self.reduction = None;
        self.tail_probe = None;
        self.tail_probe_due = false;
        self.round_trip.back_off();
        self.timeout_due = true;
        self.paced_until = now;
        self.timers.probe = None;
        self.timers.reorder = None;
        self.timers.timeout = Some(now + self.round_trip.timeout());
    }

    // ---- to the client -----------------------------------------------------------------------------------------

    /// What to send next, where there are bytes up to `queued_end` to send. What it returns counts as sent at `now`.
    pub fn next_transmit(&mut self, now: Timestamp, queued_end: u64) -> Option<Transmit> {
        debug_assert!(queued_end >= self.board.sent());
        self.queued = queued_end;
        self.timers.pace = None;
        if queued_end == self.board.sent()
            && self.is_clear()
            && self.phase == Phase::Open
            && !self.tail_probe_due
        {
            self.rest();
            self.limit_by_application();
            return None;
        }
        if std::mem::take(&mut self.tail_probe_due)
            && let Some(probe) = self.probe_tail(now)
        {
            return Some(probe);
        }
        let pacing_rate = self.pacing_rate();
        if pacing_rate.is_some()
            && self.paced_until > now
            && (self.board.lost() > 0 || queued_end > self.board.sent())
        {
            self.timers.pace = Some(self.paced_until);
            return None;
        }
        let has_bytes = self.board.lost() > 0 || queued_end > self.board.sent();
        let most = if has_bytes {
            self.packet_size(pacing_rate)
        } else {
            0
        };
        let is_checking = matches!(
            self.phase,
            Phase::Timeout {
                check: Check::Second { .. },
                ..
            }
        );
        if is_checking && let Some(sent) = self.send_to_check(now) {
            return sent;
        }
        if self.board.lost() > 0 {
            return self.send_lost(now, most);
        }
        self.send_new(now, most)
    }

    /// Bytes per second, where what is sent is paced.
    fn pacing_rate(&self) -> Option<u64> {
        self.congestion.pacing_rate().filter(|_| !self.is_near())
    }

    /// What one packet may carry: whole segments.
    fn packet_size(&self, pacing_rate: Option<u64>) -> u64 {
        let segment = u64::from(self.segment);
        let limit = u64::from(self.packet_limit) / segment * segment;
        match pacing_rate {
            None => limit,
            Some(rate) => {
                let quantum = bytes_in(rate, PACING_QUANTUM) / segment * segment;
                quantum.clamp((2 * segment).min(limit), limit)
            }
        }
    }

    /// Whether all that was sent is acknowledged.
    fn is_clear(&self) -> bool {
        self.board.acknowledged() == self.board.sent()
    }

    fn in_flight(&self) -> u64 {
        self.board.in_flight() - self.assumed
    }

    /// What may be in flight.
    fn send_window(&self) -> u64 {
        match &self.reduction {
            Some(reduction) => reduction.window(),
            None => self.congestion.window(),
        }
    }

    /// RFC 8985, section 7.3: new data if there is any that the client takes, else the last segment again.
    fn probe_tail(&mut self, now: Timestamp) -> Option<Transmit> {
        let segment = u64::from(self.segment);
        let sent = self.board.sent();
        let new = (self.queued - sent)
            .min(self.window.edge.saturating_sub(sent))
            .min(segment);
        let probe = if new > 0 && !self.board.is_full() {
            self.append(now, sent + new)
        } else {
            let number = self.rack.next_number();
            let (start, end) = self.board.retransmit_tail(segment, number)?;
            let transmission = self.transmission(now, start, end);
            self.rack.push(transmission);
            self.on_sent(now, start, end, true)
        };
        self.statistics.tail_probes += 1;
        self.tail_probe = Some(TailProbe {
            end: self.board.sent(),
            retransmission: new == 0,
        });
        self.timers.probe = None;
        Some(probe)
    }

    /// F-RTO's second step (RFC 5682, section 2.1): up to two segments of new data. `None`: there are none, so it is
    /// given up.
    fn send_to_check(&mut self, now: Timestamp) -> Option<Option<Transmit>> {
        let Phase::Timeout {
            until,
            check: Check::Second { budget },
        } = self.phase
        else {
            return None;
        };
        if budget == 0 {
            return Some(None);
        }
        let sent = self.board.sent();
        let segment = u64::from(self.segment);
        let new = (self.queued - sent)
            .min(self.window.edge.saturating_sub(sent))
            .min(segment);
        let is_first = budget == 2 * segment;
        if new == 0 || self.board.is_full() {
            if is_first {
                self.phase = Phase::Timeout {
                    until,
                    check: Check::Done,
                };
                return None;
            }
            return Some(None);
        }
        let budget = budget.saturating_sub(segment);
        self.phase = Phase::Timeout {
            until,
            check: Check::Second { budget },
        };
        Some(Some(self.append(now, sent + new)))
    }

    fn send_lost(&mut self, now: Timestamp, most: u64) -> Option<Transmit> {
        let segment = u64::from(self.segment);
        let start = self.board.first_lost()?;
        let by_timeout = std::mem::take(&mut self.timeout_due);
        let room = self.send_window().saturating_sub(self.in_flight()) / segment * segment;
        let taken = self.window.edge.saturating_sub(start);
        let allowed = if by_timeout {
            segment
        } else if room == 0 {
            self.is_window_limited = true;
            return None;
        } else if taken == 0 {
            return None;
        } else {
            room.min(most).min(taken.max(segment))
        };
        let number = self.rack.next_number();
        let (start, end) = self.board.retransmit(allowed, number)?;
        let transmission = self.transmission(now, start, end);
        self.rack.push(transmission);
        if let Some(undo) = &mut self.undo {
            undo.outstanding += end - start;
            undo.any = true;
        }
        Some(self.on_sent(now, start, end, true))
    }

    fn send_new(&mut self, now: Timestamp, most: u64) -> Option<Transmit> {
        self.timeout_due = false;
        let segment = u64::from(self.segment);
        let sent = self.board.sent();
        let is_clear = self.is_clear();
        let available = self.queued - sent;
        if available == 0 {
            self.rest();
            if self.in_flight() < self.send_window() {
                self.limit_by_application();
            }
            return None;
        }
        if self.board.is_full() {
            return None;
        }
        if is_clear && sent > 0 && now.since(self.last_sent) > self.round_trip.timeout() {
            self.congestion.on_idle(now);
            self.last_sent = now;
        }
        let mut size = available.min(most);
        let taken = self.window.edge.saturating_sub(sent);
        if size > taken {
            size = taken / segment * segment;
            if size == 0 {
                self.is_window_limited = false;
                size = self.bytes_for_small_window(now, taken, is_clear)?;
                if size == 0 {
                    self.statistics.window_probes += 1;
                    return Some(Transmit::WindowProbe {
                        at: sent.wrapping_sub(1),
                    });
                }
            }
        }
        let room = self.send_window().saturating_sub(self.in_flight());
        if size > room {
            size = room / segment * segment;
            if size == 0 {
                if !is_clear {
                    self.is_window_limited = true;
                    return None;
                }
                size = available.min(taken).min(segment);
            }
        }
        self.timers.persist = None;
        self.window_probe_due = false;
        Some(self.append(now, sent + size))
    }

    /// Nothing waits to be sent.
    fn rest(&mut self) {
        self.timeout_due = false;
        self.timers.persist = None;
        self.window_probe_due = false;
        self.is_window_limited = false;
    }

    /// More could be sent than there is.
    fn limit_by_application(&mut self) {
        self.application_limited_until = (self.delivered + self.board.in_flight()).max(1);
    }

    /// What to send into a window smaller than a segment: nothing before what is outstanding is acknowledged, then at
    /// least half of the largest window seen, or what there is when the probe timer comes up (RFC 9293, sections
    /// 3.8.6.1 and 3.8.6.2.1). `Some(0)` is a probe.
    fn bytes_for_small_window(&mut self, now: Timestamp, taken: u64, is_clear: bool) -> Option<u64> {
        if !is_clear {
            self.timers.persist = None;
            return None;
        }
        if taken > 0 && taken >= self.window.largest / 2 {
            return Some(taken);
        }
        let is_due = std::mem::take(&mut self.window_probe_due);
        if is_due {
            self.window_probes_unanswered += 1;
        }
        if is_due || self.timers.persist.is_none() {
            let interval = self
                .round_trip
                .timeout()
                .saturating_mul(1 << self.window_probes_unanswered.min(16));
            self.timers.persist = Some(now + interval.min(WINDOW_PROBE_INTERVAL_MAX));
        }
        is_due.then_some(taken)
    }

    /// Sends new data up to `end`.
    fn append(&mut self, now: Timestamp, end: u64) -> Transmit {
        let start = self.board.sent();
        let number = self.rack.next_number();
        let mut transmission = self.transmission(now, start, end);
        transmission.in_flight += end - start;
        self.rack.push(transmission);
        self.board.append(end, number);
        self.on_sent(now, start, end, false)
    }

    /// A transmission of bytes that the scoreboard has in flight already, except new ones.
    fn transmission(&mut self, now: Timestamp, start: u64, end: u64) -> Transmission {
        let is_alone =
            self.board.in_flight() == 0 || self.board.in_flight() == end - start && start < self.board.sent();
        if is_alone {
            self.first_sent_at = now;
            self.delivered_at = now;
        }
        Transmission {
            start,
            end,
            sent_at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent_at: self.first_sent_at,
            lost: self.lost,
            in_flight: self.board.in_flight(),
            application_limited: self.application_limited_until > 0,
        }
    }

    fn on_sent(&mut self, now: Timestamp, start: u64, end: u64, retransmission: bool) -> Transmit {
        let len = end - start;
        self.last_sent = now;
        if let Some(reduction) = &mut self.reduction {
            reduction.on_sent(len);
        }
        if let Some(rate) = self.pacing_rate() {
            self.paced_until = self.paced_until.max(now - PACING_CREDIT) + time_for(len, rate);
        }
        if retransmission {
            self.statistics.retransmitted += len;
            self.statistics.retransmissions += 1;
        }
        if self.timers.timeout.is_none() {
            self.timers.timeout = Some(now + self.round_trip.timeout());
        }
        if !retransmission && self.may_probe_tail() {
            self.set_probe_timer(now);
        }
        Transmit::Data {
            start,
            end,
            retransmission,
        }
    }

    /// Panics if the books do not balance.
    fn check(&self) {
        #[cfg(debug_assertions)]
        {
            if self.board.is_worth_a_check(self.delivered) {
                self.board.check();
            }
            assert!(self.assumed <= self.board.in_flight());
            let is_outstanding = self.board.acknowledged() < self.board.sent();
            assert_eq!(
                is_outstanding,
                self.timers.timeout.is_some(),
                "data outstanding has a timer"
            );
        }
    }
}

/// The earlier of two times, each of which may be never.
fn earlier(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, None) => one,
        (None, other) => other,
    }
}

/// The distance of the borders that selective acknowledgments are rounded to: whole segments.
fn sack_unit(segment: u32) -> u32 {
    SACK_UNIT_MIN.div_ceil(segment).max(1) * segment
}

/// Bytes that leave within `time` at `rate` bytes a second.
fn bytes_in(rate: u64, time: Duration) -> u64 {
    (u128::from(rate) * time.as_nanos() / 1_000_000_000) as u64
}

/// How long `bytes` take at `rate` bytes a second.
fn time_for(bytes: u64, rate: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.max(1))
}

#[cfg(test)]
mod tests;
