//! Benchmarks the matrix products (GEMM) of LLaMA's linear layers on the CPU: prints the GFLOP/s of the forward pass,
//! of the input gradients and of the weight gradients as JSON. The default sizes are those of a batch of SmolLM2-135M.
//! `tests/real/products` compares them with PyTorch's.
//!
//! ```sh
//! cargo run --release -p burn-peft-kernels --example products [f32|bf16] [TOKENS WIDTH HIDDEN KV]
//! ```

use burn::tensor::bf16;
use burn_peft_kernels::{
    MatmulPrecision,
    gemm::{GemmOptions, GemmOutput, Matrix, gemm},
};
use std::time::Instant;

/// The number of layers, large enough that no weight is still in the cache when it is needed again.
const LAYERS: usize = 8;
/// The number of measured passes over all layers, after one warm-up pass.
const ROUNDS: usize = 6;

/// Returns `n` numbers between -1 and 1.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (compute, sizes) = match arguments.split_first() {
        None => (MatmulPrecision::F32, &[][..]),
        Some((first, sizes)) if first == "f32" => (MatmulPrecision::F32, sizes),
        Some((first, sizes)) if first == "bf16" => (MatmulPrecision::Bf16, sizes),
        Some((other, _)) => return Err(format!("{other}: expected f32 or bf16")),
    };
    let sizes: Vec<usize> =
        sizes.iter().map(|size| size.parse().map_err(|e| format!("{size}: {e}"))).collect::<Result<_, _>>()?;
    let [tokens, width, hidden, kv] = match *sizes {
        [] => [768, 576, 1536, 192],
        [tokens, width, hidden, kv] => [tokens, width, hidden, kv],
        _ => return Err("expected no sizes or TOKENS WIDTH HIDDEN KV".into()),
    };
    // The shapes [out, in] of the seven projections of a layer.
    let shapes =
        [[width, width], [kv, width], [kv, width], [width, width], [hidden, width], [hidden, width], [width, hidden]];
    let most = shapes.iter().flatten().copied().max().unwrap_or_default();
    let layer = || shapes.map(|[n, k]| numbers(n * k));
    let weights: Vec<_> = (0..LAYERS).map(|_| layer()).collect();
    let halves: Vec<_> = weights
        .iter()
        .map(|layer| layer.each_ref().map(|w| w.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()))
        .collect();
    let mut gradients: Vec<_> = (0..LAYERS).map(|_| layer()).collect();
    let (x, dy) = (numbers(tokens * most), numbers(tokens * most));
    let mut y = numbers(tokens * most);
    let mut seconds = [0.0; 3];
    for round in 0..=ROUNDS {
        for layer in 0..LAYERS {
            for (which, &[n, k]) in shapes.iter().enumerate() {
                let (x, dy) = (Matrix::new(&x, [tokens, k]), Matrix::new(&dy, [tokens, n]));
                let weight = match compute {
                    MatmulPrecision::Bf16 => Matrix::from_bf16(&halves[layer][which], [n, k]),
                    _ => Matrix::new(&weights[layer][which], [n, k]),
                };
                let mut timed = |kind: usize, values: &mut [f32], stride, a, b| {
                    let start = Instant::now();
                    gemm(GemmOutput { values, stride, accumulate: false }, a, b, GemmOptions::new(compute));
                    if round > 0 {
                        seconds[kind] += start.elapsed().as_secs_f64();
                    }
                };
                timed(0, &mut y, n, x, weight.transposed());
                timed(1, &mut y, k, dy, weight);
                timed(2, &mut gradients[layer][which], k, dy.transposed(), x);
            }
        }
    }
    let weights: usize = shapes.iter().map(|[n, k]| n * k).sum();
    let work = (2 * tokens * weights * LAYERS * ROUNDS) as f64 / 1e9;
    let [forward, inputs, weights] = seconds.map(|seconds| work / seconds);
    println!("{{\"forward\": {forward:.1}, \"inputs\": {inputs:.1}, \"weights\": {weights:.1}}}");
    Ok(())
}
