//! Combinations of adapters equal PEFT's, and are the sums that they should be.

use super::{base, crowded, directory, logits, sequence};
use burn::backend::Flex;
use burn_llama::Llama;
use burn_peft::{
    Linears, Loaded,
    adapter::{self, CombinationType, Weighted},
};
use laws::{files::same_files, fixture, floats, max_abs, max_diff};
use std::{collections::BTreeMap, path::PathBuf};

/// A fixture, the adapters that are combined in it with their weights, and the kind of combination.
type CombinationCase = (&'static str, &'static [Weighted<&'static str>], CombinationType);

pub const fn weighted(adapter: &str, weight: f64) -> Weighted<&str> {
    Weighted { adapter, weight }
}

const HOW: [CombinationCase; 5] = [
    ("linear", &[weighted("a", 0.7), weighted("b", -0.4)], CombinationType::Linear),
    ("one", &[weighted("b", -1.5)], CombinationType::Svd { rank: None }),
    ("cat", &[weighted("a", 0.7), weighted("b", -0.4), weighted("wide", 1.2)], CombinationType::Cat),
    ("svd", &[weighted("a", 0.7), weighted("b", -0.4), weighted("wide", 1.2)], CombinationType::Svd { rank: None }),
    (
        "svd_3",
        &[weighted("a", 0.7), weighted("b", -0.4), weighted("wide", 1.2)],
        CombinationType::Svd { rank: Some(3) },
    ),
];

/// Returns the scaled update `B·A` of every layer.
fn deltas(model: &Llama<Flex>, name: &str) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    model.linears(&mut |path, linear| {
        let delta = linear.adapter(name).map(|adapter| floats(&adapter.delta_weight().into_data()));
        found.extend(delta.map(|delta| (path.to_owned(), delta)));
    });
    found
}

#[test]
fn combinations_are_peft_s() {
    let kept = tempfile::tempdir().unwrap();
    for (name, parts, how) in HOW {
        let mut golden = base();
        let theirs = adapter::load(&mut golden, "made", &directory(name)).unwrap().value;
        let mut model = crowded();
        let config = adapter::combine(&mut model, "made", parts, how).unwrap();
        assert_eq!((config.r, config.scaling()), (theirs.r, 1.0), "{name}");
        assert_eq!(config.target_modules, theirs.target_modules, "{name}");
        assert!(!adapter::active(&model).contains(&"made".to_owned()), "{name}: not active yet");
        let out = kept.path().join(name);
        let paths: Vec<PathBuf> = parts.iter().map(|part| directory(part.adapter)).collect();
        let directories: Vec<_> = paths
            .iter()
            .zip(parts)
            .map(|(path, part)| Weighted { adapter: path.as_path(), weight: part.weight })
            .collect();
        adapter::combine_directories::<Flex>(&directories, how, &out, &Default::default()).unwrap();
        let mut reread = base();
        let Loaded { value: ours, unknown_fields } = adapter::load(&mut reread, "made", &out).unwrap();
        assert_eq!((ours.r, ours.target_modules, unknown_fields.len()), (theirs.r, theirs.target_modules, 0), "{name}");
        let expected = deltas(&golden, "made");
        for (found, by) in [(deltas(&model, "made"), "on the model"), (deltas(&reread, "made"), "from files")] {
            assert!(found.keys().eq(expected.keys()), "{name} {by}: {:?}", found.keys());
            for (path, expected) in &expected {
                let difference = max_diff(&found[path], expected);
                assert!(difference < 1e-5 * max_abs(expected).max(1.0), "{name} {by}, {path}: {difference:e}");
            }
        }
        // The values of a truncated SVD are not unique, so only those of other combinations are compared.
        let tolerance = if name.starts_with("svd") { f32::INFINITY } else { 1e-6 };
        same_files(&out, &directory(name), tolerance, name);
    }
}

#[test]
fn side_by_side_is_the_sum_of_the_outputs() {
    let (mut model, text) = (crowded(), sequence(3, 9));
    adapter::combine(&mut model, "sum", &[weighted("a", 1.0), weighted("b", 1.0)], CombinationType::Cat).unwrap();
    let run = |model: &mut Llama<Flex>, names: &[&str]| {
        adapter::activate(model, names).unwrap();
        logits(model, &text)
    };
    let (both, sum) = (run(&mut model, &["a", "b"]), run(&mut model, &["sum"]));
    assert!(max_diff(&both, &sum) < 1e-5, "{:e}", max_diff(&both, &sum));
    // Weights of 1 and -1 cancel out.
    adapter::combine(&mut model, "nothing", &[weighted("a", 1.0), weighted("a", -1.0)], CombinationType::Cat).unwrap();
    assert!(max_diff(&run(&mut model, &["nothing"]), &logits(&base(), &text)) < 1e-5);
}

#[test]
fn impossible_combinations_are_refused() {
    let mut model = crowded();
    let mut error =
        |parts: &[Weighted<&str>], how| adapter::combine(&mut model, "made", parts, how).unwrap_err().to_string();
    let ranks = error(&[weighted("a", 1.0), weighted("wide", 1.0)], CombinationType::Linear);
    assert!(ranks.contains("same r value") && ranks.contains("[4, 6]"), "{ranks}");
    assert!(error(&[weighted("a", f64::NAN)], CombinationType::Cat).contains("NaN"));
    assert!(error(&[], CombinationType::Cat).contains("at least one"));
    assert!(error(&[weighted("c", 1.0)], CombinationType::Cat).contains("`c` is not on the model"));
    for name in ["dora", "ia3", "prefix"] {
        assert!(
            error(&[weighted("a", 1.0), weighted(name, 1.0)], CombinationType::Cat).contains("cannot be combined"),
            "{name}"
        );
    }
    assert!(
        error(&[weighted("a", 1.0), weighted("b", 1.0)], CombinationType::Svd { rank: Some(0) }).contains("svd_rank")
    );
    assert!(!adapter::names(&model).contains(&"made".to_owned()));
    let out = tempfile::tempdir().unwrap();
    let (a, dora) = (directory("a"), fixture("family/dora"));
    let parts = [&a, &dora].map(|adapter| Weighted { adapter: adapter.as_path(), weight: 1.0 });
    let place = out.path().join("x");
    let error = adapter::combine_directories::<Flex>(&parts, CombinationType::Cat, &place, &Default::default());
    assert!(error.unwrap_err().to_string().contains("without DoRA") && !place.exists());
}
