//! What the engine promises its drivers, whatever the network does and whenever the driver comes.
//!
//! 1. *Deterministic*: same seed and inputs, same outputs.
//! 2. *Settles*: a bounded number of outputs follows from one input.
//! 3. *No busy loop*: after a wake-up at a deadline, the next deadline is later.
//! 4. *Announces everything*: extra wake-ups between deadlines change no output.
//! 5. *Monotonic*: an older `now` counts as the latest one seen.
//! 6. *Bounded*: no buffer exceeds its configured size, whatever arrives.
//!
//! A story is a list of things that clients, upstreams and the driver do, sense and nonsense mixed. It is told to
//! several engines, by drivers of different [`Manner`], and what they put out is compared byte for byte. The second,
//! third and sixth promise are checked at each step of every telling.

mod story;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use tungate_engine::config::Limits;
use tungate_engine::io::UpstreamEvent;
use tungate_engine::{
    Config, Deadline, DropReason, Engine, Event, FlowId, Input, Judgement, ShardId, Timestamp,
};
use tungate_tests::packet::{ACK, Datagram, FIN, Options, PSH, RST, SYN, Segment, echo_request, fragments};
use tungate_tests::recorder::{Output, Recorder};
use tungate_tests::rig::packet_in;

use self::story::{Act, DATAGRAMS, News, PEERS, Pick, Setup, policy, setups, stories};

/// Outputs that may follow from one input. The most is a datagram of 9,000 bytes in segments of 100, or a policy that
/// ends every flow: an RST, a command and an event each, and what its client's window takes.
const OUTPUTS_MAX: usize = 150;

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn same_seed_and_inputs_make_the_same_outputs(setup in setups(), story in stories()) {
        let first = tell(&setup, &story, Manner::Plain);
        let second = tell(&setup, &story, Manner::Plain);
        prop_assert!(first == second);
    }

    #[test]
    fn extra_wakeups_change_no_output(setup in setups(), story in stories()) {
        let plain = tell(&setup, &story, Manner::Plain);
        let nervous = tell(&setup, &story, Manner::Nervous);
        assert_same(&plain.outputs(), &nervous.outputs());
    }

    #[test]
    fn an_older_now_counts_as_the_latest(setup in setups(), story in stories()) {
        let plain = tell(&setup, &story, Manner::Plain);
        let confused = tell(&setup, &story, Manner::Confused);
        assert_same(&plain.outputs(), &confused.outputs());
        prop_assert_eq!(plain.deadlines, confused.deadlines);
    }
}

/// Shows where two tellings differ first, instead of both in full.
fn assert_same(one: &[String], other: &[String]) {
    let differs = one.iter().zip(other).position(|(one, other)| one != other);
    let at = differs.unwrap_or(one.len().min(other.len()));
    assert!(
        one.len() == other.len() && differs.is_none(),
        "output {at} differs:\n  {:?}\n  {:?}\nafter {:#?}",
        one.get(at),
        other.get(at),
        &one[at.saturating_sub(10)..at]
    );
}

// ---- telling them --------------------------------------------------------------------------------------------------------

/// How a driver behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// It comes at deadlines, and when something happens.
    Plain,
    /// It comes in between as well.
    Nervous,
    /// It says an older time wherever it has said the present one already.
    Confused,
}

/// What came of a story.
#[derive(Debug, Default, PartialEq, Eq)]
struct Telling {
    heard: Vec<(Timestamp, Heard)>,
    deadlines: Vec<Option<Deadline>>,
}

/// What an engine answered or wanted done.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Judgement(Option<Judgement>),
    Read(FlowId, Vec<u8>),
    Written(FlowId, usize),
    Output(Output),
}

impl Telling {
    /// Every output in a form that shows where two differ.
    fn outputs(&self) -> Vec<String> {
        let hash = |bytes: &[u8]| {
            bytes
                .iter()
                .fold(0_u64, |hash, byte| hash.wrapping_mul(31) + u64::from(*byte))
        };
        let line = |(at, heard): &(Timestamp, Heard)| match heard {
            Heard::Output(output @ Output::Packet(out, bytes)) => {
                format!("{at} {output} {out:?} {:x}", hash(bytes))
            }
            Heard::Output(output) => format!("{at} {output:?}"),
            Heard::Read(flow, bytes) => format!("{at} read {} of {flow}: {:x}", bytes.len(), hash(bytes)),
            Heard::Judgement(_) | Heard::Written(..) => format!("{at} {heard:?}"),
        };
        self.heard.iter().map(line).collect()
    }
}

/// A client's end of a connection, as far as it makes sense.
#[derive(Debug, Clone)]
struct Peer {
    address: SocketAddr,
    target: SocketAddr,
    sequence: u32,
    expected: u32,
}

struct Teller {
    manner: Manner,
    engine: Engine,
    limits: Limits,
    world: Recorder,
    now: Timestamp,
    /// The engine has been told the present time.
    told: bool,
    deadline: Option<Deadline>,
    peers: Vec<Peer>,
    /// Every flow there has been, with its client.
    flows: Vec<(FlowId, SocketAddr)>,
    /// Acts until the engine gets its next turn.
    batch: u8,
    outputs_of_step: usize,
    dropped: u64,
    telling: Telling,
}

fn tell(setup: &Setup, story: &[Act], manner: Manner) -> Telling {
    let mut teller = Teller::new(setup, manner);
    for act in story {
        teller.act(act);
        if teller.batch > 0 {
            teller.batch -= 1;
        } else {
            teller.flush();
        }
        teller.check();
    }
    teller.flush();
    teller.pass(Duration::from_secs(20_000));
    teller.check();
    teller.telling
}

impl Teller {
    fn new(setup: &Setup, manner: Manner) -> Self {
        let limits = Limits {
            flows: 6,
            flows_per_client: 4,
            half_open: 3,
            sessions: 4,
            reassembly_bytes: 16 << 10,
            buffer_bytes: 6 * (32 << 10),
            buffer_per_flow: setup.buffer_per_flow,
            names: 3,
        };
        let config = Config {
            mtu: setup.mtu,
            clients: setup.clients,
            udp_filtering: setup.filtering,
            limits: limits.clone(),
            ..Config::default()
        };
        let peer = |number| {
            let (address, target) = match number {
                0..2 => (format!("10.0.0.2:{}", 1001 + u16::from(number)), "192.0.2.7:80"),
                2 => ("10.0.0.3:1003".to_owned(), "192.0.2.8:443"),
                _ => (
                    format!("[fd00::2]:{}", 1001 + u16::from(number)),
                    "[2001:db8::7]:80",
                ),
            };
            Peer {
                address: address.parse().expect("an address"),
                target: target.parse().expect("an address"),
                sequence: 0xffff_ff00 + u32::from(number),
                expected: 0,
            }
        };
        let now = Timestamp::ZERO;
        Self {
            manner,
            engine: Engine::new(config, policy(0), [3; 32], now),
            limits,
            world: Recorder::default(),
            now,
            told: false,
            deadline: None,
            peers: (0..PEERS).map(peer).collect(),
            flows: Vec::new(),
            batch: 0,
            outputs_of_step: 0,
            dropped: 0,
            telling: Telling::default(),
        }
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Handshake { peer } => self.handshake(peer),
            Act::Syn { peer } => self.syn(peer),
            Act::Data { peer, len, fin } => {
                let flags = ACK | PSH | if fin { FIN } else { 0 };
                self.segment(peer, flags, 0, 0, 65_535, len);
                let peer = self.peer(peer);
                peer.sequence = peer.sequence.wrapping_add(u32::from(len) + u32::from(fin));
            }
            Act::Ack { peer, window } => self.segment(peer, ACK, 0, 0, window, 0),
            Act::Reset { peer } => self.segment(peer, RST, 0, 0, 0, 0),
            Act::Nonsense {
                peer,
                flags,
                ahead,
                acknowledges,
                window,
                len,
            } => self.segment(peer, flags, ahead, acknowledges, window, len),
            Act::Damaged { peer, bit } => {
                let mut packet = self.segment_of(peer, ACK, 0, 0, 65_535, 100).packet();
                let bit = usize::from(bit) % (packet.len() * 8);
                packet[bit / 8] ^= 1 << (bit % 8);
                self.packet(&packet);
            }
            Act::Garbage { ref bytes } => self.packet(bytes),
            Act::Datagram { peer, target, len } => {
                let source = self.peer(peer).address;
                let packet = Datagram {
                    source,
                    destination: outside(source, target),
                    payload: vec![target; len.into()],
                };
                self.packet(&packet.packet());
            }
            Act::Ping { peer, target, len } => {
                let source = self.peer(peer).address;
                let target = outside(source, target).ip();
                self.packet(&echo_request(
                    source.ip(),
                    target,
                    source.port(),
                    len,
                    &vec![9; len.into()],
                ));
            }
            Act::Fragment { datagram, piece } => self.fragment(datagram, piece),
            Act::News { flow, ref news } => self.news(flow, news),
            Act::Read { flow, most } => self.read(flow, most),
            Act::Write { flow, len } => self.write(flow, len),
            Act::Policy { number } => self.handle(Input::Policy(policy(number))),
            Act::WallClock { hours } => self.handle(Input::WallClock(i64::from(hours) * 3_600_000_000_000)),
            Act::Drain => self.handle(Input::Drain),
            Act::DeviceFills => self.world.full = true,
            Act::DeviceDrains => {
                self.world.full = false;
                self.flush();
            }
            Act::Batch { acts } => self.batch = acts,
            Act::Pass { micros } => {
                self.batch = 0;
                self.flush();
                self.pass(Duration::from_micros(micros));
            }
        }
    }

    // ---- the driver --------------------------------------------------------------------------------------------

    /// The time to say in a call.
    fn time(&mut self) -> Timestamp {
        if self.manner == Manner::Confused && std::mem::replace(&mut self.told, true) {
            Timestamp::from_nanos(self.now.as_nanos() / 2)
        } else {
            self.told = true;
            self.now
        }
    }

    fn handle(&mut self, input: Input<'_>) {
        let now = self.time();
        let judgement = self.engine.handle(now, input, &mut self.world);
        if judgement.is_some_and(|judgement| judgement.dropped.is_some()) {
            self.dropped += 1;
        }
        self.telling.heard.push((self.now, Heard::Judgement(judgement)));
        self.listen();
    }

    /// Gives the engine its turn, and checks what it promises about it.
    fn flush(&mut self) {
        let now = self.time();
        self.deadline = self.engine.flush(now, &mut self.world);
        self.listen();
        assert!(
            self.outputs_of_step <= OUTPUTS_MAX,
            "{} outputs of one step",
            self.outputs_of_step
        );
        self.outputs_of_step = 0;
        self.check_deadline();
        self.telling.deadlines.push(self.deadline);
        if self.manner == Manner::Nervous && !self.world.full {
            self.wake(false);
        }
    }

    /// Wakes the engine, at its deadline or for nothing.
    fn wake(&mut self, at_deadline: bool) {
        let now = self.time();
        self.engine.handle(now, Input::Wakeup, &mut self.world);
        self.deadline = self.engine.flush(now, &mut self.world);
        self.listen();
        self.outputs_of_step = 0;
        self.check_deadline();
        if at_deadline {
            self.telling.deadlines.push(self.deadline);
        }
    }

    /// After a turn there is nothing that could be done at once, unless the device is full.
    fn check_deadline(&self) {
        let is_later = self.deadline.is_none_or(|deadline| deadline.at > self.now);
        assert!(is_later || self.world.full, "{:?} at {}", self.deadline, self.now);
    }

    /// Lets time pass as a driver would.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let next = self
                .deadline
                .map(|deadline| deadline.at.max(self.now))
                .filter(|at| *at <= end);
            let stop = next.unwrap_or(end);
            if self.manner == Manner::Nervous && stop > self.now {
                let gap = stop.since(self.now);
                for early in [self.now + gap / 2, stop - Duration::from_nanos(1)] {
                    self.go_to(early);
                    self.wake(false);
                }
            }
            let is_stuck = self.world.full && stop == self.now;
            self.go_to(stop);
            if next.is_none() || is_stuck {
                break;
            }
            self.wake(true);
        }
        self.go_to(end);
    }

    fn go_to(&mut self, at: Timestamp) {
        if at > self.now {
            self.now = at;
            self.told = false;
        }
    }

    /// Takes note of what the engine wants done.
    fn listen(&mut self) {
        for output in self.world.take() {
            self.outputs_of_step += 1;
            match &output {
                Output::Packet(out, bytes) => {
                    let mut copy = bytes.clone();
                    let peers = &mut self.peers;
                    tungate_engine::packet::segments(&mut copy, out, |packet| learn(peers, packet));
                }
                Output::Event(Event::Opened { flow, client, .. }) => self.flows.push((*flow, *client)),
                Output::Event(_) | Output::Command(..) | Output::Forward(..) => {}
            }
            self.telling.heard.push((self.now, Heard::Output(output)));
        }
    }

    /// Nothing grows beyond its limit, and nothing has gone wrong inside.
    fn check(&self) {
        let limits = &self.limits;
        assert!(self.engine.buffer_bytes() <= limits.buffer_bytes);
        assert!(self.engine.open_flows() <= (limits.flows + limits.sessions) as usize);
        let counters = self.engine.counters();
        assert_eq!(counters.drops(DropReason::Internal), 0);
        let told = |heard: &&(Timestamp, Heard)| {
            matches!(heard.1, Heard::Output(Output::Event(Event::Dropped { .. })))
        };
        let told = self.telling.heard.iter().filter(told).count() as u64;
        let counted: u64 = DropReason::ALL.iter().map(|reason| counters.drops(*reason)).sum();
        assert_eq!(counted, told, "drops counted and told");
        assert!(
            self.dropped <= counted,
            "every judgement that says dropped is counted"
        );
    }

    // ---- what the acts need ------------------------------------------------------------------------------------

    fn peer(&mut self, peer: u8) -> &mut Peer {
        &mut self.peers[usize::from(peer)]
    }

    fn packet(&mut self, bytes: &[u8]) {
        self.handle(Input::Packet(packet_in(bytes)));
    }

    fn syn(&mut self, peer: u8) {
        let mut syn = self.segment_of(peer, SYN, 0, 0, 8_000, 0);
        syn.acknowledgment = 0;
        syn.options = Options {
            max_segment_size: Some(if peer == 1 { 100 } else { 1460 }),
            window_scale: (peer != 2).then_some(7),
            sack_permitted: true,
        };
        self.packet(&syn.packet());
    }

    fn handshake(&mut self, peer: u8) {
        // Far from the connection before, but less than half of sequence space.
        let numbers = self.peer(peer);
        numbers.sequence = numbers.sequence.wrapping_add(0x1000_0000);
        let address = numbers.address;
        self.syn(peer);
        let flow = self.flows.iter().rev().find(|(_, client)| *client == address);
        if let Some(&(flow, _)) = flow {
            self.handle(Input::Upstream(flow, UpstreamEvent::Connected));
        }
        self.flush();
        let numbers = self.peer(peer);
        numbers.sequence = numbers.sequence.wrapping_add(1);
        self.segment(peer, ACK, 0, 0, 65_535, 0);
    }

    fn segment(&mut self, peer: u8, flags: u8, ahead: i32, acknowledges: i32, window: u16, len: u16) {
        let segment = self.segment_of(peer, flags, ahead, acknowledges, window, len);
        self.packet(&segment.packet());
    }

    fn segment_of(
        &mut self,
        peer: u8,
        flags: u8,
        ahead: i32,
        acknowledges: i32,
        window: u16,
        len: u16,
    ) -> Segment {
        let peer = self.peer(peer);
        Segment {
            source: peer.address,
            destination: peer.target,
            flags,
            sequence: peer.sequence.wrapping_add(ahead as u32),
            acknowledgment: peer.expected.wrapping_add(acknowledges as u32),
            window,
            options: Options::default(),
            payload: vec![0x5a; len.into()],
        }
    }

    fn fragment(&mut self, datagram: u8, piece: u8) {
        let peer = self.peer(if datagram.is_multiple_of(2) { 0 } else { 3 }).clone();
        let whole = Datagram {
            source: peer.address,
            destination: peer.target,
            payload: vec![datagram; 5_000],
        };
        // The last has the identification of the first, and is cut elsewhere.
        let (identification, size) = if datagram + 1 == DATAGRAMS {
            (0, 1_000)
        } else {
            (datagram.into(), 1_256)
        };
        let pieces = fragments(&whole.packet(), identification, size);
        self.packet(&pieces[usize::from(piece) % pieces.len()]);
    }

    fn pick(&self, pick: Pick) -> FlowId {
        match pick {
            Pick::Recent(back) if !self.flows.is_empty() => {
                self.flows[self.flows.len() - 1 - usize::from(back) % self.flows.len()].0
            }
            Pick::Recent(slot) => FlowId::new(ShardId(0), 0, slot.into()),
            Pick::Never { generation, slot } => FlowId::new(ShardId(0), generation, slot),
        }
    }

    fn news(&mut self, pick: Pick, news: &News) {
        let flow = self.pick(pick);
        let client = self
            .flows
            .iter()
            .find(|(id, _)| *id == flow)
            .map(|(_, client)| *client);
        let client = client.unwrap_or(self.peers[0].address);
        let payload = |len: u16| vec![0x77; len.into()];
        let (datagram, echo);
        let event = match *news {
            News::Connected => UpstreamEvent::Connected,
            News::Failed(error) => UpstreamEvent::Failed(error),
            News::ReadClosed => UpstreamEvent::ReadClosed,
            News::Reset => UpstreamEvent::Reset,
            News::Datagram {
                target,
                len,
                segment_size,
            } => {
                datagram = payload(len);
                UpstreamEvent::Datagram {
                    source: outside(client, target),
                    payload: &datagram,
                    segment_size: segment_size.try_into().ok(),
                }
            }
            News::EchoReply { sequence, len } => {
                echo = payload(len);
                UpstreamEvent::EchoReply {
                    sequence,
                    payload: &echo,
                }
            }
            News::Error { target, error } => UpstreamEvent::Error {
                target: outside(client, target),
                reporter: None,
                error,
            },
        };
        self.handle(Input::Upstream(flow, event));
    }

    fn read(&mut self, pick: Pick, most: u32) {
        let flow = self.pick(pick);
        let now = self.time();
        let mut bytes = Vec::new();
        let taken = self.engine.read(now, flow, |lent| {
            assert!(!lent.is_empty());
            bytes.extend_from_slice(&lent[..lent.len().min(most as usize)]);
            bytes.len()
        });
        assert_eq!(taken, bytes.len());
        self.telling.heard.push((self.now, Heard::Read(flow, bytes)));
    }

    fn write(&mut self, pick: Pick, len: u32) {
        let flow = self.pick(pick);
        let now = self.time();
        let filled = self.engine.write(now, flow, |space| {
            assert!(!space.is_empty());
            let len = space.len().min(len as usize);
            space[..len].fill(0x33);
            len
        });
        self.telling.heard.push((self.now, Heard::Written(flow, filled)));
    }
}

/// Notes for each peer what it has to acknowledge.
fn learn(peers: &mut [Peer], packet: &[u8]) {
    use tungate_tests::packet::{Message, Reader};
    let Some(Message::Tcp(segment)) = Reader::default().read(packet) else {
        return;
    };
    for peer in peers {
        if (segment.destination, segment.source) == (peer.address, peer.target) && !segment.has(RST) {
            let end = segment.sequence.wrapping_add(segment.sequence_len());
            if segment.has(SYN) || end.wrapping_sub(peer.expected) < 1 << 31 {
                peer.expected = end;
            }
        }
    }
}

/// One of a few addresses outside, of the client's family; the first is a DNS server's.
fn outside(client: SocketAddr, target: u8) -> SocketAddr {
    let ip: IpAddr = if client.is_ipv4() {
        format!("198.51.100.{}", 1 + target)
    } else {
        format!("2001:db8:1::{}", 1 + target)
    }
    .parse()
    .expect("an address");
    SocketAddr::new(ip, if target == 0 { 53 } else { 7000 })
}
