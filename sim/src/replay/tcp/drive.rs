//! Playing TCP flows: captured packets in, and what client and upstream do about what comes out.

use tungate_engine::io::{IcmpError, UpstreamCommand, UpstreamError, UpstreamEvent};
use tungate_engine::packet::{IcmpMessage, PacketView, TcpFlags, Transport};
use tungate_engine::{DropReason, Input};

use super::captured::{Captured, CapturedSegment};
use super::client::Wants;
use super::rewrite::{Header, Made};
use super::upstream::{Answer, State};
use super::{FIRST, TcpFlow};
use crate::replay::Midstream;
use crate::replay::card::Anomaly;
use crate::replay::item::{Judged, Packet};
use crate::replay::repair::Soundness;
use crate::replay::shard::{Assessed, Shard};
use crate::replay::stage::Flow;
use crate::replay::stream::SYN;
use crate::replay::timer::Timer;
use crate::replay::transcript::Line;

/// Bytes of an IPv4 and of an IPv6 packet's headers, without options, in a segment of an Ethernet's size.
const ETHERNET_MSS: [u16; 2] = [1460, 1440];

impl TcpFlow {
    /// Another connection begins on the same 4-tuple.
    pub(in super::super) fn make_room_for(&mut self, successor: u32) {
        self.successor = Some(successor);
    }

    /// Answers a segment that acknowledges something of an earlier connection (RFC 9293, section 3.10.7.3).
    pub(in super::super) fn refuse_stray(&mut self, acknowledgment: u32) {
        self.client.wants = Wants {
            reset: Some(acknowledgment),
            ..Wants::default()
        };
    }

    /// Sends the SYN once more.
    pub(in super::super) fn repeat_syn(&mut self) {
        self.client.wants.syn = true;
    }

    /// Takes a command of the engine's.
    pub(in super::super) fn on_command(&mut self, command: &UpstreamCommand<'_>) {
        let upstream = &mut self.upstream;
        match command {
            UpstreamCommand::Open(_) => upstream.state = State::Opening,
            UpstreamCommand::Readable => upstream.readable = true,
            UpstreamCommand::Writable => upstream.writable = true,
            UpstreamCommand::CloseWrite => {}
            UpstreamCommand::Close | UpstreamCommand::Abort => {
                // What waits to be read is still read: it was there before.
                upstream.end();
            }
            UpstreamCommand::Send { .. } | UpstreamCommand::Echo { .. } => {}
        }
    }
}

impl Shard {
    // ---- from the client ---------------------------------------------------------------------------------------

    /// Plays a packet that was captured from the client.
    pub(in super::super) fn tcp_from_client(
        &mut self,
        slot: u32,
        packet: &Packet,
        ip: &mut [u8],
        segment: Option<&CapturedSegment>,
    ) -> Judged {
        let Some(CapturedSegment { header, soundness }) = segment else {
            return self.no_segment_from_client(slot, packet, ip);
        };
        let assessed = self.note_soundness(*soundness);
        if assessed.is_sound() && !self.prepare(slot, header) {
            return self.raw(slot, ip, assessed);
        }
        self.translate(
            slot,
            &mut ip[header.transport..],
            (header.acknowledgment, header.window),
        );
        if !assessed.is_sound() {
            return self.raw(slot, ip, assessed);
        }
        let flow = self.stage.tcp(slot).expect("asked of a TCP flow");
        let at = flow.position_of_client(header);
        let held = flow.hold(header, at);
        if header.flags.rst() {
            flow.client.begin_reset();
        }
        let judgement = match held {
            None => self.judge(&ip[..header.end], assessed.state()),
            Some(keep) => {
                let mut scratch = std::mem::take(&mut self.scratch);
                header.write_cut(ip, keep, &mut scratch);
                let judgement = self.judge(&scratch, assessed.state());
                self.scratch = scratch;
                judgement
            }
        };
        let verdict = self.note_judgement(slot, &judgement);
        if !matches!(judgement.dropped, None | Some(DropReason::TcpWindow)) {
            return verdict;
        }
        let (now, real) = (self.now, header.real(ip));
        let flow = self
            .stage
            .tcp(slot)
            .expect("flows last as long as their conversation");
        flow.on_sent(now, header, at, held, real);
        self.stage.attend(slot);
        self.settle();
        let flow = self
            .stage
            .tcp(slot)
            .expect("flows last as long as their conversation");
        flow.keep(header, at, real);
        flow.client.arm(now);
        verdict
    }

    /// A packet of the client's that carries no segment that can be read.
    fn no_segment_from_client(&mut self, slot: u32, packet: &Packet, ip: &[u8]) -> Judged {
        let assessed = match PacketView::parse(ip) {
            Ok(view) => self.assess(packet, &view, &view.transport()),
            Err(_) => Assessed::UNREAD,
        };
        self.raw(slot, ip, assessed)
    }

    /// Gives the engine a packet as it is: nothing of it can be understood, or nothing has to be.
    fn raw(&mut self, slot: u32, ip: &[u8], assessed: Assessed) -> Judged {
        let judgement = self.judge(ip, assessed.state());
        self.note_judgement(slot, &judgement)
    }

    /// Translates numbers, window and options of a captured segment, as far as they mean something to the engine.
    fn translate(&mut self, slot: u32, tcp: &mut [u8], (acknowledgment, window): (u32, u16)) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        let flags = TcpFlags(tcp[13]);
        let server = flow.upstream.origin;
        let mut header = Header::new(tcp);
        if flags.ack()
            && !flags.syn()
            && let Some(server) = server
        {
            let position = server.position(acknowledgment, flow.client.received.max(SYN));
            if let Some((number, field)) = flow.client.translate(position, window) {
                header.set_acknowledgment(number);
                header.set_window(field);
            }
        }
        let client = &flow.client;
        let removed = header.clean_options(|edge| match server {
            Some(server) => client.translate_edge(server, edge),
            None => edge,
        });
        header.finish();
        if removed.authentication {
            flow.card.anomalies.add(Anomaly::Authentication);
        }
    }

    /// Sees to it that the flow is as far as a captured segment shows it to be. Returns whether the segment is one of
    /// the flow's at all.
    fn prepare(&mut self, slot: u32, header: &Captured) -> bool {
        let Some(flow) = self.stage.tcp(slot) else {
            return false;
        };
        flow.note_header(header);
        let flags = header.flags;
        if flags.syn() && !flags.ack() {
            return flow.prepare_syn(header);
        }
        if flags.syn() {
            flow.card.anomalies.add(Anomaly::SplitHandshake);
            return false;
        }
        if flow.client.origin.is_none() {
            if flags.rst() || flow.is_inbound() || self.midstream == Midstream::Refuse {
                flow.card.anomalies.add(Anomaly::NoSyn);
                return false;
            }
            let server = flags.ack().then_some(header.acknowledgment);
            // A packet with one byte is a keep-alive, whose byte lies below the stream.
            let is_keep_alive = header.payload.len() == 1 && !flags.fin();
            flow.began_empty = header.payload.is_empty() && !flags.fin();
            if is_keep_alive {
                flow.card.anomalies.add(Anomaly::KeepAlive);
            }
            let first = header.sequence.wrapping_add(u32::from(is_keep_alive));
            self.adopt(slot, first, server);
        }
        let Some(flow) = self.stage.tcp(slot) else {
            return false;
        };
        if flags.ack() && !flags.rst() {
            if flow.upstream.origin.is_none() {
                flow.upstream.begin(header.acknowledgment.wrapping_sub(1));
            }
            if flow.upstream.state == State::Opening && flow.upstream.answer.is_none() {
                // Whoever acknowledges a SYN-ACK has got one.
                flow.upstream.answer = Some(Answer::Connected);
                flow.card.anomalies.add(Anomaly::NoSynAck);
                self.stage.attend(slot);
                self.settle();
            }
        }
        true
    }

    /// Shakes hands for a connection whose SYN was not captured. `first` is the client's next sequence number,
    /// `server` the server's, where that is known.
    fn adopt(&mut self, slot: u32, first: u32, server: Option<u32>) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        flow.card.anomalies.add(Anomaly::NoSyn);
        flow.upstream.wait_for_syn = Timer::OFF;
        flow.client.begin(first.wrapping_sub(1));
        flow.client.on_adopted(flow.upstream.scales());
        if flow.upstream.origin.is_none()
            && let Some(server) = server
        {
            flow.upstream.begin(server.wrapping_sub(1));
        }
        flow.upstream.answer.get_or_insert(Answer::Connected);
        self.send_syn(slot);
        self.stage.attend(slot);
        self.settle();
    }

    /// Sends a SYN of the model's own making.
    fn send_syn(&mut self, slot: u32) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        let Some(origin) = flow.client.origin else { return };
        let [high, low] = ETHERNET_MSS[usize::from(flow.card.client.is_ipv6())].to_be_bytes();
        let mut options = vec![2, 4, high, low, 1, 1, 4, 2];
        if let Some(shift) = flow.client.offered_shift {
            options.extend_from_slice(&[1, 3, 3, shift]);
        }
        let made = Made {
            client: flow.card.client,
            target: flow.card.target,
            sequence: origin.number(SYN),
            acknowledgment: 0,
            flags: TcpFlags::SYN,
            window: u16::MAX,
            options: &options,
            payload: &[],
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        made.write(&mut scratch);
        self.stage.current = Some(slot);
        let judgement = self.judge(&scratch, tungate_engine::io::ChecksumState::Trusted);
        self.note_judgement(slot, &judgement);
        self.scratch = scratch;
    }

    // ---- from the target ---------------------------------------------------------------------------------------

    /// Plays a packet that was captured on its way to the client.
    pub(in super::super) fn tcp_from_target(
        &mut self,
        slot: u32,
        packet: &Packet,
        ip: &[u8],
        segment: Option<&CapturedSegment>,
    ) {
        let Some(CapturedSegment { header, soundness }) = segment else {
            return self.no_segment_from_target(slot, packet, ip);
        };
        if *soundness == Soundness::Wrong {
            return; // lost on the way
        }
        let now = self.now;
        let Some(flow) = self.stage.tcp(slot) else { return };
        flow.note_header(header);
        if header.flags.rst() {
            return flow.on_captured_reset(header);
        }
        if header.flags.syn() && !flow.on_captured_syn_ack(now, header) {
            return;
        }
        if flow.upstream.origin.is_none() {
            flow.upstream.begin(header.sequence.wrapping_sub(1));
        }
        let carries = !header.payload.is_empty() || header.flags.fin();
        if flow.client.origin.is_none() {
            let is_answer = header.flags.ack() && !header.flags.syn();
            if !carries || !is_answer || self.midstream == Midstream::Refuse {
                return;
            }
            // Something goes on here, so the client's SYN is not merely late.
            self.adopt(slot, header.acknowledgment, None);
        }
        let real = header.real(ip);
        let Some(flow) = self.stage.tcp(slot) else { return };
        let discarded = flow.on_script(now, header, real);
        self.counts.totals.discarded_after_reset += discarded;
    }

    /// An error about the client's SYN means that the target cannot be reached.
    fn no_segment_from_target(&mut self, slot: u32, packet: &Packet, ip: &[u8]) {
        let Ok(view) = PacketView::parse(ip) else { return };
        let transport = view.transport();
        if let Ok(Transport::Icmp(icmp)) = &transport
            && let IcmpMessage::Error {
                error: IcmpError::Unreachable(why),
                ..
            } = &icmp.message
            && !self.is_lost(packet, &view, &transport)
            && let Some(flow) = self.stage.tcp(slot)
            && flow.upstream.state == State::Opening
        {
            flow.upstream.answer.get_or_insert(Answer::Unreachable(*why));
        }
    }

    // ---- time --------------------------------------------------------------------------------------------------

    /// Does what a flow's timers are due for.
    pub(in super::super) fn on_tcp_timer(&mut self, slot: u32) {
        let now = self.now;
        let Some(flow) = self.stage.tcp(slot) else { return };
        if flow.client.acknowledge_at.is_due(now) {
            flow.client.on_acknowledge_timer();
        }
        if flow.client.resend_at.is_due(now) {
            flow.client.on_resend_timer(now);
        }
        if let Some(end) = flow.client.gaps.take_due(now, flow.client.captured_end()) {
            flow.fill_client_gaps(end);
        }
        if let Some(end) = flow.upstream.gaps.take_due(now, flow.upstream.captured_end()) {
            flow.fill_target_gaps(end);
        }
        if flow.upstream.wait_for_syn.is_due(now) {
            let first = flow.upstream.expected;
            self.adopt(slot, first, None);
        }
    }

    /// The capture has ended.
    pub(in super::super) fn end_tcp_capture(&mut self, slot: u32) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        if flow.upstream.wait_for_syn.is_on() {
            let first = flow.upstream.expected;
            self.adopt(slot, first, None);
        }
        let Some(flow) = self.stage.tcp(slot) else { return };
        flow.client.settle();
        if !flow.client.is_over {
            flow.fill_client_gaps(flow.client.captured_end());
        }
        flow.fill_target_gaps(flow.upstream.captured_end());
    }

    // ---- what the peers do -------------------------------------------------------------------------------------

    /// Has client and upstream of a flow do what they have to do.
    pub(in super::super) fn react(&mut self, slot: u32) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        flow.waits = false;
        self.answer_connect(slot);
        self.read(slot);
        self.write(slot);
        self.speak(slot);
        self.stage.attend(slot);
    }

    fn answer_connect(&mut self, slot: u32) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        let (Some(id), State::Opening, Some(answer)) =
            (flow.card.engine, flow.upstream.state, flow.upstream.answer)
        else {
            return;
        };
        let event = match answer {
            Answer::Connected => UpstreamEvent::Connected,
            Answer::Refused => UpstreamEvent::Failed(UpstreamError::Refused),
            Answer::Unreachable(why) => UpstreamEvent::Failed(UpstreamError::Unreachable(why)),
        };
        if answer == Answer::Connected {
            flow.upstream.state = State::Connected;
            flow.relayed = true;
        } else {
            flow.upstream.state = State::Gone;
        }
        self.call(Input::Upstream(id, event));
    }

    /// The upstream takes what waits for it.
    fn read(&mut self, slot: u32) {
        loop {
            let (now, wants_lines) = (self.now, self.stage.wanted.lines);
            let stage = &mut self.stage;
            let Some(Some(Flow::Tcp(flow))) = stage.flows.get_mut(slot as usize) else {
                return;
            };
            let Some(id) = flow.card.engine.filter(|_| flow.upstream.readable) else {
                return;
            };
            let (upstream, fillers) = (&mut flow.upstream, &mut flow.client.fillers);
            self.is_flushed = false;
            let taken = self.host.read(now, id, &mut stage.digest, |bytes| {
                let at = upstream.taken.max(FIRST);
                upstream.delivered.take(at, bytes, fillers);
                upstream.taken = at + bytes.len() as u64;
                fillers.forget_before(upstream.taken);
            });
            if taken == 0 {
                flow.upstream.readable = false;
                return;
            }
            if wants_lines {
                self.stage.line(Line::Read(id, taken));
            }
        }
    }

    /// The upstream gives what it has.
    fn write(&mut self, slot: u32) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        flow.upstream.writable = false;
        let (Some(id), State::Connected) = (flow.card.engine, flow.upstream.state) else {
            return;
        };
        loop {
            let Some(Flow::Tcp(flow)) = &mut self.stage.flows[slot as usize] else {
                return;
            };
            let pending = &mut flow.upstream.pending;
            if pending.is_empty() {
                break;
            }
            self.is_flushed = false;
            let given = self.host.write(self.now, id, |space| {
                let (first, _) = pending.as_slices();
                let len = first.len().min(space.len());
                space[..len].copy_from_slice(&first[..len]);
                if len == pending.len() {
                    pending.clear();
                } else {
                    pending.drain(..len);
                }
                len
            });
            if given == 0 {
                return;
            }
            self.stage.line(Line::Write(id, given));
        }
        let Some(flow) = self.stage.tcp(slot) else { return };
        let upstream = &mut flow.upstream;
        if upstream.has_eof() {
            self.call(Input::Upstream(id, UpstreamEvent::ReadClosed));
        } else if upstream.has_reset {
            upstream.end();
            self.call(Input::Upstream(id, UpstreamEvent::Reset));
        }
    }

    /// The client says what it has to say.
    fn speak(&mut self, slot: u32) {
        let Some(flow) = self.stage.tcp(slot) else { return };
        let wants = flow.client.wants;
        flow.client.wants.reset = None;
        flow.client.wants.syn = false;
        flow.client.wants.send_from = None;
        if let Some(sequence) = wants.reset {
            self.send(slot, |flow| flow.reset(sequence));
        }
        if wants.syn {
            self.send_syn(slot);
        }
        if let Some(from) = wants.send_from {
            self.send_kept(slot, from);
        }
        let Some(flow) = self.stage.tcp(slot) else { return };
        if flow.client.wants.acknowledge {
            self.send(slot, |flow| {
                let numbers = flow.client.numbers(flow.client.sent)?;
                Some(flow.made(numbers, TcpFlags::ACK, &[]))
            });
            if let Some(flow) = self.stage.tcp(slot) {
                flow.client.wants.acknowledge = false;
            }
        }
        let now = self.now;
        if let Some(flow) = self.stage.tcp(slot) {
            flow.client.arm(now);
        }
    }

    /// Sends what is kept from `from` on, as far as the window allows.
    fn send_kept(&mut self, slot: u32, mut from: u64) {
        loop {
            let mut sent = None;
            self.send(slot, |flow| {
                let numbers = flow.client.numbers(from)?;
                let (bytes, is_last) = flow.client.chunk(from)?;
                sent = Some((from + bytes.len() as u64, is_last));
                let fin = if is_last { TcpFlags::FIN } else { 0 };
                Some(flow.made(numbers, TcpFlags::ACK | fin, bytes))
            });
            let (Some((end, is_last)), Some(flow)) = (sent, self.stage.tcp(slot)) else {
                return;
            };
            flow.client.sent = flow.client.sent.max(end + u64::from(is_last));
            if is_last {
                return;
            }
            from = end;
        }
    }

    /// Gives the engine a segment of the client's own making.
    fn send(&mut self, slot: u32, make: impl FnOnce(&mut TcpFlow) -> Option<Made<'_>>) {
        let Self { stage, scratch, .. } = self;
        let Some(flow) = stage.tcp(slot) else { return };
        let Some(made) = make(flow) else { return };
        made.write(scratch);
        let scratch = std::mem::take(&mut self.scratch);
        self.judge(&scratch, tungate_engine::io::ChecksumState::Trusted);
        self.scratch = scratch;
    }
}
