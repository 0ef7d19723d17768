//! The upstream of a TCP flow: a server that sends what was captured from the server, and takes what the engine gives.
//!
//! Captured segments are its script. The first valid answer to the client's SYN decides what becomes of the engine's
//! connect; data is given to the engine in stream order as soon as it is contiguous, a FIN when everything before it
//! has been given, a reset at its time behind what was contiguous then. What the engine has no room for waits. A
//! keep-alive, a retransmission and bytes outside the window that the captured client had opened are no stream data.
//! (Some receivers take more than they have offered: such bytes count once the client has acknowledged them, if no
//! others have come for their place.) Of two bytes for one place the first stays.

use std::collections::VecDeque;
use std::ops::Range;

use tungate_engine::io::Unreachable;

use super::super::stream::{Delivered, Fillers, Fingerprint, Gaps, Held, Kind, Origin, SYN};
use super::super::timer::Timer;

/// Out-of-order bytes that may wait for a gap to close which nobody acknowledges.
const WAITING_MAX: usize = 4 << 20;

#[derive(Default)]
pub(super) struct Upstream {
    pub(super) state: State,
    /// What the capture says becomes of the connect.
    pub(super) answer: Option<Answer>,
    /// Until when an answer waits for its SYN.
    pub(super) wait_for_syn: Timer,
    /// The client's first sequence number, as the answer says.
    pub(super) expected: u32,
    /// What the captured SYN-ACK says of window scaling.
    pub(super) syn_ack: Option<Option<u8>>,
    /// The captured server's initial sequence number.
    pub(super) origin: Option<Origin>,

    /// Where the first byte stands that is neither captured nor filled in.
    pub(super) next: u64,
    pub(super) captured: Fingerprint,
    ahead: Held,
    /// What came from beyond the client's window.
    beyond: Held,
    /// One past the last byte or FIN that it has sent, wherever that was: SND.NXT.
    pub(super) sent: u64,
    pub(super) fillers: Fillers,
    /// Where its FIN stands.
    pub(super) fin: Option<u64>,
    pub(super) gaps: Gaps,
    /// Contiguous bytes that the engine has not taken yet.
    pub(super) pending: VecDeque<u8>,
    /// It has reset the connection, which the engine learns behind `pending`.
    pub(super) has_reset: bool,
    eof_told: bool,

    /// The highest right edge of the captured window for the client.
    pub(super) window_edge: Option<u64>,
    /// Scale of the captured windows.
    pub(super) captured_shift: u8,
    /// The engine has said that bytes wait.
    pub(super) readable: bool,
    /// The engine has room again.
    pub(super) writable: bool,
    /// Where the next byte from the client stands.
    pub(super) taken: u64,
    pub(super) delivered: Delivered,
    /// Bytes that stand where a keep-alive was, and were never missing.
    pub(super) excused: u64,
}

/// What the engine has been told about its connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum State {
    /// It has not asked.
    #[default]
    Idle,
    /// It waits for the answer.
    Opening,
    Connected,
    /// It has been told of the end, or has let go.
    Gone,
}

/// The captured answer to a SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Connected,
    Refused,
    Unreachable(Unreachable),
}

/// What was found out about a captured segment's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Found {
    pub(super) out_of_order: bool,
    pub(super) retransmission: bool,
    pub(super) overlap: bool,
}

impl Upstream {
    pub(super) fn begin(&mut self, isn: u32) {
        self.origin = Some(Origin(isn));
        self.next = SYN + 1;
    }

    /// Whether windows may be scaled, where the SYN-ACK was captured.
    pub(super) fn scales(&self) -> Option<bool> {
        self.syn_ack.map(|scale| scale.is_some())
    }

    /// Takes the data of a captured segment, at `at`: `real` bytes and behind them `cut` that the snap length cut off.
    pub(super) fn on_data(&mut self, at: u64, real: &[u8], cut: usize) -> Found {
        let mut found = Found::default();
        let end = at + (real.len() + cut) as u64;
        if end == at {
            return found;
        }
        found.retransmission = at < self.next;
        if at > self.next {
            found.out_of_order = true;
            found.overlap = self.ahead.insert(at, real);
            self.hold_fillers(at + real.len() as u64..end);
            if self.ahead.len() > WAITING_MAX {
                self.fill_gaps(self.captured_end());
            }
            return found;
        }
        if end <= self.next {
            return found;
        }
        let fresh = real.get((self.next - at) as usize..).unwrap_or_default();
        if self.ahead.is_empty() && cut == 0 {
            self.captured.add(fresh);
            self.pending.extend(fresh);
            self.next = end;
            self.gaps.on_filled(self.next, self.fin);
            return found;
        }
        found.overlap = self.ahead.insert(self.next, fresh);
        self.hold_fillers(self.next.max(at + real.len() as u64)..end);
        self.advance();
        found
    }

    /// Takes bytes from beyond the client's window, at `at`.
    pub(super) fn on_data_beyond(&mut self, at: u64, bytes: &[u8]) {
        if !bytes.is_empty() && self.beyond.len() < WAITING_MAX {
            self.beyond.insert(at, bytes);
        }
    }

    /// Fills all gaps up to `end`. Returns how many bytes were missing.
    pub(super) fn fill_gaps(&mut self, end: u64) -> u64 {
        let end = self.fin.map_or(end, |fin| end.min(fin));
        if end <= self.next {
            return 0;
        }
        self.take_from_beyond(self.next..end);
        self.beyond.forget_before(end);
        let gaps = self.ahead.gaps(self.next..end);
        let missing = gaps.iter().map(|gap| gap.end - gap.start).sum();
        gaps.into_iter().for_each(|gap| self.hold_fillers(gap));
        self.advance();
        missing
    }

    /// Where what has been captured ends.
    pub(super) fn captured_end(&self) -> u64 {
        let ahead = self.ahead.end().unwrap_or(0);
        self.next.max(ahead).max(self.fin.unwrap_or(0))
    }

    /// Whether something before the FIN is missing.
    pub(super) fn waits_for_bytes(&self) -> bool {
        self.fin.is_some_and(|fin| self.next < fin)
    }

    /// Whether the engine is to be told of the FIN.
    pub(super) fn has_eof(&mut self) -> bool {
        let due = !self.eof_told && self.pending.is_empty() && self.fin.is_some_and(|fin| self.next >= fin);
        self.eof_told |= due;
        due
    }

    /// Lets go of what waits: nobody will ask for it.
    pub(super) fn end(&mut self) {
        self.state = State::Gone;
        self.ahead.clear();
        self.beyond.clear();
        self.pending = VecDeque::new();
        self.gaps = Gaps::default();
        self.wait_for_syn = Timer::OFF;
    }

    /// The captured client says that it has got this range.
    pub(super) fn on_received(&mut self, range: Range<u64>) {
        let start = range.start.max(self.next);
        if start < range.end {
            self.take_from_beyond(start..range.end);
            self.advance();
        }
    }

    /// Takes what is there for gaps in `range`.
    fn take_from_beyond(&mut self, range: Range<u64>) {
        if self.beyond.is_empty() {
            return;
        }
        for mut gap in self.ahead.gaps(range) {
            while let Some((at, bytes)) = self.beyond.first_in(gap.clone()) {
                self.ahead.insert(at, bytes);
                gap.start = at + bytes.len() as u64;
            }
        }
    }

    fn hold_fillers(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for gap in self.ahead.gaps(range) {
            self.ahead
                .insert(gap.start, &vec![0; (gap.end - gap.start) as usize]);
            self.fillers.add(gap);
        }
    }

    /// Moves on over what is held.
    fn advance(&mut self) {
        loop {
            let piece = self.ahead.from(self.next);
            if piece.is_empty() {
                break;
            }
            let captured = &mut self.captured;
            self.fillers.split(self.next, piece, |part, kind| match kind {
                Kind::Captured => captured.add(part),
                Kind::Filler => {}
            });
            self.pending.extend(piece);
            self.next += piece.len() as u64;
        }
        self.ahead.forget_before(self.next);
        self.gaps.on_filled(self.next, self.fin);
    }
}
