//! The text of a data file: decompressed, and decoded from UTF-8 or UTF-16.

use crate::identify::{self, Purpose};
use anyhow::{Context, Result, anyhow, bail};
use std::{
    io::Read,
    path::{Path, PathBuf},
};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The bytes of a data file.
pub(super) struct DataFile {
    /// The bytes, without compression.
    pub bytes: Vec<u8>,
    /// The name of the file, without the ending of a compressed file.
    pub name: PathBuf,
    /// True if the file was compressed.
    pub compressed: bool,
}

impl DataFile {
    /// Reads a file, and decompresses it if its first bytes are those of gzip or zstd.
    ///
    /// # Errors
    /// If the file cannot be read or its compressed data is damaged; the error says what stands at the path.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()));
        let bytes = bytes.map_err(|error| identify::explain(error, path, Purpose::Rows))?;
        let mut decompressed = Vec::new();
        let read = if bytes.starts_with(&GZIP) {
            flate2::read::MultiGzDecoder::new(&bytes[..]).read_to_end(&mut decompressed)
        } else if bytes.starts_with(&ZSTD) {
            zstd::Decoder::new(&bytes[..]).and_then(|mut decoder| decoder.read_to_end(&mut decompressed))
        } else {
            return Ok(Self { bytes, name: path.to_owned(), compressed: false });
        };
        read.map_err(|error| anyhow!("{}: expected complete compressed data: {error}", path.display()))?;
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_lowercase();
        let named = ["gz", "gzip", "zst", "zstd"].contains(&ending.as_str());
        let name = if named { path.with_extension("") } else { path.to_owned() };
        Ok(Self { bytes: decompressed, name, compressed: true })
    }

    /// Returns whether the name, without the ending of a compressed file, ends in `.extension`.
    pub(super) fn has_extension(&self, extension: &str) -> bool {
        self.name.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
    }

    /// Decodes UTF-8, or UTF-16 if it begins with a byte order mark. The mark itself is no part of the text.
    ///
    /// # Errors
    /// If the bytes are in another encoding, with the line, or are no text at all; `path` is the file's.
    pub(super) fn text(self, path: &Path) -> Result<String> {
        let units = match self.bytes.as_slice() {
            [0xff, 0xfe, rest @ ..] => rest.chunks(2).map(|unit| unit.try_into().map(u16::from_le_bytes)).collect(),
            [0xfe, 0xff, rest @ ..] => rest.chunks(2).map(|unit| unit.try_into().map(u16::from_be_bytes)).collect(),
            _ => return utf8_text(self.bytes, path),
        };
        let units: Result<Vec<u16>, _> = units;
        units
            .ok()
            .and_then(|units| String::from_utf16(&units).ok())
            .with_context(|| format!("{}: expected complete UTF-16, as its byte order mark says", path.display()))
    }
}

fn utf8_text(bytes: Vec<u8>, path: &Path) -> Result<String> {
    if let Some(found) = bytes.contains(&0).then(|| identify::advice(path, Purpose::Rows)).flatten() {
        bail!("{}: expected a text file or a Parquet file; {found}", path.display());
    }
    let error = match String::from_utf8(bytes) {
        Ok(text) => return Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)),
        Err(error) => error,
    };
    let (at, bytes) = (error.utf8_error().valid_up_to(), error.as_bytes());
    let before = &bytes[..at];
    let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    bail!(
        "{}:{line}: expected UTF-8, found the byte 0x{:02x} at byte {} of the line; if the file is in Windows-1252 or \
         Latin-1, convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW",
        path.display(),
        bytes[at],
        at - line_start + 1
    )
}
