//! What signals ask for.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    End,
    Reload,
}

/// The signals that mean something to a service.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes signals from here on.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot handle signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The next request.
    pub(super) async fn next(&mut self) -> Request {
        tokio::select! {
            _ = self.terminate.recv() => Request::End,
            _ = self.interrupt.recv() => Request::End,
            _ = self.hangup.recv() => Request::Reload,
        }
    }

    /// The next request for the end.
    pub(super) async fn end(&mut self) {
        while self.next().await != Request::End {}
    }
}
