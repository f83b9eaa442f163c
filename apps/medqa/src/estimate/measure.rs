//! `estimate --measure`: runs two steps and prints the estimate beside the bytes counted in the second step and the
//! measured memory of the process.

use super::{EstimateArgs, MAX_ROW_TOKENS};
use crate::{
    backend::{Device, with_backend},
    footprint::gib,
    process,
    recipe::{MethodKind, Recipe},
    train::{self, RunSizes, World, peak_rss_bytes, rss_anon_bytes},
};
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{Example, Llama, SequenceLayout, kernel::Kernels};
use burn_peft::{DropoutKey, ForwardContext};
use burn_zero::{Engine, comm::Communicator, estimate::MemoryEstimate};
use serde_json::json;
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// The interval between two samples of the memory.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(2);

/// Samples the memory of this process in a background thread and keeps the peak.
struct PeakMemorySampler {
    peak: Arc<AtomicU64>,
    stop_flag: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl PeakMemorySampler {
    fn start() -> Result<Self> {
        let (peak, stop_flag) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (most, stop) = (peak.clone(), stop_flag.clone());
        let look = move || {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(rss_anon_bytes(), Ordering::Relaxed);
                std::thread::sleep(SAMPLE_INTERVAL);
            }
        };
        Ok(Self { peak, stop_flag, thread: std::thread::Builder::new().spawn(look)? })
    }

    fn finish(self) -> u64 {
        self.stop_flag.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        self.peak.load(Ordering::Relaxed)
    }
}

/// Runs the verb `estimate --measure`: every rank prints one line of JSON.
pub(super) fn measure(args: &EstimateArgs) -> Result<()> {
    // Otherwise the holes of a fragmented heap would be measured too.
    process::disable_memory_retention();
    let (communicator, mpi_guard) = World::join()?.into_parts();
    with_backend!(Device::default(), |B, device| measure_on::<B>(args, device, communicator))?;
    mpi_guard.finalize();
    Ok(())
}

/// Builds the recipe that the arguments describe.
fn recipe_from_args(args: &EstimateArgs) -> Result<Recipe> {
    let kind = if args.method.method == MethodKind::Full { "full" } else { "lora" };
    let folder = std::env::temp_dir().join("medqa-states");
    let mut sets = vec![
        format!("model.path={}", toml::Value::String(args.model.clone())),
        "model.dtype=f32".to_owned(),
        "data.train=none".to_owned(),
        format!("method.kind={kind}"),
        format!("method.r={}", args.method.r),
        format!("parallel.zero_stage={}", args.measure.zero_stage),
        format!("parallel.offload_optimizer={}", args.measure.offload_optimizer),
        format!("train.max_grad_norm={}", args.max_grad_norm),
    ];
    if args.method.method != MethodKind::Full {
        let names = match args.method.target_modules.as_slice() {
            [one] => toml::Value::String(one.clone()),
            names => names.to_vec().into(),
        };
        sets.push(format!("method.target_modules={names}"));
    }
    if args.recompute {
        sets.push("train.activation_checkpointing=full".to_owned());
    }
    if args.measure.offload_optimizer == "nvme" {
        sets.push(format!("parallel.nvme_path={}", toml::Value::String(folder.display().to_string())));
    }
    Recipe::parse("", Path::new("--measure"), &sets)
}

/// Returns rows of arbitrary ids with `tokens` tokens in total.
fn example_rows(tokens: u64, vocabulary: u64) -> Vec<Example> {
    let row = |number: u64| {
        let length = MAX_ROW_TOKENS.min(tokens - number * MAX_ROW_TOKENS) as usize;
        let ids: Vec<u32> = (0..length as u64).map(|i| ((i * 7919 + number * 104_729) % vocabulary) as u32).collect();
        Example { loss_mask: (0..length).map(|i| i > 0).collect(), ids }
    };
    (0..tokens.div_ceil(MAX_ROW_TOKENS)).map(row).collect()
}

/// The memory of a training step.
struct MeasuredSteps {
    /// The bytes that the engine has counted.
    counted_memory: MemoryEstimate,
    /// The largest anonymous resident memory of the process, in bytes.
    peak_rss_anon: u64,
}

/// Runs two steps on one micro-batch of `rows`, and measures the second.
fn run_two_steps<B: Kernels>(
    engine: &mut Engine<Autodiff<B>, Llama<Autodiff<B>>>,
    rows: &[Example],
    args: &EstimateArgs,
) -> Result<MeasuredSteps> {
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let layout = SequenceLayout::from_lengths(&lengths, true);
    let (mut counted_memory, mut sampler) = (MemoryEstimate::default(), None);
    for step in 0..2 {
        // Memory freed after loading and sharding is not part of a step; it shows in VmHWM.
        process::trim_heap();
        sampler.replace(PeakMemorySampler::start()?).map(PeakMemorySampler::finish);
        let noise = DropoutKey { seed: 0, step, tokens: layout.dropout_tokens(0) };
        let batch = [engine.model().batch(rows, &layout, 1.0 / args.tokens as f32, ForwardContext::training(noise))?];
        // The step frees accumulated gradients, and the first step allocates the moments.
        if args.max_grad_norm == 0.0 {
            engine.train_step(&batch, 1e-5)?;
            counted_memory = engine.memory();
        } else {
            engine.forward_backward(&batch)?;
            counted_memory = engine.memory();
            engine.step(1e-5)?;
        }
    }
    engine.barrier()?;
    Ok(MeasuredSteps { counted_memory, peak_rss_anon: sampler.map_or(0, PeakMemorySampler::finish) })
}

/// Creates the engine of the recipe, which owns the model.
fn engine<B: Kernels>(
    recipe: &Recipe,
    device: &B::Device,
    communicator: Box<dyn Communicator>,
) -> Result<Engine<Autodiff<B>, Llama<Autodiff<B>>>> {
    let (loader, loaded) = train::ModelLoader::<B>::open(recipe, communicator.world_size(), device)?;
    let model = train::apply_method(loaded.model, &loaded.tokenizer, recipe)?.model;
    loader.engine(model, &loaded.tokenizer, train::engine_config(recipe, communicator)?)
}

/// Runs two steps of the run that the arguments describe, and writes their trace to `path`.
pub(super) fn trace_two_steps(args: &EstimateArgs, path: &Path) -> Result<()> {
    let (communicator, mpi_guard) = World::join()?.into_parts();
    with_backend!(Device::default(), |B, device| trace_on::<B>(args, path, device, communicator))?;
    mpi_guard.finalize();
    Ok(())
}

fn trace_on<B: Kernels>(
    args: &EstimateArgs,
    path: &Path,
    device: &B::Device,
    communicator: Box<dyn Communicator>,
) -> Result<()> {
    let recipe = recipe_from_args(args)?;
    let mut engine = engine::<B>(&recipe, device, communicator)?;
    let rows = example_rows(args.tokens, engine.model().config().vocab_size as u64);
    run_two_steps(&mut engine, &rows, args)?;
    Ok(engine.write_trace(path)?)
}

fn measure_on<B: Kernels>(args: &EstimateArgs, device: &B::Device, communicator: Box<dyn Communicator>) -> Result<()> {
    let (recipe, before) = (recipe_from_args(args)?, rss_anon_bytes());
    let mut engine = engine::<B>(&recipe, device, communicator)?;
    let rows = example_rows(args.tokens, engine.model().config().vocab_size as u64);
    let sizes = RunSizes {
        trained: engine.trainable_parameters() as u64,
        tokens: args.tokens,
        ..RunSizes::lower_bound(engine.model().config(), &recipe, engine.world() as u64)
    };
    let MeasuredSteps { counted_memory, peak_rss_anon } = run_two_steps(&mut engine, &rows, args)?;
    let (peak, estimated) = (engine.peak_memory(), sizes.footprint(&recipe).peak_memory());
    let all = peak_rss_anon.saturating_sub(before);
    let states = counted_memory.total();
    let line = json!({
        "rank": engine.rank(), "world": engine.world(), "zero_stage": args.measure.zero_stage,
        "weights": counted_memory.parameters + counted_memory.frozen, "gradients": counted_memory.gradients,
        "master": counted_memory.master, "moments": counted_memory.moments, "host": counted_memory.host,
        "live_gradients": peak.gradients, "buckets": peak.buckets, "gathered": peak.gathered,
        "states_counted_gib": gib(states), "states_estimated_gib": gib(estimated.total() - estimated.activations - estimated.buffers),
        "peak_rss_anon_gib": gib(all), "vm_hwm_gib": gib(peak_rss_bytes()), "estimated_gib": gib(estimated.total()),
        "estimated_to_measured": estimated.total() as f64 / all as f64,
    });
    println!("{line}");
    Ok(())
}
