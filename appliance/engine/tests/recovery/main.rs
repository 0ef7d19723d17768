//! Scripts of what the send half has to do, one for each rule of the RFCs it follows.
//!
//! A script says when a client and an upstream do what, and what the engine sends then; it passes when the engine sends
//! exactly that. Times are milliseconds since the handshake, numbers are offsets of the engine's stream:
//!
//! ```text
//! open [none|cubic|bbr] [mss N] [rtt MS] [window N] [nosack] [v6]    the first line
//! T < ack N [window N] [sack A-B,C-D] [sequence N] [data N]          a segment from the client
//! T write N          the upstream sends so many bytes
//! T eof              and FIN
//! T > A-B [fin]      the engine sends these bytes (neighbours of one instant are one)
//! T > ack | probe    a segment without data: at what is to be sent next, or one below what is not acknowledged
//! T quiet            nothing else until then
//! ```

mod hostile;
mod mutated;
#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use etherparse::TcpOptionElement;
use support::{ACK, CLIENT, CLIENT6, Client, FIN, Rig, TARGET, TARGET6, pattern};
use tungate_engine::config::Clients;
use tungate_engine::io::UpstreamEvent;
use tungate_engine::policy::PolicySpec;
use tungate_engine::recovery::CongestionControl;
use tungate_engine::{Config, FlowId, Timestamp};

/// The client's window scale.
const SHIFT: u8 = 7;

struct Conversation {
    rig: Rig,
    client: Client,
    flow: FlowId,
    start: Timestamp,
    /// The client's next sequence number, as an offset.
    sequence: u32,
    isn: u32,
    written: usize,
    acknowledged: u32,
    /// What the engine has sent, as a script says it.
    sent: Vec<(u64, Sent)>,
    highest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Data { start: u32, end: u32, fin: bool },
    Ack,
    Probe,
    Reset,
}

#[test]
fn the_send_half_does_what_the_rfcs_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recovery/scripts");
    let mut scripts: Vec<_> = std::fs::read_dir(&folder)
        .expect("the scripts are there")
        .map(|entry| entry.expect("readable").path())
        .collect();
    scripts.sort();
    let mut failures = String::new();
    for script in &scripts {
        let text = std::fs::read_to_string(script).expect("readable");
        let name = script.file_stem().expect("has a name").to_string_lossy();
        let (expected, sent) = run(&name, &text);
        if expected != sent {
            let _ = writeln!(failures, "{name}\n  expected\n{expected}  sent\n{sent}");
        }
    }
    assert!(scripts.len() >= 40, "only {} scripts", scripts.len());
    assert!(failures.is_empty(), "\n{failures}");
}

/// What a script expects to be sent, and what was.
fn run(name: &str, text: &str) -> (String, String) {
    let mut lines = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or("").trim())
        .filter(|line| !line.is_empty());
    let mut conversation = Conversation::open(lines.next().expect("begins with open"));
    let mut expected = String::new();
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        let (at, rest) = words.split_first().expect("a line has words");
        let at: u64 = at
            .parse()
            .unwrap_or_else(|_| panic!("{name}: no time in {line:?}"));
        match rest {
            [">", ..] => {
                let _ = writeln!(expected, "    {at} {}", rest.join(" "));
                continue;
            }
            ["<", rest @ ..] => {
                conversation.pass(at);
                conversation.client_says(rest);
            }
            ["write", bytes] => {
                conversation.pass(at);
                conversation.write(number(bytes) as usize);
            }
            ["eof"] => {
                conversation.pass(at);
                let flow = conversation.flow;
                conversation.rig.upstream(flow, UpstreamEvent::ReadClosed);
            }
            ["quiet"] => conversation.pass(at),
            _ => panic!("{name}: {line:?} says nothing"),
        }
        conversation.take_sent();
    }
    let mut sent = String::new();
    for (at, what) in &conversation.sent {
        let what = match *what {
            Sent::Data { start, end, fin } => format!("{start}-{end}{}", if fin { " fin" } else { "" }),
            Sent::Ack => "ack".into(),
            Sent::Probe => "probe".into(),
            Sent::Reset => "reset".into(),
        };
        let _ = writeln!(sent, "    {at} > {what}");
    }
    (expected, sent)
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("{word:?} is no number"))
}

fn range(word: &str) -> (u32, u32) {
    let (start, end) = word
        .split_once('-')
        .unwrap_or_else(|| panic!("{word:?} is no range"));
    (number(start) as u32, number(end) as u32)
}

impl Conversation {
    fn open(line: &str) -> Self {
        let (mut mss, mut rtt, mut window) = (1000, 100, 8 << 20);
        let (mut selective, mut congestion) = (true, CongestionControl::Cubic);
        let (mut address, mut target) = (CLIENT, TARGET);
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("open"));
        while let Some(word) = words.next() {
            let mut value = || number(words.next().expect("a number follows"));
            match word {
                "none" => congestion = CongestionControl::None,
                "cubic" => congestion = CongestionControl::Cubic,
                "bbr" => congestion = CongestionControl::Bbr,
                "mss" => mss = value() as u16,
                "rtt" => rtt = value(),
                "window" => window = value(),
                "nosack" => selective = false,
                "v6" => (address, target) = (CLIENT6, TARGET6),
                _ => panic!("{word:?} is nothing to open with"),
            }
        }
        let config = Config {
            clients: Clients::Routed,
            congestion: Some(congestion),
            ..Config::default()
        };
        let mut rig = Rig::with(config, PolicySpec::default());
        let mut client = Client::new(address, target);
        client.window = (window >> SHIFT).min(65_535) as u16;
        let mut options = vec![
            TcpOptionElement::MaximumSegmentSize(mss),
            TcpOptionElement::WindowScale(SHIFT),
        ];
        if selective {
            options.push(TcpOptionElement::SelectiveAcknowledgementPermitted);
        }
        let flow = rig.packet(&client.syn_with(&options)).flow.expect("accepted");
        rig.upstream(flow, UpstreamEvent::Connected);
        rig.pass(Duration::from_millis(rtt));
        let syn_ack = rig.segments().remove(0);
        client.sequence = client.sequence.wrapping_add(1);
        client.expected = syn_ack.sequence.wrapping_add(1);
        rig.packet(&client.segment(ACK, &[]));
        Self {
            start: rig.now,
            isn: syn_ack.sequence,
            sequence: client.sequence,
            rig,
            client,
            flow,
            written: 0,
            acknowledged: 0,
            sent: Vec::new(),
            highest: 0,
        }
    }

    /// Lets time pass until `at`, and notes what is sent when.
    fn pass(&mut self, at: u64) {
        let end = self.start + Duration::from_millis(at);
        self.take_sent();
        while let Some(deadline) = self.rig.deadline
            && deadline.at <= end
        {
            let time = deadline.at.since(self.rig.now);
            self.rig.pass(time);
            self.take_sent();
        }
        self.rig.pass(end.since(self.rig.now));
        self.take_sent();
    }

    fn take_sent(&mut self) {
        let at = self.rig.now.since(self.start).as_millis() as u64;
        for segment in self.rig.segments() {
            let start = segment.sequence.wrapping_sub(self.isn).wrapping_sub(1);
            let end = start.wrapping_add(segment.payload.len() as u32);
            let fin = segment.flags & FIN != 0;
            if start == end && !fin {
                let what = if segment.flags & support::RST != 0 {
                    Sent::Reset
                } else if start == self.acknowledged.wrapping_sub(1) {
                    Sent::Probe
                } else {
                    assert_eq!(start, self.highest, "an ACK bears SND.NXT");
                    Sent::Ack
                };
                self.sent.push((at, what));
                continue;
            }
            assert!(segment.payload == pattern(self.written)[start as usize..end as usize]);
            self.highest = self.highest.max(end + u32::from(fin));
            match self.sent.last_mut() {
                Some((
                    before,
                    Sent::Data {
                        end: last,
                        fin: ended,
                        ..
                    },
                )) if *before == at && *last == start => {
                    *last = end;
                    *ended = fin;
                }
                _ => self.sent.push((at, Sent::Data { start, end, fin })),
            }
        }
    }

    fn client_says(&mut self, words: &[&str]) {
        let mut sack = Vec::new();
        let mut data = 0;
        let mut sequence = self.sequence;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let value = words.next().expect("a value follows");
            match *word {
                "ack" => {
                    let acknowledged = number(value) as u32;
                    self.client.expected = self.isn.wrapping_add(1).wrapping_add(acknowledged);
                    if acknowledged <= self.highest {
                        self.acknowledged = self.acknowledged.max(acknowledged);
                    }
                }
                "window" => self.client.window = (number(value) >> SHIFT) as u16,
                "sack" => sack = value.split(',').map(range).collect(),
                "sequence" => sequence = self.client.sequence.wrapping_add(number(value) as u32),
                "data" => data = number(value) as usize,
                _ => panic!("{word:?} is nothing that a client says"),
            }
        }
        let absolute = |offset: u32| self.isn.wrapping_add(1).wrapping_add(offset);
        let mut blocks = sack.iter().map(|&(start, end)| (absolute(start), absolute(end)));
        let options: Vec<_> = blocks
            .next()
            .map(|first| {
                let mut rest = [None; 3];
                for (place, block) in rest.iter_mut().zip(blocks) {
                    *place = Some(block);
                }
                TcpOptionElement::SelectiveAcknowledgement(first, rest)
            })
            .into_iter()
            .collect();
        let packet = self.client.with_options(sequence, ACK, &options, &pattern(data));
        if sequence == self.sequence {
            self.sequence = self.sequence.wrapping_add(data as u32);
        }
        self.rig.packet(&packet);
    }

    fn write(&mut self, bytes: usize) {
        let all = pattern(self.written + bytes);
        let taken = self.rig.write(self.flow, &all[self.written..]);
        assert_eq!(taken, bytes, "there is room");
        self.written += bytes;
    }
}
