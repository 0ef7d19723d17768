//! What the IP headers of datagrams say, which is an option of the socket that they leave by.

use nix::sys::socket::{setsockopt, sockopt};
use nix::{setsockopt_impl, sockopt_impl};
use socket2::Socket;
use tungate_engine::io::Carriage;

sockopt_impl!(
    /// How IPv4 datagrams may be fragmented (`IP_PMTUDISC_…`), and whether path MTU discovery takes part.
    IpMtuDiscover,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    libc::c_int
);

/// What a socket's IP headers say, as far as it was told; a new socket has the system's defaults.
#[derive(Debug, Default)]
pub(crate) struct Headers {
    hop_limit: Option<u8>,
    dont_fragment: Option<bool>,
}

impl Headers {
    /// Has `socket` send as `carriage` wants it. A socket that cannot is asked again the next time.
    ///
    /// What may be fragmented leaves without DF and in fragments that fit the path, as far as its MTU is known. What may
    /// not fails with EMSGSIZE where it is known not to fit, and is reported by the error queue like what a router says.
    pub(crate) fn set(&mut self, socket: &Socket, is_ipv4: bool, carriage: Carriage) {
        let Carriage {
            hop_limit,
            dont_fragment,
        } = carriage;
        if self.hop_limit != Some(hop_limit) {
            let set = if is_ipv4 {
                socket.set_ttl_v4(hop_limit.into())
            } else {
                socket.set_unicast_hops_v6(hop_limit.into())
            };
            self.hop_limit = set.is_ok().then_some(hop_limit);
        }
        if self.dont_fragment != Some(dont_fragment) {
            let set = if is_ipv4 {
                let discovery = if dont_fragment {
                    libc::IP_PMTUDISC_DO
                } else {
                    libc::IP_PMTUDISC_DONT
                };
                setsockopt(socket, IpMtuDiscover, &discovery)
            } else {
                setsockopt(socket, sockopt::Ipv6DontFrag, &dont_fragment)
            };
            self.dont_fragment = set.is_ok().then_some(dont_fragment);
        }
    }
}
