//! The kinds of mistakes that `tungate check` finds, each by a whole configuration with just that one.

use std::fs;

use tungate_config::{Diagnostic, Severity, load};

/// The configuration, the line of the mistake, what is said of it, and of the way out.
type Kind = (&'static str, usize, &'static str, &'static str);

const PROXY: &str = "[[egress]]\nname = \"p\"\nkind = \"http\"\naddress = \"192.0.2.1:80\"\n";

const KINDS: &[Kind] = &[
    // What is no TOML, and what is no key.
    ("[lists\n", 1, "unclosed table", "`]`"),
    ("[udp]\n[udp]\n", 2, "duplicate key", "keep one of them"),
    (
        "[limit]\nflows = 1\n",
        1,
        "`limit` is not a key of the file",
        "did you mean `limits`?",
    ),
    (
        "[limits]\nflow = 1\n",
        2,
        "`flow` is not a key of [limits]",
        "did you mean `flows`?",
    ),
    (
        "limits = 3\n",
        1,
        "`limits` is a section, not a number",
        "write [limits]",
    ),
    (
        "[limits]\nflows = \"many\"\n",
        2,
        "this is text, not a number",
        "write, for instance, ",
    ),
    // Numbers, sizes, times, words.
    ("[limits]\nflows = 0\n", 2, "0 is out of range", "use 1 to"),
    (
        "[limits]\nbuffer_bytes = \"8 GB\"\n",
        2,
        "`8 GB` is not a size",
        "KiB, MiB or GiB",
    ),
    (
        "[limits]\nbuffer_per_flow = \"96 KiB\"\n",
        2,
        "not a power of two",
        "64 KiB or 128 KiB",
    ),
    ("[timeouts]\nudp = 30\n", 2, "a time needs a unit", "\"30s\""),
    (
        "[timeouts]\nudp = \"soon\"\n",
        2,
        "`soon` is not a time",
        "\"30s\"",
    ),
    ("[timeouts]\nudp = \"1ms\"\n", 2, "too short", "100ms"),
    (
        "[udp]\nfiltering = \"none\"\n",
        2,
        "`none` is none of",
        "endpoint-independent",
    ),
    (
        "[tun]\nrouter_v4 = \"::1\"\n",
        2,
        "is not an IPv4 address",
        "192.0.2.1",
    ),
    // Lists.
    (
        "[lists]\nentries = [\"192.0.2.0/24\"]\n",
        2,
        "has no action",
        "write `deny 192.0.2.0/24`",
    ),
    (
        "[lists]\nentries = [\"block 192.0.2.0/24\"]\n",
        2,
        "`block` is not an action",
        "deny",
    ),
    (
        "[lists]\nentries = [\"deny\"]\n",
        2,
        "the network is missing",
        "192.0.2.0/24",
    ),
    (
        "[lists]\nentries = [\"deny 192.0.2.1/24\"]\n",
        2,
        "bits set behind its prefix",
        "192.0.2.0/24",
    ),
    ("[lists]\nentries = [\"deny 192.0.2.0/33\"]\n", 2, "33", "32"),
    (
        "[lists]\nentries = [\"deny host.example\"]\n",
        2,
        "is not an IP address",
        "names are not looked up",
    ),
    (
        "[lists]\nentries = [\"deny 192.0.2.0/24 sctp\"]\n",
        2,
        "`sctp` is not a protocol",
        "tcp",
    ),
    (
        "[lists]\nentries = [\"deny 192.0.2.0/24 tcp http\"]\n",
        2,
        "`http` is not a port",
        "65535",
    ),
    (
        "[lists]\nfiles = [\"absent.txt\"]\n",
        2,
        "cannot read the list file",
        "relative to the configuration",
    ),
    // Rules.
    (
        "[rule]\naction = \"drop\"\n",
        1,
        "`rule` is a list of sections",
        "write [[rule]]",
    ),
    (
        "[[rule]]\nname = \"x\"\n",
        1,
        "[[rule]] has no `action`",
        "action = ",
    ),
    (
        "[[rule]]\naction = \"rejct\"\n",
        2,
        "`rejct` is none of",
        "did you mean \"reject\"?",
    ),
    ("[[rule]]\naction = \"redirect\"\n", 1, "has no `to`", "to = "),
    (
        "[[rule]]\naction = \"redirect\"\nto = \"192.0.2.7\"\n",
        3,
        "has no port",
        "192.0.2.7:8080",
    ),
    (
        "[[rule]]\naction = \"redirect\"\nto = \"192.0.2.7:0\"\n",
        3,
        "port 0",
        "the port",
    ),
    (
        "[[rule]]\naction = \"drop\"\nto = \"192.0.2.7:80\"\n",
        3,
        "`to` has no effect",
        "redirect",
    ),
    (
        "[[rule]]\naction = \"egress\"\negress = \"gone\"\n",
        3,
        "there is no egress `gone`",
        "[[egress]]",
    ),
    (
        "[[rule]]\naction = \"drop\"\nclients = []\n",
        3,
        "`clients` is empty",
        "leave it out",
    ),
    (
        "[[rule]]\naction = \"drop\"\nports = [70000]\n",
        3,
        "70000 is not a port",
        "65535",
    ),
    (
        "[[rule]]\naction = \"drop\"\nports = [\"9-8\"]\n",
        3,
        "ends before it begins",
        "8-9",
    ),
    (
        "[[rule]]\naction = \"drop\"\nname = \"default\"\n",
        3,
        "cannot be named `default`",
        "another name",
    ),
    // Ways out.
    ("[[egress]]\nkind = \"direct\"\n", 1, "has no `name`", "name = "),
    (
        "[[egress]]\nname = \"a\"\nkind = \"vpn\"\n",
        3,
        "`vpn` is none of",
        "socks5",
    ),
    (
        "[[egress]]\nname = \"a\"\nkind = \"socks5\"\n",
        1,
        "has no `address`",
        ":1080",
    ),
    (
        "[[egress]]\nname = \"a\"\nkind = \"group\"\n",
        1,
        "has no `members`",
        "members = ",
    ),
    (
        "[[egress]]\nname = \"a\"\nkind = \"group\"\nmembers = [\"office\"]\n",
        4,
        "there is no egress `office`",
        "[[egress]]",
    ),
    // The pre-filter and the control socket.
    (
        "[prefilter]\nrequired = true\n",
        2,
        "no interface to load it on",
        "interfaces = ",
    ),
    (
        "[prefilter]\ninterfaces = [\"eth 0\"]\n",
        2,
        "is not the name of an interface",
        "ip link",
    ),
    (
        "[control]\nsocket = \"control.sock\"\n",
        2,
        "is not an absolute path",
        "/run/tungate/control.sock",
    ),
    (
        "[control]\ngroup = \"net admin\"\n",
        2,
        "is not the name of a group",
        "getent group",
    ),
];

/// The same for what is sound, but probably not meant so.
const WARNINGS: &[Kind] = &[
    (
        "[[rule]]\naction = \"drop\"\n[[rule]]\naction = \"direct\"\nports = [80]\n",
        3,
        "no flow reaches this rule",
        "before",
    ),
    (
        "[[egress]]\nname = \"a\"\nkind = \"direct\"\n",
        2,
        "no rule and no group uses the egress `a`",
        "rule",
    ),
    (
        "[lists]\nentries = [\"deny 192.0.2.0/24 icmp 8\"]\n",
        2,
        "ICMP has no ports",
        "leave out the port",
    ),
];

#[test]
fn each_kind_of_mistake_has_a_place_a_message_and_a_way_out() {
    assert!(KINDS.len() >= 20);
    let of = |kinds: &[Kind], severity| -> Vec<String> {
        kinds
            .iter()
            .filter_map(|kind| differs(kind, &check(kind.0), severity))
            .collect()
    };
    let differing = [of(KINDS, Severity::Error), of(WARNINGS, Severity::Warning)].concat();
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

#[test]
fn mistakes_in_what_is_read_besides_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tungate.toml");
    fs::write(
        directory.path().join("list.txt"),
        "deny 192.0.2.0/24\nreject 192.0.2.7\n",
    )
    .unwrap();
    fs::write(
        &path,
        format!("[lists]\nfiles = [\"list.txt\"]\n{PROXY}port = 80\n"),
    )
    .unwrap();
    let found: Vec<Diagnostic> = load(&path, &mut |_| ()).unwrap_err().into_iter().collect();
    let said: Vec<_> = found.iter().map(|found| found.message.as_str()).collect();
    assert_eq!(found.len(), 2, "{said:?}");
    assert!(said[0].starts_with("`port` is not a key"), "{said:?}");
    assert!(said[1].starts_with("`reject` is not an action"), "{said:?}");
    assert!(found[1].file.ends_with("list.txt"));
}

/// All mistakes in a configuration, or its warnings.
fn check(text: &str) -> Vec<Diagnostic> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tungate.toml");
    fs::write(&path, text).unwrap();
    match load(&path, &mut |_| ()) {
        Ok(loaded) => loaded.warnings,
        Err(found) => found.into_iter().collect(),
    }
}

/// What was found, unless it is as expected.
fn differs((text, line, message, hint): &Kind, found: &[Diagnostic], severity: Severity) -> Option<String> {
    if let [only] = found
        && only.severity == severity
        && only.place.as_ref().map(|place| place.line) == Some(*line)
        && only.message.contains(message)
        && only.hint.contains(hint)
    {
        return None;
    }
    let found: Vec<_> = found.iter().map(|found| found.render(false)).collect();
    Some(format!(
        "{text}\nline {line}: {message} ({hint}), but found\n{}\n",
        found.join("\n")
    ))
}
