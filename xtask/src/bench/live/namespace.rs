//! Network namespaces, which live as long as somebody has them open.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::process::check_interrupt;

const NONE: Option<&str> = None;

/// Gives this process, and those it starts, mounts of their own, which go with them.
pub(super) fn make_mounts_private() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE))
        .context("cannot make a mount namespace")
}

/// A network namespace; it goes when this value and the last process in it are gone.
pub(super) struct Namespace {
    file: File,
    /// Where it is mounted.
    mount: Option<PathBuf>,
}

impl Namespace {
    pub(super) fn new() -> Result<Self> {
        let open = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        let file = thread::scope(|scope| scope.spawn(open).join().expect("the thread does not panic"));
        let namespace = Self {
            file: file.context("cannot make a network namespace")?,
            mount: None,
        };
        for (key, value) in [
            // Addresses that are still being checked for duplicates would delay everything by a second.
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            // So many connections that ports must not run out. Servers have ports below these.
            ("ipv4/ip_local_port_range", "1024 65535"),
            ("ipv4/tcp_tw_reuse", "1"),
            ("core/somaxconn", "8192"),
            ("ipv4/tcp_max_syn_backlog", "8192"),
        ] {
            namespace.sysctl(key, value)?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Makes one with a file at `path` for programs that give up the right to look into this process.
    pub(super) fn mounted(path: PathBuf) -> Result<Self> {
        let mut namespace = Self::new()?;
        File::create(&path)
            .and_then(|_| {
                Ok(mount(
                    Some(&*namespace.path()),
                    &path,
                    NONE,
                    MsFlags::MS_BIND,
                    NONE,
                )?)
            })
            .with_context(|| format!("cannot mount a network namespace at {}", path.display()))?;
        namespace.mount = Some(path);
        Ok(namespace)
    }

    /// Where others find it, as long as this process lives.
    pub(super) fn path(&self) -> String {
        match &self.mount {
            Some(path) => path.display().to_string(),
            None => format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()),
        }
    }

    /// A command that will run in the namespace, away from the terminal's signals, and end with this process.
    pub(super) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        let namespace = self.file.as_raw_fd();
        command.stdin(Stdio::null()).process_group(0);
        let prepare = move || {
            // SAFETY: the descriptor is open in the parent, which waits for the child to get past this.
            let namespace = unsafe { BorrowedFd::borrow_raw(namespace) };
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: it makes two system calls, which is allowed between fork and exec.
        unsafe { command.pre_exec(prepare) };
        command
    }

    /// Runs a command line without quotes, which must succeed.
    pub(super) fn run(&self, line: &str) -> Result<()> {
        let mut words = line.split_whitespace();
        let program = words.next().context("there is no command")?;
        let output = self
            .command(program)
            .args(words)
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{line}: {}", errors.trim());
        Ok(())
    }

    pub(super) fn ip(&self, arguments: &str) -> Result<()> {
        self.run(&format!("ip {arguments}"))
    }

    /// Hands nftables a set of rules.
    pub(super) fn nft(&self, rules: &str) -> Result<()> {
        let mut child = self
            .command("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run nft")?;
        let mut input = child.stdin.take().expect("it is piped");
        input.write_all(rules.as_bytes()).context("cannot write to nft")?;
        drop(input);
        let output = child.wait_with_output().context("cannot wait for nft")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft: {}", errors.trim());
        Ok(())
    }

    pub(super) fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.enter(|| fs::write(&path, value))
            .with_context(|| format!("cannot set net/{key}"))
    }

    /// Calls `work` on a thread in the namespace.
    fn enter<T: Send>(&self, work: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
        let there = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            work()
        };
        let done = thread::scope(|scope| scope.spawn(there).join().expect("the thread does not panic"));
        Ok(done?)
    }

    /// Waits until an echo server answers at `address`.
    pub(super) fn wait_for_echo(&self, address: SocketAddr, patience: Duration) -> Result<()> {
        let exchange = || {
            let mut socket = TcpStream::connect_timeout(&address, Duration::from_millis(500))?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            socket.write_all(&[1])?;
            socket.read_exact(&mut [0])
        };
        let end = Instant::now() + patience;
        loop {
            check_interrupt()?;
            match self.enter(exchange) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(error).with_context(|| format!("{address} does not answer"));
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(path) = &self.mount {
            let _ = umount2(path, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(path);
        }
    }
}
