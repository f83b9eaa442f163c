//! Event files, for TensorBoard.
//!
//! Sources: `tensorboard/compat/proto/{event,summary}.proto` for the fields, and the format of TFRecord files,
//! <https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>.

use super::{
    scalars::{scalars, step},
    wire::{CASTAGNOLI, Message},
};
use anyhow::{Context, Result};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

const PREFIX: &str = "events.out.tfevents.";
/// Of a `SessionLog`: readers forget all that earlier files say of this step and later ones.
const START: u64 = 1;

/// An event file that is written to at every step.
pub struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// Adds an event file to `directory`. A resumed run names the step behind it: what earlier files say of later
    /// steps, which are taken again, is forgotten. Without one, all that they say is.
    pub fn create(directory: &Path, resume_step: Option<u64>) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("{}: cannot be created", directory.display()))?;
        // Readers take the files by name and none that sorts before one they have read.
        let seconds = next_second(directory, now() as u64)?;
        let path = directory.join(format!("{PREFIX}{seconds:010}.{}.{}", host(), std::process::id()));
        let file = File::options().write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("{}: cannot be created", path.display()))?;
        let mut board = Self { file, path };
        board.event(event(now(), 0).bytes(3, "brain.Event:2"))?;
        // In every file: TensorBoard takes the first such mark of a folder for the begin of the run and ignores it.
        let first = resume_step.map_or(0, |step| step + 1);
        board.event(event(now(), first).message(7, Message::default().integer(1, START)))?;
        Ok(board)
    }

    /// Writes what a line of `metrics.jsonl` measures.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        self.event(event(now(), step(line)?).message(5, summary(line)))
    }

    /// In one piece and at once, so that a run that is killed leaves whole events behind.
    fn event(&mut self, event: Message) -> Result<()> {
        let written = self.file.write_all(&frame(&event.encoded()));
        written.with_context(|| format!("{}: cannot be written", self.path.display()))
    }
}

fn event(wall_time: f64, step: u64) -> Message {
    Message::default().double(1, wall_time).integer(2, step)
}

/// Values in single precision, as `torch.utils.tensorboard` writes them: every reader takes this form.
fn summary(line: &Value) -> Message {
    scalars(line).fold(Message::default(), |summary, (tag, value)| {
        summary.message(1, Message::default().bytes(1, tag).float(2, value as f32))
    })
}

/// A record: its length, which has a checksum of its own, the bytes and their checksum.
fn frame(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u64).to_le_bytes();
    let checksum = |bytes| masked(CASTAGNOLI.of(&[bytes])).to_le_bytes();
    [&length[..], &checksum(&length), record, &checksum(record)].concat()
}

/// A checksum of bytes that hold checksums themselves says little; the format rotates and shifts it.
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// `now`, or the second after the last that a file of `directory` names.
fn next_second(directory: &Path, now: u64) -> Result<u64> {
    let place = || format!("{}: cannot be read", directory.display());
    let mut second = now;
    for entry in fs::read_dir(directory).with_context(place)? {
        let name = entry.with_context(place)?.file_name();
        let name = name.to_string_lossy();
        let named = name.strip_prefix(PREFIX).and_then(|rest| rest.split('.').next()?.parse::<u64>().ok());
        second = second.max(named.map_or(0, |named| named.saturating_add(1)));
    }
    Ok(second)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The name of this machine, where the system says.
pub(super) fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    let name = name.map(|name| name.trim().replace(|c: char| !(c.is_ascii_alphanumeric() || c == '-'), "-"));
    name.ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The payloads of a file, whose frames are taken apart and checked.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let (bytes, mut at, mut records) = (fs::read(path).unwrap(), 0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            records.push(bytes[at + 12..at + 12 + length].to_vec());
            assert_eq!(bytes[at..at + 16 + length], frame(&records[records.len() - 1]));
            at += 16 + length;
        }
        records
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    /// Made by tests/dashboards/record_vectors.py with tensorboard 2.21.
    #[test]
    fn bytes_are_those_of_tensorboard() {
        let line = json!({"step": 7, "loss": 1.25, "learning_rate": 1e-4, "elapsed_seconds": 3.0});
        let bytes = event(1.5, 7).message(5, summary(&line)).encoded();
        assert_eq!(
            hex(&frame(&bytes)),
            "3c00000000000000c8b7a35209000000000000f83f10072a2f0a110a0a747261696e2f6c6f7373150000a03f0a1a0a13747261696e2f6c6561726e696e675f726174651517b7d1380f76df53"
        );
        let start = event(1.5, 7).message(7, Message::default().integer(1, START)).encoded();
        assert_eq!(hex(&frame(&start)), "0f000000000000006d532b0909000000000000f83f10073a020801774771c7");
        let version = event(1.5, 0).bytes(3, "brain.Event:2").encoded();
        assert_eq!(
            hex(&frame(&version)),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
    }

    #[test]
    fn what_is_not_finite_is_nan() {
        let bytes = summary(&json!({"step": 1, "loss": null})).encoded();
        assert_eq!(bytes[bytes.len() - 4..], f32::NAN.to_le_bytes());
    }

    #[test]
    fn every_file_begins_with_a_mark_at_its_first_step() {
        let directory = tempfile::tempdir().unwrap();
        for (resume, first) in [(None, 0), (Some(6), 7)] {
            let mut board = TensorBoard::create(directory.path(), resume).unwrap();
            board.write(&json!({"step": first, "loss": 2.0})).unwrap();
        }
        let files = files(directory.path());
        assert_eq!(files.len(), 2);
        for (path, step) in files.iter().zip([None, Some(7)]) {
            let records = records(path);
            assert_eq!(records.len(), 3);
            let step: &[u8] = &step.map_or(Vec::new(), |step| vec![0x10, step]);
            // Behind the time: the step, and field 7 with the status START.
            assert_eq!(records[1][9..], [step, b"\x3a\x02\x08\x01"].concat());
        }
    }

    #[test]
    fn a_later_file_sorts_behind_earlier_ones() {
        let directory = tempfile::tempdir().unwrap();
        let ahead = directory.path().join(format!("{PREFIX}9000000000.other.1"));
        fs::write(&ahead, "").unwrap();
        let _board = TensorBoard::create(directory.path(), Some(1)).unwrap();
        let files = files(directory.path());
        assert_eq!(files[0], ahead);
        assert!(files[1].to_string_lossy().contains("9000000001"));
    }

    #[test]
    fn a_line_without_a_step_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(directory.path(), None).unwrap();
        let error = board.write(&json!({"loss": 1.0})).unwrap_err();
        assert_eq!(error.to_string(), "metrics: expected `step` to be a whole number, found {\"loss\":1.0}");
    }
}
