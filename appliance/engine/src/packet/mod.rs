//! Packets: parsed once into checked views, and built.

mod build;
pub mod checksum;
mod offload;
mod transport;
mod view;

pub use build::{Datagram, HOP_LIMIT};
pub(crate) use build::{ip_header_len, write_ip_header};
pub use offload::{complete_checksum, segments};
pub use transport::{Echo, IcmpMessage, IcmpView, TcpFlags, TcpOptions, TcpView, Transport, UdpView};
pub use view::{FragmentView, PacketView, QuotedPacket};

#[cfg(test)]
mod testing;
