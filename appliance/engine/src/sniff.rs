//! What a client calls its server, read from the first bytes of a connection.
//!
//! Two protocols say it in the clear: TLS, in the server name indication of the ClientHello (RFC 6066, section 3;
//! with Encrypted ClientHello it is the outer name), and HTTP/1, in the Host field (RFC 9110, section 7.2). A
//! ClientHello may be spread over records and both over segments, so bytes are taken as they come and kept, up to
//! a limit, only while the answer is open.

/// Bytes after which the search is given up. A ClientHello with post-quantum keys takes about 2,000.
const LIMIT: usize = 16 << 10;

/// Longest method before the first space of a request: none registered is longer than 17.
const METHOD_MAX: usize = 24;

/// Looks for the server's name in what a client sends first.
#[derive(Debug, Default)]
pub(crate) struct Sniffer(State);

/// What is known after some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sniffed {
    /// More bytes are needed.
    More,
    /// The name: a DNS name in lower case without the last dot. The search is over.
    Name(String),
    /// These bytes name no server. The search is over.
    Nothing,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Start,
    Tls(Records),
    Http(Head),
    Done,
}

impl Sniffer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes. Allocates only where a name is found or bytes have to be kept.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Sniffed {
        if matches!(self.0, State::Start) {
            match bytes.first() {
                None => return Sniffed::More,
                Some(&Records::HANDSHAKE) => self.0 = State::Tls(Records::default()),
                Some(b'A'..=b'Z') => self.0 = State::Http(Head::default()),
                Some(_) => self.0 = State::Done,
            }
        }
        let sniffed = match &mut self.0 {
            State::Start | State::Done => Sniffed::Nothing,
            State::Tls(records) => records.push(bytes),
            State::Http(head) => head.push(bytes),
        };
        if sniffed != Sniffed::More {
            self.0 = State::Done;
        }
        sniffed
    }
}

/// A handshake message that comes in TLS records.
#[derive(Debug, Default)]
struct Records {
    /// Header of the record that is being read, as far as it has come.
    header: [u8; 5],
    header_len: usize,
    /// Bytes of that record still to come.
    left: usize,
    /// The message so far.
    message: Vec<u8>,
}

impl Records {
    const HANDSHAKE: u8 = 22;
    const CLIENT_HELLO: u8 = 1;

    fn push(&mut self, mut bytes: &[u8]) -> Sniffed {
        loop {
            if self.left == 0 {
                let missing = self.header.len() - self.header_len;
                let (header, rest) = bytes.split_at(bytes.len().min(missing));
                self.header[self.header_len..][..header.len()].copy_from_slice(header);
                self.header_len += header.len();
                bytes = rest;
                if self.header_len < self.header.len() {
                    return Sniffed::More;
                }
                let [kind, major, _, high, low] = self.header;
                self.left = usize::from(u16::from_be_bytes([high, low]));
                // RFC 8446, section 5.1: no empty handshake records, and none above 2^14.
                if kind != Self::HANDSHAKE || major != 3 || !(1..=1 << 14).contains(&self.left) {
                    return Sniffed::Nothing;
                }
                self.header_len = 0;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(self.left));
            self.left -= part.len();
            bytes = rest;
            // The usual case, one record in one piece, is read where it lies.
            let sniffed = if self.message.is_empty() {
                sniff_message(part)
            } else {
                self.message.extend_from_slice(part);
                sniff_message(&self.message)
            };
            if sniffed != Sniffed::More {
                return sniffed;
            }
            if self.message.is_empty() {
                self.message.extend_from_slice(part);
            }
            if bytes.is_empty() {
                return Sniffed::More;
            }
        }
    }
}

/// Looks at a handshake message, which may still be cut short.
fn sniff_message(message: &[u8]) -> Sniffed {
    let Some((&kind, rest)) = message.split_first() else {
        return Sniffed::More;
    };
    if kind != Records::CLIENT_HELLO {
        return Sniffed::Nothing;
    }
    let Some((&[a, b, c], rest)) = rest.split_first_chunk() else {
        return Sniffed::More;
    };
    let len = u32::from_be_bytes([0, a, b, c]) as usize;
    if len > LIMIT {
        return Sniffed::Nothing;
    }
    match rest.get(..len) {
        None => Sniffed::More,
        Some(hello) => server_name(hello)
            .and_then(dns_name)
            .map_or(Sniffed::Nothing, Sniffed::Name),
    }
}

/// Finds the host name in a ClientHello (RFC 8446, section 4.1.2).
fn server_name(hello: &[u8]) -> Option<&[u8]> {
    const EXTENSION: u16 = 0;
    const HOST_NAME: u8 = 0;
    let mut hello = Fields(hello);
    hello.take(2 + 32)?; // version and random
    hello.vector::<1>()?; // session
    hello.vector::<2>()?; // cipher suites
    hello.vector::<1>()?; // compression methods
    let mut extensions = Fields(hello.vector::<2>()?);
    loop {
        let kind = extensions.number::<2>()?;
        let extension = extensions.vector::<2>()?;
        if kind == usize::from(EXTENSION) {
            let mut names = Fields(Fields(extension).vector::<2>()?);
            loop {
                let kind = names.number::<1>()?;
                let name = names.vector::<2>()?;
                if kind == usize::from(HOST_NAME) {
                    return Some(name);
                }
            }
        }
    }
}

/// Reads TLS structures from the front; `None` where they end too early.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }

    /// A number of `N` bytes.
    fn number<const N: usize>(&mut self) -> Option<usize> {
        Some(
            self.take(N)?
                .iter()
                .fold(0, |number, &byte| number << 8 | usize::from(byte)),
        )
    }

    /// A vector whose length comes first, in `N` bytes.
    fn vector<const N: usize>(&mut self) -> Option<&'a [u8]> {
        let len = self.number::<N>()?;
        self.take(len)
    }
}

/// The head of an HTTP request.
#[derive(Debug, Default)]
struct Head {
    /// What has come so far, once it was not complete in one piece.
    bytes: Vec<u8>,
    /// Where the line begins that is not complete yet.
    line: usize,
    /// Where to go on looking for its end.
    searched: usize,
}

impl Head {
    fn push(&mut self, bytes: &[u8]) -> Sniffed {
        let room = LIMIT - self.bytes.len();
        let is_last = bytes.len() >= room;
        let bytes = &bytes[..bytes.len().min(room)];
        let sniffed = if self.bytes.is_empty() {
            let sniffed = self.sniff(bytes);
            if sniffed == Sniffed::More {
                self.bytes.extend_from_slice(bytes);
            }
            sniffed
        } else {
            let mut head = std::mem::take(&mut self.bytes);
            head.extend_from_slice(bytes);
            let sniffed = self.sniff(&head);
            self.bytes = head;
            sniffed
        };
        if sniffed == Sniffed::More && is_last {
            Sniffed::Nothing
        } else {
            sniffed
        }
    }

    /// Reads the lines that have become complete in `head`.
    fn sniff(&mut self, head: &[u8]) -> Sniffed {
        while let Some(len) = head[self.searched..].iter().position(|&byte| byte == b'\n') {
            let end = self.searched + len;
            let line = &head[self.line..end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if self.line == 0 {
                if !line.ends_with(b" HTTP/1.1") && !line.ends_with(b" HTTP/1.0") {
                    return Sniffed::Nothing;
                }
            } else if line.is_empty() {
                return Sniffed::Nothing; // the end of the head
            } else if let Some((name, value)) = line.split_first_chunk::<5>()
                && name.eq_ignore_ascii_case(b"host:")
            {
                return dns_name(without_port(value.trim_ascii())).map_or(Sniffed::Nothing, Sniffed::Name);
            }
            self.line = end + 1;
            self.searched = self.line;
        }
        self.searched = head.len();
        if self.line == 0 && !may_be_request(head) {
            Sniffed::Nothing
        } else {
            Sniffed::More
        }
    }
}

/// Whether an incomplete first line may become an HTTP request's: other protocols that begin with a capital letter
/// are not waited for.
fn may_be_request(line: &[u8]) -> bool {
    let start = &line[..line.len().min(METHOD_MAX)];
    let method = start.split(|&byte| byte == b' ').next().unwrap_or_default();
    method
        .iter()
        .all(|&byte| byte.is_ascii_uppercase() || byte == b'-')
        && method.len() < METHOD_MAX
}

fn without_port(host: &[u8]) -> &[u8] {
    match host.iter().position(|&byte| byte == b':') {
        Some(colon) => &host[..colon],
        None => host,
    }
}

/// Makes sure that `name` is a DNS name and no address, and puts it into lower case (RFC 1123, section 2.1; with
/// underscores, which hosts do use).
pub(crate) fn dns_name(name: &[u8]) -> Option<String> {
    let name = name.strip_suffix(b".").unwrap_or(name);
    let is_label = |label: &[u8]| {
        (1..=63).contains(&label.len())
            && label
                .iter()
                .all(|&byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with(b"-")
            && !label.ends_with(b"-")
    };
    let mut labels = name.split(|&byte| byte == b'.');
    if name.len() > 253 || !labels.clone().all(is_label) {
        return None;
    }
    if labels.next_back()?.iter().all(u8::is_ascii_digit) {
        return None; // an IPv4 address
    }
    String::from_utf8(name.to_ascii_lowercase()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::*;

    proptest! {
        #[test]
        fn name_is_found_however_the_bytes_are_cut(
            https: bool,
            cuts in vec(any::<Index>(), 0..8),
            record_len in 1..400usize,
        ) {
            let stream = if https {
                records(&client_hello(Some("Www.Example.COM")), record_len)
            } else {
                b"GET /index.html HTTP/1.1\r\nUser-Agent: x\r\nhost:  Www.Example.COM:8080 \r\n\r\n".to_vec()
            };
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let mut sniffer = Sniffer::new();
            let mut found = Sniffed::More;
            for cut in cuts.windows(2) {
                if found == Sniffed::More {
                    found = sniffer.push(&stream[cut[0]..cut[1]]);
                }
            }
            prop_assert_eq!(found, Sniffed::Name("www.example.com".into()));
        }

        #[test]
        fn any_bytes_end_the_search_within_the_limit(
            start in select(vec![&b""[..], b"\x16\x03\x01", b"\x16\x03\x01\x40\x00\x01", b"GET ", b"GET / HTTP/1.1\r\n"]),
            parts in vec(vec(any::<u8>(), 0..300), 0..120),
        ) {
            let mut sniffer = Sniffer::new();
            let mut given = 0;
            let start = start.to_vec();
            for part in std::iter::once(&start).chain(&parts) {
                let sniffed = sniffer.push(part);
                given += part.len();
                prop_assert!(sniffed != Sniffed::More || given < LIMIT + (1 << 14) + 5);
                if sniffed != Sniffed::More {
                    prop_assert_eq!(sniffer.push(part), Sniffed::Nothing);
                    break;
                }
            }
        }
    }

    #[test]
    fn client_hello_without_a_name_names_nothing() {
        assert_eq!(sniff(&records(&client_hello(None), 500)), Sniffed::Nothing);
    }

    #[test]
    fn name_that_is_no_dns_name_is_nothing() {
        for name in [
            "",
            "192.0.2.7",
            "a..b",
            "-a.example",
            "a b.example",
            "ex\u{e4}mple",
            &"a".repeat(64),
        ] {
            assert_eq!(
                sniff(&records(&client_hello(Some(name)), 500)),
                Sniffed::Nothing,
                "{name:?}"
            );
        }
        assert_eq!(
            sniff(b"GET / HTTP/1.1\r\nHost: [2001:db8::7]:80\r\n\r\n"),
            Sniffed::Nothing
        );
    }

    #[test]
    fn last_dot_and_port_are_not_part_of_the_name() {
        let name = Sniffed::Name("example.com".into());
        assert_eq!(sniff(b"GET / HTTP/1.0\nHost: example.com.:443\n\n"), name);
    }

    #[test]
    fn request_without_host_ends_the_search_at_its_empty_line() {
        assert_eq!(sniff(b"GET / HTTP/1.1\r\nAccept: */*\r\n"), Sniffed::More);
        assert_eq!(
            sniff(b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\nHost: late.example\r\n"),
            Sniffed::Nothing
        );
    }

    #[test]
    fn other_protocols_are_not_waited_for() {
        for first in [
            &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
            b"\x00\x01",
            b"PRI * HTTP/2.0\r\n\r\n",
            b"EHLO_",
            b"A\0\0\0",
        ] {
            assert_eq!(sniff(first), Sniffed::Nothing, "{}", first.escape_ascii());
        }
    }

    #[test]
    fn record_that_is_no_handshake_ends_the_search() {
        let mut stream = records(&client_hello(Some("example.com")), 40);
        stream[45] = 23; // the second record's type: application data
        assert_eq!(sniff(&stream), Sniffed::Nothing);
    }

    fn sniff(bytes: &[u8]) -> Sniffed {
        Sniffer::new().push(bytes)
    }

    fn client_hello(name: Option<&str>) -> Vec<u8> {
        let mut extensions = extension(16, &[0, 3, 2, b'h', b'2']);
        if let Some(name) = name {
            let entry = [&[0], &(name.len() as u16).to_be_bytes()[..], name.as_bytes()].concat();
            extensions.extend(extension(
                0,
                &[&(entry.len() as u16).to_be_bytes()[..], &entry].concat(),
            ));
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(32);
        body.extend([8; 32]);
        body.extend([0, 4, 0x13, 0x01, 0x13, 0x02, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1, 0];
        message.extend((body.len() as u16).to_be_bytes());
        message.extend(body);
        message
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), body].concat()
    }

    fn records(message: &[u8], len: usize) -> Vec<u8> {
        let record = |part: &[u8]| [&[22, 3, 1], &(part.len() as u16).to_be_bytes()[..], part].concat();
        message.chunks(len).flat_map(record).collect()
    }
}
