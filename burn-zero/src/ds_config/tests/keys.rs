//! Tests of key names, kinds of values and keys that are not honoured.

use super::super::keys::{ACCELERATE, DEEPSPEED, KeySpec, ValueKind};
use super::*;
use std::collections::HashSet;

/// Collects every key of a table with its path, including nested blocks; the parameters of a typed block follow its
/// type.
fn every(table: &'static [KeySpec], block: &str, found: &mut Vec<(String, KeySpec)>) {
    for key in table {
        let path = if block.is_empty() { key.name.to_owned() } else { format!("{block}.{}", key.name) };
        found.push((path.clone(), *key));
        match key.kind {
            ValueKind::Block(inner) => every(inner, &path, found),
            ValueKind::Typed(types) => {
                for (name, params) in types.supported {
                    every(params, &format!("{path}.{name}"), found);
                }
            }
            _ => {}
        }
    }
}

/// Returns a document with `value` at a path that [`every`] has returned.
fn nested(path: &str, value: Value) -> Value {
    match path.split_once('.') {
        None => json!({path: value}),
        Some((block @ ("optimizer" | "scheduler"), rest)) => {
            let (name, param) = rest.split_once('.').unwrap();
            json!({block: {"type": name, "params": {param: value}}})
        }
        Some((block, rest)) => json!({block: nested(rest, value)}),
    }
}

fn deepspeed_keys() -> Vec<(String, KeySpec)> {
    let mut found = Vec::new();
    every(DEEPSPEED, "", &mut found);
    found
}

fn public_path(path: &str) -> String {
    match path.split('.').collect::<Vec<_>>()[..] {
        [block @ ("optimizer" | "scheduler"), _, param] => format!("{block}.params.{param}"),
        _ => path.to_owned(),
    }
}

#[test]
fn no_key_stands_twice_in_the_tables() {
    let mut found = deepspeed_keys();
    assert!(found.len() > 150, "{}", found.len());
    every(ACCELERATE, "accelerate", &mut found);
    let paths: HashSet<_> = found.iter().map(|(path, _)| path).collect();
    assert_eq!(paths.len(), found.len());
}

#[test]
fn every_key_refuses_a_value_of_another_kind() {
    for (path, key) in deepspeed_keys() {
        if matches!(key.kind, ValueKind::Any) {
            continue;
        }
        let text = nested(&path, json!([[]])).to_string();
        let message = message(resolve(&text));
        assert!(message.starts_with(&format!("`{}`: expected ", public_path(&path))), "{text}: {message}");
        assert!(message.ends_with("found [[]]"), "{text}: {message}");
    }
}

#[test]
fn every_key_of_accelerate_is_checked_likewise() {
    let mut found = Vec::new();
    every(ACCELERATE, "", &mut found);
    for (path, key) in found {
        let unknown = message(AccelerateConfig::from_yaml(&nested(&format!("{path}x"), json!(1)).to_string()));
        assert!(unknown.ends_with(&format!("did you mean `{path}`?")), "{unknown}");
        if !matches!(key.kind, ValueKind::Any) {
            let wrong = message(AccelerateConfig::from_yaml(&nested(&path, json!([[]])).to_string()));
            assert!(wrong.starts_with(&format!("`{path}`: expected ")), "{wrong}");
        }
    }
}

#[test]
fn every_key_with_a_letter_too_many_is_corrected() {
    for (path, _) in deepspeed_keys() {
        let text = nested(&format!("{path}x"), json!(1)).to_string();
        let message = message(resolve(&text));
        let path = public_path(&path);
        assert!(message.starts_with(&format!("`{path}x` is not a key of ")), "{message}");
        assert!(message.ends_with(&format!("did you mean `{path}`?")), "{message}");
    }
}

#[test]
fn mistakes_are_explained_in_one_line() {
    let table = [
        (
            r#"{"zero_optimisation": {"stage": 2}}"#,
            "`zero_optimisation` is not a key of the top level; did you mean `zero_optimization`?",
        ),
        (
            r#"{"zero_optimization": {"stage": 2, "reduce_bucketsize": 1}}"#,
            "`zero_optimization.reduce_bucketsize` is not a key of `zero_optimization`; did you mean \
             `zero_optimization.reduce_bucket_size`?",
        ),
        (
            r#"{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}"#,
            "`zero_optimization.offload_optimizer.devise` is not a key of `zero_optimization.offload_optimizer`; did you \
             mean `zero_optimization.offload_optimizer.device`?",
        ),
        (
            r#"{"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}"#,
            "`optimizer.params.learning_rate` is not a key of `optimizer.params`; did you mean `optimizer.params.lr`?",
        ),
        (
            r#"{"optimizer": {"type": "AdamW", "parameters": {}}}"#,
            "`optimizer.parameters` is not a key of `optimizer`; did you mean `optimizer.params`?",
        ),
        (r#"{"train_batch_size": -4}"#, "`train_batch_size`: expected a whole number, 0 or above, found -4"),
        (r#"{"train_batch_size": 1.5}"#, "`train_batch_size`: expected a whole number, 0 or above, found 1.5"),
        (r#"{"gradient_clipping": true}"#, "`gradient_clipping`: expected a finite number, 0 or above, found true"),
        (
            r#"{"zero_optimization": {"stage": 4}}"#,
            "`zero_optimization.stage`: expected a whole number from 0 to 3, found 4",
        ),
        (r#"{"zero_optimization": 2}"#, "`zero_optimization`: expected a block of keys, found 2"),
        (
            r#"{"zero_optimization": {"offload_param": {"device": "disk"}}}"#,
            r#"`zero_optimization.offload_param.device`: expected none, cpu, nvme, found "disk""#,
        ),
        (
            r#"{"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}"#,
            "`optimizer.params.betas`: expected two numbers from 0 to below 1, found [0.9]",
        ),
        (
            r#"{"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}}"#,
            "`optimizer.params.betas`: expected two numbers from 0 to below 1, found [0.9,1]",
        ),
        (r#"{"fp16": {"enabled": "yes"}}"#, r#"`fp16.enabled`: expected true or false, found "yes""#),
        (
            r#"{"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0]}}}"#,
            "`scheduler.params.warmup_min_lr`: expected a finite number, 0 or above, found [0,0]",
        ),
        (r#"[1]"#, "`the file`: expected keys and values, found [1]"),
    ];
    for (text, expected) in table {
        assert_eq!(message(resolve(text)), expected, "{text}");
    }
}

#[test]
fn what_we_do_anyway_is_not_noted() {
    let text = r#"{
        "wall_clock_breakdown": false, "prescale_gradients": false, "communication_data_type": "fp32",
        "gradient_predivide_factor": 1, "tensorboard": {"enabled": false}, "csv_monitor": {},
        "zero_optimization": {"stage": 2, "reduce_scatter": true, "allgather_partitions": true, "zenflow": null,
            "zero_hpz_partition_size": 1, "zero_quantized_weights": false, "offload_optimizer": {"ratio": 1.0}},
        "optimizer": {"type": "AdamW", "params": {"bias_correction": true, "amsgrad": false, "torch_adam": false}},
        "bf16": {"enabled": true, "check_grad_overflow": true}
    }"#;
    assert_eq!(keys(&with_batch(text).unwrap()), [""; 0]);
}

#[test]
fn what_is_not_honoured_is_noted_with_what_is_done() {
    let text = r#"{
        "wall_clock_breakdown": true, "wandb": {"enabled": true}, "communication_data_type": "fp16",
        "gradient_predivide_factor": 2, "activation_checkpointing": {"partition_activations": true},
        "zero_optimization": {"stage": 1, "reduce_scatter": false, "zenflow": {"topk_ratio": 0.1},
            "offload_optimizer": {"device": "cpu", "pin_memory": true, "ratio": 0.5}},
        "optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}, "legacy_fusion": false},
        "bf16": {"enabled": true, "bf16_optimizer_states": true}
    }"#;
    let config = with_batch(text).unwrap();
    let expected = [
        "wall_clock_breakdown",
        "wandb",
        "communication_data_type",
        "gradient_predivide_factor",
        "activation_checkpointing",
        "zero_optimization.reduce_scatter",
        "zero_optimization.zenflow",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_optimizer.ratio",
        "optimizer.params.max_grad_norm",
        "optimizer.legacy_fusion",
        "bf16.bf16_optimizer_states",
    ];
    let mut found = keys(&config);
    found.sort_unstable();
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    assert_eq!(found, expected);
    let line = config.unhonoured.iter().find(|it| it.key == "communication_data_type").unwrap().to_string();
    assert_eq!(line, "`communication_data_type` is not honoured: gradients are reduced in f32");
}
