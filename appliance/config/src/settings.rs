//! The section `[dns]`, those with the engine's bounds, `[limits]`, `[timeouts]`, `[udp]`, `[tcp]`, `[tun]` and `[bypass]`, and
//! `[prefilter]` and `[control]`.

use std::net::{IpAddr, SocketAddr};
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use toml::de::DeValue;
use tungate_engine::config::{Clients, Config, Filtering, Limits, Timeouts};
use tungate_engine::dns;
use tungate_engine::recovery::CongestionControl;

use crate::address::{parse_address, parse_socket_address};
use crate::diagnostic::Problem;
use crate::document::{FromValue, Section, choice_of, text_of};
use crate::value::{Bytes, GroupName, InterfaceName, SocketPath};

/// Reassembly must have room for one datagram of the largest size, in bytes.
const LARGEST_PACKET: u64 = 64 << 10;
/// Smallest and largest buffer of one flow and direction, in bytes.
const SMALLEST_BUFFER: u64 = 16 << 10;
const LARGEST_BUFFER: u64 = 4 << 20;

/// How the pre-filter is loaded, where the host can.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prefilter {
    /// The interfaces whose packets it sees; with none it is not loaded.
    pub interfaces: Vec<String>,
    /// Whether the appliance must not start without it.
    pub required: bool,
}

/// The socket by which a running appliance is asked and told things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Whether there is one.
    pub enabled: bool,
    /// Where it is; absolute. `None` is the usual place.
    pub socket: Option<PathBuf>,
    /// The group whose members may open it, beside root.
    pub group: Option<String>,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            enabled: true,
            socket: None,
            group: None,
        }
    }
}

/// Overwrites the settings of `config` that the document has keys for.
pub(crate) fn read_engine(root: &mut Section<'_, '_>, config: &mut Config) {
    // Without `..`, so that a new setting asks for its key; shards are the driver's business.
    let Config {
        shard: _,
        shards: _,
        mtu,
        clients,
        congestion,
        router_v4,
        router_v6,
        limits,
        timeouts,
        udp_filtering,
        bypass,
    } = config;
    if let Some(section) = root.section("limits") {
        read_limits(section, limits);
    }
    if let Some(section) = root.section("timeouts") {
        read_timeouts(section, timeouts);
    }
    if let Some(mut section) = root.section("udp") {
        section.set("filtering", udp_filtering);
        section.finish();
    }
    if let Some(mut section) = root.section("tcp") {
        section.set("clients", clients);
        section.set("congestion", congestion);
        section.finish();
    }
    if let Some(mut section) = root.section("bypass") {
        section.set("enabled", bypass);
        section.finish();
    }
    if let Some(mut section) = root.section("tun") {
        set_number(&mut section, "mtu", mtu, 1280..=u16::MAX.into());
        section.set("router_v4", router_v4);
        section.set("router_v6", router_v6);
        section.finish();
    }
}

/// Reads `[dns]`: who answers queries, if not whom clients ask.
pub(crate) fn read_dns(root: &mut Section<'_, '_>) -> Option<SocketAddr> {
    let mut section = root.section("dns")?;
    let resolver = section.get::<Resolver>("resolver");
    section.finish();
    resolver.map(|resolver| resolver.into_inner().0)
}

/// Reads `[prefilter]`.
pub(crate) fn read_prefilter(root: &mut Section<'_, '_>) -> Prefilter {
    let mut prefilter = Prefilter::default();
    let Some(mut section) = root.section("prefilter") else {
        return prefilter;
    };
    let interfaces = section.list::<InterfaceName>("interfaces").unwrap_or_default();
    prefilter.interfaces = interfaces.into_iter().map(|name| name.into_inner().0).collect();
    section.set("required", &mut prefilter.required);
    if prefilter.required && !section.has("interfaces") {
        let span = section.span_of("required").unwrap_or_default();
        section.document.error(
            span,
            "there is no interface to load it on",
            "add interfaces = [\"eth0\"]",
        );
    }
    section.finish();
    prefilter
}

/// Reads `[control]`.
pub(crate) fn read_control(root: &mut Section<'_, '_>) -> Control {
    let mut control = Control::default();
    let Some(mut section) = root.section("control") else {
        return control;
    };
    section.set("enabled", &mut control.enabled);
    control.socket = section
        .get::<SocketPath>("socket")
        .map(|path| path.into_inner().0.into());
    control.group = section
        .get::<GroupName>("group")
        .map(|group| group.into_inner().0);
    section.finish();
    control
}

fn read_limits(mut section: Section<'_, '_>, limits: &mut Limits) {
    let Limits {
        flows,
        flows_per_client,
        half_open,
        sessions,
        reassembly_bytes,
        buffer_bytes,
        buffer_per_flow,
        names,
    } = limits;
    let numbers = 1..=u32::MAX.into();
    set_number(&mut section, "flows", flows, numbers.clone());
    set_number(
        &mut section,
        "flows_per_client",
        flows_per_client,
        numbers.clone(),
    );
    set_number(&mut section, "half_open", half_open, numbers.clone());
    set_number(&mut section, "sessions", sessions, numbers.clone());
    set_number(&mut section, "names", names, numbers);
    set_bytes(
        &mut section,
        "reassembly_bytes",
        reassembly_bytes,
        LARGEST_PACKET..=u32::MAX.into(),
    );
    set_bytes(
        &mut section,
        "buffer_bytes",
        buffer_bytes,
        2 * LARGEST_BUFFER..=1 << 50,
    );
    set_bytes(
        &mut section,
        "buffer_per_flow",
        buffer_per_flow,
        SMALLEST_BUFFER..=LARGEST_BUFFER,
    );
    if !buffer_per_flow.is_power_of_two() {
        let span = section.span_of("buffer_per_flow").unwrap_or_default();
        let (above, size) = (
            buffer_per_flow.next_power_of_two(),
            Bytes(u64::from(*buffer_per_flow)),
        );
        let hint = format!(
            "use {} or {}",
            Bytes(u64::from(above / 2)),
            Bytes(u64::from(above))
        );
        section
            .document
            .error(span, format!("{size} is not a power of two"), hint);
    }
    section.finish();
}

fn read_timeouts(mut section: Section<'_, '_>, timeouts: &mut Timeouts) {
    let Timeouts {
        connect,
        handshake,
        tcp_idle,
        half_close,
        unacknowledged,
        udp,
        dns,
        icmp,
        reassembly,
    } = timeouts;
    section.set("connect", connect);
    section.set("handshake", handshake);
    section.set("tcp_idle", tcp_idle);
    section.set("half_close", half_close);
    section.set("unacknowledged", unacknowledged);
    section.set("udp", udp);
    section.set("dns", dns);
    section.set("icmp", icmp);
    section.set("reassembly", reassembly);
    section.finish();
}

/// Overwrites `setting` if `key` is there and in `range`.
fn set_number<T: TryFrom<u64>>(
    section: &mut Section<'_, '_>,
    key: &'static str,
    setting: &mut T,
    range: RangeInclusive<u64>,
) {
    let Some(number) = section.get::<u64>(key) else {
        return;
    };
    store(
        section,
        number.span(),
        *number.get_ref(),
        setting,
        &range,
        &|number| number.to_string(),
    );
}

/// The same for a size in bytes.
fn set_bytes<T: TryFrom<u64>>(
    section: &mut Section<'_, '_>,
    key: &'static str,
    setting: &mut T,
    range: RangeInclusive<u64>,
) {
    let Some(bytes) = section.get::<Bytes>(key) else {
        return;
    };
    store(
        section,
        bytes.span(),
        bytes.get_ref().0,
        setting,
        &range,
        &|bytes| Bytes(bytes).to_string(),
    );
}

fn store<T: TryFrom<u64>>(
    section: &mut Section<'_, '_>,
    span: Range<usize>,
    value: u64,
    setting: &mut T,
    range: &RangeInclusive<u64>,
    show: &dyn Fn(u64) -> String,
) {
    match T::try_from(value) {
        Ok(fitting) if range.contains(&value) => *setting = fitting,
        Ok(_) | Err(_) => {
            let hint = format!("use {} to {}", show(*range.start()), show(*range.end()));
            section
                .document
                .error(span, format!("{} is out of range", show(value)), hint);
        }
    }
}

impl FromValue for Filtering {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let choices = [
            ("endpoint-independent", Self::EndpointIndependent),
            ("address-dependent", Self::AddressDependent),
        ];
        choice_of(value, &choices)
    }
}

/// A server for DNS; on port 53 unless it says another.
struct Resolver(SocketAddr);

impl FromValue for Resolver {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "the address of a resolver", "\"192.0.2.53\"")?;
        let server = match text.parse::<IpAddr>() {
            Ok(address) => SocketAddr::new(address, dns::PORT),
            Err(_) if !text.contains(':') => SocketAddr::new(parse_address(text)?, dns::PORT),
            Err(_) => parse_socket_address(text)?,
        };
        let ip = server.ip();
        if ip.is_unspecified() || ip.is_multicast() || server.port() == 0 {
            return Err(Problem::at(
                0..text.len(),
                format!("nobody can be asked at {server}"),
                "write the address of a server, such as \"192.0.2.53\"",
            ));
        }
        Ok(Self(server))
    }
}

impl FromValue for Clients {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        choice_of(value, &[("local", Self::Local), ("routed", Self::Routed)])
    }
}

impl FromValue for Option<CongestionControl> {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let choices = [
            ("auto", None),
            ("none", Some(CongestionControl::None)),
            ("cubic", Some(CongestionControl::Cubic)),
            ("bbr", Some(CongestionControl::Bbr)),
        ];
        choice_of(value, &choices)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::testing::{mistake, read};

    use super::*;

    #[test]
    fn settings_that_are_left_out_keep_their_defaults() {
        let config = read("[limits]\nflows = 1000\n[timeouts]\nudp = \"2m\"\n").engine;
        let mut expected = Config::default();
        expected.limits.flows = 1_000;
        expected.timeouts.udp = Duration::from_secs(120);
        assert_eq!(config, expected);
    }

    #[test]
    fn every_setting_has_a_key() {
        let loaded = read(
            r#"
            [limits]
            flows = 1
            flows_per_client = 2
            half_open = 3
            sessions = 4_000
            reassembly_bytes = 65_536
            buffer_bytes = "16MiB"
            buffer_per_flow = "64 KiB"
            names = 5_000
            [timeouts]
            connect = "1s"
            handshake = "2s"
            tcp_idle = "3h"
            half_close = "4m"
            unacknowledged = "5m"
            udp = "6s"
            dns = "7s"
            icmp = "8s"
            reassembly = "9s"
            [udp]
            filtering = "address-dependent"
            [tcp]
            clients = "routed"
            congestion = "bbr"
            [tun]
            mtu = 9000
            router_v4 = "192.0.2.1"
            router_v6 = "2001:db8::1"
            [bypass]
            enabled = true
            [prefilter]
            interfaces = ["eth0", "eth1"]
            required = true
            [control]
            enabled = false
            socket = "/run/gate.sock"
            group = "netadmin"
            "#,
        );
        let seconds = Duration::from_secs;
        let expected = Config {
            mtu: 9000,
            clients: Clients::Routed,
            congestion: Some(CongestionControl::Bbr),
            router_v4: "192.0.2.1".parse().unwrap(),
            router_v6: "2001:db8::1".parse().unwrap(),
            limits: Limits {
                flows: 1,
                flows_per_client: 2,
                half_open: 3,
                sessions: 4000,
                reassembly_bytes: 65_536,
                buffer_bytes: 16 << 20,
                buffer_per_flow: 64 << 10,
                names: 5_000,
            },
            timeouts: Timeouts {
                connect: seconds(1),
                handshake: seconds(2),
                tcp_idle: seconds(3 * 3600),
                half_close: seconds(240),
                unacknowledged: seconds(300),
                udp: seconds(6),
                dns: seconds(7),
                icmp: seconds(8),
                reassembly: seconds(9),
            },
            udp_filtering: Filtering::AddressDependent,
            bypass: true,
            ..Config::default()
        };
        assert_eq!(loaded.engine, expected);
        let interfaces = vec!["eth0".to_owned(), "eth1".to_owned()];
        assert_eq!(
            loaded.prefilter,
            Prefilter {
                interfaces,
                required: true
            }
        );
        assert_eq!(
            loaded.control,
            Control {
                enabled: false,
                socket: Some("/run/gate.sock".into()),
                group: Some("netadmin".to_owned())
            }
        );
    }

    #[test]
    fn mistakes_are_named_with_their_place_and_the_way_out() {
        mistake(
            "[limits]\nflows = <<0>>",
            "0 is out of range",
            "use 1 to 4294967295",
        );
        mistake(
            "[limits]\nflows = <<5_000_000_000>>",
            "5000000000 is out of range",
            "use 1 to 4294967295",
        );
        mistake(
            "[limits]\nflows = <<-1>>",
            "-1 is out of range",
            "use a number from 0",
        );
        mistake("[limits]\nflows = <<\"many\">>", "this is text, not a number", "");
        mistake(
            "[limits]\n<<flow>> = 7",
            "`flow` is not a key of [limits]",
            "did you mean `flows`?",
        );
        mistake(
            "<<[[limits]]>>\nflows = 7",
            "`limits` is a section, not a list",
            "write [limits]",
        );
        mistake(
            "[limits]\nreassembly_bytes = <<\"1 KiB\">>",
            "1 KiB is out of range",
            "use 64 KiB to",
        );
        mistake(
            "[limits]\nbuffer_bytes = \"<<8 GB>>\"",
            "`8 GB` is not a size",
            "\"4 MiB\"",
        );
        mistake(
            "[limits]\nbuffer_bytes = <<8.5>>",
            "this is a number with a fraction, not a size",
            "\"4 MiB\"",
        );
        mistake(
            "[limits]\nbuffer_per_flow = <<\"8 MiB\">>",
            "8 MiB is out of range",
            "use 16 KiB to 4 MiB",
        );
        mistake(
            "[limits]\nbuffer_per_flow = <<\"96 KiB\">>",
            "96 KiB is not a power of two",
            "use 64 KiB or 128 KiB",
        );
        mistake(
            "[timeouts]\nconnect = <<130>>",
            "a time needs a unit",
            "\"130s\" for seconds",
        );
        mistake(
            "[timeouts]\ntcp_idle = \"<<2 hours>>\"",
            "`2 hours` is not a time",
            "\"2h 4m\"",
        );
        mistake("[timeouts]\nudp = \"<<1ms>>\"", "too short", "at least 100ms");
        mistake("[timeouts]\nudp = \"<<366d>>\"", "too long", "at most 365d");
        mistake(
            "[timeouts]\nudp = \"<<99999999999999999999s>>\"",
            "not a time",
            "",
        );
        mistake(
            "[timeouts]\n<<tcp>> = \"1h\"",
            "`tcp` is not a key of [timeouts]",
            "[timeouts] knows connect, handshake",
        );
        mistake(
            "[udp]\nfiltering = \"<<endpoint>>\"",
            "`endpoint` is none of",
            "use one of \"endpoint-independent\"",
        );
        mistake(
            "[tcp]\nclients = \"<<remote>>\"",
            "`remote` is none of",
            "use one of \"local\", \"routed\"",
        );
        mistake(
            "[tcp]\ncongestion = \"<<reno>>\"",
            "`reno` is none of",
            "use one of \"auto\", \"none\", \"cubic\", \"bbr\"",
        );
        mistake("[tun]\nmtu = <<576>>", "576 is out of range", "use 1280 to 65535");
        mistake(
            "[tun]\nrouter_v4 = \"<<::1>>\"",
            "`::1` is not an IPv4 address",
            "192.0.2.1",
        );
        mistake(
            "[tun]\nrouter_v6 = \"<<192.0.2.1>>\"",
            "`192.0.2.1` is not an IPv6 address",
            "2001:db8::1",
        );
        mistake(
            "[bypass]\nenabled = <<1>>",
            "this is a number, not true or false",
            "true",
        );
        mistake(
            "[prefilter]\nrequired = <<\"yes\">>",
            "this is text, not true or false",
            "true",
        );
        mistake(
            "[prefilter]\nrequired = <<true>>",
            "no interface to load it on",
            "interfaces = [\"eth0\"]",
        );
        mistake(
            "[control]\nsocket = \"<<control.sock>>\"",
            "`control.sock` is not an absolute path",
            "\"/run/tungate/control.sock\"",
        );
        mistake(
            "[control]\ngroup = \"<<net admin>>\"",
            "`net admin` is not the name of a group",
            "getent group",
        );
    }

    #[test]
    fn a_resolver_is_an_address_with_or_without_a_port() {
        for (text, expected) in [
            ("192.0.2.53", "192.0.2.53:53"),
            ("192.0.2.53:5353", "192.0.2.53:5353"),
            ("2001:db8::53", "[2001:db8::53]:53"),
            ("[2001:db8::53]:5353", "[2001:db8::53]:5353"),
        ] {
            let loaded = read(&format!("[dns]\nresolver = \"{text}\"\n"));
            assert_eq!(loaded.policy.resolver, Some(expected.parse().unwrap()));
        }
        assert_eq!(read("[dns]\n").policy.resolver, None);
    }

    #[test]
    fn a_resolver_that_cannot_be_asked_is_a_mistake() {
        for (text, message, hint) in [
            (
                "[dns]\nresolver = \"<<dns.example>>\"",
                "is not an IP address",
                "address",
            ),
            (
                "[dns]\nresolver = \"<<192.0.2.300>>\"",
                "is not an IP address",
                "",
            ),
            ("[dns]\nresolver = \"192.0.2.53:<<99999>>\"", "is not a port", ""),
            (
                "[dns]\nresolver = \"<<0.0.0.0>>\"",
                "nobody can be asked at 0.0.0.0:53",
                "192.0.2.53",
            ),
            (
                "[dns]\nresolver = \"<<192.0.2.53:0>>\"",
                "nobody can be asked",
                "192.0.2.53",
            ),
            ("[dns]\nresolver = \"<<224.0.0.251>>\"", "nobody can be asked", ""),
            (
                "[dns]\nresolver = <<53>>",
                "the address of a resolver",
                "192.0.2.53",
            ),
            (
                "[dns]\n<<server>> = \"192.0.2.53\"",
                "is not a key of [dns]",
                "resolver",
            ),
        ] {
            mistake(text, message, hint);
        }
    }
}
