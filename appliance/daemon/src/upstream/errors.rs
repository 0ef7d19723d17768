//! What the system says about upstreams, in the engine's words.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use tungate_engine::io::{IcmpError, Unreachable, UpstreamError, UpstreamEvent};

use super::address::{from_storage, ip_of_v4, ip_of_v6};

/// Where an entry of an error queue comes from: `SO_EE_ORIGIN_…` of linux/errqueue.h.
const ORIGIN_LOCAL: u8 = 1;
const ORIGIN_ICMP: u8 = 2;
const ORIGIN_ICMPV6: u8 = 3;

/// An error about something that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SendError {
    /// Where it was sent; the port of an echo request is its sequence number.
    pub(crate) target: SocketAddr,
    /// Who says so; `None`: this host.
    pub(crate) reporter: Option<IpAddr>,
    pub(crate) error: IcmpError,
}

impl SendError {
    /// Whether this host said so, before anything was sent.
    pub(crate) fn is_local(&self) -> bool {
        self.reporter.is_none()
    }
}

impl From<SendError> for UpstreamEvent<'static> {
    fn from(error: SendError) -> Self {
        Self::Error {
            target: error.target,
            reporter: error.reporter,
            error: error.error,
        }
    }
}

/// Why a connection could not be made. Linux turns ICMP errors about a SYN into these numbers (`icmp_err_convert`).
pub(crate) fn connect_error(error: &io::Error) -> UpstreamError {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
        return UpstreamError::Egress;
    };
    match errno {
        Errno::ECONNREFUSED | Errno::ECONNRESET => UpstreamError::Refused,
        Errno::ETIMEDOUT => UpstreamError::TimedOut,
        Errno::EMFILE
        | Errno::ENFILE
        | Errno::ENOBUFS
        | Errno::ENOMEM
        | Errno::EADDRNOTAVAIL
        | Errno::EADDRINUSE
        | Errno::EAGAIN => UpstreamError::Exhausted,
        _ => match unreachable(errno) {
            Some(unreachable) => UpstreamError::Unreachable(unreachable),
            None => UpstreamError::Egress,
        },
    }
}

/// What the client is told when a datagram could not be sent; `None`: nothing, as of a datagram that is lost.
pub(crate) fn send_error(error: &io::Error) -> Option<IcmpError> {
    let errno = Errno::from_raw(error.raw_os_error()?);
    unreachable(errno).map(IcmpError::Unreachable)
}

fn unreachable(errno: Errno) -> Option<Unreachable> {
    match errno {
        // No IPv6 on this host, and addresses that no route can ever have.
        Errno::ENETUNREACH | Errno::ENETDOWN | Errno::EAFNOSUPPORT => Some(Unreachable::Network),
        Errno::EHOSTUNREACH | Errno::EHOSTDOWN | Errno::ENONET | Errno::EINVAL | Errno::EOPNOTSUPP => {
            Some(Unreachable::Host)
        }
        Errno::ENOPROTOOPT => Some(Unreachable::Protocol),
        // Firewalls and routes of type prohibit or blackhole.
        Errno::EACCES | Errno::EPERM => Some(Unreachable::Prohibited),
        _ => None,
    }
}

/// Takes the next entry off a socket's error queue that means something to a client. `quoted` gets the beginning of
/// what was sent, as far as the error quotes it.
pub(crate) fn next_send_error(socket: &impl AsRawFd, quoted: &mut [u8]) -> Option<SendError> {
    loop {
        let mut quoted = [IoSliceMut::new(quoted)];
        let mut space = nix::cmsg_space!([libc::sock_extended_err; 2], [libc::sockaddr_in6; 2]);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut quoted, Some(&mut space), flags).ok()?;
        let target = message.address.as_ref().and_then(from_storage);
        let found = message.cmsgs().ok()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, offender) => {
                Some((error, offender.map(|address| ip_of_v4(&address))))
            }
            ControlMessageOwned::Ipv6RecvErr(error, offender) => {
                Some((error, offender.map(|address| ip_of_v6(&address))))
            }
            _ => None,
        });
        let (Some(target), Some((entry, offender))) = (target, found) else {
            continue;
        };
        let Some(error) = icmp_error(&entry) else { continue };
        let reporter =
            offender.filter(|address| entry.ee_origin != ORIGIN_LOCAL && !address.is_unspecified());
        return Some(SendError {
            target,
            reporter,
            error,
        });
    }
}

/// RFC 792 and RFC 1812 section 5.2.7.1 for ICMP, RFC 4443 section 3 for ICMPv6.
fn icmp_error(entry: &libc::sock_extended_err) -> Option<IcmpError> {
    let too_big = IcmpError::PacketTooBig {
        mtu: u16::try_from(entry.ee_info).unwrap_or(u16::MAX),
    };
    let unreachable = match (entry.ee_origin, entry.ee_type, entry.ee_code) {
        (ORIGIN_LOCAL, _, _) => {
            return match Errno::from_raw(entry.ee_errno as i32) {
                Errno::EMSGSIZE => Some(too_big),
                errno => unreachable(errno).map(IcmpError::Unreachable),
            };
        }
        (ORIGIN_ICMP, 3, 4) | (ORIGIN_ICMPV6, 2, _) => return Some(too_big),
        (ORIGIN_ICMP, 11, _) | (ORIGIN_ICMPV6, 3, _) => return Some(IcmpError::TimeExceeded),
        (ORIGIN_ICMP, 3, 0 | 6 | 11) | (ORIGIN_ICMPV6, 1, 0 | 2) => Unreachable::Network,
        (ORIGIN_ICMP, 3, 2) | (ORIGIN_ICMPV6, 4, 1) => Unreachable::Protocol,
        (ORIGIN_ICMP, 3, 3) | (ORIGIN_ICMPV6, 1, 4) => Unreachable::Port,
        (ORIGIN_ICMP, 3, 9 | 10 | 13 | 14 | 15) | (ORIGIN_ICMPV6, 1, 1 | 5 | 6) => Unreachable::Prohibited,
        (ORIGIN_ICMP, 3, _) | (ORIGIN_ICMPV6, 1, _) => Unreachable::Host,
        _ => return None,
    };
    Some(IcmpError::Unreachable(unreachable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_connect_mean_what_a_router_would_have_said() {
        let meaning = |errno: Errno| connect_error(&io::Error::from_raw_os_error(errno as i32));
        assert_eq!(meaning(Errno::ECONNREFUSED), UpstreamError::Refused);
        assert_eq!(meaning(Errno::ETIMEDOUT), UpstreamError::TimedOut);
        assert_eq!(meaning(Errno::EMFILE), UpstreamError::Exhausted);
        assert_eq!(meaning(Errno::EADDRNOTAVAIL), UpstreamError::Exhausted);
        let unreachable = |errno| match meaning(errno) {
            UpstreamError::Unreachable(unreachable) => unreachable,
            other => panic!("{other:?}"),
        };
        assert_eq!(unreachable(Errno::EHOSTUNREACH), Unreachable::Host);
        assert_eq!(unreachable(Errno::ENETUNREACH), Unreachable::Network);
        assert_eq!(unreachable(Errno::EACCES), Unreachable::Prohibited);
        assert_eq!(unreachable(Errno::EPERM), Unreachable::Prohibited);
        assert_eq!(unreachable(Errno::ENOPROTOOPT), Unreachable::Protocol);
    }

    #[test]
    fn entries_of_error_queues_are_told_apart_by_type_and_code() {
        let meaning = |ee_origin, ee_type, ee_code, ee_info| {
            icmp_error(&libc::sock_extended_err {
                ee_errno: Errno::EMSGSIZE as u32,
                ee_origin,
                ee_type,
                ee_code,
                ee_pad: 0,
                ee_info,
                ee_data: 0,
            })
        };
        let unreachable = |unreachable| Some(IcmpError::Unreachable(unreachable));
        assert_eq!(meaning(2, 3, 3, 0), unreachable(Unreachable::Port));
        assert_eq!(meaning(3, 1, 4, 0), unreachable(Unreachable::Port));
        assert_eq!(meaning(2, 3, 13, 0), unreachable(Unreachable::Prohibited));
        assert_eq!(meaning(3, 1, 3, 0), unreachable(Unreachable::Host));
        assert_eq!(
            meaning(2, 3, 4, 1400),
            Some(IcmpError::PacketTooBig { mtu: 1400 })
        );
        assert_eq!(
            meaning(3, 2, 0, 1280),
            Some(IcmpError::PacketTooBig { mtu: 1280 })
        );
        assert_eq!(
            meaning(1, 0, 0, 1500),
            Some(IcmpError::PacketTooBig { mtu: 1500 })
        );
        assert_eq!(meaning(2, 11, 0, 0), Some(IcmpError::TimeExceeded));
        assert_eq!(meaning(3, 3, 0, 0), Some(IcmpError::TimeExceeded));
        assert_eq!(meaning(2, 12, 0, 0), None);
    }
}
