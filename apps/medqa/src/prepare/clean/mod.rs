//! The verb `data clean`: repairs texts, masks personal data, and takes out rows that teach nothing.

mod normalize;
mod personal;
mod quality;

use super::{
    output::{InputArgs, RowOutput},
    texts::{RowTexts, TextPart, for_each_text},
    units::Units,
};
use crate::{
    data::{DataRow, content},
    schema::Format,
};
use anyhow::Result;
use clap::Args;
use normalize::REPAIRS;
pub(super) use personal::OnPersonal;
pub(in crate::prepare) use quality::language;
use quality::{TextBounds, is_mojibake, reason};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};
use xxhash_rust::xxh3::xxh3_64;

/// The number of rows that are worked on at a time.
const CHUNK: usize = 4096;
/// The number of examples of each step in the counts.
const EXAMPLES: usize = 3;

/// Arguments of `data clean`.
#[derive(Args, Clone, Debug)]
pub(crate) struct CleanArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// File to write; rows that were taken out go to the file beside it that ends in .removed.jsonl
    #[arg(long)]
    pub out: PathBuf,
    /// Treatment of phone numbers, identity and bank cards, e-mails, links, record numbers, dates of birth and names
    #[arg(long, default_value = "mask")]
    pub personal: OnPersonal,
    /// Languages to keep, such as en,zh; by default all
    #[arg(long, value_delimiter = ',', value_name = "CODE,...")]
    pub language: Vec<String>,
    /// Least characters of a question; a Han character counts as two
    #[arg(long, default_value_t = 4)]
    pub min_question: usize,
    /// Least words, or Han characters, of an answer
    #[arg(long, default_value_t = 2)]
    pub min_answer: usize,
    /// Largest number of characters of a row
    #[arg(long)]
    pub max_chars: Option<usize>,
    /// Removes first and last sentences that stand in more than one answer of a hundred; without it they are counted
    #[arg(long)]
    pub remove_boilerplate: bool,
}

/// A row after cleaning.
struct CleanedRow {
    row: DataRow,
    texts: RowTexts,
    /// The row before, if it was changed.
    before: Option<Map<String, Value>>,
    steps: Vec<&'static str>,
    personal: BTreeMap<&'static str, u64>,
    language: &'static str,
    removed: Option<String>,
}

/// Runs the verb. With boilerplate to find, the rows are read twice.
///
/// # Errors
/// If a file cannot be read or written, or no row is left.
pub(super) fn clean(args: &CleanArgs) -> Result<Value> {
    let boilerplate = Boilerplate::find(args)?;
    let mut output = RowOutput::new(&args.out);
    let mut counts = CleanCounts::default();
    let mut rows = args.input.rows()?;
    loop {
        let chunk: Vec<DataRow> = rows.by_ref().take(CHUNK).collect::<Result<_>>()?;
        if chunk.is_empty() {
            break;
        }
        let cleaned: Vec<CleanedRow> =
            chunk.into_par_iter().map(|row| clean_row(row, args, boilerplate.removed(args))).collect();
        for row in cleaned {
            counts.add(&row);
            let CleanedRow { row: DataRow { location, schema, value }, removed, before, .. } = row;
            let location = location.to_string();
            match (value, removed) {
                (Ok(row), None) => output.keep(&row, &schema)?,
                (Ok(row), Some(reason)) => {
                    output.remove(Value::Object(before.unwrap_or(row)), &location, &reason, Value::Null)?;
                }
                (Err(problem), _) => {
                    output.remove(Value::Null, &location, "mistake", format!("{problem:#}").into())?;
                }
            }
        }
    }
    let more = json!({
        "steps": counts.steps, "personal": counts.personal, "languages": counts.languages,
        "damaged_encoding": counts.mojibake, "boilerplate": boilerplate.described,
    });
    output.finish("clean", more)
}

fn clean_row(row: DataRow, args: &CleanArgs, boilerplate: &HashMap<u64, u32>) -> CleanedRow {
    let (mut steps, mut personal) = (Vec::new(), BTreeMap::new());
    let DataRow { location, schema, value } = row;
    let mut row = match value.and_then(|row| content::parse_row(&row, &schema).map(|_| row)) {
        Ok(row) => row,
        Err(problem) => {
            let row = DataRow { location, schema, value: Err(problem) };
            let texts = RowTexts::default();
            return CleanedRow { row, texts, before: None, steps, personal, language: "other", removed: None };
        }
    };
    let original = row.clone();
    for_each_text(&mut row, &schema, &mut |part, text| {
        for step in &REPAIRS {
            if let Cow::Owned(repaired) = (step.repair)(text) {
                *text = repaired;
                steps.push(step.name);
            }
        }
        if part == TextPart::Answer
            && let Some(rest) = without_boilerplate(text, boilerplate)
        {
            *text = rest;
            steps.push("boilerplate");
        }
        if let Some(masked) = personal::masked(text, &mut personal)
            && args.personal == OnPersonal::Mask
        {
            *text = masked;
            steps.push("personal data");
        }
    });
    steps.sort_unstable();
    steps.dedup();
    let texts = RowTexts::of(&mut row, &schema);
    let language = language(&texts.question);
    let has_answer = !matches!(schema.format, Format::Text | Format::PubMedQa | Format::MultipleChoice);
    let bounds = TextBounds { min_question: args.min_question, min_answer: args.min_answer, max_chars: args.max_chars };
    let mut removed = reason(&texts, has_answer, bounds).map(str::to_owned);
    if removed.is_none() && !args.language.is_empty() && !args.language.iter().any(|code| code == language) {
        removed = Some(format!("language {language}"));
    }
    if removed.is_none() && args.personal == OnPersonal::Drop && !personal.is_empty() {
        removed = Some("personal data".to_owned());
    }
    let before = (row != original).then_some(original);
    CleanedRow { row: DataRow { location, schema, value: Ok(row) }, texts, before, steps, personal, language, removed }
}

/// The counts of cleaning.
#[derive(Default)]
struct CleanCounts {
    steps: Map<String, Value>,
    personal: BTreeMap<&'static str, u64>,
    languages: BTreeMap<&'static str, u64>,
    mojibake: u64,
}

impl CleanCounts {
    fn add(&mut self, row: &CleanedRow) {
        for step in &row.steps {
            let entry = self.steps.entry(*step).or_insert_with(|| json!({"rows": 0, "examples": []}));
            entry["rows"] = (entry["rows"].as_u64().unwrap_or(0) + 1).into();
            let examples = entry["examples"].as_array_mut();
            if let (Some(examples), Some(before), Ok(after)) = (examples, &row.before, &row.row.value)
                && examples.len() < EXAMPLES
            {
                examples.push(json!({"at": row.row.location.to_string(), "before": before, "after": after}));
            }
        }
        for (kind, count) in &row.personal {
            *self.personal.entry(kind).or_default() += count;
        }
        *self.languages.entry(row.language).or_default() += 1;
        self.mojibake += u64::from(is_mojibake(&row.texts.all));
    }
}

/// First and last sentences that many answers share.
struct Boilerplate {
    sentences: HashMap<u64, u32>,
    none: HashMap<u64, u32>,
    described: Value,
}

impl Boilerplate {
    fn find(args: &CleanArgs) -> Result<Self> {
        let (mut counts, mut texts, mut answers) = (HashMap::<u64, u32>::new(), HashMap::new(), 0_u64);
        for row in args.input.rows()? {
            let DataRow { schema, value, .. } = row?;
            let Ok(mut row) = value else { continue };
            for_each_text(&mut row, &schema, &mut |part, text| {
                if part == TextPart::Answer {
                    answers += 1;
                    for sentence in ends(text) {
                        let key = xxh3_64(sentence.as_bytes());
                        let count = counts.entry(key).or_default();
                        *count += 1;
                        if *count == 20 {
                            texts.insert(key, sentence.to_owned());
                        }
                    }
                }
            });
        }
        let limit = (answers / 100).max(20);
        let sentences: HashMap<u64, u32> = counts.into_iter().filter(|(_, count)| u64::from(*count) > limit).collect();
        let mut described: Vec<(u32, String)> =
            sentences.iter().filter_map(|(key, count)| Some((*count, texts.get(key)?.clone()))).collect();
        described.sort_by(|one, other| other.0.cmp(&one.0).then_with(|| one.1.cmp(&other.1)));
        let described = described.iter().take(20).map(|(count, text)| json!({"answers": count, "sentence": text}));
        Ok(Self { sentences, none: HashMap::new(), described: described.collect() })
    }

    fn removed(&self, args: &CleanArgs) -> &HashMap<u64, u32> {
        if args.remove_boilerplate { &self.sentences } else { &self.none }
    }
}

/// Returns the first and the last sentence of a text of several sentences.
fn ends(text: &str) -> Vec<&str> {
    let all: Vec<&str> = sentences(text).collect();
    match all.as_slice() {
        // Verdicts and doses are no boilerplate.
        [first, .., last] => [first.trim(), last.trim()]
            .into_iter()
            .filter(|end| Units::of(end).len() >= 4 && !end.contains(|c: char| c.is_ascii_digit()))
            .collect(),
        _ => Vec::new(),
    }
}

fn sentences(text: &str) -> impl Iterator<Item = &str> {
    // A point inside a number ends no sentence.
    let mut ends: Vec<usize> = Vec::new();
    for (at, mark) in text.char_indices() {
        let next = at + mark.len_utf8();
        let apart = text[next..].chars().next().is_none_or(char::is_whitespace);
        if matches!(mark, '。' | '！' | '？' | '\n') || matches!(mark, '.' | '!' | '?') && apart {
            ends.push(next);
        }
    }
    ends.push(text.len());
    let starts: Vec<usize> = std::iter::once(0).chain(ends.iter().copied()).collect();
    let parts = starts.into_iter().zip(ends).map(|(start, end)| &text[start..end]);
    parts.filter(|sentence| sentence.trim().len() > 3)
}

/// Returns the text without a first and a last sentence that many answers share.
fn without_boilerplate(text: &str, boilerplate: &HashMap<u64, u32>) -> Option<String> {
    if boilerplate.is_empty() {
        return None;
    }
    let mut rest = text;
    while let [first, .., last] = ends(rest).as_slice() {
        if boilerplate.contains_key(&xxh3_64(first.as_bytes())) {
            rest = rest.trim().strip_prefix(first)?.trim();
        } else if boilerplate.contains_key(&xxh3_64(last.as_bytes())) {
            rest = rest.trim().strip_suffix(last)?.trim();
        } else {
            break;
        }
    }
    (rest.len() < text.len()).then(|| rest.to_owned())
}
