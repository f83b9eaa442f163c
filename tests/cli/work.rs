//! A folder with a small random model and data in which the binary runs.

use crate::{
    model::{floats, random, shapes, tensors},
    run::rows,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::Duration,
};
use tempfile::TempDir;

pub(crate) const TEMPLATE: &str = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// A chat template whose generation prompt equals the beginning of an assistant's message, so that conversations can be
/// learned.
pub(crate) const TURNS: &str = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}\
    {% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}";

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// The output of a finished command.
#[derive(Debug)]
pub(crate) struct CommandOutput {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl CommandOutput {
    /// Parses the last line of stdout as JSON.
    pub(crate) fn json(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl From<Output> for CommandOutput {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// A temporary folder with a model in which commands run.
pub(crate) struct WorkDir(pub TempDir);

impl WorkDir {
    /// Creates the folder with `model/`: two blocks with random weights, and the fixture's tokenizer with a chat
    /// template.
    pub(crate) fn new() -> Self {
        let work = Self(tempfile::tempdir().unwrap());
        fs::create_dir(work.at("model")).unwrap();
        let config = json!({
            "model_type": "llama", "vocab_size": 376, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
        });
        work.write("model/config.json", &config.to_string());
        work.weights("model/model.safetensors", &shapes(376, 16));
        fs::copy(fixture("tokenizer/tokenizer.json"), work.at("model/tokenizer.json")).unwrap();
        fs::copy(fixture("tokenizer/tokenizer_config.json"), work.at("model/tokenizer_config.json")).unwrap();
        work.template("model", Some(TEMPLATE));
        work.copy_of_model("turns");
        work.template("turns", Some(TURNS));
        work.write("train.jsonl", &rows(0..6));
        work.write("valid.jsonl", &rows(6..9));
        work.write("run.toml", RECIPE);
        work.write("bare.toml", &RECIPE.replace("r = 4\ntarget_modules = 'all-linear'\n", ""));
        work
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        fs::write(self.at(name), text).unwrap();
    }

    pub(crate) fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Copies `model/` so that a test can change the copy.
    pub(crate) fn copy_of_model(&self, name: &str) {
        fs::create_dir(self.at(name)).unwrap();
        for file in fs::read_dir(self.at("model")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), self.at(name).join(file.file_name())).unwrap();
        }
    }

    pub(crate) fn weights(&self, name: &str, shapes: &[(String, Vec<usize>)]) {
        let bytes: Vec<_> = shapes.iter().map(|(name, shape)| random(name, shape)).collect();
        let tensors = shapes.iter().zip(&bytes);
        let tensors =
            tensors.map(|((name, shape), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        fs::write(self.at(name), safetensors::serialize(tensors, None).unwrap()).unwrap();
    }

    /// Returns a command that runs the binary in this folder, without the user's caches and without the network.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medqa"));
        command.args(arguments).current_dir(self.0.path()).env("HOME", self.at("home")).env("HF_HUB_OFFLINE", "1");
        // Otherwise a software device spends minutes on autotuning kernels.
        command.env("CUBECL_AUTOTUNE_LEVEL", "minimal");
        for name in ["XDG_CACHE_HOME", "HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "MEDQA_CACHE"] {
            command.env_remove(name);
        }
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> CommandOutput {
        self.command(arguments).output().unwrap().into()
    }

    pub(crate) fn json_of_latest_checkpoint(&self, folder: &str) -> Value {
        let names =
            fs::read_dir(self.at(folder)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let steps = names.filter_map(|name| name.strip_prefix("checkpoint-")?.parse::<usize>().ok());
        self.json(&format!("{folder}/checkpoint-{}/state.json", steps.max().unwrap()))
    }

    /// Computes the logits of a text.
    pub(crate) fn logits(&self, model: &[&str]) -> Vec<f32> {
        self.succeed(&[&["logits", "--text", "What is 7?", "--out", "l"], model].concat());
        floats(&tensors(&self.at("l"))["logits"].2)
    }

    /// Parses the lines of a file as JSON objects.
    pub(crate) fn lines(&self, name: &str) -> Vec<Value> {
        self.text(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Replaces a tokenizer's chat template, or removes it.
    pub(crate) fn template(&self, model: &str, template: Option<&str>) {
        let mut config = self.json("model/tokenizer_config.json");
        let fields = config.as_object_mut().unwrap();
        match template {
            Some(template) => fields.insert("chat_template".to_owned(), json!(template)),
            None => fields.remove("chat_template"),
        };
        self.write(&format!("{model}/tokenizer_config.json"), &config.to_string());
    }

    /// Waits until a run has written `lines` lines of metrics.
    pub(crate) fn wait(&self, run: &mut Child, folder: &str, lines: usize) {
        let metrics = self.at(&format!("{folder}/metrics.jsonl"));
        while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < lines {
            if run.try_wait().unwrap().is_some() {
                panic!("{folder} ended early: {:?}", run.stderr.take().map(std::io::read_to_string));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn succeed(&self, arguments: &[&str]) -> CommandOutput {
        let done = self.run(arguments);
        assert_eq!(done.code, Some(0), "{arguments:?}: {done:?}");
        done
    }

    /// Lists every file and folder with its size.
    pub(crate) fn listing(&self) -> BTreeMap<PathBuf, u64> {
        fn walk(folder: &Path, into: &mut BTreeMap<PathBuf, u64>) {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let kind = entry.metadata().unwrap();
                into.insert(entry.path(), if kind.is_dir() { 0 } else { kind.len() });
                if kind.is_dir() {
                    walk(&entry.path(), into);
                }
            }
        }
        let mut all = BTreeMap::new();
        walk(self.0.path(), &mut all);
        all
    }
}

pub(crate) const RECIPE: &str = "[model]\npath = 'model'\n[data]\ntrain = 'train.jsonl'\nvalid = 'valid.jsonl'\n\
    [method]\nr = 4\ntarget_modules = 'all-linear'\n[train]\nbatch_size = 2\nmax_steps = 12\nlearning_rate = 2e-2\nwarmup = 0\n";
