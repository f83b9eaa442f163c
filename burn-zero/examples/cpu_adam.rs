//! Benchmark of Adam on the host: `cargo run --release --example cpu_adam [MILLIONS]`, with RAYON_NUM_THREADS threads.
//! `fixtures/cpu_adam.py` compares it with torch.

use burn_zero::optimizer::{
    AdamW,
    cpu_adam::{AdamSlices, AdamUpdate, HalfCopy},
};
use std::time::Instant;

fn main() {
    let millions: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20);
    let n = millions * 1_000_000;
    let value = |i: usize| (i as f32 * 0.37).sin();
    let (mut parameter, gradient): (Vec<f32>, Vec<f32>) =
        ((0..n).map(value).collect(), (5..n + 5).map(value).collect());
    let (mut exp_avg, mut exp_avg_sq) = (vec![-0.0; n], vec![0.0; n]);
    let settings = AdamW::default();
    let mut best = f64::INFINITY;
    for step in 1..=20 {
        let update = AdamUpdate { settings, decoupled: true, lr: 1e-3, weight_decay: 0.01, grad_scale: 1.0, step };
        let (exp_avg, exp_avg_sq) = (&mut exp_avg, &mut exp_avg_sq);
        let slices = AdamSlices { parameter: &mut parameter, gradient: &gradient, exp_avg, exp_avg_sq };
        let start = Instant::now();
        update.apply(slices, HalfCopy::None);
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{:.2} ms, {:.1} GB/s", best * 1e3, 28.0 * n as f64 / best / 1e9);
}
