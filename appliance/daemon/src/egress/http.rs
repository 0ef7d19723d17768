//! HTTP CONNECT as a client: RFC 9110, section 9.3.6, with the login of RFC 7617.

use std::net::SocketAddr;

use anyhow::{Context, anyhow};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tungate_engine::io::{Unreachable, UpstreamError};

use super::dialer::DialError;
use super::proxy::Login;

/// Longest head of an answer, in bytes.
const HEAD_MAX: usize = 16 << 10;
const FIELDS_MAX: usize = 64;

/// Asks the proxy at the other end of `stream` to connect to `target`. Afterwards the stream carries what the target
/// says, from its first byte.
pub(super) async fn connect(
    stream: &mut TcpStream,
    login: Option<&Login>,
    target: SocketAddr,
) -> Result<(), DialError> {
    let authorization = login.map_or(String::new(), |login| {
        let credentials = STANDARD.encode(format!("{}:{}", login.username, login.password));
        format!("Proxy-Authorization: Basic {credentials}\r\n")
    });
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .context("the proxy hung up")?;
    match read_status(stream).await? {
        200..=299 => Ok(()),
        401 | 407 => Err(match login {
            None => anyhow!("the proxy wants a login: give the egress a username and a password"),
            Some(login) => anyhow!("the proxy does not accept the login of {:?}", login.username),
        }
        .into()),
        403 => Err(DialError::Target(UpstreamError::Unreachable(
            Unreachable::Prohibited,
        ))),
        504 => Err(DialError::Target(UpstreamError::TimedOut)),
        // Proxies say 502 and 503 of targets that refuse and of those that cannot be reached.
        502 | 503 => Err(DialError::Target(UpstreamError::Refused)),
        status => Err(anyhow!("the proxy answers with status {status}").into()),
    }
}

/// Reads the head of an answer, and not a byte behind it: that may be the target's already.
async fn read_status(stream: &mut TcpStream) -> anyhow::Result<u16> {
    let mut head = Vec::new();
    let mut seen = [0; 1024];
    loop {
        let len = stream.peek(&mut seen).await.context("the proxy hung up")?;
        if len == 0 {
            return Err(anyhow!("the proxy hung up"));
        }
        let before = head.len();
        head.extend_from_slice(&seen[..len]);
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut response = httparse::Response::new(&mut fields);
        let parsed = response.parse(&head).context("the proxy's answer is no HTTP")?;
        let taken = match parsed {
            httparse::Status::Complete(head_len) => head_len - before,
            httparse::Status::Partial => len,
        };
        stream
            .read_exact(&mut seen[..taken])
            .await
            .context("the proxy hung up")?;
        if parsed.is_complete() {
            return response.code.context("the proxy's answer has no status");
        }
        if head.len() > HEAD_MAX {
            return Err(anyhow!(
                "the proxy's answer has a head of more than {HEAD_MAX} bytes"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What comes of an answer that arrives in these parts, the request, and what is left in the stream.
    fn answered(parts: &[&str], login: Option<&Login>) -> (Result<(), DialError>, String, String) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let proxy = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                for part in parts {
                    stream.write_all(part.as_bytes()).await.unwrap();
                    tokio::task::yield_now().await;
                }
                String::from_utf8(request).unwrap()
            };
            let target = "[2001:db8::7]:443".parse().unwrap();
            let (result, request) = tokio::join!(connect(&mut client, login, target), proxy);
            let mut rest = String::new();
            client.read_to_string(&mut rest).await.unwrap();
            (result, request, rest)
        })
    }

    #[test]
    fn connect_leaves_the_targets_first_byte_in_the_stream() {
        let parts = [
            "HTTP/1.1 200 Conn",
            "ection established\r\nVia: x\r\n",
            "\r\nSSH-2.0",
            "-server",
        ];
        let (result, request, rest) = answered(&parts, None);
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(
            request,
            "CONNECT [2001:db8::7]:443 HTTP/1.1\r\nHost: [2001:db8::7]:443\r\n\r\n"
        );
        assert_eq!(rest, "SSH-2.0-server");
    }

    #[test]
    fn login_goes_along() {
        let login = Login {
            username: "Aladdin".to_owned(),
            password: "open sesame".to_owned(),
        };
        let (result, request, _) = answered(&["HTTP/1.0 407 no\r\n\r\n"], Some(&login));
        assert!(matches!(result, Err(DialError::Egress(error)) if error.to_string().contains("Aladdin")));
        // The example of RFC 7617, section 2.
        assert!(
            request.contains("\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n"),
            "{request}"
        );
    }

    #[test]
    fn answers_that_are_no_http_are_errors() {
        for parts in [&["SSH-2.0-server\r\n"][..], &["HTTP/1.1 200 OK\r\n"], &[]] {
            assert!(matches!(answered(parts, None).0, Err(DialError::Egress(_))));
        }
    }
}
