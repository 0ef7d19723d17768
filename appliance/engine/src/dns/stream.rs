//! Questions and answers over TCP: messages, each behind its length (RFC 1035, section 4.2.2).

use std::net::SocketAddr;

use super::{Answer, Questions};

/// How much of a message is kept until it is complete. The records that are looked at fit; the rest is not read.
const KEPT_MAX: usize = 4096;

/// What a client and a server say to each other in one TCP flow.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    questions: Questions,
    from_client: Messages,
    from_server: Messages,
}

impl Conversation {
    /// Takes note of the next bytes from the client.
    pub(crate) fn on_client(&mut self, server: SocketAddr, bytes: &[u8]) {
        let Self {
            questions,
            from_client,
            ..
        } = self;
        from_client.push(bytes, |message| questions.on_message(server, message));
    }

    /// Takes note of the next bytes from the server; `learn` is told each answer that they complete.
    pub(crate) fn on_server(&mut self, server: SocketAddr, bytes: &[u8], mut learn: impl FnMut(Answer)) {
        let Self {
            questions,
            from_server,
            ..
        } = self;
        from_server.push(bytes, |message| {
            if let Some(answer) = questions.on_answer(server, message) {
                learn(answer);
            }
        });
    }
}

/// Cuts a stream into messages.
#[derive(Debug, Default)]
struct Messages {
    /// The length in front of the next message, as far as it has come.
    length: [u8; 2],
    length_len: usize,
    /// Bytes of the message still to come.
    left: usize,
    /// What has come of it and is kept.
    kept: Vec<u8>,
}

impl Messages {
    fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
        while !bytes.is_empty() {
            if self.length_len < 2 {
                self.length[self.length_len] = bytes[0];
                self.length_len += 1;
                bytes = &bytes[1..];
                if self.length_len == 2 {
                    self.left = u16::from_be_bytes(self.length).into();
                    self.length_len = if self.left == 0 { 0 } else { 2 };
                }
                continue;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(self.left));
            bytes = rest;
            self.left -= part.len();
            if self.kept.is_empty() && self.left == 0 {
                each(&part[..part.len().min(KEPT_MAX)]);
            } else {
                let room = KEPT_MAX - self.kept.len();
                self.kept.extend_from_slice(&part[..part.len().min(room)]);
                if self.left == 0 {
                    each(&self.kept);
                }
            }
            if self.left == 0 {
                self.kept = Vec::new(); // a connection that rests keeps nothing
                self.length_len = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::tests::{ANSWERS, ASKS, Record, message};
    use super::*;

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut framed = (message.len() as u16).to_be_bytes().to_vec();
        framed.extend_from_slice(message);
        framed
    }

    proptest! {
        #[test]
        fn answers_are_found_however_the_bytes_are_cut(cuts in vec(1..40_usize, 1..200)) {
            let server = "192.0.2.53:53".parse().unwrap();
            let asked: Vec<u8> = (0..3).flat_map(|id| framed(&message(id, ASKS, "example.org", 1, &[]))).collect();
            let records: &[Record<'_>] = &[("example.org", 1, 300, &[192, 0, 2, 1])];
            let mut answers = framed(&[]);
            answers.extend(framed(&[9; 60_000]));
            answers.extend((0..3).flat_map(|id| framed(&message(id, ANSWERS, "example.org", 1, records))));
            let mut conversation = Conversation::default();
            let mut found = 0;
            let (mut asked, mut answers) = (&asked[..], &answers[..]);
            for &cut in cuts.iter().cycle() {
                let (part, rest) = asked.split_at(cut.min(asked.len()));
                conversation.on_client(server, part);
                asked = rest;
                if asked.is_empty() {
                    let (part, rest) = answers.split_at((cut * 50).min(answers.len()));
                    conversation.on_server(server, part, |answer| {
                        assert_eq!(answer.name, "example.org");
                        found += 1;
                    });
                    answers = rest;
                }
                if answers.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found, 3);
            prop_assert!(conversation.from_server.kept.capacity() == 0);
        }

        #[test]
        fn a_message_that_never_ends_keeps_a_bounded_part(parts in vec(vec(any::<u8>(), 1..3000), 1..30)) {
            let mut messages = Messages::default();
            messages.push(&[0xff, 0xff], |_| ());
            for part in parts {
                messages.push(&part, |message| assert!(message.len() <= KEPT_MAX));
                prop_assert!(messages.kept.len() <= KEPT_MAX);
            }
        }
    }
}
