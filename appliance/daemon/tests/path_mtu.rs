//! Path MTU discovery through the appliance: what must not be fragmented is reported, everything else arrives.

mod support;

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, setsockopt};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};
use support::{Lab, Namespace, skipped, text, wait_until};

sockopt_impl!(
    /// How IPv4 datagrams may be fragmented: IP_PMTUDISC_….
    Discover,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// How IPv6 datagrams may be fragmented.
    Discover6,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// The known MTU of a connected IPv4 socket's path.
    Mtu, GetOnly, libc::IPPROTO_IP, libc::IP_MTU, libc::c_int);
sockopt_impl!(
    /// The known MTU of a connected IPv6 socket's path.
    Mtu6, GetOnly, libc::IPPROTO_IPV6, libc::IPV6_MTU, libc::c_int);

/// What the narrow link carries; the device carries 1500.
const NARROW: i32 = 1300;

/// Where the narrow link is.
#[derive(Debug, Clone, Copy)]
enum Narrow {
    /// This host's own, so that its kernel refuses what is too big.
    Uplink,
    /// Behind a router, which says so by ICMP.
    BehindRouter,
}

/// A server behind a narrow link, at addresses of which nobody has learned anything: 203.0.113.x and 2001:db8:1::x.
struct Site {
    lab: Lab,
    far: Namespace,
}

impl Site {
    fn new(narrow: Narrow) -> Self {
        let (lab, far) = (Lab::new(), Namespace::new());
        lab.server.enter(|| {
            for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{key}"), "1").unwrap();
            }
        });
        lab.server.ip(&format!(
            "link add far type veth peer name near netns {}",
            far.pid()
        ));
        for (namespace, device, v4, v6) in [
            (&lab.server, "far", "10.98.0.1/24", "fd98::1/64"),
            (&far, "near", "10.98.0.2/24", "fd98::2/64"),
        ] {
            namespace.ip(&format!("address add {v4} dev {device}"));
            namespace.ip(&format!("address add {v6} dev {device} nodad"));
            namespace.ip(&format!("link set {device} up"));
        }
        far.ip("-4 route add default via 10.98.0.1");
        far.ip("-6 route add default via fd98::1");
        lab.server.ip("-4 route add 203.0.113.0/24 via 10.98.0.2");
        lab.server.ip("-6 route add 2001:db8:1::/48 via fd98::2");
        for number in 1..=9 {
            far.ip(&format!("address add 203.0.113.{number}/32 dev lo"));
            far.ip(&format!("address add 2001:db8:1::{number}/128 dev lo nodad"));
        }
        let ends = match narrow {
            Narrow::Uplink => [(&lab.host, "uplink"), (&lab.server, "downlink")],
            Narrow::BehindRouter => [(&lab.server, "far"), (&far, "near")],
        };
        for (namespace, device) in ends {
            namespace.ip(&format!("link set {device} mtu {NARROW}"));
        }
        Self { lab, far }
    }
}

/// Address number `number` of the far server.
fn address(is_ipv6: bool, number: u8) -> String {
    if is_ipv6 {
        format!("2001:db8:1::{number}")
    } else {
        format!("203.0.113.{number}")
    }
}

fn path_mtu(socket: &UdpSocket, is_ipv6: bool) -> i32 {
    if is_ipv6 {
        getsockopt(&socket.as_fd(), Mtu6).unwrap()
    } else {
        getsockopt(&socket.as_fd(), Mtu).unwrap()
    }
}

/// A client's socket that is connected to `to`, and says this of fragments: IP_PMTUDISC_….
fn client(site: &Site, to: SocketAddr, discovery: libc::c_int) -> UdpSocket {
    let socket = site
        .lab
        .host
        .udp(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
    if to.is_ipv4() {
        setsockopt(&socket.as_fd(), Discover, &discovery).unwrap();
    } else {
        setsockopt(&socket.as_fd(), Discover6, &discovery).unwrap();
    }
    socket.connect(to).unwrap();
    socket
}

/// Sends datagrams of `size` bytes until the server has got one, which it must in the end; what comes back from there
/// in the same size must come, too.
fn gets_through(client: &UdpSocket, server: &UdpSocket, size: usize) {
    let mut buffer = [0; 4000];
    server.set_nonblocking(true).unwrap();
    let mut from = None;
    wait_until(|| {
        // An error is one about a datagram before.
        let _ = client.send(&vec![7; size]);
        while let Ok((len, source)) = server.recv_from(&mut buffer) {
            if len == size {
                from = Some(source);
            }
        }
        from.is_some()
    });
    // The first answers may be lost: the server's system has to learn the way back, too.
    client.set_nonblocking(true).unwrap();
    wait_until(|| {
        server.send_to(&vec![9; size], from.unwrap()).unwrap();
        loop {
            match client.recv(&mut buffer) {
                Ok(len) => break len == size && buffer[..len].iter().all(|byte| *byte == 9),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                Err(_) => {}
            }
        }
    });
    client.set_nonblocking(false).unwrap();
    server.set_nonblocking(false).unwrap();
}

fn datagrams(narrow: Narrow) {
    if skipped(&[]) {
        return;
    }
    let site = Site::new(narrow);
    let appliance = site.lab.appliance(&[]);
    for is_ipv6 in [false, true] {
        let headers = if is_ipv6 { 48 } else { 28 };
        let server = |number| {
            let at: SocketAddr = (
                address(is_ipv6, number).parse::<std::net::IpAddr>().unwrap(),
                1000,
            )
                .into();
            (at, site.far.udp(&at.to_string()))
        };
        // Discovers the path: the first one is too big, which is told; from then on this host knows.
        let (at, socket) = server(1);
        let whole = client(&site, at, libc::IP_PMTUDISC_DO);
        assert_eq!(path_mtu(&whole, is_ipv6), 1500);
        whole.send(&[7; 1400]).unwrap();
        wait_until(|| path_mtu(&whole, is_ipv6) == NARROW);
        let _ = whole.take_error();
        assert_eq!(
            whole.send(&[7; 1400]).unwrap_err().raw_os_error(),
            Some(libc::EMSGSIZE)
        );
        gets_through(&whole, &socket, NARROW as usize - headers);

        // As programs are that ask for nothing: their system discovers the path, and fragments by what it has learned.
        let (at, socket) = server(2);
        let usual = client(&site, at, libc::IP_PMTUDISC_WANT);
        gets_through(&usual, &socket, 1400);
        gets_through(&usual, &socket, 3000);
        gets_through(&usual, &socket, 100);

        // May be fragmented on the way, which IPv4 has.
        let (at, socket) = server(3);
        let free = client(&site, at, libc::IP_PMTUDISC_DONT);
        if !is_ipv6 {
            free.send(&[7; 1400]).unwrap();
            assert_eq!(
                socket.recv(&mut [0; 4000]).unwrap(),
                1400,
                "the first one arrives"
            );
            assert_eq!(path_mtu(&free, is_ipv6), 1500, "and nobody says anything");
        }
        gets_through(&free, &socket, 1400);
        gets_through(&free, &socket, 3000);
    }
    appliance.stop();
}

fn pings(narrow: Narrow) {
    if skipped(&["ping"]) {
        return;
    }
    let site = Site::new(narrow);
    let appliance = site.lab.appliance(&[]);
    for is_ipv6 in [false, true] {
        let ping = |arguments: &str, number| {
            let target = address(is_ipv6, number);
            let output = site
                .lab
                .host
                .run(&format!("ping -n -i 0.2 -W 20 {arguments} {target}"));
            (
                output.status.success(),
                text(&output.stdout) + &text(&output.stderr),
            )
        };
        let (answered, output) = ping("-c 1 -M do -s 1400", 4);
        let said = if is_ipv6 {
            "Packet too big: mtu=1300"
        } else {
            "Frag needed and DF set (mtu = 1300)"
        };
        assert!(!answered && output.contains(said), "{output}");
        // This host has learned it: nothing goes out any more.
        let (answered, output) = ping("-c 1 -M do -s 1400", 4);
        assert!(!answered && output.contains("message too long, mtu"), "{output}");
        let (answered, output) = ping("-c 2 -M do -s 1200", 4);
        assert!(answered, "{output}");
        // May be fragmented: by whoever has to in IPv4; by either end in IPv6, which both have to hear of it first.
        if is_ipv6 {
            wait_until(|| ping("-c 1 -W 1 -M dont -s 1400", 5).0);
        } else {
            let (_, output) = ping("-c 3 -M dont -s 1400", 5);
            assert!(output.contains("3 packets transmitted, 3 received"), "{output}");
        }
        let (answered, output) = ping("-c 2 -M dont -s 3000", 5);
        assert!(answered && output.contains(" 2 received"), "{output}");
    }
    appliance.stop();
}

#[test]
fn datagrams_meet_a_narrow_link_of_this_host() {
    datagrams(Narrow::Uplink);
}

#[test]
fn datagrams_meet_a_narrow_link_behind_a_router() {
    datagrams(Narrow::BehindRouter);
}

#[test]
fn pings_meet_a_narrow_link_of_this_host() {
    pings(Narrow::Uplink);
}

#[test]
fn pings_meet_a_narrow_link_behind_a_router() {
    pings(Narrow::BehindRouter);
}
