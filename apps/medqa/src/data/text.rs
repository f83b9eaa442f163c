//! The bytes of a data file: decompressed, and decoded to UTF-8.

use crate::identify::{self, Purpose};
use anyhow::{Context, Result, anyhow, bail};
use encoding_rs::{Decoder, DecoderResult, Encoding, GB18030, UTF_16BE, UTF_16LE};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read},
    path::{Path, PathBuf},
};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The number of bytes by which the kind of a file and its encoding are recognized.
const HEAD: usize = 64 << 10;

/// A data file that is read from its beginning to its end.
pub(super) struct DataFile {
    /// The name of the file, without the ending of a compressed file.
    pub name: PathBuf,
    /// True if the file was compressed.
    pub compressed: bool,
    /// The first bytes, without compression.
    pub head: Vec<u8>,
    rest: Box<dyn Read + Send>,
}

impl DataFile {
    /// Opens a file, and decompresses it if its first bytes are those of gzip or zstd.
    ///
    /// # Errors
    /// If the file cannot be read or its first bytes are damaged; the error says what stands at the path.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let opened = File::open(path).and_then(|mut file| Ok((read_head(&mut file)?, file)));
        let opened = opened.with_context(|| format!("{}: cannot be read", path.display()));
        let (head, file) = opened.map_err(|error| identify::explain(error, path, Purpose::Rows))?;
        let (gzip, zstd) = (head.starts_with(&GZIP), head.starts_with(&ZSTD));
        if !gzip && !zstd {
            return Ok(Self { name: path.to_owned(), compressed: false, head, rest: Box::new(file) });
        }
        let whole = Cursor::new(head).chain(file);
        let damaged = |error| anyhow!("{}: expected complete compressed data: {error}", path.display());
        let mut rest: Box<dyn Read + Send> = if gzip {
            Box::new(flate2::read::MultiGzDecoder::new(whole))
        } else {
            Box::new(zstd::Decoder::new(whole).map_err(damaged)?)
        };
        let head = read_head(&mut rest).map_err(damaged)?;
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_lowercase();
        let named = ["gz", "gzip", "zst", "zstd"].contains(&ending.as_str());
        let name = if named { path.with_extension("") } else { path.to_owned() };
        Ok(Self { name, compressed: true, head, rest })
    }

    /// Returns whether the name, without the ending of a compressed file, ends in `.extension`.
    pub(super) fn has_extension(&self, extension: &str) -> bool {
        self.name.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
    }

    /// Decodes UTF-8, UTF-16 if the file begins with a byte order mark, or GB18030 if its first bytes are no UTF-8 and
    /// are Chinese in GB18030. The mark is no part of the text. UTF-8 is checked where a row is read.
    ///
    /// # Errors
    /// If the first bytes are no text; `path` is the file's.
    pub(super) fn text(self, path: &Path) -> Result<TextFile> {
        let encoding: Option<&'static Encoding> = match self.head.as_slice() {
            [0xff, 0xfe, ..] => Some(UTF_16LE),
            [0xfe, 0xff, ..] => Some(UTF_16BE),
            head if head.contains(&0) => match identify::advice(path, Purpose::Rows) {
                Some(found) => bail!("{}: expected a text file or a Parquet file; {found}", path.display()),
                None => None,
            },
            head if is_gb18030(head) => {
                eprintln!("note: {} is read as GB18030, because it is no UTF-8", path.display());
                Some(GB18030)
            }
            _ => None,
        };
        let mut head = Cursor::new(self.head);
        if head.get_ref().starts_with(b"\xef\xbb\xbf") {
            head.set_position(3);
        }
        let whole: Box<dyn Read + Send> = Box::new(head.chain(self.rest));
        match encoding {
            Some(encoding) => TextFile::new(Box::new(DecodedRead::new(whole, encoding)), path),
            None => TextFile::new(whole, path),
        }
    }
}

/// Reads the first bytes.
fn read_head(from: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    from.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Returns whether bytes are no UTF-8, but Chinese in GB18030.
fn is_gb18030(head: &[u8]) -> bool {
    if std::str::from_utf8(head).map_or_else(|error| error.error_len().is_none(), |_| true) {
        return false;
    }
    let mut text = String::with_capacity(head.len() * 3);
    let mut decoder = GB18030.new_decoder_without_bom_handling();
    let (result, _) = decoder.decode_to_string_without_replacement(head, &mut text, false);
    let other = text.chars().filter(|c| !c.is_ascii()).count();
    let chinese = |c: &char| matches!(c, '\u{4e00}'..='\u{9fff}' | '\u{3000}'..='\u{303f}' | '\u{ff00}'..='\u{ffef}');
    result == DecoderResult::InputEmpty && text.chars().filter(chinese).count() * 10 >= other * 9
}

/// Decodes what it reads to UTF-8; malformed bytes are an error.
struct DecodedRead {
    inner: Box<dyn Read + Send>,
    encoding: &'static Encoding,
    decoder: Decoder,
    decoded: Vec<u8>,
    at: usize,
    ended: bool,
}

impl DecodedRead {
    fn new(inner: Box<dyn Read + Send>, encoding: &'static Encoding) -> Self {
        let decoder = encoding.new_decoder_with_bom_removal();
        Self { inner, encoding, decoder, decoded: Vec::new(), at: 0, ended: false }
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; 32 << 10];
        let read = self.inner.read(&mut bytes)?;
        self.ended = read == 0;
        let mut decoded = vec![0; self.decoder.max_utf8_buffer_length(read).unwrap_or(read * 4 + 16)];
        let (result, _, written) =
            self.decoder.decode_to_utf8_without_replacement(&bytes[..read], &mut decoded, self.ended);
        if result != DecoderResult::InputEmpty {
            let name = if self.encoding == GB18030 { "GB18030" } else { "UTF-16, as its byte order mark says" };
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("expected complete {name}")));
        }
        decoded.truncate(written);
        (self.decoded, self.at) = (decoded, 0);
        Ok(())
    }
}

impl Read for DecodedRead {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.decoded.len() && !self.ended {
            self.fill()?;
        }
        let count = into.len().min(self.decoded.len() - self.at);
        into[..count].copy_from_slice(&self.decoded[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// The text of a data file.
pub(super) struct TextFile {
    /// The first bytes of the text.
    pub head: Vec<u8>,
    rest: Box<dyn Read + Send>,
}

impl TextFile {
    fn new(mut rest: Box<dyn Read + Send>, path: &Path) -> Result<Self> {
        let head = read_head(&mut *rest).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        Ok(Self { head, rest })
    }

    /// Returns the beginning of the text, without white space before it.
    pub(super) fn start(&self) -> String {
        String::from_utf8_lossy(&self.head).trim_start().to_owned()
    }

    /// Returns the whole text as bytes.
    pub(super) fn into_read(self) -> Box<dyn BufRead + Send> {
        Box::new(BufReader::with_capacity(256 << 10, Cursor::new(self.head).chain(self.rest)))
    }
}

/// Checks that the bytes of a row are UTF-8.
///
/// # Errors
/// The first byte that is not, and its place.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let line_start = bytes[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        anyhow!(
            "expected UTF-8, found the byte 0x{:02x} at byte {} of the line; if the file is in Windows-1252 or Latin-1, \
             convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW",
            bytes[at],
            at - line_start + 1
        )
    })
}
