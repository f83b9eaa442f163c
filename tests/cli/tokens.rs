//! Tests of tokens that a recipe adds.

use crate::{
    model::{floats, tensors},
    run::train,
    work::WorkDir,
};
use serde_json::json;

#[test]
fn new_tokens_are_trained_and_saved_with_the_adapter_and_nothing_else_of_the_embedding() {
    let work = WorkDir::new();
    let row =
        |n: usize| json!({ "question": format!("What is <finding>{n}</finding>?"), "answer": format!("<finding>{n}") });
    work.write("train.jsonl", &(0..6).map(|n| format!("{}\n", row(n))).collect::<String>());
    let new = "method.new_tokens=['<finding>', '</finding>', '<c>', '<d>']";
    let sets = [new, "method.target_modules=['q_proj']", "train.max_steps=12", "train.learning_rate=2e-2"];
    work.succeed(&train("out", &sets));

    let config = work.json("out/adapter/adapter_config.json");
    assert_eq!(config["trainable_token_indices"], json!([373, 374, 375, 376]));
    let held = tensors(&work.at("out/adapter/adapter_model.safetensors"));
    let (_, shape, bytes) = &held["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"];
    assert_eq!((shape.as_slice(), held.len()), (&[4, 16][..], 1 + 2 * 2), "rows of the tokens, A and B of two layers");
    let (_, _, table) = &tensors(&work.at("model/model.safetensors"))["model.embed_tokens.weight"];
    let (rows, table) = (floats(bytes), floats(table));
    let mean: Vec<f32> = (0..16).map(|i| table[..373 * 16].iter().skip(i).step_by(16).sum::<f32>() / 373.0).collect();
    let from_mean = |row: usize| {
        let row = &rows[row * 16..(row + 1) * 16];
        row.iter().zip(&mean).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!(from_mean(0) > 1e-3 && from_mean(1) > 1e-3, "tokens of the rows are trained");
    assert!(from_mean(2) < 1e-5 && from_mean(3) < 1e-5, "other tokens start from the mean and stay there");

    let ids = |more: &[&str]| {
        let text = ["logits", "--model", "model", "--text", "a <finding>7</finding>", "--out", "l"];
        work.succeed(&[&text[..], more].concat());
        let (_, shape, bytes) = &tensors(&work.at("l"))["ids"];
        assert_eq!(bytes.len(), 8 * shape[0]);
        bytes.chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap())).collect::<Vec<_>>()
    };
    let known = |ids: Vec<i64>| ids.into_iter().filter(|&id| id >= 373).collect::<Vec<_>>();
    assert_eq!(known(ids(&["--adapter", "out/adapter"])), [373, 374], "the adapter's tokenizer is read");
    assert_eq!(known(ids(&[])), [0; 0]);

    // The merged model has the rows and the tokenizer, and gives the same logits.
    work.succeed(&["export", "--model", "model", "--adapter", "out/adapter", "--out", "merged"]);
    assert_eq!(work.json("merged/config.json")["vocab_size"], 377);
    let logits = |model: &[&str]| {
        work.succeed(&[&["logits", "--text", "<finding>", "--out", "l"][..], model].concat());
        floats(&tensors(&work.at("l"))["logits"].2)
    };
    let (merged, beside) = (logits(&["--model", "merged"]), logits(&["--model", "model", "--adapter", "out/adapter"]));
    assert!(merged.len() == beside.len() && merged.iter().zip(&beside).all(|(a, b)| (a - b).abs() < 1e-4));

    // Without its tokenizer the model still grows, and the user is told.
    std::fs::remove_file(work.at("out/adapter/tokenizer.json")).unwrap();
    let text = ["logits", "--model", "model", "--adapter", "out/adapter", "--text", "a", "--out", "l"];
    let done = work.succeed(&text);
    assert!(done.stderr.contains("377 rows, the model has 376") && done.stderr.contains("--tokenizer"), "{done:?}");

    for (sets, words) in [
        (&["method.new_tokens=['The']"][..], "found \"The\", which it has already"),
        (&["method.new_tokens=['<a>', '<a>']"], "`method.new_tokens`: expected different tokens"),
        (&["method.new_tokens=['<a>']", "method.kind=ia3"], "`method.kind` to be lora, qlora or dora"),
        (&["method.init=out/adapter"], "name the tokens that were added for it"),
    ] {
        let done = work.run(&train("refused", sets));
        assert!(done.code == Some(2) && done.stderr.contains(words), "{words}: {done:?}");
    }
}
