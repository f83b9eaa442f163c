//! Parses TOML and `--set` into a recipe, with errors that name the key.
//!
//! Every field of a table has a default, so each key is first deserialized alone: an error then belongs to that key.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{
    Recipe,
    external_config::{self, ExternalConfig, ExternalSetting},
    keys::{RecipeKeys, TableKeys},
    other_file,
    parallel::parse_stage,
};
use crate::identify::{self, Purpose};

/// The origin of each key's value: the recipe file, `--set`, or the configuration file of another program.
pub(super) struct Origin {
    file: PathBuf,
    sets: BTreeSet<String>,
    /// Keys whose values came from another program's file, with the name of that file.
    external: BTreeMap<String, String>,
}

impl Origin {
    /// Returns an error about `key` that starts with the place where its value was written.
    pub(super) fn error(&self, key: &str, problem: &str) -> anyhow::Error {
        anyhow!("{}: `{key}`: {problem}", self.location(key))
    }

    fn location(&self, key: &str) -> String {
        let set = self.sets.iter().any(|set| set == key || key.starts_with(&format!("{set}.")));
        match self.external.get(key) {
            _ if set => "--set".to_string(),
            Some(file) => file.clone(),
            None => self.file.display().to_string(),
        }
    }

    /// Fills keys that the recipe leaves out with another program's settings, and refuses contradictions.
    fn merge(&mut self, table: &mut Table, foreign: &ExternalConfig) -> Result<()> {
        let file = &foreign.file;
        for ExternalSetting { key, external_key, value, is_default } in &foreign.settings {
            let (name, last) = key.split_once('.').unwrap_or_default();
            // A DeepSpeed scheduler replaces both of the recipe's own keys, `scheduler` and `warmup`.
            let own_keys: &[&str] =
                if last == "deepspeed_scheduler" { &["scheduler", "warmup", last] } else { &[last] };
            let section_table = table.get(name).and_then(Value::as_table);
            let own_key = own_keys.iter().find_map(|&rival| Some((rival, section_table?.get(rival)?)));
            if let Some((rival, ours)) = own_key {
                if !is_default && !same_value(ours, value) {
                    let ours_at = format!("{name}.{rival}");
                    bail!(
                        "{file}: `{external_key}` is {value}, but {}: `{ours_at}` is {ours}; remove one of the two",
                        self.location(&ours_at)
                    );
                }
                continue;
            }
            let section = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(last.to_owned(), value.clone());
                self.external.insert((*key).to_owned(), file.clone());
            }
        }
        if let Some(Value::Table(parallel)) = table.get_mut("parallel") {
            parallel.retain(|key, _| key != "deepspeed" && key != "accelerate");
        }
        Ok(())
    }
}

/// Returns whether two values mean the same, even if they are written differently.
fn same_value(a: &Value, b: &Value) -> bool {
    let number = |value: &Value| value.as_float().or_else(|| value.as_integer().map(|number| number as f64));
    match (a, b) {
        (Value::String(name), Value::Integer(_)) => {
            fsdp_stage_number(name).is_some() && fsdp_stage_number(name) == parse_stage(b).map(u8::from)
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_value(a, b)),
        _ => a == b || number(a).is_some() && number(a) == number(b),
    }
}

fn fsdp_stage_number(name: &str) -> Option<u8> {
    parse_stage(&Value::String(name.to_owned())).map(u8::from)
}

/// A recipe whose values have the right types and are not checked yet.
pub(super) struct ParsedRecipe {
    pub recipe: Recipe,
    /// The origin of each value, for error messages.
    pub origin: Origin,
    /// One line for each setting of a ds_config or Accelerate file that has no effect.
    pub notes: Vec<String>,
}

/// Reads `text`, overridden by `sets`. Given the number of ranks, it also merges the ds_config or Accelerate file that
/// the recipe names.
///
/// # Errors
/// One line that names the file (or `--set`), the key, what was expected and what was found.
pub(super) fn read(text: &str, file: &Path, sets: &[String], world: Option<u64>) -> Result<ParsedRecipe> {
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        if let Some(message) = other_file::message(text) {
            return anyhow!("{}: {message}", file.display());
        }
        let (line, message) = (before.matches('\n').count() + 1, error.message().replace('\n', ", "));
        let invalid = anyhow!("{}:{line}: not valid TOML: {message}", file.display());
        identify::explain(invalid, file, Purpose::Recipe)
    })?;
    let mut origin = Origin { file: file.to_path_buf(), sets: BTreeSet::new(), external: BTreeMap::new() };
    let known = RecipeKeys::new();
    for set in sets {
        let key = apply_override(&mut table, set, &known)?;
        origin.sets.insert(key);
    }
    if let Some(name) = table.keys().find(|name| !known.tables().iter().any(|known| known.name == *name)) {
        let set = origin.sets.iter().find(|set| set.split('.').next() == Some(name));
        return Err(origin.error(set.unwrap_or(name), &known.unknown_key_message(name)));
    }
    let recipe = sections(&table, &known, &origin)?;
    let foreign = world.map(|world| external_config::read(&recipe, world)).transpose()?.flatten();
    let Some(foreign) = foreign else { return Ok(ParsedRecipe { recipe, origin, notes: Vec::new() }) };
    origin.merge(&mut table, &foreign)?;
    let recipe = sections(&table, &known, &origin)?;
    let notes = foreign.notes.iter().map(|note| format!("{}: {note}", foreign.file)).collect();
    Ok(ParsedRecipe { recipe, origin, notes })
}

fn sections(table: &Table, known: &RecipeKeys, origin: &Origin) -> Result<Recipe> {
    Ok(Recipe {
        model: section(table, &known.model, origin)?,
        data: section(table, &known.data, origin)?,
        method: section(table, &known.method, origin)?,
        train: section(table, &known.train, origin)?,
        parallel: section(table, &known.parallel, origin)?,
    })
}

fn section<T: DeserializeOwned>(table: &Table, known: &TableKeys, origin: &Origin) -> Result<T> {
    let TableKeys { name, keys } = known;
    let found = match table.get(*name) {
        Some(Value::Table(found)) => found.clone(),
        Some(other) => bail!(origin.error(name, &format!("expected a table [{name}], found {}", other.type_str()))),
        None => Table::new(),
    };
    for (key, value) in &found {
        let path = format!("{name}.{key}");
        if !keys.contains(&key.as_str()) {
            return Err(origin.error(&path, &RecipeKeys::new().unknown_key_message(&path)));
        }
        let alone = Table::from_iter([(key.clone(), value.clone())]);
        T::deserialize(Value::Table(alone)).map_err(|error| origin.error(&path, &readable_message(error.message())))?;
    }
    T::deserialize(Value::Table(found)).map_err(|error| origin.error(name, &readable_message(error.message())))
}

/// Overrides one key by `table.key=value` and returns the key. The value is TOML, or else a string.
fn apply_override(table: &mut Table, set: &str, known: &RecipeKeys) -> Result<String> {
    let (key, text) = set
        .split_once('=')
        .ok_or_else(|| anyhow!("--set {set}: expected table.key=value, such as train.batch_size=8"))?;
    let (key, text) = (key.trim(), text.trim());
    let value = match format!("value = {text}").parse::<Table>() {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value").unwrap_or_else(|| text.into()),
        _ => Value::String(text.to_string()),
    };
    let (name, last) =
        key.split_once('.').filter(|(name, last)| !name.is_empty() && !last.is_empty()).ok_or_else(|| {
            let unknown = known.unknown_key_message(key);
            anyhow!("--set: `{key}`: expected table.key, such as train.batch_size: {unknown}")
        })?;
    let section = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(section) = section else {
        bail!("--set: `{key}`: expected `{name}` to be a table, found {} in the recipe", section.type_str());
    };
    section.insert(last.to_string(), value);
    Ok(key.to_string())
}

/// Rewrites serde's `invalid type: F, expected E` and the like in terms that the author of the recipe knows.
fn readable_message(message: &str) -> String {
    let message = message.trim_end();
    // A table in place of a name, as toml reports it.
    if let Some((start, _)) = message.split_once("wanted exactly 1 element") {
        return format!("{start}expected a string, found a table");
    }
    let starts = ["invalid type: ", "invalid value: ", "invalid ", "unknown variant "];
    let Some((start, rest)) = starts.iter().find_map(|start| message.split_once(start)) else {
        return message.to_string();
    };
    let Some((found, expected)) = rest.rsplit_once(", expected ") else { return message.to_string() };
    let expected = match expected {
        "usize" | "u64" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "string or map" | "string only" | "map with a single key" => "a string",
        "a map" => "a table",
        "a sequence" => "a list",
        "an array of length 2" | "2 elements in sequence" => "a list of 2 numbers",
        other => other,
    };
    let found = match found {
        "map" => "a table",
        "sequence" => "a list",
        "unit variant" => "another kind of value",
        other => other,
    };
    format!("{start}expected {expected}, found {found}")
}
