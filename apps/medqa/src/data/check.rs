//! The verb `data check`: encodes a data file as training would, and reports what training would see.

use super::{
    content::RowContent,
    encode::{EncodeOptions, EncodedRows},
    location::RowLocation,
    reader::{Row, read_each_row},
};
use crate::{
    args::{ModelArgs, RowsArgs},
    model,
    recipe::OnTooLong,
    template,
};
use anyhow::{Result, bail};
use burn_llama::{Example, Tokenizer};
use clap::Args;
use std::{fmt::Write as _, io::IsTerminal, path::PathBuf};

/// Arguments of `data check`.
#[derive(Args)]
pub struct CheckArgs {
    /// Data file to check
    pub file: PathBuf,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Maximum length of a row, in tokens
    #[arg(long, default_value_t = 512)]
    pub max_length: usize,
    /// Treatment of longer rows
    #[arg(long, default_value = "truncate")]
    pub on_too_long: OnTooLong,
}

/// The largest number of mistakes to print.
const MAX_SHOWN: usize = 10;

/// Runs the verb `data check`: prints a report on stdout.
///
/// # Errors
/// If the file or the tokenizer cannot be read, a row has a mistake, or no row has a token to learn.
pub fn check(args: &CheckArgs) -> Result<()> {
    let rows = read_each_row(&args.file, &args.rows.schema()?)?;
    let tokenizer = args.rows.template.options().apply(model::load_tokenizer(&args.model)?)?;
    // Without a chat template, every row would report the same mistake.
    if rows
        .iter()
        .any(|(_, content)| !matches!(content, Ok(RowContent::PubMedQa { .. } | RowContent::Text(_)) | Err(_)))
    {
        template::chat_template(&tokenizer)?;
    }
    let total = rows.len();
    let (encoded, mistakes) = encode_valid_rows(&tokenizer, rows, args);
    println!("{}: {total} rows, at most {} tokens each", args.file.display(), args.max_length);
    print!("{}", format_counts(&encoded, mistakes.len()));
    if let Some(problem) = encoded.beyond_positions(model::position_limit(&args.model)?) {
        println!("warning: {problem}");
    }
    if let Some(example) = encoded.examples.first() {
        let (open, close) = if std::io::stdout().is_terminal() { ("\x1b[1;32m", "\x1b[0m") } else { ("[[", "]]") };
        let text = mark_learned(&tokenizer, example, open, close)?;
        println!("\nfirst row, with the tokens to learn marked:\n{text}");
    }
    if !mistakes.is_empty() {
        println!("\nmistakes:");
        mistakes.iter().take(MAX_SHOWN).for_each(|mistake| println!("  {mistake}"));
        if mistakes.len() > MAX_SHOWN {
            println!("  and {} more", mistakes.len() - MAX_SHOWN);
        }
        bail!("{}: {} of {total} rows have a mistake", args.file.display(), mistakes.len());
    }
    encoded.require_examples(args.max_length)
}

/// Encodes the rows that have no mistake, and returns one line of text for each of the others.
fn encode_valid_rows(
    tokenizer: &Tokenizer,
    rows: Vec<(RowLocation, Result<RowContent>)>,
    args: &CheckArgs,
) -> (EncodedRows, Vec<String>) {
    let (mut encoded, mut mistakes) = (EncodedRows::default(), Vec::new());
    let (max_length, on_too_long, learn) = (args.max_length, args.on_too_long, args.rows.learn);
    let options = EncodeOptions { max_length, on_too_long, learn };
    for (location, content) in rows {
        let at = location.to_string();
        let added = content.and_then(|content| encoded.add_row(tokenizer, &Row { location, content }, options));
        mistakes.extend(added.err().map(|problem| format!("{at}: {problem:#}")));
    }
    (encoded, mistakes)
}

/// Formats the counts of rows and the lengths of the examples.
fn format_counts(encoded: &EncodedRows, mistakes: usize) -> String {
    let EncodedRows { examples, truncated, dropped, without_target, omitted, empty_thoughts } = encoded;
    let mut text = String::new();
    for (name, count) in [
        ("truncated", *truncated),
        ("dropped as too long", *dropped),
        ("without a token to learn", *without_target),
        ("with a mistake", mistakes),
        ("examples", examples.len()),
    ] {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<26}{count:>8}");
    }
    for (name, count, reason) in [
        ("earlier texts left out", *omitted, "by the chat template"),
        ("empty thoughts", *empty_thoughts, "the prompt opens one, the row has none"),
    ] {
        if count > 0 {
            let _ = writeln!(text, "{name:<26}{count:>8} ({reason})");
        }
    }
    let (all, targets) =
        (examples.iter().map(|e| e.ids.len()).collect(), examples.iter().map(Example::num_targets).collect());
    for (name, lengths) in [("tokens", all), ("tokens to learn", targets)] {
        let _ = writeln!(text, "{name:<26}{}", format_lengths(lengths));
    }
    text
}

/// Formats the minimum, median, 95th percentile (by nearest rank), maximum and sum.
fn format_lengths(mut lengths: Vec<usize>) -> String {
    lengths.sort_unstable();
    let rank = |percent: usize| {
        let rank = (lengths.len() * percent).div_ceil(100).max(1);
        lengths.get(rank - 1).copied().unwrap_or(0)
    };
    let sum: usize = lengths.iter().sum();
    format!("min {}, median {}, p95 {}, max {}, total {sum}", rank(0), rank(50), rank(95), rank(100))
}

/// Returns the text of an example, with the learned tokens between the marks `open` and `close`.
pub fn mark_learned(tokenizer: &Tokenizer, example: &Example, open: &str, close: &str) -> Result<String> {
    let (mut text, mut shown, mut from) = (String::new(), 0, 0);
    while from < example.ids.len() {
        let learned = example.loss_mask[from];
        let to = from + example.loss_mask[from..].iter().take_while(|&&other| other == learned).count();
        // The whole prefix is decoded, because a token's text may depend on the token before it.
        let whole = tokenizer.decode(&example.ids[..to], false)?;
        let piece = whole.get(shown..).unwrap_or_default();
        if learned {
            text.extend([open, piece, close]);
        } else {
            text.push_str(piece);
        }
        (from, shown) = (to, whole.len());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        assert_eq!(format_lengths((1..=20).rev().collect()), "min 1, median 10, p95 19, max 20, total 210");
        assert_eq!(format_lengths(vec![7]), "min 7, median 7, p95 7, max 7, total 7");
        assert_eq!(format_lengths(vec![]), "min 0, median 0, p95 0, max 0, total 0");
    }
}
