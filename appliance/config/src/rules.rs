//! The sections `[[rule]]`: what is done with which flows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::DeValue;
use tungate_engine::Protocol;
use tungate_engine::policy::{Action, EgressId, Rule, RuleMatch};

use crate::coverage::Coverage;
use crate::diagnostic::{Problem, quoted};
use crate::document::{Document, FromValue, Section, choice_of};
use crate::egress::{ReadEgresses, undefined};
use crate::value::Name;

/// A rule, and where it and its parts are written.
pub(crate) struct ReadRule {
    rule: Rule,
    header: Range<usize>,
    name: Range<usize>,
}

/// Reads all `[[rule]]`; `egresses` are what they can refer to.
pub(crate) fn read_rules(root: &mut Section<'_, '_>, egresses: &mut ReadEgresses) -> Vec<ReadRule> {
    let mut rules = Vec::new();
    let mut number = 0;
    root.each("rule", |mut section| {
        number += 1;
        rules.extend(read_rule(&mut section, number, egresses));
        section.finish();
    });
    rules
}

/// Looks at the rules together: names that occur twice, rules that no flow reaches.
pub(crate) fn check_rules(document: &mut Document<'_>, rules: &[ReadRule]) {
    let mut names = BTreeMap::new();
    for rule in rules {
        if let Some(first) = names.insert(rule.rule.name.as_str(), rule.name.start) {
            let line = document.line(first);
            let message = format!("the rule in line {line} is named `{}` as well", rule.rule.name);
            document.error(rule.name.clone(), message, "give each rule a name of its own");
        }
    }
    let coverages: Vec<_> = rules
        .iter()
        .map(|rule| Coverage::of(&rule.rule.matches))
        .collect();
    for (index, rule) in rules.iter().enumerate() {
        let covering = coverages[..index]
            .iter()
            .position(|earlier| earlier.includes(&coverages[index]));
        if let Some(earlier) = covering.map(|earlier| &rules[earlier]) {
            let line = document.line(earlier.header.start);
            document.warning(
                rule.header.clone(),
                format!(
                    "no flow reaches this rule: `{}` in line {line} takes them all",
                    earlier.rule.name
                ),
                "put this rule before that one, or take it out",
            );
        }
    }
}

/// The plain rules.
pub(crate) fn into_rules(rules: Vec<ReadRule>) -> Vec<Rule> {
    rules.into_iter().map(|read| read.rule).collect()
}

/// Reads one rule; `None` if it has no action, which has been reported.
fn read_rule(section: &mut Section<'_, '_>, number: usize, egresses: &mut ReadEgresses) -> Option<ReadRule> {
    let header = section.span.clone();
    let (name_span, name) = match section.get::<Name>("name") {
        Some(name) => (name.span(), name.into_inner().0),
        None => (header.clone(), format!("rule {number}")),
    };
    if name == "default" || name.starts_with("deny ") || name.starts_with("allow ") {
        let message = format!("a rule cannot be named `{name}`, which reports use for something else");
        section
            .document
            .error(name_span.clone(), message, "choose another name");
    }
    let clients = section.some("clients", "leave it out for all clients");
    let targets = section.some("targets", "leave it out for all targets");
    let protocols = section.some::<Protocol>("protocols", "leave it out for all protocols");
    let ports = section.some("ports", "leave it out for all ports");
    let action = read_action(section, egresses);
    if let Some(action) = action {
        check_protocols(section.document, &protocols, !ports.is_empty(), action, egresses);
    }
    let mut matches = RuleMatch {
        clients: plain(clients),
        targets: plain(targets),
        protocols: plain(protocols),
        ports: plain(ports),
    };
    if let Some(targets) = section.span_of("targets").filter(|_| families_differ(&matches)) {
        let message = "clients and targets are of different IP versions, so this rule fits no flow";
        section
            .document
            .warning(targets, message, "use IPv4 or IPv6 networks for both");
    }
    if matches!(action, Some(Action::Redirect(_))) && matches.protocols.is_empty() {
        matches.protocols = vec![Protocol::Tcp, Protocol::Udp];
    }
    Some(ReadRule {
        rule: Rule {
            name,
            matches,
            action: action?,
        },
        header,
        name: name_span,
    })
}

/// Looks for protocols that a rule names but cannot do its work for.
fn check_protocols(
    document: &mut Document<'_>,
    protocols: &[Spanned<Protocol>],
    has_ports: bool,
    action: Action,
    egresses: &ReadEgresses,
) {
    for protocol in protocols {
        let (span, protocol) = (protocol.span(), *protocol.get_ref());
        match action {
            Action::Redirect(_) if protocol == Protocol::Icmp => {
                let hint = "take icmp out; a redirect is for TCP and UDP";
                document.error(span, "ICMP cannot be redirected to a port", hint);
            }
            Action::Egress(egress) if !egresses.carries(egress, protocol) => {
                let message = format!("this rule's egress carries no {}", protocol.name().to_uppercase());
                document.error(
                    span,
                    message,
                    format!("take {protocol} out and give it a rule of its own"),
                );
            }
            Action::Direct | Action::Drop | Action::Reject | Action::Redirect(_) | Action::Egress(_) => {
                if protocol == Protocol::Icmp && has_ports {
                    let hint = "take icmp out, or make a rule without `ports` for it";
                    document.warning(span, "ICMP has no ports, so this rule never fits it", hint);
                }
            }
        }
    }
}

/// Reads `action` and the key it needs.
fn read_action(section: &mut Section<'_, '_>, egresses: &mut ReadEgresses) -> Option<Action> {
    let word = section
        .require::<ActionWord>("action", "\"direct\"")
        .map(Spanned::into_inner);
    let to = match word {
        Some(ActionWord::Redirect) => section.require::<SocketAddr>("to", "\"192.0.2.7:8080\""),
        _ => section.get("to"),
    };
    let egress = match word {
        Some(ActionWord::Egress) => section.require::<String>("egress", "\"NAME\""),
        _ => section.get("egress"),
    };
    let word = word?;
    for (key, needed_by, action) in [
        ("to", ActionWord::Redirect, "redirect"),
        ("egress", ActionWord::Egress, "egress"),
    ] {
        if let Some(span) = section.span_of(key).filter(|_| word != needed_by) {
            let message = format!("`{key}` has no effect with this action");
            section.document.error(
                span,
                message,
                format!("write action = \"{action}\", or take `{key}` out"),
            );
        }
    }
    match word {
        ActionWord::Direct => Some(Action::Direct),
        ActionWord::Drop => Some(Action::Drop),
        ActionWord::Reject => Some(Action::Reject),
        ActionWord::Redirect => redirect(section, to?),
        ActionWord::Egress => egress_named(section, egress?, egresses).map(Action::Egress),
    }
}

fn redirect(section: &mut Section<'_, '_>, to: Spanned<SocketAddr>) -> Option<Action> {
    let address = *to.get_ref();
    if address.port() == 0 {
        section.document.error(
            to.span(),
            "nothing listens on port 0",
            "write the port to connect to",
        );
        return None;
    }
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        let message = format!("{} is not the address of a host", address.ip());
        section
            .document
            .error(to.span(), message, "write the address of the host to connect to");
        return None;
    }
    Some(Action::Redirect(address))
}

/// The egress called `name`.
fn egress_named(
    section: &mut Section<'_, '_>,
    name: Spanned<String>,
    egresses: &mut ReadEgresses,
) -> Option<EgressId> {
    let known = egresses.names.get(name.get_ref()).copied();
    match known {
        Some(egress) => egresses.mark_used(egress),
        None if section.document.is_broken() => {}
        None => {
            let (message, hint) = undefined(name.get_ref(), &egresses.names);
            section.document.error(name.span(), message, hint);
        }
    }
    known
}

/// Whether no client can be of the same IP version as any target.
fn families_differ(matches: &RuleMatch) -> bool {
    let all = |networks: &[IpNet], ipv4: bool| {
        !networks.is_empty() && networks.iter().all(|network| network.addr().is_ipv4() == ipv4)
    };
    [true, false]
        .iter()
        .any(|&ipv4| all(&matches.clients, ipv4) && all(&matches.targets, !ipv4))
}

fn plain<T>(values: Vec<Spanned<T>>) -> Vec<T> {
    values.into_iter().map(Spanned::into_inner).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ActionWord {
    Direct,
    Drop,
    Egress,
    Redirect,
    Reject,
}

impl FromValue for ActionWord {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let words = value.as_str().and_then(|text| text.trim().split_once([' ', ':']));
        let problem = |key: &str, action: &str, rest: &str| {
            let message = format!("an action is one word; `{key}` says where");
            let hint = format!(
                "write action = \"{action}\" and {key} = \"{}\"",
                quoted(rest.trim())
            );
            Err(Problem::at(
                0..value.as_str().unwrap_or_default().len(),
                message,
                hint,
            ))
        };
        match words {
            Some(("redirect", to)) => problem("to", "redirect", to),
            Some(("egress", name)) => problem("egress", "egress", name),
            Some(_) | None => choice_of(
                value,
                &[
                    ("direct", Self::Direct),
                    ("drop", Self::Drop),
                    ("reject", Self::Reject),
                    ("redirect", Self::Redirect),
                    ("egress", Self::Egress),
                ],
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use tungate_engine::policy::PortRange;

    use super::*;
    use crate::testing::{mistake, read, warning};

    #[test]
    fn rules_are_read_with_all_their_conditions() {
        let loaded = read(
            r#"
            [[rule]]
            name = "web"
            clients = ["10.0.0.0/8", "fd00::1"]
            targets = ["192.0.2.0/24", "2001:db8::/32"]
            protocols = ["tcp", "udp"]
            ports = [80, "8000-8100", "443", 0x1bb]
            action = "redirect"
            to = "[2001:db8::1]:8080"

            [[rule]]
            action = "drop"

            [[egress]]
            name = "office"
            kind = "direct"
            "#,
        );
        assert_eq!(loaded.warnings.len(), 1, "the egress is unused");
        let network = |text: &str| text.parse::<IpNet>().unwrap();
        let ports = |first, last| PortRange { first, last };
        assert_eq!(
            loaded.policy.rules,
            [
                Rule {
                    name: "web".to_owned(),
                    matches: RuleMatch {
                        clients: vec![network("10.0.0.0/8"), network("fd00::1/128")],
                        targets: vec![network("192.0.2.0/24"), network("2001:db8::/32")],
                        protocols: vec![Protocol::Tcp, Protocol::Udp],
                        ports: vec![ports(80, 80), ports(8000, 8100), ports(443, 443), ports(443, 443)],
                    },
                    action: Action::Redirect("[2001:db8::1]:8080".parse().unwrap()),
                },
                Rule {
                    name: "rule 2".to_owned(),
                    matches: RuleMatch::default(),
                    action: Action::Drop
                },
            ]
        );
    }

    #[test]
    fn a_rule_names_its_egress_even_before_it_is_defined() {
        let loaded = read(
            "[[rule]]\naction = \"egress\"\negress = \"b\"\nprotocols = [\"tcp\"]\n\
             [[rule]]\naction = \"egress\"\negress = \"a\"\n\
             [[egress]]\nname = \"a\"\nkind = \"direct\"\n[[egress]]\nname = \"b\"\nkind = \"direct\"\n",
        );
        let actions: Vec<_> = loaded.policy.rules.iter().map(|rule| rule.action).collect();
        assert_eq!(
            actions,
            [Action::Egress(EgressId(1)), Action::Egress(EgressId(0))]
        );
        assert_eq!(loaded.policy.egresses[1].name, "b");
    }

    #[test]
    fn a_redirect_without_protocols_is_for_tcp_and_udp() {
        let loaded = read("[[rule]]\naction = \"redirect\"\nto = \"192.0.2.7:80\"\n");
        assert_eq!(
            loaded.policy.rules[0].matches.protocols,
            [Protocol::Tcp, Protocol::Udp]
        );
    }

    #[test]
    fn mistakes_in_rules_are_named_with_their_place_and_the_way_out() {
        let rule = |rest: &str| format!("[[rule]]\naction = \"drop\"\n{rest}");
        mistake(
            "<<[rule]>>\naction = \"drop\"",
            "`rule` is a list of sections, not a section",
            "write [[rule]]",
        );
        mistake(
            "rule = [<<1>>]",
            "`rule` is a list of sections, not a number",
            "write [[rule]]",
        );
        mistake(
            "<<[[rule]]>>\nname = \"x\"",
            "[[rule]] has no `action`",
            "add, for instance, action = \"direct\"",
        );
        mistake(
            "[[rule]]\naction = \"<<rejct>>\"",
            "`rejct` is none of",
            "did you mean \"reject\"?",
        );
        mistake(
            "[[rule]]\naction = <<7>>",
            "this is a number, not one of",
            "\"direct\"",
        );
        mistake(
            "[[rule]]\naction = \"<<redirect 192.0.2.7:80>>\"",
            "one word",
            "action = \"redirect\" and to = \"192.0.2.7:80\"",
        );
        mistake(
            "[[rule]]\naction = \"<<egress office>>\"",
            "one word",
            "egress = \"office\"",
        );
        mistake(
            "<<[[rule]]>>\naction = \"redirect\"",
            "has no `to`",
            "to = \"192.0.2.7:8080\"",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = <<\"192.0.2.7:0\">>",
            "port 0",
            "write the port",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = \"<<192.0.2.7>>\"",
            "has no port",
            "192.0.2.7:8080",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = \"<<2001:db8::g>>:80\"",
            "not an IP address",
            "such as",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = \"<<proxy>>:80\"",
            "not an IP address",
            "names are not looked up",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = \"192.0.2.7:<<65536>>\"",
            "`65536` is not a port",
            "0 to 65535",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = <<\"0.0.0.0:80\">>",
            "not the address of a host",
            "address of the host",
        );
        mistake(
            "[[rule]]\naction = \"redirect\"\nto = \"192.0.2.7:80\"\nprotocols = [\"tcp\", <<\"icmp\">>]",
            "ICMP cannot be redirected",
            "take icmp out",
        );
        mistake(
            &rule("to = <<\"192.0.2.7:80\">>"),
            "`to` has no effect",
            "action = \"redirect\"",
        );
        mistake(
            &rule("egress = <<\"office\">>"),
            "`egress` has no effect",
            "action = \"egress\"",
        );
        mistake(
            "[[rule]]\naction = \"egress\"\negress = <<\"ofice\">>\n[[egress]]\nname = \"office\"\nkind = \"direct\"",
            "there is no egress `ofice`",
            "did you mean `office`?",
        );
        mistake(
            "[[rule]]\naction = \"egress\"\negress = <<\"office\">>",
            "there is no egress `office`",
            "define it: [[egress]]",
        );
        mistake(
            &rule("<<client>> = []"),
            "`client` is not a key of [[rule]]",
            "did you mean `clients`?",
        );
        mistake(
            &rule("<<\"\">> = 1"),
            "is not a key of [[rule]]",
            "[[rule]] knows name, clients",
        );
        mistake(
            &rule("clients = <<[]>>"),
            "`clients` is empty",
            "leave it out for all clients",
        );
        mistake(
            &rule("clients = <<\"10.0.0.0/8\">>"),
            "`clients` is a list, not text",
            "clients = [\"10.0.0.0/8\"]",
        );
        mistake(
            &rule("clients = [\"::/0\", \"<<10.0.0.1/8>>\"]"),
            "bits set",
            "10.0.0.0/8",
        );
        mistake(
            &rule("targets = [\"<<example.com>>\"]"),
            "not an IP address",
            "names are not looked up",
        );
        mistake(
            &rule("targets = [<<\"\">>]"),
            "this is empty",
            "such as \"192.0.2.0/24\"",
        );
        mistake(
            &rule("protocols = [\"<<TCP>>\"]"),
            "`TCP` is none of",
            "did you mean \"tcp\"?",
        );
        mistake(
            &rule("protocols = [\"<<any>>\"]"),
            "`any` is not a protocol",
            "leave out `protocols`",
        );
        mistake(&rule("ports = [<<-1>>]"), "-1 is not a port", "0 to 65535");
        mistake(&rule("ports = [<<70000>>]"), "70000 is not a port", "0 to 65535");
        mistake(&rule("ports = [<<80.5>>]"), "a number with a fraction", "443");
        mistake(
            &rule("ports = [\"<<8100-8000>>\"]"),
            "ends before it begins",
            "write 8000-8100",
        );
        mistake(
            &rule("ports = [\"<<any>>\"]"),
            "`any` is not a port",
            "leave out `ports`",
        );
        mistake(&rule("name = <<1>>"), "this is a number, not a name", "\"web\"");
        mistake(&rule("name = \"<< x>>\""), "no blanks around it", "take them out");
        mistake(
            &rule("name = <<\"default\">>"),
            "cannot be named `default`",
            "another name",
        );
        mistake(
            &rule("name = \"a\"\nports = [1]\n[[rule]]\nname = <<\"a\">>\naction = \"drop\""),
            "the rule in line 3 is named `a` as well",
            "name of its own",
        );
        mistake(
            "[[rule]]\nname = \"rule 2\"\nports = [1]\naction = \"drop\"\n<<[[rule]]>>\naction = \"drop\"",
            "the rule in line 2 is named `rule 2` as well",
            "name of its own",
        );
    }

    #[test]
    fn rules_that_are_probably_not_meant_so_give_a_warning() {
        warning(
            "[[rule]]\nname = \"all tcp\"\nprotocols = [\"tcp\"]\naction = \"drop\"\n<<[[rule]]>>\nports = [80]\nprotocols = [\"tcp\"]\naction = \"direct\"",
            "no flow reaches this rule: `all tcp` in line 1 takes them all",
            "put this rule before that one",
        );
        warning(
            "[[rule]]\naction = \"drop\"\nports = [80]\nprotocols = [<<\"icmp\">>]",
            "ICMP has no ports",
            "take icmp out",
        );
        warning(
            "[[rule]]\naction = \"drop\"\nclients = [\"10.0.0.0/8\"]\ntargets = <<[\"2001:db8::/32\"]>>",
            "different IP versions",
            "IPv4 or IPv6",
        );
    }
}
