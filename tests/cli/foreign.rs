//! Tests of configuration files of DeepSpeed and Accelerate.

use crate::{
    run::{lasting, refused_in, resolved, train, train_by},
    work::{RECIPE, WorkDir},
};
use serde_json::json;
use std::fs;

#[test]
fn a_ds_config_is_part_of_the_recipe_and_says_what_it_says_in_vain() {
    let work = WorkDir::new();
    let auto = json!({
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5, "bf16": {"enabled": "auto"}, "wall_clock_breakdown": true,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.8, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto",
            "warmup_min_lr": 1e-5, "total_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto",
            "sub_group_size": 1e8},
    });
    work.write("ds.json", &auto.to_string());
    work.write("run.toml", &RECIPE.replace("warmup = 0\n", ""));
    let done = work.succeed(&train("out", &["--deepspeed", "ds.json"]));
    for words in ["note: ds.json: `wall_clock_breakdown` is not honoured", "`zero_optimization.sub_group_size`"] {
        assert!(done.stderr.contains(words), "{words}: {done:?}");
    }
    let recipe = resolved(&work, "out");
    let (steps, parallel) = (&recipe["train"], &recipe["parallel"]);
    assert_eq!(steps["batch_size"].as_integer(), Some(2), "the recipe's, for its \"auto\"");
    assert_eq!(steps["gradient_accumulation"].as_integer(), Some(3));
    assert_eq!((steps["max_grad_norm"].as_float(), steps["learning_rate"].as_float()), (Some(0.5), Some(2e-2)));
    assert_eq!((steps["weight_decay"].as_float(), steps["epsilon"].as_float()), (Some(0.1), Some(1e-8)));
    assert_eq!(steps["betas"].as_array().unwrap()[1].as_float(), Some(0.95));
    assert_eq!((parallel["zero_stage"].as_integer(), parallel["offload_optimizer"].as_str()), (Some(2), Some("cpu")));
    assert_eq!(parallel["bucket_size"].as_integer(), Some(16 * 16), "the square of the model's width");
    assert!(parallel.get("deepspeed").is_none(), "what it said is in the recipe now");
    // DeepSpeed updates its scheduler after a step: two steps run at the minimum rate, warm-up takes at least two
    // steps, then the rate decays linearly.
    let rates: Vec<f64> = lasting(&work, "out").iter().filter_map(|line| line["learning_rate"].as_f64()).collect();
    assert!((rates[0] - 1e-5).abs() < 1e-12 && (rates[2] - 2e-2).abs() < 1e-9, "{rates:?}");
    assert!((rates[11] - (1e-5 + (2e-2 - 1e-5) * 0.2)).abs() < 1e-9, "{rates:?}");
    // The resolved recipe in the run directory is complete, so the DeepSpeed file is no longer needed.
    fs::remove_file(work.at("ds.json")).unwrap();
    work.succeed(&train_by("out/recipe.toml", "again", &[]));
    assert_eq!(lasting(&work, "again"), lasting(&work, "out"));

    let yaml = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_sharding_strategy: SHARD_GRAD_OP, \
                fsdp_activation_checkpointing: true, fsdp_version: 1}\n";
    work.write("accelerate.yaml", yaml);
    let done = work.succeed(&train("fsdp", &["--accelerate", "accelerate.yaml"]));
    assert!(done.stderr.contains("`num_processes` is 4, but mpirun started 1"), "{done:?}");
    let recipe = resolved(&work, "fsdp");
    assert_eq!(recipe["parallel"]["zero_stage"].as_integer(), Some(2));
    assert_eq!(recipe["train"]["activation_checkpointing"].as_str(), Some("full"));
}

#[test]
fn a_foreign_file_that_does_not_fit_is_refused() {
    let work = WorkDir::new();
    let table: [(&str, &[&str], &[&str]); 11] = [
        (
            r#"{"train_micro_batch_size_per_gpu": 8}"#,
            &[],
            &["ds.json: `train_micro_batch_size_per_gpu` is 8", "run.toml: `train.batch_size` is 2", "remove one"],
        ),
        (
            r#"{"train_batch_size": 6, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2}"#,
            &[],
            &["ds.json: Check batch related parameters.", "6 != 2 * 2 * 1"],
        ),
        (r#"{"gradient_accumulation_steps": 2}"#, &[], &["ds.json: Either train_batch_size or"]),
        (
            r#"{"train_batch_size": "auto", "zero_optimisation": {"stage": 2}}"#,
            &[],
            &["ds.json", "`zero_optimisation`", "did you mean `zero_optimization`"],
        ),
        (
            r#"{"train_batch_size": "auto", "zero_optimization": {"stage": 2}}"#,
            &["parallel.zero_stage=3"],
            &["`zero_optimization.stage` is 2", "--set: `parallel.zero_stage` is 3"],
        ),
        (
            r#"{"train_batch_size": "auto", "scheduler": {"type": "WarmupLR"}}"#,
            &[],
            &["ds.json: `scheduler` is", "run.toml: `train.warmup` is 0"],
        ),
        (r#"{"train_batch_size": "auto", "optimizer": {"type": "adagrad"}}"#, &[], &["ds.json", "`optimizer.type`"]),
        (
            r#"{"train_batch_size": "auto", "optimizer": {"type": "SGD"}}"#,
            &["train.optimizer=lamb"],
            &["`optimizer.type` is \"sgd\"", "`train.optimizer` is \"lamb\""],
        ),
        (
            r#"{"train_batch_size": "auto", "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}"#,
            &[],
            &["`zero_optimization.offload_param.device`", "stage 3"],
        ),
        ("{", &[], &["ds.json", "not readable as Hjson"]),
        (
            "{\n  # twice\n  train_batch_size: auto\n  train_batch_size: 8,\n}",
            &[],
            &["ds.json", "the key `train_batch_size` appears twice at line 4"],
        ),
    ];
    for (text, sets, words) in table {
        work.write("ds.json", text);
        refused_in(&work, &train("out", &[&["--deepspeed", "ds.json"], sets].concat()), words);
    }
    work.write("ds.json", r#"{"train_batch_size": "auto"}"#);
    let both = ["train", "run.toml", "--deepspeed", "ds.json", "--accelerate", "a.yaml"];
    refused_in(&work, &both, &["`parallel.deepspeed` is ds.json", "`parallel.accelerate` is a.yaml"]);
    refused_in(&work, &["train", "run.toml", "--deepspeed", "none.json"], &["none.json", "cannot be read"]);
}
