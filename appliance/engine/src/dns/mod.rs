//! What clients learn by DNS: which name an address had when they asked for it.
//!
//! Questions and answers are relayed like any other bytes; here they are only read. An answer counts if this client
//! asked this server this question under this identifier, and then for this client alone: whoever lies to one client
//! changes what is said of no other. Of an answer the records count that lead from the question's name to addresses,
//! by way of aliases, in the order in which they stand: what stub resolvers take of it (RFC 1034, section 5.3.1). Only
//! the first 64 records are looked at, so that no message costs more than a few microseconds.
//!
//! Messages are read by the `domain` crate, which takes them apart in place: it needs no allocation, no standard
//! library and no entropy, bounds compressed names, and is fuzzed by its makers. What it cannot read teaches nothing.

mod names;
mod stream;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::{Message, ParsedName, ToName};
use domain::rdata::{A, Aaaa, Cname};
use serde::{Deserialize, Serialize};

pub(crate) use names::Names;
pub(crate) use stream::Conversation;

use crate::addr::IngressId;
use crate::sniff::dns_name;

/// Where servers listen, over UDP and TCP.
pub const PORT: u16 = 53;

/// Records of an answer that are looked at.
const RECORDS_MAX: usize = 64;
/// Questions of one flow that may wait for their answers; the oldest goes first. Forwarders ask many from one port.
const QUESTIONS_MAX: usize = 32;
/// A time to live with its first bit set counts as zero (RFC 2181, section 8); more than this is not believed.
const TTL_MAX: Duration = Duration::from_secs(86_400);

/// What one answer has told one client: addresses that a name has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    /// Where the client is.
    pub ingress: IngressId,
    /// The client that asked; nobody else is concerned.
    pub client: IpAddr,
    /// The name that it asked for, in lower case without the last dot.
    pub name: String,
    /// Its addresses, each with the time it may be kept.
    pub addresses: Vec<(IpAddr, Duration)>,
}

/// An answer to a question that was asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) name: String,
    pub(crate) addresses: Vec<(IpAddr, Duration)>,
}

impl Answer {
    /// What `client` has learned from it.
    pub(crate) fn for_client(self, ingress: IngressId, client: IpAddr) -> Learned {
        let Self { name, addresses } = self;
        Learned {
            ingress,
            client,
            name,
            addresses,
        }
    }
}

/// What a client has asked in one flow and was not told yet.
#[derive(Debug, Default)]
pub(crate) struct Questions(VecDeque<Question>);

#[derive(Debug, PartialEq, Eq)]
struct Question {
    server: SocketAddr,
    id: u16,
    kind: Rtype,
    name: String,
}

impl Questions {
    /// Takes note of what a client sends to `server`, if it asks for addresses.
    pub(crate) fn on_message(&mut self, server: SocketAddr, message: &[u8]) {
        let Some(message) = read(message).filter(|message| !message.header().qr()) else {
            return;
        };
        let Some(question) = question(message, server) else {
            return;
        };
        if self.0.len() == QUESTIONS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(question);
    }

    /// Takes note of what `server` sends: the answer, if it is one to a question of these.
    pub(crate) fn on_answer(&mut self, server: SocketAddr, message: &[u8]) -> Option<Answer> {
        let message = read(message)?;
        // A client asks again by TCP what did not fit.
        if !message.header().qr() || message.header().tc() {
            return None;
        }
        let question = question(message, server)?;
        let place = self.0.iter().position(|asked| *asked == question)?;
        self.0.remove(place);
        if message.header().rcode() != Rcode::NOERROR {
            return None;
        }
        let addresses = addresses(message, question.kind)?;
        (!addresses.is_empty()).then_some(Answer {
            name: question.name,
            addresses,
        })
    }
}

fn read(message: &[u8]) -> Option<&Message<[u8]>> {
    let message = Message::from_slice(message).ok()?;
    (message.header().opcode() == Opcode::QUERY).then_some(message)
}

/// The one question of a message, if it is for addresses of something that may be the name of a host.
fn question(message: &Message<[u8]>, server: SocketAddr) -> Option<Question> {
    let question = message.sole_question().ok()?;
    let kind = question.qtype();
    if question.qclass() != Class::IN || (kind != Rtype::A && kind != Rtype::AAAA) {
        return None;
    }
    Some(Question {
        server,
        id: message.header().id(),
        kind,
        name: host_name(question.qname())?,
    })
}

/// A name as text. One with other letters than hosts have could not be told from others in a log, and is none.
fn host_name(name: &ParsedName<&[u8]>) -> Option<String> {
    let mut text = Vec::new();
    for label in name.iter().filter(|label| !label.is_root()) {
        if label.as_slice().contains(&b'.') {
            return None;
        }
        text.extend_from_slice(label.as_slice());
        text.push(b'.');
    }
    dns_name(&text)
}

/// The addresses that an answer gives to its question's name.
fn addresses(message: &Message<[u8]>, kind: Rtype) -> Option<Vec<(IpAddr, Duration)>> {
    let mut addresses = Vec::new();
    let mut owner = *message.sole_question().ok()?.qname();
    let mut alias_ttl = TTL_MAX;
    for record in message.answer().ok()?.take(RECORDS_MAX) {
        // What cannot be read ends the answer; what came before it is told.
        let Ok(record) = record else { break };
        if record.class() != Class::IN || !record.owner().name_eq(&owner) {
            continue;
        }
        let ttl = match record.ttl().as_secs() {
            seconds if seconds >> 31 == 0 => Duration::from_secs(seconds.into()).min(alias_ttl),
            _ => Duration::ZERO,
        };
        if let Ok(Some(alias)) = record.to_record::<Cname<_>>() {
            owner = *alias.data().cname();
            alias_ttl = ttl;
        } else if kind == Rtype::A
            && let Ok(Some(address)) = record.to_record::<A>()
        {
            addresses.push((address.data().addr().into(), ttl));
        } else if kind == Rtype::AAAA
            && let Ok(Some(address)) = record.to_record::<Aaaa>()
        {
            addresses.push((address.data().addr().into(), ttl));
        }
    }
    Some(addresses)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const SERVER: &str = "192.0.2.53:53";
    const A: u16 = 1;
    const CNAME: u16 = 5;
    const AAAA: u16 = 28;

    /// A record: owner, type, time to live and data.
    pub(crate) type Record<'a> = (&'a str, u16, u32, &'a [u8]);

    /// A name on the wire, not compressed (RFC 1035, section 3.1).
    pub(crate) fn wire(name: &str) -> Vec<u8> {
        let mut wire = Vec::new();
        for label in name.split('.').filter(|label| !label.is_empty()) {
            wire.push(label.len() as u8);
            wire.extend_from_slice(label.as_bytes());
        }
        wire.push(0);
        wire
    }

    /// A message (RFC 1035, section 4) with one question; `flags` are the header's second two bytes.
    pub(crate) fn message(id: u16, flags: u16, name: &str, kind: u16, records: &[Record<'_>]) -> Vec<u8> {
        let mut message = Vec::new();
        for field in [id, flags, 1, records.len() as u16, 0, 0] {
            message.extend_from_slice(&field.to_be_bytes());
        }
        message.extend(wire(name));
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&1_u16.to_be_bytes());
        for (owner, kind, ttl, data) in records {
            message.extend(wire(owner));
            message.extend_from_slice(&kind.to_be_bytes());
            message.extend_from_slice(&1_u16.to_be_bytes());
            message.extend_from_slice(&ttl.to_be_bytes());
            message.extend_from_slice(&(data.len() as u16).to_be_bytes());
            message.extend_from_slice(data);
        }
        message
    }

    pub(crate) const ASKS: u16 = 0x0100;
    pub(crate) const ANSWERS: u16 = 0x8180;

    fn server() -> SocketAddr {
        SERVER.parse().unwrap()
    }

    fn asked(name: &str, kind: u16) -> Questions {
        let mut questions = Questions::default();
        questions.on_message(server(), &message(7, ASKS, name, kind, &[]));
        questions
    }

    fn seconds(address: &str, seconds: u64) -> (IpAddr, Duration) {
        (address.parse().unwrap(), Duration::from_secs(seconds))
    }

    #[test]
    fn an_answer_names_its_addresses_after_the_question() {
        let mut questions = asked("WWW.Example.org", A);
        let records: &[Record<'_>] = &[
            ("www.example.org", A, 300, &[192, 0, 2, 1]),
            ("www.EXAMPLE.org", A, 60, &[192, 0, 2, 2]),
        ];
        let answer = message(7, ANSWERS, "www.example.ORG", A, records);
        let expected = Answer {
            name: "www.example.org".into(),
            addresses: vec![seconds("192.0.2.1", 300), seconds("192.0.2.2", 60)],
        };
        assert_eq!(questions.on_answer(server(), &answer), Some(expected));
        assert_eq!(
            questions.on_answer(server(), &answer),
            None,
            "it was answered before"
        );
    }

    #[test]
    fn aliases_lead_from_the_name_to_addresses_and_bound_their_time() {
        let mut questions = asked("www.example.org", AAAA);
        let address = "2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
        let records: &[Record<'_>] = &[
            ("www.example.org", CNAME, 30, &wire("edge.cdn.test")),
            ("edge.cdn.test", AAAA, 300, &address),
            ("other.cdn.test", AAAA, 300, &[9; 16]),
        ];
        let answer = questions.on_answer(server(), &message(7, ANSWERS, "www.example.org", AAAA, records));
        assert_eq!(answer.unwrap().addresses, [seconds("2001:db8::1", 30)]);
    }

    #[test]
    fn what_was_not_asked_is_not_believed() {
        let records: &[Record<'_>] = &[("bank.test", A, 300, &[192, 0, 2, 1])];
        let good = message(7, ANSWERS, "bank.test", A, records);
        let elsewhere = "192.0.2.54:53".parse().unwrap();
        let answers = [
            (elsewhere, good.clone(), "from another server"),
            (
                server(),
                message(8, ANSWERS, "bank.test", A, records),
                "another identifier",
            ),
            (
                server(),
                message(7, ANSWERS, "other.test", A, records),
                "another question",
            ),
            (
                server(),
                message(7, ASKS, "bank.test", A, records),
                "no answer at all",
            ),
            (server(), message(7, 0x8380, "bank.test", A, records), "cut short"),
            (server(), good[..11].to_vec(), "not even a header"),
        ];
        let mut questions = asked("bank.test", A);
        for (server, answer, why) in answers {
            assert_eq!(questions.on_answer(server, &answer), None, "{why}");
        }
        assert!(questions.on_answer(server(), &good).is_some());

        let strangers: &[Record<'_>] = &[("victim.test", A, 300, &[192, 0, 2, 1])];
        let answer = message(7, ANSWERS, "bank.test", A, strangers);
        assert_eq!(
            asked("bank.test", A).on_answer(server(), &answer),
            None,
            "another's record"
        );
        let failed = message(7, 0x8183, "bank.test", A, records);
        assert_eq!(
            asked("bank.test", A).on_answer(server(), &failed),
            None,
            "no such name"
        );
    }

    #[test]
    fn names_that_could_be_taken_for_others_are_none() {
        let mut message = message(7, ASKS, "aXb.test", A, &[]);
        let place = message.iter().position(|&byte| byte == b'X').unwrap();
        for byte in [b'.', b'\n', b' ', 0, 0xff] {
            message[place] = byte;
            let mut questions = Questions::default();
            questions.on_message(server(), &message);
            assert!(questions.0.is_empty(), "{byte:#04x}");
        }
    }

    #[test]
    fn compression_that_goes_round_in_circles_ends() {
        let mut answer = message(7, ANSWERS, "a.test", A, &[("", A, 300, &[192, 0, 2, 1])]);
        // The owner, a single zero behind the question, becomes a pointer to itself.
        let owner = 12 + wire("a.test").len() + 4;
        answer.splice(owner..=owner, [0xc0, owner as u8]);
        assert_eq!(asked("a.test", A).on_answer(server(), &answer), None);
    }

    #[test]
    fn only_the_first_records_are_looked_at() {
        let records = vec![("many.test", A, 300, &[192, 0, 2, 1][..]); 3000];
        let answer = message(7, ANSWERS, "many.test", A, &records);
        let addresses = asked("many.test", A)
            .on_answer(server(), &answer)
            .unwrap()
            .addresses;
        assert_eq!(addresses.len(), RECORDS_MAX);
    }

    #[test]
    fn a_client_that_only_asks_costs_a_bounded_number_of_questions() {
        let mut questions = Questions::default();
        for id in 0..1000 {
            questions.on_message(server(), &message(id, ASKS, "example.org", A, &[]));
        }
        assert_eq!(questions.0.len(), QUESTIONS_MAX);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in vec(any::<u8>(), 0..200)) {
            let mut questions = asked("example.org", A);
            questions.on_message(server(), &bytes);
            questions.on_answer(server(), &bytes);
        }

        #[test]
        fn a_damaged_answer_tells_nothing_or_names_what_was_asked(
            damage in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<proptest::sample::Index>(),
        ) {
            let records: &[Record<'_>] = &[
                ("example.org", CNAME, 30, &wire("edge.test")),
                ("edge.test", A, 300, &[192, 0, 2, 1]),
            ];
            let mut answer = message(7, ANSWERS, "example.org", A, records);
            for (at, byte) in damage {
                let at = at.index(answer.len());
                answer[at] = byte;
            }
            answer.truncate(cut.index(answer.len() + 1));
            if let Some(answer) = asked("example.org", A).on_answer(server(), &answer) {
                prop_assert_eq!(answer.name, "example.org");
            }
        }
    }
}
