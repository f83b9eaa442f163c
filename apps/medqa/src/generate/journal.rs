//! The journal of a generation: an append-only file of everything that was sent and came back.
//!
//! A line is written with one write before its content is used, and the file is flushed to the disk every second and at
//! the end. The last line may be torn by a kill; it is cut off when the journal is opened again.

use super::answer::TokenUsage;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum JournalEntry {
    /// A request is about to be sent. Until its end is known, it counts as spent.
    Sent { i: u64, key: String, reserved: TokenUsage },
    /// A request has ended, with an answer or without.
    End(Box<RequestEnd>),
    /// From here on, requests ask for another structure of the answers.
    Format { response_format: super::recipe::ResponseFormat },
}

/// The end of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RequestEnd {
    pub i: u64,
    pub key: String,
    /// Number of the attempt, from 0.
    pub attempt: u32,
    /// Status of HTTP; none if there was no response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The response, if it is an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<Value>,
    /// The message, if it is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Tokens that count as spent.
    pub usage: TokenUsage,
    /// Start of the attempt, in milliseconds since 1970.
    pub started: u64,
    /// Milliseconds that the attempt took.
    pub ms: u64,
}

/// The open journal, and the answers in it.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    synced: Instant,
    answers: HashMap<String, Value>,
    /// The first item for which the journal has no line.
    pub end_item: u64,
}

impl Journal {
    /// Opens or creates a journal and calls `replay` with every entry. Another process that has it open is refused.
    ///
    /// # Errors
    /// If the file cannot be opened or written, or a line other than the last is damaged.
    pub(super) fn open(path: &Path, mut replay: impl FnMut(&JournalEntry)) -> Result<Self> {
        let at = || path.display().to_string();
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).with_context(at)?;
        if file.try_lock().is_err() {
            bail!("{}: another process is generating into this folder", path.display());
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(at)?;
        let complete = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        if complete < bytes.len() {
            file.set_len(complete as u64).with_context(at)?;
            file.seek(std::io::SeekFrom::End(0)).with_context(at)?;
        }
        let mut journal =
            Self { path: path.to_owned(), file, synced: Instant::now(), answers: HashMap::new(), end_item: 0 };
        for (number, line) in bytes[..complete].split(|&byte| byte == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let entry: JournalEntry = serde_json::from_slice(line)
                .with_context(|| format!("{}:{}: expected a line of the journal", path.display(), number + 1))?;
            replay(&entry);
            journal.remember(entry);
        }
        Ok(journal)
    }

    /// Returns the response to a request, if it is known.
    pub(super) fn answer(&self, key: &str) -> Option<&Value> {
        self.answers.get(key)
    }

    /// Returns all responses.
    pub(super) fn answers(&self) -> impl Iterator<Item = &Value> {
        self.answers.values()
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn append(&mut self, entry: JournalEntry) -> Result<()> {
        let at = || format!("{}: cannot be written", self.path.display());
        let mut line = serde_json::to_vec(&entry).with_context(at)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(at)?;
        if self.synced.elapsed() >= Duration::from_secs(1) {
            self.sync()?;
        }
        self.remember(entry);
        Ok(())
    }

    /// Flushes the file to the disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        self.file.sync_data().with_context(|| format!("{}: cannot be written", self.path.display()))
    }

    fn remember(&mut self, entry: JournalEntry) {
        match entry {
            JournalEntry::Sent { i, .. } => self.end_item = self.end_item.max(i + 1),
            JournalEntry::End(end) => {
                self.end_item = self.end_item.max(end.i + 1);
                if let Some(body) = end.body {
                    self.answers.insert(end.key, body);
                }
            }
            JournalEntry::Format { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(i: u64, key: &str) -> JournalEntry {
        let end = RequestEnd {
            i,
            key: key.to_owned(),
            attempt: 0,
            status: Some(200),
            body: Some(Value::from(i)),
            error: None,
            usage: TokenUsage::default(),
            started: 0,
            ms: 1,
        };
        JournalEntry::End(Box::new(end))
    }

    #[test]
    fn a_journal_cut_off_anywhere_goes_on_with_its_complete_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let mut journal = Journal::open(&path, |_| {}).unwrap();
        journal.append(JournalEntry::Sent { i: 0, key: "a".into(), reserved: TokenUsage::default() }).unwrap();
        journal.append(end(0, "a")).unwrap();
        journal.append(end(4, "b")).unwrap();
        assert!(Journal::open(&path, |_| {}).is_err(), "a second process is refused");
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let lines = whole[..length].iter().filter(|&&byte| byte == b'\n').count();
            let mut seen = 0;
            let mut journal = Journal::open(&path, |_| seen += 1).unwrap();
            assert_eq!((seen, journal.answer("a").is_some()), (lines, lines >= 2), "cut at {length}");
            journal.append(end(9, "c")).unwrap();
            drop(journal);
            let mut again = 0;
            let journal = Journal::open(&path, |_| again += 1).unwrap();
            assert_eq!((again, journal.end_item), (lines + 1, 10));
        }
        std::fs::write(&path, "{}\n").unwrap();
        let Err(error) = Journal::open(&path, |_| {}) else { panic!("a damaged line is refused") };
        assert!(format!("{error:#}").contains("journal.jsonl:1: "));
    }
}
