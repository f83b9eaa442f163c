//! Configuration files of other programs that were given as a recipe.

use serde_yaml_ng::{Mapping, Value};

use super::other_tools;

/// The largest number of keys to translate in a message.
const MAX_SHOWN: usize = 6;

/// A program, and the keys by which its files are known.
struct Program {
    name: &'static str,
    /// A key that every file has; it may be empty.
    always: &'static str,
    /// Keys of which a file has at least one.
    some: &'static [&'static str],
    /// The next step, if it is another than writing a recipe.
    instead: &'static str,
}

const PROGRAMS: [Program; 7] = [
    Program {
        name: "LLaMA-Factory",
        always: "model_name_or_path",
        some: &["stage", "finetuning_type", "cutoff_len", "dataset", "template"],
        instead: "",
    },
    Program { name: "axolotl", always: "base_model", some: &[], instead: "" },
    Program {
        name: "mlx-lm",
        always: "model",
        some: &["iters", "fine_tune_type", "lora_parameters", "adapter_path", "steps_per_eval"],
        instead: "",
    },
    Program {
        name: "DeepSpeed",
        always: "",
        some: &["zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"],
        instead: "a ds_config.json belongs beside a recipe: --deepspeed FILE",
    },
    Program {
        name: "Accelerate",
        always: "",
        some: &["compute_environment", "distributed_type"],
        instead: "a file of `accelerate config` belongs beside a recipe: --accelerate FILE",
    },
    Program {
        name: "PEFT",
        always: "peft_type",
        some: &[],
        instead: "its directory is an adapter: --set method.init=DIR",
    },
    Program { name: "transformers", always: "per_device_train_batch_size", some: &[], instead: "" },
];

/// Says whose file a text is, and what its first keys are called here, if the text is YAML or JSON and no recipe.
pub(super) fn message(text: &str) -> Option<String> {
    // TOML tables and keys are no mapping in YAML.
    let file: Mapping = serde_yaml_ng::from_str(text).ok()?;
    let known = PROGRAMS.iter().find(|Program { always, some, .. }| {
        let has_some = some.is_empty() || some.iter().any(|key| file.contains_key(*key));
        has_some && (always.is_empty() || file.contains_key(*always))
    });
    let (whose, instead) = match known {
        Some(program) => (format!("a file of {}", program.name), program.instead),
        None => ("YAML or JSON".to_owned(), ""),
    };
    if !instead.is_empty() {
        return Some(format!("this looks like {whose}, not like a recipe in TOML; {instead}"));
    }
    let keys = file.keys().filter_map(Value::as_str);
    let translated = keys.filter_map(|key| Some(format!("`{key}` {}", other_tools::answer(key)?.predicate())));
    let translated: Vec<String> = translated.take(MAX_SHOWN).collect();
    let translated = if translated.is_empty() { String::new() } else { format!("; {}", translated.join("; ")) };
    Some(format!(
        "this looks like {whose}; a recipe is TOML, or the options --model, --data and --set TABLE.KEY=VALUE{translated}"
    ))
}
