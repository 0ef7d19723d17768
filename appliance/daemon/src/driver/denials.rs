//! Log lines about what the policy denies: a packet that starts no flow has no end to tell of it.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tungate_engine::io::Judgement;
use tungate_engine::packet::PacketView;
use tungate_engine::policy::RuleRef;
use tungate_engine::{DropReason, Engine, PacketIn, Policy, Timestamp};

/// A client that tries again is told of once in this time.
const QUIET_TIME: Duration = Duration::from_secs(30);
/// How many denials are remembered; those that share a place push each other out.
const REMEMBERED: usize = 256;
/// Lines in a second, however many are denied.
const LINES_PER_SECOND: u32 = 20;

/// What has been told lately.
pub(super) struct Denials {
    told: Box<[Option<(Denial, Timestamp)>]>,
    hasher: RandomState,
    /// When the present second began, and what was told in it.
    second: Timestamp,
    lines: u32,
    untold: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Denial {
    client: IpAddr,
    target: SocketAddr,
    protocol: u8,
    rule: RuleRef,
}

/// A line to write.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    denial: Denial,
    /// How many denials before it have got no line.
    untold: u64,
}

impl Denials {
    pub(super) fn new() -> Self {
        Self {
            told: vec![None; REMEMBERED].into_boxed_slice(),
            hasher: RandomState::new(),
            second: Timestamp::ZERO,
            lines: 0,
            untold: 0,
        }
    }

    /// Takes note of what became of `packet`, and writes a line if the policy denied it.
    pub(super) fn note(
        &mut self,
        packet: &PacketIn<'_>,
        judgement: &Judgement,
        policy: &Policy,
        engine: &Engine,
        now: Timestamp,
    ) {
        let (
            Some(
                reason @ (DropReason::ListSource
                | DropReason::ListDestination
                | DropReason::RuleDrop
                | DropReason::RuleReject),
            ),
            Some(rule),
        ) = (judgement.dropped, judgement.rule)
        else {
            return;
        };
        if !tracing::enabled!(target: "tungate::denied", tracing::Level::INFO) {
            return;
        }
        let Ok(view) = PacketView::parse(packet.bytes) else {
            return;
        };
        let denial = Denial {
            client: view.source(),
            target: SocketAddr::new(view.destination(), view.port().unwrap_or(0)),
            protocol: view.protocol().unwrap_or(0),
            rule,
        };
        if let Some(Line { denial, untold }) = self.line(denial, now) {
            tracing::info!(
                target: "tungate::denied",
                protocol = %protocol_name(denial.protocol),
                client = %denial.client,
                target = %denial.target,
                name = engine.name_of(packet.ingress, denial.client, denial.target.ip()),
                rule = %policy.name(rule),
                %reason,
                untold = (untold > 0).then_some(untold),
                "flow denied"
            );
        }
    }

    /// Says whether `denial` gets a line.
    fn line(&mut self, denial: Denial, now: Timestamp) -> Option<Line> {
        let place = &mut self.told[self.hasher.hash_one(denial) as usize % REMEMBERED];
        if let Some((told, at)) = place
            && *told == denial
            && now.since(*at) < QUIET_TIME
        {
            return None;
        }
        if now.since(self.second) >= Duration::from_secs(1) {
            (self.second, self.lines) = (now, 0);
        }
        if self.lines == LINES_PER_SECOND {
            self.untold += 1;
            return None;
        }
        self.lines += 1;
        *place = Some((denial, now));
        Some(Line {
            denial,
            untold: std::mem::take(&mut self.untold),
        })
    }
}

fn protocol_name(number: u8) -> &'static str {
    match number {
        1 | 58 => "icmp",
        6 => "tcp",
        17 => "udp",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(port: u16) -> Denial {
        Denial {
            client: IpAddr::from([10, 0, 0, 1]),
            target: SocketAddr::from(([192, 0, 2, 7], port)),
            protocol: 6,
            rule: RuleRef::Rule(0),
        }
    }

    fn seconds(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_client_that_tries_again_is_told_of_once_in_a_while() {
        let mut denials = Denials::new();
        assert!(denials.line(denial(80), seconds(0)).is_some());
        for again in [1, 3, 7, 29] {
            assert_eq!(denials.line(denial(80), seconds(again)), None);
        }
        assert!(denials.line(denial(80), seconds(30)).is_some());
    }

    #[test]
    fn a_flood_of_denials_gets_few_lines_and_is_counted() {
        let mut denials = Denials::new();
        let lines = (1..=1000).filter(|&port| denials.line(denial(port), seconds(1)).is_some());
        assert_eq!(lines.count(), LINES_PER_SECOND as usize);
        let next = denials.line(denial(2000), seconds(2)).unwrap();
        assert_eq!(next.untold, 1000 - u64::from(LINES_PER_SECOND));
    }
}
