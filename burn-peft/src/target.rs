//! The selection of the linear layers that get an adapter.

use crate::{Error, LoraConfig};
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
    pub fn matcher(&self) -> Result<Matcher, Error> {
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
pub enum Matcher {
    /// Selects layers whose path is one of these names or ends in `.` and one of them.
    Suffixes(Vec<String>),
    /// Selects every layer but `lm_head`.
    AllLinear,
    /// Selects layers whose whole path matches.
    Regex(Box<fancy_regex::Regex>),
}

impl Matcher {
    /// Returns true if the layer at `path` is selected.
    pub fn selects(&self, path: &str) -> bool {
        match self {
            Self::Suffixes(names) => names.iter().any(|name| matches_suffix(path, name)),
            Self::AllLinear => path != "lm_head" && !path.ends_with(".lm_head"),
            // A match that fails by the backtracking limit counts as no match.
            Self::Regex(regex) => regex.is_match(path).unwrap_or(false),
        }
    }
}

/// The fields of a [`LoraConfig`] that decide which layers get an adapter, compiled into a predicate.
#[derive(Debug, Clone)]
pub struct Selection {
    target: Matcher,
    exclude: Option<Matcher>,
    modules_to_save: Vec<String>,
    layers_to_transform: Option<Vec<usize>>,
    layers_pattern: Vec<fancy_regex::Regex>,
}

impl Selection {
    /// Compiles the configuration's patterns.
    ///
    /// # Errors
    /// If a pattern is not a regular expression.
    pub fn new(config: &LoraConfig) -> Result<Self, Error> {
        let layers = config.layers_to_transform.as_ref().map(|layers| layers.as_slice().to_vec());
        let patterns = config.layers_pattern.iter().flat_map(|patterns| patterns.as_slice());
        let regex = |pattern: &String| {
            fancy_regex::Regex::new(&format!(r"^(?:.*?\.)?(?:{pattern})\.(?P<layer>\d+)\."))
                .map_err(|e| Error::config(format!("layers_pattern: `{pattern}` is no regular expression: {e}")))
        };
        Ok(Self {
            target: config.target_modules.matcher()?,
            exclude: config.exclude_modules.as_ref().map(TargetModules::matcher).transpose()?,
            modules_to_save: config.modules_to_save.clone().unwrap_or_default(),
            layers_to_transform: layers.filter(|layers| !layers.is_empty()),
            layers_pattern: patterns.map(regex).collect::<Result<_, _>>()?,
        })
    }

    /// Returns true if the layer at `path` gets an adapter.
    pub fn selects(&self, path: &str) -> bool {
        let excluded = self.exclude.as_ref().is_some_and(|exclude| exclude.selects(path));
        let block = || match &self.layers_to_transform {
            None => true,
            Some(layers) => self.layer_index(path).is_some_and(|block| layers.contains(&block)),
        };
        self.target.selects(path) && !excluded && !self.in_modules_to_save(path) && block()
    }

    /// Returns the names of `modules_to_save` that match the module at `path` or one that contains it.
    pub(crate) fn matching_modules_to_save<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a String> {
        let modules = || path.match_indices('.').map(|(at, _)| at).chain([path.len()]).map(|end| &path[..end]);
        self.modules_to_save.iter().filter(move |name| modules().any(|module| matches_suffix(module, name)))
    }

    /// Returns true if the module at `path` is one of `modules_to_save` or inside one.
    pub fn in_modules_to_save(&self, path: &str) -> bool {
        self.matching_modules_to_save(path).next().is_some()
    }

    /// Returns the index of the transformer block of a path: the number after a name of `layers_pattern`, or the first
    /// number.
    fn layer_index(&self, path: &str) -> Option<usize> {
        if self.layers_pattern.is_empty() {
            // Like PEFT's default pattern: the number has at least two names before it and one after it.
            let parts: Vec<&str> = path.split('.').collect();
            let numbers = parts.get(2..parts.len().saturating_sub(1))?.iter();
            return numbers.filter_map(|part| part.parse().ok()).next();
        }
        let found = |regex: &fancy_regex::Regex| regex.captures(path).ok()??.name("layer")?.as_str().parse().ok();
        self.layers_pattern.iter().find_map(found)
    }
}

/// Returns true if `path` is `name` or ends in `.` and `name`.
fn matches_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OneOrMany;

    #[test]
    fn exclusions_saved_modules_and_blocks_narrow_the_selection() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let base = || LoraConfig {
            target_modules: TargetModules::Suffixes(names(&["q_proj", "k_proj", "lm_head"])),
            ..LoraConfig::default()
        };
        let exclude = |modules| LoraConfig { exclude_modules: Some(modules), ..base() };
        let layers = |layers, pattern: Option<&str>| LoraConfig {
            layers_to_transform: Some(layers),
            layers_pattern: pattern.map(|pattern| OneOrMany::One(pattern.to_owned())),
            ..base()
        };
        let (q0, k1) = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj");
        let expert = "model.layers.1.experts.0.q_proj";
        let saved = LoraConfig { modules_to_save: Some(names(&["lm_head", "self_attn"])), ..base() };
        for (config, expected) in [
            (base(), [true, true, true, true]),
            (exclude(TargetModules::Suffixes(names(&["k_proj"]))), [true, false, true, true]),
            (exclude(TargetModules::Pattern(r".*layers\.0\..*".into())), [false, true, true, true]),
            (exclude(TargetModules::Pattern("q_proj".into())), [true, true, true, true]),
            (saved, [false, false, true, false]),
            (layers(OneOrMany::One(0), None), [true, false, false, false]),
            (layers(OneOrMany::Many(vec![1, 7]), Some("layers")), [false, true, true, false]),
            (layers(OneOrMany::One(0), Some("experts")), [false, false, true, false]),
            (layers(OneOrMany::Many(vec![]), None), [true, true, true, true]),
        ] {
            let selection = Selection::new(&config).unwrap();
            assert_eq!([q0, k1, expert, "lm_head"].map(|path| selection.selects(path)), expected, "{config:?}");
        }
    }

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
