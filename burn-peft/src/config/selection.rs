//! The selection of the linear layers that get an adapter.

use super::LoraConfig;
use crate::{
    Error, TargetModules,
    target::{Matcher, matches_suffix},
};

/// The fields of a [`LoraConfig`] that decide which layers get an adapter, compiled into a predicate.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
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
    pub(crate) fn new(config: &LoraConfig) -> Result<Self, Error> {
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
    pub(crate) fn selects(&self, path: &str) -> bool {
        let excluded = self.exclude.as_ref().is_some_and(|exclude| exclude.selects(path));
        let block = || match &self.layers_to_transform {
            None => true,
            Some(layers) => self.layer_index(path).is_some_and(|block| layers.contains(&block)),
        };
        self.target.selects(path) && !excluded && !self.is_saved_target(path) && block()
    }

    /// Returns true if the token embedding at `path` gets low-rank matrices; `all-linear` does not select it.
    pub(crate) fn selects_embedding(&self, path: &str) -> bool {
        !matches!(self.target, Matcher::AllLinear) && self.selects(path)
    }

    /// Returns the names of `modules_to_save` that match the module at `path` or one that contains it. As in PEFT, a
    /// name matches the end of a path, even inside a segment: `norm` is `input_layernorm` too.
    pub(crate) fn matching_modules_to_save<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a String> {
        self.modules_to_save.iter().filter(move |name| modules(path).any(|module| module.ends_with(name.as_str())))
    }

    /// Returns true if a module of `modules_to_save` keeps the layer at `path` from getting an adapter. Here PEFT
    /// compares whole segments.
    fn is_saved_target(&self, path: &str) -> bool {
        self.modules_to_save.iter().any(|name| modules(path).any(|module| matches_suffix(module, name)))
    }

    /// Returns true if the module at `path` is one of `modules_to_save` or inside one.
    pub(crate) fn in_modules_to_save(&self, path: &str) -> bool {
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

/// Returns the paths of the module at `path` and of those that contain it.
fn modules(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('.').map(|(at, _)| at).chain([path.len()]).map(|end| &path[..end])
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
}
