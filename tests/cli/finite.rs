//! Tests that numbers which are not finite reach the user with the tensor that they come from.

use crate::{
    model::{shapes, tensors},
    run::train,
    work::{CommandOutput, WorkDir},
};
use safetensors::tensor::TensorView;
use std::{fs, io::Write, process::Stdio};

/// Puts a NaN into a tensor of a file.
fn spoil(work: &WorkDir, file: &str, name: &str) {
    let mut all = tensors(&work.at(file));
    all.get_mut(name).unwrap_or_else(|| panic!("{name}")).2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let views =
        all.iter().map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(work.at(file), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Asserts that a command fails with one line of error that contains all the words, and prints nothing else.
fn named(work: &WorkDir, arguments: &[&str], words: &[&str]) {
    let done = work.run(arguments);
    let error = done.stderr.lines().last().unwrap_or_default();
    assert!(done.code == Some(2) && done.stdout.is_empty(), "{arguments:?}: {done:?}");
    assert!(error.starts_with("error: ") && words.iter().all(|word| error.contains(word)), "{arguments:?}: {done:?}");
}

#[test]
fn a_spoiled_model_or_adapter_is_named_by_every_verb() {
    let work = WorkDir::new();
    work.copy_of_model("spoiled");
    let weight = "model.layers.1.mlp.up_proj.weight";
    assert!(shapes(376, 16).iter().any(|(name, _)| name == weight));
    spoil(&work, "spoiled/model.safetensors", weight);
    work.succeed(&train("run", &["train.max_steps=1"]));
    let adapter = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    spoil(&work, "run/adapter/adapter_model.safetensors", adapter);
    work.write("pubmedqa.json", &crate::data::pubmedqa());
    let found = "adapter `run`: model.layers.0.self_attn.q_proj.lora_b";
    for (model, tensor) in
        [(&["--model", "spoiled"][..], weight), (&["--model", "model", "--adapter", "run/adapter"], found)]
    {
        for verb in [
            &["chat", "--prompt", "hi", "--max-new-tokens", "5"][..],
            &["eval", "--task", "qa-loss", "--data", "valid.jsonl"],
            &["eval", "--task", "pubmedqa", "--data", "pubmedqa.json"],
            &["logits", "--text", "hi", "--out", "l"],
            &["logits", "--text", "hi", "--out", "l", "--by-steps"],
        ] {
            named(&work, &[verb, model].concat(), &["expected finite numbers", tensor]);
        }
    }
    assert!(!work.at("l").exists());
    // With and without validation rows; the learning rate is not to blame.
    let valid = work.text("run.toml");
    work.write("bare.toml", &valid.replace("valid = 'valid.jsonl'\n", ""));
    for (recipe, folder) in [("run.toml", "out"), ("bare.toml", "other")] {
        named(
            &work,
            &["train", recipe, "--set", "model.path=spoiled", "--dir", folder],
            &["expected finite numbers", weight],
        );
    }
}

#[test]
fn a_text_beyond_the_models_positions_is_refused_and_such_rows_are_counted() {
    let work = WorkDir::new();
    let long = "word ".repeat(300);
    let ask = ["chat", "--model", "model", "--max-new-tokens", "5", "--prompt", &long];
    named(&work, &ask, &["at most 256 positions", "found "]);
    // In a conversation the question is dropped, and the next one is answered.
    let mut command = work.command(&["chat", "--model", "model", "--max-new-tokens", "5"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("{long}\nWhat is 7?\n").as_bytes()).unwrap();
    let done: CommandOutput = child.wait_with_output().unwrap().into();
    assert!(done.code == Some(0) && done.stdout.lines().count() == 1, "{done:?}");
    assert!(done.stderr.contains("at most 256 positions") && done.stderr.contains("/new"), "{done:?}");
    // The same model with scaled positions has no such limit.
    work.copy_of_model("scaled");
    let mut config = work.json("scaled/config.json");
    config["rope_scaling"] = serde_json::json!({ "type": "linear", "factor": 8.0 });
    work.write("scaled/config.json", &config.to_string());
    work.succeed(&["chat", "--model", "scaled", "--max-new-tokens", "5", "--prompt", &long]);

    let row = serde_json::json!({ "question": long, "answer": "yes" }).to_string() + "\n";
    work.write("long.jsonl", &(work.text("train.jsonl") + &row + &row));
    let (longest, counted) = ("data.max_length=2000", "2 examples are longer than the 256 positions");
    let done = work.succeed(&train("run", &["data.train=long.jsonl", "train.max_steps=1", longest]));
    assert!(done.stderr.contains(&format!("warning: long.jsonl: {counted}")), "{done:?}");
    let done = work.succeed(&["data", "check", "long.jsonl", "--model", "model", "--max-length", "2000"]);
    assert!(done.stdout.contains(counted), "{done:?}");
    let done = work.succeed(&["data", "check", "long.jsonl", "--model", "scaled", "--max-length", "2000"]);
    assert!(!done.stdout.contains("longer than"), "{done:?}");
}

#[test]
fn a_result_that_is_not_finite_is_not_saved() {
    let work = WorkDir::new();
    let sets = ["train.learning_rate=1e39", "train.max_steps=1", "train.max_grad_norm=0"];
    named(&work, &train("out", &sets), &["holds NaN or infinity after the last step", "`train.learning_rate`"]);
    assert!(!work.at("out/adapter").exists() && !work.at("out/summary.json").exists());
}
