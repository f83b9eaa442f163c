//! The location of a row: its file, and its place in it.

use anyhow::Result;
use serde_json::Value;
use std::{fmt, path::Path, sync::Arc};

/// Location of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowLocation {
    /// The file of the row.
    pub file: Arc<Path>,
    /// The place of the row in its file.
    pub place: RowPlace,
}

/// Place of a row in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowPlace {
    /// Line number, counted from 1.
    Line(usize),
    /// Position in a JSON array or in a file of columns, counted from 1.
    Row(usize),
    /// Key in a JSON object.
    Key(String),
}

impl fmt::Display for RowPlace {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Row(n) => write!(f, "row {n}"),
            Self::Key(key) => f.write_str(key),
        }
    }
}

impl fmt::Display for RowLocation {
    /// Formats the location as editors and compilers do.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.place {
            RowPlace::Line(n) => write!(f, "{}:{n}", self.file.display()),
            place => write!(f, "{}: {place}", self.file.display()),
        }
    }
}

/// A row as a JSON value, before its format is applied.
pub(super) struct RawRow {
    pub place: RowPlace,
    /// The value, or what is wrong with the row.
    pub value: Result<Value>,
}

/// Rows in the order of their file. Each has a result of its own; nothing follows an error of the file as a whole.
pub(super) type RawRows = Box<dyn Iterator<Item = RawRow> + Send>;
