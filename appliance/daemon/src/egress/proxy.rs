//! A proxy: where it is, who to be there, and the TCP connection to it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::timeout;
use tungate_config::{EgressKind, Endpoint, Host, Password};

use crate::upstream::{Broker, SocketSetup, Transport};

/// How long a proxy may take to accept a connection, and to answer where it need not connect anywhere itself.
pub(super) const PROXY_TIMEOUT: Duration = Duration::from_secs(10);

/// A proxy.
#[derive(Debug)]
pub(super) struct Proxy {
    address: Endpoint,
    pub(super) login: Option<Login>,
    pub(super) setup: SocketSetup,
    /// What was found when its name was last looked up.
    found: Mutex<Arc<[SocketAddr]>>,
}

/// A user and password.
#[derive(Clone)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({})", self.username)
    }
}

impl Proxy {
    pub(super) fn new(proxy: &tungate_config::Proxy, broker: Option<&Arc<Broker>>) -> Result<Self> {
        let login = match &proxy.login {
            None => None,
            Some(login) => Some(Login {
                username: login.username.clone(),
                password: read_password(&login.password)?,
            }),
        };
        let found: Arc<[_]> = match proxy.address.host {
            Host::Address(address) => [SocketAddr::new(address, proxy.address.port)].into(),
            Host::Name(_) => [].into(),
        };
        Ok(Self {
            address: proxy.address.clone(),
            login,
            setup: SocketSetup::of(&proxy.socket, broker),
            found: Mutex::new(found),
        })
    }

    /// Looks the proxy's name up, if it has one.
    pub(super) async fn look_up(&self) -> Result<Arc<[SocketAddr]>> {
        let Host::Name(name) = &self.address.host else {
            return Ok(self.found());
        };
        let found: Arc<[_]> = timeout(PROXY_TIMEOUT, lookup_host((name.as_str(), self.address.port)))
            .await
            .with_context(|| format!("nobody has answered what the address of {name} is"))?
            .with_context(|| format!("cannot find the address of {name}"))?
            .collect();
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = found.clone();
        Ok(found)
    }

    /// Connects to the proxy: to the first of its addresses that accepts.
    ///
    /// # Errors
    ///
    /// If none does, or the name has no address.
    pub(super) async fn connect(&self, client: Option<IpAddr>) -> Result<TcpStream> {
        let known = self.found();
        let mut failure = None;
        for &address in known.iter() {
            match self.connect_to(address, client).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = Some(error),
            }
        }
        // The name may mean another address by now.
        for &address in self
            .look_up()
            .await?
            .iter()
            .filter(|address| !known.contains(address))
        {
            match self.connect_to(address, client).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) => {
                Err(error).with_context(|| format!("cannot connect to the proxy {}", self.address))
            }
            None => bail!("the proxy {} has no address", self.address),
        }
    }

    async fn connect_to(&self, address: SocketAddr, client: Option<IpAddr>) -> io::Result<TcpStream> {
        let connected = timeout(PROXY_TIMEOUT, connect(&self.setup, address, client)).await;
        connected.unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)))
    }

    fn found(&self) -> Arc<[SocketAddr]> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Connects to `target` by a socket set up as `setup` says.
pub(super) async fn connect(
    setup: &SocketSetup,
    target: SocketAddr,
    client: Option<IpAddr>,
) -> io::Result<TcpStream> {
    let socket = setup.open(Transport::Tcp, target.ip(), client)?;
    socket.set_tcp_nodelay(true)?;
    TcpSocket::from_std_stream(socket.into()).connect(target).await
}

/// Puts passwords in the place of the files that they are in, for a process that cannot read those.
///
/// # Errors
///
/// If one of the files cannot be read.
pub(crate) fn read_passwords(egresses: &mut [tungate_config::Egress]) -> Result<()> {
    for egress in egresses {
        if let EgressKind::Socks5(proxy) | EgressKind::Http(proxy) = &mut egress.kind
            && let Some(login) = &mut proxy.login
        {
            login.password = Password::Inline(read_password(&login.password)?);
        }
    }
    Ok(())
}

fn read_password(password: &Password) -> Result<String> {
    match password {
        Password::Inline(password) => Ok(password.clone()),
        Password::File(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the password file {}", path.display()))?;
            Ok(text.lines().next().unwrap_or_default().to_owned())
        }
    }
}
