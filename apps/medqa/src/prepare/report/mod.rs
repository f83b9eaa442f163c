//! The verb `data report`: what stands in the rows, on one HTML page and in JSON.

mod histogram;
mod page;
mod statistics;

use super::output::{InputArgs, InputRow};
use crate::write;
use anyhow::{Context, Result, bail};
use burn_llama::Tokenizer;
use clap::Args;
use rayon::prelude::*;
use serde_json::{Value, json};
use statistics::{RowFacts, Statistics};
use std::path::PathBuf;

/// The number of rows that are worked on at a time.
const CHUNK: usize = 4096;

/// Arguments of `data report`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// HTML page to write; the same figures in JSON go to the file beside it that ends in .figures.json
    #[arg(long)]
    pub out: PathBuf,
    /// Directory with the tokenizer of the model, to count tokens too
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Maximum length of a row in training, in tokens
    #[arg(long, default_value_t = 512)]
    pub max_length: usize,
}

/// Runs the verb.
///
/// # Errors
/// If a row has a mistake, there is none, or a file cannot be written.
pub(super) fn report(args: &ReportArgs) -> Result<Value> {
    let tokenizer = args.tokenizer.as_ref().map(|path| Tokenizer::from_dir(path)).transpose()?;
    let mut statistics = Statistics::default();
    let mut rows = args.input.valid_rows()?;
    loop {
        let chunk: Vec<InputRow> = rows.by_ref().take(CHUNK).collect::<Result<_>>()?;
        if chunk.is_empty() {
            break;
        }
        let facts: Vec<RowFacts> =
            chunk.into_par_iter().map(|row| RowFacts::of(row, tokenizer.as_ref())).collect::<Result<_>>()?;
        facts.into_iter().for_each(|facts| statistics.add(facts));
    }
    if statistics.rows == 0 {
        bail!("expected at least one row, found none");
    }
    let figures = statistics.figures(args.max_length);
    let html = page::html(&figures, &statistics).context("the page cannot be drawn")?;
    write::create_parent_dir(&args.out)?;
    write::write_atomically(&args.out, html.as_bytes())?;
    write::write_atomically(&args.out.with_extension("figures.json"), format!("{figures:#}\n").as_bytes())?;
    Ok(json!({"verb": "report", "rows": statistics.rows, "page": args.out.display().to_string()}))
}
