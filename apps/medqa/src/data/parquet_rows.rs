//! Rows of a Parquet file.

use super::location::{JsonRows, RowLocation};
use crate::catch_panic::catch_panic;
use anyhow::{Context, Result, anyhow, bail};
use parquet::{
    basic::Compression,
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};
use serde_json::{Map, Number, Value};
use std::{fs::File, path::Path};

/// The first and the last bytes of a Parquet file.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// Reads the rows of a file. Structs become objects; dates, times and decimals become text.
///
/// # Errors
/// If the file is damaged or compressed by a codec that is not built in. A value that JSON cannot hold is an error of
/// its row alone.
pub(super) fn read(path: &Path) -> Result<JsonRows> {
    // The reader panics on some damaged files.
    let rows = catch_panic(|| read_rows(path)).unwrap_or_else(|problem| Err(anyhow!("it is damaged: {problem}")));
    rows.with_context(|| format!("{}: expected a whole Parquet file", path.display()))
}

fn read_rows(path: &Path) -> Result<JsonRows> {
    let reader = SerializedFileReader::new(File::open(path)?)?;
    let columns = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    for codec in columns.map(|column| column.compression()) {
        if matches!(codec, Compression::BROTLI(_) | Compression::LZO) {
            bail!("its codec is {codec}, which is not read here; write it with snappy, zstd, gzip or lz4");
        }
    }
    let mut rows = JsonRows::new();
    for row in reader.get_row_iter(None)? {
        rows.push((RowLocation::Row(rows.len() + 1), object(row?)));
    }
    Ok(rows)
}

fn object(row: Row) -> Result<Value> {
    let mut object = Map::new();
    for (column, field) in row.into_columns() {
        let value = value(field).with_context(|| format!("`{column}`"))?;
        object.insert(column, value);
    }
    Ok(Value::Object(object))
}

fn value(field: Field) -> Result<Value> {
    let float = |value: f64| Number::from_f64(value).map(Value::Number).context("expected a finite number");
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => float(value.into())?,
        Field::Float(value) => float(value.into())?,
        Field::Double(value) => float(value)?,
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => bail!("expected text, found {} bytes that are none", bytes.len()),
        },
        Field::Group(row) => object(row)?,
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(value).collect::<Result<_>>()?),
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, entry) in map.entries() {
                let key = match key {
                    Field::Str(text) => text.clone(),
                    other => other.to_string(),
                };
                object.insert(key, value(entry.clone())?);
            }
            Value::Object(object)
        }
        other => Value::String(other.to_string()),
    })
}
