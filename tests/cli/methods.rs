//! Tests of every PEFT method that a recipe can name.

use crate::{
    model::{apart, shapes},
    run::{number, run_folder, train, usable},
    work::WorkDir,
};
use std::fs;

/// Trains with every method, and stops and resumes with the same result bit for bit. The adapter has PEFT's format and
/// can be evaluated and used in chat.
#[test]
fn every_method_from_a_recipe_to_chat_with_a_pause_that_changes_nothing() {
    let work = WorkDir::new();
    // A model with rows of whole blocks.
    work.copy_of_model("wide");
    work.write("wide/config.json", &work.text("model/config.json").replace("\"hidden_size\":16", "\"hidden_size\":64"));
    work.weights("wide/model.safetensors", &shapes(376, 64));
    work.succeed(&["export", "--model", "wide", "--out", "wide.gguf", "--dtype", "q8_0"]);
    // The values of the nf4 weights, as floats.
    work.succeed(&["export", "--model", "wide", "--out", "floats", "--nf4"]);
    let logits = |model: &[&str]| work.logits(model);
    let (plain, floats) = (logits(&["--model", "wide"]), logits(&["--model", "floats"]));
    assert!(apart(&floats, &logits(&["--model", "wide", "--weights", "nf4"])) < 1e-4 * apart(&floats, &plain).max(1.0));
    assert!(apart(&floats, &plain) > 1e-3, "nf4 rounds");
    let table: [(&str, &[&str], &str); 19] = [
        ("qlora", &["model.path=wide.gguf"], "LORA"),
        ("qlora", &["model.path=wide", "model.dtype=nf4"], "LORA"),
        ("qlora", &["model.path=wide", "method.init_lora_weights=loftq", "method.loftq_iter=1"], "LORA"),
        ("dora", &["method.r=2"], "LORA"),
        (
            "lora",
            &["method.init_lora_weights=olora", "method.layers_to_transform=[0]", "method.layers_pattern=layers"],
            "LORA",
        ),
        ("lora", &["method.target_modules=['lm_head']", "train.loraplus_lr_ratio=2"], "LORA"),
        (
            "lora",
            &[
                "method.modules_to_save=['embed_tokens']",
                "train.loraplus_lr_ratio=2",
                "train.loraplus_lr_embedding=1e-2",
            ],
            "LORA",
        ),
        ("lora", &["method.target_modules=['q_proj', 'embed_tokens']"], "LORA"),
        // The model has spare rows for three tokens; with five it grows.
        ("lora", &["method.new_tokens=['<a>', '<b>']", "method.target_modules='all-linear'"], "LORA"),
        ("lora", &["method.new_tokens=['<a>', '<b>', '<c>', '<d>', '<e>']"], "LORA"),
        ("lora", &["method.init_lora_weights=pissa", "method.rank_pattern={q_proj = 3}"], "LORA"),
        ("lora", &["method.bias=all", "method.modules_to_save=['lm_head']", "method.layers_to_transform=[1]"], "LORA"),
        (
            "ia3",
            &[
                "train.learning_rate=1e-1",
                "method.target_modules=['v_proj', 'up_proj']",
                "method.feedforward_modules=['up_proj']",
            ],
            "IA3",
        ),
        ("p-tuning-v2", &["train.learning_rate=1e-1", "method.dropout=0.1"], "PREFIX_TUNING"),
        ("p-tuning-v2", &["train.learning_rate=1e-1", "method.init_weights=zero"], "PREFIX_TUNING"),
        ("p-tuning-v2", &["method.prefix_projection=true", "method.num_virtual_tokens=5"], "PREFIX_TUNING"),
        ("p-tuning-v2", &["method.init_text='It is a number.'", "train.learning_rate=1e-1"], "PREFIX_TUNING"),
        ("prompt", &["method.init_text='It is a number.'", "train.learning_rate=1e-1"], "PROMPT_TUNING"),
        ("p-tuning", &["method.encoder_hidden_size=8"], "P_TUNING"),
    ];
    for (index, (kind, sets, peft_type)) in table.into_iter().enumerate() {
        let kind = format!("method.kind={kind}");
        let targets =
            if peft_type == "LORA" { "method.target_modules=['q_proj', 'down_proj']" } else { "train.keep=2" };
        let shared = [kind.as_str(), targets, "train.scheduler=constant", "train.learning_rate=2e-2"];
        let run = |folder: &str, rest: &[&str]| work.succeed(&train(folder, &[&shared, sets, rest].concat()));
        let (whole, parts) = (format!("whole-{index}"), format!("parts-{index}"));
        run(&whole, &["train.max_steps=12"]);
        run(&parts, &["train.save_every=5", "train.max_steps=6"]);
        fs::remove_file(work.at(&parts).join("summary.json")).unwrap();
        run(&parts, &["train.save_every=5", "train.max_steps=12", "--resume"]);
        for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"] {
            let read = |folder: &str| fs::read(work.at(folder).join(file)).unwrap();
            assert!(read(&whole) == read(&parts), "{kind} {sets:?}: {file} differs after a pause");
        }
        let config = work.json(&format!("{whole}/adapter/adapter_config.json"));
        assert_eq!(config["peft_type"], peft_type);
        let summary = run_folder(&work, &whole, 12, &["adapter/adapter_model.safetensors"]);
        let adapter = format!("{whole}/adapter");
        let base: &[&str] = match index {
            0 => &["--model", "wide.gguf", "--weights", "packed"],
            1 | 2 => &["--model", "wide", "--weights", "nf4"],
            _ => &["--model", "model"],
        };
        usable(&work, &[base, &["--adapter", &adapter]].concat(), number(&summary, "valid_loss_after"));
        // A run can start from the adapter of another run.
        if peft_type != "LORA" {
            let (init, again) = (format!("method.init={adapter}"), format!("again-{index}"));
            run(&again, &["train.max_steps=1", "train.learning_rate=1e-9", &init]);
            let before = number(&work.json(&format!("{again}/summary.json")), "valid_loss_before");
            assert!((before - number(&summary, "valid_loss_after")).abs() < 1e-4, "{kind}: {before}");
        }
    }
}
