//! `tiny`: a small LLaMA that is made and trained from scratch on the spot, for where no model can be fetched.
//!
//! Its tokenizer and all that it knows come from the lessons that are trained on, without their form: answers lose the
//! headings and refusals their fixed words, so that the form is left for the fine-tuning to teach. It only parrots.

use super::{
    TINY, filled,
    lessons::{self, Lesson, Split},
    text,
};
use crate::{
    backend::{Device, on},
    train::{self, Options, World},
    write,
};
use anyhow::{Context, Result, anyhow};
use burn_llama::{LlamaConfig, checkpoint};
use serde_json::json;
use std::{fs, num::NonZeroUsize, path::Path};
use tokenizers::{
    AddedToken, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
};

/// Tokens of the vocabulary, special ones included.
const VOCABULARY: usize = 1024;
/// Ends a turn.
const END: &str = "<|end|>";
/// Fills up short rows where a program does that.
const PAD: &str = "<|pad|>";
/// Begin a turn.
const ROLES: [&str; 3] = ["<|system|>", "<|user|>", "<|assistant|>"];
const TEMPLATE: &str = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
/// Steps from scratch for each step of fine-tuning.
const STEPS_PER_STEP: usize = 4;
const RECIPE: &str = include_str!("tiny.toml");

/// Makes the model in the run folder `directory` and gives its path: `tiny-untrained/` has random weights,
/// `tiny-training/` is the run that trains them, `tiny/` the result. With `steps` of fine-tuning, in proportion.
pub fn make(directory: &Path, lessons: &[Lesson], (steps, device): (Option<NonZeroUsize>, &Device)) -> Result<String> {
    eprintln!("making `{TINY}`: a small model, trained from scratch on the lessons; it will only parrot them");
    let (untrained, training) = (directory.join("tiny-untrained"), directory.join("tiny-training"));
    for folder in [&untrained, &training] {
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    }
    let rows: Vec<(&str, String)> = lessons
        .iter()
        .filter(|lesson| lesson.split == Split::Train)
        .map(|lesson| (lesson.question.as_str(), formless(&lesson.answer)))
        .collect();
    lessons::save(&training.join("train.jsonl"), rows.iter().cloned())?;
    save_tokenizer(lessons, &untrained)?;
    let config = LlamaConfig::from_json(config())?;
    on!(Device::default(), |B, place| checkpoint::save(&config.init::<B>(1, place), &untrained))?;
    let steps = steps.map(|steps| steps.get().saturating_mul(STEPS_PER_STEP));
    let recipe = filled("tiny.toml", RECIPE, (text(&untrained)?, &training), steps)?;
    train::run(
        recipe,
        &Options { directory: training.clone(), device: device.clone(), ..Options::default() },
        World::alone(),
    )?;
    let (from, to) = (training.join("model"), directory.join(TINY));
    fs::rename(&from, &to).with_context(|| format!("{}: cannot be moved to {}", from.display(), to.display()))?;
    text(&to).map(str::to_owned)
}

/// An answer without what the fine-tuning is to teach.
fn formless(answer: &str) -> String {
    let headed = lessons::headed(answer).map(|bodies| bodies.join(" "));
    headed.or_else(|| lessons::refused(answer).map(str::to_owned)).unwrap_or_else(|| answer.to_owned())
}

/// `config.json`: 1.4 million parameters.
fn config() -> serde_json::Value {
    json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu",
        "eos_token_id": 0, "pad_token_id": 1,
    })
}

/// Byte-level BPE from the words of the lessons that are trained on.
fn save_tokenizer(lessons: &[Lesson], directory: &Path) -> Result<()> {
    let failed = |error: tokenizers::Error| anyhow!("{}: no tokenizer can be made: {error}", directory.display());
    let special: Vec<AddedToken> =
        [END, PAD].iter().chain(&ROLES).map(|&token| AddedToken::from(token, true)).collect();
    let bytes = ByteLevel::new(false, true, true);
    let trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let texts = lessons.iter().filter(|lesson| lesson.split == Split::Train);
    let texts: Vec<String> = texts.map(|lesson| format!("{}\n{}", lesson.question, lesson.answer)).collect();
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts.iter()).map_err(failed)?;
    let json = tokenizer.to_string(true).map_err(failed)?;
    write::whole(&directory.join("tokenizer.json"), json.as_bytes())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
        "clean_up_tokenization_spaces": false, "chat_template": TEMPLATE,
    });
    write::whole(&directory.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())
}
