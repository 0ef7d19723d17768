//! The dispatcher: reads the capture in file order and hands each packet to the shard that owns its conversation.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, OnceLock};

use tungate_engine::packet::{IcmpMessage, PacketView, TcpFlags, Transport};
use tungate_engine::{ShardId, Timestamp, dns, shard};

use super::fragments::Fragments;
use super::item::{Batch, Counts, End, Item, Packet, Record, Reply, Verdict, What};
use super::merge::Epoch;
use super::repair::{self, Extent};
use super::roles::{Facts, Place, Role, Roles, Sender};
use super::{Options, Progress, SHARDS};
use crate::capture::link::{self, LinkView};
use crate::capture::{Capture, Damage, LinkType};
use crate::outcome::{Path, Side};

/// The first epoch ends after so many packets, so that the workers soon have something to do; each one after it is
/// twice as long,
const FIRST_EPOCH_PACKETS: usize = 128;
/// up to so many, as handing over wakes threads and what is handed over shall fit caches,
const EPOCH_PACKETS: usize = 1024;
/// or so many bytes, whichever comes first.
const EPOCH_BYTES: usize = 1 << 20;

const ETHERNET_HEADER: usize = 14;

pub(super) struct Dispatcher<'a> {
    roles: Roles,
    fragments: Fragments,
    #[expect(clippy::vec_box, reason = "batches go through channels as pointers")]
    batches: Vec<Box<Batch>>,
    workers: Vec<SyncSender<Box<Batch>>>,
    /// Which worker has a shard.
    worker_of: [u8; SHARDS as usize],
    replies: Vec<Receiver<Reply>>,
    epochs: SyncSender<Epoch>,
    /// Batches that have come back.
    spent: Receiver<Box<Batch>>,
    started: &'a OnceLock<u64>,
    /// Whether the merge stage knows when the capture started.
    is_announced: bool,
    now: Timestamp,
    counts: Counts,
    records: Vec<Record>,
    /// In this epoch.
    packets: usize,
    bytes: usize,
    /// Packets that an epoch may have now.
    epoch_packets: usize,
    /// Changes of policy that are still to come, the next one last.
    changes: Vec<(Timestamp, u16)>,
    /// A packet that had to be mended before it can be looked at.
    mended: Vec<u8>,
}

/// Nobody takes what is dispatched: a worker or the caller has given up.
struct Abandoned;

type Dispatched = Result<(), Abandoned>;

/// A packet as it was found in its frame.
#[derive(Clone, Copy)]
struct Found<'a> {
    number: u64,
    link_type: LinkType,
    /// Link header, as captured.
    link: &'a [u8],
    /// Link header and IP packet, where they are captured whole and next to each other.
    frame: Option<&'a [u8]>,
    ip: &'a [u8],
    /// How much of `ip` was captured.
    captured: usize,
    is_reassembled: bool,
}

impl<'a> Dispatcher<'a> {
    pub(super) fn new(
        options: &'a Options,
        workers: Vec<SyncSender<Box<Batch>>>,
        replies: Vec<Receiver<Reply>>,
        epochs: SyncSender<Epoch>,
        spent: Receiver<Box<Batch>>,
        started: &'a OnceLock<u64>,
    ) -> Self {
        let mut changes: Vec<_> = options
            .changes
            .iter()
            .zip(1..)
            .map(|((at, _), index)| (*at, index))
            .collect();
        changes.sort_by_key(|(at, _)| *at);
        changes.reverse();
        Self {
            roles: Roles::new(&options.clients, &options.config.timeouts),
            fragments: Fragments::new(),
            batches: workers.iter().map(|_| new_batch()).collect(),
            worker_of: std::array::from_fn(|shard| (shard % workers.len()) as u8),
            workers,
            replies,
            epochs,
            spent,
            started,
            is_announced: false,
            now: Timestamp::ZERO,
            counts: Counts::default(),
            records: Vec::new(),
            packets: 0,
            bytes: 0,
            epoch_packets: FIRST_EPOCH_PACKETS,
            changes,
            mended: Vec::new(),
        }
    }

    /// Reads and dispatches all of the capture.
    pub(super) fn run(mut self, capture: &mut Capture) -> (Counts, Option<Damage>) {
        let mut damaged = None;
        let read = self.read(capture, &mut damaged);
        if read.is_ok() {
            // Whoever has given up is joined next, and says why.
            let _ = self.finish(capture);
        }
        let totals = &mut self.counts.totals;
        totals.started = self.started.get().copied().unwrap_or(0);
        totals.duration = self.now;
        (self.counts, damaged)
    }

    fn read(&mut self, capture: &mut Capture, damaged: &mut Option<Damage>) -> Dispatched {
        loop {
            let record = match capture.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(()),
                Err(damage) => {
                    *damaged = Some(damage);
                    return Ok(());
                }
            };
            let started = *self.started.get_or_init(|| record.unix_nanos);
            let time = Timestamp::from_nanos(record.unix_nanos.saturating_sub(started));
            self.now = self.now.max(time);
            self.counts.totals.read += 1;
            self.counts.totals.captured_bytes += record.bytes.len() as u64;
            self.change_policy();
            let gone = &mut Vec::new();
            self.roles.forget(self.now, |each| gone.push(each));
            for each in gone.drain(..) {
                self.push(each.shard, What::Forget(each.slot));
            }
            self.record(&record)?;
            self.packets += 1;
            if self.packets >= self.epoch_packets || self.bytes >= EPOCH_BYTES {
                self.end_epoch(End::Epoch, self.now, capture.position())?;
                self.epoch_packets = (self.epoch_packets * 2).min(EPOCH_PACKETS);
            }
        }
    }

    /// Ends the capture.
    fn finish(&mut self, capture: &Capture) -> Dispatched {
        self.send(End::Capture, self.now)?;
        let mut settled = self.now;
        for worker in &self.replies {
            match worker.recv() {
                Ok(Reply::Settled(at)) => settled = settled.max(at),
                Ok(Reply::Fragment(_) | Reply::Learned(_)) | Err(_) => return Err(Abandoned),
            }
        }
        self.end_epoch(End::Books, settled, capture.position())
    }

    fn change_policy(&mut self) {
        while let Some((at, index)) = self.changes.pop_if(|(at, _)| *at <= self.now) {
            for shard in 0..SHARDS {
                self.push_at(at, ShardId(shard), What::Policy(index));
            }
        }
    }

    // ---- one record --------------------------------------------------------------------------------------------

    fn record(&mut self, record: &crate::capture::Record<'_>) -> Dispatched {
        let range = match link::ip_of(record.link_type, record.bytes) {
            LinkView::Ip(range) => range,
            LinkView::NotIp(_) => {
                self.note(record.number, Side::None, Verdict::NotIp);
                return Ok(());
            }
            LinkView::Unreadable(_) => {
                self.note(record.number, Side::None, Verdict::Unreadable);
                return Ok(());
            }
        };
        let captured = &record.bytes[range.clone()];
        let is_cut = record.original_length as usize > record.bytes.len() && range.end == record.bytes.len();
        let on_wire = if is_cut {
            record.original_length as usize - range.start
        } else {
            captured.len()
        };
        let Some(extent) = repair::extent(captured, on_wire) else {
            self.note(record.number, Side::None, Verdict::Unreadable);
            return Ok(());
        };
        let is_unchanged = extent.len == captured.len() && !extent.length_is_missing;
        let mut mended = std::mem::take(&mut self.mended);
        let ip = if is_unchanged {
            captured
        } else {
            mend(captured, extent, &mut mended)
        };
        let result = self.packet(Found {
            number: record.number,
            link_type: record.link_type,
            link: &record.bytes[..range.start],
            frame: is_unchanged.then(|| &record.bytes[..range.end]),
            ip,
            captured: captured.len(),
            is_reassembled: false,
        });
        self.mended = mended;
        result
    }

    fn packet(&mut self, found: Found<'_>) -> Dispatched {
        if let Some((source, destination, facts)) = plain_facts(found.ip) {
            let role = self.roles.role(self.now, source, destination, &facts, |client| {
                let view = PacketView::parse(found.ip).expect("it is plain");
                owner(&view, client)
            });
            return self.dispatch(role, &facts, &found);
        }
        let view = match PacketView::parse(found.ip) {
            Ok(view) => view,
            Err(_) => {
                self.broken(&found);
                return Ok(());
            }
        };
        if view.fragment().is_some() {
            return self.fragment(&view, found);
        }
        let facts = facts(&view);
        let role = self
            .roles
            .role(self.now, view.source(), view.destination(), &facts, |client| {
                owner(&view, client)
            });
        self.dispatch(role, &facts, &found)
    }

    fn dispatch(&mut self, role: Role, facts: &Facts, found: &Found<'_>) -> Dispatched {
        if let Role::Target(place) = role
            && let Facts::Tcp { ports, .. } | Facts::Udp { ports } = facts
            && ports.0 == dns::PORT
        {
            return self.look_at_answer(place, found);
        }
        self.place(role, found);
        Ok(())
    }

    /// Hands a packet from a name server to its shard, and what the client learns from it to all others.
    fn look_at_answer(&mut self, place: Place, found: &Found<'_>) -> Dispatched {
        if let Some(begins) = self.roles.take_begun() {
            self.push(place.shard, What::Begin(place, found.number, Box::new(begins)));
        }
        let packet = self.write(place.shard, found);
        self.push(place.shard, What::Answer(place, packet));
        let Reply::Learned(learned) = self.ask(place.shard)? else {
            return Err(Abandoned);
        };
        for learned in learned {
            let learned = Arc::new(learned);
            for shard in (0..SHARDS).map(ShardId).filter(|shard| *shard != place.shard) {
                self.push(shard, What::Learned(Arc::clone(&learned)));
            }
        }
        Ok(())
    }

    /// A packet whose lengths or extension headers make no sense: the engine will say so, whoever has sent it.
    fn broken(&mut self, found: &Found<'_>) {
        let Some((source, destination, facts)) = loose_facts(found.ip) else {
            self.note(found.number, Side::None, Verdict::Unreadable);
            return;
        };
        let owner = |client| shard::owner_of_udp_client(client, SHARDS);
        let role = self.roles.role(self.now, source, destination, &facts, owner);
        self.place(role, found);
    }

    fn fragment(&mut self, view: &PacketView<'_>, found: Found<'_>) -> Dispatched {
        let (sender, place) = self.fragments.sender(self.now, view, &mut self.roles);
        let whole = match sender {
            Sender::Client => {
                let shard = shard::owner(view, SHARDS);
                let packet = self.write(shard, &found);
                self.push(shard, What::ClientFragment(packet));
                match self.ask(shard)? {
                    Reply::Fragment(whole) => whole,
                    Reply::Learned(_) | Reply::Settled(_) => return Err(Abandoned),
                }
            }
            Sender::Target => match self.fragments.push(self.now, view) {
                Some(whole) => Some(whole.to_vec()),
                None => {
                    match place {
                        Some(place) => {
                            let packet = self.write(place.shard, &found);
                            self.push(place.shard, What::TargetFragment(place, packet));
                        }
                        None => self.note(found.number, Side::Target, Verdict::Pass),
                    }
                    None
                }
            },
        };
        let Some(whole) = whole else { return Ok(()) };
        let whole = Found {
            number: found.number,
            link_type: LinkType::RAW,
            link: &[],
            frame: None,
            ip: &whole,
            captured: whole.len(),
            is_reassembled: true,
        };
        match PacketView::parse(whole.ip) {
            Ok(view) if view.fragment().is_none() => self.packet(whole),
            Ok(_) | Err(_) => {
                self.broken(&whole);
                Ok(())
            }
        }
    }

    /// Hands a packet to where it belongs.
    fn place(&mut self, role: Role, found: &Found<'_>) {
        let (side, place) = match role {
            Role::Client(place) => (Side::Client, place),
            Role::Target(place) => (Side::Target, place),
            Role::Outside => return self.note(found.number, Side::Target, Verdict::Pass),
        };
        if let Some(begins) = self.roles.take_begun() {
            self.push(place.shard, What::Begin(place, found.number, Box::new(begins)));
        }
        let packet = self.write(place.shard, found);
        self.push(place.shard, What::Packet(side, place, packet));
    }

    /// Notes a packet that no shard has to do with.
    fn note(&mut self, number: u64, side: Side, verdict: Verdict) {
        let record = Record {
            number,
            time: self.now,
            side,
            verdict,
            path: Path::Engine,
            rule: None,
            policy: 0,
            flow: 0,
        };
        self.counts.add(&record);
        self.records.push(record);
    }

    // ---- batches -----------------------------------------------------------------------------------------------

    fn batch(&mut self, shard: ShardId) -> &mut Batch {
        &mut self.batches[usize::from(self.worker_of[usize::from(shard.0)])]
    }

    /// Copies a packet to its shard's batch, as the Ethernet frame that a pre-filter would see.
    fn write(&mut self, shard: ShardId, found: &Found<'_>) -> Packet {
        let bytes = &mut self.batch(shard).bytes;
        let frame = bytes.len();
        match found.frame {
            Some(whole) if found.link_type == LinkType::ETHERNET => bytes.extend_from_slice(whole),
            Some(_) | None => {
                if found.link_type == LinkType::ETHERNET {
                    bytes.extend_from_slice(found.link);
                } else {
                    let ether_type: u16 = if found.ip[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
                    bytes.extend_from_slice(&[0; ETHERNET_HEADER - 2]);
                    bytes.extend_from_slice(&ether_type.to_be_bytes());
                }
                bytes.extend_from_slice(found.ip);
            }
        }
        let len = bytes.len() - frame;
        let start = bytes.len() - found.ip.len();
        self.bytes += len;
        Packet {
            number: found.number,
            frame: frame as u32,
            link_len: (start - frame) as u16,
            len: found.ip.len() as u32,
            captured: found.captured as u32,
            is_reassembled: found.is_reassembled,
        }
    }

    fn push(&mut self, shard: ShardId, what: What) {
        self.push_at(self.now, shard, what);
    }

    fn push_at(&mut self, time: Timestamp, shard: ShardId, what: What) {
        self.batch(shard).items.push(Item { time, shard, what });
    }

    /// Sends a worker what there is, and waits for what became of the item at its end.
    fn ask(&mut self, shard: ShardId) -> Result<Reply, Abandoned> {
        let worker = usize::from(self.worker_of[usize::from(shard.0)]);
        let mut batch = std::mem::take(&mut self.batches[worker]);
        batch.end = End::Reply;
        self.workers[worker].send(batch).map_err(|_| Abandoned)?;
        self.replies[worker].recv().map_err(|_| Abandoned)
    }

    fn end_epoch(&mut self, end: End, until: Timestamp, position: u64) -> Dispatched {
        self.send(end, until)?;
        let started = self.started.get().copied().filter(|_| !self.is_announced);
        self.is_announced = started.is_some() || self.is_announced;
        let epoch = Epoch {
            started,
            records: std::mem::take(&mut self.records),
            progress: Progress {
                packets: self.counts.totals.read,
                bytes: position,
            },
        };
        self.epochs.send(epoch).map_err(|_| Abandoned)
    }

    fn send(&mut self, end: End, until: Timestamp) -> Dispatched {
        self.packets = 0;
        self.bytes = 0;
        for (batch, worker) in self.batches.iter_mut().zip(&self.workers) {
            let next = self.spent.try_recv().unwrap_or_else(|_| new_batch());
            let mut full = std::mem::replace(batch, next);
            full.end = end;
            full.until = until;
            worker.send(full).map_err(|_| Abandoned)?;
        }
        Ok(())
    }
}

/// The packet in its full length.
fn mend<'a>(captured: &'a [u8], extent: Extent, mended: &'a mut Vec<u8>) -> &'a [u8] {
    mended.clear();
    mended.extend_from_slice(captured);
    mended.resize(extent.len, 0);
    if extent.length_is_missing {
        repair::write_total_length(mended);
    }
    mended
}

/// The shard that owns what `client` sends, `view` being one packet of its conversation.
fn owner(view: &PacketView<'_>, client: SocketAddr) -> ShardId {
    match view.protocol() {
        Some(17) => shard::owner_of_udp_client(client, SHARDS),
        _ => shard::owner(view, SHARDS),
    }
}

/// What most packets are, and what [`facts`] would say about them: TCP over IPv4, whole and without IP options.
#[inline]
fn plain_facts(ip: &[u8]) -> Option<(IpAddr, IpAddr, Facts)> {
    let header: &[u8; 40] = ip.first_chunk()?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    if header[0] != 0x45 || header[9] != 6 || is_fragment || total < header.len() || total > ip.len() {
        return None;
    }
    let address = |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let port = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    Some((
        address(12),
        address(16),
        tcp_facts((port(20), port(22)), &header[20..]),
    ))
}

/// A batch with room for most epochs: to grow it would copy it.
fn new_batch() -> Box<Batch> {
    Box::new(Batch {
        items: Vec::with_capacity(EPOCH_PACKETS * 2),
        bytes: Vec::with_capacity(EPOCH_BYTES),
        ..Batch::default()
    })
}

/// What a whole packet says about roles.
fn facts(view: &PacketView<'_>) -> Facts {
    let bytes = &view.bytes()[view.transport_offset()..];
    let Some(protocol) = view.protocol() else {
        return Facts::Other { protocol: u8::MAX };
    };
    match (protocol, view.ports()) {
        (6, Some(ports)) => tcp_facts(ports, bytes),
        (17, Some(ports)) => Facts::Udp { ports },
        (1 | 58, _) => match view.transport() {
            Ok(Transport::Icmp(icmp)) => match icmp.message {
                IcmpMessage::EchoRequest(echo) => Facts::EchoRequest {
                    identifier: echo.identifier,
                },
                IcmpMessage::EchoReply(echo) => Facts::EchoReply {
                    identifier: echo.identifier,
                },
                IcmpMessage::Error {
                    quoted: Some(quoted), ..
                } => {
                    let (sender, receiver) = quoted.ports.unwrap_or_default();
                    Facts::Error {
                        protocol: quoted.protocol,
                        sender: (quoted.source, sender),
                        receiver: (quoted.destination, receiver),
                    }
                }
                IcmpMessage::Error { quoted: None, .. } | IcmpMessage::Other { .. } => {
                    Facts::Other { protocol }
                }
            },
            Ok(Transport::Tcp(_) | Transport::Udp(_)) | Err(_) => Facts::Other { protocol },
        },
        _ => Facts::Other { protocol },
    }
}

fn tcp_facts(ports: (u16, u16), tcp: &[u8]) -> Facts {
    // Zeros stand for what is cut off.
    let mut fields = [0; 14];
    match tcp.first_chunk::<14>() {
        Some(whole) => fields = *whole,
        None => fields[..tcp.len()].copy_from_slice(tcp),
    }
    let [_, _, _, _, a, b, c, d, e, f, g, h, _, flags] = fields;
    Facts::Tcp {
        ports,
        flags: TcpFlags(flags),
        sequence: u32::from_be_bytes([a, b, c, d]),
        acknowledgment: u32::from_be_bytes([e, f, g, h]),
    }
}

/// What can be read of a packet that the IP parser refuses: addresses, and ports where they seem to be.
fn loose_facts(ip: &[u8]) -> Option<(IpAddr, IpAddr, Facts)> {
    let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, &[u8]) = match ip.first()? >> 4 {
        4 => {
            let address = |at: usize| Some(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?));
            let is_later = u16::from_be_bytes([*ip.get(6)?, *ip.get(7)?]) & 0x1fff != 0;
            let start = usize::from(ip[0] & 0xf) * 4;
            let transport = ip.get(start..).filter(|_| !is_later).unwrap_or_default();
            (address(12)?.into(), address(16)?.into(), ip[9], transport)
        }
        6 => {
            let address = |at: usize| Some(Ipv6Addr::from(*ip.get(at..)?.first_chunk::<16>()?));
            (address(8)?.into(), address(24)?.into(), ip[6], ip.get(40..)?)
        }
        _ => return None,
    };
    let ports = transport
        .first_chunk()
        .map(|&[a, b, c, d]| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])));
    let facts = match (protocol, ports) {
        (6, Some(ports)) => tcp_facts(ports, transport),
        (17, Some(ports)) => Facts::Udp { ports },
        _ => Facts::Other { protocol },
    };
    Some((source, destination, facts))
}
