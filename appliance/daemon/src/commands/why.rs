//! `tungate why`: what the policy does with a flow, found by giving a packet of it to an engine.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use etherparse::PacketBuilder;
use tungate_engine::bypass::{BypassOrder, Ends};
use tungate_engine::dns::Learned;
use tungate_engine::io::{ChecksumState, Judgement, PacketOut, UpstreamCommand};
use tungate_engine::policy::{Action, RuleRef};
use tungate_engine::{
    Config, Engine, Event, FlowId, IngressId, Input, PacketIn, Policy, Protocol, ShardId, Timestamp, World,
};

use super::configuration;
use crate::cli::Why;
use crate::host::device_addresses;

/// Where a client's flow would come from: any port does, since rules know only those of targets.
const CLIENT_PORT: u16 = 49_152;

pub(super) fn run(why: &Why) -> Result<ExitCode> {
    let loaded = configuration(why.policy.config.as_deref())?;
    let flow = Described::parse(&why.flow, &loaded.engine)?;
    let policy = Arc::new(Policy::new(loaded.policy));
    print!("{}", explain(&flow, loaded.engine, &policy)?);
    Ok(ExitCode::SUCCESS)
}

/// A flow as the user describes it.
#[derive(Debug, PartialEq, Eq)]
struct Described {
    protocol: Protocol,
    client: SocketAddr,
    target: SocketAddr,
}

impl Described {
    /// Reads `[tcp|udp|icmp] TARGET [from CLIENT]`.
    fn parse(words: &[String], config: &Config) -> Result<Self> {
        let words: Vec<&str> = words.iter().flat_map(|word| word.split_whitespace()).collect();
        let (protocol, rest) = match words.as_slice() {
            ["tcp", rest @ ..] => (Protocol::Tcp, rest),
            ["udp", rest @ ..] => (Protocol::Udp, rest),
            ["icmp", rest @ ..] => (Protocol::Icmp, rest),
            rest => (Protocol::Tcp, rest),
        };
        let (target, client) = match rest {
            [target] => (*target, None),
            [target, "from", client] => (*target, Some(*client)),
            _ => bail!(
                "a flow is described as `[tcp|udp|icmp] TARGET [from CLIENT]`, for instance `tcp 192.0.2.7:443 from 10.0.0.2`"
            ),
        };
        let target = match protocol {
            Protocol::Icmp => SocketAddr::new(address(target)?, 0),
            Protocol::Tcp | Protocol::Udp => target.parse().with_context(|| {
                format!("{target:?} is no address with a port, as 192.0.2.7:443 or [2001:db8::7]:443 are")
            })?,
        };
        let (device_v4, device_v6) = device_addresses(config);
        let default = if target.is_ipv4() {
            IpAddr::V4(device_v4)
        } else {
            IpAddr::V6(device_v6)
        };
        let client = match client {
            None => SocketAddr::new(default, CLIENT_PORT),
            Some(text) => match text.parse() {
                Ok(client) => client,
                Err(_) => SocketAddr::new(address(text)?, CLIENT_PORT),
            },
        };
        if client.is_ipv4() != target.is_ipv4() {
            bail!(
                "client {} and target {} are of different IP versions",
                client.ip(),
                target.ip()
            );
        }
        Ok(Self {
            protocol,
            client,
            target,
        })
    }

    /// The first packet of the flow.
    fn packet(&self) -> Result<Vec<u8>> {
        let mut packet = Vec::new();
        let builder = match (self.client.ip(), self.target.ip()) {
            (IpAddr::V4(client), IpAddr::V4(target)) => {
                PacketBuilder::ipv4(client.octets(), target.octets(), 64)
            }
            (IpAddr::V6(client), IpAddr::V6(target)) => {
                PacketBuilder::ipv6(client.octets(), target.octets(), 64)
            }
            _ => bail!("client and target are of different IP versions"),
        };
        let (from, to) = (self.client.port(), self.target.port());
        match self.protocol {
            Protocol::Tcp => builder.tcp(from, to, 1, 65_535).syn().write(&mut packet, &[])?,
            Protocol::Udp => builder.udp(from, to).write(&mut packet, &[])?,
            Protocol::Icmp if self.client.is_ipv4() => {
                builder.icmpv4_echo_request(from, 1).write(&mut packet, &[])?
            }
            Protocol::Icmp => builder.icmpv6_echo_request(from, 1).write(&mut packet, &[])?,
        }
        Ok(packet)
    }
}

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Protocol::Icmp => write!(f, "icmp {} to {}", self.client.ip(), self.target.ip()),
            Protocol::Tcp | Protocol::Udp => {
                write!(f, "{} {} to {}", self.protocol, self.client, self.target)
            }
        }
    }
}

fn address(text: &str) -> Result<IpAddr> {
    text.parse().with_context(|| format!("{text:?} is no IP address"))
}

/// What becomes of the flow's first packet, in words.
fn explain(flow: &Described, config: Config, policy: &Arc<Policy>) -> Result<String> {
    let now = Timestamp::ZERO;
    let mut engine = Engine::new(config, policy.clone(), [0; 32], now);
    let mut world = Onlooker::default();
    let wall_clock = crate::driver::Clock::start().wall_offset();
    engine.handle(now, Input::WallClock(wall_clock), &mut world);
    let packet = flow.packet()?;
    let input = Input::Packet(PacketIn {
        ingress: IngressId(0),
        bytes: &packet,
        checksum: ChecksumState::Unverified,
        segment_size: None,
        reassembled: false,
    });
    let judgement = engine.handle(now, input, &mut world);
    let Judgement { dropped, rule, .. } = judgement.context("the engine has no opinion on a packet")?;
    let verdict = match world.action {
        Some(Action::Egress(egress)) => format!("egress {}", policy.egress_name(egress)),
        Some(Action::Redirect(to)) => format!("redirect to {to}"),
        Some(action @ (Action::Direct | Action::Reject | Action::Drop)) => action.name().to_owned(),
        None => match dropped {
            Some(tungate_engine::DropReason::RuleReject) => "reject".to_owned(),
            Some(_) | None => "drop".to_owned(),
        },
    };
    let by = match rule {
        None => "no list entry and no rule was asked".to_owned(),
        Some(RuleRef::List(_)) => format!(
            "the list entry `{}`",
            policy.name(rule.unwrap_or(RuleRef::Default))
        ),
        Some(rule @ RuleRef::Rule(_)) => format!("the rule `{}`", policy.name(rule)),
        Some(RuleRef::Default) => "the default: no rule fits".to_owned(),
        Some(RuleRef::Resolver) => "[dns] resolver: no rule fits".to_owned(),
    };
    let path = match rule {
        _ if world.bypassed => "the engine for its first packet, then the kernel",
        Some(RuleRef::List(_)) => "the pre-filter where it is loaded, the engine elsewhere",
        Some(RuleRef::Rule(_) | RuleRef::Default | RuleRef::Resolver) | None => "the engine",
    };
    let mut lines = format!("flow     {flow}\nverdict  {verdict}\nby       {by}\npath     {path}\n");
    if let Some(reason) = dropped {
        lines.push_str(&format!("counted  {reason}\n"));
    }
    Ok(lines)
}

/// Takes note of what the engine wants done with a flow, and does nothing.
#[derive(Default)]
struct Onlooker {
    action: Option<Action>,
    bypassed: bool,
    buffer: Vec<u8>,
}

impl World for Onlooker {
    fn has_room(&self) -> bool {
        true
    }

    fn bypass(&mut self, _: FlowId, _: Ends, _: BypassOrder) {
        self.bypassed = true;
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.buffer.resize(len, 0);
        &mut self.buffer
    }

    fn send_packet(&mut self, _: PacketOut) {}

    fn upstream(&mut self, _: FlowId, _: UpstreamCommand<'_>) {}

    fn event(&mut self, event: &Event) {
        if let Event::Opened { action, .. } = event {
            self.action = Some(*action);
        }
    }

    fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {}

    fn learned(&mut self, _: &Learned) {}
}

#[cfg(test)]
mod tests {
    use tungate_engine::policy::{EgressId, EgressSpec, ListAction, ListEntry, PolicySpec, Rule, RuleMatch};

    use super::*;

    fn explained(flow: &str, spec: PolicySpec) -> String {
        let config = Config::default();
        let flow = Described::parse(&[flow.to_owned()], &config).unwrap();
        explain(&flow, config, &Arc::new(Policy::new(spec))).unwrap()
    }

    fn rule(name: &str, target: &str, action: Action) -> Rule {
        Rule {
            name: name.to_owned(),
            matches: RuleMatch {
                targets: vec![target.parse().unwrap()],
                ..RuleMatch::default()
            },
            action,
        }
    }

    #[test]
    fn the_default_is_direct() {
        assert_eq!(
            explained("192.0.2.7:443", PolicySpec::default()),
            "flow     tcp 198.18.0.2:49152 to 192.0.2.7:443\n\
             verdict  direct\nby       the default: no rule fits\npath     the engine\n"
        );
    }

    #[test]
    fn a_list_entry_is_named() {
        let deny = ListEntry {
            action: ListAction::Deny,
            network: "2001:db8::/32".parse().unwrap(),
            protocol: tungate_engine::policy::ListProtocol::Any,
            ports: None,
            expires: None,
        };
        let spec = PolicySpec {
            lists: vec![deny],
            ..PolicySpec::default()
        };
        let text = explained("udp [2001:db8::1]:53 from 2001:db9::2", spec);
        assert!(
            text.contains("verdict  drop\nby       the list entry `deny 2001:db8::/32`"),
            "{text}"
        );
        assert!(text.contains("counted  list-destination"), "{text}");
    }

    #[test]
    fn rules_are_named_with_what_they_do() {
        let spec = PolicySpec {
            rules: vec![
                rule("proxied", "192.0.2.0/24", Action::Egress(EgressId(0))),
                rule("no pings", "198.51.100.0/24", Action::Reject),
            ],
            egresses: vec![EgressSpec {
                name: "office".to_owned(),
            }],
            ..PolicySpec::default()
        };
        let text = explained("tcp 192.0.2.7:443 from 10.0.0.2:1234", spec.clone());
        assert!(
            text.contains("verdict  egress office\nby       the rule `proxied`"),
            "{text}"
        );
        let text = explained("icmp 198.51.100.1", spec);
        assert!(
            text.contains("verdict  reject\nby       the rule `no pings`"),
            "{text}"
        );
    }

    #[test]
    fn descriptions_that_mean_nothing_are_explained() {
        for (text, expected) in [
            ("tcp 192.0.2.7", "is no address with a port"),
            ("icmp 192.0.2.7:80", "is no IP address"),
            ("192.0.2.7:80 to 10.0.0.1", "a flow is described as"),
            ("192.0.2.7:80 from fd00::1", "different IP versions"),
        ] {
            let error = Described::parse(&[text.to_owned()], &Config::default()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
