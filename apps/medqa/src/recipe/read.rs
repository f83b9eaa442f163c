//! TOML and `--set` into a recipe, with errors that name the key.
//!
//! Every table's fields have defaults, so each key can be read alone first: whatever goes wrong then is that key's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use toml::{Table, Value};

use super::{
    Choice, Data, Division, Files, Lora, Method, Model, Offload, Optimizer, Parallel, Recipe, Saving, Schedule, Scope,
    Steps, Train, VirtualTokens,
    foreign::{self, Foreign, Said},
    parallel::stage_of,
};

/// Where each key's value came from.
pub struct Origin {
    file: PathBuf,
    sets: BTreeSet<String>,
    /// Keys whose values came from another program's file.
    foreign: BTreeMap<String, String>,
}

impl Origin {
    /// An error about `key`, opened by the place where it was written.
    pub fn error(&self, key: &str, problem: &str) -> anyhow::Error {
        anyhow!("{}: `{key}`: {problem}", self.place(key))
    }

    fn place(&self, key: &str) -> String {
        let set = self.sets.iter().any(|set| set == key || key.starts_with(&format!("{set}.")));
        match self.foreign.get(key) {
            _ if set => "--set".to_string(),
            Some(file) => file.clone(),
            None => self.file.display().to_string(),
        }
    }

    /// Puts what another program's file says where the recipe says nothing.
    fn merge(&mut self, table: &mut Table, foreign: &Foreign) -> Result<()> {
        let file = &foreign.file;
        for Said { key, theirs, value, weak } in &foreign.said {
            let (name, last) = key.split_once('.').unwrap_or_default();
            // A scheduler of theirs stands for all that ours is.
            let rivals: &[&str] = if last == "deepspeed_scheduler" { &["scheduler", "warmup", last] } else { &[last] };
            let said = table.get(name).and_then(Value::as_table);
            let rival = rivals.iter().find_map(|&rival| Some((rival, said?.get(rival)?)));
            if let Some((rival, ours)) = rival {
                if !weak && !same(ours, value) {
                    let ours_at = format!("{name}.{rival}");
                    bail!(
                        "{file}: `{theirs}` is {value}, but {}: `{ours_at}` is {ours}; remove one of the two",
                        self.place(&ours_at)
                    );
                }
                continue;
            }
            let section = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(last.to_owned(), value.clone());
                self.foreign.insert((*key).to_owned(), file.clone());
            }
        }
        if let Some(Value::Table(parallel)) = table.get_mut("parallel") {
            parallel.retain(|key, _| key != "deepspeed" && key != "accelerate");
        }
        Ok(())
    }
}

/// Whether two ways to write a value mean the same.
fn same(a: &Value, b: &Value) -> bool {
    let number = |value: &Value| value.as_float().or_else(|| value.as_integer().map(|number| number as f64));
    match (a, b) {
        (Value::String(name), Value::Integer(_)) => fsdp(name).is_some() && fsdp(name) == stage_of(b).map(u8::from),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b || number(a).is_some() && number(a) == number(b),
    }
}

fn fsdp(name: &str) -> Option<u8> {
    stage_of(&Value::String(name.to_owned())).map(u8::from)
}

/// Reads `text`, overridden by `sets`; with the number of ranks, also the file of another program that it names, and says what
/// that one says in vain.
pub fn read(text: &str, file: &Path, sets: &[String], world: Option<u64>) -> Result<(Recipe, Origin, Vec<String>)> {
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let (line, message) = (before.matches('\n').count() + 1, error.message().replace('\n', ", "));
        anyhow!("{}:{line}: not valid TOML: {message}", file.display())
    })?;
    let mut origin = Origin { file: file.to_path_buf(), sets: BTreeSet::new(), foreign: BTreeMap::new() };
    for set in sets {
        let key = apply(&mut table, set)?;
        origin.sets.insert(key);
    }
    let tables = tables();
    if let Some(name) = table.keys().find(|name| !tables.iter().any(|(known, _)| known == name)) {
        return Err(origin.error(name, &unknown(name)));
    }
    let recipe = sections(&table, &origin)?;
    let foreign = world.map(|world| foreign::read(&recipe, world)).transpose()?.flatten();
    let Some(foreign) = foreign else { return Ok((recipe, origin, Vec::new())) };
    origin.merge(&mut table, &foreign)?;
    let recipe = sections(&table, &origin)?;
    let notes = foreign.notes.iter().map(|note| format!("{}: {note}", foreign.file)).collect();
    Ok((recipe, origin, notes))
}

fn sections(table: &Table, origin: &Origin) -> Result<Recipe> {
    let tables = tables();
    Ok(Recipe {
        model: section(table, &tables[0], origin)?,
        data: section(table, &tables[1], origin)?,
        method: section(table, &tables[2], origin)?,
        train: section(table, &tables[3], origin)?,
        parallel: section(table, &tables[4], origin)?,
    })
}

/// Every table and its keys.
fn tables() -> [(&'static str, Vec<&'static str>); 5] {
    let train = [fields::<Steps>(), fields::<Optimizer>(), fields::<Schedule>(), fields::<Saving>()].concat();
    let method = [fields::<Choice>(), fields::<Lora>(), fields::<Scope>(), fields::<VirtualTokens>()].concat();
    let parallel = [fields::<Division>(), fields::<Offload>(), fields::<Files>()].concat();
    // The tables themselves only flatten these; were they to gain a field of their own, this would miss it.
    debug_assert!(fields::<Train>().is_empty() && fields::<Method>().is_empty() && fields::<Parallel>().is_empty());
    [
        ("model", fields::<Model>().to_vec()),
        ("data", fields::<Data>().to_vec()),
        ("method", method),
        ("train", train),
        ("parallel", parallel),
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
