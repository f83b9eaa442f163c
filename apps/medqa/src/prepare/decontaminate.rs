//! The verb `data decontaminate`: rows that quote a test set are taken out, and test items that stand in the rows are
//! listed.

use super::{
    output::{InputArgs, InputRow, RowOutput},
    texts::{RowTexts, TextPart, for_each_text},
    units::Units,
    writer::RowWriter,
};
use crate::{
    data::RowReader,
    schema::{Format, SchemaRequest},
};
use anyhow::{Result, bail};
use clap::Args;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

/// Words, and Han characters, in a run that is looked for.
const WORDS: usize = 8;
const CHARACTERS: usize = 13;
/// Units below which an item is too short to be looked for inside a row.
const SHORTEST: usize = 4;
/// The number of rows that are worked on at a time.
const CHUNK: usize = 4096;
const SEED: u64 = 42;

/// Arguments of `data decontaminate`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DecontaminateArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// Test sets, in any format
    #[arg(long, required = true, num_args = 1..)]
    pub against: Vec<PathBuf>,
    /// File to write; rows that were taken out go to the file beside it that ends in .removed.jsonl, test items that
    /// stand in the rows to the one that ends in .items.jsonl
    #[arg(long)]
    pub out: PathBuf,
    /// Least share of an item's text that stands in one row: in runs of 8 words, or of 13 Han characters
    #[arg(long, default_value_t = 0.5)]
    pub threshold: f64,
}

/// A text of a test item: its question, or its question with context and options.
struct ItemText {
    location: String,
    part: &'static str,
    units: Units,
    /// Length of the runs that are looked for; shorter texts are looked for as a whole.
    n: usize,
}

/// The place of a run in a test item.
#[derive(Debug, Clone, Copy)]
struct RunPlace {
    item: u32,
    at: u32,
}

/// All runs of the test items.
struct ItemIndex {
    items: Vec<ItemText>,
    runs: HashMap<u64, Vec<RunPlace>>,
    /// The lengths of the runs.
    lengths: Vec<usize>,
}

/// A test item that a row holds.
struct Overlap {
    item: u32,
    /// The share of the item's units that stand in the row.
    covered: f64,
    from: usize,
    to: usize,
}

/// Runs the verb.
///
/// # Errors
/// If a row has a mistake, or a file cannot be read or written.
pub(super) fn decontaminate(args: &DecontaminateArgs) -> Result<Value> {
    let index = ItemIndex::read(args)?;
    let mut output = RowOutput::new(&args.out);
    // The row that covers most of an item.
    let mut best: BTreeMap<u32, (f64, String, String)> = BTreeMap::new();
    let mut rows = args.input.valid_rows()?;
    loop {
        let chunk: Vec<InputRow> = rows.by_ref().take(CHUNK).collect::<Result<_>>()?;
        if chunk.is_empty() {
            break;
        }
        let found: Vec<(InputRow, Vec<Overlap>)> = chunk
            .into_par_iter()
            .map(|mut input| {
                let texts = RowTexts::of(&mut input.row, &input.schema);
                let overlaps = index.overlaps(&texts, args.threshold);
                (input, overlaps)
            })
            .collect();
        for (InputRow { location, schema, row }, overlaps) in found {
            let Some(most) = overlaps.iter().max_by(|a, b| a.covered.total_cmp(&b.covered).then(b.item.cmp(&a.item)))
            else {
                output.keep(&row, &schema)?;
                continue;
            };
            for overlap in &overlaps {
                let text =
                    index.items[overlap.item as usize].units.excerpt(overlap.from, overlap.to.min(overlap.from + 40));
                let known = best.entry(overlap.item).or_insert((0.0, String::new(), String::new()));
                if overlap.covered > known.0 {
                    *known = (overlap.covered, location.clone(), text);
                }
            }
            let item = &index.items[most.item as usize];
            let details = json!({"item": item.location, "part": item.part, "covered": most.covered});
            output.remove(Value::Object(row), &location, "stands in a test set", details)?;
        }
    }
    write_items(&output.beside("items.jsonl"), &index, &best)?;
    let locations: std::collections::BTreeSet<&str> =
        best.keys().map(|item| index.items[*item as usize].location.as_str()).collect();
    let total: std::collections::BTreeSet<&str> = index.items.iter().map(|item| item.location.as_str()).collect();
    output.finish("decontaminate", json!({"test_items": total.len(), "test_items_in_rows": locations.len()}))
}

fn write_items(path: &std::path::Path, index: &ItemIndex, best: &BTreeMap<u32, (f64, String, String)>) -> Result<()> {
    let mut writer = RowWriter::create(path, &[])?;
    for (item, (covered, row, text)) in best {
        let item = &index.items[*item as usize];
        let line = json!({"item": item.location, "part": item.part, "covered": covered, "row": row, "text": text});
        writer.write(line.as_object().unwrap_or(&Map::new()))?;
    }
    writer.finish()
}

impl ItemIndex {
    fn read(args: &DecontaminateArgs) -> Result<Self> {
        let mut items = Vec::new();
        for path in &args.against {
            for row in RowReader::open(path, &SchemaRequest::default())? {
                let InputRow { location, schema, mut row } = InputRow::new(row?)?;
                let texts = RowTexts::of(&mut row, &schema);
                let (mut with_context, mut options) = (String::new(), String::new());
                for_each_text(&mut row, &schema, &mut |part, text| {
                    if part != TextPart::Answer && part != TextPart::System {
                        with_context.extend([&*text, "\n"]);
                    }
                    if part == TextPart::Context && schema.format == Format::MultipleChoice {
                        options.extend([&*text, "\n"]);
                    }
                });
                let options = ItemText::new(location.clone(), "options", &options);
                if options.units.len() >= WORDS {
                    items.push(options);
                }
                let has_context = with_context.trim().len() > texts.question.trim().len();
                if schema.format != Format::Text {
                    items.push(ItemText::new(location.clone(), "question", &texts.question));
                }
                if has_context || schema.format == Format::Text {
                    items.push(ItemText::new(location, "question and context", &with_context));
                }
            }
        }
        items.retain(|item| item.units.len() > 0);
        if items.is_empty() {
            bail!("--against: expected at least one test item, found none");
        }
        let (mut runs, mut lengths) = (HashMap::<u64, Vec<RunPlace>>::new(), Vec::new());
        for (number, item) in items.iter().enumerate() {
            if !lengths.contains(&item.n) {
                lengths.push(item.n);
            }
            for (at, run) in item.units.grams(item.n, SEED + item.n as u64).into_iter().enumerate() {
                runs.entry(run).or_default().push(RunPlace { item: number as u32, at: at as u32 });
            }
        }
        lengths.sort_unstable();
        Ok(Self { items, runs, lengths })
    }

    /// Returns the items of which at least the share `threshold` stands in a row.
    fn overlaps(&self, texts: &RowTexts, threshold: f64) -> Vec<Overlap> {
        let (all, question) = (Units::of(&texts.all), Units::of(&texts.question));
        let mut covered: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &n in self.lengths.iter().filter(|&&n| n > 0) {
            for run in all.grams(n, SEED + n as u64) {
                for place in self.runs.get(&run).into_iter().flatten() {
                    covered.entry(place.item).or_default().push(place.at);
                }
            }
        }
        covered
            .into_iter()
            .filter_map(|(item, mut places)| {
                let text = &self.items[item as usize];
                let (length, n) = (text.units.len(), text.n);
                if length < SHORTEST && question != text.units {
                    return None;
                }
                places.sort_unstable();
                places.dedup();
                let (mut units, mut end) = (0, 0);
                for &at in &places {
                    let at = at as usize;
                    units += (at + n) - at.max(end);
                    end = at + n;
                }
                let from = places.first().map_or(0, |&at| at as usize);
                let share = units as f64 / length as f64;
                (share >= threshold).then_some(Overlap { item, covered: share, from, to: end })
            })
            .collect()
    }
}

impl ItemText {
    fn new(location: String, part: &'static str, text: &str) -> Self {
        let units = Units::of(text);
        let n = if units.is_chinese() { CHARACTERS } else { WORDS };
        // A shorter text is one run.
        let n = n.min(units.len());
        Self { location, part, units, n }
    }
}
