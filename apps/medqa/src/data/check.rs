//! The verb `data check`: rows as training would see them, before anything is trained.

use super::{
    content::Content,
    encode::Encoded,
    source::{Place, Row, read_each},
};
use crate::{cli::CheckArgs, model};
use anyhow::{Result, bail};
use burn_llama::{Example, Tokenizer};
use std::{fmt::Write as _, io::IsTerminal};

/// So many mistakes are shown.
const SHOWN: usize = 10;

/// Prints a report on stdout.
///
/// # Errors
/// If the file or the tokenizer cannot be read, a row has a mistake, or nothing can be learned.
pub fn check(args: &CheckArgs) -> Result<()> {
    let rows = read_each(&args.file, &args.rows.schema()?)?;
    let tokenizer = model::tokenizer_of(&args.model)?;
    // Without a template every row of a chat would be the same mistake.
    if rows.iter().any(|(_, content)| !matches!(content, Ok(Content::PubMedQa { .. }) | Err(_))) {
        model::template(&tokenizer)?;
    }
    let total = rows.len();
    let (encoded, mistakes) = encode(&tokenizer, rows, args);
    println!("{}: {total} rows, at most {} tokens each", args.file.display(), args.max_length);
    print!("{}", counts(&encoded, mistakes.len()));
    if let Some(example) = encoded.examples.first() {
        let marks = if std::io::stdout().is_terminal() { ("\x1b[1;32m", "\x1b[0m") } else { ("[[", "]]") };
        println!("\nfirst row, what is learned marked:\n{}", marked(&tokenizer, example, marks)?);
    }
    if !mistakes.is_empty() {
        println!("\nmistakes:");
        mistakes.iter().take(SHOWN).for_each(|mistake| println!("  {mistake}"));
        if mistakes.len() > SHOWN {
            println!("  and {} more", mistakes.len() - SHOWN);
        }
        bail!("{}: {} of {total} rows have a mistake", args.file.display(), mistakes.len());
    }
    encoded.check(args.max_length)
}

/// The examples of the rows that have any, and a line about each that has a mistake.
fn encode(tokenizer: &Tokenizer, rows: Vec<(Place, Result<Content>)>, args: &CheckArgs) -> (Encoded, Vec<String>) {
    let (mut encoded, mut mistakes) = (Encoded::default(), Vec::new());
    for (place, content) in rows {
        let at = place.of(&args.file);
        let added = content
            .and_then(|content| encoded.add(tokenizer, &Row { place, content }, (args.max_length, args.on_too_long)));
        mistakes.extend(added.err().map(|problem| format!("{at}: {problem:#}")));
    }
    (encoded, mistakes)
}

/// What became of the rows, and the lengths of the examples.
fn counts(encoded: &Encoded, mistakes: usize) -> String {
    let Encoded { examples, truncated, dropped, without_target } = encoded;
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
    let (all, targets) =
        (examples.iter().map(|e| e.ids.len()).collect(), examples.iter().map(Example::targets).collect());
    for (name, lengths) in [("tokens", all), ("tokens to learn", targets)] {
        let _ = writeln!(text, "{name:<26}{}", spread(lengths));
    }
    text
}

/// Least, median, 95th percentile (the nearest rank), greatest and sum.
fn spread(mut lengths: Vec<usize>) -> String {
    lengths.sort_unstable();
    let rank = |percent: usize| {
        let rank = (lengths.len() * percent).div_ceil(100).max(1);
        lengths.get(rank - 1).copied().unwrap_or(0)
    };
    let sum: usize = lengths.iter().sum();
    format!("min {}, median {}, p95 {}, max {}, total {sum}", rank(0), rank(50), rank(95), rank(100))
}

/// The text of an example, what is learned between `marks`.
pub fn marked(tokenizer: &Tokenizer, example: &Example, (open, close): (&str, &str)) -> Result<String> {
    let (mut text, mut shown, mut from) = (String::new(), 0, 0);
    while from < example.ids.len() {
        let learned = example.learned[from];
        let to = from + example.learned[from..].iter().take_while(|&&other| other == learned).count();
        // The whole start is decoded, as a token's text may depend on the one before.
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
        assert_eq!(spread((1..=20).rev().collect()), "min 1, median 10, p95 19, max 20, total 210");
        assert_eq!(spread(vec![7]), "min 7, median 7, p95 7, max 7, total 7");
        assert_eq!(spread(vec![]), "min 0, median 0, p95 0, max 0, total 0");
    }
}
