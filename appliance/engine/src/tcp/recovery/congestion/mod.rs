//! Congestion control: how much may be in flight, and how fast it leaves.

mod bbr;
mod cubic;
mod hystart;
mod unlimited;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::bbr::Bbr;
use self::cubic::Cubic;
use self::unlimited::Unlimited;
use crate::time::Timestamp;

/// A congestion control by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CongestionControl {
    /// None: for clients on this host, where nothing lies between but a queue that pushes back.
    None,
    /// Cubic (RFC 9438) with HyStart++ (RFC 9406): backs off at every loss.
    Cubic,
    /// By a model of the path, after BBR: bandwidth and round-trip time decide, and loss only where it is more than the
    /// path loses anyway.
    Bbr,
}

impl CongestionControl {
    pub(super) fn start(self, segment_size: u32, now: Timestamp) -> Box<dyn Congestion> {
        match self {
            Self::None => Box::new(Unlimited), // of no size: nothing is allocated
            Self::Cubic => Box::new(Cubic::new(segment_size)),
            Self::Bbr => Box::new(Bbr::new(segment_size, now)),
        }
    }
}

/// The initial window (RFC 6928, section 2).
pub(super) fn initial_window(segment_size: u32) -> u64 {
    let size = u64::from(segment_size);
    (10 * size).min((2 * size).max(14_600))
}

/// What one ACK says about the path. Bytes are payload bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// When it came.
    pub now: Timestamp,
    /// Of the most recent segment it delivers that was sent once.
    pub rtt: Option<Duration>,
    /// The lowest of the last minutes.
    pub rtt_minimum: Option<Duration>,
    /// SRTT.
    pub rtt_smoothed: Option<Duration>,
    /// Delivered by it, in order or not.
    pub delivered: u64,
    /// It acknowledges new data in order.
    pub is_cumulative: bool,
    /// Found lost by it.
    pub lost: u64,
    /// In flight before it and after.
    pub in_flight_before: u64,
    /// See above.
    pub in_flight: u64,
    /// SND.UNA and SND.NXT after it.
    pub acknowledged: u64,
    /// See above.
    pub sent: u64,
    /// Delivered since the start.
    pub delivered_total: u64,
    /// The window, not the application or the client, has kept the sender from sending more.
    pub is_window_limited: bool,
    /// It has come in a recovery.
    pub in_recovery: bool,
    /// How fast data is being delivered.
    pub delivery: Option<Delivery>,
}

/// A delivery rate sample (draft-ietf-ccwg-bbr, section 4.1).
#[derive(Debug, Clone, Copy)]
pub struct Delivery {
    /// Bytes delivered between the sending of the sampled transmission and its ACK.
    pub delivered: u64,
    /// How long that took.
    pub interval: Duration,
    /// [`Sample::delivered_total`] when it was sent.
    pub prior_delivered: u64,
    /// Bytes lost between.
    pub lost: u64,
    /// In flight right after it was sent.
    pub in_flight: u64,
    /// The application had nothing more to send then.
    pub is_application_limited: bool,
}

/// A congestion control.
pub trait Congestion: fmt::Debug + Send {
    /// Takes an ACK that delivers something or finds a loss.
    fn on_ack(&mut self, sample: &Sample);
    /// A loss begins a recovery, with `in_flight` bytes in flight, the lost ones included.
    fn on_congestion(&mut self, now: Timestamp, in_flight: u64);
    /// The recovery that began with [`Congestion::on_congestion`], or with a timeout, is over.
    fn on_recovered(&mut self, now: Timestamp, after_timeout: bool);
    /// The retransmission timer has come up; `in_flight` bytes are still believed to be under way, of the
    /// `outstanding` before it. `repeated`: nothing has been heard since the one before.
    fn on_timeout(&mut self, now: Timestamp, outstanding: u64, in_flight: u64, repeated: bool);
    /// The loss that the latest [`Congestion::on_congestion`] or [`Congestion::on_timeout`] reacted to was none.
    fn undo(&mut self, now: Timestamp);
    /// Data is sent after nothing has been for at least one retransmission timeout (RFC 5681, section 4.1).
    fn on_idle(&mut self, now: Timestamp);
    /// The segment size has changed.
    fn set_segment_size(&mut self, bytes: u32);
    /// What may be in flight, in bytes.
    fn window(&self) -> u64;
    /// Where proportional rate reduction is to end; `None`: [`Congestion::window`] holds in a recovery too.
    fn recovery_target(&self) -> Option<u64>;
    /// Bytes a second; `None`: as fast as the window allows.
    fn pacing_rate(&self) -> Option<u64>;
}
