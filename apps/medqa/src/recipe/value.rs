//! Recipe values that can be written in more than one form.

use std::fmt;

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::schema::{Columns, Format};

/// A file of training rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetSource {
    /// The path of the file.
    pub path: String,
    /// Its format, if it is not `data.format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The column names of the file, if they differ from `data.columns`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// The mean number of times that a row is seen per epoch.
    #[serde(default = "default_weight")]
    pub weight: f64,
}

fn default_weight() -> f64 {
    1.0
}

impl DatasetSource {
    /// Creates a source of weight 1 in the format of `[data]`.
    fn from_path(path: impl Into<String>) -> Self {
        Self { path: path.into(), format: None, columns: None, weight: default_weight() }
    }

    /// Parses an item of `data.train`.
    ///
    /// # Errors
    /// A message that says what was expected and found, and for which key of the item.
    fn from_item(item: toml::Value) -> Result<Self, String> {
        let table = match item {
            toml::Value::String(path) => return Ok(Self::from_path(path)),
            toml::Value::Table(table) => table,
            other => {
                let found = describe(&other);
                return Err(format!("expected a path, or {{ path, format, columns, weight }}, found {found}"));
            }
        };
        // Each key is first parsed alone, beside a path, so that an error belongs to that key.
        for (key, value) in &table {
            let mut alone = toml::Table::from_iter([("path".to_owned(), String::new().into())]);
            alone.insert(key.clone(), value.clone());
            Self::deserialize(alone).map_err(|error| format!("`{key}`: {}", error.message()))?;
        }
        Self::deserialize(table).map_err(|error| error.message().to_owned())
    }
}

/// Describes a value of the wrong kind, for an error message.
pub(super) fn describe(value: &toml::Value) -> String {
    match value {
        toml::Value::Array(_) => "a list".to_owned(),
        toml::Value::Table(_) => "a table".to_owned(),
        toml::Value::String(text) => format!("string {text:?}"),
        other => format!("{} `{other}`", other.type_str()),
    }
}

/// Reads `data.train`: a path, or a list whose items are paths or tables.
pub(super) fn deserialize_sources<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DatasetSource>, D::Error> {
    deserializer.deserialize_any(SourcesVisitor)
}

struct SourcesVisitor;

impl<'de> Visitor<'de> for SourcesVisitor {
    type Value = Vec<DatasetSource>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a path, or a list of { path, format, columns, weight }")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
        Ok(vec![DatasetSource::from_path(path)])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut sources = Vec::new();
        while let Some(item) = items.next_element::<toml::Value>()? {
            let number = sources.len() + 1;
            let source = DatasetSource::from_item(item);
            sources.push(source.map_err(|problem| A::Error::custom(format!("item {number}: {problem}")))?);
        }
        Ok(sources)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Err(A::Error::invalid_type(Unexpected::Map, &self))
    }
}

/// The modules that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Modules whose path ends in one of these names.
    Names(Vec<String>),
    /// One string: `all-linear`, or a regular expression that a module's whole path must match, as in PEFT.
    Pattern(String),
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Names(["q_proj", "v_proj"].map(String::from).to_vec())
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TargetModulesVisitor;
        impl<'de> Visitor<'de> for TargetModulesVisitor {
            type Value = TargetModules;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of module names, or one string")
            }

            fn visit_str<E: Error>(self, pattern: &str) -> Result<Self::Value, E> {
                Ok(TargetModules::Pattern(pattern.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = items.next_element()? {
                    names.push(name);
                }
                Ok(TargetModules::Names(names))
            }
        }
        deserializer.deserialize_any(TargetModulesVisitor)
    }
}

/// The blocks that `freeze` trains, like LLaMA-Factory's `freeze_trainable_layers` and `freeze_extra_modules`: an
/// integer, or `{ count, extra_modules }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainableLayers {
    /// The number of blocks: n for the last n, -n for the first n.
    pub count: i64,
    /// Other modules to train: `embed_tokens`, `norm`, `lm_head`.
    pub extra_modules: Vec<String>,
}

impl Default for TrainableLayers {
    fn default() -> Self {
        Self { count: 2, extra_modules: Vec::new() }
    }
}

/// The table form of [`TrainableLayers`].
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TrainableLayersTable {
    count: i64,
    extra_modules: Vec<String>,
}

impl Default for TrainableLayersTable {
    fn default() -> Self {
        let TrainableLayers { count, extra_modules } = TrainableLayers::default();
        Self { count, extra_modules }
    }
}

impl Serialize for TrainableLayers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.extra_modules.is_empty() {
            return serializer.serialize_i64(self.count);
        }
        TrainableLayersTable { count: self.count, extra_modules: self.extra_modules.clone() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for TrainableLayers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TrainableLayersVisitor;
        impl<'de> Visitor<'de> for TrainableLayersVisitor {
            type Value = TrainableLayers;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of blocks, or { count, extra_modules }")
            }

            fn visit_i64<E: Error>(self, count: i64) -> Result<TrainableLayers, E> {
                Ok(TrainableLayers { count, ..TrainableLayers::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TrainableLayers, A::Error> {
                let table = TrainableLayersTable::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                Ok(TrainableLayers { count: table.count, extra_modules: table.extra_modules })
            }
        }
        deserializer.deserialize_any(TrainableLayersVisitor)
    }
}

/// The length of the learning rate warmup.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// Optimizer steps, written as an integer.
    Steps(usize),
    /// Fraction of all optimizer steps, in [0, 1), written as a float.
    Ratio(f64),
}

impl Warmup {
    /// Returns true if there is no warmup.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Steps(0)) || self == Self::Ratio(0.0)
    }

    /// Returns the warmup steps in a run of `total` steps; a fraction is rounded up, as in `transformers`.
    pub fn steps(self, total: usize) -> usize {
        match self {
            Self::Steps(steps) => steps,
            Self::Ratio(ratio) => (total as f64 * ratio).ceil() as usize,
        }
    }
}

impl Default for Warmup {
    fn default() -> Self {
        Self::Steps(0)
    }
}

impl Serialize for Warmup {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Steps(steps) => serializer.serialize_u64(steps as u64),
            Self::Ratio(ratio) => serializer.serialize_f64(ratio),
        }
    }
}

impl<'de> Deserialize<'de> for Warmup {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WarmupVisitor;
        impl Visitor<'_> for WarmupVisitor {
            type Value = Warmup;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("steps as an integer, or a ratio of all steps as a float in [0, 1)")
            }

            fn visit_u64<E: Error>(self, steps: u64) -> Result<Warmup, E> {
                usize::try_from(steps)
                    .map(Warmup::Steps)
                    .map_err(|_| E::invalid_value(Unexpected::Unsigned(steps), &self))
            }

            fn visit_i64<E: Error>(self, steps: i64) -> Result<Warmup, E> {
                usize::try_from(steps)
                    .map(Warmup::Steps)
                    .map_err(|_| E::invalid_value(Unexpected::Signed(steps), &self))
            }

            fn visit_f64<E: Error>(self, ratio: f64) -> Result<Warmup, E> {
                let is_ratio = (0.0..1.0).contains(&ratio);
                let invalid = || E::invalid_value(Unexpected::Float(ratio), &self);
                is_ratio.then_some(Warmup::Ratio(ratio)).ok_or_else(invalid)
            }
        }
        deserializer.deserialize_any(WarmupVisitor)
    }
}

/// The layout of a micro-batch and its number of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packing {
    /// `train.batch_size` rows, each padded to the longest.
    Padded,
    /// `train.batch_size` rows, concatenated without padding.
    #[default]
    PaddingFree,
    /// As many concatenated rows as fit into `train.batch_size` · `data.max_length` tokens.
    Fill,
}

impl Packing {
    /// Returns whether rows are concatenated without padding.
    pub fn is_padding_free(self) -> bool {
        self != Self::Padded
    }
}

impl Serialize for Packing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fill => serializer.serialize_str("fill"),
            joined => serializer.serialize_bool(joined.is_padding_free()),
        }
    }
}

impl<'de> Deserialize<'de> for Packing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PackingVisitor;
        impl Visitor<'_> for PackingVisitor {
            type Value = Packing;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, false or \"fill\"")
            }

            fn visit_bool<E: Error>(self, joined: bool) -> Result<Packing, E> {
                Ok(if joined { Packing::PaddingFree } else { Packing::Padded })
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<Packing, E> {
                match word {
                    "fill" => Ok(Packing::Fill),
                    _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
                }
            }
        }
        deserializer.deserialize_any(PackingVisitor)
    }
}

/// The textual form of activation checkpointing: `"none"`, `"full"` or every k-th segment.
pub(super) mod checkpointing {
    use super::{Error, Unexpected, Visitor, fmt};
    use burn_zero::segment::Checkpointing;
    use serde::{Deserializer, Serializer};

    /// Writes the settings that a recipe can have.
    pub(crate) fn serialize<S: Serializer>(value: &Checkpointing, serializer: S) -> Result<S::Ok, S::Error> {
        match *value {
            Checkpointing::None => serializer.serialize_str("none"),
            Checkpointing::Full | Checkpointing::All => serializer.serialize_str("full"),
            Checkpointing::Every(k) => serializer.serialize_u64(k as u64),
        }
    }

    /// Reads `"none"`, `"full"` or an integer above 0.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Checkpointing, D::Error> {
        deserializer.deserialize_any(CheckpointingVisitor)
    }

    struct CheckpointingVisitor;

    impl Visitor<'_> for CheckpointingVisitor {
        type Value = Checkpointing;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("\"none\", \"full\" or an integer k ≥ 1 (every k-th segment)")
        }

        fn visit_str<E: Error>(self, word: &str) -> Result<Checkpointing, E> {
            match word {
                "none" => Ok(Checkpointing::None),
                "full" => Ok(Checkpointing::Full),
                _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
            }
        }

        fn visit_u64<E: Error>(self, k: u64) -> Result<Checkpointing, E> {
            self.visit_i64(i64::try_from(k).unwrap_or(0))
        }

        fn visit_i64<E: Error>(self, k: i64) -> Result<Checkpointing, E> {
            match usize::try_from(k) {
                Ok(k) if k > 0 => Ok(Checkpointing::Every(k)),
                _ => Err(E::invalid_value(Unexpected::Signed(k), &self)),
            }
        }
    }
}
