//! Tests of files of every kind: the same rows are read from each, and what is no file of rows, no model or no adapter
//! is named together with the next step.

use crate::{
    run::{conversations, rows, train, train_by},
    spoiled::refused_in_folder,
    work::{CommandOutput, WorkDir, fixture},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
};

/// Returns the report of `data check` without the name of the file.
fn report(work: &WorkDir, file: &str, more: &[&str]) -> String {
    let done = work.succeed(&[&["data", "check", file, "--model", "turns"], more].concat());
    done.stdout.strip_prefix(file).unwrap_or_else(|| panic!("{done:?}")).to_owned()
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// Returns the report of a `data check` of stdin.
fn piped_report(mut command: Command, rows: &[u8]) -> String {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rows).unwrap();
    let done: CommandOutput = child.wait_with_output().unwrap().into();
    done.stdout.strip_prefix("/dev/stdin").unwrap_or_else(|| panic!("{done:?}")).to_owned()
}

#[test]
fn the_same_rows_are_read_from_every_kind_of_file() {
    let work = WorkDir::new();
    let text = work.text("train.jsonl");
    let values: Vec<Value> = work.lines("train.jsonl");
    let separated = |mark: &str| {
        let row = |row: &Value| {
            format!("{}{mark}\"{}\"\r\n", row["question"].as_str().unwrap(), row["answer"].as_str().unwrap())
        };
        format!("question{mark}answer\r\n{}", values.iter().map(row).collect::<String>())
    };
    let pretty: Vec<String> = values.iter().map(|row| serde_json::to_string_pretty(row).unwrap()).collect();
    let utf16 = |mark: &[u8], bytes: fn(u16) -> [u8; 2]| {
        [mark, &text.encode_utf16().flat_map(bytes).collect::<Vec<u8>>()].concat()
    };
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("rows.csv", separated(",").into()),
        ("bom.csv", [&b"\xef\xbb\xbf"[..], separated(",").as_bytes()].concat()),
        ("rows.tsv", separated("\t").into()),
        ("rows.csv.gz", gzip(separated(",").as_bytes())),
        ("rows.jsonl.gz", gzip(text.as_bytes())),
        ("rows.jsonl.zst", zstd::encode_all(text.as_bytes(), 0).unwrap()),
        ("little.jsonl", utf16(b"\xff\xfe", u16::to_le_bytes)),
        ("big.jsonl", utf16(b"\xfe\xff", u16::to_be_bytes)),
        ("pretty.json", pretty.join("\n").into()),
        ("wrapped.json", serde_json::to_string_pretty(&json!({"version": "1.0", "data": values})).unwrap().into()),
        ("line.json", json!({"train": values}).to_string().into()),
        ("array.json", json!(values).to_string().into()),
        ("header.txt", separated(",").into()),
    ];
    let expected = report(&work, "train.jsonl", &[]);
    assert!(expected.contains("examples                         6"), "{expected}");
    for (name, bytes) in files {
        fs::write(work.at(name), bytes).unwrap();
        assert_eq!(report(&work, name, &[]), expected, "{name}");
    }
    for name in ["snappy.parquet", "zstd.parquet", "gzip.parquet", "lz4.parquet", "rows.arrow"] {
        let file = fixture(&format!("data/{name}")).display().to_string();
        assert_eq!(report(&work, &file, &[]), expected, "{name}");
    }
    // Lists of structs, as the hub has conversations, and lists as JSON in a field.
    work.write("messages.jsonl", &conversations(0..6));
    let expected = report(&work, "messages.jsonl", &["--format", "messages"]);
    for name in ["messages.parquet", "messages.arrow"] {
        let file = fixture(&format!("data/{name}")).display().to_string();
        assert_eq!(report(&work, &file, &["--format", "messages"]), expected);
    }
    let field = |row: &Value| format!("\"{}\"\n", row["messages"].to_string().replace('"', "\"\""));
    let fields: String = work.lines("messages.jsonl").iter().map(field).collect();
    work.write("messages.csv", &format!("messages\n{fields}"));
    assert_eq!(report(&work, "messages.csv", &["--format", "messages"]), expected);
    // One row of a conversation is a row, not an object around rows.
    work.write("one.jsonl", &conversations(0..1));
    assert!(report(&work, "one.jsonl", &["--format", "messages"]).contains("examples                         1"));
    // Folders, patterns, and data sets of LLaMA-Factory by name.
    let expected = report(&work, "train.jsonl", &[]);
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    work.write("parts/a.jsonl", &lines[..2].concat());
    work.write("parts/b/c.json", &json!(values[2..5]).to_string());
    work.write("parts/d.jsonl", &lines[5..].concat());
    work.write("parts/README.md", "about");
    let columns = json!({"prompt": "question", "response": "answer"});
    let sets = json!({"all": {"file_name": "b", "columns": columns}, "two": {"file_name": "a.jsonl", "columns": columns},
        "last": {"file_name": "d.jsonl", "columns": columns}, "hub": {"hf_hub_url": "a/b"}});
    work.write("parts/dataset_info.json", &sets.to_string());
    for name in ["parts", "parts/dataset_info.json:two,all,last"] {
        assert_eq!(report(&work, name, &[]), expected, "{name}");
    }
    work.write("pattern/1.jsonl", &lines[..3].concat());
    work.write("pattern/2.jsonl", &lines[3..].concat());
    assert_eq!(report(&work, "pattern/?.jsonl", &[]), expected);
    for (name, words) in [
        ("parts/dataset_info.json", ["expected the name of a data set", "all, two, last, hub"]),
        ("parts/dataset_info.json:hub", ["`hub`: `hf_hub_url`", "not downloaded"]),
        ("parts/dataset_info.json:other", ["expected the data set `other`", "all, two, last, hub"]),
    ] {
        refused_in_folder(&work, &["data", "check", name, "--model", "turns"], &words);
    }
    // Chinese as spreadsheets write it.
    work.write("utf8.csv", "question,answer\n什么是哮喘？,一种慢性的气道疾病。\n");
    let (chinese, ..) = encoding_rs::GB18030.encode("question,answer\n什么是哮喘？,一种慢性的气道疾病。\n");
    fs::write(work.at("gb.csv"), &chinese).unwrap();
    assert_eq!(report(&work, "gb.csv", &[]), report(&work, "utf8.csv", &[]));
    // A pipe is read once.
    let piped = work.command(&["data", "check", "/dev/stdin", "--model", "turns"]);
    assert_eq!(piped_report(piped, text.as_bytes()), report(&work, "train.jsonl", &[]));
    // Every verb that reads rows has the same reader.
    let parquet = fixture("data/snappy.parquet").display().to_string();
    let sets = [format!("data.train={parquet}"), "data.valid=rows.csv".to_owned(), "train.max_steps=1".to_owned()];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let trained = work.succeed(&train("out", &sets)).json();
    let eval = ["eval", "--task", "qa-loss", "--model", "model", "--adapter", "out", "--data"];
    for data in ["rows.csv", "pretty.json", &parquet] {
        let loss = work.succeed(&[&eval[..], &[data]].concat()).json()["loss"].as_f64().unwrap();
        assert!((loss - trained["valid_loss_after"].as_f64().unwrap()).abs() < 1e-4, "{data}: {loss} {trained}");
    }
}

#[test]
fn rows_that_cannot_be_read_are_named_with_their_place() {
    let work = WorkDir::new();
    let head = "question,answer\na,b\n";
    let broken = [rows(0..2).as_bytes(), b"{\"question\": \"caf\xe9\", \"answer\": \"x\"}\n"].concat();
    let pretty = serde_json::to_string_pretty(&json!({"question": "a", "answer": "b"})).unwrap();
    let several = json!({"train": [{"question": "a", "answer": "b"}], "test": [{"question": "c", "answer": "d"}]});
    let snappy = fs::read(fixture("data/snappy.parquet")).unwrap();
    let files: Vec<(&str, Vec<u8>, &[&str])> = vec![
        (
            "latin.jsonl",
            broken,
            &["latin.jsonl:3: expected UTF-8, found the byte 0xe9 at byte 18", "iconv -f WINDOWS-1252"],
        ),
        ("few.csv", format!("{head}c\n").into(), &["few.csv:3: expected 2 fields, as in the header, found 1"]),
        ("lines.csv", format!("{head}\"c\nd\",e,f\n").into(), &["lines.csv:3: expected 2 fields", "found 3"]),
        ("open.csv", format!("{head}c,\"d\ne,f\n").into(), &["open.csv:3: a quote (\") opens", "never closed"]),
        (
            "semicolons.csv",
            "question;answer\na;b\n".into(),
            &["semicolons.csv:1", "separated by commas", "question;answer"],
        ),
        ("twice.csv", "answer,answer\na,b\n".into(), &["twice.csv:1", "different column names", "\"answer\""]),
        (
            "other.csv",
            "prompt,answer\na,b\n".into(),
            &["other.csv:2: expected the key `question`, found prompt, answer"],
        ),
        ("header.csv", "question,answer\n".into(), &["header.csv", "at least one row"]),
        ("csv.dat", format!("{head}c,d\n").replace("answer", "reply").into(), &["csv.dat", "this is CSV", ".csv"]),
        ("cut.jsonl.gz", gzip(rows(0..6).as_bytes())[..40].into(), &["cut.jsonl.gz", "complete compressed data"]),
        ("cut.parquet", snappy[..900].into(), &["cut.parquet", "expected a whole Parquet file"]),
        ("odd.jsonl", b"\xff\xfe{".into(), &["odd.jsonl", "complete UTF-16"]),
        ("unmarked.jsonl", rows(0..1).encode_utf16().flat_map(u16::to_le_bytes).collect(), &["UTF-16", "iconv"]),
        ("cut.json", format!("{pretty}\n{}", &pretty[..20]).into(), &["cut.json", "over several lines", "EOF"]),
        ("several.json", several.to_string().into(), &["several.json", "`train`, `test`", "a file of its own"]),
        ("page.jsonl", "<!DOCTYPE html>\n<html></html>".into(), &["page.jsonl is an HTML page", "download it again"]),
        (
            "pointer.jsonl",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n".into(),
            &["pointer.jsonl is a git-lfs pointer", "git lfs pull"],
        ),
    ];
    for (name, bytes, words) in &files {
        fs::write(work.at(name), bytes).unwrap();
        refused_in_folder(&work, &["eval", "--task", "qa-loss", "--model", "model", "--data", name], words);
    }
    for (data, words) in [
        ("~/rows.jsonl", ["the shell did not expand `~`", "$HOME"]),
        ("shards/*.jsonl", ["shards/*.jsonl", "this is a pattern that matches no file"]),
        ("full", ["full: expected files with rows, found none", "this is a directory"]),
    ] {
        work.write("full/rows.bin", &rows(0..1));
        refused_in_folder(&work, &["eval", "--task", "qa-loss", "--model", "model", "--data", data], &words);
    }
    let brotli = fixture("data/brotli.parquet").display().to_string();
    refused_in_folder(&work, &["data", "check", &brotli, "--model", "turns"], &["brotli.parquet", "BROTLI", "snappy"]);
    // Every file with a mistake is named, not only the first.
    let both = "data.train=['few.csv', 'train.jsonl', 'page.jsonl']";
    refused_in_folder(&work, &train("out", &[both]), &["few.csv:3: ", "; and page.jsonl: "]);
}

#[test]
fn a_damaged_parquet_file_is_an_error_and_no_panic() {
    let work = WorkDir::new();
    let whole = fs::read(fixture("data/messages.parquet")).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 60) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        fs::write(work.at("damaged.parquet"), bytes).unwrap();
        let done = work.run(&["data", "check", "damaged.parquet", "--model", "turns", "--format", "messages"]);
        assert!(matches!(done.code, Some(0 | 2)) && !done.stderr.contains("panicked"), "byte {at}: {done:?}");
    }
}

#[test]
fn models_in_other_layouts_are_named_with_the_next_step() {
    let work = WorkDir::new();
    for name in ["bin", "original", "sentencepiece", "slow", "pointer", "page", "mlx", "empty-weights"] {
        work.copy_of_model(name);
    }
    let renamed = |from: &str, to: &str| fs::rename(work.at(from), work.at(to)).unwrap();
    renamed("bin/model.safetensors", "bin/pytorch_model.bin");
    renamed("original/model.safetensors", "original/consolidated.safetensors");
    renamed("sentencepiece/tokenizer.json", "sentencepiece/tokenizer.model");
    renamed("slow/tokenizer.json", "slow/vocab.json");
    work.write("pointer/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n");
    work.write("page/tokenizer.json", "<html><body>Sign in</body></html>");
    let mut config = work.json("model/config.json");
    config["quantization"] = json!({"group_size": 64, "bits": 4});
    work.write("mlx/config.json", &config.to_string());
    fs::remove_file(work.at("empty-weights/model.safetensors")).unwrap();
    work.write("meta/params.json", "{\"dim\": 16}");
    work.write("meta/consolidated.00.pth", "");
    work.write("hub/snapshots/0a1b/config.json", "{}");
    work.write("collection/model-q4.gguf", "GGUF");
    fs::copy(fixture("gguf/model.gguf"), work.at("blob")).unwrap();
    work.succeed(&train("run", &["train.max_steps=2", "train.save_every=1"]));
    work.succeed(&["adapters", "convert", "run/adapter", "lora.gguf", "--model", "model"]);
    for (model, words) in [
        ("bin", ["bin/pytorch_model.bin", "found a safetensors file", "rename it"]),
        ("original", ["original", "consolidated.safetensors in place of", "model.safetensors"]),
        ("sentencepiece", ["sentencepiece/tokenizer.json", "it has tokenizer.model", "AutoTokenizer"]),
        ("slow", ["slow/tokenizer.json", "it has vocab.json", "AutoTokenizer"]),
        ("pointer", ["pointer/model.safetensors is a git-lfs pointer", "git lfs pull", "error"]),
        ("page", ["page/tokenizer.json is an HTML page", "download it again", "error"]),
        ("empty-weights", ["empty-weights", "it has no weights", "model.safetensors"]),
        ("meta", ["meta", "authors' own layout", "Hugging Face"]),
        ("hub", ["hub", "the hub's cache", "use hub/snapshots/0a1b"]),
        ("collection", ["collection", "it holds a GGUF file", "use collection/model-q4.gguf"]),
        ("blob", ["blob", "this is a GGUF file", "ln -s blob model.gguf"]),
        ("run", ["run", "this is a run directory", "--model model --adapter run"]),
        ("run/checkpoint-1", ["run/checkpoint-1", "a checkpoint of a run", "--model model --adapter run/checkpoint-1"]),
        ("run/adapter", ["run/adapter", "an adapter directory", "--model model --adapter run/adapter"]),
        ("lora.gguf", ["lora.gguf", "a LoRA adapter in a GGUF file", "medqa adapters convert lora.gguf DIR"]),
        ("model/model.safetensors", ["a safetensors file", "its whole directory", "error"]),
        ("~/model", ["~/model", "the shell did not expand `~`", "$HOME"]),
        ("models/*", ["models/*", "a pattern that matches no file", "error"]),
    ] {
        let logits = ["logits", "--model", model, "--text", "The patient", "--out", "logits"];
        refused_in_folder(&work, &logits, &words);
    }
    assert_eq!(
        work.run(&["logits", "--model", "mlx", "--text", "a", "--out", "l"]).code,
        Some(0),
        "only its name is mlx's"
    );
}

#[test]
fn runs_and_checkpoints_are_taken_as_adapters_and_models() {
    let work = WorkDir::new();
    work.succeed(&train("run", &["train.max_steps=2", "train.save_every=1"]));
    work.succeed(&train_by("bare.toml", "whole", &["method.kind=full", "train.max_steps=2", "train.save_every=1"]));
    let adapter = |path: &str| work.logits(&["--model", "model", "--adapter", path]);
    assert_eq!(adapter("run"), adapter("run/adapter"));
    assert_eq!(adapter("run/checkpoint-1"), adapter("run/checkpoint-1/adapter"));
    assert_ne!(adapter("run"), adapter("run/checkpoint-1"), "the steps must matter");
    let model = |path: &str| work.logits(&["--model", path]);
    assert_eq!(model("whole"), model("whole/model"));
    assert_eq!(model("whole/checkpoint-1"), model("whole/checkpoint-1/model"));
    work.succeed(&["adapters", "combine", "--out", "half", "run=0.5"]);
    work.succeed(&["export", "--model", "model", "--adapter", "run", "--out", "merged"]);
    work.succeed(&["adapters", "convert", "run/checkpoint-1", "lora.gguf", "--model", "model"]);

    work.write("mlx/adapters.safetensors", "");
    work.write("mlx/adapter_config.json", "{\"fine_tune_type\": \"lora\", \"lora_parameters\": {\"rank\": 8}}");
    fs::create_dir(work.at("nothing")).unwrap();
    for (path, words) in [
        ("whole", ["whole", "it trained the whole model", "--model whole/model"]),
        ("model", ["model", "a model in Hugging Face's layout", "given as --model"]),
        ("mlx", ["mlx", "an adapter of mlx-lm", "mlx_lm.fuse --model BASE --adapter-path mlx"]),
        ("lora.gguf", ["lora.gguf", "in a GGUF file", "medqa adapters convert lora.gguf DIR"]),
        ("run/adapter/adapter_model.safetensors", ["a safetensors file", "name the directory", "adapter_config.json"]),
        ("nothing", ["nothing", "expected an adapter directory", "an empty directory"]),
        ("owner/name", ["owner/name", "expected an adapter directory", "found no such directory"]),
    ] {
        refused_in_folder(&work, &["chat", "--model", "model", "--prompt", "Hi", "--adapter", path], &words);
    }
    let both = ["chat", "--model", "model", "--prompt", "Hi", "--adapter", "nowhere", "--adapter", "A=nothing"];
    refused_in_folder(&work, &both, &["nowhere: expected", "; and nothing: expected"]);
}

#[test]
fn a_list_goes_on_behind_an_adapter_that_cannot_be_read() {
    let work = WorkDir::new();
    work.succeed(&train("tree/a", &["train.max_steps=1"]));
    work.succeed(&train("tree/c", &["train.max_steps=1"]));
    work.write("tree/b/adapter_config.json", "{");
    let CommandOutput { code, stdout, stderr } = work.run(&["adapters", "list", "nowhere", "tree", "model"]);
    assert_eq!((code, stderr.as_str()), (Some(2), "error: 3 of 5 cannot be read\n"), "{stdout}");
    let lines: Vec<&str> = stdout.lines().skip(1).collect();
    for (line, words) in lines.iter().zip([
        ["nowhere", "cannot be read: nowhere"],
        ["tree/a/adapter", "LORA"],
        ["tree/b", "cannot be read: tree/b/adapter_config.json"],
        ["tree/c/adapter", "LORA"],
        ["model", "cannot be read: model: expected adapters"],
    ]) {
        assert!(line.starts_with(words[0]) && line.contains(words[1]), "{line}: {words:?}");
    }
    assert_eq!(lines.len(), 5, "{stdout}");
}

#[test]
fn recipes_of_other_tools_and_files_beside_a_recipe_are_named() {
    let work = WorkDir::new();
    work.write("lf.yaml", "model_name_or_path: x\nstage: sft\ncutoff_len: 512\n");
    work.write("ds.json", "{\"train_batch_size\": \"auto\"}");
    work.write("accelerate.yaml", "distributed_type: FSDP\n");
    for (arguments, words) in [
        (
            vec!["train", "lf.yaml"],
            ["lf.yaml: this looks like a file of LLaMA-Factory", "`cutoff_len` is called `data.max_length`"],
        ),
        (vec!["train", "ds.json"], ["ds.json: this looks like a file of DeepSpeed", "--deepspeed FILE"]),
        (vec!["train", "train.jsonl"], ["train.jsonl", "--data train.jsonl"]),
        (vec!["train", "~/run.toml"], ["~/run.toml", "the shell did not expand `~`"]),
        (vec!["train", "run.toml", "--deepspeed", "accelerate.yaml"], ["accelerate.yaml", "--accelerate"]),
        (vec!["train", "run.toml", "--accelerate", "model"], ["model", "a model in Hugging Face's layout"]),
        (train("out", &["data.cutoff_len=512"]), ["--set: `data.cutoff_len`: unknown key", "`data.max_length`"]),
        (train("out", &["data.val_size=0.1"]), ["`data.val_size`", "is called `data.valid` here (a share"]),
        (
            train("out", &["train.load_best_model_at_end=true"]),
            ["unknown key", "is called `train.keep_best` here (\"valid_loss\")"],
        ),
        (train("out", &["cutoff_len=512"]), ["--set: `cutoff_len`", "is called `data.max_length` here"]),
    ] {
        refused_in_folder(&work, &arguments, &words);
    }
}
