//! What a world knows of each flow, from what it has seen itself, and what follows for how the flow may end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tungate_engine::config::Timeouts;
use tungate_engine::io::UpstreamError;
use tungate_engine::{CloseReason, Counters, DropReason, Event, FlowId, Protocol, Timestamp};

/// Names one connection of a client: the client, and how many it has had before.
pub type Attempt = (u8, u32);

/// What can end does so within this time, once nothing hinders it: two retransmission timeouts, which may have grown to
/// a minute each, and some.
const PROGRESS: Duration = Duration::from_secs(130);

/// A flow, seen from outside the engine.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) protocol: Protocol,
    pub(super) client: SocketAddr,
    /// The first target of a mapping.
    pub(super) target: SocketAddr,
    /// The connection whose SYN opened it.
    pub(super) attempt: Option<Attempt>,
    pub(super) opened: Timestamp,
    pub(super) connected: Option<Timestamp>,
    pub(super) established: bool,
    /// When the client's last packet of this flow entered the engine.
    pub(super) heard: Timestamp,
    /// When the driver last took or gave bytes, or told of an end.
    pub(super) moved: Timestamp,
    pub(super) upstream: Upstream,
    /// The client has sent a reset since the flow was opened.
    pub(super) client_reset: bool,
    /// Orders sessions by use.
    pub(super) used: u32,
    /// The driver knows that bytes wait, or that there is room.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Bytes taken from the engine, and given to it.
    pub(super) taken: u64,
    pub(super) given: u64,
    pub(super) eof_told: bool,
    pub(super) close_write: bool,
    /// Addresses that a mapping's client has sent to.
    pub(super) contacts: BTreeSet<IpAddr>,
    pub(super) dns_only: bool,
    pub(super) closed: Option<CloseReason>,
}

/// The upstream's end of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upstream {
    /// Being connected.
    Connecting,
    /// Connected; or a socket for datagrams.
    Open,
    /// Could not be connected, and the engine was told so.
    Failed(UpstreamError),
    /// Has reset the connection, and the engine was told so.
    Reset,
    /// The engine has ended it: by close, or by abort.
    Ended {
        /// By [`UpstreamCommand::Abort`](tungate_engine::io::UpstreamCommand::Abort).
        aborted: bool,
    },
}

/// What a world knows at the moment when a flow ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances<'a> {
    pub(super) now: Timestamp,
    pub(super) timeouts: &'a Timeouts,
    /// The client has sent all it will, this many bytes.
    pub(super) client_sent: Option<u64>,
    /// The upstream has sent all it will, this many bytes.
    pub(super) upstream_sent: Option<u64>,
    /// A SYN for another connection on the same addresses is being handled.
    pub(super) another_syn: bool,
    /// The policy denies the target.
    pub(super) denied: bool,
    /// There are as many sessions as may be, and this is the least recently used.
    pub(super) sessions_full: bool,
    /// Since when nothing hinders the flow, and both sides have closed.
    pub(super) all_is_well_since: Option<Timestamp>,
}

impl Record {
    /// A flow that was opened at `now`.
    pub(super) fn new(
        protocol: Protocol,
        (client, target): (SocketAddr, SocketAddr),
        attempt: Option<Attempt>,
        now: Timestamp,
    ) -> Self {
        Self {
            protocol,
            client,
            target,
            attempt,
            opened: now,
            connected: None,
            established: false,
            heard: now,
            moved: now,
            upstream: if protocol == Protocol::Tcp {
                Upstream::Connecting
            } else {
                Upstream::Open
            },
            client_reset: false,
            used: 0,
            readable: false,
            writable: false,
            taken: 0,
            given: 0,
            eof_told: false,
            close_write: false,
            contacts: BTreeSet::new(),
            dns_only: true,
            closed: None,
        }
    }

    /// Whether the engine may end it for `reason`: each reason asks for something that has happened, or for time
    /// that has passed.
    pub(super) fn may_end(&self, reason: CloseReason, seen: &Circumstances<'_>) -> bool {
        let Circumstances { now, timeouts, .. } = *seen;
        let is_stuck = seen.all_is_well_since.is_some_and(|since| now > since + PROGRESS);
        match reason {
            CloseReason::ConnectTimeout
            | CloseReason::HandshakeTimeout
            | CloseReason::IdleTimeout
            | CloseReason::HalfCloseTimeout
            | CloseReason::ClientUnresponsive
                if is_stuck && self.protocol == Protocol::Tcp =>
            {
                false
            }
            CloseReason::Finished => {
                self.eof_told
                    && self.close_write
                    && seen.client_sent == Some(self.taken)
                    && seen.upstream_sent == Some(self.given)
            }
            CloseReason::ClientReset => self.client_reset,
            CloseReason::UpstreamReset => self.upstream == Upstream::Reset,
            CloseReason::ConnectFailed(error) => self.upstream == Upstream::Failed(error),
            CloseReason::ConnectTimeout => self.connected.is_none() && now >= self.opened + timeouts.connect,
            CloseReason::HandshakeTimeout => {
                !self.established && self.connected.is_some_and(|at| now >= at + timeouts.handshake)
            }
            CloseReason::IdleTimeout => match self.protocol {
                Protocol::Tcp => now >= self.moved.max(self.heard) + timeouts.tcp_idle,
                Protocol::Udp | Protocol::Icmp => now == self.moved + self.session_timeout(timeouts),
            },
            CloseReason::HalfCloseTimeout => {
                (self.eof_told || seen.client_sent.is_some()) && now >= self.moved + timeouts.half_close
            }
            CloseReason::ClientUnresponsive => now >= self.heard + timeouts.unacknowledged,
            CloseReason::Replaced => seen.another_syn,
            CloseReason::Denied(_) => seen.denied,
            CloseReason::Evicted => seen.sessions_full,
            CloseReason::BufferLimit | CloseReason::Internal => false,
        }
    }

    /// The latest time at which it may still be open if nothing more happens; the engine may know of bytes that the
    /// driver has not seen, so this is no sooner than its own limit.
    pub(super) fn must_end(&self, timeouts: &Timeouts) -> Timestamp {
        let quiet_since = self.moved.max(self.heard);
        match (self.protocol, self.connected) {
            (Protocol::Udp | Protocol::Icmp, _) => self.moved + self.session_timeout(timeouts),
            (Protocol::Tcp, None) => self.opened + timeouts.connect,
            (Protocol::Tcp, Some(at)) if !self.established => at + timeouts.handshake,
            (Protocol::Tcp, Some(_)) if self.eof_told || self.close_write => {
                quiet_since + timeouts.half_close
            }
            (Protocol::Tcp, Some(_)) => quiet_since + timeouts.tcp_idle,
        }
    }

    fn session_timeout(&self, timeouts: &Timeouts) -> Duration {
        match self.protocol {
            Protocol::Icmp => timeouts.icmp,
            Protocol::Udp | Protocol::Tcp if self.dns_only => timeouts.dns,
            Protocol::Udp | Protocol::Tcp => timeouts.udp,
        }
    }
}

/// Every flow there has been, and how often each thing has been told.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    records: BTreeMap<FlowId, Record>,
    open: BTreeSet<FlowId>,
    drops: BTreeMap<DropReason, u64>,
    ends: BTreeMap<&'static str, u64>,
    reached: BTreeSet<String>,
}

impl Ledger {
    /// Notes an event for the counters and for [`Ledger::reached`].
    pub(super) fn count(&mut self, event: &Event) {
        let name = match event {
            Event::Dropped { reason, .. } => {
                *self.drops.entry(*reason).or_default() += 1;
                format!("dropped {reason}")
            }
            Event::Opened { protocol, .. } => format!("opened {protocol}"),
            Event::Established { .. } => "established".to_owned(),
            Event::Closed { reason, .. } => {
                *self.ends.entry(reason.name()).or_default() += 1;
                format!("closed {}", reason.name())
            }
            Event::Named { .. } => "named".to_owned(),
        };
        self.reached.insert(name);
    }

    /// Opens a record.
    ///
    /// # Panics
    ///
    /// If there has been a flow with this id.
    pub(super) fn open(&mut self, id: FlowId, record: Record) {
        assert!(
            self.records.insert(id, record).is_none(),
            "flow {id} is opened twice"
        );
        self.open.insert(id);
    }

    /// Notes how a flow ended.
    ///
    /// # Panics
    ///
    /// If it is not open.
    pub(super) fn close(&mut self, id: FlowId, reason: CloseReason) {
        assert!(self.open.remove(&id), "flow {id} ends without being open");
        self.record(id).closed = Some(reason);
    }

    /// The record of a flow.
    ///
    /// # Panics
    ///
    /// If there has been none.
    pub(super) fn record(&mut self, id: FlowId) -> &mut Record {
        self.records
            .get_mut(&id)
            .unwrap_or_else(|| panic!("flow {id} was never opened"))
    }

    /// Whether a flow is open.
    pub(super) fn is_open(&self, id: FlowId) -> bool {
        self.open.contains(&id)
    }

    /// The flows that are open, in the order of their ids.
    pub(super) fn open_flows(&self) -> impl Iterator<Item = (FlowId, &Record)> {
        self.open.iter().map(|id| (*id, &self.records[id]))
    }

    /// Every flow there has been, in the order of their ids.
    pub(super) fn all_flows(&self) -> impl Iterator<Item = (FlowId, &Record)> {
        self.records.iter().map(|(id, record)| (*id, record))
    }

    /// The kinds of event there have been, with protocol or reason.
    pub(super) fn reached(&self) -> &BTreeSet<String> {
        &self.reached
    }

    /// Checks that the engine's counters say what its events have said.
    ///
    /// # Panics
    ///
    /// If they do not.
    pub(super) fn check_counters(&self, counters: &Counters) {
        for reason in DropReason::ALL {
            let told = self.drops.get(reason).copied().unwrap_or(0);
            assert_eq!(
                counters.drops(*reason),
                told,
                "packets dropped for {reason}, counted and told"
            );
        }
        assert_eq!(*counters.ends(), self.ends, "ends of flows, counted and told");
    }
}
