//! Tests that a run knows its data: a resumed run has the same, or says what has changed; a complete run can be longer.

use crate::{
    run::{lasting, rows, train},
    work::WorkDir,
};
use serde_json::{Value, json};
use std::fs;

/// Runs four steps with a checkpoint after the second one, and takes the result away, as if the run had been killed.
fn killed(work: &WorkDir, folder: &str) {
    work.succeed(&train(folder, &["train.max_steps=4", "train.save_every=2"]));
    fs::remove_file(work.at(folder).join("summary.json")).unwrap();
}

#[test]
fn a_run_with_other_data_is_not_resumed_unless_that_is_asked_for() {
    let work = WorkDir::new();
    killed(&work, "run");
    let (inputs, state) = (work.json("run/inputs.json"), work.json_of_latest_checkpoint("run"));
    assert_eq!(state["inputs"], inputs);
    assert_eq!((&inputs["train"]["rows"], &inputs["valid"]["rows"]), (&json!(6), &json!(3)));
    let resume = ["--resume", "train.max_steps=8", "train.save_every=2"];
    let metrics = work.text("run/metrics.jsonl");
    let (train_rows, valid_rows) = (work.text("train.jsonl"), work.text("valid.jsonl"));
    let config = work.text("model/tokenizer_config.json");
    for (file, text, words) in [
        ("train.jsonl", train_rows.repeat(2), "the training rows were 6 (sha256 "),
        ("train.jsonl", train_rows.replace("What is 3?", "What is 4?"), "), now 6 (sha256 "),
        ("valid.jsonl", rows(6..8), "the validation rows were 3 (sha256 "),
        ("model/tokenizer_config.json", config.replace("assistant:", "assistant: "), "the chat template (sha256) was "),
    ] {
        let before = work.text(file);
        work.write(file, &text);
        let done = work.run(&train("run", &resume));
        let error = done.stderr.lines().last().unwrap();
        assert!(done.code == Some(2) && error.contains("run/checkpoint-2: expected the data of the run"), "{done:?}");
        assert!(error.contains(words) && error.contains("--allow-changed-data"), "{error}");
        work.write(file, &before);
    }
    assert_eq!(work.text("run/metrics.jsonl"), metrics, "a refused run is as it was");

    work.write("train.jsonl", &train_rows.repeat(2));
    assert_eq!(work.text("valid.jsonl"), valid_rows);
    let done = work.succeed(&train("run", &[&resume[..], &["--allow-changed-data"]].concat()));
    assert!(done.stderr.contains("note: the run goes on with other data: the training rows were 6"), "{done:?}");
    let noted: Vec<Value> =
        work.lines("run/metrics.jsonl").into_iter().filter(|line| line.get("note").is_some()).collect();
    assert!(noted.len() == 1 && noted[0]["step"] == 2, "{noted:?}");
    assert_eq!(work.json("run/inputs.json")["train"]["rows"], 12);
    assert_eq!(work.json_of_latest_checkpoint("run")["inputs"], work.json("run/inputs.json"));
}

#[test]
fn a_template_sees_the_clock_of_the_start_of_the_run() {
    let work = WorkDir::new();
    work.copy_of_model("clock");
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    work.template("clock", Some(&format!("{{{{ strftime_now('%H:%M:%S') }}}}{template}")));
    let sets = ["model.path=clock", "train.save_every=2", "train.max_steps=4"];
    work.succeed(&train("run", &sets));
    fs::remove_file(work.at("run/summary.json")).unwrap();
    let inputs = work.json("run/inputs.json");
    assert!(inputs["template_time"].as_str().is_some_and(|time| time.contains('T')), "{inputs}");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    work.succeed(&train("run", &[&sets[..], &["--resume"]].concat()));
    assert_eq!(work.json("run/inputs.json"), inputs);
}

#[test]
fn a_checkpoint_without_digests_is_resumed_with_a_note() {
    let work = WorkDir::new();
    killed(&work, "run");
    let mut state = work.json("run/checkpoint-2/state.json");
    state.as_object_mut().unwrap().remove("inputs").unwrap();
    work.write("run/checkpoint-2/state.json", &state.to_string());
    let done = work.succeed(&train("run", &["--resume", "train.max_steps=4", "train.save_every=2"]));
    assert!(done.stderr.contains("note: run/checkpoint-2 is of an earlier version"), "{done:?}");
    assert!(!work.text("run/metrics.jsonl").contains("note"));
}

#[test]
fn a_complete_run_goes_on_if_it_is_made_longer() {
    let work = WorkDir::new();
    // The learning rate of this schedule does not depend on the length of the run.
    let run = |folder: &str, more: &[&str]| {
        work.run(&train(folder, &[&["train.scheduler=constant", "train.save_every=2"], more].concat()))
    };
    assert_eq!(run("whole", &["train.max_steps=8"]).code, Some(0));
    assert_eq!(run("parts", &["train.max_steps=5"]).code, Some(0));
    for steps in ["train.max_steps=5", "train.max_steps=4"] {
        let done = run("parts", &[steps, "--resume"]);
        assert!(done.code == Some(2) && done.stderr.contains("a higher `train.max_steps`"), "{done:?}");
    }
    fs::rename(work.at("parts/summary.json"), work.at("summary.json")).unwrap();
    let done = run("parts", &["train.max_steps=3", "--resume"]);
    assert!(done.code == Some(2) && done.stderr.contains("has taken 4 steps, the recipe asks for 3"), "{done:?}");
    fs::rename(work.at("summary.json"), work.at("parts/summary.json")).unwrap();
    let done = run("parts", &["train.max_steps=8", "--resume"]);
    assert!(done.code == Some(0) && done.stderr.contains("resuming after step 4"), "{done:?}");
    assert_eq!(work.json("parts/summary.json")["steps"], 8);
    let steps = |folder: &str| -> Vec<Value> {
        lasting(&work, folder).into_iter().filter(|line| line.get("loss").is_some()).collect()
    };
    assert_eq!(steps("parts"), steps("whole"));
    let adapter = |folder: &str| fs::read(work.at(folder).join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("parts"), adapter("whole"));

    work.succeed(&train("bare", &["train.max_steps=2"]));
    let done = work.run(&train("bare", &["train.max_steps=4", "--resume"]));
    assert!(done.code == Some(2) && done.stderr.contains("no checkpoint to go on from"), "{done:?}");
    assert!(work.at("bare/summary.json").exists());
}

/// The default of `train.warmup` was 0.03, and `constant` warmed up. A run that began so goes on so.
#[test]
fn a_schedule_without_warmup_has_none_and_a_run_keeps_its_own() {
    let work = WorkDir::new();
    work.write("run.toml", &work.text("run.toml").replace("warmup = 0\n", ""));
    let first = |folder: &str, sets: &[&str]| {
        let done = work.succeed(&train(folder, &[&["train.max_steps=4"], sets].concat()));
        let line = work.lines(&format!("{folder}/metrics.jsonl")).into_iter().find(|line| line["step"] == 1);
        (line.unwrap()["learning_rate"].as_f64().unwrap(), done.stderr)
    };
    assert_eq!(first("constant", &["train.scheduler=constant"]).0, 2e-2);
    assert_eq!(first("cosine", &[]).0, 2e-2);
    let (rate, stderr) = first("said", &["train.scheduler=constant", "train.warmup=2", "train.save_every=2"]);
    assert!(rate == 0.0 && stderr.contains("is read as \"constant_with_warmup\""), "{rate} {stderr}");
    assert!(work.text("said/recipe.toml").contains("scheduler = \"constant_with_warmup\""));
    // The recipe as an earlier version wrote it, resumed by a recipe that does not say.
    let earlier = work.text("said/recipe.toml").replace("constant_with_warmup", "constant");
    work.write("said/recipe.toml", &earlier);
    work.succeed(&train("said", &["train.scheduler=constant", "train.max_steps=6", "--resume"]));
    assert!(work.text("said/recipe.toml").contains("warmup = 2"));
}
