//! A step of generation allocates the same few bytes whatever the model and however long the text.

use burn::backend::Flex;
use burn_llama::{Generate, LlamaConfig, Settings};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Counts what is asked of the system's allocator.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is left to the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The usual number of calls, and of bytes, of a step in each of some stretches.
fn counted(layers: usize, hidden: usize) -> Vec<[usize; 2]> {
    let fields = serde_json::json!({
        "model_type": "llama", "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
    });
    let model = LlamaConfig::from_json(fields).unwrap().init::<Flex>(3, &Default::default());
    let settings = Settings { max_new_tokens: 400, ..Settings::default() };
    let mut generate = Generate::new(&model, &[vec![7; 9]], &settings).unwrap();
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
        // Others of the process, such as threads that begin, are not of every step.
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
    // On a thread of the pool, as the application does it.
    rayon::scope(|_| {
        let (small, large) = (counted(2, 64), counted(6, 256));
        for found in small.iter().chain(&large) {
            assert_eq!(found, &small[0], "calls and bytes of a step");
            assert!(found[0] <= 8 && found[1] <= 256, "a step allocates {found:?}");
        }
    });
}
