//! Tests that the files of an earlier version can be read: a run resumes from its checkpoint, its adapter can be
//! evaluated, and its checkpoint can be consolidated. tests/fixtures/make_before.py has written them.

use crate::{
    model::{apart, floats, tensors},
    run::{lasting, number},
    work::{CommandOutput, WorkDir, fixture},
};
use serde_json::Value;
use std::{fs, path::Path};

/// Sums are in another order on other CPUs.
const RELATIVE: f64 = 1e-4;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let copied = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &copied);
        } else {
            fs::copy(entry.path(), copied).unwrap();
        }
    }
}

/// Returns a folder with a copy of the fixture in `before/`.
fn earlier() -> WorkDir {
    let work = WorkDir::new();
    copy(&fixture("before"), &work.at("before"));
    work
}

/// Runs a command in `before/`, because the recipe's paths are relative.
fn succeed(work: &WorkDir, arguments: &[&str]) -> CommandOutput {
    let done: CommandOutput = work.command(arguments).current_dir(work.at("before")).output().unwrap().into();
    assert_eq!(done.code, Some(0), "{arguments:?}: {done:?}");
    done
}

/// Asserts that two lines of metrics have the same keys in the same order, and values that differ by rounding alone.
fn assert_alike(found: &Value, expected: &Value) {
    let fields = |line: &Value| line.as_object().unwrap().clone();
    assert!(fields(found).keys().eq(fields(expected).keys()), "{found} against {expected}");
    for key in fields(expected).keys() {
        let (found, expected) = (number(found, key), number(expected, key));
        let tolerance = if ["loss", "grad_norm", "valid_loss"].contains(&key.as_str()) { RELATIVE } else { 1e-12 };
        assert!((found - expected).abs() <= tolerance * expected.abs(), "{key}: {found} against {expected}");
    }
}

#[test]
fn a_run_of_an_earlier_version_goes_on_from_its_checkpoint() {
    let work = earlier();
    let (whole, text) = (lasting(&work, "before/run"), work.text("before/run/metrics.jsonl"));
    let weights = |work: &WorkDir| tensors(&work.at("before/run/adapter/adapter_model.safetensors"));
    let (summary, adapter) = (work.json("before/run/summary.json"), weights(&work));
    let kept = work.json("before/run/checkpoint-4/state.json")["metrics_bytes"].as_u64().unwrap() as usize;
    fs::remove_file(work.at("before/run/summary.json")).unwrap();
    fs::remove_dir_all(work.at("before/run/adapter")).unwrap();

    let done = succeed(&work, &["train", "recipe.toml", "--dir", "run", "--resume"]);
    assert!(done.stderr.contains("resuming after step 4"), "{done:?}");
    assert!(work.text("before/run/metrics.jsonl").starts_with(&text[..kept]));
    let resumed = lasting(&work, "before/run");
    assert_eq!(resumed.len(), whole.len());
    resumed.iter().zip(&whole).for_each(|(found, expected)| assert_alike(found, expected));
    let found = work.json("before/run/summary.json");
    assert!(found.as_object().unwrap().keys().eq(summary.as_object().unwrap().keys()), "{found}");
    for key in ["valid_loss_before", "valid_loss_after", "steps", "tokens", "trainable_parameters"] {
        let (found, expected) = (number(&found, key), number(&summary, key));
        assert!((found - expected).abs() <= RELATIVE * expected, "{key}: {found} against {expected}");
    }
    let resumed = weights(&work);
    assert!(resumed.keys().eq(adapter.keys()));
    for (name, (_, _, bytes)) in &adapter {
        let difference = apart(&floats(bytes), &floats(&resumed[name].2));
        assert!(difference < 1e-3, "{name}: {difference}");
    }
}

#[test]
fn an_adapter_of_an_earlier_version_is_evaluated_as_it_was() {
    let work = earlier();
    let model = ["eval", "--model", "model", "--adapter", "run/adapter"];
    let data = ["--task", "qa-loss", "--data", "valid.jsonl", "--batch-size", "2"];
    let (found, expected) = (succeed(&work, &[&model[..], &data].concat()).json(), work.json("before/eval.json"));
    assert!(found.as_object().unwrap().keys().eq(expected.as_object().unwrap().keys()), "{found}");
    assert_eq!((&found["rows"], &found["target_tokens"]), (&expected["rows"], &expected["target_tokens"]));
    let neutral = |result: &Value, key| number(&result["neutral_loss"], key);
    for (found, expected) in [
        (number(&found, "loss"), number(&expected, "loss")),
        (neutral(&found, "base"), neutral(&expected, "base")),
        (neutral(&found, "adapter"), neutral(&expected, "adapter")),
    ] {
        assert!((found - expected).abs() < RELATIVE * expected, "{found} against {expected}");
    }
}

#[test]
fn a_checkpoint_of_an_earlier_version_is_consolidated_to_the_adapter_in_it() {
    let work = earlier();
    succeed(&work, &["consolidate", "run", "--out", "merged"]);
    let adapter = |folder: &str| tensors(&work.at("before").join(folder).join("adapter_model.safetensors"));
    assert_eq!(adapter("merged"), adapter("run/checkpoint-4/adapter"));
}
