//! The names of tensors, in the ways in which programs write them.

use std::collections::{BTreeMap, BTreeSet};

/// The start of every name in PEFT's files.
pub(crate) const PREFIX: &str = "base_model.model.";

/// The path segments that programs insert for the objects that they wrap around modules: `torch.compile`, FSDP and
/// activation checkpointing.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// The parts of an adapter after which a name may contain the adapter's name.
const PARTS: [&str; 8] = [
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "ia3_l",
    "trainable_tokens_delta",
];

/// Returns PEFT's name of an adapter's tensor: without the segments of wrappers and without the adapter's name, and
/// with the prefix `base_model.model.` exactly once. A name of a single segment is not changed.
pub(super) fn peft_name(name: &str) -> String {
    let mut segments: Vec<&str> = name.split('.').filter(|segment| !WRAPPERS.contains(segment)).collect();
    if segments.len() < 2 {
        return name.to_owned();
    }
    if segments[0] == "module" {
        segments.remove(0);
    }
    while segments.starts_with(&["base_model", "model"]) {
        segments.drain(..2);
    }
    if let Some(saved) = segments.iter().position(|segment| *segment == "modules_to_save") {
        let end = (saved + 2).min(segments.len().saturating_sub(1)).max(saved);
        segments.drain(saved..end);
    }
    if let Some(part) = segments.iter().rposition(|segment| PARTS.contains(segment)) {
        let end = &segments[part + 1..];
        let weight = end.last() == Some(&"weight") && segments[part] != "lora_magnitude_vector";
        segments.truncate(part + 1);
        segments.extend(weight.then_some("weight"));
    }
    PREFIX.to_owned() + &segments.join(".")
}

/// A difference at the start of names: `found` stands where `expected` should be. Either may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PrefixDifference {
    found: String,
    expected: String,
}

impl PrefixDifference {
    /// Returns the difference of `name` from the known name that has the longest end in common with it. At least two
    /// segments have to agree, and all numbers: another block is no other way to write a name.
    fn of(name: &str, known: &BTreeSet<String>) -> Option<Self> {
        let common = |other: &str| name.rsplit('.').zip(other.rsplit('.')).take_while(|(a, b)| a == b).count();
        let nearest = known.iter().max_by_key(|known| common(known)).filter(|known| common(known) >= 2)?;
        let end: usize = name.rsplit('.').take(common(nearest)).map(|segment| segment.len() + 1).sum::<usize>() - 1;
        let start = |name: &str| name[..name.len() - end].to_owned();
        let difference = Self { found: start(name), expected: start(nearest) };
        let is_number = |segment: &str| segment.parse::<usize>().is_ok();
        let numbers = [&difference.found, &difference.expected].into_iter().flat_map(|start| start.split('.'));
        if numbers.into_iter().any(is_number) { None } else { Some(difference) }
    }

    fn apply(&self, name: &str) -> Option<String> {
        Some(self.expected.clone() + name.strip_prefix(self.found.as_str())?)
    }
}

/// Returns the known names of those of the `found` names that differ from them only at their start, all in the same
/// way (`_orig_mod.` or `language_model.` before, `model.` missing). A name that is known, or does not differ in that
/// way, is not in the result.
pub fn align_names<'a>(
    found: impl Iterator<Item = &'a String> + Clone,
    known: &BTreeSet<String>,
) -> BTreeMap<String, String> {
    let unknown = found.clone().filter(|name| !known.contains(*name));
    let Some(difference) = unknown.clone().find_map(|name| PrefixDifference::of(name, known)) else {
        return BTreeMap::new();
    };
    let taken: BTreeSet<&String> = found.filter(|name| known.contains(*name)).collect();
    let renamed = unknown.filter_map(|name| Some((name.clone(), difference.apply(name)?)));
    renamed.filter(|(_, new)| known.contains(new) && !taken.contains(new)).collect()
}

/// Returns the differences between the missing and the unexpected names of an adapter in words.
pub(super) fn describe_differences(missing: &[String], unexpected: &[String]) -> Vec<String> {
    if let Some([found, expected]) = single_difference(missing, unexpected) {
        return vec![format!(
            "all {} names that differ have `{found}` where `{expected}` is expected: {}",
            unexpected.len(),
            examples(unexpected)
        )];
    }
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!("{} of the tensors it should have are missing: {}", missing.len(), examples(missing)));
    }
    if !unexpected.is_empty() {
        parts.push(format!("{} tensors belong to no selected layer: {}", unexpected.len(), examples(unexpected)));
    }
    parts
}

/// Returns the first three of a list, and dots if there are more.
pub(super) fn examples(list: &[String]) -> String {
    let shown: Vec<&str> = list.iter().take(3).map(|name| name.strip_prefix(PREFIX).unwrap_or(name)).collect();
    shown.join(", ") + if list.len() > 3 { ", …" } else { "" }
}

/// Returns what the unexpected names have in place of what the missing ones have, if that is the same for all.
fn single_difference(missing: &[String], unexpected: &[String]) -> Option<[String; 2]> {
    let pairs = missing.iter().zip(unexpected);
    let mut differences = pairs.map(|(expected, found)| {
        let (a, b): (Vec<&str>, Vec<&str>) = (found.split('.').collect(), expected.split('.').collect());
        let start = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        let (a, b) = (&a[start..], &b[start..]);
        let end = a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count();
        [a[..a.len() - end].join("."), b[..b.len() - end].join(".")]
    });
    let first = differences.next().filter(|_| missing.len() == unexpected.len())?;
    differences.all(|other| other == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_name_gives_peft_s() {
        let q = "base_model.model.model.layers.0.self_attn.q_proj";
        for (found, expected) in [
            ("model.layers.0.self_attn.q_proj.lora_A.weight", "lora_A.weight"),
            ("base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "lora_A.weight"),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "lora_A.weight"),
            ("_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_B.mine.weight", "lora_B.weight"),
            ("module.base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_B.weight", "lora_B.weight"),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_E.default", "lora_E"),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_E", "lora_E"),
            ("model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
            ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "lora_magnitude_vector"),
            ("model.layers.0.self_attn.q_proj.modules_to_save.default.weight", "weight"),
            ("model.layers.0.self_attn.q_proj.base_layer.weight", "base_layer.weight"),
        ] {
            assert_eq!(peft_name(found), format!("{q}.{expected}"), "{found}");
        }
        assert_eq!(peft_name("prompt_embeddings"), "prompt_embeddings");
    }

    #[test]
    fn names_that_differ_at_their_start_are_aligned() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let known = names(&["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]);
        for (prefix, found) in [
            ("_orig_mod.", ["_orig_mod.lm_head.weight", "_orig_mod.model.embed_tokens.weight"]),
            ("without model.", ["lm_head.weight", "embed_tokens.weight"]),
            ("language_model.", ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]),
        ] {
            let mut found = names(&found);
            let up = known.last().unwrap();
            found.insert(match prefix {
                "without model." => up["model.".len()..].to_owned(),
                prefix => format!("{prefix}{up}"),
            });
            let aligned = align_names(found.iter(), &known);
            let all: BTreeSet<String> = found.iter().map(|name| aligned.get(name).unwrap_or(name).to_owned()).collect();
            assert_eq!(all, known, "{prefix}");
        }
        for other in ["visual.up.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.w3.weight"] {
            assert!(align_names(names(&[other]).iter(), &known).is_empty(), "{other}");
        }
    }

    #[test]
    fn one_difference_is_named_once() {
        let list = |part: &str| (0..9).map(|i| format!("{PREFIX}model.layers.{i}.{part}.lora_A.weight")).collect();
        let (expected, found): (Vec<String>, Vec<String>) = (list("mlp.up_proj"), list("feed_forward.w3"));
        let words = describe_differences(&expected, &found).join("; ");
        let start = "all 9 names that differ have `feed_forward.w3` where `mlp.up_proj` is expected: model.layers.0.";
        assert!(words.starts_with(start) && words.ends_with(", …"), "{words}");
        let words = describe_differences(&expected[..1], &found).join("; ");
        assert!(words.starts_with("1 of the tensors") && words.contains("9 tensors belong to no"), "{words}");
    }
}
