//! PEFT's `trainable_token_indices`.

use crate::{Error, param::last_segment};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The tokens whose rows are trained: of the embedding, or by the name of a module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Tokens of the embedding.
    Embedding(Vec<u32>),
    /// Tokens by the end of a module's path.
    ByModule(BTreeMap<String, Vec<u32>>),
}

impl TokenIndices {
    /// Returns the tokens of the embedding at `path`. `head` is the path of an output head that shares its weight.
    ///
    /// # Errors
    /// If there are none, one appears twice, or rows of another module are asked for.
    pub fn of_embedding(&self, path: &str, head: Option<&str>) -> Result<&[u32], Error> {
        let refuse = |found: String| {
            let expected = format!("different tokens of `{}`", last_segment(path));
            Error::config(format!("`trainable_token_indices`: expected {expected}, found {found}"))
        };
        let indices = match self {
            Self::Embedding(indices) => indices,
            Self::ByModule(modules) => {
                let own = modules.iter().find(|(module, _)| path.ends_with(module.as_str()));
                let (_, own) = own.ok_or_else(|| refuse(format!("{:?}", modules.keys())))?;
                let tied =
                    |module: &str, indices: &[u32]| head.is_some_and(|head| head.ends_with(module)) && indices == own;
                let other =
                    modules.iter().find(|(module, indices)| !path.ends_with(module.as_str()) && !tied(module, indices));
                if let Some((other, _)) = other {
                    return Err(refuse(format!("also those of {other:?}, which needs `modules_to_save` instead")));
                }
                own
            }
        };
        let mut seen = BTreeSet::new();
        let twice = indices.iter().find(|&&index| !seen.insert(index));
        match (indices.is_empty(), twice) {
            (true, _) => Err(refuse("none".to_owned())),
            (_, Some(index)) => Err(refuse(format!("{index} twice"))),
            _ => Ok(indices),
        }
    }
}
