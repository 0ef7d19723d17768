//! Answers, made of what the driver and the supervisor tell.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use tungate_config::{Egress, EgressKind};
use tungate_engine::io::Stage;
use tungate_engine::policy::{Action, ListEntry, Rule};
use tungate_engine::{DropReason, FlowId, Policy};

use super::{Report, api};
use crate::driver::{Asker, FlowReport, RuleCounts, Totals};

/// Payload bytes of each flow at one time, to upstream and to the client.
pub(super) type Look = HashMap<FlowId, (u64, u64)>;

/// Up to `limit` flows, the busiest first: those that have moved the most since the look before, or since they opened.
/// Returns them with a look for the next time.
pub(super) async fn flows(
    asker: &Asker,
    limit: usize,
    before: Option<(&Look, Duration)>,
) -> (api::Flows, Look) {
    let mut all = asker.flows().await;
    let bytes = |flow: &FlowReport| (flow.progress.to_upstream, flow.progress.to_client);
    let since = |flow: &FlowReport| {
        let (to_upstream, to_client) = bytes(flow);
        let then = before
            .and_then(|(look, _)| look.get(&flow.id))
            .copied()
            .unwrap_or_default();
        (
            to_upstream.saturating_sub(then.0),
            to_client.saturating_sub(then.1),
        )
    };
    let moved = |flow: &FlowReport| since(flow).0 + since(flow).1;
    all.sort_by_cached_key(|flow| std::cmp::Reverse((moved(flow), bytes(flow), flow.id.as_u64())));
    let look = all.iter().map(|flow| (flow.id, bytes(flow))).collect();
    let shown = all.iter().take(limit).map(|flow| {
        let rates = before.map(|(_, time)| {
            // A flow that has opened in between has had less time.
            let seconds = time.min(flow.age).as_secs_f64().max(1e-3);
            (since(flow).0 as f64 / seconds, since(flow).1 as f64 / seconds)
        });
        shown_flow(flow, rates)
    });
    let flows = api::Flows {
        total: all.len(),
        flows: shown.collect(),
    };
    (flows, look)
}

fn shown_flow(flow: &FlowReport, rates: Option<(f64, f64)>) -> api::Flow {
    api::Flow {
        id: flow.id.to_string(),
        protocol: flow.protocol.to_string(),
        client: flow.client.to_string(),
        target: flow.target.to_string(),
        name: flow.name.clone(),
        rule: flow.rule().to_owned(),
        egress: flow.egress().to_owned(),
        state: match flow.progress.stage {
            Stage::Connecting => api::State::Connecting,
            Stage::Handshake => api::State::Handshake,
            Stage::Open => api::State::Open,
            Stage::ClientClosed => api::State::ClientClosed,
            Stage::UpstreamClosed => api::State::UpstreamClosed,
            Stage::Closing => api::State::Closing,
        },
        bypassed: flow.bypassed,
        age_seconds: round(flow.age.as_secs_f64()),
        to_upstream: flow.progress.to_upstream,
        to_client: flow.progress.to_client,
        to_upstream_per_second: rates.map(|rates| rates.0.round()),
        to_client_per_second: rates.map(|rates| rates.1.round()),
    }
}

/// To milliseconds.
fn round(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

/// One set of counters, wherever a packet was dropped.
pub(super) fn counters(totals: Vec<Totals>, report: Report) -> api::Counters {
    let mut dropped: BTreeMap<String, u64> = DropReason::ALL
        .iter()
        .map(|&reason| {
            let count = totals.iter().map(|totals| totals.counters.drops(reason)).sum();
            (reason.name().to_owned(), count)
        })
        .collect();
    let mut dropped_by_prefilter = 0;
    for (reason, packets) in report.dropped {
        *dropped.entry(reason).or_default() += packets;
        dropped_by_prefilter += packets;
    }
    let mut ended: BTreeMap<String, u64> = BTreeMap::new();
    for (reason, count) in totals.iter().flat_map(|totals| totals.counters.ends()) {
        *ended.entry((*reason).to_owned()).or_default() += count;
    }
    let sum = |of: fn(&Totals) -> u64| totals.iter().map(of).sum();
    let bypassed_flows = sum(|totals| totals.bypassed);
    let (open_flows, buffer_bytes) = (open_flows(&totals), sum(|totals| totals.buffer_bytes));
    let (lost_by_device, lost_between_shards) = (
        sum(|totals| totals.lost_by_device),
        sum(|totals| totals.lost_between_shards),
    );
    let mut by_rule = RuleCounts::default();
    by_rule.merge(report.by_rule);
    for totals in totals {
        by_rule.merge(totals.by_rule);
    }
    let (dropped_by_rule, dropped_by_other_rules) = by_rule.into_parts();
    api::Counters {
        open_flows,
        buffer_bytes,
        bypassed_flows,
        dropped,
        dropped_by_rule,
        dropped_by_other_rules,
        ended,
        lost_by_device,
        lost_between_shards,
        dropped_by_prefilter,
    }
}

pub(super) fn open_flows(totals: &[Totals]) -> usize {
    totals.iter().map(|totals| totals.open_flows).sum()
}

pub(super) fn buffer_bytes(totals: &[Totals]) -> u64 {
    totals.iter().map(|totals| totals.buffer_bytes).sum()
}

/// Up to `limit` entries in force at `now`, in seconds since the Unix epoch, of which the last `added` have come by the
/// control socket; with `address` those it falls under.
pub(super) fn entries(
    lists: &[ListEntry],
    added: usize,
    now: u64,
    address: Option<IpAddr>,
    limit: usize,
) -> api::Entries {
    let in_force = |entry: &ListEntry| entry.expires.is_none_or(|expires| expires > now);
    let fits = |entry: &ListEntry| address.is_none_or(|address| entry.network.contains(&address));
    let configured = lists.len() - added;
    let shown = lists
        .iter()
        .enumerate()
        .filter(|(_, entry)| in_force(entry) && fits(entry))
        .take(limit)
        .map(|(place, entry)| api::Entry {
            entry: entry.to_string(),
            origin: if place < configured {
                api::Origin::Configuration
            } else {
                api::Origin::Control
            },
            expires_in_seconds: entry.expires.map(|expires| expires - now),
        });
    api::Entries {
        total: lists.iter().filter(|entry| in_force(entry)).count(),
        entries: shown.collect(),
    }
}

pub(super) fn policy(policy: &Policy, egresses: &[Egress]) -> api::Policy {
    let spec = policy.spec();
    let egress = |egress: &Egress| api::Egress {
        name: egress.name.clone(),
        kind: match egress.kind {
            EgressKind::Direct { .. } => "direct",
            EgressKind::Socks5(_) => "socks5",
            EgressKind::Http(_) => "http",
            EgressKind::Group(_) => "group",
        }
        .to_owned(),
    };
    api::Policy {
        list_entries: spec.lists.len(),
        rules: spec.rules.iter().map(|rule| shown_rule(rule, policy)).collect(),
        egresses: egresses.iter().map(egress).collect(),
    }
}

fn shown_rule(rule: &Rule, policy: &Policy) -> api::Rule {
    let ports = rule.matches.ports.iter().map(|range| {
        if range.first == range.last {
            range.first.to_string()
        } else {
            format!("{}-{}", range.first, range.last)
        }
    });
    api::Rule {
        name: rule.name.clone(),
        clients: rule.matches.clients.iter().map(ToString::to_string).collect(),
        targets: rule.matches.targets.iter().map(ToString::to_string).collect(),
        protocols: rule.matches.protocols.iter().map(ToString::to_string).collect(),
        ports: ports.collect(),
        action: rule.action.name().to_owned(),
        to: match rule.action {
            Action::Egress(egress) => Some(policy.egress_name(egress).to_owned()),
            Action::Redirect(to) => Some(to.to_string()),
            Action::Direct | Action::Reject | Action::Drop => None,
        },
    }
}
