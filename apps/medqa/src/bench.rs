//! The verb `bench`: how fast a model reads, writes and learns here, and the memory that it took.

use crate::{
    backend::{Device, on},
    cli::{BenchArgs, Learned},
    model::{self, Loaded},
    recipe::Dtype,
    train::peak_rss_bytes,
};
use anyhow::{Result, bail};
use burn::{backend::Autodiff, module::AutodiffModule};
use burn_llama::{
    Example, Layout, Llama,
    generate::{self, Generate, Settings},
    kernel::Kernels,
};
use burn_peft::{LoraConfig, Pass, adapter, param, random};
use burn_zero::{Engine, optimizer::AdamW, segment::Checkpointing};
use serde_json::{Value, json};
use std::time::Instant;

/// Prints one JSON object.
pub fn bench(args: &BenchArgs) -> Result<()> {
    if args.length < 2 {
        bail!("--length: a row that is learned from has at least 2 tokens, found {}", args.length);
    }
    if args.train == Learned::Full && args.weights.weights != Dtype::F32 {
        bail!("--train full: weights that learn are f32; leave --weights out, or use --train lora");
    }
    let device: &Device = &args.device.device;
    on!(device.ready()?, |B, place| run::<B>(args, place))
}

fn run<B: Kernels>(args: &BenchArgs, place: &B::Device) -> Result<()> {
    let begin = Instant::now();
    let Loaded { model, .. } = model::load::<Autodiff<B>>(&args.model, args.weights.weights, place)?;
    let model = model::computing(model, args.weights.compute)?;
    let load_seconds = begin.elapsed().as_secs_f64();
    let still = model.valid();
    let (forward, decode) = (forward(&still, args)?, decode(&still, args)?);
    drop(still);
    let train = if args.train == Learned::None { Value::Null } else { train(model, args)? };
    let report = json!({
        "model": args.model.model, "device": args.device.device.to_string(), "weights": args.weights.weights,
        "compute": args.weights.compute,
        "threads": std::thread::available_parallelism().map_or(1, usize::from), "load_seconds": load_seconds,
        "forward": forward, "decode": decode, "train": train, "peak_rss_bytes": peak_rss_bytes(),
    });
    println!("{report}");
    Ok(())
}

/// Tokens of no meaning, the same every time.
fn tokens(n: usize, vocabulary: usize, row: usize) -> Vec<u32> {
    let key = random::key(&[row as u64]);
    (0..n).map(|index| (random::uniform(key, index as u64) * vocabulary as f64) as u32).collect()
}

/// The fastest of some rounds, in seconds, after one that does not count.
fn fastest(rounds: usize, mut round: impl FnMut() -> Result<f64>) -> Result<f64> {
    round()?;
    (0..rounds).try_fold(f64::INFINITY, |best, _| Ok(best.min(round()?)))
}

fn clocked<R>(work: impl FnOnce() -> Result<R>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64())
}

/// One sequence, the logits of all its tokens.
fn forward<B: Kernels>(model: &Llama<B>, args: &BenchArgs) -> Result<Value> {
    let ids = tokens(args.length, model.config().vocab_size, 0);
    let seconds = fastest(args.rounds.get(), || clocked(|| Ok(generate::logits(model, &ids)?.into_data())))?;
    Ok(json!({ "tokens": args.length, "tokens_per_second": args.length as f64 / seconds }))
}

/// One token after the other, greedily; the prompt's time does not count.
fn decode<B: Kernels>(model: &Llama<B>, args: &BenchArgs) -> Result<Value> {
    let prompt = tokens(args.prompt.get(), model.config().vocab_size, 1);
    let settings = Settings { max_new_tokens: args.new_tokens.get() + 1, ..Settings::default() };
    let seconds = fastest(args.rounds.get(), || {
        let mut generate = Generate::new(model, std::slice::from_ref(&prompt), &settings)?;
        generate.advance()?;
        clocked(|| {
            while generate.advance()?.is_some() {}
            Ok(())
        })
    })?;
    Ok(json!({
        "prompt": args.prompt.get(), "tokens": args.new_tokens.get(), "tokens_per_second": args.new_tokens.get() as f64 / seconds,
    }))
}

/// Steps over rows of one length, every token learned.
fn train<B: Kernels>(mut model: Llama<Autodiff<B>>, args: &BenchArgs) -> Result<Value> {
    let config = LoraConfig::default();
    if args.train == Learned::Lora {
        adapter::attach(&mut model, "bench", &config, 0)?;
        model = adapter::train_only(model, &config)?;
    }
    let vocabulary = model.config().vocab_size;
    let row = |row| Example { ids: tokens(args.length, vocabulary, row), learned: vec![true; args.length] };
    let rows: Vec<Example> = (0..args.batch_size.get()).map(row).collect();
    let checkpointing = if args.recompute { Checkpointing::Full } else { Checkpointing::None };
    let mut engine = Engine::<Autodiff<B>>::new(AdamW::default(), Some(1.0), checkpointing);
    let weight = 1.0 / (args.batch_size.get() * (args.length - 1)) as f32;
    let layout = Layout::of(&vec![args.length; args.batch_size.get()], true);
    let batch = model.batch(&rows, &layout, weight, Pass::default())?;
    let seconds = fastest(args.rounds.get(), || {
        clocked(|| {
            B::at_work(|| {
                engine.accumulate(&mut model, &batch)?;
                Ok(engine.step(&mut model, 1e-5)?)
            })
        })
    })?;
    let tokens = args.batch_size.get() * args.length;
    Ok(json!({
        "method": args.train, "rows": args.batch_size.get(), "tokens": tokens, "recompute": args.recompute,
        "trainable_parameters": param::count_trainable::<Autodiff<B>, _>(&model), "seconds_per_step": seconds,
        "tokens_per_second": tokens as f64 / seconds,
    }))
}
