//! The verb `data run`: several verbs, one on the output of the other, as a file in TOML says.
//!
//! ```toml
//! input = "raw/*.jsonl"
//! out = "prepared"
//!
//! [[step]]
//! verb = "clean"
//! personal = "mask"
//!
//! [[step]]
//! verb = "dedup"
//!
//! [[step]]
//! verb = "split"
//! valid = 0.05
//! ```

use crate::write;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Arguments of `data run`.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// File in TOML: the keys input and out, and a table [[step]] for each verb with the verb's options
    pub file: PathBuf,
}

/// The contents of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sequence {
    /// The first input: a path, or a list of paths.
    input: OneOrMany,
    /// The directory for all outputs.
    out: PathBuf,
    step: Vec<toml::Table>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Runs the verbs in order by `run_step`, which takes the words of a command line and returns counts. The output of
/// step 2, dedup, is `out/2-dedup.jsonl`; that of a split the directory `out/2-split`, whose training rows go on. Prints
/// one line of counts per step, and writes all to `out/counts.json`.
///
/// # Errors
/// If the file is malformed, or a step fails; the outputs of the steps before it stay.
pub(super) fn run(args: &RunArgs, run_step: fn(&[String]) -> Result<Value>) -> Result<()> {
    let at = args.file.display();
    let text = std::fs::read_to_string(&args.file).with_context(|| format!("{at}: cannot be read"))?;
    let Sequence { input, out, step } = toml::from_str(&text).map_err(|error| anyhow!("{at}: {}", one_line(&error)))?;
    if step.is_empty() {
        bail!("{at}: expected at least one [[step]], found none");
    }
    let mut input = match input {
        OneOrMany::One(path) => vec![path],
        OneOrMany::Many(paths) => paths,
    };
    let mut counts = Vec::new();
    for (number, mut options) in (1..).zip(step) {
        let verb = options.remove("verb").and_then(|verb| verb.as_str().map(str::to_owned));
        let verb = verb.with_context(|| format!("{at}: step {number}: expected the key `verb`"))?;
        let output = step_output(&out, number, &verb);
        let words = words(&verb, &input, &output, &options).with_context(|| format!("{at}: step {number}"))?;
        let done = run_step(&words).with_context(|| format!("{at}: step {number}, {verb}"))?;
        println!("{done}");
        counts.push(json!({"step": number, "arguments": words, "counts": done}));
        match verb.as_str() {
            "report" => {}
            "split" => {
                let kind = options.get("kind").and_then(toml::Value::as_str).unwrap_or("jsonl");
                input = vec![output.join(format!("train.{kind}")).display().to_string()];
            }
            _ => input = vec![output.display().to_string()],
        }
    }
    write::write_atomically(&out.join("counts.json"), format!("{:#}\n", Value::from(counts)).as_bytes())
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().lines().next().unwrap_or_default().to_owned()
}

fn step_output(out: &Path, number: usize, verb: &str) -> PathBuf {
    out.join(match verb {
        "split" => format!("{number}-split"),
        "report" => format!("{number}-report.html"),
        verb => format!("{number}-{verb}.jsonl"),
    })
}

/// Returns the words of a command line.
fn words(verb: &str, input: &[String], output: &Path, options: &toml::Table) -> Result<Vec<String>> {
    let flag = if verb == "split" { "--out-dir" } else { "--out" };
    let mut words = vec![verb.to_owned()];
    words.extend(input.iter().cloned());
    words.extend([flag.to_owned(), output.display().to_string()]);
    for (name, value) in options {
        let option = format!("--{}", name.replace('_', "-"));
        if ["--out", "--out-dir"].contains(&option.as_str()) {
            bail!("`{name}`: the outputs of all steps stand in the directory `out`");
        }
        let texts = match value {
            toml::Value::Boolean(false) => continue,
            toml::Value::Boolean(true) => {
                words.push(option);
                continue;
            }
            toml::Value::Array(items) => items.iter().map(text).collect::<Result<Vec<_>>>()?,
            other => vec![text(other)?],
        };
        texts.into_iter().for_each(|text| words.push(format!("{option}={text}")));
    }
    Ok(words)
}

fn text(value: &toml::Value) -> Result<String> {
    Ok(match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(_) | toml::Value::Float(_) => value.to_string(),
        other => bail!("expected a text or a number, found {other}"),
    })
}
