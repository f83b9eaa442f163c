//! Validation of a configuration against the table of keys: names, kinds of values, and keys that are not honoured.

use super::keys::{FixedValue, KeyHandling, KeySpec, ONE_STEP, TypeTable, ValueKind};
use crate::ConfigError;
use serde_json::{Map, Value};

/// A key of a configuration that is not honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnhonouredKey {
    /// The path of the key.
    pub key: String,
    /// A description of what is done instead.
    pub instead: &'static str,
}

impl std::fmt::Display for UnhonouredKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` is not honoured: {}", self.key, self.instead)
    }
}

/// A function that maps the path of a key to the value that replaces its `"auto"`; `None` if the key cannot be
/// `"auto"`.
pub(super) type AutoLookup<'a> = &'a dyn Fn(&str) -> Option<Value>;

/// The validation of one file.
pub(super) struct Checker<'a> {
    pub(super) auto: AutoLookup<'a>,
    pub(super) unhonoured: Vec<UnhonouredKey>,
}

impl Checker<'_> {
    /// Checks the keys of `map` against `table` and returns those that are read; `block` is the path of `map`, empty at
    /// the top level.
    ///
    /// # Errors
    /// [`ConfigError::UnknownKey`], [`ConfigError::InvalidValue`] or [`ConfigError::Unsupported`].
    pub(super) fn check_block(
        &mut self,
        block: &str,
        table: &[KeySpec],
        map: &Map<String, Value>,
    ) -> Result<Map<String, Value>, ConfigError> {
        let mut kept = Map::new();
        for (name, value) in map {
            let path = join_path(block, name);
            let Some(key) = table.iter().find(|key| key.name == name) else {
                return Err(unknown_key(block, path, table.iter().map(|key| key.name), name));
            };
            if let Some(value) = self.check_value(&path, key, value)? {
                kept.insert(name.clone(), value);
            }
        }
        let missing = |key: &&KeySpec| matches!(key.handling, KeyHandling::Required) && !kept.contains_key(key.name);
        match table.iter().find(missing) {
            Some(key) => Err(ConfigError::invalid_value(
                join_path(block, key.name),
                format!("{}, or \"auto\"", describe(key.kind)),
                "nothing",
            )),
            None => Ok(kept),
        }
    }

    /// Checks the value of a key and returns it if the key is read.
    fn check_value(&mut self, path: &str, key: &KeySpec, value: &Value) -> Result<Option<Value>, ConfigError> {
        let read = matches!(key.handling, KeyHandling::Read | KeyHandling::Required);
        if value == "auto" {
            return match (self.auto)(path) {
                _ if !read => Ok(None),
                Some(value) => Ok(Some(value).filter(|value| !value.is_null())),
                None => Err(ConfigError::invalid_value(
                    path,
                    describe(key.kind),
                    "\"auto\", which has no value for this key",
                )),
            };
        }
        if value.is_null() {
            return Ok(None);
        }
        let value = match key.kind {
            ValueKind::Block(table) => self.check_block(path, table, object(path, value)?)?.into(),
            ValueKind::Typed(types) => self.check_typed_block(path, types, object(path, value)?)?.into(),
            kind => scalar(path, kind, value)?,
        };
        let note = match key.handling {
            KeyHandling::Read | KeyHandling::Required => None,
            KeyHandling::Fixed(fixed, instead) => (!fixed.matches(&value)).then_some(instead),
            KeyHandling::NotHonoured(instead) => (!is_disabled(&value)).then_some(instead),
        };
        let note = note.map(|instead| UnhonouredKey { key: path.to_owned(), instead });
        self.unhonoured.extend(note);
        Ok(read.then_some(value))
    }

    /// Checks a block with a `type` and returns it with the type spelled as in the table.
    fn check_typed_block(
        &mut self,
        block: &str,
        types: &TypeTable,
        map: &Map<String, Value>,
    ) -> Result<Map<String, Value>, ConfigError> {
        let path = join_path(block, "type");
        let found = map.get("type").unwrap_or(&Value::Null);
        let names = || types.supported.iter().map(|(name, _)| *name);
        let Value::String(found) = found else {
            return Err(ConfigError::invalid_value(&path, names().collect::<Vec<_>>().join(", "), found.to_string()));
        };
        let same = |name: &str| name == found || types.case_insensitive && name.eq_ignore_ascii_case(found);
        if let Some((name, reason)) = types.unsupported.iter().find(|(name, _)| same(name)) {
            return Err(ConfigError::Unsupported { key: path, found: (*name).to_owned(), reason });
        }
        let Some((name, params)) = types.supported.iter().find(|(name, _)| same(name)) else {
            let expected =
                format!("{} (did you mean {}?)", names().collect::<Vec<_>>().join(", "), nearest_name(names(), found));
            return Err(ConfigError::invalid_value(&path, &expected, found));
        };
        let known = ["type", "params"];
        for key in map.keys().filter(|key| !known.contains(&key.as_str())) {
            let path = join_path(block, key);
            if key != "legacy_fusion" {
                return Err(unknown_key(block, path, known.into_iter(), key));
            }
            self.unhonoured.push(UnhonouredKey { key: path, instead: ONE_STEP });
        }
        let params = match map.get("params") {
            None | Some(Value::Null) => self.check_block(&join_path(block, "params"), params, &Map::new())?,
            Some(value) => {
                let path = join_path(block, "params");
                self.check_block(&path, params, object(&path, value)?)?
            }
        };
        Ok(Map::from_iter([("type".to_owned(), (*name).into()), ("params".to_owned(), params.into())]))
    }
}

impl FixedValue {
    fn matches(self, value: &Value) -> bool {
        match self {
            Self::Flag(flag) => *value == flag,
            Self::Number(number) => value.as_f64() == Some(number),
            Self::Text(text) => value == text,
        }
    }
}

/// Returns true if a value has no effect: false, empty, or a block with `enabled: false`.
fn is_disabled(value: &Value) -> bool {
    match value {
        Value::Bool(value) => !value,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty() || map.get("enabled").is_some_and(|enabled| *enabled == false),
        _ => false,
    }
}

fn scalar(path: &str, kind: ValueKind, value: &Value) -> Result<Value, ConfigError> {
    let fits = match kind {
        ValueKind::Flag => value.is_boolean(),
        ValueKind::Integer(from, to) => {
            let number = value.as_u64().or_else(|| as_integer(value)).filter(|number| (from..=to).contains(number));
            return number.map(Value::from).ok_or_else(|| kind_mismatch(path, kind, value));
        }
        ValueKind::Number => value.as_f64().is_some_and(|number| number.is_finite() && number >= 0.0),
        ValueKind::Betas => {
            let share = |value: &Value| value.as_f64().is_some_and(|number| (0.0..1.0).contains(&number));
            value.as_array().is_some_and(|betas| betas.len() == 2 && betas.iter().all(share))
        }
        ValueKind::Text => value.is_string(),
        ValueKind::Choice(choices) => value.as_str().is_some_and(|text| choices.contains(&text)),
        ValueKind::Any | ValueKind::Block(_) | ValueKind::Typed(_) => true,
    };
    if fits { Ok(value.clone()) } else { Err(kind_mismatch(path, kind, value)) }
}

/// Returns a float such as 5e8 as the integer that it equals.
fn as_integer(value: &Value) -> Option<u64> {
    let number = value.as_f64()?;
    (number.fract() == 0.0 && (0.0..u64::MAX as f64).contains(&number)).then_some(number as u64)
}

/// Describes the valid values of a key.
fn describe(kind: ValueKind) -> String {
    let name = match kind {
        ValueKind::Flag => "true or false",
        ValueKind::Integer(0, u64::MAX) => "a whole number, 0 or above",
        ValueKind::Integer(1, u64::MAX) => "a whole number, 1 or above",
        ValueKind::Integer(from, to) if from == to => return from.to_string(),
        ValueKind::Integer(from, to) => return format!("a whole number from {from} to {to}"),
        ValueKind::Number => "a finite number, 0 or above",
        ValueKind::Betas => "two numbers from 0 to below 1",
        ValueKind::Text => "text",
        ValueKind::Choice(choices) => return choices.join(", "),
        ValueKind::Block(_) => "a block of keys",
        ValueKind::Typed(_) => "a block with `type` and `params`",
        ValueKind::Any => "a value",
    };
    name.to_owned()
}

fn kind_mismatch(path: &str, kind: ValueKind, value: &Value) -> ConfigError {
    ConfigError::invalid_value(path, describe(kind), value.to_string())
}

fn object<'v>(path: &str, value: &'v Value) -> Result<&'v Map<String, Value>, ConfigError> {
    value.as_object().ok_or_else(|| ConfigError::invalid_value(path, "a block of keys", value.to_string()))
}

/// Returns the path of a key of a block; the path of the top level is empty.
pub(super) fn join_path(block: &str, name: &str) -> String {
    if block.is_empty() { name.to_owned() } else { format!("{block}.{name}") }
}

fn unknown_key(block: &str, key: String, names: impl Iterator<Item = &'static str>, name: &str) -> ConfigError {
    let owner = if block.is_empty() { "the top level".to_owned() } else { format!("`{block}`") };
    ConfigError::UnknownKey { key, block: owner, nearest: join_path(block, nearest_name(names, name)) }
}

fn nearest_name(names: impl Iterator<Item = &'static str>, name: &str) -> &'static str {
    let name = name.to_lowercase();
    let similarity = |known: &str| strsim::jaro_winkler(&known.to_lowercase(), &name);
    names.max_by(|a, b| similarity(a).total_cmp(&similarity(b))).unwrap_or_default()
}
