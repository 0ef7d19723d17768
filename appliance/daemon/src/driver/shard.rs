//! One shard: a thread with a queue of the device, an engine and the sockets of its flows.
//!
//! The thread waits in one place, its poll, for whatever comes first: packets, ready sockets, messages, the engine's
//! deadline. A turn takes what is there: up to [`PACKETS_PER_TURN`] packets into the engine, a turn for each flow whose
//! socket or buffers have news, then the flush that sends everything. While there is more to do the poll is only
//! asked, so nothing starves; when there is nothing the thread sleeps.
//!
//! Sockets are watched by the poll directly (edge-triggered, one registration for a socket's life, its flow's id as
//! the token), not by a runtime's tasks: there is no waker, task or lock per flow, and an event leads to its flow
//! by an index.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use tungate_engine::io::{UpstreamError, UpstreamEvent};
use tungate_engine::packet::PacketView;
use tungate_engine::{
    Config, Deadline, Engine, FlowId, IngressId, Input, PacketIn, Policy, ShardId, Timestamp, World, shard,
};

use super::clock::Clock;
use super::denials::Denials;
use super::device::{Layer, Reader, Writer, split};
use super::ethernet::Ethernet;
use super::exchange::{Buffers, Mailbox, Message};
use super::machine::{Journal, Machine};
use super::questions::{Listing, Names, RuleCounts};
use super::world::{Flows, Losses, News, ShardWorld, flow_of};
use super::{Report, Totals};
use crate::bypass::Asking;
use crate::egress::{Dialer, Egresses};
use crate::logs;
use crate::upstream::{Batch, Readiness, Tcp, Upstream};

/// Packets read before flows have their turn.
const PACKETS_PER_TURN: usize = 64;
/// Datagrams received for one flow before others have their turn.
const DATAGRAMS_PER_TURN: usize = 32;
/// Turns of flows and flushes before the poll is asked.
const ROUNDS_PER_TURN: usize = 4;
/// Bytes that flows move before the flush sends them: it finds them in the processor's cache.
const BYTES_PER_TURN: usize = 1 << 20;
/// A wait that is longer may be as much as a millisecond too long.
const COARSE: Duration = Duration::from_millis(20);
/// What one poll reports at most.
const EVENTS: usize = 1024;

const DEVICE: Token = Token(usize::MAX);
const MAILBOX: Token = Token(usize::MAX - 1);

/// The ingress of the one device there is.
pub(super) const INGRESS: IngressId = IngressId(0);

/// What a shard is made of, before its thread runs.
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) policy: Arc<Policy>,
    pub(super) egresses: Arc<Egresses>,
    pub(super) seed: [u8; 32],
    pub(super) start: Timestamp,
    pub(super) clock: Clock,
    pub(super) journal: Option<Journal>,
    pub(super) queue: OwnedFd,
    pub(super) layer: Layer,
    pub(super) udp_segmentation: bool,
    pub(super) poll: Poll,
    pub(super) mailboxes: Arc<[Arc<Mailbox>]>,
    pub(super) buffers: Arc<Buffers>,
    pub(super) dialer: Dialer,
    pub(super) bypass: Option<Asking>,
    pub(super) reports: tokio::sync::mpsc::UnboundedSender<Report>,
}

/// The poll and mailbox of a shard to be.
pub(super) fn prepare() -> io::Result<(Poll, Mailbox)> {
    let poll = Poll::new()?;
    let waker = Waker::new(poll.registry(), MAILBOX)?;
    Ok((poll, Mailbox::new(waker)))
}

/// A running shard.
struct Shard {
    id: ShardId,
    shards: u8,
    machine: Machine,
    world: ShardWorld,
    reader: Reader,
    poll: Poll,
    mailbox: Arc<Mailbox>,
    clock: Clock,
    /// For datagrams on their way to the engine.
    buffer: Box<[u8]>,
    batch: Batch,
    draining: bool,
    denials: Denials,
    /// What rules of earlier policies have dropped.
    past: RuleCounts,
    listings: VecDeque<Listing>,
    reports: tokio::sync::mpsc::UnboundedSender<Report>,
}

/// Runs a shard until it is told to stop.
///
/// # Errors
///
/// When the device is gone, or the poll fails.
pub(super) fn run(parts: Parts) -> io::Result<Totals> {
    let Parts {
        config,
        policy,
        egresses,
        seed,
        start,
        clock,
        journal,
        queue,
        layer,
        udp_segmentation,
        poll,
        mailboxes,
        buffers,
        dialer,
        bypass,
        reports,
    } = parts;
    let (id, shards) = (config.shard, config.shards);
    let ethernet = match layer {
        Layer::Ip => None,
        Layer::Ethernet => Some(Ethernet::new(config.router_v4, config.router_v6)),
    };
    let (reader, device): (Reader, Writer) = split(queue, udp_segmentation, ethernet);
    poll.registry().register(
        &mut SourceFd(&reader.as_raw_fd()),
        DEVICE,
        Interest::READABLE | Interest::WRITABLE,
    )?;
    let world = ShardWorld {
        device,
        flows: Flows::default(),
        news: Default::default(),
        tcp_flows: 0,
        policy: policy.clone(),
        names: Names::of(&policy),
        egresses,
        now: start,
        losses: Losses::default(),
        mailboxes: mailboxes.clone(),
        to_wake: 0,
        buffers,
        shard: id,
        registry: poll.registry().try_clone()?,
        dialer,
        bypass,
        bypassed: 0,
        gathered: Default::default(),
    };
    let engine = Engine::new(config, policy, seed, start);
    let mut shard = Shard {
        id,
        shards,
        machine: Machine::new(engine, id, journal),
        world,
        reader,
        poll,
        mailbox: mailboxes[usize::from(id.0)].clone(),
        clock,
        buffer: vec![0; usize::from(u16::MAX)].into_boxed_slice(),
        batch: Batch::new(),
        draining: false,
        denials: Denials::new(),
        past: RuleCounts::default(),
        listings: VecDeque::new(),
        reports,
    };
    shard.machine.handle(
        start,
        Input::WallClock(shard.clock.wall_offset()),
        &mut shard.world,
    );
    let _lines = logs::gather();
    shard.run()?;
    Ok(shard.totals())
}

impl Shard {
    fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        let mut deadline: Option<Deadline> = None;
        loop {
            let timeout = if self.has_more() {
                Some(Duration::ZERO)
            } else {
                deadline.map(|deadline| deadline.at.since(self.clock.now()))
            };
            logs::hand_over();
            self.wait(&mut events, timeout)?;
            self.world.now = self.clock.now();
            let mut has_mail = false;
            for event in &events {
                match event.token() {
                    DEVICE => {
                        self.reader.readable |= event.is_readable() || event.is_error();
                        if event.is_writable() {
                            self.world.device.on_writable();
                        }
                    }
                    MAILBOX => has_mail = true,
                    token => self.world.flows.on_ready(flow_of(token), Readiness::from(event)),
                }
            }
            if has_mail && !self.take_messages() {
                return Ok(());
            }
            self.take_parcels();
            self.read_packets()?;
            self.list_flows();
            deadline = self.work();
            if self.draining && self.world.tcp_flows == 0 {
                self.draining = false;
                let _ = self.reports.send(Report::Drained);
            }
        }
    }

    /// Waits until something comes, or for `timeout`; `None`: for as long as it takes.
    fn wait(&mut self, events: &mut Events, mut timeout: Option<Duration>) -> io::Result<()> {
        // The poll counts in whole milliseconds: too coarse for what is paced.
        if let Some(fine) = timeout
            && !fine.is_zero()
            && fine < COARSE
        {
            // SAFETY: the poll owns the descriptor and outlives the call.
            let poll = unsafe { BorrowedFd::borrow_raw(self.poll.as_raw_fd()) };
            let mut fds = [PollFd::new(poll, PollFlags::POLLIN)];
            match ppoll(&mut fds, Some(fine.into()), None) {
                Ok(_) | Err(Errno::EINTR) => timeout = Some(Duration::ZERO),
                Err(error) => return Err(error.into()),
            }
        }
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Whether there is something to do without the poll's telling so.
    fn has_more(&self) -> bool {
        (self.reader.readable && self.world.has_room())
            || self.world.flows.queued() > 0
            || !self.world.news.is_empty()
            || !self.mailbox.packets.is_empty()
            || !self.listings.is_empty()
    }

    /// Returns whether to go on.
    fn take_messages(&mut self) -> bool {
        while let Some(message) = self.mailbox.receive() {
            match message {
                Message::Policy(policy, egresses) => {
                    self.past
                        .add_all(self.machine.engine().counters(), &self.world.policy);
                    self.world.names = Names::of(&policy);
                    self.world.policy = policy.clone();
                    self.world.egresses = egresses;
                    self.handle(Input::Policy(policy));
                }
                Message::Bypass(news) => self.handle(Input::Bypass(news)),
                Message::WallClock(offset) => self.handle(Input::WallClock(offset)),
                Message::Learned(learned) => self.handle(Input::Learned(&learned)),
                Message::Drain => {
                    self.draining = true;
                    self.handle(Input::Drain);
                }
                Message::Check => {
                    let _ = self.reports.send(Report::Alive);
                }
                Message::Flows(answer) => self.listings.push_back(Listing::new(answer)),
                Message::Count(answer) => {
                    let _ = answer.send(self.totals()); // nobody waits any more
                }
                Message::Stop => {
                    self.work();
                    return false;
                }
                Message::Dialed(id, Ok(socket)) => {
                    if self.world.detach(id).is_some() {
                        self.world.attach(id, Upstream::Tcp(Tcp::connected(socket)));
                        self.handle(Input::Upstream(id, UpstreamEvent::Connected));
                    }
                }
                Message::Associated(id, Ok(association)) => {
                    if let Some(Upstream::Associating(associating)) = self.world.detach(id) {
                        let relayed = associating.finish(association);
                        self.world.attach(id, Upstream::Relayed(relayed));
                    }
                }
                Message::Dialed(id, Err(error)) | Message::Associated(id, Err(error)) => {
                    self.world.detach(id);
                    self.handle(Input::Upstream(id, UpstreamEvent::Failed(error)));
                }
            }
        }
        true
    }

    /// Goes on with the first of the listings that were asked for.
    fn list_flows(&mut self) {
        if let Some(listing) = self.listings.front_mut()
            && !listing.go_on(&self.world.flows, self.machine.engine(), self.world.now)
        {
            self.listings.pop_front();
        }
    }

    fn take_parcels(&mut self) {
        for _ in 0..PACKETS_PER_TURN {
            let Some(parcel) = self.mailbox.packets.pop() else {
                return;
            };
            let packet = parcel.packet();
            judge(&mut self.machine, &mut self.world, &mut self.denials, packet);
            self.world.buffers.give_back(parcel);
        }
    }

    /// Reads packets from the device into the engine, or into the mailbox of the shard that owns them.
    fn read_packets(&mut self) -> io::Result<()> {
        for _ in 0..PACKETS_PER_TURN {
            if !self.reader.readable || !self.world.has_room() {
                break;
            }
            let Some(received) = self.reader.read()? else {
                break;
            };
            let Some(bytes) = self.world.device.take(received.bytes) else {
                continue;
            };
            let packet = PacketIn {
                ingress: INGRESS,
                bytes,
                checksum: received.checksum,
                segment_size: received.segment_size,
                reassembled: false,
            };
            // What cannot be parsed is anybody's: it is dropped and counted.
            let owner = match PacketView::parse(packet.bytes) {
                Ok(view) if self.shards > 1 => shard::owner(&view, self.shards),
                Ok(_) | Err(_) => self.id,
            };
            if owner == self.id {
                judge(&mut self.machine, &mut self.world, &mut self.denials, packet);
            } else {
                self.world.forward(owner, packet);
            }
        }
        self.wake_others();
        Ok(())
    }

    fn wake_others(&mut self) {
        let to_wake = std::mem::take(&mut self.world.to_wake);
        for (index, mailbox) in self.world.mailboxes.iter().enumerate() {
            if to_wake & 1 << index != 0 {
                mailbox.wake();
            }
        }
    }

    /// Gives flows their turns and flushes, until there is nothing to do or others have waited long enough.
    fn work(&mut self) -> Option<Deadline> {
        let mut deadline = None;
        let mut left = BYTES_PER_TURN;
        self.world.send_gathered();
        for _ in 0..ROUNDS_PER_TURN {
            for _ in 0..self.world.flows.queued() {
                if left == 0 {
                    break;
                }
                if let Some(id) = self.world.flows.next_ready() {
                    left = left.saturating_sub(self.give_turn(id));
                }
            }
            self.tell_news();
            self.world.now = self.clock.now();
            deadline = self.machine.flush(self.world.now, &mut self.world);
            if left == 0 || self.world.flows.queued() == 0 && self.world.news.is_empty() {
                break;
            }
        }
        self.wake_others();
        deadline
    }

    /// Returns how many bytes of a TCP flow have moved.
    fn give_turn(&mut self, id: FlowId) -> usize {
        let now = self.world.now;
        let Some(entry) = self.world.flows.get_mut(id) else {
            return 0;
        };
        match &mut entry.upstream {
            Some(Upstream::Tcp(tcp)) => {
                let progress = tcp.turn(id, now, &mut self.machine);
                if progress.again {
                    self.world.flows.queue(id);
                }
                let Some(news) = progress.news else {
                    return progress.moved;
                };
                match news {
                    // Nothing more comes from it, and nothing goes to it.
                    UpstreamEvent::Failed(_) | UpstreamEvent::Reset => drop(self.world.detach(id)),
                    UpstreamEvent::Connected
                    | UpstreamEvent::ReadClosed
                    | UpstreamEvent::Datagram { .. }
                    | UpstreamEvent::EchoReply { .. }
                    | UpstreamEvent::Error { .. } => {}
                }
                self.handle(Input::Upstream(id, news));
                return progress.moved;
            }
            Some(Upstream::Relayed(relayed)) => {
                if relayed.in_doubt && relayed.has_ended() {
                    drop(self.world.detach(id));
                    self.handle(Input::Upstream(id, UpstreamEvent::Failed(UpstreamError::Egress)));
                } else {
                    self.give_session_turn(id);
                }
            }
            Some(Upstream::Udp(_) | Upstream::Ping(_)) => self.give_session_turn(id),
            Some(Upstream::Dialing(_) | Upstream::Associating(_)) | None => {}
        }
        0
    }

    /// Takes errors and datagrams, or echo replies, from a session's socket.
    fn give_session_turn(&mut self, id: FlowId) {
        for _ in 0..DATAGRAMS_PER_TURN {
            // The session may end at any of them.
            let Some(entry) = self.world.flows.get_mut(id) else {
                return;
            };
            let input = match &mut entry.upstream {
                Some(Upstream::Udp(udp)) if udp.error => udp.next_error().map(|error| error.into()),
                Some(Upstream::Ping(ping)) if ping.error => ping.next_error().map(|error| error.into()),
                Some(Upstream::Udp(udp)) if udp.readable => {
                    udp.receive(&mut self.batch);
                    let again = udp.readable || udp.error;
                    self.deliver_batch(id);
                    if again {
                        self.world.flows.queue(id);
                    }
                    return;
                }
                Some(Upstream::Ping(ping)) if ping.readable => {
                    ping.receive(&mut self.buffer)
                        .ok()
                        .map(|reply| UpstreamEvent::EchoReply {
                            sequence: reply.sequence,
                            payload: &self.buffer[reply.payload],
                        })
                }
                Some(Upstream::Relayed(relayed)) if relayed.readable => relayed
                    .receive(&mut self.buffer)
                    .ok()
                    .map(|(source, payload)| UpstreamEvent::Datagram {
                        source,
                        payload: &self.buffer[payload],
                        segment_size: None,
                    }),
                Some(
                    Upstream::Udp(_)
                    | Upstream::Ping(_)
                    | Upstream::Relayed(_)
                    | Upstream::Tcp(_)
                    | Upstream::Dialing(_)
                    | Upstream::Associating(_),
                )
                | None => return,
            };
            if let Some(event) = input {
                self.machine
                    .handle(self.world.now, Input::Upstream(id, event), &mut self.world);
            }
        }
        self.world.flows.queue(id);
    }

    /// Gives the engine the datagrams that a session's socket has received.
    fn deliver_batch(&mut self, id: FlowId) {
        while let Some(received) = self.batch.next() {
            let datagram = UpstreamEvent::Datagram {
                source: received.source,
                payload: received.payload,
                segment_size: received.segment_size,
            };
            self.machine
                .handle(self.world.now, Input::Upstream(id, datagram), &mut self.world);
        }
    }

    /// Tells the engine what came of its commands.
    fn tell_news(&mut self) {
        while let Some((id, news)) = self.world.news.pop_front() {
            let event = match news {
                News::Failed(error) => {
                    self.world.detach(id);
                    UpstreamEvent::Failed(error)
                }
                News::SendError { target, error } => UpstreamEvent::Error {
                    target,
                    reporter: None,
                    error,
                },
            };
            self.handle(Input::Upstream(id, event));
        }
    }

    fn handle(&mut self, input: Input<'_>) {
        self.machine.handle(self.world.now, input, &mut self.world);
    }

    fn totals(&self) -> Totals {
        let engine = self.machine.engine();
        let mut by_rule = self.past.clone();
        by_rule.add_all(engine.counters(), &self.world.policy);
        Totals {
            counters: engine.counters().clone(),
            by_rule,
            open_flows: engine.open_flows(),
            buffer_bytes: engine.buffer_bytes(),
            bypassed: self.world.bypassed,
            lost_by_device: self.world.device.lost(),
            lost_between_shards: self.world.losses.handed_over,
        }
    }
}

/// Gives the engine a packet, and tells the log what the policy denies.
fn judge(machine: &mut Machine, world: &mut ShardWorld, denials: &mut Denials, packet: PacketIn<'_>) {
    if let Some(judgement) = machine.handle(world.now, Input::Packet(packet), world) {
        denials.note(&packet, &judgement, &world.policy, machine.engine(), world.now);
    }
}
