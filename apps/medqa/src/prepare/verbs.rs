//! The list of the verbs.

use super::{
    clean::{self, CleanArgs},
    convert::{self, ConvertRowsArgs},
    decontaminate::{self, DecontaminateArgs},
    dedup::{self, DedupArgs},
    mix::{self, MixArgs},
    report::{self, ReportArgs},
    sequence::{self, RunArgs},
    split::{self, SplitArgs},
};
use crate::data::check::{self, CheckArgs};
use anyhow::Result;
use clap::Subcommand;
use serde_json::Value;

/// A verb of `medqa data`.
#[derive(Subcommand)]
pub(crate) enum DataVerb {
    /// Count the rows of a data file and their tokens, show how the first row is learned, and list invalid rows; exit
    /// code 2 if there are any
    Check(CheckArgs),
    /// Run several of the following verbs, one on the output of the other, as a file in TOML says
    Run(RunArgs),
    #[command(flatten)]
    Step(DataStep),
}

/// A verb that can be a step of `data run`.
#[derive(Subcommand, Clone, Debug)]
pub(crate) enum DataStep {
    /// Write rows in another format (qa, alpaca, messages, sharegpt, prompt-completion) or another kind of file
    Convert(ConvertRowsArgs),
    /// Repair Unicode, HTML and white space, mask personal data, and take out rows that teach nothing
    Clean(CleanArgs),
    /// Keep one of several rows that ask the same, equally or nearly
    Dedup(DedupArgs),
    /// Take out rows that quote a test set, and list the test items that stand in the rows
    Decontaminate(DecontaminateArgs),
    /// Divide rows into training, validation and test rows; rows that ask the same stay together
    Split(SplitArgs),
    /// Mix the rows of several files by weights
    Mix(MixArgs),
    /// Describe rows on one HTML page: lengths, languages, words, duplicates and examples
    Report(ReportArgs),
}

impl DataStep {
    /// Runs the verb, and returns its counts.
    ///
    /// # Errors
    /// The mistake or failure that the verb reports.
    pub(super) fn run(&self) -> Result<Value> {
        match self {
            Self::Convert(args) => convert::convert(args),
            Self::Clean(args) => clean::clean(args),
            Self::Dedup(args) => dedup::dedup(args),
            Self::Decontaminate(args) => decontaminate::decontaminate(args),
            Self::Split(args) => split::split(args),
            Self::Mix(args) => mix::mix(args),
            Self::Report(args) => report::report(args),
        }
    }
}

/// Runs a verb of `medqa data`; prints its counts in one line of JSON.
///
/// # Errors
/// The mistake or failure that the verb reports.
pub(crate) fn data(verb: &DataVerb) -> Result<()> {
    let counts = match verb {
        DataVerb::Check(args) => return check::check(args),
        DataVerb::Run(args) => return sequence::run(args, run_step),
        DataVerb::Step(step) => step.run()?,
    };
    println!("{}", brief(counts));
    Ok(())
}

fn run_step(arguments: &[String]) -> Result<Value> {
    #[derive(clap::Parser)]
    #[command(name = "medqa data")]
    struct StepLine {
        #[command(subcommand)]
        step: DataStep,
    }
    let line = ["medqa data".to_owned()].into_iter().chain(arguments.iter().cloned());
    let parsed = <StepLine as clap::Parser>::try_parse_from(line);
    let StepLine { step } = parsed.map_err(|error| {
        let text = error.to_string();
        anyhow::anyhow!("{}", text.lines().next().unwrap_or_default().trim_start_matches("error: "))
    })?;
    Ok(brief(step.run()?))
}

/// Leaves out the parts of the counts that are long; they stand in the counts file.
fn brief(mut counts: Value) -> Value {
    if let Some(counts) = counts.as_object_mut() {
        counts.retain(|name, _| !matches!(name.as_str(), "steps" | "boilerplate" | "columns" | "report"));
    }
    counts
}
