//! SOCKS5 as a client: RFC 1928, with the login of RFC 1929.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, anyhow, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tungate_engine::io::{Unreachable, UpstreamError};

use super::dialer::DialError;
use super::proxy::{Login, PROXY_TIMEOUT};

const VERSION: u8 = 5;
const LOGIN_VERSION: u8 = 1;
const NO_LOGIN: u8 = 0;
const LOGIN: u8 = 2;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const ASSOCIATE: u8 = 3;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// Longest header of a datagram: reserved, fragment, type, IPv6 address, port.
pub(crate) const DATAGRAM_HEADER_MAX: usize = 22;

/// Asks the proxy at the other end of `stream` to connect to `target`. Afterwards the stream carries what the target
/// says, from its first byte.
pub(super) async fn connect(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    login: Option<&Login>,
    target: SocketAddr,
) -> Result<(), DialError> {
    in_time(negotiate(stream, login)).await?;
    // The answer takes as long as the target does; the flow's connect timeout bounds it.
    request(stream, CONNECT, target).await?;
    Ok(())
}

/// Asks the proxy at the other end of `stream` to relay datagrams, and returns where it does.
pub(super) async fn associate(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    login: Option<&Login>,
) -> Result<SocketAddr, DialError> {
    in_time(negotiate(stream, login)).await?;
    // The address and port that datagrams will come from are not known yet (RFC 1928, section 7: all zeros).
    let anywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    match timeout(PROXY_TIMEOUT, request(stream, ASSOCIATE, anywhere)).await {
        Ok(answer) => answer,
        Err(_) => Err(anyhow!("the proxy does not answer").into()),
    }
}

/// Puts the header of a datagram for `target` into `header`, and returns its length (RFC 1928, section 7).
pub(crate) fn write_datagram_header(target: SocketAddr, header: &mut [u8; DATAGRAM_HEADER_MAX]) -> usize {
    let address = encode(target);
    header[..3].fill(0);
    header[3..3 + address.len()].copy_from_slice(&address);
    3 + address.len()
}

/// Takes a datagram from a relay apart: its source, and where its payload starts. `None` for what is no such datagram,
/// a fragment, or from a name.
pub(crate) fn parse_datagram(datagram: &[u8]) -> Option<(SocketAddr, usize)> {
    let &[0, 0, 0, kind, ref rest @ ..] = datagram else {
        return None;
    };
    let (ip, port): (IpAddr, _) = match kind {
        IPV4 => {
            let (ip, rest) = rest.split_first_chunk::<4>()?;
            (Ipv4Addr::from(*ip).into(), rest.first_chunk::<2>()?)
        }
        IPV6 => {
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            (Ipv6Addr::from(*ip).into(), rest.first_chunk::<2>()?)
        }
        _ => return None,
    };
    let start = if ip.is_ipv4() { 10 } else { DATAGRAM_HEADER_MAX };
    Some((SocketAddr::new(ip, u16::from_be_bytes(*port)), start))
}

async fn in_time(negotiation: impl Future<Output = anyhow::Result<()>>) -> Result<(), DialError> {
    match timeout(PROXY_TIMEOUT, negotiation).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(anyhow!("the proxy does not answer").into()),
    }
}

/// Agrees on a method and logs in.
async fn negotiate(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    login: Option<&Login>,
) -> anyhow::Result<()> {
    let methods: &[u8] = match login {
        None => &[VERSION, 1, NO_LOGIN],
        Some(_) => &[VERSION, 2, NO_LOGIN, LOGIN],
    };
    stream.write_all(methods).await.context("the proxy hung up")?;
    let [version, method] = read(stream).await?;
    if version != VERSION {
        bail!("this is no SOCKS5 proxy: it answers with version {version}");
    }
    match (method, login) {
        (NO_LOGIN, _) => Ok(()),
        (LOGIN, Some(login)) => log_in(stream, login).await,
        (NO_METHOD, None) => bail!("the proxy wants a login: give the egress a username and a password"),
        (NO_METHOD, Some(_)) => bail!("the proxy takes neither a user with a password nor one without"),
        (method, _) => bail!("the proxy chose the method {method}, which was not offered"),
    }
}

async fn log_in(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), login: &Login) -> anyhow::Result<()> {
    let mut message = vec![LOGIN_VERSION];
    for text in [&login.username, &login.password] {
        let len = u8::try_from(text.len()).context("user and password have at most 255 bytes each")?;
        message.push(len);
        message.extend_from_slice(text.as_bytes());
    }
    stream.write_all(&message).await.context("the proxy hung up")?;
    let [_, status] = read(stream).await?;
    if status != 0 {
        bail!("the proxy does not accept the login of {:?}", login.username);
    }
    Ok(())
}

/// Sends a request and returns the address in the answer.
async fn request(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    command: u8,
    target: SocketAddr,
) -> Result<SocketAddr, DialError> {
    let mut message = vec![VERSION, command, 0];
    message.extend_from_slice(&encode(target));
    stream.write_all(&message).await.context("the proxy hung up")?;
    let [version, status, _, kind] = read(stream).await?;
    if version != VERSION {
        return Err(anyhow!("the proxy answers with version {version}").into());
    }
    if status != 0 {
        return Err(refusal(status));
    }
    let ip: IpAddr = match kind {
        IPV4 => Ipv4Addr::from(read::<4>(stream).await?).into(),
        IPV6 => Ipv6Addr::from(read::<16>(stream).await?).into(),
        // The bound address of a connection is of no use here; a relay by name would be asked at the proxy itself.
        NAME => {
            let [len] = read(stream).await?;
            let mut name = vec![0; usize::from(len)];
            stream.read_exact(&mut name).await.context("the proxy hung up")?;
            Ipv4Addr::UNSPECIFIED.into()
        }
        kind => return Err(anyhow!("the proxy answers with an address of type {kind}").into()),
    };
    Ok(SocketAddr::new(ip, u16::from_be_bytes(read(stream).await?)))
}

/// RFC 1928, section 6: whose fault it is.
fn refusal(status: u8) -> DialError {
    match status {
        2 => DialError::Target(UpstreamError::Unreachable(Unreachable::Prohibited)),
        3 => DialError::Target(UpstreamError::Unreachable(Unreachable::Network)),
        4 | 6 => DialError::Target(UpstreamError::Unreachable(Unreachable::Host)),
        5 => DialError::Target(UpstreamError::Refused),
        7 => DialError::Egress(anyhow!("the proxy does not support the command")),
        8 => DialError::Egress(anyhow!("the proxy does not support this type of address")),
        // Servers say "general failure" of targets that time out, and of their own troubles.
        _ => DialError::Target(UpstreamError::Egress),
    }
}

/// Type, address and port.
fn encode(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(DATAGRAM_HEADER_MAX);
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.push(IPV4);
            bytes.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(IPV6);
            bytes.extend_from_slice(&ip.octets());
        }
    }
    bytes.extend_from_slice(&address.port().to_be_bytes());
    bytes
}

async fn read<const N: usize>(stream: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.context("the proxy hung up")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// Runs `client` against a proxy that expects and says these things by turns.
    fn talk<T>(script: &[(&[u8], &[u8])], client: impl AsyncFnOnce(&mut tokio::io::DuplexStream) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (mut ours, mut theirs) = duplex(1024);
            let proxy = async {
                for (expected, answer) in script {
                    let mut heard = vec![0; expected.len()];
                    theirs.read_exact(&mut heard).await.unwrap();
                    assert_eq!(heard, *expected);
                    theirs.write_all(answer).await.unwrap();
                }
            };
            tokio::join!(client(&mut ours), proxy).0
        })
    }

    fn login() -> Login {
        Login {
            username: "alice".to_owned(),
            password: "secret".to_owned(),
        }
    }

    #[test]
    fn connect_leaves_the_targets_first_byte_in_the_stream() {
        let script: &[(&[u8], &[u8])] = &[
            (&[5, 1, 0], &[5, 0]),
            (
                &[5, 1, 0, 1, 192, 0, 2, 7, 0, 80],
                &[5, 0, 0, 1, 10, 0, 0, 1, 4, 5, b'S'],
            ),
        ];
        talk(script, async |stream| {
            connect(stream, None, "192.0.2.7:80".parse().unwrap())
                .await
                .unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), b'S');
        });
    }

    #[test]
    fn login_is_offered_and_given() {
        let script: &[(&[u8], &[u8])] = &[
            (&[5, 2, 0, 2], &[5, 2]),
            (b"\x01\x05alice\x06secret", &[1, 0]),
            (
                &[
                    5, 1, 0, 4, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 1, 187,
                ],
                &[5, 0, 0, 3, 2, b'm', b'e', 0, 0],
            ),
        ];
        talk(script, async |stream| {
            let target = "[2001:db8::7]:443".parse().unwrap();
            connect(stream, Some(&login()), target).await.unwrap();
        });
    }

    #[test]
    fn rejected_login_is_the_ways_failure() {
        let script: &[(&[u8], &[u8])] = &[(&[5, 2, 0, 2], &[5, 2]), (b"\x01\x05alice\x06secret", &[1, 1])];
        let error = talk(script, async |stream| {
            connect(stream, Some(&login()), "192.0.2.7:80".parse().unwrap()).await
        });
        assert!(matches!(error, Err(DialError::Egress(error)) if error.to_string().contains("alice")));
    }

    #[test]
    fn refused_target_is_told_from_a_failed_proxy() {
        for (status, expected) in [
            (5, UpstreamError::Refused),
            (4, UpstreamError::Unreachable(Unreachable::Host)),
            (3, UpstreamError::Unreachable(Unreachable::Network)),
            (2, UpstreamError::Unreachable(Unreachable::Prohibited)),
        ] {
            let answer = [5, status, 0, 1, 0, 0, 0, 0, 0, 0];
            let script: &[(&[u8], &[u8])] = &[
                (&[5, 1, 0], &[5, 0]),
                (&[5, 1, 0, 1, 192, 0, 2, 7, 0, 80], &answer),
            ];
            let error = talk(script, async |stream| {
                connect(stream, None, "192.0.2.7:80".parse().unwrap()).await
            });
            assert!(matches!(error, Err(DialError::Target(error)) if error == expected));
        }
    }

    #[test]
    fn datagrams_carry_their_address() {
        for address in ["192.0.2.7:53", "[2001:db8::7]:443"] {
            let address = address.parse().unwrap();
            let mut header = [0xff; DATAGRAM_HEADER_MAX];
            let len = write_datagram_header(address, &mut header);
            let datagram = [&header[..len], b"payload"].concat();
            let (source, start) = parse_datagram(&datagram).unwrap();
            assert_eq!((source, &datagram[start..]), (address, &b"payload"[..]));
            for cut in 0..len {
                assert_eq!(parse_datagram(&datagram[..cut]), None);
            }
        }
        assert_eq!(
            parse_datagram(&[0, 0, 1, 1, 1, 2, 3, 4, 0, 53]),
            None,
            "a fragment"
        );
    }
}
