//! Recognizes the format of rows by the keys of one of them.

use crate::schema::{Columns, Format, Schema, SchemaRequest};
use serde_json::{Map, Value};
use std::path::Path;

/// Keys by which a format is recognized, and the columns that have other names then.
struct Keys {
    all: &'static [&'static str],
    format: Format,
    columns: &'static [(&'static str, &'static str)],
}

const fn keys(all: &'static [&'static str], format: Format) -> Keys {
    Keys { all, format, columns: &[] }
}

/// The first row of this table whose keys a row has tells its format.
const TABLE: &[Keys] = &[
    keys(&["QUESTION", "CONTEXTS"], Format::PubMedQa),
    keys(&["messages"], Format::Messages),
    keys(&["conversations"], Format::ShareGpt),
    keys(&["prompt", "completion"], Format::PromptCompletion),
    keys(&["instruction", "output"], Format::Alpaca),
    keys(&["question", "options"], Format::MultipleChoice),
    keys(&["question", "option"], Format::MultipleChoice),
    keys(&["question", "choices"], Format::MultipleChoice),
    keys(&["question", "opa", "opb"], Format::MultipleChoice),
    keys(&["question", "A", "B", "C"], Format::MultipleChoice),
    keys(&["Question", "Options", "Answer"], Format::MultipleChoice),
    keys(&["question", "answer"], Format::Qa),
    Keys {
        all: &["Question", "Answer"],
        format: Format::Qa,
        columns: &[("question", "Question"), ("answer", "Answer")],
    },
    Keys {
        all: &["prompt", "response"],
        format: Format::Qa,
        columns: &[("question", "prompt"), ("answer", "response")],
    },
    Keys { all: &["query", "response"], format: Format::Qa, columns: &[("question", "query"), ("answer", "response")] },
    Keys {
        all: &["instruction", "response"],
        format: Format::Alpaca,
        columns: &[("output", "response"), ("input", "context")],
    },
    keys(&["text"], Format::Text),
];

/// Returns whether an object has a column of the format, or of any format if none is certain, and so is a row.
pub(super) fn has_columns(row: &Map<String, Value>, certain: Option<&Schema>) -> bool {
    match certain {
        Some(schema) => schema.format.columns().iter().any(|column| row.contains_key(schema.columns.name(column))),
        None => TABLE.iter().flat_map(|keys| keys.all).any(|key| row.contains_key(*key)),
    }
}

/// Returns the items of PubMedQA's file: an object whose values all have a `QUESTION`.
pub(super) fn pubmedqa_items(object: &Map<String, Value>) -> Option<Map<String, Value>> {
    let is_item = |value: &Value| value.get("QUESTION").is_some();
    (!object.is_empty() && object.values().all(is_item)).then(|| object.clone())
}

/// Returns the schema of rows with the keys of `row`: the one asked for, else the one that is recognized, else qa. One
/// that a reader might not expect is said on stderr.
pub(super) fn schema(path: &Path, request: &SchemaRequest, row: &Map<String, Value>) -> Schema {
    if let Some(certain) = request.certain() {
        return certain;
    }
    let Some(keys) = TABLE.iter().find(|keys| keys.all.iter().all(|key| row.contains_key(*key))) else {
        return Schema::default();
    };
    let mut schema = Schema { format: keys.format, columns: Columns::from(keys.columns) };
    let turn = row.get("conversations").and_then(|turns| turns.get(0)).and_then(Value::as_object);
    if turn.is_some_and(|turn| turn.contains_key("role") && turn.contains_key("content")) {
        let columns = [("messages", "conversations")];
        schema = Schema { format: Format::Messages, columns: Columns::from(&columns[..]) };
    }
    let turn = row.get("messages").and_then(|turns| turns.get(0)).and_then(Value::as_object);
    if turn.is_some_and(|turn| turn.contains_key("from") && turn.contains_key("value")) {
        let columns = [("conversations", "messages")];
        schema = Schema { format: Format::ShareGpt, columns: Columns::from(&columns[..]) };
    }
    if schema != Schema::default() {
        eprintln!(
            "note: {}: the rows are read in the format {}, because they have {}",
            path.display(),
            schema.format.name(),
            keys.all.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" and ")
        );
    }
    schema
}

/// Returns whether column names are those of the format that is asked for, or of one that is recognized.
pub(super) fn is_header(names: &Map<String, Value>, request: &SchemaRequest) -> bool {
    let all = |keys: &[&str]| names.len() > 1 && keys.iter().all(|key| names.contains_key(*key));
    match request.certain() {
        Some(schema) => match schema.format {
            Format::Qa => all(&[schema.columns.name("question"), schema.columns.name("answer")]),
            format => TABLE.iter().any(|keys| keys.format == format && all(keys.all)),
        },
        None => TABLE.iter().any(|keys| all(keys.all)),
    }
}
