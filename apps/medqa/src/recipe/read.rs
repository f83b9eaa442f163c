//! TOML and `--set` into a recipe, with errors that name the key.
//!
//! Every table's fields have defaults, so each key can be read alone first: whatever goes wrong then is that key's.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use toml::{Table, Value};

use super::{
    Choice, Data, Lora, Method, Model, Optimizer, Parallel, Recipe, Saving, Schedule, Scope, Steps, Train,
    VirtualTokens,
};

/// Where each key's value came from.
pub struct Origin {
    file: PathBuf,
    sets: BTreeSet<String>,
}

impl Origin {
    /// An error about `key`, opened by the place where it was written.
    pub fn error(&self, key: &str, problem: &str) -> anyhow::Error {
        let set = self.sets.iter().any(|set| set == key || key.starts_with(&format!("{set}.")));
        let place = if set { "--set".to_string() } else { self.file.display().to_string() };
        anyhow!("{place}: `{key}`: {problem}")
    }
}

/// Reads `text`, overridden by `sets`.
pub fn read(text: &str, file: &Path, sets: &[String]) -> Result<(Recipe, Origin)> {
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let (line, message) = (before.matches('\n').count() + 1, error.message().replace('\n', ", "));
        anyhow!("{}:{line}: not valid TOML: {message}", file.display())
    })?;
    let mut origin = Origin { file: file.to_path_buf(), sets: BTreeSet::new() };
    for set in sets {
        let key = apply(&mut table, set)?;
        origin.sets.insert(key);
    }
    let tables = tables();
    if let Some(name) = table.keys().find(|name| !tables.iter().any(|(known, _)| known == name)) {
        return Err(origin.error(name, &unknown(name)));
    }
    let recipe = Recipe {
        model: section(&table, &tables[0], &origin)?,
        data: section(&table, &tables[1], &origin)?,
        method: section(&table, &tables[2], &origin)?,
        train: section(&table, &tables[3], &origin)?,
        parallel: section(&table, &tables[4], &origin)?,
    };
    Ok((recipe, origin))
}

/// Every table and its keys.
fn tables() -> [(&'static str, Vec<&'static str>); 5] {
    let train = [fields::<Steps>(), fields::<Optimizer>(), fields::<Schedule>(), fields::<Saving>()].concat();
    let method = [fields::<Choice>(), fields::<Lora>(), fields::<Scope>(), fields::<VirtualTokens>()].concat();
    // The tables themselves only flatten these; were they to gain a field of their own, this would miss it.
    debug_assert!(fields::<Train>().is_empty() && fields::<Method>().is_empty());
    [
        ("model", fields::<Model>().to_vec()),
        ("data", fields::<Data>().to_vec()),
        ("method", method),
        ("train", train),
        ("parallel", fields::<Parallel>().to_vec()),
    ]
}

fn section<T: DeserializeOwned>(table: &Table, known: &(&str, Vec<&str>), origin: &Origin) -> Result<T> {
    let (name, keys) = known;
    let found = match table.get(*name) {
        Some(Value::Table(found)) => found.clone(),
        Some(other) => bail!(origin.error(name, &format!("expected a table [{name}], found {}", other.type_str()))),
        None => Table::new(),
    };
    for (key, value) in &found {
        let path = format!("{name}.{key}");
        if !keys.contains(&key.as_str()) {
            return Err(origin.error(&path, &unknown(&path)));
        }
        let alone = Table::from_iter([(key.clone(), value.clone())]);
        T::deserialize(Value::Table(alone)).map_err(|error| origin.error(&path, &plain(error.message())))?;
    }
    T::deserialize(Value::Table(found)).map_err(|error| origin.error(name, &plain(error.message())))
}

/// Overrides one key by `table.key=value` and returns the key. The value is TOML, or else a string.
fn apply(table: &mut Table, set: &str) -> Result<String> {
    let (key, text) = set
        .split_once('=')
        .ok_or_else(|| anyhow!("--set {set}: expected table.key=value, such as train.batch_size=8"))?;
    let (key, text) = (key.trim(), text.trim());
    let value = match format!("value = {text}").parse::<Table>() {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value").unwrap_or_else(|| text.into()),
        _ => Value::String(text.to_string()),
    };
    let (name, last) = key
        .split_once('.')
        .filter(|(name, last)| !name.is_empty() && !last.is_empty())
        .ok_or_else(|| anyhow!("--set: `{key}`: expected table.key, such as train.batch_size"))?;
    let section = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(section) = section else {
        bail!("--set: `{key}`: expected `{name}` to be a table, found {} in the recipe", section.type_str());
    };
    section.insert(last.to_string(), value);
    Ok(key.to_string())
}

fn unknown(path: &str) -> String {
    format!("unknown key; the nearest known key is `{}`", nearest(path))
}

/// The known key that looks most like `path`, by its last part first: `train.max_length` is meant as `data.max_length`.
fn nearest(path: &str) -> String {
    let likeness = |known: &str| {
        let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
        let (wanted, candidate) = (last(path), last(known));
        let held = wanted.contains(&candidate) || candidate.contains(&wanted);
        let parts = strsim::normalized_damerau_levenshtein(&wanted, &candidate).max(if held { 0.7 } else { 0.0 });
        // The whole path breaks ties.
        parts + 0.1 * strsim::normalized_damerau_levenshtein(path, known)
    };
    let tables = tables();
    // A lone word is looked for among the tables too.
    let names = tables.iter().map(|(name, _)| name.to_string()).filter(|_| !path.contains('.'));
    let keys = tables.iter().flat_map(|(name, keys)| keys.iter().map(move |key| format!("{name}.{key}")));
    names.chain(keys).max_by(|a, b| likeness(a).total_cmp(&likeness(b))).unwrap_or_default()
}

/// serde's `invalid type: F, expected E`, in the words of the person who wrote the value.
fn plain(message: &str) -> String {
    let message = message.trim_end();
    let starts = ["invalid type: ", "invalid value: ", "invalid "];
    let Some((start, rest)) = starts.iter().find_map(|start| message.split_once(start)) else {
        return message.to_string();
    };
    let Some((found, expected)) = rest.rsplit_once(", expected ") else { return message.to_string() };
    let expected = match expected {
        "usize" | "u64" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "an array of length 2" | "2 elements in sequence" => "a list of 2 numbers",
        other => other,
    };
    format!("{start}expected {expected}, found {found}")
}

/// The names of a struct's fields as serde sees them; none for a struct that flattens others.
fn fields<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut seen: &'static [&'static str] = &[];
    // The capture ends in an error by design: no value is ever made.
    let _ = T::deserialize(Capture(&mut seen));
    seen
}

struct Capture<'a>(&'a mut &'static [&'static str]);

#[derive(Debug)]
struct Seen;

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("fields seen")
    }
}

impl std::error::Error for Seen {}

impl serde::de::Error for Seen {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

impl<'de> Deserializer<'de> for Capture<'_> {
    type Error = Seen;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Seen> {
        *self.0 = fields;
        Err(Seen)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Seen> {
        Err(Seen)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
