//! The types of columns, found in the rows before they are written to a file of columns.

use crate::data::JSON_COLUMN;
use arrow_schema::{DataType, Field, Fields};
use serde_json::{Map, Value};

/// The kind of all values of a column.
#[derive(Debug, Clone, PartialEq)]
enum ValueKind {
    /// Nothing is known: only nulls and empty lists.
    Unknown,
    Bool,
    Int,
    Float,
    Text,
    List(Box<ValueKind>),
    Object(Vec<(String, ValueKind)>),
    /// Values of several kinds, or those that columns cannot hold.
    Mixed,
}

impl ValueKind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Unknown,
            Value::Bool(_) => Self::Bool,
            Value::Number(number) if number.is_i64() => Self::Int,
            Value::Number(number) if number.is_f64() => Self::Float,
            Value::Number(_) => Self::Mixed,
            Value::String(_) => Self::Text,
            // A null in a list would be kept, but one in an object is the same as none.
            Value::Array(items) if items.iter().any(Value::is_null) => Self::Mixed,
            Value::Array(items) => Self::List(Box::new(items.iter().map(Self::of).fold(Self::Unknown, Self::merge))),
            Value::Object(fields) if fields.is_empty() || fields.values().any(Value::is_null) => Self::Mixed,
            Value::Object(fields) => {
                Self::Object(fields.iter().map(|(name, value)| (name.clone(), Self::of(value))).collect())
            }
        }
    }

    fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown, kind) | (kind, Self::Unknown) => kind,
            (Self::List(one), Self::List(other)) => Self::List(Box::new(one.merge(*other))),
            (Self::Object(mut fields), Self::Object(others)) => {
                for (name, kind) in others {
                    match fields.iter_mut().find(|(known, _)| *known == name) {
                        Some((_, known)) => *known = std::mem::replace(known, Self::Unknown).merge(kind),
                        None => fields.push((name, kind)),
                    }
                }
                Self::Object(fields)
            }
            (one, other) if one == other => one,
            _ => Self::Mixed,
        }
    }

    /// Returns the type of a column; none if it has to be text in JSON.
    fn data_type(&self) -> Option<DataType> {
        Some(match self {
            Self::Unknown | Self::Mixed => return None,
            Self::Bool => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Text => DataType::Utf8,
            Self::List(items) => DataType::new_list(items.data_type()?, true),
            Self::Object(fields) => {
                let field = |(name, kind): &(String, Self)| Some(Field::new(name, kind.data_type()?, true));
                DataType::Struct(fields.iter().map(field).collect::<Option<Fields>>()?)
            }
        })
    }
}

/// A column of a file, by the values of all rows.
#[derive(Debug, Clone)]
pub(super) struct FileColumn {
    name: String,
    kind: ValueKind,
    /// The number of rows that have a value.
    rows: usize,
}

/// The columns of a file.
#[derive(Debug, Clone, Default)]
pub(super) struct FileColumns {
    columns: Vec<FileColumn>,
    rows: usize,
}

impl FileColumns {
    /// Takes a row into account.
    pub(super) fn add(&mut self, row: &Map<String, Value>) {
        self.rows += 1;
        for (name, value) in row.iter().filter(|(_, value)| !value.is_null()) {
            let kind = ValueKind::of(value);
            match self.columns.iter_mut().find(|column| column.name == *name) {
                Some(column) => {
                    column.kind = std::mem::replace(&mut column.kind, ValueKind::Unknown).merge(kind);
                    column.rows += 1;
                }
                None => self.columns.push(FileColumn { name: name.clone(), kind, rows: 1 }),
            }
        }
    }

    /// Returns the fields of a Parquet file. Columns that have no type of their own are text in JSON, and their names
    /// end in `:json`.
    pub(super) fn fields(&self) -> Fields {
        let field = |column: &FileColumn| match column.kind.data_type() {
            Some(kind) => Field::new(&column.name, kind, true),
            None => Field::new(format!("{}{JSON_COLUMN}", column.name), DataType::Utf8, true),
        };
        self.columns.iter().map(field).collect()
    }

    /// Returns the row with the columns of [`FileColumns::fields`].
    pub(super) fn typed_row(&self, row: &Map<String, Value>) -> Map<String, Value> {
        let typed = self.columns.iter().filter_map(|column| {
            let value = row.get(&column.name).filter(|value| !value.is_null())?;
            Some(match column.kind.data_type() {
                Some(_) => (column.name.clone(), value.clone()),
                None => (format!("{}{JSON_COLUMN}", column.name), Value::String(value.to_string())),
            })
        });
        typed.collect()
    }

    /// Returns the header of a CSV file. Columns with other values than text in every row end in `:json`, except those
    /// in `lists`, which are read as JSON by their format.
    pub(super) fn header(&self, lists: &[&str]) -> Vec<String> {
        let name = |column: &FileColumn| {
            let plain = self.is_text(column) || lists.contains(&column.name.as_str());
            if plain { column.name.clone() } else { format!("{}{JSON_COLUMN}", column.name) }
        };
        self.columns.iter().map(name).collect()
    }

    fn is_text(&self, column: &FileColumn) -> bool {
        column.kind == ValueKind::Text && column.rows == self.rows
    }

    /// Returns the fields of a row of CSV.
    pub(super) fn record(&self, row: &Map<String, Value>) -> Vec<String> {
        let field = |column: &FileColumn| match row.get(&column.name).filter(|value| !value.is_null()) {
            None => String::new(),
            Some(Value::String(text)) if self.is_text(column) => text.clone(),
            Some(value) => value.to_string(),
        };
        self.columns.iter().map(field).collect()
    }
}
