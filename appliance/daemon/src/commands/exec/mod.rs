//! `tungate exec`: a command in a network namespace of its own, with the appliance as its only way out.
//!
//! Three processes take part. This one stays outside and relays with ordinary sockets. It forks another that enters
//! new namespaces, makes the TUN device there, hands its queues out and starts the command ([`inside`]). Whichever of
//! the two outer ones is killed, the other ends what is left of the command.

mod inside;
mod resolver;
mod supervise;

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};
use tokio::time::{Instant, sleep_until};
use tungate_config::{Egress, EgressKind, Loaded};
use tungate_engine::Policy;

use self::resolver::Resolver;
use self::supervise::{Ended, Fate, Signals, end_children};
use super::run::{closed, create_journal, raise_descriptor_limit, runtime};
use super::{Rendered, configuration};
use crate::driver::{Device, Driver, Layer, Message, Report, Settings};
use crate::egress::{Dialer, Egresses};
use crate::link::receive_descriptors;
use crate::upstream::SocketSetup;
use crate::upstream::socket::Transport;
use crate::{cli, host, logs};

/// What a command's wrapper exits with when it has failed itself, as with env(1) and timeout(1).
const FAILED: u8 = 125;
/// How long bytes that the command has left behind may take to go out.
const DRAIN_TIME: Duration = Duration::from_secs(5);

pub(super) fn run(arguments: &cli::Exec) -> Result<ExitCode> {
    Ok(exec(arguments).unwrap_or_else(|error| {
        complain(&error);
        ExitCode::from(FAILED)
    }))
}

fn complain(error: &anyhow::Error) {
    match error.downcast_ref::<Rendered>() {
        Some(mistakes) => eprintln!("{mistakes}"),
        None => eprintln!("tungate: {error:#}"),
    }
}

fn exec(arguments: &cli::Exec) -> Result<ExitCode> {
    let mut loaded = configuration(arguments.policy.config.as_deref())?;
    if loaded.engine.bypass {
        bail!(
            "bypass.enabled is for `tungate run --from INTERFACE`: leave it out of the configuration for `exec`"
        );
    }
    let configured = arguments.resolver.or(loaded.policy.resolver);
    let resolver = Resolver::find(configured, &loaded.engine);
    loaded.policy.rules.splice(0..0, resolver.rules.clone());
    let journal = arguments.journal.as_deref().map(create_journal).transpose()?;
    logs::of_a_command(arguments.verbose);
    host::check_device_node()?;
    warn_of_privileges(&loaded.egresses);
    let signals = Signals::block().context("cannot take signals")?;
    set_child_subreaper(true).context("cannot become the reaper of the command's children")?;
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    // SAFETY: there is no other thread yet, so the child may do anything.
    let child = match unsafe { fork() }.context("cannot fork")? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            drop(ours);
            inside::run(
                &arguments.command,
                &loaded.engine,
                &resolver.content,
                theirs,
                signals,
            )
        }
    };
    drop(theirs);
    raise_descriptor_limit();
    let last_lines = logs::start_writer().context("cannot start a thread")?;
    let outside = Outside {
        loaded,
        journal,
        child,
        inside: ours,
    };
    let served = runtime()?.block_on(outside.serve(signals));
    if served.is_err() {
        let _ = kill(child, Signal::SIGKILL);
    }
    end_children();
    drop(last_lines); // before this process may end by a signal
    Ok(exit_code(served?))
}

/// Warns of ways out that take more rights than this user has: their flows would fail one by one.
fn warn_of_privileges(egresses: &[Egress]) {
    for egress in egresses {
        let options = match &egress.kind {
            EgressKind::Direct { socket } => socket,
            EgressKind::Socks5(proxy) | EgressKind::Http(proxy) => &proxy.socket,
            EgressKind::Group(_) => continue,
        };
        let opened = SocketSetup::of(options, None).open(Transport::Tcp, Ipv4Addr::LOCALHOST.into(), None);
        if opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            tracing::warn!(
                egress = egress.name,
                "its mark or its clients' addresses take CAP_NET_ADMIN, so its flows will fail"
            );
        }
    }
}

/// How the process ends: as the command did, in the way of shells.
fn exit_code(ended: Ended) -> ExitCode {
    match ended.fate {
        Fate::Exited(code) => ExitCode::from(code as u8),
        Fate::Signaled(Signal::SIGINT) if ended.interrupted => {
            // A shell ends its loop when what it waits for has died by the user's interrupt.
            supervise::die_by(Signal::SIGINT)
        }
        Fate::Signaled(signal) => ExitCode::from(128 + signal as u8),
    }
}

/// The side that stays outside.
struct Outside {
    loaded: Loaded,
    journal: Option<std::fs::File>,
    /// The process inside.
    child: Pid,
    inside: UnixStream,
}

impl Outside {
    async fn serve(self, signals: Signals) -> Result<Ended> {
        let mut signals = signals.listen().context("cannot take signals")?;
        let forwarded = |sender: Pid| sender != self.child;
        let Some(device) = receive_device(&self.inside).context("cannot take the TUN device over")? else {
            // It has said why.
            return Ok(signals.supervise(self.child, forwarded).await?);
        };
        let runtime = tokio::runtime::Handle::current();
        let egresses = Arc::new(Egresses::new(&self.loaded.egresses, None)?);
        egresses.look_up_proxies().await;
        egresses.watch(&runtime);
        let mut driver = Driver::start(Settings {
            config: self.loaded.engine,
            policy: Arc::new(Policy::new(self.loaded.policy)),
            egresses: egresses.clone(),
            dialer: Dialer::new(runtime),
            device,
            bypass: None,
            journal: self.journal,
        })
        .context("cannot start the driver")?;
        let _ = (&self.inside).write_all(&[1]); // it may have died, which is seen below
        let ended = tokio::select! {
            ended = signals.supervise(self.child, forwarded) => ended?,
            report = driver.report() => match report {
                Report::Ended(Err(error)) => bail!("a shard has failed: {error}"),
                Report::Ended(Ok(_)) | Report::Drained | Report::Alive => bail!("a shard has ended"),
            },
        };
        drain(&mut driver, &mut signals).await;
        // What is still open is reset, and logged.
        let policy = Arc::new(Policy::new(closed()));
        driver.tell(|| Message::Policy(policy.clone(), egresses.clone()));
        driver.stop().await;
        Ok(ended)
    }
}

/// Lets the bytes out that the command has sent, for a while or until a signal.
async fn drain(driver: &mut Driver, signals: &mut supervise::Listening) {
    driver.tell(|| Message::Drain);
    let deadline = Instant::now() + DRAIN_TIME;
    let mut left = driver.shards();
    while left > 0 {
        tokio::select! {
            () = signals.asked_to_end() => return,
            () = sleep_until(deadline) => return,
            report = driver.report() => match report {
                Report::Drained => left -= 1,
                Report::Alive => {}
                Report::Ended(_) => return,
            },
        }
    }
}

/// Waits for the device; `None` if the process inside has ended instead.
fn receive_device(mut socket: &UnixStream) -> io::Result<Option<Device>> {
    let queues = receive_descriptors(socket)?;
    if queues.is_empty() {
        return Ok(None);
    }
    let mut udp_segmentation = [0];
    socket.read_exact(&mut udp_segmentation)?;
    Ok(Some(Device {
        queues,
        layer: Layer::Ip,
        udp_segmentation: udp_segmentation == [1],
    }))
}
