//! The process that enters the namespaces, and starts the command there.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Ipv6Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, exit};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{SigmaskHow, Signal, sigprocmask};
use nix::unistd::{Pid, getppid};
use tungate_engine::Config;

use super::supervise::{Fate, Signals, die_by, end_children, kill_children};
use super::{FAILED, complain, runtime};
use crate::driver::{Device, Layer, default_shards};
use crate::host::{self, DEVICE, device_addresses};
use crate::link::send_descriptors;

/// The command is there but cannot be run, or is not there: as shells have it.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Sockets by which the C library asks services for names, past DNS and past the appliance.
const NAME_SERVICES: [&str; 2] = ["/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket"];

/// Enters the namespaces, hands the device over `outside`, and runs `command` to its end.
pub(super) fn run(
    command: &[OsString],
    config: &Config,
    resolver: &str,
    outside: UnixStream,
    signals: Signals,
) -> ! {
    let code = match set_up(config, resolver, &outside) {
        Ok(true) => supervise(command, outside, signals).unwrap_or_else(|error| {
            complain(&error);
            i32::from(FAILED)
        }),
        Ok(false) => i32::from(FAILED), // the other side has said why
        Err(error) => {
            complain(&error);
            i32::from(FAILED)
        }
    };
    exit(code)
}

/// Makes the namespaces ready. Returns whether the other side is ready, too.
fn set_up(config: &Config, resolver: &str, mut outside: &UnixStream) -> Result<bool> {
    host::enter_namespaces(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    // Mounts made here are seen here only.
    let all = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, all, None::<&str>)
        .context("cannot keep mounts to this namespace")?;
    let device = Device::create(DEVICE, Layer::Ip, config.mtu, default_shards(), false)
        .context("cannot make a TUN device in the new network namespace")?;
    let (v4, v6) = device_addresses(config);
    let v6: Option<Ipv6Addr> = host::has_ipv6().then_some(v6);
    runtime()?.block_on(host::enclose(DEVICE, v4, v6))?;
    host::allow_pings();
    let fds: Vec<_> = device.queues.iter().map(AsFd::as_fd).collect();
    let handed = send_descriptors(outside, &fds);
    handed
        .and_then(|()| outside.write_all(&[u8::from(device.udp_segmentation)]))
        .context("cannot hand the TUN device over")?;
    drop(device);
    mount_resolver(resolver)?;
    Ok(outside.read_exact(&mut [0]).is_ok())
}

/// Puts a resolver file of our own in the place of the host's, for this mount namespace.
fn mount_resolver(content: &str) -> Result<()> {
    let bind = |from: &Path, to: &Path| mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    for socket in NAME_SERVICES
        .map(Path::new)
        .into_iter()
        .filter(|path| path.exists())
    {
        bind(Path::new("/dev/null"), socket).with_context(|| format!("cannot cover {}", socket.display()))?;
    }
    let Ok(target) = fs::canonicalize("/etc/resolv.conf") else {
        return Ok(()); // there is no file to cover: programs use 127.0.0.1, or need none
    };
    // The file lives on a file system in memory. That needs a directory to be mounted to for a moment, and this one is
    // always there; once mounted to its place, the file stays.
    let directory = Path::new("/dev");
    let mounted = (|| {
        mount(
            Some("tungate"),
            directory,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some("mode=0755,size=64k"),
        )?;
        let file = directory.join("resolv.conf");
        let written = File::create(&file).and_then(|mut file| file.write_all(content.as_bytes()));
        let bound = written.and_then(|()| Ok(bind(&file, &target)?));
        umount2(directory, MntFlags::MNT_DETACH)?;
        bound
    })();
    mounted.with_context(|| format!("cannot cover {}", target.display()))
}

/// Runs the command to its end, and what it leaves behind.
fn supervise(command: &[OsString], outside: UnixStream, signals: Signals) -> Result<i32> {
    if let Some(signal) = signals.early_end() {
        die_by(signal);
    }
    set_child_subreaper(true).context("cannot become the reaper of the command's children")?;
    let [program, arguments @ ..] = command else {
        bail!("there is no command");
    };
    let mask = signals.mask_before();
    let own = Pid::this();
    let mut process = Command::new(program);
    process.args(arguments);
    // SAFETY: the closure calls the system only.
    unsafe {
        process.pre_exec(move || {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
            set_pdeathsig(Signal::SIGKILL)?;
            if getppid() == own {
                Ok(())
            } else {
                Err(Errno::ESRCH.into())
            }
        });
    }
    let child = match process.spawn() {
        Ok(child) => Pid::from_raw(child.id() as i32),
        Err(error) => {
            let is_missing = error.kind() == io::ErrorKind::NotFound;
            eprintln!("tungate: cannot run {}: {error}", Path::new(program).display());
            return Ok(if is_missing { NOT_FOUND } else { NOT_EXECUTABLE });
        }
    };
    let parent = getppid();
    let ended = runtime()?.block_on(async {
        let mut signals = signals.listen()?;
        outside.set_nonblocking(true)?;
        let outside = tokio::net::UnixStream::from_std(outside)?;
        tokio::select! {
            ended = signals.supervise(child, |sender| sender == parent) => ended.map(Some),
            // Nothing more is sent: it has died.
            _ = outside.readable() => Ok(None),
        }
    })?;
    let Some(ended) = ended else {
        kill_children();
        bail!("the appliance has died, and the command with it");
    };
    end_children();
    match ended.fate {
        Fate::Exited(code) => Ok(code),
        Fate::Signaled(signal) => die_by(signal),
    }
}
