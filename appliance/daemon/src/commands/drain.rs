//! `tungate drain`: the end, in order.

use std::io::{self, IsTerminal};
use std::time::Duration;

use anyhow::Result;
use indicatif::ProgressBar;
use tokio::time::sleep;

use super::control::{client, print};
use super::{runtime, text};
use crate::cli;
use crate::control::Unreachable;
use crate::control::api::{DRAIN, Drain, Draining, STATUS, Status};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(200);

/// Returns when the appliance has ended.
pub(super) fn run(arguments: &cli::Drain) -> Result<()> {
    let client = client(&arguments.control)?;
    let body = Drain {
        seconds: Some(arguments.timeout.as_secs() + u64::from(arguments.timeout.subsec_nanos() > 0)),
    };
    runtime()?.block_on(async {
        let draining: Draining = client.post(DRAIN, &body).await?;
        let flows = |count| text::count(count, "open flow");
        print(&format!(
            "no new flows; {} may go on for {} s\n",
            flows(draining.open_flows),
            draining.seconds
        ))?;
        let spinner = if io::stderr().is_terminal() {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        spinner.enable_steady_tick(Duration::from_millis(100));
        loop {
            match client.get::<Status>(STATUS).await {
                Ok(status) => spinner.set_message(flows(status.open_flows)),
                Err(error) => match error.downcast_ref() {
                    Some(Unreachable::NotRunning(_) | Unreachable::Ended) => break,
                    Some(Unreachable::NotPermitted(_) | Unreachable::Silent) | None => return Err(error),
                },
            }
            sleep(INTERVAL).await;
        }
        spinner.finish_and_clear();
        print("ended\n")
    })
}
