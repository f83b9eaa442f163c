//! Tests of user mistakes: each is reported in one line and leaves no files behind.

use crate::{
    run::train,
    spoiled::refused,
    work::{CommandOutput, WorkDir},
};
use std::{fs, path::PathBuf, process::Command};

#[test]
fn models_that_cannot_be_read_are_refused() {
    let table: Vec<(&str, &[&str])> = vec![
        ("nothing-here", &["nothing-here", "no such model"]),
        ("./nothing/here", &["./nothing/here", "no such model"]),
        ("missing.gguf", &["missing.gguf", "no such file"]),
        ("train.jsonl", &["train.jsonl", ".gguf"]),
        ("noconfig", &["noconfig", "config.json"]),
        ("notjson", &["notjson/config.json", "expected JSON", "found"]),
        ("arch", &["arch/config.json", "model_type", "expected llama", "found gpt2"]),
        ("field", &["field/config.json", "num_attention_heads", "expected a positive integer", "found \"two\""]),
        ("cut", &["cut/model.safetensors", "expected a complete safetensors file", "found"]),
        (
            "shape",
            &["shape", "model.embed_tokens.weight", "expected [376, 16]", "found [376, 20]", "more of another shape"],
        ),
        ("lacking", &["lacking", "missing: model.embed_tokens.weight"]),
        ("template", &["template/tokenizer_config.json", "chat_template", "found"]),
        ("jinja", &["jinja/chat_template.jinja", "chat_template", "found"]),
        ("nowords", &["nowords/tokenizer.json", "No such file"]),
        ("words", &["words/tokenizer.json", "tokenizer: Model missing"]),
        ("few", &["expected token ids below 96", "is the tokenizer the model's own?", "found"]),
        ("magic.gguf", &["magic.gguf", "magic", "expected GGUF", "found"]),
        ("lengths.gguf", &["lengths.gguf", "metadata key", "expected 18446744073709551615 bytes", "found"]),
        ("cut.gguf", &["cut.gguf", "expected", "is it complete?"]),
        ("vocabulary.gguf", &["vocabulary.gguf", "llama.embedding_length", "expected", "found no such key"]),
        ("nowords.gguf", &["nowords.gguf", "tokenizer.ggml.tokens", "expected an array of strings", "found nothing"]),
    ];
    let commands: Vec<[&str; 7]> = table
        .iter()
        .map(|(model, _)| {
            ["logits", "--model", model, "--text", "The patient should rest", "--out", "logits.safetensors"]
        })
        .collect();
    let rows: Vec<(&[&str], &[&str])> = commands.iter().zip(&table).map(|(c, (_, words))| (&c[..], *words)).collect();
    refused(&rows);
}

#[test]
fn adapters_and_arguments_that_do_not_fit_are_refused() {
    let eval = |rest: &'static [&str]| [&["eval", "--model", "model"], rest].concat();
    let chat = |rest: &'static [&str]| [&["chat", "--prompt", "Hi"], rest].concat();
    let table: Vec<(Vec<&str>, &[&str])> = vec![
        (
            chat(&["--model", "model", "--adapter", "nowhere"]),
            &["nowhere", "expected an adapter directory", "found no such directory"],
        ),
        (
            chat(&["--model", "model", "--adapter", "other"]),
            &["other", "does not fit", "expected [4, 16]", "found [4, 32]"],
        ),
        (
            chat(&["--model", "model", "--adapter", "adapter-json"]),
            &["adapter-json/adapter_config.json", "expected JSON", "found"],
        ),
        (
            chat(&["--model", "model", "--adapter", "adapter-kind"]),
            &["adapter-kind/adapter_config.json", "peft_type", "expected LORA", "found VERA"],
        ),
        (
            chat(&["--model", "model", "--adapter", "adapter-cut"]),
            &["adapter-cut/adapter_model.safetensors", "expected safetensors", "found"],
        ),
        (
            chat(&["--model", "model", "--adapter", "adapter-weights"]),
            &["adapter-weights/adapter_model.safetensors", "No such file"],
        ),
        (
            chat(&["--model", "model", "--adapter", "adapter-old"]),
            &["adapter-old/adapter_model.bin", "found a safetensors file; rename it"],
        ),
        (chat(&["--model", "model", "--tokenizer", "nowhere"]), &["nowhere", "No such file"]),
        (chat(&["--model", "base"]), &["base", "no chat template"]),
        (
            chat(&["--model", "model", "--temperature", "nan"]),
            &["temperature", "expected a number of at least 0", "found NaN"],
        ),
        (chat(&["--model", "model", "--top-p", "0"]), &["top_p", "expected", "found 0"]),
        (chat(&["--model", "model", "--repetition-penalty", "0"]), &["repetition_penalty", "expected", "found 0"]),
        (eval(&["--task", "qa-loss", "--data", "missing.jsonl"]), &["missing.jsonl", "cannot be read"]),
        (eval(&["--task", "qa-loss", "--data", "model"]), &["model", "this is a model in Hugging Face's layout"]),
        (
            eval(&["--task", "qa-loss", "--data", "empty.jsonl"]),
            &["empty.jsonl", "expected at least one row", "found none"],
        ),
        (eval(&["--task", "qa-loss", "--data", "broken.jsonl"]), &["broken.jsonl:2", "expected a JSON object"]),
        (
            eval(&["--task", "qa-loss", "--data", "model/model.safetensors"]),
            &["model.safetensors", "this is a safetensors file", "not rows"],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--max-length", "3"]),
            &["valid.jsonl", "no row has a token to learn", "3"],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--columns", "prompt=q"]),
            &["--columns", "expected columns among question, answer", "found `prompt`"],
        ),
        (eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--columns", "prompt"]), &["--columns", "COLUMN=NAME"]),
        (
            eval(&[
                "--task",
                "qa-loss",
                "--data",
                "messages.jsonl",
                "--format",
                "messages",
                "--chat-template",
                "silent.jinja",
            ]),
            &["error: messages.jsonl:1: turn 2", "`content`: expected the chat template to print it"],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "thinking.jsonl", "--format", "messages"]),
            &["error: thinking.jsonl:1: turn 2", "`thinking`", "\"One of two.\""],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--template-arg", "x"]),
            &["--template-arg", "NAME=VALUE"],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--chat-template", "jinja/chat_template.jinja"]),
            &["jinja/chat_template.jinja", "chat template", "endfor"],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--end-token", "<end>"]),
            &["model/tokenizer.json", "end token \"<end>\"", "expected a token of the vocabulary"],
        ),
        (vec!["data", "check", "missing.jsonl", "--model", "turns"], &["missing.jsonl", "cannot be read"]),
        (vec!["data", "check", "empty.jsonl", "--model", "turns"], &["empty.jsonl", "expected at least one row"]),
        (vec!["data", "check", "train.jsonl", "--model", "nothing-here"], &["nothing-here", "no such model"]),
        (vec!["data", "check", "train.jsonl", "--model", "base"], &["base", "no chat template"]),
        (vec!["doctor", "--model", "turns", "--data", "broken.jsonl"], &["broken.jsonl:2", "expected a JSON object"]),
        (vec!["doctor", "--model", "cut"], &["cut/model.safetensors", "complete safetensors"]),
        (chat(&["--model", "model", "--device", "gpu"]), &["--device", "expected one of cpu, tch", "found \"gpu\""]),
        #[cfg(not(feature = "wgpu"))]
        (chat(&["--model", "model", "--device", "wgpu:1"]), &["\"wgpu:1\" needs", "--features wgpu"]),
        (eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--limit", "0"]), &["--limit", "0"]),
        (eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--batch-size", "0"]), &["--batch-size", "0"]),
        (
            eval(&["--task", "pubmedqa", "--data", "undecided.json"]),
            &["undecided.json", "12", "`final_decision` is missing"],
        ),
        (eval(&["--task", "pubmedqa", "--data", "valid.jsonl"]), &["valid.jsonl", "expected JSON"]),
        (
            eval(&["--task", "pubmedqa", "--data", "decision.json"]),
            &["decision.json", "12", "final_decision", "expected yes, no or maybe", "found \"perhaps\""],
        ),
        (
            eval(&["--task", "qa-loss", "--data", "valid.jsonl", "--out", "file/scores.json"]),
            &["file/scores.json", "cannot be written"],
        ),
        (
            vec!["logits", "--model", "model", "--text", "Hi", "--out", "file/logits"],
            &["file/logits", "cannot be written"],
        ),
    ];
    let rows: Vec<(&[&str], &[&str])> = table.iter().map(|(arguments, words)| (&arguments[..], *words)).collect();
    refused(&rows);
}

#[test]
fn runs_that_cannot_start_are_refused_and_leave_no_folder() {
    let mut table: Vec<(Vec<&str>, &[&str])> = vec![
        (vec!["train", "missing.toml"], &["missing.toml", "the recipe cannot be read"]),
        (vec!["train", "toml.toml"], &["toml.toml:2", "not valid TOML"]),
        (vec!["train", "run.toml", "--dir", "full"], &["full", "not empty", "--dir"]),
        (vec!["train", "run.toml", "--dir", "file/run"], &["file/run", "cannot be made"]),
        (vec!["train", "run.toml", "--dir", "file"], &["file", "cannot be made"]),
    ];
    let sets: [(&str, &[&str]); 34] = [
        ("train.batchsize=2", &["--set", "train.batchsize", "unknown key", "`train.batch_size`"]),
        ("train.lora_alpha=2", &["--set", "train.lora_alpha", "`method.alpha`"]),
        ("train.batch_size=many", &["--set", "train.batch_size", "expected a whole number", "found string \"many\""]),
        ("method.r=0", &["--set", "method.r", "positive integer", "0"]),
        ("model.path=nothing-here", &["nothing-here", "no such model"]),
        ("model.path=cut", &["cut/model.safetensors", "complete safetensors"]),
        ("model.path=base", &["no chat template"]),
        ("model.path=few", &["expected token ids below 96", "found"]),
        ("data.train=missing.jsonl", &["missing.jsonl", "cannot be read"]),
        ("data.valid=missing.jsonl", &["missing.jsonl", "cannot be read"]),
        ("data.train=empty.jsonl", &["empty.jsonl", "expected at least one row", "found none"]),
        ("data.train=broken.jsonl", &["broken.jsonl:2", "expected a JSON object"]),
        ("data.train=keys.jsonl", &["keys.jsonl:1", "expected the key `answer`", "found question, reply"]),
        ("data.train=kinds.jsonl", &["kinds.jsonl:3", "`answer`", "expected a string", "found 3"]),
        ("data.format=pubmedqa", &["train.jsonl", "expected JSON"]),
        ("data.train=[{path='pubmedqa.json', format='qa'}]", &["pubmedqa.json: 31", "expected the key `question`"]),
        (
            "data.train=[{path='roles.jsonl', format='messages'}]",
            &["roles.jsonl:1", "turn 1", "`role`", "found \"bot\""],
        ),
        ("data.train=[{path='thinking.jsonl', format='messages'}]", &["thinking.jsonl:1", "turn 2", "`thinking`"]),
        ("data.end_token='<end>'", &["model/tokenizer.json", "\"<end>\"", "a token of the vocabulary"]),
        ("data.template_arguments={tools=1}", &["--set", "data.template_arguments", "other names", "found tools"]),
        ("data.learn='first'", &["--set", "data.learn", "first"]),
        ("model.chat_template='nowhere.jinja'", &["nowhere.jinja", "the chat template cannot be read"]),
        ("data.train=[{path='asked.json', format='messages'}]", &["asked.json", "no row has a token to learn"]),
        ("data.columns={prompt='question'}", &["--set", "data.columns", "question, answer", "found `prompt`"]),
        ("method.layers=2", &["--set", "method.layers", "\"freeze\"", "found lora"]),
        ("data.max_length=4", &["train.jsonl", "no row has a token to learn", "max_length", "4"]),
        ("method.target_modules=[\"query\"]", &["target_modules", "query", "selects no linear layer", "q_proj"]),
        ("method.target_modules=([)", &["target_modules", "([)"]),
        ("model.dtype=packed", &["model", "weights", "a GGUF file", "it can be loaded as nf4 instead"]),
        ("parallel.zero_stage=4", &["--set", "parallel.zero_stage", "expected 0, 1, 2, 3", "FULL_SHARD"]),
        ("train.eval_device=gpu", &["--set", "train.eval_device", "expected one of cpu, tch", "found \"gpu\""]),
        ("method.init=nowhere", &["nowhere", "expected an adapter directory"]),
        ("method.init=other", &["other", "does not fit"]),
        ("method.init=adapter-json", &["adapter-json/adapter_config.json", "expected JSON"]),
    ];
    table.extend(sets.map(|(set, words)| (train("out", &[set]), words)));
    let pairs: [([&str; 2], &[&str]); 5] = [
        (
            ["data.on_too_long=error", "data.max_length=20"],
            &["error: train.jsonl:1: ", "more than `data.max_length` = 20", "truncate"],
        ),
        (["method.kind=qlora", "model.dtype=f32"], &["model.dtype", "\"packed\" or \"nf4\" with qlora"]),
        (["method.kind=full", "model.dtype=nf4"], &["model.dtype", "quantized weights cannot be trained"]),
        (
            ["method.kind=freeze", "method.layers={extra_modules=['wte']}"],
            &["embed_tokens, norm, lm_head", "found \"wte\""],
        ),
        (["data.on_too_long=drop", "data.max_length=20"], &["train.jsonl", "max_length", "20"]),
    ];
    table.extend(pairs.map(|(sets, words)| (train("out", &sets), words)));
    let rows: Vec<(&[&str], &[&str])> = table.iter().map(|(arguments, words)| (&arguments[..], *words)).collect();
    refused(&rows);
}

/// Runs a command with file sizes limited to `kibibytes`, as on a full disk.
fn with_little_room(work: &WorkDir, kibibytes: usize, arguments: &[&str]) -> CommandOutput {
    let shell = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", kibibytes * 2);
    let inner = work.command(arguments);
    let mut command = Command::new("sh");
    command.args(["-c", &shell, "sh"]).arg(inner.get_program()).args(arguments).current_dir(work.0.path());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.output().unwrap().into()
}

#[test]
fn a_full_disk_is_one_line_and_leaves_nothing_half_written() {
    let work = WorkDir::new();
    work.succeed(&train("done", &["train.max_steps=1"]));
    let export = |out: &'static str| vec!["export", "--model", "model", "--adapter", "done/adapter", "--out", out];
    let train = |set: &'static str| train("out", &[set, "train.max_steps=3"]);
    for (arguments, file) in [
        (train("train.save_every=9"), "out/adapter/adapter_model.safetensors"),
        (train("train.save_every=1"), "out/checkpoint-1"),
        (train("method.kind=full"), "out/model/model.safetensors"),
        (export("merged"), "merged"),
        (export("merged.gguf"), "merged.gguf"),
        (vec!["logits", "--model", "model", "--text", "Hello", "--out", "logits"], "logits"),
    ] {
        let done = with_little_room(&work, 4, &arguments);
        assert_eq!(done.code, Some(2), "{arguments:?}: {done:?}");
        let error = done.stderr.lines().last().unwrap();
        let named = error.starts_with("error: ") && error.contains(file) && error.contains("File too large");
        assert!(named, "{arguments:?}: {done:?}");
        // An empty folder may remain, but no incomplete file.
        let broken =
            |path: &PathBuf| path.starts_with(work.at(file)) || path.extension().is_some_and(|end| end == "part");
        let left: Vec<_> = work.listing().into_keys().filter(|path| path.is_file() && broken(path)).collect();
        assert!(left.is_empty(), "{arguments:?}: {left:?}");
        drop(fs::remove_dir_all(work.at("out")));
    }
}
