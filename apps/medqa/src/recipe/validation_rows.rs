//! The key `data.valid`.

use std::fmt;

use serde::{
    Deserialize, Serialize,
    de::{Deserializer, Error, Visitor},
};

/// The validation rows of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ValidationRows {
    /// The path of a file.
    Path(String),
    /// The share of the training rows, by the hash of each row's group of duplicates.
    Share(f64),
}

impl ValidationRows {
    /// Returns the path, if the rows are those of a file.
    pub fn path_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Path(path) => Some(path),
            Self::Share(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for ValidationRows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValidationRowsVisitor;
        impl Visitor<'_> for ValidationRowsVisitor {
            type Value = ValidationRows;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a path, or a share of the training rows such as 0.05")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let share = text.trim().parse().ok().filter(|share: &f64| share.is_finite());
                Ok(share.map_or_else(|| ValidationRows::Path(text.to_owned()), ValidationRows::Share))
            }

            fn visit_f64<E: Error>(self, share: f64) -> Result<Self::Value, E> {
                Ok(ValidationRows::Share(share))
            }

            fn visit_i64<E: Error>(self, share: i64) -> Result<Self::Value, E> {
                Ok(ValidationRows::Share(share as f64))
            }
        }
        deserializer.deserialize_any(ValidationRowsVisitor)
    }
}
