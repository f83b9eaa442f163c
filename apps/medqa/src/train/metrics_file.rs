//! The file `metrics.jsonl`.

use super::{
    event::{Reporter, RunEvent},
    record::MetricsRecord,
};
use anyhow::{Context, Result, bail};
use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// The file `metrics.jsonl`: one record per line, written without delay.
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl MetricsFile {
    /// Opens the file to append after its first `bytes`; the rest is truncated.
    ///
    /// # Errors
    /// If the file cannot be written or is shorter.
    pub(super) fn open(path: &Path, bytes: u64) -> Result<Self> {
        let context = || format!("{}: cannot be written", path.display());
        let mut file = File::options().write(true).create(true).truncate(false).open(path).with_context(context)?;
        let found = file.metadata().with_context(context)?.len();
        if found < bytes {
            bail!("{}: expected at least {bytes} bytes from before, found {found}", path.display());
        }
        file.set_len(bytes).and_then(|()| file.seek(SeekFrom::End(0))).with_context(context)?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Reads the records written so far.
    ///
    /// # Errors
    /// If the file cannot be read or holds another line; the error names it.
    pub(super) fn records(&self) -> Result<Vec<MetricsRecord>> {
        let path = self.path.display();
        let text = std::fs::read_to_string(&self.path).with_context(|| format!("{path}: cannot be read"))?;
        let lines = text.lines().enumerate();
        lines
            .map(|(index, line)| MetricsRecord::parse(line).with_context(|| format!("{path}: line {}", index + 1)))
            .collect()
    }

    /// Returns the bytes written so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Reporter for MetricsFile {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        let RunEvent::Record(record) = event else { return Ok(()) };
        let line = serde_json::to_string(record)? + "\n";
        self.file.write_all(line.as_bytes()).context("metrics.jsonl: cannot be written")?;
        self.bytes += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::record::EvalRecord;

    #[test]
    fn records_after_a_checkpoint_are_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let record = |step| MetricsRecord::Eval(EvalRecord { step, valid_loss: 0.5, elapsed_seconds: 0.25 });
        let mut file = MetricsFile::open(&path, 0).unwrap();
        let mut ends = vec![0];
        for step in 0..3 {
            file.report(&RunEvent::Record(&record(step))).unwrap();
            ends.push(file.bytes());
        }
        let mut file = MetricsFile::open(&path, ends[1]).unwrap();
        assert_eq!(file.records().unwrap(), [record(0)]);
        file.report(&RunEvent::Record(&record(7))).unwrap();
        assert_eq!(file.records().unwrap(), [record(0), record(7)]);
        let error = MetricsFile::open(&path, ends[3]).err().unwrap().to_string();
        assert!(
            error.contains(&format!("expected at least {} bytes from before, found {}", ends[3], ends[2])),
            "{error}"
        );
    }

    #[test]
    fn another_line_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let text = "{\"step\":0,\"valid_loss\":1.0,\"elapsed_seconds\":0.0}\nstep 2\n";
        std::fs::write(&path, text).unwrap();
        let error = format!("{:#}", MetricsFile::open(&path, text.len() as u64).unwrap().records().unwrap_err());
        assert!(error.contains("metrics.jsonl: line 2: expected the record") && !error.contains('\n'), "{error}");
    }
}
