//! Keys of other programs: their names here, or why they have none. The names are those of transformers 5.8, PEFT 0.21,
//! LLaMA-Factory, axolotl, mlx-lm and unsloth.

/// The fate of a key of another program.
pub(super) enum Answer {
    /// Its key here; the second text is about the value, and may be empty.
    Key(&'static str, &'static str),
    /// It has no key here; the text says what there is instead.
    NoKey(&'static str),
}

use Answer::{Key, NoKey};

/// Keys of other programs with one answer.
struct Synonyms {
    names: &'static [&'static str],
    answer: Answer,
}

const fn of(names: &'static [&'static str], answer: Answer) -> Synonyms {
    Synonyms { names, answer }
}

const MODEL: &[Synonyms] = &[
    of(
        &["model_name_or_path", "base_model", "model_name", "pretrained_model_name_or_path", "model_id", "model_path"],
        Key("model.path", ""),
    ),
    of(&["bf16", "pure_bf16", "bfloat16"], Key("model.compute", "\"bf16\"")),
    of(&["float16"], Key("model.compute", "\"f16\"")),
    of(&["torch_dtype", "infer_dtype"], Key("model.dtype", "")),
    of(&["load_in_4bit", "quantization_bit", "qlora"], Key("method.kind", "\"qlora\"")),
    of(&["quantization_type", "bnb_4bit_quant_type", "quantization_method"], Key("model.dtype", "\"nf4\"")),
    of(
        &["load_in_8bit"],
        NoKey("frozen weights are quantized to nf4, or taken from a GGUF file, with method.kind = \"qlora\""),
    ),
    of(&["double_quantization", "bnb_4bit_use_double_quant"], NoKey("the scales of nf4 are not quantized again")),
    of(&["trust_remote_code"], NoKey("no code of a model is run")),
    of(&["rope_scaling"], NoKey("it is read from the model's config.json")),
    of(&["template", "chat_template_path"], Key("model.chat_template", "a file with a Jinja template")),
    of(&["cache_dir"], NoKey("the environment variables HF_HOME and HF_HUB_CACHE name the cache")),
    of(
        &[
            "flash_attn",
            "flash_attention",
            "attn_implementation",
            "sdp_attention",
            "xformers_attention",
            "flex_attention",
            "use_liger_kernel",
            "enable_liger_kernel",
            "torch_compile",
            "use_unsloth",
            "shift_attn",
            "tf32",
            "use_cache",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
        ],
        NoKey("the device chooses the kernels"),
    ),
];

const DATA: &[Synonyms] = &[
    of(
        &["cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "model_max_length", "block_size"],
        Key("data.max_length", ""),
    ),
    of(
        &["dataset", "datasets", "train_file", "data_files", "data_path", "dataset_name", "train_dataset"],
        Key("data.train", "a path, or a list of { path, format, columns, weight }"),
    ),
    of(
        &["eval_dataset", "test_datasets", "validation_file", "valid_file"],
        Key("data.valid", "a path, or a share such as 0.05"),
    ),
    of(
        &["val_size", "val_set_size", "test_size", "validation_split"],
        Key("data.valid", "a share of the training rows, such as 0.05, or a path"),
    ),
    of(&["sample_packing", "neat_packing"], Key("data.packing", "\"fill\"")),
    of(&["excess_length_strategy"], Key("data.on_too_long", "")),
    of(&["disable_shuffling", "shuffle_merged_datasets"], Key("data.shuffle", "")),
    of(&["interleave_probs", "mix_strategy"], Key("data.train", "each file there may have a `weight`")),
    of(&["val_batches"], Key("data.valid_limit", "a number of rows")),
    of(&["max_samples", "max_train_samples"], NoKey("every row of a file is used; write fewer into it")),
    of(
        &["dataset_dir", "dataset_info"],
        Key("data.train", "\"DIR/dataset_info.json:NAME\", or the paths of the files"),
    ),
    of(&["dataset_text_field", "formatting_func"], Key("data.columns", "")),
    of(
        &[
            "train_on_inputs",
            "train_on_prompt",
            "mask_prompt",
            "completion_only_loss",
            "assistant_only_loss",
            "train_on_responses_only",
        ],
        NoKey("the answers are learned, and prompts are not"),
    ),
    of(
        &[
            "preprocessing_num_workers",
            "dataloader_num_workers",
            "dataset_num_proc",
            "dataset_processes",
            "dataloader_pin_memory",
            "dataset_prepared_path",
            "tokenized_path",
            "overwrite_cache",
            "streaming",
            "remove_unused_columns",
        ],
        NoKey("all rows are read and tokenized before the first step"),
    ),
    of(&["mask_history"], Key("data.learn", "\"last\"")),
    of(
        &["enable_thinking", "chat_template_kwargs"],
        Key("data.template_arguments", "a table, such as { enable_thinking = false }"),
    ),
    of(&["pad_to_sequence_len", "pad_to_multiple_of"], NoKey("rows are not padded, or only to the longest one")),
];

const METHOD: &[Synonyms] = &[
    of(&["finetuning_type", "fine_tune_type", "peft_type", "adapter", "adapter_type"], Key("method.kind", "")),
    of(&["use_dora", "peft_use_dora"], Key("method.kind", "\"dora\"")),
    of(&["lora_rank", "lora_r", "rank"], Key("method.r", "")),
    of(&["total_step"], Key("train.max_steps", "")),
    of(&["lora_alpha"], Key("method.alpha", "")),
    of(&["scale"], Key("method.alpha", "mlx-lm's scale times `method.r`")),
    of(&["lora_dropout", "adapter_dropout"], Key("method.dropout", "")),
    of(
        &["lora_target", "lora_target_modules", "lora_target_linear"],
        Key("method.target_modules", "\"all-linear\" for all"),
    ),
    of(&["additional_target", "lora_modules_to_save"], Key("method.modules_to_save", "")),
    of(
        &["add_tokens", "new_special_tokens", "additional_special_tokens"],
        Key("method.new_tokens", "a list of tokens"),
    ),
    of(&["peft_use_rslora"], Key("method.use_rslora", "")),
    of(&["peft_init_lora_weights"], Key("method.init_lora_weights", "")),
    of(&["pissa_init", "pissa_iter"], Key("method.init_lora_weights", "\"pissa\" or \"pissa_niter_N\"")),
    of(&["loftq_config", "loftq_bits"], Key("method.init_lora_weights", "\"loftq\"")),
    of(&["lora_rank_pattern"], Key("method.rank_pattern", "")),
    of(&["lora_alpha_pattern"], Key("method.alpha_pattern", "")),
    of(
        &["peft_layers_to_transform", "num_layers", "lora_layers"],
        Key("method.layers_to_transform", "indices of blocks"),
    ),
    of(&["peft_layers_pattern"], Key("method.layers_pattern", "")),
    of(&["adapter_name_or_path", "lora_model_dir", "resume_adapter_file"], Key("method.init", "")),
    of(&["freeze_trainable_layers"], Key("method.layers", "")),
    of(&["freeze_extra_modules"], Key("method.layers", "{ count, extra_modules }")),
    of(&["prompt_tuning_init_text"], Key("method.init_text", "")),
    of(&["prompt_tuning_init"], Key("method.init_from_vocabulary", "or `method.init_text`")),
    of(&["encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"], NoKey("P-tuning has PEFT's MLP")),
    of(
        &[
            "use_galore",
            "use_apollo",
            "use_badam",
            "use_adam_mini",
            "use_llama_pro",
            "relora",
            "oft_rank",
            "use_muon",
            "lora_ga_config",
            "eva_config",
            "corda_config",
        ],
        NoKey("the methods are those of `method.kind`, the optimizers those of `train.optimizer`"),
    ),
    of(
        &["stage", "rl", "trl", "pref_beta", "reward_model"],
        NoKey("`train` is supervised fine-tuning; there is no stage to choose"),
    ),
];

const STEPS: &[Synonyms] = &[
    of(&["per_device_train_batch_size", "micro_batch_size", "train_batch_size"], Key("train.batch_size", "")),
    of(&["per_device_eval_batch_size", "eval_batch_size"], NoKey("a validation has `train.batch_size` rows at a time")),
    of(&["auto_find_batch_size"], NoKey("`medqa estimate` shows what fits into memory")),
    of(
        &["gradient_accumulation_steps", "grad_accumulation_steps", "grad_accumulation"],
        Key("train.gradient_accumulation", ""),
    ),
    of(&["num_train_epochs", "num_epochs", "n_epochs", "epoch"], Key("train.epochs", "")),
    of(&["iters", "num_iters", "max_iters"], Key("train.max_steps", "")),
    of(&["data_seed", "random_state"], Key("train.seed", "")),
    of(
        &["gradient_checkpointing", "grad_checkpoint", "use_gradient_checkpointing", "use_unsloth_gc"],
        Key("train.activation_checkpointing", "\"full\" or \"none\""),
    ),
    of(&["disable_gradient_checkpointing"], Key("train.activation_checkpointing", "\"none\"")),
    of(&["resume_from_checkpoint", "auto_resume_from_checkpoints"], NoKey("it is the option --resume")),
    of(&["output_dir", "adapter_path", "run_name", "logging_dir"], NoKey("the run directory is the option --dir")),
    of(&["overwrite_output_dir"], NoKey("a run directory is never overwritten; --dir names another")),
    of(&["device", "device_map", "use_cpu", "local_rank"], NoKey("it is the option --device")),
    of(&["do_train", "do_eval", "do_predict", "test"], NoKey("the verb says it: `medqa train`, `medqa eval`")),
    of(&["full_determinism"], NoKey("runs are deterministic")),
];

const OPTIMIZER: &[Synonyms] = &[
    of(&["optim"], Key("train.optimizer", "")),
    of(&["lr"], Key("train.learning_rate", "")),
    of(&["adam_beta1", "adam_beta2", "momentum"], Key("train.betas", "[beta1, beta2]")),
    of(&["adam_epsilon", "eps"], Key("train.epsilon", "")),
    of(&["gradient_clipping", "max_norm"], Key("train.max_grad_norm", "")),
    of(&["lr_scheduler_type", "lr_scheduler", "lr_schedule"], Key("train.scheduler", "")),
    of(&["warmup_steps"], Key("train.warmup", "an integer is a number of steps")),
    of(&["warmup_ratio"], Key("train.warmup", "a number with a point is a fraction of all steps")),
    of(
        &["lr_scheduler_kwargs", "cosine_min_lr_ratio"],
        Key("train.deepspeed_scheduler", "DeepSpeed's schedules have parameters"),
    ),
    of(&["embedding_lr", "embedding_lr_scale"], Key("train.loraplus_lr_embedding", "")),
    of(&["optim_args", "optim_target_modules"], NoKey("an optimizer has `betas`, `epsilon` and `weight_decay`")),
    of(&["neftune_noise_alpha"], NoKey("no noise is added to embeddings; `method.dropout` regularizes adapters")),
    of(&["label_smoothing_factor"], NoKey("targets are not smoothed; `method.dropout` regularizes adapters")),
];

const EVALUATION: &[Synonyms] = &[
    of(&["eval_steps", "steps_per_eval", "evals_per_epoch"], Key("train.eval_every", "a number of steps")),
    of(
        &["eval_strategy", "evaluation_strategy"],
        Key("train.eval_every", "a number of steps; without it, before and after"),
    ),
    of(&["save_steps", "saves_per_epoch"], Key("train.save_every", "a number of steps")),
    of(&["save_strategy"], Key("train.save_every", "a number of steps; without it, no checkpoint")),
    of(&["save_total_limit"], Key("train.keep", "")),
    of(&["early_stopping_patience", "early_stopping_steps"], Key("train.early_stopping", "a number of validations")),
    of(
        &["load_best_model_at_end", "metric_for_best_model", "greater_is_better"],
        Key("train.keep_best", "\"valid_loss\""),
    ),
    of(&["eval_on_start"], NoKey("there is always a validation before the first step")),
    of(
        &["logging_steps", "logging_strategy", "logging_first_step", "steps_per_report", "plot_loss"],
        NoKey("every step is in metrics.jsonl, and training_loss.png shows them"),
    ),
    of(
        &["use_tensorboard", "use_wandb", "wandb_project", "wandb_mode", "use_swanlab", "use_mlflow"],
        Key("train.report_to", "[\"tensorboard\", \"wandb\"]"),
    ),
    of(&["push_to_hub", "hub_model_id", "hub_token", "hub_strategy"], NoKey("nothing is uploaded")),
    of(&["save_safetensors", "save_only_model"], NoKey("weights are safetensors, and a checkpoint can be resumed")),
];

const PARALLEL: &[Synonyms] = &[
    of(&["fsdp"], Key("parallel.zero_stage", "\"FULL_SHARD\" or \"SHARD_GRAD_OP\"")),
    of(&["fsdp_config"], Key("parallel.accelerate", "a file of `accelerate config`")),
    of(&["ddp_bucket_cap_mb", "reduce_bucket_size"], Key("parallel.bucket_size", "a number of values")),
    of(&["overlap_comm"], Key("parallel.overlap", "")),
    of(&["num_processes", "nproc_per_node", "num_gpus", "world_size"], NoKey("it is the option -n of `medqa launch`")),
    of(&["ddp_timeout", "ddp_find_unused_parameters", "ddp_backend"], NoKey("ranks are those of mpirun")),
];

/// Returns the fate of a key of another program, by its last part.
pub(super) fn answer(name: &str) -> Option<&'static Answer> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    let tables = [MODEL, DATA, METHOD, STEPS, OPTIMIZER, EVALUATION, PARALLEL];
    tables.into_iter().flatten().find(|row| row.names.contains(&name.as_str())).map(|row| &row.answer)
}

impl Answer {
    /// Formats the answer as a predicate, such as "is called `data.max_length` here".
    pub(super) fn predicate(&self) -> String {
        match self {
            Key(key, "") => format!("is called `{key}` here"),
            Key(key, value) => format!("is called `{key}` here ({value})"),
            NoKey(instead) => format!("is not here: {instead}"),
        }
    }
}

/// Returns every key of this program that an answer names.
#[cfg(test)]
pub(super) fn named_keys() -> impl Iterator<Item = &'static str> {
    let tables = [MODEL, DATA, METHOD, STEPS, OPTIMIZER, EVALUATION, PARALLEL];
    tables.into_iter().flatten().filter_map(|row| match row.answer {
        Key(key, _) => Some(key),
        NoKey(_) => None,
    })
}
