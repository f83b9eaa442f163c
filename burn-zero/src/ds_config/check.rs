//! Walks a tree along the table of keys: names, kinds, and what is not honoured.

use super::keys::{Fixed, Key, Kind, Types, Usage};
use crate::Error;
use serde_json::{Map, Value};

/// A key that stands in a configuration and is not honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unhonoured {
    /// The key's path.
    pub key: String,
    /// What is done instead.
    pub instead: &'static str,
}

impl std::fmt::Display for Unhonoured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` is not honoured: {}", self.key, self.instead)
    }
}

/// Stands for the value of an "auto", by the key's path; `None` where nothing can.
pub(super) type Auto<'a> = &'a dyn Fn(&str) -> Option<Value>;

/// The walk over one file.
pub(super) struct Check<'a> {
    pub(super) auto: Auto<'a>,
    pub(super) unhonoured: Vec<Unhonoured>,
}

impl Check<'_> {
    /// The keys of `map` that are read, of the kinds that `table` says; `block` is the path of `map`, empty at the top.
    ///
    /// # Errors
    /// [`Error::UnknownKey`], [`Error::Key`] or [`Error::Refused`].
    pub(super) fn block(
        &mut self,
        block: &str,
        table: &[Key],
        map: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Error> {
        let mut kept = Map::new();
        for (name, value) in map {
            let path = join(block, name);
            let Some(key) = table.iter().find(|key| key.name == name) else {
                return Err(unknown(block, path, table.iter().map(|key| key.name), name));
            };
            if let Some(value) = self.value(&path, key, value)? {
                kept.insert(name.clone(), value);
            }
        }
        let missing = |key: &&Key| matches!(key.usage, Usage::Need) && !kept.contains_key(key.name);
        match table.iter().find(missing) {
            Some(key) => Err(wrong(&join(block, key.name), &format!("{}, or \"auto\"", name_of(key.kind)), "nothing")),
            None => Ok(kept),
        }
    }

    /// The value of a key if it is read.
    fn value(&mut self, path: &str, key: &Key, value: &Value) -> Result<Option<Value>, Error> {
        let read = matches!(key.usage, Usage::Read | Usage::Need);
        if value == "auto" {
            return match (self.auto)(path) {
                _ if !read => Ok(None),
                Some(value) => Ok(Some(value).filter(|value| !value.is_null())),
                None => Err(wrong(path, &name_of(key.kind), "\"auto\", which nothing here stands for")),
            };
        }
        if value.is_null() {
            return Ok(None);
        }
        let value = match key.kind {
            Kind::Block(table) => self.block(path, table, object(path, value)?)?.into(),
            Kind::Typed(types) => self.typed(path, types, object(path, value)?)?.into(),
            kind => scalar(path, kind, value)?,
        };
        let note = match key.usage {
            Usage::Read | Usage::Need => None,
            Usage::Fixed(fixed, instead) => (!fixed.is(&value)).then_some(instead),
            Usage::Instead(instead) => (!is_off(&value)).then_some(instead),
        };
        let note = note.map(|instead| Unhonoured { key: path.to_owned(), instead });
        self.unhonoured.extend(note);
        Ok(read.then_some(value))
    }

    /// A block with a `type`, whose name is written as in the table afterwards.
    fn typed(&mut self, block: &str, types: &Types, map: &Map<String, Value>) -> Result<Map<String, Value>, Error> {
        let path = join(block, "type");
        let found = map.get("type").unwrap_or(&Value::Null);
        let names = || types.known.iter().map(|(name, _)| *name);
        let Value::String(found) = found else {
            return Err(wrong(&path, &names().collect::<Vec<_>>().join(", "), &found.to_string()));
        };
        let same = |name: &str| name == found || types.any_case && name.eq_ignore_ascii_case(found);
        if let Some((name, reason)) = types.refused.iter().find(|(name, _)| same(name)) {
            return Err(Error::Refused { key: path, found: (*name).to_owned(), reason });
        }
        let Some((name, params)) = types.known.iter().find(|(name, _)| same(name)) else {
            let expected =
                format!("{} (did you mean {}?)", names().collect::<Vec<_>>().join(", "), nearest(names(), found));
            return Err(wrong(&path, &expected, found));
        };
        let known = ["type", "params"];
        for key in map.keys().filter(|key| !known.contains(&key.as_str())) {
            let path = join(block, key);
            if key != "legacy_fusion" {
                return Err(unknown(block, path, known.into_iter(), key));
            }
            self.unhonoured.push(Unhonoured { key: path, instead: "there is one implementation of the step" });
        }
        let params = match map.get("params") {
            None | Some(Value::Null) => self.block(&join(block, "params"), params, &Map::new())?,
            Some(value) => {
                let path = join(block, "params");
                self.block(&path, params, object(&path, value)?)?
            }
        };
        Ok(Map::from_iter([("type".to_owned(), (*name).into()), ("params".to_owned(), params.into())]))
    }
}

impl Fixed {
    fn is(self, value: &Value) -> bool {
        match self {
            Self::Flag(flag) => *value == flag,
            Self::Number(number) => value.as_f64() == Some(number),
            Self::Text(text) => value == text,
        }
    }
}

/// Whether a value says nothing: false, empty, or a block with `enabled: false`.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Bool(value) => !value,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty() || map.get("enabled").is_some_and(|enabled| *enabled == false),
        _ => false,
    }
}

fn scalar(path: &str, kind: Kind, value: &Value) -> Result<Value, Error> {
    let fits = match kind {
        Kind::Flag => value.is_boolean(),
        Kind::Whole(from, to) => {
            let number = value.as_u64().or_else(|| whole(value)).filter(|number| (from..=to).contains(number));
            return number.map(Value::from).ok_or_else(|| mismatch(path, kind, value));
        }
        Kind::Number => value.as_f64().is_some_and(|number| number.is_finite() && number >= 0.0),
        Kind::Betas => {
            let share = |value: &Value| value.as_f64().is_some_and(|number| (0.0..1.0).contains(&number));
            value.as_array().is_some_and(|betas| betas.len() == 2 && betas.iter().all(share))
        }
        Kind::Text => value.is_string(),
        Kind::Choice(choices) => value.as_str().is_some_and(|text| choices.contains(&text)),
        Kind::Any | Kind::Block(_) | Kind::Typed(_) => true,
    };
    if fits { Ok(value.clone()) } else { Err(mismatch(path, kind, value)) }
}

/// The whole number that a float such as 5e8 is.
fn whole(value: &Value) -> Option<u64> {
    let number = value.as_f64()?;
    (number.fract() == 0.0 && (0.0..u64::MAX as f64).contains(&number)).then_some(number as u64)
}

/// What would do at a key.
fn name_of(kind: Kind) -> String {
    let name = match kind {
        Kind::Flag => "true or false",
        Kind::Whole(0, u64::MAX) => "a whole number, 0 or above",
        Kind::Whole(1, u64::MAX) => "a whole number, 1 or above",
        Kind::Whole(from, to) => return format!("a whole number from {from} to {to}"),
        Kind::Number => "a finite number, 0 or above",
        Kind::Betas => "two numbers from 0 to below 1",
        Kind::Text => "text",
        Kind::Choice(choices) => return choices.join(", "),
        Kind::Block(_) => "a block of keys",
        Kind::Typed(_) => "a block with `type` and `params`",
        Kind::Any => "a value",
    };
    name.to_owned()
}

fn mismatch(path: &str, kind: Kind, value: &Value) -> Error {
    wrong(path, &name_of(kind), &value.to_string())
}

fn object<'v>(path: &str, value: &'v Value) -> Result<&'v Map<String, Value>, Error> {
    value.as_object().ok_or_else(|| wrong(path, "a block of keys", &value.to_string()))
}

/// A key with a value that does not fit.
pub(super) fn wrong(path: &str, expected: &str, found: &str) -> Error {
    Error::Key { key: path.to_owned(), expected: expected.to_owned(), found: found.to_owned() }
}

fn join(block: &str, name: &str) -> String {
    if block.is_empty() { name.to_owned() } else { format!("{block}.{name}") }
}

fn unknown(block: &str, key: String, names: impl Iterator<Item = &'static str>, name: &str) -> Error {
    let owner = if block.is_empty() { "the top block".to_owned() } else { format!("`{block}`") };
    Error::UnknownKey { key, block: owner, nearest: join(block, nearest(names, name)) }
}

fn nearest(names: impl Iterator<Item = &'static str>, name: &str) -> &'static str {
    let name = name.to_lowercase();
    let likeness = |known: &str| strsim::jaro_winkler(&known.to_lowercase(), &name);
    names.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).unwrap_or_default()
}
