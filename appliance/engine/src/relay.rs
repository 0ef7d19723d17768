//! The relay stage: what stands between a client's bytes and the upstream.
//!
//! Bytes from the client pass an optional [`Inspector`] before they are lent to the driver. It may look at them, hold
//! them back until it has seen enough, and put bytes of its own before them; when it has nothing more to do it takes
//! itself out, and the flow costs what a flow without one costs. Each side counts its own offsets: bytes read from the
//! client's buffer are not the bytes the upstream is given when an inspector adds some.

use crate::sniff::{Sniffed, Sniffer};

/// Looks at a client's bytes before the upstream gets them.
pub(crate) trait Inspector: Send {
    /// Is shown the bytes that wait, the first of which follows the last that passed, and says what to do.
    /// `is_last`: no more will come or fit before some have passed.
    fn inspect(&mut self, bytes: &[u8], is_last: bool) -> Inspection;
}

/// What an [`Inspector`] wants.
pub(crate) enum Inspection {
    /// Hold all of them and ask again when there are more.
    #[cfg_attr(not(test), expect(dead_code, reason = "watching names holds nothing back"))]
    Hold,
    /// Let them pass and go on looking.
    Pass,
    /// Lend these bytes first, then let everything pass and ask no more.
    Done {
        before: Vec<u8>,
        /// What the client calls the server, if that has become known.
        name: Option<String>,
    },
}

type Make = fn() -> Box<Inspected<dyn Inspector>>;

/// One flow's relay stage, from the client to the upstream.
pub(crate) struct Relay {
    /// Made when the first bytes come: most flows of a flood or a scan never send any.
    make: Option<Make>,
    /// Gone once there is nothing more to do.
    inspected: Option<Box<Inspected<dyn Inspector>>>,
    given: u64,
}

/// What there is to be known of a flow while its inspector is at work.
pub(crate) struct Inspected<I: ?Sized> {
    /// Bytes of the inspector's own that are still to be lent.
    before: Vec<u8>,
    /// Bytes at the head of the client's buffer that have passed inspection and are still to be taken.
    passed: usize,
    name: Option<String>,
    is_done: bool,
    inspector: I,
}

impl<I: Inspector> Inspected<I> {
    pub(crate) fn by(inspector: I) -> Box<Self> {
        Box::new(Self {
            before: Vec::new(),
            passed: 0,
            name: None,
            is_done: false,
            inspector,
        })
    }
}

impl Inspected<dyn Inspector> {
    fn inspect(&mut self, bytes: &[u8], is_last: bool) {
        if self.is_done || bytes.len() <= self.passed {
            return;
        }
        match self.inspector.inspect(&bytes[self.passed..], is_last) {
            Inspection::Hold if !is_last => {}
            Inspection::Hold | Inspection::Pass => self.passed = bytes.len(),
            Inspection::Done { before, name } => {
                self.before = before;
                self.name = name;
                self.is_done = true;
            }
        }
    }

    /// Lends as [`Relay::lend`] does.
    fn lend(&mut self, bytes: &[u8], take: impl FnOnce(&[u8]) -> usize) -> (usize, usize) {
        if !self.before.is_empty() {
            let taken = take(&self.before).min(self.before.len());
            self.before.drain(..taken);
            return (0, taken);
        }
        let may_pass = if self.is_done { bytes.len() } else { self.passed };
        if may_pass == 0 {
            return (0, 0);
        }
        let taken = take(&bytes[..may_pass]).min(may_pass);
        self.passed = self.passed.saturating_sub(taken);
        (taken, taken)
    }

    fn has_ended(&self) -> bool {
        self.is_done && self.before.is_empty() && self.name.is_none()
    }
}

impl Relay {
    /// A relay stage with an inspector.
    pub(crate) fn inspected_by(make: Make) -> Self {
        Self {
            make: Some(make),
            inspected: None,
            given: 0,
        }
    }

    /// Bytes that the upstream has been given.
    pub(crate) fn given(&self) -> u64 {
        self.given
    }

    /// Whether bytes that do not stand in the client's buffer wait to be lent.
    pub(crate) fn has_bytes_before(&self) -> bool {
        let Some(inspected) = &self.inspected else {
            return false;
        };
        !inspected.before.is_empty()
    }

    /// Takes the server's name, once it is known.
    pub(crate) fn take_name(&mut self) -> Option<String> {
        let inspected = self.inspected.as_mut()?;
        let name = inspected.name.take()?;
        if inspected.has_ended() {
            self.inspected = None;
        }
        Some(name)
    }

    /// Whether bytes pass as they are, at once.
    pub(crate) fn is_open(&self) -> bool {
        self.make.is_none() && self.inspected.is_none()
    }

    /// The upstream has been given `bytes` on another way than by [`Relay::lend`].
    pub(crate) fn count(&mut self, bytes: usize) {
        self.given += bytes as u64;
    }

    /// Lends what may pass of `bytes`, the client's bytes that wait. Returns how many of `bytes` are done with, and how
    /// many bytes the upstream took.
    #[inline]
    pub(crate) fn lend(
        &mut self,
        bytes: &[u8],
        is_last: bool,
        take: impl FnOnce(&[u8]) -> usize,
    ) -> (usize, usize) {
        if let Some(make) = self.make.take() {
            self.inspected = Some(make());
        }
        let (done, taken) = match &mut self.inspected {
            Some(inspected) => {
                inspected.inspect(bytes, is_last);
                let lent = inspected.lend(bytes, take);
                if inspected.has_ended() {
                    self.inspected = None;
                }
                lent
            }
            None if bytes.is_empty() => (0, 0),
            None => {
                let taken = take(bytes).min(bytes.len());
                (taken, taken)
            }
        };
        self.given += taken as u64;
        (done, taken)
    }
}

/// Finds the server's name in a client's first bytes; holds nothing back.
pub(crate) struct NameWatcher(Sniffer);

impl NameWatcher {
    pub(crate) fn new() -> Self {
        Self(Sniffer::new())
    }
}

impl Inspector for NameWatcher {
    fn inspect(&mut self, bytes: &[u8], _is_last: bool) -> Inspection {
        match self.0.push(bytes) {
            Sniffed::More => Inspection::Pass,
            Sniffed::Name(name) => Inspection::Done {
                before: Vec::new(),
                name: Some(name),
            },
            Sniffed::Nothing => Inspection::Done {
                before: Vec::new(),
                name: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Holds until it has seen a line, then introduces it.
    struct Introduce;

    impl Inspector for Introduce {
        fn inspect(&mut self, bytes: &[u8], _is_last: bool) -> Inspection {
            if bytes.contains(&b'\n') {
                Inspection::Done {
                    before: b"PROXY\r\n".to_vec(),
                    name: None,
                }
            } else {
                Inspection::Hold
            }
        }
    }

    /// Lends `bytes` until the stage gives no more, three bytes at a time.
    fn drain(relay: &mut Relay, mut bytes: &[u8], is_last: bool) -> (Vec<u8>, usize) {
        let (mut given, mut done) = (Vec::new(), 0);
        loop {
            let (passed, taken) = relay.lend(bytes, is_last, |lent| {
                let take = lent.len().min(3);
                given.extend_from_slice(&lent[..take]);
                take
            });
            if taken == 0 {
                return (given, done);
            }
            done += passed;
            bytes = &bytes[passed..];
        }
    }

    #[test]
    fn held_bytes_are_lent_once_the_inspector_has_seen_enough() {
        let mut relay = Relay::inspected_by(|| Inspected::by(Introduce));
        assert_eq!(drain(&mut relay, b"GET", false), (vec![], 0));
        assert_eq!(
            drain(&mut relay, b"GET /\n", false),
            (b"PROXY\r\nGET /\n".to_vec(), 6)
        );
        assert_eq!(drain(&mut relay, b"more", false), (b"more".to_vec(), 4));
        assert_eq!(
            relay.given(),
            7 + 6 + 4,
            "what the upstream was given, its own bytes included"
        );
    }

    #[test]
    fn bytes_are_not_held_for_ever() {
        let mut relay = Relay::inspected_by(|| Inspected::by(Introduce));
        assert_eq!(drain(&mut relay, b"no line", true), (b"no line".to_vec(), 7));
    }

    #[test]
    fn a_name_is_found_while_its_bytes_pass() {
        let mut relay = Relay::inspected_by(|| Inspected::by(NameWatcher::new()));
        let request = b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n";
        let (given, done) = drain(&mut relay, &request[..20], false);
        assert_eq!((given.as_slice(), done), (&request[..20], 20));
        drain(&mut relay, &request[20..], false);
        assert_eq!(relay.take_name().as_deref(), Some("example.com"));
    }
}
