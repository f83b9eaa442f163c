//! Trains a model on one answer with LoRA and writes the adapter as an adapter directory of PEFT:
//! `cargo run --release --example lora -- MODEL ADAPTER`, where MODEL is a Hugging Face directory.

use burn::{
    backend::{Autodiff, Flex},
    tensor::DType,
};
use burn_llama::{Checkpoint, Example, SequenceLayout, Tokenizer};
use burn_peft::{AdapterModel, ForwardContext, LoraConfig, TargetModules, adapter, param};
use burn_zero::{EngineConfig, optimizer::AdamW};
use std::{error::Error, path::Path};

type Train = Autodiff<Flex>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, out] = arguments.as_slice() else { return Err("usage: lora MODEL ADAPTER".into()) };
    let tokenizer = Tokenizer::from_dir(Path::new(path))?;
    let model = Checkpoint::open(Path::new(path))?.load::<Train>(DType::F32, &Default::default())?;

    let target_modules = TargetModules::Pattern("all-linear".into());
    let config = LoraConfig { r: 8, lora_alpha: 16.0, target_modules, ..LoraConfig::default() };
    let model = adapter::attach_and_freeze(model, "default", &config)?;
    println!("{} values are trained", param::count_trainable::<Train, _>(&model));

    let (prompt, answer) = (tokenizer.encode("The heart is", true)?, tokenizer.encode(" a pump of muscle.", false)?);
    let rows = [Example::new(&prompt, &answer, 512)];
    let (layout, weight) = (SequenceLayout::padded(&[rows[0].ids.len()]), 1.0 / rows[0].num_targets() as f32);
    let mut engine = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).init(model)?;
    for step in 1..=20 {
        let batch = engine.model().batch(&rows, &layout, weight, ForwardContext::default())?;
        let loss = engine.train_step(&[batch], 1e-3)?.loss;
        println!("step {step}: loss {loss:.4}");
    }
    Ok(engine.into_model()?.save_adapter("default", Path::new(out))?)
}
