//! Values that may be written in more than one way.

use std::fmt;

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::data::{Columns, Format};

/// One file of training rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The file.
    pub path: String,
    /// Its format, if it is not `data.format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Its own names of the format's columns, if they are not those of `data.columns`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// How often each row is seen per epoch, on average.
    #[serde(default = "once")]
    pub weight: f64,
}

fn once() -> f64 {
    1.0
}

impl Source {
    /// A file like every other.
    fn plain(path: impl Into<String>) -> Self {
        Self { path: path.into(), format: None, columns: None, weight: once() }
    }
}

/// Reads `data.train`: a path, or a list whose items are paths or tables.
pub fn sources<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Source>, D::Error> {
    deserializer.deserialize_any(Sources)
}

struct Sources;

impl<'de> Visitor<'de> for Sources {
    type Value = Vec<Source>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a path, or a list of { path, format, columns, weight }")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
        Ok(vec![Source::plain(path)])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut sources = Vec::new();
        while let Some(item) = items.next_element::<toml::Value>()? {
            let number = sources.len() + 1;
            let source = match item {
                toml::Value::String(path) => Source::plain(path),
                item => Source::deserialize(item)
                    .map_err(|error| A::Error::custom(format!("item {number}: {}", error.message())))?,
            };
            sources.push(source);
        }
        Ok(sources)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Err(A::Error::invalid_type(Unexpected::Map, &self))
    }
}

/// Which modules get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Modules whose path ends in one of these names.
    Names(Vec<String>),
    /// One word: `all-linear`, or a pattern that a module's whole path must match, as in peft.
    Pattern(String),
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Names(["q_proj", "v_proj"].map(String::from).to_vec())
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Modules;
        impl<'de> Visitor<'de> for Modules {
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
        deserializer.deserialize_any(Modules)
    }
}

/// Which blocks learn under `freeze`, as LLaMA-Factory's `freeze_trainable_layers` and `freeze_extra_modules`: an integer, or
/// `{ count, extra_modules }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// The last n blocks as n, the first n as -n.
    pub count: i64,
    /// What else learns: `embed_tokens`, `norm`, `lm_head`.
    pub extra_modules: Vec<String>,
}

impl Default for Layers {
    fn default() -> Self {
        Self { count: 2, extra_modules: Vec::new() }
    }
}

/// The table form of [`Layers`].
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LayersTable {
    count: i64,
    extra_modules: Vec<String>,
}

impl Default for LayersTable {
    fn default() -> Self {
        let Layers { count, extra_modules } = Layers::default();
        Self { count, extra_modules }
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.extra_modules.is_empty() {
            return serializer.serialize_i64(self.count);
        }
        LayersTable { count: self.count, extra_modules: self.extra_modules.clone() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Blocks;
        impl<'de> Visitor<'de> for Blocks {
            type Value = Layers;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of blocks, or { count, extra_modules }")
            }

            fn visit_i64<E: Error>(self, count: i64) -> Result<Layers, E> {
                Ok(Layers { count, ..Layers::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Layers, A::Error> {
                let table = LayersTable::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                Ok(Layers { count: table.count, extra_modules: table.extra_modules })
            }
        }
        deserializer.deserialize_any(Blocks)
    }
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// Optimizer steps, written as an integer.
    Steps(usize),
    /// Fraction of all optimizer steps, in [0, 1), written with a point.
    Ratio(f64),
}

impl Warmup {
    /// Warmup's steps in a run of `total`; a fraction is rounded up, as `transformers` does.
    pub fn steps(self, total: usize) -> usize {
        match self {
            Self::Steps(steps) => steps,
            Self::Ratio(ratio) => (total as f64 * ratio).ceil() as usize,
        }
    }
}

impl Default for Warmup {
    fn default() -> Self {
        Self::Ratio(0.03)
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
        struct Length;
        impl Visitor<'_> for Length {
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
        deserializer.deserialize_any(Length)
    }
}

/// How the rows of a micro-batch lie in it, and how many they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packing {
    /// `train.batch_size` rows, each padded to the longest.
    Padded,
    /// As many, joined into one without padding.
    #[default]
    Joined,
    /// Joined, and as many as `train.batch_size` · `data.max_length` tokens hold.
    Fill,
}

impl Packing {
    /// Whether rows are joined into one.
    pub fn joins(self) -> bool {
        self != Self::Padded
    }
}

impl Serialize for Packing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fill => serializer.serialize_str("fill"),
            joined => serializer.serialize_bool(joined.joins()),
        }
    }
}

impl<'de> Deserialize<'de> for Packing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Way;
        impl Visitor<'_> for Way {
            type Value = Packing;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, false or \"fill\"")
            }

            fn visit_bool<E: Error>(self, joined: bool) -> Result<Packing, E> {
                Ok(if joined { Packing::Joined } else { Packing::Padded })
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<Packing, E> {
                match word {
                    "fill" => Ok(Packing::Fill),
                    _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
                }
            }
        }
        deserializer.deserialize_any(Way)
    }
}

/// Which segments' activations are dropped in the forward pass and computed again in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpointing {
    /// None.
    None,
    /// All.
    Full,
    /// Every k-th.
    Every(usize),
}

impl Serialize for Checkpointing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::None => serializer.serialize_str("none"),
            Self::Full => serializer.serialize_str("full"),
            Self::Every(k) => serializer.serialize_u64(k as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Checkpointing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Blocks;
        impl Visitor<'_> for Blocks {
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
        deserializer.deserialize_any(Blocks)
    }
}
