//! The command line as a user meets it: every verb on a small random model, and every mistake as one line.

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;

const TEMPLATE: &str = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// A template that opens an answer as it writes one, so that conversations can be learned.
const TURNS: &str = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}\
    {% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// What a command left behind.
#[derive(Debug)]
struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Done {
    /// The last line of stdout as JSON.
    fn json(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A folder with a model in it, in which commands run.
struct Work(TempDir);

impl Work {
    /// `model/`: two blocks with random weights and the fixture's tokenizer, with a chat template.
    fn new() -> Self {
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
        work.write("model/tokenizer_config.json", &tokenizer_config(TEMPLATE));
        work.copy_of_model("turns");
        work.write("turns/tokenizer_config.json", &tokenizer_config(TURNS));
        work.write("train.jsonl", &rows(0..6));
        work.write("valid.jsonl", &rows(6..9));
        work.write("run.toml", RECIPE);
        work
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        fs::write(self.at(name), text).unwrap();
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A copy of `model/`, to be spoiled.
    fn copy_of_model(&self, name: &str) {
        fs::create_dir(self.at(name)).unwrap();
        for file in fs::read_dir(self.at("model")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), self.at(name).join(file.file_name())).unwrap();
        }
    }

    fn weights(&self, name: &str, shapes: &[(String, Vec<usize>)]) {
        let bytes: Vec<_> = shapes.iter().map(|(name, shape)| random(name, shape)).collect();
        let tensors = shapes.iter().zip(&bytes);
        let tensors =
            tensors.map(|((name, shape), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        fs::write(self.at(name), safetensors::serialize(tensors, None).unwrap()).unwrap();
    }

    /// The binary in this folder, far from the user's caches and from the network.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medqa"));
        command.args(arguments).current_dir(self.0.path()).env("HOME", self.at("home")).env("HF_HUB_OFFLINE", "1");
        // A software device measures kernels for minutes otherwise.
        command.env("CUBECL_AUTOTUNE_LEVEL", "minimal");
        for name in ["XDG_CACHE_HOME", "HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "MEDQA_CACHE"] {
            command.env_remove(name);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Done {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Done { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    fn json_of_latest_checkpoint(&self, folder: &str) -> Value {
        let names =
            fs::read_dir(self.at(folder)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let steps = names.filter_map(|name| name.strip_prefix("checkpoint-")?.parse::<usize>().ok());
        self.json(&format!("{folder}/checkpoint-{}/state.json", steps.max().unwrap()))
    }

    fn succeed(&self, arguments: &[&str]) -> Done {
        let done = self.run(arguments);
        assert_eq!(done.code, Some(0), "{arguments:?}: {done:?}");
        done
    }

    /// Every file and folder with its size.
    fn listing(&self) -> BTreeMap<PathBuf, u64> {
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

const RECIPE: &str = "[model]\npath = 'model'\n[data]\ntrain = 'train.jsonl'\nvalid = 'valid.jsonl'\n\
    [method]\nr = 4\ntarget_modules = 'all-linear'\n[train]\nbatch_size = 2\nmax_steps = 12\nlearning_rate = 2e-2\nwarmup = 0\n";

fn tokenizer_config(template: &str) -> String {
    let mut config: Value =
        serde_json::from_slice(&fs::read(fixture("tokenizer/tokenizer_config.json")).unwrap()).unwrap();
    config["chat_template"] = json!(template);
    config.to_string()
}

/// Questions and answers that look alike, so that a small model learns something within a few steps.
fn rows(range: std::ops::Range<usize>) -> String {
    range
        .map(|i| json!({"question": format!("What is {i}?"), "answer": "It is a number."}).to_string() + "\n")
        .collect()
}

/// Conversations of two questions, in OpenAI's layout.
fn conversations(range: std::ops::Range<usize>) -> String {
    let row = |i: usize| {
        let say = |role: &str, content: &str| json!({"role": role, "content": content});
        let (first, then) = (format!("What is {i}?"), format!("And {}?", i + 1));
        let answer = say("assistant", "It is a number.");
        json!({"messages": [say("user", &first), answer.clone(), say("user", &then), answer]}).to_string() + "\n"
    };
    range.map(row).collect()
}

/// The parameters of a Llama of two blocks, two heads and one key head, untied.
fn shapes(vocabulary: usize, hidden: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![vocabulary, hidden]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 2, hidden]),
            ("self_attn.v_proj", vec![hidden / 2, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![24, hidden]),
            ("mlp.up_proj", vec![24, hidden]),
            ("mlp.down_proj", vec![hidden, 24]),
        ] {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    all
}

/// A random tensor's bytes in f32; norms are ones.
fn random(name: &str, shape: &[usize]) -> Vec<u8> {
    let mut state = name.bytes().fold(1u32, |state, byte| state.wrapping_mul(31).wrapping_add(byte.into()));
    let value = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if name.contains("norm") { 1.0 } else { (state >> 8) as f32 / (1 << 24) as f32 - 0.5 }
    };
    (0..shape.iter().product()).map(value).flat_map(f32::to_le_bytes).collect()
}

/// A GGUF file of the same kind of model: the fixture's vocabulary with the sizes, a chat template and tensors.
fn gguf() -> Vec<u8> {
    let vocabulary = fs::read(fixture("gguf/vocab-smollm.gguf")).unwrap();
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let value = |key: &str, kind: u32, value: &[u8]| [&string(key), &kind.to_le_bytes()[..], value].concat();
    let mut metadata: Vec<Vec<u8>> = [
        ("embedding_length", 16u32),
        ("block_count", 2),
        ("feed_forward_length", 24),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ]
    .map(|(key, size)| value(&format!("llama.{key}"), 4, &size.to_le_bytes()))
    .into();
    metadata.push(value("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes()));
    metadata.push(value("tokenizer.chat_template", 8, &string(TEMPLATE)));
    let (mut table, mut tensors) = (Vec::new(), Vec::new());
    let shapes = shapes(630, 16);
    for (key, shape) in &shapes {
        table.extend(string(&burn_llama::checkpoint::gguf::gguf_name(key).unwrap()));
        table.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| table.extend((*size as u64).to_le_bytes()));
        table.extend(0u32.to_le_bytes());
        table.extend((tensors.len() as u64).to_le_bytes());
        tensors.extend(random(key, shape));
        tensors.resize(tensors.len().next_multiple_of(32), 0);
    }
    // The vocabulary's last value is a text, and what follows it is padding.
    let end = vocabulary.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let counts =
        [shapes.len() as u64, u64::from_le_bytes(vocabulary[16..24].try_into().unwrap()) + metadata.len() as u64];
    let counts = counts.map(u64::to_le_bytes).concat();
    let mut file = [&vocabulary[..8], &counts, &metadata.concat(), &vocabulary[24..end], &table].concat();
    file.resize(file.len().next_multiple_of(32), 0);
    [file, tensors].concat()
}

/// The tensors of a safetensors file: type, shape and bytes by name.
fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor =
        |(name, view): (String, TensorView)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    file.tensors().into_iter().map(tensor).collect()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

/// Checks a run folder and returns its summary.
fn run_folder(work: &Work, folder: &str, steps: usize, trained: &[&str]) -> Value {
    for name in ["recipe.toml", "metrics.jsonl", "summary.json"].iter().chain(trained) {
        assert!(work.at(folder).join(name).is_file(), "{folder}/{name}");
    }
    assert!(work.listing().keys().all(|path| path.extension().is_none_or(|end| end != "part")));
    let metrics = work.text(&format!("{folder}/metrics.jsonl"));
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (evaluations, taken): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.get("valid_loss").is_some());
    assert_eq!(taken.len(), steps, "{metrics}");
    assert!(evaluations.len() >= 2, "{metrics}");
    for (index, line) in taken.iter().enumerate() {
        assert_eq!(line["step"], index + 1);
        for key in ["epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "tokens_per_second"] {
            assert!(number(line, key) > 0.0, "{key}: {line}");
        }
        assert!(number(line, "elapsed_seconds") >= 0.0 && number(line, "peak_rss_bytes") >= 0.0, "{line}");
    }
    let (first, last) = (number(taken[0], "loss"), number(taken[steps - 1], "loss"));
    assert!(last < first - 0.1, "the loss went from {first} to {last}");
    let summary = work.json(&format!("{folder}/summary.json"));
    let (before, after) = (number(&summary, "valid_loss_before"), number(&summary, "valid_loss_after"));
    assert!(after < before - 0.1, "the validation loss went from {before} to {after}");
    for key in ["steps", "seconds", "tokens", "tokens_per_second", "trainable_parameters"] {
        assert!(number(&summary, key) > 0.0, "{key}: {summary}");
    }
    summary
}

/// Evaluation, chat and logits of what a run made.
fn usable(work: &Work, model: &[&str], after: f64) {
    let with = |verb: &[&str]| work.succeed(&[verb, model].concat());
    let loss = with(&["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--batch-size", "2"]).json();
    assert!((number(&loss, "loss") - after).abs() < 1e-4, "{loss} against {after}");
    assert_eq!((&loss["task"], &loss["rows"]), (&json!("qa-loss"), &json!(3)));
    assert!(
        (number(&loss, "perplexity") - after.exp()).abs() < 1e-2 * after.exp() && number(&loss, "target_tokens") > 0.0
    );

    let chat = ["chat", "--prompt", "What is 4?", "--temperature", "0", "--max-new-tokens", "12"];
    let (first, again) = (with(&chat), with(&chat));
    assert_eq!(first.stdout, again.stdout);
    assert!(first.stdout.ends_with('\n') && first.stdout.trim() != "", "{first:?}");
    assert_eq!(first.stderr, "", "the answer stands alone");

    with(&["logits", "--text", "What is 4?", "--out", "logits.safetensors"]);
    let found = tensors(&work.at("logits.safetensors"));
    let (kind, shape, bytes) = &found["ids"];
    assert_eq!((found.len(), *kind, shape.len()), (2, Dtype::I64, 1));
    assert_eq!(bytes.len(), shape[0] * 8);
    let (kind, rows, bytes) = &found["logits"];
    assert_eq!((*kind, rows[0]), (Dtype::F32, shape[0]));
    let finite = bytes.chunks_exact(4).all(|b| f32::from_le_bytes(b.try_into().unwrap()).is_finite());
    assert!(finite && rows[1] >= 373, "{rows:?}");
}

#[test]
fn lora_from_a_recipe_to_chat() {
    let work = Work::new();
    let sets = ["--set", "train.max_steps=10", "--set", "method.dropout=0.05", "--set", "train.eval_every=4"];
    let done =
        work.succeed(&[&["train", "run.toml", "--dir", "out", "--set", "train.save_every=3"], &sets[..]].concat());
    let trained = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"];
    let summary = run_folder(&work, "out", 10, &trained);
    assert_eq!(done.json(), summary);
    assert!(!work.at("out/model").exists());
    // Two checkpoints are kept, and the end is no checkpoint.
    assert!(!work.at("out/checkpoint-3").exists() && work.at("out/checkpoint-9/adapter/adapter_config.json").is_file());
    assert!(work.at("out/checkpoint-6").is_dir() && !work.at("out/checkpoint-10").exists());
    assert_eq!(work.text("out/metrics.jsonl").matches("valid_loss").count(), 4);
    let resolved = work.text("out/recipe.toml");
    for line in ["max_steps = 10", "dropout = 0.05", "seed = 42", "epsilon = "] {
        assert!(resolved.contains(line), "{resolved}");
    }
    usable(&work, &["--model", "model", "--adapter", "out/adapter"], number(&summary, "valid_loss_after"));

    // What was written is a recipe: it makes the same adapter again, bit for bit.
    work.succeed(&["train", "out/recipe.toml", "--dir", "again"]);
    let weights = |folder: &str| tensors(&work.at(folder).join("adapter/adapter_model.safetensors"));
    assert_eq!(weights("again"), weights("out"));
    // And goes on from where an adapter is.
    let sets = ["--set", "method.init=out/adapter", "--set", "train.max_steps=2", "--set", "train.learning_rate=1e-4"];
    let further = work.succeed(&[&["train", "run.toml", "--dir", "further"], &sets[..]].concat()).json();
    let gap = number(&further, "valid_loss_before") - number(&summary, "valid_loss_after");
    assert!(gap.abs() < 1e-4, "{gap}");
}

/// Three adapters of two kinds and one run each.
fn with_adapters() -> Work {
    let work = Work::new();
    let runs: [(&str, &[&str]); 4] = [
        ("one", &["method.r=4", "train.seed=1"]),
        ("two", &["method.r=2", "method.target_modules=['q_proj', 'o_proj']", "train.seed=2"]),
        ("three", &["method.kind=p-tuning-v2", "method.num_virtual_tokens=3", "train.learning_rate=1e-1"]),
        ("four", &["method.kind=ia3", "train.learning_rate=1e-1"]),
    ];
    for (name, sets) in runs {
        let plain = work.text("run.toml").replace("r = 4\n", "").replace("target_modules = 'all-linear'\n", "");
        work.write("plain.toml", &plain);
        let recipe = if name == "one" { "run.toml" } else { "plain.toml" };
        let folder = format!("runs/{name}");
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        work.succeed(&[&["train", recipe, "--dir", &folder], &sets[..]].concat());
    }
    work
}

#[test]
fn eval_compares_adapters_with_the_base_and_measures_forgetting() {
    let work = with_adapters();
    let eval = ["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--model", "model"];
    let run = |rest: &[&str]| work.succeed(&[&eval[..], rest].concat());
    let adapters =
        ["--adapter", "runs/one/adapter", "--adapter", "B=runs/two/adapter", "--adapter", "runs/three/adapter"];
    let done = run(&adapters);
    let (all, base) = (done.json(), run(&[]).json());
    assert_eq!(all["base"], base, "the base is the model without adapters");
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(lines.len(), 6, "{done:?}");
    for (line, name) in lines[1..5].iter().zip(["base", "one", "B", "three"]) {
        assert!(line.starts_with(name) && line.split_whitespace().count() == 4, "{line}");
    }
    for (name, folder) in [("one", "one"), ("B", "two"), ("three", "three")] {
        let alone = run(&["--adapter", &format!("runs/{folder}/adapter")]).json();
        assert_eq!(all["adapters"][name], alone, "{name}: the others beside it change nothing");
        let neutral = &alone["neutral_loss"];
        let (before, after) = (number(neutral, "base"), number(neutral, "adapter"));
        assert_eq!(before, number(&base["neutral_loss"], "base"));
        assert!((number(neutral, "rise") - (after - before)).abs() < 1e-9 && after != before, "{neutral}");
        assert!(number(neutral, "tokens") > 200.0, "{neutral}");
        assert!(number(&alone, "loss") < number(&base, "loss") - 0.1);
    }
}

#[test]
fn chat_switches_adapters_in_the_middle_of_a_conversation() {
    let work = with_adapters();
    let answer = |adapter: &[&str]| {
        let chat = ["chat", "--model", "model", "--prompt", "What is 7?", "--max-new-tokens", "12"];
        work.succeed(&[&chat[..], adapter].concat()).stdout
    };
    let single =
        [answer(&["--adapter", "runs/one/adapter"]), answer(&["--adapter", "runs/three/adapter"]), answer(&[])];
    let mut command = work.command(&["chat", "--model", "model", "--max-new-tokens", "12"]);
    command.args(["--adapter", "runs/one/adapter", "--adapter", "prefix=runs/three/adapter"]);
    // Where a terminal can do nothing, answers must still be all that is printed.
    command.env("TERM", "dumb");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = "What is 7?\n/new\n/adapter prefix\nWhat is 7?\n/new\n/adapter nothing\n/adapter base\nWhat is 7?\n/adapter\n/quit\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}");
    assert!(said.contains(&single.concat()), "{said:?} against {single:?}");
    assert!(single[0] != single[2] && single[1] != single[2], "the adapters must matter");
    assert!(told.contains("adapters: base one [prefix]") && told.contains("adapters: [base] one prefix"), "{told}");
    assert!(told.contains("adapter `nothing` is not on the model, which has one, prefix"), "{told}");
}

#[test]
fn adapters_are_listed_combined_merged_and_converted() {
    let work = with_adapters();
    let listed = work.succeed(&["adapters", "list", "runs"]).stdout;
    for words in [
        ["runs/one/adapter", "LORA", "rank 4", "for model"],
        ["runs/three/adapter", "PREFIX_TUNING", "virtual tokens 3", " 96 "],
        ["runs/four/adapter", "IA3", "on k_proj v_proj down_proj", ""],
    ] {
        let line = listed.lines().find(|line| line.starts_with(words[0])).unwrap_or_else(|| panic!("{listed}"));
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
    let logits = |rest: &[&str]| {
        work.succeed(&[&["logits", "--text", "What is 7?", "--out", "l"], rest].concat());
        let bytes = tensors(&work.at("l"))["logits"].2.clone();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
    };
    let close = |a: &[f32], b: &[f32]| {
        let difference = a.iter().zip(b).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(a.len() == b.len() && difference < 1e-4, "{difference}");
    };

    // One of both, and a model with both merged.
    let parts = ["runs/one/adapter=1", "runs/two/adapter=1"];
    work.succeed(&[&["adapters", "combine", "--out", "sum"], &parts[..]].concat());
    let both = ["--adapter", "runs/one/adapter", "--adapter", "runs/two/adapter"];
    work.succeed(&[&["adapters", "merge", "--model", "model", "--out", "merged"], &both[..]].concat());
    let sum = logits(&["--model", "model", "--adapter", "sum"]);
    close(&sum, &logits(&["--model", "merged"]));
    assert_eq!(work.json("sum/adapter_config.json")["r"], 6);
    let rank = ["adapters", "combine", "--how", "svd", "--rank", "6", "--out", "svd"];
    work.succeed(&[&rank[..], &parts[..]].concat());
    close(&sum, &logits(&["--model", "model", "--adapter", "svd"]));
    let one = ["adapters", "combine", "--out", "negative", "runs/one/adapter=-1"];
    work.succeed(&one);
    work.succeed(&["adapters", "combine", "--out", "nothing", "negative=1", "runs/one/adapter=1"]);
    close(&logits(&["--model", "model", "--adapter", "nothing"]), &logits(&["--model", "model"]));

    // llama.cpp's file and back.
    work.succeed(&["adapters", "convert", "runs/one/adapter", "one.gguf", "--model", "model"]);
    work.succeed(&["adapters", "convert", "one.gguf", "back", "--model", "model"]);
    let weights = |folder: &str| tensors(&work.at(folder).join("adapter_model.safetensors"));
    assert_eq!(weights("back"), weights("runs/one/adapter"));
    close(
        &logits(&["--model", "model", "--adapter", "back"]),
        &logits(&["--model", "model", "--adapter", "runs/one/adapter"]),
    );

    // PiSSA's adapter and what it started from, as plain LoRA.
    let pissa = ["pissa", "pissa_initial", "pissa_converted"].map(|name| fixture(&format!("family/{name}")));
    let [trained, initial, converted] = pissa.each_ref().map(|path| path.to_str().unwrap());
    work.succeed(&["adapters", "convert", trained, "plain", "--initial", initial]);
    assert_eq!(work.json("plain/adapter_config.json")["init_lora_weights"], true);
    let theirs = tensors(&Path::new(converted).join("adapter_model.safetensors"));
    let floats =
        |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    for (key, (kind, shape, bytes)) in weights("plain") {
        let (their_kind, their_shape, their_bytes) = &theirs[&key];
        assert_eq!((kind, &shape), (*their_kind, their_shape), "{key}");
        close(&floats(&bytes), &floats(their_bytes));
    }
    assert_eq!(weights("plain").len(), theirs.len());

    // What a newer PEFT says is named.
    for name in ["runs/one/adapter", "runs/three/adapter", "runs/four/adapter"] {
        let file = format!("{name}/adapter_config.json");
        let mut config = work.json(&file);
        config["from_the_future"] = json!(1);
        work.write(&file, &config.to_string());
        let done = work.succeed(&["logits", "--model", "model", "--text", "a", "--out", "l", "--adapter", name]);
        let warning = format!("warning: {name}: fields not known here are passed over: from_the_future");
        assert!(done.stderr.lines().any(|line| line == warning), "{done:?}");
    }

    let table: &[(&[&str], &[&str])] = &[
        (&["adapters", "list", "model"], &["model", "expected adapters", "found none"]),
        (&["adapters", "list", "nowhere"], &["nowhere", "cannot be read"]),
        (&["adapters", "combine", "--out", "x", "runs/one/adapter"], &["expected DIR=WEIGHT", "0.7"]),
        (&["adapters", "combine", "--out", "sum", "runs/one/adapter=1"], &["sum", "expected a new folder"]),
        (
            &["adapters", "combine", "--how", "linear", "--out", "x", "runs/one/adapter=1", "runs/two/adapter=1"],
            &["same r value", "[4, 2]", "use cat or svd"],
        ),
        (&["adapters", "combine", "--rank", "3", "--out", "x", "sum=1"], &["--rank", "svd"]),
        (&["adapters", "combine", "--out", "x", "sum=1", "runs/three/adapter=1"], &["three/adapter", "LORA"]),
        (&["adapters", "merge", "--model", "model", "--out", "x"], &["--adapter", "at least one"]),
        (
            &["adapters", "merge", "--model", "model", "--out", "x", "--adapter", "runs/three/adapter"],
            &["virtual tokens"],
        ),
        (&["adapters", "convert", "runs/one/adapter", "x", "--model", "model"], &["x", ".gguf", "--initial"]),
        (&["adapters", "convert", "runs/four/adapter", "x.gguf", "--model", "model"], &["four/adapter", "LORA"]),
        (&["adapters", "convert", "one.gguf", "runs", "--model", "model"], &["runs", "expected a new folder"]),
        (
            &["adapters", "convert", "runs/one/adapter", "x", "--initial", "runs/one/adapter"],
            &["init_lora_weights", "pissa"],
        ),
        (
            &["chat", "--model", "model", "--adapter", "runs/one/adapter", "--adapter", "one=runs/two/adapter"],
            &["runs/two/adapter", "another one is called \"one\"", "--adapter NAME="],
        ),
        (
            &["logits", "--model", "model", "--text", "a", "--out", "l", "--adapter", "sum", "--adapter", "svd"],
            &["expected one here", "svd"],
        ),
    ];
    for (arguments, words) in table {
        let done = work.run(arguments);
        let error = done.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{done:?}"));
        assert_eq!(done.code, Some(2), "{arguments:?}");
        assert!(words.iter().all(|word| error.contains(word)), "{arguments:?}: {error}");
    }
    assert!(!work.at("x").exists() && !work.at("x.gguf").exists(), "what was refused leaves nothing");
}

/// Every method: trained, stopped half-way and gone on with, bit for bit; what it leaves is PEFT's, and evaluates and chats.
#[test]
fn every_method_from_a_recipe_to_chat_with_a_pause_that_changes_nothing() {
    let work = Work::new();
    // Rows that blocks can hold.
    work.copy_of_model("wide");
    work.write("wide/config.json", &work.text("model/config.json").replace("\"hidden_size\":16", "\"hidden_size\":64"));
    work.weights("wide/model.safetensors", &shapes(376, 64));
    work.succeed(&["export", "--model", "wide", "--out", "wide.gguf", "--dtype", "q8_0"]);
    // What nf4 holds, as floats.
    work.succeed(&["export", "--model", "wide", "--out", "floats", "--nf4"]);
    let logits = |model: &[&str]| {
        work.succeed(&[&["logits", "--text", "What is 7?", "--out", "l"], model].concat());
        let bytes = tensors(&work.at("l"))["logits"].2.clone();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
    };
    let differ = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
    let (plain, floats) = (logits(&["--model", "wide"]), logits(&["--model", "floats"]));
    assert!(
        differ(&floats, &logits(&["--model", "wide", "--weights", "nf4"])) < 1e-4 * differ(&floats, &plain).max(1.0)
    );
    assert!(differ(&floats, &plain) > 1e-3, "nf4 rounds");
    let table: [(&str, &[&str], &str); 16] = [
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
        let sets: Vec<&str> = [kind.as_str(), targets, "train.scheduler=constant", "train.learning_rate=2e-2"]
            .iter()
            .chain(sets)
            .flat_map(|set| ["--set", set])
            .collect();
        let run = |folder: &str, rest: &[&str]| {
            work.succeed(&[&["train", "run.toml", "--dir", folder], &sets[..], rest].concat());
        };
        let (whole, parts) = (format!("whole-{index}"), format!("parts-{index}"));
        run(&whole, &["--set", "train.max_steps=12"]);
        let steps = ["--set", "train.save_every=5", "--set", "train.max_steps=6"];
        run(&parts, &steps);
        fs::remove_file(work.at(&parts).join("summary.json")).unwrap();
        run(&parts, &["--set", "train.save_every=5", "--set", "train.max_steps=12", "--resume"]);
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
        // A run can start from what another has left.
        if peft_type != "LORA" {
            let (init, again) = (format!("method.init={adapter}"), format!("again-{index}"));
            run(&again, &["--set", "train.max_steps=1", "--set", "train.learning_rate=1e-9", "--set", &init]);
            let before = number(&work.json(&format!("{again}/summary.json")), "valid_loss_before");
            assert!((before - number(&summary, "valid_loss_after")).abs() < 1e-4, "{kind}: {before}");
        }
    }
}

#[test]
fn full_fine_tuning_from_a_recipe_to_chat() {
    let work = Work::new();
    let sets = ["--set", "method.kind=full", "--set", "train.gradient_accumulation=2"];
    work.succeed(&[&["train", "run.toml", "--dir", "runs/full"], &sets[..]].concat());
    let trained = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let summary =
        run_folder(&work, "runs/full", 12, &trained.map(|name| format!("model/{name}")).each_ref().map(String::as_str));
    let parameters: usize = shapes(376, 16).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(summary["trainable_parameters"], parameters);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(work.text(&format!("runs/full/model/{name}")), work.text(&format!("model/{name}")));
    }
    usable(&work, &["--model", "runs/full/model"], number(&summary, "valid_loss_after"));
}

#[test]
fn full_fine_tuning_of_a_gguf_file_gives_a_directory_with_its_tokenizer() {
    let work = Work::new();
    fs::write(work.at("small.gguf"), gguf()).unwrap();
    let sets = ["--set", "method.kind=full", "--set", "model.path=small.gguf"];
    work.succeed(&[&["train", "run.toml", "--dir", "out"], &sets[..]].concat());
    let trained =
        ["model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/generation_config.json"];
    let summary = run_folder(&work, "out", 12, &trained);
    assert_eq!(work.json("out/model/tokenizer_config.json")["chat_template"], TEMPLATE);
    let after = number(&summary, "valid_loss_after");
    usable(&work, &["--model", "out/model"], after);
    // Another tokenizer serves a directory that has none.
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(work.at("out/model").join(name)).unwrap();
    }
    usable(&work, &["--model", "out/model", "--tokenizer", "small.gguf"], after);
}

#[test]
fn without_dir_a_run_goes_to_the_recipe_s_name() {
    let work = Work::new();
    let sets = ["--set", "train.max_steps=1", "--set", "data.valid_limit=1"];
    let summary = work.succeed(&[&["train", "run.toml"], &sets[..]].concat()).json();
    assert_eq!(work.json("runs/run/summary.json"), summary);
    assert!(work.at("runs/run/adapter/adapter_model.safetensors").is_file());
}

/// PubMedQA's layout: items by id.
/// Without a network: `tiny` is made on the spot, learns, and everything that is named at the end is there and works.
#[test]
fn quickstart_makes_a_model_teaches_it_and_says_what_to_do_next() {
    let work = Work(tempfile::tempdir().unwrap());
    let done = work.succeed(&["quickstart", "--model", "tiny", "--dir", "my runs/q", "--steps", "16"]);
    for part in [
        "in all, besides the program itself",
        "no source of medical facts",
        "before                                           | after",
        "format kept (medical)               0 of 8",
        "refusals (not medical)              0 of 4",
        "validation loss",
        "trained 16 steps",
        "tokens/s",
        "memory at its peak",
        "chat --model 'my runs/q/tiny' --adapter 'my runs/q/adapter'",
        "train 'my runs/q/recipe.toml' --set data.train=mine.jsonl",
        "PeftModel.from_pretrained(model, \"my runs/q/adapter\")",
    ] {
        assert!(done.stdout.contains(part), "{part}: {done:?}");
    }
    assert_eq!(done.stdout.matches("\nQ: ").count(), 3, "{done:?}");
    for name in ["recipe.toml", "metrics.jsonl", "summary.json", "adapter/adapter_config.json", "tiny/config.json"] {
        assert!(work.at("my runs/q").join(name).is_file(), "{name}");
    }
    let summary = work.json("my runs/q/summary.json");
    assert!(number(&summary, "valid_loss_after") < number(&summary, "valid_loss_before"), "{summary}");
    let model = ["--model", "my runs/q/tiny", "--adapter", "my runs/q/adapter"];
    let eval = [&["eval", "--task", "qa-loss", "--data", "my runs/q/data/valid.jsonl"], &model[..]].concat();
    let loss = work.succeed(&eval).json();
    assert!((number(&loss, "loss") - number(&summary, "valid_loss_after")).abs() < 1e-4, "{loss}, {summary}");
    work.succeed(&[&["chat", "--prompt", "Why do I cough?", "--max-new-tokens", "4"], &model[..]].concat());

    // The run folder is like any other: its recipe gives the same run again.
    work.succeed(&["train", "my runs/q/recipe.toml", "--dir", "again"]);
    assert_eq!(work.json("again/summary.json")["valid_loss_after"], summary["valid_loss_after"]);
    let before = work.listing();
    for (arguments, words) in [
        (["quickstart", "--model", "tiny", "--dir", "my runs/q"], ["my runs/q", "--dir"]),
        (["quickstart", "--model", "nothing", "--dir", "other"], ["nothing", "no such model"]),
        (["quickstart", "--model", "tiny", "--steps", "0"], ["--steps", "'0'"]),
    ] {
        let done = work.run(&arguments);
        assert!(done.code == Some(2) && words.iter().all(|word| done.stderr.contains(word)), "{done:?}");
    }
    assert_eq!(work.listing(), before, "a refused command wrote something");
}

fn pubmedqa() -> String {
    let item =
        |decision: &str| json!({"QUESTION": "Is it so?", "CONTEXTS": ["One.", "Two."], "final_decision": decision});
    json!({"31": item("yes"), "7": item("no"), "12": item("maybe")}).to_string()
}

#[test]
fn conversations_of_every_format_are_trained_together() {
    let work = Work::new();
    work.write("messages.jsonl", &conversations(0..4));
    work.write("valid.jsonl", &conversations(6..8));
    let pair = json!([{"from": "human", "value": "What is 4?"}, {"from": "gpt", "value": "It is a number."}]);
    work.write("sharegpt.json", &json!([{"conversations": pair, "system": "Be brief."}]).to_string());
    let alpaca = json!([{"instruction": "What is", "input": "5?", "output": "It is a number."}]);
    work.write("alpaca.json", &alpaca.to_string());
    work.write("named.jsonl", &rows(4..6).replace("question", "prompt"));
    let sets = [
        "model.path=turns",
        "data.format=messages",
        "data.train=['messages.jsonl', {path='sharegpt.json', format='sharegpt'}, {path='alpaca.json', format='alpaca', \
         weight=2}, {path='named.jsonl', format='qa', columns={question='prompt'}}]",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let done = work.succeed(&[&["train", "run.toml", "--dir", "out"], &sets[..]].concat());
    let summary = run_folder(&work, "out", 12, &["adapter/adapter_model.safetensors"]);
    for line in ["messages.jsonl: 4 rows", "sharegpt.json: 1 rows", "alpaca.json: 1 rows", "named.jsonl: 2 rows"] {
        assert!(done.stderr.contains(line), "{done:?}");
    }
    let of = |extra: &[&'static str]| {
        let eval = ["eval", "--task", "qa-loss", "--model", "turns", "--adapter", "out/adapter", "--data"];
        work.succeed(&[&eval[..], extra].concat()).json()
    };
    let loss = of(&["valid.jsonl", "--format", "messages"]);
    assert!((number(&loss, "loss") - number(&summary, "valid_loss_after")).abs() < 1e-4, "{loss} {summary}");
    // The four answers are those of four rows, each behind the template's space, up to the end token: the newline after it is
    // not learned.
    let rows = number(&of(&["train.jsonl", "--limit", "4"]), "target_tokens") as u64;
    assert_eq!(loss["target_tokens"], rows + 4);
    let named = of(&["named.jsonl", "--columns", "question=prompt"]);
    assert_eq!(named["rows"], 2);
}

#[test]
fn freeze_trains_the_last_blocks_and_leaves_the_rest_as_it_was() {
    let work = Work::new();
    let freeze = |folder: &str, layers: &str| {
        let layers = format!("method.layers={layers}");
        let sets = ["--set", "method.kind=freeze", "--set", &layers];
        work.succeed(&[&["train", "run.toml", "--dir", folder], &sets[..]].concat());
        let trained = ["model/config.json", "model/model.safetensors", "model/tokenizer.json"];
        (run_folder(&work, folder, 12, &trained), tensors(&work.at(folder).join("model/model.safetensors")))
    };
    let before = tensors(&work.at("model/model.safetensors"));
    for (folder, layers, learned) in [
        ("last", "1", &["model.layers.1."][..]),
        ("first", "-1", &["model.layers.0."]),
        ("more", "{ count = 1, extra_modules = ['norm', 'lm_head'] }", &["model.layers.1.", "model.norm.", "lm_head."]),
    ] {
        let (summary, after) = freeze(folder, layers);
        assert!(before.keys().eq(after.keys()));
        let learns = |name: &str| learned.iter().any(|start| name.starts_with(start));
        for (name, tensor) in &after {
            assert_eq!(before[name] != *tensor, learns(name), "{folder}: {name}");
        }
        let parameters = shapes(376, 16).into_iter().filter(|(name, _)| learns(name));
        let parameters: usize = parameters.map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(summary["trainable_parameters"], parameters, "{folder}");
        let path = format!("{folder}/model");
        usable(&work, &["--model", &path], number(&summary, "valid_loss_after"));
    }
    let resolved = work.text("last/recipe.toml");
    assert!(resolved.contains("kind = \"freeze\"") && resolved.contains("layers = 1"), "{resolved}");
}

#[test]
fn data_check_counts_measures_shows_a_row_and_lists_mistakes() {
    let work = Work::new();
    fn check<'a>(rest: &[&'a str]) -> Vec<&'a str> {
        [&["data", "check", "--model", "turns"], rest].concat()
    }
    let done = work.succeed(&check(&["train.jsonl"]));
    for line in [
        "train.jsonl: 6 rows, at most 512 tokens each",
        "truncated                        0",
        "with a mistake                   0",
        "examples                         6",
        "user: What is 0?<|end_of_text|>\n<|begin_of_text|>assistant:[[It is a number.<|end_of_text|>]]",
    ] {
        assert!(done.stdout.contains(line), "{line}: {}", done.stdout);
    }
    assert_eq!(done.stderr, "");
    // A row's lengths are those that training counts.
    let (median, learned) = (20, 8);
    let lengths = |stdout: &str, name: &str, key: &str| -> usize {
        let line = stdout.lines().find(|line| line.starts_with(&format!("{name}  "))).unwrap();
        let rest = &line[line.find(&format!("{key} ")).unwrap() + key.len() + 1..];
        rest.split(',').next().unwrap().parse().unwrap()
    };
    assert!(lengths(&done.stdout, "tokens", "median") >= median, "{}", done.stdout);
    assert!(lengths(&done.stdout, "tokens to learn", "max") >= learned, "{}", done.stdout);
    let least = lengths(&done.stdout, "tokens", "min");
    let (cut, max) = (least - 2, (least - 2).to_string());
    let truncated = work.succeed(&check(&["train.jsonl", "--max-length", &max]));
    assert!(truncated.stdout.contains("truncated                        6"), "{}", truncated.stdout);
    assert_eq!(lengths(&truncated.stdout, "tokens", "max"), cut);
    work.write("two.jsonl", &(rows(0..1) + &rows(1..2).replace("is 1", &"is a long one ".repeat(9))));
    let dropped = work.succeed(&check(&["two.jsonl", "--max-length", "40", "--on-too-long", "drop"]));
    assert!(dropped.stdout.contains("dropped as too long              1"), "{}", dropped.stdout);

    let mistakes = conversations(0..2)
        + "\n{\"messages\": [{\"role\": \"bot\", \"content\": \"x\"}]}\n{\"messages\": \n"
        + "{\"messages\": [{\"role\": \"user\", \"content\": \"never answered\"}]}\n"
        + &"{\"message\": 1}\n".repeat(12);
    work.write("wrong.jsonl", &mistakes);
    let done = work.run(&check(&["wrong.jsonl", "--format", "messages"]));
    assert_eq!(done.code, Some(2), "{done:?}");
    for line in [
        "without a token to learn         1",
        "with a mistake                  14",
        "assistant:[[ It is a number.<|end_of_text|>]]\n<|begin_of_text|>user: And 1?",
        "wrong.jsonl:4: turn 1: `role`: expected system, developer, user, assistant or tool, found \"bot\"",
        "wrong.jsonl:5: expected a JSON object",
        "wrong.jsonl:7: expected the key `messages`, found message",
        "and 4 more",
    ] {
        assert!(done.stdout.contains(line), "{line}: {}", done.stdout);
    }
    assert_eq!(done.stderr, "error: wrong.jsonl: 14 of 17 rows have a mistake\n");
}

#[test]
fn doctor_approves_what_is_right_and_finds_what_is_not() {
    let work = Work::new();
    work.write("messages.jsonl", &conversations(0..3));
    fn doctor<'a>(rest: &[&'a str]) -> Vec<&'a str> {
        [&["doctor"], rest].concat()
    }
    for arguments in [
        &["--model", "turns"][..],
        &["--model", "turns", "--data", "train.jsonl"],
        &["--model", "turns", "--data", "messages.jsonl", "--format", "messages"],
    ] {
        let done = work.succeed(&doctor(arguments));
        assert!(
            done.stdout.lines().count() >= 10 && done.stdout.lines().all(|line| line.starts_with("ok ")),
            "{done:?}"
        );
        assert_eq!(done.stderr, "");
    }
    // Each broken set-up fails by the law that it breaks.
    work.copy_of_model("ending");
    let other = TURNS.replace("{{ eos_token }}", "<|eot_id|>");
    work.write("ending/tokenizer_config.json", &tokenizer_config(&other));
    work.write("ending/generation_config.json", "{\"eos_token_id\": [1, 3]}");
    work.copy_of_model("endless");
    work.write("endless/tokenizer_config.json", &tokenizer_config(&TURNS.replace("{{ eos_token }}", "")));
    work.copy_of_model("infinite");
    let mut weights = fs::read(work.at("model/model.safetensors")).unwrap();
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(work.at("infinite/model.safetensors"), weights).unwrap();
    work.write("infinite/tokenizer_config.json", &tokenizer_config(TURNS));
    work.copy_of_model("base");
    let mut config: Value = work.json("model/tokenizer_config.json");
    config.as_object_mut().unwrap().remove("chat_template");
    work.write("base/tokenizer_config.json", &config.to_string());
    for (model, law, words) in [
        ("model", "chat template renders turn by turn", "cannot be rendered turn by turn"),
        ("ending", "training ends an answer as chat does", "<|end_of_text|> = 1, found <|eot_id|> = 3"),
        ("endless", "chat template renders turn by turn", "ends an answer without an end token"),
        ("infinite", "logits are finite", "expected a finite number, found NaN"),
        ("base", "training reads what chat sends", "no chat template"),
    ] {
        let done = work.run(&doctor(&["--model", model]));
        assert_eq!(done.code, Some(1), "{model}: {done:?}");
        let line = done.stdout.lines().find(|line| line.contains(law)).unwrap();
        assert!(line.starts_with("FAIL") && line.contains(words), "{model}: {done:?}");
        assert!(done.stderr.starts_with("error: ") && done.stderr.ends_with(" of 11 checks failed\n"), "{done:?}");
    }
}

#[test]
fn pubmedqa_is_trained_and_scored() {
    let work = Work::new();
    work.write("pubmedqa.json", &pubmedqa());
    let sets = ["data.train=pubmedqa.json", "data.format=pubmedqa", "data.valid=pubmedqa.json"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let summary = work.succeed(&[&["train", "run.toml", "--dir", "out"], &sets[..]].concat()).json();
    let with = |extra: &[&str]| {
        let task =
            ["eval", "--task", "pubmedqa", "--data", "pubmedqa.json", "--model", "model", "--adapter", "out/adapter"];
        work.succeed(&[&task[..], extra].concat()).json()
    };
    let short = with(&["--out", "scores.json"]);
    let whole = work.json("scores.json");
    for key in ["task", "n", "accuracy", "macro_f1"] {
        assert_eq!(short[key], whole[key], "{key}");
    }
    assert_eq!((&short["task"], &short["n"], short.get("items")), (&json!("pubmedqa"), &json!(3), None));
    assert!((0.0..=1.0).contains(&number(&short, "accuracy")) && (0.0..=1.0).contains(&number(&short, "macro_f1")));
    let items = whole["items"].as_object().unwrap();
    assert_eq!(items.keys().collect::<Vec<_>>(), ["31", "7", "12"]);
    for item in items.values() {
        let scores: Vec<f64> = serde_json::from_value(item["loglikelihood"].clone()).unwrap();
        let best = (0..3).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        assert!(scores.iter().all(|score| *score < 0.0), "{item}");
        assert_eq!(item["prediction"], ["yes", "no", "maybe"][best]);
    }
    assert_eq!(with(&["--limit", "2"])["n"], 2);
    // The loss of the decisions is what training measured.
    let loss = work.succeed(&[
        "eval",
        "--task",
        "qa-loss",
        "--format",
        "pubmedqa",
        "--data",
        "pubmedqa.json",
        "--model",
        "model",
        "--adapter",
        "out/adapter",
    ]);
    assert!((number(&loss.json(), "loss") - number(&summary, "valid_loss_after")).abs() < 1e-4);
}

#[test]
fn draws_follow_the_seed_and_end_at_stop_strings() {
    let work = Work::new();
    let chat = |extra: &[&str]| {
        let base = ["chat", "--model", "model", "--prompt", "Hi", "--max-new-tokens", "24"];
        work.succeed(&[&base[..], extra].concat()).stdout
    };
    let hot = |extra: &[&str]| chat(&[&["--temperature", "1.5"], extra].concat());
    let one = hot(&["--seed", "1"]);
    assert_eq!(one, hot(&["--seed", "1"]));
    assert_ne!(one, hot(&["--seed", "2"]));
    assert_eq!(hot(&["--top-k", "1"]), chat(&[]), "one token to draw from is the likeliest");
    let stop: String = one.trim_end().chars().skip(2).take(2).collect();
    let stopped = hot(&["--seed", "1", "--stop", &stop]);
    assert_eq!(stopped.trim_end_matches('\n'), &one[..one.find(&stop).unwrap()]);
}

/// Everything that can be wrong with what a user brings, beside a model and data that are right.
fn spoiled() -> Work {
    let work = Work::new();
    for name in [
        "cut", "shape", "lacking", "arch", "noconfig", "notjson", "field", "template", "jinja", "base", "nowords",
        "words",
    ] {
        work.copy_of_model(name);
    }
    let weights = fs::read(work.at("model/model.safetensors")).unwrap();
    fs::write(work.at("cut/model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    work.weights("shape/model.safetensors", &shapes(376, 20));
    work.weights("lacking/model.safetensors", &shapes(376, 16)[1..]);
    work.write("arch/config.json", &work.text("model/config.json").replace("llama", "gpt2"));
    fs::remove_file(work.at("noconfig/config.json")).unwrap();
    work.write("notjson/config.json", "{\"model_type\": ");
    work.write(
        "field/config.json",
        &work.text("model/config.json").replace("\"num_attention_heads\":2", "\"num_attention_heads\":\"two\""),
    );
    work.write("template/tokenizer_config.json", &tokenizer_config("{% for m in messages %}\n{{ m.role }"));
    work.write("jinja/chat_template.jinja", "{% endfor %}");
    let mut config: Value = work.json("model/tokenizer_config.json");
    config.as_object_mut().unwrap().remove("chat_template");
    work.write("base/tokenizer_config.json", &config.to_string());
    fs::remove_file(work.at("nowords/tokenizer.json")).unwrap();
    work.write("words/tokenizer.json", "{\"version\": \"1.0\"}");
    // A model with fewer tokens than its tokenizer.
    work.copy_of_model("few");
    work.write("few/config.json", &work.text("model/config.json").replace("376", "96"));
    work.weights("few/model.safetensors", &shapes(96, 16));

    let gguf = fs::read(fixture("gguf/model.gguf")).unwrap();
    fs::write(work.at("magic.gguf"), [b"GGUX", &gguf[4..]].concat()).unwrap();
    fs::write(work.at("cut.gguf"), &gguf[..gguf.len() / 2]).unwrap();
    fs::write(work.at("lengths.gguf"), [&gguf[..24], &[0xff; 8], &gguf[32..]].concat()).unwrap();
    fs::copy(fixture("gguf/vocab-spm.gguf"), work.at("vocabulary.gguf")).unwrap();
    fs::copy(fixture("gguf/model.gguf"), work.at("nowords.gguf")).unwrap();

    for name in ["other", "adapter-json", "adapter-kind", "adapter-cut", "adapter-weights", "adapter-old"] {
        fs::create_dir(work.at(name)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(fixture("peft/lora_qv").join(file), work.at(name).join(file)).unwrap();
        }
    }
    work.write("adapter-json/adapter_config.json", "r = 8");
    work.write("adapter-kind/adapter_config.json", "{\"peft_type\": \"VERA\"}");
    fs::write(work.at("adapter-cut/adapter_model.safetensors"), [7; 20]).unwrap();
    fs::remove_file(work.at("adapter-weights/adapter_model.safetensors")).unwrap();
    let old = work.at("adapter-old");
    fs::rename(old.join("adapter_model.safetensors"), old.join("adapter_model.bin")).unwrap();

    work.write("empty.jsonl", "\n\n");
    work.write("broken.jsonl", &(rows(0..1) + "{\"question\": \"a\", \"answer\"\n"));
    work.write("keys.jsonl", "{\"question\": \"a\", \"reply\": \"b\"}\n");
    work.write("kinds.jsonl", &(rows(0..2) + "{\"question\": \"a\", \"answer\": 3}\n"));
    work.write("messages.jsonl", &conversations(0..2));
    work.write("roles.jsonl", "{\"messages\": [{\"role\": \"bot\", \"content\": \"x\"}]}\n");
    work.write("asked.json", "[{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}]");
    work.write("pubmedqa.json", &pubmedqa());
    work.write("decision.json", &pubmedqa().replace("maybe", "perhaps"));
    work.write("undecided.json", &pubmedqa().replace("\"maybe\"", "null"));
    work.write("file", "a regular file");
    work.write("full/notes.txt", "of an earlier run");
    work.write("toml.toml", "[model]\npath = model\n");
    work
}

/// Runs a table of commands that must fail: each with the code 2 and one line that has all the words, and leaving the
/// folder as it was.
fn refused(table: &[(&[&str], &[&str])]) {
    let work = spoiled();
    let before = work.listing();
    let mut wrong = String::new();
    for (arguments, words) in table {
        let done = work.run(arguments);
        // The argument parser's own errors go on with how to ask for help.
        let stderr = done.stderr.split("\n\nFor more information, try '--help'.").next().unwrap_or_default();
        let errors: Vec<&str> = stderr.lines().filter(|line| line.contains("error")).collect();
        let last = stderr.lines().last().unwrap_or_default();
        let clear = done.code == Some(2) && done.stdout.is_empty() && !done.stderr.contains("panicked");
        let one = errors.len() == 1 && last.starts_with("error: ") && words.iter().all(|word| last.contains(word));
        if !(clear && one) {
            wrong += &format!("{}\n  expected {words:?}\n  {done:?}\n", arguments.join(" "));
        }
        if work.listing() != before {
            let new: Vec<_> = work.listing().into_keys().filter(|path| !before.contains_key(path)).collect();
            wrong += &format!("{}\n  left {new:?}\n", arguments.join(" "));
            new.iter().rev().for_each(|path| drop(fs::remove_dir(path).or_else(|_| fs::remove_file(path))));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

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
        ("shape", &["shape", "model.norm.weight", "expected [16]", "found [20]"]),
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
        (chat(&["--model", "model", "--adapter", "nowhere"]), &["nowhere/adapter_config.json", "No such file"]),
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
            &["adapter-old/adapter_model.bin", "expected adapter_model.safetensors", "save_pretrained"],
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
        (eval(&["--task", "qa-loss", "--data", "model"]), &["model", "cannot be read"]),
        (
            eval(&["--task", "qa-loss", "--data", "empty.jsonl"]),
            &["empty.jsonl", "expected at least one row", "found none"],
        ),
        (eval(&["--task", "qa-loss", "--data", "broken.jsonl"]), &["broken.jsonl:2", "expected a JSON object"]),
        (eval(&["--task", "qa-loss", "--data", "model/model.safetensors"]), &["model.safetensors", "UTF-8"]),
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
            eval(&["--task", "qa-loss", "--data", "messages.jsonl", "--format", "messages"]),
            &["messages.jsonl", "line 1", "model/tokenizer.json", "cannot be rendered turn by turn"],
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
    let sets: [(&str, &[&str]); 30] = [
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
        ("data.train=pubmedqa.json", &["pubmedqa.json:1", "expected the key `question`"]),
        (
            "data.train=[{path='roles.jsonl', format='messages'}]",
            &["roles.jsonl:1", "turn 1", "`role`", "found \"bot\""],
        ),
        ("data.train=[{path='messages.jsonl', format='messages'}]", &["messages.jsonl", "line 1", "turn by turn"]),
        ("data.train=[{path='asked.json', format='messages'}]", &["asked.json", "no row has a token to learn"]),
        ("data.columns={prompt='question'}", &["--set", "data.columns", "question, answer", "found `prompt`"]),
        ("method.layers=2", &["--set", "method.layers", "\"freeze\"", "found lora"]),
        ("data.max_length=4", &["train.jsonl", "no row has a token to learn", "max_length", "4"]),
        ("method.target_modules=[\"query\"]", &["target_modules", "query", "selects no linear layer", "q_proj"]),
        ("method.target_modules=([)", &["target_modules", "([)"]),
        ("model.dtype=packed", &["model", "weights", "a GGUF file", "NF4 can be made of it"]),
        ("parallel.zero_stage=4", &["--set", "parallel.zero_stage", "expected 0, 1, 2, 3", "FULL_SHARD"]),
        ("train.eval_device=gpu", &["--set", "train.eval_device", "expected one of cpu, tch", "found \"gpu\""]),
        ("method.init=nowhere", &["nowhere/adapter_config.json", "No such file"]),
        ("method.init=other", &["other", "does not fit"]),
        ("method.init=adapter-json", &["adapter-json/adapter_config.json", "expected JSON"]),
    ];
    table.extend(sets.map(|(set, words)| (vec!["train", "run.toml", "--dir", "out", "--set", set], words)));
    let long = ["--set", "data.on_too_long=error", "--set", "data.max_length=20"];
    table.push((
        [&["train", "run.toml", "--dir", "out"], &long[..]].concat(),
        &["train.jsonl", "line 1", "more than `data.max_length` = 20", "truncate"],
    ));
    let floats = ["--set", "method.kind=qlora", "--set", "model.dtype=f32"];
    table.push((
        [&["train", "run.toml", "--dir", "out"], &floats[..]].concat(),
        &["model.dtype", "\"packed\" or \"nf4\" with qlora"],
    ));
    let blocks = ["--set", "method.kind=full", "--set", "model.dtype=nf4"];
    table.push((
        [&["train", "run.toml", "--dir", "out"], &blocks[..]].concat(),
        &["model.dtype", "where weights learn"],
    ));
    let freeze = ["--set", "method.kind=freeze", "--set", "method.layers={extra_modules=['wte']}"];
    table.push((
        [&["train", "run.toml", "--dir", "out"], &freeze[..]].concat(),
        &["embed_tokens, norm, lm_head", "found \"wte\""],
    ));
    let drop = ["--set", "data.on_too_long=drop", "--set", "data.max_length=20"];
    table.push(([&["train", "run.toml", "--dir", "out"], &drop[..]].concat(), &["train.jsonl", "max_length", "20"]));
    let rows: Vec<(&[&str], &[&str])> = table.iter().map(|(arguments, words)| (&arguments[..], *words)).collect();
    refused(&rows);
}

/// A long run that saves after every step, into `folder`.
fn long<'a>(folder: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "run.toml", "--dir", folder, "--set", "train.save_every=1"];
    for set in ["method.dropout=0.1", "train.eval_every=40", "train.learning_rate=1e-3"].iter().chain(sets) {
        arguments.extend(["--set", set]);
    }
    arguments
}

/// `metrics.jsonl` without what differs from one run of the same steps to another.
fn lasting(work: &Work, folder: &str) -> Vec<Value> {
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        for key in ["elapsed_seconds", "tokens_per_second", "peak_rss_bytes"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    work.text(&format!("{folder}/metrics.jsonl")).lines().map(line).collect()
}

/// Kills the run in `folder` once it has written `lines` lines and a moment more has passed.
fn kill_after(work: &Work, arguments: &[&str], folder: &str, lines: usize, moment: Duration) {
    let mut run = work.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let metrics = work.at(&format!("{folder}/metrics.jsonl"));
    let written = || fs::read_to_string(&metrics).unwrap_or_default().lines().count();
    while written() < lines {
        assert!(run.try_wait().unwrap().is_none(), "ended early: {:?}", run.wait_with_output());
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(moment);
    run.kill().unwrap();
    run.wait().unwrap();
}

#[test]
fn runs_that_were_killed_go_on_bit_for_bit() {
    let work = Work::new();
    for (kills, sets, written) in [
        (20, vec!["train.max_steps=260"], "adapter/adapter_model.safetensors"),
        (3, vec!["train.max_steps=60", "method.kind=full"], "model/model.safetensors"),
    ] {
        let (whole, broken) = (format!("whole-{kills}"), format!("broken-{kills}"));
        work.succeed(&long(&whole, &sets));
        for kill in 0..kills {
            let mut arguments = long(&broken, &sets);
            arguments.extend((kill > 0).then_some("--resume"));
            // Steps and saves take about as long as each other here: many of the moments lie inside a save.
            let moment = Duration::from_micros(kill as u64 * 2654435761 % 7000);
            kill_after(&work, &arguments, &broken, 12 * (kill + 1), moment);
        }
        let mut arguments = long(&broken, &sets);
        arguments.push("--resume");
        let done = work.succeed(&arguments);
        assert!(done.stderr.contains("going on after step"), "{done:?}");
        let bytes = |folder: &str| fs::read(work.at(&format!("{folder}/{written}"))).unwrap();
        assert_eq!(bytes(&broken), bytes(&whole));
        assert_eq!(lasting(&work, &broken), lasting(&work, &whole));
        let left: Vec<_> =
            work.listing().into_keys().filter(|path| path.extension() == Some("part".as_ref())).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Micro-batches of as many rows as there is room for show the very rows, in fewer steps, and a pause changes nothing.
#[test]
fn filled_micro_batches_show_every_row_and_a_pause_changes_nothing() {
    let work = Work::new();
    let row = |i: usize| {
        let answer = ["It is a number."; 4][..1 + i * i % 4 + i % 3 / 2].join(" ");
        json!({"question": format!("What is {i}?"), "answer": answer}).to_string() + "\n"
    };
    work.write("train.jsonl", &(0..23).map(row).collect::<String>());
    let run = |folder: &str, sets: &[&str]| {
        let mut arguments = vec!["train", "run.toml", "--dir", folder, "--set", "data.max_length=100"];
        for set in ["train.scheduler=constant", "train.save_every=3", "method.dropout=0.1"].iter().chain(sets) {
            match *set {
                "--resume" => arguments.push(set),
                set => arguments.extend(["--set", set]),
            }
        }
        work.run(&arguments)
    };
    // Steps are counted by epochs here.
    work.write("run.toml", &RECIPE.replace("max_steps = 12\n", ""));
    let taken = |folder: &str| -> Vec<Value> {
        lasting(&work, folder).into_iter().filter(|line| line.get("loss").is_some()).collect()
    };
    let sum = |lines: &[Value], key: &str| lines.iter().map(|line| number(line, key)).sum::<f64>();
    assert_eq!(run("plain", &[]).code, Some(0));
    let plain = taken("plain");
    for (name, grouped) in [("alike", "data.group_by_length=true"), ("mixed", "data.group_by_length=false")] {
        let (whole, parts) = (format!("{name}-whole"), format!("{name}-parts"));
        let sets = ["data.packing=fill", grouped];
        let done = run(&whole, &[&sets[..], &["train.epochs=3"]].concat());
        assert_eq!(done.code, Some(0), "{done:?}");
        let all = taken(&whole);
        assert_eq!(number(all.last().unwrap(), "epoch"), 3.0);
        let epoch: Vec<Value> = all.iter().filter(|line| number(line, "epoch") <= 1.0).cloned().collect();
        assert!(epoch.len() < plain.len(), "{} steps against {}", epoch.len(), plain.len());
        for key in ["tokens", "target_tokens"] {
            assert_eq!(sum(&epoch, key), sum(&plain, key));
            assert_eq!(sum(&all, key), 3.0 * sum(&plain, key));
        }
        assert!(all.iter().all(|line| number(line, "tokens") <= 2.0 * 100.0), "{all:?}");
        // Half-way into the second epoch, and on.
        assert_eq!(run(&parts, &[&sets[..], &["train.epochs=1.5"]].concat()).code, Some(0));
        fs::remove_file(work.at(&parts).join("summary.json")).unwrap();
        let other = run(&parts, &[&sets[..], &["train.epochs=3", "train.batch_size=4", "--resume"]].concat());
        assert!(other.code == Some(2) && other.stderr.contains("`train.batch_size`: the run has 2"), "{other:?}");
        let done = run(&parts, &[&sets[..], &["train.epochs=3", "--resume"]].concat());
        assert!(done.code == Some(0) && done.stderr.contains("going on after step"), "{done:?}");
        assert_eq!(taken(&parts), all);
        let bytes = |folder: &str| fs::read(work.at(&format!("{folder}/adapter/adapter_model.safetensors"))).unwrap();
        assert_eq!(bytes(&parts), bytes(&whole), "{name}");
    }
}

#[test]
fn an_interrupted_run_leaves_a_checkpoint_and_can_be_longer_when_it_goes_on() {
    let work = Work::new();
    let arguments = ["train", "run.toml", "--dir", "run", "--set", "train.max_steps=100000"];
    let run = work.command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
    while !work.at("run/metrics.jsonl").exists() || work.text("run/metrics.jsonl").lines().count() < 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    let step: usize = work.json_of_latest_checkpoint("run")["step"].as_u64().unwrap() as usize;
    assert!(stderr.contains(&format!("interrupted after step {step}")), "{stderr}");
    let steps = format!("train.max_steps={}", step + 5);
    work.succeed(&["train", "run.toml", "--dir", "run", "--resume", "--set", &steps]);
    assert_eq!(lasting(&work, "run").last().unwrap()["step"], json!(step + 5));
    // What cannot be resumed says so.
    for (arguments, words) in [
        (vec!["--dir", "run", "--resume", "--set", &steps], "the run is complete"),
        (vec!["--dir", "other", "--resume"], "there is no run to resume"),
    ] {
        let done = work.run(&[&["train", "run.toml"], &arguments[..]].concat());
        assert!(done.code == Some(2) && done.stderr.contains(words), "{done:?}");
    }
    fs::remove_file(work.at("run/summary.json")).unwrap();
    let done = work.run(&["train", "run.toml", "--dir", "run", "--resume", "--set", "method.r=8"]);
    assert!(done.code == Some(2) && done.stderr.contains("`method.r`: the run has 4, the recipe 8"), "{done:?}");
    let state = work.at(&format!("run/checkpoint-{step}/training.safetensors"));
    let bytes = fs::read(&state).unwrap();
    fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let done = work.run(&["train", "run.toml", "--dir", "run", "--resume", "--set", &steps]);
    let clear = done.stderr.contains("the checkpoint is damaged; remove this folder");
    assert!(done.code == Some(2) && clear && !done.stderr.contains("panicked"), "{done:?}");
}

#[test]
fn a_run_that_no_longer_improves_ends_early() {
    let work = Work::new();
    let sets = ["train.eval_every=2", "train.early_stopping=2", "train.learning_rate=50", "train.max_steps=40"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    work.succeed(&[&["train", "run.toml", "--dir", "run"], &sets[..]].concat());
    let losses = work.text("run/metrics.jsonl");
    let losses: Vec<Value> = losses.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let losses: Vec<f64> = losses.iter().skip(1).filter_map(|line| line["valid_loss"].as_f64()).collect();
    let steps = work.json("run/summary.json")["steps"].as_u64().unwrap() as usize;
    // The rule, on the losses that were measured: the first evaluation with two before it that it does not beat.
    let best = |end: usize| (0..end).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
    let expected = (1..=losses.len()).find(|&n| n - 1 - best(n) >= 2).unwrap();
    assert_eq!(steps, 2 * expected, "{losses:?}");
    assert!(steps < 40);
}

#[test]
fn schedules_and_estimates_are_printed_before_anything_is_computed() {
    let work = Work::new();
    let draw = ["--svg", "s.svg", "--csv", "s.csv"];
    let done =
        work.succeed(&[&["schedule", "--stages", "4", "--micro-batches", "8", "--kind", "1f1b"], &draw[..]].concat());
    // (4 - 1) / (8 + 4 - 1)
    assert!(done.stdout.contains("bubble           27.3 %") && done.stdout.contains("4, 3, 2, 1 at most"), "{done:?}");
    assert_eq!(done.stdout.lines().filter(|line| line.starts_with("rank ")).count(), 4, "{done:?}");
    assert!(work.text("s.svg").starts_with("<svg") && work.text("s.csv").lines().count() == 4);
    let config = ["--config", "model/config.json", "--method", "full", "--world", "4"];
    let done = work.succeed(&[&["estimate"], &config[..]].concat());
    // A heading, four stages with the optimizer on the device, on the host and in a file, stage 3's weights on the host, and
    // five lines by DeepSpeed's formulas.
    assert_eq!(done.stdout.lines().filter(|line| line.contains(" + ")).count(), 1 + 4 * 3 + 1 + 5, "{done:?}");
    let few = ["--method", "lora", "--target-modules", "q_proj,v_proj"];
    work.succeed(&[&["estimate", "--config", "model/config.json"], &few[..]].concat());
    for arguments in [
        &["schedule", "--stages", "0", "--micro-batches", "8"][..],
        &["schedule", "--stages", "4", "--micro-batches", "8", "--kind", "zigzag"],
        &["schedule", "--stages", "4", "--micro-batches", "6", "--kind", "interleaved1f1b", "--chunks", "2"],
        &["estimate", "--config", "nowhere.json"],
        &["estimate", "--config", "model/config.json", "--measure"],
        &["estimate", "--config", "model/config.json", "--method", "ia3"],
    ] {
        let done = work.run(arguments);
        assert!(done.code == Some(2) && done.stderr.contains("error: "), "{arguments:?}: {done:?}");
    }
}

#[test]
fn what_is_estimated_is_counted_and_what_cannot_fit_is_refused() {
    let work = Work::new();
    for method in ["full", "lora"] {
        let measured = ["estimate", "--measure", "--model", "model", "--method", method, "--tokens", "64"];
        let found = work.succeed(&measured).json();
        let (counted, estimated) = (number(&found, "states_counted_gib"), number(&found, "states_estimated_gib"));
        assert!((counted - estimated).abs() <= 0.02 * counted, "{method}: {found}");
        // So small a model may find all its room in what loading has left.
        assert!(number(&found, "peak_rss_anon_gib") < 0.1, "{found}");
    }
    let full = ["train", "run.toml", "--dir", "out", "--set", "method.kind=full"];
    // The weights alone are more than that.
    let refused = [&full[..], &["--set", "train.memory_gib=0.00005"]].concat();
    refused_in(&work, &refused, &["the run needs about", "`train.memory_gib`", "no setting is enough"]);
    let done = work.run(&["train", "run.toml", "--set", "train.memory_gib=-1"]);
    assert!(done.code == Some(2) && done.stderr.contains("train.memory_gib"), "{done:?}");
}

/// What a run of a foreign file was resolved to.
fn resolved(work: &Work, folder: &str) -> toml::Table {
    work.text(&format!("{folder}/recipe.toml")).parse().unwrap()
}

#[test]
fn a_ds_config_is_part_of_the_recipe_and_says_what_it_says_in_vain() {
    let work = Work::new();
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
    let done = work.succeed(&["train", "run.toml", "--dir", "out", "--deepspeed", "ds.json"]);
    for words in ["note: ds.json: `wall_clock_breakdown` is not honoured", "`zero_optimization.sub_group_size`"] {
        assert!(done.stderr.contains(words), "{words}: {done:?}");
    }
    let recipe = resolved(&work, "out");
    let (train, parallel) = (&recipe["train"], &recipe["parallel"]);
    assert_eq!(train["batch_size"].as_integer(), Some(2), "the recipe's, for its \"auto\"");
    assert_eq!(train["gradient_accumulation"].as_integer(), Some(3));
    assert_eq!((train["max_grad_norm"].as_float(), train["learning_rate"].as_float()), (Some(0.5), Some(2e-2)));
    assert_eq!((train["weight_decay"].as_float(), train["epsilon"].as_float()), (Some(0.1), Some(1e-8)));
    assert_eq!(train["betas"].as_array().unwrap()[1].as_float(), Some(0.95));
    assert_eq!((parallel["zero_stage"].as_integer(), parallel["offload_optimizer"].as_str()), (Some(2), Some("cpu")));
    assert_eq!(parallel["bucket_size"].as_integer(), Some(16 * 16), "the square of the model's width");
    assert!(parallel.get("deepspeed").is_none(), "what it said is in the recipe now");
    // DeepSpeed asks its scheduler after a step: two at the minimum, two steps of warm-up at least, then down in a line.
    let rates: Vec<f64> = lasting(&work, "out").iter().filter_map(|line| line["learning_rate"].as_f64()).collect();
    assert!((rates[0] - 1e-5).abs() < 1e-12 && (rates[2] - 2e-2).abs() < 1e-9, "{rates:?}");
    assert!((rates[11] - (1e-5 + (2e-2 - 1e-5) * 0.2)).abs() < 1e-9, "{rates:?}");
    // The run's own recipe says it all: the file is needed no more.
    fs::remove_file(work.at("ds.json")).unwrap();
    work.succeed(&["train", "out/recipe.toml", "--dir", "again"]);
    assert_eq!(lasting(&work, "again"), lasting(&work, "out"));

    let yaml = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_sharding_strategy: SHARD_GRAD_OP, \
                fsdp_activation_checkpointing: true, fsdp_version: 1}\n";
    work.write("accelerate.yaml", yaml);
    let done = work.succeed(&["train", "run.toml", "--dir", "fsdp", "--accelerate", "accelerate.yaml"]);
    assert!(done.stderr.contains("`num_processes` is 4, but mpirun started 1"), "{done:?}");
    let recipe = resolved(&work, "fsdp");
    assert_eq!(recipe["parallel"]["zero_stage"].as_integer(), Some(2));
    assert_eq!(recipe["train"]["activation_checkpointing"].as_str(), Some("full"));
}

#[test]
fn steps_that_overflow_in_f16_are_skipped_and_the_loss_is_scaled_down() {
    let work = Work::new();
    work.write("run.toml", RECIPE);
    work.succeed(&["train", "run.toml", "--dir", "f32"]);
    for (power, folder) in [(8, "fine"), (26, "overflow")] {
        let file = json!({"train_batch_size": "auto",
            "fp16": {"enabled": true, "initial_scale_power": power, "hysteresis": 1}});
        work.write("ds.json", &file.to_string());
        work.succeed(&["train", "run.toml", "--dir", folder, "--deepspeed", "ds.json"]);
        let recipe = resolved(&work, folder);
        assert_eq!(
            (recipe["model"]["compute"].as_str(), recipe["model"]["dtype"].as_str()),
            (Some("f16"), Some("f16"))
        );
    }
    let numbers = |folder: &str, key: &str| -> Vec<f64> {
        lasting(&work, folder).iter().filter(|line| line["tokens"].is_number()).map(|line| number(line, key)).collect()
    };
    let (expected, found) = (numbers("f32", "loss"), numbers("fine", "loss"));
    for (expected, found) in expected.iter().zip(&found) {
        assert!((expected - found).abs() < 5e-3 * expected, "{expected} in f32, {found} in f16");
    }
    assert_eq!(numbers("fine", "loss_scale"), [256.0; 12]);
    let lines = lasting(&work, "overflow");
    let skipped: Vec<bool> = lines.iter().filter_map(|line| line["skipped"].as_bool()).collect();
    let first = skipped.iter().position(|&skipped| !skipped).expect("the scale comes down in twelve steps");
    assert!(first > 0 && skipped[first..].iter().all(|&skipped| !skipped), "{skipped:?}");
    let scales: Vec<f64> = (0..12).map(|step| 2f64.powi(26 - step.min(first) as i32)).collect();
    assert_eq!(numbers("overflow", "loss_scale"), scales);
    refused_in(
        &work,
        &["train", "run.toml", "--dir", "no", "--set", "model.compute=f16", "--set", "train.fp16={hysteresis = 0}"],
        &["train.fp16", "hysteresis", "1 or above"],
    );
}

#[test]
fn a_foreign_file_that_does_not_fit_is_refused() {
    let work = Work::new();
    let table: [(&str, &[&str], &[&str]); 10] = [
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
        ("{", &[], &["ds.json", "not readable as JSON"]),
    ];
    for (text, sets, words) in table {
        work.write("ds.json", text);
        let mut arguments = vec!["train", "run.toml", "--dir", "out", "--deepspeed", "ds.json"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        refused_in(&work, &arguments, words);
    }
    work.write("ds.json", r#"{"train_batch_size": "auto"}"#);
    let both = ["train", "run.toml", "--deepspeed", "ds.json", "--accelerate", "a.yaml"];
    refused_in(&work, &both, &["`parallel.deepspeed` is ds.json", "`parallel.accelerate` is a.yaml"]);
    refused_in(&work, &["train", "run.toml", "--deepspeed", "none.json"], &["none.json", "cannot be read"]);
}

fn refused_in(work: &Work, arguments: &[&str], words: &[&str]) {
    let done = work.run(arguments);
    assert_eq!(done.code, Some(2), "{arguments:?}: {done:?}");
    let line = done.stderr.trim();
    assert!(line.starts_with("error: ") && !line.contains('\n'), "{arguments:?}: one line: {line}");
    assert!(words.iter().all(|word| line.contains(word)), "{arguments:?}: {line} has all of {words:?}");
    assert!(!work.at("out").exists(), "{arguments:?} leaves no folder");
}

/// Files may grow to `kibibytes` only, as on a disk that is full.
fn with_little_room(work: &Work, kibibytes: usize, arguments: &[&str]) -> Done {
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
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn a_full_disk_is_one_line_and_leaves_nothing_half_written() {
    let work = Work::new();
    work.succeed(&["train", "run.toml", "--dir", "done", "--set", "train.max_steps=1"]);
    let export = |out: &'static str| vec!["export", "--model", "model", "--adapter", "done/adapter", "--out", out];
    let train =
        |set: &'static str| vec!["train", "run.toml", "--dir", "out", "--set", set, "--set", "train.max_steps=3"];
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
        // An empty folder may stay, but no file that is not whole.
        let broken =
            |path: &PathBuf| path.starts_with(work.at(file)) || path.extension().is_some_and(|end| end == "part");
        let left: Vec<_> = work.listing().into_keys().filter(|path| path.is_file() && broken(path)).collect();
        assert!(left.is_empty(), "{arguments:?}: {left:?}");
        drop(fs::remove_dir_all(work.at("out")));
    }
}

/// The devices of this build.
fn devices() -> Vec<&'static str> {
    let all = [
        ("cpu", cfg!(feature = "flex")),
        ("tch", cfg!(feature = "tch")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("wgpu", cfg!(feature = "wgpu")),
    ];
    all.into_iter().filter(|(_, here)| *here).map(|(name, _)| name).collect()
}

/// Trained on one device, validated on any other while it trains and afterwards.
#[test]
fn a_run_on_any_device_is_validated_on_every_other() {
    let work = Work::new();
    let losses = |folder: &str| -> Vec<f64> {
        let lines = lasting(&work, folder).into_iter();
        lines.filter_map(|line| line["valid_loss"].as_f64().or(line["loss"].as_f64())).collect()
    };
    let mut expected: Option<Vec<f64>> = None;
    // Lavapipe compiles a kernel for seconds, and its training has many.
    for device in devices().into_iter().filter(|device| ["cpu", "tch"].contains(device)) {
        for there in devices() {
            let (folder, set) = (format!("{device}-{there}"), format!("train.eval_device={there}"));
            let run = ["train", "run.toml", "--dir", &folder, "--device", device, "--set", &set];
            work.succeed(&[&run[..], &["--set", "train.max_steps=5"]].concat());
            let found = losses(&folder);
            let expected = expected.get_or_insert_with(|| found.clone());
            assert_eq!(found.len(), 7, "{found:?}");
            let close = found.iter().zip(&*expected).all(|(a, b)| (a - b).abs() < 1e-3 * b);
            assert!(close, "trained on {device}, validated on {there}: {found:?} against {expected:?}");
            let adapter = format!("{folder}/adapter");
            let eval = ["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--model", "model", "--device", there];
            let loss = number(&work.succeed(&[&eval[..], &["--adapter", &adapter]].concat()).json(), "loss");
            assert!((loss - expected[6]).abs() < 1e-3 * expected[6], "{there}: {loss} against {expected:?}");
        }
    }
    // In a binary of one backend as well: elsewhere is the same place again.
    work.succeed(&["train", "run.toml", "--dir", "here", "--set", "train.max_steps=5"]);
    assert!(losses("here").iter().zip(&expected.unwrap()).all(|(a, b)| (a - b).abs() < 1e-5 * b));
}

/// Where states and weights are changes no loss, whatever the device is.
#[test]
fn offload_from_any_device_changes_no_loss() {
    let work = Work::new();
    work.write("bare.toml", &RECIPE.replace("r = 4\ntarget_modules = 'all-linear'\n", ""));
    // Lavapipe compiles a kernel for seconds, and training has many.
    for device in devices().into_iter().filter(|device| ["cpu", "tch"].contains(device)) {
        for kind in ["full", "lora"] {
            let losses = |name: &str, sets: &[&str]| -> Vec<f64> {
                let (folder, kind) = (format!("{device}-{kind}-{name}"), format!("method.kind={kind}"));
                let mut run = vec!["train", "bare.toml", "--dir", &folder, "--device", device, "--set", &kind];
                sets.iter().for_each(|set| run.extend(["--set", set]));
                work.succeed(&run);
                lasting(&work, &folder).iter().filter_map(|line| line["loss"].as_f64()).collect()
            };
            let expected = losses("none", &[]);
            assert_eq!(expected.len(), 12);
            let table: [(&str, &[&str]); 3] = [
                ("cpu", &["parallel.offload_optimizer=cpu"]),
                ("nvme", &["parallel.offload_optimizer=nvme", "parallel.nvme_path=states"]),
                ("weights", &["parallel.zero_stage=3", "parallel.offload_param=cpu", "parallel.offload_optimizer=cpu"]),
            ];
            for (name, sets) in table {
                let found = losses(name, sets);
                let near = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * b);
                assert!(found.len() == 12 && near, "{device}, {kind}, {name}: {found:?} against {expected:?}");
            }
        }
    }
}

#[test]
fn doctor_finds_every_device_of_the_build_healthy() {
    let work = Work::new();
    for device in devices() {
        let mut arguments = vec!["doctor", "--model", "turns", "--device", device];
        let mut laws = if device == "cpu" { 11 } else { 15 };
        if ["vulkan", "wgpu"].contains(&device) {
            // Software compiles the kernels of training for minutes.
            arguments.push("--quick");
            laws = 11;
        }
        let done = work.succeed(&arguments);
        assert_eq!(done.stdout.lines().filter(|line| line.starts_with("ok ")).count(), laws, "{device}: {done:?}");
    }
}

/// The same run by several processes, with everything divided that can be, and gone on with by fewer.
#[cfg(feature = "mpi")]
mod mpi {
    use super::*;

    /// The binary as `ranks` processes; this machine may have fewer cores, and the user may be root.
    fn command(work: &Work, ranks: usize, arguments: &[&str]) -> Command {
        let inner = work.command(arguments);
        let mut command = Command::new("mpirun");
        command.args(["--oversubscribe", "--allow-run-as-root", "-n", &ranks.to_string()]);
        command.arg(inner.get_program()).args(arguments).current_dir(work.0.path());
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("RAYON_NUM_THREADS", "1");
        command
    }

    fn train(work: &Work, ranks: usize, folder: &str, sets: &[&str]) -> Vec<Value> {
        let mut arguments = vec!["train", "run.toml", "--dir", folder];
        for set in ["train.scheduler=constant", "train.eval_every=3"].iter().chain(sets) {
            match *set {
                "--resume" => arguments.push(set),
                set => arguments.extend(["--set", set]),
            }
        }
        let output = command(work, ranks, &arguments).output().expect("mpirun is installed");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{ranks} ranks, {sets:?}: {words}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1, "one rank speaks");
        lasting(work, folder)
    }

    #[test]
    fn mpi_launch_finds_mpirun_and_says_what_to_install_without_it() {
        let work = Work::new();
        let arguments =
            ["launch", "-n", "2", "--", "train", "run.toml", "--dir", "out", "--set", "parallel.zero_stage=2"];
        let done = work.succeed(&arguments);
        assert_eq!(done.stdout.lines().count(), 1, "one rank speaks: {done:?}");
        assert!(!lasting(&work, "out").is_empty(), "{done:?}");
        let output = work.command(&arguments).env("PATH", "").output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && words.contains("openmpi-bin"), "{words}");
    }

    /// Asserts that two runs have the same losses.
    fn assert_same(found: &[Value], expected: &[Value], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(expected) {
            for key in ["loss", "valid_loss", "grad_norm", "step", "tokens", "target_tokens"] {
                let (a, b) = (found[key].as_f64(), expected[key].as_f64());
                let near = a == b || a.zip(b).is_some_and(|(a, b)| (a - b).abs() <= 1e-5 * b.abs());
                assert!(near, "{what}: {key}: {found} against {expected}");
            }
        }
    }

    #[test]
    fn mpi_ranks_train_what_one_process_trains_at_every_stage() {
        let work = Work::new();
        for kind in ["lora", "full"] {
            let kind_set = format!("method.kind={kind}");
            for ranks in [2, 3] {
                let accumulated = format!("train.gradient_accumulation={ranks}");
                let steps = [kind_set.as_str(), "train.batch_size=1", "train.max_steps=6"];
                let alone = train(&work, 1, &format!("{kind}-alone-{ranks}"), &[&steps[..], &[&accumulated]].concat());
                for stage in 0..4 {
                    let (folder, stage_set) =
                        (format!("{kind}-{ranks}-{stage}"), format!("parallel.zero_stage={stage}"));
                    let offload = match stage {
                        2 => "parallel.offload_optimizer=cpu",
                        3 => "parallel.offload_param=cpu",
                        _ => "parallel.bucket_size=300",
                    };
                    let found = train(&work, ranks, &folder, &[&steps[..], &[&stage_set, offload]].concat());
                    assert_same(&found, &alone, &format!("{kind}, {ranks} ranks, stage {stage}"));
                    let file =
                        if kind == "lora" { "adapter/adapter_model.safetensors" } else { "model/model.safetensors" };
                    let values = |folder: &str| -> Vec<f32> {
                        let all = tensors(&work.at(folder).join(file)).into_values();
                        all.flat_map(|(_, _, bytes)| {
                            let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                            values.collect::<Vec<_>>()
                        })
                        .collect()
                    };
                    let (found, expected) = (values(&folder), values(&format!("{kind}-alone-{ranks}")));
                    let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(found.len() == expected.len() && apart < 1e-4, "{folder}: {apart}");
                }
            }
        }
    }

    #[test]
    fn mpi_ranks_share_filled_micro_batches_and_one_without_learns_nothing() {
        let work = Work::new();
        work.write("train.jsonl", &rows(0..7));
        // Four micro-batches per epoch: of three ranks, two have none in every second step.
        let rows = ["data.packing=fill", "data.max_length=40", "train.batch_size=2"];
        let shared = [&rows[..], &["train.max_steps=6", "method.dropout=0.1"]].concat();
        for ranks in [2, 3] {
            let accumulated = format!("train.gradient_accumulation={ranks}");
            let alone = train(&work, 1, &format!("alone-{ranks}"), &[&shared[..], &[&accumulated]].concat());
            let found =
                train(&work, ranks, &format!("ranks-{ranks}"), &[&shared[..], &["parallel.zero_stage=2"]].concat());
            assert_same(&found, &alone, &format!("{ranks} ranks"));
        }
    }

    #[test]
    fn mpi_timeline_has_every_rank_and_says_what_lies_inside_computation() {
        let work = Work::new();
        let mut arguments = vec!["train", "run.toml", "--dir", "out", "--trace", "trace.json"];
        for set in
            ["method.kind=full", "parallel.zero_stage=3", "parallel.offload_param=nvme", "parallel.nvme_path=parts"]
        {
            arguments.extend(["--set", set]);
        }
        work.write("run.toml", &RECIPE.replace("r = 4\ntarget_modules = 'all-linear'\n", ""));
        let output = command(&work, 2, &arguments).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && words.contains("of the time in collectives lies inside computation"),
            "{words}"
        );
        let trace = work.json("trace.json");
        let events = trace["traceEvents"].as_array().unwrap();
        for rank in 0..2 {
            for name in ["forward 1", "backward 1", "all_gather", "reduce_scatter", "wait", "step"] {
                assert!(
                    events.iter().any(|event| event["pid"] == rank && event["name"] == name),
                    "rank {rank}: {name}"
                );
            }
        }
        assert_eq!(fs::read_dir(work.at("parts")).unwrap().count(), 0, "files go with their run");
    }

    #[test]
    fn mpi_run_goes_on_with_another_number_of_ranks_after_a_kill() {
        let work = Work::new();
        // Three ranks of two rows are one rank that accumulates three times two.
        let accumulated = "train.gradient_accumulation=3";
        let shared = ["train.batch_size=2", "train.max_steps=40", "train.save_every=1", "method.kind=full"];
        let alone = train(&work, 1, "alone", &[&shared[..], &[accumulated]].concat());
        let mut arguments = vec!["train", "run.toml", "--dir", "killed"];
        for set in ["train.scheduler=constant", "train.eval_every=3", "parallel.zero_stage=3"].iter().chain(&shared) {
            arguments.extend(["--set", set]);
        }
        let mut job = command(&work, 3, &arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let metrics = work.at("killed/metrics.jsonl");
        while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < 12 {
            assert!(job.try_wait().unwrap().is_none(), "ended early: {:?}", job.wait_with_output());
            std::thread::sleep(Duration::from_millis(2));
        }
        let start = std::time::Instant::now();
        let victim = Command::new("pkill").args(["-9", "-n", "-P", &job.id().to_string()]).status().unwrap();
        assert!(victim.success());
        let output = job.wait_with_output().unwrap();
        assert!(!output.status.success() && start.elapsed() < Duration::from_secs(30), "{output:?}");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains("exited on signal 9"), "{words}");
        let found = train(&work, 1, "killed", &[&shared[..], &[accumulated, "--resume"]].concat());
        assert_same(&found, &alone, "after a kill");
    }

    #[test]
    fn mpi_checkpoint_of_a_killed_run_becomes_one_model_or_adapter() {
        let work = Work::new();
        for (kind, ranks, file) in [
            ("full", 2, "model.safetensors"),
            ("lora", 3, "adapter_model.safetensors"),
            ("p-tuning-v2", 2, "adapter_model.safetensors"),
        ] {
            let folder = format!("killed-{kind}");
            let kind_set = format!("method.kind={kind}");
            let mut arguments = vec!["train", "run.toml", "--dir", &folder];
            if kind != "lora" {
                work.write("bare.toml", &RECIPE.replace("r = 4\ntarget_modules = 'all-linear'\n", ""));
                arguments[1] = "bare.toml";
            }
            let sets = ["parallel.zero_stage=3", "train.max_steps=400", "train.save_every=1", &kind_set];
            sets.iter().for_each(|set| arguments.extend(["--set", set]));
            let mut job =
                command(&work, ranks, &arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let metrics = work.at(&format!("{folder}/metrics.jsonl"));
            while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < 6 {
                assert!(job.try_wait().unwrap().is_none(), "ended early");
                std::thread::sleep(Duration::from_millis(2));
            }
            Command::new("pkill").args(["-9", "-n", "-P", &job.id().to_string()]).status().unwrap();
            assert!(!job.wait().unwrap().success());
            let out = format!("out-{kind}");
            work.succeed(&["consolidate", &folder, "--out", &out]);
            let found = tensors(&work.at(&out).join(file));
            assert!(
                !found.is_empty() && found.values().all(|(_, shape, bytes)| !bytes.is_empty() && !shape.contains(&0))
            );
            // The checkpoint has a copy that its ranks have gathered; this one is from their parts.
            let last = fs::read_dir(work.at(&folder)).unwrap().map(|entry| entry.unwrap().path());
            let last = last.filter(|path| path.extension().is_none() && path.join("state.json").exists());
            let step = |path: &PathBuf| path.to_string_lossy().rsplit('-').next().unwrap().parse::<usize>().unwrap();
            let last = last.max_by_key(step).unwrap();
            let gathered = last.join(if kind == "full" { "model" } else { "adapter" }).join(file);
            assert_eq!(found, tensors(&gathered), "{kind}");
            let parts = fs::read_dir(&last).unwrap().filter(|entry| {
                entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(&format!("-of-{ranks}.safetensors"))
            });
            assert_eq!(parts.count(), ranks, "{kind}");
            let again = work.run(&["consolidate", &last.to_string_lossy(), "--out", &out]);
            assert!(again.code == Some(2) && again.stderr.contains("exists already"), "{again:?}");
            let eval = ["eval", "--task", "qa-loss", "--data", "valid.jsonl"];
            let of = if kind == "full" { vec!["--model", &out] } else { vec!["--model", "model", "--adapter", &out] };
            work.succeed(&[&eval[..], &of].concat());
        }
        let none = work.run(&["consolidate", "model", "--out", "nothing"]);
        assert!(none.code == Some(2) && none.stderr.contains("no recipe.toml"), "{none:?}");
    }
}

#[test]
fn bench_measures_what_it_is_asked_for() {
    let work = Work::new();
    let small = ["bench", "--model", "model", "--length", "8", "--prompt", "4", "--new-tokens", "3", "--rounds", "1"];
    for (train, trainable) in [("lora", Some(8 * (16 + 16) * 2 + 8 * (16 + 8) * 2)), ("full", None)] {
        let report = work.succeed(&[&small[..], &["--train", train]].concat()).json();
        for speed in [&report["forward"], &report["decode"], &report["train"]] {
            assert!(speed["tokens_per_second"].as_f64().unwrap() > 0.0, "{report}");
        }
        assert_eq!(report["forward"]["tokens"], 8);
        assert_eq!(report["decode"]["tokens"], 3);
        assert_eq!(report["train"]["tokens"], 16);
        if let Some(trainable) = trainable {
            assert_eq!(report["train"]["trainable_parameters"], trainable);
        }
    }
    let report = work.succeed(&[&small[..], &["--train", "none", "--weights", "bf16"]].concat()).json();
    assert_eq!((&report["train"], &report["weights"]), (&Value::Null, &json!("bf16")));
    refused_in(&work, &[&small[..], &["--train", "full", "--weights", "bf16"]].concat(), &["--train full", "f32"]);
    refused_in(&work, &["bench", "--model", "model", "--length", "1"], &["--length", "at least 2"]);
}
