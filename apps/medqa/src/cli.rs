//! Command-line interface: lists the verbs and runs the chosen one. The arguments of a verb stand beside the verb.

use crate::{
    bench, chat, doctor, estimate, eval, export, fetch, launch, logits,
    prepare::{self, DataVerb},
    quickstart, schedule, train, verb_adapters, verb_train,
};
use anyhow::Result;
use clap::{Parser, Subcommand};

/// Fine-tune, evaluate and chat with a LLaMA model on medical questions.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start here: fine-tune a model on a few hundred built-in lessons and compare before and after; takes minutes
    Quickstart(quickstart::QuickstartArgs),
    /// Download a model, unless it is already in the cache, and print its path
    FetchModel(fetch::FetchModelArgs),
    /// Fine-tune a model as described by a recipe file, or by --model and --data
    Train(verb_train::TrainArgs),
    /// Merge a checkpoint that several ranks have written in shards into one model or one adapter
    Consolidate(train::ConsolidateArgs),
    /// Evaluate a model: the loss on the answers of a dataset, or the accuracy on PubMedQA
    Eval(eval::EvalArgs),
    /// Chat with a model
    Chat(chat::ChatArgs),
    /// Export a model, with its adapters merged, as a Hugging Face directory or as a GGUF file for llama.cpp
    Export(export::ExportArgs),
    /// List adapters, merge them into a model, convert and combine them
    #[command(subcommand)]
    Adapters(verb_adapters::AdaptersVerb),
    /// Inspect a dataset, or turn what you have into rows worth training on: convert, clean, dedup, split and others
    #[command(subcommand)]
    Data(DataVerb),
    /// Check that a model, its tokenizer and your data behave in training as in chat; exit code 1 if a check fails
    Doctor(doctor::DoctorArgs),
    /// Run a command on several ranks with mpirun: medqa launch -n 2 -- train RECIPE --set parallel.zero_stage=2
    Launch(launch::LaunchArgs),
    /// Estimate the memory of a run for every ZeRO stage, optimizer offload and precision, without loading the weights
    Estimate(estimate::EstimateArgs),
    /// Show a pipeline-parallel schedule, its bubble and the largest number of live activations per rank
    Schedule(schedule::ScheduleArgs),
    /// Measure the speed of the forward pass, decoding and training, and the peak memory; prints one line of JSON
    Bench(bench::BenchArgs),
    /// Compute the logits of every token of a text and write them to a file
    Logits(logits::LogitsArgs),
}

/// Runs the verb that the command line names.
///
/// # Errors
/// The mistake or failure that the verb reports, in one line.
pub fn run(cli: Cli) -> Result<()> {
    match cli.verb {
        Verb::Quickstart(args) => quickstart::quickstart(&args),
        Verb::FetchModel(args) => fetch::fetch_model(&args),
        Verb::Train(args) => verb_train::train(args),
        Verb::Consolidate(args) => train::consolidate(&args),
        Verb::Eval(args) => eval::eval(&args),
        Verb::Chat(args) => chat::chat(&args),
        Verb::Export(args) => export::export(&args),
        Verb::Adapters(verb) => verb_adapters::adapters(&verb),
        Verb::Data(verb) => prepare::data(&verb),
        Verb::Doctor(args) => doctor::doctor(&args),
        Verb::Launch(args) => launch::launch(&args),
        Verb::Estimate(args) => estimate::estimate(&args),
        Verb::Schedule(args) => schedule::schedule(&args),
        Verb::Bench(args) => bench::bench(&args),
        Verb::Logits(args) => logits::logits(&args),
    }
}
