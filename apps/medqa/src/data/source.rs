//! Reading rows.

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// What a file of rows looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JSONL with `question` and `answer`
    Qa,
    /// PubMedQA's official JSON
    #[value(name = "pubmedqa")]
    PubMedQa,
}

/// One row as it stands in a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    Qa { question: String, answer: String },
    PubMedQa { pmid: String, question: String, contexts: Vec<String>, decision: Option<String> },
}

/// The harness's prompt for PubMedQA.
pub fn pubmedqa_prompt(question: &str, contexts: &[String]) -> String {
    format!("Abstract: {}\nQuestion: {question}\nAnswer:", contexts.join("\n"))
}

/// All rows of a file, at least one.
pub fn read(path: &Path, format: Format) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let rows = match format {
        Format::Qa => qa(path, &text)?,
        Format::PubMedQa => pubmedqa(path, &text)?,
    };
    if rows.is_empty() {
        bail!("{}: expected at least one row, found none", path.display());
    }
    Ok(rows)
}

fn text_field(row: &Map<String, Value>, key: &str, place: &str) -> Result<String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => bail!("{place}: `{key}`: expected a string, found {other}"),
        None => {
            let found = row.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            bail!("{place}: expected the key `{key}`, found {found}")
        }
    }
}

/// JSONL, or one JSON array.
fn qa(path: &Path, text: &str) -> Result<Vec<Row>> {
    let row = |place: String, value: Value| {
        let Value::Object(row) = value else { bail!("{place}: expected an object, found {value}") };
        Ok(Row::Qa { question: text_field(&row, "question", &place)?, answer: text_field(&row, "answer", &place)? })
    };
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> =
            serde_json::from_str(text).map_err(|e| anyhow!("{}: expected JSON: {e}", path.display()))?;
        let numbered = list.into_iter().enumerate();
        return numbered.map(|(i, value)| row(format!("{}: row {}", path.display(), i + 1), value)).collect();
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let place = format!("{}:{}", path.display(), i + 1);
            let value = serde_json::from_str(line).map_err(|e| anyhow!("{place}: expected a JSON object: {e}"))?;
            row(place, value)
        })
        .collect()
}

fn pubmedqa(path: &Path, text: &str) -> Result<Vec<Row>> {
    let value: Value = serde_json::from_str(text).map_err(|e| anyhow!("{}: expected JSON: {e}", path.display()))?;
    let Value::Object(items) = value else {
        bail!("{}: expected an object of items by PubMed id, found another kind of JSON", path.display());
    };
    items.into_iter().map(|(pmid, item)| pubmedqa_item(path, pmid, &item)).collect()
}

fn pubmedqa_item(path: &Path, pmid: String, item: &Value) -> Result<Row> {
    let place = format!("{}: {pmid}", path.display());
    let Value::Object(item) = item else { bail!("{place}: expected an object, found {item}") };
    let contexts = item.get("CONTEXTS").and_then(Value::as_array);
    let contexts = contexts.and_then(|list| list.iter().map(|c| c.as_str().map(str::to_owned)).collect());
    let decision = match item.get("final_decision") {
        None | Some(Value::Null) => None,
        Some(Value::String(word)) if ["yes", "no", "maybe"].contains(&word.as_str()) => Some(word.clone()),
        Some(other) => bail!("{place}: `final_decision`: expected yes, no or maybe, found {other}"),
    };
    Ok(Row::PubMedQa {
        question: text_field(item, "QUESTION", &place)?,
        contexts: contexts.with_context(|| format!("{place}: `CONTEXTS`: expected a list of strings"))?,
        pmid,
        decision,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str, format: Format) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        format!("{:#}", read(file.path(), format).unwrap_err())
    }

    #[test]
    fn mistakes_name_the_line_and_the_key() {
        assert!(
            error("{\"question\":\"a\",\"answer\":\"b\"}\n{\"question\":1}", Format::Qa).contains(":2: `question`")
        );
        assert!(error("{\"question\":\"a\"}", Format::Qa).contains("expected the key `answer`, found question"));
        assert!(error("", Format::Qa).contains("at least one row"));
        assert!(
            error("{\"7\":{\"QUESTION\":\"q\",\"CONTEXTS\":[],\"final_decision\":\"perhaps\"}}", Format::PubMedQa)
                .contains("7: `final_decision`")
        );
    }

    #[test]
    fn rows_keep_the_order_of_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let item = |d| format!("{{\"QUESTION\":\"q\",\"CONTEXTS\":[\"a\",\"b\"],\"final_decision\":\"{d}\"}}");
        std::fs::write(file.path(), format!("{{\"9\":{},\"1\":{}}}", item("yes"), item("no"))).unwrap();
        let rows = read(file.path(), Format::PubMedQa).unwrap();
        let ids: Vec<_> = rows
            .iter()
            .map(|row| match row {
                Row::PubMedQa { pmid, .. } => pmid.as_str(),
                _ => "",
            })
            .collect();
        assert_eq!(ids, ["9", "1"]);
        assert_eq!(pubmedqa_prompt("q", &["a".into(), "b".into()]), "Abstract: a\nb\nQuestion: q\nAnswer:");
    }
}
