//! The verb `data mix`: rows of several files in given shares, in one order.

use super::output::{InputRow, RowOutput};
use crate::{
    data::RowReader,
    schema::{Format, SchemaRequest},
};
use anyhow::{Result, anyhow, bail};
use burn_peft::random;
use clap::Args;
use serde_json::{Map, Value, json};
use std::{path::PathBuf, str::FromStr};

/// Arguments of `data mix`.
#[derive(Args, Clone, Debug)]
pub(crate) struct MixArgs {
    /// Files, each with its weight: the number of times that a row is taken, such as a.jsonl=2 or b.jsonl=0.5
    #[arg(required = true, value_name = "FILE[=WEIGHT]")]
    pub inputs: Vec<WeightedFile>,
    /// Format of the rows; by default it is recognized by the keys of the rows
    #[arg(long)]
    pub format: Option<Format>,
    /// File to write
    #[arg(long)]
    pub out: PathBuf,
    /// Draws sources in proportion to rows^(1/T), up to the number of all rows, instead of the weights; a higher
    /// temperature T takes more from small files
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Largest number of times that a row is taken
    #[arg(long, default_value_t = 4.0)]
    pub max_repeats: f64,
    /// Seed of the order and of the rows that are drawn
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

/// A file and its weight.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WeightedFile {
    path: PathBuf,
    weight: f64,
}

impl FromStr for WeightedFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once('=') {
            Some((path, weight)) if !path.is_empty() => {
                let weight = weight.parse().ok().filter(|weight: &f64| *weight > 0.0 && *weight <= 1000.0);
                let weight =
                    weight.ok_or_else(|| format!("expected FILE=WEIGHT with a weight above 0, found {text:?}"))?;
                Ok(Self { path: path.into(), weight })
            }
            _ => Ok(Self { path: text.into(), weight: 1.0 }),
        }
    }
}

/// Runs the verb. The rows are held in memory.
///
/// # Errors
/// If a row has a mistake, the files have different formats, or a file cannot be written.
pub(super) fn mix(args: &MixArgs) -> Result<Value> {
    let request = SchemaRequest { format: args.format, ..SchemaRequest::default() };
    let mut sources = Vec::new();
    for WeightedFile { path, .. } in &args.inputs {
        let rows: Result<Vec<InputRow>> = RowReader::open(path, &request)?.map(|row| InputRow::new(row?)).collect();
        let rows = rows?;
        if rows.is_empty() {
            bail!("{}: expected at least one row, found none", path.display());
        }
        sources.push(rows);
    }
    let weights = weights(args, &sources.iter().map(Vec::len).collect::<Vec<_>>())?;
    let mut order = Vec::new();
    for (source, (rows, weight)) in sources.iter().zip(&weights).enumerate() {
        let key = random::key(&[args.seed, source as u64]);
        let whole = weight.floor() as usize;
        (0..whole).for_each(|_| order.extend((0..rows.len()).map(|row| (source, row))));
        // The rows with the lowest random numbers are taken once more.
        let mut drawn: Vec<usize> = (0..rows.len()).collect();
        drawn.sort_by(|a, b| random::uniform(key, *a as u64).total_cmp(&random::uniform(key, *b as u64)));
        order.extend(
            drawn.into_iter().take((weight.fract() * rows.len() as f64).round() as usize).map(|row| (source, row)),
        );
    }
    let key = random::key(&[args.seed, u64::MAX]);
    let mut keyed: Vec<(u64, usize)> =
        (0..order.len()).map(|i| (random::uniform(key, i as u64).to_bits(), i)).collect();
    keyed.sort_unstable();
    let (mut output, mut taken) = (RowOutput::new(&args.out), vec![0_u64; sources.len()]);
    for (_, index) in keyed {
        let (source, row) = order[index];
        let InputRow { row, schema, .. } = &sources[source][row];
        output.keep(row, schema)?;
        taken[source] += 1;
    }
    let table = args.inputs.iter().zip(&sources).zip(weights.iter().zip(&taken));
    let table: Map<String, Value> = table
        .map(|((file, rows), (weight, taken))| {
            (file.path.display().to_string(), json!({"rows": rows.len(), "weight": weight, "taken": taken}))
        })
        .collect();
    output.finish("mix", json!({"sources": table}))
}

fn weights(args: &MixArgs, rows: &[usize]) -> Result<Vec<f64>> {
    let weights: Vec<f64> = match args.temperature {
        None => args.inputs.iter().map(|file| file.weight).collect(),
        Some(temperature) if temperature >= 1.0 && temperature.is_finite() => {
            let shares: Vec<f64> = rows.iter().map(|&rows| (rows as f64).powf(1.0 / temperature)).collect();
            let (all, sum) = (rows.iter().sum::<usize>() as f64, shares.iter().sum::<f64>());
            shares.iter().zip(rows).map(|(share, &rows)| share / sum * all / rows as f64).collect()
        }
        Some(other) => return Err(anyhow!("--temperature: expected a number of at least 1, found {other}")),
    };
    Ok(weights.into_iter().map(|weight| weight.min(args.max_repeats)).collect())
}
