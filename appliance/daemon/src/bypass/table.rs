//! The table of rules that lets the kernel carry connections: linux/netfilter/nf_tables.h.
//!
//! It belongs to the socket that has made it, and goes with that. `nft list table inet tungate` shows it.
//!
//! A SYN that comes out of the device has been sent on by the engine: its addresses and ports go into a set, conntrack
//! makes an entry for it with our mark, and it leaves masqueraded. What a client sends between addresses and ports in the
//! set gets the mark that passes by the device; SYNs never do. All else that goes to the device or comes from it is
//! nothing to conntrack. Segments with SYN, FIN or RST, and ICMP errors, of connections with our mark are shown to the
//! worker.

use std::io;
use std::net::SocketAddr;

use nix::errno::Errno;
use tungate_engine::bypass::Ends;

use super::netlink::{
    ACK, APPEND, CREATE, EXCLUSIVE, FAMILY_INET, FAMILY_IPV4, FAMILY_IPV6, Messages, REQUEST, Reply, Socket,
    octets, replies,
};
use super::{ERROR, FROM_CLIENT, FROM_TARGET, LOG_GROUP, Opened, SEEN_LEN};
use crate::host::MARK;

const TABLE: &str = "tungate";
const SETS: [&str; 2] = ["flows4", "flows6"];
/// Connections that a set may hold; the engine's limits come before it.
const SET_MAX: u32 = 1 << 22;

const SUBSYSTEM: u16 = 10 << 8;
const NEW_TABLE: u16 = SUBSYSTEM;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const DELETE_ELEMENT: u16 = SUBSYSTEM | 14;

const OWNED: u32 = 2;
const DYNAMIC_SET: u32 = 0x20;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
/// Before conntrack (-200), behind it, and before other source translation (100).
const RAW: i32 = -300;
const MANGLE: i32 = -150;
const SOURCE: i32 = 99;
const FILTER: i32 = 0;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK_FLAG: u8 = 16;

const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const REDIRECT: u8 = 5;
const REDIRECT6: u8 = 137;

// Bits of a connection's state.
const INVALID: u32 = 1;
const NEW: u32 = 8;

/// Makes the table.
///
/// # Errors
///
/// The system's, with what could not be made.
pub(super) fn make(
    socket: &Socket,
    device: &str,
    interfaces: &[String],
    opened: &[Opened],
) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.table();
    for (index, key_len) in [16, 40].into_iter().enumerate() {
        batch.set(index, key_len);
    }
    steer(&mut batch, device, interfaces);
    mark(&mut batch, device, interfaces);
    batch.chain("masquerade", "nat", POSTROUTING, SOURCE);
    batch.rule("masquerade", |rule| {
        rule.interface(InterfaceOf::In, device)
            .ct_mark(true)
            .plain("masq");
    });
    watch(&mut batch, interfaces, opened);
    batch.carry_out(socket)
}

/// Which packets the kernel carries, and which it has nothing to do with.
fn steer(batch: &mut Batch, device: &str, interfaces: &[String]) {
    batch.chain("steer", "filter", PREROUTING, RAW);
    let begins = FIN | SYN | RST | ACK_FLAG;
    for (index, family) in [FAMILY_IPV4, FAMILY_IPV6].into_iter().enumerate() {
        batch.rule("steer", |rule| {
            let rule = rule.interface(InterfaceOf::In, device).protocol(family, TCP);
            rule.flags(begins, Equal, SYN)
                .ends(family)
                .add_to(index)
                .verdict(ACCEPT);
        });
    }
    // One that found no place in the set would go on under the client's own address.
    batch.rule("steer", |rule| {
        let rule = rule.interface(InterfaceOf::In, device).transport(TCP);
        rule.flags(begins, Equal, SYN).verdict(DROP);
    });
    batch.rule("steer", |rule| {
        rule.interface(InterfaceOf::In, device)
            .plain("notrack")
            .verdict(ACCEPT);
    });
    for interface in interfaces {
        for (index, family) in [FAMILY_IPV4, FAMILY_IPV6].into_iter().enumerate() {
            batch.rule("steer", |rule| {
                let rule = rule.interface(InterfaceOf::In, interface).protocol(family, TCP);
                let rule = rule.flags(begins, NotEqual, SYN).ends(family).find_in(index);
                rule.set_mark().verdict(ACCEPT);
            });
        }
        batch.rule("steer", |rule| {
            rule.interface(InterfaceOf::In, interface)
                .not_for_us()
                .plain("notrack");
        });
    }
}

/// Marks connections as ours, and drops what belongs to none.
fn mark(batch: &mut Batch, device: &str, interfaces: &[String]) {
    batch.chain("mark", "filter", PREROUTING, MANGLE);
    batch.rule("mark", |rule| {
        rule.interface(InterfaceOf::In, device).state(NEW).set_ct_mark();
    });
    for interface in interfaces {
        batch.rule("mark", |rule| {
            let rule = rule.interface(InterfaceOf::In, interface).mark();
            rule.state(NEW | INVALID).verdict(DROP);
        });
    }
}

/// What is shown to the worker, and what is kept from others.
fn watch(batch: &mut Batch, interfaces: &[String], opened: &[Opened]) {
    batch.chain("watch", "filter", FORWARD, MANGLE);
    batch.rule("watch", |rule| {
        rule.ct_mark(true).transport(TCP).flags(SYN, Equal, SYN).clamp();
    });
    for (direction, prefix) in [FROM_CLIENT, FROM_TARGET].into_iter().enumerate() {
        batch.rule("watch", |rule| {
            let rule = rule.ct_mark(true).direction(direction as u8).transport(TCP);
            let rule = rule.flags(FIN | SYN | RST, NotEqual, 0);
            rule.flags(FIN | SYN | RST | ACK_FLAG, NotEqual, SYN).log(prefix);
        });
    }
    // Behind the translation of what an error quotes.
    batch.chain("report", "filter", OUTPUT, FILTER);
    for chain in ["watch", "report"] {
        for protocol in [ICMP, ICMPV6] {
            batch.rule(chain, |rule| {
                rule.ct_mark(true).transport(protocol).log(ERROR);
            });
        }
    }
    for opened in opened {
        let family = if opened.ipv6 { FAMILY_IPV6 } else { FAMILY_IPV4 };
        batch.rule("watch", |rule| {
            let rule = rule.interface(InterfaceOf::In, &opened.interface).family(family);
            rule.ct_mark(false).verdict(DROP);
        });
    }
    // A client that a redirect sends to a neighbour directly would leave the translation of its own connection.
    for interface in interfaces {
        for (family, protocol, kind) in [(FAMILY_IPV4, ICMP, REDIRECT), (FAMILY_IPV6, ICMPV6, REDIRECT6)] {
            batch.rule("report", |rule| {
                let rule = rule
                    .interface(InterfaceOf::Out, interface)
                    .protocol(family, protocol);
                rule.load(TRANSPORT, 0, 1, 0)
                    .compare(0, Equal, &[kind])
                    .verdict(DROP);
            });
        }
    }
}

/// Takes a connection out of its set, if it is there.
///
/// # Errors
///
/// The system's.
pub(super) fn remove(
    socket: &Socket,
    messages: &mut Messages,
    ends: &Ends,
    buffer: &mut [u8],
) -> io::Result<()> {
    messages.clear();
    messages.begin_batch();
    let number = messages.begin(DELETE_ELEMENT, REQUEST | ACK, FAMILY_INET, 0);
    let index = usize::from(matches!(ends.client, SocketAddr::V6(_)));
    messages.put_text(1, TABLE);
    messages.put_text(2, SETS[index]);
    let mut key = Vec::new();
    for end in [ends.client, ends.target] {
        key.extend_from_slice(&octets(end.ip()));
        key.extend_from_slice(&end.port().to_be_bytes());
        key.extend_from_slice(&[0, 0]);
    }
    messages.nest(3, |list| {
        list.nest(1, |element| element.nest(1, |data| data.put(1, &key)));
    });
    messages.end_batch();
    socket.send(messages)?;
    match socket.result(number, buffer)? {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Changes that are made together.
#[derive(Default)]
struct Batch {
    messages: Messages,
    /// What is made, by the numbers of the messages.
    parts: Vec<(u32, String)>,
}

impl Batch {
    fn begin(&mut self, part: String, kind: u16, flags: u16) -> &mut Messages {
        if self.parts.is_empty() {
            self.messages.begin_batch();
        }
        let number = self.messages.begin(kind, REQUEST | ACK | flags, FAMILY_INET, 0);
        self.parts.push((number, part));
        &mut self.messages
    }

    fn table(&mut self) {
        let messages = self.begin(format!("table inet {TABLE}"), NEW_TABLE, CREATE | EXCLUSIVE);
        messages.put_text(1, TABLE);
        messages.put_u32(2, OWNED);
    }

    fn set(&mut self, index: usize, key_len: u32) {
        let name = SETS[index];
        let messages = self.begin(format!("set {name}"), NEW_SET, CREATE | EXCLUSIVE);
        // What nft calls `ipv4_addr . inet_service . ipv4_addr . inet_service`, and the same for IPv6.
        let (address, port) = (7 + index as u32, 13);
        let kind = [address, port, address, port]
            .iter()
            .fold(0, |kind, part| kind << 6 | part);
        messages.put_text(1, TABLE);
        messages.put_text(2, name);
        messages.put_u32(3, DYNAMIC_SET);
        messages.put_u32(4, kind);
        messages.put_u32(5, key_len);
        messages.nest(9, |description| description.put_u32(1, SET_MAX));
        messages.put_u32(10, index as u32 + 1);
    }

    fn chain(&mut self, name: &str, kind: &str, hook: u32, priority: i32) {
        let messages = self.begin(format!("chain {name}"), NEW_CHAIN, CREATE | EXCLUSIVE);
        messages.put_text(1, TABLE);
        messages.put_text(3, name);
        messages.nest(4, |place| {
            place.put_u32(1, hook);
            place.put(2, &priority.to_be_bytes());
        });
        messages.put_u32(5, ACCEPT);
        messages.put_text(7, kind);
    }

    fn rule(&mut self, chain: &str, write: impl FnOnce(Rule<'_>)) {
        let messages = self.begin(format!("rule in chain {chain}"), NEW_RULE, CREATE | APPEND);
        messages.put_text(1, TABLE);
        messages.put_text(2, chain);
        messages.nest(4, |messages| write(Rule { messages }));
    }

    fn carry_out(mut self, socket: &Socket) -> io::Result<()> {
        self.messages.end_batch();
        socket.send(&mut self.messages)?;
        let mut buffer = vec![0; 1 << 16];
        let mut left = self.parts.len();
        while left > 0 {
            for reply in replies(socket.receive(&mut buffer)?) {
                let Reply::Result(number, result) = reply else {
                    continue;
                };
                left -= 1;
                if let Err(error) = result {
                    let part = self.parts.iter().find(|(of, _)| *of == number);
                    let part = part.map_or("table", |(_, part)| part);
                    let error = io::Error::from(error);
                    return Err(io::Error::new(error.kind(), format!("{part}: {error}")));
                }
            }
        }
        Ok(())
    }
}

/// A rule that is being written. Each call adds a condition, or what is done if all before it hold.
struct Rule<'a> {
    messages: &'a mut Messages,
}

use Comparison::{Equal, NotEqual};

#[derive(Debug, Clone, Copy)]
enum Comparison {
    Equal = 0,
    NotEqual = 1,
}

#[derive(Debug, Clone, Copy)]
enum InterfaceOf {
    In = 6,
    Out = 7,
}

/// Bases of a packet's bytes.
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// Registers have four bytes each, from this one on.
const FIRST_REGISTER: u32 = 8;

impl Rule<'_> {
    fn expression(self, name: &str, write: impl FnOnce(&mut Messages)) -> Self {
        self.messages.nest(1, |element| {
            element.put_text(1, name);
            element.nest(2, write);
        });
        self
    }

    fn plain(self, name: &str) -> Self {
        self.expression(name, |_| ())
    }

    fn meta(self, key: u32, register: u32) -> Self {
        self.expression("meta", |data| {
            data.put_u32(1, FIRST_REGISTER + register);
            data.put_u32(2, key);
        })
    }

    fn load(self, base: u32, offset: u32, len: u32, register: u32) -> Self {
        self.expression("payload", |data| {
            data.put_u32(1, FIRST_REGISTER + register);
            data.put_u32(2, base);
            data.put_u32(3, offset);
            data.put_u32(4, len);
        })
    }

    fn compare(self, register: u32, comparison: Comparison, value: &[u8]) -> Self {
        self.expression("cmp", |data| {
            data.put_u32(1, FIRST_REGISTER + register);
            data.put_u32(2, comparison as u32);
            data.nest(3, |operand| operand.put(1, value));
        })
    }

    /// Keeps the bits of register 0 that are in `mask`.
    fn mask(self, mask: &[u8]) -> Self {
        self.expression("bitwise", |data| {
            data.put_u32(1, FIRST_REGISTER);
            data.put_u32(2, FIRST_REGISTER);
            data.put_u32(3, mask.len() as u32);
            data.nest(4, |operand| operand.put(1, mask));
            data.nest(5, |operand| operand.put(1, &vec![0; mask.len()]));
        })
    }

    fn interface(self, of: InterfaceOf, name: &str) -> Self {
        let mut padded = [0; 16];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        self.meta(of as u32, 0).compare(0, Equal, &padded)
    }

    fn family(self, family: u8) -> Self {
        self.meta(15, 0).compare(0, Equal, &[family])
    }

    fn transport(self, protocol: u8) -> Self {
        self.meta(16, 0).compare(0, Equal, &[protocol])
    }

    fn protocol(self, family: u8, protocol: u8) -> Self {
        self.family(family).transport(protocol)
    }

    fn flags(self, mask: u8, comparison: Comparison, flags: u8) -> Self {
        self.load(TRANSPORT, 13, 1, 0)
            .mask(&[mask])
            .compare(0, comparison, &[flags])
    }

    /// Loads addresses and ports, in the order of a set's key.
    fn ends(self, family: u8) -> Self {
        let (source, destination, len) = if family == FAMILY_IPV4 {
            (12, 16, 4)
        } else {
            (8, 24, 16)
        };
        let words = len / 4;
        self.load(NETWORK, source, len, 0)
            .load(TRANSPORT, 0, 2, words)
            .load(NETWORK, destination, len, words + 1)
            .load(TRANSPORT, 2, 2, 2 * words + 1)
    }

    fn add_to(self, set: usize) -> Self {
        self.expression("dynset", |data| {
            data.put_text(1, SETS[set]);
            data.put_u32(2, set as u32 + 1);
            data.put_u32(3, 0);
            data.put_u32(4, FIRST_REGISTER);
        })
    }

    fn find_in(self, set: usize) -> Self {
        self.expression("lookup", |data| {
            data.put_text(1, SETS[set]);
            data.put_u32(2, FIRST_REGISTER);
            data.put_u32(4, set as u32 + 1);
        })
    }

    fn immediate(self, register: u32, value: &[u8]) -> Self {
        self.expression("immediate", |data| {
            data.put_u32(1, FIRST_REGISTER + register);
            data.nest(2, |operand| operand.put(1, value));
        })
    }

    fn verdict(self, verdict: u32) {
        self.expression("immediate", |data| {
            data.put_u32(1, 0);
            data.nest(2, |operand| operand.nest(2, |code| code.put_u32(1, verdict)));
        });
    }

    /// Numbers in registers have the host's order.
    fn mark(self) -> Self {
        self.meta(3, 0).compare(0, Equal, &MARK.to_ne_bytes())
    }

    fn set_mark(self) -> Self {
        self.immediate(0, &MARK.to_ne_bytes()).expression("meta", |data| {
            data.put_u32(2, 3);
            data.put_u32(3, FIRST_REGISTER);
        })
    }

    fn ct(self, key: u32) -> Self {
        self.expression("ct", |data| {
            data.put_u32(1, FIRST_REGISTER);
            data.put_u32(2, key);
        })
    }

    /// Which way the packet goes: 0 as the connection's first.
    fn direction(self, direction: u8) -> Self {
        self.ct(1).compare(0, Equal, &[direction])
    }

    /// Whether the connection is ours.
    fn ct_mark(self, is_ours: bool) -> Self {
        let comparison = if is_ours { Equal } else { NotEqual };
        self.ct(3).compare(0, comparison, &MARK.to_ne_bytes())
    }

    fn set_ct_mark(self) -> Self {
        self.immediate(0, &MARK.to_ne_bytes()).expression("ct", |data| {
            data.put_u32(2, 3);
            data.put_u32(4, FIRST_REGISTER);
        })
    }

    fn state(self, bits: u32) -> Self {
        self.ct(0).mask(&bits.to_ne_bytes()).compare(0, NotEqual, &[0; 4])
    }

    /// Whether the packet goes further than this host.
    fn not_for_us(self) -> Self {
        const LOCAL: u32 = 2;
        let kind = self.expression("fib", |data| {
            data.put_u32(1, FIRST_REGISTER);
            data.put_u32(2, 3);
            data.put_u32(3, 2);
        });
        kind.compare(0, NotEqual, &LOCAL.to_ne_bytes())
    }

    /// Lowers a SYN's largest segment size to what the route takes.
    fn clamp(self) {
        let size = self.expression("rt", |data| {
            data.put_u32(1, FIRST_REGISTER);
            data.put_u32(2, 3);
        });
        let size = size.expression("byteorder", |data| {
            data.put_u32(1, FIRST_REGISTER);
            data.put_u32(2, FIRST_REGISTER);
            data.put_u32(3, 1);
            data.put_u32(4, 2);
            data.put_u32(5, 2);
        });
        size.expression("exthdr", |data| {
            data.put(2, &[2]);
            data.put_u32(3, 2);
            data.put_u32(4, 2);
            data.put_u32(6, 1);
            data.put_u32(7, FIRST_REGISTER);
        });
    }

    fn log(self, prefix: &str) {
        self.expression("log", |data| {
            data.put(1, &LOG_GROUP.to_be_bytes());
            data.put_text(2, prefix);
            data.put_u32(3, SEEN_LEN);
        });
    }
}
