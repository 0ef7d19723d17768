//! A cell on virtual time, with the engine as the sender.

use std::time::Duration;

use tungate_engine::Config;
use tungate_engine::config::Clients;
use tungate_engine::recovery::CongestionControl;
use tungate_sim::link::{Lateness, Manner, Run, Traffic};

use super::cell::{Cell, Control, Figures, Task};

/// How long a transfer may take.
const LIMIT: Duration = Duration::from_secs(600);

const IDLE: [Duration; 4] = [
    Duration::from_micros(200),
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::MAX,
];

/// How late the forwarder is with what it has to do, at 100 Mbit/s: 41,000 wake-ups in five runs (docs/loss.md).
const FORWARDER: Lateness = Lateness {
    after_idle: &[
        (IDLE[0], [0.0, 5.0, 6.0, 7.0, 9.0, 15.0, 32.0, 73.0, 675.0]),
        (IDLE[1], [0.0, 5.0, 9.0, 15.0, 32.0, 43.0, 62.0, 553.0, 936.0]),
        (IDLE[2], [3.0, 19.0, 34.0, 52.0, 69.0, 79.0, 98.0, 144.0, 771.0]),
        (IDLE[3], [1.0, 30.0, 48.0, 77.0, 87.0, 94.0, 119.0, 362.0, 751.0]),
    ],
};

/// From an acknowledgment's arrival at the host of `tungate run` to the first packet that it lets out; in the same runs.
const APPLIANCE: Lateness = Lateness {
    after_idle: &[
        (IDLE[0], [5.0, 32.0, 39.0, 48.0, 59.0, 73.0, 156.0, 356.0, 1621.0]),
        (
            IDLE[1],
            [21.0, 31.0, 36.0, 48.0, 70.0, 104.0, 166.0, 788.0, 863.0],
        ),
        (
            IDLE[2],
            [42.0, 84.0, 108.0, 145.0, 177.0, 199.0, 292.0, 837.0, 1598.0],
        ),
        (
            IDLE[3],
            [51.0, 120.0, 155.0, 183.0, 209.0, 235.0, 317.0, 655.0, 1266.0],
        ),
    ],
};

/// Runs a cell once.
pub(super) fn measure(cell: &Cell, control: Control, seed: u64) -> Figures {
    let bytes = match cell.task {
        Task::Fill(_) => u64::MAX,
        Task::Transfer(bytes) => bytes,
    };
    let traffic = |index| Traffic {
        start: Cell::start(index),
        bytes,
        manner: Manner::default(),
    };
    let every = if cell.beside { 2 } else { 1 };
    let flows = |first: u32| (first..cell.flows).step_by(every).map(traffic).collect();
    let mut run = Run::new(seed, cell.path(), config(control), flows(0));
    if cell.beside {
        run = run.beside(config(Control::Cubic), flows(1));
    }
    run = run.late(FORWARDER, APPLIANCE);
    match cell.task {
        Task::Fill(seconds) => run.advance(Duration::from_secs(seconds)),
        Task::Transfer(_) => run.finish(LIMIT),
    }
    let outcome = run.outcome();
    let goodput = match cell.task {
        Task::Fill(seconds) => {
            let flows = outcome.flows.iter();
            flows
                .map(|flow| flow.received as f64 * 8e-6 / seconds as f64)
                .collect()
        }
        Task::Transfer(_) => Vec::new(),
    };
    Figures {
        seed,
        goodput,
        millis: outcome.flows[0]
            .finished_after
            .map(|after| after.as_secs_f64() * 1e3),
        drops: (outcome.to_client.queue_drops, outcome.to_client.lost),
        retransmitted: Some(outcome.flows.iter().map(|flow| flow.retransmitted).sum()),
        spurious: Some(outcome.flows.iter().map(|flow| flow.duplicates).sum()),
        late: None,
    }
}

fn config(control: Control) -> Config {
    let mut config = Config {
        clients: Clients::Routed,
        congestion: Some(match control {
            Control::Cubic => CongestionControl::Cubic,
            Control::Bbr => CongestionControl::Bbr,
        }),
        ..Config::default()
    };
    config.limits.buffer_bytes = 256 << 20;
    config.limits.buffer_per_flow = 4 << 20;
    config
}
