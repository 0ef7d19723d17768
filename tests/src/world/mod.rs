//! A small world around one engine, on virtual time: clients, upstreams, and a link that may fail.
//!
//! A [`World`] is told [`Step`]s. In between it does what follows by itself: segments travel, timers run, the driver
//! carries out commands. What the engine may not do, it notices at once and panics, leaving evidence behind.
//!
//! One TCP client has one connection at a time to a target of its own; upstreams do what the steps say. Datagrams
//! are checked where they enter and leave the engine. Nothing here knows how the engine works.

mod datagrams;
mod engine;
mod evidence;
mod ledger;
mod link;
pub mod scenario;
mod upstream;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tungate_engine::journal::{Header, Recorded};
use tungate_engine::policy::PolicySpec;
use tungate_engine::{CloseReason, Config, Deadline, DropReason, FlowId, Input, Policy, ShardId, Timestamp};

use self::datagrams::Sent;
use self::evidence::{Evidence, Line};
use self::ledger::{Ledger, Upstream};
use self::link::{Delivery, Link, Parcel};
use self::scenario::{Answer, CLIENTS, Denial, Setup, Step, Target, tcp_addresses};
use crate::client::{End, Shape, TcpClient};
use crate::packet::{Message, Options, Reader};
use crate::pattern::Pattern;
use crate::recorder::Recorder;
use crate::script;

pub use self::ledger::Attempt;

/// Few, so that scenarios reach it.
const SESSIONS: u32 = 4;

/// Packets that may travel at one instant before it is a storm.
const STORM: u32 = 100_000;

/// Wake-ups at one instant while the device is full.
const WAKEUPS: u32 = 10;

/// With a sound link, everything that can finish does within this time: a retransmission timeout may have grown to
/// a minute on either side.
const CONCLUSION: Duration = Duration::from_secs(400);

/// An engine and everyone around it.
pub struct World {
    setup: Setup,
    config: Config,
    now: Timestamp,
    engine: Recorded<evidence::Sink>,
    recorder: Recorder,
    deadline: Option<Deadline>,
    /// When the engine was last woken at a deadline, and how often at that instant.
    woken: (Timestamp, u32),
    clients: Vec<Option<Client>>,
    scripts: BTreeMap<Attempt, Script>,
    ledger: Ledger,
    link: Link,
    denied: BTreeMap<Target, Denial>,
    policy: Arc<Policy>,
    draining: bool,
    /// Since when nothing hinders anyone, and everyone has closed.
    all_is_well_since: Option<Timestamp>,
    /// Of the call of the engine that is being made.
    handling: Handling,
    /// Flows whose client was sent a reset in this turn.
    reset: Vec<FlowId>,
    reader: Reader,
    /// Counts up through the use of sessions, and through datagrams.
    serial: u32,
    /// What passes the device, if somebody wants to know.
    tapped: Option<script::Script>,
    evidence: Evidence,
}

/// A client's present connection.
struct Client {
    attempt: Attempt,
    tcp: TcpClient,
}

/// What both ends of a connection have been told to do so far.
#[derive(Debug, Clone, Default)]
struct Script {
    answer: Option<Answer>,
    client_sent: u64,
    client_closed: bool,
    upstream_sent: u64,
    upstream_closed: bool,
    upstream_reset: bool,
    upstream_stalled: bool,
}

/// What is being handled, and what has come of it that is checked when the call is over.
#[derive(Default)]
struct Handling {
    /// Whose SYN it is.
    syn_of: Option<Attempt>,
    /// Datagrams and echo requests to upstreams.
    to_upstream: Vec<(FlowId, Sent)>,
    /// Messages to clients other than TCP segments.
    to_clients: Vec<Message>,
    dropped: Vec<DropReason>,
}

/// How a client's present connection has gone, on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Outcome {
    pub client_received: u64,
    pub client_has_fin: bool,
    pub client_end: Option<End>,
    pub upstream_received: u64,
    /// The upstream was told of the client's FIN.
    pub upstream_has_fin: bool,
    /// The upstream was told to reset.
    pub upstream_aborted: bool,
    /// Why the engine ended the flow; `None` if it has not, or there was none.
    pub closed: Option<CloseReason>,
    /// How many flows its SYNs have opened; the outcome is that of the established one, or the last.
    pub flows: usize,
}

/// Plays a scenario to its end; panics where the engine breaks a promise.
pub fn play(setup: Setup, steps: &[Step]) -> World {
    let mut world = World::new(setup, "scenario");
    for step in steps {
        world.apply(step);
    }
    world.conclude();
    world
}

impl World {
    /// A world in which nothing has happened. Evidence of a failure goes into files of this `name`.
    pub fn new(setup: Setup, name: &'static str) -> Self {
        let mut config = Config {
            mtu: setup.mtu,
            clients: setup.clients,
            udp_filtering: setup.filtering,
            ..Config::default()
        };
        config.limits.buffer_per_flow = setup.buffer_per_flow;
        config.limits.buffer_bytes = 64 << 20;
        config.limits.sessions = SESSIONS;
        let header = Header {
            config: config.clone(),
            policy: PolicySpec::default(),
            seed: [setup.seed; 32],
            start: Timestamp::ZERO,
        };
        let policy = Arc::new(Policy::new(PolicySpec::default()));
        let engine = header.engine(ShardId(0), Arc::clone(&policy));
        let evidence = Evidence::new(name, &header);
        Self {
            engine: Recorded::new(engine, ShardId(0), evidence.sink()),
            config,
            now: Timestamp::ZERO,
            recorder: Recorder::default(),
            deadline: None,
            woken: (Timestamp::ZERO, 0),
            clients: (0..CLIENTS).map(|_| None).collect(),
            scripts: BTreeMap::new(),
            ledger: Ledger::default(),
            link: Link::new(setup.seed),
            denied: BTreeMap::new(),
            policy,
            draining: false,
            all_is_well_since: None,
            handling: Handling::default(),
            reset: Vec::new(),
            reader: Reader::default(),
            serial: 0,
            tapped: None,
            evidence,
            setup,
        }
    }

    /// Lets something happen, and what follows from it at once.
    pub fn apply(&mut self, step: &Step) {
        self.evidence.note(self.now, Line::Step(step.clone()));
        match *step {
            Step::ClientConnects { client } => self.connect(client),
            Step::UpstreamAnswers { client, answer } => {
                self.script(client).answer.get_or_insert(answer);
            }
            Step::ClientSends { client, bytes } => {
                self.script(client).client_sent += u64::from(bytes);
                let now = self.now;
                self.tcp(client).send(bytes.into(), now);
            }
            Step::UpstreamSends { client, bytes } => self.script(client).upstream_sent += u64::from(bytes),
            Step::ClientCloses { client } => {
                self.script(client).client_closed = true;
                let now = self.now;
                self.tcp(client).close(now);
            }
            Step::UpstreamCloses { client } => self.script(client).upstream_closed = true,
            Step::ClientResets { client } => self.tcp(client).reset(),
            Step::UpstreamResets { client } => self.script(client).upstream_reset = true,
            Step::ClientStalls { client } => self.tcp(client).set_reading(false),
            Step::ClientResumes { client } => self.tcp(client).set_reading(true),
            Step::UpstreamStalls { client } => self.script(client).upstream_stalled = true,
            Step::UpstreamResumes { client } => self.script(client).upstream_stalled = false,
            Step::DatagramSent {
                endpoint,
                target,
                bytes,
            } => self.send_datagram(endpoint, target, bytes),
            Step::DatagramAnswered {
                endpoint,
                source,
                bytes,
            } => self.answer_datagram(endpoint, source, bytes),
            Step::PingSent {
                endpoint,
                target,
                bytes,
            } => self.send_ping(endpoint, target, bytes),
            Step::PingAnswered {
                endpoint,
                target,
                bytes,
            } => self.answer_ping(endpoint, target, bytes),
            Step::LinkBecomes {
                loss,
                repeats,
                delay_millis,
                jitter_millis,
            } => self
                .link
                .become_faulty(loss, repeats, delay_millis, jitter_millis),
            Step::DeviceFills => self.recorder.full = true,
            Step::DeviceDrains => self.drain_device(),
            Step::TargetDenied { target, how } => {
                self.denied.insert(target, how);
                self.swap_policy();
            }
            Step::AllAllowed => {
                self.denied.clear();
                self.swap_policy();
            }
            Step::EngineDrains => {
                self.draining = true;
                self.input(Input::Drain);
            }
            Step::TimePasses { millis } => {
                self.run(self.now + Duration::from_millis(millis.into()));
            }
        }
        self.run(self.now);
        self.check();
    }

    /// Makes all well and lets everyone finish: the link and the device are sound, nothing is denied, who stalled goes
    /// on, and all that is open is closed in order. Then nothing may be left.
    pub fn conclude(&mut self) {
        self.evidence.note(self.now, Line::Conclusion);
        self.link.become_faulty(0, 0, 0, 0);
        self.drain_device();
        self.denied.clear();
        self.swap_policy();
        for script in self.scripts.values_mut() {
            script.upstream_stalled = false;
            script.upstream_closed = true;
            script.answer.get_or_insert(Answer::Accepts);
        }
        for client in 0..CLIENTS {
            let now = self.now;
            let Some(Client { attempt, tcp }) = &mut self.clients[usize::from(client)] else {
                continue;
            };
            self.scripts
                .get_mut(attempt)
                .expect("every connection has one")
                .client_closed = true;
            tcp.set_reading(true);
            tcp.close(now);
        }
        self.all_is_well_since = Some(self.now);
        self.run(self.now + CONCLUSION);
        // A client that waits for the other side alone has not heard of a silent end, or of a reset that was lost.
        for Client { attempt, tcp } in self.clients.iter_mut().flatten() {
            if tcp.end().is_none() {
                let open = self
                    .ledger
                    .open_flows()
                    .find(|(_, flow)| flow.attempt == Some(*attempt));
                assert!(
                    open.is_none(),
                    "{tcp} and {open:?} are not done {CONCLUSION:?} after all has been well"
                );
                tcp.keep_alive();
            }
        }
        self.run(self.now + Duration::from_secs(1));
        for Client { tcp, .. } in self.clients.iter().flatten() {
            assert!(
                tcp.end().is_some(),
                "{tcp} cannot learn that its connection is gone"
            );
        }
        // Now only what idle times keep is left.
        let timeouts = &self.config.timeouts;
        let longest = timeouts.tcp_idle + timeouts.udp;
        self.run(self.now + longest);
        self.check();
        let open: Vec<_> = self.ledger.open_flows().collect();
        assert!(open.is_empty(), "flows are left: {open:?}");
        let engine = self.engine.engine();
        assert_eq!(
            (engine.open_flows(), engine.buffer_bytes()),
            (0, 0),
            "flows and buffers left"
        );
        assert_eq!(self.deadline, None, "nothing is left to wait for");
    }

    /// How a client's present connection has gone; `None` if it has had none.
    pub fn outcome(&self, client: u8) -> Option<Outcome> {
        let Client { attempt, tcp } = self.clients[usize::from(client)].as_ref()?;
        // A SYN that arrives once more after its flow has ended makes another, which cannot be completed.
        let flows = self.ledger.all_flows().map(|(_, flow)| flow);
        let mut flows: Vec<_> = flows.filter(|flow| flow.attempt == Some(*attempt)).collect();
        flows.sort_by_key(|flow| (flow.established, flow.used));
        let flow = flows.last();
        Some(Outcome {
            client_received: tcp.received(),
            client_has_fin: tcp.has_fin(),
            client_end: tcp.end(),
            upstream_received: flow.map_or(0, |flow| flow.taken),
            upstream_has_fin: flow.is_some_and(|flow| flow.close_write),
            upstream_aborted: flow.is_some_and(|flow| flow.upstream == Upstream::Ended { aborted: true }),
            closed: flow.and_then(|flow| flow.closed),
            flows: flows.len(),
        })
    }

    /// Captures from now on what passes the device between the clients and the engine.
    pub fn tap(&mut self) {
        self.tapped = Some(script::Script::new());
    }

    /// What was captured since [`World::tap`], also when all was over.
    ///
    /// # Panics
    ///
    /// If nobody has tapped the device.
    pub fn capture(&self) -> &script::Script {
        self.tapped.as_ref().expect("the device is tapped")
    }

    /// What a client and its target have had to say on its present connection.
    pub fn said(&self, client: u8) -> (Vec<u8>, Vec<u8>) {
        let Client { attempt, .. } = self.clients[usize::from(client)]
            .as_ref()
            .expect("the client has a connection");
        let (asks, answers) = patterns(*attempt);
        let script = &self.scripts[attempt];
        let bytes = |pattern: Pattern, len: u64| {
            let mut bytes = vec![0; len as usize];
            pattern.fill(0, &mut bytes);
            bytes
        };
        (
            bytes(asks, script.client_sent),
            bytes(answers, script.upstream_sent),
        )
    }

    /// The kinds of event there have been, with protocol or reason.
    pub fn reached(&self) -> impl Iterator<Item = &str> {
        self.ledger.reached().iter().map(String::as_str)
    }

    // ---- time --------------------------------------------------------------------------------------------------

    /// Lets everything happen that is due until `end`.
    fn run(&mut self, end: Timestamp) {
        loop {
            self.settle();
            let deadline = self
                .deadline
                .map(|deadline| deadline.at)
                .filter(|at| *at > self.now);
            let clients = self
                .clients
                .iter()
                .flatten()
                .filter_map(|client| client.tcp.deadline());
            let next = clients.chain(deadline).chain(self.link.next()).min();
            match next {
                Some(at) if at <= end => self.now = at,
                Some(_) | None => break,
            }
        }
        self.now = end;
        if !self.recorder.full {
            for (id, flow) in self.ledger.open_flows() {
                let latest = flow.must_end(&self.config.timeouts);
                assert!(self.now < latest, "flow {id} is open past {latest}: {flow:?}");
            }
        }
    }

    /// Does what is due now, until nothing more is.
    fn settle(&mut self) {
        let mut packets = 0;
        loop {
            let mut busy = false;
            let mut waiting = 0;
            while let Some(delivery) = self.link.pop(self.now) {
                busy = true;
                packets += 1;
                assert!(packets < STORM, "{packets} packets at one instant");
                match delivery {
                    Delivery::ToClient(packet) => self.deliver(&packet),
                    Delivery::ToEngine(parcel) => {
                        self.feed(&parcel);
                        waiting += 1;
                        if waiting >= self.setup.batch {
                            self.flush();
                            waiting = 0;
                        }
                    }
                }
            }
            if waiting > 0 {
                self.flush();
            }
            for client in 0..CLIENTS {
                let now = self.now;
                if let Some(Client { tcp, .. }) = &mut self.clients[usize::from(client)] {
                    busy |= tcp.deadline().is_some_and(|at| at <= now);
                    tcp.handle_time(now);
                    busy |= self.post(client);
                }
            }
            // With a full device there may be nothing to be done about a deadline; a few times are enough to see.
            let is_due = self.deadline.is_some_and(|deadline| deadline.at <= self.now);
            if is_due && !(self.recorder.full && self.woken == (self.now, WAKEUPS)) {
                busy = true;
                let before = if self.woken.0 == self.now { self.woken.1 } else { 0 };
                self.woken = (self.now, before + 1);
                self.input(Input::Wakeup);
                if let Some(deadline) = self.deadline.filter(|_| !self.recorder.full) {
                    assert!(
                        deadline.at > self.now,
                        "woken for nothing: {deadline:?} at {}",
                        self.now
                    );
                }
            }
            busy |= self.serve_upstreams();
            if !busy {
                return;
            }
        }
    }

    /// What must hold whenever nothing is going on.
    fn check(&self) {
        let engine = self.engine.engine();
        self.ledger.check_counters(engine.counters());
        assert_eq!(
            engine.open_flows(),
            self.ledger.open_flows().count(),
            "open flows"
        );
        assert!(engine.buffer_bytes() <= self.config.limits.buffer_bytes);
    }

    // ---- clients -----------------------------------------------------------------------------------------------

    fn tcp(&mut self, client: u8) -> &mut TcpClient {
        let client = self.clients[usize::from(client)].as_mut();
        &mut client.expect("the client has a connection").tcp
    }

    fn script(&mut self, client: u8) -> &mut Script {
        let attempt = self.clients[usize::from(client)]
            .as_ref()
            .expect("the client has a connection")
            .attempt;
        self.scripts.get_mut(&attempt).expect("every connection has one")
    }

    fn connect(&mut self, client: u8) {
        let attempt = match &self.clients[usize::from(client)] {
            None => (client, 0),
            Some(last) => (client, last.attempt.1 + 1),
        };
        let shape = Shape {
            options: Options {
                max_segment_size: self.setup.max_segment_size,
                window_scale: self.setup.window_scale,
                sack_permitted: true,
            },
            buffer: self.setup.client_buffer,
            largest: self.setup.client_largest,
            manner: self.setup.client_manner,
        };
        // Close below the wrap-around at first; far from each other then, as RFC 9293, section 3.4.1 asks for.
        let initial = 0xffff_f000_u32
            .wrapping_add(attempt.1.wrapping_mul(0x0fed_cba9))
            .wrapping_add(u32::from(client) * 0x300);
        let tcp = TcpClient::connect(tcp_addresses(client), shape, patterns(attempt), initial, self.now);
        self.scripts.insert(attempt, Script::default());
        self.clients[usize::from(client)] = Some(Client { attempt, tcp });
    }

    /// Hands what a client sends to the link; whether there was anything.
    fn post(&mut self, client: u8) -> bool {
        let Some(Client { attempt, tcp }) = &mut self.clients[usize::from(client)] else {
            return false;
        };
        let outbox = tcp.take_outbox();
        let any = !outbox.is_empty();
        for segment in outbox {
            self.link
                .send(self.now, Delivery::ToEngine(Parcel::segment(&segment, *attempt)));
        }
        any
    }

    /// Gives a client a packet.
    fn deliver(&mut self, packet: &[u8]) {
        let now = self.now;
        match Reader::default().read(packet) {
            Some(Message::Tcp(segment)) => {
                let Some(client) = (0..CLIENTS)
                    .find(|client| tcp_addresses(*client) == (segment.destination, segment.source))
                else {
                    panic!("a segment from {} to {}", segment.source, segment.destination)
                };
                let Some(Client { attempt, tcp }) = &mut self.clients[usize::from(client)] else {
                    panic!("a segment to client {client}, which has never sent one")
                };
                tcp.handle_segment(&segment, now);
                let script = &self.scripts[attempt];
                if let Some(at) = tcp.fin_at() {
                    assert!(
                        script.upstream_closed && at == script.upstream_sent,
                        "client {client} hears FIN at {at}, {}",
                        if script.upstream_closed {
                            "too early"
                        } else {
                            "and the upstream has sent none"
                        }
                    );
                }
                assert!(
                    tcp.received() <= script.upstream_sent,
                    "client {client} hears more than was sent"
                );
            }
            Some(Message::Icmp(icmp)) => {
                // About a SYN; the others do not travel.
                let quoted = etherparse::LaxSlicedPacket::from_ip(&icmp.payload).expect("it quotes a packet");
                let Some(etherparse::TransportSlice::Tcp(tcp)) = quoted.transport else {
                    panic!("it quotes no segment")
                };
                let client = (0..CLIENTS)
                    .find(|client| tcp_addresses(*client).0.port() == tcp.source_port())
                    .expect("it quotes a client's segment");
                if let Some(Client { tcp: connection, .. }) = &mut self.clients[usize::from(client)]
                    && connection.initial() == tcp.sequence_number()
                {
                    connection.handle_unreachable();
                }
            }
            Some(Message::Udp(_)) | None => unreachable!("datagrams are checked where they leave the engine"),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.evidence.write(&self.setup);
        }
    }
}

/// What client 0 calls its target.
const NAME: &str = "client-0.example";

/// What a connection's two directions carry.
fn patterns((client, number): Attempt) -> (Pattern, Pattern) {
    let key = number * 16 + u32::from(client) * 2;
    let head: &[u8] = if client == 0 {
        b"GET / HTTP/1.1\r\nHost: client-0.example\r\n\r\n"
    } else {
        &[]
    };
    (
        Pattern { key, head },
        Pattern {
            key: key + 1,
            head: &[],
        },
    )
}
