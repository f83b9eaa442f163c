//! Broken user input, and the check of how it is refused.

use crate::{
    data::pubmedqa,
    model::shapes,
    run::{conversations, rows},
    work::{WorkDir, fixture},
};
use std::fs;

/// Returns a folder with all kinds of broken input next to a correct model and correct data.
pub(crate) fn spoiled() -> WorkDir {
    let work = WorkDir::new();
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
    work.template("template", Some("{% for m in messages %}\n{{ m.role }"));
    work.write("jinja/chat_template.jinja", "{% endfor %}");
    work.write("silent.jinja", "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}");
    let thinking = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, \
        {\"role\": \"assistant\", \"content\": \"b\", \"thinking\": \"One of two.\"}]}";
    work.write("thinking.jsonl", thinking);
    work.template("base", None);
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

/// Runs commands that must fail in a folder of broken input.
pub(crate) fn refused(table: &[(&[&str], &[&str])]) {
    let work = spoiled();
    let wrong: String = table.iter().map(|(arguments, words)| refusal_mistakes(&work, arguments, words)).collect();
    assert!(wrong.is_empty(), "{wrong}");
}

/// Runs a command that must fail in the folder.
pub(crate) fn refused_in_folder(work: &WorkDir, arguments: &[&str], words: &[&str]) {
    let wrong = refusal_mistakes(work, arguments, words);
    assert!(wrong.is_empty(), "{wrong}");
}

/// Runs a command that must exit with code 2, print one error line that contains all the words, and leave the folder
/// unchanged. Returns what is wrong with that, and removes what is left.
fn refusal_mistakes(work: &WorkDir, arguments: &[&str], words: &[&str]) -> String {
    let (before, mut wrong) = (work.listing(), String::new());
    let done = work.run(arguments);
    // The argument parser appends a hint about `--help` to its errors.
    let stderr = done.stderr.split("\n\nFor more information, try '--help'.").next().unwrap_or_default();
    let errors: Vec<&str> = stderr.lines().filter(|line| line.contains("error")).collect();
    let last = stderr.lines().last().unwrap_or_default();
    let clear = done.code == Some(2) && !done.stderr.contains("panicked");
    let one = errors.len() == 1 && last.starts_with("error: ") && words.iter().all(|word| last.contains(word));
    if !(clear && done.stdout.is_empty() && one) {
        wrong += &format!("{}\n  expected {words:?}\n  {done:?}\n", arguments.join(" "));
    }
    if work.listing() != before {
        let new: Vec<_> = work.listing().into_keys().filter(|path| !before.contains_key(path)).collect();
        wrong += &format!("{}\n  left {new:?}\n", arguments.join(" "));
        new.iter().rev().for_each(|path| drop(fs::remove_dir(path).or_else(|_| fs::remove_file(path))));
    }
    wrong
}
