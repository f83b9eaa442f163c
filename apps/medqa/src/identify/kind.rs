//! The kind of thing at a path, by its content first and by its name where the content leaves it open.

use burn_llama::checkpoint::gguf::Gguf;
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// The kind of thing at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathKind {
    Missing,
    /// A path that begins with `~`, which a shell would have replaced.
    UnexpandedHome,
    /// A path with `*` that no file has, which a shell would have replaced.
    UnmatchedPattern,
    Run,
    RunCheckpoint,
    Adapter,
    MlxAdapter,
    Model,
    MlxQuantizedModel,
    /// The authors' own layout, of Meta or Mistral.
    OriginalModel,
    HubCache,
    EmptyDirectory,
    Directory,
    Gguf,
    GgufAdapter,
    Safetensors,
    PytorchFile,
    SentencePiece,
    Gzip,
    Zstd,
    Zip,
    Parquet,
    Arrow,
    LfsPointer,
    Html,
    EmptyFile,
    Utf16,
    JsonLines,
    Json,
    Csv,
    Yaml,
    Text,
    Binary,
}

impl PathKind {
    /// Finds the kind of thing at `path`.
    pub(super) fn of(path: &Path) -> Self {
        if path.is_dir() {
            return directory(path);
        }
        if !path.exists() {
            let text = path.to_string_lossy();
            return match text.starts_with('~') {
                true => Self::UnexpandedHome,
                false if text.contains(['*', '?']) => Self::UnmatchedPattern,
                false => Self::Missing,
            };
        }
        // A pipe would lose what is read here, or wait for ever.
        if !path.is_file() {
            return Self::Binary;
        }
        let mut head = Vec::new();
        let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head));
        match read {
            Ok(_) => binary(path, &head).unwrap_or_else(|| text(path, &head)),
            Err(_) => Self::Binary,
        }
    }

    /// Returns the kind as a noun with its article.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Missing | Self::UnexpandedHome | Self::UnmatchedPattern => "no file",
            Self::Run => "a run directory",
            Self::RunCheckpoint => "a checkpoint of a run",
            Self::Adapter => "an adapter directory",
            Self::MlxAdapter => "an adapter of mlx-lm",
            Self::Model => "a model in Hugging Face's layout",
            Self::MlxQuantizedModel => "a model that mlx-lm has quantized",
            Self::OriginalModel => "a model in its authors' own layout",
            Self::HubCache => "a folder of the hub's cache",
            Self::EmptyDirectory => "an empty directory",
            Self::Directory => "a directory",
            Self::Gguf => "a GGUF file",
            Self::GgufAdapter => "a LoRA adapter in a GGUF file",
            Self::Safetensors => "a safetensors file",
            Self::PytorchFile => "a file of torch.save",
            Self::SentencePiece => "a SentencePiece tokenizer",
            Self::Gzip => "a file that gzip has compressed",
            Self::Zstd => "a file that zstd has compressed",
            Self::Zip => "a zip archive",
            Self::Parquet => "a Parquet file",
            Self::Arrow => "an Arrow file",
            Self::LfsPointer => "a git-lfs pointer, which stands for the file",
            Self::Html => "an HTML page",
            Self::EmptyFile => "an empty file",
            Self::Utf16 => "a text in UTF-16",
            Self::JsonLines => "JSON, one object per line",
            Self::Json => "a JSON file",
            Self::Csv => "CSV",
            Self::Yaml => "YAML",
            Self::Text => "a text file",
            Self::Binary => "a file of another kind",
        }
    }
}

/// Returns the names in a directory, in order.
pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = directory.read_dir().into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Returns the JSON object in a file of a directory; an empty one if there is none.
pub(super) fn json_object(file: &Path) -> Map<String, Value> {
    let text = std::fs::read(file).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Returns a snapshot in a folder of the hub's cache.
pub(super) fn hub_snapshot(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.join("snapshots");
    names(&snapshots).iter().map(|name| snapshots.join(name)).find(|snapshot| snapshot.join("config.json").exists())
}

fn directory(path: &Path) -> PathKind {
    let has = |name: &str| path.join(name).exists();
    let names = names(path);
    if has("recipe.toml") && ["metrics.jsonl", "summary.json", "adapter", "model"].into_iter().any(has) {
        PathKind::Run
    } else if has("state.json") && has("training.safetensors") {
        PathKind::RunCheckpoint
    } else if has("adapter_config.json") {
        let config = json_object(&path.join("adapter_config.json"));
        let mlx = !config.contains_key("peft_type") && (has("adapters.safetensors") || has("adapters.npz"));
        if mlx { PathKind::MlxAdapter } else { PathKind::Adapter }
    } else if has("config.json") {
        let config = json_object(&path.join("config.json"));
        let quantized = config.get("quantization").is_some_and(|settings| settings.get("group_size").is_some());
        if quantized { PathKind::MlxQuantizedModel } else { PathKind::Model }
    } else if names.iter().any(|name| name.starts_with("consolidated")) {
        PathKind::OriginalModel
    } else if hub_snapshot(path).is_some() {
        PathKind::HubCache
    } else if names.is_empty() {
        PathKind::EmptyDirectory
    } else {
        PathKind::Directory
    }
}

/// Recognizes a file that is no text by its first bytes.
fn binary(path: &Path, head: &[u8]) -> Option<PathKind> {
    let contains = |words: &[u8]| head.windows(words.len()).any(|window| window == words);
    let header_length = head.first_chunk().map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes));
    Some(match head {
        [b'G', b'G', b'U', b'F', ..] => match Gguf::open(path) {
            Ok(file) if file.metadata("general.type").and_then(|kind| kind.as_str()) == Some("adapter") => {
                PathKind::GgufAdapter
            }
            _ => PathKind::Gguf,
        },
        [b'P', b'A', b'R', b'1', ..] => PathKind::Parquet,
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] | [0xff, 0xff, 0xff, 0xff, ..] => PathKind::Arrow,
        [0x1f, 0x8b, ..] => PathKind::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => PathKind::Zstd,
        [b'P', b'K', 3, 4, ..] if contains(b"/data.pkl") => PathKind::PytorchFile,
        [b'P', b'K', 3, 4, ..] => PathKind::Zip,
        [0x80, 2..=5, ..] => PathKind::PytorchFile,
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => PathKind::Utf16,
        [_, _, _, _, _, _, _, _, b'{', ..] if header_length < 1 << 27 => PathKind::Safetensors,
        [b'\n', _, b'\n', ..] if contains(b"<unk>") || path.ends_with("tokenizer.model") => PathKind::SentencePiece,
        [_, 0, _, 0, ..] | [0, _, 0, _, ..] => PathKind::Utf16,
        _ if head.contains(&0) => PathKind::Binary,
        _ => return None,
    })
}

fn text(path: &Path, head: &[u8]) -> PathKind {
    let text = String::from_utf8_lossy(head);
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let named = |endings: &[&str]| {
        path.extension().is_some_and(|found| endings.iter().any(|ending| found.eq_ignore_ascii_case(ending)))
    };
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).take(2).collect();
    let html = ["<!doctype html", "<html"];
    let start = text.get(..14).unwrap_or(text).to_ascii_lowercase();
    if text.is_empty() {
        PathKind::EmptyFile
    } else if text.starts_with("version https://git-lfs.github.com/spec/") {
        PathKind::LfsPointer
    } else if html.iter().any(|tag| start.starts_with(tag)) {
        PathKind::Html
    } else if text.starts_with('{') && lines.first().is_some_and(|line| is_object(line)) && lines.len() > 1 {
        PathKind::JsonLines
    } else if text.starts_with('{') || text.starts_with('[') && !named(&["toml"]) {
        PathKind::Json
    } else if named(&["csv", "tsv"]) || same_commas(&lines) {
        PathKind::Csv
    } else if named(&["yaml", "yml"]) {
        PathKind::Yaml
    } else {
        PathKind::Text
    }
}

fn is_object(line: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(line).is_ok()
}

/// Returns whether a header and a first record have as many commas or tabs.
fn same_commas(lines: &[&str]) -> bool {
    let count = |line: &str, delimiter: char| line.matches(delimiter).count();
    let [header, record] = lines else { return false };
    let plain = !header.contains(['{', '=', ':', '#']) && !record.starts_with('{');
    plain && [',', '\t'].iter().any(|&mark| count(header, mark) > 0 && count(header, mark) == count(record, mark))
}
