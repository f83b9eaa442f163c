//! Splits a stream of JSON into its values, so that an array of any size is read one element at a time.

use anyhow::{Result, anyhow, bail};
use std::io::BufRead;

/// The bytes of a value.
pub(super) struct ScannedValue {
    /// The line on which it begins, counted from 1.
    pub line: usize,
    pub bytes: Vec<u8>,
}

/// The values of a stream: the elements of an array, or values one after the other.
pub(super) struct JsonScanner {
    reader: Box<dyn BufRead + Send>,
    line: usize,
    array: bool,
    /// True before the first value, where an array has no comma.
    first: bool,
}

impl JsonScanner {
    /// Creates a scanner for the elements of an array.
    ///
    /// # Errors
    /// If the stream does not begin with an array, or cannot be read.
    pub(super) fn array(reader: Box<dyn BufRead + Send>) -> Result<Self> {
        let mut scanner = Self { reader, line: 1, array: true, first: true };
        match scanner.next_mark()? {
            Some(b'[') => scanner.reader.consume(1),
            _ => bail!("expected an array"),
        }
        Ok(scanner)
    }

    /// Creates a scanner for values one after the other.
    pub(super) fn values(reader: Box<dyn BufRead + Send>) -> Self {
        Self { reader, line: 1, array: false, first: true }
    }

    /// Returns the next value, which may be malformed inside; none at the end.
    ///
    /// # Errors
    /// If the stream cannot be read, or the values are not separated as they should be.
    pub(super) fn next_value(&mut self) -> Result<Option<ScannedValue>> {
        let mark = self.next_mark()?;
        if !self.array {
            return if mark.is_none() { Ok(None) } else { self.value().map(Some) };
        }
        match mark {
            None => bail!("EOF while parsing a list; the array is not closed"),
            Some(b']') => {
                self.reader.consume(1);
                let rest = self.next_mark()?;
                return rest
                    .map_or(Ok(None), |byte| Err(anyhow!("trailing characters after the array: {:?}", byte as char)));
            }
            Some(b',') if !self.first => {
                self.reader.consume(1);
                if matches!(self.next_mark()?, None | Some(b',' | b']')) {
                    bail!("expected a value after a comma on line {}", self.line);
                }
            }
            Some(_) if self.first => {}
            Some(byte) => bail!("expected `,` or `]` on line {}, found {:?}", self.line, byte as char),
        }
        self.first = false;
        self.value().map(Some)
    }

    /// Skips white space and returns the byte after it, which is not consumed.
    fn next_mark(&mut self) -> Result<Option<u8>> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let space = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.line += buffer[..space].iter().filter(|&&byte| byte == b'\n').count();
            let found = buffer.get(space).copied();
            self.reader.consume(space);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// Reads a value up to its end: the matching bracket, the closing quote, or the mark after a number or word.
    fn value(&mut self) -> Result<ScannedValue> {
        let mut value = ScannedValue { line: self.line, bytes: Vec::new() };
        let (mut depth, mut string, mut escaped) = (0_usize, false, false);
        loop {
            let buffer = self.reader.fill_buf()?;
            let (mut taken, mut ended) = (0, buffer.is_empty());
            for &byte in buffer {
                if depth == 0 && !string && taken + value.bytes.len() > 0 && ends_scalar(byte) {
                    ended = true;
                    break;
                }
                taken += 1;
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if string => escaped = true,
                    b'"' => string = !string,
                    _ if string => {}
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => continue,
                }
                if depth == 0 && !string && matches!(byte, b'}' | b']' | b'"') {
                    ended = true;
                    break;
                }
            }
            self.line += buffer[..taken].iter().filter(|&&byte| byte == b'\n').count();
            value.bytes.extend_from_slice(&buffer[..taken]);
            self.reader.consume(taken);
            if ended {
                return Ok(value);
            }
        }
    }
}

fn ends_scalar(byte: u8) -> bool {
    byte.is_ascii_whitespace() || matches!(byte, b',' | b']' | b'}')
}
