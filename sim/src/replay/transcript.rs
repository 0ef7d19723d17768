//! The transcript: what goes into and comes out of the engine, a line each, for people.

use std::fmt;

use tungate_engine::io::{UpstreamCommand, UpstreamEvent};
use tungate_engine::packet::{IcmpMessage, PacketView, TcpFlags, Transport};
use tungate_engine::policy::Action;
use tungate_engine::{Event, FlowId};

/// One line, without its time.
pub(super) enum Line<'a> {
    PacketIn(&'a [u8]),
    PacketOut(&'a [u8]),
    Upstream(FlowId, &'a UpstreamEvent<'a>),
    Command(FlowId, &'a UpstreamCommand<'a>),
    /// The upstream took bytes.
    Read(FlowId, usize),
    /// The upstream gave bytes.
    Write(FlowId, usize),
    Event(&'a Event),
    /// Another policy is in force, by its place in the order of changes.
    Policy(u16),
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PacketIn(packet) => write!(f, "in   packet    {}", Summary(packet)),
            Self::PacketOut(packet) => write!(f, "out  packet    {}", Summary(packet)),
            Self::Upstream(flow, event) => {
                write!(f, "in   upstream  #{flow} ")?;
                match event {
                    UpstreamEvent::Connected => f.write_str("connected"),
                    UpstreamEvent::Failed(error) => write!(f, "failed: {error:?}"),
                    UpstreamEvent::ReadClosed => f.write_str("fin"),
                    UpstreamEvent::Reset => f.write_str("reset"),
                    UpstreamEvent::Datagram { source, payload, .. } => {
                        write!(f, "datagram from {source} len {}", payload.len())
                    }
                    UpstreamEvent::EchoReply { sequence, payload } => {
                        write!(f, "echo reply {sequence} len {}", payload.len())
                    }
                    UpstreamEvent::Error { target, error, .. } => {
                        write!(f, "error about {target}: {error:?}")
                    }
                }
            }
            Self::Command(flow, command) => {
                write!(f, "out  upstream  #{flow} ")?;
                match command {
                    UpstreamCommand::Open(open) => write!(f, "open {} {}", open.protocol, open.target),
                    UpstreamCommand::Readable => f.write_str("readable"),
                    UpstreamCommand::Writable => f.write_str("writable"),
                    UpstreamCommand::CloseWrite => f.write_str("fin"),
                    UpstreamCommand::Send { target, payload, .. } => {
                        write!(f, "send to {target} len {}", payload.len())
                    }
                    UpstreamCommand::Echo {
                        sequence, payload, ..
                    } => {
                        write!(f, "echo {sequence} len {}", payload.len())
                    }
                    UpstreamCommand::Close => f.write_str("close"),
                    UpstreamCommand::Abort => f.write_str("abort"),
                }
            }
            Self::Read(flow, len) => write!(f, "out  bytes     #{flow} len {len}"),
            Self::Write(flow, len) => write!(f, "in   bytes     #{flow} len {len}"),
            Self::Event(event) => {
                f.write_str("out  event     ")?;
                match event {
                    Event::Dropped { reason, flow, .. } => {
                        write!(f, "dropped: {reason}")?;
                        flow.map_or(Ok(()), |flow| write!(f, " #{flow}"))
                    }
                    Event::Opened {
                        flow,
                        protocol,
                        client,
                        target,
                        action,
                        ..
                    } => {
                        write!(
                            f,
                            "opened #{flow} {protocol} {client} > {target} {}",
                            action.name()
                        )?;
                        match action {
                            Action::Redirect(to) => write!(f, " to {to}"),
                            Action::Direct | Action::Egress(_) | Action::Reject | Action::Drop => Ok(()),
                        }
                    }
                    Event::Established { flow } => write!(f, "established #{flow}"),
                    Event::Closed {
                        flow,
                        reason,
                        to_upstream,
                        to_client,
                    } => {
                        write!(
                            f,
                            "closed #{flow}: {}, {to_upstream} up, {to_client} down",
                            reason.name()
                        )
                    }
                    Event::Named { flow, name, source } => {
                        write!(f, "named #{flow} {name} by {}", source.name())
                    }
                }
            }
            Self::Policy(index) => write!(f, "in   policy    {index}"),
        }
    }
}

/// A packet in one line.
struct Summary<'a>(&'a [u8]);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(view) = PacketView::parse(self.0) else {
            return write!(f, "unreadable len {}", self.0.len());
        };
        let (source, destination) = (view.source(), view.destination());
        let ends = |ports: (u16, u16)| {
            (
                std::net::SocketAddr::new(source, ports.0),
                std::net::SocketAddr::new(destination, ports.1),
            )
        };
        match view.transport() {
            Ok(Transport::Tcp(tcp)) => {
                let (source, destination) = ends((tcp.source_port, tcp.destination_port));
                write!(f, "{source} > {destination} {}", Flags(tcp.flags))?;
                write!(
                    f,
                    " seq {} ack {} win {}",
                    tcp.sequence, tcp.acknowledgment, tcp.window
                )?;
                match tcp.payload.len() {
                    0 => Ok(()),
                    len => write!(f, " len {len}"),
                }
            }
            Ok(Transport::Udp(udp)) => {
                let (source, destination) = ends((udp.source_port, udp.destination_port));
                write!(f, "{source} > {destination} UDP len {}", udp.payload.len())
            }
            Ok(Transport::Icmp(icmp)) => {
                write!(f, "{source} > {destination} ICMP ")?;
                match icmp.message {
                    IcmpMessage::EchoRequest(echo) => write!(f, "echo {} {}", echo.identifier, echo.sequence),
                    IcmpMessage::EchoReply(echo) => {
                        write!(f, "echo reply {} {}", echo.identifier, echo.sequence)
                    }
                    IcmpMessage::Error { error, .. } => write!(f, "{error:?}"),
                    IcmpMessage::Other { kind, code } => write!(f, "type {kind} code {code}"),
                }
            }
            Err(_) => write!(f, "{source} > {destination} len {}", view.bytes().len()),
        }
    }
}

struct Flags(TcpFlags);

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (TcpFlags::SYN, "SYN"),
            (TcpFlags::FIN, "FIN"),
            (TcpFlags::RST, "RST"),
            (TcpFlags::PSH, "PSH"),
            (TcpFlags::ACK, "ACK"),
            (TcpFlags::URG, "URG"),
            (TcpFlags::ECE, "ECE"),
            (TcpFlags::CWR, "CWR"),
        ];
        let set = names.iter().filter(|(bit, _)| self.0.0 & bit != 0);
        for (index, (_, name)) in set.enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}
