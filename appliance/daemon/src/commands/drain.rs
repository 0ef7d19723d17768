//! `tungate drain`: the end, in order.

use std::io::{self, IsTerminal};
use std::time::Duration;

use anyhow::Result;
use indicatif::ProgressBar;
use tokio::time::sleep;

use super::control::{client, print};
use super::runtime;
use crate::cli;
use crate::control::api::{DRAIN, Drain, Draining, STATUS, Status};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(200);

/// Returns when the appliance has ended.
pub(super) fn run(arguments: &cli::Drain) -> Result<()> {
    let client = client(&arguments.control)?;
    let body = Drain {
        seconds: Some(arguments.timeout.as_secs()),
    };
    runtime()?.block_on(async {
        let draining: Draining = client.post(DRAIN, &body).await?;
        let flows = |count: usize| {
            if count == 1 {
                "1 open flow".to_owned()
            } else {
                format!("{count} open flows")
            }
        };
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
        while let Ok(status) = client.get::<Status>(STATUS).await {
            spinner.set_message(flows(status.open_flows));
            sleep(INTERVAL).await;
        }
        spinner.finish_and_clear();
        print("ended\n")
    })
}
