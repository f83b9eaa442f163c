//! The verb `data dedup`: of rows that ask the same, one stays.

use super::{
    groups::{Fingerprint, Nearness, earlier_twins, first_of_group},
    output::{InputArgs, InputRow, RowOutput, progress},
    texts::RowTexts,
};
use crate::schema::Format;
use anyhow::Result;
use clap::{Args, ValueEnum};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{collections::HashMap, path::PathBuf};
use xxhash_rust::xxh3::xxh3_64;

/// The number of rows that are worked on at a time.
const CHUNK: usize = 4096;

/// Arguments of `data dedup`. Memory: about 500 bytes per row besides the rows' location.
#[derive(Args, Clone, Debug)]
pub(crate) struct DedupArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// File to write; rows that were taken out go to the file beside it that ends in .removed.jsonl
    #[arg(long)]
    pub out: PathBuf,
    /// Row of a group that stays
    #[arg(long, default_value = "longest")]
    pub keep: KeepAnswer,
    /// Least Jaccard similarity of two near questions, over pairs of words or of Han characters; for plain text over
    /// runs of five; 1 finds equal ones only. Near questions also agree in numbers, negations, drugs and topic words.
    /// Near ones take about 500 MB for 1 M questions
    #[arg(long, default_value_t = 0.5)]
    pub threshold: f64,
    /// Seed of the hashes
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

/// Row of a group that stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeepAnswer {
    /// The row with the longest answer
    Longest,
    /// The first row
    First,
    /// The first row with the answer that most rows have
    MostFrequent,
}

/// A row, as far as it is compared.
struct ComparedRow {
    fingerprint: Fingerprint,
    answer_len: u32,
    answer: u64,
}

/// Runs the verb. The rows are read twice: to compare them, and to write those that stay.
///
/// # Errors
/// If a row has a mistake, or a file cannot be written.
pub(super) fn dedup(args: &DedupArgs) -> Result<Value> {
    let nearness = Nearness { threshold: args.threshold, long: false, seed: args.seed };
    let rows = compared_rows(args, nearness)?;
    let (mut fingerprints, mut answers) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
    for row in rows {
        fingerprints.push(row.fingerprint);
        answers.push((row.answer_len, row.answer));
    }
    let bar = progress("bands compared");
    let twins = earlier_twins(&fingerprints, nearness);
    bar.finish_and_clear();
    let first = first_of_group(&twins);
    let kept = kept_rows(&first, &answers, args.keep);
    let mut output = RowOutput::new(&args.out);
    let mut conflicts = 0_u64;
    for (index, row) in args.input.valid_rows()?.enumerate() {
        let InputRow { location, schema, row } = row?;
        let head = kept.get(&first[index]).copied().unwrap_or(first[index]) as usize;
        if head == index {
            output.keep(&row, &schema)?;
            continue;
        }
        let exact = fingerprints[head].exact == fingerprints[index].exact;
        let other_answer = answers[head].1 != answers[index].1;
        conflicts += u64::from(other_answer);
        let reason = if exact { "equal question" } else { "near question" };
        let details = json!({"kept_row": head + 1, "other_answer": other_answer});
        output.remove(Value::Object(row), &location, reason, details)?;
    }
    let mut groups: HashMap<u32, u32> = HashMap::new();
    first.iter().for_each(|first| *groups.entry(*first).or_default() += 1);
    let duplicates = groups.values().filter(|&&rows| rows > 1).count();
    output.finish("dedup", json!({"groups_with_duplicates": duplicates, "removed_with_another_answer": conflicts}))
}

fn compared_rows(args: &DedupArgs, nearness: Nearness) -> Result<Vec<ComparedRow>> {
    let (mut all, mut chunk) = (Vec::new(), Vec::with_capacity(CHUNK));
    let compare = |InputRow { mut row, schema, .. }: InputRow| {
        let texts = RowTexts::of(&mut row, &schema);
        let nearness = Nearness { long: schema.format == Format::Text, ..nearness };
        ComparedRow {
            fingerprint: Fingerprint::new(&texts.question, nearness),
            answer_len: texts.answer.len() as u32,
            answer: xxh3_64(texts.answer.trim().as_bytes()),
        }
    };
    for row in args.input.valid_rows()? {
        chunk.push(row?);
        if chunk.len() == CHUNK {
            all.par_extend(std::mem::take(&mut chunk).into_par_iter().map(compare));
        }
    }
    all.par_extend(chunk.into_par_iter().map(compare));
    Ok(all)
}

/// Returns the row of each group that stays, by the group's first row.
fn kept_rows(first: &[u32], answers: &[(u32, u64)], keep: KeepAnswer) -> HashMap<u32, u32> {
    let mut frequency: HashMap<(u32, u64), u32> = HashMap::new();
    if keep == KeepAnswer::MostFrequent {
        first.iter().zip(answers).for_each(|(first, answer)| *frequency.entry((*first, answer.1)).or_default() += 1);
    }
    let rank = |row: u32| match keep {
        KeepAnswer::First => 0,
        KeepAnswer::Longest => answers[row as usize].0,
        KeepAnswer::MostFrequent => {
            let key = (first[row as usize], answers[row as usize].1);
            frequency.get(&key).copied().unwrap_or(0)
        }
    };
    let mut kept: HashMap<u32, u32> = HashMap::new();
    for (row, first) in (0_u32..).zip(first) {
        let best = kept.entry(*first).or_insert(row);
        if rank(row) > rank(*best) {
            *best = row;
        }
    }
    kept
}
