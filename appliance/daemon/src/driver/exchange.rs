//! What threads send each other: packets to the shard that owns them, and messages to a shard.

use std::io;
use std::num::NonZeroU16;
use std::sync::Arc;

use crossbeam_queue::{ArrayQueue, SegQueue};
use socket2::Socket;
use tokio::sync::{mpsc, oneshot};
use tungate_engine::bypass::BypassNews;
use tungate_engine::dns::Learned;
use tungate_engine::io::{ChecksumState, UpstreamError};
use tungate_engine::{FlowId, IngressId, PacketIn, Policy};

use super::Totals;
use super::questions::FlowReport;
use crate::egress::{Association, Egresses};

/// Packets that may wait for one shard; more are lost, as in any queue.
const PACKETS_MAX: usize = 1024;
/// Buffers kept for use again by all shards together.
const BUFFERS_MAX: usize = 1024;
/// A larger buffer is not kept.
const BUFFER_KEPT: usize = 4096;

/// Where a shard gets what other threads have for it.
pub(crate) struct Mailbox {
    pub(crate) packets: ArrayQueue<Parcel>,
    messages: SegQueue<Message>,
    waker: mio::Waker,
}

/// A packet on its way to another shard.
#[derive(Debug)]
pub(crate) struct Parcel {
    bytes: Vec<u8>,
    ingress: IngressId,
    checksum: ChecksumState,
    segment_size: Option<NonZeroU16>,
    reassembled: bool,
}

/// What a shard is told.
pub(crate) enum Message {
    /// The policy from now on, and the ways out that it names.
    Policy(Arc<Policy>, Arc<Egresses>),
    /// Nanoseconds from the Unix epoch to the clock's.
    WallClock(i64),
    /// What has become of a flow that the kernel carries.
    Bypass(BypassNews),
    /// What a client has learned by way of another shard.
    Learned(Arc<Learned>),
    /// Take no new flows, and report when there are none.
    Drain,
    /// Report that this has come.
    Check,
    /// Tell of the flows that are open, in parts.
    Flows(mpsc::UnboundedSender<Vec<FlowReport>>),
    /// Tell what has been counted.
    Count(oneshot::Sender<Totals>),
    /// End the thread.
    Stop,
    /// What came of [`Upstream::Dialing`](crate::upstream::Upstream::Dialing).
    Dialed(FlowId, Result<Socket, UpstreamError>),
    /// What came of [`Upstream::Associating`](crate::upstream::Upstream::Associating).
    Associated(FlowId, Result<Association, UpstreamError>),
}

impl Mailbox {
    pub(crate) fn new(waker: mio::Waker) -> Self {
        Self {
            packets: ArrayQueue::new(PACKETS_MAX),
            messages: SegQueue::new(),
            waker,
        }
    }

    /// Sends a message.
    pub(crate) fn send(&self, message: Message) {
        self.messages.push(message);
        self.wake();
    }

    /// Takes the next message.
    pub(crate) fn receive(&self) -> Option<Message> {
        self.messages.pop()
    }

    /// Makes the shard look.
    pub(crate) fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            // An eventfd that is full wakes all the same.
            debug_assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }
}

impl Parcel {
    /// What the engine takes.
    pub(crate) fn packet(&self) -> PacketIn<'_> {
        PacketIn {
            ingress: self.ingress,
            bytes: &self.bytes,
            checksum: self.checksum,
            segment_size: self.segment_size,
            reassembled: self.reassembled,
        }
    }
}

/// Buffers for parcels, used again and again by all shards.
#[derive(Debug)]
pub(crate) struct Buffers(ArrayQueue<Vec<u8>>);

impl Buffers {
    pub(crate) fn new() -> Self {
        Self(ArrayQueue::new(BUFFERS_MAX))
    }

    /// Makes a parcel of a packet.
    pub(crate) fn wrap(&self, packet: &PacketIn<'_>) -> Parcel {
        let mut bytes = self.0.pop().unwrap_or_default();
        bytes.extend_from_slice(packet.bytes);
        Parcel {
            bytes,
            ingress: packet.ingress,
            checksum: packet.checksum,
            segment_size: packet.segment_size,
            reassembled: packet.reassembled,
        }
    }

    /// Takes a parcel's buffer back.
    pub(crate) fn give_back(&self, parcel: Parcel) {
        let mut bytes = parcel.bytes;
        if bytes.capacity() <= BUFFER_KEPT {
            bytes.clear();
            let _ = self.0.push(bytes); // full: there are enough
        }
    }
}
