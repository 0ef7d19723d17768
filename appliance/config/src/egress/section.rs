//! The sections `[[egress]]`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;
use tungate_engine::Protocol;
use tungate_engine::policy::EgressId;

use super::{
    Egress, EgressKind, Endpoint, Group, GroupMode, HealthCheck, Host, Login, Password, Proxy, SocketOptions,
    Source,
};
use crate::address::{parse_address, parse_port, parse_socket_address};
use crate::diagnostic::{Problem, nearest, quoted};
use crate::document::{Document, FromValue, Section, choice_of, number_of, text_of};
use crate::value::{InterfaceName, Name};

/// All egresses of a document, and what rules need to refer to them.
#[derive(Default)]
pub(crate) struct ReadEgresses {
    /// In the order in which they are written, so that an [`EgressId`] is an index.
    pub(crate) egresses: Vec<Egress>,
    /// Also those that could not be read.
    pub(crate) names: BTreeMap<String, EgressId>,
    /// Where each name is written.
    spans: Vec<Range<usize>>,
    used: BTreeSet<EgressId>,
}

/// Reads all `[[egress]]`; names of files are relative to `directory`.
pub(crate) fn read_egresses(root: &mut Section<'_, '_>, directory: &Path) -> ReadEgresses {
    let mut read = ReadEgresses::default();
    let mut groups = Vec::new();
    root.each("egress", |mut section| {
        let name = section.require::<Name>("name", "\"office\"");
        if let Some(name) = &name {
            read.add_name(&mut section, name);
        }
        let kind = read_kind(&mut section, directory, &mut |members| {
            groups.push((read.egresses.len(), members))
        });
        if let (Some(name), Some(kind)) = (name, kind) {
            read.egresses.push(Egress {
                name: name.into_inner().0,
                kind,
            });
        }
        section.finish();
    });
    for (index, members) in groups {
        let members = read.members(root.document, members);
        if let Some(Egress {
            kind: EgressKind::Group(group),
            ..
        }) = read.egresses.get_mut(index)
        {
            group.members = members;
        }
    }
    read
}

impl ReadEgresses {
    /// Whether the egress can relay `protocol` at all.
    pub(crate) fn carries(&self, egress: EgressId, protocol: Protocol) -> bool {
        match self
            .egresses
            .get(usize::from(egress.0))
            .map(|egress| &egress.kind)
        {
            // It could not be read, which has been reported.
            None => true,
            Some(EgressKind::Direct { .. }) => true,
            Some(EgressKind::Socks5(_)) => protocol != Protocol::Icmp,
            Some(EgressKind::Http(_)) => protocol == Protocol::Tcp,
            Some(EgressKind::Group(group)) => {
                group.members.iter().any(|&member| self.carries(member, protocol))
            }
        }
    }

    /// Remembers that a rule refers to the egress.
    pub(crate) fn mark_used(&mut self, egress: EgressId) {
        self.used.insert(egress);
    }

    /// Warns of egresses that nothing refers to.
    pub(crate) fn warn_of_unused(&self, document: &mut Document<'_>) {
        for (name, id) in &self.names {
            if !self.used.contains(id) {
                let message = format!("no rule and no group uses the egress `{name}`");
                let hint =
                    format!("add a rule with action = \"egress\" and egress = \"{name}\", or take it out");
                document.warning(self.spans[usize::from(id.0)].clone(), message, hint);
            }
        }
    }

    fn add_name(&mut self, section: &mut Section<'_, '_>, name: &Spanned<Name>) {
        let text = &name.get_ref().0;
        if text == "direct" {
            let hint = "choose another name; a last rule without conditions sends all the rest to it";
            section.document.error(
                name.span(),
                "`direct` is what happens where no egress is named",
                hint,
            );
        }
        if let Some(first) = self.names.get(text) {
            let line = section.document.line(self.spans[usize::from(first.0)].start);
            let message = format!("the egress in line {line} is named `{text}` as well");
            return section
                .document
                .error(name.span(), message, "give each egress a name of its own");
        }
        match u16::try_from(self.spans.len()) {
            Ok(index) => {
                self.names.insert(text.clone(), EgressId(index));
                self.spans.push(name.span());
            }
            Err(_) => section.document.error(
                name.span(),
                "there are more than 65,536 egresses",
                "take some out",
            ),
        }
    }

    /// Looks up the members of a group.
    fn members(&mut self, document: &mut Document<'_>, names: Vec<Spanned<String>>) -> Vec<EgressId> {
        let mut members = Vec::new();
        for name in names {
            let Some(&id) = self.names.get(name.get_ref()) else {
                if !document.is_broken() {
                    let (message, hint) = undefined(name.get_ref(), &self.names);
                    document.error(name.span(), message, hint);
                }
                continue;
            };
            let member = self.egresses.iter().find(|egress| egress.name == *name.get_ref());
            if members.contains(&id) {
                document.error(name.span(), "this member is named twice", "name it once");
            } else if matches!(
                member,
                Some(Egress {
                    kind: EgressKind::Group(_),
                    ..
                })
            ) {
                document.error(
                    name.span(),
                    "a group cannot have groups in it",
                    "name that group's members",
                );
            } else {
                members.push(id);
            }
        }
        self.used.extend(&members);
        members
    }
}

/// What to say when a rule or group names an egress that is not there.
pub(crate) fn undefined(name: &str, egresses: &BTreeMap<String, EgressId>) -> (String, String) {
    let hint = match nearest(name, egresses.keys().map(String::as_str)) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("define it: [[egress]] with name = \"{}\"", quoted(name)),
    };
    (format!("there is no egress `{}`", quoted(name)), hint)
}

/// Reads `kind` and the keys that go with it; members of a group are passed on for later.
fn read_kind(
    section: &mut Section<'_, '_>,
    directory: &Path,
    add_members: &mut dyn FnMut(Vec<Spanned<String>>),
) -> Option<EgressKind> {
    let kind = section.require::<KindWord>("kind", "\"socks5\"")?.into_inner();
    section.qualify(&format!("of kind \"{}\"", kind.name()));
    match kind {
        KindWord::Direct => Some(EgressKind::Direct {
            socket: read_socket(section),
        }),
        KindWord::Socks5 => read_proxy(section, directory).map(EgressKind::Socks5),
        KindWord::Http => {
            let proxy = read_proxy(section, directory)?;
            if proxy
                .login
                .as_ref()
                .is_some_and(|login| login.username.contains(':'))
            {
                let span = section.span_of("username").unwrap_or_default();
                let hint = "the user's name ends at the first colon on the wire (RFC 7617); use another user";
                section
                    .document
                    .error(span, "an HTTP proxy's user has no colon in the name", hint);
            }
            Some(EgressKind::Http(proxy))
        }
        KindWord::Group => {
            let members = section.some("members", "name the egresses that it is made of");
            if !section.has("members") {
                let hint = "add, for instance, members = [\"office\", \"backup\"]";
                section
                    .document
                    .error(section.span.clone(), "the group has no `members`", hint);
            }
            add_members(members);
            let mut group = Group {
                members: Vec::new(),
                mode: GroupMode::default(),
                check: HealthCheck::default(),
            };
            section.set("mode", &mut group.mode);
            group.check.target = section.get("check").map(Spanned::into_inner);
            section.set("check_interval", &mut group.check.interval);
            section.set("check_timeout", &mut group.check.timeout);
            Some(EgressKind::Group(group))
        }
    }
}

fn read_proxy(section: &mut Section<'_, '_>, directory: &Path) -> Option<Proxy> {
    let address = section.require::<Endpoint>("address", "\"192.0.2.10:1080\"");
    let login = read_login(section, directory);
    let socket = read_socket(section);
    Some(Proxy {
        address: address?.into_inner(),
        login,
        socket,
    })
}

fn read_login(section: &mut Section<'_, '_>, directory: &Path) -> Option<Login> {
    let username = section.get::<Credential>("username");
    let inline = section.get::<Credential>("password");
    let file = section.get::<String>("password_file");
    let span = |key| section.span_of(key);
    match (span("username"), span("password"), span("password_file")) {
        (_, Some(_), Some(file)) => {
            section.document.error(
                file,
                "the password is there already",
                "keep `password` or `password_file`",
            );
        }
        (Some(username), None, None) => {
            let hint = "add password_file = \"FILE\" or password = \"…\"";
            section.document.error(username, "the user has no password", hint);
        }
        (None, Some(password), None) | (None, None, Some(password)) => {
            section
                .document
                .error(password, "a password without a user", "add username = \"…\"");
        }
        (_, _, _) => {}
    }
    let password = match (inline, file) {
        (Some(inline), None) => Password::Inline(inline.into_inner().0),
        (None, Some(file)) => Password::File(directory.join(file.into_inner())),
        (None, None) | (Some(_), Some(_)) => return None,
    };
    Some(Login {
        username: username?.into_inner().0,
        password,
    })
}

fn read_socket(section: &mut Section<'_, '_>) -> SocketOptions {
    SocketOptions {
        mark: section.get::<Mark>("mark").map(|mark| mark.into_inner().0),
        interface: section
            .get::<InterfaceName>("interface")
            .map(|name| name.into_inner().0),
        source: section.get("source").map(Spanned::into_inner).unwrap_or_default(),
    }
}

#[derive(Clone, Copy)]
enum KindWord {
    Direct,
    Group,
    Http,
    Socks5,
}

/// A firewall mark.
struct Mark(u32);

/// A user's name or password.
struct Credential(String);

impl KindWord {
    const ALL: [Self; 4] = [Self::Direct, Self::Socks5, Self::Http, Self::Group];

    const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Group => "group",
            Self::Http => "http",
            Self::Socks5 => "socks5",
        }
    }
}

impl FromValue for KindWord {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        choice_of(value, &Self::ALL.map(|kind| (kind.name(), kind)))
    }
}

impl FromValue for GroupMode {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        choice_of(value, &[("failover", Self::Failover), ("latency", Self::Latency)])
    }
}

impl FromValue for Mark {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        number_of(value, 1..=u32::MAX.into()).map(|mark| Self(mark as u32))
    }
}

impl FromValue for Credential {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "text", "\"alice\"")?;
        if text.len() > 255 {
            let hint = "proxies take at most 255 bytes (RFC 1929)";
            return Err(Problem::at(0..0, "this is too long", hint));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromValue for Source {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        match text_of(value, "an address or \"client\"", "\"192.0.2.1\"")? {
            "client" => Ok(Self::Client),
            text => {
                parse_address(text)
                    .map(Self::Address)
                    .map_err(|problem| match nearest(text, ["client"]) {
                        Some(meant) => Problem {
                            hint: format!("did you mean \"{meant}\"?"),
                            ..problem
                        },
                        None => problem,
                    })
            }
        }
    }
}

impl FromValue for Endpoint {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "a host with a port as text", "\"192.0.2.10:1080\"")?;
        let (host, port) = match text.rsplit_once(':') {
            Some((name, port)) if is_host_name(name) => {
                let start = text.len() - port.len();
                let port = parse_port(port).map_err(|problem| problem.shifted(start))?;
                (Host::Name(name.to_owned()), port)
            }
            None if is_host_name(text) => {
                let hint = format!("add it: {text}:1080");
                return Err(Problem::at(
                    0..text.len(),
                    format!("`{}` has no port", quoted(text)),
                    hint,
                ));
            }
            Some(_) | None => {
                let address = parse_socket_address(text)?;
                (Host::Address(address.ip()), address.port())
            }
        };
        if port == 0 {
            return Err(Problem::at(
                0..text.len(),
                "nothing listens on port 0",
                "write the port to connect to",
            ));
        }
        Ok(Self { host, port })
    }
}

/// Whether `text` can be looked up as a host's name, and is no attempt at an IPv4 address.
fn is_host_name(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.len() <= 253 && text.split('.').all(is_label) && !last.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::{mistake, read, warning};

    /// A document with a rule that uses the egress `a`, whose keys follow.
    fn egress(keys: &str) -> String {
        format!("[[rule]]\naction = \"egress\"\negress = \"a\"\n[[egress]]\nname = \"a\"\n{keys}")
    }

    fn kind(keys: &str) -> EgressKind {
        read(&egress(keys)).egresses.remove(0).kind
    }

    #[test]
    fn a_direct_egress_may_have_a_mark_an_interface_and_a_source() {
        let keys = "kind = \"direct\"\nmark = 0x10\ninterface = \"wg0\"\nsource = \"192.0.2.1\"\n";
        let source = Source::Address("192.0.2.1".parse().unwrap());
        let socket = SocketOptions {
            mark: Some(16),
            interface: Some("wg0".to_owned()),
            source,
        };
        assert_eq!(kind(keys), EgressKind::Direct { socket });
        let EgressKind::Direct { socket } = kind("kind = \"direct\"\nsource = \"client\"\n") else {
            panic!()
        };
        assert_eq!(socket.source, Source::Client);
    }

    #[test]
    fn a_proxy_has_an_address_or_a_name_and_perhaps_a_login() {
        let EgressKind::Socks5(proxy) = kind("kind = \"socks5\"\naddress = \"[2001:db8::1]:1080\"\n") else {
            panic!()
        };
        assert_eq!(proxy.address.to_string(), "[2001:db8::1]:1080");
        assert_eq!((proxy.login, proxy.socket), (None, SocketOptions::default()));

        let keys = "kind = \"http\"\naddress = \"proxy.example:3128\"\nusername = \"alice\"\npassword_file = \"secret\"\n";
        let EgressKind::Http(proxy) = kind(keys) else {
            panic!()
        };
        assert_eq!(
            proxy.address,
            Endpoint {
                host: Host::Name("proxy.example".to_owned()),
                port: 3128
            }
        );
        let password = Password::File("secret".into());
        assert_eq!(
            proxy.login,
            Some(Login {
                username: "alice".to_owned(),
                password
            })
        );
    }

    #[test]
    fn a_password_is_not_printed_for_debugging() {
        let keys =
            "kind = \"socks5\"\naddress = \"192.0.2.1:1080\"\nusername = \"alice\"\npassword = \"hunter2\"\n";
        let loaded = read(&egress(keys));
        assert!(!format!("{loaded:?}").contains("hunter2"));
    }

    #[test]
    fn a_group_names_members_that_may_be_defined_below_it() {
        let group = "kind = \"group\"\nmembers = [\"c\", \"b\"]\nmode = \"latency\"\ncheck = \"192.0.2.1:443\"\n\
                     check_interval = \"1m 30s\"\ncheck_timeout = \"500ms\"\n\
                     [[egress]]\nname = \"b\"\nkind = \"direct\"\n[[egress]]\nname = \"c\"\nkind = \"direct\"\n";
        let target = Endpoint {
            host: Host::Address("192.0.2.1".parse().unwrap()),
            port: 443,
        };
        let check = HealthCheck {
            target: Some(target),
            interval: Duration::from_secs(90),
            timeout: Duration::from_millis(500),
        };
        let members = vec![EgressId(2), EgressId(1)];
        assert_eq!(
            kind(group),
            EgressKind::Group(Group {
                members,
                mode: GroupMode::Latency,
                check
            })
        );
    }

    #[test]
    fn mistakes_are_named_with_their_place_and_the_way_out() {
        let wrong = |keys: &str, message: &str, hint: &str| mistake(&egress(keys), message, hint);
        let proxy = |keys: &str| format!("kind = \"socks5\"\naddress = \"192.0.2.1:1080\"\n{keys}");
        mistake(
            "<<[[egress]]>>\nkind = \"direct\"",
            "[[egress]] has no `name`",
            "name = \"office\"",
        );
        mistake(
            &egress("").replace("[[egress]]", "<<[[egress]]>>"),
            "has no `kind`",
            "kind = \"socks5\"",
        );
        wrong(
            "kind = \"<<socks>>\"",
            "`socks` is none of",
            "did you mean \"socks5\"?",
        );
        wrong(
            "kind = \"direct\"\n<<address>> = \"192.0.2.1:1\"",
            "not a key of [[egress]] of kind \"direct\"",
            "knows name, kind, mark",
        );
        wrong(
            "kind = \"direct\"\nmark = <<0>>",
            "0 is out of range",
            "from 1 to 4294967295",
        );
        wrong(
            "kind = \"direct\"\ninterface = \"<<eth0/1>>\"",
            "not the name of an interface",
            "ip link",
        );
        wrong(
            "kind = \"direct\"\nsource = \"<<clients>>\"",
            "not an IP address",
            "did you mean \"client\"?",
        );
        mistake(
            &egress("kind = \"http\"").replace("[[egress]]", "<<[[egress]]>>"),
            "has no `address`",
            "192.0.2.10:1080",
        );
        wrong(
            "kind = \"http\"\naddress = \"<<proxy.example>>\"",
            "has no port",
            "proxy.example:1080",
        );
        wrong(
            "kind = \"http\"\naddress = \"proxy.example:<<http>>\"",
            "`http` is not a port",
            "0 to 65535",
        );
        wrong(
            "kind = \"http\"\naddress = \"<<proxy.example:0>>\"",
            "port 0",
            "write the port",
        );
        wrong(
            "kind = \"http\"\naddress = \"<<192.0.2.300>>:80\"",
            "not an IP address",
            "at most 255",
        );
        wrong(
            "kind = \"http\"\naddress = \"<<2001:db8::1:80>>\"",
            "has no port",
            "[2001:db8::1:80]:8080",
        );
        wrong(
            "kind = \"http\"\naddress = \"<<http://192.0.2.1:80>>\"",
            "not an address with a port",
            "leave out `http://`",
        );
        wrong(
            &proxy("username = <<\"alice\">>"),
            "the user has no password",
            "password_file",
        );
        wrong(
            &proxy("password = <<\"x\">>"),
            "a password without a user",
            "username",
        );
        wrong(
            &proxy("username = \"a\"\npassword = \"x\"\npassword_file = <<\"f\">>"),
            "there already",
            "keep `password` or",
        );
        wrong(
            &proxy("username = \"a\"\npassword = <<7>>"),
            "this is a number, not text",
            "",
        );
        wrong(
            "kind = \"http\"\naddress = \"192.0.2.1:80\"\nusername = <<\"a:b\">>\npassword = \"x\"",
            "no colon",
            "RFC 7617",
        );
        mistake(
            &egress("kind = \"group\"").replace("[[egress]]", "<<[[egress]]>>"),
            "has no `members`",
            "members = [",
        );
        wrong(
            "kind = \"group\"\nmembers = <<[]>>",
            "`members` is empty",
            "name the egresses",
        );
        wrong(
            "kind = \"group\"\nmembers = [<<\"b\">>]",
            "there is no egress `b`",
            "",
        );
        wrong(
            "kind = \"group\"\nmembers = [<<\"a\">>]",
            "a group cannot have groups in it",
            "that group's members",
        );
        let member = "\n[[egress]]\nname = \"b\"\nkind = \"direct\"";
        wrong(
            &format!("kind = \"group\"\nmembers = [\"b\", <<\"b\">>]{member}"),
            "named twice",
            "name it once",
        );
        let group = |keys: &str| format!("kind = \"group\"\nmembers = [\"b\"]\n{keys}{member}");
        wrong(
            &group("mode = \"<<fail-over>>\""),
            "`fail-over` is none of",
            "did you mean \"failover\"?",
        );
        wrong(
            &group("check_interval = <<30>>"),
            "a time needs a unit",
            "\"30s\" for seconds",
        );
        wrong(
            &group("check_interval = \"<<30 sec>>\""),
            "`30 sec` is not a time",
            "\"2h 4m\"",
        );
        wrong(&group("check_timeout = \"<<0s>>\""), "too short", "100ms");
        wrong(
            "kind = \"direct\"\n[[egress]]\nname = <<\"a\">>\nkind = \"direct\"",
            "the egress in line 5 is named `a` as well",
            "name of its own",
        );
        mistake(
            "[[egress]]\nname = <<\"direct\">>\nkind = \"direct\"",
            "`direct` is what happens",
            "a last rule",
        );
    }

    #[test]
    fn a_rule_cannot_send_an_egress_what_it_does_not_carry() {
        let rule = |protocols: &str, kind: &str| {
            format!(
                "[[rule]]\nprotocols = {protocols}\naction = \"egress\"\negress = \"a\"\n\
                 [[egress]]\nname = \"a\"\nkind = \"{kind}\"\naddress = \"192.0.2.1:1080\"\n"
            )
        };
        mistake(
            &rule("[\"tcp\", <<\"udp\">>]", "http"),
            "carries no UDP",
            "take udp out",
        );
        mistake(
            &rule("[<<\"icmp\">>]", "socks5"),
            "carries no ICMP",
            "take icmp out",
        );
        read(&rule("[\"tcp\", \"udp\"]", "socks5"));
    }

    #[test]
    fn an_egress_that_nothing_uses_gives_a_warning() {
        warning(
            "[[egress]]\nname = <<\"a\">>\nkind = \"direct\"",
            "no rule and no group uses the egress `a`",
            "egress = \"a\"",
        );
    }
}
