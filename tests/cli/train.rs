//! Tests of LoRA, full fine-tuning and frozen layers, from recipe to chat.

use crate::{
    model::{gguf, shapes, tensors},
    run::{lasting, number, refused_in, resolved, rows, run_folder, train, train_by, usable},
    work::{TEMPLATE, WorkDir},
};
use serde_json::json;
use std::fs;

/// Returns the number of values in the model's parameters whose names are chosen.
fn parameters(chosen: impl Fn(&str) -> bool) -> usize {
    let all = shapes(376, 16).into_iter().filter(|(name, _)| chosen(name));
    all.map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

#[test]
fn lora_from_a_recipe_to_chat() {
    let work = WorkDir::new();
    let sets = ["train.save_every=3", "train.max_steps=10", "method.dropout=0.05", "train.eval_every=4"];
    let done = work.succeed(&train("out", &sets));
    let trained = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"];
    let summary = run_folder(&work, "out", 10, &trained);
    assert_eq!(done.json(), summary);
    assert!(!work.at("out/model").exists());
    // Two checkpoints are kept, and the end of the run adds none.
    assert!(!work.at("out/checkpoint-3").exists() && work.at("out/checkpoint-9/adapter/adapter_config.json").is_file());
    assert!(work.at("out/checkpoint-6").is_dir() && !work.at("out/checkpoint-10").exists());
    assert_eq!(work.text("out/metrics.jsonl").matches("valid_loss").count(), 4);
    let resolved = work.text("out/recipe.toml");
    for line in ["max_steps = 10", "dropout = 0.05", "seed = 42", "epsilon = "] {
        assert!(resolved.contains(line), "{resolved}");
    }
    usable(&work, &["--model", "model", "--adapter", "out/adapter"], number(&summary, "valid_loss_after"));

    // The resolved recipe reproduces the same adapter bit for bit.
    work.succeed(&train_by("out/recipe.toml", "again", &[]));
    let weights = |folder: &str| tensors(&work.at(folder).join("adapter/adapter_model.safetensors"));
    assert_eq!(weights("again"), weights("out"));
    // Training can continue from an existing adapter.
    let sets = ["method.init=out/adapter", "train.max_steps=2", "train.learning_rate=1e-4"];
    let further = work.succeed(&train("further", &sets)).json();
    let gap = number(&further, "valid_loss_before") - number(&summary, "valid_loss_after");
    assert!(gap.abs() < 1e-4, "{gap}");
}

#[test]
fn full_fine_tuning_from_a_recipe_to_chat() {
    let work = WorkDir::new();
    work.succeed(&train("runs/full", &["method.kind=full", "train.gradient_accumulation=2"]));
    let trained = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let summary =
        run_folder(&work, "runs/full", 12, &trained.map(|name| format!("model/{name}")).each_ref().map(String::as_str));
    assert_eq!(summary["trainable_parameters"], parameters(|_| true));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(work.text(&format!("runs/full/model/{name}")), work.text(&format!("model/{name}")));
    }
    usable(&work, &["--model", "runs/full/model"], number(&summary, "valid_loss_after"));
}

#[test]
fn full_fine_tuning_of_a_gguf_file_gives_a_directory_with_its_tokenizer() {
    let work = WorkDir::new();
    fs::write(work.at("small.gguf"), gguf()).unwrap();
    work.succeed(&train("out", &["method.kind=full", "model.path=small.gguf"]));
    let trained =
        ["model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/generation_config.json"];
    let summary = run_folder(&work, "out", 12, &trained);
    assert_eq!(work.json("out/model/tokenizer_config.json")["chat_template"], TEMPLATE);
    let after = number(&summary, "valid_loss_after");
    usable(&work, &["--model", "out/model"], after);
    // A directory without a tokenizer can be used with another one.
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(work.at("out/model").join(name)).unwrap();
    }
    usable(&work, &["--model", "out/model", "--tokenizer", "small.gguf"], after);
}

#[test]
fn without_dir_a_run_goes_to_the_recipe_s_name() {
    let work = WorkDir::new();
    let arguments = ["train", "run.toml", "--set", "train.max_steps=1", "--set", "data.valid_limit=1"];
    let summary = work.succeed(&arguments).json();
    assert_eq!(work.json("runs/run/summary.json"), summary);
    assert!(work.at("runs/run/adapter/adapter_model.safetensors").is_file());
}

#[test]
fn a_run_without_a_recipe_writes_the_recipe_that_it_ran() {
    let work = WorkDir::new();
    let parts = ["--model", "model", "--data", "train.jsonl", "--valid", "valid.jsonl", "--method", "dora"];
    let sets = "train.batch_size=2 train.max_steps=12 train.learning_rate=2e-2 train.warmup=0 method.r=4";
    let sets: Vec<&str> = sets.split(' ').flat_map(|set| ["--set", set]).collect();
    let summary = work.succeed(&[&["train"], &parts[..], &sets].concat()).json();
    assert_eq!(run_folder(&work, "runs/train-dora", 12, &["adapter/adapter_config.json"]), summary);
    assert_eq!(resolved(&work, "runs/train-dora")["method"]["kind"].as_str(), Some("dora"));
    // The recipe that it wrote gives the same run, and so does a file with the same keys.
    work.succeed(&train_by("runs/train-dora/recipe.toml", "again", &[]));
    work.succeed(&train_by("bare.toml", "file", &["method.kind=dora", "method.r=4"]));
    for folder in ["again", "file"] {
        assert_eq!(resolved(&work, folder), resolved(&work, "runs/train-dora"), "{folder}");
        assert_eq!(lasting(&work, folder), lasting(&work, "runs/train-dora"), "{folder}");
    }
    // The method is LoRA unless another one is named.
    work.succeed(&["train", "--model", "model", "--data", "train.jsonl", "--set", "train.max_steps=1"]);
    assert_eq!(resolved(&work, "runs/train-lora")["method"]["kind"].as_str(), Some("lora"));
}

#[test]
fn a_recipe_and_the_options_that_make_one_exclude_each_other_and_one_is_needed() {
    let work = WorkDir::new();
    let both = ["train", "run.toml", "--model", "model", "--method", "full", "--dir", "out"];
    refused_in(
        &work,
        &both,
        &["run.toml and --model, --method", "found both", "--set model.path=model --set method.kind=full"],
    );
    let needed = "expected a recipe file, or --model MODEL and --data FILE";
    refused_in(&work, &["train", "--dir", "out"], &[needed, "found neither"]);
    refused_in(&work, &["train", "--model", "model", "--dir", "out"], &[needed, "found --model"]);
    refused_in(&work, &["train", "--data", "train.jsonl", "--method", "full"], &[needed, "found --data, --method"]);
    let empty = ["train", "--model", "", "--data", "train.jsonl", "--dir", "out"];
    refused_in(&work, &empty, &["command line: `model.path`: expected a model"]);
}

#[test]
fn freeze_trains_the_last_blocks_and_leaves_the_rest_as_it_was() {
    let work = WorkDir::new();
    let freeze = |folder: &str, layers: &str| {
        let layers = format!("method.layers={layers}");
        work.succeed(&train(folder, &["method.kind=freeze", &layers]));
        let trained = ["model/config.json", "model/model.safetensors", "model/tokenizer.json"];
        (run_folder(&work, folder, 12, &trained), tensors(&work.at(folder).join("model/model.safetensors")))
    };
    let before = tensors(&work.at("model/model.safetensors"));
    for (folder, layers, learned) in [
        ("last", "1", &["model.layers.1."][..]),
        ("first", "-1", &["model.layers.0."]),
        ("more", "{ count = 1, extra_modules = ['norm', 'lm_head'] }", &["model.layers.1.", "model.norm.", "lm_head."]),
    ] {
        let (summary, after) = freeze(folder, layers);
        assert!(before.keys().eq(after.keys()));
        let learns = |name: &str| learned.iter().any(|start| name.starts_with(start));
        for (name, tensor) in &after {
            assert_eq!(before[name] != *tensor, learns(name), "{folder}: {name}");
        }
        assert_eq!(summary["trainable_parameters"], parameters(learns), "{folder}");
        let path = format!("{folder}/model");
        usable(&work, &["--model", &path], number(&summary, "valid_loss_after"));
    }
    let resolved = work.text("last/recipe.toml");
    assert!(resolved.contains("kind = \"freeze\"") && resolved.contains("layers = 1"), "{resolved}");
}

#[test]
fn a_run_that_no_longer_improves_ends_early() {
    let work = WorkDir::new();
    let sets = ["train.eval_every=2", "train.early_stopping=2", "train.learning_rate=50", "train.max_steps=40"];
    work.succeed(&train("run", &sets));
    let losses = work.lines("run/metrics.jsonl");
    let losses: Vec<f64> = losses.iter().skip(1).filter_map(|line| line["valid_loss"].as_f64()).collect();
    let steps = work.json("run/summary.json")["steps"].as_u64().unwrap() as usize;
    // The expected end by the rule of early stopping: the first evaluation at which the best loss is two evaluations
    // old.
    let best = |end: usize| (0..end).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
    let expected = (1..=losses.len()).find(|&n| n - 1 - best(n) >= 2).unwrap();
    assert_eq!(steps, 2 * expected, "{losses:?}");
    assert!(steps < 40);
}

#[test]
fn steps_that_overflow_in_f16_are_skipped_and_the_loss_is_scaled_down() {
    let work = WorkDir::new();
    work.succeed(&train("f32", &[]));
    for (power, folder) in [(8, "fine"), (26, "overflow")] {
        let file = json!({"train_batch_size": "auto",
            "fp16": {"enabled": true, "initial_scale_power": power, "hysteresis": 1}});
        work.write("ds.json", &file.to_string());
        work.succeed(&train(folder, &["--deepspeed", "ds.json"]));
        let recipe = resolved(&work, folder);
        assert_eq!(
            (recipe["model"]["compute"].as_str(), recipe["model"]["dtype"].as_str()),
            (Some("f16"), Some("f16"))
        );
    }
    let numbers = |folder: &str, key: &str| -> Vec<f64> {
        lasting(&work, folder).iter().filter(|line| line["tokens"].is_number()).map(|line| number(line, key)).collect()
    };
    let (expected, found) = (numbers("f32", "loss"), numbers("fine", "loss"));
    for (expected, found) in expected.iter().zip(&found) {
        assert!((expected - found).abs() < 5e-3 * expected, "{expected} in f32, {found} in f16");
    }
    assert_eq!(numbers("fine", "loss_scale"), [256.0; 12]);
    let lines = lasting(&work, "overflow");
    let skipped: Vec<bool> = lines.iter().filter_map(|line| line["skipped"].as_bool()).collect();
    let first = skipped.iter().position(|&skipped| !skipped).expect("the scale comes down in twelve steps");
    assert!(first > 0 && skipped[first..].iter().all(|&skipped| !skipped), "{skipped:?}");
    let scales: Vec<f64> = (0..12).map(|step| 2f64.powi(26 - step.min(first) as i32)).collect();
    assert_eq!(numbers("overflow", "loss_scale"), scales);
    refused_in(
        &work,
        &train("no", &["model.compute=f16", "train.fp16={hysteresis = 0}"]),
        &["train.fp16", "hysteresis", "1 or above"],
    );
}

#[test]
fn a_share_of_the_training_rows_is_validated_and_never_trained() {
    let work = WorkDir::new();
    work.write("all.jsonl", &(rows(0..60) + &rows(0..20)));
    let sets = ["data.train=all.jsonl", "data.valid=0.2", "train.max_steps=1"];
    let done = work.succeed(&train("out", &sets));
    let line = done.stderr.lines().find(|line| line.starts_with("validation: ")).unwrap_or_else(|| panic!("{done:?}"));
    let valid: usize = line["validation: ".len()..].split(' ').next().unwrap().parse().unwrap();
    assert!(line.contains("of 80 rows, a share of 0.2") && (4..32).contains(&valid), "{line}");
    let inputs = work.json("out/inputs.json");
    assert_eq!((&inputs["valid"]["rows"], &inputs["train"]["rows"]), (&json!(valid), &json!(80 - valid)));
    // The same rows again behind the others change neither part by another row.
    work.write("more.jsonl", &(rows(0..60) + &rows(0..20) + &rows(0..60)));
    work.succeed(&train("more", &["data.train=more.jsonl", "data.valid=0.2", "train.max_steps=1"]));
    let more = work.json("more/inputs.json");
    let of = |inputs: &serde_json::Value, part: &str| inputs[part]["rows"].as_u64().unwrap();
    assert_eq!(of(&more, "valid") + of(&more, "train"), 140);
    assert!(of(&more, "valid") > of(&inputs, "valid") && of(&more, "train") > of(&inputs, "train"));
    let refused = &["`data.valid`", "at most 0.5", "found 0.7"];
    refused_in(&WorkDir::new(), &train("out", &["data.valid=0.7"]), refused);
}

#[test]
fn the_best_weights_are_kept_over_a_resume() {
    let work = WorkDir::new();
    // The validation rows say something else, so that training soon harms.
    work.write("valid.jsonl", &rows(6..9).replace("It is a number.", "ZQ XJ! 0951 %$"));
    let sets = ["train.keep_best=valid_loss", "train.eval_every=2", "train.save_every=3", "train.keep=9"];
    let whole = work.succeed(&train("whole", &sets)).json();
    let best = &whole["best"];
    let evaluations: Vec<_> =
        work.lines("whole/metrics.jsonl").into_iter().filter(|line| line.get("valid_loss").is_some()).collect();
    let after = evaluations.iter().filter(|line| line["step"].as_u64() > Some(0));
    let lowest =
        after.min_by(|a, b| a["valid_loss"].as_f64().unwrap().total_cmp(&b["valid_loss"].as_f64().unwrap())).unwrap();
    assert_eq!((&best["step"], &best["valid_loss"]), (&lowest["step"], &lowest["valid_loss"]));
    assert_ne!(best["step"], 12, "the last step must not be the best: {evaluations:?}");
    let eval =
        ["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--batch-size", "2", "--model", "model", "--adapter"];
    let loss = work.succeed(&[&eval[..], &["whole"]].concat()).json();
    assert!((number(&loss, "loss") - number(best, "valid_loss")).abs() < 1e-4, "{loss} {best}");
    // Without checkpoints nothing but the result stays; a killed run goes on from a checkpoint and ends the same.
    let plain = work.succeed(&train("plain", &sets[..2])).json();
    assert_eq!(plain["best"], *best);
    assert!(work.listing().keys().all(|path| !path.display().to_string().contains("plain/best-")));
    std::fs::remove_file(work.at("whole/summary.json")).unwrap();
    for step in [6, 9] {
        std::fs::remove_dir_all(work.at(&format!("whole/checkpoint-{step}"))).unwrap();
    }
    let resumed = work.succeed(&train("whole", &[&sets[..], &["--resume"]].concat())).json();
    assert_eq!(resumed["best"], *best);
    let loss = work.succeed(&[&eval[..], &["whole"]].concat()).json();
    assert!((number(&loss, "loss") - number(best, "valid_loss")).abs() < 1e-4, "{loss} {best}");
}
