//! Groups: one of several ways out, chosen by health and, if wished, by latency.
//!
//! A member is healthy until a check or a flow has met its failure. Without checks it is tried again after two check
//! intervals. When no member is healthy all are tried in their order, since being wrong costs little then.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use socket2::Socket;
use tokio::net::lookup_host;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tungate_config::{Endpoint, GroupMode, HealthCheck, Host};

use super::dialer::DialError;
use super::{Egress, Kind};

/// Several ways out.
#[derive(Debug)]
pub(super) struct Group {
    members: Vec<Member>,
    mode: GroupMode,
    check: HealthCheck,
    /// What times are measured from.
    epoch: Instant,
}

#[derive(Debug)]
struct Member {
    egress: Arc<Egress>,
    /// Nanoseconds that the last check took; 0 before the first.
    latency: AtomicU64,
    /// Until when it counts as failed, in nanoseconds since the group's epoch.
    failed_until: AtomicU64,
}

impl Group {
    pub(super) fn new(group: &tungate_config::Group, members: impl Iterator<Item = Arc<Egress>>) -> Self {
        let member = |egress| Member {
            egress,
            latency: AtomicU64::new(0),
            failed_until: AtomicU64::new(0),
        };
        Self {
            members: members.map(member).collect(),
            mode: group.mode,
            check: group.check.clone(),
            epoch: Instant::now(),
        }
    }

    /// The members, the one to use first.
    pub(super) fn in_order(&self) -> impl Iterator<Item = &Arc<Egress>> {
        self.sorted().into_iter().map(|member| &member.egress)
    }

    fn sorted(&self) -> Vec<&Member> {
        let now = self.now();
        let mut members: Vec<_> = self.members.iter().collect();
        // The sort is stable: equals stay in the order in which they are written.
        members.sort_by_key(|member| {
            let latency = match self.mode {
                GroupMode::Failover => 0,
                GroupMode::Latency => member.latency.load(Ordering::Relaxed),
            };
            (member.failed_until.load(Ordering::Relaxed) > now, latency)
        });
        members
    }

    /// Connects by the first member that can.
    pub(super) async fn connect(
        &self,
        client: Option<IpAddr>,
        target: SocketAddr,
    ) -> Result<Socket, DialError> {
        let mut failure = DialError::Egress(anyhow!("the group has no members"));
        for member in self.sorted() {
            match member.egress.connect(client, target).await {
                Ok(socket) => return Ok(socket),
                Err(DialError::Target(error)) => return Err(DialError::Target(error)),
                Err(DialError::Egress(error)) => {
                    self.on_failure(member, &error);
                    failure = DialError::Egress(error.context(format!("by {}", member.egress.name)));
                }
            }
        }
        Err(failure)
    }

    fn on_failure(&self, member: &Member, error: &anyhow::Error) {
        let now = self.now();
        // Checks say sooner when it is healthy again; the second interval bridges the time that a check takes.
        let until = now + 2 * self.check.interval.as_nanos() as u64;
        if member.failed_until.swap(until, Ordering::Relaxed) <= now {
            let (egress, error) = (&member.egress.name, format_args!("{error:#}"));
            tracing::warn!(egress, error, "a member of a group has failed");
        }
    }

    fn on_success(&self, member: &Member, took: Duration) {
        member.latency.store(took.as_nanos() as u64, Ordering::Relaxed);
        if member.failed_until.swap(0, Ordering::Relaxed) != 0 {
            tracing::info!(
                egress = member.egress.name,
                "a member of a group is healthy again"
            );
        }
    }

    /// Checks all members once.
    async fn check(&self, target: &Endpoint) {
        let targets = match look_up(target).await {
            Ok(targets) => targets,
            // No fault of the members.
            Err(error) => {
                tracing::warn!(error = format_args!("{error:#}"), "a health check is left out");
                return;
            }
        };
        for member in &self.members {
            let start = Instant::now();
            let checked = timeout(self.check.timeout, member.egress.connect(None, targets)).await;
            match checked {
                Ok(Ok(_)) => self.on_success(member, start.elapsed()),
                Ok(Err(DialError::Egress(error))) => self.on_failure(member, &error),
                Ok(Err(DialError::Target(error))) => {
                    self.on_failure(member, &anyhow!("{target} cannot be reached: {error:?}"));
                }
                Err(_) => self.on_failure(member, &anyhow!("{target} has not answered in time")),
            }
        }
    }

    fn now(&self) -> u64 {
        // From 1 on: 0 is "never failed".
        self.epoch.elapsed().as_nanos() as u64 + 1
    }
}

/// Checks the members of the group `egress` as long as it is there.
pub(super) async fn watch(egress: Weak<Egress>) {
    let Some((target, every)) = egress.upgrade().and_then(|egress| match &egress.kind {
        Kind::Group(group) => Some((group.check.target.clone()?, group.check.interval)),
        Kind::Direct(_) | Kind::Socks5(_) | Kind::Http(_) => None,
    }) else {
        return;
    };
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(egress) = egress.upgrade() else { return };
        if let Kind::Group(group) = &egress.kind {
            group.check(&target).await;
        }
    }
}

async fn look_up(target: &Endpoint) -> anyhow::Result<SocketAddr> {
    match &target.host {
        Host::Address(address) => Ok(SocketAddr::new(*address, target.port)),
        Host::Name(name) => lookup_host((name.as_str(), target.port))
            .await
            .with_context(|| format!("cannot find the address of {name}"))?
            .next()
            .with_context(|| format!("{name} has no address")),
    }
}
