//! Packets put on the device as they are.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use etherparse::PacketBuilder;

use super::Namespace;

/// The device's own address: what this host's captured connections come from.
pub const DEVICE: [u8; 4] = [198, 18, 0, 2];

pub const DEVICE6: &str = "fd74:756e::2";

/// Puts packets on the device as they are, as its clients could.
pub struct Injector {
    socket: OwnedFd,
    interface: i32,
}

impl Injector {
    pub fn new(namespace: &Namespace) -> Self {
        let (socket, interface) = namespace.enter(|| {
            // SAFETY: no memory is passed.
            let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
            assert!(socket >= 0);
            // SAFETY: the socket was just made, and nobody else owns it.
            let socket = unsafe { OwnedFd::from_raw_fd(socket) };
            (socket, nix::net::if_::if_nametoindex("tungate0").unwrap() as i32)
        });
        Self { socket, interface }
    }

    pub fn send(&self, packet: &[u8]) {
        let is_ipv6 = packet.first().is_some_and(|byte| byte >> 4 == 6);
        let protocol = if is_ipv6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP } as u16;
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = self.interface;
        loop {
            // SAFETY: both pointers are to living values of the lengths that are passed.
            let sent = unsafe {
                libc::sendto(
                    self.socket.as_raw_fd(),
                    packet.as_ptr().cast(),
                    packet.len(),
                    0,
                    (&raw const address).cast(),
                    size_of::<libc::sockaddr_ll>() as u32,
                )
            };
            match sent {
                0.. => return,
                _ => {
                    let error = std::io::Error::last_os_error();
                    // The device's queue is full, as it is in a flood.
                    assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
                    std::thread::yield_now();
                }
            }
        }
    }
}

pub fn syn(source_port: u16, target: [u8; 4], port: u16, sequence: u32) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(DEVICE, target, 64)
        .tcp(source_port, port, sequence, 64_240)
        .syn()
        .write(&mut packet, &[])
        .unwrap();
    packet
}

/// A segment that belongs to no connection.
pub fn unknown_segment(source_port: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(DEVICE, [192, 0, 2, 7], 64)
        .tcp(source_port, 9, 1, 64_240)
        .rst()
        .write(&mut packet, &[])
        .unwrap();
    packet
}
