//! Measures the cost of burn-zero's segment driver: time and peak memory of one backward pass over a random model, by
//! Burn's `backward` over the whole graph, by segments whose activations are kept, and by segments that are recomputed
//! (activation checkpointing). Rounds alternate, so that a busy machine slows all three, and the fastest round of each
//! counts.
//!
//! `cargo run --release --example backward [-- ROUNDS]`

use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, backend::AutodiffBackend},
};
use burn_llama::{Batch, Example, Llama, LlamaConfig, SequenceLayout};
use burn_peft::{ForwardContext, LoraConfig, TargetModules, adapter, param};
use burn_zero::segment::{self, Checkpointing};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    error::Error,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

type Train = Autodiff<Flex>;

/// An allocator that counts the bytes in use and their peak.
struct CountingAllocator;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded unchanged to the system allocator, which upholds the contract; counting does not
// allocate.
unsafe impl GlobalAlloc for CountingAllocator {
    /// # Safety
    /// The caller upholds the contract of [`GlobalAlloc::alloc`].
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc` for `layout`, which is passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    /// # Safety
    /// The caller upholds the contract of [`GlobalAlloc::alloc_zeroed`].
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc_zeroed` for `layout`, which is passed on
        // unchanged.
        unsafe { System.alloc_zeroed(layout) }
    }

    /// # Safety
    /// The caller upholds the contract of [`GlobalAlloc::dealloc`].
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `memory` comes from `System`, since all allocations above do, with this `layout`.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// A module visitor that sums the squares of all gradients.
struct SquaredNorm<'a>(&'a <Train as AutodiffBackend>::Gradients, f64);

impl ModuleVisitor<Train> for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        if let Some(gradient) = param.val().grad(self.0) {
            self.1 += gradient.powi_scalar(2).sum().into_scalar() as f64;
        }
    }
}

/// The cost and the result of one backward pass.
struct Measurement {
    seconds: f64,
    /// The peak of the bytes in use, beyond those before the pass.
    bytes: usize,
    /// The squared norm of all gradients.
    squared_norm: f64,
}

/// Measures one backward pass, at whose end all gradients are alive.
fn measure(model: &Llama<Train>, batch: &Batch<Train>, way: Option<Checkpointing>) -> Measurement {
    let (before, start) = (LIVE.load(Relaxed), Instant::now());
    PEAK.store(before, Relaxed);
    let spent = || (start.elapsed().as_secs_f64(), PEAK.load(Relaxed) - before);
    match way {
        None => {
            let grads = model.batch_loss(batch).sum().backward();
            let (seconds, bytes) = spent();
            let mut norm = SquaredNorm(&grads, 0.0);
            model.visit(&mut norm);
            Measurement { seconds, bytes, squared_norm: norm.1 }
        }
        Some(checkpointing) => {
            let mut all = Vec::new();
            segment::forward_backward(model, batch, checkpointing, &mut |gradients| all.extend(gradients));
            let (seconds, bytes) = spent();
            let square = |x: Tensor<Flex, 1>| x.powi_scalar(2).sum().into_scalar() as f64;
            let squared_norm = all.into_iter().map(|gradient| square(gradient.value.flatten())).sum();
            Measurement { seconds, bytes, squared_norm }
        }
    }
}

fn compare(name: &str, model: &Llama<Train>, batch: &Batch<Train>, rounds: usize) {
    let ways = [None, Some(Checkpointing::None), Some(Checkpointing::Full)];
    let (mut seconds, mut bytes, mut norms) = ([f64::INFINITY; 3], [0; 3], [0.0; 3]);
    // The first round is a warm-up and is not counted.
    for round in 0..=rounds {
        for (index, way) in ways.into_iter().enumerate() {
            let found = measure(model, batch, way);
            (bytes[index], norms[index]) = (found.bytes, found.squared_norm);
            if round > 0 {
                seconds[index] = seconds[index].min(found.seconds);
            }
        }
    }
    println!("{name}, {} of {} values trained", param::count_trainable::<Train, _>(model), model.num_params());
    for (index, way) in ["one graph", "segments, activations kept", "segments, recomputed"].into_iter().enumerate() {
        assert!((norms[index] / norms[0] - 1.0).abs() < 1e-4, "the gradients differ: {norms:?}");
        let (time, mib) = (seconds[index], bytes[index] as f64 / (1 << 20) as f64);
        let (times, memory) = (time / seconds[0], bytes[index] as f64 / bytes[0] as f64);
        println!("  {way:28} {time:7.3} s  × {times:.2}   {mib:7.1} MiB  × {memory:.2}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let rounds = std::env::args().nth(1).map_or(Ok(7), |rounds| rounds.parse())?;
    let config = LlamaConfig::from_json(serde_json::json!({
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    }))?;
    let full = config.init::<Train>(0, &Default::default());
    let lengths = [300, 212];
    let row = |n: usize| Example { ids: (0..n).map(|i| (i * 37 % 8192) as u32).collect(), loss_mask: vec![true; n] };
    let batch =
        full.batch(&lengths.map(row), &SequenceLayout::from_lengths(&lengths, true), 0.01, ForwardContext::default())?;
    compare("all parameters", &full, &batch, rounds);

    let target_modules = TargetModules::Pattern("all-linear".into());
    let config = LoraConfig { target_modules, ..LoraConfig::default() };
    compare("LoRA", &adapter::attach_and_freeze(full, "default", &config)?, &batch, rounds);
    Ok(())
}
