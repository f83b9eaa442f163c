//! LLaMA-Factory's `dataset_info.json`: data sets by name, with their files, formats and columns.

use crate::schema::{Columns, Format, SchemaRequest};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A file to read, and the schema that is asked for it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DataSource {
    pub path: PathBuf,
    pub request: SchemaRequest,
}

const NAME: &str = "dataset_info.json";

/// LLaMA-Factory's column names and ours, by format.
const ALPACA: [(&str, &str); 5] = [
    ("prompt", "instruction"),
    ("query", "input"),
    ("response", "output"),
    ("system", "system"),
    ("history", "history"),
];
const SHAREGPT: [(&str, &str); 3] = [("messages", "conversations"), ("system", "system"), ("tools", "tools")];
const TAGS: [(&str, &str); 2] = [("role_tag", "from"), ("content_tag", "value")];
/// Tags that name a role, and the names that are read.
const ROLES: [(&str, &[&str]); 5] = [
    ("user_tag", &["human", "user"]),
    ("assistant_tag", &["gpt", "assistant", "chatgpt", "bing", "bard"]),
    ("observation_tag", &["observation", "tool"]),
    ("function_tag", &["function_call"]),
    ("system_tag", &["system"]),
];

/// Returns the files of the data sets that `path` names as `DIR/dataset_info.json:NAME`, with several names separated
/// by commas; none if it is another path. A file with one data set needs no name.
///
/// # Errors
/// If the file or the entry cannot be read, or the entry asks for what is not read here.
pub(super) fn sources(path: &Path, request: &SchemaRequest) -> Result<Option<Vec<DataSource>>> {
    let text = path.to_string_lossy();
    let (file, names) = match text.rsplit_once(':') {
        Some((file, names)) if file.ends_with(NAME) => (Path::new(file), names),
        _ if path.ends_with(NAME) => (path, ""),
        _ => return Ok(None),
    };
    let at = file.display();
    let bytes = std::fs::read(file).with_context(|| format!("{at}: cannot be read"))?;
    let sets: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| anyhow!("{at}: expected JSON: {error}"))?;
    let known = || sets.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let names: Vec<&str> = match (names, sets.len()) {
        ("", 1) => sets.keys().map(String::as_str).collect(),
        ("", _) => bail!("{at}: expected the name of a data set, as in {at}:NAME; it has {}", known()),
        (names, _) => names.split(',').map(str::trim).collect(),
    };
    let folder = file.parent().unwrap_or(Path::new(""));
    let mut all = Vec::new();
    for name in names {
        let entry = sets.get(name).and_then(Value::as_object);
        let entry = entry.with_context(|| format!("{at}: expected the data set `{name}`, found {}", known()))?;
        all.push(entry_source(folder, entry, request).with_context(|| format!("{at}: `{name}`"))?);
    }
    Ok(Some(all))
}

fn entry_source(folder: &Path, entry: &Map<String, Value>, request: &SchemaRequest) -> Result<DataSource> {
    if let Some(key) =
        ["hf_hub_url", "ms_hub_url", "om_hub_url", "script_url"].into_iter().find(|key| entry.contains_key(*key))
    {
        bail!("`{key}`: data sets are not downloaded; save its files here and name them in `file_name`");
    }
    for (key, instead) in [
        ("ranking", "rows of preferences are not read"),
        ("num_samples", "every row of a file is read; write fewer into it"),
        ("subset", "it is a part of a data set on the hub; name a file in `file_name`"),
    ] {
        if entry.get(key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false))) {
            bail!("`{key}`: {instead}");
        }
    }
    let file = entry.get("file_name").and_then(Value::as_str).context("expected the key `file_name`")?;
    let request = if request.format.is_some() { request.clone() } else { entry_schema(entry)? };
    Ok(DataSource { path: folder.join(file), request })
}

/// Returns the format and the columns of an entry.
fn entry_schema(entry: &Map<String, Value>) -> Result<SchemaRequest> {
    let text = |key: &str| entry.get(key).and_then(Value::as_str);
    let (format, names) = match text("formatting").unwrap_or("alpaca") {
        "alpaca" => (Format::Alpaca, &ALPACA[..]),
        "sharegpt" => (Format::ShareGpt, &SHAREGPT[..]),
        "openai" => (Format::Messages, &[("messages", "messages")][..]),
        other => bail!("`formatting`: expected alpaca, sharegpt or openai, found {other}"),
    };
    let mut renamed = Vec::new();
    for (key, name) in entry.get("columns").and_then(Value::as_object).into_iter().flatten() {
        let name = name.as_str().with_context(|| format!("`columns.{key}`: expected the name of a column"))?;
        let ours = names.iter().find(|(theirs, _)| theirs == key).map(|(_, ours)| *ours);
        match ours {
            Some("tools") if name != "tools" => bail!("`columns.tools`: expected tools, found {name}"),
            Some("tools") => {}
            Some(ours) => renamed.push((ours, name)),
            None => bail!("`columns.{key}`: this column is not read for {}", format.name()),
        }
    }
    let is_text = format == Format::Alpaca && renamed.iter().all(|(ours, _)| *ours == "instruction");
    if let ([(_, name)], true) = (renamed.as_slice(), is_text && entry.contains_key("columns")) {
        // A data set for continued pretraining has a prompt only.
        return Ok(SchemaRequest { format: Some(Format::Text), columns: Columns::from(&[("text", *name)][..]) });
    }
    for (key, tag) in entry.get("tags").and_then(Value::as_object).into_iter().flatten() {
        let tag = tag.as_str().with_context(|| format!("`tags.{key}`: expected a word"))?;
        let role = ROLES.iter().find(|(name, _)| name == key);
        match (TAGS.iter().find(|(theirs, _)| theirs == key), role) {
            (Some((_, ours)), _) if format == Format::ShareGpt => renamed.push((ours, tag)),
            (_, Some((_, read))) if read.contains(&tag) => {}
            (_, Some((_, read))) => bail!("`tags.{key}`: expected {}, found {tag}", read.join(" or ")),
            _ => bail!("`tags.{key}`: this tag is not read for {}", format.name()),
        }
    }
    Ok(SchemaRequest { format: Some(format), columns: Columns::from(renamed.as_slice()) })
}
