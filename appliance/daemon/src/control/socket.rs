//! The socket's place: made so that nobody but those who may can ever open it, and removed at the end.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::{Group, chown};
use tungate_config::Control;

use crate::host::namespace_cookie;

const DIRECTORY: &str = "/run/tungate";
/// A name of [`usual_path`] for people and other programs; the first of several appliances has it.
const LINK: &str = "/run/tungate/control.sock";

/// A listening control socket; its file goes with this value.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

/// Where the socket is unless the configuration says something else: each network namespace has one appliance, and all of
/// them may share a file system.
///
/// # Errors
///
/// If the network namespace cannot be told.
pub(crate) fn usual_path() -> Result<PathBuf> {
    let namespace = namespace_cookie().context("cannot tell the network namespace")?;
    Ok(Path::new(DIRECTORY).join(format!("{namespace}.sock")))
}

/// Removes what an appliance that was killed has left in the usual place. Whoever calls it knows that none runs.
///
/// # Errors
///
/// The system's.
pub(crate) fn remove_leftover() -> Result<()> {
    let path = usual_path()?;
    drop(Socket { listener: None, path });
    Ok(())
}

impl Socket {
    /// Listens as `control` says; `None` if it says not to.
    ///
    /// # Errors
    ///
    /// If the socket cannot be made, another process listens there, or there is no such group.
    pub(crate) fn open(control: &Control) -> Result<Option<Self>> {
        if !control.enabled {
            return Ok(None);
        }
        let group = match &control.group {
            None => None,
            Some(name) => match Group::from_name(name).context("cannot ask for groups")? {
                Some(group) => Some(group.gid),
                None => bail!("there is no group {name:?}, which [control] names: `getent group` lists them"),
            },
        };
        let path = match &control.socket {
            Some(path) => path.clone(),
            None => usual_path()?,
        };
        let what = || {
            format!(
                "cannot make the control socket {}: [control] socket says where, and enabled = false does without",
                path.display()
            )
        };
        make_way(&path).with_context(what)?;
        // With another name until its rights are right.
        let new = path.with_extension("new");
        remove(&new).with_context(what)?;
        let listener = UnixListener::bind(&new).with_context(what)?;
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        let given = chown(&new, None, group)
            .map_err(io::Error::from)
            .and_then(|()| fs::set_permissions(&new, Permissions::from_mode(mode)))
            .and_then(|()| fs::rename(&new, &path));
        if let Err(error) = given {
            let _ = remove(&new); // what is wrong is said
            return Err(anyhow!(error).context(what()));
        }
        if control.socket.is_none() {
            link(&path).with_context(|| format!("cannot make the name {LINK} for it"))?;
        }
        Ok(Some(Self {
            listener: Some(listener),
            path,
        }))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket, as long as this process has it.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// Leaves the listening to another process, whose end is the end of it.
    pub(crate) fn hand_over(&mut self) {
        self.listener = None;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let linked = fs::read_link(LINK).is_ok_and(|target| target == self.path);
        let removed = if linked { remove(Path::new(LINK)) } else { Ok(()) };
        if let Err(error) = removed.and(remove(&self.path)) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove the control socket");
        }
    }
}

/// Makes sure that nothing is in the way but what a crash left.
fn make_way(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(data) if !data.file_type().is_socket() => {
            bail!("there is a file of that name, which is no socket")
        }
        Ok(_) if UnixStream::connect(path).is_ok() => bail!("another appliance listens there"),
        Ok(_) => Ok(()),
    }
}

/// Has [`LINK`] lead to `path`, unless an appliance listens where it leads already.
fn link(path: &Path) -> io::Result<()> {
    if UnixStream::connect(LINK).is_ok() {
        return Ok(());
    }
    let new = path.with_extension("link");
    remove(&new)?;
    symlink(path, &new)?;
    fs::rename(&new, LINK)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
