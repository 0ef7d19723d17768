//! How late threads wake up in a real-time run, as the forwarder sees it: its own, and the sender's.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tungate_engine::Timestamp;
use tungate_engine::packet::{PacketView, Transport};
use tungate_sim::link::{Lateness, PARTS, Quantiles, idle_class};

/// Data that follows within this time leaves in the same turn.
const TURN: Duration = Duration::from_micros(60);

/// What a cell's runs have shown, by how long the thread had been idle.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Wakes {
    forwarder: [Quantiles; 4],
    sender: [Quantiles; 4],
}

/// At 100 Mbit/s, five runs of `tungate run` with 41,000 wake-ups; where a cell has not been run, or shows nothing.
const USUAL: Wakes = Wakes {
    forwarder: [
        [0.0, 5.0, 6.0, 7.0, 9.0, 15.0, 32.0, 73.0, 412.0, 612.0, 675.0],
        [0.0, 5.0, 9.0, 15.0, 32.0, 43.0, 62.0, 555.0, 882.0, 930.0, 936.0],
        [
            3.0, 19.0, 34.0, 52.0, 69.0, 79.0, 98.0, 148.0, 718.0, 766.0, 771.0,
        ],
        [
            1.0, 30.0, 48.0, 77.0, 87.0, 94.0, 119.0, 380.0, 701.0, 746.0, 751.0,
        ],
    ],
    sender: [
        [
            5.0, 32.0, 39.0, 48.0, 59.0, 73.0, 156.0, 404.0, 1276.0, 1587.0, 1621.0,
        ],
        [
            21.0, 31.0, 36.0, 48.0, 70.0, 104.0, 166.0, 804.0, 859.0, 862.0, 863.0,
        ],
        [
            42.0, 84.0, 108.0, 145.0, 177.0, 200.0, 293.0, 927.0, 1522.0, 1590.0, 1598.0,
        ],
        [
            51.0, 120.0, 155.0, 183.0, 209.0, 236.0, 317.0, 992.0, 1242.0, 1264.0, 1266.0,
        ],
    ],
};

impl Wakes {
    /// As the model takes them: the forwarder's, and the sender's.
    pub(super) fn lateness(&self) -> (Lateness, Lateness) {
        let lateness = |after_idle| Lateness { after_idle };
        (lateness(self.forwarder), lateness(self.sender))
    }
}

impl Default for Wakes {
    fn default() -> Self {
        USUAL
    }
}

/// What is being watched.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// In microseconds.
    forwarder: [Vec<f64>; 4],
    sender: [Vec<f64>; 4],
    forwarder_active: Timestamp,
    sender_active: Timestamp,
    /// The latest acknowledgment before those that are not answered.
    acked: Option<u32>,
    asked: Option<Asked>,
    answer: Option<Answer>,
}

/// Acknowledgments that have been handed to the sender, and nothing came since.
#[derive(Debug)]
struct Asked {
    since: Timestamp,
    latest: u32,
    /// One of them acknowledges nothing new.
    has_duplicates: bool,
}

/// What came then.
#[derive(Debug)]
struct Answer {
    after: Duration,
    idle: Duration,
    expected: u32,
    sent: u32,
}

impl Watch {
    /// The forwarder hands over at `now` what was due at `due`.
    pub(super) fn handed_over(&mut self, now: Timestamp, due: Timestamp) {
        if due > self.forwarder_active {
            let class = idle_class(due.since(self.forwarder_active));
            self.forwarder[class].push(micros(now.since(due)));
        }
        self.forwarder_active = now;
    }

    /// The sender is given a packet.
    pub(super) fn given(&mut self, now: Timestamp, packet: &[u8]) {
        let Some((_, acknowledgment)) = read(packet).filter(|(len, _)| *len == 0) else {
            return;
        };
        self.end_answer();
        let before = self.asked.as_ref().map(|asked| asked.latest).or(self.acked);
        let is_new = before.is_none_or(|before| (acknowledgment.wrapping_sub(before) as i32) > 0);
        let asked = self.asked.get_or_insert(Asked {
            since: now,
            latest: acknowledgment,
            has_duplicates: false,
        });
        asked.latest = acknowledgment;
        asked.has_duplicates |= !is_new;
    }

    /// The forwarder has taken a packet from either side.
    pub(super) fn taken(&mut self, now: Timestamp) {
        self.forwarder_active = now;
    }

    /// The sender has sent a packet.
    pub(super) fn sent(&mut self, now: Timestamp, packet: &[u8]) {
        let Some((len, _)) = read(packet).filter(|(len, _)| *len > 0) else {
            return;
        };
        let is_same = now.since(self.sender_active) < TURN && self.asked.is_none();
        if let Some(answer) = self.answer.as_mut().filter(|_| is_same) {
            answer.sent += len;
        } else {
            self.end_answer();
        }
        if let Some(Asked {
            since,
            latest,
            has_duplicates,
        }) = self.asked.take()
        {
            if let Some(before) = self.acked.filter(|_| !has_duplicates) {
                self.answer = Some(Answer {
                    after: now.since(since),
                    idle: since.since(self.sender_active),
                    expected: latest.wrapping_sub(before),
                    sent: len,
                });
            }
            self.acked = Some(latest);
        }
        self.sender_active = now;
    }

    /// Only an acknowledgment that let out what it acknowledged was waited for; else something else was.
    fn end_answer(&mut self) {
        if let Some(answer) = self.answer.take()
            && answer.sent + 1460 >= answer.expected
        {
            self.sender[idle_class(answer.idle)].push(micros(answer.after));
        }
    }

    /// Adds what was seen in another run.
    pub(super) fn add(&mut self, other: Self) {
        let mine = self.forwarder.iter_mut().chain(&mut self.sender);
        for (to, from) in mine.zip(other.forwarder.into_iter().chain(other.sender)) {
            to.extend(from);
        }
    }

    /// What it comes to.
    pub(super) fn wakes(self) -> Wakes {
        let mut wakes = USUAL;
        let all = wakes.forwarder.iter_mut().chain(&mut wakes.sender);
        for (quantiles, mut seen) in all.zip(self.forwarder.into_iter().chain(self.sender)) {
            if !seen.is_empty() {
                seen.sort_by(f64::total_cmp);
                *quantiles = PARTS.map(|part| quantile(&seen, part));
            }
        }
        wakes
    }
}

/// What lies at this part of sorted figures, of which there is at least one.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = (sorted.len() - 1) as f64 * part;
    let (below, above) = (sorted[place as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

fn micros(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e7).round() / 10.0
}

/// Bytes of payload, and what is acknowledged.
fn read(packet: &[u8]) -> Option<(u32, u32)> {
    let view = PacketView::parse(packet).ok()?;
    match view.transport() {
        Ok(Transport::Tcp(tcp)) => Some((tcp.payload.len() as u32, tcp.acknowledgment)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: u64) -> Timestamp {
        Timestamp::from_nanos(micros * 1000)
    }

    /// A packet of TCP over IPv4 without checksums.
    fn packet(acknowledgment: u32, len: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend((40 + len).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 198, 18, 1, 1, 198, 18, 1, 2]);
        packet.extend([0x13, 0x89, 0x9c, 0x40, 0, 0, 0, 1]);
        packet.extend(acknowledgment.to_be_bytes());
        packet.extend([0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        packet.resize(usize::from(40 + len), 7);
        packet
    }

    /// Gives the sender acknowledgments at their times, and sends segments after that.
    fn watched(given: &[(u64, u32)], sent: &[u64]) -> Watch {
        let mut watch = Watch::default();
        watch.given(at(0), &packet(1000, 0));
        watch.sent(at(10), &packet(1, 1460));
        for &(micros, acknowledgment) in given {
            watch.given(at(micros), &packet(acknowledgment, 0));
        }
        for &micros in sent {
            watch.sent(at(micros), &packet(1, 1460));
        }
        watch.given(at(1_000_000), &packet(9999, 0));
        watch
    }

    #[test]
    fn an_answer_is_timed_from_the_first_acknowledgment_that_waits() {
        let watch = watched(&[(400, 2460), (500, 3920)], &[530, 535]);
        assert_eq!(watch.sender, [vec![], vec![130.0], vec![], vec![]]);
    }

    #[test]
    fn what_lets_out_less_than_it_acknowledges_was_not_waited_for() {
        let watch = watched(&[(400, 2460), (500, 3920), (600, 6840)], &[900, 905]);
        assert!(watch.sender.iter().all(Vec::is_empty), "{watch:?}");
    }

    #[test]
    fn duplicates_are_answered_by_other_rules() {
        let watch = watched(&[(400, 1000)], &[450]);
        assert!(watch.sender.iter().all(Vec::is_empty), "{watch:?}");
    }

    #[test]
    fn the_forwarder_is_late_when_it_was_not_busy_with_something_else() {
        let mut watch = Watch::default();
        watch.taken(at(100));
        watch.handed_over(at(120), at(90));
        watch.handed_over(at(250), at(240));
        let wakes = watch.wakes();
        assert_eq!(wakes.forwarder[0], [10.0; 11]);
        assert_eq!(wakes.forwarder[1], USUAL.forwarder[1], "nothing was seen");
    }
}
