//! A flow that the kernel carries, as far as its ends show.
//!
//! ```text
//!  SYN sent on ─▶ Connecting ──SYN-ACK──▶ Open ──FINs, RST──▶ Counting ──counted──▶ Lingering ──▶ Releasing ─▶ gone
//!                     │ RST, unreachable    │ denied, idle                ▲ told of        ten seconds
//!                     └──────▶ Lingering    └──▶ Releasing ──released──▶ Probing ──the client's answer──▶ gone
//! ```
//!
//! Its bytes are counted by its sequence numbers once they are known, as those of a terminated flow are: payload, each
//! byte once. Until then the kernel's count of packets and bytes gives a number that is near.

use std::time::Duration;

use super::segment::Control;
use super::{Fields, TIME_WAIT, TcpFlow};
use crate::bypass::{Carried, Seen, Volume};
use crate::config::Timeouts;
use crate::event::CloseReason;
use crate::io::{Stage as Progressed, UpstreamError};
use crate::packet::{TcpFlags, ip_header_len};
use crate::time::Timestamp;

/// How long a client may take to answer the probe before its reset.
const PROBE_TIME: Duration = Duration::from_secs(1);
/// The kernel's counts are looked at so often in the time that a flow may be idle.
const LOOKS: u32 = 4;
/// RFC 7323's option, padded.
const TIMESTAMPS_LEN: u64 = 12;

/// What is known of the connection.
pub(crate) struct Bypass {
    pub(crate) stage: Stage,
    /// A flow that ends before its time ends without a word to its client.
    pub(crate) silent: bool,
    /// The target's initial sequence number; known once it has answered.
    target_initial: Option<u32>,
    /// The numbers behind the last bytes, once they are known.
    client_end: Option<u32>,
    target_end: Option<u32>,
    client_closed: bool,
    target_closed: bool,
    /// Headers of one packet, and by how much those of both SYNs are longer.
    header_len: u64,
    syn_excess: [u64; 2],
    carried: Carried,
    /// When packets were last found to have moved.
    moved: Timestamp,
    /// When the kernel's counts are looked at next.
    look_at: Timestamp,
    /// The SYN of a connection between the same ends, which waits until this one is forgotten.
    pub(crate) successor: Option<Box<[u8]>>,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The target has not answered.
    Connecting,
    Open,
    /// It has ended; what it has carried is still to be heard.
    Counting(CloseReason),
    /// Its end has been told; the kernel still carries what is repeated.
    Lingering(Timestamp),
    /// The kernel is to forget it. With a reason its end is still to be told.
    Releasing(Option<CloseReason>),
    /// The client is being asked for the sequence number that a reset needs.
    Probing(CloseReason, Timestamp),
}

/// What follows from news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Nothing,
    /// The target has answered.
    Established,
    /// Its counts are wanted, now or when it rests.
    Count,
    /// Half of it has closed: another time holds.
    HalfClosed,
    /// It has ended, and needs no counts.
    End(CloseReason),
}

impl Bypass {
    /// For a SYN whose TCP header has `syn_len` bytes.
    pub(crate) fn new(syn_len: u8, now: Timestamp) -> Self {
        Self {
            stage: Stage::Connecting,
            silent: true,
            target_initial: None,
            client_end: None,
            target_end: None,
            client_closed: false,
            target_closed: false,
            header_len: 0,
            syn_excess: [syn_len.into(), 0],
            carried: Carried::default(),
            moved: now,
            look_at: Timestamp::MAX,
            successor: None,
        }
    }

    /// Whether its end has been told or is about to be.
    pub(crate) fn has_ended(&self) -> bool {
        !matches!(self.stage, Stage::Connecting | Stage::Open)
    }

    /// Whether the target has ever answered with a SYN-ACK.
    pub(crate) fn was_open(&self) -> bool {
        self.target_initial.is_some()
    }

    pub(crate) fn progressed(&self) -> Option<Progressed> {
        match self.stage {
            Stage::Connecting => Some(Progressed::Connecting),
            Stage::Open => Some(match (self.client_closed, self.target_closed) {
                (false, false) => Progressed::Open,
                (true, false) => Progressed::ClientClosed,
                (false, true) => Progressed::UpstreamClosed,
                (true, true) => Progressed::Closing,
            }),
            Stage::Counting(_) | Stage::Releasing(Some(_)) | Stage::Probing(..) => Some(Progressed::Closing),
            Stage::Lingering(_) | Stage::Releasing(None) => None,
        }
    }

    /// Takes note of a segment that went by, `client_initial` being the number of the client's SYN.
    pub(crate) fn on_segment(
        &mut self,
        seen: &Seen,
        ip_len: usize,
        client_initial: u32,
        now: Timestamp,
    ) -> Step {
        let flags = TcpFlags(seen.flags);
        let end = seen.sequence.wrapping_add(u32::from(seen.payload_len));
        self.moved = now;
        let answers = flags.syn() && flags.ack() && !seen.from_client;
        if answers && self.target_initial.is_none() {
            // Also while it is being released: the client's reset needs it.
            self.on_answered(seen, ip_len);
        }
        match self.stage {
            Stage::Connecting if flags.rst() => self.on_early_reset(seen, client_initial),
            Stage::Connecting if answers => {
                self.stage = Stage::Open;
                Step::Established
            }
            Stage::Open if flags.rst() => {
                let acknowledged = flags.ack().then_some(seen.acknowledgment);
                let (sent, received, reason) = if seen.from_client {
                    (
                        &mut self.client_end,
                        &mut self.target_end,
                        CloseReason::ClientReset,
                    )
                } else {
                    (
                        &mut self.target_end,
                        &mut self.client_end,
                        CloseReason::UpstreamReset,
                    )
                };
                *sent = sent.or(Some(end));
                *received = received.or(acknowledged);
                self.stage = Stage::Counting(reason);
                Step::Count
            }
            Stage::Open if flags.fin() => {
                let (side, closed) = if seen.from_client {
                    (&mut self.client_end, &mut self.client_closed)
                } else {
                    (&mut self.target_end, &mut self.target_closed)
                };
                *side = side.or(Some(end));
                *closed = true;
                if self.client_closed && self.target_closed {
                    self.stage = Stage::Counting(CloseReason::Finished);
                    Step::Count
                } else {
                    Step::HalfClosed
                }
            }
            _ => Step::Nothing,
        }
    }

    fn on_answered(&mut self, seen: &Seen, ip_len: usize) {
        self.target_initial = Some(seen.sequence);
        let header_len = if seen.timestamps { 20 + TIMESTAMPS_LEN } else { 20 };
        self.header_len = ip_len as u64 + header_len;
        let lens = [self.syn_excess[0], seen.header_len.into()];
        self.syn_excess = lens.map(|len| len.saturating_sub(header_len));
    }

    /// The client has said where it is.
    pub(crate) fn on_answer(&mut self, sequence: u32, acknowledgment: u32) {
        self.client_end = self.client_end.or(Some(sequence));
        self.target_end = self.target_end.or(Some(acknowledgment));
    }

    fn on_early_reset(&mut self, seen: &Seen, client_initial: u32) -> Step {
        if seen.from_client {
            return Step::End(CloseReason::ClientReset);
        }
        let answers_syn = seen.acknowledgment == client_initial.wrapping_add(1);
        if TcpFlags(seen.flags).ack() && answers_syn {
            Step::End(CloseReason::ConnectFailed(UpstreamError::Refused))
        } else {
            Step::Nothing
        }
    }

    /// Takes note of the kernel's counts.
    pub(crate) fn on_carried(&mut self, carried: Carried, now: Timestamp) {
        let packets = |carried: &Carried| carried.to_upstream.packets + carried.to_client.packets;
        if packets(&carried) != packets(&self.carried) {
            self.moved = now;
            self.carried = carried;
        }
    }

    /// The reason if nothing has moved for too long.
    pub(crate) fn overdue(&self, timeouts: &Timeouts, now: Timestamp) -> Option<CloseReason> {
        let reason = if self.is_half_closed() {
            CloseReason::HalfCloseTimeout
        } else {
            CloseReason::IdleTimeout
        };
        (now.since(self.moved) >= self.patience(timeouts)).then_some(reason)
    }

    /// What the end means that the kernel saw and we did not.
    pub(crate) fn unseen_end(&self) -> CloseReason {
        match self.stage {
            Stage::Connecting => CloseReason::ConnectTimeout,
            Stage::Counting(reason) => reason,
            _ if self.is_half_closed() => CloseReason::HalfCloseTimeout,
            _ => CloseReason::IdleTimeout,
        }
    }

    fn is_half_closed(&self) -> bool {
        self.client_closed != self.target_closed
    }

    fn patience(&self, timeouts: &Timeouts) -> Duration {
        if self.is_half_closed() {
            timeouts.half_close
        } else {
            timeouts.tcp_idle
        }
    }

    /// Has the kernel's counts looked at a while from now.
    pub(crate) fn look_later(&mut self, timeouts: &Timeouts, now: Timestamp) {
        self.look_at = now + self.patience(timeouts) / LOOKS;
    }

    /// When it is to be looked at, `since` being when it began.
    pub(crate) fn due(&self, since: Timestamp, timeouts: &Timeouts) -> Timestamp {
        match self.stage {
            Stage::Connecting => since + timeouts.connect,
            Stage::Open => self.look_at,
            Stage::Lingering(until) | Stage::Probing(_, until) => until,
            Stage::Counting(_) | Stage::Releasing(_) => Timestamp::MAX,
        }
    }

    /// Its end has been told: it stays for what is repeated, and returns until when.
    pub(crate) fn linger(&mut self, now: Timestamp) -> Timestamp {
        let until = now + TIME_WAIT;
        self.stage = Stage::Lingering(until);
        until
    }

    /// Payload bytes to the target and to the client.
    pub(crate) fn delivered(&self, client_initial: u32) -> (u64, u64) {
        let target_initial = self.target_initial.unwrap_or_default();
        (
            self.payload(
                self.carried.to_upstream,
                self.syn_excess[0],
                client_initial,
                self.client_end,
            ),
            self.payload(
                self.carried.to_client,
                self.syn_excess[1],
                target_initial,
                self.target_end,
            ),
        )
    }

    fn payload(&self, volume: Volume, excess: u64, initial: u32, end: Option<u32>) -> u64 {
        if !self.was_open() {
            return 0;
        }
        let about = volume
            .bytes
            .saturating_sub(volume.packets * self.header_len + excess);
        match end {
            None => about,
            // Sequence numbers wrap; the count says how often they did.
            Some(end) => {
                let exact = end.wrapping_sub(initial).wrapping_sub(1);
                let beyond = exact.wrapping_sub(about as u32) as i32;
                about.checked_add_signed(beyond.into()).unwrap_or(exact.into())
            }
        }
    }
}

impl TcpFlow {
    /// Takes note of a segment that went by.
    pub(crate) fn on_bypassed_segment(&mut self, seen: &Seen, now: Timestamp) -> Step {
        let (initial, ip_len) = (self.syn.sequence, ip_header_len(self.client.ip()));
        match self.bypass_mut() {
            Some(bypass) => bypass.on_segment(seen, ip_len, initial, now),
            None => Step::Nothing,
        }
    }

    /// Until when the client may answer the segment that has just been made: one far from its window, which it answers by
    /// saying where it is (RFC 9293, section 3.10.7.4).
    pub(crate) fn probe(&mut self, reason: CloseReason, now: Timestamp) -> Option<(Control, Timestamp)> {
        let (source, destination, initial) = (self.target, self.client, self.syn.sequence);
        let bypass = self.bypass_mut()?;
        let sequence = bypass.target_initial?;
        let until = now + PROBE_TIME;
        bypass.stage = Stage::Probing(reason, until);
        let fields = Fields {
            flags: TcpFlags::ACK,
            sequence,
            acknowledgment: initial.wrapping_add(1),
            window: 0,
        };
        let probe = Control {
            source,
            destination,
            fields,
        };
        Some((probe, until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(from_client: bool, flags: u8, sequence: u32, payload_len: u16) -> Seen {
        Seen {
            from_client,
            flags,
            sequence,
            acknowledgment: 0,
            payload_len,
            header_len: 40,
            timestamps: true,
        }
    }

    fn open(client_initial: u32, target_initial: u32) -> Bypass {
        let mut bypass = Bypass::new(40, Timestamp::ZERO);
        let answer = seen(false, TcpFlags::SYN | TcpFlags::ACK, target_initial, 0);
        let step = bypass.on_segment(&answer, 20, client_initial, Timestamp::ZERO);
        assert_eq!(step, Step::Established);
        bypass
    }

    #[test]
    fn bytes_are_counted_by_sequence_numbers_however_often_they_wrap() {
        // 3 × 2^32 + 7 bytes went up in packets of 60,000 bytes, a thousandth of them twice.
        let (sent, initial) = ((3_u64 << 32) + 7, u32::MAX - 3);
        let packets = (sent / 60_000) * 1001 / 1000;
        let mut bypass = open(initial, 100);
        let end = initial.wrapping_add(1).wrapping_add(sent as u32);
        let fin = seen(true, TcpFlags::FIN | TcpFlags::ACK, end.wrapping_sub(5), 5);
        assert_eq!(
            bypass.on_segment(&fin, 20, initial, Timestamp::ZERO),
            Step::HalfClosed
        );
        let fin = seen(false, TcpFlags::FIN | TcpFlags::ACK, 101, 0);
        assert_eq!(bypass.on_segment(&fin, 20, initial, Timestamp::ZERO), Step::Count);
        let carried = Carried {
            to_upstream: Volume {
                packets,
                bytes: packets * 60_052,
            },
            to_client: Volume {
                packets: packets / 2,
                bytes: packets / 2 * 52,
            },
        };
        bypass.on_carried(carried, Timestamp::ZERO);
        assert_eq!(bypass.delivered(initial), (sent, 0));
    }

    #[test]
    fn a_count_without_an_end_leaves_headers_out() {
        let mut bypass = open(1, 2);
        let volume = |packets, bytes| Volume { packets, bytes };
        // 20 bytes of IP, 20 of TCP and 12 of timestamps in each packet, and 8 more in a SYN.
        bypass.on_carried(
            Carried {
                to_upstream: volume(11, 60 + 10 * 1052),
                to_client: volume(3, 60 + 2 * 52),
            },
            Timestamp::ZERO,
        );
        assert_eq!(bypass.delivered(1), (10_000, 0));
    }

    #[test]
    fn only_a_reset_that_answers_the_syn_refuses_it() {
        let reset = |acknowledgment| Seen {
            acknowledgment,
            ..seen(false, TcpFlags::RST | TcpFlags::ACK, 0, 0)
        };
        let mut bypass = Bypass::new(40, Timestamp::ZERO);
        let mut step = |acknowledgment| bypass.on_segment(&reset(acknowledgment), 20, 41, Timestamp::ZERO);
        assert_eq!(step(7), Step::Nothing);
        assert_eq!(
            step(42),
            Step::End(CloseReason::ConnectFailed(UpstreamError::Refused))
        );
    }
}
