//! Event files for TensorBoard.
//!
//! Sources: `tensorboard/compat/proto/{event,summary}.proto` for the fields, and the format of TFRecord files,
//! <https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>.

use super::{
    crc::CRC32C,
    event::{Reporter, RunEvent},
    protobuf::ProtoMessage,
    record::{MetricsRecord, Scalar},
};
use anyhow::{Context, Result};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

const PREFIX: &str = "events.out.tfevents.";
/// The status `START` of a `SessionLog`: readers discard events of earlier files from its step on.
const SESSION_START: u64 = 1;

/// The writer of an event file.
pub(super) struct TensorBoardWriter {
    file: File,
    path: PathBuf,
}

impl TensorBoardWriter {
    /// Adds an event file to `directory`. A resumed run passes its last step: readers then discard the events of later
    /// steps in earlier files, because these steps are repeated. Without `resume_step`, they discard all earlier
    /// events.
    pub(super) fn create(directory: &Path, resume_step: Option<u64>) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("{}: cannot be created", directory.display()))?;
        // Readers read files in the order of their names and skip those that sort before one already read.
        let seconds = next_second(directory, now() as u64)?;
        let path = directory.join(format!("{PREFIX}{seconds:010}.{}.{}", hostname(), std::process::id()));
        let file = File::options().write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("{}: cannot be created", path.display()))?;
        let mut board = Self { file, path };
        board.write_event(event_message(now(), 0).bytes(3, "brain.Event:2"))?;
        // Written to every file: TensorBoard takes the first such mark in a folder for the start of the run and ignores
        // it.
        let first = resume_step.map_or(0, |step| step + 1);
        board.write_event(event_message(now(), first).message(7, ProtoMessage::default().integer(1, SESSION_START)))?;
        Ok(board)
    }

    /// Writes an event in one piece and without delay, so that a killed run leaves only complete events.
    fn write_event(&mut self, event: ProtoMessage) -> Result<()> {
        let written = self.file.write_all(&frame_record(&event.into_bytes()));
        written.with_context(|| format!("{}: cannot be written", self.path.display()))
    }
}

impl Reporter for TensorBoardWriter {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        let RunEvent::Record(record) = event else { return Ok(()) };
        if matches!(record, MetricsRecord::Note(_)) {
            return Ok(());
        }
        let summary = summary_message(&record.scalars());
        self.write_event(event_message(now(), record.step() as u64).message(5, summary))
    }
}

fn event_message(wall_time: f64, step: u64) -> ProtoMessage {
    ProtoMessage::default().double(1, wall_time).integer(2, step)
}

/// Encodes the scalars in single precision, as `torch.utils.tensorboard` does: every reader accepts this form.
fn summary_message(scalars: &[Scalar]) -> ProtoMessage {
    scalars.iter().fold(ProtoMessage::default(), |summary, &(tag, value)| {
        summary.message(1, ProtoMessage::default().bytes(1, tag).float(2, value as f32))
    })
}

/// Frames a record: its length, which has a checksum of its own, the bytes and their checksum.
fn frame_record(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u64).to_le_bytes();
    let checksum = |bytes| mask_crc(CRC32C.checksum(&[bytes])).to_le_bytes();
    [&length[..], &checksum(&length), record, &checksum(record)].concat()
}

/// Masks a checksum: the format rotates it and adds a constant, because a CRC over bytes that contain CRCs is weak.
fn mask_crc(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Returns `now`, or the second after the latest in the file names of `directory`.
fn next_second(directory: &Path, now: u64) -> Result<u64> {
    let context = || format!("{}: cannot be read", directory.display());
    let mut second = now;
    for entry in fs::read_dir(directory).with_context(context)? {
        let name = entry.with_context(context)?.file_name();
        let name = name.to_string_lossy();
        let named = name.strip_prefix(PREFIX).and_then(|rest| rest.split('.').next()?.parse::<u64>().ok());
        second = second.max(named.map_or(0, |named| named.saturating_add(1)));
    }
    Ok(second)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Returns the name of this machine; `localhost` if the system does not report it.
pub(super) fn hostname() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    let name = name.map(|name| name.trim().replace(|c: char| !(c.is_ascii_alphanumeric() || c == '-'), "-"));
    name.ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::record::{EvalRecord, MetricsRecord};

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Returns the payloads of the records of a file and checks their frames.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let (bytes, mut at, mut records) = (fs::read(path).unwrap(), 0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            records.push(bytes[at + 12..at + 12 + length].to_vec());
            assert_eq!(bytes[at..at + 16 + length], frame_record(&records[records.len() - 1]));
            at += 16 + length;
        }
        records
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    /// Compares with bytes that tests/dashboards/record_vectors.py made with tensorboard 2.21.
    #[test]
    fn bytes_are_those_of_tensorboard() {
        let scalars = [("train/loss", 1.25), ("train/learning_rate", 1e-4)];
        let bytes = event_message(1.5, 7).message(5, summary_message(&scalars)).into_bytes();
        assert_eq!(
            hex(&frame_record(&bytes)),
            "3c00000000000000c8b7a35209000000000000f83f10072a2f0a110a0a747261696e2f6c6f7373150000a03f0a1a0a13747261696e2f6c6561726e696e675f726174651517b7d1380f76df53"
        );
        let start = event_message(1.5, 7).message(7, ProtoMessage::default().integer(1, SESSION_START)).into_bytes();
        assert_eq!(hex(&frame_record(&start)), "0f000000000000006d532b0909000000000000f83f10073a020801774771c7");
        let version = event_message(1.5, 0).bytes(3, "brain.Event:2").into_bytes();
        assert_eq!(
            hex(&frame_record(&version)),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
    }

    #[test]
    fn what_is_not_finite_is_nan() {
        let bytes = summary_message(&[("train/loss", f64::NAN)]).into_bytes();
        assert_eq!(bytes[bytes.len() - 4..], f32::NAN.to_le_bytes());
    }

    #[test]
    fn every_file_begins_with_a_mark_at_its_first_step() {
        let directory = tempfile::tempdir().unwrap();
        for (resume, first) in [(None, 0), (Some(6), 7)] {
            let mut board = TensorBoardWriter::create(directory.path(), resume).unwrap();
            let record = EvalRecord { step: first, valid_loss: 2.0, elapsed_seconds: 0.0 };
            board.report(&RunEvent::Record(&MetricsRecord::Eval(record))).unwrap();
        }
        let files = files(directory.path());
        assert_eq!(files.len(), 2);
        for (path, step) in files.iter().zip([None, Some(7)]) {
            let records = records(path);
            assert_eq!(records.len(), 3);
            let step: &[u8] = &step.map_or(Vec::new(), |step| vec![0x10, step]);
            // After the time: the step, and field 7 with the status START.
            assert_eq!(records[1][9..], [step, b"\x3a\x02\x08\x01"].concat());
        }
    }

    #[test]
    fn a_later_file_sorts_behind_earlier_ones() {
        let directory = tempfile::tempdir().unwrap();
        let ahead = directory.path().join(format!("{PREFIX}9000000000.other.1"));
        fs::write(&ahead, "").unwrap();
        let _board = TensorBoardWriter::create(directory.path(), Some(1)).unwrap();
        let files = files(directory.path());
        assert_eq!(files[0], ahead);
        assert!(files[1].to_string_lossy().contains("9000000001"));
    }
}
