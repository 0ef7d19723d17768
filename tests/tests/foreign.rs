//! A TCP that nobody here wrote talks to the engine over paths that lose and reorder: smoltcp, as the client.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;
use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};
use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use tungate_engine::io::UpstreamEvent;
use tungate_engine::packet::segments;
use tungate_engine::policy::PolicySpec;
use tungate_engine::{CloseReason, Config, Event, FlowId, Timestamp};
use tungate_tests::pattern::Pattern;
use tungate_tests::recorder::{Command, Output};
use tungate_tests::rig::Rig;

const MTU: usize = 1500;
const DELAY: Duration = Duration::from_millis(10);
const TICK: Duration = Duration::from_millis(1);
/// Of the path's time; smoltcp waits a second at least before it sends again, and twice as long each time.
const PATIENCE: Duration = Duration::from_secs(600);

const FROM_CLIENT: Pattern = Pattern { key: 1, head: &[] };
const FROM_TARGET: Pattern = Pattern { key: 2, head: &[] };

/// Packets under way in one direction.
struct Path {
    under_way: Vec<(Timestamp, Vec<u8>)>,
    rng: ChaCha12Rng,
    /// Of a thousand.
    lost: u32,
    overtaken: u32,
}

impl Path {
    fn new(seed: u64, lost: u32, overtaken: u32) -> Self {
        Self {
            under_way: Vec::new(),
            rng: ChaCha12Rng::seed_from_u64(seed),
            lost,
            overtaken,
        }
    }

    fn chance(&mut self, of_thousand: u32) -> bool {
        self.rng.next_u32() % 1000 < of_thousand
    }

    fn put(&mut self, now: Timestamp, packet: Vec<u8>) {
        if self.chance(self.lost) {
            return;
        }
        let late = if self.chance(self.overtaken) {
            DELAY
        } else {
            Duration::ZERO
        };
        self.under_way.push((now + DELAY + late, packet));
    }

    fn take(&mut self, now: Timestamp) -> Vec<Vec<u8>> {
        let arrived = self.under_way.extract_if(.., |(at, _)| *at <= now);
        arrived.map(|(_, packet)| packet).collect()
    }
}

/// The device that smoltcp believes in.
#[derive(Default)]
struct Wire {
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

struct Arriving(Vec<u8>);

struct Leaving<'a>(&'a mut Vec<Vec<u8>>);

impl phy::RxToken for Arriving {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl phy::TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut packet = vec![0; len];
        let result = fill(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Arriving;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arriving, Leaving<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Arriving(packet), Leaving(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        Some(Leaving(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// A connection of smoltcp's.
struct Client {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    wire: Wire,
    sent: u64,
    received: u64,
}

impl Client {
    fn connect(address: SocketAddr, target: SocketAddr) -> Self {
        let mut wire = Wire::default();
        let config = InterfaceConfig::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let address = IpCidr::new(IpAddress::from(address.ip()), 0);
            addresses.push(address).expect("there is room for one");
        });
        let buffer = || tcp::SocketBuffer::new(vec![0; 100_000]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket
            .connect(
                interface.context(),
                (IpAddress::from(target.ip()), target.port()),
                address.port(),
            )
            .expect("it may connect");
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Self {
            interface,
            sockets,
            handle,
            wire,
            sent: 0,
            received: 0,
        }
    }

    /// Sends up to `len` bytes and then FIN, and compares what has come.
    fn turn(&mut self, now: Timestamp, len: u64) {
        let instant = Instant::from_micros((now.as_nanos() / 1000) as i64);
        self.interface.poll(instant, &mut self.wire, &mut self.sockets);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        while socket.can_recv() {
            let received = &mut self.received;
            let taken = socket.recv(|bytes| {
                assert_eq!(FROM_TARGET.mismatch(*received, bytes), None);
                (bytes.len(), bytes.len())
            });
            *received += taken.expect("it can receive") as u64;
        }
        while socket.can_send() && self.sent < len {
            let sent = &mut self.sent;
            let taken = socket.send(|space| {
                let filled = space.len().min((len - *sent) as usize);
                FROM_CLIENT.fill(*sent, &mut space[..filled]);
                (filled, filled)
            });
            *sent += taken.expect("it can send") as u64;
        }
        if self.sent == len && socket.may_send() {
            socket.close();
        }
        self.interface.poll(instant, &mut self.wire, &mut self.sockets);
    }

    fn state(&self) -> tcp::State {
        self.sockets.get::<tcp::Socket<'_>>(self.handle).state()
    }
}

/// The target: reads all that comes, and sends `len` bytes and FIN.
#[derive(Default)]
struct Target {
    flow: Option<FlowId>,
    read: u64,
    written: u64,
    closed: bool,
}

impl Target {
    fn turn(&mut self, rig: &mut Rig, len: u64) {
        let Some(flow) = self.flow else { return };
        let read = &mut self.read;
        while rig.engine.read(rig.now, flow, |bytes| {
            assert_eq!(FROM_CLIENT.mismatch(*read, bytes), None);
            *read += bytes.len() as u64;
            bytes.len()
        }) > 0
        {}
        self.written += rig.write(flow, self.written, (len - self.written) as usize) as u64;
        if self.written == len && !self.closed {
            self.closed = true;
            rig.upstream(flow, UpstreamEvent::ReadClosed);
        }
        rig.flush();
    }
}

/// Carries `up` and `down` bytes; both ends have to get all of them, and to part in peace.
fn carry(client: IpAddr, target: IpAddr, (up, down): (u64, u64), mut ways: [Path; 2]) {
    let (address, target) = (SocketAddr::new(client, 40_000), SocketAddr::new(target, 80));
    let mut rig = Rig::new(Config::default(), PolicySpec::default());
    let mut client = Client::connect(address, target);
    let mut upstream = Target::default();
    let mut ended = None;
    while rig.now < Timestamp::ZERO + PATIENCE {
        client.turn(rig.now, up);
        for packet in client.wire.sent.drain(..) {
            ways[0].put(rig.now, packet);
        }
        for packet in ways[0].take(rig.now) {
            rig.packet(&packet);
        }
        upstream.turn(&mut rig, down);
        for output in rig.world.take() {
            match output {
                Output::Packet(out, mut bytes) => {
                    segments(&mut bytes, &out, |packet| ways[1].put(rig.now, packet.to_vec()));
                }
                Output::Command(flow, Command::Open(_)) => {
                    upstream.flow = Some(flow);
                    rig.upstream(flow, UpstreamEvent::Connected);
                }
                Output::Event(Event::Closed { reason, .. }) => ended = Some(reason),
                Output::Event(Event::Dropped { reason, .. }) => panic!("a packet was dropped: {reason}"),
                Output::Command(..) | Output::Event(_) | Output::Forward(..) => {}
            }
        }
        client.wire.received.extend(ways[1].take(rig.now));
        if ended.is_some() && matches!(client.state(), tcp::State::Closed | tcp::State::TimeWait) {
            break;
        }
        rig.pass(TICK);
    }
    assert_eq!((client.received, upstream.read), (down, up), "after {}", rig.now);
    assert_eq!(
        ended,
        Some(CloseReason::Finished),
        "the client's end is {}",
        client.state()
    );
}

fn addresses(is_ipv6: bool) -> (IpAddr, IpAddr) {
    let address = |v4: &str, v6: &str| if is_ipv6 { v6.parse() } else { v4.parse() }.expect("an address");
    (
        address("10.0.0.2", "fd00::2"),
        address("192.0.2.1", "2001:db8::1"),
    )
}

#[test]
fn a_foreign_client_is_served_over_a_clean_path() {
    for is_ipv6 in [false, true] {
        let (client, target) = addresses(is_ipv6);
        for bytes in [(0, 0), (1, 1), (300_000, 0), (0, 300_000), (300_000, 300_000)] {
            carry(client, target, bytes, [Path::new(1, 0, 0), Path::new(2, 0, 0)]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_foreign_client_is_served_whatever_the_path_loses(
        is_ipv6: bool,
        seed: u64,
        up in 0_u64..200_000,
        down in 0_u64..200_000,
        lost in 0_u32..50,
        overtaken in 0_u32..50,
    ) {
        let (client, target) = addresses(is_ipv6);
        let ways = [Path::new(seed, lost, overtaken), Path::new(!seed, lost, overtaken)];
        carry(client, target, (up, down), ways);
    }
}
