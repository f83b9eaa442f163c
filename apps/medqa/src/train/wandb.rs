//! Runs for Weights & Biases, written like the offline runs of its client and uploaded by `wandb sync FOLDER`: nothing
//! is sent while a run trains.
//!
//! Sources: `wandb_internal.proto` of `wandb` 0.31 for the fields, its `datastore.py` (0.19) for the file header, and
//! <https://github.com/google/leveldb/blob/main/doc/log_format.md> for the records, here with zlib's checksum.

use super::{
    crc::CRC32,
    event::{Reporter, RunEvent},
    protobuf::ProtoMessage,
    record::{MetricsRecord, SCALAR_NAMES, Scalar},
    tensorboard::hostname,
};
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::{
    fs::{self, File},
    hash::{BuildHasher, RandomState},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// `:W&B`, the low half of the CRC-32 of "Weights & Biases", and version 0.
const HEADER: [u8; FRAGMENT_HEADER] = *b":W&B\xe1\xbe\x00";
const BLOCK_SIZE: usize = 32768;
/// The length of the header of each fragment of a record: checksum, length, type.
const FRAGMENT_HEADER: usize = 7;
/// The metric for the step, named as in Transformers: the x axis of all charts.
const STEP_METRIC: &str = "train/global_step";

/// The metadata of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunMetadata<'a> {
    pub project: &'a str,
    pub name: &'a str,
    /// The recipe.
    pub config: &'a Map<String, Value>,
}

/// The writer of an offline run.
pub(super) struct WandbWriter {
    file: File,
    path: PathBuf,
    /// The offset of the next record in the file.
    offset: usize,
    records: u64,
    rows: u64,
    /// Seconds since 1970.
    started: f64,
}

impl WandbWriter {
    /// Creates the run in a folder of `directory`: the existing folder of a resumed run, else a new one. Its contents
    /// are written anew from the `earlier` records, so that repeated steps are not in it twice.
    pub(super) fn create(directory: &Path, run: &RunMetadata, earlier: &[MetricsRecord]) -> Result<Self> {
        let before = earlier.last().map_or(0.0, MetricsRecord::elapsed_seconds);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = now.saturating_sub(Duration::try_from_secs_f64(before).unwrap_or_default());
        let (folder, id) = match existing_run(directory)? {
            Some(found) => found,
            None => {
                let id = new_id();
                (directory.join(format!("offline-run-{}-{id}", timestamp(now.as_secs()))), id)
            }
        };
        let path = folder.join(format!("run-{id}.wandb"));
        let partial = folder.join(format!("run-{id}.wandb.part"));
        let context = || format!("{}: cannot be written", path.display());
        let file = fs::create_dir_all(folder.join("files")).and_then(|()| File::create(&partial));
        let file = file.with_context(context)?;
        let mut log = Self { file, path: path.clone(), offset: 0, records: 0, rows: 0, started: started.as_secs_f64() };
        log.write_header(&id, run, started)?;
        earlier.iter().try_for_each(|record| log.write(record))?;
        fs::rename(&partial, &path).with_context(context)?;
        // `wandb sync` skips runs that have these marker files of an earlier upload.
        for mark in ["synced", "syncstate"] {
            drop(fs::remove_file(folder.join(format!("run-{id}.wandb.{mark}"))));
        }
        Ok(log)
    }

    fn write(&mut self, record: &MetricsRecord) -> Result<()> {
        if matches!(record, MetricsRecord::Note(_)) {
            return Ok(());
        }
        self.write_row(record.step(), record.elapsed_seconds(), &record.scalars())
    }

    /// Writes the scalars of a step: a row of the history, and the latest values of the summary.
    fn write_row(&mut self, step: usize, seconds: f64, scalars: &[Scalar]) -> Result<()> {
        let mut row = vec![
            ("_step", json!(self.rows)),
            ("_runtime", json!(seconds)),
            ("_timestamp", json!(self.started + seconds)),
            (STEP_METRIC, json!(step)),
        ];
        let finite = scalars.iter().filter(|(_, value)| value.is_finite());
        row.extend(finite.map(|&(name, value)| (name, json!(value))));
        let items = |field| {
            row.iter()
                .fold(ProtoMessage::default(), |all, (name, value)| all.message(field, encode_item(2, name, value)))
        };
        let summary = items(1);
        let history = items(1).message(2, ProtoMessage::default().integer(1, self.rows));
        self.rows += 1;
        self.record(3, summary)?;
        self.record(2, history)
    }

    /// Writes the end of the run: exit code 0 for success.
    fn finish(&mut self, exit_code: u8) -> Result<()> {
        self.record(18, ProtoMessage::default().integer(1, exit_code.into()))
    }

    /// Returns the folder for `wandb sync`.
    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    fn write_header(&mut self, id: &str, run: &RunMetadata, started: Duration) -> Result<()> {
        self.append(&HEADER)?;
        let version = ProtoMessage::default().bytes(1, env!("CARGO_PKG_VERSION")).bytes(2, "0.70.0");
        self.record(21, ProtoMessage::default().message(1, version))?;
        let config = run.config.iter();
        let config =
            config.fold(ProtoMessage::default(), |all, (key, value)| all.message(1, encode_item(1, key, value)));
        let time = ProtoMessage::default().integer(1, started.as_secs()).integer(2, started.subsec_nanos().into());
        let about = ProtoMessage::default().bytes(1, id).bytes(3, run.project).message(4, config).bytes(8, run.name);
        self.record(17, about.bytes(13, hostname()).message(17, time))?;
        let options = ProtoMessage::default().integer(1, 1).integer(3, 1);
        for name in SCALAR_NAMES {
            self.record(12, ProtoMessage::default().bytes(1, name).bytes(4, STEP_METRIC).message(6, options.clone()))?;
        }
        Ok(())
    }

    /// Writes a `Record`, which holds the message `about` in its `field`.
    fn record(&mut self, field: u64, about: ProtoMessage) -> Result<()> {
        self.records += 1;
        let record = ProtoMessage::default().integer(1, self.records).message(field, about);
        let framed = frame_record(&record.into_bytes(), self.offset);
        self.append(&framed)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| format!("{}: cannot be written", self.path.display()))?;
        self.offset += bytes.len();
        Ok(())
    }
}

impl Reporter for WandbWriter {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        match event {
            RunEvent::Record(record) => self.write(record),
            RunEvent::Finished(end) => {
                eprintln!("to upload the run: wandb sync {}", self.folder().display());
                self.finish(end.exit_code())
            }
            RunEvent::Started(_) | RunEvent::TraceWritten(_) => Ok(()),
        }
    }
}

/// Encodes an item of the history, the summary or the configuration; `field` is the field number of its name.
fn encode_item(field: u64, name: &str, value: &Value) -> ProtoMessage {
    ProtoMessage::default().bytes(field, name).bytes(16, value.to_string())
}

/// Splits a record, which starts at `offset` of the file, into fragments with headers: no fragment crosses a block.
fn frame_record(mut record: &[u8], mut offset: usize) -> Vec<u8> {
    const FULL: u8 = 1;
    const FIRST: u8 = 2;
    const MIDDLE: u8 = 3;
    const LAST: u8 = 4;
    let (mut framed, mut first) = (Vec::new(), true);
    loop {
        let left = BLOCK_SIZE - offset % BLOCK_SIZE;
        if left < FRAGMENT_HEADER {
            framed.resize(framed.len() + left, 0);
            offset += left;
            continue;
        }
        let (piece, rest) = record.split_at(record.len().min(left - FRAGMENT_HEADER));
        let kind = match (first, rest.is_empty()) {
            (true, true) => FULL,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        framed.extend(CRC32.checksum(&[&[kind], piece]).to_le_bytes());
        framed.extend((piece.len() as u16).to_le_bytes());
        framed.push(kind);
        framed.extend(piece);
        (offset, record, first) = (offset + FRAGMENT_HEADER + piece.len(), rest, false);
        if rest.is_empty() {
            return framed;
        }
    }
}

/// Returns the folder that an earlier process wrote into, and the run's id.
fn existing_run(directory: &Path) -> Result<Option<(PathBuf, String)>> {
    if !directory.exists() {
        return Ok(None);
    }
    let context = || format!("{}: cannot be read", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some((_, id)) = name.strip_prefix("offline-run-").and_then(|rest| rest.split_once('-')) {
            return Ok(Some((path, id.to_owned())));
        }
    }
    Ok(None)
}

/// Returns a random id of eight letters and digits, as the client's.
fn new_id() -> String {
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let random = RandomState::new().hash_one(std::process::id());
    (0..8).map(|place| LETTERS[(random / 36_u64.pow(place) % 36) as usize] as char).collect()
}

/// Formats a time as `YYYYMMDD_HHMMSS`, in UTC. Years begin in March here, so that the leap day is the last: month `m`
/// of such a year begins on day `(153 * m + 2) / 5`.
fn timestamp(seconds: u64) -> String {
    let (days, time) = (seconds / 86400, seconds % 86400);
    // 400 years have 146 097 days, and 719 468 lie between 1 March of the year 0 and 1970.
    let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + next;
    format!("{year:04}{month:02}{day:02}_{:02}{:02}{:02}", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::record::EvalRecord;

    /// Returns the records of a file, put together from their fragments, and checks the fragments' checksums and
    /// places.
    fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
        assert_eq!(bytes[..FRAGMENT_HEADER], HEADER);
        let (mut at, mut records, mut open) = (FRAGMENT_HEADER, Vec::new(), Vec::new());
        while at < bytes.len() {
            let left = BLOCK_SIZE - at % BLOCK_SIZE;
            if left < FRAGMENT_HEADER {
                assert!(bytes[at..at + left].iter().all(|&byte| byte == 0));
                at += left;
                continue;
            }
            let length = usize::from(u16::from_le_bytes([bytes[at + 4], bytes[at + 5]]));
            assert!(FRAGMENT_HEADER + length <= left, "a piece crosses a block");
            let piece = &bytes[at + FRAGMENT_HEADER..at + FRAGMENT_HEADER + length];
            assert_eq!(bytes[at..at + 4], CRC32.checksum(&[&bytes[at + 6..at + 7], piece]).to_le_bytes());
            open.extend(piece);
            if [1, 4].contains(&bytes[at + 6]) {
                records.push(std::mem::take(&mut open));
            }
            at += FRAGMENT_HEADER + length;
        }
        assert!(open.is_empty(), "the last record lacks its end");
        records
    }

    fn config() -> Map<String, Value> {
        json!({"train": {"epochs": 3}}).as_object().unwrap().clone()
    }

    fn create(directory: &Path, earlier: &[MetricsRecord]) -> WandbWriter {
        WandbWriter::create(directory, &RunMetadata { project: "p", name: "n", config: &config() }, earlier).unwrap()
    }

    fn record(step: usize) -> MetricsRecord {
        let (valid_loss, elapsed_seconds) = (1.0 / step as f64, step as f64);
        MetricsRecord::Eval(EvalRecord { step, valid_loss, elapsed_seconds })
    }

    /// Compares with the file that wandb 0.19 makes of the same records, by tests/dashboards/record_vectors.py.
    #[test]
    fn files_are_those_of_the_client() {
        let (mut file, mut expected) = (HEADER.to_vec(), Vec::new());
        for length in (32700..32800).chain(0..100).chain([200_000]) {
            let record: Vec<u8> = (0..length).map(|place| (place % 251) as u8).collect();
            file.extend(frame_record(&record, file.len()));
            expected.push(record);
        }
        assert_eq!(records(&file), expected);
        assert_eq!((file.len(), CRC32.checksum(&[&file])), (3482055, 0xcaa684ca));
    }

    /// Compares a row in the same way.
    #[test]
    fn rows_are_those_of_the_client() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("row");
        let file = File::create(&path).unwrap();
        let mut log =
            WandbWriter { file, path: path.clone(), offset: FRAGMENT_HEADER, records: 0, rows: 0, started: 100.0 };
        log.write_row(7, 2.5, &[("train/loss", 1.25), ("train/grad_norm", f64::NAN)]).unwrap();
        assert_eq!(CRC32.checksum(&[&fs::read(&path).unwrap()]), 0x6c133af1);
    }

    #[test]
    fn a_resumed_run_goes_on_in_its_folder_with_the_lines_that_are_left() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = create(directory.path(), &[]);
        let (folder, path) = (log.folder().to_owned(), log.path.clone());
        (1..=9).for_each(|step| log.write(&record(step)).unwrap());
        let before = records(&fs::read(&path).unwrap()).len();
        drop(log);
        let synced = PathBuf::from(format!("{}.synced", path.display()));
        fs::write(&synced, "").unwrap();

        let mut log = create(directory.path(), &[record(1), record(2)]);
        assert_eq!(log.folder(), folder);
        assert!(!synced.exists());
        log.write(&record(3)).unwrap();
        log.finish(0).unwrap();
        let after = records(&fs::read(&path).unwrap());
        // Every row has two records, and there are three rows instead of nine; one more record ends the run.
        assert_eq!(after.len(), before - 2 * (9 - 3) + 1);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "`files` and the run");
    }

    #[test]
    fn folders_are_named_by_the_date() {
        assert_eq!(timestamp(0), "19700101_000000");
        assert_eq!(timestamp(951_782_399), "20000228_235959");
        assert_eq!(timestamp(951_782_400), "20000229_000000");
        assert_eq!(timestamp(1_735_689_599), "20241231_235959");
        assert_eq!(timestamp(4_107_542_400), "21000301_000000");
        let id = new_id();
        assert!(id.len() == 8 && id.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase()), "{id}");
    }
}
