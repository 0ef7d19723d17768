//! The worker as its supervisor sees it: a process and a link.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::bypass::Lines;
use crate::driver::Device;
use crate::link::{Link, News, Order, Start, send_descriptors};

/// How long the worker may take to reset its flows and end.
const END_TIME: Duration = Duration::from_secs(5);

/// The worker. It is killed when this is dropped.
pub(super) struct Process {
    child: Child,
    link: Link,
}

impl Process {
    /// Starts the worker and gives it what it needs. The device has no other user then, so its carrier is lost when
    /// the worker dies.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub(super) async fn start(
        start: Start,
        line: OwnedFd,
        device: Device,
        bypass: Option<Lines>,
        journal: Option<File>,
        control: Option<BorrowedFd<'_>>,
    ) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let child = Command::new("/proc/self/exe") // this very program, whatever its file is by now
            .arg0("tungate")
            .arg("worker")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            .process_group(0) // a terminal's interrupt is for the supervisor
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the relaying process")?;
        let mut descriptors = vec![line.as_fd()];
        descriptors.extend(device.queues.iter().map(AsFd::as_fd));
        descriptors.extend(
            bypass
                .iter()
                .flat_map(|lines| [lines.line.as_fd(), lines.log.as_fd()]),
        );
        descriptors.extend(journal.as_ref().map(AsFd::as_fd));
        descriptors.extend(control);
        let sent = send_descriptors(&ours, &descriptors);
        drop((line, device, bypass, journal));
        let mut process = Self {
            child,
            link: Link::new(ours)?,
        };
        let started = match sent {
            Ok(()) => process.tell(&Order::Start(Box::new(start))).await,
            Err(error) => Err(error.into()),
        };
        match started {
            Ok(()) => Ok(process),
            Err(error) => {
                // Why it does not listen says more than that it does not.
                process.next().await?;
                Err(error)
            }
        }
    }

    /// Gives an order.
    ///
    /// # Errors
    ///
    /// If the worker has died or does not listen.
    pub(super) async fn tell(&mut self, order: &Order) -> Result<()> {
        let sent = self.link.send(order).await;
        sent.context("the relaying process takes no orders")
    }

    /// Waits for the next news. Nothing is lost when this is given up.
    ///
    /// # Errors
    ///
    /// If the worker cannot go on or has died.
    pub(super) async fn next(&mut self) -> Result<News> {
        match self.link.receive().await.context("the link is broken")? {
            Some(News::Failed(error)) => bail!(error),
            Some(news) => Ok(news),
            None => match timeout(END_TIME, self.child.wait()).await {
                Ok(status) => bail!("the relaying process has died: {}", status?),
                Err(_) => bail!("the relaying process does not answer"),
            },
        }
    }

    /// Has the worker reset what is still open and end.
    pub(super) async fn end(mut self) {
        if self.link.send(&Order::End).await.is_err() || timeout(END_TIME, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await; // it may have ended by now
        }
    }
}
