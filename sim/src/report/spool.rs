//! Finished flows outside memory: written as they end, read back in the order of their ids.

use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::SpooledTempFile;

/// Bytes that stay in memory before a spool becomes a temporary file.
pub(super) const MEMORY_BYTES: usize = 8 << 20;

/// One JSON object per flow, found again by the flow's id.
///
/// In memory stay 16 bytes per flow and the first [`MEMORY_BYTES`] of text. The first failure to write is kept and
/// told by [`FlowSpool::finish`].
pub(super) struct FlowSpool {
    file: BufWriter<SpooledTempFile>,
    /// Offset and length by id − 1; a length of 0 where there is no such flow.
    index: Vec<(u64, u32)>,
    end: u64,
    line: Vec<u8>,
    failure: Option<io::Error>,
}

/// The flows of a [`FlowSpool`] when all have ended.
pub(super) struct StoredFlows {
    file: SpooledTempFile,
    index: Vec<(u64, u32)>,
}

/// Reads [`StoredFlows`], lowest id first.
pub(super) struct FlowReader<'a> {
    file: BufReader<&'a mut SpooledTempFile>,
    index: std::slice::Iter<'a, (u64, u32)>,
    position: u64,
    line: Vec<u8>,
}

impl FlowSpool {
    pub(super) fn new() -> Self {
        Self::with_memory(MEMORY_BYTES)
    }

    fn with_memory(bytes: usize) -> Self {
        Self {
            file: BufWriter::new(SpooledTempFile::new(bytes)),
            index: Vec::new(),
            end: 0,
            line: Vec::new(),
            failure: None,
        }
    }

    /// Adds the flow `id`, counted from 1; each id once, in any order.
    pub(super) fn push(&mut self, id: u64, flow: &impl Serialize) {
        if self.failure.is_some() {
            return;
        }
        self.line.clear();
        let written = serde_json::to_writer(&mut self.line, flow)
            .map_err(io::Error::from)
            .and_then(|()| self.file.write_all(&self.line));
        match written {
            Ok(()) => {
                let slot = id as usize - 1;
                if slot >= self.index.len() {
                    self.index.resize(slot + 1, (0, 0));
                }
                self.index[slot] = (self.end, self.line.len() as u32);
                self.end += self.line.len() as u64;
            }
            Err(error) => self.failure = Some(error),
        }
    }

    /// Ends the writing.
    ///
    /// # Errors
    ///
    /// The first failure to write: the folder for temporary files is full, for instance.
    pub(super) fn finish(self) -> io::Result<StoredFlows> {
        if let Some(error) = self.failure {
            return Err(error);
        }
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(StoredFlows {
            file,
            index: self.index,
        })
    }
}

impl StoredFlows {
    /// Begins to read from the lowest id.
    ///
    /// # Errors
    ///
    /// Those of the temporary file.
    pub(super) fn read(&mut self) -> io::Result<FlowReader<'_>> {
        self.file.seek(SeekFrom::Start(0))?;
        Ok(FlowReader {
            file: BufReader::new(&mut self.file),
            index: self.index.iter(),
            position: 0,
            line: Vec::new(),
        })
    }
}

impl FlowReader<'_> {
    /// The next flow's JSON object on one line without its end, lent until the next call; `None` after the last.
    ///
    /// # Errors
    ///
    /// Those of the temporary file.
    pub(super) fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let Some(&(offset, length)) = self.index.find(|&&(_, length)| length > 0) else {
            return Ok(None);
        };
        // Flows mostly end in an order near that of their ids, so the next one is often in the buffer already.
        self.file.seek_relative(offset as i64 - self.position as i64)?;
        self.line.resize(length as usize, 0);
        self.file.read_exact(&mut self.line)?;
        self.position = offset + u64::from(length);
        Ok(Some(&self.line))
    }

    /// The next flow as a value.
    ///
    /// # Errors
    ///
    /// Those of the temporary file.
    pub(super) fn next_value<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let line = self.next()?;
        Ok(line.map(serde_json::from_slice).transpose()?)
    }
}

/// Bytes that go to disk beyond [`MEMORY_BYTES`].
///
/// Failures are kept as in [`FlowSpool`].
pub(super) struct Spool {
    file: BufWriter<SpooledTempFile>,
    failure: Option<io::Error>,
}

impl Spool {
    pub(super) fn new() -> Self {
        Self {
            file: BufWriter::new(SpooledTempFile::new(MEMORY_BYTES)),
            failure: None,
        }
    }

    /// Appends `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.failure.is_none() {
            self.failure = self.file.write_all(bytes).err();
        }
    }

    /// Appends `value` as one line of JSON.
    pub(super) fn push_json(&mut self, value: &impl Serialize) {
        let mut line = serde_json::to_vec(value).expect("plain values, in memory");
        line.push(b'\n');
        self.push(&line);
    }

    /// Begins to read; nothing is to be appended afterwards.
    ///
    /// # Errors
    ///
    /// The first failure to write.
    pub(super) fn read(&mut self) -> io::Result<BufReader<&mut SpooledTempFile>> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.file.flush()?;
        let file = self.file.get_mut();
        file.seek(SeekFrom::Start(0))?;
        Ok(BufReader::new(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(spool: FlowSpool) -> Vec<String> {
        let mut stored = spool.finish().unwrap();
        let mut reader = stored.read().unwrap();
        let mut lines = Vec::new();
        while let Some(line) = reader.next().unwrap() {
            lines.push(String::from_utf8(line.to_vec()).unwrap());
        }
        lines
    }

    #[test]
    fn flows_come_back_by_id_whatever_the_order_of_their_ends() {
        let mut spool = FlowSpool::new();
        for id in [3_u64, 1, 5, 2] {
            spool.push(id, &format!("flow {id}"));
        }
        assert_eq!(
            read_all(spool),
            ["\"flow 1\"", "\"flow 2\"", "\"flow 3\"", "\"flow 5\""]
        );
    }

    #[test]
    fn flows_beyond_memory_come_back_from_disk() {
        let mut spool = FlowSpool::with_memory(1000);
        for id in (1..=2000_u64).rev() {
            spool.push(id, &(id, "x".repeat(id as usize % 90)));
        }
        assert!(spool.file.get_ref().is_rolled());
        let lines = read_all(spool);
        assert_eq!(lines.len(), 2000);
        for (index, line) in lines.iter().enumerate() {
            let id = index + 1;
            assert_eq!(line, &format!("[{id},\"{}\"]", "x".repeat(id % 90)));
        }
    }

    #[test]
    fn no_flows_are_read_back_as_none() {
        assert!(read_all(FlowSpool::new()).is_empty());
    }
}
