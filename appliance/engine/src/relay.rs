//! The relay stage: what stands between a client's bytes and the upstream.
//!
//! Bytes from the client pass an optional [`Inspector`] before they are lent to the driver. It may look at them, hold
//! them back until it has seen enough, and put bytes of its own before them; when it has nothing more to do it takes
//! itself out, and the flow costs what a flow without one costs. Each side counts its own offsets: bytes read from the
//! client's buffer are not the bytes the upstream is given when an inspector adds some.

/// Looks at a client's bytes before the upstream gets them.
pub(crate) trait Inspector: Send {
    /// Is shown the bytes that wait, the first of which follows the last that passed, and says what to do.
    /// `is_last`: no more will come or fit before some have passed.
    fn inspect(&mut self, bytes: &[u8], is_last: bool) -> Inspection;
}

/// What an [`Inspector`] wants.
pub(crate) enum Inspection {
    /// Hold all of them and ask again when there are more.
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

/// One flow's relay stage, from the client to the upstream.
#[derive(Default)]
pub(crate) struct Relay {
    inspector: Option<Box<dyn Inspector>>,
    /// Bytes of the inspector's own that are still to be lent.
    before: Vec<u8>,
    /// Bytes at the head of the client's buffer that have passed inspection and are still to be taken.
    passed: usize,
    given: u64,
    name: Option<String>,
}

impl Relay {
    /// A relay stage with an inspector.
    pub(crate) fn inspected_by(inspector: Box<dyn Inspector>) -> Self {
        Self {
            inspector: Some(inspector),
            ..Self::default()
        }
    }

    /// Bytes that the upstream has been given.
    pub(crate) fn given(&self) -> u64 {
        self.given
    }

    /// Whether bytes that do not stand in the client's buffer wait to be lent.
    pub(crate) fn has_bytes_before(&self) -> bool {
        !self.before.is_empty()
    }

    /// Takes the server's name, once it is known.
    pub(crate) fn take_name(&mut self) -> Option<String> {
        self.name.take()
    }

    /// Lends what may pass of `bytes`, the client's bytes that wait. Returns how many of `bytes` are done with, and how
    /// many bytes the upstream took.
    pub(crate) fn lend(
        &mut self,
        bytes: &[u8],
        is_last: bool,
        take: impl FnOnce(&[u8]) -> usize,
    ) -> (usize, usize) {
        if let Some(inspector) = &mut self.inspector
            && bytes.len() > self.passed
        {
            match inspector.inspect(&bytes[self.passed..], is_last) {
                Inspection::Hold if !is_last => {}
                Inspection::Hold | Inspection::Pass => self.passed = bytes.len(),
                Inspection::Done { before, name } => {
                    self.before = before;
                    self.name = name;
                    self.inspector = None;
                }
            }
        }
        if !self.before.is_empty() {
            let taken = take(&self.before).min(self.before.len());
            self.before.drain(..taken);
            self.given += taken as u64;
            return (0, taken);
        }
        let may_pass = if self.inspector.is_some() {
            self.passed
        } else {
            bytes.len()
        };
        if may_pass == 0 {
            return (0, 0);
        }
        let taken = take(&bytes[..may_pass]).min(may_pass);
        self.passed = self.passed.saturating_sub(taken);
        self.given += taken as u64;
        (taken, taken)
    }
}
