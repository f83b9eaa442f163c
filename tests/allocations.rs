//! A decoding step allocates the same small amount of memory for every model size and text length.

use burn::backend::Flex;
use burn_llama::{Generation, GenerationConfig, LlamaConfig};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A global allocator that counts the calls and bytes requested from the system allocator.
struct CountingAllocator;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded unchanged to `System`, which is a correct allocator; counting does not allocate.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: `layout` has a non-zero size, as `GlobalAlloc::alloc` requires of every caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System.alloc` with this `layout`, because `alloc` above forwards to it.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Returns the median number of allocator calls and of bytes per step, for three stretches of 100 steps each.
fn counted(layers: usize, hidden: usize) -> Vec<[usize; 2]> {
    let fields = serde_json::json!({
        "model_type": "llama", "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
    });
    let model = LlamaConfig::from_json(fields).unwrap().init::<Flex>(3, &Default::default());
    let settings = GenerationConfig { max_new_tokens: 400, ..GenerationConfig::default() };
    let mut generate = Generation::new(&model, &[vec![7; 9]], &settings).unwrap();
    let mut step = || {
        let before = [&CALLS, &BYTES].map(|counter| counter.load(Relaxed));
        generate.advance().unwrap();
        [CALLS.load(Relaxed) - before[0], BYTES.load(Relaxed) - before[1]]
    };
    for _ in 0..40 {
        step();
    }
    let stretch = |_| {
        let steps: Vec<[usize; 2]> = (0..100).map(|_| step()).collect();
        // The median ignores allocations of other threads, such as those of a starting thread.
        let usual = |part: usize| {
            let mut all: Vec<usize> = steps.iter().map(|step| step[part]).collect();
            all.sort_unstable();
            all[all.len() / 2]
        };
        [usual(0), usual(1)]
    };
    (0..3).map(stretch).collect()
}

#[test]
fn a_step_allocates_nothing_that_grows() {
    // Run on a thread of the pool, like the application.
    rayon::scope(|_| {
        let (small, large) = (counted(2, 64), counted(6, 256));
        for found in small.iter().chain(&large) {
            assert_eq!(found, &small[0], "calls and bytes of a step");
            assert!(found[0] <= 8 && found[1] <= 256, "a step allocates {found:?}");
        }
    });
}
