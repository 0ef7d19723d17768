//! Congestion control by a model of the path, after BBR (draft-ietf-ccwg-bbr), in integers.
//!
//! ```text
//!  Startup ──pipe full──▶ Drain ──queue gone──▶ Down ─▶ Cruise ──time──▶ Refill ──a round──▶ Up ─┐
//!                                                ▲                                               │
//!                                                └────────── queue, or too much loss ────────────┘
//!  and from any of them ProbeRtt, for 200 ms every 10 s in which the round-trip time has not come down by itself
//! ```
//!
//! Bandwidth is the highest delivery rate of the last two cycles, the round-trip time the lowest of the last ten
//! seconds. Their product, times a gain, bounds what is in flight; the bandwidth, times another, is the pace. A loss by
//! itself changes nothing. A round trip in which more than 2 % are lost *above what the path loses anyway* has filled a
//! short queue, and lowers the ceiling of what may be in flight. What it loses anyway is measured while cruising, where
//! there is no queue of ours, and counts up to 5 %: radio links lose that much, and the draft's fixed bound would take
//! them for congested.
//!
//! Losses in a queue that somebody else fills are those that Cubic and Reno share a path by. Where such are seen, Cubic
//! runs along with the model, and its window is a bound: so neither is crowded out. It goes when it binds no more.
//!
//! Otherwise it differs from the draft in what it leaves out: ECN, which the handshake does not offer, and randomised
//! probe times, as an engine has no randomness that is not its seed's.

use std::time::Duration;

use super::cubic::Cubic;
use super::{Congestion, Delivery, Sample, initial_window};
use crate::time::Timestamp;

const STARTUP_PACING: u64 = 2770;
const STARTUP_WINDOW: u64 = 2000;
const DRAIN_PACING: u64 = 350;
const UP_PACING: u64 = 1250;
const UP_WINDOW: u64 = 2250;
const DOWN_PACING: u64 = 900;
const WINDOW: u64 = 2000;
/// The pace stays below the estimate by this, so that a queue that has come drains.
const PACING_MARGIN: u64 = 990;
/// Of the ceiling, left for others while cruising.
const HEADROOM: u64 = 850;
/// What a bound is multiplied by when there is too much loss.
const DECREASE: u64 = 700;

/// Loss above what the path loses anyway, in thousandths, that makes a round congested.
const EXCESS_LOSS: u64 = 20;
/// The most that the path is believed to lose anyway.
const USUAL_LOSS_MAX: u64 = 50;
/// Loss that ends start-up: far above what random loss makes.
const STARTUP_LOSS: u64 = 100;
/// Segments lost in a round below which it is no statistics. In start-up more: a short queue loses some of the first
/// burst, and the rate that is found then is far too low to end with.
const LOST_SEGMENTS_MIN: u64 = 4;
const LOST_SEGMENTS_MIN_STARTUP: u64 = 8;

/// Start-up ends after so many rounds without a quarter more bandwidth.
const FULL_ROUNDS: u32 = 3;
const STARTUP_GROWTH: u64 = 1250;
/// A probe for bandwidth goes on while it finds a tenth more in a round, and waits for its queue no longer than this.
const UP_GROWTH: u64 = 1100;
const UP_ROUNDS_MAX: u32 = 8;
const RTT_WINDOW: Duration = Duration::from_secs(10);
const PROBE_RTT_TIME: Duration = Duration::from_millis(200);
/// Between two probes for more bandwidth, unless so many rounds pass first.
const CRUISE_TIME: Duration = Duration::from_millis(2_500);
const CRUISE_ROUNDS_MAX: u64 = 63;
/// Somebody else's queue: between our own probes, round-trip times are above the lowest by so many thousandths of it,
/// and by more than the time of so many segments, which is what packets and timers make anyway.
const RIVAL_QUEUE: u64 = 100;
const RIVAL_QUEUE_SEGMENTS: u64 = 3;
const RIVAL_QUEUE_MIN: Duration = Duration::from_micros(500);
/// What our own probe leaves has gone after so many rounds, or more where it is long for the path.
const OWN_QUEUE_ROUNDS: u64 = 5;
/// So many rounds with losses, but no queue, show that there is no rival.
const RIVAL_DOUBTS: u32 = 3;
/// Where a rival holds the queue, a window is spread over four fifths of a round trip.
const RIVAL_PACING: u64 = 1250;
/// Rounds after which the measure of how ACKs bunch is forgotten.
const BUNCHING_ROUNDS: u64 = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Startup,
    Drain,
    Down,
    Cruise,
    Refill,
    Up,
    ProbeRtt { until: Option<Timestamp> },
}

#[derive(Debug)]
pub(super) struct Bbr {
    segment: u64,
    state: State,
    window: u64,
    /// Bytes a second.
    pacing_rate: u64,
    /// Highest delivery rates: of this cycle and of the one before.
    bandwidths: [u64; 2],
    /// Bounds found where there was too much loss; short-term ones hold until the next probe.
    bandwidth_low: u64,
    in_flight_low: u64,
    in_flight_high: u64,
    rtt_minimum: Option<(Duration, Timestamp)>,
    round: Round,
    /// Highest bandwidth of start-up or of a probe, and rounds since it grew.
    full: (u64, u32),
    is_full: bool,
    cycle_since: Timestamp,
    cycle_rounds: u64,
    /// Rounds for which the queue after a probe may be our own.
    own_queue_rounds: u64,
    /// Loss of the path itself, in thousandths times 8.
    usual_loss: u64,
    bunching: Bunching,
    /// The window before a timeout or a probe of the round-trip time.
    kept_window: u64,
    /// The latest round-trip time.
    rtt: Duration,
    /// What Cubic would do, where somebody else fills the queue.
    rival: Option<Cubic>,
    /// Losses are looked at once a round: next when what is sent from here on is acknowledged.
    rival_judged_at: u64,
    /// Rounds with losses and no queue, since there was one.
    rival_doubts: u32,
}

/// A round trip: from a transmission to its ACK.
#[derive(Debug, Default)]
struct Round {
    /// It ends when what is sent from here on is acknowledged.
    end: u64,
    count: u64,
    delivered: u64,
    lost: u64,
    /// Highest delivery rate and most delivered per sample.
    bandwidth: u64,
    in_flight: u64,
}

/// How much more than the bandwidth's share ACKs acknowledge at once.
#[derive(Debug)]
struct Bunching {
    since: Timestamp,
    acknowledged: u64,
    most: [u64; 2],
    turned: u64,
}

impl Bbr {
    pub(super) fn new(segment_size: u32, now: Timestamp) -> Self {
        Self {
            segment: u64::from(segment_size),
            state: State::Startup,
            window: initial_window(segment_size),
            pacing_rate: 0,
            bandwidths: [0; 2],
            bandwidth_low: u64::MAX,
            in_flight_low: u64::MAX,
            in_flight_high: u64::MAX,
            rtt_minimum: None,
            round: Round::default(),
            full: (0, 0),
            is_full: false,
            cycle_since: now,
            cycle_rounds: 0,
            own_queue_rounds: OWN_QUEUE_ROUNDS,
            usual_loss: 0,
            bunching: Bunching {
                since: now,
                acknowledged: 0,
                most: [0; 2],
                turned: 0,
            },
            kept_window: 0,
            rtt: Duration::ZERO,
            rival: None,
            rival_judged_at: 0,
            rival_doubts: 0,
        }
    }

    fn bandwidth(&self) -> u64 {
        self.bandwidths[0].max(self.bandwidths[1]).min(self.bandwidth_low)
    }

    /// Bandwidth times round-trip time, times `gain` thousandths.
    fn product(&self, gain: u64) -> u64 {
        let Some((rtt, _)) = self.rtt_minimum else {
            return initial_window(self.segment as u32);
        };
        let bytes = u128::from(self.bandwidth()) * rtt.as_nanos() / 1_000_000_000;
        (bytes * u128::from(gain) / 1000) as u64
    }

    /// What the sender and the receiver hold back to work in larger units: timers have milliseconds.
    fn held_back(&self) -> u64 {
        3 * (self.pacing_rate / 1000).max(2 * self.segment)
    }

    fn window_least(&self) -> u64 {
        4 * self.segment
    }

    fn gains(&self) -> (u64, u64) {
        match self.state {
            State::Startup => (STARTUP_PACING, STARTUP_WINDOW),
            State::Drain => (DRAIN_PACING, STARTUP_WINDOW),
            State::Down => (DOWN_PACING, WINDOW),
            State::Cruise | State::Refill => (1000, WINDOW),
            State::Up => (UP_PACING, UP_WINDOW),
            State::ProbeRtt { .. } => (1000, 500),
        }
    }

    /// Whether the round that is under way has lost more than `bound` thousandths, by more than chance would.
    fn is_congested(&self, bound: u64) -> bool {
        let Round { delivered, lost, .. } = self.round;
        let (lost, sent) = (lost / self.segment, (delivered + lost) / self.segment);
        let expected = sent * bound / 1000;
        let least = if self.state == State::Startup {
            LOST_SEGMENTS_MIN_STARTUP
        } else {
            LOST_SEGMENTS_MIN
        };
        // Two standard deviations: a round of a slow path has few segments.
        lost >= least && lost > expected + 2 * expected.isqrt()
    }

    /// Whether a sample says less than the path can, as the sender had nothing more to send. With a quarter more in
    /// flight than the estimate needs, it would have shown a higher rate all the same.
    fn is_understated(&self, delivery: &Delivery) -> bool {
        delivery.is_application_limited && delivery.in_flight < self.product(UP_PACING)
    }

    fn loss_bound(&self) -> u64 {
        EXCESS_LOSS + (self.usual_loss / 8).min(USUAL_LOSS_MAX)
    }

    fn take_delivery(&mut self, delivery: &Delivery) {
        let nanos = delivery.interval.as_nanos().max(1);
        let rate = (u128::from(delivery.delivered) * 1_000_000_000 / nanos) as u64;
        self.round.bandwidth = self.round.bandwidth.max(rate);
        self.round.in_flight = self.round.in_flight.max(delivery.delivered);
        if !self.is_understated(delivery) || rate >= self.bandwidths[0].max(self.bandwidths[1]) {
            self.bandwidths[0] = self.bandwidths[0].max(rate);
        }
    }

    /// How much ACKs bunch (the draft's extra_acked): a receiver behind a radio link acknowledges in bursts.
    fn take_bunching(&mut self, sample: &Sample) {
        let bandwidth = self.bandwidth();
        let expected = |since: Timestamp| {
            (u128::from(bandwidth) * sample.now.since(since).as_nanos() / 1_000_000_000) as u64
        };
        if self.bunching.acknowledged <= expected(self.bunching.since) {
            self.bunching.since = sample.now;
            self.bunching.acknowledged = 0;
        }
        self.bunching.acknowledged += sample.delivered;
        let extra =
            self.bunching.acknowledged - expected(self.bunching.since).min(self.bunching.acknowledged);
        self.bunching.most[0] = self.bunching.most[0].max(extra.min(self.window));
        if self.round.count >= self.bunching.turned + BUNCHING_ROUNDS / 2 {
            self.bunching.turned = self.round.count;
            self.bunching.most = [0, self.bunching.most[0]];
        }
    }

    fn take_round_trip(&mut self, sample: &Sample) {
        let Some(rtt) = sample.rtt else { return };
        let is_lower = self.rtt_minimum.is_none_or(|(minimum, _)| rtt <= minimum);
        if is_lower || (matches!(self.state, State::ProbeRtt { .. }) && self.is_rtt_stale(sample.now)) {
            self.rtt_minimum = Some((rtt, sample.now));
        }
    }

    fn is_rtt_stale(&self, now: Timestamp) -> bool {
        self.rtt_minimum.is_some_and(|(_, at)| now.since(at) > RTT_WINDOW)
    }

    /// At the end of a round, before its counters are cleared.
    fn on_round_end(&mut self, sample: &Sample, delivery: &Delivery) {
        let Round { delivered, lost, .. } = self.round;
        match self.state {
            State::Startup => {
                // Where holes hold back most of what is outstanding, the send buffer is the limit, and will stay it.
                let is_held_back = sample.sent - sample.acknowledged > 2 * sample.in_flight_before;
                if is_held_back || !self.is_understated(delivery) {
                    self.look_for_growth(STARTUP_GROWTH);
                }
                if self.is_congested(STARTUP_LOSS) {
                    self.in_flight_high = self.product(1000).max(self.round.in_flight);
                    self.is_full = true;
                }
                self.is_full |= self.full.1 >= FULL_ROUNDS;
            }
            State::Cruise if delivered + lost >= 16 * self.segment => {
                let loss = lost * 1000 / (delivered + lost);
                self.usual_loss = match self.usual_loss {
                    0 => 8 * loss,
                    usual => usual * 7 / 8 + loss,
                };
            }
            State::Up => self.look_for_growth(UP_GROWTH),
            State::Drain | State::Down | State::Cruise | State::Refill | State::ProbeRtt { .. } => {}
        }
        let is_probing = matches!(self.state, State::Startup | State::Refill | State::Up);
        if !is_probing && self.is_congested(self.loss_bound()) {
            let bandwidth = self.bandwidth();
            self.bandwidth_low = self.round.bandwidth.max(bandwidth / 1000 * DECREASE);
            let in_flight = self.in_flight_low.min(self.window);
            self.in_flight_low = self.round.in_flight.max(in_flight / 1000 * DECREASE);
        }
        self.cycle_rounds += 1;
    }

    /// Notes whether the bandwidth has grown by so many thousandths since it last did.
    fn look_for_growth(&mut self, growth: u64) {
        let bandwidth = self.bandwidths[0].max(self.bandwidths[1]);
        if bandwidth >= self.full.0 / 1000 * growth {
            self.full = (bandwidth, 0);
        } else {
            self.full.1 += 1;
        }
    }

    fn enter(&mut self, state: State, sample: &Sample) {
        let now = sample.now;
        match state {
            State::Down => {
                self.cycle_since = now;
                self.cycle_rounds = 0;
                // In a round there drains of it what the pace is below the bandwidth.
                let (queue, drained) = (
                    sample.in_flight.saturating_sub(self.product(1000)),
                    self.product(1000 - DOWN_PACING),
                );
                self.own_queue_rounds = (queue / drained.max(1)).max(OWN_QUEUE_ROUNDS);
            }
            State::Refill => {
                self.bandwidth_low = u64::MAX;
                self.in_flight_low = u64::MAX;
                self.cycle_rounds = 0;
            }
            State::Up => {
                // A cycle in which the application was the limit has shown nothing.
                if self.bandwidths[0] > 0 {
                    self.bandwidths = [0, self.bandwidths[0]];
                }
                self.cycle_since = now;
                self.cycle_rounds = 0;
                self.full = (self.bandwidth(), 0);
            }
            State::ProbeRtt { .. } => self.kept_window = self.kept_window.max(self.window),
            State::Startup | State::Drain | State::Cruise => {}
        }
        self.state = state;
    }

    fn update_state(&mut self, sample: &Sample) {
        let now = sample.now;
        match self.state {
            State::Startup => {
                if self.is_full {
                    self.enter(State::Drain, sample);
                }
            }
            State::Drain => {
                if sample.in_flight <= self.product(1000) {
                    self.enter(State::Down, sample);
                }
            }
            State::Down => {
                let room = self.in_flight_high / 1000 * HEADROOM;
                if sample.in_flight <= self.product(1000).min(room.max(self.window_least())) {
                    self.enter(State::Cruise, sample);
                } else if self.is_time_to_probe(now) {
                    self.enter(State::Refill, sample);
                }
            }
            State::Cruise => {
                if self.is_time_to_probe(now) {
                    self.enter(State::Refill, sample);
                }
            }
            State::Refill => {
                if self.cycle_rounds >= 2 {
                    self.enter(State::Up, sample);
                }
            }
            State::Up => self.update_while_up(sample),
            State::ProbeRtt { until } => match until {
                None if sample.in_flight <= self.product(500).max(self.window_least()) => {
                    let until = Some(now + PROBE_RTT_TIME);
                    self.state = State::ProbeRtt { until };
                }
                Some(until) if now >= until => {
                    self.rtt_minimum = self.rtt_minimum.map(|(rtt, _)| (rtt, now));
                    self.window = self.window.max(self.kept_window);
                    self.kept_window = 0;
                    self.enter(if self.is_full { State::Down } else { State::Startup }, sample);
                }
                None | Some(_) => {}
            },
        }
        if !matches!(self.state, State::ProbeRtt { .. }) && self.is_rtt_stale(now) {
            self.enter(State::ProbeRtt { until: None }, sample);
        }
    }

    fn is_time_to_probe(&self, now: Timestamp) -> bool {
        let rounds = (self.product(1000) / self.segment).min(CRUISE_ROUNDS_MAX);
        now.since(self.cycle_since) >= CRUISE_TIME || self.cycle_rounds >= rounds.max(8)
    }

    fn update_while_up(&mut self, sample: &Sample) {
        let bound = self.loss_bound();
        if self.is_congested(bound) {
            let target = self.product(1000).min(self.window);
            self.in_flight_high = sample
                .in_flight_before
                .max(target / 1000 * DECREASE + self.held_back());
            self.enter(State::Down, sample);
            return;
        }
        // The ceiling has held without loss: it was too low.
        if sample.is_window_limited
            && sample.in_flight_before + self.segment >= self.in_flight_high / 1000 * HEADROOM
        {
            self.in_flight_high = self.in_flight_high.saturating_add(sample.delivered);
        }
        let rtt = self.rtt_minimum.map_or(Duration::ZERO, |(rtt, _)| rtt);
        let had_time = sample.now.since(self.cycle_since) >= rtt && self.cycle_rounds >= 2 && self.full.1 > 0;
        if had_time && sample.in_flight_before >= self.product(UP_PACING) {
            self.enter(State::Down, sample);
        } else if self.full.1 >= UP_ROUNDS_MAX {
            self.enter(State::Down, sample); // the application does not fill the path
        }
    }

    /// Losses in a queue that is not ours: somebody fills it who backs off by them. So does this flow then, as Cubic
    /// would, until that bound is far above what the model asks for, or until losses come without a queue: those are
    /// the path's own.
    fn yield_to_rivals(&mut self, sample: &Sample) {
        // A loss that a timer finds comes with none.
        self.rtt = sample.rtt.unwrap_or(self.rtt);
        let most = 2 * self.product(WINDOW);
        if let Some(rival) = &mut self.rival {
            rival.on_ack(&Sample {
                in_recovery: false,
                ..*sample
            });
            if rival.window() > most {
                self.rival = None;
            }
        }
        // With little in flight, ACKs that are held back look like a queue.
        if sample.lost == 0
            || sample.acknowledged < self.rival_judged_at
            || sample.in_flight_before < self.product(500)
        {
            return;
        }
        let may_be_ours =
            self.cycle_rounds < self.own_queue_rounds || !matches!(self.state, State::Cruise | State::Down);
        let is_long = self.is_queue_long(sample);
        if self.rival.is_none() && (may_be_ours || !is_long) {
            return;
        }
        self.rival_judged_at = sample.sent;
        if !is_long {
            self.rival_doubts += 1;
            if self.rival_doubts >= RIVAL_DOUBTS {
                self.rival = None;
            }
            return;
        }
        self.rival_doubts = 0;
        let (segment, window) = (
            self.segment as u32,
            self.product(1000).max(sample.in_flight_before),
        );
        let rival = self
            .rival
            .get_or_insert_with(|| Cubic::from_window(segment, window));
        rival.on_congestion(sample.now, sample.in_flight_before);
        rival.on_recovered(sample.now, false);
    }

    fn is_queue_long(&self, sample: &Sample) -> bool {
        let lowest = sample.rtt_minimum.unwrap_or(self.rtt);
        let segments = RIVAL_QUEUE_SEGMENTS * self.segment * 1_000_000_000 / self.pacing_rate.max(1);
        let least = RIVAL_QUEUE_MIN + Duration::from_nanos(segments);
        let share = Duration::from_nanos(lowest.as_nanos() as u64 / 1000 * RIVAL_QUEUE);
        self.rtt.saturating_sub(lowest) > least.max(share)
    }

    fn set_pace(&mut self, sample: &Sample) {
        let (gain, _) = self.gains();
        let rate = match self.pacing_rate {
            // The first ACK says nothing of the rate: nine of ten segments are still under way.
            0 => {
                let rtt = sample.rtt_smoothed.unwrap_or(Duration::from_millis(1));
                (u128::from(self.window) * 1_000_000_000 / rtt.as_nanos().max(1)) as u64
            }
            _ => self.bandwidth(),
        };
        let rate = rate / 1000 * gain / 1000 * PACING_MARGIN;
        if self.is_full || rate > self.pacing_rate {
            self.pacing_rate = rate.max(self.segment);
        }
        if self.rival.is_some()
            && let Some(rtt) = sample.rtt_smoothed
        {
            let rate = u128::from(self.window) * 1_000_000_000 / rtt.as_nanos().max(1);
            self.pacing_rate = self.pacing_rate.max(rate as u64 / 1000 * RIVAL_PACING);
        }
    }

    fn set_window(&mut self, sample: &Sample) {
        let (_, gain) = self.gains();
        let bunching = self.bunching.most[0].max(self.bunching.most[1]);
        let target = self.product(gain) + bunching + self.held_back();
        if self.is_full {
            self.window = (self.window + sample.delivered).min(target);
        } else if self.window < target || sample.delivered_total < 2 * initial_window(self.segment as u32) {
            self.window += sample.delivered;
        }
        let ceiling = match self.state {
            State::Startup | State::Drain | State::Refill | State::Up | State::Down => self.in_flight_high,
            State::Cruise => self.in_flight_high / 1000 * HEADROOM,
            State::ProbeRtt { .. } => self.product(500),
        };
        let rival = self.rival.as_ref().map_or(u64::MAX, Cubic::window);
        let ceiling = ceiling.min(self.in_flight_low).min(rival);
        self.window = self.window.min(ceiling).max(self.window_least());
    }
}

impl Congestion for Bbr {
    fn on_ack(&mut self, sample: &Sample) {
        self.round.delivered += sample.delivered;
        self.round.lost += sample.lost;
        self.take_round_trip(sample);
        if let Some(delivery) = &sample.delivery {
            self.take_delivery(delivery);
            if delivery.prior_delivered >= self.round.end {
                self.on_round_end(sample, delivery);
                self.round = Round {
                    end: sample.delivered_total,
                    count: self.round.count + 1,
                    ..Round::default()
                };
            }
        }
        self.take_bunching(sample);
        self.update_state(sample);
        self.yield_to_rivals(sample);
        self.set_pace(sample);
        self.set_window(sample);
    }

    fn on_congestion(&mut self, _: Timestamp, _: u64) {}

    fn on_recovered(&mut self, _: Timestamp, after_timeout: bool) {
        if after_timeout {
            self.window = self.window.max(self.kept_window);
            self.kept_window = 0;
        }
    }

    fn on_timeout(&mut self, _: Timestamp, _: u64, in_flight: u64, repeated: bool) {
        if !repeated {
            self.kept_window = self.kept_window.max(self.window);
        }
        self.window = in_flight + self.segment;
    }

    fn undo(&mut self, _: Timestamp) {
        self.window = self.window.max(self.kept_window);
        self.kept_window = 0;
    }

    fn on_idle(&mut self, _: Timestamp) {}

    fn set_segment_size(&mut self, bytes: u32) {
        self.segment = u64::from(bytes);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn recovery_target(&self) -> Option<u64> {
        None
    }

    fn pacing_rate(&self) -> Option<u64> {
        (self.pacing_rate > 0).then_some(self.pacing_rate)
    }
}
