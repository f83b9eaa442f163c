//! Training runs in tests: their data, their arguments, and checks of the run directory.

use crate::{
    model::{floats, tensors},
    work::WorkDir,
};
use safetensors::Dtype;
use serde_json::{Value, json};

/// Returns the arguments of a run of `run.toml` into `folder`, with settings (`key=value`) and other arguments.
pub(crate) fn train<'a>(folder: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    train_by("run.toml", folder, more)
}

/// Like [`train`], with another recipe.
pub(crate) fn train_by<'a>(recipe: &'a str, folder: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", recipe, "--dir", folder];
    for argument in more {
        arguments.extend(argument.contains('=').then_some("--set"));
        arguments.push(argument);
    }
    arguments
}

/// Returns questions and answers that are similar, so that a small model learns something within a few steps.
pub(crate) fn rows(range: std::ops::Range<usize>) -> String {
    range
        .map(|i| json!({"question": format!("What is {i}?"), "answer": "It is a number."}).to_string() + "\n")
        .collect()
}

/// Returns conversations with two questions each, in OpenAI's format.
pub(crate) fn conversations(range: std::ops::Range<usize>) -> String {
    let row = |i: usize| {
        let say = |role: &str, content: &str| json!({"role": role, "content": content});
        let (first, then) = (format!("What is {i}?"), format!("And {}?", i + 1));
        let answer = say("assistant", "It is a number.");
        json!({"messages": [say("user", &first), answer.clone(), say("user", &then), answer]}).to_string() + "\n"
    };
    range.map(row).collect()
}

pub(crate) fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

/// Checks a run directory and returns its summary.
pub(crate) fn run_folder(work: &WorkDir, folder: &str, steps: usize, trained: &[&str]) -> Value {
    for name in ["recipe.toml", "metrics.jsonl", "summary.json"].iter().chain(trained) {
        assert!(work.at(folder).join(name).is_file(), "{folder}/{name}");
    }
    assert!(work.listing().keys().all(|path| path.extension().is_none_or(|end| end != "part")));
    let lines = work.lines(&format!("{folder}/metrics.jsonl"));
    let (evaluations, taken): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.get("valid_loss").is_some());
    assert_eq!(taken.len(), steps, "{lines:?}");
    assert!(evaluations.len() >= 2, "{lines:?}");
    for (index, line) in taken.iter().enumerate() {
        assert_eq!(line["step"], index + 1);
        for key in ["epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "tokens_per_second"] {
            assert!(number(line, key) > 0.0, "{key}: {line}");
        }
        assert!(number(line, "elapsed_seconds") >= 0.0 && number(line, "peak_rss_bytes") >= 0.0, "{line}");
    }
    let (first, last) = (number(taken[0], "loss"), number(taken[steps - 1], "loss"));
    assert!(last < first - 0.1, "the loss went from {first} to {last}");
    let summary = work.json(&format!("{folder}/summary.json"));
    let (before, after) = (number(&summary, "valid_loss_before"), number(&summary, "valid_loss_after"));
    assert!(after < before - 0.1, "the validation loss went from {before} to {after}");
    for key in ["steps", "seconds", "tokens", "tokens_per_second", "trainable_parameters"] {
        assert!(number(&summary, key) > 0.0, "{key}: {summary}");
    }
    summary
}

/// Checks evaluation, chat and logits with the result of a run.
pub(crate) fn usable(work: &WorkDir, model: &[&str], after: f64) {
    let with = |verb: &[&str]| work.succeed(&[verb, model].concat());
    let loss = with(&["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--batch-size", "2"]).json();
    assert!((number(&loss, "loss") - after).abs() < 1e-4, "{loss} against {after}");
    assert_eq!((&loss["task"], &loss["rows"]), (&json!("qa-loss"), &json!(3)));
    assert!(
        (number(&loss, "perplexity") - after.exp()).abs() < 1e-2 * after.exp() && number(&loss, "target_tokens") > 0.0
    );

    let chat = ["chat", "--prompt", "What is 4?", "--temperature", "0", "--max-new-tokens", "12"];
    let (first, again) = (with(&chat), with(&chat));
    assert_eq!(first.stdout, again.stdout);
    assert!(first.stdout.ends_with('\n') && first.stdout.trim() != "", "{first:?}");
    assert_eq!(first.stderr, "", "the answer stands alone");

    with(&["logits", "--text", "What is 4?", "--out", "logits.safetensors"]);
    let found = tensors(&work.at("logits.safetensors"));
    let (kind, shape, bytes) = &found["ids"];
    assert_eq!((found.len(), *kind, shape.len()), (2, Dtype::I64, 1));
    assert_eq!(bytes.len(), shape[0] * 8);
    let (kind, rows, bytes) = &found["logits"];
    assert_eq!((*kind, rows[0]), (Dtype::F32, shape[0]));
    assert!(floats(bytes).iter().all(|x| x.is_finite()) && rows[1] >= 373, "{rows:?}");
}

/// Reads `metrics.jsonl` without the values that differ between runs of the same steps.
pub(crate) fn lasting(work: &WorkDir, folder: &str) -> Vec<Value> {
    let lines = work.lines(&format!("{folder}/metrics.jsonl")).into_iter();
    let line = |mut line: Value| {
        for key in ["elapsed_seconds", "tokens_per_second", "peak_rss_bytes"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    lines.map(line).collect()
}

/// Reads the resolved recipe of a run.
pub(crate) fn resolved(work: &WorkDir, folder: &str) -> toml::Table {
    work.text(&format!("{folder}/recipe.toml")).parse().unwrap()
}

/// Asserts that a command fails with a one-line error that contains all the words, and creates no folder `out`.
pub(crate) fn refused_in(work: &WorkDir, arguments: &[&str], words: &[&str]) {
    let done = work.run(arguments);
    assert_eq!(done.code, Some(2), "{arguments:?}: {done:?}");
    let line = done.stderr.trim();
    assert!(line.starts_with("error: ") && !line.contains('\n'), "{arguments:?}: one line: {line}");
    assert!(words.iter().all(|word| line.contains(word)), "{arguments:?}: {line} has all of {words:?}");
    assert!(!work.at("out").exists(), "{arguments:?} leaves no folder");
}
