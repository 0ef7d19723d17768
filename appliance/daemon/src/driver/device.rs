//! One queue of a TUN or TAP device: packets with the virtio header in front, read and written as they are.
//!
//! The header (`struct virtio_net_hdr`, 10 bytes, in the host's byte order) carries what checksum and segmentation
//! offload need: a super-packet of up to 64 KiB crosses the device in one call. tun-rs opens the device; its own
//! batching is left aside, since it cuts super-packets to the MTU and joins them again in user space.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::num::NonZeroU16;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::uio::writev;
use nix::unistd::read;
use serde::{Deserialize, Serialize};
use tun_rs::DeviceBuilder;
use tungate_engine::io::{ChecksumState, PacketOut};
use tungate_engine::packet::segments;

use super::ethernet::{ETHERNET_HEADER_LEN, Ethernet, Taken};

/// Length of the virtio header.
const HEADER_LEN: usize = 10;
/// Longest IP packet.
const PACKET_MAX: usize = 65_535;
/// Packets that wait for a device that does not take them, per queue.
const OVERFLOW_MAX: usize = 256;
/// Shorter queues drop plain packets under load: a window of 1 MiB is 700 of them.
pub(crate) const TRANSMIT_QUEUE_LEN: u32 = 5000;

// linux/virtio_net.h
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const TCP_CHECKSUM: u16 = 16;
const UDP_HEADER_LEN: u16 = 8;

/// What a device carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Layer {
    /// IP packets: TUN.
    Ip,
    /// Ethernet frames: TAP.
    Ethernet,
}

/// The hardware address of the host's end of a TAP device. A bridge takes the lowest of its ports' addresses unless it
/// has one of its own, so this one is as high as they get.
pub(crate) const TAP_MAC: [u8; 6] = [0xfe, 0x74, 0x75, 0x6e, 0x67, 0x30];

/// The queues of a device.
#[derive(Debug)]
pub(crate) struct Device {
    /// One for each shard.
    pub(crate) queues: Vec<OwnedFd>,
    pub(crate) layer: Layer,
    /// Whether the kernel cuts UDP super-packets (Linux 6.2).
    pub(crate) udp_segmentation: bool,
}

impl Device {
    /// Makes a device that carries IP packets of at most `mtu` bytes, in the network namespace of this thread. It
    /// has no address yet and is down. It goes when its last queue is closed, unless it is `persistent`.
    ///
    /// # Errors
    ///
    /// The system's, for instance EPERM without CAP_NET_ADMIN, and EBUSY where the name is taken.
    pub(crate) fn create(
        name: &str,
        layer: Layer,
        mtu: u16,
        queues: u8,
        persistent: bool,
    ) -> io::Result<Self> {
        let builder = match layer {
            Layer::Ip => DeviceBuilder::new().layer(tun_rs::Layer::L3),
            Layer::Ethernet => DeviceBuilder::new().layer(tun_rs::Layer::L2).mac_addr(TAP_MAC),
        };
        let first = builder
            .name(name)
            .offload(true)
            .multi_queue(true)
            .mtu(mtu)
            .enable(false)
            .build_sync()?;
        match first.set_tx_queue_len(TRANSMIT_QUEUE_LEN) {
            // In a user namespace this call is never allowed; netlink is, for `host::enclose`.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            result => result?,
        }
        if persistent {
            first.persist()?;
        }
        let udp_segmentation = first.udp_gso();
        let mut devices = Vec::new();
        for _ in 1..queues {
            devices.push(first.try_clone()?);
        }
        devices.insert(0, first);
        let mut fds = Vec::new();
        for device in devices {
            device.set_nonblocking(true)?;
            // SAFETY: the device gives its descriptor up, and nobody else has it.
            fds.push(unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) });
        }
        Ok(Self {
            queues: fds,
            layer,
            udp_segmentation,
        })
    }
}

/// What was read from a queue.
#[derive(Debug)]
pub(crate) struct Received<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) checksum: ChecksumState,
    pub(crate) segment_size: Option<NonZeroU16>,
}

/// The reading half of a queue.
pub(crate) struct Reader {
    queue: Arc<OwnedFd>,
    buffer: Box<[u8]>,
    /// Whether there may be more to read; set by the poll, cleared when nothing was there.
    pub(crate) readable: bool,
}

/// The writing half of a queue.
pub(crate) struct Writer {
    outlet: Outlet,
    /// Headers and the packet that is being made behind them, from `start` on.
    buffer: Box<[u8]>,
    start: usize,
    len: usize,
    /// On a TAP device.
    ethernet: Option<Ethernet>,
    udp_segmentation: bool,
}

/// Where packets leave, with their headers.
struct Outlet {
    queue: Arc<OwnedFd>,
    /// Packets that the device did not take.
    overflow: VecDeque<Vec<u8>>,
    /// Packets that the device did not take and that found no place to wait, or that it refused.
    lost: u64,
}

/// The two halves of one queue; `ethernet` is the appliance on a TAP device.
pub(super) fn split(queue: OwnedFd, udp_segmentation: bool, ethernet: Option<Ethernet>) -> (Reader, Writer) {
    let queue = Arc::new(queue);
    let start = HEADER_LEN + ethernet.as_ref().map_or(0, |_| ETHERNET_HEADER_LEN);
    let buffer = || vec![0; start + PACKET_MAX].into_boxed_slice();
    let reader = Reader {
        queue: queue.clone(),
        buffer: buffer(),
        readable: true,
    };
    let writer = Writer {
        outlet: Outlet {
            queue,
            overflow: VecDeque::new(),
            lost: 0,
        },
        buffer: buffer(),
        start,
        len: 0,
        ethernet,
        udp_segmentation,
    };
    (reader, writer)
}

impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        self.queue.as_raw_fd()
    }
}

impl Reader {
    /// Reads the next packet; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When the device is gone.
    pub(crate) fn read(&mut self) -> io::Result<Option<Received<'_>>> {
        let len = loop {
            match read(&self.queue, &mut self.buffer) {
                Ok(len) => break len,
                Err(Errno::EAGAIN) => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let (header, packet) = self.buffer[..len].split_at(HEADER_LEN.min(len));
        let &[flags, gso_type, _, _, size_low, size_high, ..] = header else {
            return Ok(None); // the driver writes whole headers
        };
        let trusted = flags & (NEEDS_CSUM | DATA_VALID) != 0;
        let is_datagrams = gso_type & !GSO_ECN == GSO_UDP_L4;
        Ok(Some(Received {
            bytes: packet,
            checksum: if trusted {
                ChecksumState::Trusted
            } else {
                ChecksumState::Unverified
            },
            segment_size: NonZeroU16::new(u16::from_ne_bytes([size_low, size_high])).filter(|_| is_datagrams),
        }))
    }
}

impl Writer {
    /// Whether the device takes bulk packets.
    pub(crate) fn has_room(&self) -> bool {
        self.outlet.overflow.is_empty()
    }

    /// Packets that have been lost on the way out.
    pub(crate) fn lost(&self) -> u64 {
        self.outlet.lost
    }

    /// Lends a buffer for a packet of `len` bytes.
    pub(crate) fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.len = len;
        &mut self.buffer[self.start..self.start + len]
    }

    /// Takes what was read from the device, and returns the packet in it. A frame that is about the Ethernet alone is
    /// answered here.
    pub(super) fn take<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let Some(ethernet) = &mut self.ethernet else {
            return Some(bytes);
        };
        match ethernet.take(bytes) {
            Taken::Packet(packet) => Some(packet),
            Taken::Answer(frame) => {
                self.send_frame(&frame);
                None
            }
            Taken::Nothing => None,
        }
    }

    fn send_frame(&mut self, frame: &[u8]) {
        let mut framed = vec![0; HEADER_LEN];
        framed.extend_from_slice(frame);
        self.outlet.write(&[IoSlice::new(&framed)]);
    }

    /// Sends the packet in the buffer.
    pub(crate) fn send(&mut self, packet: &PacketOut) {
        let is_datagram = packet.partial_checksum.is_some_and(|field| field != TCP_CHECKSUM);
        if packet.segment_size.is_some() && is_datagram && !self.udp_segmentation {
            self.send_segments(packet);
        } else if self.put_headers(packet) {
            self.write((&[], &[]));
        }
    }

    /// Sends a packet with its payload from where it is.
    pub(crate) fn send_parts(&mut self, packet: &PacketOut, headers: &[u8], payload: (&[u8], &[u8])) {
        self.packet_buffer(headers.len()).copy_from_slice(headers);
        if self.put_headers(packet) {
            self.write(payload);
        }
    }

    /// Sends the super-packet in the buffer in pieces, to a device that does not cut datagrams.
    fn send_segments(&mut self, packet: &PacketOut) {
        if !self.put_headers(packet) {
            return;
        }
        let mut whole = self.buffer[self.start..self.start + self.len].to_vec();
        let mut headers = self.buffer[..self.start].to_vec();
        headers[..HEADER_LEN].fill(0);
        segments(&mut whole, packet, |segment| {
            let mut frame = headers.clone();
            frame.extend_from_slice(segment);
            self.outlet.write(&[IoSlice::new(&frame)]);
        });
    }

    /// Puts virtio and Ethernet headers in front of the IP header in the buffer. `false` if the packet cannot be sent.
    fn put_headers(&mut self, packet: &PacketOut) -> bool {
        let bytes = &self.buffer[self.start..self.start + self.len];
        let link_len = (self.start - HEADER_LEN) as u16;
        let virtio = header_of(bytes, packet, link_len);
        let link = self.ethernet.as_mut().map(|ethernet| ethernet.header_for(bytes));
        match link {
            None => {}
            Some(Ok(header)) => self.buffer[HEADER_LEN..self.start].copy_from_slice(&header),
            Some(Err(question)) => {
                self.outlet.lost += 1;
                self.send_frame(&question);
                return false;
            }
        }
        self.buffer[..HEADER_LEN].copy_from_slice(&virtio);
        true
    }

    /// Writes what waits, now that the device may take it.
    pub(crate) fn on_writable(&mut self) {
        self.outlet.on_writable();
    }

    /// Writes what is in the buffer, and the payload behind it.
    fn write(&mut self, (first, second): (&[u8], &[u8])) {
        let start = &self.buffer[..self.start + self.len];
        self.outlet.write(&[start, first, second].map(IoSlice::new));
    }
}

impl Outlet {
    fn on_writable(&mut self) {
        while let Some(packet) = self.overflow.pop_front() {
            if !self.try_write(&[IoSlice::new(&packet)]) {
                self.overflow.push_front(packet);
                return;
            }
        }
    }

    /// Writes one packet, behind those that wait.
    fn write(&mut self, parts: &[IoSlice<'_>]) {
        if self.overflow.is_empty() && self.try_write(parts) {
            return;
        }
        if self.overflow.len() == OVERFLOW_MAX {
            self.lost += 1;
        } else {
            self.overflow
                .push_back(parts.iter().flat_map(|part| part.iter().copied()).collect());
        }
    }

    /// Writes one packet; `false` if the device is full. If it is down (EIO), or the kernel has no memory, the packet is
    /// lost, as on any link.
    fn try_write(&mut self, parts: &[IoSlice<'_>]) -> bool {
        match writev(&self.queue, parts) {
            Ok(_) => true,
            Err(Errno::EAGAIN) => false,
            Err(error) => {
                self.lost += 1;
                tracing::debug!(%error, "the TUN device refused a packet");
                true
            }
        }
    }
}

/// The virtio header for a packet of the engine, behind a link header of `link_len` bytes.
fn header_of(packet: &[u8], out: &PacketOut, link_len: u16) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    let Some(field) = out.partial_checksum else {
        return header; // no flags, GSO_NONE: complete as it is
    };
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&(link_len + out.header_len).to_ne_bytes());
    header[8..10].copy_from_slice(&field.to_ne_bytes());
    let Some(size) = out.segment_size else {
        header[1] = GSO_NONE;
        return header;
    };
    let is_ipv6 = packet[0] >> 4 == 6;
    let (kind, transport_len) = if field == TCP_CHECKSUM {
        let data_offset = packet[usize::from(out.header_len) + 12] >> 4;
        (
            if is_ipv6 { GSO_TCPV6 } else { GSO_TCPV4 },
            u16::from(data_offset) * 4,
        )
    } else {
        (GSO_UDP_L4, UDP_HEADER_LEN)
    };
    header[1] = kind;
    header[2..4].copy_from_slice(&(link_len + out.header_len + transport_len).to_ne_bytes());
    header[4..6].copy_from_slice(&size.get().to_ne_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use tungate_engine::IngressId;

    use super::*;

    fn out(header_len: u16, partial_checksum: Option<u16>, segment_size: Option<u16>) -> PacketOut {
        PacketOut {
            ingress: IngressId(0),
            flow: None,
            header_len,
            partial_checksum,
            segment_size: segment_size.and_then(NonZeroU16::new),
        }
    }

    fn native(fields: [u16; 4]) -> Vec<u8> {
        fields.iter().flat_map(|field| field.to_ne_bytes()).collect()
    }

    #[test]
    fn headers_say_what_the_kernel_has_to_finish() {
        let mut ipv4 = [0_u8; 60];
        ipv4[0] = 0x45;
        ipv4[20 + 12] = 8 << 4; // 32 bytes of TCP header
        let mut ipv6 = [0_u8; 100];
        ipv6[0] = 0x60;
        ipv6[40 + 12] = 5 << 4;

        assert_eq!(header_of(&ipv4, &out(20, None, None), 0), [0; 10]);
        let checksum = header_of(&ipv4, &out(20, Some(16), None), 0);
        assert_eq!((checksum[0], checksum[1]), (NEEDS_CSUM, GSO_NONE));
        assert_eq!(checksum[2..], native([0, 0, 20, 16]));
        let segments = header_of(&ipv4, &out(20, Some(16), Some(1448)), 0);
        assert_eq!((segments[0], segments[1]), (NEEDS_CSUM, GSO_TCPV4));
        assert_eq!(segments[2..], native([52, 1448, 20, 16]));
        // Offsets count from the beginning of the frame.
        let framed = header_of(&ipv4, &out(20, Some(16), Some(1448)), 14);
        assert_eq!(framed[2..], native([66, 1448, 34, 16]));
        let segments = header_of(&ipv6, &out(40, Some(16), Some(1440)), 0);
        assert_eq!(
            (segments[1], &segments[2..]),
            (GSO_TCPV6, &*native([60, 1440, 40, 16]))
        );
        let datagrams = header_of(&ipv6, &out(40, Some(6), Some(1200)), 0);
        assert_eq!(
            (datagrams[1], &datagrams[2..]),
            (GSO_UDP_L4, &*native([48, 1200, 40, 6]))
        );
    }

    #[test]
    fn a_full_device_makes_packets_wait_in_order_and_then_lose() {
        let (ours, kernel) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        kernel.set_nonblocking(true).unwrap();
        let (_, mut writer) = split(ours.into(), true, None);
        let mut sent = 0_u32;
        let mut send = |writer: &mut Writer| {
            let (packet, [a, b, c, d]) = (out(20, None, None), sent.to_ne_bytes());
            if sent.is_multiple_of(2) {
                writer.packet_buffer(4).copy_from_slice(&[a, b, c, d]);
                writer.send(&packet);
            } else {
                writer.send_parts(&packet, &[a], (&[b, c], &[d]));
            }
            sent += 1;
        };
        while writer.has_room() {
            send(&mut writer);
        }
        // One waits already.
        for _ in 1..OVERFLOW_MAX + 3 {
            send(&mut writer);
        }
        assert_eq!(writer.lost(), 3);

        let mut received = Vec::new();
        let mut buffer = [0; 64];
        while let Ok(len) = kernel.recv(&mut buffer) {
            received.push(u32::from_ne_bytes(buffer[HEADER_LEN..len].try_into().unwrap()));
            writer.on_writable();
        }
        assert!(writer.has_room());
        assert_eq!(received, (0..sent - 3).collect::<Vec<_>>());
    }

    #[test]
    fn what_the_kernel_says_of_a_packet_is_read_from_its_header() {
        let (ours, kernel) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut reader, _) = split(ours.into(), true, None);
        let mut packet = |flags: u8, gso_type: u8, size: u16| {
            let mut framed = vec![flags, gso_type, 0, 0];
            framed.extend_from_slice(&size.to_ne_bytes());
            framed.extend_from_slice(&[0; 4]);
            framed.extend_from_slice(b"packet");
            kernel.send(&framed).unwrap();
            let received = reader.read().unwrap().unwrap();
            assert_eq!(received.bytes, b"packet");
            (received.checksum, received.segment_size.map(NonZeroU16::get))
        };
        assert_eq!(packet(0, GSO_NONE, 0), (ChecksumState::Unverified, None));
        assert_eq!(packet(DATA_VALID, GSO_NONE, 0), (ChecksumState::Trusted, None));
        assert_eq!(
            packet(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, 1448),
            (ChecksumState::Trusted, None)
        );
        assert_eq!(
            packet(NEEDS_CSUM, GSO_UDP_L4, 1200),
            (ChecksumState::Trusted, Some(1200))
        );
        assert!(reader.read().unwrap().is_none());
        assert!(!reader.readable);
    }
}
