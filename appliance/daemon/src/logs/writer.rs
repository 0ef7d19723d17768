//! The thread that writes the log.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes of lines that wait for a slow reader: some seconds of a busy appliance.
pub(super) const WAITING_MAX: usize = 4 << 20;
/// Memory that is kept for the next ones.
const KEPT: usize = 256 << 10;
/// How long a process that ends waits for the reader.
const LAST_LINES_TIME: Duration = Duration::from_secs(2);

/// The one of this process, once it is started.
pub(super) static WRITER: OnceLock<Writer> = OnceLock::new();

/// What other threads and the one that writes share.
#[derive(Debug, Default)]
pub(super) struct Writer {
    waiting: Mutex<Waiting>,
    /// There is something to write.
    news: Condvar,
    /// Everything has been written.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Lines that were lost since that was told.
    lost: u64,
    /// The thread has taken lines that it has not written yet.
    is_writing: bool,
}

/// Starts the thread. Until the returned value is dropped, which waits for what is left for a while, no line of this
/// process is written by any other.
///
/// # Errors
///
/// The system's, when it has no more threads.
pub(crate) fn start() -> io::Result<impl Drop> {
    struct LastLines;
    impl Drop for LastLines {
        fn drop(&mut self) {
            if let Some(writer) = WRITER.get() {
                writer.wait_for_idle(LAST_LINES_TIME);
            }
        }
    }
    let writer = WRITER.get_or_init(Writer::default);
    std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(|| writer.run(write_out))?;
    Ok(LastLines)
}

/// Writes to standard error, and waits for it where it does not wait itself. There is nobody to tell of errors.
pub(super) fn write_out(mut lines: &[u8]) {
    let mut stderr = io::stderr().lock();
    while !lines.is_empty() {
        match stderr.write(lines) {
            Ok(len) => lines = &lines[len..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
            Err(_) => return,
        }
    }
}

impl Writer {
    /// Takes whole lines to be written, or counts them as lost.
    pub(super) fn push(&self, lines: &[u8]) {
        let mut waiting = self.lock();
        if waiting.lines.len() + lines.len() > WAITING_MAX {
            waiting.lost += lines.iter().filter(|byte| **byte == b'\n').count() as u64;
            return;
        }
        let was_empty = waiting.lines.is_empty();
        waiting.lines.extend_from_slice(lines);
        drop(waiting);
        if was_empty {
            self.news.notify_one();
        }
    }

    fn run(&self, mut write: impl FnMut(&[u8])) {
        let mut taken = Vec::new();
        let mut waiting = self.lock();
        loop {
            if waiting.lines.is_empty() {
                self.idle.notify_all();
                waiting = self.news.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            std::mem::swap(&mut taken, &mut waiting.lines);
            waiting.is_writing = true;
            drop(waiting);
            write(&taken);
            taken.clear();
            taken.shrink_to(KEPT);
            waiting = self.lock();
            waiting.is_writing = false;
            let lost = std::mem::take(&mut waiting.lost);
            if lost > 0 {
                drop(waiting);
                tracing::warn!(
                    lines = lost,
                    "the log is read too slowly, and these lines are lost"
                );
                waiting = self.lock();
            }
        }
    }

    fn wait_for_idle(&self, limit: Duration) {
        let is_busy = |waiting: &mut Waiting| waiting.is_writing || !waiting.lines.is_empty();
        drop(self.idle.wait_timeout_while(self.lock(), limit, is_busy));
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // A thread that has panicked leaves lines as whole as it found them.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn lines_are_written_in_their_order_and_none_is_lost_in_silence() {
        static SLOW: OnceLock<Writer> = OnceLock::new();
        let writer = SLOW.get_or_init(Writer::default);
        let (written, read) = mpsc::sync_channel::<Vec<u8>>(0); // the reader decides when
        std::thread::spawn(|| writer.run(move |lines| written.send(lines.to_vec()).unwrap()));
        let line = [&[b'x'; 99][..], b"\n"].concat();
        // One is being written, then as many as may wait, then some that may not.
        writer.push(b"first\n");
        while !writer.lock().lines.is_empty() {
            std::thread::yield_now();
        }
        let fits = WAITING_MAX / line.len();
        for _ in 0..fits + 7 {
            writer.push(&line);
        }
        assert_eq!(writer.lock().lost, 7);
        assert_eq!(read.recv().unwrap(), b"first\n");
        let rest = read.recv().unwrap();
        assert!(rest.len() == fits * line.len() && rest.chunks(line.len()).all(|part| part == line));
        writer.wait_for_idle(Duration::from_secs(60));
        let waiting = writer.lock();
        assert!(waiting.lines.is_empty() && waiting.lost == 0);
    }
}
