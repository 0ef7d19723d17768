//! A cell on virtual time, with the engine as the sender.

use std::time::Duration;

use tungate_engine::Config;
use tungate_engine::config::Clients;
use tungate_engine::recovery::CongestionControl;
use tungate_sim::link::{Manner, Run, Traffic};

use super::cell::{Cell, Control, Figures, Task};
use super::wakes::Wakes;

/// How long a transfer may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs a cell once, with threads as late as those of a real-time run.
pub(super) fn measure(cell: &Cell, control: Control, seed: u64, wakes: &Wakes) -> Figures {
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
    let (forwarder, engine) = wakes.lateness();
    run = run.late(forwarder, engine);
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
