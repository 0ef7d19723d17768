//! Captures written packet by packet, and what a replay makes of them.

use std::fmt::Arguments;
use std::io::Cursor;
use std::net::SocketAddr;
use std::time::Duration;

use tungate_engine::Timestamp;
use tungate_sim::capture::{Capture, LinkType};
use tungate_sim::outcome::{Emitted, FlowRecord, PacketRecord, Sink};
use tungate_sim::replay::{self, Outcome};

use crate::packet::{ACK, Options, SYN, Segment};

/// When the first packet of every script is captured: 2026-01-01T00:00:00Z, in seconds since the Unix epoch.
const START: u64 = 1_767_225_600;

/// What a tap between clients and targets has seen.
#[derive(Debug, Clone)]
pub struct Script {
    link_type: LinkType,
    now: Duration,
    records: Vec<Record>,
}

#[derive(Debug, Clone)]
struct Record {
    at: Duration,
    bytes: Vec<u8>,
    original_length: usize,
}

/// One TCP connection as both sides number it.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Conversation {
    pub client: SocketAddr,
    pub target: SocketAddr,
    /// The sequence number of the client's next byte.
    pub client_next: u32,
    /// The sequence number of the target's next byte.
    pub target_next: u32,
    /// Window field of segments other than SYNs.
    pub window: u16,
}

/// What a replay has found.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Played {
    /// By their numbers.
    pub flows: Vec<FlowRecord>,
    /// In file order.
    pub packets: Vec<PacketRecord>,
    /// Packets that clients would have been sent.
    pub emitted: Vec<(Timestamp, Vec<u8>)>,
    /// The transcript, such as `0.250000 in   upstream  #6.0.0 connected`.
    pub lines: Vec<String>,
    pub outcome: Option<Outcome>,
}

impl Script {
    /// A capture of raw IP packets.
    pub fn new() -> Self {
        Self::of(LinkType::RAW)
    }

    /// A capture of frames.
    pub fn of(link_type: LinkType) -> Self {
        Self {
            link_type,
            now: Duration::ZERO,
            records: Vec::new(),
        }
    }

    /// Lets time pass before the next packet.
    pub fn wait(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }

    /// Sets the clock, also back.
    pub fn at(&mut self, time: Duration) -> &mut Self {
        self.now = time;
        self
    }

    /// A packet, of which all is captured.
    pub fn packet(&mut self, bytes: impl Into<Vec<u8>>) -> &mut Self {
        let bytes = bytes.into();
        let captured = bytes.len();
        self.cut(bytes, captured)
    }

    /// A packet of which the first `captured` bytes are captured.
    pub fn cut(&mut self, bytes: impl Into<Vec<u8>>, captured: usize) -> &mut Self {
        let mut bytes = bytes.into();
        let original_length = bytes.len();
        bytes.truncate(captured);
        self.records.push(Record {
            at: self.now,
            bytes,
            original_length,
        });
        self
    }

    /// A segment.
    pub fn segment(&mut self, segment: &Segment) -> &mut Self {
        self.packet(segment.packet())
    }

    /// Segments, each a millisecond behind what is before it.
    pub fn segments<'a>(&mut self, segments: impl IntoIterator<Item = &'a Segment>) -> &mut Self {
        for segment in segments {
            if !self.records.is_empty() {
                self.wait(Duration::from_millis(1));
            }
            self.segment(segment);
        }
        self
    }

    /// The capture as a file: classic pcap, microseconds, little-endian.
    ///
    /// # Panics
    ///
    /// If it is longer than such a file may be.
    pub fn pcap(&self) -> Vec<u8> {
        let mut file = Vec::new();
        let word = |file: &mut Vec<u8>, number: u64| {
            file.extend_from_slice(&u32::try_from(number).expect("32 bits").to_le_bytes());
        };
        word(&mut file, 0xa1b2_c3d4);
        file.extend_from_slice(&[2, 0, 4, 0]);
        [0, 0, 262_144, u64::from(self.link_type.0)]
            .into_iter()
            .for_each(|number| word(&mut file, number));
        for record in &self.records {
            word(&mut file, START + record.at.as_secs());
            word(&mut file, record.at.subsec_micros().into());
            word(&mut file, record.bytes.len() as u64);
            word(&mut file, record.original_length as u64);
            file.extend_from_slice(&record.bytes);
        }
        file
    }

    /// Replays the capture as it is replayed by default.
    pub fn replay(&self) -> Played {
        self.replay_with(&replay::Options::default())
    }

    /// Replays the capture.
    ///
    /// # Panics
    ///
    /// If packets get lost on the way to the report.
    pub fn replay_with(&self, options: &replay::Options) -> Played {
        let mut capture = Capture::from_reader("script", Cursor::new(self.pcap())).expect("a capture");
        let mut played = Played::default();
        let outcome = replay::run(&mut capture, options, None, &mut played, &mut |_| {});
        let outcome = outcome.expect("there is no journal to fail");
        assert_eq!(outcome.totals.read, self.records.len() as u64);
        assert_eq!(played.packets.len(), self.records.len());
        played.flows.sort_by_key(|flow| flow.id);
        played.outcome = Some(outcome);
        played
    }
}

impl Default for Script {
    fn default() -> Self {
        Self::new()
    }
}

impl Conversation {
    /// A connection that has not begun. The initial sequence numbers are 1000 and 5000.
    ///
    /// # Panics
    ///
    /// If an endpoint is not written as address and port.
    pub fn new(client: &str, target: &str) -> Self {
        Self {
            client: client.parse().expect("address and port"),
            target: target.parse().expect("address and port"),
            client_next: 1000,
            target_next: 5000,
            window: 500,
        }
    }

    /// The client's SYN, which offers a window scale of 7.
    pub fn syn(&mut self) -> Segment {
        let mut segment = self.from_client(SYN, b"");
        (segment.acknowledgment, segment.window) = (0, 64_240);
        segment.options = SYN_OPTIONS;
        segment
    }

    /// The target's SYN-ACK, which offers a window scale of 7.
    pub fn syn_ack(&mut self) -> Segment {
        let mut segment = self.from_target(SYN | ACK, b"");
        segment.window = 65_160;
        segment.options = SYN_OPTIONS;
        segment
    }

    /// SYN, SYN-ACK and ACK.
    pub fn handshake(&mut self) -> [Segment; 3] {
        [self.syn(), self.syn_ack(), self.ack()]
    }

    /// The client acknowledges all there is.
    pub fn ack(&mut self) -> Segment {
        self.from_client(ACK, b"")
    }

    /// The target acknowledges all there is.
    pub fn target_ack(&mut self) -> Segment {
        self.from_target(ACK, b"")
    }

    /// The client sends `payload`.
    pub fn ask(&mut self, payload: &[u8]) -> Segment {
        self.from_client(ACK, payload)
    }

    /// The target sends `payload`.
    pub fn answer(&mut self, payload: &[u8]) -> Segment {
        self.from_target(ACK, payload)
    }

    /// The client's next segment, with these flags.
    pub fn from_client(&mut self, flags: u8, payload: &[u8]) -> Segment {
        let segment = Segment {
            source: self.client,
            destination: self.target,
            flags,
            sequence: self.client_next,
            acknowledgment: self.target_next,
            window: self.window,
            options: Options::default(),
            payload: payload.to_vec(),
        };
        self.client_next = self.client_next.wrapping_add(segment.sequence_len());
        segment
    }

    /// The target's next segment, with these flags.
    pub fn from_target(&mut self, flags: u8, payload: &[u8]) -> Segment {
        let segment = Segment {
            source: self.target,
            destination: self.client,
            flags,
            sequence: self.target_next,
            acknowledgment: self.client_next,
            window: self.window,
            options: Options::default(),
            payload: payload.to_vec(),
        };
        self.target_next = self.target_next.wrapping_add(segment.sequence_len());
        segment
    }
}

const SYN_OPTIONS: Options = Options {
    max_segment_size: Some(1460),
    window_scale: Some(7),
    sack_permitted: true,
};

impl Played {
    /// The only flow.
    ///
    /// # Panics
    ///
    /// If there is none, or more than one.
    #[track_caller]
    pub fn flow(&self) -> &FlowRecord {
        let [flow] = self.flows.as_slice() else {
            panic!("{} flows: {:#?}", self.flows.len(), self.flows)
        };
        flow
    }

    /// What the replay comes to.
    ///
    /// # Panics
    ///
    /// Before it has come to its end.
    pub fn outcome(&self) -> &Outcome {
        self.outcome.as_ref().expect("replayed")
    }

    /// Lines of the transcript that contain all of `parts`.
    pub fn lines(&self, parts: &[&str]) -> Vec<&str> {
        let lines = self.lines.iter().map(String::as_str);
        lines
            .filter(|line| parts.iter().all(|part| line.contains(part)))
            .collect()
    }
}

impl Sink for Played {
    fn started(&mut self, _: u64) {}

    fn packet(&mut self, record: &PacketRecord) {
        self.packets.push(record.clone());
    }

    fn flow(&mut self, record: FlowRecord) {
        self.flows.push(record);
    }

    fn emitted(&mut self, packet: &Emitted<'_>) {
        self.emitted.push((packet.time, packet.bytes.to_vec()));
    }

    fn line(&mut self, time: Timestamp, text: Arguments<'_>) {
        let micros = time.as_nanos() / 1_000;
        let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
        self.lines.push(format!("{seconds}.{fraction:06} {text}"));
    }

    fn wants_emitted(&self) -> bool {
        true
    }

    fn wants_lines(&self) -> bool {
        true
    }

    fn wants_packets(&self) -> bool {
        true
    }
}
