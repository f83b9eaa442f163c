//! Figures about rows.

use crate::prepare::{
    clean::language,
    groups::{Fingerprint, Nearness, earlier_twins, first_of_group},
    output::InputRow,
    texts::{RowTexts, TextPart, for_each_text},
    units::{Units, is_han},
};
use crate::schema::Format;
use anyhow::Result;
use burn_llama::Tokenizer;
use jieba_rs::Jieba;
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::LazyLock,
};
use xxhash_rust::xxh3::xxh3_64;

static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);

/// The largest number of rows shown of a language.
const SHOWN: usize = 5;
const TOP: usize = 20;

/// The facts about one row.
pub(super) struct RowFacts {
    file: String,
    language: &'static str,
    format: Format,
    question_chars: usize,
    answer_chars: usize,
    tokens: Option<usize>,
    turns: usize,
    label: Option<String>,
    fingerprint: Fingerprint,
    words: Vec<String>,
    answer_grams: [Vec<u64>; 2],
    last_sentence: Option<String>,
    row: Map<String, Value>,
}

impl RowFacts {
    /// Finds the facts about a row.
    ///
    /// # Errors
    /// If the tokenizer cannot encode a text.
    pub(super) fn of(InputRow { location, schema, mut row }: InputRow, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let texts = RowTexts::of(&mut row, &schema);
        let mut turns = 0;
        for_each_text(&mut row, &schema, &mut |part, _| turns += usize::from(part == TextPart::Question));
        let answer = Units::of(&texts.answer);
        let tokens = tokenizer.map(|tokenizer| tokenizer.encode_plain(&texts.all, false)).transpose()?;
        let label = ["final_decision", "answer_idx", "answerKey", "answer", "label"]
            .iter()
            .find_map(|name| row.get(*name)?.as_str());
        let file = location.rsplit_once(':').map_or(location.as_str(), |(file, _)| file).to_owned();
        let last = texts.answer.trim_end().rsplit_terminator(['.', '!', '?', '。', '！', '？', '\n']).next();
        Ok(Self {
            file,
            language: language(&texts.question),
            format: schema.format,
            question_chars: texts.question.chars().count(),
            answer_chars: texts.answer.chars().count(),
            tokens: tokens.map(|ids| ids.len()),
            turns,
            label: label.filter(|label| label.len() <= 8).map(str::to_owned),
            fingerprint: Fingerprint::new(
                &texts.question,
                Nearness { long: schema.format == Format::Text, ..Nearness::questions() },
            ),
            words: words(&texts.question),
            answer_grams: [answer.hashes(0), answer.grams(2, 0)],
            last_sentence: last
                .map(|sentence| sentence.trim().to_owned())
                .filter(|sentence| sentence.chars().count() > 10),
            row,
        })
    }
}

/// Returns the words of a text: those of jieba in Chinese, without single characters.
fn words(text: &str) -> Vec<String> {
    if text.chars().any(is_han) {
        let words = JIEBA.cut(text, true).into_iter().map(|token| token.word.to_string());
        return words.filter(|word| word.chars().count() > 1 && word.chars().all(char::is_alphanumeric)).collect();
    }
    Units::of(text)
        .iter()
        .filter(|word| word.len() > 3 && word.chars().all(char::is_alphabetic))
        .map(str::to_owned)
        .collect()
}

/// A row that is shown, after the hash by which it was chosen.
type ShownRow = (u64, Map<String, Value>);

/// The figures about all rows.
#[derive(Default)]
pub(super) struct Statistics {
    pub rows: usize,
    files: BTreeMap<String, u64>,
    languages: BTreeMap<&'static str, u64>,
    formats: BTreeMap<&'static str, u64>,
    labels: BTreeMap<String, u64>,
    turns: BTreeMap<usize, u64>,
    pub question_chars: Vec<usize>,
    pub answer_chars: Vec<usize>,
    pub tokens: Vec<usize>,
    fingerprints: Vec<Fingerprint>,
    words: HashMap<String, u64>,
    sentences: HashMap<String, u64>,
    distinct: [HashSet<u64>; 2],
    grams: [u64; 2],
    /// Rows of each language, those with the lowest hashes.
    pub shown: BTreeMap<&'static str, Vec<ShownRow>>,
}

impl Statistics {
    /// Takes a row into account.
    pub(super) fn add(&mut self, row: RowFacts) {
        self.rows += 1;
        *self.files.entry(row.file).or_default() += 1;
        *self.languages.entry(row.language).or_default() += 1;
        *self.formats.entry(row.format.name()).or_default() += 1;
        *self.turns.entry(row.turns).or_default() += 1;
        row.label.into_iter().for_each(|label| *self.labels.entry(label).or_default() += 1);
        self.question_chars.push(row.question_chars);
        self.answer_chars.push(row.answer_chars);
        self.tokens.extend(row.tokens);
        row.words.into_iter().for_each(|word| *self.words.entry(word).or_default() += 1);
        row.last_sentence.into_iter().for_each(|last| *self.sentences.entry(last).or_default() += 1);
        for ((seen, total), grams) in self.distinct.iter_mut().zip(&mut self.grams).zip(row.answer_grams) {
            *total += grams.len() as u64;
            seen.extend(grams);
        }
        let shown = self.shown.entry(row.language).or_default();
        shown.push((xxh3_64(&row.fingerprint.exact.to_le_bytes()), row.row));
        shown.sort_by_key(|(hash, _)| *hash);
        shown.truncate(SHOWN);
        self.fingerprints.push(row.fingerprint);
    }

    /// Returns the figures in JSON.
    pub(super) fn figures(&self, max_length: usize) -> Value {
        let twins = earlier_twins(&self.fingerprints, Nearness::questions());
        let first = first_of_group(&twins);
        let exact: HashSet<u128> = self.fingerprints.iter().map(|row| row.exact).collect();
        let groups: HashSet<u32> = first.iter().copied().collect();
        let distinct = |n: usize| self.distinct[n].len() as f64 / self.grams[n].max(1) as f64;
        let cut = self.tokens.iter().filter(|&&tokens| tokens > max_length).count();
        json!({
            "rows": self.rows,
            "files": self.files,
            "formats": self.formats,
            "languages": self.languages,
            "questions per row": self.turns,
            "characters of questions": lengths(&self.question_chars),
            "characters of answers": lengths(&self.answer_chars),
            "tokens": lengths(&self.tokens),
            "rows that are cut": {"max_length": max_length, "rows": if self.tokens.is_empty() { Value::Null } else { cut.into() }},
            "duplicates": {"equal questions": self.rows - exact.len(), "equal or near questions": self.rows - groups.len()},
            "distinct words of answers": {"distinct-1": distinct(0), "distinct-2": distinct(1)},
            "labels": if (2..=12).contains(&self.labels.len()) { json!(self.labels) } else { Value::Null },
            "most frequent words of questions": top(&self.words, 2),
            "most frequent last sentences": top(&self.sentences, 3),
        })
    }
}

/// Returns the most frequent texts with their counts, those that occur at least `least` times.
fn top(counts: &HashMap<String, u64>, least: u64) -> Value {
    let mut sorted: Vec<(&String, &u64)> = counts.iter().filter(|(_, count)| **count >= least).collect();
    sorted.sort_by(|one, other| other.1.cmp(one.1).then_with(|| one.0.cmp(other.0)));
    Value::Object(sorted.into_iter().take(TOP).map(|(text, count)| (text.clone(), (*count).into())).collect())
}

/// Returns the mean, percentiles by nearest rank and the maximum.
fn lengths(all: &[usize]) -> Value {
    if all.is_empty() {
        return Value::Null;
    }
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    let rank = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1];
    let mean = sorted.iter().sum::<usize>() as f64 / sorted.len() as f64;
    json!({"mean": (mean * 10.0).round() / 10.0, "p50": rank(50), "p90": rank(90), "p99": rank(99), "max": rank(100)})
}
