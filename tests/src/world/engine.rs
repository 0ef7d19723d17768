//! What the engine is given, and what comes of it.

use std::sync::Arc;

use tungate_engine::event::NameSource;
use tungate_engine::io::UpstreamEvent;
use tungate_engine::packet::segments;
use tungate_engine::policy::{
    Action, ListAction, ListEntry, ListProtocol, PolicySpec, Rule, RuleMatch, RuleRef,
};
use tungate_engine::{CloseReason, DropReason, Event, FlowId, Input, Judgement, Policy, Protocol, Timestamp};

use super::evidence::Line;
use super::ledger::{Circumstances, Record};
use super::link::{Delivery, Parcel};
use super::scenario::{CLIENTS, Denial, ENDPOINTS, TARGETS, Target, target_address, tcp_addresses};
use super::{Client, Handling, NAME, World, datagrams};
use crate::client::End;
use crate::packet::RST;
use crate::recorder::Output;
use crate::rig::packet_in;

impl World {
    pub(super) fn drain_device(&mut self) {
        self.recorder.full = false;
        self.flush();
    }

    pub(super) fn swap_policy(&mut self) {
        let mut spec = PolicySpec::default();
        for (&target, &how) in &self.denied {
            let addresses: Vec<_> = match target {
                Target::OfClient(client) => vec![tcp_addresses(client).1.ip()],
                Target::OfEndpoints(target) => (0..ENDPOINTS)
                    .map(|endpoint| target_address(endpoint, target).ip())
                    .collect(),
            };
            let networks: Vec<_> = addresses.into_iter().map(ipnet::IpNet::from).collect();
            let action = match how {
                Denial::List => {
                    spec.lists.extend(networks.into_iter().map(|network| ListEntry {
                        action: ListAction::Deny,
                        network,
                        protocol: ListProtocol::Any,
                        ports: None,
                        expires: None,
                    }));
                    continue;
                }
                Denial::Drop => Action::Drop,
                Denial::Reject => Action::Reject,
            };
            spec.rules.push(Rule {
                name: format!("{target:?}"),
                matches: RuleMatch {
                    targets: networks,
                    ..RuleMatch::default()
                },
                action,
            });
        }
        self.policy = Arc::new(Policy::new(spec));
        self.input(Input::Policy(Arc::clone(&self.policy)));
        for (id, flow) in self.ledger.open_flows() {
            let target = denied_target(flow);
            assert!(
                !self.denied.contains_key(&target),
                "flow {id} lives on, and {target:?} is denied"
            );
        }
    }

    /// Gives the engine a packet from a client.
    pub(super) fn feed(&mut self, parcel: &Parcel) {
        self.evidence.note(self.now, Line::Packet(parcel.packet.clone()));
        if let Some(tap) = &mut self.tapped {
            tap.at(self.now.since(Timestamp::ZERO))
                .packet(parcel.packet.clone());
        }
        if parcel.is_reset
            && let Some((client, _)) = parcel.attempt
        {
            let addresses = tcp_addresses(client);
            let open: Vec<_> = self.ledger.open_flows().map(|(id, _)| id).collect();
            for id in open {
                let flow = self.ledger.record(id);
                flow.client_reset |= (flow.client, flow.target) == addresses;
            }
        }
        self.handling = Handling {
            syn_of: parcel.attempt.filter(|_| parcel.is_syn),
            ..Handling::default()
        };
        let judgement = self
            .handle(Input::Packet(packet_in(&parcel.packet)))
            .expect("a packet is judged");
        if let Some(id) = judgement.flow {
            self.ledger.record(id).heard = self.now;
        }
        if let Some(reason) = judgement.dropped {
            assert!(
                self.handling.dropped.contains(&reason),
                "dropped for {reason}, which no event tells"
            );
        }
        self.check_datagrams(parcel, &judgement);
        self.handling.syn_of = None;
    }

    /// Gives the engine an input, and its turn.
    pub(super) fn input(&mut self, input: Input<'_>) {
        self.handle(input);
        self.flush();
    }

    pub(super) fn tell(&mut self, flow: FlowId, event: UpstreamEvent<'_>) {
        self.evidence
            .note(self.now, Line::Told(flow, format!("{event:?}")));
        self.handling = Handling::default();
        self.input(Input::Upstream(flow, event));
    }

    fn handle(&mut self, input: Input<'_>) -> Option<Judgement> {
        let judgement = self.engine.handle(self.now, input, &mut self.recorder);
        self.process();
        judgement
    }

    pub(super) fn flush(&mut self) {
        self.deadline = self.engine.flush(self.now, &mut self.recorder);
        self.process();
        for id in std::mem::take(&mut self.reset) {
            // Before the handshake is complete, a reset may refuse an ACK that belongs to something older.
            let lives = self.ledger.is_open(id) && self.ledger.record(id).established;
            assert!(!lives, "flow {id} resets its client and lives on");
        }
    }

    /// Carries out what the engine wants done.
    fn process(&mut self) {
        for output in self.recorder.take() {
            self.evidence.note(self.now, Line::Output(output.clone()));
            match output {
                Output::Packet(out, mut packet) => {
                    let protocol = packet[if packet[0] >> 4 == 4 { 9 } else { 6 }];
                    let is_reset = protocol == 6 && packet[usize::from(out.header_len) + 13] & RST != 0;
                    self.reset.extend(out.flow.filter(|_| is_reset));
                    segments(&mut packet, &out, |packet| {
                        assert!(
                            packet.len() <= usize::from(self.setup.mtu),
                            "a packet of {} bytes",
                            packet.len()
                        );
                        if let Some(tap) = &mut self.tapped {
                            tap.at(self.now.since(Timestamp::ZERO)).packet(packet.to_vec());
                        }
                        if protocol == 6 {
                            self.link.send(self.now, Delivery::ToClient(packet.to_vec()));
                        } else if let Some(message) = self.reader.read(packet) {
                            if datagrams::is_about_tcp(&message) {
                                self.link.send(self.now, Delivery::ToClient(packet.to_vec()));
                            } else {
                                self.handling.to_clients.push(message);
                            }
                        }
                    });
                }
                Output::Command(flow, command) => self.on_command(flow, command),
                Output::Event(event) => self.on_event(&event),
                Output::Forward(shard, _) => panic!("a packet for shard {}, and there is one only", shard.0),
            }
        }
    }

    fn on_event(&mut self, event: &Event) {
        self.ledger.count(event);
        match *event {
            Event::Dropped { reason, .. } => {
                assert_ne!(reason, DropReason::Internal);
                self.handling.dropped.push(reason);
            }
            Event::Opened {
                flow,
                protocol,
                client,
                target,
                ..
            } => {
                let attempt = match protocol {
                    Protocol::Tcp => Some(self.handling.syn_of.expect("a SYN opens a TCP flow")),
                    Protocol::Udp | Protocol::Icmp => None,
                };
                if let Some((number, _)) = attempt {
                    assert_eq!((client, target), tcp_addresses(number));
                }
                let twin = self.ledger.open_flows().find(|(_, other)| {
                    (other.protocol, other.client) == (protocol, client)
                        && (protocol == Protocol::Udp || other.target == target)
                });
                assert!(twin.is_none(), "flow {flow} is opened beside {twin:?}");
                assert!(!self.draining, "flow {flow} is opened while the engine drains");
                let mut record = Record::new(protocol, (client, target), attempt, self.now);
                record.used = self.next_serial();
                self.ledger.open(flow, record);
            }
            Event::Established { flow } => {
                let record = self.ledger.record(flow);
                assert!(!record.established, "flow {flow} is established twice");
                record.established = true;
                let attempt = record.attempt;
                if let Some(Client { tcp, .. }) = self
                    .clients
                    .iter()
                    .flatten()
                    .find(|client| Some(client.attempt) == attempt)
                {
                    assert!(
                        tcp.is_connected() || tcp.end().is_some(),
                        "{tcp} is not connected yet"
                    );
                }
            }
            Event::Closed {
                flow,
                reason,
                to_upstream,
                to_client,
            } => self.on_closed(flow, reason, (to_upstream, to_client)),
            Event::Named {
                flow,
                ref name,
                source,
            } => {
                assert_eq!((name.as_str(), source), (NAME, NameSource::FirstBytes));
                assert_eq!(
                    self.ledger.record(flow).attempt.map(|(client, _)| client),
                    Some(0)
                );
            }
        }
    }

    fn on_closed(&mut self, id: FlowId, reason: CloseReason, (to_upstream, to_client): (u64, u64)) {
        let record = self.ledger.record(id).clone();
        let script = record.attempt.map(|attempt| &self.scripts[&attempt]);
        let syn = self.handling.syn_of;
        // A client that is gone may have said so, and it was lost.
        let is_present = self.clients.iter().flatten().any(|client| {
            Some(client.attempt) == record.attempt && matches!(client.tcp.end(), None | Some(End::Finished))
        });
        let seen = Circumstances {
            now: self.now,
            timeouts: &self.config.timeouts,
            client_sent: script.and_then(|script| script.client_closed.then_some(script.client_sent)),
            upstream_sent: script.and_then(|script| script.upstream_closed.then_some(script.upstream_sent)),
            another_syn: syn.is_some_and(|syn| {
                record
                    .attempt
                    .is_some_and(|attempt| attempt != syn && attempt.0 == syn.0)
            }),
            denied: self.denied.contains_key(&denied_target(&record)),
            sessions_full: self.least_recent_of_all() == Some(id),
            all_is_well_since: self.all_is_well_since.filter(|_| is_present),
        };
        assert!(
            record.may_end(reason, &seen),
            "flow {id} may not end for {reason:?}: {record:?} {seen:?}"
        );
        if let CloseReason::Denied(rule) = reason {
            let name = self.policy.name(rule).to_string();
            let target = denied_target(&record);
            match rule {
                RuleRef::List(_) => assert!(
                    name.contains(&record.target.ip().to_string()),
                    "{name} denies {target:?}"
                ),
                RuleRef::Rule(_) => assert_eq!(name, format!("{target:?}")),
                RuleRef::Default | RuleRef::Resolver => panic!("neither denies nothing"),
            }
        }
        assert_eq!(to_upstream, record.taken, "flow {id}: bytes to the upstream");
        assert!(to_client <= record.given, "flow {id}: bytes to the client");
        if reason == CloseReason::Finished || record.protocol != Protocol::Tcp {
            assert_eq!(to_client, record.given, "flow {id}: bytes to the client");
        }
        self.ledger.close(id, reason);
    }

    pub(super) fn next_serial(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }
}

/// Whom a policy would have to deny for a flow to end.
fn denied_target(flow: &Record) -> Target {
    if flow.protocol == Protocol::Tcp {
        let client = (0..CLIENTS).find(|client| tcp_addresses(*client).1 == flow.target);
        return Target::OfClient(client.expect("the target is a client's"));
    }
    let target = (0..TARGETS).find(|target| {
        (0..ENDPOINTS).any(|endpoint| target_address(endpoint, *target).ip() == flow.target.ip())
    });
    Target::OfEndpoints(target.expect("the target is one of the endpoints'"))
}
