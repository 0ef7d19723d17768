//! Frames that are dropped at the far end of a cable.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Instant;

use tungate_prefilter::Prefilter;
use tungate_prefilter::kernel::{Kernel, Options, Wanted};

use super::Figures;
use super::generator::{Generator, Sources, keep_time};
use super::lists::{network, policy};
use super::wire::{on_a_wire, run};

/// Frames of one measurement.
const FRAMES: u32 = 400_000;

/// How often each is made.
const ROUNDS: usize = 3;

/// Who drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dropper {
    /// The pre-filter, in native mode.
    Xdp,
    /// nftables: a set of intervals, at the interface's ingress, the earliest place it has.
    Nft,
    /// iptables with an ipset, before anything else it does.
    Ipset,
}

impl FromStr for Dropper {
    type Err = ();

    fn from_str(word: &str) -> Result<Self, ()> {
        match word {
            "xdp" => Ok(Self::Xdp),
            "nft" => Ok(Self::Nft),
            "ipset" => Ok(Self::Ipset),
            _ => Err(()),
        }
    }
}

/// Loads a list and sends frames against it. `None` without rights.
pub(crate) fn measure(dropper: Dropper, entries: u32) -> Option<Figures> {
    let mut figures = None;
    let figures_of = &mut figures;
    on_a_wire(move || {
        *figures_of = Some(on_the_wire(dropper, entries));
    });
    figures
}

fn on_the_wire(dropper: Dropper, entries: u32) -> Figures {
    stay_on_one_processor();
    run("ip link set far address 02:00:00:00:00:01");
    // An interface without XDP takes frames that are no socket buffers only if it polls.
    run("ethtool -K far gro on");
    let mut prefilter = None;
    let start = Instant::now();
    match dropper {
        Dropper::Xdp => {
            let mut kernel = Prefilter::<Kernel>::load(Options::default()).expect("root may load it");
            let backend = kernel.backend_mut();
            backend.attach("far", Wanted::Native).expect("a veth takes it");
            kernel.apply(&policy(entries), 0).expect("it fits");
            prefilter = Some(kernel);
        }
        Dropper::Nft => load_nft(entries),
        Dropper::Ipset => load_ipset(entries),
    }
    let mut figures = vec![("load_seconds".to_owned(), start.elapsed().as_secs_f64())];
    if dropper != Dropper::Xdp {
        let one = network(entries | 1);
        let start = Instant::now();
        match dropper {
            Dropper::Nft => drop(run(&format!("nft add element netdev bench listed {{ {one} }}"))),
            Dropper::Ipset | Dropper::Xdp => drop(run(&format!("ipset add bench {one}"))),
        }
        figures.push(("add_microseconds".to_owned(), start.elapsed().as_secs_f64() * 1e6));
    }
    let near = index("near");
    for sources in Sources::ALL {
        let sender = Generator::load(sources, entries, Some(near)).expect("root may load it");
        let alone = Generator::load(sources, entries, None).expect("root may load it");
        // The least: what disturbs a round makes it longer.
        let least = |round: &dyn Fn() -> f64| (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min);
        let own = least(&|| send(&alone).nanos / f64::from(FRAMES));
        let path = least(&|| {
            let sent = send(&sender);
            (sent.nanos - own * f64::from(FRAMES)) / sent.through
        });
        let mut figure = |name: &str, value| figures.push((format!("{}_{name}", sources.name()), value));
        figure("generator_ns", own);
        figure("path_ns", path);
        figure(
            "lost_percent",
            100.0 - send(&sender).through / f64::from(FRAMES) * 100.0,
        );
        if prefilter.is_some() {
            let timed = keep_time().expect("root may");
            let (before, runs_before) = run_time(&[sender.descriptor(), alone.descriptor()]);
            send(&sender);
            let (after, runs_after) = run_time(&[sender.descriptor(), alone.descriptor()]);
            drop(timed);
            figure("run_ns", (after - before) / (runs_after - runs_before));
        }
    }
    figures
}

/// What sending came to.
struct Sent {
    nanos: f64,
    /// Frames that the far end has looked at: the cable loses some where that is slow.
    through: f64,
}

fn send(generator: &Generator) -> Sent {
    let before = received();
    let start = Instant::now();
    generator.send(&frame(), FRAMES).expect("the kernel sends frames");
    let nanos = start.elapsed().as_nanos() as f64;
    Sent {
        nanos,
        through: (received() - before) as f64,
    }
}

/// Frames that the far end has looked at, whatever became of them.
fn received() -> u64 {
    let count =
        fs::read_to_string("/sys/class/net/far/statistics/rx_packets").expect("the interface is there");
    count.trim().parse().expect("a number")
}

fn index(interface: &str) -> u32 {
    let index =
        fs::read_to_string(format!("/sys/class/net/{interface}/ifindex")).expect("the interface is there");
    index.trim().parse().expect("a number")
}

/// A UDP datagram of 60 bytes, whose checksum is right if source address and identification add up to nothing.
fn frame() -> Vec<u8> {
    let mut header = vec![
        0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 203, 0, 113, 1,
    ];
    let words = header
        .chunks_exact(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!sum as u16).to_be_bytes());
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend(header);
    frame.extend([0x30, 0x39, 0, 53, 0, 26, 0, 0]);
    frame.resize(60, 0);
    frame
}

/// Nanoseconds and number of runs of this process's XDP programs but these.
fn run_time(others: &[i32]) -> (f64, f64) {
    for file in fs::read_dir("/proc/self/fdinfo").expect("the process has descriptors") {
        let file = file.expect("it can be read").file_name();
        let descriptor = file.to_string_lossy().parse().expect("a number");
        let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")) else {
            continue;
        };
        if field(&text, "prog_type:") == Some(6.0) && !others.contains(&descriptor) {
            let count = |name| field(&text, name).expect("the kernel keeps the time");
            return (count("run_time_ns:"), count("run_cnt:"));
        }
    }
    panic!("the program is not to be found");
}

/// The number behind a name.
pub(crate) fn field(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

fn stay_on_one_processor() {
    // SAFETY: a set of bits, which may all be zero.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is large enough for the first processor, and as long as is said.
    let done = unsafe {
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn load_nft(entries: u32) {
    let mut script =
        "table netdev bench {\n set listed {\n type ipv4_addr; flags interval\n elements = {".to_owned();
    for index in 0..entries {
        script.push_str(&format!("{},\n", network(index)));
    }
    script.push_str(
        "}\n }\n chain ingress {\n type filter hook ingress device far priority 0;\n ip saddr @listed drop\n }\n}\n",
    );
    feed("nft -f -", &script);
}

fn load_ipset(entries: u32) {
    let mut script = format!("create bench hash:net maxelem {}\n", entries + 16);
    for index in 0..entries {
        script.push_str(&format!("add bench {}\n", network(index)));
    }
    feed("ipset restore", &script);
    run("iptables -t raw -A PREROUTING -m set --match-set bench src -j DROP");
}

fn feed(line: &str, input: &str) {
    let mut words = line.split(' ');
    let mut child = Command::new(words.next().expect("a command"))
        .args(words)
        .stdin(Stdio::piped())
        .spawn()
        .expect("it can be run");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.as_bytes()).expect("it reads all");
    drop(stdin);
    assert!(child.wait().expect("it ends").success(), "{line}");
}
