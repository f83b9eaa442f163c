//! Rows of a Parquet file or of an Arrow file, a batch at a time.

use super::{
    csv_rows::JSON_COLUMN,
    location::{RawRow, RawRows, RowPlace},
};
use crate::catch_panic::catch_panic;
use anyhow::{Context, Result, anyhow, bail};
use arrow_array::{Array, ArrayRef, BinaryArray, LargeBinaryArray, LargeStringArray, RecordBatch, StringArray};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_json::{WriterBuilder, writer::LineDelimited};
use arrow_schema::{DataType, Field, Schema};
use parquet::{arrow::arrow_reader::ParquetRecordBatchReaderBuilder, basic::Compression};
use serde_json::Value;
use std::{fs::File, io::BufReader, path::Path, sync::Arc};

/// The first bytes of a Parquet file, of an Arrow file and of an Arrow stream.
const PARQUET: &[u8] = b"PAR1";
const ARROW: &[u8] = b"ARROW1";
const ARROW_STREAM: &[u8] = &[0xff, 0xff, 0xff, 0xff];

type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

/// A kind of file that holds columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ColumnarKind {
    Parquet,
    Arrow,
    ArrowStream,
}

impl ColumnarKind {
    /// Recognizes a file by its first bytes.
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        [(PARQUET, Self::Parquet), (ARROW, Self::Arrow), (ARROW_STREAM, Self::ArrowStream)]
            .into_iter()
            .find_map(|(magic, kind)| head.starts_with(magic).then_some(kind))
    }

    /// Returns the name of the kind.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Parquet => "Parquet",
            Self::Arrow | Self::ArrowStream => "Arrow",
        }
    }
}

/// Opens the rows of a file. Structs become objects without their null values; dates, times and decimals become text.
///
/// # Errors
/// If the file is damaged or compressed by a codec that is not built in. A damaged batch ends the rows with an error.
pub(super) fn open(path: &Path, kind: ColumnarKind) -> Result<RawRows> {
    let expected = format!("{}: expected a whole {} file", path.display(), kind.name());
    let batches = guarded(|| open_batches(path, kind)).with_context(|| expected.clone())?;
    let (mut batches, mut rows, mut number, mut ended) = (batches, Vec::new().into_iter(), 0, false);
    Ok(Box::new(std::iter::from_fn(move || {
        loop {
            if let Some(value) = rows.next() {
                number += 1;
                return Some(RawRow { place: RowPlace::Row(number), value: Ok(value) });
            }
            if ended {
                return None;
            }
            let next = guarded(|| batches.next().map(|batch| json_rows(&batch?)).transpose());
            match next.map_err(|error| error.context(format!("expected a whole {} file", kind.name()))) {
                Ok(None) => return None,
                Ok(Some(batch)) => rows = batch.into_iter(),
                Err(problem) => {
                    ended = true;
                    return Some(RawRow { place: RowPlace::Row(number + 1), value: Err(problem) });
                }
            }
        }
    })))
}

/// Runs work of the libraries, which panic on some damaged files.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_panic(work).unwrap_or_else(|problem| Err(anyhow!("it is damaged: {problem}")))
}

fn open_batches(path: &Path, kind: ColumnarKind) -> Result<Batches> {
    let file = File::open(path)?;
    Ok(match kind {
        ColumnarKind::Parquet => {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
            let columns = builder.metadata().row_groups().iter().flat_map(|group| group.columns());
            for codec in columns.map(|column| column.compression()) {
                if matches!(codec, Compression::BROTLI(_) | Compression::LZO) {
                    bail!("its codec is {codec}, which is not read here; write it with snappy, zstd, gzip or lz4");
                }
            }
            Box::new(builder.with_batch_size(1024).build()?.map(|batch| Ok(batch?)))
        }
        ColumnarKind::Arrow => Box::new(FileReader::try_new_buffered(file, None)?.map(|batch| Ok(batch?))),
        ColumnarKind::ArrowStream => {
            Box::new(StreamReader::try_new(BufReader::new(file), None)?.map(|batch| Ok(batch?)))
        }
    })
}

/// Returns the rows of a batch as JSON.
fn json_rows(batch: &RecordBatch) -> Result<Vec<Value>> {
    let batch = with_text(batch)?;
    let mut writer = WriterBuilder::new().build::<_, LineDelimited>(Vec::new());
    writer.write(&batch)?;
    writer.finish()?;
    let bytes = writer.into_inner();
    let mut rows = serde_json::Deserializer::from_slice(&bytes).into_iter().collect::<Result<Vec<Value>, _>>()?;
    rows.iter_mut().try_for_each(parse_json_columns)?;
    Ok(rows)
}

/// Replaces columns whose names end in `:json` by the values that their texts hold.
fn parse_json_columns(row: &mut Value) -> Result<()> {
    let Some(fields) = row.as_object_mut().filter(|row| row.keys().any(|name| name.ends_with(JSON_COLUMN))) else {
        return Ok(());
    };
    for (name, value) in std::mem::take(fields) {
        match (name.strip_suffix(JSON_COLUMN), value.as_str()) {
            (Some(plain), Some(text)) => {
                let value = serde_json::from_str(text).with_context(|| format!("`{name}`: expected JSON"))?;
                fields.insert(plain.to_owned(), value);
            }
            _ => {
                fields.insert(name, value);
            }
        }
    }
    Ok(())
}

/// Replaces columns of bytes, which some programs write for text, by text.
fn with_text(batch: &RecordBatch) -> Result<RecordBatch> {
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let text: Option<ArrayRef> = match column.data_type() {
            DataType::Binary => {
                let bytes = column.as_any().downcast_ref::<BinaryArray>().cloned();
                bytes.map(StringArray::try_from_binary).transpose()?.map(|text| Arc::new(text) as ArrayRef)
            }
            DataType::LargeBinary => {
                let bytes = column.as_any().downcast_ref::<LargeBinaryArray>().cloned();
                bytes.map(LargeStringArray::try_from_binary).transpose()?.map(|text| Arc::new(text) as ArrayRef)
            }
            _ => None,
        };
        let column = text.unwrap_or_else(|| Arc::clone(column));
        fields.push(Field::new(field.name(), column.data_type().clone(), true));
        columns.push(column);
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}
