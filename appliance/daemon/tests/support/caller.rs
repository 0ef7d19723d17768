//! Who calls `tungate exec` and `tungate demo`, and whether they may open the TUN device node.
//!
//! Where the node is for root only, as no distribution ships it, tests widen its mode meanwhile.

use std::fs::{self, File};
use std::io::BufRead;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::unistd::{Pid, geteuid, getuid};

use super::{TUNGATE, file};

pub const TUN: &str = "/dev/net/tun";

/// Whoever runs as this user has no rights at all.
pub const NOBODY: u32 = 65534;

/// Who calls the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Whoever runs the tests.
    Own,
    /// An ordinary user, where root runs the tests.
    Nobody,
}

impl Caller {
    /// Root and an ordinary user, or only the latter.
    pub fn all() -> &'static [Self] {
        if geteuid().is_root() {
            &[Self::Own, Self::Nobody]
        } else {
            &[Self::Own]
        }
    }

    pub fn user(self) -> u32 {
        match self {
            Self::Own => getuid().as_raw(),
            Self::Nobody => NOBODY,
        }
    }

    pub fn command(self, program: impl AsRef<Path>) -> Command {
        match self {
            Self::Own => Command::new(program.as_ref()),
            Self::Nobody => {
                let mut command = Command::new("setpriv");
                command
                    .args([
                        &format!("--reuid={NOBODY}"),
                        &format!("--regid={NOBODY}"),
                        "--clear-groups",
                    ])
                    .arg(program.as_ref());
                command
            }
        }
    }

    /// `tungate exec`, with arguments up to `--` and the command behind it.
    pub fn exec(self, arguments: &[&str], command: &[&str]) -> Command {
        let mut exec = self.command(program());
        exec.arg("exec")
            .args(arguments)
            .arg("--")
            .args(command)
            .stdin(Stdio::null());
        exec
    }
}

/// The program, at a place that everybody can reach.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<(PathBuf, Option<tempfile::TempDir>)> = OnceLock::new();
    let (path, _) = PROGRAM.get_or_init(|| {
        let built = PathBuf::from(TUNGATE);
        let everybody =
            |path: &Path| fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0);
        if !geteuid().is_root() || built.ancestors().all(everybody) {
            return (built, None);
        }
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let copy = directory.path().join("tungate");
        fs::copy(built, &copy).unwrap();
        (copy, Some(directory))
    });
    path
}

/// The TUN device node, with a mode of the test's choice as long as this lives.
pub struct DeviceNode {
    _turn: Turn,
}

#[expect(dead_code, reason = "they are held")]
enum Turn {
    Open(RwLockReadGuard<'static, ()>),
    Closed(RwLockWriteGuard<'static, ()>),
}

/// Tests that need the node open share it; those that need it closed have it alone.
pub static TURNS: RwLock<()> = RwLock::new(());

/// What the tests of this process have changed.
static CHANGED: Mutex<Changed> = Mutex::new(Changed {
    times: 0,
    mode: 0,
    lock: None,
});

struct Changed {
    times: u32,
    /// What it was before.
    mode: u32,
    /// Held meanwhile, so that no other process with these tests does the same.
    lock: Option<File>,
}

impl DeviceNode {
    /// Lets everybody open it, as distributions do.
    pub fn open() -> Self {
        Self::with_mode(
            Turn::Open(TURNS.read().unwrap_or_else(|error| error.into_inner())),
            0o666,
        )
    }

    /// Lets nobody but root open it.
    pub fn closed() -> Self {
        Self::with_mode(
            Turn::Closed(TURNS.write().unwrap_or_else(|error| error.into_inner())),
            0o600,
        )
    }

    fn with_mode(turn: Turn, mode: u32) -> Self {
        if geteuid().is_root() {
            let mut changed = CHANGED.lock().unwrap();
            if changed.times == 0 {
                let node = File::open(TUN).unwrap();
                node.lock().unwrap();
                changed.lock = Some(node);
                changed.mode = mode_of(TUN);
            }
            changed.times += 1;
            fs::set_permissions(TUN, fs::Permissions::from_mode(mode)).unwrap();
        }
        Self { _turn: turn }
    }
}

impl Drop for DeviceNode {
    fn drop(&mut self) {
        if geteuid().is_root() {
            let mut changed = CHANGED.lock().unwrap();
            changed.times -= 1;
            if changed.times == 0 {
                fs::set_permissions(TUN, fs::Permissions::from_mode(changed.mode)).unwrap();
                changed.lock = None;
            }
        }
    }
}

pub fn mode_of(path: &str) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Says why a test does not run here, if it cannot.
pub fn skipped(programs: &[&str]) -> bool {
    let is_missing = |program: &&&str| {
        !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|directory| directory.join(program).exists())
    };
    let missing = if !Path::new(TUN).exists() {
        Some(format!("{TUN} is not there"))
    } else if !geteuid().is_root() && File::options().read(true).write(true).open(TUN).is_err() {
        Some(format!("this user cannot open {TUN}"))
    } else if !namespaces_work() {
        Some("this user may not make namespaces".to_owned())
    } else {
        let found = ["setpriv", "unshare"].iter().chain(programs).find(is_missing);
        found.map(|program| format!("{program} is not installed"))
    };
    if let Some(missing) = missing {
        println!("skipped: {missing}");
        return true;
    }
    false
}

fn namespaces_work() -> bool {
    Caller::all().iter().all(|caller| {
        let made = caller
            .command("unshare")
            .args(["--user", "--net", "true"])
            .stderr(Stdio::null())
            .status();
        made.is_ok_and(|status| status.success())
    })
}

/// A configuration in a file that everybody can read.
pub fn configuration(directory: &tempfile::TempDir, content: &str) -> String {
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    file(directory.path(), "tungate.toml", content)
}

pub fn output(mut command: Command) -> Output {
    command.output().unwrap()
}

pub fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

pub fn pids(stdout: &mut impl BufRead) -> Vec<Pid> {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    line.split_whitespace()
        .map(|pid| Pid::from_raw(pid.parse().unwrap()))
        .collect()
}

/// The state of a process as `ps` has it; `None` when it is gone.
pub fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?
        .1
        .chars()
        .next()
        .filter(|state| *state != 'Z')
}
