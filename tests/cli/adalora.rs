//! Tests of training with AdaLoRA.

use crate::{
    run::{lasting, number, refused_in, run_folder, train_by, usable},
    work::WorkDir,
};
use std::fs;

/// Settings of twelve steps, of which the fourth, the sixth, the eighth and the ninth allocate ranks.
const SETS: [&str; 10] = [
    "method.kind=adalora",
    "method.target_modules=all-linear",
    "method.init_r=4",
    "method.target_r=2",
    "method.tinit=2",
    "method.tfinal=3",
    "method.deltaT=2",
    "method.orth_reg_weight=0.1",
    "method.dropout=0.1",
    "train.learning_rate=5e-2",
];

/// Ranks move between the layers, and a run that stops before, between or after the allocations resumes with the same
/// result bit for bit. The adapter is PEFT's.
#[test]
fn ranks_are_allocated_and_a_pause_changes_nothing() {
    let work = WorkDir::new();
    let shared = ["train.scheduler=constant", "train.save_every=3", "train.keep=4"];
    let run = |folder: &str, rest: &[&str]| {
        work.succeed(&train_by("bare.toml", folder, &[&SETS[..], &shared, rest].concat()))
    };
    run("whole", &[]);
    run("parts", &[]);
    let adapter = |folder: &str| {
        ["adapter_model.safetensors", "adapter_config.json"]
            .map(|file| fs::read(work.at(folder).join("adapter").join(file)).unwrap())
    };
    for stop in [9, 6, 3] {
        for later in [6, 9].into_iter().filter(|&step| step > stop) {
            fs::remove_dir_all(work.at(&format!("parts/checkpoint-{later}"))).unwrap();
        }
        fs::remove_dir_all(work.at("parts/adapter")).unwrap();
        fs::remove_file(work.at("parts/summary.json")).unwrap();
        let resumed = run("parts", &["--resume"]);
        assert!(resumed.stderr.contains(&format!("resuming after step {stop} ")), "{resumed:?}");
        assert!(adapter("parts") == adapter("whole"), "the adapter differs after a pause at step {stop}");
        assert_eq!(lasting(&work, "parts"), lasting(&work, "whole"), "a pause at step {stop}");
    }
    // Other steps would have allocated other ranks.
    fs::remove_file(work.at("parts/summary.json")).unwrap();
    let longer =
        work.run(&train_by("bare.toml", "parts", &[&SETS[..], &shared, &["train.max_steps=15", "--resume"]].concat()));
    assert_eq!(longer.code, Some(2), "{longer:?}");
    assert!(
        longer.stderr.contains("`total_step`: expected 12, for which the ranks were allocated, found 15"),
        "{longer:?}"
    );

    let config = work.json("whole/adapter/adapter_config.json");
    assert_eq!((config["peft_type"].as_str(), config["total_step"].as_u64()), (Some("ADALORA"), Some(12)));
    let kept = config["rank_pattern"].as_object().unwrap().values();
    let ranks: Vec<usize> =
        kept.map(|kept| kept.as_array().unwrap().iter().filter(|rank| rank.as_bool() == Some(true)).count()).collect();
    assert_eq!((ranks.len(), ranks.iter().sum::<usize>()), (14, 28), "the mean of 14 layers is `target_r`: {ranks:?}");
    assert!(ranks.iter().any(|&rank| rank != 2), "the ranks differ: {ranks:?}");
    let summary = run_folder(&work, "whole", 12, &["adapter/adapter_model.safetensors"]);
    usable(&work, &["--model", "model", "--adapter", "whole/adapter"], number(&summary, "valid_loss_after"));
    let listed = work.succeed(&["adapters", "list", "whole"]).stdout;
    assert!(listed.contains("ADALORA") && listed.contains("mean rank 2, alpha 16"), "{listed}");
}

#[test]
fn settings_that_do_not_go_with_adalora_are_refused() {
    let work = WorkDir::new();
    let table: [(&[&str], &[&str]); 14] = [
        (&["method.tinit=9"], &["method.tinit", "`tinit` + `tfinal` below the 12 steps of the run, found 9 + 3"]),
        (&["method.target_r=5"], &["method.target_r", "expected 1 to `method.init_r`, which is 4, found 5"]),
        (&["method.init_r=0"], &["method.init_r", "expected a positive integer"]),
        (&["method.beta1=1.0"], &["method.beta1", "expected a number between 0 and 1, found 1"]),
        (&["method.kind=lora"], &["method.init_r", "expected `method.kind` to be \"adalora\", found \"lora\""]),
        (&["method.r=4"], &["method.r", "expected `method.init_r` instead with adalora, found 4"]),
        (&["method.use_rslora=true"], &["method.use_rslora", "the default with adalora"]),
        (&["method.init_lora_weights=pissa"], &["method.init_lora_weights", "the default with adalora"]),
        (&["method.rank_pattern={q_proj = 3}"], &["method.rank_pattern", "finds the ranks itself"]),
        (&["method.init=somewhere"], &["method.init", "starts a new adapter"]),
        (&["parallel.zero_stage=3"], &["parallel.zero_stage", "at most 2 with adalora"]),
        (&["train.optimizer=adamw8bit"], &["train.optimizer", "moments are in host memory"]),
        (&["parallel.offload_optimizer=cpu"], &["parallel.offload_optimizer", "\"none\" with adalora"]),
        (&["parallel.pipeline=2", "train.gradient_accumulation=2"], &["parallel.pipeline", "expected 1 with adalora"]),
    ];
    for (sets, words) in table {
        refused_in(&work, &train_by("bare.toml", "out", &[&SETS[..], sets].concat()), words);
    }
    // Here the number of steps comes from the data: six rows, two in a step.
    work.write("epochs.toml", &work.text("bare.toml").replace("max_steps = 12\n", ""));
    let done = work.run(&train_by("epochs.toml", "out", &SETS));
    assert_eq!(done.code, Some(2), "{done:?}");
    assert!(done.stderr.contains("`method.tinit`: expected `tinit` + `tfinal` below the 3 steps"), "{done:?}");
}
