//! PEFT's `target_modules`: a predicate on the paths of linear layers.

use crate::Error;
use serde::{Deserialize, Serialize};

/// PEFT's `target_modules`: a list of names, matched as suffixes, or one string: a regular expression for the whole
/// path, `all-linear` (every linear layer but the output head) or `qkv` (the query, key and value projections).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Layers whose path is one of the names or ends in `.` and one of the names.
    Suffixes(Vec<String>),
    /// `all-linear`, `qkv`, or a regular expression that the whole path must match.
    Pattern(String),
}

impl Default for TargetModules {
    /// Returns PEFT's default for LLaMA: `q_proj` and `v_proj`.
    fn default() -> Self {
        Self::Suffixes(vec!["q_proj".into(), "v_proj".into()])
    }
}

impl std::fmt::Display for TargetModules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Suffixes(names) => write!(f, "{names:?}"),
            Self::Pattern(pattern) => write!(f, "`{pattern}`"),
        }
    }
}

impl TargetModules {
    /// Compiles the value into a predicate on the paths of linear layers.
    ///
    /// # Errors
    /// If the pattern is not a regular expression.
    pub(crate) fn matcher(&self) -> Result<Matcher, Error> {
        Ok(match self {
            Self::Suffixes(names) => Matcher::Suffixes(names.clone()),
            Self::Pattern(pattern) if pattern == "all-linear" => Matcher::AllLinear,
            Self::Pattern(pattern) if pattern == "qkv" => {
                Matcher::Suffixes(["q_proj", "k_proj", "v_proj"].map(String::from).to_vec())
            }
            Self::Pattern(pattern) => {
                Matcher::Regex(Box::new(fancy_regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|error| {
                    Error::config(format!("target_modules: `{pattern}` is no regular expression: {error}"))
                })?))
            }
        })
    }
}

/// A compiled [`TargetModules`]: a predicate on layer paths.
#[derive(Debug, Clone)]
pub(crate) enum Matcher {
    /// Selects layers whose path is one of these names or ends in `.` and one of them.
    Suffixes(Vec<String>),
    /// Selects every layer but `lm_head`.
    AllLinear,
    /// Selects layers whose whole path matches.
    Regex(Box<fancy_regex::Regex>),
}

impl Matcher {
    /// Returns true if the layer at `path` is selected.
    pub(crate) fn selects(&self, path: &str) -> bool {
        match self {
            Self::Suffixes(names) => names.iter().any(|name| matches_suffix(path, name)),
            Self::AllLinear => path != "lm_head" && !path.ends_with(".lm_head"),
            // A match that fails by the backtracking limit counts as no match.
            Self::Regex(regex) => regex.is_match(path).unwrap_or(false),
        }
    }
}

/// Returns true if `path` is `name` or ends in `.` and `name`.
pub(crate) fn matches_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_modules_match_as_in_peft() {
        let q = "model.layers.0.self_attn.q_proj";
        let table: [(TargetModules, &str, bool); 9] = [
            (TargetModules::Suffixes(vec!["q_proj".into()]), q, true),
            (TargetModules::Suffixes(vec!["self_attn.q_proj".into()]), q, true),
            (TargetModules::Suffixes(vec!["proj".into()]), q, false),
            (TargetModules::Suffixes(vec!["q_proj".into()]), "q_proj", true),
            (TargetModules::Pattern(r".*layers\.0\..*_proj".into()), q, true),
            (TargetModules::Pattern("q_proj".into()), q, false),
            (TargetModules::Pattern("(?!.*q_proj).*".into()), q, false),
            (TargetModules::Pattern("all-linear".into()), "lm_head", false),
            (TargetModules::Pattern("qkv".into()), "model.layers.0.self_attn.o_proj", false),
        ];
        for (target, path, expected) in table {
            assert_eq!(target.matcher().unwrap().selects(path), expected, "{target} on {path}");
        }
        assert!(TargetModules::Pattern("(".into()).matcher().is_err());
    }
}
