//! The process that enters the namespaces, and starts the command there.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, exit};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{SigmaskHow, Signal, sigprocmask};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{Pid, getegid, geteuid, getppid};
use tungate_engine::Config;

use super::supervise::{Fate, Signals, die_by, end_children, kill_children};
use super::{FAILED, complain, queues, runtime};
use crate::driver::Device;
use crate::host::{self, DEVICE, device_addresses};

/// The command is there but cannot be run, or is not there: as shells have it.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

const TUN: &str = "/dev/net/tun";
/// Sockets by which the C library asks services for names, past DNS and past the appliance.
const NAME_SERVICES: [&str; 2] = ["/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket"];

/// Makes sure that this user can open the TUN device node.
///
/// # Errors
///
/// What is wrong with it, and the way out.
pub(super) fn check_device() -> Result<()> {
    let Err(error) = OpenOptions::new().read(true).write(true).open(TUN) else {
        return Ok(());
    };
    let way_out = match error.kind() {
        io::ErrorKind::NotFound => {
            "load the kernel's module with `modprobe tun`, or give the container the device (docker run --device /dev/net/tun)"
        }
        io::ErrorKind::PermissionDenied => {
            "it needs the mode that most distributions give it: `chmod 0666 /dev/net/tun` as root"
        }
        _ => "the kernel has no TUN support here",
    };
    Err(anyhow!("cannot open {TUN}: {error}; {way_out}"))
}

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
fn set_up(config: &Config, resolver: &str, outside: &UnixStream) -> Result<bool> {
    enter_namespaces()?;
    let device = Device::create(DEVICE, config.mtu, queues(), false)
        .context("cannot make a TUN device in the new network namespace")?;
    let (v4, v6) = device_addresses(config);
    let v6: Option<Ipv6Addr> = host::has_ipv6().then_some(v6);
    runtime()?.block_on(host::enclose(DEVICE, v4, v6))?;
    allow_pings();
    let fds: Vec<_> = device.queues.iter().map(AsRawFd::as_raw_fd).collect();
    sendmsg::<()>(
        outside.as_raw_fd(),
        &[IoSlice::new(&[u8::from(device.udp_segmentation)])],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .context("cannot hand the TUN device over")?;
    drop(device);
    mount_resolver(resolver)?;
    let mut outside = outside;
    Ok(outside.read_exact(&mut [0]).is_ok())
}

/// Enters a new network and mount namespace; where that takes more rights than this user has, in a user namespace.
fn enter_namespaces() -> Result<()> {
    let kinds = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    if unshare(kinds).is_err() {
        let (user, group) = (geteuid(), getegid());
        unshare(kinds | CloneFlags::CLONE_NEWUSER).map_err(explain_refusal)?;
        // Without CAP_SETGID outside, groups can only be mapped once they cannot be dropped any more.
        let write = |name: &str, map: String| fs::write(format!("/proc/self/{name}"), map);
        write("setgroups", "deny".to_owned())
            .and_then(|()| write("uid_map", format!("{user} {user} 1")))
            .and_then(|()| write("gid_map", format!("{group} {group} 1")))
            .map_err(|error| explain_refusal(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EPERM))))?;
    }
    // Mounts made here are seen here only.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SLAVE | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(explain_refusal)
}

/// Says which of the many switches it was.
fn explain_refusal(error: Errno) -> anyhow::Error {
    let is = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let way_out = if is("/proc/sys/user/max_user_namespaces", "0") {
        "they are turned off: `sysctl user.max_user_namespaces=10000` as root"
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "they are turned off for users: `sysctl kernel.unprivileged_userns_clone=1` as root"
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "AppArmor restricts them: `sysctl kernel.apparmor_restrict_unprivileged_userns=0` as root, or a profile for tungate with `userns,`"
    } else {
        "a container's or a service's sandbox may forbid them (docker run --security-opt seccomp=unconfined, systemd's RestrictNamespaces=); root does without"
    };
    anyhow!("user namespaces cannot be used: {}; {way_out}", error.desc())
}

/// Lets all groups there are send echo requests without a raw socket. Without it, they need one.
fn allow_pings() {
    let group = getegid();
    for range in ["0 2147483647".to_owned(), format!("{group} {group}")] {
        if fs::write("/proc/sys/net/ipv4/ping_group_range", range).is_ok() {
            return;
        }
    }
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
