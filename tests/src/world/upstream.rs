//! The driver and the upstreams behind it: they carry out commands, and do what the script says.

use tungate_engine::FlowId;
use tungate_engine::Protocol;
use tungate_engine::io::UpstreamEvent;

use super::datagrams::Sent;
use super::ledger::Upstream;
use super::{World, patterns};
use crate::recorder::Command;

impl World {
    pub(super) fn on_command(&mut self, id: FlowId, command: Command) {
        assert!(
            self.ledger.is_open(id),
            "flow {id} is closed, and gets {command:?}"
        );
        let record = self.ledger.record(id);
        assert!(
            matches!(record.upstream, Upstream::Connecting | Upstream::Open),
            "the upstream of flow {id} has ended ({:?}), and gets {command:?}",
            record.upstream
        );
        match command {
            Command::Open(open) => {
                assert_eq!(
                    (open.protocol, open.client, open.target, open.egress),
                    (record.protocol, record.client, record.target, None)
                );
            }
            Command::Readable => {
                assert!(!record.readable, "flow {id} is said to be readable twice");
                record.readable = true;
            }
            Command::Writable => {
                assert!(!record.writable, "flow {id} is said to be writable twice");
                assert!(
                    record.established,
                    "flow {id} is not established and said to be writable"
                );
                record.writable = true;
            }
            Command::CloseWrite => {
                assert!(!record.close_write, "flow {id} is told of FIN twice");
                record.close_write = true;
                let attempt = record.attempt.expect("FIN belongs to TCP");
                let taken = record.taken;
                let script = &self.scripts[&attempt];
                assert!(
                    script.client_closed && taken == script.client_sent,
                    "flow {id} is told of FIN after {taken} of {} bytes; closed: {}",
                    script.client_sent,
                    script.client_closed
                );
            }
            Command::Send {
                target,
                payload,
                segment_size,
                carriage,
            } => {
                assert_eq!(segment_size, None, "one datagram at a time");
                let sent = Sent::Datagram {
                    client: record.client,
                    target,
                    payload,
                };
                assert_eq!(carriage.hop_limit, crate::packet::HOP_LIMIT - 1);
                self.handling.to_upstream.push((id, sent));
            }
            Command::Echo {
                sequence,
                payload,
                carriage,
            } => {
                let sent = Sent::Ping {
                    client: record.client,
                    target: record.target.ip(),
                    sequence,
                    payload,
                };
                assert_eq!(carriage.hop_limit, crate::packet::HOP_LIMIT - 1);
                self.handling.to_upstream.push((id, sent));
            }
            Command::Close => {
                assert!(
                    record.protocol != Protocol::Tcp || (record.eof_told && record.close_write),
                    "flow {id} is closed in order, and an end is missing: {record:?}"
                );
                record.upstream = Upstream::Ended { aborted: false };
            }
            Command::Abort => {
                assert_eq!(record.protocol, Protocol::Tcp, "datagrams have nothing to abort");
                record.upstream = Upstream::Ended { aborted: true };
            }
        }
    }

    /// Lets every upstream do what it can now; whether one did anything.
    pub(super) fn serve_upstreams(&mut self) -> bool {
        let open: Vec<_> = self.ledger.open_flows().map(|(id, _)| id).collect();
        let mut busy = false;
        for id in open {
            if self.ledger.is_open(id) && self.ledger.record(id).protocol == Protocol::Tcp {
                busy |= self.serve(id);
            }
        }
        busy
    }

    fn serve(&mut self, id: FlowId) -> bool {
        let now = self.now;
        let record = self.ledger.record(id);
        let attempt = record.attempt.expect("a TCP flow belongs to a connection");
        let script = self.scripts[&attempt].clone();
        match record.upstream {
            Upstream::Connecting => {
                let Some(answer) = script.answer else {
                    return false;
                };
                record.moved = now;
                if let Some(error) = answer.error() {
                    record.upstream = Upstream::Failed(error);
                    self.tell(id, UpstreamEvent::Failed(error));
                } else {
                    record.upstream = Upstream::Open;
                    record.connected = Some(now);
                    self.tell(id, UpstreamEvent::Connected);
                }
                true
            }
            Upstream::Open if script.upstream_reset => {
                record.upstream = Upstream::Reset;
                self.tell(id, UpstreamEvent::Reset);
                true
            }
            Upstream::Open => {
                let takes = record.readable && !script.upstream_stalled;
                let gives = record.writable && record.given < script.upstream_sent;
                if takes {
                    self.take(id);
                }
                if gives {
                    self.give(id, script.upstream_sent);
                }
                if takes || gives {
                    self.flush();
                }
                if !self.ledger.is_open(id) {
                    return true;
                }
                let record = self.ledger.record(id);
                let ends = script.upstream_closed
                    && !record.eof_told
                    && record.given == script.upstream_sent
                    && record.upstream == Upstream::Open;
                if ends {
                    record.eof_told = true;
                    record.moved = now;
                    self.tell(id, UpstreamEvent::ReadClosed);
                }
                takes || gives || ends
            }
            Upstream::Failed(_) | Upstream::Reset | Upstream::Ended { .. } => false,
        }
    }

    /// Takes all bytes that wait.
    fn take(&mut self, id: FlowId) {
        let record = self.ledger.record(id);
        let attempt = record.attempt.expect("a TCP flow belongs to a connection");
        let (pattern, _) = patterns(attempt);
        loop {
            let at = record.taken;
            let most = self.setup.chunk as usize;
            let taken = self.engine.read(self.now, id, |bytes| {
                assert!(!bytes.is_empty(), "nothing is lent");
                let taken = bytes.len().min(most);
                if let Some(at) = pattern.mismatch(at, &bytes[..taken]) {
                    panic!("flow {id}: byte {at} from the client is not what was sent");
                }
                taken
            });
            if taken == 0 {
                record.readable = false;
                return;
            }
            record.taken += taken as u64;
            record.moved = self.now;
            let sent = self.scripts[&attempt].client_sent;
            assert!(
                record.taken <= sent,
                "flow {id}: {} bytes of {sent} have come",
                record.taken
            );
        }
    }

    /// Gives bytes until `end`, or until there is no room.
    fn give(&mut self, id: FlowId, end: u64) {
        let record = self.ledger.record(id);
        let (_, pattern) = patterns(record.attempt.expect("a TCP flow belongs to a connection"));
        while record.given < end {
            let (at, most) = (record.given, (end - record.given).min(self.setup.chunk.into()));
            let given = self.engine.write(self.now, id, |space| {
                assert!(!space.is_empty(), "no room is lent");
                let given = space.len().min(most as usize);
                pattern.fill(at, &mut space[..given]);
                given
            });
            if given == 0 {
                record.writable = false;
                return;
            }
            record.given += given as u64;
            record.moved = self.now;
        }
    }
}
