//! What is known of a flow for its record, whatever it speaks.

use std::net::SocketAddr;

use tungate_engine::event::NameSource;
use tungate_engine::policy::{Action, RuleRef};
use tungate_engine::{CloseReason, DropReason, FlowId, Policy, Protocol, Timestamp};

use super::roles::Begins;
use super::stream::Delivered;
use crate::outcome::{FlowRecord, Path};

macro_rules! anomalies {
    ($($(#[$doc:meta])* $variant:ident => $text:literal,)*) => {
        /// A peculiarity of a captured flow.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Anomaly { $($(#[$doc])* $variant,)* }

        impl Anomaly {
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $text),)*];
        }
    };
}

// In the order of their names.
anomalies! {
    /// A signature or authentication option had to be taken off.
    Authentication => "authentication-option",
    /// Bytes behind a FIN.
    DataAfterFin => "data-after-fin",
    /// Bytes from the target after the client had reset the connection.
    DataAfterReset => "data-after-reset",
    /// Something acknowledged was never captured.
    Hole => "hole",
    /// A probe below the next sequence number.
    KeepAlive => "keep-alive",
    /// The beginning was not captured, or is no SYN.
    NoSyn => "no-syn",
    /// A connection that was answered, but whose answer was not captured.
    NoSynAck => "no-syn-ack",
    /// A segment came before another that precedes it.
    OutOfOrder => "out-of-order",
    /// Bytes outside the window that the receiver had opened.
    OutsideWindow => "outside-window",
    /// Two segments with different bytes for one place.
    Overlap => "overlap",
    /// A reset that carries data.
    ResetData => "reset-data",
    /// Segments that were sent again.
    Retransmission => "retransmission",
    /// Packets were cut by the snap length.
    SnapCut => "snap-cut",
    /// Both sides have sent a SYN.
    SplitHandshake => "split-handshake",
    /// Data on the SYN.
    SynData => "syn-data",
    /// The SYN was sent again.
    SynRetransmit => "syn-retransmit",
    /// Nobody answered until the capture's end.
    Unanswered => "unanswered",
    /// An urgent pointer.
    Urgent => "urgent",
    /// The window was closed.
    ZeroWindow => "zero-window",
}

/// A set of anomalies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Anomalies(u32);

impl Anomalies {
    pub(super) fn add(&mut self, anomaly: Anomaly) {
        self.0 |= 1 << anomaly as u32;
    }

    fn names(self) -> Vec<&'static str> {
        let has = |anomaly: Anomaly| self.0 & 1 << anomaly as u32 != 0;
        let names = Anomaly::ALL.iter();
        names
            .filter(|(anomaly, _)| has(*anomaly))
            .map(|(_, name)| *name)
            .collect()
    }
}

/// What a policy said of a flow, and which policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decided {
    pub(super) action: Action,
    pub(super) rule: RuleRef,
    /// Index of the policy in the run's list.
    pub(super) policy: u16,
}

/// A flow's entries in the report that do not depend on what it speaks.
#[derive(Debug)]
pub(super) struct Card {
    pub(super) number: u64,
    pub(super) protocol: Protocol,
    pub(super) client: SocketAddr,
    pub(super) target: SocketAddr,
    first_packet: u64,
    first_time: Timestamp,
    last_time: Timestamp,
    packets: u64,
    /// The engine's flow for it, the latest if there were several.
    pub(super) engine: Option<FlowId>,
    pub(super) decided: Option<Decided>,
    /// Why the engine refuses it, as long as it does.
    pub(super) refused: Option<Refused>,
    /// Which path refused it.
    pub(super) path: Path,
    pub(super) closed: Option<CloseReason>,
    pub(super) name: Option<(String, NameSource)>,
    pub(super) anomalies: Anomalies,
}

/// What stands for the verdict on a refused flow's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) reason: DropReason,
    pub(super) rule: Option<RuleRef>,
    pub(super) policy: u16,
}

/// How a flow came out.
pub(super) struct Result<'a> {
    pub(super) to_target: &'a Delivered,
    pub(super) to_client: &'a Delivered,
    /// What there is to say of a flow that nothing has ended.
    pub(super) alive: &'static str,
    pub(super) exact: Option<bool>,
}

impl Card {
    pub(super) fn new(number: u64, begins: &Begins, protocol: Protocol, packet: u64, now: Timestamp) -> Self {
        Self {
            number,
            protocol,
            client: begins.client,
            target: begins.target,
            first_packet: packet,
            first_time: now,
            last_time: now,
            packets: 0,
            engine: None,
            decided: None,
            refused: None,
            path: Path::Engine,
            closed: None,
            name: None,
            anomalies: Anomalies::default(),
        }
    }

    /// Notes a captured packet of the flow.
    pub(super) fn on_packet(&mut self, now: Timestamp) {
        self.packets += 1;
        self.last_time = now;
    }

    /// Notes that something happened to it.
    pub(super) fn on_event(&mut self, now: Timestamp) {
        self.last_time = self.last_time.max(now);
    }

    /// The flow's record.
    pub(super) fn record(self, policies: &[std::sync::Arc<Policy>], result: &Result<'_>) -> FlowRecord {
        let refused = self.refused.filter(|_| self.decided.is_none());
        let rule = match (self.decided, refused) {
            (Some(decided), _) => Some((decided.policy, decided.rule)),
            (None, Some(refused)) => refused.rule.map(|rule| (refused.policy, rule)),
            (None, None) => None,
        };
        let verdict = match (self.decided, refused) {
            (Some(decided), _) => decided.action.name(),
            (None, Some(refused)) if refused.reason == DropReason::RuleReject => "reject",
            (None, Some(_)) => "drop",
            (None, None) => "none",
        };
        let egress = match self.decided {
            Some(Decided {
                action: Action::Egress(egress),
                policy,
                ..
            }) => Some(policies[usize::from(policy)].egress_name(egress).to_owned()),
            _ => None,
        };
        let (end, reason) = match (self.closed, refused) {
            (Some(closed), _) => (end_name(self.protocol, closed), Some(closed.name())),
            (None, Some(refused)) if refused.reason == DropReason::RuleReject => {
                ("rejected", Some(refused.reason.name()))
            }
            (None, Some(refused)) => ("dropped", Some(refused.reason.name())),
            (None, None) => (result.alive, None),
        };
        FlowRecord {
            id: self.number,
            protocol: self.protocol,
            client: self.client,
            target: self.target,
            first_packet: self.first_packet,
            first_time: self.first_time,
            last_time: self.last_time,
            packets: self.packets,
            verdict,
            rule: rule.map(|(policy, rule)| policies[usize::from(policy)].name(rule).to_string()),
            path: if refused.is_some() {
                self.path
            } else {
                Path::Engine
            },
            egress,
            name_source: self.name.as_ref().map(|(_, source)| *source),
            name: self.name.map(|(name, _)| name),
            to_target: result.to_target.stream(),
            to_client: result.to_client.stream(),
            end,
            reason,
            anomalies: self.anomalies.names(),
            exact: result.exact,
        }
    }
}

fn end_name(protocol: Protocol, closed: CloseReason) -> &'static str {
    use tungate_engine::io::UpstreamError;
    match closed {
        CloseReason::Finished => "fin",
        CloseReason::ClientReset | CloseReason::UpstreamReset => "rst",
        CloseReason::ConnectFailed(UpstreamError::Refused) => "refused",
        CloseReason::ConnectFailed(UpstreamError::Unreachable(_)) => "unreachable",
        CloseReason::ConnectFailed(
            UpstreamError::TimedOut | UpstreamError::Egress | UpstreamError::Exhausted,
        ) => "failed",
        CloseReason::IdleTimeout if protocol != Protocol::Tcp => "idle",
        CloseReason::ConnectTimeout
        | CloseReason::HandshakeTimeout
        | CloseReason::IdleTimeout
        | CloseReason::HalfCloseTimeout
        | CloseReason::ClientUnresponsive => "timeout",
        CloseReason::Replaced => "replaced",
        CloseReason::Denied(_) => "denied",
        CloseReason::Evicted => "evicted",
        CloseReason::BufferLimit => "refused",
        CloseReason::Internal => "internal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anomalies_are_listed_once_and_sorted() {
        let names: Vec<_> = Anomaly::ALL.iter().map(|(_, name)| *name).collect();
        assert!(names.is_sorted(), "{names:?}");
        let mut anomalies = Anomalies::default();
        anomalies.add(Anomaly::SynRetransmit);
        anomalies.add(Anomaly::Hole);
        anomalies.add(Anomaly::SynRetransmit);
        assert_eq!(anomalies.names(), ["hole", "syn-retransmit"]);
    }
}
