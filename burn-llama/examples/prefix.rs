//! Trains a prefix (prefix tuning) on one answer, once from random numbers and once from the KV cache of a text, and
//! writes the second as an adapter directory of PEFT: `cargo run --release --example prefix -- MODEL ADAPTER`, where
//! MODEL is a Hugging Face directory.

use burn::{
    backend::{Autodiff, Flex},
    tensor::DType,
};
use burn_llama::{Checkpoint, Example, SequenceLayout, Tokenizer};
use burn_peft::{ForwardContext, PromptConfig, adapter, param};
use burn_zero::{EngineConfig, optimizer::AdamW};
use std::{error::Error, path::Path};

type Train = Autodiff<Flex>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, out] = arguments.as_slice() else { return Err("usage: prefix MODEL ADAPTER".into()) };
    let tokenizer = Tokenizer::from_dir(Path::new(path))?;
    let base = Checkpoint::open(Path::new(path))?.load::<Train>(DType::F32, &Default::default())?;

    let (prompt, answer) = (tokenizer.encode("The heart is", true)?, tokenizer.encode(" a pump of muscle.", false)?);
    let rows = [Example::new(&prompt, &answer, 512)];
    let (layout, weight) = (SequenceLayout::padded(&[rows[0].ids.len()]), 1.0 / rows[0].num_targets() as f32);
    let text =
        tokenizer.encode("You are a doctor. You answer questions about the human body in one short sentence.", true)?;
    for (start, text) in [("random numbers", None), ("a text", Some(text.as_slice()))] {
        let mut model = base.clone();
        model.prompts = vec![model.new_prompt(&PromptConfig::prefix(16), text, 0)?];
        let model = param::train_only(model, adapter::is_adapter);
        let mut engine = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).init(model)?;
        let mut losses = Vec::new();
        for _ in 0..=20 {
            let batch = engine.model().batch(&rows, &layout, weight, ForwardContext::default())?;
            losses.push(engine.train_step(&[batch], 5e-3)?.loss);
        }
        println!("from {start}: loss {:.4} at first, {:.4} after 20 steps", losses[0], losses[20]);
        engine.model().prompts.iter().try_for_each(|prompt| prompt.save(Path::new(out)))?;
    }
    Ok(())
}
