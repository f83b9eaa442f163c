//! The keys that a recipe can have, and what an unknown one may mean.

use std::fmt;

use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};

use super::{
    AdaLoraOptions, AdapterTargets, CommonMethodConfig, DataConfig, EvalSaveConfig, LoraOptions, LrScheduleConfig,
    MethodConfig, ModelConfig, OffloadConfig, OptimizerConfig, ParallelConfig, ParallelFiles, PipelineOptions,
    ShardingConfig, StepsConfig, TrainConfig, VirtualTokens, other_tools,
};

/// A table of a recipe file.
pub(super) struct TableKeys {
    pub name: &'static str,
    pub keys: Vec<&'static str>,
}

/// All tables of a recipe file.
pub(super) struct RecipeKeys {
    pub model: TableKeys,
    pub data: TableKeys,
    pub method: TableKeys,
    pub train: TableKeys,
    pub parallel: TableKeys,
}

impl RecipeKeys {
    /// Collects the fields of the tables.
    pub(super) fn new() -> Self {
        // The tables themselves only flatten these structs; a field of their own would be missed here.
        debug_assert!(
            field_names::<TrainConfig>().is_empty()
                && field_names::<MethodConfig>().is_empty()
                && field_names::<ParallelConfig>().is_empty()
        );
        let table = |name, parts: &[&[&'static str]]| TableKeys { name, keys: parts.concat() };
        Self {
            model: table("model", &[field_names::<ModelConfig>()]),
            data: table("data", &[field_names::<DataConfig>()]),
            method: table(
                "method",
                &[
                    field_names::<CommonMethodConfig>(),
                    field_names::<LoraOptions>(),
                    field_names::<AdaLoraOptions>(),
                    field_names::<AdapterTargets>(),
                    field_names::<VirtualTokens>(),
                ],
            ),
            train: table(
                "train",
                &[
                    field_names::<StepsConfig>(),
                    field_names::<OptimizerConfig>(),
                    field_names::<LrScheduleConfig>(),
                    field_names::<EvalSaveConfig>(),
                ],
            ),
            parallel: table(
                "parallel",
                &[
                    field_names::<PipelineOptions>(),
                    field_names::<ShardingConfig>(),
                    field_names::<OffloadConfig>(),
                    field_names::<ParallelFiles>(),
                ],
            ),
        }
    }

    /// Returns the tables in the order of a recipe.
    pub(super) fn tables(&self) -> [&TableKeys; 5] {
        [&self.model, &self.data, &self.method, &self.train, &self.parallel]
    }

    /// Says what an unknown key may mean: `path` is `table.key`, or one word at the top of a recipe.
    pub(super) fn unknown_key_message(&self, path: &str) -> String {
        let (table, key) = path.split_once('.').unwrap_or(("", path));
        let last = key.rsplit('.').next().unwrap_or(key);
        let same_key = |table: &&&TableKeys| table.keys.contains(&last);
        if let Some(other) = self.tables().iter().find(same_key) {
            return format!("unknown key; `{last}` stands in the table [{}]: `{}.{last}`", other.name, other.name);
        }
        if let Some(answer) = other_tools::answer(last) {
            return format!("unknown key; it {}", answer.predicate());
        }
        if let Some(near) = self.nearest(table, last) {
            return format!("unknown key; the nearest known key is `{near}`");
        }
        match self.tables().into_iter().find(|known| known.name == table) {
            Some(known) => format!("unknown key; those of [{table}] are {}", known.keys.join(", ")),
            None => {
                let names: Vec<String> = self.tables().iter().map(|table| format!("[{}]", table.name)).collect();
                format!("unknown key; a recipe has the tables {}", names.join(", "))
            }
        }
    }

    /// Returns the known key of which `key` is a misspelling, at best in the table of that name.
    fn nearest(&self, table: &str, key: &str) -> Option<String> {
        let plain = |name: &str| name.to_ascii_lowercase().replace(['_', '-'], "");
        let distance = |known: &str| strsim::damerau_levenshtein(&plain(key), &plain(known));
        // A short name has many neighbours.
        let near = |known: &str| distance(known) <= (known.len() / 4).min(2);
        let names = self.tables().into_iter().map(|table| table.name).filter(|_| table.is_empty());
        let names = names.filter(|name| near(name)).map(|name| (distance(name), false, name.to_owned()));
        let keys = self.tables().into_iter().flat_map(|known| known.keys.iter().map(|key| (known.name, *key)));
        let keys = keys
            .filter(|(_, known)| near(known))
            .map(|(name, known)| (distance(known), name != table, format!("{name}.{known}")));
        names.chain(keys).min().map(|(_, _, name)| name)
    }
}

/// Returns the names of a struct's fields as serde sees them; none for a struct that only flattens others.
fn field_names<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut seen: &'static [&'static str] = &[];
    // The capture always ends in an error: no value is ever built.
    let _ = T::deserialize(FieldNameCapture(&mut seen));
    seen
}

/// A deserializer that only records the names of a struct's fields.
struct FieldNameCapture<'a>(&'a mut &'static [&'static str]);

/// The error that ends a capture.
#[derive(Debug)]
struct FieldsCaptured;

impl fmt::Display for FieldsCaptured {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("fields seen")
    }
}

impl std::error::Error for FieldsCaptured {}

impl serde::de::Error for FieldsCaptured {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

impl<'de> Deserializer<'de> for FieldNameCapture<'_> {
    type Error = FieldsCaptured;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, FieldsCaptured> {
        *self.0 = fields;
        Err(FieldsCaptured)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, FieldsCaptured> {
        Err(FieldsCaptured)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
