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

mod acknowledge;
pub mod congestion;
mod prr;
mod rack;
mod rtt;
mod scoreboard;
mod timers;
mod transmit;

use std::time::Duration;

use self::congestion::Congestion;
pub use self::congestion::CongestionControl;
use self::prr::RateReduction;
use self::rack::{Rack, Transmission};
use self::rtt::RoundTrip;
use self::scoreboard::Scoreboard;
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

/// Whoever is nearer gets super-packets as soon as the window has room: timers are hardly finer than such a path's round
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
