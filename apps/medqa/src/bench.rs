//! The verb `bench`: measures the speed of the forward pass, decoding and training, and the peak memory.

use crate::{
    args::{DeviceArgs, ModelArgs, WeightsArgs, parse_positive},
    backend::{Device, with_backend},
    model::{self, LoadedModel},
    recipe::WeightDtype,
    train::peak_rss_bytes,
};
use anyhow::{Result, bail};
use burn::{backend::Autodiff, module::AutodiffModule};
use burn_llama::{
    Example, Llama, SequenceLayout,
    generate::{self, Generation, GenerationConfig},
    kernel::Kernels,
};
use burn_peft::{ForwardContext, LoraConfig, adapter, param, random};
use burn_zero::{EngineConfig, optimizer::AdamW, segment::Checkpointing};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};
use std::{num::NonZeroUsize, time::Instant};

/// Parameters that the training benchmark updates.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BenchMethod {
    /// No training
    None,
    /// LoRA of rank 8 on q_proj and v_proj
    Lora,
    /// All weights
    Full,
}

/// Arguments of `bench`.
#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Tokens of the sequence in the forward benchmark, and of each row in the training benchmark
    #[arg(long, default_value_t = 512)]
    pub length: usize,
    #[command(flatten)]
    pub decode: DecodeBenchArgs,
    #[command(flatten)]
    pub training: TrainBenchArgs,
    /// Number of timed rounds; the fastest one counts
    #[arg(long, default_value = "3", value_parser = parse_positive::<NonZeroUsize>)]
    pub rounds: NonZeroUsize,
}

/// The decoding benchmark.
#[derive(Args)]
pub(crate) struct DecodeBenchArgs {
    /// Tokens of the prompt in the decoding benchmark
    #[arg(long, default_value = "32", value_parser = parse_positive::<NonZeroUsize>)]
    pub prompt: NonZeroUsize,
    /// Tokens to decode
    #[arg(long, default_value = "64", value_parser = parse_positive::<NonZeroUsize>)]
    pub new_tokens: NonZeroUsize,
}

/// The training benchmark.
#[derive(Args, Clone, Copy)]
pub(crate) struct TrainBenchArgs {
    /// Parameters to train in the training benchmark
    #[arg(long, default_value = "lora")]
    pub train: BenchMethod,
    /// Rows per training step
    #[arg(long, default_value = "2", value_parser = parse_positive::<NonZeroUsize>)]
    pub batch_size: NonZeroUsize,
    /// Train with full activation checkpointing, as with activation_checkpointing = "full" in a recipe
    #[arg(long)]
    pub recompute: bool,
}

/// Runs the benchmarks and prints the results as one JSON object.
pub(crate) fn bench(args: &BenchArgs) -> Result<()> {
    if args.length < 2 {
        bail!("--length: expected at least 2 tokens per training row, found {}", args.length);
    }
    if args.training.train == BenchMethod::Full && args.weights.weights != WeightDtype::F32 {
        bail!("--train full: trained weights are f32; leave out --weights, or use --train lora");
    }
    let device: &Device = &args.device.device;
    with_backend!(device.ensure_ready()?, |B, device| run::<B>(args, device))
}

fn run<B: Kernels>(args: &BenchArgs, device: &B::Device) -> Result<()> {
    let begin = Instant::now();
    let LoadedModel { model, .. } = model::load::<Autodiff<B>>(&args.model, args.weights.weights, device)?;
    let model = model::with_compute(model, args.weights.compute)?;
    let load_seconds = begin.elapsed().as_secs_f64();
    let inference_model = model.valid();
    let (forward, decode) = (forward(&inference_model, args)?, decode(&inference_model, args)?);
    drop(inference_model);
    let train = if args.training.train == BenchMethod::None { Value::Null } else { train(model, args)? };
    let report = json!({
        "model": args.model.model, "device": args.device.device.to_string(), "weights": args.weights.weights,
        "compute": args.weights.compute,
        "threads": std::thread::available_parallelism().map_or(1, usize::from), "load_seconds": load_seconds,
        "forward": forward, "decode": decode, "train": train, "peak_rss_bytes": peak_rss_bytes(),
    });
    println!("{report}");
    Ok(())
}

/// Returns `n` pseudo-random tokens, which depend on `row` alone.
fn random_tokens(n: usize, vocabulary: usize, row: usize) -> Vec<u32> {
    let key = random::key(&[row as u64]);
    (0..n).map(|index| (random::uniform(key, index as u64) * vocabulary as f64) as u32).collect()
}

/// Returns the time of the fastest round in seconds, after one warm-up round.
fn fastest(rounds: usize, mut round: impl FnMut() -> Result<f64>) -> Result<f64> {
    round()?;
    (0..rounds).try_fold(f64::INFINITY, |best, _| Ok(best.min(round()?)))
}

fn timed<R>(work: impl FnOnce() -> Result<R>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Measures one forward pass that computes the logits of all tokens of a sequence.
fn forward<B: Kernels>(model: &Llama<B>, args: &BenchArgs) -> Result<Value> {
    let ids = random_tokens(args.length, model.config().vocab_size, 0);
    let seconds = fastest(args.rounds.get(), || timed(|| Ok(generate::logits(model, &ids)?.into_data())))?;
    Ok(json!({ "tokens": args.length, "tokens_per_second": args.length as f64 / seconds }))
}

/// Measures greedy decoding token by token; the time of the prompt does not count.
fn decode<B: Kernels>(model: &Llama<B>, args: &BenchArgs) -> Result<Value> {
    let (length, new_tokens) = (args.decode.prompt.get(), args.decode.new_tokens.get());
    let prompt = random_tokens(length, model.config().vocab_size, 1);
    let settings = GenerationConfig { max_new_tokens: new_tokens + 1, ..GenerationConfig::default() };
    let seconds = fastest(args.rounds.get(), || {
        let mut generate = Generation::new(model, std::slice::from_ref(&prompt), &settings)?;
        generate.advance()?;
        timed(|| {
            while generate.advance()?.is_some() {}
            Ok(())
        })
    })?;
    Ok(json!({ "prompt": length, "tokens": new_tokens, "tokens_per_second": new_tokens as f64 / seconds }))
}

/// Measures training steps on rows of equal length, in which every token is learned.
fn train<B: Kernels>(mut model: Llama<Autodiff<B>>, args: &BenchArgs) -> Result<Value> {
    let TrainBenchArgs { train: method, batch_size, recompute } = args.training;
    let batch_size = batch_size.get();
    if method == BenchMethod::Lora {
        model = adapter::attach_and_freeze(model, "bench", &LoraConfig::default())?;
    }
    let vocabulary = model.config().vocab_size;
    let row = |row| Example { ids: random_tokens(args.length, vocabulary, row), loss_mask: vec![true; args.length] };
    let rows: Vec<Example> = (0..batch_size).map(row).collect();
    let checkpointing = if recompute { Checkpointing::Full } else { Checkpointing::None };
    let weight = 1.0 / (batch_size * (args.length - 1)) as f32;
    let layout = SequenceLayout::from_lengths(&vec![args.length; batch_size], true);
    let batch = [model.batch(&rows, &layout, weight, ForwardContext::default())?];
    let config = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).with_checkpointing(checkpointing);
    let mut engine = config.init(model)?;
    let seconds =
        fastest(args.rounds.get(), || timed(|| B::with_spinning_pool(|| Ok(engine.train_step(&batch, 1e-5)?))))?;
    let tokens = batch_size * args.length;
    Ok(json!({
        "method": method, "rows": batch_size, "tokens": tokens, "recompute": recompute,
        "trainable_parameters": param::count_trainable::<Autodiff<B>, _>(engine.model()), "seconds_per_step": seconds,
        "tokens_per_second": tokens as f64 / seconds,
    }))
}
