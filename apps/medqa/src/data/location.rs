//! The location of a row in its data file.

use anyhow::Result;
use serde_json::Value;
use std::{fmt, path::Path};

/// Location of a row in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowLocation {
    /// Line number, counted from 1.
    Line(usize),
    /// Position in a JSON array or in a Parquet file, counted from 1.
    Row(usize),
    /// Key in a JSON object.
    Key(String),
}

impl fmt::Display for RowLocation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Row(n) => write!(f, "row {n}"),
            Self::Key(key) => f.write_str(key),
        }
    }
}

impl RowLocation {
    /// Formats the location with its file, as editors and compilers do.
    pub fn in_file(&self, path: &Path) -> String {
        match self {
            Self::Line(n) => format!("{}:{n}", path.display()),
            place => format!("{}: {place}", path.display()),
        }
    }
}

/// Rows as JSON values, before their format is applied. Each has a result of its own.
pub(super) type JsonRows = Vec<(RowLocation, Result<Value>)>;
