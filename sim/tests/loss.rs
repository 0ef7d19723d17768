//! Cells of `cargo xtask bench loss`, with bounds from elsewhere: nine tenths of what Linux has sent over the same path
//! (docs/loss.md), or what was asked for. On virtual time, so every run is the same.

use std::thread;
use std::time::Duration;

use tungate_engine::Config;
use tungate_engine::config::Clients;
use tungate_engine::recovery::CongestionControl::{self, Bbr, Cubic};
use tungate_sim::link::{Discipline, Lateness, Loss, Manner, Outcome, Queue, Run, Shape, Traffic};

const SECONDS: u64 = 5;
const SEEDS: u64 = 3;
const BURSTS: Loss = Loss::Burst {
    share: 0.01,
    length: 10.0,
};

/// How late the threads of a forwarder and of `tungate run` have been: microseconds by how long they had slept, eleven
/// quantiles each.
const FORWARDER: Lateness = Lateness {
    after_idle: [
        [0.0, 5.0, 6.0, 7.0, 9.0, 15.0, 32.0, 73.0, 412.0, 612.0, 675.0],
        [0.0, 5.0, 9.0, 15.0, 32.0, 43.0, 62.0, 555.0, 882.0, 930.0, 936.0],
        [
            3.0, 19.0, 34.0, 52.0, 69.0, 79.0, 98.0, 148.0, 718.0, 766.0, 771.0,
        ],
        [
            1.0, 30.0, 48.0, 77.0, 87.0, 94.0, 119.0, 380.0, 701.0, 746.0, 751.0,
        ],
    ],
};
const ENGINE: Lateness = Lateness {
    after_idle: [
        [
            5.0, 32.0, 39.0, 48.0, 59.0, 73.0, 156.0, 404.0, 1276.0, 1587.0, 1621.0,
        ],
        [
            21.0, 31.0, 36.0, 48.0, 70.0, 104.0, 166.0, 804.0, 859.0, 862.0, 863.0,
        ],
        [
            42.0, 84.0, 108.0, 145.0, 177.0, 200.0, 293.0, 927.0, 1522.0, 1590.0, 1598.0,
        ],
        [
            51.0, 120.0, 155.0, 183.0, 209.0, 236.0, 317.0, 992.0, 1242.0, 1264.0, 1266.0,
        ],
    ],
};

/// A path towards the clients.
#[derive(Debug, Clone, Copy)]
struct Path {
    megabits: u64,
    round_trip: Duration,
    queue: usize,
    loss: Loss,
}

const fn path(megabits: u64, round_trip_millis: u64, queue: usize, loss: Loss) -> Path {
    Path {
        megabits,
        round_trip: Duration::from_millis(round_trip_millis),
        queue,
        loss,
    }
}

impl Path {
    fn shapes(self) -> (Shape, Shape) {
        let way = Shape::delay(self.round_trip / 2);
        let down = Shape {
            rate: self.megabits * 1_000_000,
            queue: Queue {
                packets: self.queue,
                discipline: Discipline::TailDrop,
            },
            loss: self.loss,
            ..way
        };
        (down, way)
    }
}

/// Routed clients, with that control or the one they have by default.
fn config(congestion: Option<CongestionControl>) -> Config {
    let mut config = Config {
        clients: Clients::Routed,
        congestion,
        ..Config::default()
    };
    config.limits.buffer_bytes = 256 << 20;
    config.limits.buffer_per_flow = 4 << 20;
    config
}

/// Flows that send so many bytes each and begin 50 ms apart, the first at `first` times that.
fn flows(first: u32, count: u32, bytes: u64) -> Vec<Traffic> {
    let traffic = |index| Traffic {
        start: Duration::from_millis(50) * index,
        bytes,
        manner: Manner::default(),
    };
    (first..first + count).map(traffic).collect()
}

/// Fills a path with one flow for a while.
fn fill(path: Path, control: Option<CongestionControl>, seconds: u64, seed: u64) -> Outcome {
    let mut run = Run::new(seed, path.shapes(), config(control), flows(0, 1, u64::MAX));
    run.advance(Duration::from_secs(seconds));
    run.outcome()
}

/// The median over the seeds, in Mbit/s; where nothing is left to chance, one is enough.
fn rate(path: Path, control: Option<CongestionControl>) -> f64 {
    let seeds = if path.loss == Loss::None { 1 } else { SEEDS };
    let mut received: Vec<u64> = thread::scope(|scope| {
        let runs: Vec<_> = (1..=seeds)
            .map(|seed| scope.spawn(move || fill(path, control, SECONDS, seed).flows[0].received))
            .collect();
        runs.into_iter()
            .map(|run| run.join().expect("it does not panic"))
            .collect()
    });
    received.sort_unstable();
    received[received.len() / 2] as f64 * 8e-6 / SECONDS as f64
}

/// The median of five seeds, in Mbit/s, where threads wake late.
fn rate_late(path: Path, control: CongestionControl) -> f64 {
    let mut reached: Vec<f64> = (1..=5)
        .map(|seed| {
            let flows = flows(0, 1, u64::MAX);
            let run = Run::new(seed, path.shapes(), config(Some(control)), flows);
            let mut run = run.late(FORWARDER, ENGINE);
            run.advance(Duration::from_secs(SECONDS));
            run.outcome().flows[0].received as f64 * 8e-6 / SECONDS as f64
        })
        .collect();
    reached.sort_by(f64::total_cmp);
    reached[2]
}

#[track_caller]
fn assert_reaches(path: Path, control: Option<CongestionControl>, least: f64) {
    let reached = rate(path, control);
    assert!(
        reached >= least,
        "{control:?}, {path:?}: {reached:.1} of {least:.1} Mbit/s"
    );
}

#[test]
fn cubic_keeps_up_with_linux() {
    for (path, linux) in [
        (path(10, 1, 64, Loss::Random(0.03)), 9.08),
        (path(10, 20, 64, Loss::Random(0.01)), 5.76),
        (path(10, 100, 100, Loss::None), 8.83),
    ] {
        assert_reaches(path, Some(Cubic), 0.9 * linux);
    }
}

#[test]
fn bbr_keeps_up_with_linux() {
    for (path, linux) in [
        (path(10, 1, 64, Loss::None), 9.65),
        (path(10, 20, 64, Loss::Random(0.03)), 9.24),
        (path(10, 100, 100, Loss::Random(0.01)), 8.52),
    ] {
        assert_reaches(path, Some(Bbr), 0.9 * linux);
    }
}

/// What the queue does not hold is dropped. Linux's BBR reaches 73.6 Mbit/s there, its Cubic 14.4.
#[test]
fn bbr_copes_with_a_short_queue() {
    let short = path(100, 20, 5, Loss::None);
    assert_reaches(short, Some(Bbr), 0.9 * 73.6);
    let short = path(10, 20, 5, Loss::None);
    assert_reaches(short, Some(Bbr), rate(short, Some(Cubic)));
}

/// As measured over the forwarder: after a pause two or three acknowledgments wait until both threads are awake, and
/// what they let out stands in the queue. `tungate run` came to 8.7 to 24.7 Mbit/s there in 15 runs.
#[test]
fn threads_that_wake_late_overfill_a_short_queue() {
    let reached = rate_late(path(100, 20, 5, Loss::None), Cubic);
    assert!((8.7..=24.7).contains(&reached), "{reached:.1}");
}

/// What a probe leaves in the queue of a path that holds ten packets takes long to drain. Taken for somebody else's, it
/// made the window so short that a burst took all that was in flight. Linux's BBR reaches 95.5 Mbit/s there.
#[test]
fn on_a_short_path_its_own_queue_is_no_rival() {
    let reached = rate_late(path(100, 1, 256, BURSTS), Bbr);
    assert!(reached >= 0.9 * 95.5, "{reached:.1}");
}

/// As on a radio link.
#[test]
fn by_default_a_path_that_loses_one_percent_keeps_its_rate() {
    let outcome = fill(path(100, 20, 256, Loss::Random(0.01)), None, SECONDS, 1);
    let reached = outcome.flows[0].received as f64 * 8e-6 / SECONDS as f64;
    assert!(reached >= 85.0, "{reached:.1} Mbit/s");
}

/// A client so near is not paced: the queue must hold what that sends at once.
#[test]
fn a_near_client_behind_a_short_queue_gets_the_whole_rate() {
    let near = Path {
        round_trip: Duration::from_micros(200),
        ..path(10, 0, 10, Loss::None)
    };
    assert_reaches(near, None, 0.95 * 9.73);
}

/// Without reordering, duplicates or lost acknowledgments, nothing that arrived is sent again: a retransmission for
/// each drop, and none besides.
#[test]
fn nothing_is_retransmitted_needlessly() {
    for control in [Cubic, Bbr] {
        for (path, seconds) in [
            (path(100, 20, 256, Loss::None), 1), // the end of slow start
            (path(10, 20, 64, Loss::Random(0.01)), 5),
            (path(10, 20, 64, BURSTS), 5),
        ] {
            let outcome = fill(path, Some(control), seconds, 1);
            let flow = &outcome.flows[0];
            let drops = outcome.to_client.queue_drops + outcome.to_client.lost;
            assert_eq!(flow.duplicates, 0, "{control:?} {path:?} {outcome:?}");
            assert!(flow.retransmitted <= drops, "{control:?} {path:?} {outcome:?}");
        }
    }
}

/// Jain's index of flows of one control and of another over 60 s of 10 Mbit/s and 20 ms.
fn fairness(
    (first, of_first): (CongestionControl, u32),
    (second, of_second): (CongestionControl, u32),
) -> f64 {
    let path = path(10, 20, 64, Loss::None);
    let mut run = Run::new(
        1,
        path.shapes(),
        config(Some(first)),
        flows(0, of_first, u64::MAX),
    )
    .beside(config(Some(second)), flows(of_first, of_second, u64::MAX));
    run.advance(Duration::from_secs(60));
    let received: Vec<f64> = run
        .outcome()
        .flows
        .iter()
        .map(|flow| flow.received as f64)
        .collect();
    let sum: f64 = received.iter().sum();
    let squares: f64 = received.iter().map(|bytes| bytes * bytes).sum();
    sum * sum / (received.len() as f64 * squares)
}

#[test]
fn two_flows_share_a_path() {
    for second in [Bbr, Cubic] {
        let index = fairness((Bbr, 1), (second, 1));
        assert!(index >= 0.9, "{second:?}: {index:.3}");
    }
}

#[test]
fn eight_flows_share_a_path() {
    let index = fairness((Bbr, 4), (Cubic, 4));
    assert!(index >= 0.9, "{index:.3}");
}

/// From the SYN to the last byte, against what Linux takes on the same path.
#[test]
fn short_transfers_take_no_longer_than_with_linux() {
    for (control, bytes, linux_millis) in [
        (Cubic, 10_000, 41.3),
        (Cubic, 100_000, 85.6),
        (Cubic, 1_000_000, 189.3),
        (Bbr, 10_000, 41.3),
        (Bbr, 100_000, 103.0),
        (Bbr, 1_000_000, 194.1),
    ] {
        let path = path(100, 20, 256, Loss::None);
        let mut run = Run::new(1, path.shapes(), config(Some(control)), flows(0, 1, bytes));
        run.finish(Duration::from_secs(60));
        let outcome = run.outcome();
        let took = outcome.flows[0].finished_after.expect("it has ended");
        let millis = took.as_secs_f64() * 1e3;
        assert!(
            millis <= 1.1 * linux_millis,
            "{control:?}, {bytes} bytes: {millis:.1} ms of {linux_millis:.1}"
        );
    }
}
