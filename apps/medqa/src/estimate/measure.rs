//! An estimate beside the truth: two steps, the bytes of the second counted and the process measured meanwhile.

use super::gib;
use crate::{
    backend::{Device, on},
    cli::EstimateArgs,
    model, process,
    recipe::{MethodKind, Recipe},
    train::{self, Load, World, held, most_held},
};
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{Example, Layout, kernel::Kernels};
use burn_peft::{Noise, Pass, param};
use burn_zero::{comm::Communicator, estimate::Memory};
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

/// The longest row that is made.
const ROW: u64 = 512;
/// How often the process is looked at.
const PAUSE: Duration = Duration::from_millis(2);

/// Watches the memory of this process from a thread of its own.
struct Watch {
    peak: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watch {
    fn begin() -> Result<Self> {
        let (peak, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (most, stop) = (peak.clone(), end.clone());
        let look = move || {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(held(), Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
        };
        Ok(Self { peak, end, thread: std::thread::Builder::new().spawn(look)? })
    }

    fn peak(self) -> u64 {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        self.peak.load(Ordering::Relaxed)
    }
}

/// The verb `estimate --measure`: one line of JSON by each rank, in the order of ranks.
pub fn measure(args: &EstimateArgs) -> Result<()> {
    // A heap with holes would be measured else.
    process::keep_nothing();
    let (communicator, farewell) = World::join()?.divide();
    on!(Device::default(), |B, place| measured::<B>(args, place, communicator))?;
    farewell.say();
    Ok(())
}

/// The recipe of the arguments.
fn recipe(args: &EstimateArgs) -> Result<Recipe> {
    let kind = if args.method == MethodKind::Full { "full" } else { "lora" };
    let folder = std::env::temp_dir().join("medqa-states");
    let mut sets = vec![
        format!("model.path={}", toml::Value::String(args.model.clone())),
        "model.dtype=f32".to_owned(),
        "data.train=none".to_owned(),
        format!("method.kind={kind}"),
        format!("method.r={}", args.r),
        format!("parallel.zero_stage={}", args.zero_stage),
        format!("parallel.offload_optimizer={}", args.offload_optimizer),
        format!("train.max_grad_norm={}", args.max_grad_norm),
    ];
    if args.method != MethodKind::Full {
        let names = match args.target_modules.as_slice() {
            [one] => toml::Value::String(one.clone()),
            names => names.to_vec().into(),
        };
        sets.push(format!("method.target_modules={names}"));
    }
    if args.recompute {
        sets.push("train.activation_checkpointing=full".to_owned());
    }
    if args.offload_optimizer == "nvme" {
        sets.push(format!("parallel.nvme_path={}", toml::Value::String(folder.display().to_string())));
    }
    Recipe::parse("", Path::new("--measure"), &sets)
}

fn measured<B: Kernels>(args: &EstimateArgs, device: &B::Device, group: Box<dyn Communicator>) -> Result<()> {
    let (recipe, before) = (recipe(args)?, held());
    let loaded = model::base::<Autodiff<B>>(&recipe.model.path, recipe.model.dtype.unwrap_or_default(), device)?;
    let (mut model, _) = train::adapt(loaded.model, &loaded.tokenizer, &recipe)?;
    let load = Load {
        trained: param::count_trainable::<Autodiff<B>, _>(&model) as u64,
        tokens: args.tokens,
        ..Load::least(model.config(), &recipe, group.world() as u64)
    };
    let mut engine = train::engine::<B>(&recipe, group)?;
    let vocabulary = model.config().vocab_size as u64;
    let row = |number: u64| {
        let length = ROW.min(args.tokens - number * ROW) as usize;
        let ids: Vec<u32> = (0..length as u64).map(|i| ((i * 7919 + number * 104_729) % vocabulary) as u32).collect();
        Example { learned: (0..length).map(|i| i > 0).collect(), ids }
    };
    let rows: Vec<Example> = (0..args.tokens.div_ceil(ROW)).map(row).collect();
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let layout = Layout::of(&lengths, true);
    let (mut counted, mut watch) = (Memory::default(), None);
    for step in 0..2 {
        // What loading and dividing have left free is no part of a step; it shows in VmHWM.
        process::give_back();
        watch.replace(Watch::begin()?).map(Watch::peak);
        let noise = Noise { seed: 0, step, tokens: layout.tokens(0) };
        let batch = model.batch(&rows, &layout, 1.0 / args.tokens as f32, Pass::training(noise))?;
        // Gradients that wait for a step are gone after it, moments come with the first.
        if args.max_grad_norm == 0.0 {
            engine.accumulate_and_step(&mut model, &batch, 1e-5)?;
            counted = engine.memory(&model);
        } else {
            engine.accumulate(&mut model, &batch)?;
            counted = engine.memory(&model);
            engine.step(&mut model, 1e-5)?;
        }
    }
    let (peak, estimated) = (engine.peak(), load.memory(&recipe));
    engine.barrier()?;
    let all = watch.map_or(0, Watch::peak).saturating_sub(before);
    let states = counted.total();
    let line = json!({
        "rank": engine.rank(), "world": engine.world(), "zero_stage": args.zero_stage,
        "weights": counted.parameters + counted.frozen, "gradients": counted.gradients,
        "master": counted.master, "moments": counted.moments, "host": counted.host,
        "live_gradients": peak.gradients, "buckets": peak.buckets, "gathered": peak.gathered,
        "states_counted_gib": gib(states), "states_estimated_gib": gib(estimated.total() - estimated.activations - estimated.buffers),
        "peak_rss_anon_gib": gib(all), "vm_hwm_gib": gib(most_held()), "estimated_gib": gib(estimated.total()),
        "estimated_to_measured": estimated.total() as f64 / all as f64,
    });
    println!("{line}");
    Ok(())
}
