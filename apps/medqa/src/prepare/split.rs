//! The verb `data split`: training, validation and test rows, none of which asks what a row of another part asks.

use super::{
    assign::{SplitPart, SplitShares},
    groups::{Fingerprint, Nearness},
    output::{InputArgs, InputRow, RowOutput},
    texts::RowTexts,
};
use crate::schema::Format;
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Arguments of `data split`.
#[derive(Args, Clone, Debug)]
pub(crate) struct SplitArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// Directory to write train, valid and test into
    #[arg(long)]
    pub out_dir: PathBuf,
    /// Share of the validation rows
    #[arg(long, default_value_t = 0.1)]
    pub valid: f64,
    /// Share of the test rows
    #[arg(long, default_value_t = 0.0)]
    pub test: f64,
    /// Column whose value decides, such as a patient, a source or a topic; by default near questions go to one part
    #[arg(long)]
    pub by: Option<String>,
    /// Ending of the files: jsonl, json, csv, tsv or parquet
    #[arg(long, default_value = "jsonl")]
    pub kind: String,
    /// Seed of the hash that decides
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

/// Runs the verb. A row goes where the hash of its group says, so that rows never move when others are added behind
/// them; a new row that is near to rows of two parts is taken out.
///
/// # Errors
/// If the shares are not possible, a row has a mistake or lacks the column, or a part has no row.
pub(super) fn split(args: &SplitArgs) -> Result<Value> {
    let shares = SplitShares { valid: args.valid, test: args.test, seed: args.seed };
    let possible =
        args.valid >= 0.0 && args.test >= 0.0 && args.valid + args.test > 0.0 && args.valid + args.test < 1.0;
    if !possible {
        bail!(
            "--valid, --test: expected shares whose sum is above 0 and below 1, found {} and {}",
            args.valid,
            args.test
        );
    }
    let parts = parts(args, shares)?;
    let file = |name: &str| args.out_dir.join(format!("{name}.{}", args.kind));
    let mut outputs = [("train", SplitPart::Train), ("valid", SplitPart::Valid), ("test", SplitPart::Test)]
        .map(|(name, part)| (name, part, RowOutput::new(&file(name)), 0_u64));
    let mut between = 0_u64;
    for (row, part) in args.input.valid_rows()?.zip(&parts) {
        let InputRow { location, schema, row } = row?;
        match outputs.iter_mut().find(|(_, known, ..)| known == part) {
            Some((_, _, output, rows)) => {
                output.keep(&row, &schema)?;
                *rows += 1;
            }
            None => {
                between += 1;
                let [(_, _, train, _), ..] = &mut outputs;
                train.remove(Value::Object(row), &location, "near to rows of two parts", Value::Null)?;
            }
        }
    }
    let counts: Vec<(&str, u64)> = outputs.iter().map(|(name, _, _, rows)| (*name, *rows)).collect();
    let asked = |part: &SplitPart| match part {
        SplitPart::Valid => args.valid > 0.0,
        SplitPart::Test => args.test > 0.0,
        SplitPart::Train | SplitPart::Between => true,
    };
    if let Some((name, ..)) = outputs.iter().find(|(_, part, _, rows)| *rows == 0 && asked(part)) {
        bail!(
            "{}: no row has come to the part {name}; there are too few groups for such a share",
            args.out_dir.display()
        );
    }
    for (name, _, output, rows) in outputs {
        if rows > 0 {
            output.finish(&format!("split {name}"), Value::Null)?;
        }
    }
    let of = |name: &str| counts.iter().find(|(known, _)| *known == name).map_or(0, |(_, rows)| *rows);
    Ok(json!({
        "verb": "split", "rows": parts.len(), "train": of("train"), "valid": of("valid"), "test": of("test"),
        "near_to_rows_of_two_parts": between,
    }))
}

fn parts(args: &SplitArgs, shares: SplitShares) -> Result<Vec<SplitPart>> {
    let nearness = Nearness { seed: args.seed, ..Nearness::questions() };
    let (mut fingerprints, mut parts) = (Vec::new(), Vec::new());
    for row in args.input.valid_rows()? {
        let InputRow { location, schema, mut row } = row?;
        match &args.by {
            Some(column) => {
                let value = row.get(column).filter(|value| !value.is_null());
                let value = value.with_context(|| format!("{location}: --by: expected the column `{column}`"))?;
                parts.push(shares.by_value(&value.to_string()));
            }
            None => {
                let nearness = Nearness { long: schema.format == Format::Text, ..nearness };
                fingerprints.push(Fingerprint::new(&RowTexts::of(&mut row, &schema).question, nearness));
            }
        }
    }
    Ok(if args.by.is_some() { parts } else { shares.by_question(&fingerprints, nearness) })
}
