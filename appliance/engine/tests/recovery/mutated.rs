//! Segments that are wrong in ways no checksum shows.

use std::time::Duration;

use etherparse::TcpOptionElement;
use tungate_engine::config::Clients;
use tungate_engine::io::{ChecksumState, UpstreamEvent};
use tungate_engine::policy::PolicySpec;
use tungate_engine::recovery::CongestionControl;
use tungate_engine::{CloseReason, Config, Event, FlowId, IngressId, Input, PacketIn};

use crate::hostile::{Random, number_of};
use crate::support::{ACK, CLIENT, CLIENT6, Client, FIN, PSH, Rig, TARGET, TARGET6, pattern};

const SEGMENTS_PER_CONNECTION: u64 = 1_000;
/// Of an IPv4 or IPv6 header and the ports behind it: changing these would make it another flow's packet.
const HEADERS: [usize; 2] = [20 + 4, 40 + 4];

/// Whatever a client's segments say, nothing panics, and a connection that they have not ended delivers the rest.
#[test]
fn segments_may_be_mutated() {
    let segments = number_of("RECOVERY_SEGMENTS", 40_000);
    let mut random = Random(number_of("RECOVERY_SEED", 1));
    let (mut connections, mut survived) = (0, 0);
    while connections * SEGMENTS_PER_CONNECTION < segments {
        connections += 1;
        survived += u64::from(Mutated::open(&mut random).survives(&mut random));
    }
    assert!(
        survived > connections / 20,
        "{survived} of {connections} connections have come to their end"
    );
}

struct Mutated {
    rig: Rig,
    client: Client,
    flow: FlowId,
    header: usize,
    isn: u32,
    written: usize,
    /// SND.NXT, as the client sees it.
    highest: u32,
    closed: bool,
}

impl Mutated {
    fn open(random: &mut Random) -> Self {
        let config = Config {
            clients: Clients::Routed,
            congestion: Some(
                [
                    CongestionControl::None,
                    CongestionControl::Cubic,
                    CongestionControl::Bbr,
                ][random.below(3) as usize],
            ),
            ..Config::default()
        };
        let mut rig = Rig::with(config, PolicySpec::default());
        let family = random.below(2) as usize;
        let (address, target) = [(CLIENT, TARGET), (CLIENT6, TARGET6)][family];
        let (client, flow) = Client::open(address, target, &mut rig);
        Self {
            isn: client.expected,
            rig,
            client,
            flow,
            header: HEADERS[family],
            written: 0,
            highest: 0,
            closed: false,
        }
    }

    fn survives(mut self, random: &mut Random) -> bool {
        for _ in 0..SEGMENTS_PER_CONNECTION {
            match random.below(8) {
                0 => self.write(random.below(20_000) as usize),
                1 => self.pass(Duration::from_secs(1)),
                _ => self.say_something(random),
            }
            self.take();
            if self.closed {
                return false;
            }
        }
        self.deliver_the_rest();
        true
    }

    fn write(&mut self, bytes: usize) {
        let room = (1 << 20) - self.written;
        let all = pattern(bytes.min(room));
        self.written += self.rig.write(self.flow, &all);
    }

    /// Lets time pass until something is due, if that is soon.
    fn pass(&mut self, most: Duration) {
        if let Some(deadline) = self.rig.deadline {
            let time = deadline.at.since(self.rig.now);
            if time <= most {
                self.rig.pass(time);
            }
        }
    }

    /// A plausible segment, most of the time with a few bytes changed.
    fn say_something(&mut self, random: &mut Random) {
        let near = |random: &mut Random| {
            let offset = random.below(u64::from(self.highest) + 3_000) as u32;
            self.isn.wrapping_add(offset).wrapping_sub(1_000)
        };
        self.client.expected = match random.below(4) {
            0 => near(random),
            1 => self.isn.wrapping_add(self.highest),
            _ => self.client.expected,
        };
        self.client.window = random.below(1 << 16) as u16;
        let options: Vec<_> = (random.below(2) == 0)
            .then(|| {
                let mut block = || {
                    let start = near(random);
                    (start, start.wrapping_add(random.below(5_000) as u32))
                };
                TcpOptionElement::SelectiveAcknowledgement(block(), [Some(block()), Some(block()), None])
            })
            .into_iter()
            .collect();
        let len = [0, 0, 0, 100][random.below(4) as usize];
        let mut packet = self
            .client
            .with_options(self.client.sequence, ACK | PSH, &options, &pattern(len));
        if random.below(4) > 0 {
            for _ in 0..=random.below(3) {
                let at = self.header + random.below((packet.len() - self.header) as u64) as usize;
                // RST and SYN end a connection: once in a while is enough.
                let is_flags = at == self.header + 9;
                if !is_flags || random.below(16) == 0 {
                    packet[at] ^= 1 << random.below(8);
                }
            }
        }
        self.hand_over(&packet);
    }

    fn hand_over(&mut self, bytes: &[u8]) {
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes,
            checksum: ChecksumState::Trusted,
            segment_size: None,
            reassembled: false,
        };
        self.rig.handle(Input::Packet(packet));
    }

    /// Notes what the engine has sent, and whether it has ended the connection.
    fn take(&mut self) {
        for segment in self.rig.segments() {
            let end = segment
                .sequence
                .wrapping_sub(self.isn)
                .wrapping_add(segment.payload.len() as u32 + u32::from(segment.flags & FIN != 0));
            // Probes are one below.
            if (end as i32) > self.highest as i32 {
                self.highest = end;
            }
            self.client.sequence = segment.acknowledgment;
        }
        self.rig.read_all(self.flow);
        self.rig.commands();
        for event in self.rig.events() {
            if let Event::Closed { reason, .. } = event {
                assert_ne!(reason, CloseReason::Internal, "it has panicked");
                self.closed = true;
            }
        }
    }

    /// An honest client in the end: everything that was written comes, and FIN.
    fn deliver_the_rest(&mut self) {
        self.rig.upstream(self.flow, UpstreamEvent::ReadClosed);
        self.client.window = u16::MAX;
        for _ in 0..10_000 {
            self.take();
            if self.closed || self.highest as usize > self.written {
                return;
            }
            self.client.expected = self.isn.wrapping_add(self.highest);
            let packet = self.client.segment(ACK, &[]);
            self.hand_over(&packet);
            self.take();
            self.pass(Duration::from_secs(600));
        }
        panic!("stuck at {} of {}", self.highest, self.written);
    }
}
