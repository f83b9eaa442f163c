//! Rows of a plain text: its paragraphs, which blank lines separate.

use super::{
    location::{RawRow, RawRows, RowPlace},
    text::{TextFile, utf8},
};
use anyhow::anyhow;
use serde_json::json;

/// The number of bytes after which a paragraph ends at the next line.
const LONGEST: usize = 1 << 20;

/// Opens the paragraphs of a text, each a row with the key `text`. A paragraph of more than 1 MiB becomes several rows.
pub(super) fn open(text: TextFile) -> RawRows {
    let (mut reader, mut line, mut ended) = (text.into_read(), 0, false);
    Box::new(std::iter::from_fn(move || {
        let (mut bytes, mut first) = (Vec::new(), line + 1);
        while !ended {
            let from = bytes.len();
            match reader.read_until(b'\n', &mut bytes) {
                Ok(read) => ended = read == 0,
                Err(error) => {
                    ended = true;
                    let value = Err(anyhow!("the file cannot be read to its end: {error}"));
                    return Some(RawRow { place: RowPlace::Line(line + 1), value });
                }
            }
            line += 1;
            if bytes[from..].trim_ascii().is_empty() {
                bytes.truncate(from);
                if bytes.is_empty() {
                    first = line + 1;
                    continue;
                }
                break;
            }
            if bytes.len() > LONGEST {
                break;
            }
        }
        if bytes.is_empty() {
            return None;
        }
        let value = utf8(&bytes).map(|text| json!({"text": text.trim_end()}));
        Some(RawRow { place: RowPlace::Line(first), value })
    }))
}
