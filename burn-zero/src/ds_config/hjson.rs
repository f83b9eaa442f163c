//! A reader of Hjson, the superset of JSON in which DeepSpeed reads a ds_config (`hjson.load`): comments (`#`, `//` and
//! `/* */`), optional and trailing commas, keys and strings without quotes, strings in single quotes, a file without
//! outer braces. Strings over several lines (`'''`) are refused. Duplicate keys are refused, as DeepSpeed refuses them.
//!
//! It is written here because the crates that read Hjson do not fit: deser-hjson 2.2 panics on some malformed strings
//! and skips stray characters, and serde-hjson 1.1 loses the line of a duplicate key and keeps single quotes.

use crate::ConfigError;
use serde_json::{Map, Number, Value};

/// The largest depth of nested blocks and lists.
const MAX_DEPTH: usize = 64;

/// A syntax error with its position; line and column count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} at line {line} column {column}")]
struct HjsonError {
    message: String,
    line: usize,
    column: usize,
}

/// Parses a ds_config and returns its top-level object; an empty file is an empty object.
pub(super) fn parse(text: &str) -> Result<Map<String, Value>, ConfigError> {
    let mut reader = HjsonReader { text: text.strip_prefix('\u{feff}').unwrap_or(text), position: 0, depth: 0 };
    let value = reader.document().map_err(|error| ConfigError::Syntax { format: "Hjson", source: error.into() })?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(ConfigError::invalid_value("the file", "keys and values", other.to_string())),
    }
}

struct HjsonReader<'a> {
    text: &'a str,
    /// The number of bytes that have been read.
    position: usize,
    /// The number of blocks and lists around the position.
    depth: usize,
}

impl<'a> HjsonReader<'a> {
    fn document(&mut self) -> Result<Value, HjsonError> {
        self.skip_blank()?;
        let value = match self.peek() {
            Some('{' | '[') => self.value()?,
            _ => self.object(None)?,
        };
        self.skip_blank()?;
        if self.peek().is_some() {
            Err(self.error(format!("expected the end, found {}", self.found())))
        } else {
            Ok(value)
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.position..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    /// Reads `expected` if it comes next.
    fn accept(&mut self, expected: &str) -> bool {
        let accepted = self.rest().starts_with(expected);
        self.position += if accepted { expected.len() } else { 0 };
        accepted
    }

    fn error(&self, message: impl Into<String>) -> HjsonError {
        let before = &self.text[..self.position];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let (line, column) = (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1);
        HjsonError { message: message.into(), line, column }
    }

    /// Returns the next characters of the line for a message.
    fn found(&self) -> String {
        match self.rest().lines().next() {
            None => "the end of the file".to_owned(),
            Some(line) => format!("`{}`", line.chars().take(20).collect::<String>()),
        }
    }

    /// Skips white space and comments.
    fn skip_blank(&mut self) -> Result<(), HjsonError> {
        loop {
            let rest = self.rest();
            let blank = rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
            let comment = if rest.starts_with('#') || rest.starts_with("//") {
                rest.find(['\n', '\r']).unwrap_or(rest.len())
            } else if rest.starts_with("/*") {
                rest.find("*/").ok_or_else(|| self.error("the comment `/*` has no end"))? + 2
            } else {
                0
            };
            if blank + comment == 0 {
                return Ok(());
            }
            self.position += blank.max(comment);
        }
    }

    fn value(&mut self) -> Result<Value, HjsonError> {
        match self.peek() {
            Some(quote @ ('"' | '\'')) => self.quoted(quote).map(Value::String),
            Some('{') => self.nested(|reader| reader.object(Some('}'))),
            Some('[') => self.nested(Self::array),
            Some('}' | ']' | ',' | ':') | None => Err(self.error(format!("expected a value, found {}", self.found()))),
            Some(_) => Ok(self.unquoted()),
        }
    }

    fn nested(&mut self, read: impl FnOnce(&mut Self) -> Result<Value, HjsonError>) -> Result<Value, HjsonError> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(format!("blocks and lists are nested more than {MAX_DEPTH} deep")));
        }
        (self.position, self.depth) = (self.position + 1, self.depth + 1);
        let value = read(self);
        self.depth -= 1;
        value
    }

    fn array(&mut self) -> Result<Value, HjsonError> {
        let mut items = Vec::new();
        self.skip_blank()?;
        while !self.accept("]") {
            items.push(self.value()?);
            self.skip_separator()?;
        }
        Ok(items.into())
    }

    /// Reads keys and values up to `end`; without one, up to the end of the file.
    fn object(&mut self, end: Option<char>) -> Result<Value, HjsonError> {
        let mut map = Map::new();
        self.skip_blank()?;
        while self.peek() != end {
            let start = self.position;
            let key = self.key()?;
            if map.contains_key(&key) {
                self.position = start;
                return Err(self.error(format!("the key `{key}` appears twice")));
            }
            self.skip_blank()?;
            if !self.accept(":") {
                return Err(self.error(format!("expected `:` after the key `{key}`, found {}", self.found())));
            }
            self.skip_blank()?;
            map.insert(key, self.value()?);
            self.skip_separator()?;
        }
        self.position += end.map_or(0, char::len_utf8);
        Ok(map.into())
    }

    /// Skips what separates two entries, including an optional comma.
    fn skip_separator(&mut self) -> Result<(), HjsonError> {
        self.skip_blank()?;
        self.accept(",");
        self.skip_blank()
    }

    fn key(&mut self) -> Result<String, HjsonError> {
        if let Some(quote @ ('"' | '\'')) = self.peek() {
            return self.quoted(quote);
        }
        let rest = self.rest();
        let length = rest.find(|c: char| c.is_whitespace() || "{}[],:".contains(c)).unwrap_or(rest.len());
        if length == 0 {
            return Err(self.error(format!("expected a key, found {}", self.found())));
        }
        self.position += length;
        Ok(rest[..length].to_owned())
    }

    /// Reads a string in quotes.
    fn quoted(&mut self, quote: char) -> Result<String, HjsonError> {
        if self.rest().starts_with("'''") {
            return Err(self.error("strings over several lines (''') are not read; write the string in double quotes"));
        }
        // The same string as JSON, whose parser decodes the escapes.
        let mut json = String::from('"');
        let mut characters = self.rest()[1..].char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => match characters.next() {
                    Some((_, '\'')) => json.push('\''),
                    Some((_, escaped)) => json.extend(['\\', escaped]),
                    None => break,
                },
                end if end == quote => {
                    json.push('"');
                    let string = serde_json::from_str(&json).map_err(|_| {
                        let expected = "expected a string without line breaks and with the escapes of JSON";
                        self.error(format!("{expected}, found {}", self.found()))
                    })?;
                    self.position += 1 + at + 1;
                    return Ok(string);
                }
                '"' => json.push_str("\\\""),
                other => json.push(other),
            }
        }
        Err(self.error("the string has no end"))
    }

    /// Reads a number, `true`, `false` or `null`, which end at a separator or comment; or a string without quotes, which
    /// ends with the line.
    fn unquoted(&mut self) -> Value {
        let rest = self.rest();
        let line = rest.lines().next().unwrap_or_default();
        let ends = |&(at, c): &(usize, char)| {
            ",}]#".contains(c) || line[at..].starts_with("//") || line[at..].starts_with("/*")
        };
        let length = line.char_indices().find(ends).map_or(line.len(), |(at, _)| at);
        let word = line[..length].trim();
        let constant = match word {
            "null" => Some(Value::Null),
            "true" => Some(true.into()),
            "false" => Some(false.into()),
            number => number.parse::<Number>().ok().map(Value::Number),
        };
        self.position += if constant.is_some() { length } else { line.len() };
        constant.unwrap_or_else(|| line.trim().into())
    }
}
