//! Continues a text: `cargo run --release --example generate -- MODEL "The heart is" [ADAPTER]`, where MODEL is a
//! Hugging Face directory or a GGUF file and ADAPTER is an adapter directory of PEFT.

use burn::{backend::Flex, tensor::DType};
use burn_llama::{Checkpoint, Generation, GenerationConfig, Tokenizer};
use burn_peft::adapter;
use std::{error::Error, io::Write, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, prompt, adapters @ ..] = arguments.as_slice() else { return Err("usage: generate MODEL PROMPT".into()) };

    let checkpoint = Checkpoint::open(Path::new(path))?;
    let tokenizer = match checkpoint.gguf() {
        Some(gguf) => Tokenizer::from_gguf(gguf)?,
        None => Tokenizer::from_dir(Path::new(path))?,
    };
    let mut model = checkpoint.load::<Flex>(DType::F32, &Default::default())?;
    for directory in adapters {
        adapter::load(&mut model, directory, Path::new(directory))?;
    }

    let settings =
        GenerationConfig { max_new_tokens: 64, eos: tokenizer.eos_ids().to_vec(), ..GenerationConfig::default() };
    let mut generate = Generation::new(&model, &[tokenizer.encode(prompt, true)?], &settings)?;
    let mut stream = tokenizer.stream();
    print!("{prompt}");
    while let Some(new) = generate.advance()? {
        for id in new.into_iter().flatten() {
            print!("{}", stream.push(id)?.unwrap_or_default());
            std::io::stdout().flush()?;
        }
    }
    println!("{}", stream.finish()?.unwrap_or_default());
    Ok(())
}
