//! Tests of `quickstart`.

use crate::{
    run::{number, train_by},
    work::WorkDir,
};

/// Runs without a network: the model `tiny` is created and trained, and everything named in the final output exists and
/// works.
#[test]
fn quickstart_makes_a_model_teaches_it_and_says_what_to_do_next() {
    let work = WorkDir(tempfile::tempdir().unwrap());
    let done = work.succeed(&["quickstart", "--model", "tiny", "--dir", "my runs/q", "--steps", "16"]);
    for part in [
        "in all, besides the program itself",
        "no source of medical facts",
        "before                                           | after",
        "format kept (medical)               0 of 8",
        "refusals (not medical)              0 of 4",
        "validation loss",
        "trained 16 steps",
        "tokens/s",
        "memory at its peak",
        "chat --model 'my runs/q/tiny' --adapter 'my runs/q/adapter'",
        "train 'my runs/q/recipe.toml' --set data.train=mine.jsonl",
        "PeftModel.from_pretrained(model, \"my runs/q/adapter\")",
    ] {
        assert!(done.stdout.contains(part), "{part}: {done:?}");
    }
    assert_eq!(done.stdout.matches("\nQ: ").count(), 3, "{done:?}");
    for name in ["recipe.toml", "metrics.jsonl", "summary.json", "adapter/adapter_config.json", "tiny/config.json"] {
        assert!(work.at("my runs/q").join(name).is_file(), "{name}");
    }
    let summary = work.json("my runs/q/summary.json");
    assert!(number(&summary, "valid_loss_after") < number(&summary, "valid_loss_before"), "{summary}");
    let model = ["--model", "my runs/q/tiny", "--adapter", "my runs/q/adapter"];
    let eval = [&["eval", "--task", "qa-loss", "--data", "my runs/q/data/valid.jsonl"], &model[..]].concat();
    let loss = work.succeed(&eval).json();
    assert!((number(&loss, "loss") - number(&summary, "valid_loss_after")).abs() < 1e-4, "{loss}, {summary}");
    work.succeed(&[&["chat", "--prompt", "Why do I cough?", "--max-new-tokens", "4"], &model[..]].concat());

    // The run directory is an ordinary one: its recipe reproduces the run.
    work.succeed(&train_by("my runs/q/recipe.toml", "again", &[]));
    assert_eq!(work.json("again/summary.json")["valid_loss_after"], summary["valid_loss_after"]);
    let before = work.listing();
    for (arguments, words) in [
        (["quickstart", "--model", "tiny", "--dir", "my runs/q"], ["my runs/q", "--dir"]),
        (["quickstart", "--model", "nothing", "--dir", "other"], ["nothing", "no such model"]),
        (["quickstart", "--model", "tiny", "--steps", "0"], ["--steps", "'0'"]),
    ] {
        let done = work.run(&arguments);
        assert!(done.code == Some(2) && words.iter().all(|word| done.stderr.contains(word)), "{done:?}");
    }
    assert_eq!(work.listing(), before, "a refused command wrote something");
}
