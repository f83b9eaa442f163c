//! `tiny`: a small LLaMA that is created and trained from scratch, for use where no model can be fetched.
//!
//! Its tokenizer and its weights come from the training lessons without their form: answers lose the headings and
//! refusals their fixed words, so that fine-tuning still has the form to teach. It only parrots.

use super::{
    TINY, fill_recipe,
    lessons::{self, Lesson, LessonSplit},
    utf8_path,
};
use crate::{
    backend::{Device, with_backend},
    train::{self, TrainOptions, World},
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

/// The size of the vocabulary, special tokens included.
const VOCABULARY: usize = 1024;
/// The token that ends a turn.
const END_OF_TURN: &str = "<|end|>";
/// The padding token, for programs that pad.
const PAD: &str = "<|pad|>";
/// The tokens that begin a turn.
const ROLE_TOKENS: [&str; 3] = ["<|system|>", "<|user|>", "<|assistant|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
/// Steps of training from scratch for each step of fine-tuning.
const STEPS_PER_STEP: usize = 4;
const RECIPE: &str = include_str!("tiny.toml");

/// Creates the model in the run directory `directory` and returns its path: `tiny-untrained/` has random weights,
/// `tiny-training/` is the run that trains them, `tiny/` the result. If `steps` of fine-tuning are given, its training
/// steps are in proportion.
pub(super) fn create(
    directory: &Path,
    lessons: &[Lesson],
    steps: Option<NonZeroUsize>,
    device: &Device,
) -> Result<String> {
    eprintln!("making `{TINY}`: a small model, trained from scratch on the lessons; it will only parrot them");
    let (untrained, training) = (directory.join("tiny-untrained"), directory.join("tiny-training"));
    for folder in [&untrained, &training] {
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    }
    let rows: Vec<(&str, String)> = lessons
        .iter()
        .filter(|lesson| lesson.split == LessonSplit::Train)
        .map(|lesson| (lesson.question.as_str(), without_form(&lesson.answer)))
        .collect();
    lessons::save(&training.join("train.jsonl"), rows.iter().cloned())?;
    save_tokenizer(lessons, &untrained)?;
    let config = LlamaConfig::from_json(config())?;
    with_backend!(Device::default(), |B, device| checkpoint::save(&config.init::<B>(1, device), &untrained))?;
    let steps = steps.map(|steps| steps.get().saturating_mul(STEPS_PER_STEP));
    let recipe = fill_recipe("tiny.toml", RECIPE, utf8_path(&untrained)?, &training, steps)?;
    train::run(
        recipe,
        &TrainOptions { directory: training.clone(), device: device.clone(), ..TrainOptions::default() },
        World::single_process(),
    )?;
    let (from, to) = (training.join("model"), directory.join(TINY));
    fs::rename(&from, &to).with_context(|| format!("{}: cannot be moved to {}", from.display(), to.display()))?;
    utf8_path(&to).map(str::to_owned)
}

/// Returns an answer without the form that fine-tuning is to teach.
fn without_form(answer: &str) -> String {
    let headed = lessons::parse_headings(answer).map(|bodies| bodies.join(" "));
    headed.or_else(|| lessons::parse_refusal(answer).map(str::to_owned)).unwrap_or_else(|| answer.to_owned())
}

/// Returns the contents of `config.json`: a model of 1.4 million parameters.
fn config() -> serde_json::Value {
    json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu",
        "eos_token_id": 0, "pad_token_id": 1,
    })
}

/// Trains a byte-level BPE tokenizer on the training lessons and saves it.
fn save_tokenizer(lessons: &[Lesson], directory: &Path) -> Result<()> {
    let failed = |error: tokenizers::Error| anyhow!("{}: no tokenizer can be made: {error}", directory.display());
    let special: Vec<AddedToken> =
        [END_OF_TURN, PAD].iter().chain(&ROLE_TOKENS).map(|&token| AddedToken::from(token, true)).collect();
    let bytes = ByteLevel::new(false, true, true);
    let trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let texts = lessons.iter().filter(|lesson| lesson.split == LessonSplit::Train);
    let texts: Vec<String> = texts.map(|lesson| format!("{}\n{}", lesson.question, lesson.answer)).collect();
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts.iter()).map_err(failed)?;
    let json = tokenizer.to_string(true).map_err(failed)?;
    write::write_atomically(&directory.join("tokenizer.json"), json.as_bytes())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TURN, "pad_token": PAD,
        "clean_up_tokenization_spaces": false, "chat_template": CHAT_TEMPLATE,
    });
    write::write_atomically(&directory.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())
}
