//! The next step for a thing that does not serve its purpose.

use super::{
    Purpose,
    kind::{self, PathKind},
};
use std::path::Path;

/// Says what stands at a path and what to do, or `None` if nothing is there or it is of the expected kind.
pub(crate) fn advice(path: &Path, purpose: Purpose) -> Option<String> {
    let found = PathKind::of(path);
    let at = path.display();
    Some(match found {
        PathKind::Missing | PathKind::Binary => return None,
        PathKind::UnexpandedHome => "the shell did not expand `~` here; write $HOME in its place".to_owned(),
        PathKind::UnmatchedPattern => "this is a pattern that matches no file".to_owned(),
        PathKind::LfsPointer => {
            format!("{at} is {}; run `git lfs pull` in its directory to download it", found.name())
        }
        PathKind::Html => format!(
            "{at} is {}; a browser or a program has saved the page of the file in place of the file, so download it again",
            found.name()
        ),
        _ => return for_purpose(path, found, purpose),
    })
}

fn for_purpose(path: &Path, found: PathKind, purpose: Purpose) -> Option<String> {
    match purpose {
        Purpose::Model => for_model(path, found),
        Purpose::Adapter => for_adapter(path, found),
        Purpose::Tokenizer => for_tokenizer(path, found),
        Purpose::Rows => for_rows(path, found),
        Purpose::Recipe => for_recipe(path, found),
        Purpose::DeepSpeed => match found {
            PathKind::Json | PathKind::Text => None,
            PathKind::Yaml => Some("this is YAML; a file of `accelerate config` is given as --accelerate".to_owned()),
            _ => Some(plain(found)),
        },
        Purpose::Accelerate => match found {
            PathKind::Yaml | PathKind::Text => None,
            PathKind::Json => Some("this is JSON; a ds_config.json is given as --deepspeed".to_owned()),
            _ => Some(plain(found)),
        },
    }
}

fn plain(found: PathKind) -> String {
    format!("this is {}", found.name())
}

/// Returns the base model that an adapter names.
fn base_of(adapter: &Path) -> String {
    let config = kind::json_object(&adapter.join("adapter_config.json"));
    let base = config.get("base_model_name_or_path").and_then(|name| name.as_str());
    base.filter(|name| !name.is_empty()).unwrap_or("BASE").to_owned()
}

fn for_model(path: &Path, found: PathKind) -> Option<String> {
    let at = path.display();
    let name = found.name();
    let next = match found {
        PathKind::Model => return incomplete_model(path),
        PathKind::Gguf if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) => return None,
        PathKind::Gguf => format!("give it a name that ends in .gguf, such as by `ln -s {at} model.gguf`"),
        PathKind::Run | PathKind::RunCheckpoint => {
            format!("use --model {} --adapter {at}", base_of(&path.join("adapter")))
        }
        PathKind::Adapter => format!("use --model {} --adapter {at}", base_of(path)),
        PathKind::GgufAdapter => gguf_adapter(path),
        PathKind::MlxAdapter => mlx_adapter(path),
        PathKind::MlxQuantizedModel => {
            format!("write its weights out by `mlx_lm.convert --hf-path {at} --mlx-path DIR --dequantize`, and use DIR")
        }
        PathKind::OriginalModel => original_weights(),
        PathKind::HubCache => format!("use {}", kind::hub_snapshot(path)?.display()),
        PathKind::Safetensors | PathKind::PytorchFile => {
            "a model is its whole directory, with config.json and tokenizer.json".to_owned()
        }
        PathKind::Directory => {
            let inside = kind::names(path).into_iter().find(|name| name.ends_with(".gguf"))?;
            format!("it holds a GGUF file: use {}", path.join(inside).display())
        }
        _ => return Some(plain(found)),
    };
    Some(format!("this is {name}; {next}"))
}

fn original_weights() -> String {
    "its weights have their authors' names, so use the same model in Hugging Face's layout, with config.json, \
     model.safetensors and tokenizer.json, which most repositories have too"
        .to_owned()
}

fn gguf_adapter(path: &Path) -> String {
    format!("convert it by `medqa adapters convert {} DIR --model BASE`, and use --adapter DIR", path.display())
}

fn mlx_adapter(path: &Path) -> String {
    let at = path.display();
    format!("merge it by `mlx_lm.fuse --model BASE --adapter-path {at} --save-path DIR`, and use --model DIR")
}

/// Says what a directory with config.json lacks.
fn incomplete_model(path: &Path) -> Option<String> {
    let names = kind::names(path);
    let weights: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    let parts = weights.iter().map(|name| name.as_str()).chain(["config.json"]);
    for part in parts.map(|name| path.join(name)) {
        if matches!(PathKind::of(&part), PathKind::LfsPointer | PathKind::Html) {
            return advice(&part, Purpose::Model);
        }
    }
    let has = |start: &str, end: &str| names.iter().find(|name| name.starts_with(start) && name.ends_with(end));
    if has("model", ".safetensors").or_else(|| has("pytorch_model", ".bin")).is_some() {
        return None;
    }
    if let Some(original) = has("consolidated", "") {
        return Some(format!("it has {original} in place of model.safetensors; {}", original_weights()));
    }
    Some("it has no weights: expected model.safetensors, or its parts with model.safetensors.index.json".to_owned())
}

/// Returns the command that reads a tokenizer with transformers and writes it back in today's files.
fn resave_tokenizer(path: &Path) -> String {
    let at = path.display();
    format!(
        "`python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{at}').save_pretrained('{at}')\"`"
    )
}

fn for_adapter(path: &Path, found: PathKind) -> Option<String> {
    let at = path.display();
    let name = found.name();
    let next = match found {
        PathKind::Adapter => return None,
        PathKind::Run | PathKind::RunCheckpoint if path.join("model").is_dir() => {
            format!("it trained the whole model: use --model {}", path.join("model").display())
        }
        PathKind::Run => match newest_checkpoint(path) {
            Some(checkpoint) => format!("it has no adapter yet; a checkpoint is {}", path.join(checkpoint).display()),
            None => "it has neither an adapter nor a checkpoint yet".to_owned(),
        },
        PathKind::RunCheckpoint => format!("it is in shards; `medqa consolidate {at} --out DIR` merges them"),
        PathKind::Model | PathKind::Gguf => "it is given as --model".to_owned(),
        PathKind::GgufAdapter => gguf_adapter(path),
        PathKind::MlxAdapter => mlx_adapter(path),
        PathKind::Safetensors | PathKind::PytorchFile | PathKind::Json => {
            "name the directory that holds it, with adapter_config.json".to_owned()
        }
        PathKind::Directory => "it has no adapter_config.json; `medqa adapters list` finds adapters in it".to_owned(),
        _ => return Some(plain(found)),
    };
    Some(format!("this is {name}; {next}"))
}

/// Returns the name of the checkpoint with the most steps in the directory of a run.
fn newest_checkpoint(run: &Path) -> Option<String> {
    let steps = |name: &String| name.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    kind::names(run).into_iter().filter(|name| steps(name).is_some()).max_by_key(steps)
}

fn for_tokenizer(path: &Path, found: PathKind) -> Option<String> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match found {
        PathKind::SentencePiece => Some(format!(
            "{} is {}; write tokenizer.json by {}",
            path.display(),
            found.name(),
            resave_tokenizer(parent)
        )),
        PathKind::Json => Some(format!("{} is a file; name its directory, {}", path.display(), parent.display())),
        _ if path.is_dir() => {
            let file = path.join("tokenizer.json");
            if file.exists() {
                return matches!(PathKind::of(&file), PathKind::LfsPointer | PathKind::Html)
                    .then(|| advice(&file, Purpose::Tokenizer))
                    .flatten();
            }
            let older = ["tokenizer.model", "vocab.json"].into_iter().find(|name| path.join(name).exists());
            Some(match older {
                Some(name) => {
                    format!("it has {name} in place of tokenizer.json; write that by {}", resave_tokenizer(path))
                }
                None => format!("{} is {} without tokenizer.json", path.display(), found.name()),
            })
        }
        PathKind::Gguf => None,
        _ => Some(plain(found)),
    }
}

fn for_rows(path: &Path, found: PathKind) -> Option<String> {
    let name = found.name();
    let next = match found {
        PathKind::Parquet | PathKind::Gzip | PathKind::Zstd | PathKind::Json | PathKind::JsonLines => return None,
        PathKind::EmptyFile | PathKind::Text => return None,
        PathKind::Csv => "give it a name that ends in .csv if it has commas, or in .tsv if it has tabs".to_owned(),
        PathKind::Utf16 => "convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW".to_owned(),
        PathKind::Zip => "unpack it first".to_owned(),
        PathKind::Arrow => "write it as Parquet: datasets.Dataset.from_file(FILE).to_parquet(NEW)".to_owned(),
        PathKind::Gguf | PathKind::Safetensors | PathKind::PytorchFile => "it holds weights, not rows".to_owned(),
        PathKind::Directory => match kind::names(path).into_iter().find(|name| is_data_file(name)) {
            Some(file) => format!("name a file in it, such as {}", path.join(file).display()),
            None => "name a file with rows".to_owned(),
        },
        _ if path.is_dir() => "name a file with rows".to_owned(),
        _ => return Some(plain(found)),
    };
    Some(format!("this is {name}; {next}"))
}

fn is_data_file(name: &str) -> bool {
    [".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz"].iter().any(|ending| name.ends_with(ending))
}

fn for_recipe(path: &Path, found: PathKind) -> Option<String> {
    let name = found.name();
    let next = match found {
        PathKind::Text | PathKind::Yaml | PathKind::Json | PathKind::EmptyFile => return None,
        PathKind::Run => format!("its recipe is {}", path.join("recipe.toml").display()),
        PathKind::JsonLines | PathKind::Parquet | PathKind::Csv => {
            format!("train on it without a recipe: medqa train --model MODEL --data {}", path.display())
        }
        PathKind::Utf16 => "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW".to_owned(),
        _ if path.is_dir() => match kind::names(path).into_iter().find(|name| name.ends_with(".toml")) {
            Some(file) => format!("name a file in it, such as {}", path.join(file).display()),
            None => "a recipe is a TOML file".to_owned(),
        },
        _ => "a recipe is a TOML file".to_owned(),
    };
    Some(format!("this is {name}; {next}"))
}
