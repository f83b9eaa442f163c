//! Encodes texts: `cargo run --release --example tokenize -- MODEL`, where MODEL is a Hugging Face directory or a GGUF
//! file, which may hold a vocabulary alone. Reads a JSON array of texts from standard input and writes a JSON array with
//! the ids of each, without special tokens around it.

use burn_llama::{Tokenizer, checkpoint::gguf::Gguf};
use std::{error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: tokenize MODEL < TEXTS.json")?;
    let path = Path::new(&path);
    let tokenizer = if path.is_dir() { Tokenizer::from_dir(path)? } else { Tokenizer::from_gguf(&Gguf::open(path)?)? };

    let texts: Vec<String> = serde_json::from_reader(std::io::stdin().lock())?;
    let ids = texts.iter().map(|text| tokenizer.encode(text, false)).collect::<Result<Vec<_>, _>>()?;
    println!("{}", serde_json::to_string(&ids)?);
    Ok(())
}
