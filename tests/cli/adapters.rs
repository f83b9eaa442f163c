//! Tests of several adapters of one model: compared, switched, combined, merged, converted.

use crate::{
    model::{apart, floats, tensors},
    run::{number, train_by},
    work::{WorkDir, fixture},
};
use serde_json::json;
use std::{path::Path, process::Stdio};

/// Returns a folder with several adapters of different kinds, each from its own run.
fn with_adapters() -> WorkDir {
    let work = WorkDir::new();
    let runs: [(&str, &[&str]); 4] = [
        ("one", &["method.r=4", "train.seed=1"]),
        ("two", &["method.r=2", "method.target_modules=['q_proj', 'o_proj']", "train.seed=2"]),
        ("three", &["method.kind=p-tuning-v2", "method.num_virtual_tokens=3", "train.learning_rate=1e-1"]),
        ("four", &["method.kind=ia3", "train.learning_rate=1e-1"]),
    ];
    for (name, sets) in runs {
        let recipe = if name == "one" { "run.toml" } else { "bare.toml" };
        work.succeed(&train_by(recipe, &format!("runs/{name}"), sets));
    }
    work
}

#[test]
fn eval_compares_adapters_with_the_base_and_measures_forgetting() {
    let work = with_adapters();
    let eval = ["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--model", "model"];
    let run = |rest: &[&str]| work.succeed(&[&eval[..], rest].concat());
    let adapters =
        ["--adapter", "runs/one/adapter", "--adapter", "B=runs/two/adapter", "--adapter", "runs/three/adapter"];
    let done = run(&adapters);
    let (all, base) = (done.json(), run(&[]).json());
    assert_eq!(all["base"], base, "the base is the model without adapters");
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(lines.len(), 6, "{done:?}");
    for (line, name) in lines[1..5].iter().zip(["base", "one", "B", "three"]) {
        assert!(line.starts_with(name) && line.split_whitespace().count() == 4, "{line}");
    }
    for (name, folder) in [("one", "one"), ("B", "two"), ("three", "three")] {
        let alone = run(&["--adapter", &format!("runs/{folder}/adapter")]).json();
        assert_eq!(all["adapters"][name], alone, "{name}: the others beside it change nothing");
        let neutral = &alone["neutral_loss"];
        let (before, after) = (number(neutral, "base"), number(neutral, "adapter"));
        assert_eq!(before, number(&base["neutral_loss"], "base"));
        assert!((number(neutral, "rise") - (after - before)).abs() < 1e-9 && after != before, "{neutral}");
        assert!(number(neutral, "tokens") > 200.0, "{neutral}");
        assert!(number(&alone, "loss") < number(&base, "loss") - 0.1);
    }
}

#[test]
fn chat_switches_adapters_in_the_middle_of_a_conversation() {
    let work = with_adapters();
    let answer = |adapter: &[&str]| {
        let chat = ["chat", "--model", "model", "--prompt", "What is 7?", "--max-new-tokens", "12"];
        work.succeed(&[&chat[..], adapter].concat()).stdout
    };
    let single =
        [answer(&["--adapter", "runs/one/adapter"]), answer(&["--adapter", "runs/three/adapter"]), answer(&[])];
    let mut command = work.command(&["chat", "--model", "model", "--max-new-tokens", "12"]);
    command.args(["--adapter", "runs/one/adapter", "--adapter", "prefix=runs/three/adapter"]);
    // Even on a dumb terminal, only the answers may be printed.
    command.env("TERM", "dumb");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = "What is 7?\n/new\n/adapter prefix\nWhat is 7?\n/new\n/adapter nothing\n/adapter base\nWhat is 7?\n/adapter\n/quit\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}");
    assert!(said.contains(&single.concat()), "{said:?} against {single:?}");
    assert!(single[0] != single[2] && single[1] != single[2], "the adapters must matter");
    assert!(told.contains("adapters: base one [prefix]") && told.contains("adapters: [base] one prefix"), "{told}");
    assert!(told.contains("adapter `nothing` is not on the model, which has one, prefix"), "{told}");
}

#[test]
fn adapters_are_listed_combined_merged_and_converted() {
    let work = with_adapters();
    let listed = work.succeed(&["adapters", "list", "runs"]).stdout;
    for words in [
        ["runs/one/adapter", "LORA", "rank 4", "for model"],
        ["runs/three/adapter", "PREFIX_TUNING", "virtual tokens 3", " 96 "],
        ["runs/four/adapter", "IA3", "on k_proj v_proj down_proj", ""],
    ] {
        let line = listed.lines().find(|line| line.starts_with(words[0])).unwrap_or_else(|| panic!("{listed}"));
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
    let logits = |model: &[&str]| work.logits(model);
    let close = |a: &[f32], b: &[f32]| {
        let difference = apart(a, b);
        assert!(difference < 1e-4, "{difference}");
    };

    // An adapter that combines both, and a model with both merged.
    let parts = ["runs/one/adapter=1", "runs/two/adapter=1"];
    work.succeed(&[&["adapters", "combine", "--out", "sum"], &parts[..]].concat());
    let both = ["--adapter", "runs/one/adapter", "--adapter", "runs/two/adapter"];
    work.succeed(&[&["adapters", "merge", "--model", "model", "--out", "merged"], &both[..]].concat());
    let sum = logits(&["--model", "model", "--adapter", "sum"]);
    close(&sum, &logits(&["--model", "merged"]));
    assert_eq!(work.json("sum/adapter_config.json")["r"], 6);
    let rank = ["adapters", "combine", "--how", "svd", "--rank", "6", "--out", "svd"];
    work.succeed(&[&rank[..], &parts[..]].concat());
    close(&sum, &logits(&["--model", "model", "--adapter", "svd"]));
    let one = ["adapters", "combine", "--out", "negative", "runs/one/adapter=-1"];
    work.succeed(&one);
    work.succeed(&["adapters", "combine", "--out", "nothing", "negative=1", "runs/one/adapter=1"]);
    close(&logits(&["--model", "model", "--adapter", "nothing"]), &logits(&["--model", "model"]));

    // Conversion to llama.cpp's adapter file and back.
    work.succeed(&["adapters", "convert", "runs/one/adapter", "one.gguf", "--model", "model"]);
    work.succeed(&["adapters", "convert", "one.gguf", "back", "--model", "model"]);
    let weights = |folder: &str| tensors(&work.at(folder).join("adapter_model.safetensors"));
    assert_eq!(weights("back"), weights("runs/one/adapter"));
    close(
        &logits(&["--model", "model", "--adapter", "back"]),
        &logits(&["--model", "model", "--adapter", "runs/one/adapter"]),
    );

    // Conversion of a PiSSA adapter and its initial adapter to plain LoRA.
    let pissa = ["pissa", "pissa_initial", "pissa_converted"].map(|name| fixture(&format!("family/{name}")));
    let [trained, initial, converted] = pissa.each_ref().map(|path| path.to_str().unwrap());
    work.succeed(&["adapters", "convert", trained, "plain", "--initial", initial]);
    assert_eq!(work.json("plain/adapter_config.json")["init_lora_weights"], true);
    let theirs = tensors(&Path::new(converted).join("adapter_model.safetensors"));
    for (key, (kind, shape, bytes)) in weights("plain") {
        let (their_kind, their_shape, their_bytes) = &theirs[&key];
        assert_eq!((kind, &shape), (*their_kind, their_shape), "{key}");
        close(&floats(&bytes), &floats(their_bytes));
    }
    assert_eq!(weights("plain").len(), theirs.len());

    // Unknown fields of a newer PEFT version are reported by name.
    for name in ["runs/one/adapter", "runs/three/adapter", "runs/four/adapter"] {
        let file = format!("{name}/adapter_config.json");
        let mut config = work.json(&file);
        config["from_the_future"] = json!(1);
        work.write(&file, &config.to_string());
        let done = work.succeed(&["logits", "--model", "model", "--text", "a", "--out", "l", "--adapter", name]);
        let warning = format!("warning: {name}: unknown fields are ignored: from_the_future");
        assert!(done.stderr.lines().any(|line| line == warning), "{done:?}");
    }

    let table: &[(&[&str], &[&str])] = &[
        (&["adapters", "combine", "--out", "x", "runs/one/adapter"], &["expected DIR=WEIGHT", "0.7"]),
        (&["adapters", "combine", "--out", "sum", "runs/one/adapter=1"], &["sum", "expected a new folder"]),
        (
            &["adapters", "combine", "--how", "linear", "--out", "x", "runs/one/adapter=1", "runs/two/adapter=1"],
            &["same r value", "[4, 2]", "use cat or svd"],
        ),
        (&["adapters", "combine", "--rank", "3", "--out", "x", "sum=1"], &["--rank", "svd"]),
        (&["adapters", "combine", "--out", "x", "sum=1", "runs/three/adapter=1"], &["three/adapter", "LORA"]),
        (&["adapters", "merge", "--model", "model", "--out", "x"], &["--adapter", "at least one"]),
        (
            &["adapters", "merge", "--model", "model", "--out", "x", "--adapter", "runs/three/adapter"],
            &["virtual tokens"],
        ),
        (&["adapters", "convert", "runs/one/adapter", "x", "--model", "model"], &["x", ".gguf", "--initial"]),
        (&["adapters", "convert", "runs/four/adapter", "x.gguf", "--model", "model"], &["four/adapter", "LORA"]),
        (&["adapters", "convert", "one.gguf", "runs", "--model", "model"], &["runs", "expected a new folder"]),
        (
            &["adapters", "convert", "runs/one/adapter", "x", "--initial", "runs/one/adapter"],
            &["init_lora_weights", "pissa"],
        ),
        (
            &["chat", "--model", "model", "--adapter", "runs/one/adapter", "--adapter", "one=runs/two/adapter"],
            &["runs/two/adapter", "another one is called \"one\"", "--adapter NAME="],
        ),
        (
            &["logits", "--model", "model", "--text", "a", "--out", "l", "--adapter", "sum", "--adapter", "svd"],
            &["expected one here", "svd"],
        ),
    ];
    for (arguments, words) in table {
        let done = work.run(arguments);
        let error = done.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{done:?}"));
        assert_eq!(done.code, Some(2), "{arguments:?}");
        assert!(words.iter().all(|word| error.contains(word)), "{arguments:?}: {error}");
    }
    assert!(!work.at("x").exists() && !work.at("x.gguf").exists(), "what was refused leaves nothing");
}
